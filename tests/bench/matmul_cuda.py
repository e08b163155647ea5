#!/usr/bin/env python3
"""Linear layers of many rows on a GPU, whose weight is decoded first: gq_linear with a workspace, torch.ops.gquant.linear_4bit, and the whole
weight decoded at once for torch, each in the speed of torch with a bf16 weight.

    GQUANT_LIBRARY=lib/libgquant.so python matmul_cuda.py [--bias] [--quick]

CUDA graphs of many calls over weights that are together larger than the L2 cache, medians, all in one run. Prints a table; the last
columns are the MB of memory that a call of gq_linear and of the operator takes beside its arguments. Needs torch with CUDA.
"""

import argparse
import ctypes

import bench_cuda
import torch

from gquant import _ffi, quant
from gquant.torch import ops
from gquant.torch.state import arguments

ROWS = [128, 512, 1024, 2048, 4096, 8192]


def gq_linear(weight, x, bias, y):
    """A call of gq_linear for a weight that the kernels for packed weights may take too, and its bytes of workspace."""
    handle, size = ops._borrow(weight).handle, ctypes.c_uint64()
    where = _ffi.gq_exec(device=0)
    _ffi.lib.gq_linear_workspace_size(handle, x.shape[0], 15, where, ctypes.byref(size), None)
    workspace = torch.empty(size.value, dtype=torch.uint8, device="cuda")

    def call():
        on = _ffi.gq_exec(device=0, stream=torch.cuda.current_stream().cuda_stream, workspace=workspace.data_ptr(), workspace_bytes=size.value)
        added = 0 if bias is None else bias.data_ptr()
        _ffi.lib.gq_linear(handle, x.data_ptr(), x.shape[0], 15, added, y.data_ptr(), on)

    return call, size.value


def peak(call):
    """Bytes that torch allocates for a call at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def whole(weight, x, bias):
    dense = torch.empty(*weight[5], dtype=weight[6], device="cuda")
    ops.decode(weight, dense)
    return torch.nn.functional.linear(x, dense, bias)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bias {args.bias}; speed relative to a bf16 weight's")
    print(f"{'N x K':>14} {'M':>6} {'bf16 us':>9} {'gq_linear':>10} {'operator':>9} {'whole':>7} {'MB':>5} {'MB op':>6}")
    for n, k in bench_cuda.SHAPES[:: 3 if args.quick else 1]:
        quantized, dense = bench_cuda.layers(n, k)
        weights = [arguments(*q) for q in quantized]
        dense += [w.clone() for w in dense * int(220e6 / (8 * n * k))]
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16) if args.bias else None
        for m in ROWS[:: 2 if args.quick else 1]:
            x, y = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            calls = [gq_linear(w, x, bias, y) for w in weights]
            memory = peak(lambda: torch.ops.gquant.linear_4bit.out(x, bias, *weights[0], out=y))
            count = 24 if m < 2048 else 8
            graphs = [
                bench_cuda.captured(call, count)
                for call in (
                    lambda i: torch.nn.functional.linear(x, dense[i % len(dense)], bias),
                    lambda i: calls[i % len(calls)][0](),
                    lambda i: torch.ops.gquant.linear_4bit(x, bias, *weights[i % len(weights)]),
                    lambda i: whole(weights[i % len(weights)], x, bias),
                )
            ]
            times = bench_cuda.in_turn(graphs, count)
            speeds = " ".join(f"{times[0] / t:{width}.2f}" for t, width in zip(times[1:], (10, 9, 7), strict=True))
            print(f"{f'{n}x{k}':>14} {m:>6} {times[0] * 1e6:>9.1f} {speeds} {calls[0][1] / 1e6:>5.0f} {memory / 1e6:>6.0f}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()

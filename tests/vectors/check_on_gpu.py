#!/usr/bin/env python3
"""Compares libgquant on the CPU with bitsandbytes on a CUDA GPU, on far more inputs than the golden files hold.

    GQUANT_LIBRARY=lib/libgquant.so python check_on_gpu.py

Random and hostile blocks of every dtype, for NF4, FP4 and blockwise 8-bit: normal numbers, absmax of every mantissa,
elements at thresholds and one ulp beside them, products at the edge of the subnormal numbers, raw random bits. Codes, absmax and
dequantized values must be the same bytes. Needs torch with CUDA and bitsandbytes 0.50. Prints a line per case; exit code 1 at a
difference.
"""

import ctypes
import os
import sys

import bitsandbytes.functional as F
import torch

LIBRARY = ctypes.CDLL(os.environ["GQUANT_LIBRARY"])
LIBRARY.gq_last_error.restype = ctypes.c_char_p
DTYPES = {torch.float32: 18, torch.float16: 14, torch.bfloat16: 15}
N = 1 << 24


def address(t):
    return ctypes.c_uint64(t.data_ptr())


def ok(status):
    if status:
        raise SystemExit(LIBRARY.gq_last_error().decode())


def ours4(x, kind, blocksize):
    n = x.numel()
    absmax, packed = torch.empty(-(-n // blocksize)), torch.empty((n + 1) // 2, dtype=torch.uint8)
    call = getattr(LIBRARY, f"gq_quantize_{kind}")
    ok(call(address(x), DTYPES[x.dtype], ctypes.c_int64(n), ctypes.c_int64(blocksize), address(absmax), ctypes.c_int64(absmax.numel()),
            address(packed), ctypes.c_size_t(packed.numel()), None))
    return absmax, packed


def ours8(x, blocksize):
    n = x.numel()
    absmax, codes = torch.empty(-(-n // blocksize)), torch.empty(n, dtype=torch.uint8)
    ok(LIBRARY.gq_quantize_blockwise(address(x), DTYPES[x.dtype], ctypes.c_int64(n), ctypes.c_int64(blocksize), ctypes.c_uint64(0), address(absmax),
                                     ctypes.c_int64(absmax.numel()), address(codes), ctypes.c_size_t(n), None))
    return absmax, codes


def inputs(dtype, generator):
    """(name, flat tensor) pairs; blocks are thought of as 64 elements."""
    rand = lambda *shape: torch.rand(*shape, generator=generator)
    yield "normal", torch.randn(N, generator=generator).to(dtype)
    scale = torch.exp2(rand(N // 64, 1) * 40 - 20)
    yield "scales", (torch.randn(N // 64, 64, generator=generator) * scale).flatten().to(dtype)
    bits = torch.randint(-(2**31), 2**31 - 1, (N,), generator=generator, dtype=torch.int64).to(torch.int32)
    yield "raw bits", (bits.view(torch.float32) if dtype == torch.float32 else bits[: N // 2].view(dtype)[:N]).contiguous()
    thresholds = torch.tensor([-0.8480964, -0.6106329, -0.4599953, -0.33967943, -0.23460741, -0.13791173, -0.045525018, 0.03979015, 0.12025525, 0.20352125,
                               0.29201377, 0.38931254, 0.50166342, 0.64278692, 0.86147842, 0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333])
    absmax = 1 + rand(N // 64, 1)
    near = thresholds[torch.randint(0, 22, (N // 64, 64), generator=generator)] * absmax
    steps = torch.randint(-2, 3, near.shape, generator=generator, dtype=torch.int32)
    near = (near.view(torch.int32) + steps).view(torch.float32)
    near[:, :1] = absmax
    yield "thresholds", near.flatten().to(dtype)
    if dtype == torch.float32:
        edge = -(2.0**-126) * absmax * (1 + (torch.randint(-4, 5, (N // 64, 64), generator=generator)) * 2.0**-24)
        edge[:, :1] = absmax
        yield "edge of the subnormal", edge.flatten()


def main():
    generator = torch.Generator().manual_seed(20261)
    failed = False

    def same(name, ours, theirs):
        nonlocal failed
        theirs = theirs.flatten().cpu()
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[theirs.element_size()]
        different = int((ours.view(width) != theirs.view(width)).sum())
        failed |= different > 0
        return f"{name} {different}"

    for dtype in DTYPES:
        for name, x in inputs(dtype, generator):
            on_gpu = x.cuda()
            for kind in ("nf4", "fp4"):
                for blocksize in (64, 256) if name == "normal" else (64,):
                    packed, state = F.quantize_4bit(on_gpu, blocksize=blocksize, quant_type=kind)
                    absmax, codes = ours4(x, kind, blocksize)
                    print(f"{dtype} {name} {kind} {blocksize}: {x.numel()} elements, differing:", same("absmax", absmax, state.absmax), same("bytes", codes, packed), flush=True)
            codes, state = F.quantize_blockwise(on_gpu, blocksize=256)
            absmax, ours = ours8(x, 256)
            print(f"{dtype} {name} 8-bit 256: {x.numel()} elements, differing:", same("absmax", absmax, state.absmax), same("bytes", ours, codes), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""What a call costs the host before the device has anything to do: microseconds per call, as JSON.

    GQUANT_LIBRARY=lib/libgquant.so python overhead_cuda.py

Weights are tiny, so that the device is done before the next call. Beside them is torch.add(a, b, out=c), which is one kernel too.
Needs torch with CUDA.
"""

import ctypes
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bindings" / "python"))
os.environ.setdefault("GQUANT_LIBRARY", str(ROOT / "lib" / "libgquant.so"))

import torch  # noqa: E402

import gquant.torch  # noqa: E402
from gquant import _ffi, quant  # noqa: E402
from gquant.torch.state import arguments  # noqa: E402

ROWS, COLS = 64, 128
CALLS, REPEATS = 300, 31


def microseconds(call):
    """The median over repeats of the time of one call, without waiting for the device in between."""
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return round(statistics.median(times[1:]), 3)


def borrowed(packed, state):
    """A gq_state over a plain weight."""
    shape = (ctypes.c_int64 * 2)(ROWS, COLS)
    desc = _ffi.gq_state_desc(
        format=quant.format_number(state.quant_type), dtype=15, ndim=2, shape=ctypes.addressof(shape), blocksize=state.blocksize, device=0
    )
    desc.parts.packed, desc.parts.packed_bytes = packed.data_ptr(), packed.nbytes
    desc.parts.absmax, desc.parts.absmax_bytes = state.absmax.data_ptr(), state.absmax.nbytes
    handle = ctypes.c_void_p()
    _ffi.lib.gq_state_create(ctypes.byref(desc), ctypes.byref(handle))
    return handle


def measure():
    """Microseconds by what is called."""
    gquant.prepare(0)
    weight = torch.randn(ROWS, COLS, device="cuda").bfloat16()
    other, out = torch.randn_like(weight), torch.empty_like(weight)
    x, many = (torch.randn(rows, COLS, device="cuda").bfloat16() for rows in (1, 65))
    y = x.new_empty(1, ROWS)
    dequantize, op = gquant.torch.dequantize_4bit, torch.ops.gquant.dequantize_4bit.out
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "unit": "microseconds per call"}
    result["torch.add(a, b, out=c)"] = microseconds(lambda: torch.add(weight, other, out=out))
    packed, plain = gquant.torch.quantize_4bit(weight)
    handle, function, address, size = borrowed(packed, plain), _ffi.lib.gq_dequantize, out.data_ptr(), out.nbytes
    where = _ffi.execution(device=0)
    result["gq_dequantize by ctypes"] = microseconds(lambda: function(handle, address, size, 15, where))
    bare, fixed = _ffi.bare("gq_dequantize"), (ctypes.c_uint64(address), ctypes.c_size_t(size), ctypes.c_int32(15), ctypes.byref(where))
    result["gq_dequantize by ctypes, unchecked"] = microseconds(lambda: bare(handle, *fixed))
    for name, nested in (("plain", False), ("nested", True)):
        packed, state = gquant.torch.quantize_4bit(weight, compress_statistics=nested)
        weights = arguments(packed, state)
        layer = gquant.torch.Linear4bit(COLS, ROWS, bias=False, quant_type="nf4", compress_statistics=nested, device="cuda")
        layer.load_state_dict({"weight": weight})
        result[f"gquant.torch.dequantize_4bit(out=), {name}"] = microseconds(lambda: dequantize(packed, state, out))
        result[f"torch.ops.gquant.dequantize_4bit.out, {name}"] = microseconds(lambda: op(*weights, out=out))
        result[f"gquant.torch.dequantize_4bit, {name}"] = microseconds(lambda: dequantize(packed, state))
        result[f"gquant.torch.quantize_4bit, {name}"] = microseconds(lambda: gquant.torch.quantize_4bit(weight, compress_statistics=nested))
        with torch.no_grad():
            result[f"Linear4bit, {name}"] = microseconds(lambda: layer(x))
            result[f"Linear4bit, 65 rows, {name}"] = microseconds(lambda: layer(many))
        linear = torch.ops.gquant.linear_4bit
        result[f"torch.ops.gquant.linear_4bit, {name}"] = microseconds(lambda: linear(x, None, *weights))
        result[f"torch.ops.gquant.linear_4bit.out, {name}"] = microseconds(lambda: linear.out(x, None, *weights, out=y))
    result["torch.nn.functional.linear"] = microseconds(lambda: torch.nn.functional.linear(x, weight))
    return result


def main():
    if not torch.cuda.is_available() or not gquant.devices():
        sys.exit("no CUDA device")
    print(json.dumps(measure(), indent=2))


if __name__ == "__main__":
    main()

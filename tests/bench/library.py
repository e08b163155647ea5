"""The C library and its Python binding against the issue's limits; bench.py prints the rows.

    python library.py FILE REPEAT HEADER    # FILE: a large model, HEADER: one of 1,000 tensors; prints JSON
"""

import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bindings" / "python"))

import gquant  # noqa: E402
import gquant.torch  # noqa: E402
from gquant import _ffi  # noqa: E402

SIZE = 4096


def median(times, run):
    run()
    measured = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        measured.append(time.perf_counter() - start)
    return statistics.median(measured)


def call():
    """Seconds of a call that does nothing."""
    number = ctypes.c_int32()
    argument = ctypes.byref(number)
    return median(20, lambda: [_ffi.lib.gq_format_count(argument) for _ in range(1000)]) / 1000


def read(path, repeat):
    """Seconds to read all tensors into one buffer, and those of cat, in turn."""
    ours, cat = [], []
    with gquant.open(path) as model:
        tensors = list(model.tensors.values())
        buffer = np.zeros(max(t.nbytes for t in tensors), np.uint8)
        for _ in range(repeat + 1):
            start = time.perf_counter()
            subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
            cat.append(time.perf_counter() - start)
            start = time.perf_counter()
            for t in tensors:
                t.read(buffer[: t.nbytes])
            ours.append(time.perf_counter() - start)
    return statistics.median(ours[1:]), statistics.median(cat[1:])


def dequantize(repeat):
    """Seconds of gquant.torch and of the C call below it, into the same memory."""
    packed, state = gquant.torch.quantize_4bit(torch.randn(SIZE, SIZE).bfloat16())
    out = torch.empty(SIZE, SIZE, dtype=torch.bfloat16)
    shape = (ctypes.c_int64 * 2)(SIZE, SIZE)
    desc = _ffi.gq_state_desc(format=1, dtype=15, ndim=2, shape=ctypes.addressof(shape), blocksize=64)
    for name, tensor in (("packed", packed), ("absmax", state.absmax)):
        setattr(desc.parts, name, tensor.data_ptr())
        setattr(desc.parts, name + "_bytes", tensor.numel() * tensor.element_size())
    handle = ctypes.c_void_p()
    _ffi.lib.gq_state_create(ctypes.byref(desc), ctypes.byref(handle))
    c, torch_ = [], []
    for _ in range(5):  # in turn: the machine's speed drifts
        c.append(median(repeat, lambda: _ffi.lib.gq_dequantize(handle, out.data_ptr(), out.nbytes, 15, None)))
        torch_.append(median(repeat, lambda: gquant.torch.dequantize_4bit(packed, state, out=out)))
    _ffi.lib.gq_state_free(handle)
    return statistics.median(torch_), statistics.median(c)


def main():
    model, repeat, header = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    print(json.dumps({
        "call": call(),
        "load": median(repeat, lambda: gquant.open(header).close()),
        "read": read(model, repeat),
        "dequantize": dequantize(repeat),
    }))


if __name__ == "__main__":
    main()

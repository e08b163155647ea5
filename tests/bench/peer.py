"""Measures bitsandbytes' CPU functions, the peer of the kernels, and prints seconds per call as JSON.

    python peer.py THREADS REPEAT SIZE BLOCKSIZE

A process of its own: whether malloc keeps memory is chosen by its environment.
"""

import json
import logging
import statistics
import sys
import time

import torch

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional package

import bitsandbytes  # noqa: E402
import bitsandbytes.functional as F  # noqa: E402


def median_time(call, repeat):
    times = []
    for i in range(3 + repeat):
        start = time.perf_counter()
        call()
        if i >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


threads, repeat, size, blocksize = map(int, sys.argv[1:])
torch.set_num_threads(threads)
times = {}
for mode in ("nf4", "fp4"):
    for name, dtype in {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}.items():
        weight = (torch.randn(size, size) * 0.02).to(dtype)
        packed, state = F.quantize_4bit(weight, blocksize=blocksize, quant_type=mode)
        times[f"quantize {mode} {name}"] = median_time(
            lambda w=weight, m=mode: F.quantize_4bit(w, blocksize=blocksize, quant_type=m), max(3, repeat // 4)
        )
        times[f"dequantize {mode} {name}"] = median_time(lambda p=packed, s=state: F.dequantize_4bit(p, s), repeat)
print(json.dumps({"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__, "times": times}))

#!/usr/bin/env python3
"""Measures this build against its peers and the machine's limits, and prints one table.

    make bench                  # everything; some minutes and 10 GB of disk
    make bench BENCH=--quick    # less often, and the 1 GB conversion only

Everything is measured in this run, with the same number of threads. Peers and limits: for the kernels
bitsandbytes' CPU functions and memcpy of the bytes read (quantize) or written (dequantize), for a conversion `cp`
of the same file. Results go into memory that was in use before, unless the table says otherwise: bitsandbytes as
it is called takes new memory each time, and so do both in the rows "into new memory". Times are medians. All
numbers go to build/bench/results.json.
"""

import argparse
import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import make_flux_like
import numpy as np
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[2]
GQUANT = ROOT / "bin" / "gquant"
LIBRARY = ROOT / "lib" / "libgquant.so"
FOLDER = ROOT / "build" / "bench"
KERNELS = FOLDER / "kernelbench"
SIZE, BLOCKSIZE = 4096, 64


def output(*command, env=None):
    """The JSON that a command prints."""
    text = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True, cwd=ROOT, env={**os.environ, **(env or {})}).stdout
    return json.loads(text)


# ---- kernels


def memcpy_time(size, threads, repeat):
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    step = -(-size // threads)

    def copy(i):
        begin = i * step
        ctypes.memmove(target.ctypes.data + begin, source.ctypes.data + begin, min(step, size - begin))

    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3 + repeat):
            start = time.perf_counter()
            list(pool.map(copy, range(threads)))
            times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def bench_kernels(threads, quick):
    repeat = 5 if quick else 20
    subprocess.run(["go", "build", "-trimpath", "-o", KERNELS, "./tests/bench/kernelbench"], cwd=ROOT, check=True)
    ours = output(KERNELS, "-size", SIZE, "-blocksize", BLOCKSIZE, "-threads", threads, "-repeat", repeat)
    peer = [sys.executable, Path(__file__).with_name("peer.py"), threads, repeat, SIZE, BLOCKSIZE]
    as_called = output(*peer)
    # bitsandbytes takes no memory for its results. What it allocates is new to the process each time, and touching it
    # first takes several times as long as dequantizing; unless malloc is told to keep large blocks.
    kept = output(*peer, env={"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)})
    rows = []
    for mode in ("nf4", "fp4"):
        for name, itemsize in {"bf16": 2, "f16": 2, "f32": 4}.items():
            size = SIZE * SIZE * itemsize
            limit = memcpy_time(size, threads, repeat)
            for what, own, other, goal in (
                (f"quantize {name} → {mode}", "quantize", kept, "≥ 25×, ≥ 0.3"),
                (f"dequantize {mode} → {name}", "dequantize", kept, "≥ 0.5 of limit"),
                ("… bitsandbytes as called", "dequantize", as_called, "≥ 2×"),
                ("… both into new memory", "dequantize to new memory", as_called, ""),
            ):
                seconds = statistics.median(ours["times"][f"{own} {mode} {name}"])
                theirs = other["times"][f"{own.split()[0]} {mode} {name}"]
                goal = goal if (mode, name) == ("nf4", "bf16") else ""
                rows.append(row(what, "GB/s", size / seconds / 1e9, size / theirs / 1e9, size / limit / 1e9, goal))
    return rows, {"level": ours["level"], "torch": kept["torch"], "bitsandbytes": kept["bitsandbytes"]}


# ---- conversion


def run_measured(*command):
    """Seconds and peak memory in MiB of a process that must succeed."""
    measure = [sys.executable, "-S", Path(__file__).with_name("measure.py")]
    result = output(*measure, *command)
    if result["code"]:
        raise SystemExit(f"{command} failed with exit code {result['code']}")
    return result["seconds"], result["peak"]


def read_all(path):
    with open(path, "rb", buffering=0) as f:
        buffer = bytearray(1 << 24)
        while f.readinto(buffer):
            pass


def bench_convert(gigabytes, threads, repeat):
    source = FOLDER / f"flux_like_{gigabytes}GB.safetensors"
    if not source.exists():
        make_flux_like.write(source, int(gigabytes * 1e9))
    size = source.stat().st_size
    copy, result = FOLDER / "copy.safetensors", FOLDER / "flux_like_nf4.safetensors"
    ours, peak, cp = [], [], []
    for _ in range(repeat):
        for target in (copy, result):
            target.unlink(missing_ok=True)
        read_all(source)  # into the page cache
        os.sync()  # what earlier runs wrote is not to be written during this one
        cp.append(run_measured("cp", source, copy)[0])
        copy.unlink()
        os.sync()
        seconds, memory = run_measured(GQUANT, "convert", source, "-o", result, "--threads", threads)
        ours.append(seconds)
        peak.append(memory)
    result.unlink()
    ours, cp, peak = statistics.median(ours), statistics.median(cp), max(peak)
    return [
        row(f"convert {size / 1e9:.1f} GB bf16 → nf4 (peer: cp)", "s", ours, cp, None, "≤ 1.5×"),
        row(f"… its peak memory ({size / 1e9:.1f} GB)", "MiB", peak, None, None, "< 512"),
    ]


# ---- start-up


def bench_start(repeat):
    path = FOLDER / "tensors_1000.safetensors"
    header = {f"blocks.{i}.weight": {"dtype": "BF16", "shape": [1], "data_offsets": [2 * i, 2 * i + 2]} for i in range(1000)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(2000))
    version = statistics.median(run_measured(GQUANT, "version")[0] for _ in range(repeat))
    inspect = statistics.median(run_measured(GQUANT, "inspect", path, "--json")[0] for _ in range(repeat))
    parse = statistics.median(output(KERNELS, "-header", path)["seconds"] for _ in range(repeat))
    nothing = statistics.median(run_measured("true")[0] for _ in range(repeat))
    return [
        row("gquant version (limit: true)", "ms", version * 1e3, None, nothing * 1e3, "< 30"),
        row("header of 1,000 tensors, first parse of a process", "ms", parse * 1e3, None, None, "< 10"),
        row("gquant inspect of that file", "ms", inspect * 1e3, None, nothing * 1e3, ""),
    ]


# ---- the library


def bench_library(repeat):
    """Rows of library.py; the model is the first conversion's, the header the start-up's."""
    script = Path(__file__).with_name("library.py")
    model = next(iter(sorted(FOLDER.glob("flux_like_*.safetensors"))))
    found = output(sys.executable, script, model, repeat, FOLDER / "tensors_1000.safetensors", env={"GQUANT_LIBRARY": str(LIBRARY)})
    size = model.stat().st_size
    (ours, cat), (torch, c) = found["read"], found["dequantize"]
    return [
        row("a call from Python that does nothing", "µs", found["call"] * 1e6, None, None, "< 3"),
        row("open a model of 1,000 tensors from Python", "ms", found["load"] * 1e3, None, None, "< 10"),
        row(f"read all tensors of {size / 1e9:.1f} GB (limit: cat)", "GB/s", size / ours / 1e9, None, size / cat / 1e9, "≥ 0.8"),
        row("dequantize by gquant.torch (limit: its C call)", "ms", torch * 1e3, None, c * 1e3, "≤ 1.03"),
    ]


# ---- the table


def row(what, unit, ours, peer, limit, goal):
    """Ratios are of this build to the other."""
    return {
        "what": what, "unit": unit, "gquant": ours, "peer": peer, "limit": limit,
        "to peer": ours / peer if peer else None, "to limit": ours / limit if limit else None, "goal": goal,
    }  # fmt: skip


def print_table(rows):
    def number(x, suffix=""):
        return "" if x is None else f"{x:.{0 if x >= 100 else 1 if x >= 10 else 2}f}{suffix}"

    lines = [
        [r["what"], r["unit"], number(r["gquant"]), number(r["peer"]), number(r["limit"]), number(r["to peer"], "×"), number(r["to limit"]), r["goal"]]
        for r in rows
    ]
    print(tabulate(lines, ["", "", "gquant", "peer", "limit", "to peer", "to limit", "goal"], disable_numparse=True,
                   colalign=("left", "left", "right", "right", "right", "right", "right", "left")))  # fmt: skip


def machine(threads, versions):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu, "threads": threads, "kernel": platform.release(), **versions,
        "gquant": output(GQUANT, "version", "--json")["version"], "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(FOLDER).free < 12e9:
        raise SystemExit(f"{FOLDER} needs 12 GB of free disk")
    rows, versions = bench_kernels(args.threads, args.quick)
    for gigabytes in (1,) if args.quick else (1, 4):
        rows += bench_convert(gigabytes, args.threads, 1 if args.quick else 3)
    rows += bench_start(5 if args.quick else 20)
    rows += bench_library(5 if args.quick else 20)
    about = machine(args.threads, versions)
    results = FOLDER / "results.json"
    results.write_text(json.dumps({"machine": about, "size": SIZE, "blocksize": BLOCKSIZE, "rows": rows}, indent=1) + "\n")
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(f"kernels: {SIZE}×{SIZE}, blocks of {BLOCKSIZE}; peer is bitsandbytes, limit is memcpy\n")
    print_table(rows)
    print(f"\n{results.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

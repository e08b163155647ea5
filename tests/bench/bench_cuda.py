#!/usr/bin/env python3
"""Measures the CUDA engine against its peers and the card's limits, and prints one table.

    make bench-cuda                   # two minutes; 10 GB of disk, 5 of memory
    make bench-cuda BENCH=--quick

Kernels: CUDA graphs of many calls over buffers that are together larger than the L2 cache, medians, the time of one call by the events
around a replay. Bytes count once read and once written. The peer is bitsandbytes on the same card in the same run, the limit a copy
between device buffers of the bytes that dequantizing writes (or quantizing reads), counted twice. Loading: a file on disk, in the page
cache; the peer is safetensors' load_file, the limit a copy from pinned memory in pieces of 4 MiB. Converting: from the page cache to
tmpfs. All numbers go to build/bench/cuda.json.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import bench
import make_flux_like
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bindings" / "python"))
os.environ.setdefault("GQUANT_LIBRARY", str(ROOT / "lib" / "libgquant.so"))

import overhead_cuda  # noqa: E402

import gquant  # noqa: E402
import gquant.torch  # noqa: E402
from gquant import _ffi  # noqa: E402

try:
    import bitsandbytes
    from bitsandbytes import functional as peer
except ImportError:  # the peer's columns stay empty
    bitsandbytes = peer = None

GQUANT = Path(os.environ.get("GQUANT_PROGRAM", ROOT / "bin" / "gquant"))
FOLDER = ROOT / "build" / "bench"
TMPFS = Path("/dev/shm/gquant-bench")
L2 = 300e6  # bytes of buffers that no cache holds
MIB = 1 << 20


# ---- timing


def events(run):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3


def captured(call, count):
    """A CUDA graph of call(i), i = 0 … count - 1."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    graph.replay()
    return graph


def in_turn(graphs, count, repeat=9):
    """Seconds of a call in each of some graphs of count calls, which are replayed by turns: a card that the work before has heated is slower for all."""
    times = [[events(graph.replay) for graph in graphs] for _ in range(repeat)]
    return [statistics.median(each) / count for each in zip(*times, strict=True)]


def graphed(call, count=24, repeat=9):
    """Seconds of call(i), i = 0, 1, …, in a CUDA graph of count calls."""
    return in_turn([captured(call, count)], count, repeat)[0]


def direct(call, count, repeat=5):
    """Seconds of call(i) without a graph, for what cannot be captured and takes far longer than its launch."""
    call(0)
    return statistics.median(events(lambda: [call(i) for i in range(count)]) for _ in range(repeat)) / count


def row(what, unit, ours, theirs=None, limit=None, goal="", less=False):
    """A row of bench.py's table; less: less is better, so ratios are those of the other to this build."""
    made = bench.row(what, unit, ours, theirs, limit, goal)
    if less:
        made |= {key: 1 / made[key] for key in ("to peer", "to limit") if made[key]}
    return made


# ---- kernels


def rotating(n):
    return max(2, int(L2 / (2 * n)) + 1)


def copy_speed(n):
    """TB/s that a copy of n bf16 reads and writes."""
    r = rotating(n)
    buffers = [torch.empty(n, dtype=torch.bfloat16, device="cuda").fill_(i) for i in range(r)]
    return 4 * n / graphed(lambda i: buffers[i % r].copy_(buffers[(i + 1) % r])) / 1e12


def moved(n, itemsize, blocksize, nested=False):
    blocks = n / blocksize
    return n * (itemsize + 0.5) + (blocks + blocks / 64 if nested else 4 * blocks)


def bench_dequantize(quick):
    rows = []
    for shape in [(4096, 4096), (12288, 3072)] if quick else [(3072, 3072), (4096, 4096), (12288, 3072), (8192, 8192), (16384, 32768)]:
        n, limit = shape[0] * shape[1], None
        r = rotating(n)
        limit = copy_speed(n)
        outs = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(r)]
        for nested in (False, True):
            layers, theirs = [], []
            for i in range(r):
                weight = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
                layers.append(gquant.torch.quantize_4bit(weight, compress_statistics=nested))
                if peer:
                    theirs.append(peer.quantize_4bit(weight, compress_statistics=nested, quant_type="nf4"))
                del weight
            ours = graphed(lambda i: gquant.torch.dequantize_4bit(*layers[i % r], out=outs[i % r]))
            other = graphed(lambda i: peer.dequantize_4bit(*theirs[i % r], out=outs[i % r])) if peer else None
            size = moved(n, 2, 64, nested) / 1e12
            what = f"dequantize nf4{' nested' if nested else ''} → bf16 {shape[0]}×{shape[1]}"
            goal = "≥ 1.25×, ≥ 2.6" if n >= 1e7 and not nested else ""
            rows.append(row(what, "TB/s", size / ours, size / other if other else None, limit, goal))
            if nested:
                rows.append(row("… its time against not nested", "µs", ours * 1e6, None, plain * 1e6, "≥ 0.9" if n >= 1e7 else "", less=True))
            plain = ours
        del layers, theirs, outs
    return rows


def bench_quantize(quick):
    rows, n = [], 8192 * 8192
    limit, r = copy_speed(n), rotating(n)
    cases = [("nf4", torch.bfloat16, 64), ("fp4", torch.bfloat16, 64), ("nf4", torch.float16, 64), ("nf4", torch.float32, 64)]
    cases += [("nf4", torch.bfloat16, b) for b in (32, 128, 256, 512, 1024, 2048, 4096)]
    for mode, dtype, blocksize in cases[:2] if quick else cases:
        sources = [torch.randn(n, device="cuda").to(dtype) for _ in range(r)]
        parts = [
            (torch.empty(n // 2, dtype=torch.uint8, device="cuda"), torch.empty(n // blocksize, dtype=torch.float32, device="cuda"))
            for _ in range(r)
        ]
        function, number = getattr(_ffi.lib, f"gq_quantize_{mode}"), {2: 15, 4: 18}[dtype.itemsize] if dtype != torch.float16 else 14

        def ours(i):
            (packed, absmax), on = parts[i % r], _ffi.gq_exec(device=0, stream=torch.cuda.current_stream().cuda_stream)
            function(sources[i % r].data_ptr(), number, n, blocksize, absmax.data_ptr(), absmax.numel(), packed.data_ptr(), packed.numel(), on)

        seconds, size = graphed(ours), moved(n, dtype.itemsize, blocksize) / 1e12
        # It launches on the legacy default stream, which no graph captures.
        other = direct(lambda i: peer.quantize_4bit(sources[i % r], blocksize=blocksize, quant_type=mode), 4) if peer else None
        goal = "≥ 8×, ≥ 2.2" if (mode, dtype, blocksize) == ("nf4", torch.bfloat16, 64) else "≥ 5×"
        name = str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
        rows.append(row(f"quantize {name} → {mode} b{blocksize} 8192×8192", "TB/s", size / seconds, size / other if other else None, limit, goal))
        del sources, parts
    return rows


# ---- linear layers

SHAPES = [(3072, 3072), (4096, 4096), (9216, 3072), (12288, 3072), (3072, 12288), (14336, 4096), (4096, 14336), (8192, 8192)]


def layers(n, k, nested=False):
    """Quantized weights that together are larger than any cache."""
    count = max(3, int(220e6 / (n * k * 0.5625)) + 1)
    weights = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(min(count, 4))]
    quantized = [gquant.torch.quantize_4bit(w, compress_statistics=nested) for w in weights]
    while len(quantized) < count:  # copies have addresses of their own
        packed, state = quantized[len(quantized) % len(weights)]
        quantized.append((packed.clone(), state.map(lambda t: t.clone())))
    return quantized, weights


def bench_linear(quick):
    """Geometric means over the shapes, speeds relative to cuBLAS with plain bf16 weights."""
    widths = (1, 8, 32) if quick else (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
    cells = {m: [] for m in widths}
    for n, k in SHAPES[:2] if quick else SHAPES:
        quantized, weights = layers(n, k)
        nested, _ = layers(n, k, nested=True)
        dense = weights if 8 * n * k > 220e6 else [w.clone() for w in weights * (1 + int(220e6 / (8 * n * k)))]
        arguments = [gquant.torch.state.arguments(*q) for q in quantized]
        nested = [gquant.torch.state.arguments(*q) for q in nested]
        theirs = [peer.quantize_4bit(w, compress_statistics=False, quant_type="nf4") for w in weights] if peer else []
        for m in widths:
            x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
            count = 24 if m <= 512 else 4

            def layers_of(weights):
                return captured(lambda i: torch.ops.gquant.linear_4bit(x, None, *weights[i % len(weights)]), count)  # noqa: B023

            graphs = {"cublas": captured(lambda i: torch.nn.functional.linear(x, dense[i % len(dense)]), count), "unsettled": layers_of(arguments)}
            with gquant.torch.settled_weights():
                graphs |= {"ours": layers_of(arguments), "nested": layers_of(nested)}
            if peer:
                graphs["peer"] = captured(lambda i: bitsandbytes.matmul_4bit(x, theirs[i % len(theirs)][0].t(), theirs[i % len(theirs)][1]), count)
            seconds = dict(zip(graphs, in_turn(graphs.values(), count), strict=True))
            cells[m].append({"shape": (n, k), **seconds, "bytes": moved(n * k, 0, 64) + 2 * m * (n + k)})
            del graphs
        del quantized, weights, nested, dense, arguments, theirs

    def mean(values):
        return statistics.geometric_mean(values)

    rows = []
    goals = {1: 2.6, 4: 2.6, 8: 2.6, 16: 2.2, 32: 1.7, 64: 1.7, 128: 1.5, 256: 1.1, 512: 0.95, 1024: 0.95, 4096: 0.95}
    for m, list_ in cells.items():
        ours = mean(c["cublas"] / c["ours"] for c in list_)
        other = mean(c["cublas"] / c["peer"] for c in list_) if peer else None
        roof = mean(c["bytes"] / c["ours"] for c in list_) / 1e12
        rows.append(row(f"linear nf4 M={m}, speed in cuBLAS bf16's", "×", ours, other, None, f"≥ {goals[m]}"))
        rows.append(row("… without settled_weights", "×", mean(c["cublas"] / c["unsettled"] for c in list_), other, None))
        rows.append(row("… bytes moved; with nested statistics: its time against not nested", "TB/s", roof, None, None))
        rows[-1]["to limit"] = mean(c["ours"] / c["nested"] for c in list_)
    return rows, cells


# ---- loading


def pinned_copy(size):
    """GB/s of copies from pinned memory, 4 MiB at a time, as the loader makes them."""
    host = torch.empty(64 * MIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    pieces = [(device[at : at + 4 * MIB], host[at : at + 4 * MIB]) for at in range(0, 64 * MIB, 4 * MIB)]
    count = max(1, int(size / 64 / MIB))

    def run():
        for _ in range(count):
            for to, source in pieces:
                to.copy_(source, non_blocking=True)

    run()
    return count * 64 * MIB / statistics.median(events(run) for _ in range(5)) / 1e9


def wall(run, repeat):
    times = []
    for _ in range(repeat):
        gc.collect()
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        del result
    return times


def c_load(path):
    """gq_load_model with a device: the library's own memory."""
    handle = ctypes.c_void_p()
    _ffi.lib.gq_load_model(os.fsencode(path), _ffi.gq_load_options(device=0), ctypes.byref(handle))
    _ffi.lib.gq_free_model(handle)


def bench_load(gigabytes, repeat):
    from safetensors.torch import load_file

    source = FOLDER / f"flux_like_{gigabytes}GB.safetensors"
    if not source.exists():
        make_flux_like.write(source, int(gigabytes * 1e9))
    quantized = FOLDER / "flux_like_nf4.safetensors"
    gquant.convert(source, quantized, force=True, progress=False)
    for path in (source, quantized):
        bench.read_all(path)  # into the page cache
    rows, limit = [], pinned_copy(source.stat().st_size)
    for path, what in ((source, "bf16"), (quantized, "nf4")):
        size = path.stat().st_size / 1e9
        first, *library = wall(lambda: c_load(path), repeat + 1)
        torch_first, *ours = wall(lambda: gquant.torch.load_4bit_model(path, device="cuda"), repeat + 1)
        other = wall(lambda: load_file(path, device="cuda"), 2)[1:]
        library, ours, other = map(statistics.median, (library, ours, other))
        name = f"load {size:.1f} GB of {what} to the device"
        rows.append(row(name, "GB/s", size / library, size / other, limit, "≥ 8×, ≥ 0.9" if what == "bf16" else ""))
        rows.append(row("… gquant.torch.load_4bit_model", "GB/s", size / ours, size / other, limit))
        rows.append(row("… the first call of the process", "GB/s", size / first))
    source_size = source.stat().st_size / 1e9
    return rows, source, source_size


def bench_convert(source, size, repeat):
    """Whole processes, file on tmpfs to file on tmpfs; and what the conversion itself took, without the start of CUDA."""
    target, inside, whole, peak = TMPFS / "converted.safetensors", [], [], []
    measure = [sys.executable, "-S", str(Path(__file__).with_name("measure.py"))]
    for _ in range(repeat):
        report = subprocess.run([GQUANT, "convert", source, "-o", target, "--device", "cuda:0", "--force", "--json"], check=True, stdout=subprocess.PIPE)
        inside.append(json.loads(report.stdout)["seconds"])
        done = json.loads(subprocess.run([*measure, GQUANT, "convert", source, "-o", target, "--device", "cuda:0", "--force"], check=True, stdout=subprocess.PIPE).stdout)
        if done["code"]:
            raise SystemExit(f"gquant convert failed with exit code {done['code']}")
        whole.append(done["seconds"])
        peak.append(done["peak"])
    on_cpu = TMPFS / "cpu.safetensors"
    report = subprocess.run([GQUANT, "convert", source, "-o", on_cpu, "--force", "--json"], check=True, stdout=subprocess.PIPE)
    cpu = json.loads(report.stdout)["seconds"]
    if subprocess.run(["cmp", on_cpu, target]).returncode:
        raise SystemExit("the CPU's conversion and the device's differ")
    inside, whole = statistics.median(inside), statistics.median(whole)
    return [
        row(f"convert {size:.1f} GB bf16 → nf4 on the device (peer: gquant's CPU, {os.cpu_count()} threads)", "GB/s", size / inside, size / cpu, None, "≥ 5"),
        row("… the whole process, CUDA's start included", "GB/s", size / whole),
        row("… its peak memory", "MiB", max(peak), None, None, "< 1024"),
    ]


# ---- from Python


def bench_overhead():
    found = overhead_cuda.measure()
    add = found["torch.add(a, b, out=c)"]
    return [
        row("a call by ctypes: gq_dequantize of 64×64", "µs", found["gq_dequantize by ctypes"], goal="≤ 6"),
        row("gquant.torch.dequantize_4bit(out=) (peer: torch.add out=)", "µs", found["gquant.torch.dequantize_4bit(out=), plain"], add, goal="≥ 0.5×", less=True),
        row("torch.ops.gquant.dequantize_4bit.out", "µs", found["torch.ops.gquant.dequantize_4bit.out, plain"], add, less=True),
    ]


def bench_start():
    script = "import ctypes, sys, time; t = time.perf_counter(); ctypes.CDLL(sys.argv[1]); print(time.perf_counter() - t)"
    library = os.environ["GQUANT_LIBRARY"]
    load = [float(subprocess.run([sys.executable, "-c", script, library], check=True, stdout=subprocess.PIPE).stdout) for _ in range(9)]
    script = (
        "import ctypes, sys, time; l = ctypes.CDLL(sys.argv[1]); t = time.perf_counter(); assert l.gq_device_prepare(0) == 0; print(time.perf_counter() - t)"
    )
    prepare = [float(subprocess.run([sys.executable, "-c", script, library], check=True, stdout=subprocess.PIPE).stdout) for _ in range(3)]
    return [
        row("load the library", "ms", statistics.median(load) * 1e3, goal="< 100"),
        row("gq_device_prepare, first call of a process", "ms", statistics.median(prepare) * 1e3),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["linear"], help="these rows alone")
    args = parser.parse_args()
    if not gquant.devices():
        raise SystemExit("make bench-cuda needs a CUDA device; `gquant devices` says what is missing")
    FOLDER.mkdir(parents=True, exist_ok=True)
    TMPFS.mkdir(exist_ok=True)
    try:
        rows = [] if args.only else bench_start() + bench_overhead() + bench_dequantize(args.quick) + bench_quantize(args.quick)
        linear, cells = bench_linear(args.quick)
        rows += linear
        if not args.only:
            loads, source, size = bench_load(1 if args.quick else 6, 3 if args.quick else 7)
            rows += loads + bench_convert(source, size, 1 if args.quick else 3)
    finally:
        shutil.rmtree(TMPFS)
    about = {
        "device": torch.cuda.get_device_name(), "driver": gquant.devices()[0].driver_version, "torch": torch.__version__,
        "bitsandbytes": bitsandbytes.__version__ if bitsandbytes else None, "gquant": json.loads(subprocess.run(
            [GQUANT, "version", "--json"], check=True, stdout=subprocess.PIPE).stdout)["version"],
        "date": time.strftime("%Y-%m-%d"), "peak host memory of this process, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip
    (FOLDER / "cuda.json").write_text(json.dumps({"machine": about, "rows": rows, "linear": cells}, indent=1) + "\n")
    print(", ".join(f"{k} {v}" for k, v in about.items()), end="\n\n")
    bench.print_table(rows)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Measures what ComfyUI's models are made of, with 4-bit weights as QuantizedTensors, against other weights on the same card; prints one table.

    python tests/bench/bench_comfy.py            # a minute; needs comfy-kitchen, and bitsandbytes for the peer's column
    python tests/bench/bench_comfy.py --quick

Flux blocks: a double and a single one, hidden 3072, 4096 + 512 tokens, random weights, bf16. Text encoder: the linear layers of two T5-XXL
blocks. A pass is timed with events, launches included, after a warm-up, medians. "peer" is bitsandbytes' Linear4bit, "limit" plain bf16.
A LoRA has rank 16 and is on every layer. bench_comfyui.py measures whole models in ComfyUI. All numbers go to build/bench/comfy.json.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import bench
import bench_cuda
import torch
from torch import nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bindings" / "python"))
os.environ.setdefault("GQUANT_LIBRARY", str(ROOT / "lib" / "libgquant.so"))

from comfy_kitchen.tensor import QuantizedTensor  # noqa: E402

import gquant  # noqa: E402
import gquant.comfy  # noqa: E402

try:
    import bitsandbytes
except ImportError:  # the peer's column stays empty
    bitsandbytes = None

HIDDEN, IMAGE, TEXT, HEADS = 3072, 4096, 512, 24
T5 = [(4096, 4096)] * 4 + [(10240, 4096)] * 2 + [(4096, 10240)]  # n, k
RANK = 16


# ---- kinds of linear layers


def plain(n, k):
    layer = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    layer.weight.data.normal_().mul_(k**-0.5)
    return layer.requires_grad_(False)


def packed(layout="GQuantNF4Layout", **options):
    def make(n, k):
        layer = plain(n, k)
        layer.weight = nn.Parameter(QuantizedTensor.from_float(layer.weight.data, layout, **options), requires_grad=False)
        return layer

    return make


class Dequantized(nn.Module):
    """What ComfyUI does where a format has no product of its own."""

    def __init__(self, n, k):
        super().__init__()
        self.inner = packed()(n, k)

    def forward(self, x):
        return functional.linear(x, self.inner.weight.dequantize(), self.inner.bias)


class Float8(nn.Module):
    """fp8 as ComfyUI runs it: activations are quantized, too."""

    def __init__(self, n, k):
        super().__init__()
        self.inner = packed("TensorCoreFP8Layout")(n, k)

    def forward(self, x):
        rows = QuantizedTensor.from_float(x.reshape(-1, x.shape[-1]), "TensorCoreFP8Layout")
        return functional.linear(rows, self.inner.weight, self.inner.bias).view(*x.shape[:-1], -1)


class Beside(nn.Module):
    """A LoRA added to the product with the packed weight, as gquant.comfy.lora does it."""

    def __init__(self, n, k):
        super().__init__()
        self.inner = packed()(n, k)
        self.up, self.down = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((n, RANK), (RANK, k)))

    def forward(self, x):
        y = self.inner(x)
        y.view(-1, y.shape[-1]).addmm_(functional.linear(x.reshape(-1, x.shape[-1]), self.down), self.up.t(), alpha=0.5)
        return y


def peer(n, k):
    layer = bitsandbytes.nn.Linear4bit(k, n, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4")
    layer.load_state_dict(plain(n, k).cpu().state_dict())
    return layer.cuda().requires_grad_(False)


class Flux(nn.Module):
    """A double and a single block: their linear layers, attention and activations."""

    def __init__(self, linear):
        super().__init__()
        h = HIDDEN
        shapes = {"mod": (6 * h, h), "qkv": (3 * h, h), "proj": (h, h), "up": (4 * h, h), "down": (h, 4 * h)}
        self.streams = nn.ModuleList(nn.ModuleDict({name: linear(*shape) for name, shape in shapes.items()}) for _ in range(2))
        self.mod, self.linear1, self.linear2 = linear(3 * h, h), linear(7 * h, h), linear(h, 5 * h)

    def attention(self, qkv):
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, image, text, vec):
        given, mods = [image, text], [layers["mod"](vec).chunk(6, -1) for layers in self.streams]
        normed = [modulated(x, *mod[:2]) for x, mod in zip(given, mods)]
        mixed = self.attention(torch.cat([layers["qkv"](x) for layers, x in zip(self.streams, normed)], 1)).split([IMAGE, TEXT], 1)
        results = []
        for layers, mod, x, attended in zip(self.streams, mods, given, mixed):
            x = x + mod[2] * layers["proj"](attended)
            hidden = functional.gelu(layers["up"](modulated(x, *mod[3:5])), approximate="tanh")
            results.append(x + mod[5] * layers["down"](hidden))
        x, mod = torch.cat(results, 1), self.mod(vec).chunk(3, -1)
        qkv, up = self.linear1(modulated(x, *mod[:2])).split([3 * HIDDEN, 4 * HIDDEN], -1)
        return x + mod[2] * self.linear2(torch.cat([self.attention(qkv), functional.gelu(up, approximate="tanh")], -1))


def modulated(x, shift, scale):
    return functional.layer_norm(x, (HIDDEN,)) * (1 + scale) + shift


# ---- timing


def seconds(run, repeat):
    """Median time of run(), launches included."""
    return statistics.median([bench_cuda.events(run) for _ in range(repeat + 2)][2:])


def replayed(run):
    """The same work as a CUDA graph, so that launches take no time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def faster(what, unit, ours, theirs=None, limit=None, goal=""):
    """A row of times: its ratios are those of the others to ours."""
    made = bench.row(what, unit, ours, theirs, limit, goal)
    return made | {key: 1 / made[key] for key in ("to peer", "to limit") if made[key]}


def bench_flux(repeat):
    given = [torch.randn(1, tokens, HIDDEN, device="cuda", dtype=torch.bfloat16) for tokens in (IMAGE, TEXT, 1)]

    def time_of(linear):
        torch.manual_seed(0)
        model = Flux(linear)
        return seconds(lambda: model(*given), repeat) * 1e3

    bf16, ours = time_of(plain), time_of(packed())
    theirs = time_of(peer) if bitsandbytes else None
    rows = [
        faster("Flux blocks, nf4", "ms", ours, theirs, bf16, "≥ 0.91× limit, > peer"),
        faster("Flux blocks, nf4 nested", "ms", time_of(packed(nested=True)), theirs, bf16),
        faster("Flux blocks, fp4", "ms", time_of(packed("GQuantFP4Layout")), theirs, bf16),
        faster("Flux blocks, nf4, LoRA beside it; limit: without", "ms", time_of(Beside), None, ours, "≥ 0.91× limit"),
        faster("Flux blocks, dequantize, then multiply", "ms", time_of(Dequantized), None, bf16),
    ]
    if torch.cuda.get_device_capability() >= (8, 9):
        rows.append(faster("Flux blocks, fp8", "ms", time_of(Float8), None, bf16))
    return rows


def bench_encoder(repeat):
    rows = []
    for tokens in (77, 128, 256, 512):
        given = {k: torch.randn(1, tokens, k, device="cuda", dtype=torch.bfloat16) for _, k in T5}

        def times(linear):
            blocks = [linear(n, k) for n, k in T5 * 2]  # together larger than the L2 cache

            def run():
                return [layer(given[layer.in_features]) for layer in blocks]  # noqa: B023

            return seconds(run, repeat) * 1e3, seconds(replayed(run), repeat) * 1e3

        bf16, ours, theirs = times(plain), times(packed()), times(peer) if bitsandbytes else (None, None)
        goal = "≥ 2× peer" + (", ≥ 1× limit" if tokens <= 256 else "")
        for how, *found in zip(("", ", in a CUDA graph"), ours, theirs, bf16):
            rows.append(faster(f"T5-XXL blocks, {tokens} tokens, nf4{how}", "ms", *found, goal))
    return rows


def bench_patching(repeat):
    """What a weight takes, and quantizing one that a LoRA changed."""
    rows, n, k = [], 4 * HIDDEN, HIDDEN
    for nested in (False, True):
        source, weight, changed = torch.randn(n, k, device="cuda", dtype=torch.bfloat16), None, None
        before = torch.cuda.memory_allocated()
        weight = QuantizedTensor.from_float(source, "GQuantNF4Layout", nested=nested)
        torch.cuda.synchronize()
        size = (torch.cuda.memory_allocated() - before) / (n * k)
        name = f"{n} × {k}, nf4{' nested' * nested}"
        rows.append(bench.row(f"{name}: memory of a weight", "bytes", size, None, None, "≤ 0.53" if nested else "≤ 0.57"))
        changed = weight.dequantize() + 0.01
        nearest, chance = (seconds(lambda s=s: weight.requantize_from_float(changed, stochastic_rounding=s), repeat) * 1e3 for s in (None, 7))
        rows.append(faster(f"{name}: quantize again by chance; limit: to the nearest", "ms", chance, None, nearest))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    repeat = 5 if parser.parse_args().quick else 20
    if not gquant.devices():
        raise SystemExit("this needs a CUDA device; `gquant devices` says what is missing")
    gquant.prepare(0)
    with torch.inference_mode():
        rows = bench_flux(repeat) + bench_encoder(repeat) + bench_patching(repeat)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "bitsandbytes": bitsandbytes and bitsandbytes.__version__}
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comfy.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    bench.print_table(rows)


if __name__ == "__main__":
    main()

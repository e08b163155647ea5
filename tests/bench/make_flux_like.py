#!/usr/bin/env python3
"""Writes a bf16 checkpoint with the names and shapes of Flux's transformer, of about the size asked for.

    python make_flux_like.py build/bench/flux_4GB.safetensors 4e9

Whole double and single blocks, in Flux's proportion of 1 to 2, until the size is reached. Weights are normal
numbers × 0.02, drawn once and repeated: quantizing takes no less time, drawing billions of them would.
"""

import json
import os
import struct
import sys
from pathlib import Path

import numpy as np

HIDDEN, HEAD, MLP, CONTEXT = 3072, 128, 12288, 4096
PERIOD = 1 << 24  # numbers drawn


def linear(name, rows, columns):
    return {f"{name}.weight": [rows, columns], f"{name}.bias": [rows]}


def double_block(i):
    shapes = {}
    for stream in ("img", "txt"):
        name = f"double_blocks.{i}.{stream}"
        shapes |= linear(f"{name}_mod.lin", 6 * HIDDEN, HIDDEN)
        shapes |= linear(f"{name}_attn.qkv", 3 * HIDDEN, HIDDEN)
        shapes |= {f"{name}_attn.norm.query_norm.scale": [HEAD], f"{name}_attn.norm.key_norm.scale": [HEAD]}
        shapes |= linear(f"{name}_attn.proj", HIDDEN, HIDDEN)
        shapes |= linear(f"{name}_mlp.0", MLP, HIDDEN)
        shapes |= linear(f"{name}_mlp.2", HIDDEN, MLP)
    return shapes


def single_block(i):
    name = f"single_blocks.{i}"
    return {
        **linear(f"{name}.modulation.lin", 3 * HIDDEN, HIDDEN),
        **linear(f"{name}.linear1", 3 * HIDDEN + MLP, HIDDEN),
        **linear(f"{name}.linear2", HIDDEN, HIDDEN + MLP),
        f"{name}.norm.query_norm.scale": [HEAD],
        f"{name}.norm.key_norm.scale": [HEAD],
    }


def bytes_of(shapes):
    return sum(2 * int(np.prod(s)) for s in shapes.values())


def flux_shapes(size):
    """Name → shape of tensors of at least `size` bytes in bf16, by less than a single block more."""
    shapes = {
        **linear("img_in", HIDDEN, 64),
        **linear("txt_in", HIDDEN, CONTEXT),
        **linear("time_in.in_layer", HIDDEN, 256),
        **linear("time_in.out_layer", HIDDEN, HIDDEN),
        **linear("final_layer.linear", 64, HIDDEN),
    }
    doubles = singles = 0
    while (missing := size - bytes_of(shapes)) > 0:
        if singles >= 2 * doubles and missing >= bytes_of(double_block(0)):
            shapes |= double_block(doubles)
            doubles += 1
        else:
            shapes |= single_block(singles)
            singles += 1
    return shapes


def normal_bf16(count, seed=0):
    """Normal numbers × 0.02 as bf16 bits, rounded to nearest even."""
    x = np.random.default_rng(seed).standard_normal(count, dtype=np.float32)
    x *= np.float32(0.02)
    u = x.view(np.uint32)
    return ((u + (0x7FFF + ((u >> 16) & 1))) >> 16).astype(np.uint16)


def write(path, size):
    shapes, header, offset = flux_shapes(size), {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    pool = normal_bf16(PERIOD).view(np.uint8)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for begin in range(0, offset, pool.size):
            f.write(pool[: offset - begin])
    os.replace(partial, path)
    return path


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, int(float(sys.argv[2])))
    print(target, target.stat().st_size)

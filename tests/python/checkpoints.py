"""Makes and reads the checkpoints that the tests use."""

import json
import struct
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def save(tensors, path, metadata=None):
    save_file(tensors, str(path), metadata=metadata)
    return path


def load(path):
    """All tensors of a file, or of the shards that an index names."""
    path = Path(path)
    if path.suffix == ".json":
        weight_map = json.loads(path.read_text())["weight_map"]
        tensors = {}
        for shard in sorted(set(weight_map.values())):
            part = load(path.parent / shard)
            assert all(weight_map[name] == shard for name in part), "a shard holds what the index has elsewhere"
            tensors |= part
        assert tensors.keys() == weight_map.keys()
        return tensors
    with safe_open(str(path), "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}


def metadata(path):
    with safe_open(str(path), "pt") as f:
        return f.metadata()


def header(path):
    """The header's JSON and the offset of the data, read without any library."""
    data = Path(path).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), 8 + size


def write_raw(path, head, data=b""):
    """A file with any header, valid or not."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_sparse(path, dtype, shape, name="big.weight"):
    """One huge weight of zeros that takes no space on disk."""
    size = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    for dim in shape:
        size *= dim
    write_raw(path, {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}})
    with open(path, "r+b") as f:
        f.truncate(f.seek(0, 2) + size)
    return path


def mixed(seed=0):
    """Linear layers of several shapes and dtypes beside everything that a conversion leaves alone."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, dtype=torch.bfloat16):
        return (torch.randn(*shape, generator=g) * 0.05).to(dtype)

    return {
        "embed_tokens.weight": randn(200, 64),
        "conv_in.weight": randn(32, 16, 3, 3),
        "blocks.0.norm1.weight": randn(128),
        "blocks.0.attn.q.weight": randn(96, 128),
        "blocks.0.attn.q.bias": randn(96),
        "blocks.0.attn.k.weight": randn(96, 128, dtype=torch.float16),
        "blocks.0.attn.v.weight": randn(96, 128, dtype=torch.float32),
        "blocks.0.mlp.cut.weight": randn(160, 96),  # blocks of 64 run across its rows
        "blocks.0.mlp.tail.weight": randn(70, 90),  # and the last one is not full
        "blocks.0.mlp.odd.weight": randn(65, 101, dtype=torch.float32),  # nor is the last byte
        "blocks.0.mlp.wide.weight": randn(3, 4096, dtype=torch.float16),
        "small.weight": randn(8, 8),
        "position_ids": torch.arange(77).reshape(1, 77),
    }


LAYERS = [name for name in mixed() if name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name]


def bits(tensor):
    """The bytes of a tensor, for comparisons that tell -0 from 0 and one NaN from another."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def equal_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def parts(tensors, weight):
    """A layer's statistics by the names that bitsandbytes knows them by."""
    return {name[len(weight) + 1 :]: t for name, t in tensors.items() if name.startswith(weight + ".")}


def codes(packed, count):
    """The 4-bit codes of a packed weight, the first in the high half of its byte."""
    raw = bits(packed)
    return torch.stack([raw >> 4, raw & 15], dim=1).flatten()[:count]

"""Weights that the tests quantize."""

import itertools

import torch
from comfy_kitchen.tensor import QuantizedTensor

from gquant.comfy import FP4Layout, NF4Layout

LAYOUTS = (NF4Layout, FP4Layout)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = [(layout, nested) for layout, nested in itertools.product(LAYOUTS, (False, True))]
NAMES = [f"{layout.quant_type}{'-nested' if nested else ''}" for layout, nested in KINDS]


def random(n, k, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def quantized(layout, nested=False, n=96, k=128, dtype=torch.float32, **options):
    return QuantizedTensor.from_float(random(n, k, dtype), layout.name, nested=nested, **options)


def tensors(weight):
    """All tensors of a QuantizedTensor, by name."""
    params = weight._params
    return {"qdata": weight._qdata} | {name: getattr(params, name) for name in params._tensor_fields()}


def same_bytes(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a
    )

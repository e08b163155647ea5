"""What torch's functions do with the weights of the layouts: F.linear multiplies with the packed weight.

On CUDA that is gquant::linear_4bit. On the CPU the weight is decoded and torch multiplies, so that a model gives bit for bit what it
gives with decoded weights; with GQUANT_COMFY_CPU=fused in the environment it is gquant::linear_4bit there too, which is faster and sums
in another order.

F.linear comes here as linear in inference mode, else as t and then mm or addmm. Every other function gets the decoded weight.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Optional

import torch
from comfy_kitchen.tensor import QuantizedTensor, dequantize_args, register_layout_op
from torch import Tensor
from torch.nn import functional

from ..torch import ops
from .layouts import LAYOUTS, is_4bit, weight_arguments

_aten = torch.ops.aten
_FUSED = {"cuda"} | ({"cpu"} if os.environ.get("GQUANT_COMFY_CPU") == "fused" else set())


def linear(x: Tensor, weight: QuantizedTensor, bias: Optional[Tensor]) -> Tensor:
    """x · weightᵀ + bias of x's dtype. x: [..., k], weight: [n, k], bias: [n]."""
    if x.device.type not in _FUSED:
        return functional.linear(x, weight.dequantize().to(x.dtype), bias)
    arguments = weight_arguments(weight)
    if ops.plain(x, arguments[0]):  # the same as the operator, without its own time
        return ops.linear(x, bias, arguments)
    return torch.ops.gquant.linear_4bit(x, bias, *arguments)


def _handler(op: Any) -> Callable[[Any], Any]:
    """Registers what a function of torch does with both layouts, given its arguments."""

    def register(function: Any) -> Any:
        for layout in LAYOUTS.values():
            register_layout_op(op, layout)(lambda _, args, kwargs: function(*args, **kwargs))
        return function

    return register


def _transposed(weight: Any) -> bool:
    return is_4bit(weight) and weight._params.transposed


@_handler(_aten.linear.default)
def _linear(x: Any, weight: Any, bias: Any = None) -> Tensor:
    x, bias = dequantize_args((x, bias))
    if is_4bit(weight) and not _transposed(weight):
        return linear(x, weight, bias)
    return functional.linear(x, dequantize_args(weight), bias)


@_handler(_aten.t.default)
def _t(weight: QuantizedTensor) -> QuantizedTensor:
    params = weight._params
    turned = replace(params, orig_shape=params.orig_shape[::-1], transposed=not params.transposed)
    return QuantizedTensor(weight._qdata, weight._layout_cls, turned)


@_handler(_aten.mm.default)
def _mm(a: Any, b: Any) -> Tensor:
    a = dequantize_args(a)
    return linear(a, _t(b), None) if _transposed(b) else torch.mm(a, dequantize_args(b))


@_handler(_aten.addmm.default)
def _addmm(bias: Any, a: Any, b: Any, **scales: Any) -> Tensor:
    bias, a = dequantize_args((bias, a))
    if _transposed(b) and bias.dim() == 1 and not scales:
        return linear(a, _t(b), bias)
    return torch.addmm(bias, a, dequantize_args(b), **scales)

"""The operators torch.ops.gquant.*: what they are, what they do on the CPU, their shapes, and the gradient of linear_4bit.

They take a quantized weight as its tensors and numbers, in this order:

    packed         the codes, of any dtype: [bytes / itemsize, 1]
    absmax         float32 [blocks], or uint8 [blocks] when nested
    nested_absmax  float32 [ceil(blocks / 256)], when nested; else None, as the next two
    nested_code    float32 [256]
    offset         float32 []
    shape, dtype   of the weight
    blocksize, quant_type
"""

from typing import Any, Optional

import torch
from torch import Tensor

from .. import quant
from .._errors import InvalidArgumentError

_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, SymInt[] shape, "
    "ScalarType dtype, int blocksize, str quant_type"
)

_library = torch.library.Library("gquant", "DEF")
_compiles = (torch.Tag.pt2_compliant_tag,)


# ---- quantize_4bit: the tensors of a weight; the last three are empty if compress_statistics is False

_library.define(
    "quantize_4bit(Tensor A, int blocksize, str quant_type, bool compress_statistics, ScalarType quant_storage) -> "
    "(Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor nested_code, Tensor offset)",
    tags=_compiles,
)

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.impl(_library, "quantize_4bit", "CPU")
def _quantize(A: Tensor, blocksize: int, quant_type: str, compress_statistics: bool, quant_storage: torch.dtype) -> Parts:
    if quant_type not in ("nf4", "fp4"):
        raise InvalidArgumentError(f'quant_type is {quant_type!r}; want "nf4" or "fp4"')
    state = quant.quantize(A, quant_type, blocksize=blocksize, nested=compress_statistics)
    if state.packed.numel() % quant_storage.itemsize:
        raise InvalidArgumentError(f"{state.packed.numel()} bytes of codes are no number of quant_storage {quant_storage}")
    packed = state.packed.view(quant_storage).reshape(-1, 1)
    if compress_statistics:
        return packed, state.absmax, state.nested_absmax, state.nested_codebook, torch.tensor(state.offset, dtype=torch.float32)
    return packed, state.absmax, torch.empty(0), torch.empty(0), torch.empty(0)


@torch.library.register_fake("gquant::quantize_4bit", lib=_library)
def _(A: Tensor, blocksize: int, quant_type: str, compress_statistics: bool, quant_storage: torch.dtype) -> Parts:
    def floats(*shape: int) -> Tensor:
        return A.new_empty(shape, dtype=torch.float32)

    blocks = -(A.numel() // -blocksize)
    packed = A.new_empty(((A.numel() + 1) // 2 // quant_storage.itemsize, 1), dtype=quant_storage)
    if not compress_statistics:
        return packed, floats(blocks), floats(0), floats(0), floats(0)
    absmax = A.new_empty((blocks,), dtype=torch.uint8)
    return packed, absmax, floats(-(blocks // -quant.NESTED_BLOCKSIZE)), floats(256), floats()


# ---- dequantize_4bit: the weight

_library.define(f"dequantize_4bit({_WEIGHT}) -> Tensor", tags=_compiles)
_library.define(f"dequantize_4bit.out({_WEIGHT}, *, Tensor(a!) out) -> ()", tags=_compiles)


def _state(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Optional[Tensor],
    nested_code: Optional[Tensor],
    offset: Optional[Tensor],
    shape: list[int],
    dtype: torch.dtype,
    blocksize: int,
    quant_type: str,
) -> quant.QuantState:
    return quant.QuantState(
        format=quant_type,
        shape=tuple(shape),
        blocksize=blocksize,
        dtype=str(dtype).removeprefix("torch."),
        packed=packed,
        absmax=absmax,
        nested_absmax=nested_absmax,
        nested_codebook=nested_code,
        offset=None if offset is None else float(offset),
    )


@torch.library.impl(_library, "dequantize_4bit", "CPU")
def _dequantize(*weight: Any) -> Tensor:
    return _state(*weight).dequantize()


@torch.library.impl(_library, "dequantize_4bit.out", "CPU")
def _dequantize_out(*weight: Any, out: Tensor) -> None:
    _state(*weight).dequantize(weight[6], out)


@torch.library.register_fake("gquant::dequantize_4bit", lib=_library)
def _(*weight: Any) -> Tensor:
    return weight[0].new_empty(weight[5], dtype=weight[6])


@torch.library.register_fake("gquant::dequantize_4bit.out", lib=_library)
def _(*weight: Any, out: Tensor) -> None:
    pass


# ---- linear_4bit: x · weightᵀ + bias, with the weight decoded to its own dtype first and then cast to that of x

_library.define(f"linear_4bit(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor", tags=_compiles)


@torch.library.impl(_library, "linear_4bit", "CPU")
def _linear(x: Tensor, bias: Optional[Tensor], *weight: Any) -> Tensor:
    return torch.nn.functional.linear(x, _dequantize(*weight).to(x.dtype), bias)


@torch.library.register_fake("gquant::linear_4bit", lib=_library)
def _(x: Tensor, bias: Optional[Tensor], *weight: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight[5][0]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:7])
    ctx.numbers = inputs[7:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.gquant.dequantize_4bit(*ctx.saved_tensors, *ctx.numbers)
        of_x = gradient @ weight.to(gradient.dtype)
    if ctx.needs_input_grad[1]:
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return of_x, of_bias, *(None for _ in range(9))


torch.library.register_autograd("gquant::linear_4bit", _backward, setup_context=_remember, lib=_library)

"""NF4Layout and FP4Layout: weights with the bytes of bitsandbytes as QuantizedTensors of comfy-kitchen.

A QuantizedTensor has the shape of the weight and the dtype that it decodes to (Params.orig_dtype, which .to() changes); its
_qdata are the codes as a file has them, uint8 [ceil(n / 2), 1], high nibble first.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from comfy_kitchen.tensor import BaseLayoutParams, QuantizedLayout, QuantizedTensor, get_layout_class, register_layout_class
from torch import Tensor

from .._errors import InvalidArgumentError
from ..quant import NESTED_BLOCKSIZE, dequantize_blockwise, pack_4bit
from ..torch.functional import quantize_4bit
from ..torch.state import QuantState, arguments, codebook

_NESTED = ("nested_absmax", "nested_code", "offset")
_CHUNK = 1 << 22  # elements that are rounded at a time; a multiple of every blocksize


@dataclass(frozen=True)
class Params(BaseLayoutParams):
    """All of a weight but its codes.

    scale is absmax: float32 [blocks], or uint8 [blocks] when nested. orig_shape is (k, n) when transposed.
    """

    blocksize: int = 64  # elements per absmax
    dtype: torch.dtype = torch.float32  # of the weight before it was quantized; orig_dtype is what it decodes to
    nested_absmax: Optional[Tensor] = None  # float32 [ceil(blocks / 256)]
    nested_code: Optional[Tensor] = None  # float32 [256]
    offset: Optional[Tensor] = None  # float32 []
    transposed: bool = False
    wait: Optional[Callable[[], None]] = None  # waits for a file of which the weight is still being read

    @property
    def nested(self) -> bool:
        """Whether absmax is quantized itself."""
        return self.nested_absmax is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight in memory."""
        return self.orig_shape[::-1] if self.transposed else self.orig_shape

    def ready(self) -> "Params":
        """Itself, when the weight has been read."""
        if self.wait is not None:
            self.wait()
        return self

    def clone(self) -> BaseLayoutParams:
        """With copies of the tensors."""
        self.ready()
        return super().clone()

    def to_device(self, device: torch.device) -> BaseLayoutParams:
        """With the tensors on a device."""
        self.ready()
        return super().to_device(device)

    def _tensor_fields(self) -> list[str]:
        return ["scale", *_NESTED] if self.nested else ["scale"]

    def _validate_tensor_fields(self) -> None:
        wanted = torch.uint8 if self.nested else torch.float32
        if self.scale.dtype is not wanted:
            raise InvalidArgumentError(f"absmax is {self.scale.dtype}; want {wanted}, as nested is {self.nested}")


class _Layout(QuantizedLayout):
    """What the two layouts share. Each has its quant_type, and the name that it is registered by."""

    quant_type: str
    name: str
    Params = Params
    QUANTIZES_INPUT = False

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        blocksize: int = 64,
        nested: bool = False,
        dtype: Optional[torch.dtype] = None,
        stochastic_rounding: Optional[int] = None,
        like: Optional[QuantizedTensor] = None,
        **_: Any,
    ) -> tuple[Tensor, Params]:
        """Quantizes a weight to the bytes of bitsandbytes' CUDA backend. ComfyUI's scale and inplace_ops say nothing here.

        tensor: float32, float16 or bfloat16, on the CPU or a CUDA device. blocksize: elements per absmax, 32 … 4096. nested: quantize
        absmax too. dtype: what a file shall call the weight's dtype; None: the tensor's.

        stochastic_rounding: a seed; None or 0 is rounding to the nearest code. absmax is the same with a seed, but of the two values
        of codes lo <= x / absmax <= hi (absmax as it decodes, the quotient in float32 and cut to [-1, 1]) hi is taken where u <
        (x / absmax - lo) / (hi - lo), else lo. u is torch.rand of a torch.Generator of the tensor's device with the seed, drawn
        4,194,304 elements at a time in row-major order. So a weight decodes to its own values in the mean.

        like: the weight that the tensor was decoded from. If nothing changed, its bytes are the result, shared if they are on the
        tensor's device: decoding rounds, FP4 has two zeros, and nested absmax is no fixed point.
        """
        tensor = tensor.detach().contiguous()
        if like is not None and like._params.shape == tuple(tensor.shape):
            like = with_dtype(like, tensor.dtype).to(device=tensor.device)
            if torch.equal(like.dequantize(), tensor):
                return like._qdata, like._params
        packed, state = quantize_4bit(tensor, blocksize, nested, cls.quant_type)
        params = _params(state, tensor.dtype)
        if stochastic_rounding:
            packed = _round(tensor, params, cls.quant_type, stochastic_rounding)
        return packed, replace(params, dtype=dtype or tensor.dtype)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Params) -> Tensor:
        """The weight: orig_dtype, of the shape that it has in memory."""
        return torch.ops.gquant.dequantize_4bit(*cls._arguments(qdata, params.ready()))

    @classmethod
    def _arguments(cls, qdata: Tensor, params: Params) -> tuple[Any, ...]:
        nested = (params.nested_absmax, params.nested_code, params.offset)
        return qdata, params.scale, *nested, params.shape, params.orig_dtype, params.blocksize, cls.quant_type

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        """The codes, absmax, and when nested its absmax, the values of its codes and its mean."""
        params = qtensor._params
        return qtensor._qdata, *(getattr(params, name) for name in params._tensor_fields())

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Params) -> dict[str, Tensor]:
        """What bitsandbytes' layer has in its state dict, by what follows "weight"."""
        state = QuantState(
            absmax=params.scale,
            shape=torch.Size(params.shape),
            code=_codebook(cls.quant_type, qdata.device).clone(),  # safetensors saves no tensors that share memory
            blocksize=params.blocksize,
            quant_type=cls.quant_type,
            dtype=params.dtype,
        )
        if params.nested:
            state.offset = params.offset
            state.state2 = QuantState(params.nested_absmax, code=params.nested_code, blocksize=NESTED_BLOCKSIZE)
        return {"": qdata} | {"." + key: tensor for key, tensor in state.as_dict(packed=True).items()}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """What quantize needs to give a changed weight the geometry it had, and an unchanged one its bytes."""
        params = qtensor._params
        return {"blocksize": params.blocksize, "nested": params.nested, "dtype": params.dtype, "like": qtensor}


class NF4Layout(_Layout):
    """4-bit NormalFloat."""

    quant_type, name = "nf4", "GQuantNF4Layout"


class FP4Layout(_Layout):
    """4-bit floating point."""

    quant_type, name = "fp4", "GQuantFP4Layout"


LAYOUTS = {layout.quant_type: layout for layout in (NF4Layout, FP4Layout)}
for _layout in LAYOUTS.values():
    register_layout_class(_layout.name, _layout)


def is_4bit(tensor: Any) -> bool:
    """Whether it is a QuantizedTensor of these layouts."""
    return isinstance(tensor, QuantizedTensor) and issubclass(get_layout_class(tensor._layout_cls), _Layout)


def wrap(
    packed: Tensor, state: QuantState, dtype: Optional[torch.dtype] = None, wait: Optional[Callable[[], None]] = None
) -> QuantizedTensor:
    """A QuantizedTensor over the tensors of a weight, of which none is copied.

    packed: the codes, of any dtype. dtype: what the weight decodes to; None: the dtype that it had. wait: called before it decodes.
    """
    if state.shape is None:
        raise InvalidArgumentError("the state has no shape")
    params = _params(state, dtype or state.dtype, wait)
    return QuantizedTensor(packed.view(torch.uint8).reshape(-1, 1), LAYOUTS[state.quant_type].name, params)


def with_dtype(weight: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """The weight, decoding to another dtype. Unlike .to() it copies nothing."""
    return QuantizedTensor(weight._qdata, weight._layout_cls, replace(weight._params, orig_dtype=dtype))


def weight_arguments(weight: QuantizedTensor) -> tuple[Any, ...]:
    """A weight as the operators torch.ops.gquant take it."""
    return weight.layout_cls._arguments(weight._qdata, weight._params)


_codebook = functools.cache(codebook)  # to bring one to a device takes its turn behind weights that are being read


def _params(state: QuantState, orig_dtype: torch.dtype, wait: Optional[Callable[[], None]] = None) -> Params:
    _, absmax, nested_absmax, nested_code, offset, shape, dtype, blocksize, _ = arguments(state.absmax, state)
    return Params(
        scale=absmax,
        orig_dtype=orig_dtype,
        orig_shape=tuple(shape),
        blocksize=blocksize,
        dtype=dtype,
        nested_absmax=nested_absmax,
        nested_code=nested_code,
        offset=offset,
        wait=wait,
    )


def _round(tensor: Tensor, params: Params, quant_type: str, seed: int) -> Tensor:
    """Codes, rounded up or down by chance."""
    values, codes = codebook(quant_type, tensor.device).sort()
    if quant_type == "fp4":
        kept = codes != 8  # the other zero
        values, codes = values[kept], codes[kept]
    absmax = params.scale
    if params.nested:
        absmax = dequantize_blockwise(absmax, params.nested_absmax, params.nested_code, blocksize=NESTED_BLOCKSIZE) + params.offset
    absmax = absmax.where(absmax != 0, 1.0)  # a block of zeros
    generator, widths = torch.Generator(tensor.device).manual_seed(seed), values.diff()
    chosen = torch.empty(tensor.numel(), dtype=torch.uint8, device=tensor.device)
    for x, to, scales in zip(tensor.view(-1).split(_CHUNK), chosen.split(_CHUNK), absmax.split(_CHUNK // params.blocksize)):
        scales = scales.repeat_interleave(params.blocksize)[: x.numel()]
        x = x.float().div(scales).clamp_(-1, 1)
        low = torch.searchsorted(values[1:-1], x, out_int32=True)  # lo is its value, hi the next
        up = torch.rand(x.shape, generator=generator, device=x.device) < (x - values[low]) / widths[low]
        to.copy_(codes[low + up])
    return pack_4bit(chosen).view(-1, 1)

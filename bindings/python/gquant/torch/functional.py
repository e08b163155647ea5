"""Quantizing and decoding tensors, with bitsandbytes' arguments."""

from typing import Optional

import torch
from torch import Tensor

from .. import quant
from .._errors import InvalidArgumentError, UnsupportedError
from . import ops  # noqa: F401 - it defines torch.ops.gquant
from .state import QuantState, arguments, codebook


def quantize_4bit(
    A: Tensor,
    blocksize: int = 64,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantizes a tensor to the bytes of bitsandbytes' CUDA backend.

    A: float32, float16 or bfloat16 on the CPU, contiguous. blocksize: elements per absmax, 32 … 4096. compress_statistics:
    quantize absmax too. quant_type: "nf4" or "fp4". quant_storage: the dtype that the codes are labelled with.
    Returns codes, quant_storage [ceil(n / 2) / itemsize, 1], and the state that decodes them.
    """
    _check_device(A, "A")
    packed, absmax, nested_absmax, nested_code, offset = torch.ops.gquant.quantize_4bit(
        A, blocksize, quant_type, compress_statistics, quant_storage
    )
    state = QuantState(absmax, A.shape, codebook(quant_type, A.device), blocksize, quant_type, A.dtype)
    if compress_statistics:
        state.offset, state.state2 = offset, QuantState(nested_absmax, code=nested_code, blocksize=quant.NESTED_BLOCKSIZE)
    return packed, state


def dequantize_4bit(packed: Tensor, state: QuantState, out: Optional[Tensor] = None) -> Tensor:
    """Decodes a weight: state.dtype, state.shape. out, if given, takes it and is returned."""
    _check_device(packed, "packed")
    weight = arguments(packed, state)
    if out is None:
        return torch.ops.gquant.dequantize_4bit(*weight)
    if out.dtype != state.dtype or out.shape != state.shape:
        raise InvalidArgumentError(f"out is {out.dtype} {tuple(out.shape)}; want {state.dtype} {state.shape and tuple(state.shape)}")
    torch.ops.gquant.dequantize_4bit.out(*weight, out=out)
    return out


def _check_device(tensor: Tensor, name: str) -> None:
    if tensor.device.type != "cpu":
        raise UnsupportedError(f"{name} is on device {tensor.device}; this build of gquant computes on the CPU: move it there first")

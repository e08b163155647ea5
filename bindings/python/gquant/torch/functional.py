"""Quantizing and decoding tensors, with bitsandbytes' arguments."""

from typing import Optional

import torch
from torch import Tensor

from .. import quant
from .._errors import InvalidArgumentError, UnsupportedError
from . import ops
from .state import QuantState, arguments


def quantize_4bit(
    A: Tensor,
    blocksize: int = 64,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantizes a tensor to the bytes of bitsandbytes' CUDA backend.

    A: float32, float16 or bfloat16 on the CPU or a CUDA device, contiguous. blocksize: elements per absmax, 32 … 4096. compress_statistics:
    quantize absmax too. quant_type: "nf4" or "fp4". quant_storage: the dtype that the codes are labelled with.
    Returns codes, quant_storage [ceil(n / 2) / itemsize, 1], and the state that decodes them.
    """
    _check_device(A, "A")
    packed, absmax, nested_absmax, nested_code, offset, code = torch.ops.gquant.quantize_4bit(
        A, blocksize, quant_type, compress_statistics, quant_storage
    )
    state = QuantState(absmax, A.shape, code, blocksize, quant_type, A.dtype)
    if compress_statistics:
        state.offset, state.state2 = offset, QuantState(nested_absmax, code=nested_code, blocksize=quant.NESTED_BLOCKSIZE)
    return packed, state


def dequantize_4bit(packed: Tensor, state: QuantState, out: Optional[Tensor] = None) -> Tensor:
    """Decodes a weight: state.dtype, state.shape, where it is. out, if given, takes it and is returned."""
    if out is not None and (out.dtype != state.dtype or out.shape != state.shape):
        wanted = state.shape and tuple(state.shape)
        raise InvalidArgumentError(f"out is {out.dtype} {tuple(out.shape)}; want {state.dtype} {wanted}")
    weight = arguments(packed, state)
    if torch.compiler.is_compiling() or type(packed) not in ops.REAL:
        _check_device(packed, "packed")
        if out is None:
            return torch.ops.gquant.dequantize_4bit(*weight)
        torch.ops.gquant.dequantize_4bit.out(*weight, out=out)
        return out
    # The dispatcher is left out: it takes longer than to start the work on a device, and after a large weight on the CPU it has
    # to come back into the caches.
    if out is None:
        out = torch.empty(weight[5], dtype=state.dtype, device=packed.device)
    ops.decode(weight, out)
    return out


def _check_device(tensor: Tensor, name: str) -> None:
    if tensor.device.type not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"{name} is on device {tensor.device}; gquant computes on the CPU and on CUDA devices: move it there first"
        )

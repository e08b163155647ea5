"""A linear layer with a 4-bit weight."""

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .. import quant
from .._errors import GquantError, InvalidArgumentError
from . import ops
from .functional import dequantize_4bit, quantize_4bit
from .state import QuantState, arguments, codebook

_BLOCKSIZE = 64  # of weights that are new, as in bitsandbytes' layer


class Linear4bit(nn.Module):
    """y = x · weightᵀ + bias with a 4-bit weight: takes the place of bitsandbytes' Linear4bit, and of nn.Linear.

    load_state_dict takes what bitsandbytes' layer saved (the layer then has its quant_type, blocksize, nesting and storage),
    and the plain weight of an nn.Linear, which it quantizes as the constructor's arguments say. state_dict is what
    bitsandbytes' layer loads. A new layer is all zeros. .to() and the like move the weight but never change its dtype.

    weight: the codes, a parameter without gradient. quant_state: the rest of the weight. compute_dtype: what x is cast to, the
    result comes in the dtype that x had; None: no cast.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        compute_dtype: Optional[torch.dtype] = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = compute_dtype
        self.compress_statistics, self.quant_type, self.quant_storage = compress_statistics, quant_type, quant_storage
        device = torch.get_default_device() if device is None else torch.device(device)
        count = (in_features * out_features + 1) // 2 // quant_storage.itemsize
        self.weight = nn.Parameter(torch.zeros(count, 1, dtype=quant_storage, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        self.quant_state = self._zeros(device)

    def _zeros(self, device: torch.device) -> QuantState:
        """The state of a weight of zeros."""
        blocks = -(self.in_features * self.out_features // -_BLOCKSIZE)
        state = QuantState(
            absmax=torch.zeros(blocks, dtype=torch.uint8 if self.compress_statistics else torch.float32, device=device),
            shape=torch.Size((self.out_features, self.in_features)),
            code=codebook(self.quant_type, device),
            blocksize=_BLOCKSIZE,
            quant_type=self.quant_type,
            dtype=torch.get_default_dtype(),
        )
        if self.compress_statistics:
            nested_absmax = torch.zeros(-(blocks // -quant.NESTED_BLOCKSIZE), dtype=torch.float32, device=device)
            state.offset = torch.zeros((), dtype=torch.float32, device=device)
            state.state2 = QuantState(nested_absmax, code=codebook("dynamic", device), blocksize=quant.NESTED_BLOCKSIZE)
        return state

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features] of x's dtype."""
        given = x.dtype
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        bias = self.bias
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if learns or torch.compiler.is_compiling():
            y = torch.ops.gquant.linear_4bit(x, bias, *arguments(self.weight, self.quant_state))
        elif ops.plain(x, self.weight):  # the same, without the operator's own time
            y = ops.linear(x, bias, arguments(self.weight, self.quant_state))
        else:  # what the operator does not know: vmap, forward-mode gradients
            y = nn.functional.linear(x, dequantize_4bit(self.weight, self.quant_state).to(x.dtype), bias)
        return y if y.dtype is given else y.to(given)

    def extra_repr(self) -> str:
        state = self.quant_state
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"quant_type={state.quant_type}, blocksize={state.blocksize}, nested={state.nested}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear4bit":
        weight = self.weight

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(lambda tensor: move(tensor) if tensor is weight else fn(tensor), recurse)
        self.quant_state = self.quant_state.map(move)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in self.quant_state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{key}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        parts = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(key + ".")}
        if key in state_dict:
            try:
                packed, state = self._accept(state_dict[key], {name[len(key) + 1 :]: part for name, part in parts.items()})
            except GquantError as e:
                error_msgs.append(f"{key}: {e}")
                return
            # torch's own code then copies or assigns the codes and the bias.
            state_dict[key] = packed
            device = self.weight.device
            self.weight = nn.Parameter(torch.empty_like(packed, device=device), requires_grad=False)
            assign = local_metadata.get("assign_to_params_buffers", False)
            self.quant_state = state if assign else state.map(lambda tensor: tensor.to(device, copy=True))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _accept(self, weight: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, QuantState]:
        """The codes and the state that a state dict has for this layer."""
        shape = torch.Size((self.out_features, self.in_features))
        if not parts and weight.shape == shape and weight.is_floating_point():
            plain = weight.detach().contiguous()
            return quantize_4bit(plain, _BLOCKSIZE, self.compress_statistics, self.quant_type, self.quant_storage)
        state = QuantState.from_dict(parts, device=weight.device)
        if state.shape is None:
            state.shape = shape
        if state.shape != shape:
            raise InvalidArgumentError(f"the quantized weight is {list(state.shape)}; this layer's is {list(shape)}")
        if weight.nbytes != (shape.numel() + 1) // 2:
            raise InvalidArgumentError(f"there are {weight.nbytes} bytes of codes; {list(shape)} needs {(shape.numel() + 1) // 2}")
        return weight, state

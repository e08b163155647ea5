"""The layers that ComfyUI builds a model from, with 4-bit weights. Needs ComfyUI."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Optional

import comfy.ops
import comfy.quant_ops
import torch
from torch import Tensor, nn

from .._errors import UnsupportedError
from ..torch import QuantState
from . import handlers
from .layouts import LAYOUTS, QuantizedTensor, is_4bit, with_dtype, wrap
from .lora import LowRank, low_rank

# The name of each layout in the .comfy_quant of a layer, which `gquant convert --convention comfy` writes too.
FORMATS = {layout.name: f"bnb_{quant_type}" for quant_type, layout in LAYOUTS.items()}
_DESCRIPTIONS = {layout: json.dumps({"format": format}).encode() for layout, format in FORMATS.items()}

for _layout, _format in FORMATS.items():
    _entry = {"storage_t": torch.uint8, "parameters": set(), "comfy_tensor_layout": _layout, "quantize_input": False}
    comfy.quant_ops.QUANT_ALGOS.setdefault(_format, _entry)


def linear_4bit_ops(compute_dtype: torch.dtype) -> type:
    """For ComfyUI's model_options["custom_operations"]: its own layers for mixed precision, with a Linear that takes 4-bit weights.

    compute_dtype: what the weights decode to; the dtype that the model computes in, so that no weight is converted in a forward pass.
    """
    base: Any = comfy.ops.mixed_precision_ops({}, compute_dtype)

    class Linear(base.Linear):
        """A weight may be a QuantizedTensor of gquant's layouts, or what state_dict() made of one; else it is ComfyUI's own layer.

        The codes are not copied when they are loaded: they stay views of the file.
        """

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self._functions: list[Any] = []
            self._patch: Any = None  # of dynamic VRAM; in _functions, too, if it is a LowRank

        @property
        def weight_function(self) -> list[Any]:
            """What is to be done to the weight in a forward pass: ComfyUI sets it for layers that it offloads."""
            return self._functions

        @weight_function.setter
        def weight_function(self, functions: list[Any]) -> None:
            self._functions = functions
            self.weight_lowvram_function = self._patch

        @property
        def weight_lowvram_function(self) -> Any:
            """What is to be done to the weight when dynamic VRAM brings it to the device; LoRAs become weight functions instead, so that
            they are exact wherever the weight is."""
            return None if isinstance(self._patch, LowRank) else self._patch

        @weight_lowvram_function.setter
        def weight_lowvram_function(self, patch: Any) -> None:
            functions = [self._low_rank(function) for function in self._functions if function is not self._patch]
            self._patch = self._low_rank(patch)
            self._functions = [self._patch, *functions] if isinstance(self._patch, LowRank) else functions

        def _low_rank(self, function: Any) -> Any:
            return low_rank(function) if is_4bit(getattr(self, "weight", None)) else function

        def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._at_hand(input):
                comfy.ops.run_every_op()
                return handlers.linear(input, self.weight, self.bias)
            functions = [self._low_rank(function) for function in self._functions]
            if not functions or not all(isinstance(function, LowRank) for function in functions):
                return super().forward(input, *args, **kwargs)
            kept, self._functions = self._functions, []
            try:
                y = self.forward(input, *args, **kwargs)
            finally:
                self._functions = kept
            for function in functions:
                function.add(y, input)
            return y

        def _at_hand(self, input: Tensor) -> bool:
            """Whether ComfyUI's layer would do nothing but multiply: it takes longer to find that out than a small product does."""
            weight, bias = self.weight, self.bias
            return (
                not torch.compiler.is_compiling()
                and not self._functions
                and not self.bias_function
                and "_v" not in self.__dict__  # dynamic VRAM
                and type(input) is Tensor
                and is_4bit(weight)
                and weight._params.orig_dtype is input.dtype
                and weight._qdata.device == input.device
                and (bias is None or (bias.dtype is input.dtype and bias.device == input.device))
                and not torch.is_grad_enabled()
            )

        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
            weight = _take_weight(state_dict, prefix + "weight")
            if weight is None:
                self.layout_type = self.quant_format = None
                super()._load_from_state_dict(state_dict, prefix, *args)
                return
            if tuple(weight.shape) != self._orig_shape:
                args[-1].append(f"{prefix}weight is {list(weight.shape)}; this layer's is {list(self._orig_shape)}")
                return
            state_dict.pop(prefix + "comfy_quant", None)
            params = replace(weight._params, orig_dtype=compute_dtype, wait=None)  # it is read before the layer runs
            self._set(QuantizedTensor(weight._qdata, weight._layout_cls, params))
            nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
            missing = args[2]
            missing[:] = [key for key in missing if key != prefix + "weight"]

        def _set(self, weight: Any) -> None:
            self.layout_type, self.quant_format = weight._layout_cls, FORMATS[weight._layout_cls]
            # What nn.Parameter returns, without detach(), in which comfy-kitchen copies absmax. So the weight must be new.
            weight._is_param = True
            self.weight, self.comfy_quant = weight, describe(weight)

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            # ComfyUI's layer wraps parameters anew, also those that fn leaves as they are.
            if not is_4bit(self._parameters.get("weight")):
                return super()._apply(fn, recurse)
            changed = {id(parameter): fn(parameter) for parameter in self._parameters.values() if parameter is not None}
            if all(id(tensor) == before for before, tensor in changed.items()):
                return self
            return super()._apply(lambda tensor: changed[id(tensor)] if id(tensor) in changed else fn(tensor), recurse)

        def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
            """bitsandbytes' keys, and .comfy_quant."""
            if not is_4bit(getattr(self, "weight", None)):
                return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
            found = {} if destination is None else destination
            if self.bias is not None:
                found[prefix + "bias"] = self.bias
            found |= {f"{prefix}weight{suffix}": part for suffix, part in _parts(self.weight).items()}
            found[prefix + "comfy_quant"] = self.comfy_quant
            return found

        def set_weight(
            self, weight: Tensor, inplace_update: bool = False, seed: Optional[int] = None, return_weight: bool = False, **kwargs: Any
        ) -> Any:
            """Takes a changed weight: quantized as the one that was there, rounded by chance with the seed."""
            if not is_4bit(self.weight):
                return super().set_weight(weight, inplace_update=inplace_update, seed=seed, return_weight=return_weight, **kwargs)
            if inplace_update:  # to take it back, ComfyUI would copy codes into the weight, but not absmax
                raise UnsupportedError(
                    "a hook (a scheduled LoRA) cannot patch a 4-bit weight while the model runs: load the LoRA for the whole run, with "
                    "Load LoRA (LoraLoader) or its bypass"
                )
            changed = with_dtype(self.weight.requantize_from_float(weight, stochastic_rounding=seed), self.weight.dtype)
            if return_weight:
                return changed
            self._set(changed)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            # torch copies the storage of a tensor, which a QuantizedTensor has not.
            if is_4bit(getattr(self, "weight", None)):
                memo[id(self.weight)] = nn.Parameter(self.weight.clone(), requires_grad=False)
            copied = memo[id(self)] = type(self).__new__(type(self))
            copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return copied

    return type("Linear4bitOps", (base,), {"Linear": Linear})


def describe(weight: Any) -> Tensor:
    """The .comfy_quant of a layer with a 4-bit weight: ComfyUI's JSON as uint8, by which it sees that a model is quantized."""
    return torch.frombuffer(bytearray(_DESCRIPTIONS[weight._layout_cls]), dtype=torch.uint8)


def _take_weight(state_dict: dict[str, Any], key: str) -> Any:
    """Takes a 4-bit weight out of a state dict; None if it is something else."""
    weight = state_dict.get(key)
    if not is_4bit(weight):
        names = [name for name in state_dict if name.startswith(key + ".")]
        if weight is None or not any(".quant_state." in name for name in names):
            return None
        parts = {name[len(key) + 1 :]: state_dict.pop(name) for name in names}
        weight = wrap(weight, QuantState.from_dict(parts, device=weight.device))
    del state_dict[key]
    return weight


def _parts(weight: Any) -> dict[str, Tensor]:
    """What a state dict has of a weight, by what follows "weight". ComfyUI asks often, to add up sizes, so it is kept."""
    kept = weight.__dict__.get("_parts")
    if kept is None or kept[0] is not weight._params:
        weight._parts = kept = weight._params, weight.state_dict()
        _name(weight, kept[1])
    return kept[1]


def _name(weight: Any, parts: dict[str, Tensor]) -> None:
    """Makes the parts of a weight what their keys say, attributes of it: so ModelPatcher.get_key_patches looks every key up."""
    for suffix, part in parts.items():
        owner, _, name = suffix[1:].rpartition(".")
        if owner:
            setattr(weight, owner, SimpleNamespace(**{name: part}))
        elif name:
            setattr(weight, name, part)

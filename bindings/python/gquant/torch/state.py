"""The state of a 4-bit weight, with the fields and the dictionaries of bitsandbytes' QuantState."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Optional, Union

import torch
from torch import Tensor

from .. import quant
from .._errors import InvalidArgumentError

_PACKED_KEY = "quant_state.bitsandbytes__"
_KEYS = {"absmax", "quant_map", "quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_absmax", "nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset"}
_CODES = {name: quant.codebook(name, like=torch.empty(0)) for name in ("nf4", "fp4", "dynamic")}
_TYPES = ("nf4", "fp4")


def codebook(name: str, device: Union[torch.device, str]) -> Tensor:
    """A new tensor with the values of the codes: float32 [16] for "nf4" and "fp4", [256] for "dynamic"."""
    return _CODES[name].to(device, copy=True)


# eq would compare tensors.
@dataclass(eq=False)
class QuantState:
    """What is needed beside the codes to decode a weight, or (state2) its absmax."""

    absmax: Tensor  # float32 [blocks], or uint8 [blocks] when nested
    shape: Optional[torch.Size] = None  # of the weight
    code: Optional[Tensor] = None  # float32 [16], [256] in state2
    blocksize: Optional[int] = None  # elements per absmax
    quant_type: Optional[str] = None  # "nf4" or "fp4"; None in state2
    dtype: torch.dtype = torch.float32  # of the weight
    offset: Optional[Tensor] = None  # float32 []: the mean of absmax, when nested
    state2: Optional["QuantState"] = None  # of absmax, when nested

    @property
    def nested(self) -> bool:
        """Whether absmax is quantized itself."""
        return self.state2 is not None

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The entries of the state by bitsandbytes' names; packed: tensors only, as in a state dict after "weight."."""
        entries: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None and self.offset is not None:
            entries |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": self.state2.code,
                "nested_dtype": str(self.state2.dtype).removeprefix("torch."),
                "nested_offset": self.offset.item(),
            }
        if not packed:
            return entries
        text = json.dumps({key: value for key, value in entries.items() if not isinstance(value, Tensor)}).encode()
        tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
        return tensors | {f"{_PACKED_KEY}{self.quant_type}": torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any], device: Union[torch.device, str] = "cpu") -> "QuantState":
        """The way back from as_dict, packed or not. Prefixes that end in a dot are cut off the keys.

        Unknown, missing and contradicting entries are InvalidArgumentError. Tensors on the device are not copied.
        """
        tensors = {key: value for key, value in entries.items() if _PACKED_KEY not in key}
        texts = [key for key in entries if _PACKED_KEY in key]
        plain = {key.rpartition(".")[2]: value for key, value in tensors.items()}
        if texts:
            described = quant.parse_json(quant.bytes_of(entries[texts[0]].cpu()))
            if len(texts) > 1 or not texts[0].endswith(_PACKED_KEY + described["quant_type"]):
                raise InvalidArgumentError(f"the keys {texts} are not one that ends in {_PACKED_KEY}{described['quant_type']}")
            plain |= described
        wanted = _KEYS | _NESTED_KEYS if "nested_absmax" in plain else _KEYS
        if plain.keys() != wanted or len(plain) < len(tensors):
            raise InvalidArgumentError(f"the state has the keys {sorted(plain)}; want {sorted(wanted)}")
        if plain["quant_type"] not in _TYPES:
            raise InvalidArgumentError(f"quant_type is {plain['quant_type']!r}; want one of {', '.join(_TYPES)}")
        offset = state2 = None
        if wanted > _KEYS:
            offset = torch.tensor(plain["nested_offset"], dtype=torch.float32, device=device)
            state2 = cls(
                absmax=plain["nested_absmax"].to(device),
                code=plain["nested_quant_map"].to(device),
                blocksize=plain["nested_blocksize"],
                dtype=getattr(torch, plain["nested_dtype"]),
            )
        return cls(
            absmax=plain["absmax"].to(device),
            shape=None if plain["shape"] is None else torch.Size(plain["shape"]),
            code=plain["quant_map"].to(device),
            blocksize=plain["blocksize"],
            quant_type=plain["quant_type"],
            dtype=getattr(torch, plain["dtype"]),
            offset=offset,
            state2=state2,
        )

    def map(self, change: Any) -> "QuantState":
        """A state whose tensors are change(tensor)."""

        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            return value.map(change) if isinstance(value, QuantState) else value

        return QuantState(**{f.name: changed(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: Union[torch.device, str]) -> "QuantState":
        """The state on a device."""
        return self.map(lambda tensor: tensor.to(device))


def arguments(packed: Tensor, state: QuantState) -> tuple[Any, ...]:
    """A weight as the operators take it (ops.py). A QuantState of bitsandbytes will do as well."""
    if state.shape is None:
        raise InvalidArgumentError("the state has no shape")
    nested = (state.state2.absmax, state.state2.code, state.offset) if state.state2 is not None else (None, None, None)
    return packed, state.absmax, *nested, state.shape, state.dtype, state.blocksize, state.quant_type

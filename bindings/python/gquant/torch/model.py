"""Loading a whole model."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Optional, Union

import torch
from torch import Tensor

from .. import _buffers
from .. import model as models
from ..quant import NESTED_BLOCKSIZE, empty_parts
from .state import QuantState, codebook


def load_4bit_model(
    path: models.Path, device: Union[torch.device, str] = "cpu", prefix: Optional[str] = None
) -> dict[str, Tensor]:
    """The tensors of a model as a state dict that bitsandbytes' or gquant's layers load; nothing is decoded.

    path: a .safetensors file, a shard index or a folder. device: where the tensors are made; a CUDA device gets them straight
    from the file. prefix: only names that start with it, which is cut off. A 4-bit layer "L.weight" has the keys "L.weight"
    (uint8) and "L.weight.absmax" …, an LLM.int8 layer "L.weight" (int8), "L.SCB" and "L.weight_format", whatever the file calls
    them. Load it with assign=True to keep it from being copied. Raises what open() does, and torch.OutOfMemoryError.
    """
    tensors, weights = load_4bit_weights(path, device, prefix)
    nested = [state.offset for _, state in weights.values() if state.offset is not None]
    offsets = iter(torch.stack(nested).cpu().unbind() if nested else ())  # a device is waited for once
    texts: dict[str, Tensor] = {}
    for name, (packed, state) in weights.items():
        tensors[name] = packed
        if state.offset is not None:
            state = replace(state, offset=next(offsets))
        for key, part in state.as_dict(packed=True).items():
            (texts if part.device != packed.device else tensors)[f"{name}.{key}"] = part
    if texts:
        joined = torch.cat(list(texts.values())).to(packed.device)
        tensors |= zip(texts, joined.split([len(text) for text in texts.values()]))
    return tensors


Weights = dict[str, tuple[Tensor, QuantState]]


def load_4bit_weights(
    path: models.Path, device: Union[torch.device, str] = "cpu", prefix: Optional[str] = None
) -> tuple[dict[str, Tensor], Weights]:
    """The same without its detour by bitsandbytes' keys: the tensors that belong to no 4-bit weight, and the 4-bit weights by their names.
    These are their codes, uint8 [bytes, 1], and their states, all on the device."""
    device = torch.device(device)
    with models.open(path, prefix) as model:
        tensors, parts = _memory(model, device)
        model.read_all(tensors, parts)
        tensors, weights = _assembled(model, tensors, parts)
    if device.type not in ("cpu", "cuda"):
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        weights = {name: (packed.to(device), state.to(device)) for name, (packed, state) in weights.items()}
    return tensors, weights


@contextmanager
def reading_4bit_weights(model: models.Model, device: Union[torch.device, str]) -> Iterator[tuple[dict[str, Tensor], Weights, Callable[[], None]]]:
    """What load_4bit_weights returns while the 4-bit weights, most of a file, are still being read, and a function that waits for them.

    Their memory is there, all else is read, offsets too; at the end of the context the weights are. device: the CPU or a CUDA device.
    """
    device = torch.device(device)
    tensors, parts = _memory(model, device)
    late, early = {}, {}
    for name, arrays in parts.items():
        soon = arrays if model.layers[name].format == "int8" else {"offset"}
        early[name] = {key: part for key, part in arrays.items() if key in soon}
        late[name] = {key: part for key, part in arrays.items() if key not in soon}
    model.read_all(tensors, early)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    read = model._reader({}, late, stream=stream)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        yield *_assembled(model, tensors, parts), reading.result
        reading.result()


def _memory(model: models.Model, device: torch.device) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What the tensors and the parts of the layers are read into."""
    like = torch.empty(0, device=device if device.type == "cuda" else "cpu")
    where = _buffers.place_of(like)
    tensors = {name: _empty(tensor, like) for name, tensor in model.tensors.items()}
    parts = {name: empty_parts(like, layer._sizes, layer.nested, where) for name, layer in model.layers.items()}
    offsets = torch.empty(len(parts), dtype=torch.float32, device=like.device)
    for arrays, offset in zip(parts.values(), offsets.unbind()):
        if "offset" in arrays:
            arrays["offset"] = offset
    return tensors, parts


def _assembled(model: models.Model, tensors: dict[str, Tensor], parts: dict[str, dict[str, Any]]) -> tuple[dict[str, Tensor], Weights]:
    weights: Weights = {}
    for name, layer in model.layers.items():
        if layer.format == "int8":
            tensors |= _int8(name, layer, parts[name])
        else:
            weights[name] = parts[name]["packed"].reshape(-1, 1), _state(layer, parts[name])
    return tensors, weights


def _empty(tensor: models.Tensor, like: Tensor) -> Tensor:
    dtype = getattr(torch, tensor.dtype, None)
    if dtype is None:  # smaller than a byte
        return torch.empty(tensor.nbytes, dtype=torch.uint8, device=like.device)
    return torch.empty(tensor.shape, dtype=dtype, device=like.device)


def _state(layer: models.Layer, parts: dict[str, Any]) -> QuantState:
    packed, code = parts["packed"], parts.get("codebook")
    state = QuantState(
        absmax=parts["absmax"],
        shape=torch.Size(layer.shape),
        code=codebook(layer.format, packed.device) if code is None else code,
        blocksize=layer.blocksize,
        quant_type=layer.format,
        dtype=getattr(torch, layer.dtype),
    )
    if layer.nested:
        state.offset = parts["offset"]
        state.state2 = QuantState(parts["nested_absmax"], code=parts["nested_codebook"], blocksize=NESTED_BLOCKSIZE)
    return state


def _int8(name: str, layer: models.Layer, parts: dict[str, Any]) -> dict[str, Tensor]:
    codes, module = parts["packed"], name.removesuffix("weight")
    return {
        name: codes.view(torch.int8).reshape(layer.shape),
        f"{module}SCB": parts["absmax"],
        f"{module}weight_format": torch.zeros((), dtype=torch.uint8, device=codes.device),
    }

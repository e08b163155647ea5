"""Loading a whole model."""

from typing import Optional, Union

import torch
from torch import Tensor

from .. import model as models
from ..quant import NESTED_BLOCKSIZE
from .state import QuantState, codebook


def load_4bit_model(
    path: models.Path, device: Union[torch.device, str] = "cpu", prefix: Optional[str] = None
) -> dict[str, Tensor]:
    """The tensors of a model as a state dict that bitsandbytes' or gquant's layers load; nothing is decoded.

    path: a .safetensors file, a shard index or a folder. prefix: only names that start with it, which is cut off. A 4-bit layer
    "L.weight" has the keys "L.weight" (uint8) and "L.weight.absmax" …, an LLM.int8 layer "L.weight" (int8), "L.SCB" and
    "L.weight_format", whatever the file calls them. Load it with assign=True to keep it from being copied.
    """
    tensors: dict[str, Tensor] = {}
    with models.open(path, prefix) as model:
        for name, tensor in model.tensors.items():
            tensors[name] = _read(tensor)
        for name, layer in model.layers.items():
            tensors |= _int8(name, layer) if layer.format == "int8" else _4bit(name, layer)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _read(tensor: models.Tensor) -> Tensor:
    dtype = getattr(torch, tensor.dtype, None)
    if dtype is None:  # smaller than a byte
        return tensor.read(torch.empty(tensor.nbytes, dtype=torch.uint8))
    return tensor.read(torch.empty(tensor.shape, dtype=dtype))


def _4bit(name: str, layer: models.Layer) -> dict[str, Tensor]:
    read = layer.read(like=torch.empty(0))
    state = QuantState(
        absmax=read.absmax,
        shape=torch.Size(layer.shape),
        code=codebook(layer.format, "cpu") if read.codebook is None else read.codebook,
        blocksize=layer.blocksize,
        quant_type=layer.format,
        dtype=getattr(torch, layer.dtype),
    )
    if read.nested:
        state.offset = torch.tensor(read.offset, dtype=torch.float32)
        state.state2 = QuantState(read.nested_absmax, code=read.nested_codebook, blocksize=NESTED_BLOCKSIZE)
    parts = {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    return {name: read.packed.reshape(-1, 1)} | parts


def _int8(name: str, layer: models.Layer) -> dict[str, Tensor]:
    read = layer.read(like=torch.empty(0))
    module = name.removesuffix("weight")
    codes = read.packed.view(torch.int8).reshape(layer.shape)
    return {name: codes, f"{module}SCB": read.absmax, f"{module}weight_format": torch.zeros((), dtype=torch.uint8)}

"""Models that ComfyUI has loaded, with their linear layers in 4 bits. Needs ComfyUI."""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import InvalidArgumentError, UnsupportedError
from . import build
from .layouts import LAYOUTS, QuantizedTensor, is_4bit

import comfy.model_detection as detection  # isort: skip
import comfy.model_management as management  # isort: skip
import comfy.utils  # isort: skip

_MIN_ELEMENTS = 4096  # below it a weight is not worth its error, as `gquant convert` has it


def quantize_model(
    model: Any,
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    exclude: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    disable_dynamic: bool = False,
) -> Any:
    """A ModelPatcher with the model's linear layers in 4 bits; the given one, a ModelPatcher too, stays as it is.

    What LoRAs and other patches changed is quantized with the weights. blocksize: weights per absmax. nested: quantize absmax too.
    exclude: globs of weights to leave. progress: called before every tensor with the tensors done and those in all; may raise.
    """
    diffusion_model = model.model.diffusion_model
    modules = dict(diffusion_model.named_modules())
    if any(isinstance(weight, QuantizedTensor) for weight in diffusion_model.parameters()):
        raise InvalidArgumentError("the model's weights are quantized already; load it from a bf16 or fp16 file to quantize it anew")
    management.unload_model_and_clones(model)  # its weights are then the unpatched ones
    sd, tensors = {}, diffusion_model.state_dict()
    quantized = 0
    for done, (name, tensor) in enumerate(tensors.items()):
        progress(done, len(tensors))
        key = f"diffusion_model.{name}"
        if key in model.patches:
            tensor = model.patch_weight_to_device(key, device_to=model.load_device, return_weight=True)
        if _is_linear(modules[name.rpartition(".")[0]], name, tensor) and not any(fnmatch.fnmatchcase(name, glob) for glob in exclude):
            dense = tensor.to(torch.bfloat16) if tensor.dtype.itemsize == 1 else tensor
            packed, params = LAYOUTS[quant_type].quantize(dense, blocksize=blocksize, nested=nested)
            tensor = QuantizedTensor(packed, LAYOUTS[quant_type].name, params)
            sd[build.description(name)] = build.describe(tensor)
            quantized += 1
        sd[name] = tensor.to(model.offload_device, copy=not is_4bit(tensor))  # the two models share nothing
    progress(len(tensors), len(tensors))
    if not quantized:
        raise InvalidArgumentError("the model has no linear layer to quantize, or exclude leaves none")
    sd = model.model.model_config.process_unet_state_dict_for_saving(sd)
    prefix = detection.unet_prefix_from_state_dict(sd)
    sd = comfy.utils.state_dict_prefix_replace(sd, {prefix: ""}, filter_keys=True)
    config = detection.model_config_from_unet(sd, "")
    if config is None:
        raise UnsupportedError(f"ComfyUI does not detect a {type(model.model).__name__} model from its weights, so it cannot be built anew")
    device = "cpu" if model.load_device.type == "cpu" else "default"
    built = build.build_model(sd, config, None, model.model.get_dtype_inference(), device, disable_dynamic, "the quantized model")
    # All but the weights is the given model's: options, sampling, wrappers.
    result = model.clone(model_override=(built.model, ({}, {}, {}, set())))
    result.patches, result.hook_backup, result.size = {}, {}, 0
    result.clone_base_uuid, result.parent = built.clone_base_uuid, None
    result.cached_patcher_init = None
    if model.cached_patcher_init is not None:
        result.cached_patcher_init = (_quantize_again, (model.cached_patcher_init, dict(model.patches), quant_type, blocksize, nested, exclude))
    return result


def _quantize_again(init: tuple[Any, ...], patches: Any, *arguments: Any, disable_dynamic: bool = False) -> Any:
    load, given, *index = init
    model = load(*given, disable_dynamic=disable_dynamic)
    model = model[index[0]] if index else model
    model.patches = patches
    return quantize_model(model, *arguments, disable_dynamic=disable_dynamic)


def _is_linear(module: nn.Module, name: str, tensor: Tensor) -> bool:
    return (
        name.endswith(".weight")
        and hasattr(module, "in_features")
        and tensor.dim() == 2
        and tensor.numel() >= _MIN_ELEMENTS
        and tensor.is_floating_point()
    )

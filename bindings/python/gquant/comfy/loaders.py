"""Models with 4-bit weights for ComfyUI: from files, from models that are loaded, and into files. Needs ComfyUI.

ComfyUI's own loaders build the models; they get the weights as QuantizedTensors, under the names and in the pieces they want, and
layers that take those. Nothing of ComfyUI is changed.
"""

import fnmatch
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .. import model as models
from .._errors import BadFileError, GquantError, InvalidArgumentError, UnsupportedError
from ..torch import load_4bit_model
from . import files, probe
from .layouts import LAYOUTS, QuantizedTensor, is_4bit, with_dtype, wrap

probe.comfyui()

import comfy.memory_management  # noqa: E402
import comfy.model_detection as detection  # noqa: E402
import comfy.model_management as management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402

from .ops import FORMATS, linear_4bit_ops  # noqa: E402

_MIN_ELEMENTS = 4096  # below it a weight is not worth its error, as `gquant convert` has it
# What an encoder works without: files of text encoders often leave it out.
_OPTIONAL = re.compile(r"(^|\.)(visual|vision_\w+|audio_\w+|multi_modal_projector|lm_head)\.")

StateDict = dict[str, Union[Tensor, QuantizedTensor]]


def load_model(path: str, dtype: Optional[torch.dtype] = None, device: str = "default", disable_dynamic: bool = False) -> Any:
    """A diffusion model: a ModelPatcher.

    path: a file of bitsandbytes or gquant, of the diffusion model alone or a checkpoint, with ComfyUI's or diffusers' names. dtype:
    what it computes in; None: what ComfyUI takes. device: "default" (ComfyUI moves the weights as it needs them), "gpu" (they are
    read straight to it) or "cpu" (it runs there). disable_dynamic: as ComfyUI's loaders have it.
    """
    values, metadata = _read(path, device)
    prefix = detection.unet_prefix_from_state_dict(values)
    inside = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    notices: list[str] = []
    sd, config = _detect(inside or values, metadata, notices)
    if config is None:
        raise UnsupportedError(f"{_name(path)} is no diffusion model that this ComfyUI knows{_what_fits(values, metadata)}")
    _tell(path, notices)
    patcher = _build(sd, config, metadata, dtype, device, disable_dynamic, path)
    patcher.cached_patcher_init = (load_model, (path, dtype, device))
    return patcher


def load_checkpoint(
    path: str,
    dtype: Optional[torch.dtype] = None,
    device: str = "default",
    embeddings: Any = None,
    wanted: Sequence[str] = ("model", "clip", "vae"),
    disable_dynamic: bool = False,
) -> tuple[Any, Any, Any]:
    """A diffusion model, its text encoder and its VAE, of one file: a ModelPatcher, a CLIP and a VAE. See load_model.

    embeddings: ComfyUI's folders of textual inversions. wanted: those of the three to load; the others are None.
    """
    values, metadata = _read(path, device)
    prefix = detection.unet_prefix_from_state_dict(values)
    sd = _state_dict(values)
    config = detection.model_config_from_unet(sd, prefix, metadata=metadata)
    if config is None or (list(wanted) != ["model"] and all(name.startswith(prefix) for name in sd)):
        raise InvalidArgumentError(f"{_name(path)} is no checkpoint, with a text encoder or a VAE beside the model{_what_fits(values, metadata)}")
    for name in [name for name in sd if name.startswith(tuple(config.vae_key_prefix)) and is_4bit(sd[name])]:
        sd[name] = sd[name].dequantize()  # the VAE's layers are ComfyUI's own
        sd.pop(_description(name))
    encoder_device = "cpu" if device == "cpu" else "default"
    if _straight(device):
        sd = {name: tensor if name.startswith(prefix) else tensor.cpu() for name, tensor in sd.items()}
    compute_dtype = dtype or _compute_dtype(config, device)
    encoder_dtype = management.text_encoder_dtype()
    absent: list[str] = []
    model_options = _options(device, management.unet_offload_device())
    encoder_options = _options(encoder_device, management.text_encoder_offload_device())
    model, clip, vae, _ = _call(
        path,
        comfy.sd.load_state_dict_guess_config,
        sd,
        output_model="model" in wanted,
        output_clip="clip" in wanted,
        output_vae="vae" in wanted,
        embedding_directory=embeddings,
        model_options=model_options | {"dtype": compute_dtype, "custom_operations": _ops(compute_dtype, absent)},
        te_model_options=encoder_options | {"custom_operations": _ops(encoder_dtype, absent)},
        metadata=metadata,
        disable_dynamic=disable_dynamic,
    )
    _check_absent(path, absent)
    if model is not None:
        _placed(model, compute_dtype, device)
    for name, patcher in (("model", model), ("clip", getattr(clip, "patcher", None)), ("vae", getattr(vae, "patcher", None))):
        if patcher is not None:
            patcher.cached_patcher_init = (_load_part, (path, dtype, device, embeddings, name))
    return model, clip, vae


def _load_part(path: str, dtype: Any, device: str, embeddings: Any, part: str, disable_dynamic: bool = False) -> Any:
    """One part's patcher, which ComfyUI asks for where it needs a second one."""
    model, clip, vae = load_checkpoint(path, dtype, device, embeddings, [part], disable_dynamic)
    return {"model": model, "clip": getattr(clip, "patcher", None), "vae": getattr(vae, "patcher", None)}[part]


def holds_4bit(path: str) -> bool:
    """Whether it is a file that load_model and the like are for."""
    try:
        with models.open(path) as model:
            return any(layer.format in LAYOUTS for layer in model.layers.values())
    except GquantError:
        return False


def load_clip(
    paths: Sequence[str],
    clip_type: Any,
    dtype: Optional[torch.dtype] = None,
    device: str = "default",
    embeddings: Any = None,
    options: Optional[dict[str, Any]] = None,
    disable_dynamic: bool = False,
) -> Any:
    """A text encoder, or several that a model takes together: a CLIP.

    paths: one file per encoder; at least one has 4-bit weights. clip_type: of comfy.sd.CLIPType: for which kind of model. options: more
    of ComfyUI's model options. The rest is as load_model and load_checkpoint have it.
    """
    read = [_read(path, device, quantized=False) for path in paths]
    if not any(isinstance(value, files.Weight) for values, _ in read for value in values.values()):
        raise _not_quantized(paths[0])
    sds = []
    for path, (values, metadata) in zip(paths, read):
        sd = _state_dict(values)
        if comfy.sd.detect_te_model(sd) is None and "transformer.resblocks.0.ln_1.weight" not in sd:
            raise InvalidArgumentError(f"{_name(path)} is no text encoder that this ComfyUI knows{_what_fits(values, metadata)}")
        sds.append(sd)
    absent: list[str] = []
    encoder_dtype = dtype or management.text_encoder_dtype()
    model_options = _options(device, management.text_encoder_offload_device()) | (options or {})
    model_options |= {"dtype": encoder_dtype, "custom_operations": _ops(encoder_dtype, absent)}
    clip = _call(
        paths[0],
        comfy.sd.load_text_encoder_state_dicts,
        sds,
        embedding_directory=embeddings,
        clip_type=clip_type,
        model_options=model_options,
        disable_dynamic=disable_dynamic,
    )
    _check_absent(" and ".join(paths), absent)
    clip.patcher.cached_patcher_init = (_reload_clip, (paths, clip_type, dtype, device, embeddings, options))
    return clip


def _reload_clip(*arguments: Any, disable_dynamic: bool = False) -> Any:
    return load_clip(*arguments, disable_dynamic=disable_dynamic).patcher


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
            sd[_description(name)] = _describe(tensor)
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
    built = _build(sd, config, None, model.model.get_dtype_inference(), device, disable_dynamic, "the quantized model")
    # All but the weights is the given model's: options, sampling, wrappers.
    result = model.clone(model_override=(built.model, ({}, {}, {}, set())))
    result.patches, result.hook_backup, result.size = {}, {}, 0
    result.clone_base_uuid, result.parent = built.clone_base_uuid, None
    result.cached_patcher_init = None
    if model.cached_patcher_init is not None:
        result.cached_patcher_init = (_quantize_again, (model.cached_patcher_init, model.patches, quant_type, blocksize, nested, exclude))
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


def save_model(path: str, model: Any, clip: Any = None, vae: Any = None, metadata: Optional[dict[str, str]] = None) -> int:
    """Writes a 4-bit model, with clip and vae a checkpoint, as bitsandbytes names things and ComfyUI too. Returns its 4-bit layers.

    LoRAs and other patches are written into the weights. The file is read back: BadFileError if it lacks a layer.
    """
    parts = [model.model] if clip is None else [model.model, clip.cond_stage_model]
    count, *more = (sum(is_4bit(weight) for weight in part.parameters()) for part in parts)
    if not count:
        raise InvalidArgumentError(
            "the model has no 4-bit weights: put Quantize to 4 Bits (Quantize4Bit) before this node, or save it with Save Model (ModelSave)"
        )
    unfinished = path + ".part"
    try:
        comfy.sd.save_checkpoint(unfinished, model, clip, vae, metadata=metadata)
        with models.open(unfinished) as saved:
            written = sum(layer.format in LAYOUTS for layer in saved.layers.values())
        if written != sum(more, count):
            raise BadFileError(f"ComfyUI wrote {written} of {sum(more, count)} 4-bit layers of the model; nothing was saved as {_name(path)}")
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)
    return written


# ---- files


def _read(path: str, device: str, quantized: bool = True) -> tuple[dict[str, files.Value], dict[str, str]]:
    """The weights of a file and its metadata. quantized: whether they must be."""
    if not path.lower().endswith((".safetensors", ".sft")):
        raise UnsupportedError(f"{_name(path)} is no safetensors file, as which alone 4-bit weights are published")
    with models.open(path) as model:
        metadata, layers = dict(model.metadata), list(model.layers.values())
    if quantized and not layers:
        raise _not_quantized(path)
    if _straight(device) or any(layer.convention != "bitsandbytes" for layer in layers):
        tensors = load_4bit_model(path, management.get_torch_device() if _straight(device) else "cpu")
    else:
        tensors = comfy.utils.load_torch_file(path, safe_load=True)  # views of the file, which ComfyUI can read again from it
    tensors, metadata = comfy.utils.convert_old_quants(tensors, "", metadata=metadata)
    notices: list[str] = []
    try:
        values = files.weights(tensors, notices)
    except BadFileError as e:
        raise BadFileError(f"{_name(path)}: {e}") from None
    _tell(path, notices)
    return values, metadata


def _not_quantized(path: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{_name(path)} is not quantized. Load it with ComfyUI's own loader and connect Quantize to 4 Bits (Quantize4Bit), or convert the file "
        f"once: gquant convert {_name(path)} --mode nf4"
    )


def _state_dict(values: dict[str, files.Value]) -> StateDict:
    """What ComfyUI takes: QuantizedTensors, each with its description."""
    sd: StateDict = {}
    for name, value in values.items():
        if not isinstance(value, files.Weight):
            sd[name] = value
        elif len(value.shape) == 2 and name.endswith(".weight"):
            sd[name] = wrap(value.packed, value.state)
            sd[_description(name)] = _describe(sd[name])
        else:
            sd[name] = value.dequantize()  # of no linear layer
    return sd


def _description(name: str) -> str:
    return name.removesuffix("weight") + "comfy_quant"


def _describe(weight: QuantizedTensor) -> Tensor:
    """ComfyUI's JSON of a layer, by which it sees that a model is quantized."""
    return torch.frombuffer(bytearray(json.dumps({"format": FORMATS[weight._layout_cls]}).encode()), dtype=torch.uint8)


def _detect(values: dict[str, files.Value], metadata: Optional[dict[str, str]], notices: list[str]) -> tuple[StateDict, Any]:
    """The state dict with ComfyUI's names, and what ComfyUI knows of the model; None if it does not know it."""
    sd = _state_dict(values)
    config = detection.model_config_from_unet(sd, "", metadata=metadata)
    if config is None and (maps := files.row_map(detection.convert_diffusers_mmdit, values)) is not None:
        sd = _state_dict(files.rearranged(values, maps, notices))
        config = detection.model_config_from_unet(sd, "", metadata=metadata)
    elif config is None:  # a UNet with diffusers' names, which ComfyUI's loader renames
        config = detection.model_config_from_diffusers_unet(sd)
    return sd, config


def _what_fits(values: dict[str, files.Value], metadata: dict[str, str]) -> str:
    """What can be said of a file that was given to the wrong node."""
    sd = _state_dict(values)
    if any(".lora_" in name or name.startswith("lora_") for name in sd):
        return ": it is a LoRA, which Load LoRA (LoraLoader) takes"
    if comfy.sd.detect_te_model(sd) is not None:
        return ": it is a text encoder, which Load 4-Bit CLIP (Load4BitCLIP) takes"
    prefix = detection.unet_prefix_from_state_dict(values)
    inside = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    try:
        known = _detect(inside or values, metadata, [])[1] is not None
    except BadFileError as e:
        return f": {e}"
    if known:
        return ": it is a diffusion model, which Load 4-Bit Diffusion Model (Load4BitModel) takes"
    if any(name.startswith(("decoder.", "first_stage_model.")) for name in sd):
        return ": it looks like a VAE, which Load VAE (VAELoader) takes"
    return ". A newer ComfyUI may know it; its tensors are such as " + ", ".join(sorted(sd)[:3])


# ---- models


def _build(sd: StateDict, config: Any, metadata: Any, dtype: Optional[torch.dtype], device: str, disable_dynamic: bool, path: str) -> Any:
    compute_dtype = dtype or _compute_dtype(config, device)
    absent: list[str] = []
    options = _options(device, management.unet_offload_device()) | {"dtype": compute_dtype, "custom_operations": _ops(compute_dtype, absent)}
    patcher = _call(
        path, comfy.sd.load_diffusion_model_state_dict, sd, model_options=options, metadata=metadata, disable_dynamic=disable_dynamic
    )
    _check_absent(path, absent)
    return _placed(patcher, compute_dtype, device)


def _compute_dtype(config: Any, device: str) -> torch.dtype:
    """What ComfyUI computes in with weights of no dtype of their own."""
    runs_on = torch.device("cpu") if device == "cpu" else management.get_torch_device()
    return management.unet_manual_cast(None, runs_on, config.supported_inference_dtypes)


def _options(device: str, offload_device: torch.device) -> dict[str, Any]:
    """ComfyUI's model options for a device."""
    if device == "cpu":
        return {"load_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    return {"offload_device": management.get_torch_device() if _straight(device) else offload_device}


def _straight(device: str) -> bool:
    """Whether weights are read straight to the GPU: not where ComfyUI streams them there itself."""
    return device == "gpu" and not comfy.memory_management.aimdo_enabled and management.get_torch_device().type == "cuda"


def _placed(patcher: Any, compute_dtype: torch.dtype, device: str) -> Any:
    """Tells the patcher where its weights are, and what they decode to."""
    # ComfyUI sets its default dtype for quantized models, and reserves memory for decoded weights only if one is set.
    patcher.model.manual_cast_dtype = compute_dtype
    if _straight(device):
        patcher.offload_device = management.unet_offload_device()
        management.load_models_gpu([patcher], force_full_load=True)
    return patcher


def _ops(compute_dtype: torch.dtype, absent: list[str]) -> type:
    """Layers that note in absent which of their tensors a state dict lacks: their memory is then whatever it was before."""
    base = linear_4bit_ops(compute_dtype)

    class Noting:
        def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: Any, missing: list[str], *lists: Any) -> None:
            key = prefix + "weight"
            if not isinstance(self, base.Linear) and is_4bit(state_dict.get(key)):
                state_dict[key] = with_dtype(state_dict[key], compute_dtype).dequantize()  # an embedding
                state_dict.pop(_description(key), None)
            lacks_weight, before = isinstance(self, base.Linear) and key not in state_dict, len(missing)
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *lists)
            absent.extend(missing[before:])
            if lacks_weight:  # ComfyUI only logs that
                if prefix.endswith("text_projection."):  # an encoder without one
                    self.weight = nn.Parameter(torch.eye(self.out_features, self.in_features, dtype=compute_dtype), requires_grad=False)
                else:
                    absent.append(key)

    layers = {name: getattr(base, name) for name in dir(base)}
    noting = {name: type(name, (Noting, layer), {}) for name, layer in layers.items() if isinstance(layer, type) and issubclass(layer, nn.Module)}
    return type("Linear4bitOps", (base,), noting)


def _check_absent(path: str, absent: list[str]) -> None:
    needed = [name for name in absent if not _OPTIONAL.search(name)]
    if needed:
        raise BadFileError(
            f"{_name(path)} lacks {len(needed)} tensors that the model needs, such as {needed[0]}: it is cut off or one of several files. "
            "Get it again, whole"
        )


def _call(path: str, function: Any, *arguments: Any, **options: Any) -> Any:
    """What one of ComfyUI's loaders returns; tensors that fit no layer are a BadFileError."""
    try:
        return function(*arguments, **options)
    except RuntimeError as e:
        if "loading state_dict" not in str(e):
            raise
        what, first, *more = (line.strip() for line in str(e).splitlines())
        raise BadFileError(f"{_name(path)} does not fit the model that ComfyUI takes it for. {what} {first} And {len(more)} more") from e


def _name(path: str) -> str:
    return os.path.basename(path)


def _tell(path: str, notices: list[str]) -> None:
    for notice in notices:
        logging.warning("gquant: %s: %s", _name(path), notice)

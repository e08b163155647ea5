"""Models with 4-bit weights from files. Needs ComfyUI."""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Optional

import torch

from .. import model as models
from .._errors import BadFileError, GquantError, InvalidArgumentError, UnsupportedError
from ..torch import reading_4bit_weights
from . import build, files
from .layouts import LAYOUTS, is_4bit

# build has looked whether all is there that is used of ComfyUI.
import comfy.model_detection as detection  # isort: skip
import comfy.model_management as management  # isort: skip
import comfy.sd  # isort: skip
import comfy.utils  # isort: skip

from .ops import FORMATS  # isort: skip

_DESCRIPTIONS = "_quantization_metadata"  # ComfyUI's entry in a file's metadata


def load_model(path: str, dtype: Optional[torch.dtype] = None, device: str = "default", disable_dynamic: bool = False) -> Any:
    """A diffusion model: a ModelPatcher.

    path: a file of bitsandbytes or gquant, of the diffusion model alone or a checkpoint, with ComfyUI's or diffusers' names. dtype:
    what it computes in; None: what ComfyUI takes. device: "default" (ComfyUI moves the weights as it needs them), "gpu" (they are
    read straight to it) or "cpu" (it runs there). disable_dynamic: as ComfyUI's loaders have it.
    """
    notices: list[str] = []
    with _reading(path, device) as (values, metadata, wait):
        sd, config = _detect(values, metadata, notices, wait)
        if config is None:
            wait()
            raise UnsupportedError(f"{build.file_name(path)} is no diffusion model that this ComfyUI knows{_what_fits(values, metadata)}")
        _tell(path, notices)
        patcher = build.build_model(sd, config, metadata, dtype, device, disable_dynamic, path)
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
    sd = build.state_dict(values)
    config = detection.model_config_from_unet(sd, prefix, metadata=metadata)
    if config is None or (list(wanted) != ["model"] and all(name.startswith(prefix) for name in sd)):
        raise InvalidArgumentError(f"{build.file_name(path)} is no checkpoint, with a text encoder or a VAE beside the model{_what_fits(values, metadata)}")
    for name in [name for name in sd if name.startswith(tuple(config.vae_key_prefix)) and is_4bit(sd[name])]:
        sd[name] = sd[name].dequantize()  # the VAE's layers are ComfyUI's own
        sd.pop(build.description(name))
    encoder_device = "cpu" if device == "cpu" else "default"
    if build.reads_straight(device):
        sd = {name: tensor if name.startswith(prefix) else tensor.cpu() for name, tensor in sd.items()}
    compute_dtype = dtype or build.default_dtype(config, device)
    encoder_dtype = management.text_encoder_dtype()
    absent: list[str] = []
    model_options = build.model_options(device, management.unet_offload_device())
    encoder_options = build.model_options(encoder_device, management.text_encoder_offload_device())
    model, clip, vae, _ = build.call(
        path,
        comfy.sd.load_state_dict_guess_config,
        sd,
        output_model="model" in wanted,
        output_clip="clip" in wanted,
        output_vae="vae" in wanted,
        embedding_directory=embeddings,
        model_options=model_options | {"dtype": compute_dtype, "custom_operations": build.layers(compute_dtype, absent)},
        te_model_options=encoder_options | {"custom_operations": build.layers(encoder_dtype, absent)},
        metadata=metadata,
        disable_dynamic=disable_dynamic,
    )
    build.check_absent(path, absent)
    if model is not None:
        build.placed(model, compute_dtype, device)
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
        sd = build.state_dict(values)
        if comfy.sd.detect_te_model(sd) is None and "transformer.resblocks.0.ln_1.weight" not in sd:
            raise InvalidArgumentError(f"{build.file_name(path)} is no text encoder that this ComfyUI knows{_what_fits(values, metadata)}")
        sds.append(sd)
    absent: list[str] = []
    encoder_dtype = dtype or management.text_encoder_dtype()
    model_options = build.model_options(device, management.text_encoder_offload_device()) | (options or {})
    model_options |= {"dtype": encoder_dtype, "custom_operations": build.layers(encoder_dtype, absent)}
    clip = build.call(
        paths[0],
        comfy.sd.load_text_encoder_state_dicts,
        sds,
        embedding_directory=embeddings,
        clip_type=clip_type,
        model_options=model_options,
        disable_dynamic=disable_dynamic,
    )
    build.check_absent(" and ".join(paths), absent)
    clip.patcher.cached_patcher_init = (_reload_clip, (paths, clip_type, dtype, device, embeddings, options))
    return clip


def _reload_clip(*arguments: Any, disable_dynamic: bool = False) -> Any:
    return load_clip(*arguments, disable_dynamic=disable_dynamic).patcher


def _read(path: str, device: str, quantized: bool = True) -> tuple[dict[str, files.Value], dict[str, str]]:
    """The weights of a file and its metadata. quantized: whether they must be."""
    with _reading(path, device, quantized) as (values, metadata, _):
        return values, metadata


@contextlib.contextmanager
def _reading(path: str, device: str, quantized: bool = True) -> Iterator[tuple[dict[str, files.Value], dict[str, str], Callable[[], None]]]:
    """The same while the weights of linear layers may still be read, which takes as long as building a model, and a function that waits
    for them: whatever decodes, cuts or joins weights has to."""
    if not path.lower().endswith((".safetensors", ".sft")):
        raise UnsupportedError(f"{build.file_name(path)} is no safetensors file, as which alone 4-bit weights are published")
    known: dict[str, files.Weight] = {}
    read: Callable[[], None] = lambda: None  # noqa: E731

    @functools.cache
    def wait() -> None:
        read()
        with _naming(path):
            files.check_statistics(known)

    with contextlib.ExitStack() as stack:
        model = stack.enter_context(models.open(path))
        metadata, layers = _undescribed(model.metadata), list(model.layers.values())
        if quantized and not layers:
            raise _not_quantized(path)
        if build.reads_straight(device) or any(layer.convention != "bitsandbytes" for layer in layers):
            to = management.get_torch_device() if build.reads_straight(device) else "cpu"
            tensors, weights, read = stack.enter_context(reading_4bit_weights(model, to))
            known = {name: files.Weight(*weight) for name, weight in weights.items()}
        else:
            tensors = comfy.utils.load_torch_file(path, safe_load=True)  # views of the file, which ComfyUI can read again from it
        tensors, metadata = comfy.utils.convert_old_quants(tensors, "", metadata=metadata)
        notices: list[str] = []
        with _naming(path):
            values = files.weights(tensors, notices, known)
        _tell(path, notices)
        if not all(build.is_linear(name, value) for name, value in known.items()):
            wait()
        yield values, metadata, wait
        wait()


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Names a file in what is said of it."""
    try:
        yield
    except BadFileError as e:
        raise BadFileError(f"{build.file_name(path)}: {e}") from None


def _undescribed(metadata: Mapping[str, str]) -> dict[str, str]:
    """Without the descriptions of 4-bit layers, each of which ComfyUI would make a tensor that says what is known already."""
    try:
        described = json.loads(metadata.get(_DESCRIPTIONS, "{}"))
    except ValueError as e:
        raise BadFileError(f"{_DESCRIPTIONS} in the file's metadata is no JSON: {e}") from None
    others = {name: layer for name, layer in described.get("layers", {}).items() if layer.get("format") not in FORMATS.values()}
    kept = {key: value for key, value in metadata.items() if key != _DESCRIPTIONS}
    return kept | ({_DESCRIPTIONS: json.dumps(described | {"layers": others})} if others else {})


def _not_quantized(path: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{build.file_name(path)} is not quantized. Load it with ComfyUI's own loader and connect Quantize to 4 Bits (Quantize4Bit), or convert the file "
        f"once: gquant convert {build.file_name(path)} --mode nf4"
    )


def _detect(
    values: dict[str, files.Value], metadata: Optional[dict[str, str]], notices: list[str], wait: Callable[[], None] = lambda: None
) -> tuple[build.StateDict, Any]:
    """A diffusion model's state dict with ComfyUI's names, and what ComfyUI knows of the model; None if it does not know it."""
    prefix = detection.unet_prefix_from_state_dict(values)  # of a checkpoint
    values = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)} or values
    sd = build.state_dict(values, wait)
    config = detection.model_config_from_unet(sd, "", metadata=metadata)
    if config is None and (maps := files.row_map(detection.convert_diffusers_mmdit, values)) is not None:
        wait()
        sd = build.state_dict(files.rearranged(values, maps, notices))
        config = detection.model_config_from_unet(sd, "", metadata=metadata)
    elif config is None:  # a UNet with diffusers' names, which ComfyUI's loader renames
        config = detection.model_config_from_diffusers_unet(sd)
    return sd, config


def _what_fits(values: dict[str, files.Value], metadata: dict[str, str]) -> str:
    """What can be said of a file that was given to the wrong node."""
    sd = build.state_dict(values)
    if any(".lora_" in name or name.startswith("lora_") for name in sd):
        return ": it is a LoRA, which Load LoRA (LoraLoader) takes"
    if comfy.sd.detect_te_model(sd) is not None:
        return ": it is a text encoder, which Load 4-Bit CLIP (Load4BitCLIP) takes"
    try:
        known = _detect(values, metadata, [])[1] is not None
    except BadFileError as e:
        return f": {e}"
    if known:
        return ": it is a diffusion model, which Load 4-Bit Diffusion Model (Load4BitModel) takes"
    if any(name.startswith(("decoder.", "first_stage_model.")) for name in sd):
        return ": it looks like a VAE, which Load VAE (VAELoader) takes"
    return ". A newer ComfyUI may know it; its tensors are such as " + ", ".join(sorted(sd)[:3])


def _tell(path: str, notices: list[str]) -> None:
    for notice in notices:
        logging.warning("gquant: %s: %s", build.file_name(path), notice)

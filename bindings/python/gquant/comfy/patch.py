"""The patch that lets ComfyUI's own loaders open 4-bit files. Needs ComfyUI; nothing installs it but GQUANT_PATCH_CORE=1 or a call.

Three functions of comfy.sd, which Load Diffusion Model, Load Checkpoint, Load CLIP and many custom nodes call, hand files with 4-bit
weights to gquant.comfy.loaders, and do with all others what they always did.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import loaders

import comfy.sd  # isort: skip

Arguments = dict[str, Any]
_wrapped: dict[str, Callable[..., Any]] = {}  # by the name of the function that each took the place of
_installed = False


def install() -> None:
    """Patches ComfyUI, once however often it is called."""
    global _installed
    _installed = True
    for name, (path, load) in _LOADERS.items():
        if name not in _wrapped:
            _wrapped[name] = _wrap(getattr(comfy.sd, name), path, load)
            setattr(comfy.sd, name, _wrapped[name])


def restore() -> None:
    """Makes ComfyUI what it was. Where someone patched over the patch, it stays in between and does nothing."""
    global _installed
    _installed = False
    for name in list(_wrapped):
        if getattr(comfy.sd, name) is _wrapped[name]:
            setattr(comfy.sd, name, _wrapped.pop(name).__wrapped__)


def _wrap(original: Callable[..., Any], path: str, load: Callable[[Arguments], Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments[path]
        paths = given if isinstance(given, list) else [given]
        # Who brings own layers knows what to do with them.
        own_layers = call.arguments["model_options"].get("custom_operations") is not None
        if _installed and not own_layers and any(map(loaders.holds_4bit, paths)):
            return load(call.arguments)
        return original(*args, **kwargs)

    return wrapped


def _device(arguments: Arguments) -> str:
    return "cpu" if arguments["model_options"].get("load_device") == torch.device("cpu") else "default"


def _model(a: Arguments) -> Any:
    # The dtype that the node offers is one for weights, and these have theirs.
    return loaders.load_model(a["unet_path"], device=_device(a), disable_dynamic=a["disable_dynamic"])


def _checkpoint(a: Arguments) -> Any:
    wanted = [name for name in ("model", "clip", "vae") if a[f"output_{name}"]]
    parts = loaders.load_checkpoint(
        a["ckpt_path"], device=_device(a), embeddings=a["embedding_directory"], wanted=wanted, disable_dynamic=a["disable_dynamic"]
    )
    return *parts, None


def _clip(a: Arguments) -> Any:
    options = {key: value for key, value in a["model_options"].items() if key not in ("dtype", "load_device", "offload_device")}
    return loaders.load_clip(
        a["ckpt_paths"], a["clip_type"], device=_device(a), embeddings=a["embedding_directory"], options=options, disable_dynamic=a["disable_dynamic"]
    )


_LOADERS = {
    "load_diffusion_model": ("unet_path", _model),
    "load_checkpoint_guess_config": ("ckpt_path", _checkpoint),
    "load_clip": ("ckpt_paths", _clip),
}

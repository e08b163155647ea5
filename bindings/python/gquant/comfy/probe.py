"""What gquant needs of comfy-kitchen and of ComfyUI, looked for by name: versions say little, forks and nightly builds less.

Each check raises an UnsupportedError that says what is missing, in what, and what to do; once it has passed, it costs nothing.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
from typing import Any

from .._errors import UnsupportedError

_KITCHEN = {
    "comfy_kitchen.tensor.BaseLayoutParams": ("scale", "orig_dtype", "orig_shape"),
    "comfy_kitchen.tensor.QuantizedLayout.requantize_kwargs": (),  # since 0.2.13; without it a LoRA changes the format
    "comfy_kitchen.tensor.QuantizedTensor": ("qdata", "layout_cls", "params"),
    "comfy_kitchen.tensor.dequantize_args": (),
    "comfy_kitchen.tensor.get_layout_class": (),
    "comfy_kitchen.tensor.register_layout_class": ("name", "cls"),
    "comfy_kitchen.tensor.register_layout_op": (),
}
# By name, the parameters that are used.
_COMFYUI = {
    "comfy.model_detection.convert_diffusers_mmdit": ("state_dict",),
    "comfy.model_detection.model_config_from_diffusers_unet": ("state_dict",),
    "comfy.model_detection.model_config_from_unet": ("state_dict", "unet_key_prefix", "metadata"),
    "comfy.model_detection.unet_prefix_from_state_dict": ("state_dict",),
    "comfy.model_management.get_torch_device": (),
    "comfy.model_management.load_models_gpu": ("models", "force_full_load"),
    "comfy.model_management.text_encoder_dtype": (),
    "comfy.model_management.text_encoder_offload_device": (),
    "comfy.model_management.throw_exception_if_processing_interrupted": (),
    "comfy.model_management.unet_manual_cast": ("weight_dtype", "inference_device", "supported_dtypes"),
    "comfy.model_management.unet_offload_device": (),
    "comfy.model_management.unload_model_and_clones": ("model",),
    "comfy.model_patcher.LowVramPatch": ("key", "patches"),
    "comfy.ops.mixed_precision_ops": ("quant_config", "compute_dtype"),
    "comfy.ops.run_every_op": (),
    "comfy.quant_ops.QUANT_ALGOS": (),
    "comfy.sd.CLIPType": (),
    "comfy.sd.detect_te_model": ("sd",),
    "comfy.sd.load_checkpoint_guess_config": ("ckpt_path", "output_vae", "output_clip", "output_model", "embedding_directory", "model_options"),
    "comfy.sd.load_clip": ("ckpt_paths", "embedding_directory", "clip_type", "model_options", "disable_dynamic"),
    "comfy.sd.load_diffusion_model": ("unet_path", "model_options", "disable_dynamic"),
    "comfy.sd.load_diffusion_model_state_dict": ("sd", "model_options", "metadata", "disable_dynamic"),
    "comfy.sd.load_state_dict_guess_config": ("sd", "output_model", "model_options", "te_model_options", "metadata", "disable_dynamic"),
    "comfy.sd.load_text_encoder_state_dicts": ("state_dicts", "clip_type", "model_options", "disable_dynamic"),
    "comfy.sd.save_checkpoint": ("output_path", "model", "clip", "vae", "metadata"),
    "comfy.utils.ProgressBar": ("total",),
    "comfy.utils.convert_old_quants": ("state_dict", "model_prefix", "metadata"),
    "comfy.utils.load_torch_file": ("ckpt", "safe_load", "return_metadata"),
    "comfy.utils.state_dict_prefix_replace": ("state_dict", "replace_prefix", "filter_keys"),
    "comfy.weight_adapter.LoRAAdapter": ("weights",),
}


@functools.cache
def kitchen() -> None:
    """Checks comfy-kitchen."""
    try:
        importlib.import_module("comfy_kitchen.tensor")
    except ImportError as e:
        raise UnsupportedError(f"gquant's layouts need comfy-kitchen 0.2.13 or newer ({e}): pip install --upgrade comfy-kitchen") from e
    missing = _missing(_KITCHEN)
    if missing:
        raise UnsupportedError(
            f"comfy-kitchen {_version('comfy-kitchen')} lacks {missing}; gquant needs 0.2.13 or newer and was tested with 0.2.40: "
            "pip install --upgrade comfy-kitchen"
        )


@functools.cache
def comfyui() -> None:
    """Checks ComfyUI, and comfy-kitchen with it."""
    kitchen()
    if importlib.util.find_spec("comfy") is None:
        raise UnsupportedError("there is no ComfyUI to import: this part of gquant.comfy works in its process, or with its folder in sys.path")
    missing = _missing(_COMFYUI)
    if missing:
        try:
            version = importlib.import_module("comfyui_version").__version__
        except (ImportError, AttributeError):
            version = "of unknown version"
        raise UnsupportedError(
            f"this ComfyUI ({version}) lacks {missing}, which gquant uses; it was tested with 0.33 and needs 0.27 or newer: update "
            "ComfyUI if it is older, and gquant if ComfyUI is newer"
        )


def _missing(wanted: dict[str, tuple[str, ...]]) -> str:
    """The first that is not there, or "": a name, or one of its parameters."""
    for name, parameters in wanted.items():
        try:
            found = _find(name)
        except (ImportError, AttributeError):
            return name
        if parameters:
            there = inspect.signature(found).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in there.values()):
                for parameter in parameters:
                    if parameter not in there:
                        return f"{name}({parameter}=)"
    return ""


def _find(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as e:
        if e.name != module:
            raise
        return getattr(_find(module), attribute)  # of a class


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"

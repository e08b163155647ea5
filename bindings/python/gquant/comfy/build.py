"""Models of state dicts with 4-bit weights, built by ComfyUI's own loaders. Needs ComfyUI.

They get the weights as QuantizedTensors, by whose shapes they detect a model, and layers that take those. Nothing of ComfyUI is changed.
"""

import os
import re
from collections.abc import Callable
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .._errors import BadFileError
from . import files, probe
from .layouts import QuantizedTensor, is_4bit, with_dtype, wrap

probe.comfyui()

import comfy.memory_management  # noqa: E402
import comfy.model_management as management  # noqa: E402
import comfy.sd  # noqa: E402

from .ops import describe, linear_4bit_ops  # noqa: E402

# What an encoder works without: files of text encoders often leave it out.
_OPTIONAL = re.compile(r"(^|\.)(visual|vision_\w+|audio_\w+|multi_modal_projector|lm_head)\.")

StateDict = dict[str, Union[Tensor, QuantizedTensor]]


def state_dict(values: dict[str, files.Value], wait: Optional[Callable[[], None]] = None) -> StateDict:
    """What ComfyUI takes: QuantizedTensors, each with its description. wait: for weights that are still being read."""
    sd: StateDict = {}
    for name, value in values.items():
        if not isinstance(value, files.Weight):
            sd[name] = value
        elif is_linear(name, value):
            sd[name] = wrap(value.packed, value.state, wait=wait)
            sd[description(name)] = describe(sd[name])
        else:
            sd[name] = value.dequantize()  # of no linear layer
    return sd


def is_linear(name: str, weight: files.Weight) -> bool:
    """Whether a weight can be that of a linear layer."""
    return len(weight.shape) == 2 and name.endswith(".weight")


def description(name: str) -> str:
    """The key of a weight's description."""
    return name.removesuffix("weight") + "comfy_quant"


def build_model(
    sd: StateDict,
    config: Any,
    metadata: Any,
    dtype: Optional[torch.dtype],
    device: str,
    disable_dynamic: bool,
    path: str,
) -> Any:
    """A ModelPatcher of a diffusion model. config: what ComfyUI detected. path: named in errors. The rest: see loaders.load_model."""
    compute_dtype = dtype or default_dtype(config, device)
    absent: list[str] = []
    options = model_options(device, management.unet_offload_device()) | {"dtype": compute_dtype, "custom_operations": layers(compute_dtype, absent, device)}
    patcher = call(
        path, comfy.sd.load_diffusion_model_state_dict, sd, model_options=options, metadata=metadata, disable_dynamic=disable_dynamic
    )
    check_absent(path, absent)
    return placed(patcher, compute_dtype, device)


def default_dtype(config: Any, device: str) -> torch.dtype:
    """What ComfyUI computes in with weights of no dtype of their own."""
    runs_on = torch.device("cpu") if device == "cpu" else management.get_torch_device()
    return management.unet_manual_cast(None, runs_on, config.supported_inference_dtypes)


def model_options(device: str, offload_device: torch.device) -> dict[str, Any]:
    """ComfyUI's model options for a device."""
    if device == "cpu":
        return {"load_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    return {"offload_device": management.get_torch_device() if reads_straight(device) else offload_device}


def reads_straight(device: str) -> bool:
    """Whether weights are read straight to the GPU: not where ComfyUI streams them there itself."""
    return device == "gpu" and not comfy.memory_management.aimdo_enabled and management.get_torch_device().type == "cuda"


def placed(patcher: Any, compute_dtype: torch.dtype, device: str) -> Any:
    """Tells the patcher where its weights are, and what they decode to."""
    # ComfyUI sets its default dtype for quantized models, and reserves memory for decoded weights only if one is set.
    patcher.model.manual_cast_dtype = compute_dtype
    if reads_straight(device):
        patcher.offload_device = management.unet_offload_device()
        for module in patcher.model.modules():
            # What ComfyUI notes of weights that are on the device and patched. To get there it would wait for the device, which is
            # still being sent weights, once per module.
            module.comfy_patched_weights = True
        management.load_models_gpu([patcher], force_full_load=True)
    return patcher


def layers(compute_dtype: torch.dtype, absent: list[str], device: str = "default") -> type:
    """Layers that note in absent which of their tensors a state dict lacks: their memory is then whatever it was before."""
    base = linear_4bit_ops(compute_dtype)
    place = management.get_torch_device() if reads_straight(device) else None

    class Noting:
        def __init__(self, *args: Any, **options: Any):
            if place is not None and options.get("device", place) is None:
                options["device"] = place  # ComfyUI would move each tensor there later, in turn with the weights that are being read
            super().__init__(*args, **options)

        def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: Any, missing: list[str], *lists: Any) -> None:
            key = prefix + "weight"
            if not isinstance(self, base.Linear) and is_4bit(state_dict.get(key)):
                state_dict[key] = with_dtype(state_dict[key], compute_dtype).dequantize()  # an embedding
                state_dict.pop(description(key), None)
            lacks_weight, before = isinstance(self, base.Linear) and key not in state_dict, len(missing)
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *lists)
            absent.extend(missing[before:])
            if lacks_weight:  # ComfyUI only logs that
                if prefix.endswith("text_projection."):  # an encoder without one
                    self.weight = nn.Parameter(torch.eye(self.out_features, self.in_features, dtype=compute_dtype), requires_grad=False)
                else:
                    absent.append(key)

    found = {name: getattr(base, name) for name in dir(base)}
    noting = {name: type(name, (Noting, layer), {}) for name, layer in found.items() if isinstance(layer, type) and issubclass(layer, nn.Module)}
    return type("Linear4bitOps", (base,), noting)


def check_absent(path: str, absent: list[str]) -> None:
    """BadFileError if the file lacks tensors that its model needs."""
    needed = [name for name in absent if not _OPTIONAL.search(name)]
    if needed:
        raise BadFileError(
            f"{file_name(path)} lacks {len(needed)} tensors that the model needs, such as {needed[0]}: it is cut off or one of several files. "
            "Get it again, whole"
        )


def call(path: str, function: Any, *arguments: Any, **options: Any) -> Any:
    """What one of ComfyUI's loaders returns; tensors that fit no layer are a BadFileError."""
    try:
        return function(*arguments, **options)
    except RuntimeError as e:
        if "loading state_dict" not in str(e):
            raise
        what, first, *more = (line.strip() for line in str(e).splitlines())
        raise BadFileError(f"{file_name(path)} does not fit the model that ComfyUI takes it for. {what} {first} And {len(more)} more") from e


def file_name(path: str) -> str:
    """What the user knows a file by."""
    return os.path.basename(path)

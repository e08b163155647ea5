"""Models with 4-bit weights into files. Needs ComfyUI."""

import os
from typing import Any, Optional

from .. import model as models
from .._errors import BadFileError, InvalidArgumentError
from . import build
from .layouts import LAYOUTS, is_4bit

import comfy.sd  # isort: skip


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
            raise BadFileError(f"ComfyUI wrote {written} of {sum(more, count)} 4-bit layers of the model; nothing was saved as {build.file_name(path)}")
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)
    return written

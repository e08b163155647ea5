"""gquant for ComfyUI: NF4 and FP4 weights that stay packed, as QuantizedTensors of comfy-kitchen.

Needs torch and comfy-kitchen; gquant.comfy.ops and what loads models need ComfyUI itself.
"""

from . import handlers as _handlers  # registers them
from .layouts import FP4Layout, NF4Layout, is_4bit, wrap

__all__ = ["FP4Layout", "NF4Layout", "is_4bit", "wrap"]

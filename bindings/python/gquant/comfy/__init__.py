"""gquant for ComfyUI: NF4 and FP4 weights that stay packed, as QuantizedTensors of comfy-kitchen.

Needs torch and comfy-kitchen; gquant.comfy.ops and what loads models need ComfyUI itself.
"""

from . import probe as _probe

_probe.kitchen()  # before comfy-kitchen is imported without a word of what is missing

from . import handlers as _handlers  # noqa: E402, F401: registers them
from .layouts import FP4Layout, NF4Layout, is_4bit, wrap  # noqa: E402

__all__ = ["FP4Layout", "NF4Layout", "is_4bit", "wrap"]

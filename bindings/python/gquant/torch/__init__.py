"""gquant for PyTorch: quantize_4bit and dequantize_4bit, a QuantState and a Linear4bit that exchange state dicts with
bitsandbytes, and the operators torch.ops.gquant.*, which torch.compile understands and autograd follows."""

from .functional import dequantize_4bit, quantize_4bit
from .linear import Linear4bit
from .model import load_4bit_model, load_4bit_weights, reading_4bit_weights
from .ops import settled_weights
from .state import QuantState

__all__ = [
    "Linear4bit",
    "QuantState",
    "dequantize_4bit",
    "load_4bit_model",
    "load_4bit_weights",
    "quantize_4bit",
    "reading_4bit_weights",
    "settled_weights",
]

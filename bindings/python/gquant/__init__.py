"""Quantize model weights to 4 and 8 bits with the bytes of bitsandbytes' CUDA backend; read, write and decode such models.

gquant.torch has the same for PyTorch, with operators and a Linear4bit module.
"""

from ._errors import (
    BadFileError,
    CancelledError,
    DeviceError,
    FailedError,
    ForkedError,
    GquantError,
    InternalError,
    InvalidArgumentError,
    InvalidHandleError,
    IoError,
    NotFoundError,
    OutOfMemoryError,
    UnsupportedError,
)
from .device import Device, devices, prepare
from .jobs import convert, dequantize_model, diff, inspect, verify
from .model import Layer, Model, Tensor, open
from .quant import (
    QuantState,
    codebook,
    dequantize_blockwise,
    pack_4bit,
    quantize,
    quantize_blockwise,
    quantize_rows_int8,
    unpack_4bit,
)

__version__ = "0.1.0"

__all__ = [
    "BadFileError",
    "CancelledError",
    "Device",
    "DeviceError",
    "FailedError",
    "ForkedError",
    "GquantError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidHandleError",
    "IoError",
    "Layer",
    "Model",
    "NotFoundError",
    "OutOfMemoryError",
    "QuantState",
    "Tensor",
    "UnsupportedError",
    "codebook",
    "convert",
    "dequantize_blockwise",
    "dequantize_model",
    "devices",
    "diff",
    "inspect",
    "open",
    "pack_4bit",
    "prepare",
    "quantize",
    "quantize_blockwise",
    "quantize_rows_int8",
    "unpack_4bit",
    "verify",
]

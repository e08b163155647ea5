"""The element types of safetensors, by the names that numpy, ml_dtypes and torch have for them."""

from typing import Any

from ._errors import InvalidArgumentError

# Name: number in the header, bits.
_TABLE = {
    "bool": (1, 8),
    "float4_e2m1fn": (2, 4),
    "float6_e2m3fn": (3, 6),
    "float6_e3m2fn": (4, 6),
    "uint8": (5, 8),
    "int8": (6, 8),
    "float8_e5m2": (7, 8),
    "float8_e4m3fn": (8, 8),
    "float8_e8m0fnu": (9, 8),
    "float8_e4m3fnuz": (10, 8),
    "float8_e5m2fnuz": (11, 8),
    "int16": (12, 16),
    "uint16": (13, 16),
    "float16": (14, 16),
    "bfloat16": (15, 16),
    "int32": (16, 32),
    "uint32": (17, 32),
    "float32": (18, 32),
    "complex64": (19, 64),
    "float64": (20, 64),
    "int64": (21, 64),
    "uint64": (22, 64),
}
_NAMES = {number: name for name, (number, _) in _TABLE.items()}

WEIGHTS = ("float32", "float16", "bfloat16")  # what can be quantized, and decoded to


def number(name: str) -> int:
    """The header's number."""
    return _TABLE[name][0]


def bits(name: str) -> int:
    return _TABLE[name][1]


def from_number(n: int) -> str:
    return _NAMES[n]


def parse(dtype: Any) -> str:
    """The name of a dtype given by its name, or as numpy's, ml_dtypes' or torch's."""
    name = getattr(dtype, "__name__", None) or str(dtype).removeprefix("torch.")
    if name not in _TABLE:
        raise InvalidArgumentError(f"dtype is {dtype!r}; want one of {', '.join(_TABLE)}")
    return name


def parse_weight(dtype: Any) -> str:
    """parse, of a dtype that weights can have."""
    name = parse(dtype)
    if name not in WEIGHTS:
        raise InvalidArgumentError(f"dtype is {name}; want one of {', '.join(WEIGHTS)}")
    return name

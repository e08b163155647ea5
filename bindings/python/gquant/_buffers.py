"""Where the memory of other libraries' arrays is, without copying it, and new arrays for results.

view() takes what has the buffer protocol (numpy, array.array, bytes, mmap, ctypes, …), torch tensors, and what has
`__array_interface__` or DLPack. empty() makes a torch tensor for a caller who gave one, else a numpy array if numpy is
installed, else a memoryview.
"""

import contextlib
import ctypes
import functools
import math
import sys
from typing import Any, NamedTuple, Optional

from . import _dtypes
from ._errors import InvalidArgumentError, UnsupportedError


class Buffer(NamedTuple):
    """Memory of someone else."""

    address: int
    nbytes: int
    dtype: str  # if gquant has no name for it, what its own library calls it
    shape: tuple[int, ...]
    owner: object  # keeps the memory where it is, as long as it is referenced


def view(array: Any, name: str, writable: bool = False) -> Buffer:
    """The memory of an array on the host, C-contiguous; name is what errors call it.

    TypeError: it is no array. InvalidArgumentError: it is not contiguous, not on the host, or read-only although
    writable is asked for.
    """
    if is_torch(array):
        return _of_torch(array, name)
    if hasattr(array, "__cuda_array_interface__"):
        raise _elsewhere(name, "a CUDA device")
    if (memory := _memoryview(array)) is not None:
        return _of_memory(memory, name, writable)
    if isinstance(getattr(array, "__array_interface__", None), dict):
        return _of_array_interface(array, name, writable)
    if hasattr(array, "__dlpack__"):
        return _of_dlpack(array, name, writable)
    raise TypeError(
        f"{name} is {type(array).__name__}; want an array: of numpy or torch, or with the buffer protocol, "
        "__array_interface__ or DLPack"
    )


def _elsewhere(name: str, device: str) -> UnsupportedError:
    return UnsupportedError(f"{name} is on {device}; this build of gquant computes on the CPU: move it there first")


def _not_contiguous(name: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} is not contiguous in row-major order; copy it into an array that is")


def _read_only(name: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} is read-only; want an array that can be written to")


# ---- torch


def is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _of_torch(tensor: Any, name: str) -> Buffer:
    if tensor.device.type != "cpu":
        raise _elsewhere(name, f"device {tensor.device}")
    if tensor.layout is not sys.modules["torch"].strided or not tensor.is_contiguous():
        raise _not_contiguous(name)
    return Buffer(tensor.data_ptr(), tensor.nbytes, _torch_name(tensor.dtype), tensor.shape, tensor)


@functools.cache
def _torch_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the buffer protocol


def _memoryview(array: Any) -> Optional[memoryview]:
    """None without the protocol, or with a dtype that it cannot express, such as bfloat16."""
    try:
        return memoryview(array)
    except (TypeError, ValueError, BufferError):
        return None


class _PyBuffer(ctypes.Structure):
    """CPython's Py_buffer."""

    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


_PYBUF_FULL_RO = 0x11C
_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None

_KINDS = {"?": "bool", "e": "float", "f": "float", "d": "float", "Zf": "complex"}
_KINDS |= dict.fromkeys("cBHILQN", "uint") | dict.fromkeys("bhilqn", "int")


def _of_memory(memory: memoryview, name: str, writable: bool) -> Buffer:
    if not memory.c_contiguous:
        raise _not_contiguous(name)
    if writable and memory.readonly:
        raise _read_only(name)
    raw = _PyBuffer()
    _get_buffer(memory, ctypes.byref(raw), _PYBUF_FULL_RO)
    address = raw.buf or 0
    _release_buffer(ctypes.byref(raw))  # the memoryview, which becomes the owner, has a claim of its own
    kind = _KINDS.get(memory.format.lstrip("@=<"))
    dtype = _dtype(kind, 8 * memory.itemsize) if kind else memory.format
    return Buffer(address, memory.nbytes, dtype, tuple(memory.shape or ()), memory)


def _dtype(kind: str, bits: int) -> str:
    return kind if kind == "bool" else f"{kind}{bits}"


# ---- __array_interface__


def _of_array_interface(array: Any, name: str, writable: bool) -> Buffer:
    interface = array.__array_interface__
    shape, typestr = tuple(interface["shape"]), interface["typestr"]
    itemsize = int(typestr[2:])
    address, read_only = interface["data"]
    if interface.get("strides") not in (None, _strides(shape, itemsize)) and math.prod(shape) > 0:
        raise _not_contiguous(name)
    if writable and read_only:
        raise _read_only(name)
    kind = {"b": "bool", "u": "uint", "i": "int", "f": "float", "c": "complex"}.get(typestr[1])
    if typestr[0] == ">":
        dtype = typestr
    elif kind:
        dtype = _dtype(kind, 8 * itemsize)
    else:
        dtype = str(getattr(array, "dtype", typestr))  # ml_dtypes' types are "void", but their arrays know better
    return Buffer(address, math.prod(shape) * itemsize, dtype, shape, array)


def _strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """In bytes, of a contiguous array."""
    return tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))


# ---- DLPack


class _DLTensor(ctypes.Structure):
    """dlpack.h's DLTensor, with which a DLManagedTensor starts."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_DL_CPU = 1
_DL_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_pointer.restype = ctypes.c_void_p


def _of_dlpack(array: Any, name: str, writable: bool) -> Buffer:
    device_type, device_id = array.__dlpack_device__()
    if device_type != _DL_CPU:
        raise _elsewhere(name, f"DLPack device {int(device_type)}:{device_id}")
    if writable:  # a capsule of this version does not say whether it may be written to
        raise _read_only(name)
    capsule = array.__dlpack__()
    tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[: tensor.ndim])
    itemsize = (tensor.bits * tensor.lanes + 7) // 8
    strides = tuple(itemsize * s for s in tensor.strides[: tensor.ndim]) if tensor.strides else None
    if strides not in (None, _strides(shape, itemsize)) and math.prod(shape) > 0:
        raise _not_contiguous(name)
    kind = _DL_KINDS.get(tensor.code) if tensor.lanes == 1 else None
    dtype = _dtype(kind, tensor.bits) if kind else f"DLPack {tensor.code}:{tensor.bits}x{tensor.lanes}"
    # The capsule was not renamed: dropping it gives the memory back.
    return Buffer((tensor.data or 0) + tensor.byte_offset, math.prod(shape) * itemsize, dtype, shape, capsule)


# ---- what callers check


def weights(array: Any, name: str, dtype: Any = None, shape: Optional[tuple[int, ...]] = None) -> Buffer:
    """view() of weights. dtype and shape, if given, say what the bytes are, for arrays that cannot."""
    buffer = view(array, name)
    if dtype is None:
        if buffer.dtype not in _dtypes.WEIGHTS:
            raise InvalidArgumentError(f"{name} has dtype {buffer.dtype}; want one of {', '.join(_dtypes.WEIGHTS)}")
        kept = buffer.dtype
    else:
        kept = _dtypes.parse_weight(dtype)
        check_dtype(buffer, name, kept)
    itemsize = _dtypes.bits(kept) // 8
    if buffer.nbytes % itemsize:
        raise InvalidArgumentError(f"{name} has {buffer.nbytes} bytes, which is no number of {kept}")
    if shape is None:
        as_is = math.prod(buffer.shape) * itemsize == buffer.nbytes
        shape = buffer.shape if as_is else (buffer.nbytes // itemsize,)
    if math.prod(shape) * itemsize != buffer.nbytes:
        raise InvalidArgumentError(f"{name} has {buffer.nbytes} bytes; shape {tuple(shape)} of {kept} needs {math.prod(shape) * itemsize}")
    return Buffer(buffer.address, buffer.nbytes, kept, tuple(shape), buffer.owner)


def check_dtype(buffer: Buffer, name: str, dtype: str) -> None:
    """Accepts the dtype, or its bits: unsigned integers of its size, or bytes."""
    accepted = (dtype, f"uint{_dtypes.bits(dtype)}", "uint8")
    if buffer.dtype not in accepted:
        raise InvalidArgumentError(f"{name} has dtype {buffer.dtype}; want {dtype} (or its bits as {' or '.join(dict.fromkeys(accepted[1:]))})")


def output(array: Any, name: str, dtype: str, nbytes: int) -> Buffer:
    """view() of an array that takes nbytes of a dtype."""
    buffer = view(array, name, writable=True)
    check_dtype(buffer, name, dtype)
    if buffer.nbytes != nbytes:
        raise InvalidArgumentError(f"{name} has {buffer.nbytes} bytes; want {nbytes}")
    return buffer


# ---- new arrays


@functools.cache
def _optional(module: str) -> Any:
    """An imported module, None if it is not installed."""
    try:
        return __import__(module)
    except ImportError:
        return None


def empty(like: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    """A new array for results, of the library that like is of.

    A dtype that the library does not have is returned as its bits, in unsigned integers: bfloat16 in numpy without
    ml_dtypes, both 16-bit types in a memoryview.
    """
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype))
    if numpy := _optional("numpy"):
        return numpy.empty(shape, _numpy_dtype(numpy, dtype))
    return _plain(dtype, shape)


def _numpy_dtype(numpy: Any, dtype: str) -> Any:
    with contextlib.suppress(TypeError):
        return numpy.dtype(dtype)
    known = getattr(_optional("ml_dtypes"), dtype, None)
    return numpy.dtype(known or f"uint{_dtypes.bits(dtype)}")


_FORMATS = {"bool": "?", "float32": "f", "float64": "d", "int8": "b", "int16": "h", "int32": "i", "int64": "q"}
_BITS_FORMATS = {8: "B", 16: "H", 32: "I", 64: "Q"}


def _plain(dtype: str, shape: tuple[int, ...]) -> Any:
    bits = _dtypes.bits(dtype)
    count = math.prod(shape)
    format: Any = _FORMATS.get(dtype, _BITS_FORMATS[bits])
    flat = memoryview(bytearray(count * bits // 8)).cast(format)
    # Python has no empty views of more than one dimension.
    return flat.cast("B").cast(format, shape) if count > 0 and len(shape) > 1 else flat


def column(array: Any) -> Any:
    """The same memory with shape [elements, 1]."""
    if hasattr(array, "reshape"):
        return array.reshape(-1, 1)
    memory = memoryview(array)
    format: Any = memory.format
    return memory.cast("B").cast(format, (len(memory), 1)) if len(memory) else memory

"""Where the memory of other libraries' arrays is, without copying it, and new arrays for results.

view() takes what has the buffer protocol (numpy, array.array, bytes, mmap, ctypes, …), torch tensors, and what has
`__array_interface__`, `__cuda_array_interface__` or DLPack. empty() makes a torch tensor for a caller who gave one; else on
the host a numpy array if numpy is installed, else a memoryview; on a device an array of cupy if that is what the caller gave,
else of torch.
"""

import contextlib
import ctypes
import functools
import math
import sys
from typing import Any, NamedTuple, Optional

from . import _dtypes
from ._errors import InvalidArgumentError, UnsupportedError
from ._ffi import GQ_CPU


class Buffer(NamedTuple):
    """Memory of someone else."""

    address: int
    nbytes: int
    dtype: str  # if gquant has no name for it, what its own library calls it
    shape: tuple[int, ...]
    owner: object  # keeps the memory where it is, as long as it is referenced
    name: str  # what errors call it
    device: int = GQ_CPU  # or the ordinal of the CUDA device that holds it
    stream: Optional[int] = None  # of the device: what is put on it finds the values there; None: every stream does


class Place(NamedTuple):
    """Where a call runs."""

    device: int
    stream: int


HOST = Place(GQ_CPU, 0)


def view(array: Any, name: str, writable: bool = False, stream: Optional[int] = None) -> Buffer:
    """The memory of an array on the host or a CUDA device, C-contiguous; name is what errors call it.

    stream is where the caller will use it, None = where its library works. TypeError: it is no array. UnsupportedError: it
    is on another kind of device. InvalidArgumentError: it is not contiguous, or read-only although writable is asked for.
    """
    if is_torch(array):
        return _of_torch(array, name)
    if hasattr(array, "__cuda_array_interface__"):
        return _of_cuda_array_interface(array, name, writable)
    if (memory := _memoryview(array)) is not None:
        return _of_memory(memory, name, writable)
    if isinstance(getattr(array, "__array_interface__", None), dict):
        return _of_interface(array, array.__array_interface__, name, writable)
    if hasattr(array, "__dlpack__"):
        return _of_dlpack(array, name, writable, stream)
    raise TypeError(
        f"{name} is {type(array).__name__}; want an array: of numpy or torch, or with the buffer protocol, "
        "__array_interface__, __cuda_array_interface__ or DLPack"
    )


def place(*buffers: Buffer, stream: Optional[int] = None) -> Place:
    """Where a call with these arrays runs: on the device that holds them, on the stream, None = where their libraries work.

    The host for none. InvalidArgumentError: they are on different devices, or their libraries work on different streams.
    """
    if not buffers:
        return HOST
    first = buffers[0]
    for other in buffers[1:]:
        if other.device != first.device:
            raise InvalidArgumentError(
                f"{first.name} is on {_name(first.device)} and {other.name} on {_name(other.device)}; "
                "all arrays of a call must be on one device"
            )
    if first.device == GQ_CPU:
        return HOST
    if stream is None:
        streams = {buffer.stream: buffer.name for buffer in buffers if buffer.stream is not None}
        if len(streams) > 1:
            wanted = ", ".join(f"{name} on {number:#x}" for number, name in streams.items())
            raise InvalidArgumentError(f"the arrays are on different streams ({wanted}); say which one with stream")
        stream = next(iter(streams), 0)
    return Place(first.device, stream)


def place_of(array: Any, stream: Optional[int] = None) -> Place:
    """place() of an array that says where results go; the host for None and for all that is not on a device."""
    if is_torch(array):
        return Place(*_torch_place(array, "like", stream))
    on_device = hasattr(array, "__cuda_array_interface__") or _dlpack_device(array) == _DL_CUDA
    return place(view(array, "like", stream=stream), stream=stream) if on_device else HOST


def _name(device: int) -> str:
    return "the host" if device == GQ_CPU else f"CUDA device {device}"


def _elsewhere(name: str, device: str) -> UnsupportedError:
    return UnsupportedError(f"{name} is on {device}; gquant computes on the CPU and on CUDA devices: move it there first")


def _not_contiguous(name: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} is not contiguous in row-major order; copy it into an array that is")


def _read_only(name: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} is read-only; want an array that can be written to")


# ---- torch


def is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _of_torch(tensor: Any, name: str) -> Buffer:
    device, stream = _torch_place(tensor, name)
    if tensor.layout is not sys.modules["torch"].strided or not tensor.is_contiguous():
        raise _not_contiguous(name)
    return Buffer(tensor.data_ptr(), tensor.nbytes, _torch_name(tensor.dtype), tensor.shape, tensor, name, device, stream)


def _torch_place(tensor: Any, name: str, stream: Optional[int] = None) -> tuple[int, int]:
    if tensor.is_cpu:
        return HOST
    if not tensor.is_cuda:
        raise _elsewhere(name, f"device {tensor.device}")
    device = tensor.get_device()
    return device, current_stream(device) if stream is None else stream


def current_stream(device: int) -> int:
    """The stream that torch works on; 0, the legacy default stream, if torch does not use devices here."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    if hasattr(torch._C, "_cuda_getCurrentRawStream"):
        return torch._C._cuda_getCurrentRawStream(device)
    return torch.cuda.current_stream(device).cuda_stream


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
    return Buffer(address, memory.nbytes, dtype, tuple(memory.shape or ()), memory, name)


def _dtype(kind: str, bits: int) -> str:
    return kind if kind == "bool" else f"{kind}{bits}"


# ---- __array_interface__ and __cuda_array_interface__


def _of_interface(array: Any, interface: dict[str, Any], name: str, writable: bool) -> Buffer:
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
    return Buffer(address, math.prod(shape) * itemsize, dtype, shape, array, name)


_LEGACY_STREAM = 1  # a name of the legacy default stream, as 0 is

_CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9


def _of_cuda_array_interface(array: Any, name: str, writable: bool) -> Buffer:
    interface = array.__cuda_array_interface__
    buffer = _of_interface(array, interface, name, writable)
    stream = interface.get("stream")
    return buffer._replace(
        device=array.__dlpack_device__()[1] if hasattr(array, "__dlpack_device__") else _ordinal(buffer),
        stream=0 if stream == _LEGACY_STREAM else stream,
    )


def _ordinal(buffer: Buffer) -> int:
    """The device that holds memory, which the interface does not say."""
    if buffer.nbytes == 0:
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UnsupportedError(f"{buffer.name} is on a CUDA device, but there is no driver for it here") from None
    ordinal = ctypes.c_int()
    address = ctypes.c_uint64(buffer.address)
    if driver.cuPointerGetAttribute(ctypes.byref(ordinal), _CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address) != 0:
        raise InvalidArgumentError(f"{buffer.name} is at {buffer.address:#x}, which is no memory of a CUDA device")
    return ordinal.value


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
_DL_CUDA = 2
_DL_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_pointer.restype = ctypes.c_void_p


def _dlpack_device(array: Any) -> Optional[int]:
    return array.__dlpack_device__()[0] if hasattr(array, "__dlpack_device__") else None


def _of_dlpack(array: Any, name: str, writable: bool, stream: Optional[int]) -> Buffer:
    device_type, device_id = array.__dlpack_device__()
    if device_type not in (_DL_CPU, _DL_CUDA):
        raise _elsewhere(name, f"DLPack device {int(device_type)}:{device_id}")
    if writable:  # a capsule of this version does not say whether it may be written to
        raise _read_only(name)
    if device_type == _DL_CUDA:
        device = device_id
        stream = current_stream(device) if stream is None else stream
        capsule = array.__dlpack__(stream=stream or _LEGACY_STREAM)
    else:
        device, stream = GQ_CPU, None
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
    address = (tensor.data or 0) + tensor.byte_offset
    return Buffer(address, math.prod(shape) * itemsize, dtype, shape, capsule, name, device, stream)


# ---- what callers check


def weights(
    array: Any, name: str, dtype: Any = None, shape: Optional[tuple[int, ...]] = None, stream: Optional[int] = None
) -> Buffer:
    """view() of weights. dtype and shape, if given, say what the bytes are, for arrays that cannot."""
    buffer = view(array, name, stream=stream)
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
    return buffer._replace(dtype=kept, shape=tuple(shape))


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


def empty(like: Any, dtype: str, shape: tuple[int, ...], where: Place = HOST) -> Any:
    """A new array for results, of the library that like is of, on the host or a device.

    A dtype that the library does not have is returned as its bits, in unsigned integers: bfloat16 in numpy without
    ml_dtypes, both 16-bit types in a memoryview. UnsupportedError: like is on a device, and of a library for which there is
    no other here.
    """
    if where.device != GQ_CPU:
        library = _device_library(like)
        with _on(library, where):
            if library.__name__ == "torch":
                return library.empty(shape, dtype=getattr(library, dtype), device=f"cuda:{where.device}")
            return library.empty(shape, _numpy_dtype(_optional("numpy"), dtype))
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
    if numpy := _optional("numpy"):
        return numpy.empty(shape, _numpy_dtype(numpy, dtype))
    return _plain(dtype, shape)


def floats(like: Any, values: Any, where: Place) -> Any:
    """A new float32 array with a number or a list of numbers, of the library that like is of, on a device. Waits until every
    stream can use it."""
    library = _device_library(like)
    if library.__name__ == "torch":
        return library.tensor(values, dtype=library.float32, device=f"cuda:{where.device}")
    with _on(library, where):
        array = library.asarray(values, "float32")
        library.cuda.get_current_stream().synchronize()
    return array


def to_host(array: Any, name: str) -> Any:
    """A copy of an array that is on a device."""
    if is_torch(array):
        return array.cpu()
    if hasattr(array, "get"):  # cupy's
        return array.get()
    raise UnsupportedError(f"{name} is on a CUDA device; copy it to the host first")


def _device_library(like: Any) -> Any:
    """What makes new arrays on a device: cupy or torch."""
    if type(like).__module__.partition(".")[0] == "cupy":
        return sys.modules["cupy"]
    if is_torch(like):
        return sys.modules["torch"]
    torch = _optional("torch")
    if torch is not None and torch.cuda.is_available():
        return torch
    raise UnsupportedError(f"results for a {type(like).__name__} on a CUDA device are torch tensors, and there is no torch with CUDA here")


def _on(library: Any, where: Place) -> Any:
    """A context in which cupy or torch gives memory that is free for use on the stream."""
    if library.__name__ == "torch":
        if where.stream == current_stream(where.device):
            return contextlib.nullcontext()
        if where.stream == 0:  # which ExternalStream would take for a wish for a new one
            return library.cuda.stream(library.cuda.default_stream(where.device))
        return library.cuda.stream(library.cuda.ExternalStream(where.stream, where.device))
    stack = contextlib.ExitStack()
    stack.enter_context(library.cuda.Device(where.device))
    stack.enter_context(library.cuda.ExternalStream(where.stream, where.device))
    return stack


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

"""include/gquant.h for ctypes: its numbers, its structs and its functions, under its names.

A test compares all of it with the header and with the library. `lib` holds the loaded functions; those that return a
status raise the fitting exception instead.
"""

import ctypes
import os
from ctypes import POINTER, c_char, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

from ._errors import BY_STATUS, ForkedError, GquantError

GQ_ABI_VERSION = 4
GQ_CPU = -1
GQ_EXEC_SETTLED = 1
GQ_HIGH_NIBBLE_FIRST = 0
GQ_LOW_NIBBLE_FIRST = 1

# ---- structs: with the fields of the header


class _Sized(ctypes.Structure):
    """A struct that starts with its size."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(ctypes.sizeof(self), **fields)


class _SizedOnDevice(_Sized):
    """Its device is the CPU until set."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{"device": GQ_CPU, **fields})


class gq_buffer(ctypes.Structure):
    _fields_ = [("address", c_uint64), ("bytes", c_uint64)]


class gq_exec(_SizedOnDevice):
    _fields_ = [
        ("struct_size", c_uint32),
        ("device", c_int32),
        ("stream", c_uint64),
        ("workspace", c_uint64),
        ("workspace_bytes", c_uint64),
        ("threads", c_int32),
        ("flags", c_uint32),
    ]


class gq_device_info(_Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("major", c_int32),
        ("minor", c_int32),
        ("multiprocessors", c_int32),
        ("driver_version", c_int32),
        ("reserved", c_uint32),
        ("memory_bytes", c_uint64),
        ("name", c_char * 256),
    ]


class gq_format_info(_Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("format", c_int32),
        ("name", c_char_p),
        ("bits", c_int32),
        ("codebook_size", c_int32),
    ]


class gq_parts(ctypes.Structure):
    _fields_ = [
        ("packed", c_uint64),
        ("packed_bytes", c_uint64),
        ("absmax", c_uint64),
        ("absmax_bytes", c_uint64),
        ("nested_absmax", c_uint64),
        ("nested_absmax_bytes", c_uint64),
        ("nested_codebook", c_uint64),
        ("nested_codebook_bytes", c_uint64),
        ("offset", c_uint64),
        ("offset_bytes", c_uint64),
        ("codebook", c_uint64),
        ("codebook_bytes", c_uint64),
    ]


class gq_quantize_options(_Sized):
    _fields_ = [("struct_size", c_uint32), ("nested", c_int32), ("blocksize", c_int64)]


class gq_state_desc(_SizedOnDevice):
    _fields_ = [
        ("struct_size", c_uint32),
        ("format", c_int32),
        ("dtype", c_int32),
        ("ndim", c_int32),
        ("shape", c_uint64),
        ("blocksize", c_int64),
        ("nested_blocksize", c_int64),
        ("parts", gq_parts),
        ("device", c_int32),
        ("reserved", c_uint32),
    ]


class gq_load_options(_SizedOnDevice):
    _fields_ = [("struct_size", c_uint32), ("device", c_int32), ("prefix", c_char_p), ("include", c_char_p)]


class gq_tensor_info(_Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("dtype", c_int32),
        ("name", c_char_p),
        ("shape", POINTER(c_int64)),
        ("ndim", c_int32),
        ("reserved", c_uint32),
        ("bytes", c_uint64),
        ("file", c_char_p),
        ("file_offset", c_uint64),
        ("address", c_uint64),
    ]


class gq_layer_info(_Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("format", c_int32),
        ("name", c_char_p),
        ("convention", c_char_p),
        ("shape", POINTER(c_int64)),
        ("ndim", c_int32),
        ("dtype", c_int32),
        ("blocksize", c_int64),
        ("nested_blocksize", c_int64),
        ("sizes", gq_parts),
    ]


class gq_job_progress(_Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("finished", c_int32),
        ("done_bytes", c_uint64),
        ("total_bytes", c_uint64),
    ]


STRUCTS = (
    gq_buffer,
    gq_exec,
    gq_device_info,
    gq_format_info,
    gq_parts,
    gq_quantize_options,
    gq_state_desc,
    gq_load_options,
    gq_tensor_info,
    gq_layer_info,
    gq_job_progress,
)

# ---- functions

_status = c_int32
_addr = c_uint64
_handle = c_void_p  # a gq_state, gq_model or gq_job

# Name, result, arguments.
FUNCTIONS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("gq_status_name", c_char_p, (_status,)),
    ("gq_last_error", c_char_p, ()),
    ("gq_version", c_char_p, ()),
    ("gq_abi_version", c_int32, ()),
    ("gq_build_info", c_char_p, ()),
    ("gq_device_count", _status, (POINTER(c_int32),)),
    ("gq_device_get_info", _status, (c_int32, POINTER(gq_device_info))),
    ("gq_device_prepare", _status, (c_int32,)),
    ("gq_format_count", _status, (POINTER(c_int32),)),
    ("gq_format_get_info", _status, (c_int32, POINTER(gq_format_info))),
    ("gq_format_by_name", _status, (c_char_p, POINTER(c_int32))),
    (
        "gq_quantize_nf4",
        _status,
        (_addr, c_int32, c_int64, c_int64, _addr, c_int64, _addr, c_size_t, POINTER(gq_exec)),
    ),
    (
        "gq_quantize_fp4",
        _status,
        (_addr, c_int32, c_int64, c_int64, _addr, c_int64, _addr, c_size_t, POINTER(gq_exec)),
    ),
    (
        "gq_quantize_blockwise",
        _status,
        (_addr, c_int32, c_int64, c_int64, _addr, _addr, c_int64, _addr, c_size_t, POINTER(gq_exec)),
    ),
    (
        "gq_quantize_rows_int8",
        _status,
        (
            _addr,
            c_int32,
            c_int64,
            c_int64,
            c_float,
            _addr,
            c_int64,
            _addr,
            c_size_t,
            _addr,
            c_size_t,
            POINTER(gq_exec),
        ),
    ),
    ("gq_codebook", _status, (c_char_p, POINTER(c_float), c_int64)),
    ("gq_pack_4bit", _status, (_addr, c_int64, c_int32, _addr, c_size_t, POINTER(gq_exec))),
    ("gq_unpack_4bit", _status, (_addr, c_size_t, c_int32, _addr, c_int64, POINTER(gq_exec))),
    (
        "gq_quantized_layout",
        _status,
        (c_int32, POINTER(c_int64), c_int32, POINTER(gq_quantize_options), POINTER(gq_parts)),
    ),
    (
        "gq_quantize_workspace_size",
        _status,
        (c_int32, POINTER(c_int64), c_int32, POINTER(gq_quantize_options), c_int32, POINTER(c_uint64)),
    ),
    (
        "gq_quantize",
        _status,
        (
            c_int32,
            _addr,
            c_int32,
            POINTER(c_int64),
            c_int32,
            POINTER(gq_quantize_options),
            POINTER(gq_parts),
            POINTER(gq_exec),
            POINTER(c_int64),
        ),
    ),
    ("gq_state_create", _status, (POINTER(gq_state_desc), POINTER(_handle))),
    ("gq_state_free", _status, (_handle,)),
    ("gq_state_get_desc", _status, (_handle, POINTER(gq_state_desc))),
    ("gq_state_json", _status, (_handle, c_char_p, c_size_t, POINTER(c_size_t))),
    ("gq_dequantize", _status, (_handle, _addr, c_size_t, c_int32, POINTER(gq_exec))),
    ("gq_dequantize_range", _status, (_handle, c_int64, c_int64, _addr, c_size_t, c_int32, POINTER(gq_exec))),
    ("gq_linear_workspace_size", _status, (_handle, c_int64, c_int32, POINTER(gq_exec), POINTER(c_uint64), POINTER(c_int32))),
    ("gq_linear", _status, (_handle, _addr, c_int64, c_int32, _addr, _addr, POINTER(gq_exec))),
    ("gq_load_model", _status, (c_char_p, POINTER(gq_load_options), POINTER(_handle))),
    ("gq_free_model", _status, (_handle,)),
    ("gq_model_tensor_count", _status, (_handle, POINTER(c_int64))),
    ("gq_model_tensor", _status, (_handle, c_int64, POINTER(gq_tensor_info))),
    ("gq_model_find_tensor", _status, (_handle, c_char_p, POINTER(c_int64))),
    ("gq_model_read", _status, (_handle, c_int64, c_uint64, _addr, c_size_t, POINTER(gq_exec))),
    ("gq_model_layer_count", _status, (_handle, POINTER(c_int64))),
    ("gq_model_layer", _status, (_handle, c_int64, POINTER(gq_layer_info))),
    ("gq_model_find_layer", _status, (_handle, c_char_p, POINTER(c_int64))),
    ("gq_model_read_layer", _status, (_handle, c_int64, POINTER(gq_parts), POINTER(gq_exec))),
    (
        "gq_model_read_all",
        _status,
        (_handle, POINTER(gq_buffer), c_int64, POINTER(gq_parts), c_int64, POINTER(gq_exec)),
    ),
    ("gq_model_state", _status, (_handle, c_int64, POINTER(_handle))),
    (
        "gq_model_dequantize",
        _status,
        (_handle, c_int64, c_int64, c_int64, _addr, c_size_t, c_int32, POINTER(gq_exec)),
    ),
    ("gq_model_metadata_count", _status, (_handle, POINTER(c_int64))),
    ("gq_model_metadata", _status, (_handle, c_int64, POINTER(c_char_p), POINTER(c_char_p))),
    ("gq_convert", _status, (c_char_p, POINTER(_handle))),
    ("gq_dequantize_model", _status, (c_char_p, POINTER(_handle))),
    ("gq_verify", _status, (c_char_p, POINTER(_handle))),
    ("gq_diff", _status, (c_char_p, POINTER(_handle))),
    ("gq_inspect", _status, (c_char_p, POINTER(_handle))),
    ("gq_job_poll", _status, (_handle, POINTER(gq_job_progress))),
    ("gq_job_cancel", _status, (_handle,)),
    ("gq_job_wait", _status, (_handle, c_int64, POINTER(c_int32))),
    ("gq_job_result", _status, (_handle, POINTER(c_char_p))),
    ("gq_job_free", _status, (_handle,)),
)

# What returns a number that is no status.
_NO_STATUS = ("gq_abi_version",)

# ---- loading


def _candidates() -> list[Path]:
    """Where the library may be: where GQUANT_LIBRARY says, or else beside this file."""
    named = os.environ.get("GQUANT_LIBRARY")
    return [Path(named)] if named else [Path(__file__).with_name("libgquant.so")]


def _load() -> ctypes.CDLL:
    tried = []
    for path in _candidates():
        try:
            return ctypes.CDLL(str(path))
        except OSError as e:
            tried.append(f"{path}: {e}")
    raise ImportError("libgquant.so cannot be loaded (GQUANT_LIBRARY can name another). Tried:\n" + "\n".join(tried))


def error(status: int) -> GquantError:
    """The exception for a status that this thread's last call returned."""
    return BY_STATUS.get(status, GquantError)(lib.gq_last_error().decode(errors="replace"))


def _check(status: int, function: Any, arguments: Any) -> None:
    """Turns a status into an exception. ctypes calls it after each function that returns one."""
    if status != 0:
        raise error(status)


def _bind(library: ctypes.CDLL) -> SimpleNamespace:
    functions = SimpleNamespace()
    library.gq_abi_version.restype = c_int32
    abi = library.gq_abi_version()
    if abi < GQ_ABI_VERSION:
        raise ImportError(f"{library._name} has version {abi} of the C interface; this package needs {GQ_ABI_VERSION}")
    for name, restype, argtypes in FUNCTIONS:
        function = getattr(library, name)
        function.restype, function.argtypes = restype, argtypes
        if restype is _status and name not in _NO_STATUS:
            function.errcheck = _check
        setattr(functions, name, function)
    return functions


_library = _load()
lib = _bind(_library)


def bare(name: str) -> Any:
    """A function for calls in which microseconds count: takes ctypes objects only, of the right types, and returns the status."""
    return _library[name]

# ---- fork

_forked = False


def _refuse(*arguments: Any) -> None:
    raise ForkedError(
        "this process was forked after libgquant was loaded, which the library does not survive. Start processes with "
        'multiprocessing.get_context("spawn"), or import gquant in the child only'
    )


def _after_fork_in_child() -> None:
    """Keeps the child out of the library: its threads are gone, and a call could wait for them for ever."""
    global _forked
    _forked = True
    for name, _, _ in FUNCTIONS:
        setattr(lib, name, _refuse)


os.register_at_fork(after_in_child=_after_fork_in_child)


# ---- helpers


def free(function: str, handle: int) -> None:
    """Ends a handle. For finalizers, which also run in a forked child and when Python ends."""
    if not _forked:
        getattr(lib, function)(handle)


def execution(
    threads: int = 0, device: int = GQ_CPU, stream: int = 0, workspace: int = 0, workspace_bytes: int = 0
) -> Optional[gq_exec]:
    """Where to run: a device's stream, or the CPU with so many threads, 0 = all cores."""
    if device == GQ_CPU and threads == 0:
        return None
    return gq_exec(device=device, stream=stream, workspace=workspace, workspace_bytes=workspace_bytes, threads=threads)

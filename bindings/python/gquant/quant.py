"""Quantizing and decoding arrays.

Every array may be of numpy or torch, or have the buffer protocol, `__array_interface__`, `__cuda_array_interface__` or DLPack. It
must be contiguous in row-major order; nothing is copied. The arrays of a call are all on the host, or all on one CUDA device,
which then does the work. Results are torch tensors for torch tensors; else on the host numpy arrays if numpy is installed, else
memoryviews; on a device cupy arrays for cupy arrays, else torch tensors.

On a device a function only puts work on a stream and returns: torch's current one for torch tensors, that of
`__cuda_array_interface__` if it names one, else the legacy default stream; the argument stream, a CUstream's address, names
another. threads then says nothing. Only what comes from the host is waited for: a codebook(), the table of a "blockwise8", and an
offset that is a number, the first time.
"""

import contextlib
import ctypes
import functools
import json
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from ctypes import byref, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass, field
from typing import Any, Optional

from . import _buffers, _dtypes, _ffi
from ._errors import InvalidArgumentError
from ._ffi import lib

NESTED_BLOCKSIZE = 256  # absmax per nested absmax

_ORDERS = {"high_first": _ffi.GQ_HIGH_NIBBLE_FIRST, "low_first": _ffi.GQ_LOW_NIBBLE_FIRST}
_FLOATS = ("nested_absmax", "nested_codebook", "offset", "codebook")
# By whether they are nested: the parts' names, the names of their sizes, and their dtypes; None = any, the bytes count.
_PARTS = [
    [("packed", "packed_bytes", None), ("absmax", "absmax_bytes", absmax), *((name, name + "_bytes", "float32") for name in _FLOATS)]
    for absmax in ("float32", "uint8")
]
_BITSANDBYTES_KEY = "quant_state.bitsandbytes__"


# eq would compare arrays.
@dataclass(eq=False)
class QuantState:
    """A quantized weight: what it was, and the arrays it is now.

    The arrays are the caller's: a state only refers to them.
    """

    format: str  # "nf4", "fp4", "int8" or "blockwise8"
    shape: tuple[int, ...]  # of the weight
    blocksize: int  # elements per absmax in flat order; the row length for int8
    dtype: str  # of the weight before: "float32", "float16" or "bfloat16"
    packed: Any  # the codes: uint8, or the same bytes as any other dtype
    absmax: Any  # float32 [blocks], or uint8 [blocks] when nested
    nested_absmax: Any = None  # float32 [ceil(blocks / 256)], when nested
    nested_codebook: Any = None  # float32 [256], when nested
    offset: Any = None  # the mean of absmax, when nested: a number, or float32 []; quantize gives a number on the host only
    codebook: Any = None  # float32 [16] or [256]: the value of each code
    _copied: Any = field(default=None, init=False, repr=False)  # an offset, the device it was copied to, and the copy

    @property
    def nested(self) -> bool:
        """Whether absmax is quantized itself."""
        return self.nested_absmax is not None

    def dequantize(self, dtype: Any = None, out: Any = None, *, threads: int = 0, stream: Optional[int] = None) -> Any:
        """Decodes the whole weight, where its arrays are.

        dtype: "float32", "float16" or "bfloat16", as text or as numpy's or torch's; by default that of out, or what the
        weight was. out: takes the result; it has as many elements of the dtype (or its bits as unsigned integers or bytes)
        and is returned. threads: 0 = all cores. An offset that is a number is copied to the arrays' device the first time,
        which a stream that is captured does not allow.
        """
        parts = self._parts(stream)
        given = [] if out is None else [_buffers.view(out, "out", writable=True)]
        where = _buffers.place(*parts.values(), *given, stream=stream)
        if dtype is None and given and given[0].dtype in _dtypes.WEIGHTS:
            dtype = given[0].dtype
        dtype = self.dtype if dtype is None else _dtypes.parse_weight(dtype)
        if out is None:
            out = _buffers.empty(self.packed, dtype, self.shape, where)
        to = _buffers.output(out, "out", dtype, math.prod(self.shape) * _dtypes.bits(dtype) // 8)
        with self._handle(parts, where.device) as handle:
            execution = _ffi.execution(threads, *where)
            lib.gq_dequantize(handle, to.address, to.nbytes, _dtypes.number(dtype), execution)
        return out

    def linear(self, x: Any, bias: Any = None, out: Any = None, *, threads: int = 0, stream: Optional[int] = None) -> Any:
        """The linear layer x · weightᵀ + bias with the packed weight [n, k], where its arrays are; "nf4" and "fp4" have it.

        x: float32, float16 or bfloat16 [..., k]. bias: x's dtype [n]. out: takes the result, [..., n] of x's dtype, as dequantize's
        does, and is returned; it must not overlap x. threads: 0 = all cores. On a device x is aligned to 16 bytes, and what the
        kernels for packed weights do not take is decoded into memory for that call and multiplied by cuBLASLt: gq_linear in gquant.h
        says when, and where libcublasLt is looked for. UnsupportedError: it is not there, and dequantize is the way then.
        """
        parts = self._parts(stream)
        source = _buffers.weights(x, "x", stream=stream)
        if len(self.shape) != 2:
            raise InvalidArgumentError(f"the weight has shape {tuple(self.shape)}; a linear layer needs 2 dimensions")
        n, k = self.shape
        if source.shape[-1:] != (k,):
            raise InvalidArgumentError(f"x has shape {tuple(source.shape)}; want [..., {k}]")
        given = [] if bias is None else [_buffers.weights(bias, "bias", source.dtype, (n,), stream)]
        results = [] if out is None else [_buffers.view(out, "out", writable=True)]
        where = _buffers.place(*parts.values(), source, *given, *results, stream=stream)
        rows = math.prod(source.shape[:-1])
        if out is None:
            out = _buffers.empty(x, source.dtype, (*source.shape[:-1], n), where)
        to = _buffers.output(out, "out", source.dtype, rows * n * _dtypes.bits(source.dtype) // 8)
        added, dtype = given[0].address if given else 0, _dtypes.number(source.dtype)
        with self._handle(parts, where.device) as handle:
            execution = _ffi.execution(threads, *where)
            if where != _buffers.HOST:
                size = c_uint64()
                lib.gq_linear_workspace_size(handle, rows, dtype, execution, byref(size), None)
                workspace = _buffers.view(_buffers.empty(x, "uint8", (size.value,), where), "workspace")
                execution = _ffi.execution(threads, *where, workspace.address, workspace.nbytes)
            lib.gq_linear(handle, source.address, rows, dtype, added, to.address, execution)
        return out

    def json(self) -> str:
        """bitsandbytes' text of a 4-bit state, as Python's json.dumps writes it. Waits for an offset that is on a device."""
        parts = self._parts(None)
        where = _buffers.place(*parts.values())
        if where != _buffers.HOST:
            return self._described()
        length = c_size_t()
        with self._handle(parts, where.device) as handle:
            lib.gq_state_json(handle, None, 0, byref(length))
            text = ctypes.create_string_buffer(length.value)
            lib.gq_state_json(handle, text, length, byref(length))
        return text.raw.decode()

    def _described(self) -> str:
        """json() of a state on a device, whose offset the library would read from host memory."""
        entries = {"quant_type": self.format, "blocksize": self.blocksize, "dtype": self.dtype, "shape": list(self.shape)}
        if self.nested:
            offset = c_float(self.offset if isinstance(self.offset, numbers.Real) else self.offset.item())
            entries |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": offset.value}
        return json.dumps(entries)

    def to_bitsandbytes(self) -> dict[str, Any]:
        """What bitsandbytes' `QuantState.as_dict(packed=True)` is for this state, and "weight": the codes as [bytes, 1].

        In the state dict of a module, all but "weight" follow "weight.". The arrays are the state's own, but for the
        text, which is on the host.
        """
        if self.codebook is None:
            raise InvalidArgumentError("the state has no codebook, which bitsandbytes wants as quant_map")
        parts = {"weight": _buffers.column(self.packed), "absmax": self.absmax, "quant_map": self.codebook}
        if self.nested:
            parts |= {"nested_absmax": self.nested_absmax, "nested_quant_map": self.nested_codebook}
        text = self.json().encode()
        packed = _buffers.empty(self.packed, "uint8", (len(text),))
        memory = _buffers.view(packed, "text")
        ctypes.memmove(memory.address, text, len(text))
        return parts | {_BITSANDBYTES_KEY + self.format: packed}

    @classmethod
    def from_bitsandbytes(cls, parts: Mapping[str, Any]) -> "QuantState":
        """The way back from to_bitsandbytes. Unknown, missing and contradicting entries are InvalidArgumentError."""
        texts = [key for key in parts if key.startswith(_BITSANDBYTES_KEY)]
        if len(texts) != 1:
            raise InvalidArgumentError(f"want one key that starts with {_BITSANDBYTES_KEY}; there are {texts}")
        described = parse_json(bytes_of(parts[texts[0]]))
        if described["quant_type"] != texts[0].removeprefix(_BITSANDBYTES_KEY):
            raise InvalidArgumentError(f"{texts[0]} describes a state of type {described['quant_type']}")
        wanted = {"weight", "absmax", "quant_map", texts[0]}
        nested = "nested_offset" in described
        if nested:
            wanted |= {"nested_absmax", "nested_quant_map"}
        if parts.keys() != wanted:
            raise InvalidArgumentError(f"the keys are {sorted(parts)}; want {sorted(wanted)}")
        if described["shape"] is None:
            raise InvalidArgumentError("the state has no shape")
        return cls(
            format=described["quant_type"],
            shape=tuple(described["shape"]),
            blocksize=described["blocksize"],
            dtype=described["dtype"],
            packed=parts["weight"],
            absmax=parts["absmax"],
            nested_absmax=parts["nested_absmax"] if nested else None,
            nested_codebook=parts["nested_quant_map"] if nested else None,
            offset=described["nested_offset"] if nested else None,
            codebook=parts["quant_map"],
        )

    def _parts(self, stream: Optional[int]) -> dict[str, _buffers.Buffer]:
        """Where the arrays are."""
        arrays = {name: getattr(self, name) for name, _, _ in _PARTS[self.nested]}
        return views(arrays | {"offset": self._offset(stream)}, self.nested, stream)

    def _offset(self, stream: Optional[int]) -> Any:
        """The offset as an array beside the others."""
        if not isinstance(self.offset, numbers.Real):
            return self.offset
        where = _buffers.place_of(self.packed, stream)
        if where == _buffers.HOST:
            return c_float(self.offset)
        if self._copied is None or self._copied[:2] != (self.offset, where.device):
            self._copied = (self.offset, where.device, _buffers.floats(self.packed, self.offset, where))
        return self._copied[2]

    @contextlib.contextmanager
    def _handle(self, parts: Mapping[str, _buffers.Buffer], device: int) -> Iterator[c_void_p]:
        """A gq_state that borrows the parts."""
        shape = (c_int64 * len(self.shape))(*self.shape)
        desc = _ffi.gq_state_desc(
            format=format_number(self.format),
            dtype=_dtypes.number(_dtypes.parse_weight(self.dtype)),
            ndim=len(self.shape),
            shape=ctypes.addressof(shape),
            blocksize=self.blocksize,
            nested_blocksize=NESTED_BLOCKSIZE if self.nested else 0,
            device=device,
        )
        fill(desc.parts, parts)
        handle = c_void_p()
        lib.gq_state_create(byref(desc), byref(handle))
        try:
            yield handle
        finally:
            lib.gq_state_free(handle)


def views(arrays: Mapping[str, Any], nested: bool, stream: Optional[int] = None) -> dict[str, _buffers.Buffer]:
    """Where the arrays of a weight are, by their names in gq_parts."""
    found = {}
    for name, _, dtype in _PARTS[nested]:
        array = arrays.get(name)
        if array is None:
            continue
        buffer = found[name] = _buffers.view(array, name, stream=stream)
        if dtype is not None and buffer.dtype != dtype:
            raise InvalidArgumentError(f"{name} has dtype {buffer.dtype}; want {dtype}")
    return found


def fill(parts: _ffi.gq_parts, buffers: Mapping[str, _buffers.Buffer]) -> None:
    """Puts addresses and sizes into a gq_parts. They are valid as long as the buffers are referenced."""
    for name, buffer in buffers.items():
        setattr(parts, name, buffer.address)
        setattr(parts, name + "_bytes", buffer.nbytes)


def empty_parts(like: Any, sizes: _ffi.gq_parts, nested: bool, where: _buffers.Place) -> dict[str, Any]:
    """New arrays for the parts that there are; on the host the offset is a c_float."""
    always = ("packed", "absmax", "nested_absmax") if nested else ("packed", "absmax")  # an empty weight has them too
    arrays: dict[str, Any] = {}
    for name, size, dtype in _PARTS[nested]:
        nbytes = getattr(sizes, size)
        if name == "offset":
            if nbytes:
                arrays[name] = c_float() if where == _buffers.HOST else _buffers.empty(like, "float32", (), where)
        elif nbytes or name in always:
            dtype = dtype or "uint8"
            arrays[name] = _buffers.empty(like, dtype, (nbytes * 8 // _dtypes.bits(dtype),), where)
    return arrays


def filled(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays of empty_parts when they are filled, as a QuantState takes them."""
    offset = arrays.get("offset")
    return arrays | {"offset": offset.value} if isinstance(offset, c_float) else arrays


def parse_json(text: bytes) -> dict[str, Any]:
    """Reads bitsandbytes' text of a state. What its writer could not have written is an InvalidArgumentError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        described = json.loads(text, object_pairs_hook=unique)
    except ValueError as e:
        raise InvalidArgumentError(f"quant_state: {e}") from None
    plain: dict[str, Any] = {"quant_type": str, "blocksize": int, "dtype": str, "shape": (list, type(None))}
    nested = {"nested_blocksize": int, "nested_dtype": str, "nested_offset": float}
    types = plain | nested if isinstance(described, dict) and described.keys() & nested else plain
    if not isinstance(described, dict) or described.keys() != types.keys() or not all(isinstance(described[key], types[key]) for key in types):
        raise InvalidArgumentError(f"quant_state is {described}; want {', '.join(plain)}, and when nested {', '.join(nested)}")
    if types != plain and (described["nested_blocksize"], described["nested_dtype"]) != (NESTED_BLOCKSIZE, "float32"):
        raise InvalidArgumentError(f"quant_state is {described}; want nested_blocksize {NESTED_BLOCKSIZE} and nested_dtype float32")
    if not all(isinstance(dim, int) for dim in described["shape"] or ()):
        raise InvalidArgumentError(f"quant_state has the shape {described['shape']}")
    _dtypes.parse_weight(described["dtype"])
    return described


def bytes_of(array: Any) -> bytes:
    """A copy of an array's memory, for texts. Waits for one that is on a device."""
    buffer = _buffers.view(array, "quant_state")
    if buffer.device != _ffi.GQ_CPU:
        buffer = _buffers.view(_buffers.to_host(array, "quant_state"), "quant_state")
    return ctypes.string_at(buffer.address, buffer.nbytes) if buffer.nbytes else b""


@functools.cache
def format_number(name: str) -> int:
    """The header's number of a format."""
    number = c_int32()
    lib.gq_format_by_name(name.encode(), byref(number))
    return number.value


@functools.cache
def format_name(number: int) -> str:
    info = _ffi.gq_format_info()
    lib.gq_format_get_info(number, byref(info))
    return str(info.name, "ascii")


def quantize(
    array: Any,
    format: str = "nf4",
    *,
    blocksize: int = 64,
    nested: bool = False,
    dtype: Any = None,
    shape: Optional[Sequence[int]] = None,
    threads: int = 0,
    stream: Optional[int] = None,
) -> QuantState:
    """Quantizes a weight, to the bytes of bitsandbytes' CUDA backend.

    array: float32, float16 or bfloat16, of any shape but (). format: "nf4", "fp4", "int8" or "blockwise8". blocksize: elements
    per absmax, 32, 64, … 4096; int8 has one absmax per row whatever it says. nested: quantize absmax too (bitsandbytes'
    compress_statistics). dtype and shape say what the bytes of array are, for arrays that cannot: bfloat16 in bytes, or in
    uint16. threads: 0 = all cores.
    """
    source = _buffers.weights(array, "array", dtype, None if shape is None else tuple(shape), stream)
    where = _buffers.place(source, stream=stream)
    number, ndim = format_number(format), len(source.shape)
    if format == "int8" and ndim > 0:
        blocksize = source.shape[-1]
    dims = (c_int64 * ndim)(*source.shape)
    options = _ffi.gq_quantize_options(blocksize=blocksize, nested=nested)
    parts = _ffi.gq_parts()
    lib.gq_quantized_layout(number, dims, ndim, options, byref(parts))
    arrays = empty_parts(array, parts, nested, where)
    if format == "blockwise8":
        arrays["codebook"] = codebook("dynamic", like=array)  # here the table is an input
    fill(parts, views(arrays, nested))
    if where == _buffers.HOST:
        execution = _ffi.execution(threads)
    else:
        size = c_uint64()
        lib.gq_quantize_workspace_size(number, dims, ndim, options, where.device, byref(size))
        workspace = _buffers.view(_buffers.empty(array, "uint8", (size.value,), where), "workspace")
        execution = _ffi.execution(threads, *where, workspace.address, workspace.nbytes)
    lib.gq_quantize(number, source.address, _dtypes.number(source.dtype), dims, ndim, options, parts, execution, None)
    return QuantState(format=format, shape=source.shape, blocksize=blocksize, dtype=source.dtype, **filled(arrays))


def quantize_blockwise(
    array: Any,
    codebook: Any = None,
    *,
    blocksize: int = 4096,
    dtype: Any = None,
    threads: int = 0,
    stream: Optional[int] = None,
) -> tuple[Any, Any]:
    """Quantizes to 8 bits with a table of values: bitsandbytes' quantize_blockwise.

    array: float32, float16 or bfloat16 (dtype says so for bytes). codebook: 256 ascending float32 from -1 or 0 to 1;
    None = "dynamic". Returns codes, uint8 of array's shape, and absmax, float32 [ceil(elements / blocksize)].
    """
    source = _buffers.weights(array, "array", dtype, stream=stream)
    tables = [] if codebook is None else [_table(codebook, stream)]
    where = _buffers.place(source, *tables, stream=stream)
    n = math.prod(source.shape)
    codes = _buffers.empty(array, "uint8", source.shape, where)
    absmax = _buffers.empty(array, "float32", (max(0, -(-n // blocksize)) if blocksize else 0,), where)
    to, scales = _buffers.view(codes, "codes"), _buffers.view(absmax, "absmax")
    lib.gq_quantize_blockwise(
        source.address,
        _dtypes.number(source.dtype),
        n,
        blocksize,
        tables[0].address if tables else 0,
        scales.address,
        scales.nbytes // 4,
        to.address,
        to.nbytes,
        _ffi.execution(threads, *where),
    )
    return codes, absmax


def _table(codebook: Any, stream: Optional[int]) -> _buffers.Buffer:
    table = _buffers.view(codebook, "codebook", stream=stream)
    if table.dtype != "float32" or table.nbytes != 1024:
        raise InvalidArgumentError(f"codebook has {table.nbytes} bytes of {table.dtype}; want 256 float32")
    return table


def dequantize_blockwise(
    codes: Any,
    absmax: Any,
    codebook: Any = None,
    *,
    blocksize: int = 4096,
    dtype: Any = "float32",
    out: Any = None,
    threads: int = 0,
    stream: Optional[int] = None,
) -> Any:
    """The way back from quantize_blockwise, to codes' shape: codebook[code] · absmax, as the dtype."""
    shape = _buffers.view(codes, "codes", stream=stream).shape
    if codebook is not None:
        _table(codebook, stream)
    state = QuantState("blockwise8", shape, blocksize, "float32", codes, absmax, codebook=codebook)
    return state.dequantize(dtype, out, threads=threads, stream=stream)


def quantize_rows_int8(
    array: Any, threshold: float = 0.0, *, dtype: Any = None, threads: int = 0, stream: Optional[int] = None
) -> tuple[Any, Any, Any]:
    """Quantizes the rows of a matrix to 8 bits: bitsandbytes' int8_vectorwise_quant.

    array: float32, float16 or bfloat16 [..., cols] (dtype says so for bytes), rounded to float16 first. threshold: if above 0,
    elements of this magnitude or more are outliers: they do not count for absmax, and their columns get code 0 in all rows.
    Returns codes, int8 of array's shape; absmax, float32 [rows]; and outliers, uint8 [cols] with 1 for a column that has
    one, or None without a threshold.
    """
    source = _buffers.weights(array, "array", dtype, stream=stream)
    where = _buffers.place(source, stream=stream)
    if not source.shape:
        raise InvalidArgumentError("array has no dimension; want rows")
    rows, cols = math.prod(source.shape[:-1]), source.shape[-1]
    codes = _buffers.empty(array, "int8", source.shape, where)
    absmax = _buffers.empty(array, "float32", (rows,), where)
    outliers = _buffers.empty(array, "uint8", (cols,), where) if threshold > 0 else None
    to, scales = _buffers.view(codes, "codes"), _buffers.view(absmax, "absmax")
    mask = None if outliers is None else _buffers.view(outliers, "outliers")
    lib.gq_quantize_rows_int8(
        source.address,
        _dtypes.number(source.dtype),
        rows,
        cols,
        threshold,
        scales.address,
        rows,
        to.address,
        to.nbytes,
        mask.address if mask else 0,
        mask.nbytes if mask else 0,
        _ffi.execution(threads, *where),
    )
    return codes, absmax, outliers


def codebook(name: str, *, like: Any = None) -> Any:
    """A table of values, float32 [256]: bitsandbytes' "dynamic", "dynamic_unsigned", "linear", "linear_unsigned", "fp8_e4m3",
    "fp8_e5m2"; or float32 [16]: "nf4", "fp4". An array of like's library, where like is."""
    where = _buffers.place_of(like)
    if where != _buffers.HOST:
        return _buffers.floats(like, codebook(name).tolist(), where)
    if name in ("nf4", "fp4"):
        return quantize(_buffers.empty(like, "float32", (0,)), name).codebook
    table = _buffers.empty(like, "float32", (256,))
    address = _buffers.view(table, "table").address
    lib.gq_codebook(name.encode(), ctypes.cast(address, ctypes.POINTER(c_float)), 256)
    return table


def pack_4bit(codes: Any, order: str = "high_first", *, threads: int = 0, stream: Optional[int] = None) -> Any:
    """Packs codes, uint8 from 0 to 15, two to a byte: uint8 [ceil(n / 2)].

    order: "high_first" (bitsandbytes: the first of two is in the high nibble) or "low_first". An odd n leaves the last nibble 0.
    A code above 15 is an InvalidArgumentError; a device takes its lower 4 bits.
    """
    source = _bytes(codes, "codes", stream)
    where = _buffers.place(source, stream=stream)
    packed = _buffers.empty(codes, "uint8", ((source.nbytes + 1) // 2,), where)
    to = _buffers.view(packed, "packed")
    execution = _ffi.execution(threads, *where)
    lib.gq_pack_4bit(source.address, source.nbytes, _order(order), to.address, to.nbytes, execution)
    return packed


def unpack_4bit(
    packed: Any, count: Optional[int] = None, order: str = "high_first", *, threads: int = 0, stream: Optional[int] = None
) -> Any:
    """The way back from pack_4bit: uint8 [count]; by default all that packed holds."""
    source = _bytes(packed, "packed", stream)
    where = _buffers.place(source, stream=stream)
    codes = _buffers.empty(packed, "uint8", (2 * source.nbytes if count is None else max(0, count),), where)
    to = _buffers.view(codes, "codes")
    n = to.nbytes if count is None else count
    execution = _ffi.execution(threads, *where)
    lib.gq_unpack_4bit(source.address, source.nbytes, _order(order), to.address, n, execution)
    return codes


def _bytes(array: Any, name: str, stream: Optional[int]) -> _buffers.Buffer:
    buffer = _buffers.view(array, name, stream=stream)
    if buffer.dtype != "uint8":
        raise InvalidArgumentError(f"{name} has dtype {buffer.dtype}; want uint8")
    return buffer


def _order(order: str) -> int:
    if order not in _ORDERS:
        raise InvalidArgumentError(f"order is {order!r}; want one of {', '.join(_ORDERS)}")
    return _ORDERS[order]

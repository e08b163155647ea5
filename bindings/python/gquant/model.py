"""Reading models: a safetensors file, a shard index or a folder, quantized or not."""

import functools
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import byref, c_char_p, c_int64, c_void_p
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from . import _buffers, _dtypes, _ffi
from ._errors import InvalidArgumentError, InvalidHandleError, NotFoundError, UnsupportedError
from ._ffi import lib
from .quant import QuantState, empty_parts, fill, filled, format_name, views

Path = Union[str, os.PathLike[str]]
Rows = Optional[tuple[int, int]]  # first, and behind the last; None = all


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor as stored. Nothing of it is read until read() is called."""

    name: str
    dtype: str  # such as "bfloat16"
    shape: tuple[int, ...]
    nbytes: int
    file: str  # path
    file_offset: int  # of its first byte
    _handle: "_Handle" = field(repr=False)
    _index: int = field(repr=False)

    def read(self, out: Any = None, *, rows: Rows = None, threads: int = 0, stream: Optional[int] = None) -> Any:
        """The values, or those of rows first … last-1 of the first dimension.

        out takes them without a copy and is returned: an array of so many bytes, of the dtype or of its bits as unsigned
        integers, on the host or a CUDA device. By default it is a new one; a tensor whose elements are smaller than a byte
        comes as uint8 [bytes]. stream: on a device, whose work is done before the values are written.
        """
        first, last = _bounds(self, rows)
        row = self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes
        offset, nbytes = (0, self.nbytes) if rows is None else (first * row, (last - first) * row)
        shape: tuple[int, ...] = (last - first, *self.shape[1:]) if self.shape else ()
        if self._read_as != self.dtype:
            shape = (nbytes,)
        if out is None:
            out = _buffers.empty(None, self._read_as, shape)
        to = _buffers.output(out, "out", self._read_as, nbytes)
        execution = _ffi.execution(threads, *_buffers.place(to, stream=stream))
        lib.gq_model_read(self._handle.value, self._index, offset, to.address, nbytes, execution)
        return out

    @property
    def _read_as(self) -> str:
        return self.dtype if _dtypes.bits(self.dtype) >= 8 else "uint8"


@dataclass(frozen=True, eq=False)
class Layer:
    """A quantized layer. Nothing of it is read until dequantize() or read() is called."""

    name: str  # of the weight it stands for
    format: str  # "nf4", "fp4" or "int8"
    convention: str  # how its tensors are named: "bitsandbytes" or "gptqmodel"
    shape: tuple[int, ...]
    dtype: str  # of the weight before: "float32", "float16" or "bfloat16"
    blocksize: int
    nested: bool
    nbytes: int  # of all its parts
    _handle: "_Handle" = field(repr=False)
    _index: int = field(repr=False)
    _sizes: _ffi.gq_parts = field(repr=False)

    def dequantize(self, dtype: Any = None, out: Any = None, *, rows: Rows = None, threads: int = 0) -> Any:
        """Decodes the weight, or its rows first … last-1, straight from the file, on the host. See QuantState.dequantize."""
        first, last = _bounds(self, rows)
        if dtype is None and out is not None and (given := _buffers.view(out, "out").dtype) in _dtypes.WEIGHTS:
            dtype = given
        dtype = self.dtype if dtype is None else _dtypes.parse_weight(dtype)
        shape = (last - first, *self.shape[1:])
        if out is None:
            out = _buffers.empty(None, dtype, shape)
        to = _buffers.output(out, "out", dtype, math.prod(shape) * _dtypes.bits(dtype) // 8)
        if to.device != _ffi.GQ_CPU:
            raise UnsupportedError("out is on a CUDA device: read(like=out) the layer there and dequantize that")
        lib.gq_model_dequantize(
            self._handle.value,
            self._index,
            first,
            last - first,
            to.address,
            to.nbytes,
            _dtypes.number(dtype),
            _ffi.execution(threads),
        )
        return out

    def read(self, *, like: Any = None, threads: int = 0, stream: Optional[int] = None) -> QuantState:
        """The layer's state, in new arrays: of like's library, where like is."""
        where = _buffers.place_of(like, stream)
        arrays = empty_parts(like, self._sizes, self.nested, where)
        parts = _ffi.gq_parts()
        fill(parts, views(arrays, self.nested))
        lib.gq_model_read_layer(self._handle.value, self._index, parts, _ffi.execution(threads, *where))
        return QuantState(format=self.format, shape=self.shape, blocksize=self.blocksize, dtype=self.dtype, **filled(arrays))


def _bounds(item: Union[Tensor, Layer], rows: Rows) -> tuple[int, int]:
    count = item.shape[0] if item.shape else 1
    first, last = rows if rows is not None else (0, count)
    if not 0 <= first <= last <= count or (rows is not None and not item.shape):
        raise InvalidArgumentError(f"rows {first} to {last} of {item.name}, whose shape is {list(item.shape)}")
    return first, last


class _Handle:
    """A gq_model. What refers to it keeps it open, unless it is closed by hand."""

    def __init__(self, path: Path, options: _ffi.gq_load_options):
        handle = c_void_p()
        lib.gq_load_model(os.fsencode(path), options, byref(handle))
        self.path = os.fsdecode(path)
        self._value = handle.value or 0
        self.close = weakref.finalize(self, _ffi.free, "gq_free_model", self._value)

    @property
    def value(self) -> int:
        if not self.close.alive:
            raise InvalidHandleError(f"the model {self.path} is closed")
        return self._value


class Model(Mapping[str, Union[Tensor, Layer]]):
    """An opened model: a mapping from names to tensors and quantized layers.

    Usable from several threads. close(), the end of a with block, or the garbage collector closes its files; what was read
    stays valid.
    """

    def __init__(self, path: Path, prefix: Optional[str] = None, include: Union[str, Sequence[str], None] = None):
        if include is not None and not isinstance(include, str):
            include = ",".join(include)
        options = _ffi.gq_load_options(
            prefix=None if prefix is None else prefix.encode(), include=None if include is None else include.encode()
        )
        self._handle = _Handle(path, options)

    @property
    def path(self) -> str:
        return self._handle.path

    def close(self) -> None:
        """Closes the model's files; waits for reads under way in other threads. Closing twice is no error."""
        self._handle.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<gquant.Model {self.path!r}{'' if self._handle.close.alive else ', closed'}>"

    @functools.cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that belong to no quantized layer, by name."""
        return {tensor.name: tensor for tensor in map(self._tensor, range(self._count("gq_model_tensor_count")))}

    @functools.cached_property
    def layers(self) -> Mapping[str, Layer]:
        """The quantized layers, by the name of the weight that each stands for."""
        return {layer.name: layer for layer in map(self._layer, range(self._count("gq_model_layer_count")))}

    @functools.cached_property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the headers."""
        texts, key, value = {}, c_char_p(), c_char_p()
        for i in range(self._count("gq_model_metadata_count")):
            lib.gq_model_metadata(self._handle.value, i, byref(key), byref(value))
            texts[str(key.value or b"", "utf-8")] = str(value.value or b"", "utf-8")
        return texts

    def read_all(
        self,
        tensors: Mapping[str, Any],
        layers: Mapping[str, Mapping[str, Any]],
        *,
        threads: int = 0,
        stream: Optional[int] = None,
    ) -> None:
        """Reads many tensors and layers at once into arrays that are there, which is the fast way to a device.

        tensors: by name, what takes the values: see Tensor.read. layers: by name, what takes the parts, by the names of
        QuantState's fields, "packed" as any dtype, "offset" as float32 []; parts that are not there are not read. All arrays are
        on the host, or all on one device. stream: on a device, whose work is done before memory is written.
        """
        self._reader(tensors, layers, threads, stream)()

    def _reader(
        self, tensors: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]], threads: int = 0, stream: Optional[int] = None
    ) -> Callable[[], None]:
        """read_all, but for the reading: a function that does it and keeps no other thread from running Python meanwhile."""
        buffers = []
        memory = (_ffi.gq_buffer * len(self.tensors))()
        for name, out in tensors.items():
            tensor = self._find(self.tensors, name)
            buffer = _buffers.output(out, name, tensor._read_as, tensor.nbytes)
            memory[tensor._index] = (buffer.address, buffer.nbytes)
            buffers.append(buffer)
        parts = (_ffi.gq_parts * len(self.layers))()
        for name, arrays in layers.items():
            layer = self._find(self.layers, name)
            found = views(arrays, layer.nested)
            fill(parts[layer._index], found)
            buffers.extend(found.values())
        execution = _ffi.execution(threads, *_buffers.place(*buffers, stream=stream))

        def read() -> None:
            lib.gq_model_read_all(self._handle.value, memory, len(memory), parts, len(parts), execution)
            buffers.clear()  # which were kept until here

        return read

    def _find(self, items: Mapping[str, Any], name: str) -> Any:
        found = items.get(name)
        if found is None:
            raise NotFoundError(f"the model {self.path} has no tensor or layer {name!r}")
        return found

    def __getitem__(self, name: str) -> Union[Tensor, Layer]:
        return self.layers.get(name) or self._find(self.tensors, name)

    def __iter__(self) -> Iterator[str]:
        yield from self.layers
        yield from self.tensors

    def __len__(self) -> int:
        return len(self.layers) + len(self.tensors)

    def _count(self, function: str) -> int:
        count = c_int64()
        getattr(lib, function)(self._handle.value, byref(count))
        return count.value

    def _tensor(self, index: int) -> Tensor:
        info = _ffi.gq_tensor_info()
        lib.gq_model_tensor(self._handle.value, index, byref(info))
        return Tensor(
            name=info.name.decode(),
            dtype=_dtypes.from_number(info.dtype),
            shape=tuple(info.shape[: info.ndim]),
            nbytes=info.bytes,
            file=os.fsdecode(info.file),
            file_offset=info.file_offset,
            _handle=self._handle,
            _index=index,
        )

    def _layer(self, index: int) -> Layer:
        info = _ffi.gq_layer_info()
        lib.gq_model_layer(self._handle.value, index, byref(info))
        sizes = _ffi.gq_parts.from_buffer_copy(info.sizes)
        nbytes = sum(getattr(sizes, field[0]) for field in sizes._fields_ if field[0].endswith("_bytes"))
        return Layer(
            name=info.name.decode(),
            format=format_name(info.format),
            convention=info.convention.decode(),
            shape=tuple(info.shape[: info.ndim]),
            dtype=_dtypes.from_number(info.dtype),
            blocksize=info.blocksize,
            nested=info.nested_blocksize != 0,
            nbytes=nbytes,
            _handle=self._handle,
            _index=index,
            _sizes=sizes,
        )


def open(path: Path, prefix: Optional[str] = None, include: Union[str, Sequence[str], None] = None) -> Model:
    """Opens a model: a .safetensors file, a shard index or a folder. Reads headers, no weights.

    prefix: only names that start with it, which is cut off. include: only names that match one of these globs.
    NotFoundError if there is nothing at path; BadFileError if a file or layer breaks the rules.
    """
    return Model(path, prefix, include)

"""The operators torch.ops.gquant.*: what they are, what they do on the CPU and on CUDA, their shapes, and the gradient of
linear_4bit.

On CUDA they put work on the current stream and wait for nothing. They take a quantized weight as its tensors, which are all on
one device, and numbers, in this order:

    packed         the codes, of any dtype: [bytes / itemsize, 1]
    absmax         float32 [blocks], or uint8 [blocks] when nested
    nested_absmax  float32 [ceil(blocks / 256)], when nested; else None, as the next two
    nested_code    float32 [256]
    offset         float32 []
    shape, dtype   of the weight
    blocksize, quant_type
"""

import contextlib
import ctypes
import functools
import math
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from ctypes import c_int32, c_int64, c_size_t, c_uint64
from typing import Any, Optional, Union

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _ffi, quant
from .._buffers import current_stream
from .._errors import InvalidArgumentError, UnsupportedError
from .._ffi import lib

_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, SymInt[] shape, "
    "ScalarType dtype, int blocksize, str quant_type"
)

REAL = (Tensor, torch.nn.Parameter)  # not what tracing puts in their place
_library = torch.library.Library("gquant", "DEF")
_compiles = (torch.Tag.pt2_compliant_tag,)


def _kernel(name: str) -> Any:
    """Registers what an operator does on the devices that gquant computes on."""

    def register(function: Any) -> Any:
        for key in ("CPU", "CUDA"):
            torch.library.impl(_library, name, key)(function)
        return function

    return register


# ---- quantize_4bit: the tensors of a weight and the values of its codes; nested_absmax, nested_code and offset are empty if
# compress_statistics is False

_library.define(
    "quantize_4bit(Tensor A, int blocksize, str quant_type, bool compress_statistics, ScalarType quant_storage) -> "
    "(Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor nested_code, Tensor offset, Tensor code)",
    tags=_compiles,
)

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@_kernel("quantize_4bit")
def _quantize(A: Tensor, blocksize: int, quant_type: str, compress_statistics: bool, quant_storage: torch.dtype) -> Parts:
    if quant_type not in ("nf4", "fp4"):
        raise InvalidArgumentError(f'quant_type is {quant_type!r}; want "nf4" or "fp4"')
    state = quant.quantize(A, quant_type, blocksize=blocksize, nested=compress_statistics)
    if state.packed.numel() % quant_storage.itemsize:
        raise InvalidArgumentError(f"{state.packed.numel()} bytes of codes are no number of quant_storage {quant_storage}")
    packed = state.packed.view(quant_storage).reshape(-1, 1)
    if not compress_statistics:
        return packed, state.absmax, *(A.new_empty(0, dtype=torch.float32) for _ in range(3)), state.codebook
    offset = state.offset if A.is_cuda else torch.tensor(state.offset, dtype=torch.float32)
    return packed, state.absmax, state.nested_absmax, state.nested_codebook, offset, state.codebook


@torch.library.register_fake("gquant::quantize_4bit", lib=_library)
def _(A: Tensor, blocksize: int, quant_type: str, compress_statistics: bool, quant_storage: torch.dtype) -> Parts:
    def floats(*shape: int) -> Tensor:
        return A.new_empty(shape, dtype=torch.float32)

    blocks = -(A.numel() // -blocksize)
    packed = A.new_empty(((A.numel() + 1) // 2 // quant_storage.itemsize, 1), dtype=quant_storage)
    if not compress_statistics:
        return packed, floats(blocks), floats(0), floats(0), floats(0), floats(16)
    absmax = A.new_empty((blocks,), dtype=torch.uint8)
    return packed, absmax, floats(-(blocks // -quant.NESTED_BLOCKSIZE)), floats(256), floats(), floats(16)


# ---- dequantize_4bit: the weight

_library.define(f"dequantize_4bit({_WEIGHT}) -> Tensor", tags=_compiles)
_library.define(f"dequantize_4bit.out({_WEIGHT}, *, Tensor(a!) out) -> ()", tags=_compiles)


def _state(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Optional[Tensor],
    nested_code: Optional[Tensor],
    offset: Optional[Tensor],
    shape: list[int],
    dtype: torch.dtype,
    blocksize: int,
    quant_type: str,
) -> quant.QuantState:
    return quant.QuantState(
        format=quant_type,
        shape=tuple(shape),
        blocksize=blocksize,
        dtype=str(dtype).removeprefix("torch."),
        packed=packed,
        absmax=absmax,
        nested_absmax=nested_absmax,
        nested_codebook=nested_code,
        offset=None if offset is None else offset.detach().to(torch.float32),
    )


class _Borrowed:
    """A gq_state over the memory of tensors that the caller keeps alive during a call."""

    def __init__(self, desc: _ffi.gq_state_desc):
        self.handle = ctypes.c_void_p()
        lib.gq_state_create(ctypes.byref(desc), ctypes.byref(self.handle))
        weakref.finalize(self, _ffi.free, "gq_state_free", self.handle.value or 0)


# A layer is decoded again and again, and describing it takes longer than the call. The key holds every address, size and number
# that the description has, so a remembered one fits whatever tensors have these; it reads nothing between calls.
@functools.lru_cache(maxsize=4096)
def _borrowed(format: int, dtype: int, blocksize: int, device: int, shape: tuple[int, ...], *parts: int) -> _Borrowed:
    dims = (ctypes.c_int64 * len(shape))(*shape)
    desc = _ffi.gq_state_desc(
        format=format,
        dtype=dtype,
        ndim=len(shape),
        shape=ctypes.addressof(dims),
        blocksize=blocksize,
        nested_blocksize=quant.NESTED_BLOCKSIZE if len(parts) > 4 else 0,
        device=device,
    )
    names = ("packed", "absmax", "nested_absmax", "nested_codebook", "offset")
    for name, address, nbytes in zip(names, parts[::2], parts[1::2]):
        setattr(desc.parts, name, address)
        setattr(desc.parts, name + "_bytes", nbytes)
    return _Borrowed(desc)


@functools.lru_cache(maxsize=256)
def _on(device: int, stream: int, flags: int = 0) -> Any:
    """A reference to a gq_exec."""
    return ctypes.byref(_ffi.gq_exec(device=device, stream=stream, flags=flags))


_NUMBERS = {torch.float32: 18, torch.float16: 14, torch.bfloat16: 15}  # gq_dtype
_ARGUMENTS = {dtype: c_int32(number) for dtype, number in _NUMBERS.items()}
_FORMATS = {name: quant.format_number(name) for name in ("nf4", "fp4")}
_F32, _U8 = torch.float32, torch.uint8
_gq_dequantize = _ffi.bare("gq_dequantize")
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", current_stream)


def _borrow(weight: tuple[Any, ...]) -> Optional[_Borrowed]:
    """The state of a weight; None if its tensors are not what they usually are."""
    packed, absmax, nested_absmax, nested_code, offset, shape, dtype, blocksize, quant_type = weight
    device = packed.get_device()
    usual = (
        dtype in _NUMBERS
        and quant_type in _FORMATS
        and (packed.is_cuda or packed.is_cpu)
        and absmax.get_device() == device
        and packed.is_contiguous()
        and absmax.is_contiguous()
    )
    if nested_absmax is None:
        usual = usual and absmax.dtype is _F32
        parts = (packed.data_ptr(), packed.nbytes, absmax.data_ptr(), absmax.nbytes)
    else:
        usual = (
            usual
            and absmax.dtype is _U8
            and nested_absmax.dtype is nested_code.dtype is offset.dtype is _F32
            and nested_absmax.get_device() == nested_code.get_device() == offset.get_device() == device
            and nested_absmax.is_contiguous()
            and nested_code.is_contiguous()
        )
        parts = (
            packed.data_ptr(),
            packed.nbytes,
            absmax.data_ptr(),
            absmax.nbytes,
            nested_absmax.data_ptr(),
            nested_absmax.nbytes,
            nested_code.data_ptr(),
            nested_code.nbytes,
            offset.data_ptr(),
            offset.nbytes,
        )
    if not usual:
        return None
    return _borrowed(_FORMATS[quant_type], _NUMBERS[dtype], blocksize, device, tuple(shape), *parts)


def decode(weight: tuple[Any, ...], out: Tensor) -> None:
    """Decodes a weight into out, without torch's dispatcher."""
    device, dtype = weight[0].get_device(), weight[6]
    fits = out.dtype is dtype and out.get_device() == device and out.is_contiguous()
    state = _borrow(weight) if fits else None
    if state is None:
        _state(*weight).dequantize(dtype, out)  # slower, and knows what is wrong
        return
    execution = None if device < 0 else _on(device, _current_stream(device))
    status = _gq_dequantize(state.handle, c_uint64(out.data_ptr()), c_size_t(out.nbytes), _ARGUMENTS[dtype], execution)
    if status != 0:
        raise _ffi.error(status)


@_kernel("dequantize_4bit")
def _dequantize(*weight: Any) -> Tensor:
    out = torch.empty(weight[5], dtype=weight[6], device=weight[0].device)
    decode(weight, out)
    return out


@_kernel("dequantize_4bit.out")
def _dequantize_out(*weight: Any, out: Tensor) -> None:
    decode(weight, out)


@torch.library.register_fake("gquant::dequantize_4bit", lib=_library)
def _(*weight: Any) -> Tensor:
    return weight[0].new_empty(weight[5], dtype=weight[6])


@torch.library.register_fake("gquant::dequantize_4bit.out", lib=_library)
def _(*weight: Any, out: Tensor) -> None:
    pass


# ---- linear_4bit: x · weightᵀ + bias of x's dtype, to which the bias is cast. The library multiplies with the packed weight where it
# can; else the weight is decoded to its own dtype, cast to that of x, and torch multiplies

_library.define(f"linear_4bit(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor", tags=_compiles)
_library.define(f"linear_4bit.out(Tensor x, Tensor? bias, {_WEIGHT}, *, Tensor(a!) out) -> ()", tags=_compiles)

_HALVES = (torch.float16, torch.bfloat16)
_gq_linear = _ffi.bare("gq_linear")


# The number of a state is never used again.
@functools.lru_cache(maxsize=16384)
def _workspace_bytes(state: int, rows: int, dtype: int, device: int) -> Optional[int]:
    """The bytes of workspace that gq_linear wants on a CUDA device; None where it would decode the weight."""
    size, packed = c_uint64(), c_int32()
    execution = _ffi.gq_exec(device=device)
    lib.gq_linear_workspace_size(state, rows, dtype, execution, None, ctypes.byref(packed))
    if not packed.value:
        return None
    lib.gq_linear_workspace_size(state, rows, dtype, execution, ctypes.byref(size), None)
    return size.value


def plain(x: Tensor, packed: Tensor) -> bool:
    """Whether the tensors are themselves: no subclass, and no mode, transform or forward-mode gradient takes note of what is done."""
    return (
        type(x) in REAL
        and type(packed) in REAL
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def linear(x: Tensor, bias: Optional[Tensor], weight: tuple[Any, ...], out: Optional[Tensor] = None) -> Tensor:
    """x · weightᵀ + bias, in out if given; without torch's dispatcher where the library multiplies."""
    packed, shape = weight[0], weight[5]
    device, on_cpu, dtype, given = packed.get_device(), packed.is_cpu, x.dtype, x.shape
    if len(shape) != 2:
        raise InvalidArgumentError(f"the weight has shape {tuple(shape)}; a linear layer needs 2 dimensions")
    n, k = shape
    if not given or given[-1] != k:
        raise InvalidArgumentError(f"x has shape {tuple(given)}; want [..., {k}]")
    if x.get_device() != device or x.is_cpu != on_cpu:
        raise _apart(packed, x, "x")
    if bias is not None:
        if bias.get_device() != device or bias.is_cpu != on_cpu:
            raise _apart(packed, bias, "bias")
        if bias.shape != (n,):
            raise InvalidArgumentError(f"bias has shape {tuple(bias.shape)}; want ({n},)")
        if bias.dtype is not dtype:
            bias = bias.to(dtype)
    if out is not None:
        if out.get_device() != device or out.is_cpu != on_cpu:
            raise _apart(packed, out, "out")
        if out.dtype is not dtype or out.shape != (*given[:-1], n):
            raise InvalidArgumentError(f"out is {out.dtype} {tuple(out.shape)}; want {dtype} {(*given[:-1], n)}")
        if not out.is_contiguous():
            raise InvalidArgumentError("out is not contiguous in row-major order; copy it into an array that is")
    rows = x.numel() // k if k else math.prod(given[:-1])
    known = weight[8] in _FORMATS and dtype in (_NUMBERS if on_cpu else _HALVES)
    state, workspace = _borrow(weight) if known else None, 0 if known and on_cpu else None
    if state is not None and packed.is_cuda:
        aligned = (x.data_ptr() % 16 == 0 or not x.is_contiguous()) and (out is None or out.data_ptr() % 16 == 0)
        workspace = _workspace_bytes(state.handle.value, rows, _NUMBERS[dtype], device) if aligned else None
    if workspace is None:
        return _decoded(x, bias, weight, out, rows)
    x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    y = x.new_empty((*given[:-1], n)) if out is None else out
    if state is None:
        return _state(*weight).linear(x, bias, y)  # slower, and knows what is wrong
    return _multiply(state, x, bias, y, rows, workspace)


_SLAB_BYTES = 64 << 20  # of decoded elements, from which on a weight is decoded in slabs
_SLAB_ROWS = 2048  # of x, from which on slabs are no slower than the whole weight


def _decoded(x: Tensor, bias: Optional[Tensor], weight: tuple[Any, ...], out: Optional[Tensor], rows: int) -> Tensor:
    """linear() with the decoded weight. For many rows of x and a large weight that is the library's work, which takes slabs of the weight
    and so bounded memory; torch would copy y's columns, or add the bias in a pass of its own."""
    packed, (n, k), stored, dtype = weight[0], weight[5], weight[6], x.dtype
    # Autocast chooses the dtype of products. float32 is torch's, which may be allowed to round it to TF32.
    if packed.is_cuda and dtype in _HALVES and rows >= _SLAB_ROWS and n * k * 2 >= _SLAB_BYTES and not torch.is_autocast_enabled():
        state = _borrow(weight)
        workspace = None if state is None else _slab_bytes(state.handle.value, rows, _NUMBERS[dtype], packed.get_device())
        if workspace is not None:
            y = x.new_empty((*x.shape[:-1], n)) if out is None else out
            return _multiply(state, x.contiguous(), None if bias is None else bias.contiguous(), y, rows, workspace)
    dense = torch.empty(n, k, dtype=stored, device=packed.device)
    decode(weight, dense)
    if out is None:
        return torch.nn.functional.linear(x, dense.to(dtype), bias)
    torch.nn.functional.linear(x.reshape(rows, k), dense.to(dtype), bias, out=out.view(rows, n))
    return out


@functools.lru_cache(maxsize=4096)
def _slab_bytes(state: int, rows: int, dtype: int, device: int) -> Optional[int]:
    """The bytes of workspace with which gq_linear decodes a weight in slabs; None if there is no libcublasLt."""
    size = c_uint64()
    try:
        lib.gq_linear_workspace_size(state, rows, dtype, _ffi.gq_exec(device=device), ctypes.byref(size), None)
    except UnsupportedError:
        return None
    return size.value


def _multiply(state: Any, x: Tensor, bias: Optional[Tensor], y: Tensor, rows: int, workspace: int) -> Tensor:
    """gq_linear of contiguous tensors."""
    device = x.get_device()
    stream = 0 if device < 0 else _current_stream(device)
    if workspace:
        scratch = torch.empty(workspace, dtype=_U8, device=x.device)
        execution = ctypes.byref(
            _ffi.gq_exec(device=device, stream=stream, workspace=scratch.data_ptr(), workspace_bytes=workspace, flags=_flags.get())
        )
    else:
        execution = None if device < 0 else _on(device, stream, _flags.get())
    added = c_uint64(0 if bias is None else bias.data_ptr())
    status = _gq_linear(state.handle, c_uint64(x.data_ptr()), c_int64(rows), _ARGUMENTS[x.dtype], added, c_uint64(y.data_ptr()), execution)
    if status != 0:
        raise _ffi.error(status)
    return y


_flags: ContextVar[int] = ContextVar("flags of gq_linear", default=0)


@contextlib.contextmanager
def settled_weights(device: Union[torch.device, str, int, None] = None) -> Iterator[None]:
    """Makes linear layers of few rows faster on Hopper and newer, by 1 µs each in a CUDA graph: they read their 4-bit weights while the kernel
    before them ends. In this block no 4-bit weight may be written; to load or change some, leave it.

        with gquant.torch.settled_weights(), torch.inference_mode():
            ...

    device: the CUDA device whose work is waited for at the beginning, as what writes the weights may be among it; None: the current one. It
    holds for this thread (or asyncio's task), and for graphs that are captured in the block as long as weights are written only between their
    launches.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize(device)
    before = _flags.set(_ffi.GQ_EXEC_SETTLED)
    try:
        yield
    finally:
        _flags.reset(before)


def _apart(packed: Tensor, tensor: Tensor, name: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"packed is on device {packed.device} and {name} on {tensor.device}; all tensors of a call must be on one device"
    )


@_kernel("linear_4bit")
def _linear(x: Tensor, bias: Optional[Tensor], *weight: Any) -> Tensor:
    return linear(x, bias, weight)


@_kernel("linear_4bit.out")
def _linear_out(x: Tensor, bias: Optional[Tensor], *weight: Any, out: Tensor) -> None:
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise InvalidArgumentError("linear_4bit.out has no gradient, but x or bias asks for one: leave out= away, or use torch.no_grad()")
    linear(x, bias, weight, out)


@torch.library.register_fake("gquant::linear_4bit", lib=_library)
def _(x: Tensor, bias: Optional[Tensor], *weight: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight[5][0]))


@torch.library.register_fake("gquant::linear_4bit.out", lib=_library)
def _(x: Tensor, bias: Optional[Tensor], *weight: Any, out: Tensor) -> None:
    pass


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:7])
    ctx.numbers, ctx.dtype_of_bias = inputs[7:], None if inputs[1] is None else inputs[1].dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.gquant.dequantize_4bit(*ctx.saved_tensors, *ctx.numbers)
        of_x = gradient @ weight.to(gradient.dtype)
    if ctx.needs_input_grad[1]:
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.dtype_of_bias)
    return of_x, of_bias, *(None for _ in range(9))


torch.library.register_autograd("gquant::linear_4bit", _backward, setup_context=_remember, lib=_library)

"""What can be given to the functions, what comes back, and what errors say."""

import array
import ctypes
import mmap

import ml_dtypes
import numpy
import pytest
import torch

import gquant
from gquant import _buffers

VALUES = [0.5, -2.0, 0.25, 1.0] * 16


class Interface:
    """Has __array_interface__ and nothing else."""

    def __init__(self, owner):
        self._owner = owner
        self.__array_interface__ = owner.__array_interface__


class DLPack:
    """Has DLPack and nothing else."""

    def __init__(self, owner, device=(1, 0)):
        self._owner, self._device = owner, device

    def __dlpack__(self):
        return self._owner.__dlpack__()

    def __dlpack_device__(self):
        return self._device


class Cuda:
    """Has the two interfaces of an array on a device, and no memory."""

    def __init__(self, device=1, **changes):
        self.__cuda_array_interface__ = {"shape": (8, 16), "typestr": "<f4", "data": (4096, False), "version": 3} | changes
        self._device = device

    def __dlpack_device__(self):
        return (2, self._device)


def kinds():
    """Arrays of VALUES in float32, by where they come from."""
    numbers = numpy.array(VALUES, "f4")
    mapped = mmap.mmap(-1, numbers.nbytes)
    mapped[:] = numbers.tobytes()
    read_only = numbers.copy()
    read_only.flags.writeable = False
    return {
        "numpy": numbers,
        "numpy read-only": read_only,
        "torch": torch.tensor(VALUES),
        "torch with gradient": torch.tensor(VALUES, requires_grad=True),
        "array": array.array("f", VALUES),
        "ctypes": (ctypes.c_float * 64)(*VALUES),
        "memoryview of bytes": memoryview(numbers.tobytes()).cast("f"),
        "array interface": Interface(numbers),
        "DLPack of numpy": DLPack(numbers),
        "DLPack of torch": DLPack(torch.tensor(VALUES)),
    }


@pytest.mark.parametrize("kind", kinds())
def test_sources(kind):
    source = kinds()[kind]
    state = gquant.quantize(source)
    want = gquant.quantize(numpy.array(VALUES, "f4"))
    assert state.shape == (64,) and state.dtype == "float32"
    assert bytes(memoryview(numpy.asarray(state.packed))) == want.packed.tobytes()
    assert type(state.packed) is (torch.Tensor if "torch" in kind and "DLPack" not in kind else numpy.ndarray)
    assert type(state.dequantize()) is type(state.packed)


def test_bytes_with_a_dtype():
    numbers = numpy.array(VALUES, ml_dtypes.bfloat16)
    want = gquant.quantize(numbers)
    assert want.dtype == "bfloat16"
    sources = (numbers.tobytes(), numbers.view("u2"), bytearray(numbers.tobytes()), array.array("H", numbers.view("u2").tolist()))
    for source in sources:
        state = gquant.quantize(source, dtype="bfloat16", shape=(4, 16))
        assert state.shape == (4, 16) and state.dtype == "bfloat16"
        assert state.packed.tobytes() == want.packed.tobytes()
    assert gquant.quantize(numbers.tobytes(), dtype=torch.bfloat16).shape == (64,)
    mapped = mmap.mmap(-1, 128)
    mapped[:] = numbers.tobytes()
    assert gquant.quantize(mapped, dtype=numbers.dtype).packed.tobytes() == want.packed.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_outputs(dtype):
    state = gquant.quantize(numpy.array(VALUES, "f4"))
    want = gquant.quantize(torch.tensor(VALUES)).dequantize(getattr(torch, dtype))
    size = want.itemsize
    tensor = torch.empty(64, dtype=want.dtype)
    assert state.dequantize(out=tensor) is tensor and torch.equal(tensor, want)
    numbers = numpy.empty(64, f"u{size}")
    for out in (numbers, bytearray(64 * size), memoryview(bytearray(64 * size)), (ctypes.c_uint8 * (64 * size))()):
        assert state.dequantize(dtype, out) is out
        assert bytes(memoryview(out).cast("B")) == bytes(want.view(torch.uint8).tolist())
    assert state.dequantize(numpy.dtype(dtype) if dtype != "bfloat16" else ml_dtypes.bfloat16).dtype.name == dtype


def test_memory_is_not_copied():
    for source in kinds().values():
        buffer = _buffers.view(source, "source")
        with_data = getattr(source, "_owner", source)
        if hasattr(with_data, "data_ptr"):
            assert buffer.address == with_data.data_ptr()
        elif hasattr(with_data, "ctypes"):
            assert buffer.address == with_data.ctypes.data
        elif isinstance(with_data, array.array):
            assert buffer.address == with_data.buffer_info()[0]
        elif isinstance(with_data, ctypes.Array):
            assert buffer.address == ctypes.addressof(with_data)


def test_a_source_stays_until_it_is_read():
    """Only the view refers to the memory."""
    buffer = _buffers.view(DLPack(numpy.array(VALUES, "f4")), "source")
    numpy.zeros(64, "f4")
    assert (ctypes.c_float * 64).from_address(buffer.address)[:] == VALUES


def test_empty():
    for source in (numpy.empty(0, "f4"), torch.empty(0), torch.empty(3, 0), array.array("f"), b""):
        state = gquant.quantize(source, dtype="float32")
        assert len(state.packed) == len(state.absmax) == 0
        assert state.dequantize().shape == state.shape
        assert gquant.QuantState.from_bitsandbytes(state.to_bitsandbytes()).json() == state.json()
        nested = gquant.quantize(source, dtype="float32", nested=True)
        assert nested.nested and len(nested.nested_absmax) == 0 and nested.dequantize().shape == nested.shape


NUMBERS = numpy.zeros((8, 16), "f4")

REFUSED = {
    "not contiguous": (lambda: gquant.quantize(NUMBERS.T), gquant.InvalidArgumentError, "array is not contiguous"),
    "torch, not contiguous": (lambda: gquant.quantize(torch.zeros(8, 8)[:, ::2]), gquant.InvalidArgumentError, "array is not contiguous"),
    "torch, sparse": (lambda: gquant.quantize(torch.zeros(8, 8).to_sparse()), gquant.InvalidArgumentError, "array is not contiguous"),
    "interface, not contiguous": (lambda: gquant.quantize(Interface(NUMBERS.T)), gquant.InvalidArgumentError, "not contiguous"),
    "DLPack, not contiguous": (lambda: gquant.quantize(DLPack(NUMBERS.T)), gquant.InvalidArgumentError, "not contiguous"),
    "float64": (lambda: gquant.quantize(numpy.zeros(8)), gquant.InvalidArgumentError, "array has dtype float64; want one of float32"),
    "integers": (lambda: gquant.quantize(torch.zeros(8, dtype=torch.int32)), gquant.InvalidArgumentError, "dtype int32"),
    "big-endian": (lambda: gquant.quantize(numpy.zeros(8, ">f4")), gquant.InvalidArgumentError, "dtype >f"),
    "records": (lambda: gquant.quantize(numpy.zeros(8, "f4,f4")), gquant.InvalidArgumentError, "dtype T{"),
    "bytes without a dtype": (lambda: gquant.quantize(bytes(64)), gquant.InvalidArgumentError, "array has dtype uint8"),
    "half an element": (lambda: gquant.quantize(bytes(3), dtype="float16"), gquant.InvalidArgumentError, "3 bytes"),
    "another shape": (lambda: gquant.quantize(NUMBERS, shape=(9, 16)), gquant.InvalidArgumentError, "needs 576"),
    "another dtype": (lambda: gquant.quantize(NUMBERS, dtype="float16"), gquant.InvalidArgumentError, "dtype float32; want float16"),
    "DLPack elsewhere": (lambda: gquant.quantize(DLPack(NUMBERS, (8, 1))), gquant.UnsupportedError, "DLPack device 8:1"),
    "another torch device": (lambda: gquant.quantize(torch.zeros(64, device="meta")), gquant.UnsupportedError, "array is on device meta"),
    "no array": (lambda: gquant.quantize([1.0, 2.0]), TypeError, "array is list; want an array"),
    "no dimension": (lambda: gquant.quantize(numpy.float32(1)), gquant.InvalidArgumentError, "ndim is 0"),
    "format": (lambda: gquant.quantize(NUMBERS, "nf5"), gquant.NotFoundError, "nf5"),
    "blocksize": (lambda: gquant.quantize(NUMBERS, blocksize=48), gquant.InvalidArgumentError, "blocksize is 48"),
    "nested int8": (lambda: gquant.quantize(NUMBERS, "int8", nested=True), gquant.InvalidArgumentError, "int8"),
    "threads": (lambda: gquant.quantize(NUMBERS, threads=-1), gquant.InvalidArgumentError, "threads is -1"),
    "dtype": (lambda: gquant.quantize(NUMBERS, dtype="float33"), gquant.InvalidArgumentError, "'float33'"),
    "out, dtype": (lambda: gquant.quantize(NUMBERS).dequantize("float16", numpy.empty((8, 16), "f4")), gquant.InvalidArgumentError, "out has dtype float32; want float16"),
    "out, size": (lambda: gquant.quantize(NUMBERS).dequantize(out=numpy.empty(127, "f4")), gquant.InvalidArgumentError, "out has 508 bytes; want 512"),
    "out, read-only": (lambda: gquant.quantize(NUMBERS).dequantize("float32", bytes(512)), gquant.InvalidArgumentError, "out is read-only"),
    "out, not contiguous": (lambda: gquant.quantize(NUMBERS).dequantize(out=numpy.empty((16, 8), "f4").T), gquant.InvalidArgumentError, "out is not contiguous"),
    "out, CUDA": (lambda: gquant.quantize(NUMBERS).dequantize("float32", Cuda()), gquant.InvalidArgumentError, "packed is on the host and out on CUDA device 1"),
    "codebook, CUDA": (lambda: gquant.quantize_blockwise(NUMBERS, Cuda(shape=(256,))), gquant.InvalidArgumentError, "array is on the host and codebook on CUDA device 1"),
    "CUDA, two devices": (lambda: gquant.quantize_blockwise(Cuda(), Cuda(2, shape=(256,))), gquant.InvalidArgumentError, "array is on CUDA device 1 and codebook on CUDA device 2"),
    "CUDA, two streams": (lambda: gquant.quantize_blockwise(Cuda(stream=1), Cuda(stream=0x70, shape=(256,))), gquant.InvalidArgumentError, "array on 0x0, codebook on 0x70"),
    "CUDA, not contiguous": (lambda: gquant.quantize(Cuda(strides=(4, 32))), gquant.InvalidArgumentError, "array is not contiguous"),
    "CUDA, read-only": (lambda: gquant.quantize(NUMBERS).dequantize("float32", Cuda(data=(4096, True))), gquant.InvalidArgumentError, "out is read-only"),
    "CUDA, float64": (lambda: gquant.quantize(Cuda(typestr="<f8")), gquant.InvalidArgumentError, "dtype float64"),
    "out, DLPack": (lambda: gquant.quantize(NUMBERS).dequantize("float32", DLPack(NUMBERS)), gquant.InvalidArgumentError, "out is read-only"),
    "dequantize to float64": (lambda: gquant.quantize(NUMBERS).dequantize("float64"), gquant.InvalidArgumentError, "dtype is float64"),
    "codes above 15": (lambda: gquant.pack_4bit(numpy.array([16], "u1")), gquant.InvalidArgumentError, "16"),
    "codes of int8": (lambda: gquant.pack_4bit(numpy.array([1], "i1")), gquant.InvalidArgumentError, "codes has dtype int8; want uint8"),
    "order": (lambda: gquant.pack_4bit(b"\1", "big"), gquant.InvalidArgumentError, "'big'"),
    "rows of nothing": (lambda: gquant.quantize_rows_int8(numpy.array(1, "f4")), gquant.InvalidArgumentError, "array has no dimension"),
    "threshold": (lambda: gquant.quantize_rows_int8(NUMBERS, -1.0), gquant.InvalidArgumentError, "threshold"),
    "rows of float64": (lambda: gquant.quantize_rows_int8(numpy.zeros((8, 16))), gquant.InvalidArgumentError, "dtype float64"),
    "count": (lambda: gquant.unpack_4bit(b"\1", 3), gquant.InvalidArgumentError, "want 2"),
    "negative count": (lambda: gquant.unpack_4bit(b"", -1), gquant.InvalidArgumentError, "n is -1"),
    "short codebook": (lambda: gquant.quantize_blockwise(NUMBERS, numpy.zeros(16, "f4")), gquant.InvalidArgumentError, "codebook has 64 bytes"),
    "codebook's name": (lambda: gquant.codebook("dynamite"), gquant.NotFoundError, "dynamite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, error, text = REFUSED[case]
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


def test_results_on_a_device_need_a_library(monkeypatch):
    monkeypatch.setattr(_buffers, "_optional", lambda module: None)
    with pytest.raises(gquant.UnsupportedError, match="results for a Cuda on a CUDA device are torch tensors"):
        gquant.quantize(Cuda())


def test_wrong_parts():
    state = gquant.quantize(NUMBERS)
    state.absmax = state.absmax.astype("f8")
    with pytest.raises(gquant.InvalidArgumentError, match="absmax has dtype float64; want float32"):
        state.dequantize()
    state.absmax = numpy.zeros(1, "f4")
    with pytest.raises(gquant.InvalidArgumentError, match="absmax has 4 bytes; want 8"):
        state.dequantize()


def test_output_is_left_alone_when_arguments_are_wrong():
    state = gquant.quantize(NUMBERS)
    state.blocksize = 48
    out = numpy.full((8, 16), 7, "f4")
    with pytest.raises(gquant.InvalidArgumentError):
        state.dequantize(out=out)
    assert (out == 7).all()


@pytest.mark.parametrize("order", ["high_first", "low_first"])
def test_pack(order):
    codes = numpy.arange(15, dtype="u1")
    packed = gquant.pack_4bit(codes, order)
    shifts = (4, 0) if order == "high_first" else (0, 4)
    padded = numpy.append(codes, 0).reshape(-1, 2)
    assert (packed == (padded[:, 0] << shifts[0] | padded[:, 1] << shifts[1])).all()
    assert (gquant.unpack_4bit(packed, 15, order) == codes).all()
    assert len(gquant.unpack_4bit(packed, order=order)) == 16


def test_blockwise8_with_any_codebook():
    numbers = numpy.random.default_rng(0).standard_normal((16, 64)).astype("f4")
    for name in ("dynamic", "linear", "fp8_e4m3"):
        table = gquant.codebook(name)
        codes, absmax = gquant.quantize_blockwise(numbers, table, blocksize=256)
        assert codes.shape == numbers.shape and absmax.shape == (4,)
        restored = gquant.dequantize_blockwise(codes, absmax, table, blocksize=256)
        assert (restored.reshape(4, 256) == table[codes.reshape(4, 256)] * absmax[:, None]).all()
    state = gquant.quantize(numbers, "blockwise8", blocksize=256)
    assert (state.codebook == gquant.codebook("dynamic")).all()
    assert (state.dequantize() == gquant.dequantize_blockwise(*gquant.quantize_blockwise(numbers, blocksize=256), blocksize=256)).all()


def test_int8_rows():
    numbers = numpy.random.default_rng(0).standard_normal((16, 64)).astype("f4")
    state = gquant.quantize(numbers, "int8")
    assert state.absmax.shape == (16,) and state.blocksize == 64
    assert abs(state.dequantize() - numbers).max() < abs(numbers).max() / 127
    codes, absmax, outliers = gquant.quantize_rows_int8(numbers)
    assert codes.dtype == "i1" and codes.shape == (16, 64) and outliers is None
    assert codes.tobytes() == state.packed.tobytes() and (absmax == state.absmax).all()
    assert gquant.quantize_rows_int8(numbers.reshape(4, 4, 64))[0].tobytes() == codes.tobytes()


def test_int8_outliers():
    numbers = numpy.random.default_rng(0).standard_normal((16, 64)).astype("f2")
    numbers[3, 5] = numbers[9, 40] = -7
    for source in (numbers, numbers.astype("f4"), torch.from_numpy(numbers)):
        codes, absmax, outliers = map(numpy.asarray, gquant.quantize_rows_int8(source, 6.0))
        assert outliers.dtype == "u1" and numpy.flatnonzero(outliers).tolist() == [5, 40]
        assert not codes[:, [5, 40]].any()
        assert (absmax == numpy.where(abs(numbers) < 6, abs(numbers), 0).max(1)).all()
        plain = gquant.quantize_rows_int8(numpy.delete(numbers, [5, 40], 1).copy())
        assert (numpy.delete(codes, [5, 40], 1) == plain[0]).mean() > 0.9  # others where an outlier's column had the largest


def test_offset_as_an_array():
    state = gquant.quantize(numpy.array(VALUES * 64, "f4"), nested=True)
    want, text = state.dequantize(), state.json()
    for offset in (numpy.float32(state.offset), numpy.array([state.offset], "f4"), torch.tensor(state.offset)):
        state.offset = offset
        assert (state.dequantize() == want).all() and state.json() == text
    state.offset = torch.tensor(0.0, dtype=torch.float64)
    with pytest.raises(gquant.InvalidArgumentError, match="offset has dtype float64; want float32"):
        state.dequantize()

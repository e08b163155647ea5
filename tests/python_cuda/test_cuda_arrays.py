"""Arrays on the device: results equal to those of the CPU, from any library, at any address; what is refused."""

import pytest
import torch

import gquant
import gquant.torch
import support
from gquant.torch.state import arguments
from weights import BLOCKSIZES, DTYPES, TYPES, equal, normal, random_bits

PARTS = ("packed", "absmax", "nested_absmax", "nested_codebook", "codebook")


def same_state(ours, want):
    for name in PARTS:
        a, b = getattr(ours, name), getattr(want, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.is_cuda and equal(a, b)), name
    assert (ours.shape, ours.dtype, ours.blocksize) == (want.shape, want.dtype, want.blocksize)
    if want.offset is not None:
        assert ours.offset.is_cuda and ours.offset.shape == ()
        assert equal(ours.offset, torch.tensor(want.offset, dtype=torch.float32))


# ---- the device gives the CPU's results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [*TYPES, "blockwise8"])
def test_quantize_is_the_cpus(format, dtype):
    for length in (0, 1, 2, 63, 100_003):
        x = random_bits(length, dtype, seed=length)
        for blocksize in BLOCKSIZES:
            for nested in (False, True) if format in TYPES else (False,):
                want = gquant.quantize(x, format, blocksize=blocksize, nested=nested)
                state = gquant.quantize(x.cuda(), format, blocksize=blocksize, nested=nested)
                same_state(state, want)
                for to in DTYPES:
                    assert equal(state.dequantize(to), want.dequantize(to)), (length, blocksize, nested, to)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_the_cpus(dtype):
    for shape in ((1, 1), (3, 101), (64, 1000), (2, 70_001)):
        x = random_bits(shape[0] * shape[1], dtype).reshape(shape)
        state, want = gquant.quantize(x.cuda(), "int8"), gquant.quantize(x, "int8")
        same_state(state, want)
        for to in DTYPES:
            assert equal(state.dequantize(to), want.dequantize(to))
        for threshold in (0.0, 2.5):
            for ours, theirs in zip(gquant.quantize_rows_int8(x.cuda(), threshold), gquant.quantize_rows_int8(x, threshold)):
                assert (ours is None) == (theirs is None)
                assert ours is None or equal(ours, theirs), (shape, threshold)


@pytest.mark.parametrize("order", ["high_first", "low_first"])
def test_pack_is_the_cpus(order):
    for length in (0, 1, 2, 31, 100_001):
        codes = torch.randint(0, 16, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        packed = gquant.pack_4bit(codes.cuda(), order)
        assert packed.is_cuda and equal(packed, gquant.pack_4bit(codes, order))
        assert equal(gquant.unpack_4bit(packed, length, order), codes)
    assert gquant.pack_4bit(torch.tensor([0x1F, 0xF2], dtype=torch.uint8, device="cuda")).item() == 0xF2


def test_json_and_bitsandbytes_entries_are_the_cpus():
    x = normal(64, 256, dtype=torch.bfloat16)
    for nested in (False, True):
        state, want = gquant.quantize(x.cuda(), nested=nested), gquant.quantize(x, nested=nested)
        assert state.json() == want.json()
        parts, wanted = state.to_bitsandbytes(), want.to_bitsandbytes()
        assert parts.keys() == wanted.keys()
        for key in parts:
            assert equal(parts[key], wanted[key]), key
        on_device = {key: part.cuda() for key, part in parts.items()}
        back = gquant.QuantState.from_bitsandbytes(on_device)
        assert equal(back.dequantize(), want.dequantize())
        assert equal(back.dequantize(), want.dequantize()) and back.json() == want.json()


def test_a_number_as_offset_is_copied_once():
    x = normal(64, 256).cuda()
    state = gquant.quantize(x, nested=True)
    want = state.dequantize()
    state.offset = state.offset.item()
    assert equal(state.dequantize(), want)
    torch.cuda.synchronize()
    with no_waiting():
        again = state.dequantize()
    assert equal(again, want)
    state.offset += 1
    assert not equal(state.dequantize(), want)


class no_waiting:
    """torch raises an error when it would wait for the device."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *exception):
        torch.cuda.set_sync_debug_mode("default")


# ---- memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_address(dtype):
    """Sources, codes and results begin at any byte; what is beside the results stays as it was."""
    count = 5001
    x = normal(count, dtype=dtype)
    want = gquant.quantize(x)
    plain = want.dequantize()
    size = x.itemsize
    name = str(dtype).removeprefix("torch.")
    for shift in (0, 1, 2, 3, 4, 5, 8, 13):
        memory = torch.full((count * size + 32,), 0xAB, dtype=torch.uint8, device="cuda")
        source = memory[shift : shift + count * size]
        source.copy_(x.view(torch.uint8))
        assert source.data_ptr() % 16 == shift % 16
        state = gquant.quantize(source, dtype=name, shape=(count,))
        same_state(state, want)
        codes = torch.full((state.packed.numel() + 32,), 0xAB, dtype=torch.uint8, device="cuda")
        moved = codes[shift : shift + state.packed.numel()]
        moved.copy_(state.packed)
        state.packed = moved
        out = torch.full_like(memory, 0xAB)
        state.dequantize(dtype, out[shift : shift + count * size])
        assert equal(out[shift : shift + count * size], plain.view(torch.uint8))
        assert (out[:shift] == 0xAB).all() and (out[shift + count * size :] == 0xAB).all()


def test_views_of_tensors():
    x = normal(130, 64, dtype=torch.bfloat16)
    on_device = x.cuda()
    for first in (1, 2, 7):
        packed, state = gquant.torch.quantize_4bit(on_device[first:])
        want, wanted = gquant.torch.quantize_4bit(x[first:].clone())
        assert equal(packed, want) and equal(state.absmax, wanted.absmax)
        out = torch.zeros(131, 64, dtype=torch.bfloat16, device="cuda")
        gquant.torch.dequantize_4bit(packed, state, out[1 : 131 - first])
        assert equal(out[1 : 131 - first], gquant.torch.dequantize_4bit(want, wanted))
        assert not out[0].any() and not out[131 - first :].any()


def needs_memory(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GiB of free device memory")


def test_more_than_2_31_elements():
    needs_memory(14)
    count, piece = (1 << 31) + 3 * 4096 + 17, 1 << 29
    x = torch.empty(count, dtype=torch.bfloat16, device="cuda").normal_(generator=torch.Generator("cuda").manual_seed(1))
    packed, state = gquant.torch.quantize_4bit(x)
    decoded = gquant.torch.dequantize_4bit(packed, state)
    for first in range(0, count, piece):
        part, part_state = gquant.torch.quantize_4bit(x[first : first + piece])
        assert torch.equal(part, packed[first // 2 : first // 2 + part.numel()]), first
        assert torch.equal(part_state.absmax, state.absmax[first // 64 : first // 64 + part_state.absmax.numel()]), first
        assert torch.equal(gquant.torch.dequantize_4bit(part, part_state), decoded[first : first + piece]), first
    del packed, state, decoded, part, part_state
    codes, absmax = gquant.quantize_blockwise(x, blocksize=256)
    for first in range(0, count, piece):
        part, part_absmax = gquant.quantize_blockwise(x[first : first + piece], blocksize=256)
        assert torch.equal(part, codes[first : first + piece]), first
        assert torch.equal(part_absmax, absmax[first // 256 : first // 256 + part_absmax.numel()]), first


# ---- arrays of other libraries


class Interface:
    """Has __cuda_array_interface__ and nothing else."""

    def __init__(self, owner, **changes):
        self._owner = owner
        self.__cuda_array_interface__ = owner.__cuda_array_interface__ | changes


class DLPack:
    """Has DLPack and nothing else."""

    def __init__(self, owner):
        self._owner = owner
        self.streams = []

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        return self._owner.__dlpack__(stream=stream)

    def __dlpack_device__(self):
        return self._owner.__dlpack_device__()


@pytest.mark.parametrize("wrap", [Interface, DLPack])
def test_interfaces(wrap):
    x = normal(64, 128).cuda()
    state = gquant.quantize(wrap(x), nested=True)
    same_state(state, gquant.quantize(x.cpu(), nested=True))
    assert state.shape == (64, 128) and all(type(getattr(state, name)) is torch.Tensor for name in PARTS)
    state.packed = wrap(state.packed)
    decoded = state.dequantize("float16")
    assert type(decoded) is torch.Tensor and equal(decoded, gquant.quantize(x, nested=True).dequantize("float16"))


def test_results_are_written_through_the_interface():
    x = normal(64, 128).cuda()
    state, out = gquant.quantize(x), torch.zeros(64, 128, device="cuda")
    state.dequantize(out=Interface(out))
    assert equal(out, state.dequantize())
    with pytest.raises(gquant.InvalidArgumentError, match="out is read-only"):
        state.dequantize(out=Interface(out, data=(out.data_ptr(), True)))


def test_stream_of_the_interface():
    x, side = normal(64, 128).cuda(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
    codes, absmax = gquant.quantize_blockwise(Interface(x, stream=side.cuda_stream))
    assert not side.query(), "it waited"
    torch.cuda.current_stream().wait_stream(side)
    want = gquant.quantize_blockwise(x.cpu())
    assert equal(codes, want[0]) and equal(absmax, want[1])


def test_dlpack_is_told_the_stream():
    x, side = DLPack(normal(64, 128).cuda()), torch.cuda.Stream()
    gquant.quantize_blockwise(x)
    with torch.cuda.stream(side):
        gquant.quantize_blockwise(x)
    gquant.quantize_blockwise(x, stream=side.cuda_stream)
    assert x.streams == [1, side.cuda_stream, side.cuda_stream]
    side.synchronize()


def test_cupy():
    cupy = pytest.importorskip("cupy")
    x = normal(64, 128)
    want = gquant.quantize(x.numpy(), nested=True)
    with cupy.cuda.Stream(non_blocking=True):
        state = gquant.quantize(cupy.asarray(x.numpy()), nested=True)
        decoded = state.dequantize("float16")
        for name in PARTS:
            assert isinstance(getattr(state, name), cupy.ndarray)
            assert (cupy.asnumpy(getattr(state, name)) == getattr(want, name)).all()
        assert state.offset.item() == want.offset and state.json() == want.json()
        assert isinstance(decoded, cupy.ndarray) and (cupy.asnumpy(decoded) == want.dequantize("float16")).all()
        back = gquant.QuantState.from_bitsandbytes(state.to_bitsandbytes())
        assert (cupy.asnumpy(back.dequantize()) == want.dequantize()).all()
        bits = cupy.asarray(x.bfloat16().view(torch.int16).numpy().view("u2"))
        half = gquant.quantize(bits, dtype="bfloat16")
        assert (cupy.asnumpy(half.packed) == gquant.quantize(x.bfloat16()).packed.numpy()).all()
        assert (cupy.asnumpy(gquant.codebook("dynamic", like=bits)) == gquant.codebook("dynamic")).all()


# ---- devices


def test_devices():
    found = gquant.devices()
    assert len(found) == torch.cuda.device_count()
    for device in found:
        properties = torch.cuda.get_device_properties(device.index)
        assert device.name == properties.name and device.capability == (properties.major, properties.minor)
        assert device.multiprocessors == properties.multi_processor_count
        assert device.memory_bytes == properties.total_memory
        assert device.driver_version >= 11000
        gquant.prepare(device.index)
    for number in (len(found), -2):
        with pytest.raises(gquant.NotFoundError):
            gquant.prepare(number)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device():
    x = normal(64, 128)
    with torch.cuda.device(0):
        packed, state = gquant.torch.quantize_4bit(x.to("cuda:1"), 64, True)
        assert {packed.device, state.absmax.device, state.offset.device} == {torch.device("cuda:1")}
        want = gquant.torch.dequantize_4bit(*gquant.torch.quantize_4bit(x, 64, True))
        assert equal(gquant.torch.dequantize_4bit(packed, state), want)
        with pytest.raises(gquant.InvalidArgumentError, match="packed is on CUDA device 0 and absmax on CUDA device 1"):
            gquant.torch.dequantize_4bit(packed.to("cuda:0"), state)


# ---- what is refused


def mixed(part):
    """Calls with one tensor of a weight on the host."""

    def call():
        packed, state = gquant.torch.quantize_4bit(normal(64, 64).cuda(), 64, True)
        weight = list(arguments(packed, state))
        weight[part] = weight[part].cpu()
        torch.ops.gquant.dequantize_4bit(*weight)

    return call


def on_device(format="nf4"):
    return gquant.quantize(normal(8, 16).cuda(), format)


REFUSED = {
    "absmax on the host": (mixed(1), gquant.InvalidArgumentError, "packed is on CUDA device 0 and absmax on the host"),
    "nested_absmax on the host": (mixed(2), gquant.InvalidArgumentError, "packed is on CUDA device 0 and nested_absmax on the host"),
    "nested_code on the host": (mixed(3), gquant.InvalidArgumentError, "packed is on CUDA device 0 and nested_codebook on the host"),
    "offset on the host": (mixed(4), gquant.InvalidArgumentError, "packed is on CUDA device 0 and offset on the host"),
    "codes on the host": (
        lambda: gquant.torch.dequantize_4bit(*(lambda p, s: (p.cpu(), s))(*gquant.torch.quantize_4bit(normal(64, 64).cuda()))),
        gquant.InvalidArgumentError,
        "packed is on the host and absmax on CUDA device 0",
    ),
    "out on the host": (
        lambda: gquant.torch.dequantize_4bit(*gquant.torch.quantize_4bit(normal(64, 64).cuda()), out=torch.empty(64, 64)),
        gquant.InvalidArgumentError,
        "packed is on CUDA device 0 and out on the host",
    ),
    "numpy's out": (lambda: on_device().dequantize(out=normal(8, 16).numpy()), gquant.InvalidArgumentError, "packed is on CUDA device 0 and out on the host"),
    "codebook on the host": (
        lambda: gquant.quantize_blockwise(normal(64).cuda(), gquant.codebook("dynamic")),
        gquant.InvalidArgumentError,
        "array is on CUDA device 0 and codebook on the host",
    ),
    "no memory of a device": (
        lambda: gquant.quantize(Interface(torch.empty(1, device="cuda"), data=(4096, False))),
        gquant.InvalidArgumentError,
        "array is at 0x1000, which is no memory of a CUDA device",
    ),
    "float64": (lambda: gquant.torch.quantize_4bit(normal(64).double().cuda()), gquant.InvalidArgumentError, "dtype float64"),
    "not contiguous": (lambda: gquant.torch.quantize_4bit(normal(64, 32).cuda().T), gquant.InvalidArgumentError, "not contiguous"),
    "blocksize": (lambda: gquant.torch.quantize_4bit(normal(64).cuda(), 48), gquant.InvalidArgumentError, "blocksize is 48"),
    "short codes": (
        lambda: gquant.torch.dequantize_4bit(*(lambda p, s: (p[1:], s))(*gquant.torch.quantize_4bit(normal(64, 64).cuda()))),
        gquant.InvalidArgumentError,
        "packed has 2047 bytes; want 2048",
    ),
    "out's dtype": (lambda: on_device().dequantize("float16", torch.empty(8, 16, device="cuda")), gquant.InvalidArgumentError, "out has dtype float32; want float16"),
    "out's size": (lambda: on_device().dequantize(out=torch.empty(127, device="cuda")), gquant.InvalidArgumentError, "out has 508 bytes; want 512"),
    "int8 codes to pack": (lambda: gquant.pack_4bit(torch.zeros(4, dtype=torch.int8, device="cuda")), gquant.InvalidArgumentError, "codes has dtype int8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, error, text = REFUSED[case]
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)
    torch.cuda.synchronize()


def test_checked_addresses():
    """With GQUANT_CHECK=1 the library tells a host address from a device's."""
    code = """
import torch, gquant
from gquant import _ffi
source, absmax, packed = torch.randn(64), torch.empty(1, device="cuda"), torch.empty(32, dtype=torch.uint8, device="cuda")
def call(source):
    where = _ffi.execution(0, 0)
    _ffi.lib.gq_quantize_nf4(source.data_ptr(), 18, 64, 64, absmax.data_ptr(), 1, packed.data_ptr(), 32, where)
call(source.cuda())
torch.cuda.synchronize()
try:
    call(source)
    print("taken")
except gquant.InvalidArgumentError as e:
    print(e)
"""
    assert "src" in support.python(code, GQUANT_CHECK="1")


def test_forked_child():
    """A child of fork hears what is wrong, also where no function of Python stands before the library."""
    code = """
import os, torch, gquant.torch
packed, state = gquant.torch.quantize_4bit(torch.randn(64, 64, device="cuda"))
out = gquant.torch.dequantize_4bit(packed, state)
torch.cuda.synchronize()
if os.fork() == 0:
    try:
        gquant.torch.dequantize_4bit(packed, state, out)
        os._exit(1)
    except gquant.ForkedError:
        os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert support.python(code, timeout=60) == "0\n"


def test_without_torch():
    """Python alone can use a device through ctypes."""
    code = """
import ctypes, sys
from gquant import _ffi
import gquant
sys.modules["torch"] = None
driver = ctypes.CDLL("libcuda.so.1")
assert driver.cuInit(0) == 0
context = ctypes.c_void_p()
assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0 and driver.cuCtxPushCurrent_v2(context) == 0
def room(size):
    address = ctypes.c_uint64()
    assert driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) == 0
    return address.value
source, absmax, packed = room(256), room(4), room(32)
numbers = (ctypes.c_float * 64)(*range(64))
assert driver.cuMemcpyHtoD_v2(ctypes.c_uint64(source), numbers, ctypes.c_size_t(256)) == 0
_ffi.lib.gq_quantize_nf4(source, 18, 64, 64, absmax, 1, packed, 32, _ffi.execution(device=0))
codes = (ctypes.c_uint8 * 32)()
assert driver.cuMemcpyDtoH_v2(codes, ctypes.c_uint64(packed), ctypes.c_size_t(32)) == 0
print(bytes(codes) == bytes(gquant.quantize(numbers).packed))
"""
    assert support.python(code, timeout=60) == "True\n"

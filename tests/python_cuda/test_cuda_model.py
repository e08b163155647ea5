"""Models, read into the memory of the device."""

import ctypes
import gc
import json

import pytest
import torch

import gquant
import gquant.torch
import support
from gquant import _ffi
from weights import close, equal, normal


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The path of a model, with layers of all dtypes and odd sizes."""
    path = tmp_path_factory.mktemp("model") / "source.safetensors"
    tensors = {
        "a.weight": normal(96, 128, seed=1),
        "b.weight": normal(70, 90, seed=2).half(),
        "c.weight": normal(64, 256, seed=3).bfloat16(),
        "d.weight": normal(2048, 1024, seed=4).bfloat16(),
        "a.bias": normal(96, seed=5),
        "norm.weight": torch.ones(129).bfloat16(),
        "steps": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False, True]),
    }
    support.save(tensors, path, {"author": "Ωmega"})
    return path


@pytest.fixture(scope="module", params=["nf4", "fp4 nested"])
def converted(source, request):
    mode, _, nested = request.param.partition(" ")
    path = source.with_name(f"{request.param.replace(' ', '_')}.safetensors")
    gquant.convert(source, path, mode, double_quant=bool(nested))
    return path


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 0)])
def test_load_4bit_model(converted, device):
    loaded, wanted = gquant.torch.load_4bit_model(converted, device), gquant.torch.load_4bit_model(converted)
    assert loaded.keys() == wanted.keys()
    for name, tensor in loaded.items():
        assert tensor.device == torch.device("cuda", 0), name
        assert equal(tensor, wanted[name]), name
    layer = gquant.torch.Linear4bit(128, 96, device="cuda")
    layer.load_state_dict({name.removeprefix("a."): t for name, t in loaded.items() if name.startswith("a.")}, assign=True)
    assert layer.weight.data_ptr() == loaded["a.weight"].data_ptr()
    on_cpu = gquant.torch.Linear4bit(128, 96)
    on_cpu.load_state_dict({name.removeprefix("a."): t for name, t in wanted.items() if name.startswith("a.")})
    torch.testing.assert_close(layer(normal(2, 128).cuda()).cpu(), on_cpu(normal(2, 128)), rtol=1e-3, atol=1e-2)


def test_load_recorded_models(tmp_path):
    """Of bitsandbytes' modules, LLM.int8 among them, with and without a prefix."""
    entries = {f"m.{name}": t for name, t in support.vectors("modules").items() if not name.endswith(".reference")}
    support.save(entries, tmp_path / "m.safetensors")
    loaded = gquant.torch.load_4bit_model(tmp_path / "m.safetensors", "cuda")
    assert loaded.keys() == entries.keys()
    for name, want in entries.items():
        assert loaded[name].is_cuda and equal(support.bits(loaded[name]), support.bits(want)), name
    short = gquant.torch.load_4bit_model(tmp_path / "m.safetensors", "cuda", prefix="m.int8.")
    assert short.keys() == {"weight", "SCB", "weight_format", "bias"}


def test_their_layer_loads_it(F, converted):
    import bitsandbytes

    loaded = gquant.torch.load_4bit_model(converted, "cuda")
    parts = {name.removeprefix("d."): t for name, t in loaded.items() if name.startswith("d.weight.")}
    theirs = bitsandbytes.nn.Linear4bit(1024, 2048, bias=False, compute_dtype=torch.bfloat16)
    theirs.weight = bitsandbytes.nn.Params4bit.from_prequantized(loaded["d.weight"], parts, device="cuda", module=theirs)
    ours = gquant.torch.Linear4bit(1024, 2048, bias=False, device="cuda")
    ours.load_state_dict({name.removeprefix("d."): t for name, t in loaded.items() if name.startswith("d.")})
    decoded = gquant.torch.dequantize_4bit(ours.weight, ours.quant_state)
    # For FP4's second zero the sign differs.
    assert equal(F.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state) + 0, decoded + 0)
    x = normal(1600, 1024, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        assert close(ours(x), theirs(x))


def test_tensors(source):
    with gquant.open(source) as model:
        for name, tensor in model.tensors.items():
            want = tensor.read(torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype)))
            out = torch.zeros_like(want, device="cuda")
            assert tensor.read(out) is out and equal(out, want), name
        rows = torch.zeros(10, 128, device="cuda")
        tensor = model.tensors["a.weight"]
        tensor.read(rows, rows=(3, 13))
        assert equal(rows, tensor.read(torch.empty(96, 128))[3:13])
        with pytest.raises(gquant.InvalidArgumentError, match="out has 48640 bytes; want 49152"):
            tensor.read(torch.zeros(95, 128, device="cuda"))


def test_layers(converted):
    like = torch.empty(0, device="cuda")
    with gquant.open(converted) as model:
        for name, layer in model.layers.items():
            state, want = layer.read(like=like), layer.read(like=torch.empty(0))
            assert state.packed.is_cuda and equal(state.packed, want.packed) and equal(state.absmax, want.absmax), name
            assert equal(state.dequantize(), want.dequantize()) and state.json() == want.json(), name
            with pytest.raises(gquant.UnsupportedError, match="out is on a CUDA device"):
                layer.dequantize(out=torch.empty(layer.shape, dtype=getattr(torch, layer.dtype), device="cuda"))


def test_read_all(converted):
    with gquant.open(converted) as model:
        names = [name for name in model.tensors if name != "steps"]
        tensors = {name: torch.zeros(model.tensors[name].shape, dtype=getattr(torch, model.tensors[name].dtype), device="cuda") for name in names}
        codes = {name: torch.zeros((layer.shape[0] * layer.shape[1] + 1) // 2, dtype=torch.uint8, device="cuda") for name, layer in model.layers.items()}
        model.read_all(tensors, {name: {"packed": packed} for name, packed in codes.items()})
        for name, tensor in tensors.items():
            assert equal(tensor, model.tensors[name].read(torch.empty_like(tensor, device="cpu"))), name
        for name, packed in codes.items():
            assert equal(packed, model.layers[name].read(like=torch.empty(0)).packed), name
        with pytest.raises(gquant.NotFoundError, match="'nothing'"):
            model.read_all({"nothing": tensors["norm.weight"]}, {})
        with pytest.raises(gquant.InvalidArgumentError, match="is on CUDA device 0 and norm.weight on the host"):
            model.read_all({"a.bias": tensors["a.bias"], "norm.weight": tensors["norm.weight"].cpu()}, {})
        with pytest.raises(gquant.InvalidArgumentError, match="want"):
            model.read_all({"a.bias": tensors["a.bias"][1:]}, {})


def test_reading_waits_for_the_stream(source):
    """What the stream does before still sees the old values, and what it does later the new ones."""
    side = torch.cuda.Stream()
    with gquant.open(source) as model:
        tensor = model.tensors["d.weight"]
        want = tensor.read(torch.empty(tensor.shape, dtype=torch.bfloat16))
        out = torch.full(tensor.shape, 5, dtype=torch.bfloat16, device="cuda")
        before, after = torch.zeros_like(out), torch.zeros_like(out)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
            before.copy_(out)
            model.read_all({"d.weight": out}, {})
            after.copy_(out)
        side.synchronize()
    assert (before == 5).all() and equal(after, want)


def test_convert_on_the_device(source, tmp_path):
    for options in ({}, {"double_quant": True, "mode": "fp4", "block_size": 128}):
        gquant.convert(source, tmp_path / "cpu.safetensors", force=True, **options)
        gquant.convert(source, tmp_path / "cuda.safetensors", force=True, device="cuda:0", **options)
        assert (tmp_path / "cpu.safetensors").read_bytes() == (tmp_path / "cuda.safetensors").read_bytes()


# ---- memory of the library


class Memory:
    """A part of device memory, for torch.as_tensor."""

    def __init__(self, address, nbytes):
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def load(path, device=0):
    handle = ctypes.c_void_p()
    _ffi.lib.gq_load_model(str(path).encode(), _ffi.gq_load_options(device=device), ctypes.byref(handle))
    return handle


def free_memory():
    """Bytes that no tensor and no model has."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_model_in_memory_of_the_library(converted):
    _ffi.lib.gq_free_model(load(converted))  # what is made once is there then
    free = free_memory()
    handle = load(converted)
    count, info = ctypes.c_int64(), _ffi.gq_tensor_info()
    _ffi.lib.gq_model_tensor_count(handle, ctypes.byref(count))
    with gquant.open(converted) as model:
        assert count.value == len(model.tensors)
        for index in range(count.value):
            _ffi.lib.gq_model_tensor(handle, index, ctypes.byref(info))
            tensor = model.tensors[info.name.decode()]
            if info.bytes:
                assert info.address != 0
                found = torch.as_tensor(Memory(info.address, info.bytes), device="cuda").cpu()
                want = tensor.read(torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype)))
                assert equal(found, want.reshape(-1).view(torch.uint8)), tensor.name
        for index, layer in enumerate(model.layers.values()):
            state = ctypes.c_void_p()
            _ffi.lib.gq_model_state(handle, index, ctypes.byref(state))
            out = torch.empty(layer.shape, dtype=getattr(torch, layer.dtype), device="cuda")
            execution = _ffi.execution(device=0)
            _ffi.lib.gq_dequantize(state, out.data_ptr(), out.nbytes, {2: 14, 4: 18}[out.itemsize] if layer.dtype != "bfloat16" else 15, execution)
            assert equal(out, layer.dequantize(out=torch.empty_like(out, device="cpu"))), layer.name
            _ffi.lib.gq_state_free(state)
    _ffi.lib.gq_free_model(handle)
    del out
    assert free_memory() >= free


@pytest.fixture
def too_big(tmp_path):
    """A model with more bytes than any device has, and none on disk."""
    path, size = tmp_path / "big.safetensors", 1 << 40
    entries = {"a.bias": {"dtype": "F32", "shape": [1024], "data_offsets": [0, 4096]}}
    entries |= {"b.weight": {"dtype": "U8", "shape": [size], "data_offsets": [4096, 4096 + size]}}
    header = json.dumps(entries).encode()
    with open(path, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + 4096 + size)
    return path


def test_out_of_memory(too_big):
    free, allocated = free_memory(), torch.cuda.memory_allocated()
    with pytest.raises(gquant.OutOfMemoryError):
        load(too_big)
    assert free_memory() >= free
    try:
        gquant.torch.load_4bit_model(too_big, "cuda")
    except torch.OutOfMemoryError:
        pass
    else:
        raise AssertionError("it fitted")
    gc.collect()
    assert torch.cuda.memory_allocated() == allocated
    # The device is as good as before.
    x = normal(64, 64)
    assert equal(gquant.quantize(x.cuda()).packed, gquant.quantize(x).packed)

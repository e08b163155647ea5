"""What the package does for arrays on a device, with a driver that plays one (tests/c/fake_cuda.c): which device, stream and memory it
names, and what it reads there. What kernels compute is tested on devices, in tests/python_cuda."""

import json
import subprocess

import pytest

import support

FAKE = support.ROOT / "tests" / "python_binding" / "fake"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs code in a process with the driver, two devices and a stand-in for cupy; what it printed."""
    folder = tmp_path_factory.mktemp("driver")
    for name, source in (("libcuda.so.1", "fake_cuda.c"), ("libcublasLt.so.13", "fake_cublaslt.c")):
        source = support.ROOT / "tests" / "c" / source
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-pthread", "-o", folder / name, source, "-ldl"], check=True)
    environment = {
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": f"{support.PACKAGE}:{FAKE}",
        "GQ_FAKE_CUDA": "devices=2",
        "GQUANT_CHECK": "1",
        "GQUANT_CUBLASLT": str(folder / "libcublasLt.so.13"),
    }

    def run(code, **more):
        return support.python("import cupy, gquant, numpy\n" + code, **environment | more)

    if run("print(len(gquant.devices()))") == "0\n":
        pytest.skip("the library was built without CUDA")
    return run


def test_no_devices():
    code = """
import gquant
print(gquant.devices())
try:
    gquant.prepare(0)
except gquant.UnsupportedError as e:
    print(e)
"""
    lines = support.python(code, LD_LIBRARY_PATH="", GQ_FAKE_CUDA="devices=0").splitlines()
    assert lines[0].startswith("[") and len(lines) == 1 + (lines[0] == "[]")


def test_devices(run):
    found = json.loads(run("import json, dataclasses; print(json.dumps([dataclasses.asdict(d) for d in gquant.devices()]))"))
    assert [d["index"] for d in found] == [0, 1] and found[1]["name"] == "Fake Device 1"
    assert found[0]["capability"] == [9, 0] and found[0]["memory_bytes"] == 8 << 30 and found[0]["driver_version"] == 13000
    code = """
gquant.prepare(1)
for number in (2, -1):
    try:
        gquant.prepare(number)
    except gquant.NotFoundError as e:
        print("refused")
"""
    assert run(code) == "refused\nrefused\n"


def test_work_goes_to_the_arrays_device_and_stream(run):
    code = """
def launched(work, stream):
    before = cupy.count("launches")
    made = work()
    assert cupy.count("launches") > before and cupy.count("last_stream") == stream, (cupy.count("last_stream"), stream)
    return made

driver = cupy.driver
import ctypes
own = ctypes.c_void_p()
with cupy.cuda.Device(1), cupy._context(1):
    assert driver.cuStreamCreate(ctypes.byref(own), 1) == 0
    x = cupy.asarray(numpy.ones((64, 64), "f4"))
    wide, bias = cupy.asarray(numpy.ones((64, 128), "f2")), cupy.asarray(numpy.ones(64, "f2"))
    many = cupy.asarray(numpy.ones((65, 128), "f4"))
own = own.value

def everything(expected, **keyword):
    for format, nested in (("nf4", False), ("nf4", True), ("fp4", True), ("int8", False), ("blockwise8", False)):
        state = launched(lambda: gquant.quantize(x, format, nested=nested, **keyword), expected)
        out = launched(lambda: state.dequantize("float16", **keyword), expected)
        made = [state.packed, state.absmax, out] + ([state.offset, state.nested_absmax] if nested else [])
        yield from made
        assert out.dtype == "f2" and out.shape == (64, 64) and not nested or state.offset.shape == ()
        if nested:
            state.offset = 0.5
            launched(lambda: state.dequantize(out=out, **keyword), expected)
            copied = state._copied[2]
            launched(lambda: state.dequantize(out=out, **keyword), expected)
            assert state._copied[2] is copied and copied.item() == 0.5
            text = state.json()
            assert text.endswith('"nested_offset": 0.5}')
            back = gquant.QuantState.from_bitsandbytes(state.to_bitsandbytes())
            launched(lambda: back.dequantize(**keyword), expected)
    codes, absmax = launched(lambda: gquant.quantize_blockwise(x, **keyword), expected)
    launched(lambda: gquant.dequantize_blockwise(codes, absmax, **keyword), expected)
    yield from launched(lambda: gquant.quantize_rows_int8(x, **keyword), expected)[:2]
    yield from launched(lambda: gquant.quantize_rows_int8(x, 6.0, **keyword), expected)
    for format, nested in (("nf4", False), ("fp4", True)):
        state = gquant.quantize(wide, format, nested=nested, **keyword)
        y = launched(lambda: state.linear(wide, **keyword), expected)
        assert y.dtype == "f2" and y.shape == (64, 64)
        launched(lambda: state.linear(wide, bias, out=y, **keyword), expected)
        assert launched(lambda: state.linear(many, **keyword), expected).shape == (65, 64)  # with a workspace
        yield y
    packed = launched(lambda: gquant.pack_4bit(codes, **keyword), expected)
    yield launched(lambda: gquant.unpack_4bit(packed, **keyword), expected)

for made in everything(0):
    assert type(made) is cupy.ndarray and made.device == 1 and made.stream == 0
for made in everything(own, stream=own):
    assert made.device == 1 and made.stream == own
with cupy.cuda.ExternalStream(own):
    for made in everything(own):
        assert made.device == 1 and made.stream == own
table = gquant.codebook("dynamic", like=x)
assert table.device == 1 and (table.get() == gquant.codebook("dynamic")).all()
assert cupy.count("misuse") == 0
print("ok")
"""
    assert run(code).endswith("ok\n")


def test_refused(run):
    code = """
x, numbers = cupy.asarray(numpy.ones((8, 16), "f4")), numpy.ones((8, 16), "f4")
with cupy.cuda.Device(1):
    table = gquant.codebook("dynamic", like=cupy.empty(1, "f4"))
state = gquant.quantize(x)
mixed = gquant.quantize(x)
mixed.absmax = mixed.absmax.get()
class Host:
    __cuda_array_interface__ = {"shape": (64,), "typestr": "<f4", "data": (numbers.ctypes.data, False), "version": 3}
for call in (
    lambda: gquant.quantize(numbers).dequantize(out=x),
    lambda: state.dequantize(out=numbers),
    mixed.dequantize,
    lambda: gquant.quantize_blockwise(x, table),
    lambda: gquant.quantize(Host()),
    lambda: state.dequantize("float16", x),
    lambda: gquant.quantize(x, blocksize=48),
    lambda: state.linear(numbers),
    lambda: state.linear(x, bias=numbers[0, :8]),
    lambda: state.linear(x),
):
    try:
        call()
        print("taken")
    except (gquant.InvalidArgumentError, gquant.UnsupportedError) as e:
        print(e)
"""
    wanted = [
        "packed is on the host and out on CUDA device 0",
        "packed is on CUDA device 0 and out on the host",
        "packed is on CUDA device 0 and absmax on the host",
        "array is on CUDA device 0 and codebook on CUDA device 1",
        "which is no memory of a CUDA device",
        "out has dtype float32; want float16",
        "blocksize is 48",
        "packed is on CUDA device 0 and x on the host",
        "packed is on CUDA device 0 and bias on the host",
        "x is not F16 or BF16, and libcublasLt, which GQUANT_CUBLASLT names, cannot be loaded",
    ]
    for line, text in zip(run(code, GQUANT_CUBLASLT="none").splitlines(), wanted, strict=True):
        assert text in line


def test_models(run, converted):
    code = f"""
path = {str(converted[0])!r}
"""
    code += """
def on_device(shape, dtype):
    with cupy.cuda.Device(1):
        return cupy.empty(shape, dtype)

like = on_device(1, "f4")
with gquant.open(path) as model:
    wanted = {name: tensor.read() for name, tensor in model.tensors.items()}
    states = {name: layer.read() for name, layer in model.layers.items()}
    tensors = {name: on_device(value.shape, value.dtype) for name, value in wanted.items()}
    for name, out in tensors.items():
        assert model.tensors[name].read(out) is out and out.get().tobytes() == wanted[name].tobytes(), name
    part = on_device(7, "f4")
    assert (model.tensors["a.bias"].read(part, rows=(3, 10)).get() == wanted["a.bias"][3:10]).all()
    for name, layer in model.layers.items():
        state, want = layer.read(like=like), states[name]
        assert state.packed.device == 1 and (state.packed.get() == want.packed).all() and (state.absmax.get() == want.absmax).all()
        assert state.json() == want.json() and state.offset.item() == want.offset, (state.json(), want.json())
        try:
            layer.dequantize(out=on_device(layer.shape, "u2"), dtype="bfloat16")
        except gquant.UnsupportedError as e:
            assert "read(like=out)" in str(e)
        else:
            raise SystemExit("decoded")
    again = {name: on_device(value.shape, value.dtype) for name, value in wanted.items() if name != "steps"}
    parts = {name: {"packed": on_device(state.packed.shape, "u1"), "offset": on_device((), "f4")} for name, state in states.items()}
    model.read_all(again, parts)
    for name, out in again.items():
        assert out.get().tobytes() == wanted[name].tobytes(), name
    for name, found in parts.items():
        assert (found["packed"].get() == states[name].packed).all() and found["offset"].item() == states[name].offset, name
assert cupy.count("misuse") == 0
print("ok")
"""
    assert run(code, PYTHONWARNINGS="ignore").endswith("ok\n")

"""Processes: what is loaded and how, environments without numpy and torch, forks, threads, memory, the cost of a call."""

import re
import subprocess
import threading

import numpy

import gquant
import support
from support import ROOT, python

# What can be done with nothing but Python.
PLAIN = """
import array, gquant, sys
x = array.array("f", [0.5, -2.0, 0.25, 1.0] * 64)
for nested in (False, True):
    state = gquant.quantize(x, "nf4", nested=nested)
    for part in (state.packed, state.absmax, state.codebook):
        assert type(part) is memoryview, type(part)
    assert state.packed.format == "B" and len(state.packed) == 128
    back = state.dequantize()
    assert back.format == "f" and list(back[:4]) == list(state.dequantize(out=array.array("f", bytes(1024))))[:4]
    assert max(abs(a - b) for a, b in zip(back, x)) < 0.3
    half = state.dequantize("bfloat16")
    assert half.format == "H" and half.nbytes == 512
    parts = state.to_bitsandbytes()
    assert parts["weight"].shape == (128, 1)
    assert gquant.QuantState.from_bitsandbytes(parts).dequantize() == back
shaped = gquant.quantize(x, shape=(16, 16)).dequantize()
assert shaped.shape == (16, 16)
assert gquant.quantize(bytes(64), dtype="float16").dequantize("float32").tolist() == [0.0] * 32
assert gquant.unpack_4bit(gquant.pack_4bit(bytes([1, 2, 3])), 3) == bytes([1, 2, 3])
codes, absmax = gquant.quantize_blockwise(x)
assert len(gquant.dequantize_blockwise(codes, absmax)) == 256
assert len(gquant.codebook("dynamic")) == 256
try:
    gquant.quantize([1.0])
    raise SystemExit("a list was taken")
except TypeError:
    pass
if len(sys.argv) > 1:
    with gquant.open(sys.argv[1]) as model:
        for layer in model.layers.values():
            assert layer.dequantize().shape == layer.shape
        assert model.tensors["a.bias"].read().format == "f"
    assert gquant.verify(sys.argv[1])["problems"] == []
assert "numpy" not in sys.modules and "torch" not in sys.modules
print("ok")
"""


def test_without_numpy_and_torch(converted):
    # -S: without site-packages
    assert python(f"import sys; sys.argv = ['', {str(converted[0])!r}]\n{PLAIN}", "-S") == "ok\n"


def test_import_is_light():
    code = "import gquant, sys; print(sorted(sys.modules.keys() & {'numpy', 'torch', 'ml_dtypes'}))"
    assert python(code) == "[]\n"


def test_numpy_without_ml_dtypes():
    code = """
import sys; sys.modules["ml_dtypes"] = None
import gquant, numpy
state = gquant.quantize(numpy.ones(64, "f4"))
assert state.dequantize("bfloat16").dtype == "u2"
assert state.dequantize("float16").dtype == "f2"
"""
    python(code)


def test_missing_library(tmp_path):
    p = python("import gquant", check=False, GQUANT_LIBRARY=str(tmp_path / "no.so"))
    assert p.returncode == 1 and f"Tried:\n{tmp_path}/no.so: " in p.stderr
    p = python("import gquant", check=False, GQUANT_LIBRARY="")
    assert "ImportError" in p.stderr and "gquant/libgquant.so: " in p.stderr


def test_library_of_an_older_interface(tmp_path):
    (tmp_path / "old.c").write_text("int gq_abi_version(void) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "old.so", tmp_path / "old.c"], check=True)
    p = python("import gquant", check=False, GQUANT_LIBRARY=str(tmp_path / "old.so"))
    version = re.search(r"#define GQ_ABI_VERSION (\d+)", (ROOT / "include" / "gquant.h").read_text())[1]
    assert f"has version 0 of the C interface; this package needs {version}" in p.stderr


def test_forked_child():
    code = """
import gc, os, gquant, numpy
state, model = gquant.quantize(numpy.ones(64, "f4")), gquant.open(PATH)
if os.fork() == 0:
    for call in (state.dequantize, lambda: model.layers, lambda: gquant.verify(PATH)):
        try:
            call()
            os._exit(1)
        except gquant.ForkedError as e:
            assert "spawn" in str(e)
    del model
    gc.collect()
    raise SystemExit(0)  # and what runs at the end of Python
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
assert (state.dequantize() == 1).all() and len(model.layers) >= 0
print("ok")
"""
    path = support.ROOT / "tests" / "vectors" / "bitsandbytes" / "modules.safetensors"
    assert python(f"PATH = {str(path)!r}\n{code}", timeout=60) == "ok\n"


def test_forked_child_with_torch():
    """torch's decoding calls the library without the functions that the child replaced."""
    code = """
import os, torch, gquant.torch
packed, state = gquant.torch.quantize_4bit(torch.ones(64, 64))
out = gquant.torch.dequantize_4bit(packed, state)
if os.fork() == 0:
    try:
        gquant.torch.dequantize_4bit(packed, state, out)
    except gquant.ForkedError:
        os._exit(0)
    os._exit(1)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert python(code, timeout=60) == "0\n"


def test_multiprocessing_with_spawn(tmp_path):
    (tmp_path / "main.py").write_text("""
import multiprocessing, numpy, gquant
def work(seed):
    return gquant.quantize(numpy.full(64, seed, "f4")).absmax[0]
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print(pool.map(work, [1, 2, 3]) == [1, 2, 3])
""")
    code = f"import runpy; runpy.run_path({str(tmp_path / 'main.py')!r}, run_name='__main__')"
    assert python(code, timeout=60) == "True\n"


def test_nothing_is_printed():
    p = python("import gquant, numpy; gquant.quantize(numpy.ones(64, 'f4')).dequantize()", check=False)
    assert (p.returncode, p.stdout, p.stderr) == (0, "", "")


def test_errors_belong_to_their_thread():
    wrong = []

    def work(number):
        for _ in range(200):
            try:
                gquant.quantize(numpy.zeros(64, "f4"), blocksize=number)
            except gquant.InvalidArgumentError as e:
                if f"blocksize is {number};" not in str(e):
                    wrong.append(str(e))

    threads = [threading.Thread(target=work, args=(1000 + n,)) for n in range(32)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_threads_give_equal_results():
    x = numpy.random.default_rng(0).standard_normal((513, 1000)).astype("f4")
    want = gquant.quantize(x, nested=True, threads=1)
    for threads in (0, 2, 7):
        state = gquant.quantize(x, nested=True, threads=threads)
        assert all(numpy.array_equal(getattr(state, n), getattr(want, n)) for n in ("packed", "absmax", "nested_absmax"))
        assert numpy.array_equal(state.dequantize(threads=threads), want.dequantize(threads=1))


def test_large_arrays_are_not_copied():
    """Memory at its peak: the arrays, the results, and little else."""
    code = """
import gquant, numpy
def peak(work):
    open("/proc/self/clear_refs", "w").write("5")
    now = lambda key: int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) << 10
    before = now("VmRSS")
    kept = work()
    return now("VmHWM") - before, kept
n = 64 << 20
x = numpy.ones(n, "f4")
gquant.quantize(x[:1 << 20]).dequantize()
used, state = peak(lambda: gquant.quantize(x))
assert used < 1.15 * (n // 2 + n // 16), used
out = numpy.zeros(n, "f4"); out[:] = 1
used, _ = peak(lambda: state.dequantize(out=out))
assert used < 8 << 20, used
used, _ = peak(state.dequantize)
assert used < 1.05 * 4 * n, used
"""
    python(code)


RESIDENT = """
import os, sys
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
"""


def test_states_leave_nothing():
    code = """
import array, gquant
state = gquant.quantize(bytes(256), nested=True, dtype="float32")
out = bytearray(256)
def cycle(count):
    for _ in range(count):
        state.dequantize("float32", out, threads=1)
cycle(20_000)
before = resident()
cycle(100_000)
assert resident() - before < 4 << 20, resident() - before
"""
    python(RESIDENT + code)


def test_models_leave_nothing(converted):
    code = """
import gquant
out = bytearray(96 * 128 * 4)
def cycle(count):
    for _ in range(count):
        with gquant.open(sys.argv[1]) as model:
            model.layers["a.weight"].dequantize("float32", out)
cycle(1000)
before, descriptors = resident(), len(os.listdir("/proc/self/fd"))
cycle(5000)
assert resident() - before < 8 << 20, resident() - before
assert len(os.listdir("/proc/self/fd")) == descriptors
"""
    python(f"import sys; sys.argv = ['', {str(converted[0])!r}]\n{RESIDENT}{code}")

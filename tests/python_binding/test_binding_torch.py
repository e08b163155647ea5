"""The operators: their schemas and fake kernels, gradients, torch.compile."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import gquant
import gquant.torch
import support
from gquant.torch.state import arguments
from support import check_linear, same

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def quantized(nested, quant_type="nf4", dtype=torch.float32, storage=torch.uint8):
    x = torch.randn(96, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    return arguments(*gquant.torch.quantize_4bit(x, 64, nested, quant_type, storage))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_opcheck(nested):
    ops, check = torch.ops.gquant, torch.library.opcheck
    for dtype in DTYPES:
        weight = quantized(nested, dtype=dtype)
        check(ops.quantize_4bit.default, (torch.randn(96, 128).to(dtype), 64, "nf4", nested, torch.uint8))
        check(ops.quantize_4bit.default, (torch.randn(3, 101).to(dtype), 32, "fp4", nested, torch.int8))
        check(ops.dequantize_4bit.default, weight)
        check(ops.dequantize_4bit.out, weight, {"out": torch.empty(96, 128, dtype=dtype)})
        check(ops.linear_4bit.out, (torch.randn(3, 128, dtype=dtype), None, *weight), {"out": torch.empty(3, 96, dtype=dtype)})
        for shape in ((128,), (3, 128), (2, 3, 128)):
            for bias in (None, torch.randn(96, dtype=dtype, requires_grad=True)):
                check(ops.linear_4bit.default, (torch.randn(shape, dtype=dtype, requires_grad=True), bias, *weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_gradients(nested, dtype):
    """Those of torch's linear with the decoded weight."""
    weight = quantized(nested, "fp4", torch.bfloat16)
    dense = torch.ops.gquant.dequantize_4bit(*weight).to(dtype)
    for shape in ((128,), (5, 128), (2, 3, 128), (0, 128)):
        x, bias = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(96).to(dtype).requires_grad_()
        y = torch.ops.gquant.linear_4bit(x, bias, *weight)
        wanted = torch.nn.functional.linear(x, dense, bias)
        check_linear(y, x, bias, weight)
        gradient = torch.randn(y.shape).to(dtype)
        for ours, theirs in zip(torch.autograd.grad(y, (x, bias), gradient), torch.autograd.grad(wanted, (x, bias), gradient), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    weight = quantized(True)
    x, bias = torch.randn(3, 128, dtype=torch.float64, requires_grad=True), torch.randn(96, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: torch.ops.gquant.linear_4bit(x, b, *weight), (x, bias))


def test_layer_trains_what_is_before_it():
    model = torch.nn.Sequential(torch.nn.Linear(16, 128), gquant.torch.Linear4bit(128, 96))
    model[1].load_state_dict({"weight": torch.randn(96, 128), "bias": torch.zeros(96)})
    frozen = {k: v.clone() for k, v in model[1].state_dict().items() if "weight" in k}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(5):
        loss = model(torch.ones(4, 16)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(same(frozen[k], model[1].state_dict()[k]) for k in frozen)


def test_compute_dtype():
    layer = gquant.torch.Linear4bit(128, 96, bias=False, compute_dtype=torch.bfloat16)
    layer.load_state_dict({"weight": torch.randn(96, 128)})
    x = torch.randn(2, 128)
    y = layer(x)
    assert y.dtype == torch.float32
    assert same(y.bfloat16().float(), y)
    check_linear(y.bfloat16(), x.bfloat16(), None, arguments(layer.weight, layer.quant_state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out(dtype):
    packed, state = gquant.torch.quantize_4bit(torch.randn(64, 64).to(dtype))
    out = torch.empty(64, 64, dtype=dtype)
    address = out.data_ptr()
    assert gquant.torch.dequantize_4bit(packed, state, out) is out and out.data_ptr() == address
    assert same(out, gquant.torch.dequantize_4bit(packed, state))


def test_memory_that_is_used_again():
    """New tensors often lie where old ones lay; what the library remembers of those must fit them."""
    generator = torch.Generator().manual_seed(4)
    for step in range(300):
        shape = [(64, 64), (32, 128), (64, 32)][step % 3]
        dtype, nested = DTYPES[step % 2], step % 5 == 0
        packed, state = gquant.torch.quantize_4bit(torch.randn(shape, generator=generator).to(dtype), 64, nested)
        plain = gquant.QuantState("nf4", shape, 64, str(dtype)[6:], packed.numpy(), state.absmax.numpy())
        if nested:
            plain.nested_absmax, plain.nested_codebook = state.state2.absmax.numpy(), state.state2.code.numpy()
            plain.offset = state.offset.item()
        want = torch.empty(shape, dtype=dtype)
        plain.dequantize(out=want)
        assert same(gquant.torch.dequantize_4bit(packed, state), want)
        packed.fill_(step % 256)
        plain.dequantize(out=want)
        assert same(gquant.torch.dequantize_4bit(packed, state), want)


def test_eager_is_the_operator():
    packed, state = gquant.torch.quantize_4bit(torch.randn(64, 64), compress_statistics=True)
    want = torch.ops.gquant.dequantize_4bit(*arguments(packed, state))
    assert same(gquant.torch.dequantize_4bit(packed, state), want)
    assert same(gquant.torch.dequantize_4bit(torch.nn.Parameter(packed, requires_grad=False), state), want)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = gquant.torch.dequantize_4bit(mode.from_tensor(packed), state)
        assert (fake.shape, fake.dtype, type(fake)) == (want.shape, want.dtype, torch._subclasses.FakeTensor)


def test_refused():
    packed, state = gquant.torch.quantize_4bit(torch.randn(64, 64))
    meta = torch.empty(64, 64, device="meta")
    for call, error, text in (
        (lambda: gquant.torch.quantize_4bit(torch.randn(64, 64).T), gquant.InvalidArgumentError, "not contiguous"),
        (lambda: gquant.torch.quantize_4bit(torch.randn(64, 64).double()), gquant.InvalidArgumentError, "dtype float64"),
        (lambda: gquant.torch.quantize_4bit(meta), gquant.UnsupportedError, "A is on device meta"),
        (lambda: gquant.torch.quantize_4bit(torch.randn(64), quant_type="int8"), gquant.InvalidArgumentError, "quant_type is 'int8'"),
        (lambda: gquant.torch.quantize_4bit(torch.randn(3), quant_storage=torch.float32), gquant.InvalidArgumentError, "quant_storage"),
        (lambda: gquant.torch.dequantize_4bit(packed.to("meta"), state), gquant.UnsupportedError, "packed is on device meta"),
        (lambda: gquant.torch.dequantize_4bit(packed[1:], state), gquant.InvalidArgumentError, "packed has 2047 bytes; want 2048"),
        (lambda: gquant.torch.dequantize_4bit(packed, state, torch.empty(64, 63)), gquant.InvalidArgumentError, "want torch.float32 (64, 64)"),
        (lambda: gquant.torch.dequantize_4bit(packed, state, torch.empty(64, 64).half()), gquant.InvalidArgumentError, "torch.float16"),
        (lambda: gquant.torch.dequantize_4bit(packed, state, torch.empty(64, 64).T), gquant.InvalidArgumentError, "out is not contiguous"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert text in str(caught.value)


def compiles_cpp():
    """Whether there is what inductor needs: a compiler, and Python's headers."""
    return (shutil.which("c++") or shutil.which("g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()


needs_cpp = pytest.mark.skipif(not compiles_cpp(), reason="inductor needs a C++ compiler and Python's headers")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_cpp)])
def test_compile(backend):
    program = Path(__file__).with_name("compiled.py")
    env = {**os.environ, **support.ENVIRONMENT}
    del env["TORCHDYNAMO_DISABLE"]
    p = subprocess.run([sys.executable, program, backend], env=env, capture_output=True, text=True, timeout=600)
    assert p.returncode == 0, p.stderr

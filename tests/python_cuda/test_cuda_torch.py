"""The operators and the layer on the device: torch.compile, gradients, moving, no waiting."""

import copy
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

import gquant
import gquant.torch
from gquant.torch.state import arguments
from support import check_linear
from weights import DTYPES, TYPES, equal, normal


def quantized(nested, quant_type="nf4", dtype=torch.float32):
    return arguments(*gquant.torch.quantize_4bit(normal(96, 128, dtype=dtype).cuda(), 64, nested, quant_type))


def layer_of(nested=True, quant_type="nf4", device="cuda", bias=True, **options):
    layer = gquant.torch.Linear4bit(128, 96, bias=bias, quant_type=quant_type, compress_statistics=nested, device=device, **options)
    entries = {"weight": normal(96, 128, seed=7).to(device)} | ({"bias": normal(96, seed=8).to(device)} if bias else {})
    layer.load_state_dict(entries)
    return layer


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_opcheck(nested):
    ops, check = torch.ops.gquant, torch.library.opcheck
    weight = quantized(nested, dtype=torch.bfloat16)
    check(ops.quantize_4bit.default, (normal(96, 128).cuda(), 64, "nf4", nested, torch.uint8))
    check(ops.quantize_4bit.default, (normal(3, 101).half().cuda(), 32, "fp4", nested, torch.int8))
    check(ops.dequantize_4bit.default, weight)
    check(ops.dequantize_4bit.out, weight, {"out": torch.empty(96, 128, dtype=torch.bfloat16, device="cuda")})
    for bias in (None, torch.randn(96, device="cuda", requires_grad=True)):
        check(ops.linear_4bit.default, (torch.randn(2, 3, 128, device="cuda", requires_grad=True), bias, *weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_gradients(nested, dtype):
    """Those of torch's linear with the decoded weight."""
    layer = layer_of(nested, "fp4")
    dense = gquant.torch.dequantize_4bit(layer.weight, layer.quant_state).to(dtype)
    for shape in ((128,), (5, 128), (2, 3, 128), (0, 128)):
        x = normal(*shape, dtype=dtype).cuda().requires_grad_()
        y = layer(x)
        bias = layer.bias.detach().to(dtype).requires_grad_()
        wanted = torch.nn.functional.linear(x, dense, bias)
        check_linear(y, x, bias, arguments(layer.weight, layer.quant_state))
        gradient = normal(*y.shape, dtype=dtype, seed=3).cuda()
        of_x, of_bias = torch.autograd.grad(y, (x, layer.bias), gradient)
        want_x, want_bias = torch.autograd.grad(wanted, (x, bias), gradient)
        torch.testing.assert_close(of_x, want_x)
        torch.testing.assert_close(of_bias, want_bias.float(), rtol=1e-2, atol=1e-2)


def test_layer_trains_what_is_before_it():
    model = torch.nn.Sequential(torch.nn.Linear(16, 128, device="cuda"), layer_of())
    frozen = {k: v.clone() for k, v in model[1].state_dict().items() if "weight" in k}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(5):
        loss = model(torch.ones(4, 16, device="cuda")).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(equal(frozen[k], model[1].state_dict()[k]) for k in frozen)


@pytest.mark.parametrize("quant_type", TYPES)
def test_layer_is_the_cpus(quant_type):
    """The same state dict whichever device quantized it, and whatever moved it."""
    on_cpu, on_device = layer_of(quant_type=quant_type, device="cpu"), layer_of(quant_type=quant_type)
    wanted = on_cpu.state_dict()
    for layer in (on_device, copy.deepcopy(on_cpu).cuda(), copy.deepcopy(on_cpu).to("cuda", torch.bfloat16).float(), copy.deepcopy(on_device).cpu()):
        entries = layer.state_dict()
        assert entries.keys() == wanted.keys()
        for key in wanted:
            assert equal(entries[key], wanted[key]) or (key == "bias" and torch.allclose(entries[key].cpu(), wanted[key], rtol=1e-2)), key
        x = normal(3, 128).to(layer.weight.device)
        torch.testing.assert_close(layer(x).cpu(), on_cpu(normal(3, 128)), rtol=1e-2, atol=1e-1)
    moved = copy.deepcopy(on_cpu).cuda()
    assert {moved.weight.device.type, moved.quant_state.absmax.device.type, moved.quant_state.offset.device.type, moved.quant_state.state2.code.device.type} == {"cuda"}


def test_inference_is_the_operator():
    for nested in (False, True):
        layer = layer_of(nested)
        for dtype in DTYPES:
            x = normal(5, 128, dtype=dtype).cuda()
            bias = layer.bias.to(dtype)
            want = torch.ops.gquant.linear_4bit(x, bias, *arguments(layer.weight, layer.quant_state))
            with torch.no_grad():
                assert equal(layer(x), want)
            with torch.inference_mode():
                assert equal(layer(x), want)
            assert equal(layer(x).detach(), want)


def test_compute_dtype():
    layer = layer_of(compute_dtype=torch.bfloat16, bias=False)
    x = normal(2, 128).cuda()
    y = layer(x)
    assert y.dtype == torch.float32 and equal(y.bfloat16().float(), y)
    check_linear(y.bfloat16(), x.bfloat16(), None, arguments(layer.weight, layer.quant_state))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_out(nested):
    for dtype in DTYPES:
        packed, state = gquant.torch.quantize_4bit(normal(64, 64, dtype=dtype).cuda(), 64, nested)
        want = gquant.torch.dequantize_4bit(packed, state)
        out = torch.zeros(64, 64, dtype=dtype, device="cuda")
        assert gquant.torch.dequantize_4bit(packed, state, out) is out and equal(out, want)
        out.zero_()
        torch.ops.gquant.dequantize_4bit.out(*arguments(packed, state), out=out)
        assert equal(out, want)


def test_nothing_waits():
    layer, x = layer_of(), normal(4, 128).cuda()
    layer(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)
        with torch.no_grad():
            layer(x)
        x.requires_grad_()
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_state_under_another_default_dtype():
    """The offset of a state whose offset is no float32 is converted, on the device."""
    packed, state = gquant.torch.quantize_4bit(normal(64, 64).cuda(), 64, True)
    state.offset = state.offset.bfloat16()
    decoded = gquant.torch.dequantize_4bit(packed, state)
    state.offset = state.offset.float()
    assert equal(decoded, gquant.torch.dequantize_4bit(packed, state))


# ---- torch.compile


def compiles_for_devices():
    """Whether there is what inductor needs: Triton, a compiler, and Python's headers."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return (shutil.which("cc") or shutil.which("gcc")) and Path(sysconfig.get_path("include"), "Python.h").exists()


needs_inductor = pytest.mark.skipif(not compiles_for_devices(), reason="inductor needs Triton, a C compiler and Python's headers")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_inductor)])
def test_compile(backend):
    def compiled(function):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend=backend)

    x = normal(96, 128).cuda()
    for nested in (False, True):
        packed, state = gquant.torch.quantize_4bit(x, compress_statistics=nested)
        dense = gquant.torch.dequantize_4bit(packed, state)
        assert equal(compiled(gquant.torch.dequantize_4bit)(packed, state), dense)
        both = compiled(lambda t: gquant.torch.dequantize_4bit(*gquant.torch.quantize_4bit(t, compress_statistics=nested)))
        assert equal(both(x), dense)
    model = torch.nn.Sequential(torch.nn.Linear(16, 128, device="cuda"), torch.nn.GELU(), layer_of())
    fast = compiled(model)
    for rows in (1, 3, 8):  # the second number of rows makes it dynamic
        given = normal(rows, 16, seed=rows).cuda()
        found = []
        for run in (model, fast):
            model.zero_grad()
            y = run(given)
            y.square().sum().backward()
            found.append((y.detach(), model[0].weight.grad.clone(), model[2].bias.grad.clone()))
        for eager, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(given), model(given), rtol=1e-2, atol=1e-2)


@needs_inductor
def test_compile_with_graphs():
    """mode="reduce-overhead" captures the compiled layer in a CUDA graph."""
    layer = layer_of()
    torch._dynamo.reset()
    fast = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(5):
            x = normal(4, 128, seed=seed).cuda()
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(fast(x).clone(), layer(x), rtol=1e-2, atol=1e-2)

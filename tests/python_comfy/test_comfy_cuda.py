"""The layouts on a CUDA device: the CPU's bytes, products with the packed weight, and nothing that a graph cannot capture."""

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from layout_weights import DTYPES, KINDS, NAMES, quantized, random, same_bytes, tensors
from torch.nn import functional

import support
from gquant.comfy import is_4bit
from gquant.comfy.layouts import weight_arguments

pytestmark = pytest.mark.cuda
kinds = pytest.mark.parametrize("layout, nested", KINDS, ids=NAMES)
HALVES = [torch.float16, torch.bfloat16]


def on_device(layout, nested, n=96, k=128, dtype=torch.bfloat16, **options):
    return QuantizedTensor.from_float(random(n, k, dtype).cuda(), layout.name, nested=nested, **options)


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_are_the_cpus(layout, nested, dtype):
    ours, cpus = on_device(layout, nested, dtype=dtype), quantized(layout, nested, dtype=dtype)
    assert same_bytes(ours.to("cpu"), cpus)
    assert torch.equal(ours.dequantize().cpu(), cpus.dequantize())
    moved = cpus.to("cuda")
    assert same_bytes(moved, ours) and all(tensor.is_cuda for tensor in tensors(moved).values())
    for key, part in ours.state_dict("weight").items():
        assert torch.equal(part.cpu(), cpus.state_dict("weight")[key]), key


@kinds
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda mode: mode.__name__)
def test_linear(layout, nested, dtype, mode):
    weight = on_device(layout, nested, 1000, 1024, dtype)
    bias = random(1, 1000, dtype, seed=3)[0].cuda()
    for rows in (1, 5, 16, 64, 77, 600):
        x = random(rows, 1024, dtype, seed=rows).cuda().view(1, rows, 1024)
        for added in (None, bias):
            with mode():
                y = functional.linear(x, weight, added)
            assert y.dtype == dtype and y.shape == (1, rows, 1000)
            support.check_linear(y, x, added, weight_arguments(weight), 1.05 if rows <= 16 else 1.25)  # kernels for many rows round weights


@kinds
def test_the_gradient_of_x(layout, nested):
    weight, bias = on_device(layout, nested), random(1, 96, torch.bfloat16)[0].cuda()
    gradients = []
    for w in (weight, weight.dequantize()):
        x = random(80, 128, torch.bfloat16, seed=5).cuda().requires_grad_()
        functional.linear(x, w, bias).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@kinds
@pytest.mark.parametrize("seed", [None, 5])
def test_requantizing(layout, nested, seed):
    weight = on_device(layout, nested, 256, 512)
    for decoded in (weight.to(dtype) for dtype in DTYPES):
        assert same_bytes(decoded.requantize_from_float(decoded.dequantize(), stochastic_rounding=seed), weight)
    cpus = weight.to("cpu")  # a weight that is offloaded, patched on the device
    again = cpus.requantize_from_float(weight.dequantize(), stochastic_rounding=seed)
    assert again._qdata.is_cuda and same_bytes(again, weight)
    changed = weight.requantize_from_float(weight.dequantize() + 0.1, stochastic_rounding=seed)
    assert is_4bit(changed) and not same_bytes(changed, weight)
    weight.copy_(changed)
    assert same_bytes(weight, changed)


@kinds
def test_stochastic_rounding_is_right_in_the_mean(layout, nested):
    weight = random(64, 64).cuda()
    once = [QuantizedTensor.from_float(weight, layout.name, nested=nested, stochastic_rounding=3) for _ in range(2)]
    assert same_bytes(*once)
    mean = sum(QuantizedTensor.from_float(weight, layout.name, nested=nested, stochastic_rounding=s).dequantize() for s in range(1, 101)) / 100
    unclipped = weight.abs() < 0.9 * weight.abs().view(64, 1, 64).amax(-1)
    assert ((mean - weight).abs() * unclipped).max() < 5 * weight.abs().max() / 6 / 10


def test_a_large_weight_is_rounded_in_pieces():
    weight = random(2048, 2304, torch.bfloat16).cuda()  # more than one piece, the last of them short
    nearest = QuantizedTensor.from_float(weight, "GQuantNF4Layout").dequantize()
    rounded = QuantizedTensor.from_float(weight, "GQuantNF4Layout", stochastic_rounding=1).dequantize()
    step = weight.abs().view(-1, 64).amax(1).repeat_interleave(64).view_as(weight) * 0.31
    assert ((rounded - weight).abs() <= step).all() and ((rounded - nearest).abs() <= step).all()


@kinds
@pytest.mark.parametrize("rows", [7, 300])
def test_a_graph_captures_it(layout, nested, rows):
    weight, x = on_device(layout, nested, 256, 512), random(rows, 512, torch.bfloat16, seed=1).cuda()
    with torch.inference_mode():
        eager = functional.linear(x, weight)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            functional.linear(x, weight)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = functional.linear(x, weight)
        y.zero_()
        graph.replay()
    torch.testing.assert_close(y, eager)


@kinds
def test_it_runs_on_the_current_stream(layout, nested):
    weight, x = on_device(layout, nested, 256, 512), random(7, 512, torch.bfloat16, seed=1).cuda()
    with torch.inference_mode():
        want = functional.linear(x, weight)
        late, stream = torch.zeros_like(x), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            late.copy_(x)
            y = functional.linear(late, weight)
        stream.synchronize()
    assert torch.equal(y, want)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend):
    code = (support.ROOT / "tests" / "python_comfy" / "compiled_comfy.py").read_text()
    support.python(f"import sys; sys.argv[1:] = [{backend!r}, 'cuda']\n{code}", TORCHDYNAMO_DISABLE="0")

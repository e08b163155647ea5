"""F.linear with a packed weight: which handler it comes to, and that its result is that of the decoded weight."""

import pytest
import torch
from torch.nn import functional

import gquant.comfy.handlers
import support
from layout_weights import DTYPES, KINDS, NAMES, quantized, random

kinds = pytest.mark.parametrize("layout, nested", KINDS, ids=NAMES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
modes = pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda mode: mode.__name__)


def sized(*shape, dtype=torch.float32, seed=8):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of x that came to the one function that multiplies."""
    seen, linear = [], gquant.comfy.handlers.linear
    monkeypatch.setattr(gquant.comfy.handlers, "linear", lambda x, *rest: seen.append(tuple(x.shape)) or linear(x, *rest))
    return seen


@kinds
@dtypes
@modes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(128,), (5, 128), (2, 3, 128), (0, 128)], ids=str)
def test_equals_the_decoded_weight_on_the_cpu(layout, nested, dtype, mode, bias, shape, calls):
    weight = quantized(layout, nested, dtype=dtype)
    x, added = sized(*shape, dtype=dtype), sized(96, dtype=dtype) if bias else None
    with mode():
        y = functional.linear(x, weight, added)
        assert len(calls) == 1 or len(shape) == 1
        assert torch.equal(y, functional.linear(x, weight.dequantize(), added))
        assert y.dtype == dtype and type(y) is torch.Tensor


@kinds
def test_another_dtype_than_the_weights_is_xs(layout, nested):
    weight = quantized(layout, nested, dtype=torch.bfloat16)
    x = sized(5, 128)
    with torch.inference_mode():
        assert torch.equal(functional.linear(x, weight), functional.linear(x, weight.dequantize().float()))


@kinds
def test_the_gradient_of_x_is_exact(layout, nested):
    weight = quantized(layout, nested)
    results = []
    for w in (weight, weight.dequantize()):
        x, bias = sized(2, 3, 128).requires_grad_(), sized(96).requires_grad_()
        functional.linear(x, w, bias).square().sum().backward()
        results.append((x.grad, bias.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@kinds
def test_products_of_matrices(layout, nested, calls):
    weight, x, bias = quantized(layout, nested), sized(5, 128), sized(96)
    dense = weight.dequantize()
    assert torch.equal(torch.mm(x, weight.t()), torch.mm(x, dense.t()))
    assert torch.equal(torch.addmm(bias, x, weight.t()), torch.addmm(bias, x, dense.t()))
    assert len(calls) == 2
    # What is no linear layer gets the decoded weight.
    torch.testing.assert_close(torch.addmm(bias, x, weight.t(), beta=2, alpha=3), torch.addmm(bias, x, dense.t(), beta=2, alpha=3))
    torch.testing.assert_close(torch.addmm(sized(5, 96), x, weight.t()), torch.addmm(sized(5, 96), x, dense.t()))
    assert torch.equal(torch.mm(sized(5, 96), weight), torch.mm(sized(5, 96), dense))
    assert torch.equal(torch.mm(weight, sized(128, 3)), torch.mm(dense, sized(128, 3)))
    assert torch.equal(functional.linear(weight, sized(7, 128)), functional.linear(dense, sized(7, 128)))
    assert torch.equal(functional.linear(sized(5, 96), weight.t()), functional.linear(sized(5, 96), dense.t()))
    assert torch.equal(functional.linear(weight, weight), functional.linear(dense, dense))
    assert len(calls) == 3


def test_wrong_shapes_are_errors():
    weight = quantized(*KINDS[0])
    with pytest.raises(RuntimeError, match="shape"), torch.inference_mode():
        functional.linear(sized(5, 96), weight)


def test_the_environment_chooses_the_fused_product():
    code = """
import torch, gquant.comfy
from comfy_kitchen.tensor import QuantizedTensor
from torch.nn import functional

called = []
from gquant.torch import ops
linear = ops.linear
ops.linear = lambda *a: called.append(a) or linear(*a)
torch.manual_seed(0)
weight = QuantizedTensor.from_float(torch.randn(96, 128), "GQuantNF4Layout")
x, bias = torch.randn(2, 3, 128), torch.randn(96)
with torch.inference_mode():
    y = functional.linear(x, weight, bias)
    wanted = functional.linear(x, weight.dequantize(), bias)
torch.testing.assert_close(y, wanted)
print(len(called))
"""
    assert support.python(code, GQUANT_COMFY_CPU="fused").strip() == "1"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend):
    code = (support.ROOT / "tests" / "python_comfy" / "compiled_comfy.py").read_text()
    support.python(f"import sys; sys.argv[1:] = [{backend!r}]\n{code}", TORCHDYNAMO_DISABLE="0")

"""linear_4bit, Linear4bit and QuantState.linear: they multiply with the packed weight."""

import array
import threading

import bitsandbytes
import numpy
import pytest
import torch

import gquant
import gquant.torch
from gquant.torch import ops
from gquant.torch.state import arguments
from support import check_linear, decoded, same

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(96, 128), (1, 64), (5, 1), (7, 31), (33, 100), (130, 257), (3, 65), (257, 1000)]  # n, k


def normal(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(n, k, blocksize=64, nested=False, quant_type="nf4", dtype=torch.bfloat16):
    return arguments(*gquant.torch.quantize_4bit(normal(n, k, dtype=dtype), blocksize, nested, quant_type))


def layer_of(weight, bias=None):
    n, k = weight[5]
    layer = gquant.torch.Linear4bit(k, n, bias=bias is not None)
    layer.weight = torch.nn.Parameter(weight[0], requires_grad=False)
    packed, absmax, nested_absmax, nested_code, offset, shape, dtype, blocksize, quant_type = weight
    state2 = None if offset is None else gquant.torch.QuantState(nested_absmax, code=nested_code, blocksize=256)
    layer.quant_state = gquant.torch.QuantState(absmax, shape, None, blocksize, quant_type, dtype, offset, state2)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias)
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_shapes(nested, dtype):
    for number, (n, k) in enumerate(SHAPES):
        for blocksize in (32, 64, 256, 4096):
            weight = quantized(n, k, blocksize, nested, ["nf4", "fp4"][number % 2], DTYPES[number % 3])
            layer, bias = layer_of(weight, normal(n, seed=2)), normal(n, dtype=dtype, seed=2)
            for rows in (1, 2, 9, 40):
                x = normal(rows, k, dtype=dtype, seed=rows)
                y = torch.ops.gquant.linear_4bit(x, None, *weight)
                check_linear(y, x, None, weight)
                y = torch.ops.gquant.linear_4bit(x, bias, *weight)
                check_linear(y, x, bias, weight)
                with torch.no_grad():
                    assert same(layer(x), y)
                assert same(layer(x), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_x(dtype):
    weight, bias = quantized(33, 100, nested=True), normal(33, dtype=dtype)
    layer = layer_of(weight, bias)
    plain = normal(2, 3, 100, dtype=dtype)
    for x in (
        plain,
        plain[0, 0],
        plain[:, 1],
        plain.transpose(0, 1),
        normal(100, 6, dtype=dtype).T,
        normal(4, 200, dtype=dtype)[:, ::2],
        normal(4, 101, dtype=dtype)[:, 1:],
        normal(100, dtype=dtype).expand(5, 100),
        plain[:0],
        plain[:, :0],
        plain[0, 0].requires_grad_(),
    ):
        y = torch.ops.gquant.linear_4bit(x, bias, *weight)
        assert y.is_contiguous()
        check_linear(y, x, bias, weight)
        with torch.no_grad():
            assert same(layer(x), y)


def test_a_row_depends_on_its_row_alone():
    weight, x = quantized(96, 128), normal(40, 128, dtype=torch.bfloat16)
    y = torch.ops.gquant.linear_4bit(x, None, *weight)
    for count in (1, 8, 9, 33):
        assert same(torch.ops.gquant.linear_4bit(x[:count], None, *weight), y[:count])
    assert same(torch.ops.gquant.linear_4bit(x, None, *weight), y)


def test_bias_of_another_dtype():
    weight = quantized(96, 128)
    for dtype in DTYPES:
        x = normal(3, 128, dtype=dtype)
        for other in (*DTYPES, torch.float64):
            bias = normal(96, dtype=other)
            assert same(torch.ops.gquant.linear_4bit(x, bias, *weight), torch.ops.gquant.linear_4bit(x, bias.to(dtype), *weight))
            bias.requires_grad_()
            y = torch.ops.gquant.linear_4bit(x, bias, *weight)
            y.sum().backward()
            assert bias.grad.dtype == other and (bias.grad == 3).all()
            with torch.no_grad():
                assert same(layer_of(weight, bias)(x), y)
        strided = normal(192, dtype=dtype)[::2]
        assert same(torch.ops.gquant.linear_4bit(x, strided, *weight), torch.ops.gquant.linear_4bit(x, strided.clone(), *weight))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_out(dtype):
    weight, bias = quantized(33, 100, nested=True), normal(33, dtype=dtype)
    for shape in ((100,), (4, 100), (2, 3, 100), (0, 100)):
        for added in (None, bias):
            x = normal(*shape, dtype=dtype)
            out = torch.full((*shape[:-1], 33), 7.0, dtype=dtype)
            address = out.data_ptr()
            assert torch.ops.gquant.linear_4bit.out(x, added, *weight, out=out) is None and out.data_ptr() == address
            torch.testing.assert_close(out, torch.ops.gquant.linear_4bit(x, added, *weight), rtol=0, atol=1e-13)


def test_out_has_no_gradient():
    weight, x, out = quantized(33, 100), normal(4, 100).requires_grad_(), torch.empty(4, 33)
    with pytest.raises(gquant.InvalidArgumentError, match="no gradient"):
        torch.ops.gquant.linear_4bit.out(x, None, *weight, out=out)
    with torch.no_grad():
        torch.ops.gquant.linear_4bit.out(x, None, *weight, out=out)
    assert same(out, torch.ops.gquant.linear_4bit(x, None, *weight).detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_an_odd_layer(dtype):
    weight = quantized(33, 100, 256, True, dtype=dtype)
    dense = torch.nn.Linear(100, 33, dtype=dtype)
    dense.weight.data = decoded(weight, dtype)
    layer = layer_of(weight, dense.bias.data.clone())
    for shape in ((100,), (5, 100), (2, 3, 100), (0, 100)):
        results = []
        for run in (layer, dense):
            x = normal(*shape, dtype=dtype).requires_grad_()
            y = run(x)
            gradient = normal(*y.shape, dtype=dtype, seed=3)
            results.append((y, *torch.autograd.grad(y, (x, run.bias), gradient)))
        rtol = {torch.float32: 1e-5}.get(dtype, 2e-2)
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=10 * rtol)


def test_weights_that_are_not_usual():
    weight = quantized(33, 100, nested=True)
    x = normal(3, 100)
    want = torch.ops.gquant.linear_4bit(x, None, *weight)
    wide = list(weight)
    wide[4] = weight[4].double()
    assert same(torch.ops.gquant.linear_4bit(x, None, *wide), want)
    shifted = list(weight)
    memory = torch.zeros(weight[0].nbytes + 1, dtype=torch.uint8)
    shifted[0] = memory[1:]
    shifted[0].copy_(weight[0].flatten())
    assert same(torch.ops.gquant.linear_4bit(x, None, *shifted), want)


def test_what_the_operator_does_not_know():
    """The layer as torch sees it: vmap, forward-mode gradients, fake tensors."""
    weight = quantized(96, 128)
    layer, x = layer_of(weight, normal(96)), normal(5, 3, 128)
    dense, bias = decoded(weight, torch.float32), layer.bias
    want = torch.nn.functional.linear(x, dense, bias)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(layer)(x), want)
        with torch.autograd.forward_ad.dual_level():
            y = layer(torch.autograd.forward_ad.make_dual(x, x))
            tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
        torch.testing.assert_close(tangent, torch.nn.functional.linear(x, dense))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.float32
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.ops.gquant.linear_4bit(mode.from_tensor(x), None, *weight)
        assert (fake.shape, fake.dtype) == ((5, 3, 96), torch.float32)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes(quant_type, nested):
    for dtype in DTYPES:
        layer = gquant.torch.Linear4bit(192, 100, quant_type=quant_type, compress_statistics=nested)
        layer.load_state_dict({"weight": normal(100, 192, dtype=dtype), "bias": normal(100)})
        entries = layer.state_dict()
        theirs = bitsandbytes.nn.Linear4bit(192, 100, quant_type=quant_type, compute_dtype=dtype)
        parts = {key: part for key, part in entries.items() if key.startswith("weight.")}
        theirs.weight = bitsandbytes.nn.Params4bit.from_prequantized(entries["weight"], parts, device="cpu", module=theirs)
        theirs.bias = torch.nn.Parameter(entries["bias"], requires_grad=False)
        tolerance = {torch.float32: 1e-4}.get(dtype, 0.2)  # of numbers up to 50
        for rows in (1, 17):
            x = normal(rows, 192, dtype=dtype)
            with torch.no_grad():
                torch.testing.assert_close(layer(x), theirs(x), rtol=tolerance / 10, atol=tolerance)


def test_settled_weights():
    """It needs no device, on which alone it means something, and ends with its block, also in another thread's eyes."""
    flags, weight, x = [], quantized(96, 128), normal(4, 128, dtype=torch.bfloat16)
    want = torch.ops.gquant.linear_4bit(x, None, *weight)
    with pytest.raises(KeyError), gquant.torch.settled_weights():
        assert same(torch.ops.gquant.linear_4bit(x, None, *weight), want)
        flags.append(ops._flags.get())
        thread = threading.Thread(target=lambda: flags.append(ops._flags.get()))
        thread.start()
        thread.join()
        raise KeyError
    assert [*flags, ops._flags.get()] == [1, 0, 0]


def test_refused():
    weight, x, bias = quantized(96, 128), normal(3, 128), normal(96)
    op = torch.ops.gquant.linear_4bit
    flat = arguments(*gquant.torch.quantize_4bit(normal(128)))
    layer = layer_of(weight)
    for call, text in (
        (lambda: op(normal(3, 127), None, *weight), "x has shape (3, 127); want [..., 128]"),
        (lambda: layer(normal(3, 127)), "x has shape (3, 127); want [..., 128]"),
        (lambda: op(torch.tensor(1.0), None, *weight), "x has shape (); want [..., 128]"),
        (lambda: op(x, None, *flat), "the weight has shape (128,); a linear layer needs 2 dimensions"),
        (lambda: op(x, bias[:1], *weight), "bias has shape (1,); want (96,)"),
        (lambda: op(x, bias[None], *weight), "bias has shape (1, 96); want (96,)"),
        (lambda: op(x, None, weight[0][1:], *weight[1:]), "packed has 6143 bytes; want 6144"),
        (lambda: op.out(x, None, *weight, out=torch.empty(3, 95)), "want torch.float32 (3, 96)"),
        (lambda: op.out(x, None, *weight, out=torch.empty(3, 96).half()), "out is torch.float16"),
        (lambda: op.out(x, None, *weight, out=torch.empty(96, 3).T), "out is not contiguous"),
        (lambda: ops.linear(x.to("meta"), None, weight), "packed is on device cpu and x on meta"),
        (lambda: ops.linear(x, bias.to("meta"), weight), "packed is on device cpu and bias on meta"),
    ):
        with torch.no_grad(), pytest.raises(gquant.InvalidArgumentError) as caught:
            call()
        assert text in str(caught.value)


# ---- QuantState.linear


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_arrays(nested):
    source = normal(33, 100)
    for format in ("nf4", "fp4"):
        ours = gquant.quantize(source, format, nested=nested)
        weight = arguments(*gquant.torch.quantize_4bit(source, 64, nested, format))
        theirs = gquant.quantize(source.numpy(), format, nested=nested)
        for dtype in DTYPES:
            for shape in ((100,), (3, 100), (2, 3, 100), (0, 100)):
                for bias in (None, normal(33, dtype=dtype)):
                    x = normal(*shape, dtype=dtype)
                    want = torch.ops.gquant.linear_4bit(x, bias, *weight)
                    assert same(ours.linear(x, bias), want) and same(theirs.linear(x, bias, threads=1), want)
                    out = torch.empty_like(want)
                    assert ours.linear(x, bias, out) is out and same(out, want)
                    if dtype != torch.bfloat16:
                        found = theirs.linear(x.numpy(), None if bias is None else bias.numpy())
                        assert isinstance(found, numpy.ndarray) and same(torch.from_numpy(found), want)


def test_arrays_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, state = normal(3, 128), gquant.quantize(normal(96, 128))
    found = state.linear(x.numpy().astype(ml_dtypes.bfloat16))
    assert found.dtype == ml_dtypes.bfloat16 and same(torch.from_numpy(found.view("i2")).view(torch.bfloat16), state.linear(x.bfloat16()))


def test_buffers():
    state = gquant.quantize(array.array("f", normal(128).tolist()), shape=(2, 64))
    x = array.array("f", normal(64).tolist())
    assert state.linear(x).tolist() == state.linear(torch.tensor(x)).tolist()


def test_arrays_that_are_refused():
    x = normal(3, 128).numpy()
    state, flat, int8 = gquant.quantize(normal(96, 128).numpy()), gquant.quantize(normal(128).numpy()), gquant.quantize(normal(96, 128).numpy(), "int8")
    for call, error, text in (
        (lambda: state.linear(x[:, :127].copy()), gquant.InvalidArgumentError, "x has shape (3, 127); want [..., 128]"),
        (lambda: state.linear(numpy.float32(1)), gquant.InvalidArgumentError, "x has shape (); want [..., 128]"),
        (lambda: state.linear(x.T), gquant.InvalidArgumentError, "x is not contiguous"),
        (lambda: state.linear(x.astype("f8")), gquant.InvalidArgumentError, "x has dtype float64; want one of float32"),
        (lambda: state.linear(x, x[0, :96].astype("f2")), gquant.InvalidArgumentError, "bias has dtype float16; want float32"),
        (lambda: state.linear(x, x[0, :95]), gquant.InvalidArgumentError, "bias has 380 bytes; shape (96,) of float32 needs 384"),
        (lambda: state.linear(x, out=numpy.empty((3, 95), "f4")), gquant.InvalidArgumentError, "out has 1140 bytes; want 1152"),
        (lambda: state.linear(x, out=numpy.empty((3, 96), "f2")), gquant.InvalidArgumentError, "out has dtype float16; want float32"),
        (lambda: state.linear(x.tolist()), TypeError, "x is list"),
        (lambda: flat.linear(x), gquant.InvalidArgumentError, "the weight has shape (128,); a linear layer needs 2 dimensions"),
        (lambda: int8.linear(x), gquant.UnsupportedError, "not nf4 or fp4"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert text in str(caught.value)

"""linear_4bit, Linear4bit and QuantState.linear on the device: with the packed weight where there is a kernel, else decoded."""

import pytest
import torch

import gquant
import gquant.torch
from gquant.torch import ops
from gquant.torch.state import arguments
from support import check_linear, decoded, python
from weights import DTYPES, TYPES, equal, normal

HALVES = [torch.float16, torch.bfloat16]
ROWS = [1, 8, 16, 32, 33, 64, 65, 200]
MANY_ROWS = 1.25  # more than 16: their kernels round weights once, those of NF4 twice
SHAPES = [(96, 128), (5, 256), (1, 128), (257, 1024), (1000, 4096)]  # n, k

fuses = pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs Ampere or newer")


def quantized(n, k, blocksize=64, nested=True, quant_type="nf4", dtype=torch.bfloat16):
    return arguments(*gquant.torch.quantize_4bit(normal(n, k, dtype=dtype).cuda(), blocksize, nested, quant_type))


def layer_of(n, k, bias=True, **options):
    layer = gquant.torch.Linear4bit(k, n, bias=bias, quant_type="nf4", device="cuda", **options)
    layer.load_state_dict({"weight": normal(n, k, seed=7).cuda()} | ({"bias": normal(n, seed=8).cuda()} if bias else {}))
    return layer


def usual(x, bias, weight):
    return torch.nn.functional.linear(x, decoded(weight, x.dtype), bias)


@pytest.fixture
def calls(monkeypatch):
    """The numbers of rows that the library was called with."""
    found, function = [], ops._gq_linear

    def counted(*given):
        found.append(given[2].value)
        return function(*given)

    monkeypatch.setattr(ops, "_gq_linear", counted)
    return found


@fuses
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_shapes(nested, quant_type, dtype, calls):
    for number, (n, k) in enumerate(SHAPES):
        for blocksize in (64, 128):
            weight, bias = quantized(n, k, blocksize, nested, quant_type, DTYPES[number % 3]), normal(n, dtype=dtype, seed=2).cuda()
            for rows in ROWS:
                x = normal(rows, k, dtype=dtype, seed=rows).cuda()
                for added in (None, bias):
                    calls.clear()
                    y = torch.ops.gquant.linear_4bit(x, added, *weight)
                    fused = calls == [rows]
                    assert fused or calls == [] and rows > 64
                    check_linear(y, x, added, weight, 1.05 if rows <= 16 else MANY_ROWS if n > 5 else 2 * MANY_ROWS)  # a few rows of a weight may have luck
                    assert equal(torch.ops.gquant.linear_4bit(x, added, *weight), y)
                    if not fused:
                        assert equal(y, usual(x, added, weight))
                    out = torch.full_like(y, 7)
                    torch.ops.gquant.linear_4bit.out(x, added, *weight, out=out)
                    if fused:
                        assert equal(out, y)
                    else:
                        torch.testing.assert_close(out, y)


# Weights of Flux, SDXL, Wan, Qwen-Image, T5 and Llama: n, k.
MODELS = [(21504, 3072), (3072, 15360), (1280, 1280), (10240, 1280), (640, 320), (5120, 5120), (13824, 5120), (3072, 3584), (10240, 4096), (1024, 4096), (4096, 14336)]


@fuses
@pytest.mark.parametrize("n,k", MODELS)
def test_models(n, k):
    weight, bias = quantized(n, k), normal(n, dtype=torch.bfloat16, seed=2).cuda()
    for rows in (1, 77, 256, 333, 1024, 2333, 4608, 8192):
        x = normal(rows, k, dtype=torch.bfloat16, seed=rows).cuda()
        y = torch.ops.gquant.linear_4bit(x, bias, *weight)
        few = torch.arange(0, rows, -(rows // -100), device="cuda")  # float64 takes long
        check_linear(y[few], x[few], bias, weight, 1.5)  # cuBLASLt may round a sum before it adds the bias
        assert equal(torch.ops.gquant.linear_4bit(x, bias, *weight), y)


@fuses
@pytest.mark.parametrize("blocksize", [64, 128, 256, 512, 1024, 2048, 4096])
def test_blocksizes(blocksize, calls):
    weight, x = quantized(33, 4096, blocksize), normal(7, 4096, dtype=torch.bfloat16).cuda()
    check_linear(torch.ops.gquant.linear_4bit(x, None, *weight), x, None, weight)
    assert calls == [7]


@fuses
def test_codes_of_statistics_anywhere(calls):
    """The codes of nested statistics are bytes: no address is too odd for the kernel."""
    weight, x = quantized(264, 512), normal(3, 512, dtype=torch.bfloat16).cuda()
    want = torch.ops.gquant.linear_4bit(x, None, *weight)
    check_linear(want, x, None, weight)
    for at in range(1, 17):
        memory = torch.zeros(at + weight[1].numel(), dtype=torch.uint8, device="cuda")
        memory[at:].copy_(weight[1])
        assert equal(torch.ops.gquant.linear_4bit(x, None, weight[0], memory[at:], *weight[2:]), want)
    assert calls == [3] * 17


@fuses
def test_what_is_decoded(calls):
    """What the kernels do not do is done as before."""

    def shifted(weight):
        memory = torch.zeros(weight[0].nbytes + 8, dtype=torch.uint8, device="cuda")
        memory[8:].copy_(weight[0].flatten())
        return memory[8:], *weight[1:]

    def unaligned(weight):
        memory = torch.zeros(weight[1].numel() + 1, device="cuda")
        return weight[0], memory[1:].copy_(weight[1]), *weight[2:]

    odd = torch.zeros(3 * 128 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(3, 128).copy_(normal(3, 128))
    plain = normal(3, 128, dtype=torch.bfloat16).cuda()
    for name, x, weight in (
        ("float32", normal(3, 128).cuda(), quantized(96, 128)),
        ("float64", normal(3, 128).double().cuda(), quantized(96, 128)),
        ("k", normal(3, 96, dtype=torch.bfloat16).cuda(), quantized(96, 96)),
        ("odd k", normal(3, 101, dtype=torch.bfloat16).cuda(), quantized(33, 101)),
        ("blocksize 32", plain, quantized(96, 128, 32)),
        ("blocks over rows", plain, quantized(96, 128, 256)),
        ("codes", plain, shifted(quantized(96, 128))),
        ("absmax", plain, unaligned(quantized(96, 128, nested=False))),
        ("x", odd, quantized(96, 128)),
        ("rows", normal(20000, 128, dtype=torch.bfloat16).cuda(), quantized(96, 128)),
    ):
        n = weight[5][0]
        for bias in (None, normal(n, dtype=x.dtype).cuda()):
            y = torch.ops.gquant.linear_4bit(x, bias, *weight)
            assert equal(y, usual(x, bias, weight)), name
            out = torch.empty_like(y)
            torch.ops.gquant.linear_4bit.out(x, bias, *weight, out=out)
            torch.testing.assert_close(out, y)
    assert calls == []


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n,k,blocksize", [(32768, 4096, 32), (9000, 4099, 64)])
def test_slabs(n, k, blocksize, stored):
    """A large weight and many rows of x: memory is that of slabs. No kernel takes these weights as they are."""
    weight, bias = quantized(n, k, blocksize, True, "nf4", stored), normal(n, dtype=torch.bfloat16, seed=2).cuda()
    for rows in (2047, 2048):
        x = normal(rows, k, dtype=torch.bfloat16, seed=rows).cuda()
        for added in (None, bias):
            y, out = torch.ops.gquant.linear_4bit(x, added, *weight), torch.full((rows, n), 7, dtype=x.dtype, device="cuda")
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.ops.gquant.linear_4bit.out(x, added, *weight, out=out)
            used = torch.cuda.max_memory_allocated() - before
            if rows >= 2048:  # a slab of up to 128 MiB, and 32 MiB of cuBLASLt's
                assert used <= min(2 * n * k, 128 << 20) + (33 << 20)
                assert equal(out, y)
            elif n == 32768:
                assert used >= 2 * n * k
            check_linear(y, x, added, weight, 1.5)  # cuBLASLt may round a sum before it adds the bias


@fuses
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_any_x(dtype, calls):
    weight, bias = quantized(96, 128), normal(96, dtype=dtype).cuda()
    plain = normal(2, 3, 128, dtype=dtype).cuda()
    given = (
        plain,
        plain[0, 0],
        plain[:, 1],
        plain.transpose(0, 1),
        normal(128, 6, dtype=dtype).cuda().T,
        normal(4, 129, dtype=dtype).cuda()[:, 1:],
        plain[0, 0].expand(5, 128),
        plain[:0],
        plain[:, :0],
    )
    for x in given:
        y = torch.ops.gquant.linear_4bit(x, bias, *weight)
        assert y.is_contiguous()
        check_linear(y, x, bias, weight)
    assert len(calls) == len(given)
    assert equal(torch.ops.gquant.linear_4bit(plain, bias.float(), *weight), torch.ops.gquant.linear_4bit(plain, bias.float().to(dtype), *weight))


@pytest.mark.parametrize("rows", [1, 8, 65])
def test_layer_is_the_operator(rows):
    for bias in (False, True):
        layer = layer_of(257, 512, bias)
        for dtype in DTYPES:
            x = normal(rows, 512, dtype=dtype).cuda()
            want = torch.ops.gquant.linear_4bit(x, layer.bias, *arguments(layer.weight, layer.quant_state)).detach()
            with torch.no_grad():
                assert equal(layer(x), want)
            assert equal(layer(x).detach(), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype):
    weight = quantized(96, 128, dtype=dtype)
    for rows in (1, 33, 65):
        results = []
        for run in (lambda x, b: torch.ops.gquant.linear_4bit(x, b, *weight), lambda x, b: usual(x, b, weight)):
            x, bias = normal(rows, 128, dtype=dtype).cuda().requires_grad_(), normal(96, dtype=dtype).cuda().requires_grad_()
            y = run(x, bias)
            results.append((y, *torch.autograd.grad(y, (x, bias), normal(*y.shape, dtype=dtype, seed=3).cuda())))
        tolerance = {torch.float32: 1e-3}.get(dtype, 2e-2)
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("rows", ROWS)
def test_graph(rows):
    """A captured layer computes anew from what x and the weight hold when it is replayed."""
    layer, x = layer_of(256, 512), torch.zeros(rows, 512, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(rows, 256, device="cuda", dtype=torch.bfloat16)
    weight = arguments(layer.weight, layer.quant_state)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(x)  # cuBLAS makes its workspace
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
            torch.ops.gquant.linear_4bit.out(x, layer.bias, *weight, out=out)
        for seed in (1, 2):
            x.copy_(normal(rows, 512, seed=seed))
            graph.replay()
            torch.testing.assert_close(y, layer(x))
            torch.testing.assert_close(out, y)
        layer.weight.data.fill_(0)
        graph.replay()
        torch.testing.assert_close(y, layer(x))


@fuses
@pytest.mark.parametrize("rows", [1, 33, 100])
def test_settled_weights(rows, monkeypatch):
    """Calls in the block promise it, others don't, and nothing but the time depends on it."""
    flags, function = [], ops._gq_linear

    def noted(*given):
        flags.append(given[-1]._obj.flags)
        return function(*given)

    monkeypatch.setattr(ops, "_gq_linear", noted)
    layers, x = [layer_of(512, 512), layer_of(512, 512, bias=False)], normal(rows, 512, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        want = layers[1](layers[0](x))
        graph = torch.cuda.CUDAGraph()
        with gquant.torch.settled_weights(), torch.cuda.graph(graph):
            y = layers[1](layers[0](x))
        layers[0](x)
        assert flags == [0, 0, 1, 1, 0]
        for _ in range(3):
            graph.replay()
            assert equal(y, want)
        layers[0].weight.data.fill_(0x2d)
        graph.replay()
        changed = layers[1](layers[0](x))
        assert equal(y, changed) and not equal(y, want)


@pytest.mark.parametrize("rows", ROWS)
def test_side_stream(rows):
    """It goes to the current stream, and nothing waits."""
    layer, x = layer_of(256, 512), normal(rows, 512, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        want, later, side = layer(x), torch.zeros_like(x), torch.cuda.Stream()
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(side):
                torch.cuda._sleep(200_000_000)
                later.copy_(x)
                y = layer(later)
                assert not side.query(), "it waited"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        side.synchronize()
        torch.testing.assert_close(y, want)


@pytest.mark.parametrize("rows", [1, 33, 65])
def test_compile(rows):
    layer, x = layer_of(96, 128), normal(rows, 128, dtype=torch.bfloat16).cuda()
    torch._dynamo.reset()
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), layer(x))
    results = []
    for run in (layer, fast):
        given = x.clone().requires_grad_()
        run(given).float().square().sum().backward()
        results.append((given.grad, layer.bias.grad.clone()))
        layer.bias.grad = None
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-2)


def test_opcheck():
    for x in (normal(3, 128, dtype=torch.bfloat16).cuda(), normal(3, 128).cuda()):
        out = {"out": torch.empty(3, 96, dtype=x.dtype, device="cuda")}
        torch.library.opcheck(torch.ops.gquant.linear_4bit.out, (x, None, *quantized(96, 128)), out)
        torch.library.opcheck(torch.ops.gquant.linear_4bit.default, (x.requires_grad_(), None, *quantized(96, 128)))


# ---- QuantState.linear


@fuses
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_arrays(dtype):
    source = normal(96, 128).cuda()
    for nested in (False, True):
        state, weight = gquant.quantize(source, nested=nested), arguments(*gquant.torch.quantize_4bit(source, 64, nested))
        for shape in ((128,), (3, 128), (2, 3, 128), (0, 128), (64, 128)):
            x, bias = normal(*shape, dtype=dtype).cuda(), normal(96, dtype=dtype).cuda()
            want = torch.ops.gquant.linear_4bit(x, bias, *weight)
            assert equal(state.linear(x, bias), want)
            out, side = torch.zeros_like(want), torch.cuda.Stream()
            torch.cuda.synchronize()
            assert state.linear(x, bias, out, stream=side.cuda_stream) is out
            side.synchronize()
            assert equal(out, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_decoded(dtype):
    """What the kernels do not take is decoded into a workspace and multiplied by the libcublasLt that torch loaded."""
    for n, k, rows, blocksize in ((96, 128, 65, 64), (33, 101, 3, 64), (257, 192, 200, 32), (1000, 4096, 4096, 4096), (1, 1, 65, 64)):
        for nested in (False, True):
            weight = quantized(n, k, blocksize, nested, "fp4" if nested else "nf4", dtype)
            state, bias = ops._state(*weight), normal(n + 1, dtype=dtype, seed=2).cuda()
            x = normal(rows, k, dtype=dtype).cuda()
            for added in (None, bias[:n], bias[1:]):
                y = state.linear(x, added)
                check_linear(y, x, added, weight, MANY_ROWS)
                out, side = torch.zeros_like(y), torch.cuda.Stream()
                torch.cuda.synchronize()
                assert state.linear(x, added, out, stream=side.cuda_stream) is out
                side.synchronize()
                assert equal(out, y)


def test_arrays_without_cublaslt():
    code = """
import torch
import gquant
state = gquant.quantize(torch.ones(96, 128, device="cuda"))
try:
    state.linear(torch.ones(65, 128, device="cuda"))
except gquant.UnsupportedError as e:
    print(e)
"""
    printed = python(code, GQUANT_CUBLASLT="/nowhere/libcublasLt.so.13")
    assert "libcublasLt, which GQUANT_CUBLASLT names, cannot be loaded: /nowhere" in printed and "gq_dequantize" in printed


@fuses
def test_cupy():
    cupy = pytest.importorskip("cupy")
    x, weight = normal(3, 128).half(), normal(96, 128).half()
    state = gquant.quantize(cupy.asarray(weight.numpy()))
    found = state.linear(cupy.asarray(x.numpy()))
    want = torch.ops.gquant.linear_4bit(x.cuda(), None, *arguments(*gquant.torch.quantize_4bit(weight.cuda())))
    assert isinstance(found, cupy.ndarray) and (cupy.asnumpy(found) == want.cpu().numpy()).all()


# ---- what is refused


def test_refused():
    weight, x, bias = quantized(96, 128), normal(3, 128, dtype=torch.bfloat16).cuda(), normal(96, dtype=torch.bfloat16).cuda()
    odd = torch.zeros(3 * 128 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(3, 128)
    layer, state, op = layer_of(96, 128), gquant.quantize(normal(96, 128).cuda()), torch.ops.gquant.linear_4bit
    on_host = tuple(part.cpu() if isinstance(part, torch.Tensor) else part for part in weight)
    absmax_on_host = (weight[0], weight[1].cpu(), *weight[2:])
    for call, error, text in (
        (lambda: op(x.cpu(), None, *weight), gquant.InvalidArgumentError, "packed is on device cuda:0 and x on cpu"),
        (lambda: op(x, None, *on_host), gquant.InvalidArgumentError, "packed is on device cpu and x on cuda:0"),
        (lambda: layer(x.cpu()), gquant.InvalidArgumentError, "packed is on device cuda:0 and x on cpu"),
        (lambda: op(x, bias.cpu(), *weight), gquant.InvalidArgumentError, "packed is on device cuda:0 and bias on cpu"),
        (lambda: op.out(x, None, *weight, out=torch.empty(3, 96, dtype=x.dtype)), gquant.InvalidArgumentError, "and out on cpu"),
        (lambda: op(x, None, *absmax_on_host), gquant.InvalidArgumentError, "packed is on CUDA device 0 and absmax on the host"),
        (lambda: op(x[:, :127], None, *weight), gquant.InvalidArgumentError, "x has shape (3, 127); want [..., 128]"),
        (lambda: state.linear(x.cpu()), gquant.InvalidArgumentError, "packed is on CUDA device 0 and x on the host"),
        (lambda: state.linear(odd), gquant.InvalidArgumentError, "x are not aligned to 16 bytes, so the weight is decoded into exec.workspace"),
    ):
        with torch.no_grad(), pytest.raises(error) as caught:
            call()
        assert text in str(caught.value)
    torch.cuda.synchronize()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device():
    weight, x = quantized(96, 128), normal(3, 128, dtype=torch.bfloat16)
    want = torch.ops.gquant.linear_4bit(x.cuda(), None, *weight)
    other = tuple(part.to("cuda:1") if isinstance(part, torch.Tensor) else part for part in weight)
    with torch.cuda.device(0):
        assert equal(torch.ops.gquant.linear_4bit(x.to("cuda:1"), None, *other), want)
        with pytest.raises(gquant.InvalidArgumentError, match="packed is on device cuda:1 and x on cuda:0"):
            torch.ops.gquant.linear_4bit(x.cuda(), None, *other)

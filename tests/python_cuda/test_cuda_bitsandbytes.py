"""Live, side by side with bitsandbytes on the same device: equal bytes."""

import pytest
import torch

import gquant
import gquant.torch
from weights import BLOCKSIZES, DTYPES, TYPES, close, equal, normal, random_bits

LENGTHS = [3, 63, 64, 65, 1025, 4096, 50_001, 1 << 20]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
def test_4bit(F, quant_type, dtype):
    for length in LENGTHS:
        x = normal(length, dtype=dtype, seed=length).cuda()
        for blocksize in BLOCKSIZES:
            theirs, their_state = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
            ours, our_state = gquant.torch.quantize_4bit(x, blocksize, quant_type=quant_type)
            assert equal(ours, theirs), (length, blocksize)
            assert equal(our_state.absmax, their_state.absmax), (length, blocksize)
            want = F.dequantize_4bit(theirs, their_state).reshape(-1)
            assert equal(gquant.torch.dequantize_4bit(ours, our_state), want), (length, blocksize)
            assert equal(gquant.torch.dequantize_4bit(ours, their_state), want), (length, blocksize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
def test_4bit_of_random_bits(F, quant_type, dtype):
    x = random_bits(1 << 20, dtype).cuda()
    theirs, their_state = F.quantize_4bit(x, blocksize=64, quant_type=quant_type)
    ours, our_state = gquant.torch.quantize_4bit(x, 64, quant_type=quant_type)
    assert equal(ours, theirs) and equal(our_state.absmax, their_state.absmax)
    assert equal(gquant.torch.dequantize_4bit(ours, our_state), F.dequantize_4bit(theirs, their_state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
def test_nested(F, quant_type, dtype):
    for shape in ((3, 101), (96, 128), (1000, 1024)):
        x = normal(*shape, dtype=dtype).cuda()
        theirs, their_state = F.quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type=quant_type)
        ours, our_state = gquant.torch.quantize_4bit(x, 64, True, quant_type)
        assert equal(ours, theirs)
        assert equal(our_state.state2.code, their_state.state2.code)
        torch.testing.assert_close(our_state.offset, their_state.offset, rtol=1e-6, atol=0)
        # With their offset, which is a mean in another order, all bytes are theirs.
        absmax = gquant.torch.quantize_4bit(x, 64, False, quant_type)[1].absmax
        codes, nested_absmax = gquant.quantize_blockwise(absmax - their_state.offset, blocksize=256)
        assert equal(codes, their_state.absmax) and equal(nested_absmax, their_state.state2.absmax)
        assert equal(gquant.torch.dequantize_4bit(theirs, their_state), F.dequantize_4bit(theirs, their_state))
        # They read ours.
        read = F.QuantState.from_dict(our_state.as_dict(packed=True), device="cuda")
        assert equal(F.dequantize_4bit(ours, read), gquant.torch.dequantize_4bit(ours, our_state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blockwise(F, dtype):
    for length in LENGTHS:
        x = normal(length, dtype=dtype, seed=length).cuda()
        for blocksize in BLOCKSIZES[1:]:
            theirs, their_state = F.quantize_blockwise(x, blocksize=blocksize)
            ours, absmax = gquant.quantize_blockwise(x, blocksize=blocksize)
            assert equal(ours, theirs) and equal(absmax, their_state.absmax), (length, blocksize)
            want = F.dequantize_blockwise(theirs, their_state)
            assert equal(gquant.dequantize_blockwise(ours, absmax, blocksize=blocksize, dtype=dtype), want), (length, blocksize)


def test_blockwise_with_other_tables(F):
    x = normal(1 << 16).cuda()
    for name, table in {"dynamic_unsigned": F.create_dynamic_map(signed=False), "linear": F.create_linear_map()}.items():
        ours = gquant.codebook(name, like=x)
        assert equal(ours, table)
        theirs, their_state = F.quantize_blockwise(x, code=table.cuda(), blocksize=256)
        codes, absmax = gquant.quantize_blockwise(x, ours, blocksize=256)
        assert equal(codes, theirs) and equal(absmax, their_state.absmax)
        assert equal(gquant.dequantize_blockwise(codes, absmax, ours, blocksize=256), F.dequantize_blockwise(theirs, their_state))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_rows(F, threshold):
    for rows, cols in ((1, 64), (48, 320), (7, 1001), (512, 4096)):
        x = normal(rows, cols).half()
        x[rows // 2, cols // 3] = 8.0
        x[0, cols - 1] = -6.0
        x[-1, :3] = 0
        x = x.cuda()
        # A copy: bitsandbytes may change its argument.
        theirs, their_absmax, columns = F.int8_vectorwise_quant(x.clone(), threshold=threshold)
        codes, absmax, outliers = gquant.quantize_rows_int8(x, threshold)
        assert equal(codes, theirs) and equal(absmax, their_absmax), (rows, cols)
        assert (outliers is None) == (columns is None)
        if outliers is not None:
            assert equal(outliers.nonzero().flatten(), columns)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", TYPES)
def test_their_layer_loads_ours(F, quant_type, nested):
    import bitsandbytes

    layer = gquant.torch.Linear4bit(256, 192, quant_type=quant_type, compress_statistics=nested, device="cuda")
    layer.load_state_dict({"weight": normal(192, 256, dtype=torch.bfloat16).cuda(), "bias": normal(192).cuda()})
    entries = layer.state_dict()
    theirs = bitsandbytes.nn.Linear4bit(256, 192, quant_type=quant_type, compute_dtype=torch.bfloat16)
    parts = {key: part for key, part in entries.items() if key.startswith("weight.")}
    theirs.weight = bitsandbytes.nn.Params4bit.from_prequantized(entries["weight"], parts, device="cuda", module=theirs)
    theirs.bias = torch.nn.Parameter(entries["bias"], requires_grad=False)
    assert equal(F.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state), gquant.torch.dequantize_4bit(layer.weight, layer.quant_state))
    back = theirs.state_dict()
    assert back.keys() == entries.keys()
    for key in entries:
        assert equal(back[key], entries[key]), key
    x = normal(2048, 256, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        assert close(layer(x), theirs(x))

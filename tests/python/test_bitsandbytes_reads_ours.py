"""bitsandbytes accepts our layers, and its values are ours."""

import bitsandbytes.functional as F
import pytest
import torch

import checkpoints
from checkpoints import LAYERS, equal_bits
from program import ok

BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
STORAGES = ["uint8", "int8", "bf16", "f16", "f32"]


def bitsandbytes_is_right(shape, blocksize):
    """Its AVX-512 code finds the absmax by row and column and so the wrong one when blocks run across rows.
    (Rows of odd length take another path, which is right.)"""
    return shape[-1] % blocksize == 0 or shape[-1] % 2 == 1


def decode(packed, absmax, quant_map, blocksize, shape, dtype):
    """Plainly by the definition: code's value times the block's absmax in float32, rounded once."""
    n = shape.numel()
    values = quant_map[checkpoints.codes(packed, n).long()]
    return (values * absmax.repeat_interleave(blocksize)[:n]).to(dtype).reshape(shape)


def absmax_of(state):
    if not state.nested:
        return state.absmax
    scale = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: state.absmax.numel()]
    return state.state2.code[state.absmax.long()] * scale + state.offset


def equal_values(mode, a, b):
    # For FP4's code 8 bitsandbytes gives 0 with AVX-512 and NEON and -0 without them and on CUDA (ours): the
    # sign of a zero can't be compared. Adding 0 makes -0 a 0. NF4 has one zero, whose sign is that of absmax.
    return equal_bits(a + 0, b + 0) if mode == "fp4" else equal_bits(a, b)


def check(mixed, tmp_path, mode, *options, blocksize=64):
    out, plain = tmp_path / "out.safetensors", tmp_path / "plain.safetensors"
    ok("convert", mixed, "-o", out, "--mode", mode, "--block_size", blocksize, *options)
    ok("dequantize", out, "-o", plain)
    source, tensors, ours = checkpoints.load(mixed), checkpoints.load(out), checkpoints.load(plain)
    assert ours.keys() == source.keys()
    compared = 0
    for weight in LAYERS:
        parts, shape = checkpoints.parts(tensors, weight), source[weight].shape
        text = parts[f"quant_state.bitsandbytes__{mode}"]
        state = F.QuantState.from_dict(dict(parts), device="cpu")  # it refuses any key that it doesn't know
        assert (state.quant_type, state.blocksize, state.shape, state.dtype) == (mode, blocksize, shape, source[weight].dtype)
        own = state.as_dict(packed=True)
        assert own.keys() == parts.keys()
        for key, tensor in own.items():
            assert equal_bits(tensor, parts[key]), (weight, key, bytes(text.numpy()))
        want = decode(tensors[weight], absmax_of(state), state.code, blocksize, shape, state.dtype)
        assert equal_values(mode, ours[weight], want), weight
        if bitsandbytes_is_right(shape, blocksize):
            assert equal_values(mode, ours[weight], F.dequantize_4bit(tensors[weight], state)), weight
            compared += 1
    assert compared > 0


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("mode", ["nf4", "fp4"])
def test_blocksizes(mixed, tmp_path, mode, blocksize, nested):
    check(mixed, tmp_path, mode, *["--double_quant"] * nested, blocksize=blocksize)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("mode", ["nf4", "fp4"])
def test_storages(mixed, tmp_path, mode, storage, nested):
    check(mixed, tmp_path, mode, "--quant_storage", storage, *["--double_quant"] * nested)


@pytest.mark.parametrize("name", checkpoints.DTYPES)
def test_dequantize_to_any_dtype(mixed, tmp_path, name):
    out, plain = tmp_path / "out.safetensors", tmp_path / "plain.safetensors"
    ok("convert", mixed, "-o", out)
    ok("dequantize", out, "-o", plain, "--dtype", name)
    tensors, ours = checkpoints.load(out), checkpoints.load(plain)
    for weight in LAYERS:
        state = F.QuantState.from_dict(checkpoints.parts(tensors, weight), device="cpu")
        want = decode(tensors[weight], state.absmax, state.code, 64, state.shape, checkpoints.DTYPES[name])
        assert equal_bits(ours[weight], want), weight


def test_nested_blocks_of_blocks(tmp_path):
    """More than 256 blocks, so that there is more than one nested absmax, the last of a group that is not full."""
    source, out, plain = (tmp_path / f"{n}.safetensors" for n in ("in", "out", "plain"))
    weight = torch.randn(300, 320, generator=torch.Generator().manual_seed(5)).bfloat16()
    checkpoints.save({"a.weight": weight}, source)
    ok("convert", source, "-o", out, "--double_quant")
    ok("dequantize", out, "-o", plain)
    tensors = checkpoints.load(out)
    assert tensors["a.weight.nested_absmax"].shape == (6,)
    state = F.QuantState.from_dict(checkpoints.parts(tensors, "a.weight"), device="cpu")
    assert equal_bits(checkpoints.load(plain)["a.weight"], F.dequantize_4bit(tensors["a.weight"], state))
    # The statistics' own error is small against that of four bits.
    exact = weight.float().reshape(-1, 64).abs().amax(dim=1)
    assert (absmax_of(state) - exact).abs().max() < 0.01 * exact.max()

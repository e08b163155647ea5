"""The recorded bytes of bitsandbytes' CUDA backend, on the device."""

import re

import pytest
import torch

import gquant
import gquant.torch
from gquant.torch.state import arguments
from support import check_linear, vectors
from weights import DTYPES, equal, normal


def check4(x, quant_type, blocksize, tensors, prefix):
    packed, state = gquant.torch.quantize_4bit(x.cuda(), blocksize, quant_type=quant_type)
    assert packed.is_cuda and state.absmax.is_cuda and state.code.is_cuda
    assert equal(packed.flatten(), tensors[f"{prefix}.packed"].flatten()), prefix
    assert equal(state.absmax, tensors[f"{prefix}.absmax"]), prefix
    assert equal(state.code, gquant.codebook(quant_type, like=x)), prefix
    if f"{prefix}.dequant" in tensors:
        want = tensors[f"{prefix}.dequant"]
        assert equal(gquant.torch.dequantize_4bit(packed, state).reshape(want.shape), want), prefix


@pytest.mark.parametrize("file", ["blockwise4", "tails4"])
def test_4bit(file):
    tensors = vectors(file)
    found = 0
    for name in tensors:
        if m := re.fullmatch(r"(.+)\.(nf4|fp4)\.(\d+)\.packed", name):
            check4(tensors[f"{m[1]}.input"], m[2], int(m[3]), tensors, name.removesuffix(".packed"))
            found += 1
    assert found >= 36


@pytest.mark.parametrize("file", ["special4", "thresholds4"])
def test_4bit_special_values(file):
    tensors = vectors(file)
    found = 0
    for name in tensors:
        if name.endswith(".packed"):
            prefix = name.removesuffix(".packed")
            quant_type = "nf4" if "nf4" in prefix else "fp4"
            source = f"{prefix}.input" if f"{prefix}.input" in tensors else f"{prefix.removesuffix('.' + quant_type)}.input"
            check4(tensors[source], quant_type, 64, tensors, prefix)
            found += 1
    assert found >= 2


def test_codebooks():
    tensors = vectors("thresholds4")
    for name in ("nf4", "fp4", "dynamic"):
        table = gquant.codebook(name, like=torch.empty(0, device="cuda"))
        assert table.is_cuda and equal(table, tensors[f"{name}.code"])


def test_8bit():
    tensors = vectors("nested8")
    found = 0
    for name in tensors:
        if m := re.fullmatch(r"(b8\.\w+\.(\d+))\.input", name):
            codes, absmax = gquant.quantize_blockwise(tensors[name].cuda(), blocksize=int(m[2]))
            assert equal(codes, tensors[f"{m[1]}.codes"])
            assert equal(absmax, tensors[f"{m[1]}.absmax"])
            want = tensors[f"{m[1]}.dequant"]
            assert equal(gquant.dequantize_blockwise(codes, absmax, blocksize=int(m[2]), dtype=want.dtype), want)
            found += 1
    assert found == 9


def test_nested():
    """The offset, a mean, is compared closely; what depends on it is decoded from the recorded parts."""
    tensors = vectors("nested8")
    found = 0
    for name in tensors:
        if m := re.fullmatch(r"(nested\.\w+\.(nf4|fp4))\.input", name):
            packed, state = gquant.torch.quantize_4bit(tensors[name].cuda(), 64, True, m[2])
            assert equal(packed.flatten(), tensors[f"{m[1]}.packed"])
            assert state.offset.item() == pytest.approx(tensors[f"{m[1]}.offset"].item(), rel=1e-5)
            state.absmax, state.state2.absmax = tensors[f"{m[1]}.absmax_u8"].cuda(), tensors[f"{m[1]}.nested_absmax"].cuda()
            state.offset = tensors[f"{m[1]}.offset"].cuda().reshape(())
            assert equal(gquant.torch.dequantize_4bit(packed, state), tensors[f"{m[1]}.dequant"])
            # Given the offset, the nested statistics are the recorded ones.
            shifted = tensors[f"{m[1]}.absmax_f32"].cuda() - state.offset
            codes, nested_absmax = gquant.quantize_blockwise(shifted, blocksize=256)
            assert equal(codes, state.absmax) and equal(nested_absmax, state.state2.absmax)
            found += 1
    assert found == 6


def test_int8_rows():
    tensors = vectors("int8")
    for threshold in ("0.0", "6.0"):
        prefix = f"row.{threshold}"
        codes, absmax, outliers = gquant.quantize_rows_int8(tensors[f"{prefix}.input"].cuda(), float(threshold))
        assert equal(codes, tensors[f"{prefix}.codes"])
        assert equal(absmax, tensors[f"{prefix}.stats"])
        found = torch.empty(0, dtype=torch.int64) if outliers is None else outliers.nonzero().flatten()
        assert equal(found, tensors[f"{prefix}.outlier_cols"])


def case_names():
    return sorted(name.removesuffix(".reference") for name in vectors("modules") if name.endswith(".reference"))


@pytest.mark.parametrize("case", case_names())
def test_modules(case, modules):
    entries = dict(modules[case])
    reference = entries.pop("reference").cuda()
    layer = gquant.torch.Linear4bit(128, 96, bias="bias" in entries, device="cuda")
    if "bias" in entries:
        layer.bias.data = layer.bias.data.to(entries["bias"].dtype)
    assert layer.load_state_dict(entries) == ([], [])
    assert layer.weight.is_cuda and layer.quant_state.absmax.is_cuda
    assert equal(gquant.torch.dequantize_4bit(layer.weight, layer.quant_state), reference)
    for dtype in DTYPES:
        x = normal(5, 128, dtype=dtype).cuda()
        with torch.no_grad():
            check_linear(layer(x), x, layer.bias, arguments(layer.weight, layer.quant_state))
    saved = layer.state_dict()
    assert saved.keys() == entries.keys()
    for key in entries:
        assert equal(saved[key], entries[key]), key

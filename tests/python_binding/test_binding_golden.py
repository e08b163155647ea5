"""The recorded bytes of bitsandbytes' CUDA backend, through Python."""

import re

import pytest
import torch

import gquant
from support import same, vectors


def check4(x, quant_type, blocksize, tensors, prefix):
    state = gquant.quantize(x, quant_type, blocksize=blocksize)
    assert same(state.packed.reshape(-1), tensors[f"{prefix}.packed"].reshape(-1)), prefix
    assert same(state.absmax, tensors[f"{prefix}.absmax"]), prefix
    if f"{prefix}.dequant" in tensors:
        want = tensors[f"{prefix}.dequant"]
        assert same(state.dequantize(want.dtype).reshape(want.shape), want), prefix


@pytest.mark.parametrize("file", ["blockwise4", "tails4"])
def test_4bit(file):
    tensors = vectors(file)
    found = 0
    for name in tensors:
        if m := re.fullmatch(r"(.+)\.(nf4|fp4)\.(\d+)\.packed", name):
            check4(tensors[f"{m[1]}.input"], m[2], int(m[3]), tensors, name.removesuffix(".packed"))
            found += 1
    assert found > 0


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
    assert found > 0


def test_codebooks():
    tensors = vectors("thresholds4")
    for name in ("nf4", "fp4", "dynamic"):
        assert same(gquant.codebook(name, like=torch.empty(0)), tensors[f"{name}.code"])


def test_8bit():
    tensors = vectors("nested8")
    found = 0
    for name in tensors:
        if m := re.fullmatch(r"(b8\.\w+\.(\d+))\.input", name):
            codes, absmax = gquant.quantize_blockwise(tensors[name], blocksize=int(m[2]))
            assert same(codes, tensors[f"{m[1]}.codes"])
            assert same(absmax, tensors[f"{m[1]}.absmax"])
            want = tensors[f"{m[1]}.dequant"]
            assert same(gquant.dequantize_blockwise(codes, absmax, blocksize=int(m[2]), dtype=want.dtype), want)
            found += 1
    assert found > 0


def test_nested():
    """The offset, a mean, is compared closely; what depends on it is decoded from the recorded parts."""
    tensors = vectors("nested8")
    found = 0
    for name in tensors:
        if m := re.fullmatch(r"(nested\.\w+\.(nf4|fp4))\.input", name):
            state = gquant.quantize(tensors[name], m[2], nested=True)
            assert same(state.packed, tensors[f"{m[1]}.packed"])
            assert state.offset == pytest.approx(tensors[f"{m[1]}.offset"].item(), rel=1e-5)
            state.absmax, state.nested_absmax = tensors[f"{m[1]}.absmax_u8"], tensors[f"{m[1]}.nested_absmax"]
            state.offset = tensors[f"{m[1]}.offset"].item()
            assert same(state.dequantize(), tensors[f"{m[1]}.dequant"])
            found += 1
    assert found > 0


def test_int8_rows():
    tensors = vectors("int8")
    found = 0
    for name in tensors:
        if m := re.fullmatch(r"(row\.(\d+\.\d+))\.input", name):
            codes, absmax, outliers = gquant.quantize_rows_int8(tensors[name], float(m[2]))
            assert same(codes, tensors[f"{m[1]}.codes"])
            assert same(absmax, tensors[f"{m[1]}.stats"])
            columns = torch.empty(0, dtype=torch.int64) if outliers is None else outliers.nonzero().flatten()
            assert same(columns, tensors[f"{m[1]}.outlier_cols"])
            found += 1
    assert found > 0

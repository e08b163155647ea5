"""Our codes and bitsandbytes', made from the same weights.

We match its CUDA backend, and the golden files in tests/vectors prove it. Its CPU backend, which runs here, agrees
with CUDA on NF4 for full blocks that hold no NaN and not only zeros: for 16-bit weights always, for float32 up to
the last bit of some thresholds. FP4 on its CPU has other thresholds (midpoints), breaks ties of negative values the
other way, and swaps the two zeros.
"""

import bitsandbytes.functional as F
import pytest
import torch

import checkpoints
from program import ok

SHAPE = (1024, 2048)
FP4_RANK = torch.tensor([0, 1, 6, 7, 4, 5, 2, 3]).argsort()  # place of a magnitude's code in order of size


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    g = torch.Generator().manual_seed(7)
    tensors = {f"{name}.weight": torch.randn(SHAPE, generator=g).to(dtype) for name, dtype in checkpoints.DTYPES.items()}
    return checkpoints.save(tensors, tmp_path_factory.mktemp("weights") / "in.safetensors"), tensors


def both(weights, tmp_path, mode, blocksize):
    """Per layer: its name, our codes and absmax, bitsandbytes' codes and absmax."""
    path, tensors = weights
    out = tmp_path / "out.safetensors"
    ok("convert", path, "-o", out, "--mode", mode, "--block_size", blocksize)
    ours = checkpoints.load(out)
    for name, tensor in tensors.items():
        packed, state = F.quantize_4bit(tensor, blocksize=blocksize, quant_type=mode)
        n = tensor.numel()
        yield name, checkpoints.codes(ours[name], n), ours[f"{name}.absmax"], checkpoints.codes(packed, n), state.absmax


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_nf4(weights, tmp_path, blocksize):
    for name, ours, our_absmax, theirs, their_absmax in both(weights, tmp_path, "nf4", blocksize):
        assert checkpoints.equal_bits(our_absmax, their_absmax), name
        differing = int((ours != theirs).sum())
        allowed = 1e-6 * ours.numel() if name == "f32.weight" else 0
        assert differing <= allowed, f"{name}: {differing} of {ours.numel()} codes differ"


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_fp4_up_to_ties_and_zeros(weights, tmp_path, blocksize):
    for name, ours, our_absmax, theirs, their_absmax in both(weights, tmp_path, "fp4", blocksize):
        assert checkpoints.equal_bits(our_absmax, their_absmax), name
        # Zeros apart, a code that differs is the neighbour with the same sign.
        a, b = FP4_RANK[(ours & 7).long()], FP4_RANK[(theirs & 7).long()]
        differing = (a != b) | ((ours ^ theirs) & 8).bool() & (a + b > 0)
        assert (a - b).abs().max() <= 1, name
        assert not (differing & ((ours ^ theirs) & 8).bool() & (a > 0) & (b > 0)).any(), name
        share = differing.float().mean().item()
        assert share < (1e-5 if name == "f32.weight" else 2e-3), f"{name}: {share:.2%} of the codes differ"

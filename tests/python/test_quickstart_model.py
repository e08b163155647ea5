"""A real model, all-MiniLM-L6-v2, compared tensor by tensor with bitsandbytes."""

import bitsandbytes.functional as F
import pytest

import checkpoints
from checkpoints import equal_bits
from program import ROOT, ok, ok_json

MODEL = ROOT / "build" / "quickstart" / "model.safetensors"

pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="the model is not there: make quickstart fetches it")


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_like_bitsandbytes(tmp_path, nested, record_property):
    out, plain = tmp_path / "out.safetensors", tmp_path / "plain.safetensors"
    report = ok_json("convert", MODEL, "-o", out, *["--double_quant"] * nested)
    ok("dequantize", out, "-o", plain)
    source, got, ours = checkpoints.load(MODEL), checkpoints.load(out), checkpoints.load(plain)
    layers = {name.partition(".quant_state.")[0] for name in got if ".quant_state." in name}
    assert len(layers) == report["quantized"] == 37  # 6 blocks of 6 linear layers, and the pooler
    assert ours.keys() == source.keys()
    differing = total = 0
    for name, tensor in source.items():
        if name not in layers:
            assert equal_bits(got[name], tensor), name
            continue
        packed, state = F.quantize_4bit(tensor, quant_type="nf4", compress_statistics=False)
        n = tensor.numel()
        differing += int((checkpoints.codes(got[name], n) != checkpoints.codes(packed, n)).sum())
        total += n
        own = F.QuantState.from_dict(checkpoints.parts(got, name), device="cpu")
        assert own.nested is nested
        assert nested or equal_bits(own.absmax, state.absmax), name
        assert equal_bits(ours[name], F.dequantize_4bit(got[name], own)), name
    record_property("differing codes", f"{differing} of {total}")
    # Its CPU code rounds some float32 thresholds otherwise than its CUDA code, which we follow.
    assert differing <= 1e-6 * total, f"{differing} of {total} codes differ"


def test_error_of_each_layer(tmp_path):
    out = tmp_path / "out.safetensors"
    ok("convert", MODEL, "-o", out, "--double_quant")
    diff = ok_json("diff", MODEL, out)
    changed = [t for t in diff["tensors"] if not t["equal"]]
    assert len(changed) == 37 and diff["only_a"] == diff["only_b"] == []
    for t in changed:
        # NF4 in blocks of 64 of normally distributed weights has 20.7 dB.
        assert 18 < t["snr_db"] < 24, t
        assert t["cosine"] > 0.99 and t["nonfinite"] == 0, t

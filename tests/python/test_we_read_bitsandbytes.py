"""State dicts of the real modules are opened by us, and we give bitsandbytes' values."""

import bitsandbytes as bnb
import bitsandbytes.functional as F
import pytest
import torch

import checkpoints
from checkpoints import equal_bits
from program import gquant, ok, ok_json

STORAGES = {"uint8": torch.uint8, "bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def linear4bit(mode, nested, storage, dtype, blocksize=64, shape=(96, 128)):
    """A quantized module. Made on the CPU: its 8-bit statistics are not CUDA's, but they are as good to read."""
    module = bnb.nn.Linear4bit(
        shape[1], shape[0], compute_dtype=dtype, quant_type=mode, compress_statistics=nested, quant_storage=STORAGES[storage]
    ).to(dtype)
    if blocksize != 64:  # Linear4bit has no argument for it
        module.weight = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, blocksize=blocksize, compress_statistics=nested,
            quant_type=mode, quant_storage=STORAGES[storage], module=module,
        )  # fmt: skip
    return module.to("cpu")


def check(model, tmp_path, mode):
    """Opens a model's saved state dict and compares the values of its layers."""
    path, plain = tmp_path / "model.safetensors", tmp_path / "plain.safetensors"
    checkpoints.save({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    found = {layer["name"]: layer for layer in ok_json("inspect", path)["layers"]}
    assert ok_json("verify", path)["problems"] == []
    ok("dequantize", path, "-o", plain)
    got = checkpoints.load(plain)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert sorted(found) == sorted(f"{name}.weight" for name in modules)
    assert sorted(got) == sorted(name for module in modules for name in (f"{module}.weight", f"{module}.bias"))
    for name, module in modules.items():
        state, layer = module.weight.quant_state, found[f"{name}.weight"]
        assert (layer["format"], layer["convention"]) == (mode, "bitsandbytes")
        assert (layer["blocksize"], layer["nested"], tuple(layer["shape"])) == (state.blocksize, state.nested, state.shape)
        want = F.dequantize_4bit(module.weight.data, state)
        ours = got[f"{name}.weight"]
        # The sign of FP4's zero depends on bitsandbytes' CPU build; see test_bitsandbytes_reads_ours.
        assert equal_bits(ours + 0, want + 0) if mode == "fp4" else equal_bits(ours, want), name
        assert equal_bits(got[f"{name}.bias"], module.bias.data), name


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("mode", ["nf4", "fp4"])
def test_linear4bit(tmp_path, mode, storage, nested):
    torch.manual_seed(11)
    check(torch.nn.ModuleDict({name: linear4bit(mode, nested, storage, d) for name, d in checkpoints.DTYPES.items()}), tmp_path, mode)


@pytest.mark.parametrize("blocksize", [32, 128, 256, 512, 1024, 2048, 4096])
def test_linear4bit_blocksizes(tmp_path, blocksize):
    torch.manual_seed(12)
    layers = {f"block.{nested}": linear4bit("nf4", nested, "uint8", torch.bfloat16, blocksize, (8, 4096)) for nested in (False, True)}
    model = torch.nn.Sequential(*layers.values())
    check(model, tmp_path, "nf4")


def test_linear8bit(tmp_path):
    torch.manual_seed(13)
    module = bnb.nn.Linear8bitLt(128, 96, has_fp16_weights=False).to("cpu")
    state = {f"a.{k}": v.contiguous() for k, v in module.state_dict().items()}
    assert sorted(state) == ["a.SCB", "a.bias", "a.weight", "a.weight_format"]
    path, plain = tmp_path / "model.safetensors", tmp_path / "plain.safetensors"
    checkpoints.save(state, path)
    (layer,) = ok_json("inspect", path)["layers"]
    assert (layer["name"], layer["format"], layer["shape"]) == ("a.weight", "int8", [96, 128])
    assert ok_json("verify", path)["problems"] == []
    want = F.int8_vectorwise_dequant(state["a.weight"], state["a.SCB"])
    for name, dtype in checkpoints.DTYPES.items():
        ok("dequantize", path, "-o", plain, "--dtype", name, "--force")
        got = checkpoints.load(plain)
        assert sorted(got) == ["a.bias", "a.weight"]
        assert equal_bits(got["a.weight"], want.to(dtype)), name


def test_golden_modules(vectors, tmp_path):
    """Modules that were quantized on CUDA, with what CUDA dequantizes them to."""
    path, plain = vectors / "bitsandbytes" / "modules.safetensors", tmp_path / "plain.safetensors"
    golden = checkpoints.load(path)
    ok("dequantize", path, "-o", plain)
    got = checkpoints.load(plain)
    cases = [name.removesuffix(".reference") for name in golden if name.endswith(".reference")]
    assert len(cases) == 36
    for case in cases:
        assert equal_bits(got[f"{case}.weight"], golden[f"{case}.reference"]), case
    want = F.int8_vectorwise_dequant(golden["int8.weight"], golden["int8.SCB"]).half()
    assert equal_bits(got["int8.weight"], want)


def variant(name):
    """How other tools write the same layer: name → its tensors, all standing for the same weight "a.weight"."""
    torch.manual_seed(14)
    module = linear4bit("nf4", "nested" in name, "uint8", torch.bfloat16)
    t = {f"a.{k}": v for k, v in module.state_dict().items() if k != "bias"}
    want = F.dequantize_4bit(module.weight.data, module.weight.quant_state)
    if name == "row of bytes":
        t["a.weight"] = t["a.weight"].reshape(1, -1)
    elif name == "no quant_map":
        del t["a.weight.quant_map"]
    elif name == "no nested_quant_map":
        del t["a.weight.nested_quant_map"]
    elif name in ("gptqmodel", "gptqmodel nested"):
        t = {k.replace("a.weight.quant_state.bitsandbytes__nf4", "a.weight_quant_state").replace("weight.", "weight_"): v for k, v in t.items()}
    elif name == "prefix":
        t = {f"model.diffusion_model.{k}": v for k, v in t.items()}
    return {k: v.contiguous() for k, v in t.items()}, want


@pytest.mark.parametrize("name", ["row of bytes", "no quant_map", "no nested_quant_map", "gptqmodel", "gptqmodel nested", "prefix"])
def test_variants(tmp_path, name):
    tensors, want = variant(name)
    path, plain = checkpoints.save(tensors, tmp_path / "model.safetensors"), tmp_path / "plain.safetensors"
    ok("dequantize", path, "-o", plain)
    ((weight, got),) = checkpoints.load(plain).items()
    assert weight == ("model.diffusion_model.a.weight" if name == "prefix" else "a.weight")
    assert equal_bits(got, want)


def test_quantized_layers_are_not_quantized_again(tmp_path):
    torch.manual_seed(15)
    module = linear4bit("nf4", True, "uint8", torch.bfloat16)
    tensors = {f"a.{k}": v.contiguous() for k, v in module.state_dict().items()}
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    checkpoints.save(tensors, path)
    p = gquant("convert", path, "-o", out)
    assert p.returncode == 1 and "nothing to quantize" in p.stderr and "already nf4" in p.stderr
    checkpoints.save(tensors | {"b.weight": torch.randn(96, 128)}, path)
    ok("convert", path, "-o", out, "--mode", "fp4")
    got = checkpoints.load(out)
    assert all(equal_bits(got[k], v) for k, v in tensors.items())
    assert "b.weight.quant_state.bitsandbytes__fp4" in got

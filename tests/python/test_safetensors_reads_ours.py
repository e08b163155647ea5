"""What we write is opened by the safetensors package and holds what the documentation says."""

import json

import pytest
import torch

import checkpoints
from checkpoints import LAYERS, equal_bits
from program import ok, ok_json

STORAGES = {"uint8": torch.uint8, "int8": torch.int8, "bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def expected_layer(weight, shape, mode, blocksize, nested, storage, convention):
    """Name → dtype and shape of the tensors of a layer; a text's length, which is not fixed, is None."""
    n = shape.numel()
    packed, blocks = (n + 1) // 2, -(-n // blocksize)
    want = {
        weight: (storage, (-(-packed // storage.itemsize), 1)),
        f"{weight}.absmax": (torch.uint8 if nested else torch.float32, (blocks,)),
        f"{weight}.quant_map": (torch.float32, (16,)),
        f"{weight}.quant_state.bitsandbytes__{mode}": (torch.uint8, None),
    }
    if nested:
        want[f"{weight}.nested_absmax"] = (torch.float32, (-(-blocks // 256),))
        want[f"{weight}.nested_quant_map"] = (torch.float32, (256,))
    if convention == "comfy":
        want[f"{weight.removesuffix('.weight')}.comfy_quant"] = (torch.uint8, None)
    return want


@pytest.mark.parametrize("convention", ["bitsandbytes", "comfy"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("mode", ["nf4", "fp4"])
def test_every_tensor_is_there_and_no_other(mixed, tmp_path, mode, storage, nested, convention):
    out = tmp_path / "out.safetensors"
    ok("convert", mixed, "-o", out, "--mode", mode, "--quant_storage", storage, "--convention", convention, *["--double_quant"] * nested)
    source, got = checkpoints.load(mixed), checkpoints.load(out)
    want = {}
    for name, tensor in source.items():
        if name in LAYERS:
            want |= expected_layer(name, tensor.shape, mode, 64, nested, STORAGES[storage], convention)
        else:
            want[name] = (tensor.dtype, tuple(tensor.shape))
            assert equal_bits(got[name], tensor), name
    assert got.keys() == want.keys()
    for name, (dtype, shape) in want.items():
        assert got[name].dtype == dtype, name
        assert shape is None or tuple(got[name].shape) == shape, name


def test_data_start_at_a_page(mixed, tmp_path):
    out = tmp_path / "out.safetensors"
    ok("convert", mixed, "-o", out)
    assert checkpoints.header(out)[1] % 4096 == 0


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_comfyui_metadata(mixed, tmp_path, nested):
    plain, comfy = tmp_path / "plain.safetensors", tmp_path / "comfy.safetensors"
    options = ["--double_quant"] * nested
    ok("convert", mixed, "-o", plain, *options)
    ok("convert", mixed, "-o", comfy, "--convention", "comfy", *options)
    document = json.loads(checkpoints.metadata(comfy)["_quantization_metadata"])
    assert document == json.loads(checkpoints.metadata(plain)["_quantization_metadata"])
    assert document["format_version"] == "1.0"
    source, tensors = checkpoints.load(mixed), checkpoints.load(comfy)
    assert sorted(document["layers"]) == sorted(name.removesuffix(".weight") for name in LAYERS)
    for module, layer in document["layers"].items():
        weight = module + ".weight"
        state = json.loads(bytes(tensors[f"{weight}.quant_state.bitsandbytes__nf4"].numpy()))
        assert layer["format"] == "bnb_nf4" and layer["type"] == "nf4"
        assert layer["block_size"] == 64 and layer["double_quant"] is nested
        assert layer["original_dtype"] == state["dtype"] == str(source[weight].dtype).removeprefix("torch.")
        assert layer["original_shape"] == state["shape"] == list(source[weight].shape)
        assert layer["absmax_shape"] == list(tensors[f"{weight}.absmax"].shape)
        assert layer.get("nested_offset") == state.get("nested_offset")
        assert torch.equal(torch.tensor(layer["quant_map"]), tensors[f"{weight}.quant_map"])
        # ComfyUI prefers the header to the tensor, so that they must say the same.
        assert json.loads(bytes(tensors[f"{module}.comfy_quant"].numpy())) == layer


def test_metadata_of_the_source_is_kept(tmp_path):
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    own = {"format": "pt", "modelspec.title": "Ä title — \"quoted\"", "ss_tag": "{}"}
    checkpoints.save({"a.weight": torch.randn(64, 64)}, source, own)
    ok("convert", source, "-o", out)
    got = checkpoints.metadata(out)
    assert {k: v for k, v in got.items() if k != "_quantization_metadata"} == own


def test_shards(mixed, tmp_path):
    whole, sharded = tmp_path / "whole.safetensors", tmp_path / "sharded.safetensors"
    ok("convert", mixed, "-o", whole)
    report = ok_json("convert", mixed, "-o", sharded, "--max-shard-size", "20KB")
    index = tmp_path / "sharded.safetensors.index.json"
    assert report["outputs"][-1] == str(index) and len(report["outputs"]) > 3
    assert not sharded.exists()
    want, got = checkpoints.load(whole), checkpoints.load(index)
    assert got.keys() == want.keys()
    assert all(equal_bits(got[name], want[name]) for name in want)
    total = sum(t.numel() * t.itemsize for t in got.values())
    assert json.loads(index.read_text())["metadata"]["total_size"] == total
    layers = set()
    for shard in report["outputs"][:-1]:
        layers |= set(json.loads(checkpoints.metadata(shard).get("_quantization_metadata", '{"layers": {}}'))["layers"])
    assert layers == {name.removesuffix(".weight") for name in LAYERS}


def test_sharded_input(mixed, tmp_path):
    tensors = checkpoints.load(mixed)
    folder = tmp_path / "model"
    folder.mkdir()
    weight_map = {}
    for i, name in enumerate(sorted(tensors)):
        weight_map[name] = f"model-{i % 3 + 1:05d}-of-00003.safetensors"
    for shard in set(weight_map.values()):
        checkpoints.save({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    whole = tmp_path / "whole.safetensors"
    ok("convert", mixed, "-o", whole)
    want = checkpoints.load(whole)
    for source in (folder, index):
        out = tmp_path / f"from_{source.name}.safetensors"
        ok("convert", source, "-o", out)
        got = checkpoints.load(out)
        assert got.keys() == want.keys()
        assert all(equal_bits(got[name], want[name]) for name in want)

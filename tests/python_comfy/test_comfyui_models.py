"""Diffusion models in ComfyUI: what a 4-bit file computes is what its decoded weights compute, bit for bit."""

import comfyui  # isort: skip
import json
import time

import comfy.sd
import comfy.utils
import pytest
import tiny_models
import torch
from comfyui import models, packed, sample  # noqa: F401: a fixture
from safetensors.torch import load_file, save_file
from support import same

import gquant
from gquant.comfy import build, files, loaders
from gquant.comfy.quantize import quantize_model
from gquant.comfy.save import save_model

VARIANTS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


@pytest.mark.parametrize(("mode", "nested"), VARIANTS)
def test_flux_computes_what_its_decoded_weights_do(models, mode, nested):
    model = loaders.load_model(models.quantized("flux", mode, nested))
    want = sample(comfy.sd.load_diffusion_model(models.decoded("flux", mode, nested)))
    assert want.isfinite().all() and want.std() > 0.5
    assert torch.equal(sample(model), want)
    weights = packed(model.model)
    with gquant.open(models.quantized("flux", mode, nested)) as file:
        assert len(weights) == len(file.layers)
    # Still packed after it ran, in the memory that was promised.
    params = sum(weight.numel() for weight in weights.values())
    size = sum(sum(t.nbytes for t in weight.layout_cls.get_plain_tensors(weight)) for weight in weights.values())
    assert size / params <= (0.53 if nested else 0.57)


def test_wan_computes_what_its_decoded_weights_do(models):
    model = loaders.load_model(models.quantized("wan", "nf4", True))
    want = sample(comfy.sd.load_diffusion_model(models.decoded("wan", "nf4", True)))
    assert want.isfinite().all() and want.std() > 0.5
    assert torch.equal(sample(model), want)


def test_quantizing_keeps_the_picture(models):
    a, b = sample(loaders.load_model(models.quantized("flux"))), sample(comfy.sd.load_diffusion_model(models.source("flux")))
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.95


def test_weights_are_views_of_the_file(models, monkeypatch):
    given = {}
    read = comfy.utils.load_torch_file

    def load_torch_file(*args, **options):
        given.update(sd := read(*args, **options))
        return sd

    monkeypatch.setattr(comfy.utils, "load_torch_file", load_torch_file)
    model = loaders.load_model(models.quantized("flux"))
    weights = packed(model.model.diffusion_model)
    sample(model)  # with the weights where they are
    assert weights and all(weight is packed(model.model.diffusion_model)[name] for name, weight in weights.items())
    for name, weight in weights.items():
        assert weight._qdata.data_ptr() == given[name].data_ptr()
        assert weight._params.scale.data_ptr() == given[name + ".absmax"].data_ptr()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("names", ["comfyui", "diffusers"])
def test_what_is_read_straight_to_a_device_is_the_same(models, monkeypatch, tmp_path, names, nested):
    """Without bitsandbytes' keys in between, and while the model is built: weights that come late are in it. Here the device is the CPU."""
    path = models.quantized("flux", "nf4", nested) if names == "comfyui" else diffusers_file(tmp_path, nested, 64)[0]
    want, reader, late = loaders.load_model(path), gquant.model.Model._reader, []

    def delayed(self, tensors, layers, *given, **options):
        read = reader(self, tensors, layers, *given, **options)

        def late_read():
            time.sleep(1)
            late.append(len(layers))
            read()

        if not any("packed" in parts for parts in layers.values()):
            return read
        for parts in layers.values():
            for part in parts.values():
                part.fill_(0x5A)
        return late_read

    monkeypatch.setattr(gquant.model.Model, "_reader", delayed)
    monkeypatch.setattr(build, "reads_straight", lambda device: device == "gpu")
    monkeypatch.setattr(comfy.utils, "load_torch_file", None)
    got = loaders.load_model(path, device="gpu")
    ours, theirs = got.model.state_dict(), want.model.state_dict()
    assert late and late[0] >= len(packed(want.model))
    assert ours.keys() == theirs.keys() and packed(got.model).keys() == packed(want.model).keys()
    assert all(same(ours[name], tensor) for name, tensor in theirs.items())
    assert torch.equal(sample(got), sample(want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtype_is_what_weights_decode_to(models, dtype):
    model = loaders.load_model(models.quantized("flux"), dtype)
    assert {weight.dtype for weight in packed(model.model).values()} == {dtype}
    assert model.model.get_dtype_inference() == dtype
    assert sample(model).isfinite().all()


def test_prefixes_of_checkpoints_are_cut_off(models, tmp_path):
    tensors = load_file(models.quantized("flux"))
    save_file({f"model.diffusion_model.{name}": t for name, t in tensors.items()}, tmp_path / "prefixed.safetensors")
    want = sample(loaders.load_model(models.quantized("flux")))
    assert torch.equal(sample(loaders.load_model(str(tmp_path / "prefixed.safetensors"))), want)


def test_comfy_convention(models):
    want = sample(loaders.load_model(models.quantized("flux")))
    assert torch.equal(sample(loaders.load_model(models.quantized("flux", convention="comfy"))), want)


def test_layers_in_formats_of_comfyui(models, tmp_path):
    """Beside 4-bit layers a file may have others that ComfyUI's header describes."""
    tensors, name = load_file(models.source("flux")), "double_blocks.0.img_mlp.0"
    scale = tensors[f"{name}.weight"].abs().max().float() / 448
    tensors[f"{name}.weight"] = (tensors[f"{name}.weight"].float() / scale).to(torch.float8_e4m3fn)
    tensors[f"{name}.weight_scale"] = scale
    described = {"format_version": "1.0", "layers": {name: {"format": "float8_e4m3fn"}}}
    save_file(tensors, tmp_path / "fp8.safetensors", {"_quantization_metadata": json.dumps(described)})
    gquant.convert(tmp_path / "fp8.safetensors", tmp_path / "mixed.safetensors", progress=False)
    model = loaders.load_model(str(tmp_path / "mixed.safetensors"))
    weight = model.model.diffusion_model.get_submodule(name).weight
    assert weight._layout_cls == "TensorCoreFP8E4M3Layout" and len(packed(model.model)) == 33
    source = sample(comfy.sd.load_diffusion_model(models.source("flux")))
    assert torch.nn.functional.cosine_similarity(sample(model).flatten(), source.flatten(), dim=0) > 0.95


def test_bytes_of_bitsandbytes_with_other_storage(models):
    want = sample(loaders.load_model(models.quantized("flux")))
    assert torch.equal(sample(loaders.load_model(models.quantized("flux", quant_storage="bf16"))), want)


def test_names_of_gptqmodel(models, tmp_path):
    tensors = {name.replace(".weight.quant_state.bitsandbytes__nf4", ".weight_quant_state"): t for name, t in load_file(models.quantized("flux")).items()}
    tensors = {name.replace(".weight.", ".weight_"): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "gptqmodel.safetensors")
    want = sample(loaders.load_model(models.quantized("flux")))
    assert torch.equal(sample(loaders.load_model(str(tmp_path / "gptqmodel.safetensors"))), want)


def test_int8_weights_are_decoded(models, tmp_path, caplog):
    tensors = load_file(models.source("flux"))
    for name in [name for name in tensors if "mlp" in name and name.endswith(".weight")]:
        module = name.removesuffix("weight")
        tensors[name], tensors[f"{module}SCB"], _ = gquant.quantize_rows_int8(tensors[name])
        tensors[f"{module}weight_format"] = torch.zeros((), dtype=torch.uint8)
    save_file(tensors, tmp_path / "int8.safetensors")
    gquant.dequantize_model(tmp_path / "int8.safetensors", tmp_path / "f16.safetensors", dtype="f16", progress=False)
    want = sample(comfy.sd.load_diffusion_model(str(tmp_path / "f16.safetensors")))
    assert torch.equal(sample(loaders.load_model(str(tmp_path / "int8.safetensors"))), want)
    assert "LLM.int8 weights were decoded" in caplog.text


def diffusers_file(folder, nested, blocksize, hidden=256):
    """A tiny Flux with diffusers' names in 4 bits, and what ComfyUI makes of its decoded weights."""
    model = tiny_models.flux(hidden=hidden)
    key_map = comfy.utils.flux_to_diffusers({"depth": 2, "depth_single_blocks": 2, "hidden_size": hidden})
    save_file(tiny_models.diffusers(model, key_map), folder / "bf16.safetensors")
    gquant.convert(folder / "bf16.safetensors", folder / "nf4.safetensors", "nf4", double_quant=nested, block_size=blocksize, progress=False)
    gquant.dequantize_model(folder / "nf4.safetensors", folder / "decoded.safetensors", dtype="f32", progress=False)
    return str(folder / "nf4.safetensors"), comfy.sd.load_diffusion_model(str(folder / "decoded.safetensors"))


@pytest.mark.parametrize("blocksize", [64, 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_diffusers_names_are_joined_without_loss(tmp_path, caplog, nested, blocksize):
    path, want = diffusers_file(tmp_path, nested, blocksize)
    model = loaders.load_model(path)
    weights = packed(model.model.diffusion_model)
    dense = want.model.diffusion_model.state_dict()
    assert "double_blocks.0.img_attn.qkv.weight" in weights and "single_blocks.1.linear1.weight" in weights
    assert all(same(weight.dequantize(), dense[name]) for name, weight in weights.items())
    assert torch.equal(sample(model), sample(want))
    assert not [record for record in caplog.records if record.message.startswith("gquant")]


def test_model_that_is_saved_is_the_same(models, tmp_path):
    for mode, nested in VARIANTS:
        model = loaders.load_model(models.quantized("flux", mode, nested))
        path = str(tmp_path / f"{mode}{nested}.safetensors")
        assert save_model(path, model) == len(packed(model.model))
        saved, given = load_file(path), load_file(models.quantized("flux", mode, nested))
        for name, weight in given.items():
            if not name.endswith(".bias") and "scale" not in name and weight.dtype is not torch.bfloat16:
                assert same(saved[f"model.diffusion_model.{name}"], weight), name
        assert torch.equal(sample(loaders.load_model(path)), sample(model))
        assert not gquant.verify(path, progress=False)["problems"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{m}{n}.safetensors" for m, n in VARIANTS)


@pytest.mark.parametrize(("mode", "nested"), VARIANTS)
def test_quantized_in_memory_is_quantized_on_disk(models, mode, nested):
    source = comfy.sd.load_diffusion_model(models.source("flux"), {"dtype": torch.bfloat16})
    before = sample(source)
    calls = []
    model = quantize_model(source, mode, nested=nested, progress=lambda *done: calls.append(done))
    converted = packed(loaders.load_model(models.quantized("flux", mode, nested)).model)
    weights = packed(model.model)
    assert weights.keys() == converted.keys()
    for name, weight in weights.items():
        assert same(weight._qdata, converted[name]._qdata) and same(weight._params.scale, converted[name]._params.scale)
    assert calls[0][0] == 0 and calls[-1][0] == calls[-1][1] > len(weights)
    assert torch.equal(sample(model), sample(loaders.load_model(models.quantized("flux", mode, nested))))
    assert torch.equal(sample(source), before)  # which is as it was


def test_quantized_model_keeps_what_was_set(models):
    source = comfy.sd.load_diffusion_model(models.source("flux"))
    source.model_options["transformer_options"]["mark"] = 1
    model = quantize_model(source, exclude=["*mod.lin.weight", "final_layer.*"])
    assert model.model_options["transformer_options"]["mark"] == 1
    weights = packed(model.model.diffusion_model)
    assert "double_blocks.0.img_mod.lin.weight" not in weights and "final_layer.linear.weight" not in weights
    assert "double_blocks.0.img_mlp.0.weight" in weights
    assert model.model_size() < source.model_size()
    again = model.cached_patcher_init[0](*model.cached_patcher_init[1], disable_dynamic=True)
    assert torch.equal(sample(again), sample(model))


def test_lora_is_quantized_with_the_weights(models):
    source = comfy.sd.load_diffusion_model(models.source("flux"))
    name = "double_blocks.0.img_mlp.0.weight"
    generator = torch.Generator().manual_seed(5)
    lora = {
        f"diffusion_model.{name[:-7]}.lora_up.weight": torch.randn(1024, 4, generator=generator) * 0.1,
        f"diffusion_model.{name[:-7]}.lora_down.weight": torch.randn(4, 256, generator=generator) * 0.1,
    }
    patched, _ = comfy.sd.load_lora_for_models(source, None, lora, 1.0, 0.0)
    sample(patched)  # the patch is in the weights that both share
    for given, up in ((patched, 1.0), (source, 0.0)):
        model = quantize_model(given)
        want = source.model.diffusion_model.state_dict()[name].clone()
        assert not model.patches
        product = lora[f"diffusion_model.{name[:-7]}.lora_up.weight"] @ lora[f"diffusion_model.{name[:-7]}.lora_down.weight"]
        weight = packed(model.model.diffusion_model)[name].dequantize()
        best = (want + up * product).bfloat16().float()
        assert (weight - best).norm() / best.norm() < 0.12


def test_second_patchers_are_the_same(models):
    model = loaders.load_model(models.quantized("flux"))
    want = sample(model)
    assert torch.equal(sample(model.clone(disable_dynamic=True)), want)
    assert torch.equal(sample(model.deepclone_multigpu()), want)


def test_weights_that_are_not_of_linear_layers_are_decoded(models, tmp_path):
    """Embeddings and such, if someone quantized them."""
    values = files.weights(load_file(models.quantized("flux")), [])
    weight = values["img_in.weight"]
    weight.state.shape = torch.Size([256, 4, 16])
    sd = build.state_dict({"a.weight": weight})
    assert set(sd) == {"a.weight"} and same(sd["a.weight"], weight.dequantize())

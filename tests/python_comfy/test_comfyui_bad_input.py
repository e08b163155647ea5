"""What is wrong with a file or with ComfyUI is said in one sentence that says what to do."""

import comfyui  # isort: skip
import comfy.model_detection
import comfy.ops
import comfy.sd
import pytest
import tiny_models
import torch
from comfyui import models  # noqa: F401: a fixture
from safetensors.torch import load_file, save_file

import gquant
from gquant.comfy import loaders, probe
from gquant.comfy.quantize import quantize_model
from gquant.comfy.save import save_model

SD = comfy.sd.CLIPType.STABLE_DIFFUSION


def load_clip(path):
    return loaders.load_clip([path], SD)


def test_file_that_is_not_quantized(models):
    for load, name in ((loaders.load_model, "flux"), (loaders.load_checkpoint, "flux"), (load_clip, "clip_l")):
        with pytest.raises(gquant.InvalidArgumentError, match=rf"{name}.safetensors is not quantized.*Quantize4Bit.*gquant convert {name}"):
            load(models.source(name))


def test_wrong_node(models, tmp_path):
    lora = {f"lora_unet_{i}.lora_{part}.weight": torch.randn(64, 64) for i in range(3) for part in ("up", "down")}
    save_file(lora, tmp_path / "lora.safetensors")
    gquant.convert(tmp_path / "lora.safetensors", tmp_path / "lora_nf4.safetensors", progress=False)
    save_file({f"decoder.{i}.weight": torch.randn(64, 64) for i in range(3)}, tmp_path / "vae.safetensors")
    gquant.convert(tmp_path / "vae.safetensors", tmp_path / "vae_nf4.safetensors", progress=False)
    flux, clip = models.quantized("flux"), models.quantized("clip_l")
    for load, path, fits in (
        (loaders.load_model, clip, "Load4BitCLIP"),
        (loaders.load_checkpoint, clip, "Load4BitCLIP"),
        (loaders.load_checkpoint, flux, "Load4BitModel"),
        (load_clip, flux, "Load4BitModel"),
        (load_clip, models.quantized("wan"), "Load4BitModel"),
        (loaders.load_model, str(tmp_path / "lora_nf4.safetensors"), "LoraLoader"),
        (loaders.load_model, str(tmp_path / "vae_nf4.safetensors"), "VAELoader"),
    ):
        with pytest.raises(gquant.GquantError, match=f"{path.rpartition('/')[2]} is no .*{fits}"):
            load(path)


def test_checkpoint_with_diffusion_model_alone(models, tmp_path):
    tensors = {f"model.diffusion_model.{name}": t for name, t in load_file(models.quantized("flux")).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(gquant.InvalidArgumentError, match="no checkpoint.*Load4BitModel"):
        loaders.load_checkpoint(str(tmp_path / "model.safetensors"))


def test_unknown_architecture(tmp_path):
    save_file({f"layer{i}.weight": torch.randn(64, 64) for i in range(3)}, tmp_path / "a.safetensors")
    gquant.convert(tmp_path / "a.safetensors", tmp_path / "unknown.safetensors", progress=False)
    for load in (loaders.load_model, loaders.load_checkpoint, load_clip):
        with pytest.raises(gquant.GquantError, match=r"unknown.safetensors is no .*A newer ComfyUI may know it.*layer0.weight"):
            load(str(tmp_path / "unknown.safetensors"))


@pytest.mark.parametrize("name", ["double_blocks.1.img_mlp.0.weight", "double_blocks.1.img_mlp.0.bias", "single_blocks.0.norm.key_norm.scale"])
def test_missing_tensors(models, tmp_path, name):
    tensors = {key: t for key, t in load_file(models.quantized("flux")).items() if key != name and not key.startswith(name + ".")}
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(gquant.BadFileError, match=f"cut.safetensors lacks 1 tensors .*{name.removesuffix('.scale')}.*whole"):
        loaders.load_model(str(tmp_path / "cut.safetensors"))


def test_missing_tensors_of_an_encoder(models, tmp_path):
    name = "text_model.encoder.layers.1.mlp.fc2.weight"
    tensors = {key: t for key, t in load_file(models.quantized("clip_l")).items() if not key.startswith(name)}
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(gquant.BadFileError, match=f"lacks 1 tensors .*{name}"):
        loaders.load_clip([str(tmp_path / "cut.safetensors")], SD, options={"model_config": dict(tiny_models.CLIP_L)})


def test_missing_part_of_a_joined_weight(models, tmp_path):
    key_map = comfy.utils.flux_to_diffusers({"depth": 2, "depth_single_blocks": 2, "hidden_size": 256})
    sd = tiny_models.diffusers(tiny_models.flux(), key_map)
    del sd["transformer_blocks.0.attn.to_k.weight"]
    save_file(sd, tmp_path / "a.safetensors")
    gquant.convert(tmp_path / "a.safetensors", tmp_path / "cut.safetensors", progress=False)
    with pytest.raises(gquant.BadFileError, match="img_attn.qkv.weight"):
        loaders.load_model(str(tmp_path / "cut.safetensors"))


def test_layers_of_other_sizes(models, tmp_path):
    tensors = load_file(models.quantized("flux"))
    other = load_file(models.quantized("wan"))
    for key in [key for key in tensors if key.startswith("txt_in.weight")]:
        tensors[key] = other[key.replace("txt_in", "blocks.0.self_attn.q")]
    tensors["double_blocks.0.txt_attn.proj.bias"] = torch.zeros(7, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(gquant.BadFileError, match="mixed.safetensors does not fit the model.*txt_attn.proj.bias"):
        loaders.load_model(str(tmp_path / "mixed.safetensors"))


def test_statistics_that_are_not_numbers(models, tmp_path):
    tensors = load_file(models.quantized("flux"))
    tensors["txt_in.weight.absmax"][3] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(gquant.BadFileError, match="nan.safetensors: txt_in.weight would decode to NaN or Inf"):
        loaders.load_model(str(tmp_path / "nan.safetensors"))


def test_damaged_file(models, tmp_path):
    data = open(models.quantized("flux"), "rb").read()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(gquant.GquantError, match="cut.safetensors"):
        loaders.load_model(str(tmp_path / "cut.safetensors"))


def test_other_kinds_of_files(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.ckpt")
    with pytest.raises(gquant.UnsupportedError, match="model.ckpt is no safetensors file"):
        loaders.load_model(str(tmp_path / "model.ckpt"))


def test_model_that_cannot_be_quantized_or_saved(models, tmp_path):
    plain, packed = comfy.sd.load_diffusion_model(models.source("flux")), loaders.load_model(models.quantized("flux"))
    with pytest.raises(gquant.InvalidArgumentError, match="quantized already"):
        quantize_model(packed)
    with pytest.raises(gquant.InvalidArgumentError, match="no linear layer"):
        quantize_model(plain, exclude=["*"])
    with pytest.raises(gquant.InvalidArgumentError, match="no 4-bit weights.*Quantize4Bit"):
        save_model(str(tmp_path / "a.safetensors"), plain)
    assert not list(tmp_path.iterdir())


def test_save_that_fails_leaves_nothing(models, tmp_path, monkeypatch):
    def save_checkpoint(path, model, *rest, **options):
        save_file({"a": torch.zeros(2)}, path)  # as if ComfyUI had lost the layers

    monkeypatch.setattr(comfy.sd, "save_checkpoint", save_checkpoint)
    with pytest.raises(gquant.BadFileError, match="wrote 0 of"):
        save_model(str(tmp_path / "a.safetensors"), loaders.load_model(models.quantized("flux")))
    assert not list(tmp_path.iterdir())


def test_cancel(models):
    class Cancelled(BaseException):
        pass

    def cancel(done, total):
        if done > total // 2:
            raise Cancelled

    source = comfy.sd.load_diffusion_model(models.source("flux"))
    before = comfyui.sample(source)
    with pytest.raises(Cancelled):
        quantize_model(source, progress=cancel)
    assert torch.equal(comfyui.sample(source), before)


@pytest.fixture
def forgetful_probe():
    probe.comfyui.cache_clear()
    yield
    probe.comfyui.cache_clear()


def test_comfyui_that_lacks_something(monkeypatch, forgetful_probe):
    monkeypatch.delattr(comfy.model_detection, "convert_diffusers_mmdit")
    with pytest.raises(gquant.UnsupportedError, match=r"this ComfyUI \(0.*\) lacks comfy.model_detection.convert_diffusers_mmdit.*update"):
        probe.comfyui()


def test_comfyui_whose_functions_changed(monkeypatch, forgetful_probe):
    monkeypatch.setattr(comfy.ops, "mixed_precision_ops", lambda quant_config, dtype: None)
    with pytest.raises(gquant.UnsupportedError, match=r"lacks comfy.ops.mixed_precision_ops\(compute_dtype=\)"):
        probe.comfyui()

"""Text encoders and checkpoints in ComfyUI."""

import comfyui  # isort: skip
import comfy.sd
import pytest
import tiny_models
import torch
from comfyui import models, packed, sample  # noqa: F401: a fixture
from safetensors.torch import load_file, save_file

import gquant
from gquant.comfy import loaders
from gquant.comfy.save import save_model

OPTIONS = {"model_config": dict(tiny_models.CLIP_L)}
SD = comfy.sd.CLIPType.STABLE_DIFFUSION


def load(path, **options):
    return loaders.load_clip([path], SD, options=OPTIONS, **options)


def decoded(path):
    return comfy.sd.load_clip([path], clip_type=SD, model_options=OPTIONS | {"dtype": torch.float32})


def encode(clip, text="a photo of a cat"):
    return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


@pytest.mark.parametrize(("mode", "nested"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_encoder_gives_what_its_decoded_weights_do(models, mode, nested):
    clip = load(models.quantized("clip_l", mode, nested), dtype=torch.float32)
    want = encode(decoded(models.decoded("clip_l", mode, nested)))
    found = encode(clip)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(found, want))
    assert not torch.equal(found[0], encode(clip, "a dog")[0])
    assert len(packed(clip.cond_stage_model)) == 3 * 6 + 1  # 6 in each layer, and the projection


@pytest.mark.parametrize(
    ("name", "kind", "options", "layers"),
    [
        ("t5", comfy.sd.CLIPType.STABLE_AUDIO, {"t5base_model_config": tiny_models.T5}, 12),
        ("qwen3", comfy.sd.CLIPType.QWEN_IMAGE, {"qwen3_06b_model_config": tiny_models.QWEN}, 14),
    ],
)
def test_other_kinds_of_encoders(models, name, kind, options, layers):
    clip = loaders.load_clip([models.quantized(name, "nf4", True)], kind, torch.float32, options=options)
    want = comfy.sd.load_clip([models.decoded(name, "nf4", True)], clip_type=kind, model_options=options | {"dtype": torch.float32})
    found, want = (encode(c)[0] for c in (clip, want))
    assert found.isfinite().all() and found.std() > 0.01 and torch.equal(found, want)
    assert len(packed(clip.cond_stage_model)) == layers


def test_default_dtype(models):
    """ComfyUI keeps encoders in float16 and computes in float32, to which weights decode without float16 in between."""
    want = encode(decoded(models.decoded("clip_l")))
    assert all(torch.allclose(a, b, rtol=1e-2, atol=2e-2) for a, b in zip(encode(load(models.quantized("clip_l"))), want))


def test_encoder_without_projection(models, tmp_path):
    tensors = {name: t for name, t in load_file(models.quantized("clip_l")).items() if "text_projection" not in name}
    save_file(tensors, tmp_path / "clip.safetensors")
    clip = load(str(tmp_path / "clip.safetensors"))
    assert all(t.isfinite().all() for t in encode(clip))
    projection = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    assert torch.equal(projection.float(), torch.eye(128))


def test_embeddings_that_are_quantized_are_decoded(models):
    path = models.quantized("clip_l", include=["*token_embedding*"])
    with gquant.open(path) as model:
        assert "text_model.embeddings.token_embedding.weight" in model.layers
    gquant.dequantize_model(path, path + ".decoded.safetensors", dtype="f32", force=True, progress=False)
    assert torch.equal(encode(load(path, dtype=torch.float32))[0], encode(decoded(path + ".decoded.safetensors"))[0])


def test_lora_on_an_encoder(models):
    clip = load(models.quantized("clip_l"), dtype=torch.float32)
    name = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    lora = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(256, 1) * 0.1}
    lora["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(1, 128) * 0.1
    _, patched = comfy.sd.load_lora_for_models(None, clip, lora, 0.0, 1.0)
    assert name in patched.patcher.patches
    before = encode(clip)[0]
    assert not torch.equal(encode(patched)[0], before)
    assert torch.equal(encode(clip)[0], before)


def test_second_patcher_of_an_encoder(models):
    clip = load(models.quantized("clip_l"))
    make, arguments = clip.patcher.cached_patcher_init
    assert packed(make(*arguments, disable_dynamic=True).model).keys() == packed(clip.cond_stage_model).keys()


def test_encoders_of_which_one_is_quantized(models):
    """One in 4 bits is enough. Of two for the same place the last counts, as ComfyUI has it."""
    paths = [models.source("clip_l"), models.quantized("clip_l")]
    for order, found in ((paths, 19), (paths[::-1], 0)):
        clip = loaders.load_clip(order, comfy.sd.CLIPType.SD3, options=OPTIONS)
        assert len(packed(clip.cond_stage_model)) == found


def test_checkpoint(models):
    model, clip, vae = loaders.load_checkpoint(models.quantized("checkpoint"))
    want, want_clip, want_vae, _ = comfy.sd.load_checkpoint_guess_config(models.decoded("checkpoint"))
    with gquant.open(models.quantized("checkpoint")) as file:
        assert len(packed(model.model)) + len(packed(clip.cond_stage_model)) == len(file.layers)
    prompt = encode(clip)
    assert all(torch.allclose(a, b, rtol=1e-2, atol=2e-2) for a, b in zip(prompt, encode(want_clip)))
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    made = []
    for m in (model, want):
        conds = [[prompt[0], {"pooled_output": prompt[1]}]]
        made.append(comfy.sample.sample(m, noise, 2, 1.0, "euler", "simple", conds, conds, torch.zeros_like(noise), seed=0))
    assert made[0].isfinite().all() and made[0].std() > 0.5 and torch.equal(*made)
    assert torch.equal(vae.decode(made[0]), want_vae.decode(made[0]))


def test_parts_of_a_checkpoint(models):
    path = models.quantized("checkpoint")
    model, clip, vae = loaders.load_checkpoint(path)
    for part, patcher in (("model", model), ("clip", clip.patcher), ("vae", vae.patcher)):
        make, arguments = patcher.cached_patcher_init
        again = make(*arguments, disable_dynamic=True)
        assert type(again.model).__name__ == type(patcher.model).__name__ and len(packed(again.model)) == len(packed(patcher.model)), part


def test_checkpoint_is_a_diffusion_model_too(models):
    assert type(loaders.load_model(models.quantized("checkpoint")).model).__name__ == "SD3"


def test_checkpoint_that_is_saved_is_the_same(models, tmp_path):
    model, clip, vae = loaders.load_checkpoint(models.quantized("checkpoint", "fp4", True))
    path = str(tmp_path / "saved.safetensors")
    save_model(path, model, clip, vae)
    given, saved = load_file(models.quantized("checkpoint", "fp4", True)), load_file(path)
    for name, tensor in given.items():
        if tensor.dtype is torch.uint8 or name.rpartition(".")[2] in ("nested_absmax", "absmax", "quant_map", "nested_quant_map"):
            assert torch.equal(saved[name], tensor), name
    again, clip_again, _ = loaders.load_checkpoint(path)
    assert all(torch.equal(a, b) for a, b in zip(encode(clip_again), encode(clip)))

"""ComfyUI's own loaders open 4-bit files when they are patched, and are then what they were."""

import comfyui  # isort: skip
import comfy.sd
import folder_paths
import nodes
import pytest
import tiny_models
import torch
from comfyui import PATH, models, packed, sample  # noqa: F401: a fixture
from support import python

from gquant.comfy import loaders, patch

LOADERS = ("load_diffusion_model", "load_checkpoint_guess_config", "load_clip")


@pytest.fixture
def patched(models):
    for folder in ("diffusion_models", "text_encoders", "checkpoints"):
        folder_paths.add_model_folder_path(folder, str(models.folder))
    patch.install()
    yield
    patch.restore()


def originals():
    return [getattr(comfy.sd, name) for name in LOADERS]


def test_stock_nodes(models, patched):
    names = {name: models.quantized(name).rpartition("/")[2] for name in ("flux", "checkpoint", "full_clip_l")}
    (model,) = nodes.UNETLoader().load_unet(names["flux"], "fp8_e4m3fn")
    assert packed(model.model) and torch.equal(sample(model), sample(loaders.load_model(models.quantized("flux"))))
    model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(names["checkpoint"])
    assert packed(model.model) and packed(clip.cond_stage_model) and vae.first_stage_model is not None
    (clip,) = nodes.CLIPLoader().load_clip(names["full_clip_l"], "stable_diffusion", "cpu")
    assert packed(clip.cond_stage_model) and clip.patcher.load_device == torch.device("cpu")


def test_parts_that_are_not_wanted(models, patched):
    parts = comfy.sd.load_checkpoint_guess_config(models.quantized("checkpoint"), output_vae=False, output_clip=False)
    assert packed(parts[0].model) and parts[1:] == (None, None, None)


def test_other_files_are_loaded_as_ever(models, patched):
    model = comfy.sd.load_diffusion_model(models.source("flux"))
    assert not packed(model.model) and model.cached_patcher_init[0] is not loaders.load_model
    clip = comfy.sd.load_clip([models.source("clip_l")], model_options={"model_config": dict(tiny_models.CLIP_L)})
    assert not packed(clip.cond_stage_model)
    with pytest.raises(Exception, match="none.safetensors"):
        comfy.sd.load_diffusion_model("none.safetensors")


def test_own_layers_are_left_alone(models, patched):
    with pytest.raises(Exception):  # noqa: B017: what ComfyUI says to codes where it wants weights
        comfy.sd.load_diffusion_model(models.quantized("flux"), {"custom_operations": comfy.ops.manual_cast})


def test_install_twice_and_restore():
    before = originals()
    patch.install()
    once = originals()
    patch.install()
    assert originals() == once and not set(once) & set(before)
    patch.restore()
    patch.restore()
    assert originals() == before


def test_restore_below_another_patch(models, monkeypatch):
    before = comfy.sd.load_diffusion_model
    patch.install()
    ours = comfy.sd.load_diffusion_model
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", lambda *args, **options: ours(*args, **options))
    patch.restore()
    with pytest.raises(ValueError, match="Unsupported quantization format"):  # what ComfyUI says without the patch
        comfy.sd.load_diffusion_model(models.quantized("flux"))
    patch.install()
    assert packed(comfy.sd.load_diffusion_model(models.quantized("flux")).model)
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", ours)
    patch.restore()
    assert comfy.sd.load_diffusion_model is before


@pytest.mark.parametrize("value", ["", "0", "1"])
def test_only_the_variable_installs_it(value):
    code = f"""
import sys; sys.path[:0] = [{PATH!r}, {str(comfyui.NODES.parent)!r}]
import comfy.cli_args; comfy.cli_args.args.cpu = True
import comfy.sd, importlib
importlib.import_module({comfyui.NODES.name!r})
print(all(hasattr(getattr(comfy.sd, name), "__wrapped__") for name in {LOADERS!r}))
"""
    assert python(code, GQUANT_PATCH_CORE=value).splitlines()[-1] == str(value == "1")

"""ComfyUI itself, for tests: import this first. Without it the tests of the file that does are skipped.

GQUANT_COMFYUI_PATH names a folder with ComfyUI's source, 0.27 or newer (tried: 0.33.0). The Python that runs the tests needs, beside
tests/requirements.txt, what ComfyUI imports:

    import comfy.sd   torchvision torchaudio einops torchsde scipy transformers tokenizers sentencepiece PyYAML tqdm Pillow psutil
                      comfy-aimdo
    its server        aiohttp yarl av simpleeval blake3 requests pydantic-settings alembic sqlalchemy

ComfyUI is under the GPL and no part of gquant: nothing of it is copied here.
"""

import os
import sys
from pathlib import Path

import pytest
import support
import torch
from safetensors.torch import load_file, save_file

PATH = os.environ.get("GQUANT_COMFYUI_PATH", "")
if not PATH:
    pytest.skip("GQUANT_COMFYUI_PATH names no folder with ComfyUI: see tests/python_comfy/comfyui.py", allow_module_level=True)
if not (Path(PATH) / "comfy" / "sd.py").exists():
    pytest.exit(f"GQUANT_COMFYUI_PATH is {PATH}, where there is no comfy/sd.py", returncode=2)
sys.path.insert(1, PATH)
NODES = support.ROOT / "bindings" / "comfyui"  # the folder that goes into custom_nodes

import comfy.cli_args

comfy.cli_args.args.cpu = True

import comfy.sample
import comfy.sd
import comfy.taesd.taesd

import gquant
import tiny_models


def sample(model, steps=2, seed=0, size=8):
    """What a tiny model makes of noise: the latent after a few steps."""
    generator = torch.Generator().manual_seed(seed)
    if type(model.model).__name__ == "WAN21":
        prompt, pooled, shape = torch.randn(1, 16, 4096, generator=generator), {}, (1, 16, 1, size, size)
    else:
        prompt, shape = torch.randn(1, 16, 64, generator=generator), (1, 16, size, size)
        pooled = {"pooled_output": torch.randn(1, 64, generator=generator)}
    noise = torch.randn(shape, generator=generator)
    prompt = [[prompt, pooled]]
    return comfy.sample.sample(model, noise, steps, 1.0, "euler", "simple", prompt, prompt, torch.zeros(shape), denoise=1.0, seed=seed)


def packed(model):
    """The 4-bit weights of a module, by name."""
    from gquant.comfy import is_4bit

    return {name: weight for name, weight in model.named_parameters() if is_4bit(weight)}


class Models:
    """Files of tiny models in a folder, each made once."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def source(self, name):
        """A bfloat16 file: of a function in tiny_models, "vae", or "checkpoint" (sd3, full_clip_l and vae)."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            made = getattr(self, f"_{name}", None) or getattr(tiny_models, name)
            save_file(made(), path, metadata={"format": "pt"})
        return str(path)

    def _vae(self):
        """A small VAE for 16 latent channels, random."""
        generator = torch.Generator().manual_seed(4)
        shapes = comfy.taesd.taesd.TAESD(latent_channels=16).state_dict()
        sd = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
        for name in sorted(shapes.keys() - sd.keys()):
            shape = shapes[name].shape
            sd[name] = torch.randn(shape, generator=generator) * shape[1:].numel() ** -0.5
        return sd

    def _checkpoint(self):
        parts = {"model.diffusion_model.": "sd3", "text_encoders.clip_l.transformer.": "full_clip_l", "first_stage_model.": "vae"}
        return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in load_file(self.source(part)).items()}

    def quantized(self, name, mode="nf4", nested=False, **options):
        """It, as gquant converts it."""
        path = self.folder / f"{name}_{mode}{'_nested' * nested}{'_'.join(options)}.safetensors"
        if not path.exists():
            gquant.convert(self.source(name), path, mode, double_quant=nested, progress=False, **options)
        return str(path)

    def decoded(self, name, mode="nf4", nested=False):
        """That, with all tensors in float32: what computing with the 4-bit file must equal."""
        path = self.folder / f"{name}_{mode}{'_nested' * nested}_decoded.safetensors"
        if not path.exists():
            restored = self.folder / "restored.safetensors"
            gquant.dequantize_model(self.quantized(name, mode, nested), restored, dtype="f32", force=True, progress=False)
            # ComfyUI takes the dtype of some encoders from a norm, which was not quantized.
            save_file({key: tensor.float() for key, tensor in load_file(restored).items()}, path)
        return str(path)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))

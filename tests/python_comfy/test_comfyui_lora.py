"""LoRAs on 4-bit models in ComfyUI, through its own loader functions, against the same LoRA on the decoded model."""

import comfyui  # isort: skip
import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.weight_adapter
import pytest
import torch
from comfyui import models, packed, sample  # noqa: F401: a fixture
from loras import KINDS, lora
from layout_weights import same_bytes

import gquant
from gquant.comfy import loaders
from gquant.comfy.lora import LowRank
from gquant.comfy.save import save_model

CPU = torch.device("cpu")
VARIANTS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


@pytest.fixture(scope="module")
def shapes(models):
    """The layers that LoRAs are for."""
    weights = packed(loaders.load_model(models.quantized("flux")).model)
    return {name: tuple(weight.shape) for name, weight in weights.items() if any(part in name for part in ("attn", "mlp", "linear"))}


@pytest.fixture
def pair(models):
    """Makes the 4-bit model and the decoded one."""

    def make(mode="nf4", nested=False):
        return loaders.load_model(models.quantized("flux", mode, nested)), comfy.sd.load_diffusion_model(models.decoded("flux", mode, nested))

    return make


def forward(model):
    """One pass through a patched diffusion model."""
    generator = torch.Generator().manual_seed(5)
    x, context = torch.randn(1, 16, 8, 8, generator=generator), torch.randn(1, 16, 64, generator=generator)
    with torch.inference_mode():
        return model.model.diffusion_model(x, torch.tensor([0.5]), context, torch.randn(1, 64, generator=generator), guidance=None)


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def with_lora(model, lora, strength=1.0):
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def snapshot(model):
    return {name: weight.clone() for name, weight in packed(model.model).items()}


def unchanged(model, before):
    after = packed(model.model)
    return after.keys() == before.keys() and all(same_bytes(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize(("mode", "nested"), VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_patched(pair, shapes, kind, mode, nested):
    model, decoded = pair(mode, nested)
    before, plain = snapshot(model), sample(decoded)
    patched, wanted = (with_lora(m, lora(kind, shapes)) for m in (model, decoded))
    assert len(patched.patches) == len(shapes)
    result, want = sample(patched), sample(wanted)
    # Weights are quantized again: what they lose has the size of what they lost the first time.
    assert distance(result, want) < 0.25
    if kind == "loha":
        assert distance(result, want) < distance(plain, want)
    now = packed(model.model)
    assert now.keys() == before.keys()
    for name, weight in now.items():
        params, old = weight._params, before[name]._params
        assert (params.blocksize, params.nested, params.dtype, weight.dtype) == (old.blocksize, nested, old.dtype, before[name].dtype)
        assert same_bytes(weight, before[name]) == (name not in shapes)
    comfy.model_management.unload_all_models()
    assert unchanged(model, before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dora"])  # which ComfyUI does not bypass
def test_bypass_is_exact(pair, shapes, kind):
    model, decoded = pair()
    before = snapshot(model)
    bypassed = comfy.sd.load_bypass_lora_for_models(model, None, lora(kind, shapes), 1.0, 0)[0]
    want = sample(with_lora(decoded, lora(kind, shapes)))
    assert distance(sample(bypassed), want) < 1e-5 < distance(sample(model), want)
    comfy.model_management.unload_all_models()
    assert unchanged(model, before)


@pytest.mark.parametrize(("mode", "nested"), VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_layers_are_exact(pair, shapes, kind, mode, nested):
    model, decoded = pair(mode, nested)
    before = snapshot(model)
    patched, wanted = (with_lora(m, lora(kind, shapes)) for m in (model, decoded))
    patched.patch_model(device_to=CPU, lowvram_model_memory=1)
    functions = [f for module in patched.model.modules() for f in getattr(module, "weight_function", [])]
    assert len(functions) == len(shapes) and all(isinstance(f, LowRank) == (kind == "lora") for f in functions)
    wanted.patch_model(device_to=CPU)
    assert distance(forward(patched), forward(wanted)) < 1e-5
    assert unchanged(model, before)
    patched.unpatch_model(CPU)
    assert not any(getattr(module, "weight_function", []) for module in patched.model.modules())
    assert unchanged(model, before)
    wanted.unpatch_model(CPU)


def test_offloaded_weights_stay_packed(pair, shapes, monkeypatch):
    model, _ = pair()
    patched = with_lora(model, lora("lora", shapes))
    patched.patch_model(device_to=CPU, lowvram_model_memory=1)
    monkeypatch.setattr(comfy.lora, "calculate_weight", lambda *_, **__: pytest.fail("a weight was decoded and patched"))
    assert forward(patched).isfinite().all()
    patched.unpatch_model(CPU)


def test_several_loras_at_once(pair, shapes):
    model, decoded = pair()
    half = dict(list(shapes.items())[::2])
    loras = [(lora("lora", shapes), 0.7), (lora("lora", half, seed=1, rank=8), -0.4), (lora("lora", shapes, seed=2, rank=1), 1.3)]
    for entry in loras:
        model, decoded = with_lora(model, *entry), with_lora(decoded, *entry)
    want = forward_of(decoded)
    model.patch_model(device_to=CPU, lowvram_model_memory=1)
    assert distance(forward(model), want) < 1e-5
    model.unpatch_model(CPU)
    # One that is no product of two matrices takes its layers the slow way, and no others.
    mixed, decoded = (with_lora(m, lora("loha", half, seed=3)) for m in (model, decoded))
    mixed.patch_model(device_to=CPU, lowvram_model_memory=1)
    functions = [f for module in mixed.model.modules() for f in getattr(module, "weight_function", [])]
    assert sum(isinstance(f, LowRank) for f in functions) == len(shapes) - len(half)
    assert distance(forward(mixed), forward_of(decoded)) < 1e-5
    mixed.unpatch_model(CPU)


def forward_of(model):
    model.patch_model(device_to=CPU)
    result = forward(model)
    model.unpatch_model(CPU)
    return result


def test_parts_of_fused_layers(pair, shapes):
    """LoRAs with diffusers' names patch the rows of q, k and v, and columns, of a fused weight."""
    model, decoded = pair()
    generator = torch.Generator().manual_seed(1)
    patches = {}
    for name, (n, k) in shapes.items():
        for part in ((0, n // 4, n // 2), (1, k // 4, k // 2), (0, 0, 8)):
            sizes = (part[2], k) if part[0] == 0 else (n, part[2])
            up, down = torch.randn(sizes[0], 4, generator=generator) * 0.1, torch.randn(4, sizes[1], generator=generator) * k**-0.5
            adapter = comfy.weight_adapter.LoRAAdapter(set(), (up, down, 2.0, None, None, None))
            patches[(name, part)] = adapter
    assert len(model.add_patches(patches, 0.8)) == len(decoded.add_patches(patches, 0.8)) == len(patches)
    model.patch_model(device_to=CPU, lowvram_model_memory=1)
    assert all(isinstance(f, LowRank) for module in model.model.modules() for f in getattr(module, "weight_function", []))
    assert distance(forward(model), forward_of(decoded)) < 1e-5
    model.unpatch_model(CPU)


def test_lowrank_factors_move_and_are_counted(pair, shapes):
    model, _ = pair()
    patched = with_lora(model, lora("lora", shapes))
    patched.patch_model(device_to=CPU, lowvram_model_memory=1)
    size = sum(4 * 4 * (n + k) for n, k in shapes.values())
    assert patched.model.model_loaded_weight_memory >= size
    assert sum(f.move_to(CPU) for m in patched.model.modules() for f in getattr(m, "weight_function", [])) == size
    patched.unpatch_model(CPU)


def test_a_patched_model_saves_and_loads(pair, shapes, tmp_path):
    model, _ = pair("nf4", True)
    patched = with_lora(model, lora("lora", shapes))
    want = sample(patched)
    patched.unpatch_model(CPU)
    save_model(str(tmp_path / "patched.safetensors"), patched)
    again = loaders.load_model(str(tmp_path / "patched.safetensors"))
    assert torch.equal(sample(again), want)


def test_scheduled_loras_are_an_error_that_says_what_to_do(pair, shapes):
    model, _ = pair()
    before = snapshot(model)
    hooks = comfy.hooks.create_hook_lora(lora("lora", shapes), 1.0, 1.0)
    model.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    model.patch_model(device_to=CPU)
    with pytest.raises(gquant.UnsupportedError, match="Load LoRA"):
        model.patch_hooks(hooks)
    assert unchanged(model, before)

"""A 4-bit Flux on the GPU in ComfyUI, with LoRAs; test_comfyui_cuda.py runs it in a process of its own, because a process of ComfyUI
computes on one kind of device.

    comfyui_on_gpu.py COMFYUI FOLDER legacy|partial|dynamic

legacy: all weights on the device. partial: some stay on the host. dynamic: dynamic VRAM (comfy-aimdo), as main.py sets it up.
"""

import sys

comfyui, folder, mode = sys.argv[1:]
sys.argv[1:] = []
sys.path.insert(0, comfyui)

if mode == "dynamic":
    import comfy_aimdo.control

    try:
        comfy_aimdo.control.init(simple_vram_headroom=None, nvml_pressure=True)
    except TypeError:  # an older one
        comfy_aimdo.control.init()

import comfy.memory_management
import comfy.model_management as management
import comfy.model_patcher
import comfy.sample
import comfy.sd
import torch
from safetensors.torch import save_file

import gquant
import tiny_models
from gquant.comfy import is_4bit, loaders
from gquant.comfy.lora import LowRank
from layout_weights import same_bytes
from loras import lora

device = management.get_torch_device()
assert device.type == "cuda", device
if mode == "dynamic":
    try:
        started = comfy_aimdo.control.init_devices([(device.index, 0)])
    except TypeError:
        started = comfy_aimdo.control.init_devices([device.index])
    if not started:
        print("skip: comfy-aimdo does not work on this machine")
        sys.exit()
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def sample(model):
    generator = torch.Generator().manual_seed(0)
    prompt, shape = torch.randn(1, 16, 64, generator=generator), (1, 16, 8, 8)
    prompt = [[prompt, {"pooled_output": torch.randn(1, 64, generator=generator)}]]
    noise = torch.randn(shape, generator=generator)
    return comfy.sample.sample(model, noise, 3, 1.0, "euler", "simple", prompt, prompt, torch.zeros(shape), denoise=1.0, seed=0)


def forward(model):
    """One pass with some of the weights on the host."""
    generator = torch.Generator().manual_seed(5)
    given = [torch.randn(*shape, generator=generator).to(device, torch.bfloat16) for shape in ((1, 16, 8, 8), (1, 16, 64), (1, 64))]
    with torch.inference_mode():
        return model.model.diffusion_model(given[0], torch.tensor([0.5], device=device), given[1], given[2], guidance=None)


def weights(model):
    return {name: weight for name, weight in model.model.named_parameters() if is_4bit(weight)}


def run(model):
    if mode != "partial":
        return sample(model)
    management.unload_all_models()
    model.partially_load(device, int(0.95 * model.model_size()))
    places = {weight.device.type for weight in weights(model).values()}
    assert places in (set(), {"cpu", "cuda"}), places
    y = forward(model)
    model.detach()
    return y


def distance(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


save_file(tiny_models.flux(), f"{folder}/flux.safetensors", metadata={"format": "pt"})
for nested in (False, True):
    path = f"{folder}/nf4_{nested}.safetensors"
    gquant.convert(f"{folder}/flux.safetensors", path, "nf4", double_quant=nested, progress=False)
    gquant.dequantize_model(path, f"{folder}/decoded_{nested}.safetensors", dtype="bf16", progress=False)
    model = loaders.load_model(path, torch.bfloat16)
    decoded = comfy.sd.load_diffusion_model(f"{folder}/decoded_{nested}.safetensors", model_options={"dtype": torch.bfloat16})
    assert model.is_dynamic() == (mode == "dynamic")
    before = {name: weight.to("cpu", copy=True) for name, weight in weights(model).items()}
    plain, want = run(model), run(decoded)
    assert plain.isfinite().all() and distance(plain, want) < 0.03, distance(plain, want)
    assert weights(model).keys() == before.keys()
    # Not the last layer: ComfyUI loads layers of up to 16 KiB at once, patched, also under dynamic VRAM.
    shapes = {name: tuple(weight.shape) for name, weight in before.items() if any(part in name for part in ("attn", "mlp", ".linear1", ".linear2"))}
    for kind in ("lora", "loha", "lokr", "dora"):
        patched, wanted = (comfy.sd.load_lora_for_models(m, None, lora(kind, shapes), 1.0, 0)[0] for m in (model, decoded))
        result, want = run(patched), run(wanted)
        exact = kind == "lora" and mode == "dynamic"
        assert distance(result, want) < (0.03 if exact else 0.3), (kind, distance(result, want))
        if exact:
            functions = [f for module in patched.model.modules() for f in getattr(module, "weight_function", [])]
            assert len(functions) == len(shapes) and all(isinstance(f, LowRank) for f in functions)
        print(mode, nested, kind, "effect", distance(want, run(decoded)), "error", distance(result, want))
    management.unload_all_models()
    after = weights(model)
    assert after.keys() == before.keys() and all(same_bytes(weight.to("cpu"), before[name]) for name, weight in after.items())
    assert distance(run(model), plain) < 1e-3  # nothing of the LoRAs is left
    management.unload_all_models()
print("ok")

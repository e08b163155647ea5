#!/usr/bin/env python3
"""Measures 4-bit models in ComfyUI: loading one, its memory, and a step of sampling, against bf16, fp8 and bitsandbytes.

    GQUANT_COMFYUI_PATH=… python tests/bench/bench_comfyui.py                  # Flux' size: 12e9 weights; 60 GB of memory, 7 of disk
    GQUANT_COMFYUI_PATH=… python tests/bench/bench_comfyui.py --double 6 --single 12

Needs what tests/python_comfy/comfyui.py lists, and bitsandbytes for its row. Weights are random, of Flux' shapes, with 4,096 tokens of a picture of
1024 × 1024 and 512 of text. Loading: from the page cache, the least of three. A step: one forward pass of the model with all weights
on the device, the median of nine. All in one run; numbers go to build/bench/comfyui.json.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT / "bindings" / "python"), os.environ["GQUANT_COMFYUI_PATH"]]
os.environ.setdefault("GQUANT_LIBRARY", str(ROOT / "lib" / "libgquant.so"))

import torch

import comfy.cli_args

comfy.cli_args.args.cpu = not torch.cuda.is_available()

import comfy.model_management as management
import comfy.sd
from safetensors.torch import save_file

import gquant.torch
from gquant.comfy import handlers, is_4bit, loaders

try:
    import bitsandbytes
except ImportError:
    bitsandbytes = None

FOLDER = ROOT / "build" / "bench"
DEVICE = management.get_torch_device()
FLUX = {"hidden": 3072, "context": 4096, "pooled": 768}


def shapes(hidden, context, pooled, double, single):
    """The weights of Flux schnell's linear layers, [n, k] by name, and the norms."""
    linear = {"img_in": (hidden, 64), "txt_in": (hidden, context), "final_layer.linear": (64, hidden)}
    linear |= {"final_layer.adaLN_modulation.1": (2 * hidden, hidden)}
    for name, width in (("time_in", 256), ("vector_in", pooled)):
        linear |= {f"{name}.in_layer": (hidden, width), f"{name}.out_layer": (hidden, hidden)}
    norms = []
    for i in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}_"
            linear |= {f"{block}attn.qkv": (3 * hidden, hidden), f"{block}attn.proj": (hidden, hidden), f"{block}mod.lin": (6 * hidden, hidden)}
            linear |= {f"{block}mlp.0": (4 * hidden, hidden), f"{block}mlp.2": (hidden, 4 * hidden)}
            norms += [f"{block}attn.norm.query_norm.scale", f"{block}attn.norm.key_norm.scale"]
    for i in range(single):
        block = f"single_blocks.{i}."
        linear |= {f"{block}linear1": (7 * hidden, hidden), f"{block}linear2": (hidden, 5 * hidden), f"{block}modulation.lin": (3 * hidden, hidden)}
        norms += [f"{block}norm.query_norm.scale", f"{block}norm.key_norm.scale"]
    return linear, norms


def weights(linear, norms):
    generator = torch.Generator(DEVICE).manual_seed(0)
    sd = {name: torch.ones(128, dtype=torch.bfloat16) for name in norms}
    for name, (n, k) in linear.items():
        sd[f"{name}.weight"] = (torch.randn(n, k, generator=generator, device=DEVICE, dtype=torch.bfloat16) * k**-0.5).cpu()
        sd[f"{name}.bias"] = torch.zeros(n, dtype=torch.bfloat16)
    return sd


def write_quantized(sd, path, nested):
    made = {}
    for name, tensor in sd.items():
        made[name] = tensor
        if name.endswith(".weight"):
            packed, state = gquant.torch.quantize_4bit(tensor.to(DEVICE), 64, nested, "nf4")
            made |= {name: packed.cpu()} | {f"{name}.{key}": part.cpu() for key, part in state.as_dict(packed=True).items()}
    save_file(made, path)


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(run):
    synchronize()
    start = time.perf_counter()
    made = run()
    synchronize()
    return time.perf_counter() - start, made


def forget():
    management.unload_all_models()
    gc.collect()
    management.soft_empty_cache()


def least(run, count=3):
    found = []
    for _ in range(count + 1):  # the first makes what is kept
        took, made = seconds(run)
        found.append(took)
        del made
        forget()
    return min(found[1:])


def step(model, side, count=9):
    """Seconds of one forward pass."""
    management.load_models_gpu([model], force_full_load=True)
    dtype = model.model.get_dtype_inference()
    generator = torch.Generator().manual_seed(1)
    x, context, y = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in ((1, 16, side, side), (1, 512, FLUX["context"]), (1, FLUX["pooled"])))
    t = torch.tensor([0.5], device=DEVICE, dtype=dtype)
    model.inject_model()  # a LoRA beside the weights
    with torch.inference_mode():
        found = [seconds(lambda: model.model.diffusion_model(x, t, context=context, y=y))[0] for _ in range(count + 2)]
    model.eject_model()
    return statistics.median(found[2:])


def lora(linear, rank=16):
    """A LoRA of the attention and of the two matrices behind it."""
    made = {}
    for name, (n, k) in linear.items():
        if "attn" in name or "mlp" in name or "linear" in name.rpartition(".")[2]:
            made[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(n, rank) * 1e-3
            made[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(rank, k) * k**-0.5
    return made


def with_bitsandbytes(model):
    """The bf16 model with bitsandbytes' matmul_4bit in its linear layers."""
    for module in model.model.diffusion_model.modules():
        if getattr(module, "in_features", None):
            packed, state = bitsandbytes.functional.quantize_4bit(module.weight.data.to(DEVICE), quant_type="nf4")
            bias = module.bias.data.to(DEVICE)
            module.forward = lambda x, p=packed, s=state, b=bias: bitsandbytes.matmul_4bit(x, p.t(), bias=b, quant_state=s)
            module.weight = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16), requires_grad=False)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    parser.add_argument("--hidden", type=int, default=FLUX["hidden"])
    parser.add_argument("--side", type=int, default=128, help="of the latent; the tokens are (side / 2)²")
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    linear, norms = shapes(**FLUX | {"hidden": given.hidden}, double=given.double, single=given.single)
    params = sum(n * k for n, k in linear.values())
    sd = weights(linear, norms)
    result = {"device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu", "weights": params}
    print(f"{params / 1e9:.1f}e9 weights on {result['device']}", flush=True)

    def note(what, value, unit):
        result[what] = value
        print(f"{what:40} {value:10.3f} {unit}", flush=True)

    paths = {nested: str(FOLDER / f"comfy_nf4{'_nested' * nested}.safetensors") for nested in (False, True)}
    for nested, path in paths.items():
        write_quantized(sd, path, nested)
        what = "nf4 nested" if nested else "nf4"
        raw = least(lambda: gquant.torch.load_4bit_model(path, DEVICE))
        ours = least(lambda: loaders.load_model(path, device="gpu"))
        note(f"{what}: file", os.path.getsize(path) / 1e9, "GB")
        note(f"{what}: raw loader", raw, "s")
        note(f"{what}: loaded in ComfyUI", ours, f"s, {ours / raw:.2f} of that")
        before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
        model = loaders.load_model(path, device="gpu")
        used = (torch.cuda.memory_allocated() if DEVICE.type == "cuda" else model.model_size()) - before
        note(f"{what}: memory", used / params, "bytes per weight")
        note(f"{what}: step", 1e3 * step(model, given.side), "ms")
        if not nested:
            plain = handlers.linear
            handlers.linear = lambda x, w, b: torch.nn.functional.linear(x, w.dequantize().to(x.dtype), b)
            note(f"{what}: step, weights decoded for each", 1e3 * step(model, given.side), "ms")
            handlers.linear = plain
            patched, _ = comfy.sd.load_lora_for_models(model, None, lora(linear), 1.0, 0.0)
            note(f"{what}: step, with a patched LoRA", 1e3 * step(patched, given.side), "ms")
            assert all(is_4bit(w) for n, w in patched.model.named_parameters() if n.endswith("qkv.weight"))
            beside, _ = comfy.sd.load_bypass_lora_for_models(model, None, lora(linear), 1.0, 0.0)
            note(f"{what}: step, with a LoRA beside", 1e3 * step(beside, given.side), "ms")
            del patched, beside
        del model
        forget()
    for what, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        model = comfy.sd.load_diffusion_model_state_dict(dict(sd), {"dtype": dtype})
        note(f"{what}: step", 1e3 * step(model, given.side), "ms")
        del model
        forget()
    if bitsandbytes and DEVICE.type == "cuda":
        model = with_bitsandbytes(comfy.sd.load_diffusion_model_state_dict(dict(sd), {"dtype": torch.bfloat16}))
        note("bitsandbytes: step", 1e3 * step(model, given.side), "ms")
    (FOLDER / "comfyui.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

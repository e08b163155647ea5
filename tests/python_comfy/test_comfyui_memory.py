"""Where 4-bit weights are while ComfyUI moves a model about: what it counts, copies, shares and merges."""

import comfyui  # isort: skip
import copy
import threading
from pathlib import Path

import comfy.memory_management
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from comfyui import models, packed, sample  # noqa: F401: a fixture
from loras import lora
from test_comfyui_lora import CPU, VARIANTS, distance, snapshot, unchanged, with_lora
from layout_weights import same_bytes, tensors

import support
from gquant.comfy import is_4bit, loaders

variants = pytest.mark.parametrize(("mode", "nested"), VARIANTS)


@pytest.fixture
def load(models):
    return lambda mode="nf4", nested=False: loaders.load_model(models.quantized("flux", mode, nested))


def layers(model):
    return {name: module for name, module in model.model.named_modules() if is_4bit(getattr(module, "weight", None))}


# ---- sizes


@variants
def test_sizes_are_those_of_the_packed_weights(load, mode, nested):
    model = load(mode, nested)
    for module in layers(model).values():
        weight = sum(tensor.nbytes for tensor in tensors(module.weight).values())
        size = comfy.model_management.module_size(module)
        assert weight + module.bias.nbytes <= size <= weight + module.bias.nbytes + 512  # the table of codes, and texts
    assert model.model_size() < 0.62 * sum(weight.numel() for weight in model.model.parameters())


@variants
def test_loading_and_unloading(load, mode, nested):
    model = load(mode, nested)
    before, want = snapshot(model), sample(model)
    assert model.loaded_size() == pytest.approx(model.model_size(), rel=0.01)
    comfy.model_management.unload_all_models()
    assert model.loaded_size() == 0
    model.partially_load(CPU, int(0.95 * model.model_size()))  # a part stays free, for the largest weight when it is decoded
    assert 0 < model.loaded_size() < 0.9 * model.model_size()
    assert model.partially_unload(CPU, model.model_size()) > 0
    assert torch.equal(sample(model), want)
    assert unchanged(model, before)


# ---- codes stay views of the file


def test_codes_stay_views_of_the_file(load):
    model = load()
    before = {name: weight._qdata.data_ptr() for name, weight in packed(model.model).items()}
    sample(model)
    comfy.model_management.unload_all_models()
    model.clone().patch_model(device_to=CPU)
    assert {name: weight._qdata.data_ptr() for name, weight in packed(model.model).items()} == before


def test_codes_can_be_read_from_the_file_again(models, monkeypatch):
    """As dynamic VRAM does it: ComfyUI marks the memory of a file's tensors, and reads marked tensors from the file."""
    path, read = models.quantized("flux", "nf4", True), comfy.utils.load_torch_file

    def marked(*arguments, **options):
        result = read(*arguments, **options)
        with open(path, "rb") as file:
            content = file.read()
        for tensor in result[0].values() if isinstance(result, tuple) else result.values():
            if tensor.dtype is torch.uint8 and tensor.nbytes > 1024:
                at = content.find(tensor.numpy().tobytes())
                file_slice = comfy.memory_management.TensorFileSlice(open(path, "rb", buffering=0), threading.Lock(), at, tensor.nbytes)
                tensor.untyped_storage()._comfy_tensor_file_slice = file_slice
        return result

    monkeypatch.setattr(comfy.utils, "load_torch_file", marked)
    for weight in packed(loaders.load_model(path).model).values():
        empty = torch.empty_like(weight)
        empty._qdata.zero_()
        assert comfy.memory_management.read_tensor_file_slice_into(weight, empty)
        assert same_bytes(empty, weight)


# ---- dynamic VRAM: the parts of ComfyUI that copy weights, without the device that they copy to


@variants
def test_gathered_geometry(load, mode, nested):
    """A weight and its bias are copied through one buffer of bytes."""
    for module in list(layers(load(mode, nested)).values())[:8]:
        both = [module.weight, module.bias]
        buffer = torch.zeros(comfy.memory_management.vram_aligned_size(both), dtype=torch.uint8)
        weight, bias = comfy.memory_management.interpret_gathered_like(both, buffer)
        weight.copy_(module.weight)
        bias.copy_(module.bias)
        assert same_bytes(weight, module.weight) and torch.equal(bias, module.bias)
        packed_size = sum(tensor.nbytes for tensor in tensors(module.weight).values())
        assert buffer.nbytes <= packed_size + bias.nbytes + 6 * 1024  # each is aligned to 1 KiB
        again = comfy.memory_management.interpret_gathered_like(both, buffer)[0]
        assert torch.equal(again.dequantize(), module.weight.dequantize())


@variants
@pytest.mark.parametrize("kind", ["lokr", "loha", "dora"])
def test_dynamic_vram_patches_a_resident_weight_in_place(load, kind, mode, nested):
    model = load(mode, nested)
    name, module = next((name, module) for name, module in layers(model).items() if "mlp" in name)
    patched = with_lora(model, lora(kind, {f"{name}.weight": tuple(module.weight.shape)}))
    both = [module.weight, module.bias]
    buffer = torch.zeros(comfy.memory_management.vram_aligned_size(both), dtype=torch.uint8)
    for slot, source in zip(comfy.memory_management.interpret_gathered_like(both, buffer), both):
        slot.copy_(source)
    module.seed_key = name
    module.weight_lowvram_function = comfy.model_patcher.LowVramPatch(f"{name}.weight", patched.patches)
    geometry = comfy.memory_management.tensors_to_geometries(both)
    module._prefetch = {"resident": False, "xfer_dest": buffer, "needs_cast": False, "cast_geometry": geometry, "signature": object()}
    weight, _ = comfy.ops.resolve_cast_module_with_vbar(module, torch.float32, CPU, torch.float32, torch.float32, True)
    assert is_4bit(weight) and not same_bytes(weight, module.weight)
    resident = comfy.memory_management.interpret_gathered_like(both, buffer)[0]
    assert same_bytes(resident, weight)  # what the next steps will use is what this one used
    exact = module.weight_lowvram_function(module.weight.dequantize())
    assert distance(resident.dequantize(), exact) < 0.2


@pytest.mark.parametrize("order", ["as ComfyUI", "the other way round"])
def test_dynamic_vram_leaves_a_weight_with_a_lora_alone(load, order):
    model = load()
    name, module = next((name, module) for name, module in layers(model).items() if "mlp" in name)
    patched = with_lora(model, lora("lora", {f"{name}.weight": tuple(module.weight.shape)}))
    patch = comfy.model_patcher.LowVramPatch(f"{name}.weight", patched.patches)
    x = torch.randn(3, module.in_features)
    plain = module(x)
    exact = torch.nn.functional.linear(x, patch(module.weight.dequantize()), module.bias)

    def attach(patch, functions):
        pairs = [("weight_lowvram_function", patch), ("weight_function", functions)]
        for attribute, value in pairs if order == "as ComfyUI" else pairs[::-1]:
            setattr(module, attribute, value)

    for _ in range(2):  # each time that the model is loaded
        attach(patch, [])
        assert module.weight_lowvram_function is None and len(module.weight_function) == 1
        assert distance(module(x), exact) < 1e-6
    attach(patch, [lambda weight: 2 * weight])
    assert distance(module(x) - module.bias, 2 * (exact - module.bias)) < 1e-6
    attach(None, [])
    assert torch.equal(module(x), plain) and module.weight_function == []
    # A layer whose weight is not quantized is ComfyUI's own.
    module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
    attach(patch, [])
    assert module.weight_lowvram_function is patch and module.weight_function == []


# ---- copies and clones


@variants
def test_clone_and_deepclone(load, mode, nested):
    model = load(mode, nested)
    want = sample(model)
    before = snapshot(model)
    for copied in (model.clone(), model.clone(disable_dynamic=True), model.clone(force_deepcopy=True), model.deepclone_multigpu()):
        assert packed(copied.model).keys() == before.keys()
        assert torch.equal(sample(copied), want)
        assert unchanged(copied, before)


@variants
def test_deepcopy_of_a_model(load, mode, nested):
    model = load(mode, nested)
    copied = copy.deepcopy(model.model.diffusion_model)
    ours, theirs = packed(copied), packed(model.model.diffusion_model)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert same_bytes(weight, theirs[name])
        assert not {t.data_ptr() for t in tensors(weight).values()} & {t.data_ptr() for t in tensors(theirs[name]).values()}
    for layer, source in zip(copied.modules(), model.model.diffusion_model.modules()):
        assert type(layer) is type(source)
        assert getattr(layer, "quant_format", None) == getattr(source, "quant_format", None)


# ---- the layer


@variants
@pytest.mark.parametrize("mode_", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda mode: mode.__name__)
def test_a_layer_gives_what_the_decoded_weight_gives(load, mode, nested, mode_):
    for module in list(layers(load(mode, nested)).values())[:3]:
        x, weight = torch.randn(2, 3, module.in_features), module.weight.dequantize()
        with mode_():
            assert torch.equal(module(x), torch.nn.functional.linear(x, weight, module.bias))
            half = module(x.bfloat16())
            assert half.dtype == torch.bfloat16
            torch.testing.assert_close(half.float(), torch.nn.functional.linear(x, weight, module.bias), rtol=0.1, atol=0.1)
            module.weight_function = [lambda weight: -weight]
            assert torch.equal(module(x), torch.nn.functional.linear(x, -weight, module.bias))
            module.weight_function = []
        given = torch.randn(2, module.in_features, requires_grad=True)
        module(given).sum().backward()
        torch.testing.assert_close(given.grad, weight.sum(0).expand(2, -1))


def test_a_layer_can_be_interrupted(load):
    module = next(iter(layers(load()).values()))
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException), torch.inference_mode():
        module(torch.randn(2, module.in_features))
    module(torch.randn(2, module.in_features))


# ---- torch.compile


def test_torch_compile():
    """A layer compiles in one piece, with a LoRA beside it, too."""
    code = """
import comfyui
import comfy.model_patcher, comfy.weight_adapter, torch
from layout_weights import KINDS, quantized, random
from gquant.comfy.ops import linear_4bit_ops

x = [random(rows, 128, seed=rows) for rows in (2, 3, 5)]
for layout, nested in KINDS:
    layer = linear_4bit_ops(torch.float32).Linear(128, 96)
    layer.load_state_dict({"weight": quantized(layout, nested), "bias": torch.ones(96)})
    adapter = comfy.weight_adapter.LoRAAdapter(set(), (random(96, 4), random(4, 128), None, None, None, None))
    patch = comfy.model_patcher.LowVramPatch("k", {"k": [(1.0, adapter, 1.0, None, None)]})
    for functions in ([], [patch]):
        layer.weight_function = functions
        for dynamic in (False, True):
            torch._dynamo.reset()
            compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
            with torch.inference_mode():
                for given in x:
                    torch.testing.assert_close(compiled(given), layer(given))
"""
    folder = Path(__file__).parent
    paths = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(folder.with_name('python_binding'))!r}]\n"
    support.python(paths + code, TORCHDYNAMO_DISABLE="0")


# ---- state dicts


@variants
def test_load_state_dict_takes_what_state_dict_gives(load, mode, nested):
    model, other = load(mode, nested), load(mode, nested)
    for module in layers(other).values():
        module.weight = torch.nn.Parameter(module.weight.requantize_from_float(module.weight.dequantize() * 2), requires_grad=False)
    assert not unchanged(other, snapshot(model))
    other.model.load_state_dict(model.model.state_dict(), strict=True)
    assert unchanged(other, snapshot(model))
    for ours, theirs in zip(packed(model.model).values(), packed(other.model).values()):
        assert ours._params.dtype == theirs._params.dtype == torch.bfloat16
        assert ours.dtype == theirs.dtype


def test_a_layer_takes_a_plain_weight_again(load):
    model = load()
    name, module = next(iter(layers(model).items()))
    dense = module.weight.dequantize()
    module.load_state_dict({"weight": dense, "bias": module.bias})
    assert not is_4bit(module.weight) and torch.equal(module.weight, dense)
    patched = with_lora(model, lora("lora", {f"{name}.weight": tuple(dense.shape)}))
    assert sample(patched).isfinite().all()
    assert not is_4bit(module.weight)
    comfy.model_management.unload_all_models()
    assert torch.equal(module.weight, dense) and set(module.state_dict()) == {"weight", "bias"}


def test_a_weight_of_another_shape_is_an_error(load):
    module = next(iter(layers(load()).values()))
    sd = module.state_dict()
    other = next(m for m in layers(load()).values() if m.weight.shape != module.weight.shape)
    with pytest.raises(RuntimeError, match=r"weight is \[.*\]; this layer's is \["):
        other.load_state_dict(sd)


@variants
def test_key_patches_name_every_tensor(load, mode, nested):
    model = load(mode, nested)
    patches = model.get_key_patches("diffusion_model.")
    assert patches.keys() == model.model_state_dict("diffusion_model.").keys()
    for name, module in layers(model).items():
        weight, convert = patches[f"{name}.weight"][0]
        assert torch.equal(convert(weight), module.weight.dequantize())


@variants
def test_merging_models(load, models, mode, nested):
    """What ModelMergeSimple does: the second model's weights as patches of the first."""
    model, decoded = load(mode, nested), comfy.sd.load_diffusion_model(models.decoded("flux", mode, nested))
    others = load("fp4" if mode == "nf4" else "nf4"), comfy.sd.load_diffusion_model(models.source("flux"))
    for other in others:
        merged, want = model.clone(), decoded.clone()
        for target in (merged, want):
            target.add_patches({key: patch for key, patch in other.get_key_patches("diffusion_model.").items()}, 0.3, 0.7)
        before = snapshot(model)
        assert distance(sample(merged), sample(want)) < 0.2
        assert packed(model.model).keys() == before.keys()
        comfy.model_management.unload_all_models()
        assert unchanged(model, before)

"""NF4Layout and FP4Layout keep the contract of comfy-kitchen's layouts, with the bytes of bitsandbytes."""

import dataclasses

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

import gquant
from gquant.comfy import is_4bit, wrap
from gquant.torch import QuantState, dequantize_4bit
from support import modules
from layout_weights import DTYPES, KINDS, LAYOUTS, NAMES, quantized, random, same_bytes, tensors

kinds = pytest.mark.parametrize("layout, nested", KINDS, ids=NAMES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_registry_has_it(layout):
    assert get_layout_class(layout.name) is layout
    assert layout.name.startswith("GQuant")
    assert layout.supports_fast_matmul()


@kinds
@dtypes
def test_quantize_gives_bitsandbytes_weight(layout, nested, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random(64, 128, dtype)
    ours = QuantizedTensor.from_float(weight, layout.name, nested=nested)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=layout.quant_type)
    theirs = functional.dequantize_4bit(packed, state)
    assert ours.dtype == dtype and ours.shape == weight.shape
    decoded = ours.dequantize()
    assert decoded.dtype == dtype
    # bitsandbytes on the CPU rounds the mean of nested statistics, and values halfway between codes, otherwise.
    far = ((decoded.float() - theirs.float()).abs() > 1e-2 * theirs.float().abs() + 1e-6).float().mean()
    assert far < 1e-3


@pytest.mark.parametrize("case", sorted(modules()))
def test_wrap_takes_what_bitsandbytes_saved(case):
    saved = modules()[case]
    state = QuantState.from_dict({key.removeprefix("weight."): part for key, part in saved.items() if key.startswith("weight.")})
    weight = wrap(saved["weight"], state)
    assert is_4bit(weight) and weight.shape == state.shape and weight.dtype == state.dtype
    assert weight._qdata.data_ptr() == saved["weight"].data_ptr() and weight._params.scale.data_ptr() == state.absmax.data_ptr()
    assert torch.equal(weight.dequantize(), dequantize_4bit(saved["weight"], state))
    again = weight.state_dict("weight")
    assert again.keys() == {key for key in saved if key.startswith("weight")}
    for key, part in again.items():
        assert torch.equal(part.view(torch.uint8).flatten(), saved[key].view(torch.uint8).flatten()), key


@kinds
def test_state_dict_loads_into_bitsandbytes(layout, nested):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = quantized(layout, nested, dtype=torch.bfloat16)
    parts = weight.state_dict()
    parameter = bitsandbytes.nn.Params4bit.from_prequantized(
        parts.pop(""), {key.removeprefix("."): part for key, part in parts.items()}, device="cpu"
    )
    state = parameter.quant_state
    assert state.dtype == torch.bfloat16 and state.shape == weight.shape
    theirs = bitsandbytes.functional.dequantize_4bit(parameter.data, state)
    torch.testing.assert_close(weight.dequantize(), theirs, rtol=1e-2, atol=1e-6)


@kinds
def test_a_state_dict_shares_no_memory_with_another(layout, nested, tmp_path):
    from safetensors.torch import load_file, save_file

    layers = {f"{i}.weight": quantized(layout, nested) for i in range(2)}
    saved = {key: part for name, weight in layers.items() for key, part in weight.state_dict(name).items()}
    save_file(saved, tmp_path / "two.safetensors")
    for key, part in load_file(tmp_path / "two.safetensors").items():
        assert torch.equal(part, saved[key])


@kinds
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7, 64), (64, 72)])
def test_any_shape(layout, nested, shape):
    weight = random(*shape)
    ours = QuantizedTensor.from_float(weight, layout.name, nested=nested)
    packed, state = gquant.torch.quantize_4bit(weight, compress_statistics=nested, quant_type=layout.quant_type)
    assert torch.equal(ours.dequantize(), dequantize_4bit(packed, state))


@kinds
def test_statistics_stay_as_they_are(layout, nested):
    weight = quantized(layout, nested)
    params = weight._params
    assert params.nested == nested
    assert params.scale.dtype == (torch.uint8 if nested else torch.float32)
    assert weight.layout_cls.get_plain_tensors(weight)[:2] == (weight._qdata, params.scale)
    memory = sum(tensor.nbytes for tensor in tensors(quantized(layout, nested, 1024, 1024)).values())
    assert memory / 1024**2 <= (0.53 if nested else 0.5625)


@kinds
def test_params_move_clone_and_copy(layout, nested):
    weight, other = quantized(layout, nested), quantized(layout, nested, stochastic_rounding=3)
    cloned = weight._params.clone()
    for name in cloned._tensor_fields():
        ours, theirs = getattr(cloned, name), getattr(weight._params, name)
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    halved = dataclasses.replace(cloned, orig_dtype=torch.float16)
    assert (halved.blocksize, halved.nested, halved.dtype) == (cloned.blocksize, cloned.nested, cloned.dtype)
    assert weight._params.to_device(torch.device("cpu")).nested == nested
    target = QuantizedTensor.from_float(random(96, 128, seed=1), layout.name, nested=nested)
    target.copy_(other)
    assert same_bytes(target, other)


def test_params_say_what_is_wrong():
    weight = quantized(*KINDS[0])
    with pytest.raises(gquant.InvalidArgumentError, match="absmax is torch.uint8; want torch.float32"):
        dataclasses.replace(weight._params, scale=weight._params.scale.byte())
    with pytest.raises(gquant.InvalidArgumentError, match="no shape"):
        wrap(weight._qdata, QuantState(weight._params.scale, blocksize=64, quant_type="nf4"))
    with pytest.raises(gquant.GquantError, match="blocksize"):
        QuantizedTensor.from_float(random(4, 64), KINDS[0][0].name, blocksize=48)


# ---- requantization


@kinds
@dtypes
@pytest.mark.parametrize("decoded", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [None, 0, 5])
def test_requantizing_what_did_not_change_gives_the_same_bytes(layout, nested, dtype, decoded, seed):
    weight = quantized(layout, nested, dtype=dtype, blocksize=128).to(decoded)
    again = weight.requantize_from_float(weight.dequantize(), scale="recalculate", stochastic_rounding=seed, inplace_ops=True)
    assert same_bytes(again, weight)
    assert again.dtype == decoded and again._params.dtype == dtype


def test_both_zeros_of_fp4_stay():
    layout = LAYOUTS[1]
    packed = torch.full((32, 1), 0x80, dtype=torch.uint8)
    packed[0] = 0x38
    state = QuantState(torch.ones(1), torch.Size((1, 64)), None, 64, "fp4", torch.bfloat16)
    weight = wrap(packed, state)
    assert torch.equal(weight.requantize_from_float(weight.dequantize())._qdata, packed)
    assert layout.quantize(weight.dequantize())[0][1] != 0x80  # which only the weight itself can tell


@kinds
def test_requantizing_a_changed_weight_keeps_its_geometry(layout, nested):
    weight = quantized(layout, nested, dtype=torch.bfloat16, blocksize=256)
    changed = weight.requantize_from_float(weight.dequantize() + 0.1, scale="recalculate", stochastic_rounding=7)
    assert not torch.equal(changed._qdata, weight._qdata)
    params, wanted = changed._params, weight._params
    assert changed._layout_cls == layout.name
    assert (params.blocksize, params.nested, params.dtype, params.orig_shape) == (256, nested, torch.bfloat16, (96, 128))
    for name, tensor in tensors(changed).items():
        assert (tensor.shape, tensor.dtype) == (tensors(weight)[name].shape, tensors(weight)[name].dtype)
    weight.copy_(changed)  # what dynamic VRAM does with a patched weight
    assert same_bytes(weight, changed)
    assert wanted.blocksize == weight._params.blocksize


# ---- stochastic rounding


@kinds
def test_stochastic_rounding_is_seeded_and_keeps_absmax(layout, nested):
    first, second, other, nearest = (quantized(layout, nested, stochastic_rounding=seed) for seed in (1, 1, 2, None))
    assert same_bytes(first, second)
    assert not torch.equal(first._qdata, other._qdata)
    assert not torch.equal(first._qdata, nearest._qdata)
    assert torch.equal(first._params.scale, nearest._params.scale)


@kinds
def test_stochastic_rounding_takes_a_neighbour_of_the_value(layout, nested):
    weight = random(96, 128)
    absmax = QuantizedTensor.from_float(weight, layout.name, nested=nested)
    ones = torch.full_like(absmax._qdata, 0xFF if layout.quant_type == "nf4" else 0x33)  # the code of 1
    scales = QuantizedTensor(ones, layout.name, absmax._params).dequantize()
    values = torch.tensor(gquant.codebook(layout.quant_type).tolist()).unique()
    x = (weight / scales).clamp(-1, 1)
    chosen = quantized(layout, nested, stochastic_rounding=9).dequantize() / scales
    high = values[torch.searchsorted(values, x).clamp(max=len(values) - 1)]
    low = values[(torch.searchsorted(values, x) - 1).clamp(min=0)]
    assert (((chosen - high).abs() < 1e-5) | ((chosen - low).abs() < 1e-5)).all()


@kinds
def test_stochastic_rounding_is_right_in_the_mean(layout, nested):
    weight = random(16, 64)
    nearest = QuantizedTensor.from_float(weight, layout.name, nested=nested)
    rounds = 100
    total = sum(
        QuantizedTensor.from_float(weight, layout.name, nested=nested, stochastic_rounding=seed).dequantize() for seed in range(1, rounds + 1)
    )
    # A step between codes is at most a third of absmax: five standard deviations of the mean. Nearest codes are further off.
    bound = 5 * weight.abs().max() / 6 / rounds**0.5
    unclipped = weight.abs() < 0.9 * weight.abs().view(16, 1, 64).amax(-1)
    assert ((total / rounds - weight).abs() * unclipped).max() < bound < (nearest.dequantize() - weight).abs().max()


def test_values_of_codes_are_not_rounded_away():
    weight = quantized(*KINDS[0])
    again = QuantizedTensor.from_float(weight.dequantize(), weight._layout_cls, stochastic_rounding=3)
    assert (again._qdata != weight._qdata).float().mean() < 1e-3


def test_zeros_stay_zeros():
    for layout, nested in KINDS:
        weight = QuantizedTensor.from_float(torch.zeros(4, 64), layout.name, nested=nested, stochastic_rounding=4)
        assert torch.equal(weight.dequantize(), torch.zeros(4, 64))

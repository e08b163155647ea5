"""What torch does with a weight of our layouts, function by function: what ComfyUI's loaders, patchers and savers rest on.

The tests named for a limit pin what comfy-kitchen cannot do, and what gquant.comfy.ops therefore does itself.
"""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from gquant.comfy import is_4bit
from layout_weights import KINDS, NAMES, quantized, random, same_bytes, tensors

kinds = pytest.mark.parametrize("layout, nested", KINDS, ids=NAMES)


def pointers(weight):
    return {name: tensor.data_ptr() for name, tensor in tensors(weight).items()}


@kinds
@pytest.mark.parametrize("wrap", [lambda w: torch.nn.Parameter(w, requires_grad=False), torch.Tensor.detach, lambda w: w.data])
def test_parameter_detach_and_data_share_the_codes(layout, nested, wrap):
    weight = quantized(layout, nested)
    wrapped = wrap(weight)
    assert is_4bit(wrapped) and same_bytes(wrapped, weight)
    assert wrapped._qdata.data_ptr() == weight._qdata.data_ptr()
    assert wrapped._params.scale.data_ptr() != weight._params.scale.data_ptr()  # comfy-kitchen copies them


@kinds
@pytest.mark.parametrize("use", [torch.Tensor.detach, lambda w: w[1:], QuantizedTensor.dequantize], ids=["detach", "slice", "dequantize"])
def test_what_is_still_being_read_is_waited_for(layout, nested, use):
    weight = quantized(layout, nested)
    late = {name: torch.zeros_like(tensor) for name, tensor in tensors(weight).items()}

    def read():
        for name, tensor in tensors(weight).items():
            late[name].copy_(tensor)

    codes, *parts = late.values()
    params = replace(weight._params, **dict(zip(weight._params._tensor_fields(), parts)), wait=read)
    got, want = use(QuantizedTensor(codes, weight._layout_cls, params)), use(weight)
    assert same_bytes(got, want) if is_4bit(got) else torch.equal(got, want)


def test_a_parameter_is_one():
    assert isinstance(torch.nn.Parameter(quantized(*KINDS[0]), requires_grad=False), torch.nn.Parameter)


def test_to_the_same_is_the_same_object():
    weight = quantized(*KINDS[0])
    assert weight.to(torch.float32) is weight and weight.to("cpu") is weight


@kinds
@pytest.mark.parametrize("inference", [False, True])
def test_to_another_dtype_keeps_the_bytes(layout, nested, inference):
    weight = quantized(layout, nested, dtype=torch.bfloat16)
    with torch.inference_mode(inference):
        other = weight.to(torch.float16)
    assert other.dtype == torch.float16 and other.dequantize().dtype == torch.float16
    assert same_bytes(other, weight)
    assert (other._qdata.data_ptr() == weight._qdata.data_ptr()) == inference  # copied outside of inference mode
    assert other._params.dtype == torch.bfloat16  # what a file calls it


@kinds
def test_clone_copies_everything(layout, nested):
    weight = quantized(layout, nested)
    cloned = weight.clone()
    assert same_bytes(cloned, weight)
    assert not set(pointers(cloned).values()) & set(pointers(weight).values())


@kinds
def test_transposing_shares_everything(layout, nested):
    weight = quantized(layout, nested)
    turned = weight.t()
    assert is_4bit(turned) and turned.shape == (128, 96) and pointers(turned) == pointers(weight)
    assert torch.equal(turned.dequantize(), weight.dequantize().t())
    assert torch.equal(turned.t().dequantize(), weight.dequantize())
    assert turned.t().state_dict()[""] is weight._qdata


@kinds
@pytest.mark.parametrize(
    "function",
    [
        lambda w: w.view(-1),
        lambda w: w[3:9],
        lambda w: torch.cat([w, w]),
        lambda w: w.chunk(2)[1],
        lambda w: w + 1,
        lambda w: w.narrow(1, 5, 7),
        lambda w: w.float(),
        torch.zeros_like,
        lambda w: w.T,
        lambda w: w.abs().amax(),
    ],
    ids=["view", "slice", "cat", "chunk", "add", "narrow", "float", "zeros_like", "T", "amax"],
)
def test_other_functions_get_the_decoded_weight(layout, nested, function):
    weight = quantized(layout, nested)
    result = function(weight)
    if result is not weight:
        assert torch.equal(result.dequantize() if is_4bit(result) else result, function(weight.dequantize()))


@kinds
def test_empty_like_has_the_same_geometry(layout, nested):
    weight = quantized(layout, nested)
    empty = torch.empty_like(weight)
    assert is_4bit(empty) and empty.shape == weight.shape
    assert {n: (t.shape, t.dtype) for n, t in tensors(empty).items()} == {n: (t.shape, t.dtype) for n, t in tensors(weight).items()}
    empty.copy_(weight)
    assert same_bytes(empty, weight)
    assert torch.equal(empty.dequantize(), weight.dequantize())


def test_copying_to_and_from_a_plain_tensor_is_a_limit():
    weight = quantized(*KINDS[0])
    with pytest.raises(AttributeError, match="_layout_cls"):
        torch.empty(96, 128).copy_(weight)
    with pytest.raises(TypeError, match="Cannot copy"):
        weight.copy_(torch.empty(96, 128))
    with pytest.raises(TypeError, match="Layout mismatch"):
        weight.copy_(quantized(*KINDS[2]))


def test_copying_and_pickling_a_bare_weight_is_a_limit(tmp_path):
    for weight in (quantized(*KINDS[0]), torch.nn.Parameter(quantized(*KINDS[0]), requires_grad=False)):
        with pytest.raises(RuntimeError, match="invalid python storage"):
            copy.deepcopy(weight)
        with pytest.raises(RuntimeError, match="invalid python storage"):
            pickle.dumps(weight)


def test_sizes():
    weight = quantized(*KINDS[0])
    assert weight.nbytes == weight._qdata.nbytes == 96 * 128 // 2
    assert weight.numel() == 96 * 128 and weight.element_size() == 4
    assert weight.data_ptr() == weight._qdata.data_ptr()
    assert weight.untyped_storage().nbytes() == 96 * 128 * 4  # what the decoded weight would take


@kinds
def test_flattening_lists_every_tensor(layout, nested):
    weight = quantized(layout, nested)
    names, context = weight.__tensor_flatten__()
    inner = {name: getattr(weight, name) for name in names}
    assert len(inner) == (5 if nested else 2)
    assert all(type(tensor) is torch.Tensor and tensor.is_contiguous() for tensor in inner.values())
    again = QuantizedTensor.__tensor_unflatten__(inner, context, None, None)
    assert same_bytes(again, weight) and again.dtype == weight.dtype


@kinds
def test_a_linear_layer_of_torch_keeps_it(layout, nested):
    layer = torch.nn.Linear(128, 96, bias=False, device="meta")
    weight = quantized(layout, nested)
    layer.load_state_dict({"weight": weight}, assign=True)
    assert is_4bit(layer.weight) and layer.weight._qdata.data_ptr() == weight._qdata.data_ptr()
    layer.requires_grad_(False).to(torch.bfloat16)
    assert is_4bit(layer.weight) and layer.weight.dtype == torch.bfloat16
    assert layer.weight._params.scale.dtype == weight._params.scale.dtype
    assert same_bytes(layer.weight, weight)


def test_loading_into_a_plain_parameter_is_a_limit():
    layer = torch.nn.Linear(128, 96, bias=False)
    with pytest.raises(RuntimeError):
        layer.load_state_dict({"weight": quantized(*KINDS[0])})


# ---- LoRA arithmetic: decode, add, quantize


@kinds
def test_a_lora_changes_the_weight_in_the_mean(layout, nested):
    weight = quantized(layout, nested)
    before = weight.clone()
    delta = 0.02 * random(96, 4, seed=1) @ random(4, 128, seed=2)
    patched = [
        weight.requantize_from_float(weight.dequantize() + delta, scale="recalculate", stochastic_rounding=seed, inplace_ops=True)
        for seed in range(1, 101)
    ]
    assert same_bytes(weight, before)
    mean = sum(p.dequantize() for p in patched) / len(patched)
    kept = ((mean - weight.dequantize()) * delta).sum() / delta.square().sum()
    assert abs(kept - 1) < 0.05
    nearest = weight.requantize_from_float(weight.dequantize() + delta).dequantize()
    assert ((nearest - weight.dequantize()) * delta).sum() / delta.square().sum() < 0.8  # what rounding to the nearest code loses

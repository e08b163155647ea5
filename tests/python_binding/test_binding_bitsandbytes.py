"""States and modules go to bitsandbytes and come from it without a changed bit."""

import bitsandbytes
import bitsandbytes.functional as F
import numpy
import pytest
import torch
from safetensors.torch import load_file

import gquant
import gquant.torch
from gquant.torch.state import arguments
from support import check_linear, decoded, same, save

TYPES = ["nf4", "fp4"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STORAGES = [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32]


def weight(dtype=torch.float32, shape=(96, 128)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def same_dict(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert same(a[key], b[key]), key


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
def test_states(quant_type, dtype, nested):
    x = weight(dtype)
    packed, ours = gquant.torch.quantize_4bit(x, 64, nested, quant_type)
    entries = ours.as_dict(packed=True)
    theirs = F.QuantState.from_dict(dict(entries), device="cpu")
    same_dict(theirs.as_dict(packed=True), entries)
    same_dict(gquant.torch.QuantState.from_dict(theirs.as_dict(packed=True)).as_dict(packed=True), entries)
    unpacked = gquant.torch.QuantState.from_dict(theirs.as_dict())
    same_dict(unpacked.as_dict(packed=True), entries)
    # bitsandbytes decodes ours; for FP4's second zero its sign differs.
    decoded = gquant.torch.dequantize_4bit(packed, ours)
    assert same(F.dequantize_4bit(packed, theirs) + 0, decoded + 0)
    assert same(gquant.torch.dequantize_4bit(packed, theirs), decoded)
    # The state without torch's class is the same.
    plain = gquant.quantize(x, quant_type, nested=nested)
    parts = plain.to_bitsandbytes()
    assert same(parts.pop("weight"), packed)
    same_dict(parts, entries)
    back = gquant.QuantState.from_bitsandbytes({"weight": packed, **theirs.as_dict(packed=True)})
    assert same(back.dequantize(), decoded)
    assert back.json() == plain.json()


def test_numpy_state_to_bitsandbytes():
    state = gquant.quantize(weight().numpy(), nested=True)
    parts = {key: torch.from_numpy(part) for key, part in state.to_bitsandbytes().items()}
    packed = parts.pop("weight")
    assert packed.shape == (96 * 64, 1)
    theirs = F.QuantState.from_dict(parts, device="cpu")
    assert numpy.array_equal(F.dequantize_4bit(packed, theirs).numpy(), state.dequantize())


def test_their_quantization_is_read():
    for dtype in DTYPES:
        for nested in (False, True):
            packed, theirs = F.quantize_4bit(weight(dtype), quant_type="nf4", compress_statistics=nested)
            ours = gquant.torch.QuantState.from_dict(theirs.as_dict(packed=True))
            assert same(gquant.torch.dequantize_4bit(packed, ours), F.dequantize_4bit(packed, theirs))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_storages(storage):
    packed, state = gquant.torch.quantize_4bit(weight(), quant_storage=storage)
    theirs, _ = F.quantize_4bit(weight(), quant_type="nf4", quant_storage=storage)
    assert packed.dtype == storage and packed.shape == theirs.shape
    assert same(gquant.torch.dequantize_4bit(packed, state), gquant.torch.dequantize_4bit(packed.view(torch.uint8), state))


def test_offset_under_another_default_dtype():
    _, state = gquant.torch.quantize_4bit(weight(), compress_statistics=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = gquant.torch.QuantState.from_dict(state.as_dict(packed=True))
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.offset.dtype == torch.float32 and again.offset == state.offset


KEY = "quant_state.bitsandbytes__nf4"


def text(**changes):
    entries = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [96, 128]} | changes
    import json

    return torch.tensor(list(json.dumps({k: v for k, v in entries.items() if v != "gone"}).encode()), dtype=torch.uint8)


WRONG = {
    "unknown key": lambda d: d | {"scales": d["absmax"]},
    "missing key": lambda d: {k: v for k, v in d.items() if k != "quant_map"},
    "two texts": lambda d: d | {"quant_state.bitsandbytes__fp4": d[KEY]},
    "another type's text": lambda d: {k: v for k, v in d.items() if k != KEY} | {"quant_state.bitsandbytes__fp4": d[KEY]},
    "no JSON": lambda d: d | {KEY: torch.zeros(4, dtype=torch.uint8)},
    "a list": lambda d: d | {KEY: torch.tensor(list(b"[1]"), dtype=torch.uint8)},
    "a key twice": lambda d: d | {KEY: torch.tensor(list(b'{"quant_type": "nf4", "quant_type": "nf4"}'), dtype=torch.uint8)},
    "a field too many": lambda d: d | {KEY: text(colour="red")},
    "a field too few": lambda d: d | {KEY: text(dtype="gone")},
    "int4": lambda d: d | {KEY: text(quant_type="int4")},
    "a number as type": lambda d: d | {KEY: text(quant_type=4)},
    "dtype": lambda d: d | {KEY: text(dtype="float64")},
    "shape": lambda d: d | {KEY: text(shape=["96", 128])},
    "blocksize": lambda d: d | {KEY: text(blocksize="64")},
    "half nested": lambda d: d | {"nested_absmax": d["absmax"]},
    "nested text only": lambda d: d | {KEY: text(nested_blocksize=256, nested_dtype="float32", nested_offset=0.5)},
    "nested blocksize": lambda d: d | {KEY: text(nested_blocksize=64, nested_dtype="float32", nested_offset=0.5)},
}


@pytest.mark.parametrize("case", WRONG)
def test_strict(case):
    packed, state = gquant.torch.quantize_4bit(weight())
    entries = WRONG[case](state.as_dict(packed=True))
    with pytest.raises(gquant.InvalidArgumentError):
        gquant.torch.QuantState.from_dict(entries)
    with pytest.raises(gquant.InvalidArgumentError):
        gquant.QuantState.from_bitsandbytes({"weight": packed, **entries})


# ---- modules


def case_names():
    from support import vectors

    return sorted(name.removesuffix(".reference") for name in vectors("modules") if name.endswith(".reference"))


def their_layer(case, entries):
    """bitsandbytes' module with a saved state dict, loaded the way that transformers does."""
    layer = bitsandbytes.nn.Linear4bit(128, 96, bias="bias" in entries, quant_type=case.split(".")[0])
    parts = {key: part for key, part in entries.items() if key.startswith("weight.")}
    layer.weight = bitsandbytes.nn.Params4bit.from_prequantized(entries["weight"], parts, device="cpu", module=layer)
    if "bias" in entries:
        layer.bias = torch.nn.Parameter(entries["bias"], requires_grad=False)
    return layer


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("case", case_names())
def test_linear_is_a_drop_in(case, assign, modules, tmp_path):
    entries = dict(modules[case])
    reference = entries.pop("reference")
    layer = gquant.torch.Linear4bit(128, 96, bias="bias" in entries)
    if "bias" in entries:
        layer.bias.data = layer.bias.data.to(entries["bias"].dtype)
    assert layer.load_state_dict(entries, assign=assign) == ([], [])
    assert layer.weight.data_ptr() == entries["weight"].data_ptr() if assign else layer.weight.data_ptr() != entries["weight"].data_ptr()
    weight = arguments(layer.weight, layer.quant_state)
    assert same(decoded(weight, reference.dtype), reference)
    for dtype in DTYPES:
        x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
        check_linear(layer(x), x, layer.bias, weight)
    # Out again, through a file, into bitsandbytes' layer and out of that.
    same_dict(dict(layer.state_dict()), entries)
    save(layer.state_dict(), tmp_path / "layer.safetensors")
    theirs = their_layer(case, load_file(tmp_path / "layer.safetensors"))
    same_dict(dict(theirs.state_dict()), entries)
    assert same(F.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state) + 0, reference + 0)


def test_model_of_layers(modules):
    """Keys of nested modules, plain load_state_dict, move, copy and cast."""
    import copy

    entries = {k: v for k, v in modules["nf4.nested.bfloat16.bf16"].items() if k != "reference"}
    model = torch.nn.Sequential(torch.nn.LayerNorm(128), gquant.torch.Linear4bit(128, 96), torch.nn.Linear(96, 8))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("1.")} | {f"1.{k}": v for k, v in entries.items()}
    model.load_state_dict(state)
    before = model(torch.ones(2, 128))
    saved = model.state_dict()
    assert saved["1.weight"].dtype == torch.bfloat16
    for changed in (copy.deepcopy(model), model.float(), model.half().float(), model.to("cpu", torch.float32)):
        same_dict({k: v for k, v in changed.state_dict().items() if "1.weight" in k}, {k: v for k, v in saved.items() if "1.weight" in k})
    assert torch.allclose(model(torch.ones(2, 128)), before, atol=1e-2)


def test_plain_weights_are_quantized():
    plain = torch.nn.Linear(128, 96)
    layer = gquant.torch.Linear4bit(128, 96, quant_type="nf4", compress_statistics=False, quant_storage=torch.bfloat16)
    layer.load_state_dict(plain.state_dict())
    packed, state = gquant.torch.quantize_4bit(plain.weight.data, quant_storage=torch.bfloat16)
    assert same(layer.weight.data, packed)
    check_linear(layer(torch.ones(128)), torch.ones(128), plain.bias, arguments(packed, state))


def test_meta_layer_is_filled_by_assignment():
    packed, state = gquant.torch.quantize_4bit(weight())
    layer = gquant.torch.Linear4bit(128, 96, bias=False, device="meta")
    layer.load_state_dict({"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}, assign=True)
    assert same(layer(torch.eye(128)).T.contiguous(), gquant.torch.dequantize_4bit(packed, state))


REFUSED = {
    "another shape": lambda d: gquant.torch.Linear4bit(96, 128, bias=False).load_state_dict(d),
    "no statistics": lambda d: gquant.torch.Linear4bit(128, 96, bias=False).load_state_dict({"weight": d["weight"]}),
    "short codes": lambda d: gquant.torch.Linear4bit(128, 96, bias=False).load_state_dict(d | {"weight": d["weight"][1:]}),
    "unknown part": lambda d: gquant.torch.Linear4bit(128, 96, bias=False).load_state_dict(d | {"weight.scale": d["weight"]}),
    "no weight": lambda d: gquant.torch.Linear4bit(128, 96, bias=False).load_state_dict({k: v for k, v in d.items() if k != "weight"}),
    "no bias": lambda d: gquant.torch.Linear4bit(128, 96).load_state_dict(d),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_state_dicts(case):
    packed, state = gquant.torch.quantize_4bit(weight())
    entries = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    with pytest.raises(RuntimeError, match="weight|bias"):
        REFUSED[case](entries)

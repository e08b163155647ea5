"""gquant.comfy.files: what belongs together is taken together, and joined without loss where that can be."""

import pytest
import support
import torch

import gquant
import gquant.torch
from gquant.comfy import files
from gquant.torch import quantize_4bit


def weight(rows, columns, seed=0, nested=False, blocksize=64, quant_type="nf4"):
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return files.Weight(*quantize_4bit(dense, blocksize, nested, quant_type))


def join(*parts):
    """A convert like those of ComfyUI: makes one weight of several."""
    return lambda sd: {"joined.weight": torch.cat([sd[name] for name in parts])}


def rearranged(values, convert):
    notices = []
    return files.rearranged(values, files.row_map(convert, values), notices), notices


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_joined_weights_decode_to_the_same_values(nested, blocksize):
    values = {name: weight(rows, 256, rows, nested, blocksize) for name, rows in (("q", 96), ("k", 32), ("v", 33))}
    made, notices = rearranged(values, join("v", "q", "k"))
    joined = made["joined.weight"]
    want = torch.cat([values[name].dequantize() for name in "vqk"])
    assert joined.shape == (161, 256) and support.same(joined.dequantize(), want)
    assert joined.state.absmax.dtype is torch.float32 and not notices


def test_rows_in_another_order():
    value = weight(64, 128)
    made, notices = rearranged({"a": value, "b": torch.arange(64)}, lambda sd: {name: torch.cat(tensor.chunk(2)[::-1]) for name, tensor in sd.items()})
    assert support.same(made["a"].dequantize(), torch.cat(value.dequantize().chunk(2)[::-1]))
    assert made["b"].tolist() == [*range(32, 64), *range(32)] and not notices


def test_renamed_tensors_are_not_touched():
    values = {"a": weight(64, 128, nested=True), "b": torch.zeros(3, 2, 2), "c": torch.tensor(7.0)}
    made, notices = rearranged(values, lambda sd: {f"new.{name}": tensor for name, tensor in sd.items()})
    assert made.keys() == {"new.a", "new.b", "new.c"} and not notices
    assert all(made[f"new.{name}"] is value for name, value in values.items())


def test_blocks_that_straddle_parts_are_quantized_again():
    values = {"q": weight(31, 96), "k": weight(32, 96, 1)}  # 31 · 96 is no multiple of 64
    made, notices = rearranged(values, join("q", "k"))
    dense = torch.cat([values["q"].dequantize(), values["k"].dequantize()])
    packed, state = quantize_4bit(dense)
    assert support.same(made["joined.weight"].packed, packed) and support.same(made["joined.weight"].state.absmax, state.absmax)
    assert len(notices) == 1 and "joined.weight" in notices[0] and "second time" in notices[0]
    # With whole blocks in each part nothing is lost, though rows begin within one.
    values = {"q": weight(2, 96), "k": weight(3, 96, 1)}
    made, notices = rearranged(values, join("q", "k"))
    assert support.same(made["joined.weight"].dequantize(), torch.cat([values["q"].dequantize(), values["k"].dequantize()])) and not notices


def test_formats_that_differ_are_quantized_again():
    values = {"q": weight(64, 64), "k": weight(64, 64, 1, quant_type="fp4")}
    made, notices = rearranged(values, join("q", "k"))
    assert made["joined.weight"].state.quant_type == "nf4" and len(notices) == 1


def test_parts_that_are_not_quantized_keep_their_values():
    values = {"q": weight(64, 64), "k": torch.randn(64, 64).bfloat16()}
    made, notices = rearranged(values, join("q", "k"))
    assert support.same(made["joined.weight"], torch.cat([values["q"].dequantize(), values["k"]]))
    assert len(notices) == 1 and "decoded" in notices[0]


@pytest.mark.parametrize("garbage", [-1, 5, 128, 1 << 40])
def test_part_that_is_missing(garbage):
    """ComfyUI makes room for q, k and v, and fills what the file has."""

    def convert(sd):
        return {"joined.weight": torch.cat([sd["q"], torch.full((64, 1), garbage)])}

    with pytest.raises(gquant.BadFileError, match="parts of joined.weight are missing"):
        files.row_map(convert, {"q": weight(64, 64), "v": weight(64, 64)})


def test_names_that_convert_does_not_know():
    assert files.row_map(lambda sd: None, {"q": weight(64, 64)}) is None


def state_dict(tmp_path, nested=False, convention="bitsandbytes"):
    layers = {"a.weight": torch.randn(64, 128), "b.c.weight": torch.randn(96, 64).half()}
    support.save(layers | {"a.bias": torch.zeros(64)}, tmp_path / "source.safetensors")
    gquant.convert(tmp_path / "source.safetensors", tmp_path / "nf4.safetensors", double_quant=nested, convention=convention, progress=False)
    from safetensors.torch import load_file

    return load_file(tmp_path / "nf4.safetensors")


@pytest.mark.parametrize("convention", ["bitsandbytes", "comfy"])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_of_a_file(tmp_path, nested, convention):
    tensors = state_dict(tmp_path, nested, convention)
    values = files.weights(tensors, [])
    assert values.keys() == {"a.weight", "b.c.weight", "a.bias"}
    with gquant.open(tmp_path / "nf4.safetensors") as model:
        for name, layer in model.layers.items():
            value = values[name]
            assert value.packed.data_ptr() == tensors[name].data_ptr()
            assert support.same(value.dequantize(), torch.from_numpy(layer.dequantize("float32")).to(value.state.dtype))
            assert value.absmax().dtype is torch.float32


@pytest.mark.parametrize("key", ["absmax", "nested_absmax", "quant_state"])
def test_statistics_that_are_not_numbers(tmp_path, key):
    tensors = state_dict(tmp_path, nested=key != "absmax")
    if key == "quant_state":
        name = "b.c.weight.quant_state.bitsandbytes__nf4"
        text = bytes(tensors[name].tolist())
        start = text.index(b'"nested_offset": ') + len(b'"nested_offset": ')
        tensors[name] = torch.tensor(list(text[:start] + b"NaN}"), dtype=torch.uint8)
    else:
        tensors[f"b.c.weight.{key}"][0] = float("inf")
    with pytest.raises(gquant.BadFileError, match="b.c.weight would decode to NaN or Inf.*--strict"):
        files.weights(tensors, [])


def test_state_without_codes(tmp_path):
    tensors = state_dict(tmp_path)
    del tensors["a.weight"]
    with pytest.raises(gquant.BadFileError, match="not there: a.weight"):
        files.weights(tensors, [])


def test_int8_weights_are_decoded():
    import bitsandbytes as bnb

    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(torch.randn(32, 64).half())
    tensors = {"a.weight": codes, "a.SCB": absmax, "a.weight_format": torch.zeros((), dtype=torch.uint8)}
    notices = []
    values = files.weights(tensors, notices)
    assert values.keys() == {"a.weight"} and len(notices) == 1
    want = bnb.functional.int8_vectorwise_dequant(codes, absmax)
    assert values["a.weight"].dtype is torch.float16
    assert torch.allclose(values["a.weight"].float(), want.float(), rtol=1e-3, atol=0)

"""Models, read through Python."""

import gc
import os
import threading

import numpy
import pytest
import torch
from safetensors import safe_open

import gquant
import gquant.torch
from gquant.torch.state import arguments
from support import check_linear, same, save


@pytest.fixture
def model(converted):
    with gquant.open(converted[0]) as model:
        yield model


def test_names(model, converted):
    _, layers, others = converted
    assert model.layers.keys() == layers.keys() and model.tensors.keys() == others.keys()
    assert set(model) == layers.keys() | others.keys() and len(model) == 6
    assert "a.weight" in model and "a.weight.absmax" not in model and model.get("nothing") is None
    assert model["a.weight"] is model.layers["a.weight"] and model["a.bias"] is model.tensors["a.bias"]
    for error in (KeyError, FileNotFoundError, gquant.NotFoundError):
        with pytest.raises(error, match="no tensor or layer 'x'"):
            model["x"]


def test_metadata(model):
    assert model.metadata["author"] == "Ωmega"


def test_tensors(model, converted):
    for name, want in converted[2].items():
        tensor = model.tensors[name]
        assert (tensor.dtype, tensor.shape) == (str(want.dtype).removeprefix("torch."), tuple(want.shape))
        assert tensor.nbytes == want.nbytes
        out = torch.empty_like(want)
        assert tensor.read(out) is out and torch.equal(out, want)
        with open(tensor.file, "rb") as f:
            f.seek(tensor.file_offset)
            assert f.read(tensor.nbytes) == bytes(want.reshape(-1).view(torch.uint8).tolist())
    assert (model.tensors["a.bias"].read() == converted[2]["a.bias"].numpy()).all()
    assert (model.tensors["a.bias"].read(rows=(3, 10)) == converted[2]["a.bias"].numpy()[3:10]).all()
    raw = bytearray(8)
    model.tensors["steps"].read(raw)
    assert int.from_bytes(raw, "little") == 7


def test_layers(model, converted):
    path, layers, _ = converted
    with safe_open(str(path), "pt") as f:
        for name, source in layers.items():
            layer = model.layers[name]
            assert (layer.format, layer.convention, layer.nested, layer.blocksize) == ("nf4", "bitsandbytes", True, 64)
            assert layer.shape == tuple(source.shape) and layer.dtype == str(source.dtype).removeprefix("torch.")
            state = layer.read(like=source)
            assert same(state.packed.reshape(-1, 1), f.get_tensor(name))
            assert same(state.absmax, f.get_tensor(f"{name}.absmax"))
            assert same(state.nested_absmax, f.get_tensor(f"{name}.nested_absmax"))
            assert state.json().encode() == bytes(f.get_tensor(f"{name}.quant_state.bitsandbytes__nf4").tolist())
            whole = state.dequantize()
            assert same(layer.dequantize(out=torch.empty_like(source)), whole)
            rows = layer.dequantize(out=torch.empty_like(source[5:40]), rows=(5, 40), threads=1)
            assert same(rows, whole[5:40])
            assert numpy.array_equal(layer.dequantize("float32"), state.dequantize("float32").numpy())


def test_prefix_and_include(converted):
    with gquant.open(converted[0], prefix="a.") as model:
        assert set(model) == {"weight", "bias"}
    with gquant.open(str(converted[0]), include=["*.bias", "c*"]) as model:
        assert set(model) == {"a.bias", "c.weight"}
    with gquant.open(os.fsencode(converted[0]), include="b*") as model:
        assert list(model) == ["b.weight"]


def test_wrong_arguments(model, converted):
    layer, tensor = model.layers["a.weight"], model.tensors["a.bias"]
    for call, text in {
        lambda: layer.dequantize(rows=(90, 97)): "rows 90 to 97 of a.weight",
        lambda: layer.dequantize(rows=(3, 2)): "rows 3 to 2",
        lambda: tensor.read(rows=(-1, 2)): "rows -1 to 2",
        lambda: model.tensors["steps"].read(rows=(0, 1)): "rows 0 to 1",
        lambda: layer.dequantize("int8"): "dtype is int8",
        lambda: tensor.read(numpy.empty(96, "f8")): "out has dtype float64; want float32",
        lambda: tensor.read(numpy.empty(95, "f4")): "out has 380 bytes; want 384",
        lambda: gquant.open(converted[0], include="["): "include",
    }.items():
        with pytest.raises(gquant.InvalidArgumentError) as caught:
            call()
        assert text in str(caught.value)


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        gquant.open(tmp_path / "nowhere.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(gquant.BadFileError, match="bad.safetensors"):
        gquant.open(tmp_path / "bad.safetensors")


def test_closed(converted):
    model = gquant.open(converted[0])
    tensor = model.tensors["a.bias"]
    model.close()
    model.close()
    assert "closed" in repr(model)
    for call in (tensor.read, lambda: model.layers, lambda: model["x"]):
        with pytest.raises(gquant.InvalidHandleError, match="is closed"):
            call()


def test_files_are_closed_without_close(converted):
    def descriptors():
        return sum(os.path.realpath(f"/proc/self/fd/{n}") == str(converted[0]) for n in os.listdir("/proc/self/fd"))

    gc.collect()
    before = descriptors()
    model = gquant.open(converted[0])
    layer = model.layers["a.weight"]
    assert descriptors() == before + 1
    del model
    layer.dequantize()  # what was taken from a model keeps it open
    del layer
    assert descriptors() == before


def test_threads_share_a_model(model, converted):
    want = {name: layer.dequantize("float32") for name, layer in model.layers.items()}
    wrong = []

    def work():
        for _ in range(20):
            for name, layer in model.layers.items():
                if not numpy.array_equal(layer.dequantize("float32", threads=1), want[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_close_while_others_read(converted):
    """A reader either gets its values or hears that the model is closed."""
    model = gquant.open(converted[0])
    layer = model.layers["a.weight"]
    want, wrong = layer.dequantize("float32"), []

    def work():
        try:
            while True:
                if not numpy.array_equal(layer.dequantize("float32", threads=1), want):
                    wrong.append("values")
        except gquant.InvalidHandleError:
            pass
        except Exception as e:
            wrong.append(e)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    model.close()
    for t in threads:
        t.join()
    assert not wrong


def test_shards(converted, tmp_path):
    path, layers, others = converted
    gquant.convert(path.with_name("source.safetensors"), tmp_path / "m.safetensors", max_shard_size=20_000)
    index = tmp_path / "m.safetensors.index.json"
    assert index.exists()
    for given in (index, tmp_path):
        with gquant.open(given) as model:
            assert set(model) == layers.keys() | others.keys()
            assert len({t.file for t in model.tensors.values()}) >= 1


def test_load_4bit_model(converted, modules, tmp_path):
    path, _, others = converted
    loaded = gquant.torch.load_4bit_model(path)
    with safe_open(str(path), "pt") as f:
        assert loaded.keys() == set(f.keys())
        for name in f.keys():
            assert same(loaded[name], f.get_tensor(name)), name
    layer = gquant.torch.Linear4bit(128, 96)
    layer.load_state_dict(gquant.torch.load_4bit_model(path, prefix="a."))
    dense = gquant.open(path).layers["a.weight"].read(like=loaded["a.bias"]).dequantize()
    assert same(gquant.torch.dequantize_4bit(layer.weight, layer.quant_state), dense) and same(layer.bias, others["a.bias"])
    check_linear(layer(torch.ones(2, 128)), torch.ones(2, 128), others["a.bias"], arguments(layer.weight, layer.quant_state))


def test_load_4bit_weights(converted):
    path, layers, others = converted
    tensors, weights = gquant.torch.load_4bit_weights(path)
    assert tensors.keys() == others.keys() and weights.keys() == layers.keys()
    with gquant.open(path) as model:
        for name, (packed, state) in weights.items():
            assert packed.dtype is torch.uint8 and packed.shape[1:] == (1,)
            assert same(gquant.torch.dequantize_4bit(packed, state), model.layers[name].dequantize(out=torch.empty(state.shape, dtype=state.dtype))), name


def test_reading_4bit_weights(converted):
    path, _, _ = converted
    tensors, weights = gquant.torch.load_4bit_weights(path)
    for waits in (True, False):
        with gquant.open(path) as model, gquant.torch.reading_4bit_weights(model, "cpu") as (early, coming, wait):
            assert early.keys() == tensors.keys() and all(same(early[name], tensor) for name, tensor in tensors.items())
            if waits:
                wait()
                assert all(same(packed, weights[name][0]) for name, (packed, _) in coming.items())
        assert coming.keys() == weights.keys()
        for name, (packed, state) in coming.items():
            want = weights[name][1].as_dict(packed=True)
            assert same(packed, weights[name][0]) and all(same(part, want[key]) for key, part in state.as_dict(packed=True).items())


def test_what_cannot_be_read_is_said_when_it_is_waited_for(converted, tmp_path):
    cut = tmp_path / "m.safetensors"
    cut.write_bytes(converted[0].read_bytes())
    with gquant.open(cut) as model:
        os.truncate(cut, cut.stat().st_size // 2)
        with pytest.raises(gquant.GquantError, match=str(cut)), gquant.torch.reading_4bit_weights(model, "cpu") as (_, _, wait):
            wait()


def test_load_4bit_model_reads_gptqmodels_names(modules, tmp_path):
    entries = {key: value for key, value in modules["nf4.nested.uint8.bf16"].items() if key != "reference"}
    renamed = {"a." + key.replace("weight.", "weight_").replace("quant_state.bitsandbytes__nf4", "quant_state"): value for key, value in entries.items()}
    save(renamed, tmp_path / "m.safetensors")
    loaded = gquant.torch.load_4bit_model(tmp_path / "m.safetensors", prefix="a.")
    assert loaded.keys() == entries.keys()
    for key in entries:
        assert same(loaded[key], entries[key]), key


def test_load_4bit_model_keeps_int8(tmp_path):
    from support import vectors

    entries = {"a." + k.removeprefix("int8."): v for k, v in vectors("modules").items() if k.startswith("int8.")}
    save(entries, tmp_path / "m.safetensors")
    loaded = gquant.torch.load_4bit_model(tmp_path / "m.safetensors")
    assert loaded.keys() == entries.keys()
    for key in entries:
        assert same(loaded[key], entries[key]), key


def test_sub_byte_tensors(tmp_path):
    import json
    import struct

    header = json.dumps({"x": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\1\2\3\4")
    with gquant.open(path) as model:
        tensor = model.tensors["x"]
        assert tensor.dtype == "float4_e2m1fn" and tensor.read().tolist() == [1, 2, 3, 4]
        assert tensor.read(rows=(1, 2)).tolist() == [3, 4]
    assert gquant.torch.load_4bit_model(path)["x"].tolist() == [1, 2, 3, 4]

"""Work on whole models, through Python."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import gquant
import support


@pytest.fixture(scope="module")
def source(converted):
    return converted[0].with_name("source.safetensors")


def test_convert(source, tmp_path):
    out = tmp_path / "out.safetensors"
    report = gquant.convert(source, out, "fp4", block_size=128, include=["*.weight"], exclude=["c*", "norm*"], quant_storage="bf16")
    assert report["outputs"] == [str(out)] and report["quantized"] == 2 and report["copied"] == 4
    listed = gquant.inspect(out)
    assert {layer["name"]: (layer["format"], layer["blocksize"], layer["storage"]) for layer in listed["layers"]} == {
        "a.weight": ("fp4", 128, "BF16"),
        "b.weight": ("fp4", 128, "BF16"),
    }
    again = tmp_path / "again.safetensors"
    again.write_bytes(source.read_bytes())
    assert gquant.convert(again)["outputs"] == [str(tmp_path / "again_nf4.safetensors")]
    with pytest.raises(gquant.GquantError, match="exist"):
        gquant.convert(source, out)
    assert gquant.convert(source, out, force=True, threads=1)["quantized"] == 3


def test_convert_is_the_command_line(source, tmp_path):
    program = support.ROOT / "bin" / "gquant"
    if not program.exists():
        pytest.skip("bin/gquant is not there")
    gquant.convert(source, tmp_path / "a.safetensors", double_quant=True, convention="comfy")
    command = [program, "convert", source, "-o", tmp_path / "b.safetensors", "--mode", "nf4", "--double_quant", "--convention", "comfy"]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_back_again(source, converted, tmp_path):
    gquant.dequantize_model(converted[0], tmp_path / "plain.safetensors", dtype="f32")
    with gquant.open(tmp_path / "plain.safetensors") as model, gquant.open(converted[0]) as quantized:
        for name, layer in quantized.layers.items():
            assert (model.tensors[name].read() == layer.dequantize("float32")).all()
    report = gquant.diff(source, tmp_path / "plain.safetensors")
    assert {t["name"] for t in report["tensors"] if not t["equal"]} == set(converted[1])


def test_verify(converted, tmp_path):
    report = gquant.verify(converted[0], sha256=True)
    assert report["problems"] == [] and len(report["files"][0]["sha256"]) == 64
    support.save({"a.weight": torch.full((4, 4), torch.nan)}, tmp_path / "nan.safetensors")
    assert gquant.verify(tmp_path / "nan.safetensors")["suspects"]
    assert gquant.verify(tmp_path / "nan.safetensors", strict=True)["problems"]


def test_progress(source, tmp_path, capfd):
    seen = []
    gquant.convert(source, tmp_path / "out.safetensors", progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1] > 0
    gquant.convert(source, tmp_path / "out.safetensors", force=True)  # stderr is no terminal
    assert capfd.readouterr() == ("", "")


def test_progress_line(source, tmp_path):
    """On a terminal there is a line, which is gone at the end."""
    import pty

    master, slave = pty.openpty()
    code = f"import gquant; gquant.convert({str(source)!r}, {str(tmp_path / 'out.safetensors')!r})"
    env = {**os.environ, **support.ENVIRONMENT}
    subprocess.run([sys.executable, "-c", code], env=env, stderr=slave, check=True)
    os.close(slave)
    text = os.read(master, 10_000).decode()
    assert "100 %" in text and text.endswith("\r\x1b[K")


def test_errors(source, tmp_path):
    out = tmp_path / "out.safetensors"
    for call, error in {
        lambda: gquant.convert(tmp_path / "nowhere", out): FileNotFoundError,
        lambda: gquant.convert(source, out, "nf5"): gquant.GquantError,
        lambda: gquant.convert(source, out, block_size=48): gquant.GquantError,
        lambda: gquant.convert(source, out, threads="all"): gquant.InvalidArgumentError,
        lambda: gquant.convert(source, out, device="gpu"): gquant.InvalidArgumentError,
        lambda: gquant.convert(source, out, device="cuda:99"): (gquant.UnsupportedError, gquant.NotFoundError),
        lambda: gquant.convert(source, tmp_path / "no" / "folder" / "out.safetensors"): OSError,
        lambda: gquant.dequantize_model(source, out, dtype="f64"): gquant.InvalidArgumentError,
        lambda: gquant.verify(tmp_path / "nowhere"): FileNotFoundError,
        lambda: gquant.diff(source, tmp_path / "nowhere"): FileNotFoundError,
        lambda: gquant.inspect(tmp_path / "nowhere"): FileNotFoundError,
    }.items():
        with pytest.raises(error):
            call()
        assert not out.exists()


def test_exception_in_progress_cancels(source, tmp_path):
    def stop(done, total):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        gquant.convert(big(tmp_path), tmp_path / "out.safetensors", threads=1, progress=stop)
    assert sorted(os.listdir(tmp_path)) == ["big.safetensors"]


def big(folder):
    """A model that takes seconds and no space on disk."""
    path, shape = folder / "big.safetensors", (1 << 16, 1 << 15)
    size = 2 * shape[0] * shape[1]
    header = json.dumps({"a.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
    with open(path, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + size)
    return path


def test_interrupt_cancels(tmp_path):
    code = f"""
import signal
import gquant
signal.signal(signal.SIGINT, signal.default_int_handler)  # Python has none where tests run in the background of a shell
print("ready", flush=True)
try:
    gquant.convert({str(big(tmp_path))!r}, {str(tmp_path / "out.safetensors")!r}, threads=1)
except KeyboardInterrupt:
    print("interrupted")
"""
    env = {**os.environ, **support.ENVIRONMENT}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "interrupted\n"
    assert sorted(os.listdir(tmp_path)) == ["big.safetensors"]

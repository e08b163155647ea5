"""The commands, their flags and what they promise of their results."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import termios

import pytest
import torch

import checkpoints
from checkpoints import LAYERS, equal_bits
from program import GQUANT, gquant, listing, ok, ok_json, peak_memory, sha256, start, wait_until_written

SLOW = {"GQUANT_CPU": "generic"}  # so that there is time to interrupt


def layers_of(path):
    return sorted(layer["name"] for layer in ok_json("inspect", path)["layers"])


def test_the_roadmaps_command(tmp_path):
    tensors = checkpoints.mixed() | {"blocks.0.embedder.proj.weight": torch.randn(64, 64), "blocks.0.norm_out.linear.weight": torch.randn(64, 64)}
    checkpoints.save(tensors, tmp_path / "model.safetensors")
    command = (
        'gquant convert model.safetensors --output model_nf4.safetensors --mode nf4 --block_size 64 --double_quant --exclude "*.norm*,*.embed*"'
    )
    path = f"{GQUANT.parent}:{os.environ['PATH']}"
    subprocess.run(command, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    out = tmp_path / "model_nf4.safetensors"
    assert layers_of(out) == sorted(LAYERS)  # the two new ones are excluded
    assert all(layer["nested"] and layer["blocksize"] == 64 and layer["format"] == "nf4" for layer in ok_json("inspect", out)["layers"])


def test_dashes_and_underscores(mixed, tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    ok("convert", mixed, "-o", a, "--block_size", "128", "--double_quant", "--quant_storage", "bf16", "--max_shard_size", "1GB")
    ok("convert", mixed, "-o", b, "--block-size", "128", "--double-quant", "--quant-storage", "bf16", "--max-shard-size", "1GB")
    assert sha256(a) == sha256(b)


def test_default_output_lies_beside_the_input(mixed, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(mixed.read_bytes())
    ok("convert", "m.safetensors", cwd=tmp_path)
    ok("dequantize", "m_nf4.safetensors", cwd=tmp_path)
    assert {"m_nf4.safetensors", "m_nf4_dequantized.safetensors"} < set(listing(tmp_path))


@pytest.mark.parametrize(
    "options, left",
    [
        (["--exclude", "*.q.weight"], {"blocks.0.attn.q.weight"}),
        (["--exclude", "*.q.weight,*.k.weight"], {"blocks.0.attn.q.weight", "blocks.0.attn.k.weight"}),
        (["--exclude", "*.q.weight", "--exclude", "*mlp*"], {"blocks.0.attn.q.weight"} | {n for n in LAYERS if "mlp" in n}),
        (["--exclude", "blocks.*.attn.{q,v}.weight"], {"blocks.0.attn.q.weight", "blocks.0.attn.v.weight"}),
        (["--exclude", "blocks.?.attn.[kq].weight"], {"blocks.0.attn.q.weight", "blocks.0.attn.k.weight"}),
    ],
)
def test_exclude(mixed, tmp_path, options, left):
    out = tmp_path / "out.safetensors"
    ok("convert", mixed, "-o", out, *options)
    assert layers_of(out) == sorted(set(LAYERS) - left)
    source, got = checkpoints.load(mixed), checkpoints.load(out)
    assert all(equal_bits(got[name], source[name]) for name in left)


def test_include(mixed, tmp_path):
    out = tmp_path / "out.safetensors"
    ok("convert", mixed, "-o", out, "--include", "embed_tokens.weight,conv_in.weight", "--exclude", "conv_in*")
    assert layers_of(out) == sorted([*LAYERS, "embed_tokens.weight"])  # exclude wins


def test_plan_says_what_and_why(mixed, tmp_path):
    before = listing(mixed.parent)
    plan = ok_json("plan", mixed, "--exclude", "*.cut.weight")
    items = {item["name"]: item for item in plan["items"]}
    assert items.keys() == checkpoints.load(mixed).keys()
    reasons = {
        "embed_tokens.weight": "embedding", "conv_in.weight": "convolution", "blocks.0.norm1.weight": "norm",
        "blocks.0.attn.q.bias": "bias", "small.weight": "tiny", "blocks.0.mlp.cut.weight": "*.cut.weight", "position_ids": "not f32",
    }  # fmt: skip
    for name, item in items.items():
        assert item["action"] == ("copy" if name in reasons else "quantize"), name
        assert reasons.get(name, "linear") in item["reason"], name
        assert name in ok("plan", mixed)
    assert listing(mixed.parent) == before
    # The plan's sizes and places are those of the result.
    out = tmp_path / "out.safetensors"
    ok("convert", mixed, "-o", out, "--exclude", "*.cut.weight")
    header, start_of_data = checkpoints.header(out)
    planned = {o["name"]: o for item in plan["items"] for o in item["outputs"]}
    assert planned.keys() == header.keys() - {"__metadata__"}
    for name, o in planned.items():
        begin, end = header[name]["data_offsets"]
        assert (o["dtype"], o["shape"]) == (header[name]["dtype"], header[name]["shape"]), name
        assert (o["bytes"], o["offset"]) == (end - begin, start_of_data + begin), name
    assert ok_json("convert", mixed, "-o", out, "--dry-run", "--force", "--exclude", "*.cut.weight")["items"] == plan["items"]


def test_convert_reports(mixed, tmp_path):
    out = tmp_path / "out.safetensors"
    report = ok_json("convert", mixed, "-o", out)
    assert report["quantized"] == len(LAYERS) and report["copied"] == len(checkpoints.mixed()) - len(LAYERS)
    assert report["outputs"] == [str(out)] and report["output_bytes"] == out.stat().st_size
    assert report["nonfinite"] == report["warnings"] == [] and report["seconds"] > 0
    text = ok("convert", mixed, "-o", out, "--force")
    assert "GB/s" in text and "ratio" in text


def test_verify(mixed, tmp_path):
    out = tmp_path / "out.safetensors"
    ok("convert", mixed, "-o", out, "--double_quant", "--convention", "comfy")
    result = ok_json("verify", out, "--sha256")
    assert result["problems"] == [] and result["layers"] == len(LAYERS) and result["formats"] == ["nf4"]
    assert result["files"] == [{"path": str(out), "bytes": out.stat().st_size, "sha256": sha256(out)}]
    assert sha256(out) in ok("verify", out, "--sha256")


def test_verify_counts_nan_inf_and_zeros(tmp_path):
    bad = torch.randn(64, 64)
    bad[0, :3], bad[1, :2] = float("nan"), float("inf")
    path = checkpoints.save({"bad": bad, "zero": torch.zeros(64, 64), "good": torch.ones(64, 64)}, tmp_path / "m.safetensors")
    suspects = {s["name"]: s for s in ok_json("verify", path)["suspects"]}
    assert suspects["bad"]["nan"] == 3 and suspects["bad"]["inf"] == 2 and suspects["zero"]["all_zero"]
    assert "good" not in suspects
    assert gquant("verify", path, "--strict").returncode == 1


def test_diff_measures_what_it_says(mixed, tmp_path):
    out, plain = tmp_path / "out.safetensors", tmp_path / "plain.safetensors"
    ok("convert", mixed, "-o", out)
    ok("dequantize", out, "-o", plain)
    diff = ok_json("diff", mixed, out)
    source, values = checkpoints.load(mixed), checkpoints.load(plain)
    assert [t["snr_db"] for t in diff["tensors"]] == sorted(t["snr_db"] for t in diff["tensors"])  # worst first
    assert {t["name"] for t in diff["tensors"] if not t["equal"]} == set(LAYERS)
    for t in diff["tensors"]:
        a, b = source[t["name"]].double(), values[t["name"]].double()
        e = a - b
        assert t["max_error"] == e.abs().max().item()
        assert t["mean_error"] == pytest.approx(e.abs().mean().item(), rel=1e-9)
        assert t["mse"] == pytest.approx(e.square().mean().item(), rel=1e-9)
        if not t["equal"]:
            assert t["snr_db"] == pytest.approx(10 * torch.log10(a.square().sum() / e.square().sum()).item(), rel=1e-9)
            assert t["cosine"] == pytest.approx(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item(), rel=1e-9)
    assert all(t["equal"] for t in ok_json("diff", plain, out)["tensors"])
    assert len(ok("diff", mixed, out, "--top", "1").splitlines()) < len(ok("diff", mixed, out).splitlines())
    assert "blocks.*.attn.q.weight" in ok("diff", mixed, out, "--by-kind")


def test_version():
    assert ok("version").startswith("gquant ")
    info = ok_json("version")
    assert info["version"] and "generic" in info["cpu_levels"]
    assert ok_json("version", env={"GQUANT_CPU": "generic"})["cpu"] == "generic"
    p = gquant("version", env={"GQUANT_CPU": "abacus"})
    assert p.returncode == 1 and "abacus" in p.stderr


def test_nothing_but_the_result_is_printed(mixed, tmp_path):
    p = gquant("convert", mixed, "-o", tmp_path / "out.safetensors", "--json")
    assert p.returncode == 0 and p.stderr == "" and json.loads(p.stdout)


def test_progress_on_a_terminal(tmp_path):
    source = checkpoints.write_sparse(tmp_path / "in.safetensors", "BF16", [4096, 8192])
    terminal, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    p = start("convert", source, "-o", tmp_path / "out.safetensors", env=SLOW)
    assert p.communicate()[1] == "" and p.returncode == 0  # not on a pipe
    p = subprocess.Popen(
        [GQUANT, "convert", source, "-o", tmp_path / "out.safetensors", "--force", "--threads", "1"],
        stdout=subprocess.DEVNULL, stderr=other_end, env={**os.environ, **SLOW},
    )  # fmt: skip
    os.close(other_end)
    shown = b""
    while True:
        try:
            shown += (chunk := os.read(terminal, 4096))
        except OSError:  # the program has ended
            break
        if not chunk:
            break
    os.close(terminal)
    assert p.wait() == 0
    assert b"converting" in shown and b"B/s" in shown and b"%" in shown


# ---- determinism, memory, interruption


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_bytes_depend_on_nothing_but_the_input(mixed, tmp_path, nested):
    runs = {
        "one": ["--threads", "1"], "again": ["--threads", "1"], "two": ["--threads", "2"], "many": ["--threads", "7"], "default": [],
    }  # fmt: skip
    for name, options in runs.items():
        ok("convert", mixed, "-o", tmp_path / name, *["--double_quant"] * nested, *options)
    levels = ok_json("version")["cpu_levels"]
    assert "generic" in levels
    for level in levels:
        ok("convert", mixed, "-o", tmp_path / level, *["--double_quant"] * nested, env={"GQUANT_CPU": level})
    assert len({sha256(tmp_path / name) for name in [*runs, *levels]}) == 1


def test_memory_does_not_grow_with_the_model(tmp_path):
    peaks = []
    for rows in (2048, 16384):  # 64 MiB and 512 MiB
        source = checkpoints.write_sparse(tmp_path / "in.safetensors", "BF16", [rows, 16384])
        peaks.append(peak_memory("convert", source, "-o", tmp_path / "out.safetensors", "--force"))
    assert peaks[1] < 256, peaks
    # A float32 per block is kept for the layer under way: 16 MiB for 512 MiB of bf16.
    assert peaks[1] - peaks[0] < 64, peaks


@pytest.fixture
def long_model(tmp_path):
    """Enough layers, of enough bytes, to be interrupted between them."""
    g = torch.Generator().manual_seed(3)
    tensors = {f"blocks.{i}.linear.weight": torch.randn(1024, 1024, generator=g).bfloat16() for i in range(64)}
    return checkpoints.save(tensors, tmp_path / "model.safetensors")


def interrupt(model, out, sent, *options):
    """Starts a conversion that can be resumed and sends it the signal when a part is written."""
    p = start("convert", model, "-o", out, "--resume", "--threads", "1", *options, env=SLOW)
    assert wait_until_written(p, 2 << 20), "it was too fast to be interrupted"
    p.send_signal(sent)
    p.communicate()
    assert not out.exists()
    return p.returncode


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_resume(long_model, tmp_path, sent, nested):
    options = ["--double_quant"] * nested
    want, out = tmp_path / "want.safetensors", tmp_path / "out.safetensors"
    ok("convert", long_model, "-o", want, *options)
    code = interrupt(long_model, out, sent, *options)
    assert code == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    report = ok_json("convert", long_model, "-o", out, "--resume", *options)
    # After Ctrl-C the journal is complete. After a kill it holds what reached the disk before.
    assert sent == signal.SIGKILL or report["resumed"] > 0
    assert sha256(out) == sha256(want)
    assert set(listing(tmp_path)) == {"model.safetensors", "want.safetensors", "out.safetensors"}


def test_resume_of_another_job_starts_anew(long_model, tmp_path):
    out = tmp_path / "out.safetensors"
    interrupt(long_model, out, signal.SIGINT)
    report = ok_json("convert", long_model, "-o", out, "--resume", "--block_size", "128")
    assert report["resumed"] == 0
    out.unlink()
    interrupt(long_model, out, signal.SIGINT)
    checkpoints.save({name: -t for name, t in checkpoints.load(long_model).items()}, long_model)
    report = ok_json("convert", long_model, "-o", out, "--resume")
    assert report["resumed"] == 0
    want = tmp_path / "want.safetensors"
    ok("convert", long_model, "-o", want)
    assert sha256(out) == sha256(want)


def test_resume_of_shards(long_model, tmp_path):
    options = ["--max-shard-size", "3MB"]
    ok("convert", long_model, "-o", tmp_path / "want.safetensors", *options)
    out = tmp_path / "out.safetensors"
    p = start("convert", long_model, "-o", out, "--resume", "--threads", "1", *options, env=SLOW)
    assert wait_until_written(p, 8 << 20)
    p.send_signal(signal.SIGINT)
    p.communicate()
    assert p.returncode == 130 and not list(tmp_path.glob("out*.safetensors"))
    assert ok_json("convert", long_model, "-o", out, "--resume", *options)["resumed"] > 0
    files = listing(tmp_path)
    ours = {name: digest for name, digest in files.items() if name.startswith("out-")}
    assert len(ours) > 2 and ours == {name.replace("want", "out"): digest for name, digest in files.items() if name.startswith("want-")}
    assert not [name for name in files if "partial" in name]


def test_tune_keeps_an_existing_table(tmp_path):
    table = tmp_path / "table.json"
    table.write_text("{}")
    p = gquant("tune", "--output", table)
    assert p.returncode == 1 and f"{table} exists; --force replaces it" in p.stderr
    assert table.read_text() == "{}" and os.listdir(tmp_path) == ["table.json"]

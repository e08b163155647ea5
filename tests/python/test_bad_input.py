"""Whatever is wrong: an error that names the file, the tensor and the cause, the right exit code, and no file."""

import base64
import json
import os
import resource
import signal

import pytest
import torch

import checkpoints
from program import ROOT, gquant, listing, ok, ok_json, start, wait_until_written

CASES = json.loads((ROOT / "tests" / "vectors" / "safetensors_header.json").read_text())["cases"]


def fails(folder, *args, code=1, says=(), **options):
    """The command fails with the code, says these texts, and leaves the folder as it was."""
    before = listing(folder)
    p = gquant(*args, cwd=folder, **options)
    assert p.returncode == code, (p.returncode, p.stdout, p.stderr)
    assert p.stdout == ""
    lines = p.stderr.splitlines()
    assert lines and all(line.startswith("gquant: ") for line in lines), p.stderr
    for text in says:
        assert text in p.stderr, f"{text!r} is not in {p.stderr!r}"
    assert listing(folder) == before
    return p.stderr


def file_size_limit(size):
    """Options of a process whose files can't be larger: a full disk, as far as it can tell."""
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}


@pytest.fixture
def model(tmp_path, mixed):
    """A good model in a folder of its own."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(mixed.read_bytes())
    return path


# ---- files that are no safetensors files, or not whole


@pytest.mark.parametrize("case", [c for c in CASES if c["want"] == "reject"], ids=lambda c: c["name"])
def test_rejected_headers(tmp_path, case):
    (tmp_path / "bad.safetensors").write_bytes(base64.b64decode(case["file"]))
    for command in ("convert", "plan", "inspect", "verify", "dequantize"):
        fails(tmp_path, command, "bad.safetensors", says=["bad.safetensors"])
    fails(tmp_path, "diff", "bad.safetensors", "bad.safetensors", says=["bad.safetensors"])


@pytest.mark.parametrize("case", [c for c in CASES if c["want"] == "accept"], ids=lambda c: c["name"])
def test_accepted_headers(tmp_path, case):
    path = tmp_path / "good.safetensors"
    path.write_bytes(base64.b64decode(case["file"]))
    ok("inspect", path)


@pytest.mark.parametrize("size", [0, 7, 8, 100, "header", "header + 1", "all - 1"])
def test_truncated(model, size):
    data = model.read_bytes()
    end_of_header = checkpoints.header(model)[1]
    size = {"header": end_of_header, "header + 1": end_of_header + 1, "all - 1": len(data) - 1}.get(size, size)
    model.write_bytes(data[:size])
    fails(model.parent, "convert", "model.safetensors", says=["model.safetensors"])


def test_error_of_a_header_names_the_tensor(tmp_path):
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}
    checkpoints.write_raw(tmp_path / "bad.safetensors", {"layer.7.weight": entry}, bytes(8))
    fails(tmp_path, "convert", "bad.safetensors", says=["bad.safetensors", "layer.7.weight", "12", "8"])


# ---- quantized layers that contradict themselves


def damage(tensors, name):
    """The layer "a.weight" with one thing wrong; the texts that the error must have."""
    state_name = next(n for n in tensors if ".quant_state." in n)
    state = json.loads(bytes(tensors[state_name].numpy()))

    def put(**changes):
        text = json.dumps({**state, **changes}).encode()
        tensors[state_name] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    match name:
        case "codes missing":
            del tensors["a.weight"]
            return ["a.weight"]
        case "codes too short":
            tensors["a.weight"] = tensors["a.weight"][:-1].contiguous()
            return ["a.weight", "6143", "6144"]
        case "codes of a wrong dtype":
            tensors["a.weight"] = tensors["a.weight"].long()
            return ["a.weight", "I64"]
        case "absmax missing":
            del tensors["a.weight.absmax"]
            return ["a.weight", "absmax"]
        case "absmax too short":
            tensors["a.weight.absmax"] = tensors["a.weight.absmax"][:-1].clone()
            return ["a.weight.absmax", "192"]
        case "absmax of a wrong dtype":
            tensors["a.weight.absmax"] = tensors["a.weight.absmax"].double()
            return ["a.weight.absmax", "F64"]
        case "quant_map of a wrong size":
            tensors["a.weight.quant_map"] = torch.zeros(8)
            return ["a.weight.quant_map", "16"]
        case "nested_absmax missing":
            del tensors["a.weight.nested_absmax"]
            return ["a.weight", "nested_absmax"]
        case "nested_absmax of a wrong size":
            tensors["a.weight.nested_absmax"] = torch.zeros(7)
            return ["a.weight.nested_absmax", "7"]
        case "nested_quant_map of a wrong size":
            tensors["a.weight.nested_quant_map"] = torch.zeros(255)
            return ["a.weight.nested_quant_map", "256"]
        case "state is no JSON":
            tensors[state_name] = torch.frombuffer(bytearray(b"{nf4"), dtype=torch.uint8)
            return [state_name]
        case "state of another format":
            put(quant_type="fp4")
            return [state_name, "fp4"]
        case "state of an unknown format":
            put(quant_type="nf5")
            return [state_name, "nf5"]
        case "blocksize of no power of two":
            put(blocksize=48)
            return [state_name, "48"]
        case "blocksize 0":
            put(blocksize=0)
            return [state_name, "0"]
        case "blocksize that does not fit":
            put(blocksize=128)
            return ["a.weight", "128"]
        case "negative shape":
            put(shape=[-96, -128])
            return [state_name, "-96"]
        case "huge shape":
            put(shape=[2**40, 2**40])
            return ["a.weight"]
        case "unknown dtype":
            put(dtype="float12")
            return [state_name, "float12"]
    raise AssertionError(name)


PLAIN = [
    "codes missing", "codes too short", "codes of a wrong dtype", "absmax missing", "absmax too short", "absmax of a wrong dtype",
    "quant_map of a wrong size", "state is no JSON", "state of another format", "state of an unknown format",
    "blocksize of no power of two", "blocksize 0", "blocksize that does not fit", "negative shape", "huge shape", "unknown dtype",
]  # fmt: skip
NESTED = ["nested_absmax missing", "nested_absmax of a wrong size", "nested_quant_map of a wrong size", "absmax too short"]


@pytest.mark.parametrize("name, nested", [(n, False) for n in PLAIN] + [(n, True) for n in NESTED])
def test_damaged_layers(tmp_path, name, nested):
    source, path = tmp_path / "in.safetensors", tmp_path / "bad.safetensors"
    checkpoints.save({"a.weight": torch.randn(96, 128)}, source)
    ok("convert", source, "-o", path, *["--double_quant"] * nested)
    tensors = checkpoints.load(path)
    says = damage(tensors, name)
    checkpoints.save(tensors, path)
    for command in ("dequantize", "inspect", "convert"):
        fails(tmp_path, command, "bad.safetensors", says=["bad.safetensors", *says])
    p = gquant("verify", path)
    assert p.returncode == 1 and all(text in p.stderr for text in says), p.stderr


def test_verify_finds_comfyui_metadata_that_disagree(tmp_path):
    source, path = tmp_path / "in.safetensors", tmp_path / "bad.safetensors"
    checkpoints.save({"a.weight": torch.randn(96, 128)}, source)
    ok("convert", source, "-o", path)
    metadata = checkpoints.metadata(path)
    metadata["_quantization_metadata"] = metadata["_quantization_metadata"].replace('"block_size":64', '"block_size":32')
    checkpoints.save(checkpoints.load(path), path, metadata)
    p = gquant("verify", path)
    assert p.returncode == 1 and "a.weight" in p.stderr and "32" in p.stderr and "64" in p.stderr


# ---- shards


def write_sharded(folder, weight_map, shards):
    for name, tensors in shards.items():
        checkpoints.save(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("value", ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "..", "", "sub\\a.safetensors", "./a.safetensors"])
def test_index_values_are_bare_names(tmp_path, value):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (folder, folder / "sub", tmp_path):
        checkpoints.save({"a.weight": torch.randn(64, 64)}, place / "a.safetensors")
    write_sharded(folder, {"a.weight": value}, {})
    for source in ("model.safetensors.index.json", "."):
        error = fails(folder, "convert", source, "-o", "out.safetensors", says=["model.safetensors.index.json", "a.weight"])
        assert "bare name" in error or "name is empty" in error  # refused as a name, before anything is opened


def test_missing_shard(tmp_path):
    write_sharded(tmp_path, {"a.weight": "a.safetensors", "b.weight": "b.safetensors"}, {"a.safetensors": {"a.weight": torch.randn(64, 64)}})
    fails(tmp_path, "convert", "model.safetensors.index.json", says=["model.safetensors.index.json", "b.safetensors", "b.weight"])


def test_tensor_missing_from_its_shard(tmp_path):
    write_sharded(tmp_path, {"a.weight": "a.safetensors", "b.weight": "a.safetensors"}, {"a.safetensors": {"a.weight": torch.randn(64, 64)}})
    fails(tmp_path, "convert", "model.safetensors.index.json", says=["a.safetensors", "b.weight"])


def test_tensor_in_two_shards(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        checkpoints.save({"a.weight": torch.randn(64, 64)}, tmp_path / name)
    fails(tmp_path, "convert", ".", "-o", "out.safetensors", says=["a.safetensors", "b.safetensors", "a.weight"])


def test_folder_without_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    fails(tmp_path, "convert", "empty", "-o", "out.safetensors", says=["empty", ".safetensors"])


# ---- outputs


def test_output_is_the_input(model):
    folder = model.parent
    (folder / "link.safetensors").symlink_to("model.safetensors")
    os.link(model, folder / "hard.safetensors")
    for output in ("model.safetensors", str(model), "./model.safetensors", "link.safetensors", "hard.safetensors"):
        for options in ([], ["--force"]):
            fails(folder, "convert", "model.safetensors", "-o", output, *options, says=[output, "input"])


def test_output_is_a_shard_of_the_input(tmp_path):
    write_sharded(tmp_path, {"a.weight": "a.safetensors"}, {"a.safetensors": {"a.weight": torch.randn(64, 64)}})
    fails(tmp_path, "convert", "model.safetensors.index.json", "-o", "a.safetensors", "--force", says=["a.safetensors", "input"])


def test_existing_output(model):
    folder = model.parent
    (folder / "out.safetensors").write_bytes(b"precious")
    fails(folder, "convert", "model.safetensors", "-o", "out.safetensors", says=["out.safetensors", "exist", "--force"])
    ok("convert", model, "-o", folder / "out.safetensors", "--force")
    fails(folder, "dequantize", "out.safetensors", "-o", "model.safetensors", says=["model.safetensors", "exist", "--force"])


def test_existing_shards(model):
    folder = model.parent
    options = ["-o", "out.safetensors", "--max-shard-size", "50KB"]
    outputs = [folder / name for name in ok_json("convert", model, *options, cwd=folder)["outputs"]]
    assert len(outputs) > 2
    for path in outputs:
        path.unlink()
    for path in outputs:  # any one of them is in the way
        path.write_bytes(b"precious")
        fails(folder, "convert", "model.safetensors", *options, says=[path.name, "--force"])
        path.unlink()


def test_a_failed_run_keeps_what_force_would_replace(model):
    folder = model.parent
    (folder / "out.safetensors").write_bytes(b"precious")
    fails(folder, "convert", "model.safetensors", "-o", "out.safetensors", "--force", **file_size_limit(50_000))


def test_output_is_a_directory(model):
    folder = model.parent
    (folder / "out.safetensors").mkdir()
    fails(folder, "convert", "model.safetensors", "-o", "out.safetensors", says=["out.safetensors", "directory"])
    fails(folder, "convert", "model.safetensors", "-o", "out.safetensors", "--force", says=["out.safetensors", "directory"])


def test_output_in_no_folder(model):
    fails(model.parent, "convert", "model.safetensors", "-o", "nowhere/out.safetensors", says=["nowhere"])
    fails(model.parent, "convert", "model.safetensors", "-o", "model.safetensors/out.safetensors", says=["model.safetensors/out.safetensors"])


@pytest.mark.parametrize("shards", [[], ["--max-shard-size", "40KB"]], ids=["one", "sharded"])
@pytest.mark.parametrize("limit", [1, 4096, 30_000])
def test_full_disk(model, limit, shards):
    fails(model.parent, "convert", "model.safetensors", "-o", "out.safetensors", *shards, says=["out", "too large"], **file_size_limit(limit))


@pytest.mark.parametrize("shards", [[], ["--max-shard-size", "20MB"]], ids=["one", "sharded"])
def test_ctrl_c(tmp_path, shards):
    checkpoints.write_sparse(tmp_path / "in.safetensors", "BF16", [16 * 4096, 4096])
    before = listing(tmp_path)
    p = start("convert", "in.safetensors", "-o", "out.safetensors", "--threads", "1", *shards, cwd=tmp_path, env={"GQUANT_CPU": "generic"})
    assert wait_until_written(p, 2 << 20), "it was too fast to be interrupted"
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=30)
    assert (p.returncode, out) == (130, "") and err.startswith("gquant: ") and "interrupt" in err
    assert listing(tmp_path) == before


# ---- inputs that can't be read, arguments that make no sense


def test_missing_input(tmp_path):
    for command in ("convert", "plan", "inspect", "verify", "dequantize"):
        fails(tmp_path, command, "nowhere.safetensors", says=["nowhere.safetensors", "no such file"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_input(model):
    model.chmod(0)
    p = gquant("convert", model, "-o", model.parent / "out.safetensors")
    assert p.returncode == 1 and "model.safetensors" in p.stderr and "permission" in p.stderr
    assert not (model.parent / "out.safetensors").exists()


def test_input_of_another_kind(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    before = sorted(p.name for p in tmp_path.iterdir())
    for source in (tmp_path / "pipe.safetensors", "/dev/null"):
        p = gquant("convert", source, "-o", tmp_path / "out.safetensors", timeout=20)
        assert p.returncode == 1 and str(source) in p.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("size", ["0", "1", "16", "63", "96", "8192", "-64"])
def test_blocksize_not_allowed(model, size):
    fails(model.parent, "convert", "model.safetensors", "--block_size", size, says=[size, "32", "64", "4096"])


@pytest.mark.parametrize(
    "options, says",
    [
        (["--mode", "nf5"], "nf5"),
        (["--mode", "int8"], "int8"),
        (["--quant_storage", "i4"], "i4"),
        (["--convention", "mine"], "mine"),
        (["--exclude", "a[b"], "a[b"),
    ],
)
def test_values_not_allowed(model, options, says):
    fails(model.parent, "convert", "model.safetensors", *options, says=[says])


@pytest.mark.parametrize(
    "args",
    [["convert"], ["convert", "a", "b"], ["convert", "a", "--block_size", "big"], ["convert", "a", "--no-such-flag"], ["frobnicate"],
     ["diff", "a"], ["convert", "model.safetensors", "--max-shard-size", "huge"], ["convert", "model.safetensors", "--threads", "-1"],
     ["dequantize", "a", "--dtype", "f12"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage(model, args):
    fails(model.parent, *args, code=2)


def test_nothing_to_quantize(tmp_path):
    checkpoints.save({"a.norm.weight": torch.randn(64), "b.bias": torch.randn(64)}, tmp_path / "m.safetensors")
    fails(tmp_path, "convert", "m.safetensors", says=["m.safetensors", "nothing to quantize"])
    checkpoints.save({"a.weight": torch.randn(64, 64)}, tmp_path / "m.safetensors")
    fails(tmp_path, "convert", "m.safetensors", "--exclude", "*", says=["m.safetensors", "nothing to quantize", "excluded"])


def test_nothing_to_dequantize(model):
    fails(model.parent, "dequantize", "model.safetensors", says=["model.safetensors", "no quantized layer"])


# ---- weights and patterns that deserve a remark


@pytest.mark.parametrize("dtype", checkpoints.DTYPES.values(), ids=checkpoints.DTYPES)
def test_nan_and_inf(tmp_path, dtype):
    bad = torch.randn(64, 128).to(dtype)
    bad[3, :5], bad[7, 0], bad[63, 127] = float("nan"), float("inf"), float("-inf")
    checkpoints.save({"bad.weight": bad, "good.weight": torch.randn(64, 128).to(dtype)}, tmp_path / "m.safetensors")
    p = gquant("convert", "m.safetensors", "-o", "out.safetensors", "--json", cwd=tmp_path)
    assert p.returncode == 0 and json.loads(p.stdout)["nonfinite"] == [{"name": "bad.weight", "count": 7}]
    assert "bad.weight" in p.stderr and "7" in p.stderr and "good.weight" not in p.stderr
    (tmp_path / "out.safetensors").unlink()
    fails(tmp_path, "convert", "m.safetensors", "-o", "out.safetensors", "--strict", says=["m.safetensors", "bad.weight", "7"])


@pytest.mark.parametrize("flag", ["exclude", "include"])
def test_pattern_that_matches_nothing(model, flag):
    p = gquant("convert", model, "-o", model.parent / "out.safetensors", f"--{flag}", "*.atn.q.weight")
    assert p.returncode == 0
    assert "warning" in p.stderr and "*.atn.q.weight" in p.stderr and "blocks.0.attn.q.weight" in p.stderr
    p = gquant("plan", model, "-o", model.parent / "other.safetensors", "--json", f"--{flag}", "*.atn.q.weight")
    assert any("*.atn.q.weight" in w for w in json.loads(p.stdout)["warnings"])


def test_the_cpu_level_asked_for_is_not_there(model):
    fails(model.parent, "convert", "model.safetensors", env={"GQUANT_CPU": "abacus"}, says=["abacus", "generic"])

"""The nodes in ComfyUI's server: workflows run through its HTTP API on the CPU."""

import comfyui  # isort: skip
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from comfyui import NODES, PATH, models  # noqa: F401: a fixture
from PIL import Image
from support import ENVIRONMENT

import gquant

pytest.importorskip("sqlalchemy", reason="the server needs more packages than ComfyUI's models: see comfyui.py")

FILES = {"diffusion_models": ("sd3", "flux"), "text_encoders": ("full_clip_l",), "checkpoints": ("checkpoint",)}


class Server:
    def __init__(self, base, port):
        self.base, self.url = base, f"http://127.0.0.1:{port}"

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            return json.load(e)

    def run(self, workflow, timeout=300):
        """A workflow's outputs by its nodes' names; a RuntimeError with what the server says if it fails."""
        answer = self.ask("/prompt", {"prompt": workflow})
        if "prompt_id" not in answer:
            raise RuntimeError(json.dumps(answer))
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            done = self.ask(f"/history/{answer['prompt_id']}").get(answer["prompt_id"])
            if done and done["status"]["status_str"] != "success":
                raise RuntimeError(json.dumps(done["status"]["messages"]))
            if done:
                return done["outputs"]
            time.sleep(0.2)
        raise TimeoutError(workflow)

    def picture(self, outputs, node="save"):
        (image,) = outputs[node]["images"]
        return np.asarray(Image.open(self.base / "output" / image["subfolder"] / image["filename"]))


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    for folder, names in FILES.items():
        (base / "models" / folder).mkdir(parents=True)
        for name in names:
            for path in (models.source(name), models.quantized(name, nested=True), models.decoded(name, nested=True)):
                os.symlink(path, base / "models" / folder / os.path.basename(path))
    (base / "models" / "vae").mkdir()
    os.symlink(models.source("vae"), base / "models" / "vae" / "vae.safetensors")
    (base / "web").mkdir()
    (base / "user").mkdir()
    shutil.copytree(NODES, base / "custom_nodes" / "gquant")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "main.py", "--cpu", "--base-directory", str(base), "--port", str(port), "--front-end-root", str(base / "web")]
    command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", "gquant", "--disable-api-nodes"]
    with open(base / "log", "w") as log:
        process = subprocess.Popen(command, cwd=PATH, env=os.environ | ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
    found = Server(base, port)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                found.ask("/system_stats")
                break
            if process.poll() is not None:
                pytest.fail((base / "log").read_text()[-3000:])
            time.sleep(0.2)
        yield found
    finally:
        process.terminate()
        process.wait(30)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


CLIP = node("Load4BitCLIP", clip_name1="full_clip_l_nf4_nested.safetensors", type="sd3", dtype="fp32")


def text_to_picture(loader, clip=CLIP):
    """A picture of 512 by 512 pixels. loader: the node whose first output is the model."""
    return {
        "model": loader,
        "clip": clip,
        "vae": node("VAELoader", vae_name="vae.safetensors"),
        "positive": node("CLIPTextEncode", text="a lighthouse at dusk", clip=["clip", 0]),
        "negative": node("CLIPTextEncode", text="blurry", clip=["clip", 0]),
        "latent": node("EmptySD3LatentImage", width=512, height=512, batch_size=1),
        "sampler": node(
            "KSampler",
            **{"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]},
            **{"seed": 1, "steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="picture"),
    }


def test_picture_is_that_of_the_decoded_weights(server):
    found = server.picture(server.run(text_to_picture(node("Load4BitModel", model_name="sd3_nf4_nested.safetensors", dtype="default"))))
    want = server.picture(server.run(text_to_picture(node("UNETLoader", unet_name="sd3_nf4_nested_decoded.safetensors", weight_dtype="default"))))
    assert found.shape == (512, 512, 3) and found.std() > 20
    assert np.array_equal(found, want)
    other = server.picture(server.run(text_to_picture(node("UNETLoader", unet_name="sd3.safetensors", weight_dtype="default"))))
    assert not np.array_equal(other, want)


def test_quantize_save_and_load(server):
    workflow = text_to_picture(node("Quantize4Bit", model=["source", 0], format="nf4", blocksize="64", double_quant=True, exclude="*embedder*"))
    workflow["source"] = node("UNETLoader", unet_name="sd3.safetensors", weight_dtype="default")
    workflow["file"] = node("Save4BitModel", model=["model", 0], filename_prefix="diffusion_models/made")
    found = server.picture(server.run(workflow))
    path = server.base / "output" / "diffusion_models" / "made_00001_.safetensors"
    with gquant.open(path) as file:
        assert {(layer.format, layer.nested) for layer in file.layers.values()} == {("nf4", True)}
        assert "Quantize4Bit" in file.metadata["prompt"]
    listed = server.ask("/object_info/Load4BitModel")["Load4BitModel"]["input"]["required"]["model_name"]
    assert "made_00001_.safetensors" in json.dumps(listed)
    loaded = server.run(text_to_picture(node("Load4BitModel", model_name="made_00001_.safetensors", dtype="default")))
    assert np.array_equal(server.picture(loaded), found)


def test_checkpoint(server):
    loader = node("Load4BitCheckpoint", ckpt_name="checkpoint_nf4_nested.safetensors", dtype="default", device="default")
    workflow = text_to_picture(loader)
    for name in ("positive", "negative"):
        workflow[name]["inputs"]["clip"] = ["model", 1]
    workflow["decode"]["inputs"]["vae"] = ["model", 2]
    picture = server.picture(server.run(workflow))
    assert picture.shape == (512, 512, 3) and picture.std() > 20


def test_errors_reach_the_user(server):
    with pytest.raises(RuntimeError, match="sd3.safetensors is not quantized.*Quantize4Bit"):
        server.run(text_to_picture(node("Load4BitModel", model_name="sd3.safetensors", dtype="default")))
    clip = node("Load4BitCLIP", clip_name1="full_clip_l.safetensors", type="sd3")
    with pytest.raises(RuntimeError, match="full_clip_l.safetensors is not quantized"):
        server.run(text_to_picture(node("Load4BitModel", model_name="sd3_nf4_nested.safetensors", dtype="default"), clip))
    with pytest.raises(RuntimeError, match="value_not_in_list"):
        server.run(text_to_picture(node("Load4BitModel", model_name="../secret.safetensors", dtype="default")))


def to_api(graph, info):
    """A workflow as the API takes it, of one that the editor saved."""
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    workflow = {}
    for n in graph["nodes"]:
        kinds = info[n["type"]]["input"]
        slots = {i["name"]: i["link"] for i in n["inputs"]}
        values, inputs = iter(n["widgets_values"]), {}
        for name, (kind, *options) in (kinds["required"] | kinds.get("optional", {})).items():
            if isinstance(kind, list) or kind in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"):
                inputs[name] = next(values)
                if options and options[0].get("control_after_generate"):
                    next(values)
            elif slots.get(name) is not None:
                inputs[name] = links[slots[name]]
            slots.pop(name, None)
        assert not slots and next(values, None) is None, n["type"]
        workflow[str(n["id"])] = {"class_type": n["type"], "inputs": inputs}
    return workflow


EXAMPLES = sorted((NODES / "example_workflows").glob("*.json"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_workflows_fit_the_nodes(server, path):
    info = server.ask("/object_info")
    graph = json.loads(path.read_text())
    workflow = to_api(graph, info)
    for n in workflow.values():
        kinds = info[n["class_type"]]["input"]
        assert kinds["required"].keys() <= n["inputs"].keys() <= (kinds["required"] | kinds.get("optional", {})).keys()
        for name, value in n["inputs"].items():
            kind, *options = (kinds["required"] | kinds.get("optional", {}))[name]
            choices = kind if isinstance(kind, list) else options[0].get("options") if options else None
            if choices is not None and not str(value).endswith(".safetensors"):
                assert value in choices, (n["class_type"], name)
    # The links name the types that the nodes have.
    by_id = {n["id"]: n for n in graph["nodes"]}
    for _, source, output, target, slot, kind in graph["links"]:
        assert info[by_id[source]["type"]]["output"][output] == kind == by_id[target]["inputs"][slot]["type"]


@pytest.mark.parametrize("name", ["checkpoint", "quantize_and_save"])
def test_example_workflows_run(server, name):
    text = (NODES / "example_workflows" / f"{name}.json").read_text()
    for file, ours in (("checkpoint-nf4", "checkpoint_nf4_nested"), ("flux1-dev", "flux")):
        text = text.replace(f"{file}.safetensors", f"{ours}.safetensors")
    workflow = to_api(json.loads(text.replace("1024", "256")), server.ask("/object_info"))
    outputs = server.run(workflow)
    if name == "checkpoint":
        (images,) = (node["images"] for node in outputs.values())
        assert Image.open(server.base / "output" / images[0]["filename"]).size == (256, 256)
    else:
        with gquant.open(server.base / "output" / "diffusion_models" / "gquant_00001_.safetensors") as file:
            assert len(file.layers) > 30


def test_every_node_explains_itself(server):
    info = server.ask("/object_info")
    for name in ("Load4BitModel", "Load4BitCheckpoint", "Load4BitCLIP", "Quantize4Bit", "Save4BitModel"):
        assert info[name]["description"] and info[name]["display_name"] != name
        inputs = info[name]["input"]
        for key, (kind, *options) in (inputs["required"] | inputs.get("optional", {})).items():
            assert kind in ("MODEL", "CLIP", "VAE") or options[0]["tooltip"], (name, key)


def test_project_file_is_one_that_comfyui_reads():
    parser = pytest.importorskip("comfy_config.config_parser", reason="needs pydantic-settings")
    found = parser.extract_node_configuration(str(NODES))
    assert found.project.name and "comfyui" not in found.project.name.lower() and found.project.version == gquant.__version__
    assert found.project.supported_os and found.project.supported_accelerators and found.project.supported_comfyui_version
    assert found.tool_comfy.publisher_id and found.tool_comfy.display_name


def test_examples_are_listed_as_templates(server):
    assert sorted(server.ask("/workflow_templates")["gquant"]) == [path.stem for path in EXAMPLES]

"""4-bit models in ComfyUI on a CUDA device: the output of the decoded weights, LoRAs, offloading, and every byte as it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import support

PATH = os.environ.get("GQUANT_COMFYUI_PATH", "")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not PATH, reason="GQUANT_COMFYUI_PATH names no folder with ComfyUI")]


@pytest.mark.parametrize("mode", ["legacy", "partial", "dynamic"])
def test_a_model_on_the_device(mode, tmp_path):
    folder = Path(__file__).parent
    path = os.pathsep.join([support.ENVIRONMENT["PYTHONPATH"], str(folder), str(folder.with_name("python_binding"))])
    ran = subprocess.run(
        [sys.executable, str(folder / "comfyui_on_gpu.py"), PATH, str(tmp_path), mode],
        env={**os.environ, **support.ENVIRONMENT, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    if "skip:" in ran.stdout:
        pytest.skip(ran.stdout.strip())
    assert ran.stdout.splitlines()[-1] == "ok", ran.stdout

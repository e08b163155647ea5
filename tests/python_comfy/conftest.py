"""Tests of gquant.comfy. Those of comfy-kitchen's layouts need nothing else; see comfyui.py for those of ComfyUI."""

import os
import sys
from pathlib import Path

# bitsandbytes compiles its plain torch code otherwise: slow, and its arithmetic then depends on a compiler. What tests
# torch.compile runs in a process of its own.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.with_name("python_binding")))

import support

os.environ.update(support.ENVIRONMENT)
sys.path.insert(0, str(support.PACKAGE))


def pytest_configure(config):
    if not support.LIBRARY.exists():
        pytest.exit(f"{support.LIBRARY} is not there: run `make lib` first", returncode=2)

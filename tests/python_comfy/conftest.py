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
from support import pytest_configure  # a hook

os.environ.update(support.ENVIRONMENT)
sys.path.insert(0, str(support.PACKAGE))


def pytest_collection_modifyitems(items):
    folder = Path(__file__).resolve().parent
    marked = [item for item in items if Path(item.path).parent == folder and item.get_closest_marker("cuda")]
    if marked and not _has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device, or libgquant was built without CUDA"))


def _has_cuda():
    import torch

    import gquant

    return torch.cuda.is_available() and bool(gquant.devices())

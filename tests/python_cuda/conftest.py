"""Tests on a CUDA device, through Python. Without one, or with a library without kernels, all of them are skipped."""

import os
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.with_name("python_binding")))

import support
from support import pytest_configure  # a hook

os.environ.update(support.ENVIRONMENT)
sys.path.insert(0, str(support.PACKAGE))


def missing():
    """Why the tests cannot run here; None if they can."""
    import torch

    import gquant

    if not torch.cuda.is_available():
        return "torch has no CUDA device"
    if not gquant.devices():
        return "libgquant has no CUDA device, or was built without CUDA"
    return None


def pytest_collection_modifyitems(items):
    ours = [item for item in items if Path(item.path).parent == FOLDER]
    reason = missing() if ours else None
    for item in ours:
        item.add_marker(pytest.mark.cuda)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def kernels():
    """Are there before the first test, so that none waits for them."""
    import gquant

    gquant.prepare(0)


@pytest.fixture(scope="session")
def F():
    """bitsandbytes.functional, on a device."""
    return pytest.importorskip("bitsandbytes.functional")


@pytest.fixture(scope="session")
def modules():
    return support.modules()

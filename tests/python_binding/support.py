"""What the tests of the Python package share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "bindings" / "python"
LIBRARY = Path(os.environ.get("GQUANT_LIBRARY", ROOT / "lib" / "libgquant.so")).resolve()
HEADER = ROOT / "include" / "gquant.h"
# What else PYTHONPATH has stays.
ENVIRONMENT = {"GQUANT_LIBRARY": str(LIBRARY), "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))}


def pytest_configure(config):
    """The hook of every conftest.py that imports it."""
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    if not LIBRARY.exists():
        pytest.exit(f"{LIBRARY} is not there: run `make lib` first", returncode=2)


def python(code, *options, check=True, timeout=300, **environment):
    """Runs code in a new process; what it printed, or with check=False the process."""
    env = {**os.environ, **ENVIRONMENT, **environment}
    p = subprocess.run([sys.executable, *options, "-c", code], env=env, capture_output=True, text=True, timeout=timeout)
    if not check:
        return p
    assert p.returncode == 0, p.stderr
    return p.stdout


def vectors(name):
    """The tensors of a golden file."""
    from safetensors import safe_open

    with safe_open(str(ROOT / "tests" / "vectors" / "bitsandbytes" / f"{name}.safetensors"), "pt") as f:
        return {key: f.get_tensor(key) for key in f.keys()}


def modules():
    """State dicts that bitsandbytes' layers saved, by the case's name."""
    cases = {}
    for name, tensor in vectors("modules").items():
        case, _, key = name.partition(".weight") if ".weight" in name else name.rpartition(".")
        cases.setdefault(case, {})["weight" + key if ".weight" in name else key] = tensor
    del cases["int8"]
    return cases


def save(tensors, path, metadata=None):
    from safetensors.torch import save_file

    save_file(tensors, str(path), metadata=metadata)


def same(a, b):
    """Bit for bit, except that a NaN is a NaN."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.is_floating_point:
        if not torch.equal(a.isnan(), b.isnan()):
            return False
        a, b = a.nan_to_num(0), b.nan_to_num(0)
    return torch.equal(bits(a), bits(b))


def bits(tensor):
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def decoded(weight, dtype):
    """The weight that an operator's arguments stand for, as a dtype of torch, with the rounding of the dtype that it was."""
    import torch

    return torch.ops.gquant.dequantize_4bit(*weight).to(dtype)


def check_linear(y, x, bias, weight, bound=1.05):
    """y is the linear layer of x with the packed weight: its error, against float64, is that of torch with the decoded weight, or less, but for a factor."""
    import torch

    added = None if bias is None else bias.detach().to(x.dtype)
    exact = torch.ops.gquant.dequantize_4bit(*weight[:6], torch.float32, *weight[7:]).double()
    want = torch.nn.functional.linear(x.detach().double(), exact, None if added is None else added.double())
    usual = torch.nn.functional.linear(x.detach(), decoded(weight, x.dtype), added)
    assert (y.dtype, y.shape, y.device) == (usual.dtype, usual.shape, usual.device)
    ours, theirs, size = ((t.detach().double() - want).norm().item() for t in (y, usual, torch.zeros_like(want)))
    # A few float32 sums may be lucky.
    assert ours <= max(bound * theirs, 3 * torch.finfo(torch.float32).eps * size), (ours / size, theirs / size)

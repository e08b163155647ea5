"""What the tests of the Python package share."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "bindings" / "python"
LIBRARY = Path(os.environ.get("GQUANT_LIBRARY", ROOT / "lib" / "libgquant.so")).resolve()
HEADER = ROOT / "include" / "gquant.h"
ENVIRONMENT = {"GQUANT_LIBRARY": str(LIBRARY), "PYTHONPATH": str(PACKAGE)}


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

import os
import sys

# bitsandbytes compiles its plain torch code otherwise: slow, and its arithmetic then depends on a compiler. What tests
# torch.compile runs in processes of its own.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import pytest

import support
from support import pytest_configure  # a hook

os.environ.update(support.ENVIRONMENT)
sys.path.insert(0, str(support.PACKAGE))


@pytest.fixture(scope="session")
def modules():
    return support.modules()


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The path of a converted model, its 4-bit layers' sources by name, and its other tensors by name."""
    import torch

    generator = torch.Generator().manual_seed(3)
    layers = {
        "a.weight": torch.randn(96, 128, generator=generator),
        "b.weight": torch.randn(70, 90, generator=generator).half(),
        "c.weight": torch.randn(64, 256, generator=generator).bfloat16(),
    }
    others = {"a.bias": torch.randn(96, generator=generator), "norm.weight": torch.ones(128).bfloat16(), "steps": torch.tensor(7)}
    folder = tmp_path_factory.mktemp("model")
    support.save(layers | others, folder / "source.safetensors", {"author": "Ωmega"})
    import gquant

    gquant.convert(folder / "source.safetensors", folder / "nf4.safetensors", "nf4", double_quant=True)
    return folder / "nf4.safetensors", layers, others

import os

# bitsandbytes compiles its plain torch code otherwise: slow, and its arithmetic then depends on a compiler.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import pytest

import checkpoints
import program


def pytest_configure(config):
    if not program.GQUANT.exists():
        pytest.exit(f"{program.GQUANT} is not there: run `make build` first", returncode=2)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory):
    """A checkpoint with every kind of tensor that a conversion meets; its path. Not to be written to."""
    path = tmp_path_factory.mktemp("mixed") / "model.safetensors"
    checkpoints.save(checkpoints.mixed(), path)
    return path


@pytest.fixture(scope="session")
def vectors():
    return program.ROOT / "tests" / "vectors"

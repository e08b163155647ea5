"""The wheel, in an environment that holds nothing else."""

import os
import re
import subprocess
import sys
import zipfile

import pytest

import support
from test_binding_process import PLAIN

PROGRAM = support.ROOT / "bin" / "gquant"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if not PROGRAM.exists():
        pytest.skip("bin/gquant is not there")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    env = {**os.environ, **support.ENVIRONMENT}
    p = subprocess.run([*command, "--wheel-dir", folder, support.PACKAGE], env=env, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The Python of an environment with the wheel, and what runs it there."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    env = {k: v for k, v in os.environ.items() if k not in support.ENVIRONMENT}

    def run(*arguments, **options):
        return subprocess.run([folder / "bin" / "python", *arguments], env=env, cwd=folder, capture_output=True, text=True, **options)

    run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", wheel, check=True)
    return run


def test_name_and_content(wheel):
    assert re.fullmatch(r"gquant-[\w.]+-py3-none-manylinux_2_34_(x86_64|aarch64)\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
    assert {"gquant/libgquant.so", "gquant/gquant", "gquant/py.typed", "gquant/torch/ops.py"} <= set(names)
    assert not [n for n in names if not n.startswith(("gquant/", "gquant-"))]


@pytest.mark.parametrize("binary", [support.LIBRARY, PROGRAM], ids=["library", "program"])
def test_binaries_run_on_what_the_tag_says(binary):
    listing = subprocess.run(["nm", "-D", "--undefined-only", binary], capture_output=True, text=True, check=True).stdout
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", listing)}
    assert max(versions) <= (2, 34)


def test_library_in_an_empty_environment(environment):
    p = environment("-c", PLAIN)
    assert p.returncode == 0 and p.stdout == "ok\n", p.stderr


def test_command_line(environment):
    for arguments in (["--help"], ["version"]):
        ours = environment("-m", "gquant", *arguments)
        want = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True)
        assert (ours.returncode, ours.stdout, ours.stderr) == (want.returncode, want.stdout, want.stderr)
    assert environment("-m", "gquant", "inspect", "nowhere").returncode == 1


def test_command_line_needs_the_wheel():
    p = support.python("import runpy; runpy.run_module('gquant', run_name='__main__')", check=False)
    assert p.returncode == 1 and "is not there: only the wheel has it" in p.stderr


def test_versions_agree():
    import gquant

    changes = (support.ROOT / "CHANGELOG.md").read_text()
    assert f"## {gquant.__version__}" in changes or "## Unreleased" in changes

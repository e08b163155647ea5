"""What gquant says of a comfy-kitchen that it cannot work with."""

import comfy_kitchen.tensor
import pytest
from support import python

import gquant
from gquant.comfy import probe


@pytest.fixture(autouse=True)
def forgetful_probe():
    probe.kitchen.cache_clear()
    yield
    probe.kitchen.cache_clear()


def test_kitchen_that_will_do():
    probe.kitchen()


def test_old_kitchen(monkeypatch):
    monkeypatch.delattr(comfy_kitchen.tensor.QuantizedLayout, "requantize_kwargs")
    with pytest.raises(gquant.UnsupportedError, match=r"comfy-kitchen \d.* lacks .*requantize_kwargs.*0.2.13.*pip install --upgrade comfy-kitchen"):
        probe.kitchen()


def test_kitchen_whose_functions_changed(monkeypatch):
    monkeypatch.setattr(comfy_kitchen.tensor, "register_layout_class", lambda cls: cls)
    with pytest.raises(gquant.UnsupportedError, match=r"register_layout_class\(name=\)"):
        probe.kitchen()


def test_without_kitchen():
    """The package is importable, and the first word of gquant.comfy is what to install."""
    code = "import sys; sys.modules['comfy_kitchen'] = None; import gquant, gquant.torch; import gquant.comfy"
    p = python(code, check=False)
    assert p.returncode and "UnsupportedError" in p.stderr.splitlines()[-1] and "pip install --upgrade comfy-kitchen" in p.stderr.splitlines()[-1]


def test_without_comfyui():
    p = python("import gquant.comfy.loaders", check=False)
    assert p.returncode and "UnsupportedError: there is no ComfyUI" in p.stderr.splitlines()[-1]

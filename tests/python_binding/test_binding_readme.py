"""The examples of the package's README."""

import re

import torch

import support

EXAMPLES = re.findall(r"```python\n(.*?)```", (support.PACKAGE / "README.md").read_text(), re.DOTALL)


def test_examples(tmp_path):
    assert len(EXAMPLES) == 3
    support.save({"a.weight": torch.randn(96, 128), "a.bias": torch.randn(96)}, tmp_path / "model.safetensors")
    for example in EXAMPLES:
        support.python(f"import os; os.chdir({str(tmp_path)!r})\n{example}")

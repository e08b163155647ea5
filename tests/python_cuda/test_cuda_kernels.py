"""Every kernel for linear layers, by tables that want each of them for some numbers of rows. A process reads one table."""

from pathlib import Path

import pytest
import torch

from support import ROOT, python

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

CODE = """
import ctypes, json, os, sys
import torch
import gquant, gquant.torch
from gquant import _ffi
from gquant.torch import ops
from gquant.torch.state import arguments
from support import check_linear
from weights import equal, normal

numbers = {torch.float16: 14, torch.bfloat16: 15}
# Left over from something else: nothing in it is to be taken for a flag.
memory = torch.full((64 << 20,), 0xa5, dtype=torch.uint8, device="cuda")

def layer(weight, x, bias, y, workspace, settled=False):
    state, size, packed = ops._borrow(weight), ctypes.c_uint64(), ctypes.c_int32()
    execution = _ffi.gq_exec(device=0, stream=torch.cuda.current_stream().cuda_stream)
    _ffi.lib.gq_linear_workspace_size(state.handle, len(x), numbers[x.dtype], execution, ctypes.byref(size), ctypes.byref(packed))
    assert packed.value == 1 and size.value <= memory.nbytes
    execution.flags = _ffi.GQ_EXEC_SETTLED if settled else 0
    if workspace:
        execution.workspace, execution.workspace_bytes = memory.data_ptr(), size.value
    _ffi.lib.gq_linear(state.handle, x.data_ptr(), len(x), numbers[x.dtype], bias.data_ptr() if bias is not None else 0, y.data_ptr(), execution)
    return size.value

used = 0
for (n, k), blocksize, quant_type, nested, dtype in (
    ((96, 128), 64, "nf4", True, torch.bfloat16),
    ((1000, 256), 64, "nf4", False, torch.float16),
    ((264, 1024), 128, "fp4", True, torch.bfloat16),
    ((136, 14336), 64, "nf4", False, torch.bfloat16),
    ((3072, 3072), 64, "nf4", True, torch.float16),
    ((9216, 3072), 64, "fp4", False, torch.float16),
    ((4096, 2048), 2048, "nf4", True, torch.bfloat16),
):
    weight = arguments(*gquant.torch.quantize_4bit(normal(n, k, dtype=dtype).cuda(), blocksize, nested, quant_type))
    for rows in map(int, sys.argv[1:]):
        x, bias = normal(rows, k, dtype=dtype, seed=rows).cuda(), normal(n, dtype=dtype, seed=2).cuda() if rows % 2 else None
        y = torch.full((rows + 1, n), float("nan"), dtype=dtype, device="cuda")
        for workspace in (False, True):
            size = layer(weight, x, bias, y[:rows], workspace)
            check_linear(y[:rows], x, bias, weight, 1.25)
            assert y[rows].isnan().all()
        first, used = y[:rows].clone(), max(used, size)
        late = torch.empty_like(x)
        for i in range(4):  # behind one another, with the workspace that each leaves, and with an x that is there just in time
            y.fill_(float("nan"))
            for _ in range(5):
                layer(weight, x, bias, y[:rows], True, settled=i % 2)
            assert equal(y[:rows], first)
            late.fill_(float("nan"))
            late.copy_(x)
            layer(weight, late, bias, y[:rows], True, settled=i % 2)
            assert equal(y[:rows], first)
print("workspace", used)
"""


def run(table, rows):
    code = f"import sys; sys.argv[1:] = {list(map(str, rows))}; sys.path[:0] = {[str(Path(__file__).parent), str(ROOT / 'tests/python_binding')]}\n" + CODE
    printed = python(code, GQUANT_TUNE=str(table), PYTHONPATH=str(ROOT / "bindings/python"))
    assert printed.startswith("workspace ")
    return int(printed.split()[1])


@pytest.mark.skipif(not HOPPER, reason="needs Hopper")
def test_hopper():
    rows = [5, 6, 7, 8, 9, 10, 14, 15, 16, 20, 24, 25, 31, 32, 40, 42, 48, 50, 56, 60, 61, 63, 64, 70, 80, 88, 95, 96, 100, 101, 108, 109, 112, 120, 121, 124, 127, 128]
    rows += [150, 191, 192, 200, 210, 220, 250, 255, 256, 300, 301, 302, 403, 404, 405, 406, 407, 408, 409, 410, 411, 420, 500, 501, 502, 601, 700, 701, 702]
    assert run(ROOT / "tests/c/tables/all.json", rows) > 0


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs Ampere or newer")
def test_tile():
    assert run(ROOT / "tests/c/tables/tile.json", [1, 7, 32, 33, 64, 65, 100, 128, 129, 300, 1000]) > 0


def test_shipped():
    """The table that the library brings, for the device; few of these numbers of rows are decoded."""
    code = CODE
    for usual, here in (("assert packed.value == 1 and", "assert"), (", weight, 1.25)", ", weight, 1.05 if rows <= 16 else 1.25)")):
        assert usual in code
        code = code.replace(usual, here)
    printed = python(
        f"import sys; sys.argv[1:] = {[str(m) for m in range(1, 65)]}; sys.path[:0] = {[str(Path(__file__).parent), str(ROOT / 'tests/python_binding')]}\n" + code,
        PYTHONPATH=str(ROOT / "bindings/python"),
    )
    assert printed.startswith("workspace ")

"""Compares compiled layers with packed weights with eager ones; test_comfy_linear.py runs it in a process where torch.compile is on.

    BACKEND [DEVICE]
"""

import sys

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import nn

import gquant.comfy

backend, *device = sys.argv[1:]
torch.set_default_device(device[0] if device else "cpu")


def layer(n, k, name, nested):
    made = nn.Linear(k, n).requires_grad_(False)
    made.weight = nn.Parameter(QuantizedTensor.from_float(torch.randn(n, k), name, nested=nested), requires_grad=False)
    return made


def compiled(function, dynamic):
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


kinds = [(layout.name, nested) for layout in (gquant.comfy.NF4Layout, gquant.comfy.FP4Layout) for nested in (False, True)]
for name, nested in kinds if backend == "aot_eager" else kinds[1:2]:
    model = nn.Sequential(layer(128, 64, name, nested), nn.GELU(), layer(96, 128, name, nested))
    for dynamic in (False, True) if backend == "aot_eager" else (True,):
        for mode in (torch.inference_mode, torch.enable_grad):
            fast = compiled(model, dynamic)
            with mode():
                for shape in ((1, 64), (3, 64), (8, 64), (2, 5, 64)):
                    results = []
                    for run in (model, fast):
                        x = torch.ones(shape).mul(0.5).requires_grad_(mode is torch.enable_grad)
                        y = run(x)
                        if x.requires_grad:
                            y.square().sum().backward()
                            results.append(x.grad)
                        results.append(y.detach())
                    half = len(results) // 2
                    for eager, ours in zip(results[:half], results[half:], strict=True):
                        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3)  # inductor has another order of sums
    # A weight that is an argument, of changing size: comfy-kitchen's __tensor_unflatten__ leaves the new size out.
    linear = compiled(nn.functional.linear, True)
    with torch.no_grad():
        for n in (96, 128):
            weight = layer(n, 64, name, nested).weight
            for rows in (3, 8, 5):
                x = torch.randn(rows, 64)
                torch.testing.assert_close(linear(x, weight), nn.functional.linear(x, weight), rtol=1e-3, atol=1e-3)

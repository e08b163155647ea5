"""Compares compiled code with eager code; test_binding_torch.py runs it in a process where torch.compile is on."""

import sys

import torch

import gquant.torch
from gquant.torch.state import arguments

backend = sys.argv[1]


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


x = torch.randn(96, 128)
for nested in (False, True):
    packed, state = gquant.torch.quantize_4bit(x, compress_statistics=nested)
    dense = gquant.torch.dequantize_4bit(packed, state)

    assert torch.equal(compiled(gquant.torch.dequantize_4bit)(packed, state), dense)
    assert torch.equal(compiled(lambda t: gquant.torch.dequantize_4bit(*gquant.torch.quantize_4bit(t, compress_statistics=nested)))(x), dense)

    layer = gquant.torch.Linear4bit(128, 96, quant_type="nf4", compress_statistics=nested)
    layer.load_state_dict({"weight": x, "bias": torch.randn(96)})
    model = torch.nn.Sequential(torch.nn.Linear(16, 128), torch.nn.GELU(), layer)
    fast = compiled(model)
    for rows in (1, 3, 8):  # the second number of rows makes it dynamic
        given = torch.randn(rows, 16)
        results = []
        for run in (model, fast):
            model.zero_grad()
            y = run(given)
            y.square().sum().backward()
            results.append((y.detach(), model[0].weight.grad.clone(), layer.bias.grad.clone()))
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3)  # inductor has another order of sums
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(given), model(given), rtol=1e-3, atol=1e-3)

packed, state = gquant.torch.quantize_4bit(x)
weight = arguments(packed, state)


def into(t):
    out = t.new_empty(t.shape[0], 96)
    torch.ops.gquant.linear_4bit.out(t, None, *weight, out=out)
    return out


torch.testing.assert_close(compiled(into)(torch.ones(3, 128)), torch.ops.gquant.linear_4bit(torch.ones(3, 128), None, *weight))

# Weights of different layers are inputs of the graph, not constants in it.
first, second = (gquant.torch.Linear4bit(128, 96, bias=False) for _ in range(2))
for layer in (first, second):
    layer.load_state_dict({"weight": torch.randn(96, 128)})
torch._dynamo.reset()
for layer in (first, second):
    fast = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(fast(x), layer(x))
first.load_state_dict(second.state_dict())
torch.testing.assert_close(torch.compile(first, fullgraph=True, backend=backend)(x), second(x))

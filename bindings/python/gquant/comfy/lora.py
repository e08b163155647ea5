"""LoRAs beside a packed weight: y += scale · (x · downᵀ) · upᵀ. Needs ComfyUI.

When a layer is offloaded, ComfyUI leaves its patches in the layer's weight_function, and applies them to the decoded weight in
every forward pass; under dynamic VRAM in weight_lowvram_function, and quantizes the patched weight again. Where all of them are
low-rank products the weight can stay as it is, and what is added is exact.
"""

from dataclasses import dataclass
from typing import Any, Optional

import comfy.model_patcher
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor
from torch.nn import functional


@dataclass
class _Product:
    """scale · up · down, added to a part of a weight."""

    up: Tensor  # [part of n, rank]
    down: Tensor  # [rank, part of k]
    scale: float
    part: Optional[tuple[int, int, int]]  # dimension, start, length; None: the whole weight

    def add(self, y: Tensor, x: Tensor) -> None:
        """y: [rows, n], x: [rows, k]."""
        if self.part is not None:
            dimension, start, length = self.part
            y, x = (y.narrow(1, start, length), x) if dimension == 0 else (y, x.narrow(1, start, length))
        up, down = (factor.to(x.device, x.dtype, non_blocking=True) for factor in (self.up, self.down))
        y.addmm_(functional.linear(x, down), up.t(), alpha=self.scale)  # y is read and written once


class LowRank:
    """Takes the place of ComfyUI's patch in a layer's weight_function. Its factors are where ComfyUI moves them, and it counts them."""

    def __init__(self, patch: Any, products: list[_Product]):
        self.patch, self.products = patch, products

    def __call__(self, weight: Tensor) -> Tensor:
        return self.patch(weight)

    def add(self, y: Tensor, x: Tensor) -> None:
        """Adds what the patches add to y, the layer's output without them, in place. x: the layer's input."""
        rows, inputs = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        for product in self.products:
            product.add(rows, inputs)

    def move_to(self, device: Any) -> int:
        """Moves the factors; the bytes that they take."""
        for product in self.products:
            product.up, product.down = product.up.to(device), product.down.to(device)
        return sum(product.up.nbytes + product.down.nbytes for product in self.products)


def low_rank(function: Any) -> Any:
    """A weight function of a layer, as a LowRank if it is nothing but LoRAs."""
    if not isinstance(function, comfy.model_patcher.LowVramPatch):
        return function
    products = [_product(*patch) for patch in function.patches[function.key]]
    return function if None in products else LowRank(function, products)


def _product(strength: float, adapter: Any, strength_model: float, part: Any, function: Any) -> Optional[_Product]:
    """What a patch adds; None if it does something else to the weight than to add a product of two matrices."""
    if type(adapter) is not LoRAAdapter or strength_model != 1.0 or function is not None:
        return None
    up, down, alpha, mid, dora_scale, reshape = adapter.weights
    if mid is not None or dora_scale is not None or reshape is not None:
        return None
    up, down = up.flatten(start_dim=1), down.flatten(start_dim=1)
    return _Product(up, down, strength * (1.0 if alpha is None else alpha / down.shape[0]), part)

"""LoRA files of every kind for the layers of a model, with random factors."""

import torch

KINDS = ("lora", "dora", "loha", "lokr")


def lora(kind, weights, seed=0, rank=4, strength=0.3):
    """A state dict as LoRA files are. weights: their shapes, by name."""
    generator = torch.Generator().manual_seed(seed)
    found = {}

    def random(key, *shape, scale):
        found[key] = torch.randn(*shape, generator=generator) * scale

    for name, (n, k) in weights.items():
        layer = name.removesuffix(".weight")
        if kind in ("lora", "dora"):
            random(f"{layer}.lora_up.weight", n, rank, scale=strength * rank**-0.5)
            random(f"{layer}.lora_down.weight", rank, k, scale=k**-0.5)
            found[f"{layer}.alpha"] = torch.tensor(rank / 2)
        if kind == "dora":
            found[f"{layer}.dora_scale"] = torch.rand(n, 1, generator=generator) + 0.5
        if kind == "loha":
            for i in "12":
                random(f"{layer}.hada_w{i}_a", n, rank, scale=strength**0.5 * rank**-0.5)
                random(f"{layer}.hada_w{i}_b", rank, k, scale=k**-0.25)
        if kind == "lokr":
            random(f"{layer}.lokr_w1", 4, 4, scale=strength)
            random(f"{layer}.lokr_w2", n // 4, k // 4, scale=k**-0.5)
    return found

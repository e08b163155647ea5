"""Weights for the tests, and how results are compared."""

import torch

from support import same

TYPES = ["nf4", "fp4"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def normal(*shape, dtype=torch.float32, seed=1):
    """Normal numbers, made on the host, so that they are the same everywhere."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_bits(count, dtype, seed=1):
    """Numbers of every kind: NaN, Inf and subnormal ones among them."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(bits)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(limits.min, limits.max, (count,), generator=generator, dtype=bits).view(dtype)
    # Beside the largest of a block most random bits are zeros, so there are blocks of normal numbers with a few of them too.
    tame = torch.randn(count, generator=generator).to(dtype)
    mixed = torch.arange(count) // 4096 % 2 == 0
    mixed &= torch.rand(count, generator=generator) < 0.99
    return torch.where(mixed, tame, x)


def close(a, b):
    """Whether results of two kernels differ by no more than their rounding, taken together: single sums may cancel to anything."""
    return bool((a.float() - b.float()).norm() <= 0.01 * b.float().norm())


def equal(a, b):
    """The same bits on whatever devices, except that a NaN is a NaN."""
    return same(a.cpu(), b.cpu())

"""Encodings: how a static image becomes an input over time, ``(B, *features)`` to ``(T, B, *)``."""

import torch
from torch import Tensor


def constant(values: Tensor, length: int) -> Tensor:
    """The values as a current that is the same at every step: ``(T, B, *features)``.

    A view that repeats the values without a copy; the filters read it as it is.
    """
    return values.expand(length, *values.shape)


def poisson(values: Tensor, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Independent spikes of 0 or 1 at every step, with the values as probabilities.

    Args:
        values: ``(B, *features)``; at or above 1 a spike is certain, at or below 0 impossible.
        length: T.
        generator: source of randomness, PyTorch's default if ``None``.

    Returns:
        ``(T, B, *features)``, in the dtype of ``values``.
    """
    # 16 random bits an element resolve rates to 1/65536 and cost a quarter of a float's draw.
    count = length * values.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=values.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
    below = (values * 65536).round().clamp(0, 65536) - 32768
    return (bits.view(length, *values.shape) < below.to(torch.int32)).to(values.dtype)

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
        generator: source of randomness, PyTorch's default of the values' device if ``None``. One
            of another device draws there, so that a seed gives the same spikes wherever they go.

    Returns:
        ``(T, B, *features)``, in the dtype of ``values`` and on their device.

    Raises:
        TypeError: the values are integers, such as grey levels, and no probabilities.
    """
    if not values.is_floating_point():
        raise TypeError(f"values are {values.dtype}, expected probabilities in floating point")
    # 16 random bits an element resolve rates to 1/65536 and cost a quarter of a float's draw.
    count = length * values.numel()
    device = values.device if generator is None else generator.device
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
    # Lower precisions cannot count to 65536.
    rates = values.to(torch.promote_types(values.dtype, torch.float32))
    below = (rates * 65536).round().clamp(0, 65536) - 32768
    spikes = bits.to(values.device).view(length, *values.shape) < below.to(torch.int32)
    return spikes.to(values.dtype)

"""Encodings: how values become an input over time.

:func:`constant` and :func:`poisson` take static values such as an image's, ``(B, *features)`` to
``(T, B, *features)``. The others take values that change over time, ``(T, B, channels)``, to more
channels or more steps; what they say of a step depends on nothing later.
"""

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


def population(values: Tensor, centres: Tensor) -> Tensor:
    """Values as currents into a population of Gaussian receptive fields.

    Each value drives the neurons most whose centre is near, exp(-d^2 / 2) at a distance of d times
    that between neighbouring centres: a linear layer behind it can tell any range of values.

    Source: Bohte, Kok, La Poutre, "Error-backpropagation in temporally encoded networks of spiking
    neurons", Neurocomputing 2002, doi 10.1016/S0925-2312(01)00658-0.

    Args:
        values: ``(T, B, channels)``.
        centres: ``(fields,)``, evenly spaced, two or more.

    Returns:
        ``(T, B, channels * fields)``, from 0 to 1, the fields of a channel side by side.

    Raises:
        ValueError: there are fewer than two centres.
    """
    if len(centres) < 2:
        raise ValueError(f"there are {len(centres)} centres, expected two or more")
    distance = (values[..., None] - centres) / (centres[1] - centres[0])
    return torch.exp(-0.5 * distance.square()).flatten(-2)


def latency(values: Tensor, window: int) -> Tensor:
    """A spike for every value, the earlier in a window of its own the larger it is.

    Args:
        values: ``(T, B, channels)``, from 0, in the last step of its window, to 1, in the first;
            beyond that as 0 and 1.
        window: steps that each of the T steps becomes.

    Returns:
        Spikes ``(T * window, B, channels)``, ``window`` times as long as before.

    Raises:
        ValueError: the window is shorter than two steps, in which all values are alike.
    """
    if window < 2:
        raise ValueError(f"window is {window}, expected two steps or more")
    late = ((1.0 - values.clamp(0.0, 1.0)) * (window - 1)).round()  # (T, B, channels)
    steps = torch.arange(window, device=values.device).view(-1, 1, 1)
    return (late[:, None] == steps).to(values.dtype).flatten(0, 1)


def delta(values: Tensor, threshold: float) -> Tensor:
    """Events where a value has changed by a threshold since the last one, as event sensors give.

    The channel remembers a level, first 0. A value that is n thresholds above it gives an event
    of the size n in the channel of rises, one below in that of falls, and the level follows by n
    thresholds: it stays within one threshold of the value, and silence means no change.

    Args:
        values: ``(T, B, channels)``.
        threshold: the change that is an event, > 0.

    Returns:
        ``(T, B, 2 * channels)``, whole numbers, mostly 0: rises of all channels, then falls.

    Raises:
        ValueError: the threshold is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}, expected > 0")
    level, steps = torch.zeros_like(values[0]), []
    for value in values:
        change = ((value - level) / threshold).trunc()
        level = level + change * threshold
        steps.append(change)
    changes = torch.stack(steps)
    return torch.cat([changes.relu(), (-changes).relu()], -1)

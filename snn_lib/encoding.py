"""Encodings: how values become an input over time.

:func:`constant`, :func:`poisson` and :func:`latency` turn static values such as an image's,
``(B, *features)``, into a sequence, ``(T, B, *features)``. The others turn values that change over
time, ``(T, B, channels)``, into more channels. Their output at a step depends on no later step.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from snn_lib.functional import check_tensor

LatencyLaw = Literal["linear", "logarithmic"]


def constant(values: Tensor, length: int) -> Tensor:
    """The values as a current that is the same at every step: ``(T, B, *features)``.

    The result is a view that repeats the values without a copy, which the filters can read.

    Raises:
        TypeError: the values are no tensor.
        ValueError: the length is below 1.
    """
    _check(values, length)
    return values.expand(length, *values.shape)


def poisson(values: Tensor, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Independent spikes of 0 or 1 at every step, with the values as probabilities.

    Args:
        values: ``(B, *features)``. At or above 1 a spike is certain, at or below 0 impossible.
        length: T.
        generator: the source of randomness; ``None`` is PyTorch's default on the values' device. A
            generator of the CPU gives the same spikes on every device.

    Returns:
        ``(T, B, *features)``, in the dtype of ``values`` and on their device.

    Raises:
        TypeError: the values are no tensor, or integers, such as grey levels.
        ValueError: the length is below 1.
    """
    _check(values, length, "probabilities")
    # 16 random bits for each element resolve rates to 1/65536. Drawing them takes a quarter of the
    # time that floats take.
    count = length * values.numel()
    device = values.device if generator is None else generator.device
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
    # Dtypes of lower precision cannot count to 65536.
    rates = values.to(torch.promote_types(values.dtype, torch.float32))
    below = (rates * 65536).round().clamp(0, 65536) - 32768
    spikes = bits.to(values.device).view(length, *values.shape) < below.to(torch.int32)
    return spikes.to(values.dtype)


def latency(
    values: Tensor,
    length: int,
    threshold: float = 0.2,
    law: LatencyLaw = "linear",
    tau: float = 5.0,
    jitter: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One spike for each value above a threshold, earlier for a larger value; none for the others.

    - ``linear``: at step (1 - x) / (1 - threshold) (length - 1), from 0 for x = 1 to the last for
      the threshold.
    - ``logarithmic``: at step tau log(x / (x - threshold)), when a membrane that leaks with tau
      and is driven by x first reaches the threshold (Gerstner et al., Neuronal Dynamics, 2014,
      section 1.3). If that is after the last step, there is no spike.

    The steps are rounded. Source: Thorpe, Delorme, Van Rullen, "Spike-based strategies for rapid
    processing", 2001, doi 10.1016/S0893-6080(01)00083-1.

    Args:
        values: ``(B, *features)``; those above 1 count as 1.
        length: T.
        threshold: in [0, 1); in (0, 1) for the logarithmic law.
        law: how a value becomes a time.
        tau: the time constant of the logarithmic law, in steps.
        jitter: the standard deviation of the normal noise on each time, in steps. The noise moves
            no spike out of the T steps.
        generator: the source of the jitter, as in :func:`poisson`.

    Returns:
        ``(T, B, *features)`` of 0 and 1, in the dtype of ``values`` and on their device.

    Raises:
        TypeError: the values are no tensor, or integers, such as grey levels.
        ValueError: the law is unknown, or length, threshold, tau or jitter is out of its range.
    """
    _check(values, length, "fractions")
    if law not in get_args(LatencyLaw):
        raise ValueError(f"law is {law!r}, expected one of {', '.join(get_args(LatencyLaw))}")
    if not (0 <= threshold < 1 and tau > 0 and jitter >= 0):
        raise ValueError(
            f"threshold is {threshold}, tau {tau}, jitter {jitter}, expected 0 <= threshold < 1, "
            "tau > 0, jitter >= 0"
        )
    if law == "logarithmic" and threshold == 0:
        raise ValueError("threshold is 0, which every membrane reaches at once: expected > 0")
    x = values.to(torch.promote_types(values.dtype, torch.float32)).clamp(max=1.0)
    if law == "linear":
        time = (1.0 - x) / (1.0 - threshold) * (length - 1)
    else:
        time = tau * torch.log(x / (x - threshold))
    spikes = (x > threshold) & (time.round() < length)
    if jitter:
        device = values.device if generator is None else generator.device
        noise = torch.empty(x.shape, dtype=x.dtype, device=device).normal_(generator=generator)
        time = (time + jitter * noise.to(x.device)).clamp(0, length - 1)
    step = torch.where(spikes, time, 0).round().long()
    steps = torch.zeros(length, *values.shape, dtype=values.dtype, device=values.device)
    return steps.scatter_(0, step[None], spikes.to(values.dtype)[None])


def population(values: Tensor, centres: Tensor) -> Tensor:
    """Values as currents into a population of Gaussian receptive fields.

    The current is exp(-d^2 / 2), where d is the distance between the value and the field's centre,
    in units of the distance between two neighbouring centres. A linear layer behind the fields can
    tell any range of values from the rest.

    Source: Bohte, Kok, La Poutre, "Error-backpropagation in temporally encoded networks of spiking
    neurons", Neurocomputing 2002, doi 10.1016/S0925-2312(01)00658-0.

    Args:
        values: ``(T, B, channels)``.
        centres: ``(fields,)``, evenly spaced, two or more.

    Returns:
        ``(T, B, channels * fields)``, from 0 to 1. The fields of a channel lie side by side.

    Raises:
        TypeError: the values or the centres are no tensor.
        ValueError: there are fewer than two centres, or not in a single dimension.
    """
    check_tensor("values", values)
    check_tensor("centres", centres)
    if centres.dim() != 1 or len(centres) < 2:
        raise ValueError(f"centres have shape {tuple(centres.shape)}, expected two or more numbers")
    distance = (values[..., None] - centres) / (centres[1] - centres[0])
    return torch.exp(-0.5 * distance.square()).flatten(-2)


def delta(values: Tensor, threshold: float) -> Tensor:
    """Events wherever a value has changed by a threshold since the last event, as in event sensors.

    Each channel remembers a level, which starts at 0. A value n thresholds above the level gives an
    event of size n among the rises, and a value n thresholds below it one among the falls. The
    level then follows by n thresholds, so it stays within one threshold of the value.

    Args:
        values: ``(T, B, channels)``.
        threshold: the change that makes an event, > 0.

    Returns:
        ``(T, B, 2 * channels)``, whole numbers, mostly 0: all rises, then all falls.

    Raises:
        TypeError: the values are no tensor.
        ValueError: the threshold is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}, expected > 0")
    check_tensor("values", values)
    level, steps = values.new_zeros(values.shape[1:]), []
    for value in values:
        change = ((value - level) / threshold).trunc()
        level = level + change * threshold
        steps.append(change)
    changes = torch.stack(steps) if steps else values
    return torch.cat([changes.relu(), (-changes).relu()], -1)


def _check(values: Tensor, length: int, expected: str = "") -> None:
    """Refuses values that are no tensor, or not floating point as ``expected``, and no length."""
    check_tensor("values", values)
    if not length >= 1:
        raise ValueError(f"length is {length}, expected at least one step")
    if expected and not values.is_floating_point():
        raise TypeError(f"values are {values.dtype}, expected {expected} in floating point")

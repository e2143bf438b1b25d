"""Time constants, and the decays per step that filters are made of.

A trace with the time constant tau is multiplied by exp(-1 / tau) at every step. The difference of a
slow and a fast trace rises and falls. A time constant is one number for all channels, or a tensor
with a number for each.

Source: Fang et al., IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

PerChannel: TypeAlias = "float | Tensor | Callable[[tuple[int, ...]], Tensor]"


def per_channel(value: PerChannel, shape: tuple[int, ...], name: str) -> float | Tensor:
    """Turns an argument of a layer into a number, or a tensor with a number for each channel.

    The argument is a number, a tensor of the channels' shape, or a function of this shape that
    returns one, such as :func:`log_spaced`. A number is returned as a float, and a tensor in
    float64 on the CPU, where first values are computed.

    Raises:
        ValueError: the tensor has another shape, or no values; the message calls the argument
            ``name``.
        TypeError: it is nothing of these.
    """
    if callable(value):
        with torch.device("cpu"):  # also where layers are built without values
            value = value(shape)
    if isinstance(value, (int, float)):
        return float(value)  # a number of NumPy, too
    if isinstance(value, Tensor) and value.is_meta:
        raise ValueError(f"{name} is a tensor without values: make it outside of the meta device")
    try:
        value = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {value!r}, expected numbers") from None
    if value.shape not in ((), shape):
        raise ValueError(f"{name} has the shape {tuple(value.shape)}, expected {shape} or a number")
    return value


def log_spaced(low: float, high: float) -> Callable[[tuple[int, ...]], Tensor]:
    """Values for the channels of a layer, evenly spread on a logarithmic scale, in random order.

    Because the values are evenly spread, a few channels already cover the whole range. Because the
    order is random, two properties of the channels are independent. The order is drawn from
    PyTorch's generator of the CPU, on every device.

    Args:
        low, high: the smallest and the largest value, 0 < low <= high.

    Returns:
        A function of the channels' shape that draws the values, float64, ``(*shape)``.

    Raises:
        ValueError: the values are not in that order, or not finite.
    """
    if not 0 < low <= high < math.inf:  # nan too
        raise ValueError(f"low is {low} and high {high}, expected 0 < low <= high, both finite")

    def draw(shape: tuple[int, ...]) -> Tensor:
        order = torch.randperm(math.prod(shape), device="cpu")
        ends = math.log(low), math.log(high)
        values = torch.linspace(*ends, len(order), dtype=torch.float64, device="cpu").exp()
        return values.clamp(low, high)[order].view(shape)  # exp and log are rounded

    return draw


def decay_of(tau: float | Tensor, name: str = "tau") -> float | Tensor:
    """exp(-1 / tau), the part of a trace that is left after one step; ``tau`` is in steps.

    Raises:
        ValueError: ``tau`` is not positive; the message calls it ``name``.
    """
    wrong = ~torch.as_tensor(tau > 0, device="cpu")  # nan too
    if wrong.any():
        raise ValueError(f"{name} is {_one(tau, wrong)}, expected a positive number of steps")
    return torch.exp(-1.0 / tau) if isinstance(tau, Tensor) else math.exp(-1.0 / tau)


def decays_of(
    tau_m: float | Tensor, tau_s: float | Tensor
) -> tuple[float | Tensor, float | Tensor]:
    """p = exp(-1 / tau_m) and q = exp(-1 / tau_s) of a dual exponential, with times in steps.

    Raises:
        ValueError: not 0 < tau_s < tau_m, or one is not finite.
    """
    _check_order(tau_m, tau_s)
    return decay_of(tau_m), decay_of(tau_s)


def peak_scale(tau_m: float, tau_s: float) -> float:
    """v0, the factor that gives a difference of two exponentials the peak 1 in continuous time.

    v0 = eta^(eta / (eta - 1)) / (eta - 1),  eta = tau_m / tau_s

    Raises:
        ValueError: not 0 < tau_s < tau_m, or one is not finite.
    """
    _check_order(tau_m, tau_s)
    eta = tau_m / tau_s
    return eta ** (eta / (eta - 1)) / (eta - 1)


def cycles_per_step(frequency: PerChannel, shape: tuple[int, ...]) -> Tensor:
    """The frequency of each channel's oscillation, float64 ``(*shape)`` or ``()``.

    Raises:
        ValueError: one lies outside [0, 0.5], or as :func:`per_channel`.
        TypeError: as there.
    """
    given = per_channel(frequency, shape, "frequency")
    cycles = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    for wrong in cycles[~((cycles >= 0) & (cycles <= 0.5))]:  # nan too
        raise ValueError(f"frequency is {wrong}, expected cycles per step in [0, 0.5]")
    return cycles


def _check_order(tau_m: float | Tensor, tau_s: float | Tensor) -> None:
    right = (tau_s > 0) & (tau_s < tau_m) & (tau_m < math.inf)
    wrong = ~torch.as_tensor(right, device="cpu")  # nan too
    if wrong.any():
        raise ValueError(
            f"tau_m is {_one(tau_m, wrong)} and tau_s {_one(tau_s, wrong)}, "
            "expected 0 < tau_s < tau_m, both finite"
        )


def _one(value: float | Tensor, wrong: Tensor) -> float:
    """The wrong number, or the first wrong number of a tensor."""
    return value.expand_as(wrong)[wrong][0].item() if isinstance(value, Tensor) else value

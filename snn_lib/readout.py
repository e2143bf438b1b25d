"""Readouts: what a network says about a whole sequence, from its output at every step.

Each is a module ``(T, B, *features)`` to ``(B, *features)`` without parameters. With ``lengths``,
int64 ``(B,)``, only the first steps of each sequence count, those after them being padding.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from snn_lib.functional import iir_filter
from snn_lib.time_constants import decay_of


class SpikeCount(nn.Module):
    """The number of output spikes: the sum over time."""

    def forward(self, output: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads out; see the module for shapes."""
        output = _at_least_float32(output)
        return (output if lengths is None else output * within(output, lengths)).sum(0)


class Mean(nn.Module):
    """The mean over time: a firing rate, or the mean of a non-spiking output."""

    def forward(self, output: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads out; see the module for shapes."""
        output = _at_least_float32(output)
        if lengths is None:
            return output.mean(0)
        steps = lengths.view(-1, *[1] * (output.dim() - 2))
        return (output * within(output, lengths)).sum(0) / steps


class Last(nn.Module):
    """The value at the last step."""

    def forward(self, output: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads out; see the module for shapes."""
        if lengths is None:
            return output[-1]
        index = (lengths - 1).view(1, -1, *[1] * (output.dim() - 2))
        return output.gather(0, index.expand(1, *output.shape[1:]))[0]


class Maximum(nn.Module):
    """The largest value over time, such as that of a membrane potential."""

    def forward(self, output: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads out; see the module for shapes."""
        if lengths is not None:
            output = output.masked_fill(~within(output, lengths), -math.inf)
        return output.amax(0)


class LeakyIntegrator(nn.Module):
    """The last value of a membrane that leaks and does not spike, driven by the output.

    U[t] = lambda U[t-1] + (1 - lambda) output[t],  lambda = exp(-1 / tau)

    Args:
        tau: the time constant, in steps: how long ago what counts may be.

    Raises:
        ValueError: ``tau`` is not positive.
    """

    def __init__(self, tau: float = 20.0) -> None:
        super().__init__()
        self.tau, self.decay = tau, decay_of(tau)

    def forward(self, output: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads out; see the module for shapes."""
        output = _at_least_float32(output)
        decay = output.new_full((1, *output.shape[2:]), self.decay)
        return Last()(iir_filter(output, decay, 1.0 - decay)[0], lengths)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"tau={self.tau}"


READOUTS: dict[str, type[nn.Module]] = {
    "count": SpikeCount,
    "mean": Mean,
    "last": Last,
    "maximum": Maximum,
    "leaky": LeakyIntegrator,
}


def first_lead(output: Tensor, lead: float) -> tuple[Tensor, Tensor]:
    """What each sequence's output says as soon as it says so clearly enough.

    An answer stands at the first step at which the sum of the output so far is larger for one class
    than for every other by ``lead``; where that never happens, at the last.

    Args:
        output: ``(T, B, classes)``, output spikes, say; at least two classes.
        lead: by how much the first has to be ahead of the second.

    Returns:
        The class and the number of steps that it took, both int64 ``(B,)``.

    Raises:
        ValueError: there are no steps, or fewer than two classes.
    """
    return _first_lead(_at_least_float32(output).cumsum(0), lead)


def until_clear(
    model: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor, lead: float, steps: int = 1
) -> tuple[Tensor, Tensor]:
    """The same from a model that stops running as soon as every sequence's answer stands.

    Args:
        model: ``(x, state) -> (output, state)``, in evaluation mode.
        x: ``(T, B, *features)``.
        lead: as in :func:`first_lead`.
        steps: that it runs between two looks at the output.

    Returns:
        Classes and steps as :func:`first_lead` finds them in the output of the whole run.

    Raises:
        ValueError: as :func:`first_lead`, or ``steps`` is none.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    state, totals, clear = None, [], False
    for part in x.split(steps):
        output, state = model(part, state)
        output = _at_least_float32(output)
        if totals:  # go on adding up
            output = torch.cat([totals[-1][-1:], output])
        totals.append(output.cumsum(0)[-len(part) :])
        clear = clear | _leads(totals[-1], lead).any(0)
        if clear.all():
            break
    return _first_lead(torch.cat(totals) if totals else x, lead)


def within(sequence: Tensor, lengths: Tensor) -> Tensor:
    """The mask of the steps that are each sequence's own, bool ``(T, B, 1, ...)``.

    It has the dimensions of ``sequence``, ``(T, B, *features)``, to be multiplied with it.
    """
    mask = torch.arange(len(sequence), device=lengths.device)[:, None] < lengths
    return mask.view(*mask.shape, *[1] * (sequence.dim() - 2))


def _first_lead(total: Tensor, lead: float) -> tuple[Tensor, Tensor]:
    """:func:`first_lead` of sums so far, ``(T, B, classes)``."""
    clear = _leads(total, lead)
    clear[-1] = True
    step = clear.int().argmax(0)  # the first of equals
    answers = total.argmax(2).gather(0, step[None])[0]
    return answers, step + 1


def _leads(total: Tensor, lead: float) -> Tensor:
    """Where the first class of sums so far, ``(T, B, classes)``, is far enough ahead, (T, B)."""
    if total.dim() != 3 or len(total) == 0 or total.shape[2] < 2:
        raise ValueError(
            f"the output has the shape {tuple(total.shape)}, expected (T, B, classes) of at least "
            "one step and two classes"
        )
    first, second = total.topk(2, dim=2).values.unbind(2)
    return first - second >= lead


def _at_least_float32(output: Tensor) -> Tensor:
    """What is added up over time needs more digits than a product in bfloat16 hands out."""
    return output.to(torch.promote_types(output.dtype, torch.float32))

"""Readouts: a network's answer about a whole sequence, from its output at every step.

Each readout is a module without parameters that takes ``(T, B, *features)`` and returns
``(B, *features)``. With ``lengths``, int64 ``(B,)``, only the first so many steps of each sequence
count and the others are padding. A length beyond T counts as T. As a layer of a
:class:`snn_lib.Sequential` a readout is handed the lengths that the network is given.

:class:`Snapshots` is a layer before a readout, with which the last weights see several moments.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from snn_lib.containers import (
    Output,
    Readout,
    StatefulModule,
    batch_first_part,
    last_steps,
    lengths_beside,
    whole_number,
)
from snn_lib.functional import (
    check_entries,
    check_sequence,
    check_shape,
    check_tensor,
    iir_filter,
)
from snn_lib.time_constants import decay_of


class SpikeCount(Readout):
    """The number of output spikes: the sum over time."""

    def forward(self, output: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads out; see the module for shapes."""
        output = at_least_float32(output)
        if lengths is not None:  # padding may be undefined
            output = output.masked_fill(~within(output, lengths), 0)
        return output.sum(0)


class Mean(Readout):
    """The mean over time: a firing rate, or the mean of a non-spiking output.

    A length of 0 gives 0.
    """

    def forward(self, output: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads out; see the module for shapes."""
        output = at_least_float32(output)
        if lengths is None:
            return output.mean(0)
        mask = within(output, lengths)
        return output.masked_fill(~mask, 0).sum(0) / mask.sum(0).clamp(min=1)


class Last(Readout):
    """The value at the last step. Every sequence needs at least one step."""

    reads_all = False

    def forward(self, output: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads out; see the module for shapes."""
        check_tensor("output", output)
        if lengths is None:
            return output[-1]
        return last_steps(output, 1, lengths_beside(output, lengths) - 1)[0]


class Maximum(Readout):
    """The largest value over time, such as that of a membrane potential."""

    def forward(self, output: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads out; see the module for shapes."""
        check_tensor("output", output)
        if lengths is not None:
            output = output.masked_fill(~within(output, lengths), -math.inf)
        return output.amax(0)


class LeakyIntegrator(Readout):
    """The last value of a membrane that leaks and does not spike, driven by the output.

    U[t] = lambda U[t-1] + (1 - lambda) output[t],  lambda = exp(-1 / tau)

    Args:
        tau: the time constant, in steps: about how far back the output still counts.

    Raises:
        ValueError: ``tau`` is not positive, or so long that the membrane does not leak in float32.
    """

    def __init__(self, tau: float = 20.0) -> None:
        super().__init__()
        self.tau, self.decay = tau, float(decay_of(tau))
        if not torch.tensor(self.decay, dtype=torch.float32, device="cpu") < 1:
            raise ValueError(f"tau is {tau}, so long that the membrane does not leak in float32")

    def forward(self, output: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Reads out; see the module for shapes."""
        output = at_least_float32(output)[..., None]  # the filter asks for a feature dimension
        decay = output.new_full((1, *output.shape[2:]), self.decay)
        return Last()(iir_filter(output, decay, 1.0 - decay)[0], lengths)[..., 0]

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"tau={self.tau}"


class Snapshots(StatefulModule):
    """The sum of parts of its input, each taken at a step of its own.

    The channels are split into as many equal parts ``x_1, ..., x_K`` as there are steps:

        y[t] = sum of x_k[steps_k] over all k with steps_k <= t

    Before the first of the steps the output is 0, and a step that a sequence does not reach adds
    nothing. After an ``nn.Linear`` with K outputs for each class and before the readout
    :class:`Last`, the answer depends on what the layer before remembers at K moments, with weights
    of their own for each moment:

        Sequential(..., nn.Linear(256, 4 * 10), Snapshots([196, 392, 588, 784]))

    Args:
        steps: when the parts are taken; the first step of a sequence is number 1.

    Shape:
        ``(T, B, K * C, *positions)`` to ``(T, B, C, *positions)``, in float32 at least. The state
        is ``(taken, elapsed)``: the parts taken so far, ``(B, K, C, *positions)``, and the number
        of steps so far, int64 ``(B,)``. (Their sum alone would be rounded at the end of a chunk.)

    Raises:
        ValueError: a step is not a whole number of at least 1, or there is none; the channels
            cannot be split into so many parts; or a shape is wrong.
    """

    def __init__(self, steps: Iterable[int]) -> None:
        super().__init__()
        self.steps = tuple(whole_number(step, "a step") for step in steps)
        if not self.steps:
            raise ValueError("there are no steps, expected whole numbers of at least 1")

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> Output:
        """Takes the parts; see the class for shapes."""
        check_sequence("x", x)
        total, batch, channels, *positions = x.shape
        count = len(self.steps)
        if channels % count:
            raise ValueError(f"got {channels} channels, expected a multiple of the {count} steps")
        parts = at_least_float32(x).unflatten(2, (count, -1))
        shape, features = (batch, count, channels // count, *positions), [1] * (x.dim() - 2)
        if state is None:
            state = parts.new_zeros(shape), x.new_zeros(batch, dtype=torch.int64)
        else:
            check_entries(state, ["taken", "elapsed"])
        before, elapsed = state
        check_shape("state taken", before, shape)
        check_shape("state elapsed", elapsed, (batch,))
        end = torch.full_like(elapsed, total)
        if lengths is not None:
            end = lengths_beside(x, lengths).clamp(max=total)

        # At which step of x a part is taken; 0 if at none, so that it is as it was before.
        here = torch.stack([step - elapsed for step in self.steps], 1)  # (B, K)
        here = torch.where((here > 0) & (here <= end[:, None]), here, 0)
        index = here.view(1, batch, count, *features).expand(1, *shape)
        taken = torch.cat([before[None].to(parts.dtype), parts]).gather(0, index)[0]
        now = elapsed + torch.arange(1, total + 1, device=x.device)[:, None]  # (T, B)
        counts = torch.stack([now >= step for step in self.steps], 2)
        counts = counts.view(total, batch, count, *features)
        return Output(torch.where(counts, taken, 0).sum(2), (taken, elapsed + end))

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"steps={list(self.steps)}"


READOUTS: dict[str, type[Readout]] = {
    "count": SpikeCount,
    "mean": Mean,
    "last": Last,
    "maximum": Maximum,
    "leaky": LeakyIntegrator,
}

EVERY_STEP = "every step"  # the answer is the output itself


def first_lead(output: Tensor, lead: float) -> tuple[Tensor, Tensor]:
    """Each sequence's answer at the first step at which it is clear.

    The answer is clear when the sum of the output so far is larger for one class than for every
    other by ``lead``. If that never happens, the answer at the last step counts.

    The sum of whole numbers, such as spikes, is exact. Other sums are rounded, and
    :func:`until_clear` and a compiled network round them in another order. If a class is ahead by
    almost exactly ``lead``, they may find the answer clear a step earlier or later.

    Args:
        output: ``(T, B, classes)``, for example output spikes, with at least two classes.
        lead: by how much the first class has to be ahead of the second.

    Returns:
        The classes and the numbers of steps until they were clear, both int64 ``(B,)``.

    Raises:
        ValueError: there are no steps, or fewer than two classes; ``lead`` is negative or nan.
    """
    return _first_lead(at_least_float32(output).cumsum(0), lead)


def until_clear(
    model: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor, lead: float, steps: int = 1
) -> tuple[Tensor, Tensor]:
    """Runs a model until every sequence's answer is clear.

    Args:
        model: ``(x, state) -> (output, state)``, in evaluation mode.
        x: ``(T, B, *features)``.
        lead: as in :func:`first_lead`.
        steps: how many steps the model runs before the answers are looked at again.

    Returns:
        What :func:`first_lead` returns for the output of the whole run, but for its rounding.

    Raises:
        ValueError: as :func:`first_lead`, ``steps`` is not a whole number of at least 1, or the
            model, or a part of it, has ``batch_first`` and the model no attribute that says False.
    """
    steps = whole_number(steps, "steps")
    if (part := batch_first_part(model)) is not None:
        raise ValueError(
            f"the model{part and f', in its part {part},'} has batch_first, expected one that "
            "takes (T, B, *features), or that has an attribute batch_first = False"
        )
    check_tensor("x", x)
    state, totals, clear = None, [], False
    for part in x.split(steps):
        output, state = model(part, state)
        output = at_least_float32(output)
        if totals:  # go on adding up
            output = torch.cat([totals[-1][-1:], output])
        totals.append(output.cumsum(0)[-len(part) :])
        clear = clear | _leads(totals[-1], lead).any(0)
        if clear.all():
            break
    return _first_lead(torch.cat(totals), lead)


def within(sequence: Tensor, lengths: Tensor) -> Tensor:
    """The mask of the steps that are not padding, bool ``(T, B, 1, ...)``.

    It has as many dimensions as ``sequence``, ``(T, B, *features)``, so the two can be multiplied.

    Raises:
        ValueError: there is not a whole number for each sequence.
    """
    lengths = lengths_beside(sequence, lengths)
    mask = torch.arange(sequence.shape[0], device=lengths.device)[:, None] < lengths
    return mask.view(*mask.shape, *[1] * (sequence.dim() - 2))


def _first_lead(total: Tensor, lead: float) -> tuple[Tensor, Tensor]:
    """:func:`first_lead` from the sums so far, ``(T, B, classes)``."""
    clear = _leads(total, lead)
    clear[-1] = True
    step = clear.int().argmax(0)  # the first of equals
    answers = total.argmax(2).gather(0, step[None])[0]
    return answers, step + 1


def _leads(total: Tensor, lead: float) -> Tensor:
    """Where one class leads in the sums so far, ``(T, B, classes)``; bool ``(T, B)``."""
    if total.dim() != 3 or len(total) == 0 or total.shape[2] < 2:
        raise ValueError(
            f"the output has the shape {tuple(total.shape)}, expected (T, B, classes) of at least "
            "one step and two classes"
        )
    check_lead(lead)
    first, second = total.topk(2, dim=2).values.unbind(2)
    return first - second >= lead


def check_lead(lead: float) -> None:
    """Raises a ValueError unless ``lead`` is 0 or more."""
    if not lead >= 0:  # nan too
        raise ValueError(f"lead is {lead}, expected a number that is not negative")


def at_least_float32(output: Tensor) -> Tensor:
    """The output in float32 at least: sums over time need more digits than bfloat16 has.

    Raises:
        TypeError: it is no tensor.
    """
    check_tensor("output", output)
    return output.to(torch.promote_types(output.dtype, torch.float32))

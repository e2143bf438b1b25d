"""A trained network in integers: weights of 8, 4 or 2 bits, factors of 24, states of 31.

A number is an integer times its unit, in most cases a power of two: fixed point. How large values
become is measured on samples, and all have headroom. Products are summed in 64 bits and rounded
once for each state, by :func:`snn_lib.inference.stages.rounded` alone. What does not fit after all
is held at the limit, and counted. A step is lowered to lines of integers (``lowering.py``), which
NumPy runs and C spells, so both compute the same bits.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snn_lib.data.preparation import NetworkInput, Preparation
from snn_lib.inference.arrays import unmasked
from snn_lib.inference.description import preparation_of
from snn_lib.inference.lowering import (
    HEADROOM,
    STATE_BITS,
    Lowering,
    Values,
    fraction_of,
    keep_row,
)
from snn_lib.inference.stages import FUNCTIONS, SATURATED, Pool, Rows, Stage, States, Step
from snn_lib.inference.staging import LARGEST_LOSS, StagedNetwork, raw_steps, read_stages
from snn_lib.kernels.trace import Line, Trace, Value
from snn_lib.rounding import WEIGHT_BITS, integer_weights

INPUT_BITS = 16
LEAST_STEPS = 100  # of its unit, which the input has to reach
LEAST_AGREEMENT = 0.9  # the share of samples whose class is the same in integers as in floats
NEAR_LIMIT = 1 << (STATE_BITS - 2)  # half of what fits: a sum of a class as large is shifted
FAR_BEHIND = -3 << (STATE_BITS - 3)  # the least sum that is kept: a step more still fits


@dataclass(frozen=True)
class StagedIntegers(StagedNetwork):
    """A network in stages whose numbers are integers.

    Attributes:
        weight_bits: of each weight.
        input_kind: the type of the input in C.
        input_limits: its least and its largest value.
        input_scale, output_scale, lead_scale: what a 1 of the input, of the output, and of the
            answers stands for.
    """

    weight_bits: int
    input_kind: str
    input_limits: tuple[int, int]
    input_scale: float
    output_scale: float
    lead_scale: float

    @property
    def answers_are_sums(self) -> bool:
        """Whether the answers add up over time, so that they may near their limit."""
        return any("sum" in step.states for step in self.readout or ())


def quantise(
    network: nn.Module,
    x: NetworkInput | np.ndarray | Tensor,
    weight_bits: int = 8,
    shape: Sequence[int] | None = None,
) -> "IntegerNetwork":
    """Makes an integer network of a trained one, without training.

        made = quantise(network, network.prepare(samples))

    Args:
        network: as :func:`snn_lib.inference.compiled` takes, without :class:`snn_lib.Recurrent`.
        x: what ``network.prepare`` returns for some hundred samples of the training data, or the
            network's input over time, ``(T, B, *features)``. Fixed points are chosen so that four
            times what they reach still fits.
        weight_bits: 8, 4 or 2. With 2, a network should have been trained with as many.
        shape: as in :func:`snn_lib.inference.compiled`.

    Raises:
        ValueError: the number of bits is another one, ``x`` is not finite, has another shape or is
            too small, a step computes what integers cannot or grows beyond them, no stable filter
            is near enough, or as :func:`snn_lib.inference.to_c`.
        TypeError: the number of bits is no integer, or ``x`` is another tuple.

    Warns:
        UserWarning: an input varies so little beside the largest ones that its integers lose it,
            rounding makes another filter of one, or fewer than 90 % of the samples in ``x`` have
            the same class in integers as in floats, after their last step.
    """
    lengths = None
    if isinstance(x, NetworkInput):
        x, lengths = x
    if isinstance(x, tuple):
        raise TypeError("x is a tuple, expected an array, a tensor or network.prepare(samples)")
    if index(weight_bits) not in WEIGHT_BITS:
        raise ValueError(f"weight_bits is {weight_bits}, expected 8, 4 or 2")
    read, raw = read_stages(network, shape), raw_steps(preparation_of(network), x)
    if raw.ndim < 2 or raw.shape[2:] != read.before or raw.size == 0:
        raise ValueError(f"x has the shape {raw.shape}, expected (T, B, *{read.before})")
    if not np.isfinite(raw).all():
        raise ValueError("x has values that are not finite")
    _warn_of_coarse_inputs(raw, float(_input_of(raw)[1].unit))
    staged, answers = integer_stages(read, raw, weight_bits)
    if answers:
        _warn_of_other_classes(staged, raw, np.stack(answers), lengths)
    return IntegerNetwork(staged, preparation_of(network))


def _warn_of_other_classes(
    staged: StagedIntegers, x: np.ndarray, answers: np.ndarray, lengths: Tensor | None
) -> None:
    """Warns if integers often choose another class than floats, which answered ``answers``."""
    made = IntegerNetwork(staged)
    found = _at_ends(made.answers(made.integers(x)), lengths).argmax(1)
    expected = _at_ends(answers, lengths).argmax(1)
    alike, count = np.count_nonzero(found == expected), len(expected)
    if alike < LEAST_AGREEMENT * count:
        warnings.warn(
            f"only {alike} of the {count} samples in x have the same class in integers as in "
            "floats: test the integers before you use them",
            UserWarning,
            stacklevel=3,
        )


def _at_ends(answers: np.ndarray, lengths: Tensor | None) -> np.ndarray:
    """Of answers after each step, ``(T, B, outputs)``, those after the last one of each sample."""
    if lengths is None:
        return answers[-1]
    return answers[lengths.numpy() - 1, np.arange(len(lengths))]


def _warn_of_coarse_inputs(x: np.ndarray, unit: float) -> None:
    """Warns if the unit that all inputs share is too large for what varies in one of them."""
    rows = x.reshape(-1, math.prod(x.shape[2:]))
    lost = (rows - unit * np.rint(rows / unit)).std(0)
    varying = rows.std(0)
    for number in np.flatnonzero(lost > LARGEST_LOSS * varying)[:1]:
        warnings.warn(
            f"input {number} varies by {varying[number]:.3g}, and all inputs have the unit "
            f"{unit:.3g}, which is too large for it: give the inputs similar ranges around 0, and "
            "train again",
            UserWarning,
            stacklevel=3,
        )


def integer_stages(
    read: StagedNetwork, x: np.ndarray, weight_bits: int
) -> tuple[StagedIntegers, list[np.ndarray]]:
    """The stages in integers for input like x, ``(T, B, *before)``, and the answers of floats.

    These are what the readout says after each step, ``(B, outputs)``; none if it is not known.
    """
    quantiser = _Quantiser(read, x, weight_bits)
    return quantiser.staged, quantiser.answers


class IntegerNetwork:
    """Streams through an integer network, which computes the bits that its C source computes.

    :func:`quantise` makes it, and :func:`snn_lib.inference.to_c` writes it as C. It takes and
    returns integers, and keeps its state from one step to the next.

    Attributes:
        before, after: the shapes of one step of the input and of the output.
        input_scale, output_scale: what a 1 of the input and of the output stands for.
        lead_scale: what a 1 of the answers stands for, and of ``network_lead`` in C; 1 if the
            network counts spikes.
        saturated: how many values have not fitted since the last reset.
    """

    def __init__(self, staged: StagedIntegers, preparation: Preparation | None = None) -> None:
        self.staged, self._preparation = staged, preparation
        self.before, self.after = staged.before, staged.after
        self.input_scale, self.output_scale = staged.input_scale, staged.output_scale
        self.lead_scale = staged.lead_scale
        self.reset()

    def reset(self) -> None:
        """Sets all states to zero, for new sequences."""
        self._states: States = {SATURATED: 0}
        self._sequences = 0  # of the steps since then

    @property
    def saturated(self) -> int:  # noqa: D102 (an attribute of the class)
        return self._states[SATURATED]

    def integers(self, values: np.ndarray) -> np.ndarray:
        """The integers that stand for values as they were measured, halves away from zero."""
        values = unmasked(values).astype(np.float32) / np.float32(self.input_scale)
        return np.trunc(values + np.copysign(np.float32(0.5), values)).astype(np.int64)

    def step(self, x: np.ndarray) -> np.ndarray:
        """Runs a time step of a batch, int64 ``(B, *before)`` to ``(B, *after)``.

        Raises:
            ValueError: ``x`` has another shape, values that do not fit or are masked, or not as
                many sequences as the steps before it. The state then stays as it is.
            TypeError: ``x`` does not hold integers.
        """
        (now,) = self._steps([x])
        return self._step(now)[0].copy()  # the output may be a state of the last layer

    def run(self, x: np.ndarray) -> np.ndarray:
        """Runs sequences, int64 ``(T, B, *before)`` to ``(T, B, *after)``, from the present state.

        Raises:
            ValueError, TypeError: as :meth:`step`.
        """
        outputs = [self._step(now)[0] for now in self._steps(x)]
        return np.stack(outputs) if outputs else np.zeros((*np.shape(x)[:2], *self.after), np.int64)

    def classify(self, samples: Any) -> tuple[list[str], np.ndarray]:
        """The name of each sample's class, and the answers of all classes, int64 ``(B, classes)``.

        If the network answers at every step, they are those of the last; :meth:`answers` has all.

        Args:
            samples: what ``network.classify`` takes, if :func:`snn_lib.load` returned the network;
                else its input over time.

        Raises:
            ValueError: the network has no readout that is known here, or as :meth:`step`.
        """
        if self.staged.readout is None:
            raise ValueError("the readout is not known here: run the network and read its output")
        x, lengths = samples, None
        if self._preparation is not None:
            x, lengths = self._preparation(samples)
        last = _at_ends(self.answers(self.integers(raw_steps(self._preparation, x))), lengths)
        names = self.staged.classes or [str(number) for number in range(last.shape[1])]
        return [names[number] for number in last.argmax(1)], last

    def answers(self, x: np.ndarray) -> np.ndarray:
        """What the readout says after each step of new sequences: int64 ``(T, B, outputs)``.

        For ``count`` and ``mean`` that is the sum of the steps so far. In a long stream, when one
        of them nears its limit, those of all classes lose the largest: their differences stay.
        Afterwards the network is ready for other sequences, and ``saturated`` is that of these.
        """
        self.reset()
        try:
            return np.stack([self._step(now)[1] for now in self._steps(x)])
        finally:
            saturated = self.saturated
            self.reset()
            self._states[SATURATED] = saturated

    def _steps(self, x: Iterable[np.ndarray]) -> list[np.ndarray]:
        """The steps of sequences, ``(B, features)`` each, after all of them have been checked."""
        steps: list[np.ndarray] = []
        count, (low, high) = self._sequences, self.staged.input_limits
        for now in map(unmasked, x):
            if now.dtype.kind not in "iub":
                raise TypeError(
                    f"the input is {now.dtype}, expected integers: call integers(values)"
                )
            if now.shape[1:] != self.before:
                raise ValueError(f"a step has the shape {now.shape[1:]}, expected {self.before}")
            if len(now) == 0 or count not in (0, len(now)):
                before = f" after steps of {count}: call reset() for new ones"
                expected = before if len(now) else ", expected at least one"
                raise ValueError(f"a step has {len(now)} sequences{expected}")
            if now.size and not (low <= now.min() and now.max() <= high):
                raise ValueError(f"the input has values outside {low} to {high}")
            count = len(now)
            steps.append(now.reshape(count, -1))
        return steps

    def _step(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The output of a step, and the answer."""
        x, self._sequences = x.astype(np.int64), len(x)
        for stage in self.staged.stages:
            x = stage.run(x, self._states)
        answer = x
        for stage in self.staged.readout or ():
            answer = stage.run(answer, self._states)
            if self.staged.answers_are_sums:
                self._states[f"{stage.name}.sum"] = self._shifted(f"{stage.name}.sum")
        return x.reshape(len(x), *self.after), answer

    def _shifted(self, name: str) -> np.ndarray:
        """The sums of the classes, of which only the differences count, away from the limit.

        One that is far behind stays there, which changes no class.
        """
        sums = self._states[name]
        largest = sums.max(-1, keepdims=True)
        near = (abs(sums) >= NEAR_LIMIT).any(-1, keepdims=True)
        return np.where(near, np.maximum(sums - largest, FAR_BEHIND), sums)


# --------------------------------------------------------------------------------------------------
# Layers


class _Quantiser:
    """Makes stages of integers, one by one, from the values that samples reach."""

    def __init__(self, read: StagedNetwork, x: np.ndarray, weight_bits: int) -> None:
        self._bits = weight_bits
        kind, values = _input_of(x)
        stages = tuple(_joined([_without_rests(stage) for stage in read.stages]))
        readout = read.readout and tuple(map(_without_rests, read.readout))
        read = replace(read, stages=stages, readout=readout)
        with np.errstate(all="ignore"):  # what is not finite is refused
            reached, self.answers = _reached(read, x)
        self._stages: list[Stage] = []
        self._values, self._reach = values, float(abs(x).max(initial=0))
        for number, stage in enumerate(read.stages):
            reach = reached[number]
            match stage:
                case Rows():
                    self._rows(stage)
                case Pool():
                    self._pool(stage)
                case Step():
                    self._step(stage, reach)
                case _:
                    self._stages.append(stage)
            self._reach = reach[""]
        stages, last = tuple(self._stages), self._values
        self._stages = []
        for step in read.readout or ():
            self._step(step, reached[len(read.stages)])
        known = {field.name: getattr(read, field.name) for field in fields(StagedNetwork)}
        known |= {"stages": stages, "dtype": np.dtype(np.int64)}
        known["readout"] = None if read.readout is None else tuple(self._stages)
        limits = values.low, values.high
        self.staged = StagedIntegers(
            **known,
            weight_bits=weight_bits,
            input_kind=kind,
            input_limits=limits,
            input_scale=float(values.unit),
            output_scale=float(last.unit),
            lead_scale=float(self._values.unit),
        )

    def _rows(self, rows: Rows) -> None:
        by_output = torch.from_numpy(rows.weights.swapaxes(1, 2))
        weights, scale = (x.mT.numpy() for x in integer_weights(by_output, self._bits))
        weights = weights.astype(np.int64)
        dead = ~weights.any(1, keepdims=True)  # outputs without weights, whose scale says nothing
        scale = np.where(dead, scale.max(initial=0, where=~dead) or 1.0, scale)
        sums = int(abs(weights).sum(1).max())
        values = self._values
        spikes = values.fraction == 0 and (values.low, values.high) == (0, 1)
        if not spikes:
            self._hold(rows.name, rows.windows.before, min(16, STATE_BITS - sums.bit_length()))
            values = self._values
        above = weights.clip(0, None).sum(1), -weights.clip(None, 0).sum(1)
        high = int((above[0] * values.high - above[1] * values.low).max())
        low = int((above[0] * values.low - above[1] * values.high).min())
        self._stages.append(replace(rows, weights=weights, spikes=spikes, bits=self._bits))
        unit = scale.reshape(1, -1) * values.unit
        self._values = Values(float(unit[0, 0]) if np.ptp(unit) == 0 else unit, low, high)

    def _pool(self, pool: Pool) -> None:
        taps = pool.windows.places.shape[1]
        if not pool.largest:
            self._hold(pool.name, pool.windows.before, STATE_BITS - taps.bit_length())
            values = self._values
            self._values = replace(values, low=taps * values.low, high=taps * values.high)
        self._stages.append(pool)

    def _step(self, step: Step, reach: Mapping[str, float]) -> None:
        step, before = _with_named_factors(step), self._values
        reach = {**reach, **{name: abs(row).max() for name, row in step.coefficients.items()}}
        made, self._values = Lowering(step, before, reach).lowered()
        self._stages.append(made)

    def _hold(self, name: str, maps: Sequence[int], bits: int) -> None:
        """Rounds the present values to so many bits, if they may need more."""
        values, limit = self._values, 1 << (bits - 1)
        if -limit <= values.low and values.high < limit:
            return
        needed = math.ceil(math.log2(HEADROOM * (self._reach or 1.0) / values.unit))
        shift = max(needed - (bits - 1), 0)
        trace = Trace((Line("_0", "round", ("x", shift, bits)),), ("_0",))
        height, width, channels = maps
        self._stages.append(Step(name, height * width, channels, trace))
        self._values = Values(2.0**shift * values.unit, -limit, limit - 1)


def _input_of(x: np.ndarray) -> tuple[str, Values]:
    """The type in C of an input like x, and what its integers are."""
    if np.isin(x, (0, 1)).all():
        return "uint8_t", Values(1.0, 0, 1)
    limit, largest = 1 << (INPUT_BITS - 1), abs(x).max()
    # Pixels are never larger. Other whole numbers, such as counts, may be.
    for scale, kind, low, high in (1 / 255, "uint8_t", 0, 255), (1.0, "int16_t", -limit, limit - 1):
        nearest = np.rint(x / scale)
        near = abs(x / scale - nearest).max() < 1e-3 and nearest.any()  # what is small is near to 0
        reach = nearest if kind == "uint8_t" else HEADROOM * nearest
        if near and reach.min() >= low and reach.max() <= high:
            return kind, Values(scale, low, high)
    unit = 2.0 ** -fraction_of(largest, INPUT_BITS)
    if largest < LEAST_STEPS * unit:
        raise ValueError(f"x lies within {largest:g} of 0, which is too little: scale the input up")
    return "int16_t", Values(unit, -limit, limit - 1)


def _without_rests(stage: Stage) -> Stage:
    """The same stage; sums of integers leave no rest, which those of floats remember."""
    if not isinstance(stage, Step):
        return stage
    rests = {state: 0.0 for state in stage.states if state.endswith(".rest")}
    trace, states = stage.trace.without(rests).live(stage.states)
    return replace(stage, trace=trace, states=tuple(states))


def _joined(stages: Sequence[Stage]) -> list[Stage]:
    """The same stages, where a step without a state and the step behind it are one.

    So a bias and the gain of a filter become one factor and one summand, and nothing is rounded in
    between.
    """
    joined: list[Stage] = []
    for stage in stages:
        first = joined[-1] if joined else None
        if isinstance(stage, Step) and isinstance(first, Step) and _can_join(first, stage):
            joined[-1] = _behind(first, stage)
        else:
            joined.append(stage)
    return joined


def _can_join(first: Step, second: Step) -> bool:
    shared = first.coefficients.keys() & {*second.coefficients, *second.states}
    return first.grid == second.grid and not first.states and not shared


def _behind(first: Step, second: Step) -> Step:
    """Two steps as one, the first of which has no state."""
    inner: dict[Value, Value] = {line.name: f"_before{line.name}" for line in first.trace.lines}

    def renamed(lines: Sequence[Line], names: Mapping[Value, Value]) -> list[Line]:
        return [
            replace(
                line,
                name=names.get(line.name, line.name),
                arguments=tuple(names.get(value, value) for value in line.arguments),
            )
            for line in lines
        ]

    (output,) = first.trace.results
    outer: dict[Value, Value] = {"x": inner.get(output, output)}
    lines = renamed(first.trace.lines, inner) + renamed(second.trace.lines, outer)
    results = tuple(outer.get(value, value) for value in second.trace.results)
    coefficients = {**first.coefficients, **second.coefficients}
    return replace(second, trace=Trace(tuple(lines), results), coefficients=coefficients)


def _with_named_factors(step: Step) -> Step:
    """The same step, in which all factors that never change are coefficients.

    So what a coefficient is computed from, numbers and other coefficients, is computed once, and
    all factors can be kept stable.
    """
    rows = dict(step.coefficients)
    lines: list[Line] = []
    names: dict[Value, str] = {}

    def constant(name: str, row: np.ndarray) -> str:
        return keep_row(rows, name, row, step.states)

    for line in step.trace.lines:
        values = [names.get(value, value) for value in line.arguments]
        known = [rows.get(v) if isinstance(v, str) else np.full((1, 1), v) for v in values]
        if all(row is not None for row in known):
            result = FUNCTIONS[line.operation](*known)
            names[line.name] = constant(f"constant{line.name}", result.astype(float))
            continue
        if line.operation == "div" and known[1] is not None:
            values[1] = constant(f"inverse_of_{values[1]}", 1 / known[1])
            line = replace(line, operation="mul")
        elif line.operation == "mul":
            values = [
                constant(str(v), np.full((1, 1), v)) if isinstance(v, float) else v for v in values
            ]
        lines.append(replace(line, arguments=tuple(values)))
    results = tuple(names.get(value, value) for value in step.trace.results)
    return replace(step, trace=Trace(tuple(lines), results), coefficients=rows)


def _reached(read: StagedNetwork, x: np.ndarray) -> tuple[list[dict[str, float]], list[np.ndarray]]:
    """For each stage and for the readout, the largest size of its values, by name; "": the output.

    The network runs in floats, step by step. The answers after each are returned as well.
    """
    stages = [*read.stages, *(read.readout or ())]
    reached: list[dict[str, float]] = [{} for _ in stages]
    states: States = {}
    answers = []
    for now in x:
        values = np.asarray(now, np.float64).reshape(len(now), -1)
        for stage, reach in zip(stages, reached, strict=True):
            named = {"x": values}
            if isinstance(stage, Step):
                named = stage.values(values, states)
                after = zip(stage.states, stage.trace.results[1:], strict=True)
                named |= {state: named[result] for state, result in after}
                values = named[stage.trace.results[0]].reshape(len(values), -1)
            else:
                values = stage.run(values, states)
            named[""] = values
            sizes = {name: float(np.abs(value).max(initial=0)) for name, value in named.items()}
            infinite = {name for name, size in sizes.items() if not math.isfinite(size)}
            if infinite & {"", *(stage.states if isinstance(stage, Step) else ())}:
                raise ValueError("the network's values grow without limit on x: is it stable?")
            if infinite:
                raise ValueError(
                    f"layer {stage.name} computes numbers that are not finite, such as 1 / 0, "
                    "which integers cannot, though its output does not depend on them"
                )
            for name, size in sizes.items():
                reach[name] = max(reach.get(name, 0.0), size)
        if read.readout is not None:
            answers.append(values)
    return reached, answers

"""A trained network in integers: weights of 8, 4 or 2 bits, factors of 24, states of 31.

A number is an integer times its unit, in most cases a power of two: fixed point. How large values
become is measured on samples, and all have headroom. Products are summed in 64 bits and rounded
once for each state, by :func:`snn_lib.inference.stages.rounded` alone. What does not fit after all
is held at the limit, and counted. A step is lowered to lines of integers, which NumPy runs and C
spells, so both compute the same bits.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from operator import index
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from snn_lib.data.preparation import Preparation
from snn_lib.inference.description import preparation_of
from snn_lib.inference.stages import FUNCTIONS, SATURATED, Pool, Rows, Stage, States, Step
from snn_lib.inference.staging import StagedNetwork, raw_steps, read_stages
from snn_lib.kernels.trace import COMPARISONS, LOGIC, Line, Trace, Value
from snn_lib.rounding import WEIGHT_BITS, integer_weights

STATE_BITS = 31  # so that the sum of two fits 32
INPUT_BITS = 16
FINEST = 30  # f of a state's unit 2^-f
FACTOR_BITS = 24  # of what states are multiplied by
GUARD_BITS = 14  # beyond those of its result, of a product that is rounded soon
LEAST_STEPS = 100  # of its unit, which the input has to reach
LARGEST_LOSS = 0.05  # by rounding, of the deviation of an input
HEADROOM = 4.0  # times what the samples reach
SMALL = 1e-3  # a state at which no neuron fires
NEAR = 2  # by how much a rounded factor may be moved to keep a filter stable
NEXT_TO_1 = 1e-7  # a pole radius that is not told apart from 1
LARGEST_SHIFT = 0.1  # of a pole by rounding, of its distance from the unit circle
LARGEST_CHANGE = 0.02  # by rounding, of the response to what lasts
SMALL_GAIN = 2.0**-12  # of the largest one
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
    x: np.ndarray | Tensor,
    weight_bits: int = 8,
    shape: Sequence[int] | None = None,
) -> "IntegerNetwork":
    """Makes an integer network of a trained one, without training.

        made = quantise(network, network.prepare(samples).x)

    Args:
        network: as :func:`snn_lib.inference.compiled` takes.
        x: its input over time ``(T, B, *features)`` for some hundred samples of the training data.
            Fixed points are chosen so that four times what they reach still fits.
        weight_bits: 8, 4 or 2. With 2, a network should have been trained with as many.
        shape: as in :func:`snn_lib.inference.compiled`.

    Raises:
        ValueError: the number of bits is another one, ``x`` is not finite, a step computes what
            integers cannot, no stable filter is near enough, or as
            :func:`snn_lib.inference.to_c`.
        TypeError: the number of bits is no integer, or ``x`` is a tuple.

    Warns:
        UserWarning: an input varies so little beside the largest ones that its integers lose it, or
            rounding makes another filter of one.
    """
    if isinstance(x, tuple):
        raise TypeError("x is a tuple, expected an array or a tensor: network.prepare(samples).x")
    if index(weight_bits) not in WEIGHT_BITS:
        raise ValueError(f"weight_bits is {weight_bits}, expected 8, 4 or 2")
    read, raw = read_stages(network, shape), raw_steps(preparation_of(network), x)
    if raw.ndim < 2 or raw.shape[2:] != read.before or raw.size == 0:
        raise ValueError(f"x has the shape {raw.shape}, expected (T, B, *{read.before})")
    if not np.isfinite(raw).all():
        raise ValueError("x has values that are not finite")
    _warn_of_coarse_inputs(raw, float(_input_of(raw)[1].unit))
    return IntegerNetwork(integer_stages(read, raw, weight_bits), preparation_of(network))


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


def integer_stages(read: StagedNetwork, x: np.ndarray, weight_bits: int) -> StagedIntegers:
    """The stages in integers, for input like x, ``(T, B, *before)``."""
    return _Quantiser(read, x, weight_bits).staged


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
        values = np.asarray(values, np.float32) / np.float32(self.input_scale)
        return np.trunc(values + np.copysign(np.float32(0.5), values)).astype(np.int64)

    def step(self, x: np.ndarray) -> np.ndarray:
        """Runs a time step of a batch, int64 ``(B, *before)`` to ``(B, *after)``.

        Raises:
            ValueError: ``x`` has another shape, values that do not fit, or not as many sequences as
                the steps before it.
            TypeError: ``x`` does not hold integers.
        """
        return self._step(x)[0]

    def run(self, x: np.ndarray) -> np.ndarray:
        """Runs sequences, int64 ``(T, B, *before)`` to ``(T, B, *after)``, from the present state.

        Raises:
            ValueError, TypeError: as :meth:`step`.
        """
        outputs = [self.step(now) for now in x]
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
        answers = self.answers(self.integers(raw_steps(self._preparation, x)))
        ends = np.full(answers.shape[1], len(answers)) if lengths is None else lengths.numpy()
        last = answers[ends - 1, np.arange(len(ends))]
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
            return np.stack([self._step(now)[1] for now in x])
        finally:
            saturated = self.saturated
            self.reset()
            self._states[SATURATED] = saturated

    def _step(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The output of a step, and the answer."""
        x, (low, high) = np.asarray(x), self.staged.input_limits
        if x.dtype.kind not in "iub":
            raise TypeError(f"the input is {x.dtype}, expected integers: call integers(values)")
        if x.shape[1:] != self.before:
            raise ValueError(f"a step has the shape {x.shape[1:]}, expected {self.before}")
        if len(x) == 0 or self._sequences not in (0, len(x)):
            before = f" after steps of {self._sequences}" * (self._sequences > 0)
            raise ValueError(f"a step has {len(x)} sequences{before}: call reset() for new ones")
        if x.size and not (low <= x.min() and x.max() <= high):
            raise ValueError(f"the input has values outside {low} to {high}")
        self._sequences = len(x)
        x = x.reshape(len(x), -1).astype(np.int64)
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


@dataclass(frozen=True)
class _Values:
    """What is known of the integers between two stages: their unit, and their limits.

    The unit is a number, or one for each channel, ``(1, channels)``. The limits include 0, which is
    what lies around a map, and what a state begins with.
    """

    unit: float | np.ndarray
    low: int
    high: int

    @property
    def fraction(self) -> int | None:
        """f, if the unit is 2^-f."""
        if np.ndim(self.unit):
            return None
        fraction = -round(math.log2(self.unit))
        return fraction if 2.0**-fraction == self.unit else None


class _Quantiser:
    """Makes stages of integers, one by one, from the values that samples reach."""

    def __init__(self, read: StagedNetwork, x: np.ndarray, weight_bits: int) -> None:
        self._bits = weight_bits
        kind, values = _input_of(x)
        stages = tuple(_joined([_without_rests(stage) for stage in read.stages]))
        readout = read.readout and tuple(map(_without_rests, read.readout))
        read = replace(read, stages=stages, readout=readout)
        with np.errstate(all="ignore"):  # what is not finite is refused
            reached = _reached(read, x)
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
        self._values = _Values(float(unit[0, 0]) if np.ptp(unit) == 0 else unit, low, high)

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
        made, self._values, loss = _Lowering(step, before, reach).lowered()
        self._stages.append(made)
        if loss <= 1:
            return
        layer, bits = f"layer {step.name}", f"{FACTOR_BITS} bits"
        remedy = "give it a shorter time constant, or make several filters of lower order of it, "
        remedy += "one after the other"
        if loss == math.inf:
            raise ValueError(f"{layer} has a filter that is not stable with {bits}: {remedy}")
        warnings.warn(
            f"{layer} has a filter of which {bits} make another one, since its poles lie close "
            f"together near the unit circle: {remedy}",
            UserWarning,
            stacklevel=5,
        )

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
        self._values = _Values(2.0**shift * values.unit, -limit, limit - 1)


def _fraction(reach: float, bits: int) -> int:
    """f, up to ``FINEST``, so that ``HEADROOM`` times the reach fits so many bits, in 2^-f."""
    return min(bits - 1 - math.ceil(math.log2(HEADROOM * (reach or 1.0))), FINEST)


def _input_of(x: np.ndarray) -> tuple[str, _Values]:
    """The type in C of an input like x, and what its integers are."""
    if np.isin(x, (0, 1)).all():
        return "uint8_t", _Values(1.0, 0, 1)
    limit, largest = 1 << (INPUT_BITS - 1), abs(x).max()
    # Pixels are never larger. Other whole numbers, such as counts, may be.
    for scale, kind, low, high in (1 / 255, "uint8_t", 0, 255), (1.0, "int16_t", -limit, limit - 1):
        nearest = np.rint(x / scale)
        near = abs(x / scale - nearest).max() < 1e-3 and nearest.any()  # what is small is near to 0
        reach = nearest if kind == "uint8_t" else HEADROOM * nearest
        if near and reach.min() >= low and reach.max() <= high:
            return kind, _Values(scale, low, high)
    unit = 2.0 ** -_fraction(largest, INPUT_BITS)
    if largest < LEAST_STEPS * unit:
        raise ValueError(f"x lies within {largest:g} of 0, which is too little: scale the input up")
    return "int16_t", _Values(unit, -limit, limit - 1)


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
    shared = first.coefficients.keys() & second.coefficients.keys()
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
        rows[name] = row
        return name

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


def _reached(read: StagedNetwork, x: np.ndarray) -> list[dict[str, float]]:
    """For each stage and for the readout, the largest size of its values, by name; "": the output.

    The network runs in floats, step by step.
    """
    stages = [*read.stages, *(read.readout or ())]
    reached: list[dict[str, float]] = [{} for _ in stages]
    states: States = {}
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
    return reached


# --------------------------------------------------------------------------------------------------
# Steps


@dataclass(frozen=True)
class _Number:
    """An integer in lowered lines: its name or itself, the f of its unit 2^-f, and its limits."""

    value: Value
    fraction: int
    low: int
    high: int

    @property
    def bits(self) -> int:
        """Of the largest size, without the sign."""
        return max(-self.low, self.high).bit_length()


@dataclass(frozen=True)
class _Affine:
    """``gain * x + offset`` in floats, each a row, which becomes integers where it is needed.

    Without a gain it is a coefficient of this name, or a number.
    """

    offset: np.ndarray
    gain: np.ndarray | None = None
    name: str = ""

    @property
    def is_whole(self) -> bool:
        return self.gain is None and bool((self.offset == np.rint(self.offset)).all())


class _Lowering:
    """Lowers the lines of a step from floats to integers.

    Factors of states have 24 bits, all other coefficients 31. What is added or compared is
    brought to the finer unit of the two. States and outputs are rounded to 31 bits, and so is a
    factor that needs more than 32. What is whole for all time, such as a count, keeps the unit 1.
    """

    def __init__(self, step: Step, values: _Values, reach: Mapping[Any, float]) -> None:
        self._step, self._values, self._reach = step, values, reach
        self._lines: list[Line] = []
        self._wide: set[str] = set()
        self._coefficients: dict[str, np.ndarray] = {}
        self._factors_of: dict[str, tuple[str, float]] = {}  # states, and what a 1 stands for
        self._known: dict[tuple, _Number] = {}
        self._whole = self._find_whole()
        self._fractions = self._find_fractions()
        self._numbers: dict[Value, _Number | _Affine] = {}

    def lowered(self) -> tuple[Step, _Values, float]:
        """The step of integers, what is known of its output, and the loss of its filters."""
        step, numbers, values = self._step, self._numbers, self._values
        limit = 1 << (STATE_BITS - 1)
        if values.fraction is not None:
            numbers["x"] = _Number("x", values.fraction, values.low, values.high)
        elif step.hands_on and np.ndim(values.unit) == 0:
            return step, values, 0.0
        else:
            numbers["x"] = _Affine(np.zeros((1, 1)), np.atleast_2d(values.unit))
        for name in reversed(step.states):  # past values come oldest first
            low, high = -limit, limit - 1
            result = step.trace.results[1 + step.states.index(name)]
            copied = numbers.get(result)
            if isinstance(copied, _Number):
                low, high = copied.low, copied.high
            numbers[name] = _Number(name, self._fractions[name], low, high)
        for name, row in step.coefficients.items():
            numbers[name] = _Affine(row, name=name)
        for line in step.trace.lines:
            numbers[line.name] = self._lower(line)
        name, *_ = step.trace.results
        output = self._made(self._given(name), self._fraction(name) + GUARD_BITS)
        if output.low < -limit or output.high >= limit:
            output = self._rounded(output, self._fraction(name))
        after = [
            self._held(self._given(result), self._fractions[state])
            for state, result in zip(step.states, step.trace.results[1:], strict=True)
        ]
        results = tuple(number.value for number in (output, *after))
        stable, loss = _kept_stable(step, self._coefficients, self._factors_of)
        trace = Trace(tuple(self._lines), results).only(results)
        rows = {**self._coefficients, **stable}
        made = replace(
            step,
            trace=trace,
            coefficients={name: row for name, row in rows.items() if trace.reads(name)},
            wide=frozenset(self._wide),
        )
        known = _Values(2.0**-output.fraction, min(output.low, 0), max(output.high, 0))
        return made, known, loss

    # ---------------------------------------------------------------------------------------------
    # Units

    def _find_whole(self) -> set[Value]:
        """The names of what is a whole number at every step."""
        step = self._step
        constant = {n for n, row in step.coefficients.items() if (row == np.rint(row)).all()}
        states = set(step.states)
        while True:
            whole: set[Value] = {*states, *constant, *["x"] * (self._values.fraction == 0)}
            for line in step.trace.lines:
                values = line.arguments[line.operation == "where" :]
                if line.is_condition or all(v in whole or _is_whole(v) for v in values):
                    whole.add(line.name)
            after = zip(step.states, step.trace.results[1:], strict=True)
            still = {state for state, v in after if v in whole or _is_whole(v)} & states
            if still == states:
                return whole
            states = still

    def _find_fractions(self) -> dict[str, int]:
        """f of each state: the same for states that take over each other's values.

        A state that takes over the input, or a sum of itself and the input, is no finer than the
        input. So what is copied keeps its limits.
        """
        step = self._step
        found = {name: self._fraction(name) for name in step.states}
        if self._values.fraction is not None:
            for line in step.trace.lines:
                if line.operation in ("add", "sub") and "x" in line.arguments:
                    for name in found.keys() & set(line.arguments):
                        if step.trace.results[1 + step.states.index(name)] == line.name:
                            found[name] = min(found[name], self._values.fraction)
            found["x"] = self._values.fraction
        for _ in step.states:
            for state, value in zip(step.states, step.trace.results[1:], strict=True):
                if value in found:
                    found[state] = found[value] = min(found[state], found[value])
        return found

    def _fraction(self, name: Value) -> int:
        return 0 if name in self._whole else _fraction(self._reach[name], STATE_BITS)

    def _given(self, value: Value) -> _Number | _Affine:
        return self._numbers[value] if isinstance(value, str) else _Affine(np.full((1, 1), value))

    def _made(self, value: _Number | _Affine, fraction: int) -> _Number:
        """The integer of a value; if it is still to be made, in this unit or a coarser one."""
        if isinstance(value, _Number):
            return value
        if value.gain is None:
            # with a bit more than a state, beyond which it may lie
            return self._row(value.name or "offset", value.offset, fraction, STATE_BITS + 1)
        if value.offset.any():
            # The offset has the same unit, which costs no shift, if the gain keeps enough bits.
            shared = min(fraction, _finest(value.offset, STATE_BITS))
            if _finest(value.gain, STATE_BITS) - shared <= STATE_BITS - FACTOR_BITS:
                fraction = shared
        gain = self._row("gain", value.gain, fraction, STATE_BITS)
        limits = [
            p * q for p in (gain.low, gain.high) for q in (self._values.low, self._values.high)
        ]
        made = self._line("mul", ("x", gain.value), gain.fraction, min(limits), max(limits))
        if not value.offset.any():
            return made
        offset = self._row("offset", value.offset, gain.fraction, STATE_BITS)
        return self._sum("add", made, self._at(offset, made.fraction))

    def _factors(self, line: Line, given: Sequence) -> list[_Number]:
        """The two factors of a product: numbers in 32 bits, coefficients in 24.

        A coefficient is no finer than the product needs.
        """
        found = [
            self._narrow(value, name) for value, name in zip(given, line.arguments, strict=True)
        ]
        known = [number.fraction for number in found if number is not None]
        finest = FINEST
        if known and self._reach.get(line.name):
            finest = self._fraction(line.name) + GUARD_BITS + FACTOR_BITS // 2 - known[0]
        return [
            number or self._coefficient(value, finest)
            for number, value in zip(found, given, strict=True)
        ]

    def _coefficient(self, value: _Affine, finest: int) -> _Number:
        """A coefficient that states are multiplied by."""
        finest = 0 if value.is_whole else finest
        name = value.name or "factor"
        made = self._row(name, value.offset, finest, FACTOR_BITS, keeps_name=value.name != "")
        if isinstance(made.value, str):
            self._factors_of[made.value] = value.name, 2.0**-made.fraction
        return made

    def _narrow(self, value: _Number | _Affine, name: Value) -> _Number | None:
        """A value in 32 bits; None if it is a coefficient."""
        if _is_constant(value):
            return None
        made = self._made(value, self._fraction(name) + GUARD_BITS)
        if made.low >= -(1 << 31) and made.high < 1 << 31:
            return made
        return self._rounded(made, self._fraction(name))

    def _row(
        self, name: str, row: np.ndarray, fraction: int, bits: int, keeps_name: bool = False
    ) -> _Number:
        """A coefficient in integers of so many bits, in this unit or a coarser one."""
        fraction = min(fraction, _finest(row, bits))
        integers = np.rint(row * 2.0**fraction).astype(np.int64)
        if integers.size == 1 and not keeps_name:
            integer = int(integers[0, 0])
            return _Number(integer, fraction, integer, integer)
        while not np.array_equal(self._coefficients.setdefault(name, integers), integers):
            name += "_"
        low, high = int(integers.min()), int(integers.max())
        return _Number(name, fraction, low - NEAR, high + NEAR)

    # ---------------------------------------------------------------------------------------------
    # Lines

    def _lower(self, line: Line) -> _Number | _Affine:
        operation, name = line.operation, self._step.name
        given = [self._given(value) for value in line.arguments]
        if operation == "div":
            raise ValueError(f"layer {name} divides by what changes, which integers cannot")
        known = [value for value in given if isinstance(value, _Affine)]
        if len(known) == len(given) and (linear := _affine(operation, known)):
            return linear
        match operation:
            case "mul":
                a, b = self._factors(line, given)
                limits = [p * q for p, q in product((a.low, a.high), (b.low, b.high))]
                values = a.value, b.value
                return self._line("mul", values, a.fraction + b.fraction, min(limits), max(limits))
            case "add" | "sub" | "maximum" | "minimum":
                return self._sum(operation, *self._aligned(line, given))
            case "where":
                condition, a, b = self._made(given[0], 0), *self._aligned(line, given)
                values, low, high = (condition.value, a.value, b.value), a.low, a.high
                return self._line("where", values, a.fraction, min(low, b.low), max(high, b.high))
            case "neg":
                a = self._made(given[0], self._fraction(line.arguments[0]) + GUARD_BITS)
                return self._line("neg", (a.value,), a.fraction, -a.high, -a.low)
            case "abs":
                a = self._made(given[0], self._fraction(line.arguments[0]) + GUARD_BITS)
                return self._line("abs", (a.value,), a.fraction, 0, max(-a.low, a.high))
            case _ if operation in COMPARISONS or operation in LOGIC:
                made = (self._made(value, 0) for value in given)
                numbers = self._aligned(line, given) if operation in COMPARISONS else made
                values = tuple(number.value for number in numbers)
                return self._line(operation, values, 0, 0, 1, is_condition=True)
        raise ValueError(f"layer {name} computes {operation}, which integers cannot")

    def _sum(self, operation: str, a: _Number, b: _Number) -> _Number:
        """A sum, a difference, or the larger or smaller of two numbers of the same unit."""
        low, high = {
            "add": (a.low + b.low, a.high + b.high),
            "sub": (a.low - b.high, a.high - b.low),
            "maximum": (max(a.low, b.low), max(a.high, b.high)),
            "minimum": (min(a.low, b.low), min(a.high, b.high)),
        }[operation]
        return self._line(operation, (a.value, b.value), a.fraction, low, high)

    def _line(
        self,
        operation: str,
        values: tuple[Value, ...],
        fraction: int,
        low: int,
        high: int,
        is_condition: bool = False,
    ) -> _Number:
        """Adds a line, or finds the same one."""
        if max(-low, high) >= 1 << 62:
            raise ValueError(f"layer {self._step.name} computes numbers that do not fit 64 bits")
        same = operation, values, fraction  # 0.8 and 0.2 are the same integers of other units
        if same not in self._known:
            name = f"_{len(self._lines)}"
            self._lines.append(Line(name, operation, values, is_condition))
            if max(-low - 1, high) >= 1 << 31:
                self._wide.add(name)
            self._known[same] = _Number(name, fraction, low, high)
        return self._known[same]

    def _aligned(self, line: Line, given: Sequence[_Number | _Affine]) -> list[_Number]:
        """The last two numbers of a line in the finer unit of the two.

        Where they do not fit 64 bits in it, they are rounded to 31 bits before, the finer one
        first.
        """
        pair = [*given[-2:]]
        made = self._fine_enough(pair)
        if line.operation in {*COMPARISONS, "maximum", "minimum"}:
            others = made[::-1]
            pair = [_within_reach(line.operation, *two) for two in zip(pair, others, strict=True)]
            made = self._fine_enough(pair)
        bits = 61 if line.operation in ("add", "sub") else 62
        for place in sorted((0, 1), key=lambda place: -made[place].fraction):
            finest = max(number.fraction for number in made)
            fit = all(number.bits + finest - number.fraction <= bits for number in made)
            if not (fit or _is_constant(pair[place])):
                fraction = self._fraction(line.arguments[-2:][place])
                pair[place] = self._rounded(made[place], fraction)
                made = self._fine_enough(pair)
        finest = max(number.fraction for number in made)
        return [self._at(number, finest) for number in made]

    def _fine_enough(self, pair: Sequence[_Number | _Affine]) -> list[_Number]:
        """Two numbers, of which those still to be made are as fine as the other one, or finer."""
        units = [value.fraction for value in pair if isinstance(value, _Number)]
        both = all(isinstance(value, _Affine) and value.is_whole for value in pair)
        finest = max(units, default=0 if both else STATE_BITS - 2)
        return [self._made(value, _fraction_beside(value, finest)) for value in pair]

    def _at(self, number: _Number, fraction: int) -> _Number:
        """The number in a unit, if that one is finer."""
        factor = 1 << max(fraction - number.fraction, 0)
        if factor == 1:
            return number
        low, high = factor * number.low, factor * number.high
        if isinstance(number.value, int):
            return _Number(number.value * factor, fraction, low, high)
        return self._line("mul", (number.value, factor), fraction, low, high)

    def _held(self, value: _Number | _Affine, fraction: int) -> _Number:
        """A value as a state of this unit remembers it."""
        guard = 0 if _is_constant(value) else GUARD_BITS
        return self._rounded(self._at(self._made(value, fraction + guard), fraction), fraction)

    def _rounded(self, number: _Number, fraction: int) -> _Number:
        """The number in a coarser unit and in 31 bits."""
        shift = max(number.fraction - fraction, 0)
        bits = min(STATE_BITS, 63 - shift)  # which is enough for what was shifted so far
        limit = 1 << (bits - 1)
        if shift == 0 and number.low >= -limit and number.high < limit:
            return number
        half = (1 << shift) >> 1
        low, high = ((end + half) >> shift for end in (number.low, number.high))
        low, high = max(low, -limit), min(high, limit - 1)
        values = number.value, shift, bits
        return self._line("round", values, number.fraction - shift, low, high)


def _finest(row: np.ndarray, bits: int) -> int:
    """f of the finest unit 2^-f in which a row fits so many bits."""
    return math.floor(math.log2(((1 << (bits - 1)) - 1) / (float(abs(row).max()) or 1.0)))


def _within_reach(operation: str, value: _Number | _Affine, other: _Number) -> _Number | _Affine:
    """A constant beyond all that it may be compared with is just beyond it, which changes nothing.

    The larger of two numbers may be the constant itself if it is above the other, so it is held
    from below alone.
    """
    if not _is_constant(value):
        return value
    least, most = (
        (end + by) * 2.0**-other.fraction for end, by in ((other.low, -1), (other.high, 1))
    )
    row = value.offset.astype(float)  # in float32 a step beyond would be none
    if operation != "minimum":
        row = row.clip(min=least)
    if operation != "maximum":
        row = row.clip(max=most)
    return replace(value, offset=row)


def _fraction_beside(value: _Number | _Affine, fraction: int) -> int:
    """The unit in which a value is made beside another one, which may be as coarse as a count's.

    Gains have at least 12 bits, but for those that are small beside the largest, and the largest
    constant has 16, if that needs no unit that is much finer than the finest of a state.
    """
    if isinstance(value, _Number) or value.is_whole:
        return fraction
    if value.gain is None:
        size, bits = float(abs(value.offset).max()), 16
    else:
        sizes = abs(value.gain)
        largest = float(sizes.max())
        size, bits = float(sizes[sizes > SMALL_GAIN * largest].min(initial=largest)), 12
    needed = bits - 1 - math.floor(math.log2(size or 1.0))
    return max(fraction, min(needed, FINEST + GUARD_BITS))


def _affine(operation: str, given: Sequence[_Affine]) -> _Affine | None:
    """The result of an operation on what is linear in x, and on constants, if it is linear in x."""
    gains = [np.zeros((1, 1)) if value.gain is None else value.gain for value in given]
    match operation, given, gains:
        case "mul", [a, b], [x, y] if _is_constant(a) or _is_constant(b):
            return _Affine(a.offset * b.offset, x * b.offset + y * a.offset)
        case "neg", [a], [x]:
            return _Affine(-a.offset, -x)
        case "add", [a, b], [x, y]:
            return _Affine(a.offset + b.offset, x + y)
        case "sub", [a, b], [x, y]:
            return _Affine(a.offset - b.offset, x - y)
    return None


def _kept_stable(
    step: Step, integers: Mapping[str, np.ndarray], factors: Mapping[str, tuple[str, float]]
) -> tuple[dict[str, np.ndarray], float]:
    """Integer factors with which all states decay that decay with the step's own.

    Rounding may move a pole out of the unit circle. There the nearest integers are taken with which
    it is inside.

    Args:
        step: in floats.
        integers: the rounded coefficients, by name.
        factors: the step's own name of each that is a factor of states, and what a 1 stands for.

    Returns:
        The factors, and how much is lost by them: at most 1 if the filters are the same ones, and
        infinity if there are none near with which all poles are inside.
    """
    found = {name: integers[name] for name in factors}
    if not (found and step.states):
        return found, 0.0

    def poles(integers: Mapping[str, np.ndarray]) -> np.ndarray:
        rounded = {own: integers[name] * unit for name, (own, unit) in factors.items()}
        return _poles(step, {**step.coefficients, **rounded})

    def leave(poles: np.ndarray) -> np.ndarray:
        return abs(poles).max(-1) >= 1 - NEXT_TO_1

    exact, moved = _poles(step, step.coefficients), poles(found)
    wrong = ~leave(exact) & leave(moved)
    if wrong.any():
        moving = [
            name for name in factors if (poles({**found, name: 0 * found[name]}) != moved).any()
        ]
        for way in _small_changes(len(moving)):
            tried = {name: found[name] + by for name, by in zip(moving, way, strict=True)}
            held = wrong & ~leave(poles({**found, **tried}))
            found |= {name: np.where(held, tried[name], found[name]) for name in moving}
            wrong &= ~held
            if not wrong.any():
                break
        moved = poles(found)
    inside = 1 - abs(exact)
    shift = abs(exact[..., None] - moved[..., None, :]).min(-1) / inside.clip(NEXT_TO_1)
    exact, moved = (np.take_along_axis(p, np.argsort(abs(1 - p)), -1) for p in (exact, moved))
    rests = abs(1 - exact) > NEXT_TO_1  # unlike a count: those that do not come first
    lasting, after = (np.where(rests, 1 - poles, 1.0).prod(-1) for poles in (exact, moved))
    change = abs(after / lasting - 1)
    losses = shift[inside > NEXT_TO_1] / LARGEST_SHIFT, change / LARGEST_CHANGE
    return found, math.inf if wrong.any() else max(one.max(initial=0.0) for one in losses)


def _small_changes(count: int) -> list[tuple[int, ...]]:
    """What to add to so many integers, the least first; to one of them alone if there are many."""
    if count > 4:  # of which all combinations would take hours
        rows = np.eye(count, dtype=int)
        return [tuple(by * row) for by in (1, -1, 2, -2) for row in rows]
    changes = product(range(-NEAR, NEAR + 1), repeat=count)
    return sorted(changes, key=lambda change: np.dot(change, change))


def _poles(step: Step, coefficients: Mapping[str, np.ndarray]) -> np.ndarray:
    """The factors by which a step changes small states, of every channel.

    The shape is that of the coefficients, ``(1, channels)`` or ``(positions, channels)``, and the
    number of states.
    """
    positions = max(map(len, coefficients.values()), default=1)
    alone, count = replace(step, positions=positions, coefficients=coefficients), len(step.states)
    states = {
        f"{step.name}.{state}": np.broadcast_to(row[:, None, None], (count + 1, *alone.grid))
        for state, row in zip(step.states, SMALL * np.eye(count + 1)[1:], strict=True)
    }
    alone.run(np.zeros((count + 1, math.prod(alone.grid))), states)
    after = np.stack([states[f"{step.name}.{state}"] for state in step.states], -1)
    return np.linalg.eigvals((after[1:] - after[0]).transpose(1, 2, 3, 0) / SMALL)


def _is_constant(value: _Number | _Affine) -> TypeGuard[_Affine]:
    return isinstance(value, _Affine) and value.gain is None


def _is_whole(value: Value) -> bool:
    return not isinstance(value, str) and value == round(value)

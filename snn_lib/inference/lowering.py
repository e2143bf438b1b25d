"""A step of a cell in integers: its lines, their units, and factors that keep its filters stable.

Each line of floats becomes lines of integers that fit 64 bits whatever the input is. How large
values become is measured before, and all have headroom.
"""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeGuard

import numpy as np

from snn_lib.inference.stages import Step
from snn_lib.kernels.trace import COMPARISONS, LOGIC, Line, Trace, Value

STATE_BITS = 31  # so that the sum of two fits 32
FINEST = 30  # f of a state's unit 2^-f
FACTOR_BITS = 24  # of what states are multiplied by
GUARD_BITS = 14  # beyond those of its result, of a product that is rounded soon
HEADROOM = 4.0  # times what the samples reach
SMALL = 1e-3  # a state at which no neuron fires
NEAR = 2  # by how much a rounded factor may be moved to keep a filter stable
NEXT_TO_1 = 1e-7  # a pole radius that is not told apart from 1
LARGEST_SHIFT = 0.1  # of a pole by rounding, of its distance from the unit circle
LARGEST_CHANGE = 0.02  # by rounding, of the response to what lasts
SMALL_GAIN = 2.0**-12  # of the largest one


@dataclass(frozen=True)
class Values:
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


class Lowering:
    """Lowers the lines of a step from floats to integers.

    Factors of states have 24 bits, all other coefficients 31, or 32 if they are only added or
    compared. What is added or compared is brought to the finer unit of the two. States and outputs
    are rounded to 31 bits, and so is a factor that needs more than 32. What is whole for all time,
    such as a count, keeps the unit 1.
    """

    def __init__(self, step: Step, values: Values, reach: Mapping[Any, float]) -> None:
        self._step, self._values, self._reach = step, values, reach
        self._lines: list[Line] = []
        self._wide: set[str] = set()
        self._coefficients: dict[str, np.ndarray] = {}
        self._factors_of: dict[str, tuple[str, float]] = {}  # states, and what a 1 stands for
        self._known: dict[tuple, _Number] = {}
        self._whole = self._find_whole()
        self._fractions = self._find_fractions()
        self._numbers: dict[Value, _Number | _Affine] = {}

    def lowered(self) -> tuple[Step, Values]:
        """The step of integers, and what is known of its output."""
        step, numbers, values = self._step, self._numbers, self._values
        limit = 1 << (STATE_BITS - 1)
        if values.fraction is not None:
            numbers["x"] = _Number("x", values.fraction, values.low, values.high)
        elif step.hands_on and np.ndim(values.unit) == 0:
            return step, values
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
        _refuse_or_warn(step.name, loss)
        trace = Trace(tuple(self._lines), results).only(results)
        rows = {**self._coefficients, **stable}
        made = replace(
            step,
            trace=trace,
            coefficients={name: row for name, row in rows.items() if trace.reads(name)},
            wide=frozenset(self._wide),
        )
        known = Values(2.0**-output.fraction, min(output.low, 0), max(output.high, 0))
        return made, known

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
        return 0 if name in self._whole else fraction_of(self._reach[name], STATE_BITS)

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
        name = keep_row(self._coefficients, name, integers, self._step.states)
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


def fraction_of(reach: float, bits: int) -> int:
    """f, up to ``FINEST``, so that ``HEADROOM`` times the reach fits so many bits, in 2^-f."""
    return min(bits - 1 - math.ceil(math.log2(HEADROOM * (reach or 1.0))), FINEST)


def keep_row(
    rows: dict[str, np.ndarray], name: str, row: np.ndarray, states: Collection[str]
) -> str:
    """Keeps a coefficient under this name, or a longer one if a state or another row has it."""
    while name in states or not np.array_equal(rows.setdefault(name, row), row, equal_nan=True):
        name += "_"
    return name


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


def _refuse_or_warn(name: str, loss: float) -> None:
    """Raises a ValueError or warns where :func:`_kept_stable` says that too much is lost."""
    if loss <= 1:
        return
    layer, bits = f"layer {name}", f"{FACTOR_BITS} bits"
    remedy = "give it a shorter time constant, or make several filters of lower order of it, "
    remedy += "one after the other"
    if loss == math.inf:
        raise ValueError(f"{layer} has a filter that is not stable with {bits}: {remedy}")
    warnings.warn(
        f"{layer} has a filter of which {bits} make another one, since its poles lie close "
        f"together near the unit circle: {remedy}",
        UserWarning,
        stacklevel=7,  # the line that calls quantise
    )


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

"""A described network as a chain of few kinds of stages, which become C or integers.

- :class:`Gather` puts values in another order.
- :class:`Rows` adds up a row of weights for each input that is not zero.
- :class:`Pool` adds up the values of a window, or takes the largest.
- :class:`Step` computes lines of a trace for every channel on its own. Whatever has a state is a
  step: cells, sums over time, snapshots, and the preparation of the input.

Maps lie with their channels last, as (H, W, C), so that the rows of a position lie side by side.
NumPy runs a stage on a batch, ``(B, values)``, in floats or in integers.
"""

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from snn_lib.inference.layers import Shape
from snn_lib.kernels.trace import Trace

States = MutableMapping[str, Any]  # arrays, and a count of what did not fit
FUNCTIONS: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "abs": np.abs,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_not": np.logical_not,
    "where": np.where,
}


@dataclass(frozen=True)
class Gather:
    """Value n of the output is value ``index[n]`` of the input."""

    index: np.ndarray

    def run(self, x: np.ndarray, states: States) -> np.ndarray:
        """One step of a batch."""
        return x[:, self.index]


@dataclass(frozen=True)
class Windows:
    """The windows of a convolution or a pooling, one for each position of the output.

    Attributes:
        before, after: the maps, (H, W, C). A layer of vectors has maps of one position.
        size, stride, padding, dilation: as in ``nn.Conv2d``.
    """

    before: Shape
    after: Shape
    size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @cached_property
    def places(self) -> np.ndarray:
        """For each position of the output and of its window, the position of the input or -1."""
        lines, columns = (
            np.arange(self.after[side])[:, None] * self.stride[side]
            - self.padding[side]
            + np.arange(self.size[side]) * self.dilation[side]
            for side in (0, 1)
        )
        height, width, _ = self.before
        inside = ((lines >= 0) & (lines < height))[:, None, :, None] & (
            (columns >= 0) & (columns < width)
        )[None, :, None, :]
        places = lines[:, None, :, None] * width + columns[None, :, None, :]
        return np.where(inside, places, -1).reshape(math.prod(self.after[:2]), -1)

    def of(self, x: np.ndarray, outside: float) -> np.ndarray:
        """The values in each window: ``(B, positions, taps, channels)``."""
        x = x.reshape(len(x), -1, self.before[2])
        around = np.full((len(x), 1, self.before[2]), outside, x.dtype)
        return np.concatenate([x, around], 1)[:, self.places]


@dataclass(frozen=True)
class Rows:
    """Weights without a bias: each input that is not zero adds its row, times its value.

    Attributes:
        name: the layer's.
        windows: where the inputs of a position lie; one position for an ``nn.Linear``.
        weights: ``(groups, taps * inputs of a group, outputs of a group)``.
        spikes: whether the inputs are all 0 or 1.
        bits: of a weight, if the weights are integers.
    """

    name: str
    windows: Windows
    weights: np.ndarray
    spikes: bool = False
    bits: int = 0

    def run(self, x: np.ndarray, states: States) -> np.ndarray:
        """One step of a batch. Sums of integers are exact in float64, which multiplies faster."""
        groups, inputs, _ = self.weights.shape
        values = self.windows.of(x, 0).astype(np.float64)  # (B, positions, taps, channels)
        values = values.reshape(*values.shape[:3], groups, -1).transpose(0, 3, 1, 2, 4)
        values = values.reshape(len(x), groups, -1, inputs)
        sums = (values @ self.weights.astype(np.float64)).transpose(0, 2, 1, 3)
        return sums.reshape(len(x), -1).astype(x.dtype)


@dataclass(frozen=True)
class Pool:
    """The largest value of each window, or their sum; outside the map are none, or zeros."""

    name: str
    windows: Windows
    largest: bool

    def run(self, x: np.ndarray, states: States) -> np.ndarray:
        """One step of a batch."""
        least = np.iinfo(x.dtype).min if x.dtype.kind == "i" else -np.inf
        values = self.windows.of(x, least if self.largest else 0)
        return (values.max(2) if self.largest else values.sum(2)).reshape(len(x), -1)


@dataclass(frozen=True)
class Step:
    """Lines of a trace for every channel: of ``x``, its states, and its coefficients.

    Attributes:
        name: the layer's.
        positions, channels: of its values.
        trace: its results are the output and the next values of ``states``.
        states: their names.
        coefficients: by name, ``(1, channels)`` if all positions share them, else ``(positions,
            channels)``.
        wide: the lines whose integers need 64 bits.
    """

    name: str
    positions: int
    channels: int
    trace: Trace
    states: tuple[str, ...] = ()
    coefficients: Mapping[str, np.ndarray] = field(default_factory=dict)
    wide: frozenset[str] = frozenset()

    @property
    def grid(self) -> tuple[int, int]:
        """Positions and channels."""
        return self.positions, self.channels

    @property
    def hands_on(self) -> bool:
        """Whether its output is its input, and it remembers nothing."""
        return self.trace.results == ("x",)

    def run(self, x: np.ndarray, states: States) -> np.ndarray:
        """One step of a batch; ``states`` holds what is remembered, and the next states after."""
        return self.values(x, states)[self.trace.results[0]].reshape(len(x), -1)

    def values(self, x: np.ndarray, states: States) -> dict:
        """As :meth:`run`, but returns the values of all names, ``(B, positions, channels)``."""
        values: dict = {"x": x.reshape(-1, *self.grid), **self.coefficients}
        for name in self.states:
            key = f"{self.name}.{name}"
            values[name] = states[key] if key in states else np.zeros_like(values["x"])
        for line in self.trace.lines:
            given: list[Any] = [values[v] if isinstance(v, str) else v for v in line.arguments]
            if line.operation == "round":
                value = rounded(*given, states=states)
            else:
                value = FUNCTIONS[line.operation](*given)
            values[line.name] = value
        for result in self.trace.results:  # also a result that is the same number in all channels
            value = values[result] if isinstance(result, str) else result
            values[result] = np.broadcast_to(value, values["x"].shape).astype(x.dtype)
        for name, result in zip(self.states, self.trace.results[1:], strict=True):
            states[f"{self.name}.{name}"] = values[result]
        return values


Stage = Gather | Rows | Pool | Step
SATURATED = "saturated"  # beside the states: how many values did not fit


def rounded(value: np.ndarray, shift: int, bits: int, states: States) -> np.ndarray:
    """``value / 2^shift``, rounded to the nearest integer (halves up) and held in so many bits.

    This is the only rounding of integers that there is. What does not fit is counted.
    """
    value, limit = (value + ((1 << shift) >> 1)) >> shift, 1 << (bits - 1)
    states[SATURATED] += np.count_nonzero((value < -limit) | (value >= limit))
    return np.clip(value, -limit, limit - 1)

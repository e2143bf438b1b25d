"""Reads a network into a chain of stages: layers, the preparation before, the readout behind.

The layers are those of a :class:`snn_lib.inference.description.Description`, in the order of memory
that ``stages.py`` describes. What the layers and the preparation remember is written here as steps,
and traced like the step of a cell.
"""

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from snn_lib.data.preparation import (
    MEAN_PIXEL,
    DigitPreparation,
    PixelPreparation,
    Preparation,
    RecordingPreparation,
    SequencePreparation,
    SeriesPreparation,
)
from snn_lib.inference import layers as kinds
from snn_lib.inference.arrays import unmasked
from snn_lib.inference.compiled import compare_layers
from snn_lib.inference.description import classes_of, describe, preparation_of, readout_of
from snn_lib.inference.layers import Layer, Shape, channels_last_order, over_time
from snn_lib.inference.stages import FUNCTIONS, Gather, Pool, Rows, Stage, Step, Windows
from snn_lib.kernels.program import program
from snn_lib.kernels.trace import Line, Trace, trace

LONGEST = 2.0**24  # up to which steps are counted, in float32
LARGEST_LOSS = 0.05  # by rounding, of the deviation of an input


@dataclass(frozen=True)
class StagedNetwork:
    """A network in stages, and what its numbers mean.

    Attributes:
        title: what the network is called.
        before, after: the shapes of one step of the input and of the output.
        stages: from the one to the other.
        readout: steps behind the output, whose largest result is the class; ``None`` if the
            readout is unknown.
        dtype: float32 or float64; int64 if the numbers are integers.
        takes: what the input is, in words.
        step: what a time step is, such as ``"25 ms"``.
        classes: the names of the classes.
        order: for pixels one by one, the number of each in the image.
    """

    title: str
    before: Shape
    after: Shape
    stages: tuple[Stage, ...]
    readout: tuple[Step, ...] | None
    dtype: np.dtype
    takes: str
    step: str
    classes: tuple[str, ...]
    order: np.ndarray | None


def read_stages(
    network: nn.Module,
    shape: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    step: str | None = None,
) -> StagedNetwork:
    """Reads a network; see :func:`snn_lib.inference.to_c` for the arguments and errors."""
    description = describe(network, shape)
    compare_layers(description)
    preparation = preparation_of(network)
    order = channels_last_order(description.layers[0].before)
    names = {layer.name for layer in description.layers}
    preparing, answering = (_free(name, names) for name in ("input", "answer"))
    takes, before, stages, values = _prepare(preparation, description.before, preparing)
    stages += _gather(description.entry[order], values)
    for layer in description.layers:
        more, order = _stages_of(layer, order)
        stages += more
    outputs, readout = len(order), readout_of(network)
    stages += _gather(np.argsort(order), outputs)
    if classes is None:
        classes = classes_of(network)
        if readout is None and len(classes) != outputs:  # a readout of one's own makes them
            classes = ()
    return StagedNetwork(
        type(getattr(network, "model", network)).__name__,
        tuple(before),
        description.after,
        tuple(stages),
        _readout(readout, outputs, answering),
        description.dtype,
        takes,
        getattr(preparation, "step", "") if step is None else step,
        check_classes(classes, description.after),
        preparation.order.numpy() if isinstance(preparation, PixelPreparation) else None,
    )


def _free(name: str, names: Collection[str]) -> str:
    """This name, or a longer one that no layer has."""
    while name in names:
        name += "_"
    return name


def check_classes(classes: Sequence[str], after: Sequence[int]) -> tuple[str, ...]:
    """The names of the classes as texts: none, or one for each output."""
    outputs = math.prod(after)
    if isinstance(classes, str):  # of which each letter would be a name
        raise ValueError(f"classes is {classes!r}, expected a list of names")
    if len(classes) not in (0, outputs):
        raise ValueError(f"there are {len(classes)} names of classes and {outputs} outputs")
    return tuple(map(str, classes))


# --------------------------------------------------------------------------------------------------
# Layers


def _stages_of(layer: Layer, order: np.ndarray) -> tuple[list[Stage], np.ndarray]:
    """The stages of a layer whose input lies in this order, and the order of its output."""
    name, count = layer.name, len(order)
    match layer:
        case kinds.Flattening():
            return [], order
        case kinds.Weights(weight=weight, bias=bias):
            _check_finite(name, weight)
            chosen = weight.argmax(1)
            selects = (weight.max(1) == 1).all() and np.count_nonzero(weight) == len(weight)
            if selects and not bias.any():
                return _gather(np.argsort(order)[chosen], count), np.arange(len(bias))
            rows = Rows(name, _of_vectors(count, len(bias)), weight.T[order][None])
            return [rows, _biased(name, bias, 1)], np.arange(len(bias))
        case kinds.Convolution(weight=weight, bias=bias, groups=groups):
            _check_finite(name, weight)
            size = weight.shape[2:]
            maps = _windows(layer, size)
            weight = weight.reshape(groups, -1, *weight.shape[1:]).transpose(0, 3, 4, 2, 1)
            rows = Rows(name, maps, weight.reshape(groups, -1, weight.shape[-1]))
            positions = math.prod(layer.after[1:])
            return [rows, _biased(name, bias, positions)], channels_last_order(layer.after)
        case kinds.Pooling(size=size):
            largest = isinstance(layer, kinds.MaxPooling)
            windows = _windows(layer, size)
            if largest and not (windows.places >= 0).any(1).all():
                raise ValueError(
                    f"layer {name} has windows that hold nothing of the map, whose largest value "
                    "C does not have: set another size, dilation or padding"
                )
            stages: list[Stage] = [Pool(name, windows, largest)]
            after = channels_last_order(layer.after)
            if not largest:
                stages.append(_step(name, _mean_of(math.prod(size)), after, layer.after))
            return stages, after
        case kinds.CellLayer():
            return [_cell(layer, order)], order
        case kinds.Recurrence():
            raise ValueError(
                f"layer {name} is given its own spikes, which C and integers cannot: run it by "
                "compiled, or export it by to_onnx"
            )
        case kinds.Snapshot(steps=steps):
            channels, copies = layer.after[0], len(steps)
            moments = np.repeat(steps, count // copies)[order]
            gate = _step(f"{name}.taken", _taken, order, layer.before, moment=moments)
            parts, bias = np.tile(np.eye(channels), (1, copies)), np.zeros(channels)
            weights = kinds.Weights(name, layer.before, layer.after, parts, bias)
            if len(layer.before) == 3:
                parts, window = parts[..., None, None], ((1, 1), (0, 0), (1, 1), 1)
                weights = kinds.Convolution(name, layer.before, layer.after, parts, bias, *window)
            sums, order = _stages_of(weights, order)
            total = over_time("running_sum", name, layer.after)
            return [gate, *sums, _cell(total, order)], order
    raise NotImplementedError(f"there is no case for {type(layer).__name__}")


def _cell(layer: kinds.CellLayer, order: np.ndarray) -> Step:
    """The step of a cell, without the lines and states that do not count."""
    made = program(layer.key)
    shape = _grid(layer.before)
    rows = layer.coefficients.reshape(-1, len(order))[:, order].reshape(-1, *shape)
    coefficients = dict(zip(made.coefficients, rows, strict=True))
    return _reduced(layer.name, made.forward, made.states, coefficients, shape)


def _step(
    name: str, function: Callable, order: np.ndarray, features: Shape, **coefficients: np.ndarray
) -> Step:
    """A step of this file, ``function(x, *states, *coefficients)``.

    It returns its output and the next states, which its arguments name. The coefficients, one for
    each feature, are already in the order of memory.
    """
    names = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    states = [state for state in names if state not in coefficients]
    shape = _grid(features)
    rows = {key: np.asarray(row, float).reshape(shape) for key, row in coefficients.items()}
    lines, _ = trace(function, ["x", *states, *coefficients])
    return _reduced(name, lines, states, rows, shape)


def _reduced(
    name: str,
    lines: Trace,
    states: Sequence[str],
    coefficients: Mapping[str, np.ndarray],
    shape: tuple[int, int],
) -> Step:
    """A step without products by 0 and 1, and without states that nothing reads.

    Raises:
        ValueError: it computes what C has only in a library, or with a number that is not finite.
    """
    for line in lines.lines:
        if line.operation == "round":
            raise ValueError(f"layer {name} rounds to bfloat16, which C does not have")
        if line.operation not in FUNCTIONS:
            raise ValueError(
                f"layer {name} computes {line.operation}, for which C needs its library of "
                "mathematics: it cannot be exported"
            )
        for value in line.arguments:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"layer {name} computes with {value}, which C has no number for")
    _check_finite(name, *coefficients.values())
    known = {"dropout_scale": 1.0}
    for key, row in coefficients.items():
        if not row.any() or (row == 1).all():
            known[key] = float(row.flat[0])
    lines, live = lines.without(known).live(states)
    shared = {
        key: row[:1] if (row == row[:1]).all() else row
        for key, row in coefficients.items()
        if lines.reads(key)
    }
    return Step(name, *shape, lines, tuple(live), shared)


def _check_finite(name: str, *rows: np.ndarray) -> None:
    if not all(np.isfinite(row).all() for row in rows):
        raise ValueError(f"layer {name} has weights or coefficients that are not finite")


def _biased(name: str, bias: np.ndarray, positions: int) -> Step:
    lines = Trace((Line("_0", "add", ("x", "bias")),), ("_0",))
    row = np.asarray(bias, float)[None]
    return _reduced(name, lines, (), {"bias": row}, (positions, len(bias)))


def _gather(index: np.ndarray, values: int) -> list[Stage]:
    """The stage that takes these of so many values; none if it would change nothing."""
    return [] if np.array_equal(index, np.arange(values)) else [Gather(index)]


def _windows(layer: kinds.Convolution | kinds.Pooling, size: tuple[int, int]) -> Windows:
    before, after = ((height, width, n) for n, height, width in (layer.before, layer.after))
    return Windows(before, after, size, layer.stride, layer.padding, layer.dilation)


def _of_vectors(inputs: int, outputs: int) -> Windows:
    return Windows((1, 1, inputs), (1, 1, outputs))


def _grid(features: Shape) -> tuple[int, int]:
    """How many positions and channels there are."""
    maps = len(features) == 3
    channels = features[0] if maps else math.prod(features)
    return math.prod(features) // channels, channels


# --------------------------------------------------------------------------------------------------
# Steps: what else has a state


def _taken(x: Tensor, elapsed: Tensor, moment: Tensor) -> tuple[Tensor, ...]:
    """x at its moment, else 0."""
    elapsed = torch.clamp(elapsed + 1, max=LONGEST)
    return torch.where(elapsed == moment, x, torch.zeros_like(x)), elapsed


def _mean_of(count: int) -> Callable:
    return lambda x: (x / count,)


def _readout(readout: str | None, outputs: int, name: str) -> tuple[Step, ...] | None:
    """The steps behind the output whose largest result is the class."""
    order = np.arange(outputs)
    if outputs < 2 or readout not in ("count", "mean", "last", "maximum"):
        return None
    if readout == "last":
        return (_step(name, lambda x: (x,), order, (outputs,)),)
    # The mean of each class has the same divisor.
    kind = "running_maximum" if readout == "maximum" else "running_sum"
    return (_cell(over_time(kind, name, (outputs,)), order),)


# --------------------------------------------------------------------------------------------------
# The preparation of the input


def input_of(preparation: Preparation | None) -> tuple[str, Sequence[Callable]]:
    """What the values of a step are before they are prepared, and what prepares them.

    Returns:
        The first in words, and functions of a step's values, to be traced; none for a time series,
        which also needs the step before.

    Raises:
        ValueError: no step prepares its input like this.
    """
    match preparation:
        case None | SequencePreparation():
            return "as in the training", ()
        case RecordingPreparation(values="counted", order="forward"):
            return "numbers of events", ()
        case RecordingPreparation(values="clipped", order="forward"):
            return "numbers of events, clipped at 1", [lambda x: (torch.clamp(x, max=1.0),)]
        case DigitPreparation(encoding="constant", max_rate=rate):
            return "pixels from 0 to 1", [lambda x: (x * rate,)] * (rate != 1)
        case DigitPreparation():
            return "spikes, 0 or 1", ()
        case PixelPreparation(max_rate=rate):
            return "pixels from 0 to 1", [lambda x: ((x - MEAN_PIXEL) * rate,)]
        case SeriesPreparation(encoding="current", block=1):
            return "values as they were measured", ()
    raise ValueError(
        f"{type(preparation).__name__} of this network, as it is set, is written into no step: "
        "export network.model, and prepare its input outside"
    )


def _prepare(
    preparation: Preparation | None, features: Shape, name: str
) -> tuple[str, Shape, list[Stage], int]:
    """What a step's values are before they are prepared, their shape, and the stages that do it.

    Also returns the number of values that leave these stages.

    Raises:
        ValueError: as :func:`input_of`.
    """
    takes, functions = input_of(preparation)
    count = math.prod(features)
    if isinstance(preparation, SeriesPreparation):
        channels = len(preparation.mean)
        ones, twice = np.ones(channels), np.tile(np.arange(channels), 2)
        step = _step(
            *(name, _standardised, np.arange(count), (count,)),
            mean=np.tile(preparation.mean, 2),
            factor=np.tile(1 / preparation.deviation, 2),
            own=np.concatenate([ones, 0 * ones]),
            change=np.concatenate([0 * ones, 1 / preparation.change]),
        )
        return takes, tuple(preparation.mean.shape), [Gather(twice), step], count
    steps = [_step(name, one, np.arange(count), (count,)) for one in functions]
    return takes, features, [*steps], count


def warn_of_far_channels(preparation: Preparation | None, dtype: np.dtype) -> None:
    """Warns if values of a series in this dtype lose what an exported network sees of a channel."""
    if not isinstance(preparation, SeriesPreparation):
        return
    mean, deviation = preparation.mean.numpy(), preparation.deviation.numpy()
    change = preparation.change.numpy()
    seen = deviation * np.minimum(change, 1.0)  # the values, and what they change by
    apart = float(np.finfo(dtype).eps) * np.abs(mean)  # numbers of this size
    lost = apart / math.sqrt(12) > LARGEST_LOSS * seen  # the deviation of what rounding adds
    changes = (deviation != 1) | (change != 1)  # both are 1 of a channel that never changes
    remedy = ", or in Python export network.double()" if dtype == np.float32 else ""
    for channel in np.flatnonzero(lost & changes)[:1]:
        warnings.warn(
            f"channel {channel} of the series lies around {mean[channel]:.3g}, where {dtype} "
            f"may not tell apart what differs by {seen[channel]:.3g}: subtract a constant "
            f"from the channel, and train again{remedy}",
            UserWarning,
            stacklevel=3,
        )


def _standardised(
    x: Tensor,
    before: Tensor,
    started: Tensor,
    mean: Tensor,
    factor: Tensor,
    own: Tensor,
    change: Tensor,
) -> tuple[Tensor, ...]:
    """The standardised values themselves, or their changes since the step before."""
    x = (x - mean) * factor
    difference = torch.where(started > 0, x - before, torch.zeros_like(x))
    return own * x + change * difference, x, torch.ones_like(x)


def raw_steps(preparation: Preparation | None, x: np.ndarray | Tensor) -> np.ndarray:
    """The values of each step as they were measured, from a network's input.

    That is what an exported network takes. Both are ``(T, B, *features)``.

    Raises:
        ValueError: ``x`` has other features than series that are prepared.
    """
    x = x.detach().cpu().double().numpy() if isinstance(x, Tensor) else unmasked(x).astype(float)
    match preparation:
        case DigitPreparation(encoding="constant", max_rate=rate):
            return x / rate
        case PixelPreparation(max_rate=rate):
            return x / rate + MEAN_PIXEL
        case SeriesPreparation(mean=mean, deviation=deviation, features=features):
            if x.shape[2:] != features:
                raise ValueError(f"x has the shape {x.shape}, expected (T, B, *{features})")
            return x[..., : len(mean)] * deviation.numpy() + mean.numpy()
    return x

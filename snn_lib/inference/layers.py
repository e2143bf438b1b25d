"""The layers that can run outside PyTorch, described by arrays, and how modules are read.

To add a kind of layer, add a dataclass, an entry in ``READERS``, and a case in ``arrays.py``, in
``onnx_graph.py`` and in ``staging.py``. A new cell needs none: all cells are one kind of layer.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snn_lib.cells import Cell, Delay, IIRSynapse, Recurrent
from snn_lib.chain import layers_of
from snn_lib.containers import ChannelsFirst, PerStep, Repeat, Votes
from snn_lib.errors import one_line
from snn_lib.kernels.program import Kind, key_of, kind_of, program, register
from snn_lib.kernels.trace import UnknownOperationError
from snn_lib.readout import (
    READOUTS,
    Last,
    LeakyIntegrator,
    Maximum,
    Mean,
    Snapshots,
    SpikeCount,
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """What a layer computes in one step.

    Attributes:
        name: the layer's name in the network, such as ``layers.3``.
        before, after: the shapes of its input and of its output, without time and batch.
    """

    name: str
    before: Shape
    after: Shape


@dataclass(frozen=True)
class Weights(Layer):
    """An ``nn.Linear``: weight ``(outputs, inputs)`` and bias ``(outputs,)``."""

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Convolution(Layer):
    """An ``nn.Conv2d``, padded with zeros: weight ``(C_out, C_in / groups, height, width)``.

    ``padding`` is the number of rows above the map and of columns left of it.
    """

    weight: np.ndarray
    bias: np.ndarray
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Pooling(Layer):
    """A value for every window of this ``size`` of each map."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@dataclass(frozen=True)
class MaxPooling(Pooling):
    """An ``nn.MaxPool2d``: the largest value, without positions outside the map."""


@dataclass(frozen=True)
class AveragePooling(Pooling):
    """An ``nn.AvgPool2d``: the sum, divided by the number of positions; outside the map are zeros.

    In floats it is divided, not multiplied by a rounded inverse: the mean of ones is exactly 1, a
    threshold.
    """


@dataclass(frozen=True)
class Flattening(Layer):
    """Feature maps as one row of features, in PyTorch's order, without arithmetic."""


@dataclass(frozen=True)
class Rearrangement(Layer):
    """The same features in another order or shape: for each of them, the number that it had."""

    order: np.ndarray


@dataclass(frozen=True)
class Normalisation(Layer):
    """A batch normalisation in evaluation mode: scale and shift ``(C,)`` of every channel.

    :func:`fold_normalisations` makes it a part of the weights before it.
    """

    scale: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True)
class CellLayer(Layer):
    """A synapse, a neuron or another cell: the key of its program, see ``snn_lib.kernels``.

    ``coefficients`` are ``(C, *features)``, in the program's order.
    """

    key: str
    coefficients: np.ndarray


@dataclass(frozen=True)
class Recurrence(Layer):
    """Neurons that are also given what they returned a step before, through weights.

    ``synapse`` is what filters their spikes before the weights, if something does.
    """

    weight: np.ndarray
    bias: np.ndarray
    neuron: CellLayer
    synapse: CellLayer | None


@dataclass(frozen=True)
class Snapshot(Layer):
    """The sum of parts of the input, each taken at a step of its own; the first is number 1."""

    steps: tuple[int, ...]


# --------------------------------------------------------------------------------------------------
# Sums, means and maxima over time, read at every step: cells without coefficients


def running_sum(x, state, coefficients, fire):
    """The sum of the steps so far.

    The sum is kept in two numbers, itself and what its rounding has left out (Kahan, 1965, doi
    10.1145/363707.363723). So whole numbers, such as spikes, are counted exactly up to 2^48 in
    float32, and the output is this count in the network's dtype. After n steps other sums are off
    by at most about (2^-23 + n 2^-48) times the sum of the absolute values, in float64 by
    (2^-52 + n 2^-106) times it. A sum that overflows is infinite from then on.
    """
    total, rest = state
    x = x + rest
    larger = total + x
    lost = x - (larger - total)  # which is undefined if the sum overflows
    return larger, (larger, torch.where(larger - larger == 0.0, lost, rest))


def running_mean(x, state, coefficients, fire):
    """The mean of the steps so far: a :func:`running_sum`, divided by the steps, counted alike."""
    total, sums = running_sum(x, state[:2], coefficients, fire)
    steps, counts = running_sum(torch.ones_like(x), state[2:], coefficients, fire)
    return total / steps, (*sums, *counts)


def running_maximum(x, state, coefficients, fire):
    """The largest value of the steps so far."""
    largest, started = state
    largest = torch.where(started > 0.0, torch.maximum(x, largest), x)
    return largest, (largest, torch.clamp(started, min=1.0))


register(Kind("running_sum", running_sum, ("sum", "sum.rest"), ()))
register(Kind("running_mean", running_mean, ("sum", "sum.rest", "steps", "steps.rest"), ()))
register(Kind("running_maximum", running_maximum, ("maximum", "started"), ()))


def over_time(kind: str, name: str, features: Shape) -> CellLayer:
    """One of the cells above, in the place of a readout: its answer so far, at every step."""
    key = key_of(kind, (None,) * len(kind_of(kind).states), ())
    return CellLayer(name, features, features, key, np.empty((0, *features), np.float32))


# --------------------------------------------------------------------------------------------------
# How modules are read


def read(chain: nn.Module, name: str, before: Shape, dtype: np.dtype) -> Iterator[Layer]:
    """Yields the layers of a chain, in order.

    The kind of a layer is known by its ``forward``. So a subclass with a ``forward`` of its own is
    refused. ``before`` is the shape of one step of the chain's input.

    Raises:
        ValueError: only PyTorch can run a layer, or its input does not fit; the message names it.
    """
    for inner, module, around in layers_of(chain, name):
        for layer in _read(module, inner, before, dtype, around):
            before = layer.after
            yield layer


def _read(
    module: nn.Module, name: str, before: Shape, dtype: np.dtype, around: Sequence[nn.Module]
) -> list[Layer]:
    kind = type(module).__name__
    here = f"{name} ({kind})" if name else kind
    forward = type(module).forward
    if isinstance(module, LeakyIntegrator) and forward is LeakyIntegrator.forward:
        return [_leaky(module, name, before, dtype)]
    if forward not in READERS:
        raise ValueError(f"{here} runs only in PyTorch: it can be neither compiled nor exported")
    leading = 1 if any(isinstance(one, PerStep) for one in around) else 2  # without, or with time
    # On the meta device PyTorch computes nothing but shapes.
    x = torch.zeros(*[1] * leading, *before, dtype=getattr(torch, dtype.name), device="meta")
    try:
        output = copy.deepcopy(module).to("meta")(x)
        output = output[0] if isinstance(output, tuple) else output
        without_time = isinstance(module, tuple(READOUTS.values()))
        after = tuple(output.shape[leading - without_time :])
        return READERS[forward](module, name, before, after)
    except UnknownOperationError as error:
        raise ValueError(f"{here} runs only in PyTorch: {error}") from None
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{here} is given the shape {before}: {one_line(error)}") from None


def is_read(module: nn.Module) -> bool:
    """Whether :func:`read` makes something of a layer."""
    forward = type(module).forward
    return forward is LeakyIntegrator.forward or READERS.get(forward, _nothing) is not _nothing


def fold_normalisations(layers: Iterable[Layer]) -> list[Layer]:
    """The same layers, with each normalisation folded into the layer of weights before it.

    Raises:
        ValueError: there is no layer of weights right before a normalisation.
    """
    folded: list[Layer] = []
    for layer in layers:
        if isinstance(layer, Normalisation):
            weights = folded.pop() if folded else None
            if not isinstance(weights, (Weights, Convolution)):
                raise ValueError(
                    f"layer {layer.name} normalises what comes from no layer of weights: put it "
                    "right after an nn.Linear or nn.Conv2d"
                )
            scale = layer.scale.reshape(-1, *[1] * (weights.weight.ndim - 1))
            bias = layer.scale * weights.bias + layer.shift
            layer = replace(weights, weight=scale * weights.weight, bias=bias)
        folded.append(layer)
    return folded


def _nothing(module: nn.Module, name: str, before: Shape, after: Shape) -> list[Layer]:
    """A layer that returns its input."""
    return []


def _linear(module: nn.Linear, name: str, before: Shape, after: Shape) -> list[Layer]:
    if len(before) != 1:
        raise ValueError("it weighs only the last dimension: put nn.Flatten(2) before it")
    return [Weights(name, before, after, *_weight_and_bias(module))]


def _convolution(module: nn.Conv2d, name: str, before: Shape, after: Shape) -> list[Layer]:
    _check_maps(before)
    if module.padding_mode != "zeros":
        raise ValueError(f"padding_mode is {module.padding_mode!r}, expected 'zeros'")
    padding = module.padding
    if isinstance(padding, str):  # "same" or "valid"
        spans = zip(module.dilation, module.kernel_size, strict=True)
        same = padding == "same"
        padding = tuple(same * dilation * (size - 1) // 2 for dilation, size in spans)
    stride, padding, dilation = map(_pair, (module.stride, padding, module.dilation))
    window = stride, padding, dilation, module.groups
    return [Convolution(name, before, after, *_weight_and_bias(module), *window)]


def _normalisation(
    module: nn.BatchNorm1d | nn.BatchNorm2d, name: str, before: Shape, after: Shape
) -> list[Layer]:
    if module.running_var is None or module.running_mean is None:
        raise ValueError("it has no running averages: expected track_running_stats=True")
    weight, bias = (module.weight, module.bias) if module.affine else (1.0, 0.0)
    scale = weight * (module.running_var + module.eps).rsqrt()
    shift = bias - scale * module.running_mean
    return [Normalisation(name, before, after, scale.numpy(), shift.numpy())]


def _average(module: nn.AvgPool2d, name: str, before: Shape, after: Shape) -> list[Layer]:
    _check_maps(before)
    size, stride, padding = map(_pair, (module.kernel_size, module.stride, module.padding))
    padded = padding != (0, 0) and not module.count_include_pad
    if module.ceil_mode or padded or module.divisor_override:
        raise ValueError(
            "expected no ceil_mode, no divisor_override, and padding that counts in the mean"
        )
    return [AveragePooling(name, before, after, size, stride, padding, (1, 1))]


def _maximum(module: nn.MaxPool2d, name: str, before: Shape, after: Shape) -> list[Layer]:
    _check_maps(before)
    if module.return_indices:
        raise ValueError("return_indices is True, expected False")
    window = module.kernel_size, module.stride, module.padding, module.dilation
    return [MaxPooling(name, before, after, *map(_pair, window))]


def _flattening(module: nn.Flatten, name: str, before: Shape, after: Shape) -> list[Layer]:
    if after != (math.prod(before),):
        raise ValueError("it must make one row of all features of a step, as nn.Flatten(2) does")
    return [Flattening(name, before, after)]


def _unflattening(module: nn.Unflatten, name: str, before: Shape, after: Shape) -> list[Layer]:
    return [Rearrangement(name, before, after, np.arange(math.prod(before)))]


def _rearrangement(module: ChannelsFirst, name: str, before: Shape, after: Shape) -> list[Layer]:
    numbers = torch.arange(math.prod(before), device="cpu").view(1, 1, *before)
    return [Rearrangement(name, before, after, module(numbers).flatten().numpy())]


def _votes(module: Votes, name: str, before: Shape, after: Shape) -> list[Layer]:
    """Weights of 0 and 1."""
    if len(before) != 1:
        raise ValueError("it adds up one row of features: put nn.Flatten(2) before it")
    weight = np.repeat(np.eye(after[0]), before[0] // after[0], axis=1)
    return [Weights(name, before, after, weight, np.zeros(after[0]))]


def _repetition(module: Repeat, name: str, before: Shape, after: Shape) -> list[Layer]:
    """Weights of 0 and 1, which for maps are a convolution."""
    weight, bias = np.tile(np.eye(before[0]), (module.copies, 1)), np.zeros(after[0])
    if len(before) == 1:
        return [Weights(name, before, after, weight, bias)]
    _check_maps(before)
    window = (1, 1), (0, 0), (1, 1), 1
    return [Convolution(name, before, after, weight[..., None, None], bias, *window)]


def _cell(module: Cell, name: str, before: Shape, after: Shape) -> list[Layer]:
    return [_cell_layer(module, name, before, after)]


def _cell_layer(module: Cell, name: str, before: Shape, after: Shape) -> CellLayer:
    key = module.key
    _ = program(key).forward  # refuses a step with an operation that only PyTorch has
    rows = [np.empty((0, *before), np.float32)]  # a cell may have no coefficients
    for tensor in module.effective_coefficients().values():
        has_rows = tensor.dim() > len(module.shape)
        rows.append(_over(tensor if has_rows else tensor[None], before))
    return CellLayer(name, before, after, key, np.concatenate(rows))


def _delay(module: Delay, name: str, before: Shape, after: Shape) -> list[Layer]:
    """A filter without past outputs, whose weights of past inputs are zero but for two."""
    longest, channels = module.longest, math.prod(before)
    steps = _over(module.effective_coefficients()["steps"][None], before).ravel()
    whole = np.clip(np.floor(steps), 0, longest - 1).astype(int)
    beta = np.zeros((longest + 1, channels), steps.dtype)
    beta[whole, np.arange(channels)] = 1 - (steps - whole)
    beta[whole + 1, np.arange(channels)] = steps - whole
    key = key_of(IIRSynapse.kind, (0, longest), (0, longest + 1))
    return [CellLayer(name, before, after, key, beta.reshape(-1, *before))]


def _recurrence(module: Recurrent, name: str, before: Shape, after: Shape) -> list[Layer]:
    weights = module.weights
    if not isinstance(weights, nn.Linear) or type(weights).forward is not nn.Linear.forward:
        raise ValueError(f"its weights are {type(weights).__name__}, expected nn.Linear")
    if len(before) != 1:
        raise ValueError("it weighs only the last dimension: put nn.Flatten(2) before it")
    neuron, synapse = _cell_layer(module.neuron, f"{name}.neuron", before, after), None
    if module.synapse is not None:
        synapse = _cell_layer(module.synapse, f"{name}.synapse", before, after)
    return [Recurrence(name, before, after, *_weight_and_bias(weights), neuron, synapse)]


def _snapshot(module: Snapshots, name: str, before: Shape, after: Shape) -> list[Layer]:
    if max(module.steps) >= 2**24:  # up to which the steps are counted, in float32
        raise ValueError(f"a step is {max(module.steps)}, expected fewer than 2^24 steps")
    return [Snapshot(name, before, after, module.steps)]


def _readout(kind: str, module: nn.Module, name: str, before: Shape, after: Shape) -> list[Layer]:
    return [over_time(kind, name, before)]


def _leaky(module: LeakyIntegrator, name: str, shape: Shape, dtype: np.dtype) -> CellLayer:
    """F[t] = lambda F[t-1] + (1 - lambda) x[t], with the rounding of lambda in both."""
    decay = np.full((1, *shape), module.decay, dtype)
    key = key_of(IIRSynapse.kind, (1, 0), (1, 1))
    return CellLayer(name, shape, shape, key, np.concatenate([decay, 1 - decay]))


def _check_maps(shape: Shape) -> None:
    if len(shape) != 3:
        raise ValueError("expected maps (C, H, W)")


def _weight_and_bias(module: nn.Linear | nn.Conv2d) -> tuple[np.ndarray, np.ndarray]:
    weight = module.weight.numpy()
    return weight, np.zeros(len(weight)) if module.bias is None else module.bias.numpy()


def _over(coefficients: Tensor, features: Shape) -> np.ndarray:
    """Coefficients ``(order, *shape)`` for every feature, ``(order, *features)``."""
    return coefficients.expand(len(coefficients), *features).numpy()


def channels_last_order(features: Shape) -> np.ndarray:
    """The numbers of the features with the channels of maps ``(C, H, W)`` last, as (H, W, C)."""
    numbers = np.arange(math.prod(features)).reshape(features)
    return (np.moveaxis(numbers, 0, -1) if len(features) == 3 else numbers).ravel()


def _pair(number: int | Sequence[int]) -> tuple[int, int]:
    first, second = (number, number) if isinstance(number, int) else number
    return first, second


# The function that reads a layer, by the layer's forward.
READERS: dict[Callable, Callable[[Any, str, Shape, Shape], list[Layer]]] = {
    nn.Identity.forward: _nothing,
    nn.Dropout.forward: _nothing,
    nn.Dropout2d.forward: _nothing,
    nn.Linear.forward: _linear,
    nn.Conv2d.forward: _convolution,
    nn.BatchNorm1d.forward: _normalisation,  # and of nn.BatchNorm2d
    nn.AvgPool2d.forward: _average,
    nn.MaxPool2d.forward: _maximum,
    nn.Flatten.forward: _flattening,
    nn.Unflatten.forward: _unflattening,
    ChannelsFirst.forward: _rearrangement,
    Repeat.forward: _repetition,
    Votes.forward: _votes,
    Cell.forward: _cell,
    Delay.forward: _delay,
    Recurrent.forward: _recurrence,
    Snapshots.forward: _snapshot,
    Last.forward: _nothing,
    SpikeCount.forward: partial(_readout, "running_sum"),
    Mean.forward: partial(_readout, "running_mean"),
    Maximum.forward: partial(_readout, "running_maximum"),
}

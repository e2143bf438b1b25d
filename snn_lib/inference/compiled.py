"""A trained network as one compiled function: one sample, one time step, in microseconds.

    network = compiled(model)
    for x in stream:  # NumPy arrays
        output = network.step(x)

:func:`compiled` turns the description of a network (``layers.py``) into the program and the arrays
that ``machine.py`` runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from snn_lib.inference import layers as kinds
from snn_lib.inference import machine
from snn_lib.inference.layers import Description, Layer, Shape, describe

READOUT_KINDS = {
    "count": machine.SUM,
    "mean": machine.MEAN,
    "last": machine.LAST,
    "maximum": machine.MAXIMUM,
    "leaky": machine.INTEGRATOR,
}


def compiled(network: nn.Module, shape: Sequence[int] | None = None) -> "CompiledNetwork":
    """Compiles a trained network for one sample at a time.

    It computes what ``network`` does in evaluation mode, from NumPy arrays on the CPU, with the
    weights that it has now. Filters and neurons give PyTorch's bits; sums of weights are added in
    another order and differ in their last digits, so that a potential within some 1e-6 of the
    threshold may be decided otherwise.

    Args:
        network: a :class:`snn_lib.Sequential`, or a module around one; of ``nn.Linear``, synapses,
            :class:`snn_lib.SpikingNeuron`, readouts, ``nn.Flatten``, and :class:`snn_lib.PerStep`
            of ``nn.Conv2d``, ``nn.MaxPool2d`` and ``nn.AvgPool2d``.
        shape: the features of a step of its input, if its first layer does not tell them.

    Raises:
        ValueError: a layer cannot be compiled, or the shape is missing; see
            :func:`snn_lib.inference.layers.describe`.
    """
    network = CompiledNetwork(_Program(describe(network, shape)))
    network.run(np.zeros((1, *network.before)))  # compiles, or reads the cache, here and not later
    network.reset()
    return network


class CompiledNetwork:
    """A stream through a compiled network: it keeps its state from one step to the next.

    Made by :func:`compiled`. Each stream is used by one thread at a time; different streams of a
    network run in different threads at once, as no step holds the GIL.

    Attributes:
        before, after: the features of a step's input and output.
        dtype: of the output, float32 or float64.
    """

    def __init__(self, program: "_Program") -> None:
        self._program = program
        self.before, self.after, self.dtype = program.before, program.after, program.dtype
        self._state = np.zeros(program.states, self.dtype)
        self._values = _aligned(program.values, self.dtype)
        room = program.widest + machine.GROUP
        self._numbers = np.zeros(room, np.int64)
        self._amounts = np.zeros((machine.BLOCK, room), self.dtype)

    def stream(self) -> "CompiledNetwork":
        """Another stream through the same network, at rest; both read the same weights."""
        return CompiledNetwork(self._program)

    def reset(self) -> None:
        """Sets the state to zero, for a new sequence."""
        self._state[:] = 0

    def step(self, x: np.ndarray) -> np.ndarray:
        """Runs one time step: features ``before`` to features ``after``.

        Raises:
            ValueError: ``x`` has another shape or a value that is not finite; no state changes.
            TypeError: ``x`` does not hold real numbers.
        """
        return self.run(np.asarray(x)[None])[0]

    def run(self, x: np.ndarray) -> np.ndarray:
        """Runs a sequence ``(T, *before)`` from the present state on: ``(T, *after)``.

        Raises:
            ValueError, TypeError: as :meth:`step`.
        """
        steps = self._steps(x)
        out = np.empty((len(steps), self._program.outputs), self.dtype)
        self._run(steps, out)
        return self._in_order(out).reshape(len(out), *self.after)

    def until_clear(self, x: np.ndarray, lead: float) -> tuple[int, int]:
        """Runs a sequence until one class is ahead of every other, and returns class and steps.

        The answer stands at the first step at which the sum of the output since the start of ``x``
        is larger for one class than for every other by ``lead``; where that never happens, at the
        last. The steps after it are not run. As :func:`snn_lib.readout.first_lead`.

        Args:
            x: ``(T, *before)``, at least one step.
            lead: by how much the first has to be ahead of the second.

        Raises:
            ValueError: there are no steps or fewer than two classes, or as :meth:`step`.
            TypeError: as :meth:`step`.
        """
        x = self._steps(x)
        if len(x) == 0 or len(self.after) != 1 or self.after[0] < 2:
            raise ValueError(
                f"{len(x)} steps and an output of the shape {self.after}: expected at least one "
                "step and two classes"
            )
        total = np.zeros((1, self._program.outputs), self.dtype)
        steps = self._run(x, total, True, float(lead))
        return int(self._in_order(total)[0].argmax()), steps

    def _steps(self, x: np.ndarray) -> np.ndarray:
        """A sequence as the compiled function takes it: a fresh array, ``(T, features)``."""
        x = np.asarray(x)
        if x.shape[1:] != self.before or x.ndim == 0:
            raise ValueError(
                f"a step of the input has the shape {x.shape[1:]}, expected {self.before}"
            )
        x = x.astype(self.dtype, order="C", casting="same_kind")
        return x.reshape(len(x), math.prod(self.before))

    def _run(self, x: np.ndarray, out: np.ndarray, summing: bool = False, lead: float = 0.0) -> int:
        program = self._program
        steps = x if program.entry is None else x.take(program.entry, axis=1)
        shared = program.layers, program.coefficients, program.table
        own = self._state, self._values, self._numbers, self._amounts
        done = machine.run(*shared, *own, steps, out, summing, lead)
        if done == 0 and len(x) > 0:
            step, feature = np.argwhere(~np.isfinite(x))[0]
            channel = ", ".join(str(index) for index in np.unravel_index(feature, self.before))
            raise ValueError(
                f"the input is {x[step, feature]} in step {step}, channel {channel}: expected "
                f"finite numbers in {self.dtype}"
            )
        return done

    def _in_order(self, out: np.ndarray) -> np.ndarray:
        """The last layer's output in the order of PyTorch's features."""
        return out if self._program.leave is None else out.take(self._program.leave, axis=1)


class _Program:
    """A description as the arrays that ``machine.run`` reads.

    Attributes:
        before, after, dtype: as in :class:`Description`.
        layers: a record of ``machine.LAYER`` each.
        coefficients, table: of all layers, the numbers and the integers of the taps.
        entry: which feature of the network's input each of the first layer's is, ``None``: itself.
        leave: which feature of the last layer's output each of the network's is, likewise.
        outputs: of the last layer.
        states, values, widest: the lengths of what a stream has of its own.
    """

    def __init__(self, description: Description) -> None:
        self.before, self.after = description.before, description.after
        self.dtype = description.dtype
        order = _channels_last(description.layers[0].before)
        self.entry = _unless_in_order(description.entry[order])
        self.states, self.widest = 0, 0
        source, stride = 0, _whole_lines(len(order))
        self.values = stride * machine.BLOCK
        records, taps, coefficients, begin = [], [], [], 0
        for layer in description.layers:
            part = _part(layer, order)
            order = part.order
            if part.kind is None:
                continue
            numbers = [_lined_up(row) for row in part.coefficients]
            target_stride = _whole_lines(len(order))
            fields = {
                "kind": part.kind,
                "source": source,
                "source_stride": stride,
                "inputs": math.prod(layer.before),
                "target": self.values,
                "target_stride": target_stride,
                "outputs": len(order),
                "follows_filter": bool(records) and records[-1][0] == machine.FILTER,
                "coefficients": begin,
                "state": self.states,
                "taps": 2 * len(taps),
                "tap_count": len(part.taps),
                **part.fields,
            }
            records.append(tuple(fields.get(name, 0) for name in machine.LAYER.names))
            source, stride = self.values, target_stride
            self.values += stride * machine.BLOCK
            self.states += part.states
            self.widest = max(self.widest, fields.get("channels", 0))
            coefficients += numbers
            begin += sum(map(len, numbers))
            taps += part.taps
        self.leave, self.outputs = _unless_in_order(np.argsort(order)), len(order)
        self.layers = np.array(records, machine.LAYER)
        self.coefficients = _aligned(begin, self.dtype)
        if coefficients:
            np.concatenate(coefficients, out=self.coefficients, casting="same_kind")
        self.table = np.array(taps, np.int64).ravel()


@dataclass
class _Part:
    """A layer as ``machine.py`` runs it.

    Attributes:
        order: for each value of its output, which of PyTorch's features it is.
        kind: what it does; ``None`` if nothing is computed.
        coefficients: in the order in which the function of this kind takes them.
        states: how many numbers it remembers.
        taps: of a convolution or a pooling, see ``machine.py``.
        fields: the others of ``machine.LAYER``.
    """

    order: np.ndarray
    kind: int | None = None
    coefficients: Sequence[np.ndarray] = ()
    states: int = 0
    taps: Sequence[tuple[int, int]] = ()
    fields: dict[str, int] = field(default_factory=dict)


def _part(layer: Layer, order: np.ndarray) -> _Part:
    """A layer as the machine runs it, on values in this order."""
    count = len(order)
    match layer:
        case kinds.Flattening():
            return _Part(order)
        case kinds.Weights(weight=weight, bias=bias):
            # Whole lines of outputs: what is beyond the last stays zero.
            maps = _maps((count, 1, 1), (_whole_lines(len(bias)), 1, 1), tap_width=1)
            rows = bias, weight.T[order]
            return _Part(np.arange(len(bias)), machine.WEIGHTS, rows, 0, [(0, 0)], maps)
        case kinds.Convolution():
            return _convolution(layer)
        case kinds.MaxPooling(size=size, padding=padding, dilation=dilation, stride=stride):
            taps = [
                (y * dilation[0] - padding[0], x * dilation[1] - padding[1])
                for y, x in np.ndindex(*size)
            ]
            maps = _maps(layer.before, layer.after, stride)
            return _Part(_channels_last(layer.after), machine.POOLING, (), 0, taps, maps)
        case kinds.Filter(alpha=alpha, beta=beta):
            orders = {"past_outputs": len(alpha), "past_inputs": len(beta) - 1}
            rows = [np.concatenate([alpha, beta]).reshape(-1, count)[:, order].ravel()]
            return _Part(order, machine.FILTER, rows, sum(orders.values()) * count, (), orders)
        case kinds.Neuron():
            rows = layer.membrane_decay, layer.reset_decay, layer.reset_strength
            rows = [np.stack(rows).reshape(3, count)[:, order].ravel()]
            return _Part(order, machine.NEURON, rows, 2 * count)
        case kinds.Readout(kind=kind, decay=decay):
            numbers = np.array([decay, 1 - decay])
            return _Part(order, READOUT_KINDS[kind], (numbers,), count + 1)


def _convolution(layer: kinds.Convolution) -> _Part:
    """A convolution as taps: what an input at ``(0, 0)`` adds to the output, and where.

    Neighbours in a row of the window reach neighbouring columns, so that a tap is a whole row, last
    element first. Where they do not, with a stride or a dilation, it is a single element.
    """
    (outputs, inputs, height, width), groups = layer.weight.shape, layer.groups
    weight = np.zeros((groups, outputs // groups, groups, inputs, height, width))
    for group, own in enumerate(np.split(layer.weight, groups)):  # others' weights are zero
        weight[group, :, group] = own
    weight = weight.reshape(outputs, groups * inputs, height, width)
    (down, right), (above, left) = layer.dilation, layer.padding
    if layer.stride[1] == right == 1:
        kernel = weight[..., ::-1].transpose(2, 1, 3, 0)  # height, inputs, width, outputs
        taps = [(above - y * down, left - width + 1) for y in range(height)]
    else:
        kernel = weight.transpose(2, 3, 1, 0)  # height, width, inputs, outputs
        taps = [(above - y * down, left - x * right) for y, x in np.ndindex(height, width)]
    rows = kernel.reshape(len(taps) * groups * inputs, -1)
    maps = _maps(layer.before, layer.after, layer.stride, tap_width=rows.shape[1] // outputs)
    order = _channels_last(layer.after)
    return _Part(order, machine.WEIGHTS, (layer.bias, rows), 0, taps, maps)


def _maps(
    before: Shape, after: Shape, stride: tuple[int, int] = (1, 1), tap_width: int = 0
) -> dict[str, int]:
    """The fields of maps ``(C, H, W)``."""
    names = "channels", "height", "width", "out_channels", "out_height", "out_width"
    return {
        **dict(zip(names, (*before, *after), strict=True)),
        "stride_height": stride[0],
        "stride_width": stride[1],
        "tap_width": tap_width,
        "kernel": _whole_lines(after[0]),
        "row_stride": _whole_lines(tap_width * after[0]),
    }


def _channels_last(features: Shape) -> np.ndarray:
    """The features of maps ``(C, H, W)`` in the order (H, W, C), by number; others as they are."""
    numbers = np.arange(math.prod(features)).reshape(features)
    return (np.moveaxis(numbers, 0, -1) if len(features) == 3 else numbers).ravel()


def _unless_in_order(numbers: np.ndarray) -> np.ndarray | None:
    return None if np.array_equal(numbers, np.arange(len(numbers))) else numbers


def _whole_lines(count: int) -> int:
    """A number of numbers, rounded up to lines of the cache."""
    return -(-count // machine.LINE) * machine.LINE


def _lined_up(rows: np.ndarray) -> np.ndarray:
    """Rows one after the other, each filled up to whole lines."""
    missing = _whole_lines(rows.shape[-1]) - rows.shape[-1]
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)]).ravel()


def _aligned(count: int, dtype: np.dtype) -> np.ndarray:
    """Zeros that begin with a line."""
    room = np.zeros(count + machine.LINE, dtype)
    return room[-(room.ctypes.data // room.itemsize) % machine.LINE :][:count]

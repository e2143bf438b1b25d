"""Makes the arrays that ``machine.py`` runs from the description of a network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from snn_lib.inference import layers as kinds
from snn_lib.inference import machine
from snn_lib.inference.description import Description
from snn_lib.inference.layers import Layer, Shape, channels_last_order
from snn_lib.kernels.cpu.running import kernel_of_steps
from snn_lib.kernels.program import program


class Arrays:
    """A description as the arrays that ``machine.run`` reads.

    Attributes:
        before, after, dtype: as in :class:`Description`.
        layers: an array with a record ``machine.LAYER`` for each layer.
        coefficients, table: the coefficients and the taps of all layers.
        entry: for each feature of the first layer's input, the number of the feature of the
            network's input that it is; ``None`` if both have the same order.
        leave: for each feature of the network's output, the number of the feature of the last
            layer's output that it is; ``None`` if both have the same order.
        outputs: the number of outputs of the last layer.
        states, values, widest: the lengths of the arrays that every stream has of its own.
    """

    def __init__(self, description: Description) -> None:
        self.before, self.after = description.before, description.after
        self.dtype = description.dtype
        order = channels_last_order(description.layers[0].before)
        self.entry = _unless_in_order(description.entry[order])
        self.states, self.widest = 0, 0
        source, stride = 0, _whole_lines(len(order))
        self.values = stride * machine.BLOCK
        records, taps, coefficients, begin, lasts = [], [], [], 0, False
        self._keys: dict[tuple[int, str], str] = {}
        for layer in description.layers:
            part = _part_of(layer, order)
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
                "follows_filter": lasts,
                "coefficients": begin,
                "state": self.states,
                "taps": 2 * len(taps),
                "tap_count": len(part.taps),
                **part.fields,
            }
            self._keys |= {(len(records), name): key for name, key in part.keys.items()}
            records.append(tuple(fields.get(name, 0) for name, *_ in machine.LAYER.descr))
            lasts = part.lasts
            source, stride = self.values, target_stride
            self.values += stride * machine.BLOCK
            self.states += part.states
            self.widest = max(self.widest, fields.get("channels", 0))
            coefficients += numbers
            begin += sum(map(len, numbers))
            taps += part.taps
        self.leave, self.outputs = _unless_in_order(np.argsort(order)), len(order)
        self.layers = np.array(records, machine.LAYER)
        self.coefficients = aligned_zeros(begin, self.dtype)
        if coefficients:
            np.concatenate(coefficients, out=self.coefficients, casting="same_kind")
        self.table = np.array(taps, np.int64).ravel()
        self._link()

    def _link(self) -> None:
        """Writes where the kernels of the cells are in this process."""
        for (number, name), key in self._keys.items():
            self.layers[number][name] = kernel_of_steps(key, self.dtype.name).address

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._link()


@dataclass
class _Part:
    """A layer as ``machine.py`` runs it.

    Attributes:
        order: for each value of the output, the number of PyTorch's feature that it is.
        kind: what the layer does, one of ``machine.py``'s numbers; ``None`` if it does nothing.
        coefficients: in the order in which the function of this kind takes them.
        states: how many numbers the layer remembers.
        taps: those of a convolution, a pooling or snapshots, see ``machine.py``.
        fields: other fields of ``machine.LAYER``.
        keys: by the field of ``machine.LAYER``, the keys of the cells' programs.
        lasts: whether its output is that of a filter, which is not zero for many steps.
    """

    order: np.ndarray
    kind: int | None = None
    coefficients: Sequence[np.ndarray] = ()
    states: int = 0
    taps: Sequence[tuple[int, int]] = ()
    fields: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    lasts: bool = False


def _part_of(layer: Layer, order: np.ndarray) -> _Part:
    """A layer as the machine runs it, on values that lie in this order."""
    count = len(order)
    match layer:
        case kinds.Flattening():
            return _Part(order)
        case kinds.Weights(weight=weight, bias=bias):
            # The outputs fill whole lines of the cache; those beyond the last stay zero.
            maps = _maps((count, 1, 1), (_whole_lines(len(bias)), 1, 1), tap_width=1)
            rows = bias, weight.T[order]
            return _Part(np.arange(len(bias)), machine.WEIGHTS, rows, 0, [(0, 0)], maps)
        case kinds.Convolution():
            return _convolution(layer)
        case kinds.Pooling(size=size, padding=padding, dilation=dilation, stride=stride):
            taps = [
                (y * dilation[0] - padding[0], x * dilation[1] - padding[1])
                for y, x in np.ndindex(*size)
            ]
            maps = _maps(layer.before, layer.after, stride)
            is_mean = isinstance(layer, kinds.AveragePooling)
            kind = machine.AVERAGE if is_mean else machine.LARGEST
            return _Part(channels_last_order(layer.after), kind, (), 0, taps, maps)
        case kinds.CellLayer(key=key):
            rows, states = [_cell_rows(layer, order)], len(program(key).states) * count
            lasts = not any(program(key).spikes)
            return _Part(order, machine.CELL, rows, states, keys={"function": key}, lasts=lasts)
        case kinds.Recurrence():
            return _recurrence(layer, order)
        case kinds.Snapshot():
            return _snapshots(layer, order)
    raise NotImplementedError(f"there is no case for {type(layer).__name__}")


def _cell_rows(layer: kinds.CellLayer, order: np.ndarray) -> np.ndarray:
    """The coefficients of a cell, one after the other."""
    return layer.coefficients.reshape(-1, len(order))[:, order].ravel()


def _recurrence(layer: kinds.Recurrence, order: np.ndarray) -> _Part:
    """Weights and the cells behind them; the state is what comes back, then that of each cell."""
    count = len(order)
    rows, fields, keys, state = [layer.bias[order], layer.weight.T[order][:, order]], {}, {}, count
    places = ("function", "cells", ""), ("following", "cell_after", "state_after")
    for cell, (function, begin, past) in zip((layer.neuron, layer.synapse), places, strict=True):
        if cell is not None:
            keys[function] = cell.key
            fields[begin] = sum(len(_lined_up(row)) for row in rows)
            fields |= {past: state} if past else {}
            rows.append(_cell_rows(cell, order))
            state += len(program(cell.key).states) * count
    maps = _maps((count, 1, 1), (_whole_lines(count), 1, 1), tap_width=1)
    return _Part(order, machine.RECURRENCE, rows, state, [(0, 0)], maps | fields, keys)


def _snapshots(layer: kinds.Snapshot, order: np.ndarray) -> _Part:
    """Snapshots as taps, of all outputs at the first of the steps, then at the second, and so on.

    A tap is a step and the number of the input that is added to the output then.
    """
    places = np.argsort(order).reshape(len(layer.steps), -1)
    after = channels_last_order(layer.after)
    taps = [(s, i) for s, row in zip(layer.steps, places, strict=True) for i in row[after]]
    return _Part(after, machine.SNAPSHOTS, states=len(after) + 1, taps=taps)


def _convolution(layer: kinds.Convolution) -> _Part:
    """A convolution as taps, which say what an input at ``(0, 0)`` adds to the output, and where.

    Without stride and dilation along a row, neighbours in a row of the window reach neighbouring
    columns of the output. A tap is then a whole row of the window, with its last element first.
    Otherwise a tap is a single element.
    """
    (outputs, inputs, height, width), groups = layer.weight.shape, layer.groups
    weight = np.zeros((groups, outputs // groups, groups, inputs, height, width))
    for group, own in enumerate(np.split(layer.weight, groups)):  # other groups' weights are zero
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
    order = channels_last_order(layer.after)
    return _Part(order, machine.WEIGHTS, (layer.bias, rows), 0, taps, maps)


def _maps(
    before: Shape, after: Shape, stride: tuple[int, int] = (1, 1), tap_width: int = 0
) -> dict[str, int]:
    """The fields of ``machine.LAYER`` for maps ``(C, H, W)``."""
    names = "channels", "height", "width", "out_channels", "out_height", "out_width"
    return {
        **dict(zip(names, (*before, *after), strict=True)),
        "stride_height": stride[0],
        "stride_width": stride[1],
        "tap_width": tap_width,
        "kernel": _whole_lines(after[0]),
        "row_stride": _whole_lines(tap_width * after[0]),
    }


def unmasked(x: Any) -> np.ndarray:
    """A user's numbers as an array.

    Raises:
        ValueError: some of them are masked.
    """
    if isinstance(x, (list, tuple)):  # of masked rows, perhaps
        x = np.ma.array(x)
    if np.ma.is_masked(x):
        raise ValueError("the input has masked values: fill them first")
    return np.asarray(x)


def _unless_in_order(numbers: np.ndarray) -> np.ndarray | None:
    return None if np.array_equal(numbers, np.arange(len(numbers))) else numbers


def _whole_lines(count: int) -> int:
    """A count of numbers, rounded up to whole lines of the cache."""
    return -(-count // machine.LINE) * machine.LINE


def _lined_up(rows: np.ndarray) -> np.ndarray:
    """The rows one after the other, each padded with zeros to whole lines."""
    missing = _whole_lines(rows.shape[-1]) - rows.shape[-1]
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)]).ravel()


def aligned_zeros(count: int, dtype: np.dtype) -> np.ndarray:
    """An array of zeros that begins where a line of the cache begins."""
    room = np.zeros(count + machine.LINE, dtype)
    return room[-(room.ctypes.data // room.itemsize) % machine.LINE :][:count]

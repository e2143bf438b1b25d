"""Writes one time step of a trained network as an ONNX graph of standard operators.

Each state is an input of the graph. Its next value is an output, whose name has ``.next`` at the
end. To run a sequence, feed zeros as states at the first step, and after that the next states that
the step before has returned.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from snn_lib.data.preparation import PixelPreparation, Preparation, SeriesPreparation
from snn_lib.files import write_atomically
from snn_lib.inference import layers as kinds
from snn_lib.inference.compiled import compare_layers
from snn_lib.inference.description import (
    Description,
    classes_of,
    describe,
    preparation_of,
    readout_of,
)
from snn_lib.inference.layers import Layer, Shape
from snn_lib.inference.staging import check_classes, input_of, warn_of_far_channels
from snn_lib.kernels.program import program
from snn_lib.kernels.trace import ARITHMETIC, FUNCTIONS, Trace, Value, trace

INPUT, OUTPUT, NEXT = "x", "y", ".next"
# What the operations of a step are called in ONNX.
OPERATORS = {name: name.capitalize() for name in (*ARITHMETIC, *FUNCTIONS, "where")}
OPERATORS |= {"maximum": "Max", "minimum": "Min", "gt": "Greater", "ge": "GreaterOrEqual"}
OPERATORS |= {"lt": "Less", "le": "LessOrEqual", "eq": "Equal"}
OPERATORS |= {"logical_and": "And", "logical_or": "Or", "logical_not": "Not"}
BFLOAT16 = 16  # as ONNX counts the types of numbers
OPSET, IR_VERSION = 17, 8  # versions of 2022, which all present runtimes read


def to_onnx(
    network: nn.Module,
    path: str | Path,
    shape: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    step: str | None = None,
) -> None:
    """Writes one time step of a trained network as an ONNX graph.

    The graph takes ``x``, ``(batch, *features)``, and the states, each ``(batch, *features)``, and
    returns ``y`` and the next states. The batch may have any size. The graph computes what
    ``network`` does in evaluation mode, but adds up sums in another order than PyTorch, as
    :func:`snn_lib.inference.compiled` does. Its numbers have the network's dtype. ONNX
    Runtime has no convolutions in float64.

    If :func:`snn_lib.load` returned the network, the graph prepares its input as well. ``x`` then
    holds the values of a step as they were measured: pixels from 0 to 1, or numbers of events. They
    are standardised in the network's dtype. The graph does not make random or latency spikes: there
    ``x`` has to hold the spikes. Nor does it change the order of pixels that come one by one: the
    network's ``preparation.order`` says which pixel is next.

    The file's metadata holds, as texts, what makes a class of the outputs: ``readout``, a name of
    ``snn_lib.readout.READOUTS`` or empty, and ``classes`` and ``step`` as below. It is ``last`` if
    the network answers at every step, and empty if it predicts numbers. For pixels one by one it
    also holds ``order``, in JSON.

    Args:
        network, shape: as in :func:`snn_lib.inference.compiled`.
        path: the file to write, ``.onnx``.
        classes: the names of the classes, by default those of the network. The file's metadata
            holds them as ``classes``, in JSON. If a readout of your own makes the classes of the
            outputs, there may be more or fewer of them.
        step: what a time step is, such as ``"25 ms"``, by default what the network's preparation
            says. The file's metadata holds it as ``step``.

    Raises:
        ImportError: the package onnx is not installed.
        ValueError: a layer or the preparation cannot be exported, or as
            :func:`snn_lib.inference.compiled`, with which the layers are compared.
        RunError: the file cannot be written; what was there before is untouched.

    Warns:
        UserWarning: a channel of a series lies so far from 0 that the network's dtype loses what it
            sees of it. Export ``network.double()``, or subtract a constant and train again.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError("to_onnx needs the package onnx: pip install onnx") from None
    description = describe(network, shape)
    compare_layers(description)
    for layer, (x, y) in zip(description.layers, description.run, strict=False):
        if isinstance(layer, kinds.MaxPooling) and np.isneginf(y).any() > np.isneginf(x).any():
            raise ValueError(
                f"layer {layer.name} has windows that hold nothing of the map, whose largest value "
                "ONNX does not define: set another size, dilation or padding"
            )
    preparation = preparation_of(network)
    graph = _Graph(description, preparation)
    warn_of_far_channels(preparation, description.dtype)
    classes = classes_of(network) if classes is None else classes
    if readout_of(network) is not None:
        check_classes(classes, description.after)
    step = getattr(preparation, "step", "") if step is None else step
    number = onnx.helper.np_dtype_to_tensor_dtype(description.dtype)

    def values(features: dict[str, Shape]) -> list[onnx.ValueInfoProto]:
        return [
            onnx.helper.make_tensor_value_info(name, number, ["batch", *shape])
            for name, shape in features.items()
        ]

    states = graph.states
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node(operator, inputs, [output], name=output, **attributes)
                for operator, inputs, output, attributes in graph.nodes
            ],
            type(network).__name__,
            values({INPUT: graph.before, **states}),
            values({OUTPUT: description.after, **{name + NEXT: states[name] for name in states}}),
            [onnx.numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
        ),
        producer_name="snn_lib",
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    metadata = {
        "classes": json.dumps([str(name) for name in classes]),
        "step": step,
        "readout": readout_of(network) or "",
    }
    if isinstance(preparation, PixelPreparation):
        metadata["order"] = json.dumps(preparation.order.tolist())
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    write_atomically(Path(path), model.SerializeToString())


class _Graph:
    """A description as nodes ``(operator, inputs, output, attributes)``.

    Attributes:
        before: the shape of a step's values, before they are prepared.
        nodes: the nodes, in the order in which they run.
        constants: arrays, by name.
        states: the shape of each state, by name.
    """

    def __init__(self, description: Description, preparation: Preparation | None) -> None:
        self.nodes: list[tuple[str, list[str], str, dict]] = []
        self.constants: dict[str, np.ndarray] = {}
        self.states: dict[str, Shape] = {}
        self._dtype = description.dtype
        first, last = description.layers[0], description.layers[-1]
        self.before = description.before
        x, features = self._prepare(preparation), description.before
        if not np.array_equal(description.entry, np.arange(math.prod(description.before))):
            x, features = self._node("Flatten", x, axis=1), description.entry.shape
            x = self._node("Gather", x, description.entry, axis=1)
        x = self._reshape(x, features, first.before)
        for layer in description.layers:
            x = self._layer(layer, x)
        x = self._reshape(x, last.after, description.after)
        self._node("Identity", x, output=OUTPUT)

    def _prepare(self, preparation: Preparation | None) -> str:
        """Adds the nodes that prepare a step's values, and returns the name of their output."""
        x, (_, functions) = INPUT, input_of(preparation)
        if isinstance(preparation, SeriesPreparation):
            return self._series(preparation)
        for function in functions:
            (x,) = self._lines(trace(function, [INPUT])[0], {INPUT: x})
        return x

    def _series(self, preparation: SeriesPreparation) -> str:
        """The standardised values, and their changes since the step before."""
        self.before = tuple(preparation.mean.shape)
        centred = self._node("Sub", INPUT, preparation.mean)
        x = self._node("Div", centred, preparation.deviation)
        before = self._state("input.x", self.before)
        started = self._state("input.started", self.before)  # 0 at the first step, then 1
        change = self._node("Mul", started, self._node("Sub", x, before))  # 0 at the first step
        change = self._node("Div", change, preparation.change)
        self._next(before, x)
        self._next(started, self._node("Max", started, 1.0))
        return self._node("Concat", x, change, axis=1)

    def _layer(self, layer: Layer, x: str) -> str:
        """Adds the nodes of a layer, and returns the name of its output."""
        match layer:
            case kinds.Flattening():
                return self._node("Flatten", x, axis=1)
            case kinds.Weights(weight=weight, bias=bias):
                return self._node("Gemm", x, weight, bias, transB=1)
            case kinds.Convolution(weight=weight, bias=bias, groups=groups):
                window = self._window(layer, weight.shape[2:])
                return self._node("Conv", x, weight, bias, group=groups, **window)
            case kinds.Pooling():
                return self._pool(layer, x)
            case kinds.CellLayer():
                return self._cell(layer, x)
            case kinds.Recurrence():
                return self._recurrence(layer, x)
            case kinds.Snapshot():
                return self._snapshots(layer, x)
        raise NotImplementedError(f"there is no case for {type(layer).__name__}")

    def _cell(self, layer: kinds.CellLayer, x: str) -> str:
        """The lines of the step; states that it does not read are left out."""
        made = program(layer.key)
        coefficients = dict(zip(made.coefficients, layer.coefficients, strict=True))
        known = {name: 0.0 for name, row in coefficients.items() if not row.any()}
        lines, states = made.forward.without({**known, "dropout_scale": 1.0}).live(made.states)
        values: dict[str, Any] = {"x": x, **coefficients}
        values |= {name: self._state(f"{layer.name}.{name}", layer.before) for name in states}
        results = zip(lines.results, self._lines(lines, values), strict=True)
        output, *after = (
            # what reads neither is the same in all sequences, and has no dimension for them
            value if lines.only([result]).reads("x", *states) else self._for_each(value, x)
            for result, value in results
        )
        for name, value in zip(states, after, strict=True):
            self._next(f"{layer.name}.{name}", value)
        return output

    def _lines(self, lines: Trace, values: dict[str, Any]) -> list[Any]:
        """Adds the nodes of a trace, whose inputs have these values, and returns its results."""

        def value(one: Value) -> Any:
            return values[one] if isinstance(one, str) else one

        for line in lines.lines:
            values[line.name] = self._operation(line.operation, *map(value, line.arguments))
        return [value(result) for result in lines.results]

    def _recurrence(self, layer: kinds.Recurrence, x: str) -> str:
        """The neurons with what comes back; its state is what goes into the weights next."""
        fed = self._state(f"{layer.name}.fed", layer.before)
        current = self._node("Gemm", fed, layer.weight, layer.bias, transB=1)
        spikes = self._cell(layer.neuron, self._node("Add", x, current))
        self._next(fed, spikes if layer.synapse is None else self._cell(layer.synapse, spikes))
        return spikes

    def _operation(self, name: str, *inputs: Any) -> str:
        if name == "ne":
            return self._node("Not", self._node("Equal", *inputs))
        if name == "round":  # to bfloat16
            narrow = self._node("Cast", *inputs, to=BFLOAT16)
            return self._node("CastLike", narrow, *inputs)
        return self._node(OPERATORS[name], *inputs)

    def _pool(self, layer: kinds.Pooling, x: str) -> str:
        window = self._window(layer, layer.size)
        if isinstance(layer, kinds.AveragePooling):
            channels = layer.before[0]
            ones = np.ones((channels, 1, *layer.size))
            total = self._node("Conv", x, ones, group=channels, **window)
            return self._node("Div", total, float(math.prod(layer.size)))
        above, left, below, right = window.pop("pads")
        if above or left or below or right:  # ONNX Runtime itself pads by less than a window
            around = np.array([0, 0, above, left, 0, 0, below, right])
            x = self._node("Pad", x, around, -math.inf)
        return self._node("MaxPool", x, **window)

    def _snapshots(self, layer: kinds.Snapshot, x: str) -> str:
        """The sum so far, and each part of the input whose step has come."""
        y = total = self._state(f"{layer.name}.sum", layer.after)
        steps = self._state(f"{layer.name}.steps", layer.after)
        now = self._node("Add", steps, 1.0)
        self._next(steps, now)
        parts = np.arange(layer.before[0]).reshape(len(layer.steps), -1)
        for step, channels in zip(layer.steps, parts, strict=True):
            part = self._node("Gather", x, channels, axis=1)
            taken = self._node("Equal", now, float(step))
            y = self._node("Add", y, self._node("Where", taken, part, 0.0))
        self._next(total, y)
        return y

    def _window(self, layer: kinds.Convolution | kinds.Pooling, size: Shape) -> dict:
        """The attributes of a convolution or a pooling.

        The padding below and to the right is as large as the size of PyTorch's output needs.
        """
        below = [
            max(0, (after - 1) * stride + gap * (width - 1) + 1 - before - padded)
            for before, after, width, stride, padded, gap in zip(
                layer.before[1:],
                layer.after[1:],
                size,
                layer.stride,
                layer.padding,
                layer.dilation,
                strict=True,
            )
        ]
        return {
            "kernel_shape": list(size),
            "strides": list(layer.stride),
            "dilations": list(layer.dilation),
            "pads": [*layer.padding, *below],
        }

    def _node(
        self,
        operator: str,
        *inputs: str | np.ndarray | Tensor | float,
        output: str = "",
        **attributes: object,
    ) -> str:
        """Adds a node, and returns the name of its output; inputs are names or constants."""
        output = output or f"{operator}_{len(self.nodes)}"
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        self.nodes.append((operator, names, output, attributes))
        return output

    def _constant(self, value: np.ndarray | Tensor | float) -> str:
        """Adds a constant: an array of integers as it is, all else in the network's dtype."""
        name = f"constant_{len(self.constants)}"
        is_integers = isinstance(value, np.ndarray) and value.dtype == np.int64
        dtype = np.int64 if is_integers else self._dtype
        self.constants[name] = np.ascontiguousarray(value, dtype)
        return name

    def _reshape(self, x: str, before: Shape, after: Shape) -> str:
        same = tuple(before) == tuple(after)
        return x if same else self._node("Reshape", x, np.array([-1, *after]))

    def _for_each(self, value: Any, x: str) -> str:
        """A value of the shape of x."""
        return self._node("Expand", value, self._node("Shape", x))

    def _state(self, name: str, features: Shape) -> str:
        self.states[name] = features
        return name

    def _next(self, state: str, value: str) -> None:
        self._node("Identity", value, output=state + NEXT)

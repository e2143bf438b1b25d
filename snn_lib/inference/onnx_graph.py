"""A trained network out of Python: one time step as an ONNX graph of standard operators.

Each state is an input of the graph and, with ``.next`` behind its name, an output. Who runs the
graph feeds zeros at the first step, and at every other step what the step before has given.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

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
from snn_lib.inference.description import Description, describe
from snn_lib.inference.layers import Layer, Shape
from snn_lib.surrogate import THRESHOLD

INPUT, OUTPUT, NEXT = "x", "y", ".next"
OPSET, IR_VERSION = 17, 8  # of 2022, which today's runtimes read


def to_onnx(
    network: nn.Module,
    path: str | Path,
    shape: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    step: str | None = None,
) -> None:
    """Writes one time step of a trained network as an ONNX graph.

    The graph takes ``x``, ``(batch, *features)``, and the states, each ``(batch, *features)``, and
    returns ``y`` and the next states. Batch is free. The graph computes what ``network`` does in
    evaluation mode; sums are added in another order than PyTorch's, as in
    :func:`snn_lib.inference.compiled`. Its numbers have the network's dtype; of convolutions in
    float64 ONNX Runtime has none.

    The graph of a network that :func:`snn_lib.load` returned prepares its input as well: ``x`` are
    the values of a step as they were measured, a pixel from 0 to 1, or the number of events.
    Standardisation is computed in the network's dtype. Random and latency spikes have to come from
    outside.

    Args:
        network, shape: as in :func:`snn_lib.inference.compiled`.
        path: the file, ``.onnx``.
        classes: the names of the classes, by default the network's; the metadata ``classes`` holds
            them, as JSON.
        step: what a time step is, such as ``"25 ms"``, by default what the network's preparation
            says; the metadata ``step`` holds it.

    Raises:
        ImportError: the package onnx is not installed.
        ValueError: a layer or the preparation cannot be exported, or the shape is missing; see
            :func:`snn_lib.inference.description.describe`.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError("to_onnx needs the package onnx: pip install onnx") from None
    description = describe(network, shape)
    preparation = getattr(network, "preparation", None)
    graph = _Graph(description, preparation)
    classes = getattr(network, "classes", ()) if classes is None else classes
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
    onnx.helper.set_model_props(model, {"classes": json.dumps(list(classes)), "step": step})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


class _Graph:
    """A description as nodes ``(operator, inputs, output, attributes)``.

    Attributes:
        before: the features of a step's values, before they are prepared.
        nodes: in the order in which they run.
        constants: arrays by name.
        states: the features of each state, by name.
    """

    def __init__(self, description: Description, preparation: Preparation | None) -> None:
        self.nodes: list[tuple[str, list[str], str, dict]] = []
        self.constants: dict[str, np.ndarray] = {}
        self.states: dict[str, Shape] = {}
        self._number = description.dtype
        first, last = description.layers[0], description.layers[-1]
        self.before = description.before
        x, features = self._prepare(preparation), description.before
        if not np.array_equal(description.entry, np.arange(len(description.entry))):
            x, features = self._node("Flatten", x, axis=1), description.entry.shape
            x = self._node("Gather", x, self._integers(description.entry), axis=1)
        x = self._reshaped(x, features, first.before)
        for layer in description.layers:
            x = self._layer(layer, x)
        x = self._reshaped(x, last.after, description.after)
        self._node("Identity", x, output=OUTPUT)

    def _prepare(self, preparation: Preparation | None) -> str:
        """Adds what makes the network's input of a step's values, and returns its name."""
        match preparation:
            case None | SequencePreparation():
                return INPUT
            case RecordingPreparation(values="counted", order="forward"):
                return INPUT
            case RecordingPreparation(values="clipped", order="forward"):
                return self._node("Min", INPUT, self._numbers(1.0))
            case DigitPreparation(encoding=encoding, max_rate=rate):
                spikes = encoding != "constant"
                return INPUT if spikes else self._node("Mul", INPUT, self._numbers(rate))
            case PixelPreparation(max_rate=rate):
                centred = self._node("Sub", INPUT, self._numbers(MEAN_PIXEL))
                return self._node("Mul", centred, self._numbers(rate))
            case SeriesPreparation(encoding="current", block=1):
                return self._series(preparation)
        raise ValueError(
            f"{type(preparation).__name__} of this network looks at more than a step and the one "
            "before: export network.model, and prepare its input outside"
        )

    def _series(self, preparation: SeriesPreparation) -> str:
        """The standardised values, and their changes since the step before."""
        self.before = tuple(preparation.mean.shape)
        centred = self._node("Sub", INPUT, self._numbers(preparation.mean))
        x = self._node("Div", centred, self._numbers(preparation.deviation))
        before, started = (self._state(f"input.{name}", self.before) for name in ("x", "started"))
        change = self._node("Mul", started, self._node("Sub", x, before))  # 0 at the first step
        change = self._node("Div", change, self._numbers(preparation.change))
        self._next(before, x)
        self._next(started, self._node("Max", started, self._numbers(1.0)))
        return self._node("Concat", x, change, axis=1)

    def _layer(self, layer: Layer, x: str) -> str:
        """Adds the nodes of a layer, and returns the name of its output."""
        name = layer.name
        match layer:
            case kinds.Flattening():
                return self._node("Flatten", x, axis=1)
            case kinds.Weights(weight=weight, bias=bias):
                return self._node("Gemm", x, self._numbers(weight), self._numbers(bias), transB=1)
            case kinds.Convolution(weight=weight, bias=bias, groups=groups):
                window = self._window(layer, weight.shape[2:])
                numbers = self._numbers(weight), self._numbers(bias)
                return self._node("Conv", x, *numbers, group=groups, **window)
            case kinds.MaxPooling(size=size):
                return self._node("MaxPool", x, **self._window(layer, size))
            case kinds.Filter(alpha=alpha, beta=beta):
                f = self._node("Mul", self._numbers(beta[0]), x)
                for letter, coefficients, newest in (("x", beta[1:], x), ("F", alpha, None)):
                    past = [
                        self._state(f"{name}.{letter}[t-{lag}]", layer.before)
                        for lag in range(1, len(coefficients) + 1)
                    ]
                    for weight, value in zip(coefficients, past, strict=True):
                        f = self._node("Add", f, self._node("Mul", self._numbers(weight), value))
                    for state, value in zip(past, [newest or f, *past], strict=False):
                        self._next(state, value)
                return f
            case kinds.Neuron():
                return self._neuron(layer, x)
            case kinds.Readout():
                return self._readout(layer, x)

    def _neuron(self, layer: kinds.Neuron, current: str) -> str:
        """V = lambda V + I - R;  S = V > 1;  R = theta R + v_reset S."""
        reset = self._state(f"{layer.name}.reset", layer.before)
        if layer.membrane_decay.any():
            membrane = self._state(f"{layer.name}.membrane", layer.before)
            decayed = self._node("Mul", membrane, self._numbers(layer.membrane_decay))
            potential = self._node("Sub", self._node("Add", decayed, current), reset)
            self._next(membrane, potential)
        else:
            potential = self._node("Sub", current, reset)
        above = self._node("Greater", potential, self._numbers(THRESHOLD))
        spikes = self._node("Where", above, self._numbers(1.0), self._numbers(0.0))
        decayed = self._node("Mul", reset, self._numbers(layer.reset_decay))
        jump = self._node("Mul", spikes, self._numbers(layer.reset_strength))
        self._next(reset, self._node("Add", decayed, jump))
        return spikes

    def _readout(self, layer: kinds.Readout, x: str) -> str:
        """The readout of the steps so far."""
        if layer.kind == "last":
            return x
        before = self._state(f"{layer.name}.{layer.kind}", layer.before)
        if layer.kind == "leaky":
            old = self._node("Mul", before, self._numbers(layer.decay))
            value = self._node("Add", self._node("Mul", x, self._numbers(1 - layer.decay)), old)
        elif layer.kind == "maximum":
            started = self._state(f"{layer.name}.started", layer.before)
            first = self._node("Equal", started, self._numbers(0.0))
            value = self._node("Where", first, x, self._node("Max", x, before))
            self._next(started, self._node("Max", started, self._numbers(1.0)))
        else:
            value = self._node("Add", before, x)
        self._next(before, value)
        if layer.kind == "mean":
            steps = self._state(f"{layer.name}.steps", layer.before)
            count = self._node("Add", steps, self._numbers(1.0))
            self._next(steps, count)
            value = self._node("Div", value, count)
        return value

    def _window(self, layer: kinds.Convolution | kinds.MaxPooling, size: Shape) -> dict:
        """The attributes of a convolution or a pooling.

        What is padded below and to the right is what the output's size takes, whichever way PyTorch
        rounds it.
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

    def _node(self, operator: str, *inputs: str, output: str = "", **attributes: object) -> str:
        output = output or f"{operator}_{len(self.nodes)}"
        self.nodes.append((operator, list(inputs), output, attributes))
        return output

    def _numbers(self, values: np.ndarray | float) -> str:
        return self._constant(np.asarray(values, self._number))

    def _integers(self, values: Sequence[int]) -> str:
        return self._constant(np.asarray(values, np.int64))

    def _constant(self, array: np.ndarray) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.ascontiguousarray(array)
        return name

    def _reshaped(self, x: str, before: Shape, after: Shape) -> str:
        same = tuple(before) == tuple(after)
        return x if same else self._node("Reshape", x, self._integers([-1, *after]))

    def _state(self, name: str, features: Shape) -> str:
        self.states[name] = features
        return name

    def _next(self, state: str, value: str) -> None:
        self._node("Identity", value, output=state + NEXT)

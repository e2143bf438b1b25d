"""What a network computes in one time step, as arrays: what both ways out of PyTorch begin with.

:func:`describe` walks once through a network and returns a :class:`Description`. The compiled
network (``compiled.py``) and the ONNX graph (``onnx_graph.py``) are made from it and never look at
the network itself. To add a kind of layer, add its dataclass, an entry in ``READERS``, and what the
two make of it.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from snn_lib.containers import Output, PerStep, Sequential, StatefulModule
from snn_lib.errors import one_line
from snn_lib.neurons import SpikingNeuron
from snn_lib.readout import READOUTS
from snn_lib.synapses import IIRSynapse

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One step of one layer.

    Attributes:
        name: where the layer is in the network, such as ``layers.3``.
        before, after: the features of its input and of its output, without time and batch.
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

    ``padding`` is what lies above and left of the map.
    """

    weight: np.ndarray
    bias: np.ndarray
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class MaxPooling(Layer):
    """An ``nn.MaxPool2d``: the largest value of every window of this ``size``."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@dataclass(frozen=True)
class Flattening(Layer):
    """Maps as one row of features, in PyTorch's order; no arithmetic."""


@dataclass(frozen=True)
class Filter(Layer):
    """A synapse: alpha ``(P, *features)`` and beta ``(Q + 1, *features)``."""

    alpha: np.ndarray
    beta: np.ndarray


@dataclass(frozen=True)
class Neuron(Layer):
    """Spiking neurons: theta, v_reset and lambda, each ``(*features)``."""

    reset_decay: np.ndarray
    reset_strength: np.ndarray
    membrane_decay: np.ndarray


@dataclass(frozen=True)
class Readout(Layer):
    """A readout, whose output at every step is that of the sequence up to there.

    Attributes:
        kind: a name of ``snn_lib.readout.READOUTS``.
        decay: lambda of the leaky one.
    """

    kind: str
    decay: float


@dataclass(frozen=True)
class Description:
    """A network as what it computes in one step.

    Attributes:
        before, after: the features of a step's input and output.
        entry: for each feature of the first layer's input, in PyTorch's order, which feature of the
            network's input it is.
        layers: in order.
        dtype: float32 or float64.
    """

    before: Shape
    after: Shape
    entry: np.ndarray
    layers: tuple[Layer, ...]
    dtype: np.dtype


def describe(network: nn.Module, shape: Sequence[int] | None = None) -> Description:
    """Reads a network into a :class:`Description`.

    The network is a :class:`snn_lib.Sequential`, or a module around one whose ``forward`` may
    rearrange and repeat a step's features before it, and rearrange and add up its output. A
    Sequential inside the Sequential is read as its layers. Dropout is off, as in evaluation.

    Args:
        network: what is read; it is not changed.
        shape: the features of a step of its input, such as ``(28, 28)``. Needed if the first layer
            does not tell them: it takes maps of any size, or features are repeated before it.

    Raises:
        ValueError: only PyTorch can run a layer or the module around the Sequential, the shape is
            missing or does not fit, or a dtype is neither float32 nor float64. The message names
            the layer.
    """
    network = copy.deepcopy(network).cpu().eval().requires_grad_(False)
    dtype = _dtype_of(network)
    name, inner = _sequential_of(network)
    before = _input_shape(inner, name) if shape is None else tuple(shape)
    around = _Surroundings(network, name, before)
    if shape is None and around.features != before:
        raise ValueError(
            f"{type(network).__name__}.forward changes the features before its Sequential: give "
            "those of its input, such as shape=(28, 28)"
        )
    layers = list(_walk(inner, name, around.features, dtype))
    if not layers:
        raise ValueError(f"{type(network).__name__} has no layers")
    layers += around.sums(layers[-1].after)
    return Description(before, around.after, around.entry, tuple(layers), dtype)


def _dtype_of(network: nn.Module) -> np.dtype:
    """In what the network computes, float32 or float64."""
    found = set()
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point() or tensor.is_complex():
            if tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{name} is {tensor.dtype}: expected a network in float32 or float64, such as "
                    "network.float()"
                )
            found.add(tensor.dtype)
    return np.dtype("float64" if torch.float64 in found else "float32")


def _sequential_of(network: nn.Module) -> tuple[str, Sequential]:
    """The one Sequential that the network is or has, and its name in the network."""
    found: dict[str, Sequential] = {}
    for name, module in network.named_modules():
        inside = "" in found or any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, Sequential) and not inside:
            found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"{type(network).__name__} has {len(found)} parts that are a snn_lib.Sequential: "
            "expected one, around which its forward does no arithmetic"
        )
    return found.popitem()


def _input_shape(inner: nn.Module, name: str) -> Shape:
    """The features that the first layer takes, if it tells them."""
    while isinstance(inner, (Sequential, nn.Sequential)) and len(inner):
        child, inner = next(iter(inner._modules.items()))
        name = f"{name}.{child}".lstrip(".")
    if isinstance(inner, nn.Linear):
        return (inner.in_features,)
    shape = getattr(inner, "shape", None)
    if not shape or 1 in shape[1:]:
        raise ValueError(
            f"{name} ({type(inner).__name__}) does not tell the features of the input: give them, "
            "such as shape=(28, 28)"
        )
    return tuple(shape)


class _Arrival(Exception):
    """Carries what the Sequential would be given."""


class _Stand(StatefulModule):
    """Stands in for the Sequential: it gives a reply, or hands out what it is given."""

    reply: Tensor | None = None

    def forward(self, x: Tensor, state: object = None, lengths: Tensor | None = None) -> Output:
        if self.reply is None:
            raise _Arrival(x)
        return Output(self.reply, state)


class _Surroundings:
    """What a network's ``forward`` does around its Sequential, found out by running it.

    The features of a step are numbered: where a number arrives tells where its feature goes. An
    output of zeros with a single one tells what the forward makes of that feature. Random numbers
    then tell whether that is all it does.

    Attributes:
        features: of the input of the Sequential.
        entry: which of the network's features each of them is.
        after: the features of the network's output, once ``sums`` has been read.
    """

    def __init__(self, network: nn.Module, name: str, before: Shape) -> None:
        self.network, self.before, self.stand = network, before, _Stand()
        if name:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, self.stand)
        else:
            self.network = self.stand
        numbers = torch.arange(math.prod(before), dtype=torch.float64)
        given = self._input(numbers.view(1, 1, *before))
        self.features = tuple(given.shape[2:])
        self.entry = given.flatten().long().clamp(0, len(numbers) - 1).numpy()
        self.x = _random(3, 2, *before) * _random(3, 2, *before).mul(4).exp2()  # of all sizes
        given = self._input(self.x)
        if not torch.equal(given.flatten(2), self.x.flatten(2)[..., self.entry]):
            self._refuse("computes with its input before")

    def sums(self, inner: Shape) -> Iterator[Layer]:
        """What the forward makes of the Sequential's output of these features, as layers."""
        reply = _random(3, 2, *inner)
        output = self._output(self.x, reply)
        self.after = tuple(output.shape[2:])
        if output.shape == reply.shape and torch.equal(output, reply):
            return
        count, name = math.prod(inner), type(self.network).__name__
        ones = torch.eye(count, dtype=torch.float64).view(1, count, *inner)
        x = torch.zeros(1, count, *self.before, dtype=torch.float64)
        matrix = self._output(x, ones)[0].flatten(1)
        if not torch.allclose(output.flatten(2), reply.flatten(2) @ matrix):
            self._refuse("does more than add up output after")
        outputs = matrix.shape[1]
        yield Flattening(name, inner, (count,))
        yield Weights(name, (count,), (outputs,), matrix.T.numpy(), np.zeros(outputs))

    def _input(self, x: Tensor) -> Tensor:
        """What the Sequential is given of an input."""
        self.stand.reply = None
        try:
            self.network(x)
        except _Arrival as arrival:
            return arrival.args[0]
        except Exception as error:  # whatever a user's forward raises
            shape = self.before
            self._refuse(f"refuses features of the shape {shape} ({one_line(error)}) before")
        self._refuse("does not run")

    def _output(self, x: Tensor, reply: Tensor) -> Tensor:
        """What the network returns if the Sequential gives this reply."""
        self.stand.reply = reply
        try:
            output, _ = self.network(x)
            return output
        except Exception as error:
            self._refuse(f"returns no output and state ({one_line(error)}) after")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"{type(self.network).__name__}.forward {what} its Sequential: expected that it "
            "rearranges and repeats features before it, and adds up its output"
        ) from None


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _walk(
    module: nn.Module, name: str, before: Shape, dtype: np.dtype, leading: int = 2
) -> Iterator[Layer]:
    """The layers of a module, in order; inside :class:`PerStep` there is one ``leading`` dimension.

    A layer is known by its ``forward``: a subclass with another one is another kind.
    """
    kind = type(module).__name__
    here = f"{name} ({kind})" if name else kind
    if type(module).forward in (Sequential.forward, nn.Sequential.forward):
        for child, part in module._modules.items():  # a part that is used twice is there twice
            for layer in _walk(part, f"{name}.{child}".lstrip("."), before, dtype, leading):
                before = layer.after
                yield layer
    elif type(module).forward is PerStep.forward:
        yield from _walk(module.module, f"{name}.module", before, dtype, leading=1)
    elif type(module).forward not in READERS:
        raise ValueError(f"{here} runs in PyTorch alone: it can be neither compiled nor exported")
    else:
        # On the meta device PyTorch works out shapes alone.
        x = torch.zeros(*[1] * leading, *before, dtype=getattr(torch, dtype.name), device="meta")
        try:
            output = copy.deepcopy(module).to("meta")(x)
            output = output[0] if isinstance(output, tuple) else output
            gone = isinstance(module, tuple(READOUTS.values()))  # the time
            after = tuple(output.shape[leading - gone :])
            yield from READERS[type(module).forward](module, name, before, after)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"{here} on features of the shape {before}: {one_line(error)}"
            ) from None


def _nothing(module: nn.Module, name: str, before: Shape, after: Shape) -> list[Layer]:
    """A layer that passes on what it is given."""
    return []


def _linear(module: nn.Linear, name: str, before: Shape, after: Shape) -> list[Layer]:
    if len(before) != 1:
        raise ValueError("it takes the last dimension alone, put nn.Flatten(2) before it")
    return [Weights(name, before, after, *_weight_and_bias(module))]


def _convolution(module: nn.Conv2d, name: str, before: Shape, after: Shape) -> list[Layer]:
    if module.padding_mode != "zeros":
        raise ValueError(f"padding_mode is {module.padding_mode!r}, expected 'zeros'")
    padding = module.padding
    if padding == "same":
        spans = zip(module.dilation, module.kernel_size, strict=True)
        padding = tuple(dilation * (size - 1) // 2 for dilation, size in spans)
    elif padding == "valid":
        padding = (0, 0)
    window = module.stride, padding, module.dilation, module.groups
    return [Convolution(name, before, after, *_weight_and_bias(module), *window)]


def _average(module: nn.AvgPool2d, name: str, before: Shape, after: Shape) -> list[Layer]:
    """A convolution of every map with equal weights."""
    size, stride, padding = map(_pair, (module.kernel_size, module.stride, module.padding))
    padded = padding != (0, 0) and not module.count_include_pad
    if module.ceil_mode or padded or module.divisor_override:
        raise ValueError(
            "expected no ceil_mode, no divisor_override, and padding that counts in the mean"
        )
    weight = np.full((before[0], 1, *size), 1 / math.prod(size))
    window = stride, padding, (1, 1), before[0]
    return [Convolution(name, before, after, weight, np.zeros(before[0]), *window)]


def _maximum(module: nn.MaxPool2d, name: str, before: Shape, after: Shape) -> list[Layer]:
    if module.return_indices:
        raise ValueError("return_indices is True, expected False")
    window = module.kernel_size, module.stride, module.padding, module.dilation
    return [MaxPooling(name, before, after, *map(_pair, window))]


def _flattening(module: nn.Flatten, name: str, before: Shape, after: Shape) -> list[Layer]:
    if after != (math.prod(before),):
        raise ValueError("expected that it makes one row of all features of a step")
    return [Flattening(name, before, after)]


def _filter(module: IIRSynapse, name: str, before: Shape, after: Shape) -> list[Layer]:
    coefficients = module.effective_alpha(), module.beta
    return [Filter(name, before, after, *(_over(values, before) for values in coefficients))]


def _neuron(module: SpikingNeuron, name: str, before: Shape, after: Shape) -> list[Layer]:
    coefficients = module.reset_decay, module.reset_strength, module.membrane_decay
    rows = (_over(values[None], before)[0] for values in coefficients)
    return [Neuron(name, before, after, *rows)]


def _readout(module: nn.Module, name: str, before: Shape, after: Shape) -> list[Layer]:
    (kind,) = (kind for kind, readout in READOUTS.items() if isinstance(module, readout))
    return [Readout(name, before, after, kind, getattr(module, "decay", 0.0))]


def _weight_and_bias(module: nn.Linear | nn.Conv2d) -> tuple[np.ndarray, np.ndarray]:
    weight = module.weight.numpy()
    return weight, np.zeros(len(weight)) if module.bias is None else module.bias.numpy()


def _over(coefficients: Tensor, features: Shape) -> np.ndarray:
    """Coefficients ``(order, *shape)`` for every feature, ``(order, *features)``."""
    return coefficients.expand(len(coefficients), *features).numpy()


def _pair(number: int | Sequence[int]) -> tuple[int, int]:
    return (number, number) if isinstance(number, int) else tuple(number)


# What reads a layer, by the layer's forward.
READERS: dict[Callable, Callable[[nn.Module, str, Shape, Shape], list[Layer]]] = {
    nn.Identity.forward: _nothing,
    nn.Dropout.forward: _nothing,
    nn.Dropout2d.forward: _nothing,
    nn.Linear.forward: _linear,
    nn.Conv2d.forward: _convolution,
    nn.AvgPool2d.forward: _average,
    nn.MaxPool2d.forward: _maximum,
    nn.Flatten.forward: _flattening,
    IIRSynapse.forward: _filter,
    SpikingNeuron.forward: _neuron,
    **{readout.forward: _readout for readout in READOUTS.values()},
}

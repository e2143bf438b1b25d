"""Describes what a network computes in one time step.

:func:`describe` reads a network once. The compiled network and the ONNX graph are both made from
its description, and never look at the network itself.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from snn_lib.containers import Output, Sequential
from snn_lib.errors import one_line
from snn_lib.inference.layers import (
    Flattening,
    Layer,
    Shape,
    Weights,
    fold_normalisations,
    read,
)


@dataclass(frozen=True)
class Description:
    """What a network computes in one step.

    Attributes:
        before, after: the shapes of one step of the input and of the output.
        entry: for each feature of the first layer's input, in PyTorch's order, the number of the
            feature of the network's input that it is.
        layers: the layers, in order.
        dtype: float32 or float64.
    """

    before: Shape
    after: Shape
    entry: np.ndarray
    layers: tuple[Layer, ...]
    dtype: np.dtype


def describe(network: nn.Module, shape: Sequence[int] | None = None) -> Description:
    """Reads a network into a :class:`Description`.

    The network is a :class:`snn_lib.Sequential`, or a module around one. The module's ``forward``
    may rearrange and repeat the features of a step before the Sequential, and rearrange and add up
    its output. The layers of a Sequential inside the Sequential are read one by one. Dropout is
    off, as in evaluation.

    Args:
        network: the network, which is not changed.
        shape: the shape of one step of the input, such as ``(28, 28)``. It is needed if the first
            layer takes maps of any size, or if features are repeated before it. A network that
            :func:`snn_lib.load` returns has it from its preparation.

    Raises:
        ValueError: only PyTorch can run a layer or the module around the Sequential, the shape is
            missing or does not fit, or a dtype is neither float32 nor float64. The message names
            the layer.
    """
    preparation = getattr(network, "preparation", None)
    if shape is None and preparation is not None:
        shape = preparation.features
    network = copy.deepcopy(network).cpu().eval().requires_grad_(False)
    dtype = _dtype_of(network)
    name, inner = _sequential_of(network)
    before = _input_shape(inner, name) if shape is None else tuple(shape)
    around = _Surroundings(network, inner, before)
    if shape is None and around.features != before:
        raise ValueError(
            f"{type(network).__name__}.forward changes the features before its Sequential: give "
            "the shape of one step of its input, such as shape=(28, 28)"
        )
    layers = fold_normalisations(read(inner, name, around.features, dtype))
    if all(isinstance(layer, Flattening) for layer in layers):
        raise ValueError(f"{type(network).__name__} has no layers that compute anything")
    layers += around.sums(layers[-1].after)
    return Description(before, around.after, around.entry, tuple(layers), dtype)


def _dtype_of(network: nn.Module) -> np.dtype:
    """The dtype in which the network computes, float32 or float64."""
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
    """The name of the one Sequential that the network is or contains, and the Sequential itself."""
    found: dict[str, Sequential] = {}
    for name, module in network.named_modules():
        inside = "" in found or any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, Sequential) and not inside:
            found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"{type(network).__name__} has {len(found)} parts that are a snn_lib.Sequential, "
            "expected one, and a forward that does no arithmetic around it"
        )
    return found.popitem()


def _input_shape(inner: nn.Module, name: str) -> Shape:
    """The features that the first layer takes, if it determines them."""
    while isinstance(inner, (Sequential, nn.Sequential)) and len(inner):
        child, inner = next(iter(inner._modules.items()))
        name = f"{name}.{child}".lstrip(".")
    if isinstance(inner, nn.Linear):
        return (inner.in_features,)
    shape = getattr(inner, "shape", None)
    if not shape or 1 in shape[1:]:
        raise ValueError(
            f"{name} ({type(inner).__name__}) takes inputs of several shapes: give the shape of "
            "one step, such as shape=(28, 28)"
        )
    return tuple(shape)


class _Arrival(Exception):
    """Carries the input of the Sequential out of the network's forward."""


class _Surroundings:
    """Finds out what a network's ``forward`` does around its Sequential, by running it.

    The input of the first run holds the numbers of the features, so the numbers that reach the
    Sequential say which features it is given. Then every feature of the Sequential's output in turn
    is set to one and all others to zero, which shows what the forward makes of it. A run with
    random numbers checks that the forward does nothing else.

    Attributes:
        features: the shape of one step of the Sequential's input.
        entry: for each of its features, the number of the network's feature that it is.
        after: the shape of one step of the network's output, once ``sums`` has been read.
    """

    def __init__(self, network: nn.Module, inner: Sequential, before: Shape) -> None:
        self.network, self.before = network, before
        self.reply: Tensor | None = None
        inner.forward = self._stand_in
        numbers = torch.arange(math.prod(before), dtype=torch.float64)
        given = self._input(numbers.view(1, 1, *before))
        self.features = tuple(given.shape[2:])
        self.entry = given.flatten().long().clamp(0, len(numbers) - 1).numpy()
        self.x = _random(3, 2, *before) * _random(3, 2, *before).mul(4).exp2()  # of all sizes
        given = self._input(self.x)
        if not torch.equal(given.flatten(2), self.x.flatten(2)[..., self.entry]):
            self._refuse("computes with its input before")

    def sums(self, inner: Shape) -> Iterator[Layer]:
        """The layers that do what the forward does with the Sequential's output, ``inner``."""
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

    def _stand_in(self, x: Tensor, state: object = None, lengths: Tensor | None = None) -> Output:
        """Takes the place of the Sequential's forward: returns the reply if there is one."""
        if self.reply is None:
            raise _Arrival(x)
        return Output(self.reply, state)

    def _input(self, x: Tensor) -> Tensor:
        """The input of the Sequential when the network is given ``x``."""
        self.reply = None
        try:
            self.network(x)
        except _Arrival as arrival:
            return arrival.args[0]
        except Exception as error:  # whatever a user's forward raises
            shape = self.before
            self._refuse(f"refuses features of the shape {shape} ({one_line(error)}) before")
        self._refuse("does not run")

    def _output(self, x: Tensor, reply: Tensor) -> Tensor:
        """The network's output if the Sequential returns ``reply``."""
        self.reply = reply
        try:
            output, _ = self.network(x)
            return output
        except Exception as error:
            self._refuse(f"returns no output and state ({one_line(error)}) after")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"{type(self.network).__name__}.forward {what} its Sequential: it may only rearrange "
            "and repeat features before it, and add up its output"
        ) from None


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, dtype=torch.float64, generator=generator)

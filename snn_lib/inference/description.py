"""Describes what a network computes in one time step.

:func:`describe` reads a network once. The compiled network and the ONNX graph are both made from
its description, and never look at the network itself.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from snn_lib.chunks import Chunked
from snn_lib.containers import Output, Sequential
from snn_lib.data.preparation import Preparation
from snn_lib.errors import one_line
from snn_lib.inference.layers import (
    Flattening,
    Layer,
    Shape,
    Weights,
    fold_normalisations,
    read,
)
from snn_lib.pytorch_private import forward_hooks

CPU = {"dtype": torch.float64, "device": "cpu"}  # whatever the default device is


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
        ValueError: only PyTorch can run a layer or the module around the Sequential, a module has
            hooks, the shape is missing or does not fit, or a dtype is neither float32 nor float64.
            The message names the layer.
    """
    for name, module in network.named_modules():
        if forward_hooks(module):
            raise ValueError(
                f"{name or 'the network'} ({type(module).__name__}) has hooks, which only PyTorch "
                "can call: remove them, and make pruning permanent by torch.nn.utils.prune.remove"
            )
    preparation = getattr(network, "preparation", None)
    if shape is None and isinstance(preparation, Preparation):
        shape = preparation.features
    network = _without_chunks(copy.deepcopy(network)).cpu().eval().requires_grad_(False)
    dtype = _dtype_of(network)
    name, inner = _sequential_of(network)
    before = _input_shape(inner, name) if shape is None else tuple(shape)
    around = _Surroundings(network, inner)
    features, entry = around.read_input(before)
    if shape is None and features != before:
        raise ValueError(
            f"{type(network).__name__}.forward changes the features before its Sequential: give "
            "the shape of one step of its input, such as shape=(28, 28)"
        )
    layers = fold_normalisations(read(inner, name, features, dtype))
    if all(isinstance(layer, Flattening) for layer in layers):
        raise ValueError(f"{type(network).__name__} has no layers that compute anything")
    after, sums = around.read_output(before, layers[-1].after)
    return Description(before, after, entry, (*layers, *sums), dtype)


def _without_chunks(network: nn.Module) -> nn.Module:
    """The network as it runs over whole sequences, which computes the same."""
    while isinstance(network, Chunked):
        network = network.module
    for name, module in network._modules.items():
        if module is not None:
            network._modules[name] = _without_chunks(module)
    return network


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
        child, inner = next(inner.named_children())
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

    Before the Sequential, it may rearrange and repeat features. So each feature of the input is
    given its own number as value, and the numbers that arrive at the Sequential say which features
    they are. Behind it, the forward may rearrange and add up features. So each feature of the
    Sequential's output in turn is one and all others are zero, and what the network then returns is
    a row of a matrix. Each time, a run with random numbers checks that the forward does no more.
    """

    def __init__(self, network: nn.Module, inner: Sequential) -> None:
        self.network, self.inner = network, inner

    def read_input(self, before: Shape) -> tuple[Shape, np.ndarray]:
        """What the Sequential is given if the network is given features of the shape ``before``.

        Returns the shape of its input, and for each feature the number of the network's feature
        that it is.
        """
        count = math.prod(before)
        arrived = self._arrival(torch.arange(count, **CPU).view(1, 1, *before))
        entry = arrived.flatten().long().clamp(0, count - 1)
        x = _random_input(before)
        if not torch.equal(self._arrival(x).flatten(2), x.flatten(2)[..., entry]):
            self._refuse("computes with its input before")
        return tuple(arrived.shape[2:]), entry.numpy()

    def read_output(self, before: Shape, inner: Shape) -> tuple[Shape, list[Layer]]:
        """What the network returns if the Sequential returns features of the shape ``inner``.

        Returns the shape of its output, and the layers that make it of the Sequential's.
        """
        reply = _random(3, 2, *inner)
        output = self._output(_random_input(before), reply)
        if output.dim() < 3 or output.shape[:2] != reply.shape[:2]:
            self._refuse("does not return an output for each step after")
        after = tuple(output.shape[2:])
        if output.shape == reply.shape and torch.equal(output, reply):
            return after, []
        count, name = math.prod(inner), type(self.network).__name__
        one_each = torch.eye(count, **CPU).view(1, count, *inner)
        zeros = torch.zeros(1, count, *before, **CPU)
        matrix = self._output(zeros, one_each)[0].flatten(1)
        if not torch.allclose(output.flatten(2), reply.flatten(2) @ matrix):
            self._refuse("does more than add up output after")
        outputs = matrix.shape[1]
        weights = Weights(name, (count,), (outputs,), matrix.T.numpy(), np.zeros(outputs))
        return after, [Flattening(name, inner, (count,)), weights]

    def _arrival(self, x: Tensor) -> Tensor:
        """The input of the Sequential if the network is given ``x``."""

        def arrive(x: Tensor, state: object = None, lengths: Tensor | None = None) -> NoReturn:
            raise _Arrival(x)

        self.inner.forward = arrive
        try:
            self.network(x)
        except _Arrival as arrival:
            return arrival.args[0]
        except Exception as error:  # whatever a user's forward raises
            shape = tuple(x.shape[2:])
            self._refuse(f"refuses features of the shape {shape} ({one_line(error)}) before")
        self._refuse("does not run")

    def _output(self, x: Tensor, reply: Tensor) -> Tensor:
        """The network's output for ``x`` if the Sequential returns ``reply``."""
        self.inner.forward = lambda x, state=None, lengths=None: Output(reply, state)
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


def _random_input(features: Shape) -> Tensor:
    """Random numbers of all sizes."""
    return _random(3, 2, *features) * _random(3, 2, *features).mul(4).exp2()


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, **CPU, generator=torch.Generator("cpu").manual_seed(0))

"""Describes what a network computes in one time step.

:func:`describe` reads a network once. The compiled network and the ONNX graph are both made from
its description, and never look at the network itself.
"""

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack
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
    Normalisation,
    Shape,
    Weights,
    fold_normalisations,
    is_read,
    read,
)
from snn_lib.kernels import use_backend
from snn_lib.pytorch_private import forward_hooks

STEPS = 32  # of the run in PyTorch with which a description is compared
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
        run: what each layer of the Sequential was given and returned in one run in PyTorch, each
            ``(T, features)``.
    """

    before: Shape
    after: Shape
    entry: np.ndarray
    layers: tuple[Layer, ...]
    dtype: np.dtype
    run: tuple[tuple[np.ndarray, np.ndarray], ...]


def describe(network: nn.Module, shape: Sequence[int] | None = None) -> Description:
    """Reads a network into a :class:`Description`.

    The network is a :class:`snn_lib.Sequential`, or a module around one. The module's ``forward``
    may rearrange and repeat the features of a step before the Sequential, and rearrange and add up
    its output. The layers of a Sequential inside the Sequential are read one by one. Dropout is
    off, as in evaluation.

    The network also runs once in PyTorch, on 32 steps of random numbers, most of them between 1/300
    and 300 in size, and what surrounds the Sequential has to compute there what was read. What a
    ``forward`` does only after more steps or to larger numbers is not seen.

    Args:
        network: the network, which is not changed.
        shape: the shape of one step of the input, such as ``(28, 28)``. It is needed if the first
            layer takes maps of any size, or if features are repeated before it. A network that
            :func:`snn_lib.load` returns has it from its preparation.

    Raises:
        ValueError: only PyTorch can run a layer or the module around the Sequential, a module has
            hooks or a ``forward`` of its own, the shape is missing or does not fit, or a dtype is
            neither float32 nor float64. The message names the layer.
    """
    for name, module in network.named_modules():
        if forward_hooks(module):
            raise ValueError(
                f"{name or 'the network'} ({type(module).__name__}) has hooks, which only PyTorch "
                "can call: remove them, and make pruning permanent by torch.nn.utils.prune.remove"
            )
        if "forward" in vars(module):
            raise ValueError(
                f"{name or 'the network'} ({type(module).__name__}) has a forward that was set on "
                "the module itself, which only PyTorch can call: define it in a class"
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
    read_layers = list(read(inner, name, features, dtype))
    layers = fold_normalisations(read_layers)
    if all(isinstance(layer, Flattening) for layer in layers):
        raise ValueError(f"{type(network).__name__} has no layers that compute anything")
    after, sums = around.read_output(before, layers[-1].after)
    run = around.run(before, entry, layers[-1].after, sums, getattr(torch, dtype.name))
    layers = *layers, *sums
    return Description(before, after, entry, layers, dtype, _by_layer(read_layers, run))


def _by_layer(
    layers: Sequence[Layer], run: Sequence[tuple[Tensor, Tensor]]
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """What each layer was given and returned, once normalisations are part of the weights."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for layer, (x, y) in zip(layers, run, strict=True):
        y = y.reshape(-1, math.prod(layer.after)).numpy()
        if isinstance(layer, Normalisation):
            pairs[-1] = pairs[-1][0], y
        else:
            pairs.append((x.reshape(-1, math.prod(layer.before)).numpy(), y))
    return tuple(pairs)


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

    @torch.no_grad()
    def run(
        self,
        before: Shape,
        entry: np.ndarray,
        inner: Shape,
        sums: list[Layer],
        dtype: torch.dtype,
    ) -> list[tuple[Tensor, Tensor]]:
        """Runs the network as it is, and compares what its forward does with what was read.

        Returns what each layer that was read was given and returned.
        """
        calls, pairs = [], []

        def call(x: Tensor, state: object = None, lengths: Tensor | None = None) -> Output:
            result = type(self.inner).forward(self.inner, x, state, lengths)
            calls.append((x, result[0]))
            return result

        def note(layer: nn.Module, given: tuple, result: Tensor | tuple) -> None:
            pairs.append((given[0], result[0] if isinstance(result, tuple) else result))

        x = _random_input(before, STEPS, 1).to(dtype)
        x = x.transpose(0, 1) if self.inner.batch_first else x
        self.inner.forward = call
        with ExitStack() as hooks, use_backend("eager"):  # which need not be compiled first
            for layer in filter(is_read, self.inner.modules()):
                hooks.enter_context(layer.register_forward_hook(note))
            try:
                output, _ = self.network(x)
            except Exception as error:
                self._refuse(f"fails in a run of {STEPS} steps ({one_line(error)}) around")
        if len(calls) != 1:
            self._refuse(f"runs {len(calls)} times, expected once,")
        ((arrived, reply),) = calls
        if not torch.equal(arrived.reshape(STEPS, -1), x.reshape(STEPS, -1)[:, entry]):
            self._refuse("computes with its input before")
        expected = reply.flatten(0, -1 - len(inner)).flatten(1)  # a readout leaves no time
        for layer in sums[1:]:
            expected = expected @ torch.from_numpy(layer.weight.T).to(dtype)
        output = output.reshape(len(expected), -1)
        tolerance = 1e-4 * reply.nan_to_num(posinf=0, neginf=0).abs().max()
        if not torch.allclose(output, expected, 0, float(tolerance), equal_nan=True):
            self._refuse("does more than add up output after")
        return pairs

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


def _random_input(features: Shape, steps: int = 3, batch: int = 2) -> Tensor:
    """Random numbers of all sizes."""
    size, number = _random(2, steps, batch, *features)
    return number * size.mul(4).exp2()


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, **CPU, generator=torch.Generator("cpu").manual_seed(0))

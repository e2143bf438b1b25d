"""Describes what a network computes in one time step.

:func:`describe` reads a network once. The compiled network, the ONNX graph, C and integers are made
from its description, and never look at the network itself.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snn_lib.cells import Recurrent
from snn_lib.chain import REMEDY, chain_of, is_at_rest, layers_of, refuse_hooks
from snn_lib.chunks import Chunked
from snn_lib.containers import PerStep, Sequential, check_module, feature_shape
from snn_lib.data.preparation import Preparation
from snn_lib.errors import one_line
from snn_lib.inference.layers import (
    READERS,
    Flattening,
    Layer,
    Normalisation,
    Rearrangement,
    Shape,
    fold_normalisations,
    is_read,
    read,
)
from snn_lib.kernels import use_backend
from snn_lib.observing import bind_call, state_given
from snn_lib.pytorch_private import comes_from_compile
from snn_lib.readout import EVERY_STEP, READOUTS

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

    The network is a :class:`snn_lib.Sequential`, or a module around one that hands its input on to
    it, see :func:`snn_lib.chain.chain_of`. The layers of a Sequential inside the Sequential are
    read one by one. Dropout is off, as in evaluation. The network also runs once in PyTorch, on 32
    steps of random numbers, most of them between 1/300 and 300 in size.

    Args:
        network: the network, which is not changed.
        shape: the shape of one step of the input, such as ``(28, 28)``. It is needed if the first
            layer takes maps of any size, or rearranges or repeats features. A network that
            :func:`snn_lib.load` returns has it from its preparation.

    Raises:
        ValueError: only PyTorch can run a layer, the network is no chain of layers, a module has
            hooks or a ``forward`` of its own, nobody can copy the network, the shape is missing or
            does not fit, or a dtype is neither float32 nor float64. The message names the layer.
        TypeError: the network is no module of PyTorch's.
    """
    check_module("the network", network)
    remedy = "remove them, and make pruning permanent by torch.nn.utils.prune.remove"
    refuse_hooks(network, f"which only PyTorch can call: {remedy}")
    for name, module in network.named_modules():
        if comes_from_compile(module):
            raise ValueError(
                f"{name or 'the network'} is what torch.compile returned: give the module that it "
                "was given"
            )
        if "forward" in vars(module):
            raise ValueError(
                f"{name or 'the network'} ({type(module).__name__}) has a forward that was set on "
                "the module itself, which only PyTorch can call: define it in a class"
            )
    preparation = preparation_of(network)
    if shape is None and preparation is not None:
        shape = preparation.features
    network = _without_chunks(_copy_of(network)).cpu().eval().requires_grad_(False)
    name, chain = chain_of(network)
    dtype = _dtype_of(chain, name)
    before = _input_shape(chain, name) if shape is None else feature_shape(shape)
    found = list(read(chain, name, before, dtype))
    entry, leading = np.arange(math.prod(before)), 0
    for layer in found:
        if not isinstance(layer, Rearrangement):
            break
        entry, leading = entry[layer.order], leading + 1
    read_layers = found[leading:]
    for layer in read_layers:
        if isinstance(layer, Rearrangement):
            raise ValueError(
                f"layer {layer.name} rearranges features between layers, which only PyTorch can: "
                "put it before the first layer that computes"
            )
    layers = tuple(fold_normalisations(read_layers))
    if all(isinstance(layer, Flattening) for layer in layers):
        raise ValueError(f"{type(network).__name__} has no layers that compute anything")
    run = _run(network, chain, before, getattr(torch, dtype.name))[leading:]
    return Description(before, layers[-1].after, entry, layers, dtype, _by_layer(read_layers, run))


def preparation_of(network: nn.Module) -> Preparation | None:
    """How the input of a network is prepared, if :func:`snn_lib.load` returned it."""
    preparation = getattr(network, "preparation", None)  # or another module of the user's
    return preparation if isinstance(preparation, Preparation) else None


def classes_of(network: nn.Module) -> Sequence[str]:
    """The names of a network's classes, if :func:`snn_lib.load` returned it."""
    classes = getattr(network, "classes", ())  # or something else of the user's
    return classes if isinstance(classes, (list, tuple)) else ()


def readout_of(network: nn.Module) -> str | None:
    """The readout that makes a class of a network's outputs so far, by its name if it has one.

    If the network answers at every step, that is the ``last`` output. A network that predicts
    numbers has none.

    Raises:
        ValueError: there is none of this name.
    """
    name = getattr(network, "readout", None)  # or another module of the user's
    if not isinstance(name, str) or getattr(network, "logit_scale", 1.0) is None:
        return None
    if name == EVERY_STEP:
        return "last"
    if name not in READOUTS:
        raise ValueError(f"readout is {name!r}, expected one of {', '.join(READOUTS)}")
    return name


@torch.no_grad()
def _run(
    network: nn.Module, chain: Sequential, before: Shape, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """What each layer that is read is given and returns, on random numbers of all sizes.

    Raises:
        ValueError: the network does more than its chain.
    """
    pairs, handed = [], []

    def note(layer: nn.Module, given: tuple, result: Tensor | tuple) -> None:
        pairs.append((given[0], result[0] if isinstance(result, tuple) else result))

    def note_chain(chain: nn.Module, given: tuple, named: dict, result: tuple) -> None:
        call = bind_call(chain, given, named)
        handed.append((call["x"] if is_at_rest(state_given(chain, call)) else None, result[0]))

    generator = torch.Generator("cpu").manual_seed(0)
    size, number = torch.randn(2, STEPS, 1, *before, **CPU, generator=generator)
    x = (number * size.mul(4).exp2()).to(dtype)
    x = x.transpose(0, 1) if chain.batch_first else x
    with ExitStack() as hooks, torch.autocast("cpu", enabled=False):
        hooks.enter_context(use_backend("eager"))  # which need not be compiled first
        read_layers = [layer for _, layer, _ in layers_of(chain) if is_read(layer)]
        for layer in dict.fromkeys(read_layers):  # one that is used twice has one hook
            hooks.enter_context(layer.register_forward_hook(note))
        hooks.enter_context(chain.register_forward_hook(note_chain, with_kwargs=True))
        try:
            result = network(x)
        except RuntimeError as error:
            raise ValueError(
                f"{type(network).__name__} does not run on steps of the shape {before} in "
                f"{dtype}: {one_line(error)}"
            ) from None
    output = result[0] if isinstance(result, tuple) else result
    whole = [tuple(map(id, pair)) for pair in handed] == [(id(x), id(output))]
    halved = any(y.dtype.itemsize < 4 for _, y in pairs)  # as by an autocast of its own
    if not whole or halved:
        raise ValueError(f"{type(network).__name__} does more than its Sequential: {REMEDY}")
    if len(pairs) != len(read_layers):
        raise ValueError(
            "a layer is also a part of another one, such as a Recurrent: give each layer parts of "
            "its own"
        )
    return pairs


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


def _copy_of(network: nn.Module) -> nn.Module:
    """A copy of a network. An output with gradients that it keeps is copied without them.

    Raises:
        ValueError: the network holds what nobody can copy, such as a file.
    """
    kept = [one for module in network.modules() for one in vars(module).values()]
    outputs = [one for value in kept for one in _tensors(value) if not one.is_leaf]
    try:
        return copy.deepcopy(network, {id(one): one.detach().clone() for one in outputs})
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{type(network).__name__} cannot be copied ({one_line(error)}): give the Sequential "
            "that it holds"
        ) from None


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, and in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _without_chunks(network: nn.Module) -> nn.Module:
    """The network as it runs over whole sequences, which computes the same."""
    while isinstance(network, Chunked):
        network = network.module
    for name, module in network._modules.items():
        if module is not None:
            network._modules[name] = _without_chunks(module)
    return network


def _dtype_of(chain: nn.Module, prefix: str) -> np.dtype:
    """The dtype in which a chain computes, float32 or float64."""
    found = set()
    for name, tensor in (*chain.named_parameters(prefix), *chain.named_buffers(prefix)):
        if tensor.is_floating_point() or tensor.is_complex():
            if tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{name} is {tensor.dtype}: expected a network in float32 or float64, such as "
                    "network.float()"
                )
            found.add(tensor.dtype)
    return np.dtype("float64" if torch.float64 in found else "float32")


def _input_shape(inner: nn.Module, name: str) -> Shape:
    """The features that the first layer takes, if it determines them."""
    while isinstance(inner, (Sequential, nn.Sequential, PerStep)) and any(inner.children()):
        child, inner = next(inner.named_children())
        name = f"{name}.{child}".lstrip(".")
    if isinstance(inner, nn.Linear):
        return (inner.in_features,)
    inner = inner.neuron if isinstance(inner, Recurrent) else inner
    shape = getattr(inner, "shape", None)
    if type(inner).forward in READERS and (not shape or 1 in shape[1:]):  # others are refused later
        raise ValueError(
            f"{name} ({type(inner).__name__}) takes inputs of several shapes: give the shape of "
            "one step, such as shape=(28, 28)"
        )
    return tuple(shape or ())

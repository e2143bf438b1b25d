"""Finds the chain of layers that a network is.

Whoever counts a network's operations, compiles it or exports it takes its layers one after the
other, from the :class:`snn_lib.Sequential` that it is or holds.
"""

import copy
from collections import deque
from collections.abc import Container, Iterator

from torch import nn

from snn_lib.chunks import Chunked
from snn_lib.containers import Output, PerStep, Sequential, runs_forward_of
from snn_lib.pytorch_private import forward_hooks

REMEDY = (
    "make what surrounds it layers of the Sequential, such as nn.Flatten(2), nn.Unflatten, "
    "snn_lib.ChannelsFirst, snn_lib.Repeat and snn_lib.Votes"
)


def chain_of(network: nn.Module) -> tuple[str, Sequential]:
    """The :class:`snn_lib.Sequential` that a network is, and its name in the network.

    A network may also hold one, or a :class:`snn_lib.Chunked` of one, if its ``forward`` hands its
    input on, without a state, and returns the output as they are. To find out, the ``forward`` runs
    once with an input and an output that nothing can be computed with. What it adds to a list or
    dictionary of the network is not there afterwards, unless that lies in another one.

    Raises:
        ValueError: there is not one Sequential, or the ``forward`` does more. The message says how
            to make the network a chain.
    """
    if isinstance(network, Chunked):
        return _within("module", network.module)
    kind = type(network)
    if runs_forward_of(network, Sequential):
        return "", network
    parts: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in parts)
        if name and isinstance(module, (Sequential, Chunked)) and not inside:
            parts[name] = module
    if len(parts) != 1 or isinstance(network, Sequential):
        raise ValueError(
            f"{kind.__name__} is no chain of layers: it has a forward of its own and {len(parts)} "
            "parts that are a snn_lib.Sequential, expected one with all its layers"
        )
    ((name, part),) = parts.items()
    if not _hands_on(network, part):
        raise ValueError(
            f"{kind.__name__}.forward does more than to hand its input to its Sequential, without "
            f"a state, and return what that returns: {REMEDY}"
        )
    return _within(name, part)


def layers_of(
    module: nn.Module, name: str = "", around: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """The layers of a chain in order: the name of each, the layer, and the containers around it.

    Containers are a Sequential, PyTorch's or this library's, and :class:`snn_lib.PerStep`, unless
    they have a ``forward`` of their own. The outermost comes first.
    """
    while isinstance(module, Chunked):
        name, module = f"{name}.module", module.module
    if runs_forward_of(module, Sequential, nn.Sequential):
        for child, part in module._modules.items():  # a part that is used twice is there twice
            yield from layers_of(part, f"{name}.{child}".lstrip("."), (*around, module))
    elif runs_forward_of(module, PerStep):
        yield from layers_of(module.module, f"{name}.module", (*around, module))
    else:
        yield name, module, around


def refuse_hooks(model: nn.Module, consequence: str, but: Container[nn.Module] = ()) -> None:
    """Raises a ValueError that names the first module with hooks, other than these."""
    for name, module in model.named_modules():
        if module not in but and forward_hooks(module):
            raise ValueError(
                f"{name or 'the network'} ({type(module).__name__}) has hooks, {consequence}"
            )


def _within(name: str, part: nn.Module) -> tuple[str, Sequential]:
    inner, chain = chain_of(part)
    return f"{name}.{inner}".rstrip("."), chain


def _hands_on(network: nn.Module, part: nn.Module) -> bool:
    """Whether a network's ``forward`` calls a part once, with its input, and returns the output."""
    if "forward" in vars(part):
        return False
    x, reply, given = object(), Output._make([object(), object()]), []

    def forward(x: object, state: object = None, lengths: object = None) -> Output:
        given.append(x if is_at_rest(state) and lengths is None else None)
        return reply

    part.forward = forward
    try:
        tried = _light_copy(network, {part: part})  # which may keep what it is given
        result = tried.forward(x)
    except Exception:  # whatever a user's forward raises that computes with what is no tensor
        return False
    finally:
        del part.forward
    output = result if isinstance(result, tuple) else (result,)
    return given == [x] and output in (reply, reply[:1])


def is_at_rest(state: object) -> bool:
    """Whether a chain that is given this state begins a sequence."""
    parts = state if isinstance(state, (tuple, list)) else [state]
    return all(part is None for part in parts)


def _light_copy(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module with the values of another one, but with lists and parts of its own.

    ``made`` has the parts that are copied already, or are to be the same.
    """
    if module not in made:
        copied = made[module] = type(module).__new__(type(module))
        for name, value in vars(module).items():
            own = isinstance(value, (list, dict, set, deque))
            vars(copied)[name] = copy.copy(value) if own else value
        for name, buffer in module._buffers.items():
            copied._buffers[name] = None if buffer is None else buffer.clone()
        for name, part in module._modules.items():
            copied._modules[name] = None if part is None else _light_copy(part, made)
    return made[module]

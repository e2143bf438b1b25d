"""Observes the layers of a model while it runs: what each call is given, and what it returns."""

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from snn_lib.pytorch_private import is_compiled, run_uncompiled
from snn_lib.recomputing import is_recomputing


def observe(layer: nn.Module, report: Callable[[dict[str, Any], Any], object]) -> RemovableHandle:
    """Reports each call of a layer, until the handle is removed.

    ``report`` takes the arguments of the call, by name and in order, and the output that the layer
    returned, alone or together with a state. A call that :class:`snn_lib.Chunked` repeats for the
    backward pass is not reported again. A copy of the layer, which PyTorch gives the same hooks, is
    not reported.
    """

    def hook(caller: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        if caller is layer and not is_recomputing():
            report(bind_call(layer, args, kwargs), output_among(result))

    hook.observed = layer
    return layer.register_forward_hook(hook, with_kwargs=True)


def output_among(result: Any) -> Any:
    """The output of what a layer returned: the output alone, or ``(output, state)``."""
    return result[0] if isinstance(result, (tuple, list)) else result


@contextmanager
def observe_layers(
    model: nn.Module,
    chosen: Callable[[nn.Module], bool],
    report: Callable[[str, Any, dict[str, Any], Any], object],
    names: Collection[str] | None = None,
) -> Iterator[None]:
    """The context in which each call of the layers that are chosen is reported.

    ``report`` takes the name of the layer, the layer, and what :func:`observe` reports. If there
    are ``names``, the layers are those of these names.

    If no layer was called, a warning says so at the end of the context: perhaps a program that
    ``torch.compile`` made of the model before has run in its place.

    Raises:
        ValueError: at the end of the context, a layer was silent because a compiled program calls
            no hooks.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if chosen(layer) and (names is None or name in names)
    }
    silent = dict.fromkeys(layers)

    def note(name: str, layer: nn.Module, given: dict[str, Any], output: Any) -> None:
        silent.pop(name, None)
        report(name, layer, given, output)

    with ExitStack() as handles:
        for name, layer in layers.items():
            handles.enter_context(observe(layer, partial(note, name, layer)))
        yield
    if silent and is_compiled(model):
        raise ValueError(
            f"nothing was seen of layer {', '.join(silent)}, because torch.compile runs the model "
            "or a part of it: observe the model before it is compiled"
        )
    if silent and len(silent) == len(layers):
        warnings.warn(
            f"nothing was seen of layer {', '.join(silent)}: if torch.compile has compiled the "
            "model, observe it before that",
            RuntimeWarning,
            stacklevel=2,
        )


# By a cell, the lists in which its inputs are noted.
_noted: dict[nn.Module, list[list[dict[str, Any]]]] = {}


@contextmanager
def noting_inputs(cell: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The context with a list of what the present call of a cell gives to ``Cell.forward``.

    That is another input than that of the call if a ``forward`` of a user's own changes it.
    """
    inputs: list[dict[str, Any]] = []

    def begin(*_: Any) -> None:
        inputs.clear()

    begin.observed = cell
    handle = cell.register_forward_pre_hook(begin)
    _noted.setdefault(cell, []).append(inputs)
    try:
        yield inputs
    finally:
        handle.remove()
        _noted[cell] = [other for other in _noted[cell] if other is not inputs]
        if not _noted[cell]:
            del _noted[cell]


def note_input(cell: nn.Module, x: Any, state: Any) -> None:
    """Notes what the equation of a cell runs on, if somebody asks for it."""
    if cell in _noted:
        _note(cell, x, state)


@run_uncompiled
def _note(cell: nn.Module, x: Any, state: Any) -> None:
    for inputs in _noted[cell]:
        inputs.append({"x": x, "state": state})


def state_given(layer: nn.Module, given: dict[str, Any]) -> Any:
    """The state among the arguments of a layer's call; if none has this name, another tuple."""
    if "state" in given or "state" in inspect.signature(layer.forward).parameters:
        return given.get("state")
    _, *others = given.values()
    return next((value for value in others if isinstance(value, tuple)), None)


def bind_call(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer's call by name and in order, from what its hook is given."""
    signature, given = inspect.signature(layer.forward), {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            given.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            given.update({f"{name}[{number}]": one for number, one in enumerate(value)})
        else:
            given[name] = value
    return given

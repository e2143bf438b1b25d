"""Observes the layers of a model while it runs: what each call is given, and what it returns."""

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from snn_lib.pytorch_private import is_compiled
from snn_lib.recomputing import is_recomputing


def observe(layer: nn.Module, report: Callable[[dict[str, Any], Any], object]) -> RemovableHandle:
    """Reports each call of a layer, until the handle is removed.

    ``report`` takes the arguments of the call, by name and in order, and what the layer returned. A
    call that :class:`snn_lib.Chunked` repeats for the backward pass is not reported again.
    """

    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        if not is_recomputing():
            report(bind_call(layer, args, kwargs), result)

    return layer.register_forward_hook(hook, with_kwargs=True)


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

    def note(name: str, layer: nn.Module, given: dict[str, Any], result: Any) -> None:
        silent.pop(name, None)
        report(name, layer, given, result)

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


def bind_call(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer's call by name and in order, from what its hook is given."""
    return inspect.signature(layer.forward).bind(*args, **kwargs).arguments

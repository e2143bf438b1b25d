"""Records what happens inside a model: PSPs, membrane potentials, resets and spikes."""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snn_lib.cells import Cell
from snn_lib.containers import runs_forward_of
from snn_lib.observing import noting_inputs, observe_layers, state_given
from snn_lib.recomputing import current_chunk


@dataclass(frozen=True)
class SynapseRecord:
    """The PSP of a synapse layer, ``(T, B, *features)``."""

    psp: Tensor


@dataclass(frozen=True)
class NeuronRecord:
    """Spikes S, membrane potential V and reset R of a neuron layer, each ``(T, B, *features)``.

    S has all spikes of the neurons, also those that dropout removes later. V is what is compared
    with the threshold: a neuron fires where V[t] > 1. R[t] is already subtracted from V[t], and so
    is A[t] of an ``AdaptiveNeuron``. A spike at t first appears in R[t+1]. R is zero for a cell
    without a state ``reset``.
    """

    spikes: Tensor
    membrane: Tensor
    reset: Tensor


class Monitor:
    """A context that records layers of a model while it runs, and does not change the model.

        with Monitor(model) as monitor:
            model(x)
        monitor["2"].membrane  # (T, B, N)

    Args:
        model: any module that contains synapses and neurons of this package.
        layers: the names of the layers to record, as in ``model.named_modules()``; ``None`` for all
            synapses and neurons.

    Attributes:
        records: the :class:`SynapseRecord` or :class:`NeuronRecord` of each layer in its last run,
            without gradient. They remain after the context. A run in chunks of
            :class:`snn_lib.Chunked` is one run, unless the module inside is compiled: then the last
            chunk is what remains.

    A warning says at the end of the context if nothing was seen of any layer.

    Raises:
        ValueError: there is no synapse or neuron layer of that name; while the model runs, neurons
            have a ``forward`` of their own that does not call that of :class:`Cell` once, and no
            ``traces`` of their own; or, at the end of the context, nothing was seen of a layer
            because ``torch.compile`` runs it.
        TypeError: the names are a single text.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] | None = None) -> None:
        if isinstance(layers, str):  # or each of its letters would be a name
            raise TypeError(f"layers is {layers!r}, expected the names in a list: [{layers!r}]")
        known = [name for name, module in model.named_modules() if is_cell(module)]
        for name in layers or ():
            if name not in known:
                raise ValueError(
                    f"there is no synapse or neuron layer {name!r}, choose from "
                    f"{', '.join(map(repr, known))}"
                )
        self._model, self._layers = model, layers
        self.records: dict[str, SynapseRecord | NeuronRecord] = {}
        # In chunks, the run of each record, by its seeds, and the step with which it begins.
        self._begun: dict[str, tuple[Any, int]] = {}
        # Of neurons with a forward of a user's own, what it gives to that of Cell.
        self._inputs: dict[str, list[dict[str, Any]]] = {}

    def __getitem__(self, layer: str) -> SynapseRecord | NeuronRecord:
        if layer not in self.records:
            known = ", ".join(map(repr, self.records))
            raise KeyError(f"nothing is recorded of {layer!r}, only of {known}")
        return self.records[layer]

    def __enter__(self) -> "Monitor":
        with ExitStack() as contexts:
            for name, layer in self._model.named_modules():
                chosen = self._layers is None or name in self._layers
                if chosen and is_cell(layer) and _is_changed(layer):
                    self._inputs[name] = contexts.enter_context(noting_inputs(layer))
            observing = observe_layers(self._model, is_cell, self._store, self._layers)
            contexts.enter_context(observing)
            self._observing = contexts.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._observing.__exit__(*exception)

    def _store(self, name: str, layer: nn.Module, given: dict[str, Any], output: Tensor) -> None:
        if name in self._inputs:
            if len(inputs := self._inputs[name]) != 1:
                raise ValueError(
                    f"layer {name!r} ({type(layer).__name__}) has a forward of its own that calls "
                    f"Cell.forward {len(inputs)} times, expected once: give it a traces of its "
                    "own, too, or leave it out of the layers to record"
                )
            given = inputs[0]
        record, chunk = record_of(layer, given, output), current_chunk()
        if chunk is not None:
            run, first = self._begun.get(name, (None, 0))
            if run is chunk.seeds:
                # Of two calls in a chunk the later one counts, as it does without chunks.
                before = (part[: chunk.start - first] for part in vars(self.records[name]).values())
                parts = zip(before, vars(record).values(), strict=True)
                record = type(record)(*map(torch.cat, parts))
            else:
                self._begun[name] = chunk.seeds, chunk.start
        self.records[name] = record


def is_cell(module: nn.Module) -> bool:
    """Whether a module is a synapse, a neuron or another cell."""
    return isinstance(module, Cell)


def _is_changed(cell: Any) -> bool:
    """Whether neurons have a ``forward`` of a user's own, and the ``traces`` of all cells."""
    traces = getattr(cell.traces, "__func__", None)
    return cell.spikes and not runs_forward_of(cell, Cell) and traces is Cell.traces


@torch.no_grad()
def record_of(layer: Any, given: dict[str, Any], output: Tensor) -> SynapseRecord | NeuronRecord:
    """The record of a call that ``observe`` reports: neurons have ``traces``, synapses a PSP."""
    if not hasattr(layer, "traces") or not getattr(layer, "spikes", True):
        return SynapseRecord(output.detach().clone())  # the next layer may work in place
    (_, x), *others = given.items()  # whatever a user's own forward calls its input
    named = {name: one for name, one in others if name.isidentifier() and name != "lengths"}
    taken, state = inspect.signature(layer.traces).parameters.values(), state_given(layer, given)
    known = [o.name for o in taken if o.kind in (o.POSITIONAL_OR_KEYWORD, o.KEYWORD_ONLY)]
    unnamed = state is not None and all(one is not state for one in named.values())
    if "state" in known or unnamed:
        named = {"state": state, **named}
    if len(known) == len(taken):  # it takes no others
        named = {name: one for name, one in named.items() if name in known}
    return NeuronRecord(*layer.traces(x, **named))  # padding is recorded like the rest


def as_numpy(values: Tensor | np.ndarray) -> np.ndarray:
    """A tensor of any device as an array; floating-point numbers become at least float32."""
    if isinstance(values, np.ndarray):
        is_float = values.dtype.kind == "f"
        return values.astype(np.promote_types(values.dtype, np.float32)) if is_float else values
    tensor = values.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor.numpy()

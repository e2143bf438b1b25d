"""Counts how often the neurons of a network fire while it runs, whatever its ``forward`` does."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from snn_lib.cells import is_spiking
from snn_lib.chunks import current_chunk
from snn_lib.observing import observe_layers
from snn_lib.readout import within


class Activity:
    """The spikes of each layer of neurons, summed over all sequences.

    Attributes:
        neurons: the names of the layers.
        spike_counts: the number of spikes of each layer that are passed on, by its name. In
            training, those that dropout takes are not.
        elements: the neurons of each layer times the steps of all sequences.
    """

    def __init__(self, model: nn.Module) -> None:
        self.neurons = [name for name, module in model.named_modules() if is_spiking(module)]
        self.spike_counts: dict[str, Any] = Counter(dict.fromkeys(self.neurons, 0))
        self.elements: dict[str, Any] = Counter(self.spike_counts)
        self._lengths: Tensor | None = None

    def begin(self, lengths: Tensor | None, steps: int) -> None:
        """Announces a batch, so that its padding is not counted.

        A layer that is then given fewer steps runs them in parts: each call goes on where the last
        one ended, in the batch or in the chunk of a :class:`snn_lib.Chunked`.

        Args:
            lengths: the number of steps of each sequence, int64 ``(B,)``, on the model's device;
                ``None`` if nothing is padded.
            steps: T.
        """
        self._lengths = None if lengths is None else lengths.long()  # smaller ones would overflow
        self._steps = steps
        # The steps that each layer has run since then, or in a chunk.
        self._ran: Counter = Counter()

    def add(self, name: str, spikes: Tensor, own: Tensor) -> None:
        """Adds the spikes ``(T, B, *)`` at the sequences' own steps, bool ``(T, B)``."""
        self.spike_counts[name] += (spikes.ne(0).flatten(2).sum(2) * own).sum()
        self.elements[name] += own.sum() * spikes.shape[2:].numel()

    @torch.no_grad()
    def observe(self, name: str, layer: nn.Module, given: dict[str, Any], spikes: Tensor) -> None:
        """Adds what a layer of neurons did in a call."""
        chunk = current_chunk()
        own = torch.ones(spikes.shape[:2], dtype=torch.bool, device=spikes.device)
        if self._lengths is not None and spikes.shape[1] == len(self._lengths):
            start, steps = (chunk.start, chunk.steps) if chunk else (0, self._steps)
            ran = self._ran[name, start] % steps
            self._ran[name, start] += len(spikes)
            own = within(own, self._lengths - start - ran)
        elif given.get("lengths") is not None:
            own = within(own, given["lengths"])
        self.add(name, spikes, own)

    def firing_rates(self) -> dict[str, float]:
        """Mean firing rate of every neuron layer that ran, in spikes per neuron and time step."""
        return {
            name: float(spikes) / float(self.elements[name])
            for name, spikes in self.spike_counts.items()
            if self.elements[name]
        }

    def activity_sparsity(self) -> float:
        """The share of all neurons' steps without a spike; 1 if there are no neurons."""
        spikes, elements = (sum(map(float, d.values())) for d in (self.spike_counts, self.elements))
        return 1.0 - spikes / max(elements, 1.0)

    def sum_by(self, total: Callable[[dict[str, Any]], dict[str, float]]) -> None:
        """Replaces the counts by those of all processes, which ``total`` adds up."""
        self.spike_counts, self.elements = total(self.spike_counts), total(self.elements)


@contextmanager
def count_activity(model: nn.Module) -> Iterator[Activity]:
    """The context in which the spikes of ``model`` are counted.

    Padding is not counted if the layers are given the ``lengths``, or if :meth:`Activity.begin`
    announces them.

    with count_activity(model) as activity:
        model(x)
    activity.firing_rates()
    """
    activity = Activity(model)
    with observe_layers(model, is_spiking, activity.observe):
        yield activity

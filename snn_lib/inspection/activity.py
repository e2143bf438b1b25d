"""Counts what a network does while it runs: firing rates and operations.

Operations are counted at the weights. Each input value that is not zero takes one operation for
each of its weights that is not zero. The operation is an addition if the layer receives only 0, 1
and -1, and a multiply-accumulate otherwise. These are the effective synaptic operations of
NeuroBench (Yik et al., 2025, doi 10.1038/s41467-025-56739-4). The filters and the neurons compute
at every step, and their operations are counted separately.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from snn_lib.cells import Cell, is_spiking
from snn_lib.containers import WEIGHTED, PerStep, is_weighted
from snn_lib.inspection.monitor import is_cell
from snn_lib.inspection.timeline import Call, Timeline
from snn_lib.observing import observe_layers
from snn_lib.pytorch_private import convolve

UNCOUNTED = (
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# Classes of PyTorch's that hold the parameters of a layer of one's own.
OF_OTHERS = nn.ParameterList, nn.ParameterDict, ParametrizationList
# Of 32-bit floating point in 45 nm: Horowitz, ISSCC 2014, doi 10.1109/ISSCC.2014.6757323.
PICOJOULES_ADDITION, PICOJOULES_MULTIPLICATION = 0.9, 3.7


class Operations(NamedTuple):
    """The operations of a network for one sequence, if it skips inputs and weights that are zero.

    Attributes:
        additions: additions at the layers of weights that receive only 0, 1 and -1.
        multiply_accumulates: multiply-accumulates at the other layers of weights.
        filters: multiply-accumulates of the synapses' filters.
        neurons: multiply-accumulates of the neurons' membranes and resets.
    """

    additions: float
    multiply_accumulates: float
    filters: float
    neurons: float

    def energy(self) -> float:
        """Estimates the energy of the arithmetic in joules, for 32-bit floating point at 45 nm.

        This is not a measurement. It assumes hardware that skips zeros. It leaves out control,
        leakage and memory traffic, which costs more than arithmetic on most machines.
        """
        product = PICOJOULES_ADDITION + PICOJOULES_MULTIPLICATION
        products = self.multiply_accumulates + self.filters + self.neurons
        return 1e-12 * (PICOJOULES_ADDITION * self.additions + product * products)


class Activity:
    """What a network did, summed over all sequences that :func:`count_activity` has observed.

    Every call of an ``nn.Linear`` or a convolution is counted. If the network has weights of
    another kind, such as an ``nn.GRU``, its operations are refused. Of the layers of 2020, the
    filters and neurons are not counted. If a layer receives a value other than 0, 1 and -1 even
    once, all its operations count as multiply-accumulates. If the model calls a layer twice in a
    run, this is decided for each of the two calls.

    A new sequence begins when the first synapse or neuron of a run is called without a state. So a
    sequence in chunks counts once.

    Attributes:
        neurons: the names of the neuron layers.
        sequences: the number of input sequences.
        spike_counts: the number of spikes of each neuron layer.
        elements: the channels of each neuron and synapse layer times the steps of all sequences.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sequences: float = 0
        self.spike_counts: dict[str, Any] = {}
        self.elements: dict[str, Any] = {}
        self.work: dict[str, int] = {}  # a layer's multiply-accumulates for each element
        for name, module in model.named_modules():
            if isinstance(module, Cell):
                self.elements[name], self.work[name] = 0, module.products
            if is_spiking(module):
                self.spike_counts[name] = 0
        self._uncounted = _uncounted_part(model)  # why the operations are refused
        self.neurons = list(self.spike_counts)
        # For each call of a layer of weights in a run: its operations, and whether it multiplies.
        self._by_call: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._dense: Counter = Counter()  # each layer's operations if no zero is skipped
        self._steps: Counter = Counter()  # each layer's steps of all sequences together
        self._totals: dict[str, float] = {}  # the sums of all processes, once they are summed
        self._in_per_step = {
            part for m in model.modules() if isinstance(m, PerStep) for part in m.module.modules()
        }
        self.timeline = Timeline()

    def begin(self, lengths: Tensor | None, steps: int) -> None:
        """Announces the lengths of a batch, so that its padding is not counted.

        This is needed if sequences are padded, or to read :attr:`per_step`. The next call of the
        model must then be given ``(T, B, *)`` or ``(B, T, *)``.

        Args:
            lengths: the number of steps of each sequence, int64 ``(B,)``, on the model's device;
                ``None`` if nothing is padded and :attr:`per_step` is not read.
            steps: T.
        """
        self.timeline.lengths = lengths
        if lengths is not None:
            shape = steps, len(lengths)
            self._per_step = torch.zeros(shape, dtype=torch.int64, device=lengths.device)

    @property
    def per_step(self) -> Tensor:
        """The operations at the weights for each step and sequence of the batch, ``(T, B)``.

        The batch is the one that :meth:`begin` announced. At padding the operations are zero.

        Raises:
            ValueError: the operations are not known, the message says why; or no batch was
                announced with its lengths.
        """
        self._refuse_trouble()
        if self.timeline.lengths is None:
            raise ValueError("per_step needs the lengths of the batch: call begin(lengths, steps)")
        return self._per_step

    def firing_rates(self) -> dict[str, float]:
        """Mean firing rate of every neuron layer that ran, in spikes per neuron and time step."""
        return {
            name: float(spikes) / float(self.elements[name])
            for name, spikes in self.spike_counts.items()
            if self.elements[name]
        }

    def spikes(self) -> float:
        """Spikes of all neurons per sequence.

        Raises:
            ValueError: no sequence has begun.
        """
        return self._per_sequence(self.spike_counts.values())

    def activity_sparsity(self) -> float:
        """The share of all neurons' steps without a spike; 1 if there are no neurons."""
        spikes = sum(map(float, self.spike_counts.values()))
        return 1.0 - spikes / max(sum(float(self.elements[name]) for name in self.neurons), 1.0)

    def operations(self) -> Operations:
        """The mean number of operations per sequence, by kind.

        Raises:
            ValueError: no sequence has begun, or the operations are not known.
        """
        self._refuse_trouble()
        totals = self._sums()
        filters = self.elements.keys() - self.neurons
        return Operations(
            additions=self._per_sequence([totals["additions"]]),
            multiply_accumulates=self._per_sequence([totals["multiply_accumulates"]]),
            filters=self._per_sequence(self.work[f] * self.elements[f] for f in filters),
            neurons=self._per_sequence(self.work[n] * self.elements[n] for n in self.neurons),
        )

    def synaptic_operations(self) -> float:
        """Operations at the weights per sequence: additions and multiply-accumulates.

        Raises:
            ValueError: as :meth:`operations`.
        """
        return sum(self.operations()[:2])

    def dense_operations(self) -> float:
        """Multiply-accumulates of one step of one sequence if no zero is skipped.

        A layer that the network uses twice in a step counts twice. A layer that weighs its input
        once for all steps counts once.
        """
        totals = self._sums()
        return float(totals["dense"]) / max(float(totals["steps"]), 1.0)

    def sum_by(self, total: Callable[[dict[str, Any]], dict[str, float]]) -> None:
        """Replaces the counts by those of all processes, which ``total`` adds up."""
        self._totals = total(self._sums())
        self.spike_counts, self.elements = total(self.spike_counts), total(self.elements)
        self.sequences = total({"": self.sequences})[""]

    def _sums(self) -> dict[str, Any]:
        """The sums of operations at the weights, and those of a network that skips no zeros."""
        if self._totals:
            return self._totals
        operations = sum(counted for counted, _ in self._by_call.values())
        multiplied = sum(counted * multiplies for counted, multiplies in self._by_call.values())
        # A synapse or neuron runs at every step. Some may run several times at each, so the fewest
        # runs are the number of steps. A layer of weights may also run once for all steps.
        clocks = self._steps.keys() & self.elements.keys() or self._steps.keys()
        steps = min((int(self._steps[name]) for name in clocks), default=0)
        dense = (
            int(counted) / max(min(int(self._steps[name]), steps), 1)
            for name, counted in self._dense.items()
        )
        return {
            "additions": operations - multiplied,
            "multiply_accumulates": multiplied,
            "dense": steps * sum(dense),
            "steps": steps,
        }

    def _refuse_trouble(self) -> None:
        if self._uncounted is not None:
            raise ValueError(self._uncounted)
        if self.timeline.trouble is not None:
            raise ValueError(f"it is unknown which steps are padding: {self.timeline.trouble}")

    def _per_sequence(self, counts: Iterable[Any]) -> float:
        if not self.sequences:
            raise ValueError("no sequence has begun: no layer was called without a state")
        return sum(map(float, counts)) / self.sequences

    def count_sequences(
        self, name: str, layer: nn.Module, given: dict[str, Any], result: object
    ) -> None:
        """Adds the sequences that begin with a call of a layer."""
        if layer in self._in_per_step:
            return  # it is given time and batch in one dimension; its PerStep tells how many
        x = next(iter(given.values()))
        if isinstance(layer, WEIGHTED):
            x = self._with_time(layer, x)
        if self.timeline.begins_a_run(name) and given.get("state") is None:
            self.sequences += x.shape[1]

    @torch.no_grad()
    def count_layer(
        self, name: str, layer: nn.Module, given: dict[str, Any], result: tuple
    ) -> None:
        """Adds what a synapse or neuron layer did in a call."""
        is_neuron = is_spiking(layer)
        values = result[0] if is_neuron else next(iter(given.values()))  # (T, B, *features)
        call = self.timeline.place(name, len(values), fresh=given.get("state") is None)
        steps = _own_steps(call, values)
        self._steps[name] += steps
        self.elements[name] += steps * values.shape[2:].numel()
        if is_neuron:
            spikes = values.ne(0).flatten(2).sum(2)  # (T, B)
            self.spike_counts[name] += (spikes if call.own is None else spikes * call.own).sum()

    @torch.no_grad()
    def count_weights(
        self, name: str, layer: nn.Module, given: dict[str, Any], result: Tensor
    ) -> None:
        """Adds what a layer of weights did in a call."""
        x = self._with_time(layer, next(iter(given.values())))
        if x.numel() == 0:
            return
        call = self.timeline.place(name, len(x))
        counted = _count_products(layer, x.flatten(0, 1), layer.weight).view(x.shape[:2])
        if call.own is not None:
            counted = counted * call.own
            self._per_step[call.begin : call.begin + len(x)] += counted
        before, multiplied = self._by_call.get((name, call.number), (0, False))
        odd = ((x != 0) & (x != 1) & (x != -1)).flatten(2).any(2)  # (T, B)
        multiplies = (odd if call.own is None else odd & call.own).any()
        self._by_call[name, call.number] = before + counted.sum(), multiplied | multiplies
        one = torch.ones_like(x[0, :1]), torch.ones_like(layer.weight)
        steps = _own_steps(call, x)
        self._steps[name] += steps
        self._dense[name] += steps * _count_products(layer, *one)[0]

    def _with_time(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The input of a layer of weights as ``(T, B, *)``.

        If time and batch are one dimension and nothing is padded, it is ``(1, T * B, *)``.
        """
        lengths = self.timeline.lengths
        if x.dim() < layer.weight.dim():  # a single step of a single sequence
            x = x[None]
        batch = len(x) if lengths is None else len(lengths)
        is_folded = (
            x.dim() == layer.weight.dim()
            or layer in self._in_per_step
            or (lengths is not None and x.shape[1] != batch)  # a step with several positions
        )
        return x.unflatten(0, (len(x) // max(batch, 1), batch)) if is_folded else x


def _own_steps(call: Call, values: Tensor) -> int | Tensor:
    """The steps of all sequences in a call that are not padding; on a device nothing waits for it.

    ``values`` are ``(T, B, *)``.
    """
    return values.shape[:2].numel() if call.own is None else call.own.sum()


def _count_products(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Counts the products of inputs, ``(N, *)``, and weights that are not zero, int64 ``(N,)``."""
    # The weights are summed over the outputs first, which leaves a small layer. All numbers are
    # whole. Float32 holds sums up to 2^24 exactly, and TF32 weights up to 2^11.
    exact = weight.numel() < 2**24 and len(weight) <= 2**11
    x, weight = (t.ne(0).to(torch.float32 if exact else torch.float64) for t in (x, weight))
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(layer, nn.Linear):
            products = (x @ weight.sum(0))[..., None]
        else:
            products = convolve(layer, x, weight.unflatten(0, (layer.groups, -1)).sum(1))
    return products.round().long().flatten(1).sum(1)


def _uncounted_part(model: nn.Module) -> str | None:
    """What of a model has weights that nothing here counts, or ``None``."""
    known = *WEIGHTED, Cell, nn.LayerNorm
    counted = {part for m in model.modules() if isinstance(m, known) for part in m.modules()}
    for name, module in model.named_modules():
        if module not in counted and _has_uncounted_weights(module):
            kind = type(module)
            where = f"layer {name}" if name else "the model"
            what = "an nn." if kind.__module__.startswith("torch.nn.modules.") else "a "
            return f"{where} is {what}{kind.__name__}, whose weights have no count here"
    return None


def _has_uncounted_weights(module: nn.Module) -> bool:
    """Whether a module that is not counted has weights of its own, as far as one can tell."""
    if isinstance(module, UNCOUNTED):
        return True
    package = type(module).__module__.partition(".")[0]
    if package == "snn_lib":  # only layers of 2020 have such
        return isinstance(getattr(module, "weight", None), nn.Parameter)
    if package == "torch" and not isinstance(module, OF_OTHERS):
        return False
    own = [p for p in module.parameters(recurse=False) if not is_lazy(p)]
    # Inputs and outputs are two dimensions. A scale of each channel, such as (C, 1, 1), has one.
    return any(p.dim() == 2 or sum(size > 1 for size in p.shape) > 1 for p in own)


def is_weights(module: nn.Module) -> bool:
    """Whether a module is a layer of weights, or hides the time axis from one."""
    return isinstance(module, (PerStep, *WEIGHTED))


@contextmanager
def count_activity(model: nn.Module) -> Iterator[Activity]:
    """The context in which the activity of ``model`` is counted.

    with count_activity(model) as activity:
        model(x)
    activity.operations()
    """
    activity = Activity(model)
    # Without synapses and neurons, the layers of weights tell of new sequences.
    telling = is_cell if activity.elements else is_weights
    with (
        activity.timeline.following(model),
        observe_layers(model, telling, activity.count_sequences),
        observe_layers(model, is_cell, activity.count_layer),
        observe_layers(model, is_weighted, activity.count_weights),
    ):
        yield activity


def footprint(model: nn.Module) -> int:
    """The bytes that a model's parameters and buffers take."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def connection_sparsity(model: nn.Module) -> float:
    """The share of zeros among the weights of linear layers and convolutions; 0 without weights."""
    weights = [module.weight for module in model.modules() if isinstance(module, WEIGHTED)]
    zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
    return zeros / max(sum(weight.numel() for weight in weights), 1)

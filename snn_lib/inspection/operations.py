"""Counts the operations of a network, by running it a layer at a time.

Operations are counted at the weights. Each input value that is not zero takes one operation for
each of its weights that is not zero. The operation is an addition if the layer receives only 0, 1
and -1, and a multiply-accumulate otherwise. These are the effective synaptic operations of
NeuroBench (Yik et al., 2025, doi 10.1038/s41467-025-56739-4). The filters and the neurons compute
at every step, and their operations are counted separately.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snn_lib.cells import Cell, Delay
from snn_lib.chain import chain_of, layers_of, refuse_hooks
from snn_lib.containers import (
    WEIGHTED,
    Output,
    PerStep,
    Sequential,
    Weighted,
    holds_weights,
    weighs_once,
)
from snn_lib.inspection.activity import Activity
from snn_lib.kernels.trace import UnknownOperationError
from snn_lib.pytorch_private import convolve
from snn_lib.readout import within

# Of 32-bit floating point in 45 nm: Horowitz, ISSCC 2014, doi 10.1109/ISSCC.2014.6757323.
PICOJOULES_ADDITION, PICOJOULES_MULTIPLICATION = 0.9, 3.7


class Operations(NamedTuple):
    """The operations of a network for one sequence, if it skips inputs and weights that are zero.

    Attributes:
        additions: additions at the layers of weights that receive only 0, 1 and -1.
        multiply_accumulates: multiply-accumulates at the other layers of weights.
        filters: multiply-accumulates of the synapses' filters and of delays.
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


class CountedNetwork(Sequential):
    """A network that runs a layer at a time and counts what each layer does.

        counted = CountedNetwork(model.eval())
        counted(x)  # (T, B, *), as the model
        counted.operations()

    The counts are sums over all calls. A call with a state goes on with the sequences of the call
    before. If a layer receives a value other than 0, 1 and -1 even once, all its operations count
    as multiply-accumulates. A layer that weighs the first step for all steps, see
    :class:`snn_lib.Sequential`, has its operations in the first step. Rearranging, pooling,
    normalising and adding up (:class:`snn_lib.Votes`) take no operations here. The layers of a
    Sequential inside a Sequential are counted as if they stood in the outer one.

    Args:
        model: a :class:`snn_lib.Sequential` or a network around one, see
            :func:`snn_lib.chain.chain_of`.

    Attributes:
        sequences: the number of sequences.
        activity: how often the neurons fire.
        per_step: the operations at the weights at each step of the last sequences, int64
            ``(T, B)``. At padding they are zero.

    Shape:
        As the model. The ``lengths`` say what is counted. The layers, and readouts among them, run
        all steps, and the state is the last one's.

    Raises:
        ValueError: the model is no chain, a module around layers has hooks, or a layer has weights
            that nothing here counts; or, in a call, a layer is given another number of steps than
            the network.
    """

    def __init__(self, model: nn.Module) -> None:
        name, chain = chain_of(model)
        parts = list(layers_of(chain, name))
        for name, layer, _ in parts:
            _refuse_uncounted(name, layer)
        layers = (_alone(layer, around) for _, layer, around in parts)
        super().__init__(*layers, batch_first=chain.batch_first)
        self.parts = [(name, layer) for name, layer, _ in parts]
        inner = {part for _, layer in self.parts for part in layer.modules()}
        refuse_hooks(model, "and a count runs its layers without it: remove them", inner)
        self.sequences, self._steps, self._dense = 0, 0, 0
        self.activity = Activity(model)
        self.per_step = torch.zeros(0, 0, dtype=torch.int64)
        self._work = {"filters": 0, "neurons": 0}
        self._products = [0] * len(parts)  # each layer's operations
        self._multiplies = [False] * len(parts)

    @torch.no_grad()
    def forward(self, x: Tensor, state: Any = None, lengths: Tensor | None = None) -> Output:
        """Runs and counts all time steps; see the class for shapes."""
        states = self._states(state)
        outputs = self._outputs(x, states, None)
        if self.batch_first:
            x, outputs = x.transpose(0, 1), (output.transpose(0, 1) for output in outputs)
        shape = x.shape[:2]
        own = torch.ones(shape, dtype=torch.bool, device=x.device)
        own = own if lengths is None else within(own, lengths)
        costs = torch.zeros(shape, dtype=torch.int64, device=x.device)
        for number, output in enumerate(outputs):
            name, layer = self.parts[number]
            given = x[:1] if weighs_once(self[number], x) else x
            if isinstance(layer, (Cell, Delay, *WEIGHTED)) and x.numel():
                self._check(name, given, shape)
            if isinstance(layer, (Cell, Delay)) and x.numel():
                self._count_cell(name, layer, output, own[: len(given)])
            elif isinstance(layer, WEIGHTED) and x.numel():
                costs[: len(given)] += self._count_weights(number, layer, given, own)
            x = output
        self._steps += int(own.sum())
        self.sequences += shape[1] if state is None else 0
        begins = state is None or not self.sequences
        self.per_step = costs if begins else torch.cat([self.per_step, costs])
        return Output(x.transpose(0, 1) if self.batch_first else x, tuple(states))

    def _check(self, name: str, x: Tensor, shape: torch.Size) -> None:
        if x.dim() < 3 or x.shape[1] != shape[1] or len(x) not in (1, shape[0]):
            raise ValueError(
                f"layer {name} is given the shape {tuple(x.shape)}, expected "
                f"{(*shape, '*')}: what follows a layer that changes the steps is not counted"
            )

    def _count_cell(self, name: str, cell: Cell | Delay, output: Tensor, own: Tensor) -> None:
        channels = int(own.sum()) * output.shape[2:].numel()
        self._work["neurons" if cell.spikes else "filters"] += cell.products * channels
        if cell.spikes:
            self.activity.add(name, output, own)

    def _count_weights(self, number: int, layer: Weighted, x: Tensor, own: Tensor) -> Tensor:
        """The operations of a layer at each of its steps, int64 ``(T, B)``."""
        mask = own[: len(x)]
        products = _count_products(layer, x.flatten(0, 1), layer.weight).view(mask.shape) * mask
        odd = x.ne(x.sign()).flatten(2).any(2)
        self._products[number] += int(products.sum())
        self._multiplies[number] |= bool((odd & mask).any())
        one = torch.ones_like(x[0, :1]), torch.ones_like(layer.weight)
        self._dense += int(own.sum()) * int(_count_products(layer, *one))
        return products

    def operations(self) -> Operations:
        """The mean number of operations per sequence, by kind.

        Raises:
            ValueError: no sequence has begun.
        """
        pairs = list(zip(self._products, self._multiplies, strict=True))
        counts = (
            sum(products for products, multiplies in pairs if not multiplies),
            sum(products for products, multiplies in pairs if multiplies),
            *self._work.values(),
        )
        return Operations(*map(self._per_sequence, counts))

    def synaptic_operations(self) -> float:
        """Operations at the weights per sequence: additions and multiply-accumulates.

        Raises:
            ValueError: as :meth:`operations`.
        """
        return self._per_sequence(sum(self._products))

    def spikes(self) -> float:
        """Spikes of all neurons per sequence.

        Raises:
            ValueError: as :meth:`operations`.
        """
        return self._per_sequence(sum(map(int, self.activity.spike_counts.values())))

    def dense_operations(self) -> float:
        """Multiply-accumulates of one step of one sequence if no zero is skipped.

        A layer that the network uses twice in a step counts twice. A layer that weighs its input
        once for all steps counts once.
        """
        return self._dense / max(self._steps, 1)

    def _per_sequence(self, count: int) -> float:
        if not self.sequences:
            raise ValueError("no sequence has begun: the network was not called without a state")
        return count / self.sequences


def _alone(layer: nn.Module, around: Sequence[nn.Module]) -> nn.Module:
    """The module that runs a layer over all steps as the containers around it do."""
    for container in reversed(around):
        if isinstance(container, PerStep):
            layer = PerStep(layer)
        elif isinstance(container, nn.Sequential):  # which does not weigh one step for all
            layer = nn.Sequential(layer)
    return layer


def _refuse_uncounted(name: str, layer: nn.Module) -> None:
    """Raises an error if a layer holds what nothing here counts, as far as one can tell."""
    if isinstance(layer, Cell):
        try:
            _ = layer.products
        except UnknownOperationError as error:
            raise ValueError(f"layer {name} ({type(layer).__name__}): {error}") from None
    counted = [kind.forward for kind in WEIGHTED]
    if type(layer).forward in counted or isinstance(layer, (Cell, Delay, nn.LayerNorm)):
        return
    for parameter in layer.parameters():
        if holds_weights(parameter):
            kind = type(layer)
            what = "an nn." if kind.__module__.startswith("torch.nn.modules.") else "a "
            raise ValueError(
                f"layer {name} is {what}{kind.__name__}, whose weights have no count here"
            )
    for part in layer.modules():
        if isinstance(part, (Cell, Delay)):
            raise ValueError(
                f"layer {name} is a {type(layer).__name__}, in which a {type(part).__name__} has "
                "no count: put it into the Sequential itself"
            )


def _count_products(layer: Weighted, x: Tensor, weight: Tensor) -> Tensor:
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


def footprint(model: nn.Module) -> int:
    """The bytes that a model's parameters and buffers take."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def connection_sparsity(model: nn.Module) -> float:
    """The share of zeros among the weights of linear layers and convolutions; 0 without weights."""
    weights = [module.weight for module in model.modules() if isinstance(module, WEIGHTED)]
    zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
    return zeros / max(sum(weight.numel() for weight in weights), 1)

"""The counts of ``--test`` beside those of NeuroBench, on pretrained networks.

    pip install neurobench
    python benchmarks/neurobench_counts.py

NeuroBench counts at the input of a linear layer. Here that is a filtered potential, which it takes
for a current. The same definition where the spikes arrive, before the filters, is its count on
``Arriving``, and there the two agree. Saves both (CSV).
"""

import argparse
from copy import deepcopy

import torch
from measuring import options
from neurobench.benchmarks import Benchmark
from neurobench.metrics.static import ConnectionSparsity, Footprint
from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
from neurobench.models import TorchModel
from operations import PRETRAINED
from pretrained import exists, load
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from snn_lib import Sequential, SpikingNeuron
from snn_lib.files import write_csv
from snn_lib.inspection.activity import connection_sparsity, footprint
from snn_lib.synapses import IIRSynapse
from snn_lib.tasks.digits import DigitClassification
from snn_mlp_1 import SNN

IMAGES = 100


class Sent(nn.ReLU):
    """A layer of NeuroBench's kind that hands on what our neurons send."""


class Arriving(nn.Module):
    """The connections of a network with the spikes at their input that arrive at its synapses.

    Shape:
        Input over time, samples first, ``(B, T, N)``, to the sum of the output spikes.
    """

    def __init__(self, layers: Sequential) -> None:
        super().__init__()
        self.run = [layers]  # hidden from NeuroBench, which would count in there too
        self.weights = nn.ModuleList(deepcopy(m) for m in layers if isinstance(m, nn.Linear))
        self.sent = nn.ModuleList(Sent() for m in layers if isinstance(m, SpikingNeuron))

    def forward(self, x: Tensor) -> Tensor:
        """Runs the network, and hands its spikes to the connections."""
        (layers,), weights, sent = self.run, iter(self.weights), iter(self.sent)
        outputs, _ = layers.layerwise(x.transpose(0, 1))
        for module, before, after in zip(
            layers, [x.transpose(0, 1), *outputs], outputs, strict=False
        ):
            if isinstance(module, IIRSynapse):
                next(weights)(before.flatten(0, 1))
            if isinstance(module, SpikingNeuron):
                next(sent)(after)
        return outputs[-1].sum(0)


class AsItIs(nn.Module):
    """A network that takes samples first, and has its time and batch in one dimension inside."""

    def __init__(self, layers: Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """Runs the network."""
        return self.layers(x.transpose(0, 1))[0].sum(0)


def theirs(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """What NeuroBench counts."""
    wrapped = TorchModel(model)
    metrics = [[Footprint, ConnectionSparsity], [ActivationSparsity, SynapticOperations]]
    data = DataLoader(TensorDataset(x, y), batch_size=len(x))
    with torch.no_grad():
        found = Benchmark(wrapped, data, [], [], metrics).run(quiet=True)
    operations = found.pop("SynapticOperations")
    return {**found, **operations}


def measure(name: str, chosen: argparse.Namespace) -> dict:
    """A pretrained network, counted by both."""
    experiment = load(name, SNN, DigitClassification(), chosen)
    experiment.settings.precision = "float32"  # NeuroBench knows of no other
    experiment.config.mnist_config.test_size = 10 if chosen.smoke else IMAGES
    batch = next(iter(experiment.task.evaluation_batches("test")))
    x = batch.x.transpose(0, 1).contiguous()
    layers = experiment.model.eval().layers
    arriving, as_it_is = (theirs(kind(layers), x, batch.y) for kind in (Arriving, AsItIs))
    _, activity = experiment.evaluate("test")
    work = activity.operations()
    return {
        "model": name,
        "additions": work.additions,
        "neurobench_arriving_ACs": arriving["Effective_ACs"],
        "multiply_accumulates": work.multiply_accumulates,
        "neurobench_arriving_MACs": arriving["Effective_MACs"],
        "neurobench_as_it_is_MACs": as_it_is["Effective_MACs"],
        "activity_sparsity": activity.activity_sparsity(),
        "neurobench_activation_sparsity": arriving["ActivationSparsity"],
        "connection_sparsity": connection_sparsity(experiment.model),
        "neurobench_connection_sparsity": as_it_is["ConnectionSparsity"],
        "footprint_bytes": footprint(experiment.model),
        "neurobench_footprint": as_it_is["Footprint"],
    }


def main() -> None:
    chosen = options(__doc__, "neurobench_counts")
    torch.set_num_threads(chosen.threads)
    rows = []
    for name in PRETRAINED:
        if exists(name):
            rows.append(measure(name, chosen))
            print(name)
            for key, value in rows[-1].items():
                if key != "model":
                    print(f"  {key:32}{value:16,.4f}")
    write_csv(chosen.output.with_suffix(".csv"), rows)
    print(f"\nsaved {chosen.output}.csv")


if __name__ == "__main__":
    main()

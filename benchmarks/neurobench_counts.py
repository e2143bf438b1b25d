"""The counts of ``--test`` beside those of NeuroBench, on pretrained networks as they are.

    pip install neurobench
    python benchmarks/neurobench_counts.py

Both count the effective synaptic operations of the whole network on the same images. Saves a row
for each network (CSV); the exit code is 1 where the two differ.
"""

import argparse
import sys

import torch
from accuracy import MODELS
from measuring import options
from neurobench.benchmarks import Benchmark
from neurobench.metrics.static import ConnectionSparsity, Footprint
from neurobench.metrics.workload import SynapticOperations
from neurobench.models import TorchModel
from pretrained import load
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from snn_lib.files import write_csv
from snn_lib.inspection.operations import CountedNetwork, connection_sparsity, footprint
from snn_lib.tasks.base import output_of

IMAGES = 20


class SamplesFirst(nn.Module):
    """A network for NeuroBench, which hands out samples first and takes an output alone.

    Args:
        model: the network.
        steps: T.

    Shape:
        Input over time, ``(B, T, *)``, to the sum of the output over time. A single step,
        ``(B, 1, *)``, is an input that is the same at every step.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def forward(self, x: Tensor) -> Tensor:
        """Runs the network; see the class for shapes."""
        return output_of(self.model, x.transpose(0, 1).expand(self.steps, -1, *x.shape[2:])).sum(0)


def theirs(model: nn.Module, x: Tensor) -> dict[str, float]:
    """What NeuroBench counts for each of the sequences ``(T, B, *)``, a mean.

    One sequence at a time, since it adds up in float32, which is exact up to 2^24.
    """
    wrapped = TorchModel(SamplesFirst(model, len(x)))
    if x.stride(0) == 0:  # each step is the same
        x = x[:1]
    data = DataLoader(TensorDataset(x.transpose(0, 1), torch.zeros(x.shape[1])), batch_size=1)
    static, workload = [Footprint, ConnectionSparsity], [SynapticOperations]
    with torch.no_grad():
        found = Benchmark(wrapped, data, [], [], [static, workload]).run(quiet=True)
    operations = found.pop("SynapticOperations")
    del operations["Dense"]
    return {**found, **operations}


def ours(model: nn.Module, x: Tensor) -> dict[str, float]:
    """The same as this library counts it, all sequences at once."""
    counted = CountedNetwork(model)
    counted(x)
    work = counted.operations()
    return {
        "Footprint": footprint(model),
        "ConnectionSparsity": connection_sparsity(model),
        "Effective_ACs": work.additions,
        "Effective_MACs": work.multiply_accumulates,
    }


def measure(name: str, chosen: argparse.Namespace) -> dict:
    """A pretrained network, counted by both in float32."""
    experiment = load(name, chosen, IMAGES)
    x = next(iter(experiment.task.batches("test"))).x
    model = experiment.model.eval()
    counts = ours(model, x), theirs(model, x)
    return {"model": name} | {
        f"{key}{whose}": round(count[key], 4)
        for key in counts[0]
        for whose, count in zip(("", "_neurobench"), counts, strict=True)
    }


def main() -> int:
    chosen = options(__doc__, "neurobench_counts")
    rows, differ = [], 0
    for name in MODELS:
        rows.append(measure(name, chosen))
        print(name)
        for key, value in rows[-1].items():
            if not key.endswith("_neurobench") and key != "model":
                other = rows[-1][f"{key}_neurobench"]
                differ += value != other
                print(f"  {key:20}{value:16,.2f}{other:16,.2f}")
    write_csv(chosen.output.with_suffix(".csv"), rows)
    print(f"\nsaved {chosen.output}.csv; {differ} counts differ")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())

"""What helps beside filters? Networks of ecg_small with other neurons, delays or recurrence.

    python benchmarks/what_helps.py FOLDER   # of QTDB_train.mat and QTDB_test.mat

All have about as many parameters and are trained alike, with each seed, on the leads as they are.
Each run that ends is saved (CSV), and the next call goes on with the runs that are missing. Prints
the mean of every variant.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import ROOT, earlier_rows
from torch import Tensor, nn

from ecg import SNN, ECGConfig, data, initialise
from snn_lib import (
    AdaptiveNeuron,
    Delay,
    Gaussian,
    Recurrent,
    ResonateAndFireNeuron,
    Sequential,
    SpikingNeuron,
    log_spaced,
)
from snn_lib.data.ecg import WAVES
from snn_lib.files import write_csv
from snn_lib.tasks import SequenceClassification
from snn_lib.training.config import load_config
from snn_lib.training.experiment import Experiment

SEEDS = (2, 3, 4)
EPOCHS = 30
NEURON = 3  # the place of the neurons in ecg_small, between the weights and the trace of spikes
TAU_RESET = 4.0  # of all neurons, in steps, as in ecg.yaml
LONGEST_DELAY = 20  # steps


def with_neuron(make: Callable[[int, Gaussian], nn.Module]) -> Callable[[ECGConfig], Sequential]:
    """The network with other neurons: ``make(number, surrogate)``."""

    def build(config: ECGConfig) -> Sequential:
        layers = [*SNN(config)]
        surrogate = Gaussian(config.hyperparameters.surrogate_width)
        layers[NEURON] = make(config.hyperparameters.neurons[0], surrogate)
        return Sequential(*layers)

    return build


def adaptive(number: int, surrogate: Gaussian) -> nn.Module:
    """Thresholds that rise by each spike, for 10 to 200 steps."""
    return AdaptiveNeuron(number, TAU_RESET, log_spaced(10, 200), 0.05, surrogate=surrogate)


def resonating(number: int, surrogate: Gaussian) -> nn.Module:
    """Membranes that ring as the filters do."""
    memory, frequency = log_spaced(2, 50), log_spaced(0.0025, 0.125)
    return ResonateAndFireNeuron(number, memory, frequency, TAU_RESET, surrogate=surrogate)


def trained_decay(number: int, surrogate: Gaussian) -> nn.Module:
    """The decay of each reset is trained; that of the filters always is."""
    return SpikingNeuron(number, TAU_RESET, surrogate=surrogate, train_decay=True)


def recurrent(number: int, surrogate: Gaussian) -> nn.Module:
    """Spikes come back through weights, which are small at first."""
    weights = nn.Linear(number, number, bias=False)
    nn.init.normal_(weights.weight, std=0.1 / number**0.5)
    return Recurrent(weights, SpikingNeuron(number, TAU_RESET, surrogate=surrogate))


def delayed(config: ECGConfig) -> Sequential:
    """Each input has a delay of its own before each of its filters."""

    def draw(shape: tuple[int, ...]) -> Tensor:
        return LONGEST_DELAY * torch.rand(shape)

    repeat, filters, *others = SNN(config)
    return Sequential(repeat, Delay(filters.shape, draw, LONGEST_DELAY), filters, *others)


VARIANTS = {  # and the neurons that make about 1,850 parameters
    "filters alone": (36, SNN),
    "adaptive neurons": (36, with_neuron(adaptive)),
    "resonate-and-fire neurons": (36, with_neuron(resonating)),
    "trained decays of the reset": (35, with_neuron(trained_decay)),
    "trained delays": (35, delayed),
    "recurrence": (24, with_neuron(recurrent)),
}


def trained(variant: str, seed: int, folder: Path, runs: str, epochs: int) -> dict:
    """Trains a network; what it reaches at the epoch that validation recordings choose."""
    neurons, build = VARIANTS[variant]
    overrides = [
        f"dataset_path={folder}",
        f"runs_path={runs}",
        f"seed={seed}",
        "device=cpu",
        "exchange_leads=false",
        f"hyperparameters.epoch={epochs}",
        f"hyperparameters.neurons=[{neurons}]",
    ]
    config = load_config(ECGConfig, ROOT / "configs" / "ecg_small.yaml", overrides)
    task = SequenceClassification(data, None, classes=WAVES, config_class=ECGConfig)
    experiment = Experiment(build, task, config, initialise)
    found = experiment.train()
    return {
        "variant": variant,
        "seed": seed,
        "neurons": neurons,
        "parameters": sum(p.numel() for p in experiment.model.parameters()),
        "epoch": found["best"]["epoch"],
        "validation": round(found["best"]["validation_accuracy"], 4),
        "test": round(found["test"]["accuracy"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of QTDB_train.mat and QTDB_test.mat")
    default = ROOT / "benchmarks" / "results" / "what_helps"
    parser.add_argument("--output", type=Path, default=default, help="path without .csv")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    chosen = parser.parse_args()
    path = chosen.output.with_suffix(".csv")
    rows = earlier_rows(path)
    done = {(row["variant"], int(row["seed"])) for row in rows}
    if done:
        print(f"{len(done)} of {len(VARIANTS) * len(SEEDS)} runs are in {path} and not done again")
    with tempfile.TemporaryDirectory() as runs:
        for seed in SEEDS:
            for variant in VARIANTS:
                if (variant, seed) not in done:
                    rows.append(trained(variant, seed, chosen.folder, runs, chosen.epochs))
                    write_csv(path, rows)
    for variant in VARIANTS:
        own = [100 * float(row["test"]) for row in rows if row["variant"] == variant]
        print(f"{variant}: {statistics.mean(own):.2f} ± {statistics.stdev(own):.2f} % of the steps")


if __name__ == "__main__":
    main()

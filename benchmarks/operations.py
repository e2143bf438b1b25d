"""Accuracy against operations: encodings, numbers of time steps, penalties, early answers.

    python benchmarks/operations.py           # the pretrained models, and what has been trained
    python benchmarks/operations.py --train   # first trains the short runs that are missing

Saves a row for each model (CSV) and a chart: the error on the test images against the operations at
the weights for each image, and what stopping early saves. A short run is snn_mlp_1 trained for
EPOCHS epochs; its row is kept, so that the command goes on where it was stopped. The dense network
has the same size and is trained as snn_mlp_1 is. It is drawn twice: with all its products, and with
those alone in which neither the pixel or activation nor the weight is zero.
"""

import argparse
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import pretrained
import torch
from measuring import ROOT, earlier_rows, options
from torch import Tensor, nn

from snn_lib import Sequential
from snn_lib.containers import tensors_in
from snn_lib.data.batches import Batch
from snn_lib.files import write_csv
from snn_lib.inspection.operations import (
    PICOJOULES_ADDITION,
    PICOJOULES_MULTIPLICATION,
    connection_sparsity,
    footprint,
)
from snn_lib.inspection.plotting import BLACK, BLUE, GREEN, GREY, ORANGE
from snn_lib.tasks.digits import DigitClassification, DigitConfig
from snn_lib.training.config import load_config
from snn_lib.training.experiment import Experiment
from snn_mlp_1 import SNN

EPOCHS = 1
# For 64 bits from an SRAM of 1 MB, in which weights of 8 bits lie, and from one of 32 kB, in which
# states of 32 bits lie: Horowitz, ISSCC 2014, doi 10.1109/ISSCC.2014.6757323.
PICOJOULES_WEIGHTS, PICOJOULES_STATES = 100, 20
LEADS = (1, 2, 3, 4, 6)
COLORS = {"constant": BLUE, "poisson": ORANGE, "latency": GREEN}
BEFORE = ("snn_mlp_1", "snn_mlp_1_poisson", "snn_mlp_1_latency")
BEHIND = tuple(f"{name}_behind" for name in BEFORE)
PRETRAINED = BEFORE + BEHIND
DENSE, SPARING, SIZES = "dense network", "dense network, as sparing", (784, 500, 500, 10)
FAINT = 0.5  # grey level up to which pixels are left out
PENALTY = 0.3  # on the mean output of the first hidden layer, whose units cost most


def short_runs() -> dict[str, list[str]]:
    """Overrides of every short run, by name."""
    runs = {}
    for encoding in COLORS:
        for steps in (4, 8, 12, 25):
            for penalty in (0.0, 0.1):
                name = f"{encoding}, T = {steps}" + (", penalty" if penalty else "")
                runs[name] = [
                    f"hyperparameters.encoding={encoding}",
                    f"hyperparameters.length={steps}",
                    f"latency.span={max(2, 2 * steps // 3)}",
                    f"hyperparameters.rate_penalty={penalty}",
                    f"hyperparameters.target_rate={0.03 if penalty else 0}",
                    f"hyperparameters.epoch={EPOCHS}",
                ]
    return runs


def row_of(name: str, experiment: Experiment, leads: tuple[float, ...] = LEADS) -> dict:
    """What a trained model reaches on the test images, and what it takes."""
    metrics, activity = experiment.evaluate("test")
    settings = experiment.settings
    with experiment.autocast():
        counted, _, early = experiment.task.stop_early(experiment.model, leads)
    work = counted.operations()
    return {
        "model": name,
        "encoding": settings.encoding if leads else "dense",
        "steps": settings.length if leads else 1,
        "accuracy": round(metrics["accuracy"], 4),
        "spikes": round(counted.spikes()),
        "additions": round(work.additions),
        "multiply_accumulates": round(work.multiply_accumulates),
        "filters": round(work.filters),
        "neurons": round(work.neurons),
        "dense_operations": round(counted.dense_operations()),
        "microjoules_estimate": round(1e6 * work.energy(), 3),
        "activity_sparsity": round(activity.activity_sparsity(), 4),
        "connection_sparsity": round(connection_sparsity(experiment.model), 4),
        "footprint_bytes": footprint(experiment.model),
        "states": states_of(experiment),
    } | {
        f"{key}_lead_{row['lead']}": round(row[key], 4)
        for row in early
        for key in ("accuracy", "steps", "operations")
    }


@torch.no_grad()
def states_of(experiment: Experiment) -> int:
    """How many numbers the network remembers from a step to the next."""
    x = next(experiment.task.batches("test")).x[:1, :1]
    return sum(tensor.numel() for tensor in tensors_in(experiment.model.eval()(x)[1]))


def effort(row: dict, stopped: str = "") -> dict[str, float]:
    """What an image takes beside the operations at the weights; of all steps or stopped at a lead.

    Each operation reads a weight of 8 bits. Each step reads and writes all states, and compares the
    outputs with the two largest so far.
    """
    steps = float(row[f"steps{stopped}"])
    operations, share = point(row, stopped)[0], steps / float(row["steps"])
    states = 2 * 4 * float(row["states"]) * steps
    multiplies = share * (float(row["filters"]) + float(row["neurons"]))
    spiking = float(row["additions"]) > 0
    product = PICOJOULES_ADDITION + PICOJOULES_MULTIPLICATION
    arithmetic = operations * (PICOJOULES_ADDITION if spiking else product) + multiplies * product
    memory = operations / 8 * PICOJOULES_WEIGHTS + states / 8 * PICOJOULES_STATES
    return {
        "multiply-accumulates of filters and neurons": multiplies,
        "comparisons to stop": 2 * SIZES[-1] * steps if stopped else 0,
        "bytes of weights": operations,
        "bytes of states": states,
        "microjoules of arithmetic": 1e-6 * arithmetic,
        "microjoules with memory": 1e-6 * (arithmetic + memory),
    }


class FirstStep(nn.Module):
    """The first step of a sequence, ``(T, B, *)`` to ``(1, B, *)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:1]


def dense_network(config: DigitConfig) -> Sequential:
    """The network of the same size with ReLU, which sees each image once.

    Shape:
        An image that is constant over time ``(T, B, 784)`` to logits ``(1, B, 10)``.
    """
    layers: list[nn.Module] = [FirstStep()]
    for inputs, outputs in pairwise(SIZES):
        dropout = nn.Dropout(config.hyperparameters.dropout)
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), dropout]
    return Sequential(*layers[:-2])


class Bright(nn.Module):
    """Pixels without the faint ones."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x > FAINT)


def sparing_network(config: DigitConfig) -> Sequential:
    """The dense network without faint pixels; its shape is the same."""
    return Sequential(Bright(), *dense_network(config))


class Sparing(DigitClassification):
    """Digits, with a penalty on what a dense network's first hidden layer returns."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict]:
        loss, sums = super().loss(model, batch)
        if model.training:
            loss = loss + PENALTY * model[:4](batch.x)[0].mean()
        return loss, sums


def train(
    network: Callable[[DigitConfig], nn.Module],
    overrides: list[str],
    chosen: argparse.Namespace,
    task: type[DigitClassification] = DigitClassification,
) -> Experiment:
    """Trains a network with the settings of snn_mlp_1.yaml, but for what is overridden."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"dataset_path={ROOT / 'dataset'}", f"device={chosen.device}"]
        paths.append(f"runs_path={folder}")
        if chosen.smoke:
            sizes = ("training_size=64", "validation_size=10", "test_size=10")
            paths += [f"mnist_config.{size}" for size in sizes]
        config = load_config(DigitConfig, ROOT / "snn_mlp_1.yaml", overrides + paths)
        experiment = Experiment(network, task(), config)
        experiment.train()  # and leaves the best epoch in the model
    return experiment


def chart(path: Path, rows: list[dict]) -> None:
    """Error against operations; a dot is a short run, a line a pretrained model stopped early."""
    figure, axes = plt.subplots(figsize=(10.5, 5), layout="constrained")
    for encoding, color in COLORS.items():
        for row in (row for row in rows if row["encoding"] == encoding):
            if row["model"] in PRETRAINED:
                early = [point(row, f"_lead_{lead}") for lead in LEADS]
                x, y = zip(*early, point(row), strict=True)
                behind = row["model"] in BEHIND
                label = f"{encoding}, filters {'behind' if behind else 'before'} the weights"
                axes.plot(x, y, "o-" if behind else "o:", color=color, ms=4, label=label)
            else:
                axes.scatter(*point(row), s=18, color=color, alpha=0.4, lw=0)
    if any(row["model"] not in (*PRETRAINED, DENSE, SPARING) for row in rows):
        axes.scatter([], [], s=18, color=GREY, alpha=0.4, lw=0, label="one epoch, filters before")
    for row in rows:
        if row["model"] == DENSE:
            (skipping, error), every = point(row), float(row["dense_operations"])
            axes.plot(every, error, "*", color=BLACK, ms=10, label="dense, multiplies everything")
            axes.plot(skipping, error, "*", color=BLACK, mfc="w", ms=10, label="dense, skips zeros")
        if row["model"] == SPARING:
            label = "the same, trained for it"
            axes.plot(*point(row), "P", color=BLACK, mfc="w", ms=8, label=label)
    axes.set(xscale="log", yscale="log", xlabel="operations at the weights for an image")
    axes.set_ylabel("test images not recognised, %")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted("{x:g}")
    axes.margins(0.08)
    axes.grid(which="both", alpha=0.3)
    title = "lines: stopped 1, 2, 3, 4, 6 spikes\nahead, and after all steps"
    figure.legend(title=title, loc="outside right upper")
    figure.savefig(path.with_suffix(".png"), dpi=120)


def point(row: dict, stopped: str = "") -> tuple[float, float]:
    """Operations, and the error in per cent; of all steps or if stopped at a lead."""
    kinds = [f"operations{stopped}"] if stopped else ["additions", "multiply_accumulates"]
    error = 100 * (1 - float(row[f"accuracy{stopped}"]))
    return sum(float(row[kind]) for kind in kinds), error


def main() -> None:
    text = "first train the short runs that are missing"
    chosen = options(__doc__, "operations", train=text)
    path = chosen.output.with_suffix(".csv")
    kept = [row for row in earlier_rows(path) if row["model"] not in PRETRAINED]
    rows = [row_of(name, pretrained.load(name, chosen)) for name in PRETRAINED]
    done = {row["model"] for row in kept}
    epochs = ["hyperparameters.epoch=1"] if chosen.smoke else []
    if chosen.train and DENSE not in done:
        kept.insert(0, row_of(DENSE, train(dense_network, epochs, chosen), leads=()))
        write_csv(path, rows + kept)
    if chosen.train and SPARING not in done:
        teachers = f"mnist_config.teachers=[{ROOT / 'benchmarks/results/dense_conv'}]"
        settings = [teachers, "hyperparameters.epoch=40", *epochs]
        trained = train(sparing_network, settings, chosen, Sparing)
        kept.insert(1, row_of(SPARING, trained, leads=()))
        write_csv(path, rows + kept)
    missing = {name: run for name, run in short_runs().items() if name not in done}
    for name, overrides in list(missing.items())[: 2 if chosen.smoke else None]:
        if chosen.train:
            kept.append(row_of(name, train(SNN, overrides, chosen)))
            write_csv(path, rows + kept)
    for row in rows + kept:
        operations, error = point(row)
        print(f"{row['model']}: {100 - error:.2f} %, {operations:,.0f} synaptic operations")
    write_csv(path, rows + kept)
    rivals = [(row, "") for row in rows + kept if row["model"] in (BEHIND[-1], DENSE, SPARING)]
    for row, stopped in [(rows[-1], "_lead_2"), *rivals]:
        print(f"\n{row['model']}{', at a lead of two' if stopped else ''}:")
        for name, value in effort(row, stopped).items():
            print(f"  {value:,.2f} {name}")
    chart(chosen.output, rows + kept)
    print(f"\nsaved {chosen.output}.csv and .png")


if __name__ == "__main__":
    main()

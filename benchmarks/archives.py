"""How time_series.py does on every data set that aeon brings along, beside what is usual there.

    python benchmarks/archives.py

One recipe, the defaults of time_series.py, for all sets, five seeds each; the other encodings of
the input, a seed each; an LSTM and a GRU of as many parameters in the same loop; and from aeon
MiniRocket and the nearest neighbour by dynamic time warping, on the whole training part as it is,
for MiniRocket at one length. Seconds are those of the processor, whatever else it does meanwhile.

Every row goes into the CSV when it is finished, and a later call goes on from there. Prints the
table and draws the accuracies.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from measuring import ROOT, earlier_rows, machine, options
from torch import nn

from snn_lib import Sequential
from snn_lib.data.augmentation import resample
from snn_lib.data.sequences import collate
from snn_lib.data.series import load_series
from snn_lib.files import write_csv
from snn_lib.tasks.time_series import TimeSeries, TimeSeriesConfig
from snn_lib.time_series import build_network, initialise
from snn_lib.training.config import load_config
from snn_lib.training.experiment import Experiment

SETS = (
    "UnitTest",
    "ItalyPowerDemand",
    "JapaneseVowels",
    "Covid3Month_disc",
    "GunPoint",
    "BasicMotions",
    "ArrowHead",
    "PickupGestureWiimoteZ",
    "OSULeaf",
    "ACSF1",
)
# They are trained by gradients; and of longer sequences an epoch takes minutes.
RECURRENT_RECIPE = (
    "hyperparameters.length=128",
    "hyperparameters.dropout=0.2",
    "optimizer.optimizer_choice=AdamW",
    "optimizer.gradient_clipping=1",
    "scheduler.scheduler_choice=OneCycleLR",
    "scheduler.OneCycleLR.max_lr=0.003",
    "augmentation.noise=0.1",
    "augmentation.scale=0.1",
    "augmentation.stretch=1.1",
)
EPOCHS, SHOWN = 30, 256  # of so many sequences at least: a smaller set is shown more often
ENCODINGS = ("current", "population", "delta")
RECURRENT = {"nn.LSTM": nn.LSTM, "nn.GRU": nn.GRU}
DTW, MINIROCKET = "1-NN DTW", "MiniRocket"
SPIKING = "SNN-IIR"
OTHERS = tuple(f"{SPIKING}, {encoding}" for encoding in ENCODINGS[1:])
METHODS = (SPIKING, *RECURRENT, MINIROCKET, DTW, *OTHERS)
SEEDS = range(5)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def recurrent(kind: type[nn.RNNBase], config: TimeSeriesConfig, task: TimeSeries) -> nn.Module:
    """One layer, as wide as makes it the largest with no more parameters than the spiking one."""
    classes, dropout = len(task.classes), nn.Dropout(config.hyperparameters.dropout)

    def sized(width: int) -> nn.Module:
        return Sequential(kind(task.preparation.inputs, width), dropout, nn.Linear(width, classes))

    most = parameters(build_network(config.hyperparameters, task.preparation, classes))
    width = 1
    while parameters(sized(width + 1)) <= most:
        width += 1
    return sized(width)


class Whole(TimeSeries):
    """Trains on all sequences: the sets are too small to hold some out."""

    def read(self, config: TimeSeriesConfig) -> dict:
        parts = super().read(config)
        return {**parts, "validation": parts["train"]}


def trained(name: str, method: str, seed: int, smoke: bool) -> dict:
    """The row of a network that is trained by the loop of the experiments."""
    recipe = RECURRENT_RECIPE if method in RECURRENT else []
    config = load_config(TimeSeriesConfig, ROOT / "time_series.yaml", recipe)
    config.dataset, config.seed, config.device = name, seed, "cpu"
    config.dataset_path = str(ROOT / "dataset")
    config.hyperparameters.encoding = method.partition(", ")[2] or ENCODINGS[0]
    if smoke:
        config.hyperparameters.neurons = 64
    task = Whole()
    if method in RECURRENT:
        count = len(load_series(name, ROOT / "dataset").parts["train"][1])
        config.hyperparameters.epoch = 1 if smoke else max(EPOCHS, -(-EPOCHS * SHOWN // count))

    def build(config: TimeSeriesConfig) -> nn.Module:
        if method in RECURRENT:
            return recurrent(RECURRENT[method], config, task)
        return build_network(config.hyperparameters, task.preparation, len(task.classes))

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config.runs_path = folder
        begin = time.process_time()
        first_weights = None if method in RECURRENT else initialise
        experiment = Experiment(build, task, config, first_weights)
        experiment.train()
        seconds = time.process_time() - begin
        metrics, activity = experiment.evaluate("test")
        spikes = sum(map(float, activity.spike_counts.values()))
    row = {"accuracy": metrics["accuracy"], "seconds": round(seconds, 1)}
    row["parameters"] = parameters(experiment.model)
    if activity.neurons:
        row["spikes"] = round(spikes / experiment.task.split("test").count)
    return row


def fitted(name: str, method: str, seed: int) -> dict:
    """The row of a classifier of aeon's."""
    from aeon.classification.convolution_based import MiniRocketClassifier
    from aeon.classification.distance_based import KNeighborsTimeSeriesClassifier

    parts = load_series(name, ROOT / "dataset").parts
    if method == MINIROCKET:
        classifier = MiniRocketClassifier(random_state=seed)
        longest = max(len(sequence) for x, _ in parts.values() for sequence in x)
        x, test = (at_length(x, longest) for x, _ in (parts["train"], parts["test"]))
    else:
        classifier = KNeighborsTimeSeriesClassifier(n_neighbors=1, distance="dtw")
        x, test = ([s.T.double().numpy() for s in x] for x, _ in (parts["train"], parts["test"]))
    begin = time.process_time()
    classifier.fit(x, parts["train"][1].numpy())
    found = classifier.predict(test)
    seconds = time.process_time() - begin
    return {
        "accuracy": float(np.mean(found == parts["test"][1].numpy())),
        "seconds": round(seconds, 1),
    }


def at_length(x: list[torch.Tensor], steps: int) -> np.ndarray:
    """Sequences stretched to one length, ``(samples, channels, T)`` as aeon has them."""
    batch, _, lengths = collate([(sequence.float(), 0) for sequence in x])
    if lengths is None:
        lengths = torch.full((len(x),), len(batch))
    whole = resample(batch, lengths, torch.zeros(len(x)), lengths, torch.full_like(lengths, steps))
    return whole.permute(1, 2, 0).double().numpy()


def jobs(chosen: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Sets, methods and seeds, what matters most first."""
    seeds, sets = (SEEDS[:1], SETS[:1]) if chosen.smoke else (SEEDS, SETS)
    plan = (
        ((SPIKING,), seeds),
        ((MINIROCKET,), seeds),
        ((DTW,), seeds[:1]),  # which draws nothing
        (RECURRENT, seeds),
        (OTHERS, seeds[:1]),
    )
    for methods, own in plan:
        yield from ((name, method, seed) for seed in own for method in methods for name in sets)


def accuracies(rows: list[dict], name: str, method: str) -> list[float]:
    """In percent, of the seeds that there are."""
    return [
        100 * float(row["accuracy"])
        for row in rows
        if (row["dataset"], row["method"]) == (name, method)
    ]


def table(rows: list[dict]) -> Iterator[str]:
    """Lines of Markdown: mean and deviation for every set and method, and the means over all sets.

    A method's mean is that of the sets on which every method has a result.
    """
    methods = [m for m in METHODS if any(row["method"] == m for row in rows)]
    sets = [name for name in SETS if any(row["dataset"] == name for row in rows)]
    yield "| test accuracy, % | " + " | ".join(methods) + " |"
    yield "|---" * (1 + len(methods)) + "|"
    complete = [name for name in sets if all(accuracies(rows, name, m) for m in methods)]

    def shown(values: list[float]) -> str:
        if not values:
            return ""
        return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")

    for name in sets:
        cells = (shown(accuracies(rows, name, method)) for method in methods)
        yield f"| {name} | " + " | ".join(cells) + " |"
    if complete:
        means = (mean(mean(accuracies(rows, n, m)) for n in complete) for m in methods)
        yield f"| mean of {len(complete)} | " + " | ".join(f"{value:.1f}" for value in means) + " |"
    for key, unit in (
        ("seconds", "seconds to train (aeon's: also to compile and to test), mean"),
        ("spikes", "spikes a sequence, mean"),
    ):
        cells = []
        for method in methods:
            found = [float(r[key]) for r in rows if r["method"] == method and r.get(key)]
            cells.append(f"{mean(found):,.0f}" if found else "")
        yield f"| {unit} | " + " | ".join(cells) + " |"


def chart(path: Path, rows: list[dict]) -> None:
    """Draws the mean accuracy of every method on every set, and its deviation."""
    import matplotlib.pyplot as plt

    methods = [m for m in METHODS[:5] if any(row["method"] == m for row in rows)]
    sets = [name for name in SETS if any(row["dataset"] == name for row in rows)]
    figure, axes = plt.subplots(figsize=(7.5, 0.8 + 0.55 * len(sets)), layout="constrained")
    for offset, method in enumerate(methods):
        found = {place: accuracies(rows, name, method) for place, name in enumerate(sets)}
        found = {place: values for place, values in found.items() if values}
        axes.errorbar(
            [mean(values) for values in found.values()],
            [place + 0.12 * (offset - 2) for place in found],
            xerr=[stdev(v) if len(v) > 1 else 0 for v in found.values()],
            fmt="Do^s*"[offset],
            color=f"C{offset}",
            label=method,
        )
    axes.set_yticks(range(len(sets)), sets)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("test accuracy, %: mean and deviation over the seeds")
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(methods))
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> None:
    chosen = options(__doc__, "archives")
    path = chosen.output.with_suffix(".csv")
    rows = earlier_rows(path)
    done = {(row["dataset"], row["method"], int(row["seed"])) for row in rows}
    for name, method, seed in jobs(chosen):
        if (name, method, seed) in done:
            continue
        if method in (DTW, MINIROCKET):
            row = fitted(name, method, seed)
        else:
            row = trained(name, method, seed, chosen.smoke)
        rows.append({"dataset": name, "method": method, "seed": seed, **row})
        rows[-1]["machine"] = machine(chosen)
        write_csv(path, rows)
        print(f"{name}, {method}, seed {seed}: {100 * row['accuracy']:.1f} %", flush=True)
    print("", *table(rows), sep="\n")
    chart(chosen.output, rows)
    print(f"\nsaved {chosen.output}.csv and .png")


if __name__ == "__main__":
    main()

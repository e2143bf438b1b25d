"""How many patterns the associative memory holds, beside looking them up in a table.

    python benchmarks/capacity.py           # what has been trained, and the baseline
    python benchmarks/capacity.py --train   # first trains the networks that are missing

The patterns are random closed curves, drawn as the ten figures of dataset/make_patterns.py are. For
each number of them a network of associative_memory.yaml is trained for EPOCHS epochs of SAMPLES
samples. The baseline knows the patterns by heart: at every step it answers with the stored one that
correlates most with what it has seen so far. Saves error and retrieval of both under several kinds
of damage (CSV), and a chart.
"""

import argparse
import runpy
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from measuring import ROOT, earlier_rows, options
from torch import Tensor, nn

from associative_memory import SNN
from snn_lib.data.patterns import Damage, single_damage
from snn_lib.files import write_csv
from snn_lib.inspection.plotting import BLUE
from snn_lib.tasks.association import Association, AssociationConfig
from snn_lib.training.config import load_config
from snn_lib.training.experiment import Experiment

NUMBERS = (10, 20, 40, 80)
EPOCHS = 20
SAMPLES = 1000  # an epoch, of all patterns together
HARMONICS = 4  # of a curve
DAMAGE = {
    "undamaged": single_damage("rows_removed", 0),
    "half of the trains removed": single_damage("rows_removed", 150),
    "noise of 2 %": single_damage("noise_probability", 0.02),
}
STYLES = dict(zip(DAMAGE, ("-", "--", ":"), strict=True))


class NearestPattern(nn.Module):
    """Answers at every step with the stored pattern that correlates most with the steps so far.

    Compared are the spike trains behind the output filter, so that jitter matters little.

    Shape:
        Damaged patterns ``(T, B, N)`` to the spikes of stored ones, ``(T, B, N)``.
    """

    def __init__(self, task: Association) -> None:
        super().__init__()
        self.filter, self.targets = task.filter, task.targets
        self.stored = task.filter(task.patterns.to(task.device))[0]  # (T, patterns, N)

    def forward(self, x: Tensor) -> Tensor:
        """See the class for shapes."""
        seen = self.filter(x)[0]
        overlap = torch.bmm(seen, self.stored.transpose(1, 2)).cumsum(0)  # (T, B, patterns)
        power = self.stored.square().sum(2).cumsum(0)[:, None]  # (T, 1, patterns)
        nearest = (overlap / power.sqrt().clamp(min=1e-6)).argmax(2)  # (T, B)
        return self.targets[torch.arange(len(x), device=x.device)[:, None], nearest]


def curve(random: np.random.Generator) -> list[tuple[float, float]]:
    """A closed curve of a few harmonics, the higher the weaker."""
    angle = np.linspace(0, 2 * np.pi, 200)
    order = np.arange(1, HARMONICS + 1)[:, None]
    phases = random.uniform(0, 2 * np.pi, (2, HARMONICS, 1))
    sizes = random.normal(size=(2, HARMONICS, 1)) / order
    x, y = (sizes * np.cos(order * angle + phases)).sum(1)
    return list(zip(x, y, strict=True))


def experiment_with(number: int, folder: str, chosen: argparse.Namespace) -> Experiment:
    """The associative memory of so many random patterns."""
    draw = runpy.run_path(str(ROOT / "dataset" / "make_patterns.py"))["make_patterns"]
    random = np.random.default_rng(0)
    path = Path(folder) / f"{number}.npy"
    np.save(path, draw([curve(random)] for _ in range(number)))
    samples = (40 if chosen.smoke else SAMPLES) // number
    overrides = [
        f"dataset_path={path}",
        f"runs_path={folder}",
        f"device={chosen.device}",
        f"hyperparameters.epoch={1 if chosen.smoke else EPOCHS}",
        f"pattern_config.training_samples={samples}",
        f"pattern_config.validation_samples={-(-samples // 10)}",
        "pattern_config.test_samples=1",
    ]
    config = load_config(AssociationConfig, ROOT / "associative_memory.yaml", overrides)
    return Experiment(SNN, Association(), config)


def rows_of(
    number: int, answering: str, task: Association, model: nn.Module, damage: dict[str, Damage]
) -> list[dict]:
    """A row for each kind of damage, on about a hundred samples."""
    rows = []
    for name, kind in damage.items():
        metrics = task.measure(model, kind, max(1, 100 // number))
        numbers = {key: round(metrics[key], 4) for key in ("error", "late_error", "retrieval")}
        rows.append({"patterns": number, "answering": answering, "damage": name} | numbers)
    return rows


def chart(path: Path, rows: list[dict]) -> None:
    """The network's error against the number of patterns: a line for each kind of damage."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, style in STYLES.items():
        own = [r for r in rows if (r["answering"], r["damage"]) == ("network", name)]
        errors = [100 * float(row["error"]) for row in own]
        numbers = [int(row["patterns"]) for row in own]
        axes.plot(numbers, errors, style, color=BLUE, marker="o", ms=4, label=name)
    axes.set(xscale="log", xlabel="patterns stored", ylim=(0, None))
    axes.set_ylabel("error, % of the target's power")
    axes.set_xticks(NUMBERS, NUMBERS)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> None:
    chosen = options(__doc__, "capacity", train="first train the networks that are missing")
    path = chosen.output.with_suffix(".csv")
    trained = [row for row in earlier_rows(path) if row["answering"] == "network"]
    done, looked_up = {int(row["patterns"]) for row in trained}, []
    for number in NUMBERS[: 1 if chosen.smoke else None]:
        with tempfile.TemporaryDirectory() as folder:
            experiment = experiment_with(number, folder, chosen)
            task = experiment.task
            looked_up += rows_of(number, "table", task, NearestPattern(task), DAMAGE)
            if chosen.train and number not in done:
                experiment.train()  # and leaves the best epoch in the model
                trained += rows_of(number, "network", task, experiment.model, DAMAGE)
        write_csv(path, trained + looked_up)
    for row in trained + looked_up:
        print(
            f"{row['answering']} of {row['patterns']} patterns, {row['damage']}: error "
            f"{100 * float(row['error']):.1f} %, retrieval {100 * float(row['retrieval']):.0f} %"
        )
    chart(chosen.output, trained + looked_up)
    print(f"\nsaved {chosen.output}.csv and .png")


if __name__ == "__main__":
    main()

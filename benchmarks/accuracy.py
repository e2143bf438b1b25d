"""What the pretrained MNIST networks reach, what it costs, and how early they can be stopped.

    python benchmarks/accuracy.py

Prints and saves the accuracy on the test images if the output spikes are counted up to each time
step (CSV and a chart), and spikes and synaptic operations per image (CSV).
"""

import argparse
from pathlib import Path

from measuring import options
from pretrained import NAMES, load

from snn_lib.files import write_csv

MODELS = [name for name in NAMES if name.startswith(("snn_mlp", "snn_conv"))]


def measure(name: str, chosen: argparse.Namespace) -> dict:
    """Accuracy after each step, and activity, of one pretrained model."""
    experiment = load(name, chosen)
    metrics, _ = experiment.evaluate("test")
    with experiment.autocast():
        counted, accuracy, _ = experiment.task.stop_early(experiment.model)
    return {
        "model": name,
        "encoding": experiment.settings.encoding,
        "accuracy": round(metrics["accuracy"], 4),
        "spikes_per_image": round(counted.spikes()),
        "synaptic_operations_per_image": round(counted.synaptic_operations()),
        **{f"accuracy_{step}": round(float(value), 4) for step, value in enumerate(accuracy, 1)},
    }


def steps_of(row: dict) -> int:
    """How many time steps the model of a row runs."""
    return sum(key.startswith("accuracy_") for key in row)


def show(row: dict) -> None:
    """Prints the row of a model."""
    steps = steps_of(row)
    early = ", ".join(
        f"{step}: {100 * row[f'accuracy_{step}']:.2f} %" for step in range(5, steps, 5)
    )
    print(
        f"{row['model']}: {100 * row['accuracy']:.2f} % (after fewer steps {early}), "
        f"{row['spikes_per_image']:,} spikes and {row['synaptic_operations_per_image']:,} synaptic "
        "operations per image"
    )


def chart(path: Path, rows: list[dict]) -> None:
    """Draws the error over the number of time steps, a line for each model."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    for row in rows:
        steps = range(1, steps_of(row) + 1)
        errors = [100 * (1 - row[f"accuracy_{step}"]) for step in steps]
        style = "--" if row["encoding"] == "poisson" else "-"
        axes.semilogy(steps, errors, style, label=f"{row['model']}: {100 * row['accuracy']:.2f} %")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="time steps at inference", ylabel="test images not recognised, %")
    axes.grid(which="both", alpha=0.3)
    axes.legend(title="after all steps")
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> None:
    chosen = options(__doc__, "accuracy")
    rows = [measure(name, chosen) for name in MODELS]
    for row in rows:
        show(row)
    write_csv(chosen.output.with_suffix(".csv"), rows)
    chart(chosen.output, rows)
    print(f"\nsaved {chosen.output}.csv and .png")


if __name__ == "__main__":
    main()

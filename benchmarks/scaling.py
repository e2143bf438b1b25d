"""How time and memory of a training step grow with the time steps T, the batch and the width.

    python benchmarks/scaling.py

Sweeps one of them at a time, for this library and for the dense network of the same matrix
products, all points of a sweep measured in turns. Prints and saves, as CSV and as a chart, medians
and the slope of a straight line through them on log-log axes: 1 is linear, 2 quadratic.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from measuring import interleave, machine, options, quartiles
from networks import FLOOR, MEMORY, SNN, ChunkedLoss, ChunkedSNN, Network, Variant

from snn_lib.files import write_csv

ROUNDS, SECONDS = 8, 0.2  # visits to each point, and how long one lasts at least

BASE = replace(MEMORY, steps=100, batch=16)
SWEEPS = {
    "time steps": (25, 50, 100, 200, 400, 800, 1600),
    "batch": (4, 8, 16, 32, 64, 128),
    "width": (64, 128, 256, 512, 1024),
}
FITTED_FROM = {"time steps": 100, "batch": 16, "width": 128}  # below, fixed costs show
SMOKE = dict.fromkeys(SWEEPS, (2, 4))


def resized(base: Network, name: str, size: int) -> Network:
    """``base`` with another number of time steps, batch or width."""
    if name == "width":
        return replace(base, sizes=(size,) * len(base.sizes))
    return replace(base, **{{"time steps": "steps", "batch": "batch"}[name]: size})


def variants(device: str) -> list[Variant]:
    """The lines of the chart."""
    return [
        Variant(f"SNN-IIR {device}", SNN, backend=device),
        Variant(f"SNN-IIR {device}, chunks", ChunkedSNN, backend=device),
        Variant(
            f"SNN-IIR {device}, chunks of loss",
            ChunkedLoss,
            backend=device,
            data=Network.trains_and_loss,
        ),
        FLOOR,
    ]


def slope(sizes: list[int], values: list[float]) -> float:
    """Exponent of the power law nearest to the points."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def sweep(name: str, chosen: argparse.Namespace) -> list[dict]:
    """Measures all points of one sweep."""
    base, sizes, rounds, seconds = (
        (BASE.small(), SMOKE[name], 1, 0.0)
        if chosen.smoke
        else (BASE, SWEEPS[name], ROUNDS, SECONDS)
    )
    points = [(variant, size) for variant in variants(chosen.device) for size in sizes]
    subjects = [(variant, resized(base, name, size)) for variant, size in points]
    results = interleave(subjects, chosen, rounds, seconds, kinds=("training",))
    rows = []
    for (variant, size), result in zip(points, results, strict=True):
        first, median, third = quartiles(result["training"])
        rows.append(
            {
                "sweep": name,
                "variant": variant.name,
                "size": size,
                "training_ms": round(median, 3),
                "training_q25": round(first, 3),
                "training_q75": round(third, 3),
                "memory_MB": round(max(result["memory"], 1) / 1e6, 3),
            }
        )
    for variant in variants(chosen.device):
        line = [row for row in rows if row["variant"] == variant.name]
        fitted = [row for row in line if row["size"] >= FITTED_FROM[name]] or line
        for key in ("training_ms", "memory_MB"):
            exponent = slope([row["size"] for row in fitted], [row[key] for row in fitted])
            for row in line:
                row[f"slope_{key}"] = round(exponent, 3)
    return [row | {"machine": machine(chosen)} for row in rows]


def show(rows: list[dict]) -> None:
    """Prints one sweep."""
    for variant in dict.fromkeys(row["variant"] for row in rows):
        line = [row for row in rows if row["variant"] == variant]
        print(
            f"\n{variant} against {line[0]['sweep']}: slope of the time "
            f"{line[0]['slope_training_ms']:.2f}, of the memory {line[0]['slope_memory_MB']:.2f}"
        )
        for row in line:
            spread = f"({row['training_q25']:.1f} to {row['training_q75']:.1f})"
            print(
                f"{row['size']:8}{row['training_ms']:10.1f} ms{spread:>20}"
                f"{row['memory_MB']:10.1f} MB{1e3 * row['training_ms'] / row['size']:10.1f} us each"
            )


def chart(path: Path, rows: list[dict]) -> None:
    """Draws time and memory, a column of axes for each sweep."""
    import matplotlib.pyplot as plt

    labels = {"training_ms": "training step, ms", "memory_MB": "peak memory beyond start-up, MB"}
    figure, grid = plt.subplots(2, len(SWEEPS), figsize=(13, 10), layout="constrained")
    for column, name in enumerate(SWEEPS):
        for axes, (key, label) in zip(grid[:, column], labels.items(), strict=True):
            for variant in dict.fromkeys(row["variant"] for row in rows):
                line = [r for r in rows if (r["sweep"], r["variant"]) == (name, variant)]
                legend = f"{variant}, slope {line[0][f'slope_{key}']:.2f}"
                axes.loglog([r["size"] for r in line], [r[key] for r in line], "o-", label=legend)
            axes.set(xlabel=name, ylabel=label)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
            axes.grid(alpha=0.3)
    figure.suptitle(rows[0]["machine"], fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> None:
    chosen = options(__doc__, "scaling")
    rows = []
    for name in SWEEPS:
        swept = sweep(name, chosen)
        show(swept)
        rows += swept
    write_csv(chosen.output.with_suffix(".csv"), rows)
    chart(chosen.output, rows)
    print(f"\nsaved {chosen.output}.csv and .png")


if __name__ == "__main__":
    main()

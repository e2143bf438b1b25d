"""How long a training step takes as more neurons fire, beside dense networks that do not care.

    python benchmarks/firing_rates.py

The network has its filters behind the weights, so its weights receive spikes. Its input and all its
layers fire at a rate, to which the weights are scaled. The dense network has the same products and
computes no gradient of its input. All points are measured in turns. Prints and saves, as CSV and as
a chart, medians and quartiles.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from measuring import interleave, machine, options, quartiles
from networks import DIGITS, FLOOR, SNN, Network, Variant

from snn_lib.files import write_csv

ROUNDS, SECONDS = 8, 0.2  # visits to each point, and how long one lasts at least
SMOKE = (0.35,)
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35)
PRECISIONS = ("float32", "bfloat16")
SPIKES = replace(DIGITS, images=False, dropout=0.0)


def subjects(rates: Sequence[float], device: str) -> list[tuple[Variant, Network]]:
    """The points of both lines, and the two dense networks."""
    floor = replace(FLOOR, input_gradient=False)
    pairs = [
        (Variant(f"{rate}", partial(SNN, behind=True, rate=rate), backend=device), rate)
        for rate in rates
    ]
    pairs.append((floor, rates[0]))
    return [
        (replace(variant, precision=precision), replace(SPIKES, rate=rate))
        for precision in PRECISIONS
        for variant, rate in pairs
    ]


def chart(path: Path, rows: list[dict]) -> None:
    """Draws the time of a step against the rate, and the dense networks as horizontal lines."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for precision, color in zip(PRECISIONS, ("tab:orange", "tab:blue"), strict=True):
        own = [row for row in rows if row["precision"] == precision]
        line = [row for row in own if row["rate"]]
        (dense,) = (row["training_ms"] for row in own if not row["rate"])
        rates = [100 * row["rate"] for row in line]
        axes.plot(rates, [r["training_ms"] for r in line], "o-", c=color, label=f"SNN, {precision}")
        axes.axhline(dense, color=color, linestyle=":", label=f"dense, {precision}")
    axes.set(xlabel="neurons that fire in a step, %", ylabel="training step, ms", xscale="log")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.set_title(f"{SPIKES}; {rows[0]['machine']}", fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> None:
    chosen = options(__doc__, "firing_rates")
    points, rounds, seconds = subjects(RATES, chosen.device), ROUNDS, SECONDS
    if chosen.smoke:
        points, rounds, seconds = subjects(SMOKE, chosen.device), 1, 0.0
        points = [(variant, network.small()) for variant, network in points]
    results = interleave(points, chosen, rounds, seconds, kinds=("training",))
    rows = []
    for (point, _), result in zip(points, results, strict=True):
        first, median, third = quartiles(result["training"])
        rate = "" if point.name == FLOOR.name else float(point.name)
        row = {"rate": rate, "precision": point.precision, "training_ms": round(median, 3)}
        row |= {"training_q25": round(first, 3), "training_q75": round(third, 3)}
        rows.append(row | {"machine": machine(chosen)})
        name = f"rate {rate:.0%}" if rate else point.name
        print(f"{name:12} {point.precision:9}{median:9.1f} ms ({first:.1f} to {third:.1f})")
    write_csv(chosen.output.with_suffix(".csv"), rows)
    chart(chosen.output, rows)
    print(f"\nsaved {chosen.output}.csv and .png")


if __name__ == "__main__":
    main()

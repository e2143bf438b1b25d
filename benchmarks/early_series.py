"""How soon a series is recognised: accuracy against the share of it that has been seen.

    python benchmarks/early_series.py

A SpikingClassifier is fitted once, on whole series, and follows each test series step by step. What
it says after 10, 20, ... 100 % of the steps is compared with MiniRocket and with SpikingClassifier
fitted anew for each share, on the beginnings of the training series. How sure the stream is stands
beside its accuracy. Means of three seeds.
"""

import sys
from collections.abc import Iterator
from statistics import mean

import numpy as np
import torch
from measuring import ROOT, machine, options

sys.path.insert(0, str(ROOT))
from aeon.classification.convolution_based import MiniRocketClassifier
from aeon.datasets import load_classification

from snn_lib.classifier import SpikingClassifier
from snn_lib.files import write_csv

SETS = "GunPoint", "BasicMotions", "ArrowHead"  # whose series are equally long
SHARES = [tenth / 10 for tenth in range(1, 11)]
SEEDS = range(3)
STREAM, REFITTED, MINIROCKET = "SNN-IIR, one stream", "SNN-IIR, refitted", "MiniRocket, refitted"


def streamed(name: str, seed: int) -> Iterator[dict]:
    """What a stream says of the test series after each share, and how sure it is."""
    x, y = load_classification(name, split="train")
    test, labels = load_classification(name, split="test")
    classifier = SpikingClassifier(random_state=seed).fit(x, y)
    stream, right, sure = classifier.stream(), [], []
    for series, label in zip(test, labels, strict=True):
        stream.reset()
        answers = [stream.step(step) for step in series.T]
        seen = [answers[round(share * len(answers)) - 1] for share in SHARES]
        right.append([answer.label == label for answer in seen])
        sure.append([answer.probabilities.max() for answer in seen])
    found = zip(SHARES, np.mean(right, 0), np.mean(sure, 0), strict=True)
    for share, accuracy, certainty in found:
        yield {"method": STREAM, "share": share, "accuracy": accuracy, "sure": certainty}


def refitted(name: str, seed: int) -> Iterator[dict]:
    """What classifiers say that are fitted to the beginnings of the series."""
    x, y = load_classification(name, split="train")
    test, labels = load_classification(name, split="test")
    for share in SHARES:
        steps = round(share * x.shape[2])
        for method, kind in ((REFITTED, SpikingClassifier), (MINIROCKET, MiniRocketClassifier)):
            classifier = kind(random_state=seed).fit(x[..., :steps], y)
            accuracy = classifier.score(test[..., :steps], labels)
            yield {"method": method, "share": share, "accuracy": accuracy, "sure": ""}


def average(rows: list[dict], name: str, method: str, share: float, what: str) -> float:
    key = name, method, share
    return mean(r[what] for r in rows if (r["dataset"], r["method"], r["share"]) == key)


def chart(path, rows: list[dict]) -> None:
    """A plot for each set, with a line for each method."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["dataset"] for row in rows))
    figure, plots = plt.subplots(
        1, len(names), figsize=(3.6 * len(names), 3.4), sharey=True, layout="constrained"
    )
    for axes, name in zip(np.atleast_1d(plots), names, strict=True):
        for method, colour in ((STREAM, "C0"), (REFITTED, "C1"), (MINIROCKET, "C3")):
            line = [100 * average(rows, name, method, s, "accuracy") for s in SHARES]
            axes.plot([100 * s for s in SHARES], line, "o-", color=colour, label=method)
        line = [100 * average(rows, name, STREAM, s, "sure") for s in SHARES]
        axes.plot([100 * s for s in SHARES], line, "--", color="C0", label="how sure the stream is")
        axes.set(title=name, xlabel="seen of the series, %")
        axes.grid(alpha=0.3)
    np.atleast_1d(plots)[0].set_ylabel("test accuracy, %")
    handles, labels = np.atleast_1d(plots)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> None:
    chosen = options(__doc__, "early_series")
    torch.set_num_threads(chosen.threads)
    rows = []
    for name in SETS[1:2] if chosen.smoke else SETS:
        for seed in [0] if chosen.smoke else SEEDS:
            for row in (*streamed(name, seed), *refitted(name, seed)):
                rows.append({"dataset": name, "seed": seed, **row, "machine": machine(chosen)})
        print(f"| {name}: seen | " + " | ".join(f"{s:.0%}" for s in SHARES) + " |")
        for method in (STREAM, REFITTED, MINIROCKET):
            found = (100 * average(rows, name, method, s, "accuracy") for s in SHARES)
            print(f"| {method} | " + " | ".join(f"{one:.1f}" for one in found) + " |", flush=True)
        write_csv(chosen.output.with_suffix(".csv"), rows)
    chart(chosen.output, rows)
    print(f"saved {chosen.output}.csv and .png")


if __name__ == "__main__":
    main()

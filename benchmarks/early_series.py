"""How soon a series is recognised: accuracy against the share of it that has been seen.

    python benchmarks/early_series.py

A SpikingClassifier is fitted once, with a last layer for each tenth (moments=10), and follows each
test series step by step. Beside what it says after 10, 20, ... 100 % of the steps stand ten
MiniRockets, each fitted to the beginnings of the training series. The dashed line is how sure the
stream is: it should be as high as its accuracy. Everything has one seed.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from aeon.classification.convolution_based import MiniRocketClassifier
from aeon.datasets import load_classification
from measuring import machine, options

from snn_lib.classifier import SpikingClassifier
from snn_lib.files import write_csv

SETS = "GunPoint", "BasicMotions", "ArrowHead"  # whose series are equally long
TENTHS = range(1, 11)
SEED = 0
STREAM, MINIROCKET = "SNN-IIR, one stream", "MiniRocket, ten fits"


def beginning(steps: int, tenth: int) -> int:
    """How many steps so many tenths are."""
    return -(-steps * tenth // 10)


def streamed(name: str, most: int | None) -> Iterator[dict]:
    """What a stream says of the test series after each share, and how sure it is."""
    x, y = load_classification(name, split="train")
    test, labels = load_classification(name, split="test")
    classifier = SpikingClassifier(moments=10, random_state=SEED).fit(x, y)
    stream, right, sure = classifier.stream(), [], []
    for series, label in zip(test[:most], labels[:most], strict=True):
        stream.reset()
        answers = [stream.step(step) for step in series.T]
        seen = [answers[beginning(len(answers), tenth) - 1] for tenth in TENTHS]
        right.append([answer.label == label for answer in seen])
        sure.append([answer.probabilities.max() for answer in seen])
    found = zip(TENTHS, np.mean(right, 0), np.mean(sure, 0), strict=True)
    for tenth, accuracy, certainty in found:
        yield {"method": STREAM, "share": tenth / 10, "accuracy": accuracy, "sure": certainty}


def refitted(name: str) -> Iterator[dict]:
    """What MiniRockets say that are fitted to the beginnings of the series."""
    x, y = load_classification(name, split="train")
    test, labels = load_classification(name, split="test")
    for tenth in TENTHS:
        steps = beginning(x.shape[2], tenth)
        classifier = MiniRocketClassifier(random_state=SEED).fit(x[..., :steps], y)
        accuracy = classifier.score(test[..., :steps], labels)
        yield {"method": MINIROCKET, "share": tenth / 10, "accuracy": accuracy, "sure": ""}


def line(rows: list[dict], name: str, method: str, what: str) -> list[float]:
    """The values of a method on a set, in the order of the shares."""
    return [row[what] for row in rows if (row["dataset"], row["method"]) == (name, method)]


def chart(path: Path, rows: list[dict]) -> None:
    """A plot for each set, with a line for each method."""
    import matplotlib.pyplot as plt

    shares = [tenth / 10 for tenth in TENTHS]
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    size = {"figsize": (3.6 * len(names), 3.4), "layout": "constrained"}
    figure, (plots,) = plt.subplots(1, len(names), sharey=True, squeeze=False, **size)
    for axes, name in zip(plots, names, strict=True):
        for method, colour in ((STREAM, "C0"), (MINIROCKET, "C3")):
            found = line(rows, name, method, "accuracy")
            axes.plot(shares, found, "o-", color=colour, label=method)
        sure = line(rows, name, STREAM, "sure")
        axes.plot(shares, sure, "--", color="C0", label="how sure the stream is")
        axes.set(title=name, xlabel="share of the series that is seen")
        axes.grid(alpha=0.3)
    plots[0].set_ylabel("test accuracy")
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> None:
    chosen = options(__doc__, "early_series")
    rows = []
    for name in SETS[:1] if chosen.smoke else SETS:
        for row in (*streamed(name, 10 if chosen.smoke else None), *refitted(name)):
            rows.append({"dataset": name, **row, "machine": machine(chosen)})
        print(f"| {name}: seen | " + " | ".join(f"{tenth}0 %" for tenth in TENTHS) + " |")
        for method in (STREAM, MINIROCKET):
            found = (f"{100 * one:.1f}" for one in line(rows, name, method, "accuracy"))
            print(f"| {method} | " + " | ".join(found) + " |", flush=True)
        write_csv(chosen.output.with_suffix(".csv"), rows)
    chart(chosen.output, rows)
    print(f"saved {chosen.output}.csv and .png")


if __name__ == "__main__":
    main()

"""Draws the events of an electrocardiogram, the wave of each step, and what a network answers.

    python docs/make_ecg_picture.py --dataset_path FOLDER                  # the pretrained ecg
    python docs/make_ecg_picture.py --dataset_path FOLDER --checkpoint runs/ecg/TIME/best --number 7

A compiled network runs the sequence step by step, as it would follow a live stream. Above are the
events of the four channels. Below, a colour is a wave: the labels, white where there is none, the
network's answers, and in black the steps at which both differ.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of snn_lib
import snn_lib
from snn_lib.data.ecg import WAVES, load_ecg
from snn_lib.errors import require
from snn_lib.inference import compiled
from snn_lib.inspection.plotting import (
    BLACK,
    BLUE,
    GREEN,
    LEGEND,
    ORANGE,
    SKY,
    VERMILION,
)
from snn_lib.training.command_line import exit_with

ROOT = Path(__file__).resolve().parents[1]
PAPER, INK = "#ffffff", "#444444"  # opaque, to be read on a dark page as well
COLORS = [ORANGE, SKY, BLUE, VERMILION, GREEN, "#d9d9d9"]  # of the waves


def draw(x: Tensor, labels: np.ndarray, answers: np.ndarray) -> plt.Figure:
    """Events ``(T, 4)`` above, labels and answers ``(T,)`` below, each a row."""
    figure, (above, below) = plt.subplots(
        *(2, 1), figsize=(10, 3.6), sharex=True, layout="constrained", facecolor=PAPER
    )
    above.eventplot([channel.nonzero()[:, 0] for channel in x.T], colors=BLACK, linelengths=0.7)
    above.set(ylabel="events", yticks=[], ylim=(len(x.T) - 0.5, -0.5))
    wrong = np.where((labels >= 0) & (answers != labels), len(WAVES), -1)
    rows = np.ma.masked_less([labels, answers, wrong], 0)
    colors = ListedColormap([*COLORS, BLACK])
    below.imshow(rows, cmap=colors, vmin=0, vmax=len(WAVES), aspect="auto", interpolation="nearest")
    below.set_yticks(range(3), ["label", "network", "wrong"], color=INK)
    below.set_xlabel("time step, of 4 ms each", color=INK)
    patches = [Patch(color=color, label=wave) for color, wave in zip(COLORS, WAVES, strict=True)]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(WAVES), **LEGEND)
    return figure


def main() -> int:
    """Runs the network, draws and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "checkpoint" / "pretrained_ecg"
    parser.add_argument("--checkpoint", type=Path, default=default, help="of ecg.py")
    parser.add_argument("--number", type=int, default=2, help="of a test sequence")
    parser.add_argument("--dataset_path", type=Path, default=ROOT / "dataset" / "qtdb")
    default = ROOT / "docs" / "pictures" / "ecg.png"
    parser.add_argument("--output", type=Path, default=default, help="a .png file")
    chosen = parser.parse_args()
    require(chosen.output.suffix == ".png", f"--output {chosen.output}: expected a .png file")
    network, parts = snn_lib.load(chosen.checkpoint), load_ecg(chosen.dataset_path, "test")
    stream = compiled(network)
    if (stream.before, stream.after) != ((4,), (len(WAVES),)):
        parser.error(f"{chosen.checkpoint} is no network of ecg.py")
    if not 0 <= chosen.number < len(parts[0]):
        parser.error(f"--number is {chosen.number}, expected 0 to {len(parts[0]) - 1}")
    x, labels = (part[chosen.number] for part in parts)
    labels, answers = labels.numpy(), np.array([stream.step(step).argmax() for step in x.numpy()])
    known = labels >= 0
    print(f"{100 * (answers == labels)[known].mean():.2f} % of {known.sum():,} labelled steps")
    draw(x, labels, answers).savefig(chosen.output, dpi=100, facecolor=PAPER)
    print(f"wrote {chosen.output}, {chosen.output.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    exit_with(Path(__file__).name, main)

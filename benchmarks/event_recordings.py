"""Are the recordings of the simulated camera like those of N-MNIST? Measures and draws both.

    python benchmarks/event_recordings.py FOLDER  # which has N-MNIST's Train/CLASS/NUMBER.bin

The number of a file is that of an image of MNIST, so the simulated camera records the same images.
Prints and saves, as CSV and as a picture, what describes the events of either camera. A part of
the set is enough.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from measuring import ROOT
from snn_lib.data.events import NMNIST_SIDE, Events, Frames
from snn_lib.data.recordings import NMNIST, recording_files
from snn_lib.data.simulated_events import BLOCK, CameraConfig, simulated_recordings
from snn_lib.files import write_csv
from snn_lib.inspection.plotting import BLUE, ORANGE

CORNER = 4  # pixels on a side of the sensor's corners, which no digit reaches
FRAMES = Frames(12, 300.0)  # of event_vision.py
SHOWN = 1, 5  # numbers of recordings
CAMERAS = {"real": BLUE, "simulated": ORANGE}


def pauses(events: Events) -> np.ndarray:
    """Milliseconds between an event and the next one of its pixel."""
    pixel = events.y * NMNIST_SIDE + events.x
    order = np.lexsort((events.t, pixel))
    return np.diff(events.t[order])[np.diff(pixel[order]) == 0] / 1000


def centres(recordings: Sequence[Events]) -> np.ndarray:
    """Where a recording's events are on average, in pixels from the middle, ``(recordings, 2)``."""
    return np.array([(e.x.mean(), e.y.mean()) for e in recordings]) - (NMNIST_SIDE - 1) / 2


def describe(recordings: Sequence[Events]) -> dict[str, Any]:
    """What describes recordings, in numbers."""
    counts = np.array([len(e.t) for e in recordings])
    pixels = [len(np.unique(e.y * NMNIST_SIDE + e.x)) for e in recordings]
    near = (range(CORNER), range(NMNIST_SIDE - CORNER, NMNIST_SIDE))
    edge = np.concatenate([list(side) for side in near])
    noise = [(np.isin(e.x, edge) & np.isin(e.y, edge)).sum() / np.ptp(e.t) for e in recordings]
    pause = np.concatenate([pauses(e) for e in recordings])
    place = centres(recordings)
    return {
        "events": round(counts.mean()),
        "deviation": round(counts.std()),
        "brighter": round(np.mean([e.p.mean() for e in recordings]), 3),
        "pixels": round(np.mean(pixels)),
        "right": round(place[:, 0].mean(), 2),
        "below": round(place[:, 1].mean(), 2),
        "spread_x": round(np.mean([e.x.std() for e in recordings]), 2),
        "spread_y": round(np.mean([e.y.std() for e in recordings]), 2),
        "noise_hz": round(1e6 * np.mean(noise) / len(edge) ** 2, 2),
        "shortest_pause_ms": round(np.quantile(pause, 0.01), 2),
        "median_pause_ms": round(np.median(pause), 2),
    }


def differ(one: Sequence[Events], other: Sequence[Events]) -> float:
    """Pixels of all frames that have events in one alone, relative to those that ``one`` has."""
    mine, theirs = (
        np.stack([FRAMES.count_events(e, NMNIST_SIDE) for e in recordings]) > 0
        for recordings in (one, other)
    )
    return (mine != theirs).sum() / mine.sum()


def draw_frames(rows: Sequence[Sequence[Axes]], pairs: Sequence[tuple[Events, Events]]) -> None:
    """A row for each recording, real and simulated by turns."""
    for row, (events, name) in zip(
        rows, [(e, c) for pair in pairs for e, c in zip(pair, CAMERAS, strict=True)], strict=True
    ):
        frames = FRAMES.count_events(events, NMNIST_SIDE) > 0
        image = np.ones((*frames.shape[:3], 3))
        image[frames[..., 0]], image[frames[..., 1]] = (0.9, 0.6, 0.0), (0.0, 0.45, 0.7)
        for ax, step in zip(row, image, strict=True):
            ax.imshow(step)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)


def draw_histograms(row: Sequence[Axes], found: dict[str, Sequence[Events]]) -> None:
    """The distributions of both cameras on the same axes."""
    labels = "events of a recording", "ms since the start", "ms between events of a pixel"
    for ax, label in zip(row, (*labels, "events right of the middle, pixels"), strict=True):
        ax.set(xlabel=label, yticks=[])
    for name, recordings in found.items():
        style = {"histtype": "step", "color": CAMERAS[name], "label": name, "density": True}
        row[0].hist([len(e.t) for e in recordings], np.linspace(0, 9000, 40), **style)
        row[1].hist(np.concatenate([e.t for e in recordings]) / 1000, np.arange(0, 321, 5), **style)
        row[2].hist(np.concatenate([pauses(e) for e in recordings]), np.arange(0, 20, 0.5), **style)
        row[3].hist(centres(recordings)[:, 0], np.linspace(-3, 3, 40), **style)
    row[0].legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of N-MNIST")
    parser.add_argument("--dataset_path", type=Path, default=ROOT / "dataset")
    results = ROOT / "benchmarks" / "results" / "event_recordings"
    parser.add_argument("--output", type=Path, default=results, help="path without .csv and .png")
    chosen = parser.parse_args()
    paths = recording_files(NMNIST, chosen.folder, "train")
    numbers = [int(path.stem) for path in paths]
    simulated = simulated_recordings(CameraConfig(), chosen.dataset_path, True, max(numbers))
    pairs = [(NMNIST.read(path), NMNIST.read(simulated[n - 1])) for path, n in zip(paths, numbers)]
    found = dict(zip(CAMERAS, zip(*pairs, strict=True), strict=True))
    rows = [{"camera": name} | describe(recordings) for name, recordings in found.items()]
    for key in rows[0]:
        print(f"{key:18}" + "".join(f"{row[key]!s:>12}" for row in rows))
    print(f"\n{differ(*found.values()):.2f} of the frames' pixels with events differ")
    write_csv(chosen.output.with_suffix(".csv"), rows)
    figure = plt.figure(figsize=(13, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2 * len(SHOWN), 2))
    shown = [pairs[numbers.index(number)] for number in SHOWN]
    draw_frames(above.subplots(2 * len(SHOWN), FRAMES.length), shown)
    draw_histograms(below.subplots(1, 4), found)
    figure.savefig(chosen.output.with_suffix(".png"), dpi=80)


if __name__ == "__main__":
    main()

"""Are the recordings of the simulated camera like those of N-MNIST? Measures and draws both.

    python benchmarks/event_recordings.py FOLDER  # which has N-MNIST's Train/CLASS/NUMBER.bin

A part of the set is enough. The number of a file is that of an image of MNIST, so the simulated
camera records the same images. Prints and saves, as CSV and as a picture, what describes the events
of either camera, and how well the pretrained networks read them. Those have seen neither a real
recording nor, of the first 1,000, the image.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from measuring import ROOT

import snn_lib
from snn_lib.data.events import NMNIST_SIDE, Events, Frames
from snn_lib.data.recordings import NMNIST, recording_files
from snn_lib.data.simulated_events import CameraSettings, simulated_recordings
from snn_lib.files import write_csv
from snn_lib.inspection.plotting import BLACK, BLUE, ORANGE, VERMILION

CORNER = 4  # pixels on a side of the sensor's corners, which no digit reaches
FRAMES = Frames(12, 300.0)  # of event_vision.py
BATCH = 100
SHOWN = 1, 5  # numbers of recordings
NETWORKS = "event_vision", "event_vision_behind"
CAMERAS = {"real": BLACK, "simulated": VERMILION}


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
    edge = np.delete(np.arange(NMNIST_SIDE), slice(CORNER, -CORNER))
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


def accuracy(name: str, recordings: Sequence[Events], labels: Sequence[str]) -> float:
    """The share of recordings that a pretrained network reads right."""
    network, right = snn_lib.load(ROOT / "checkpoint" / f"pretrained_{name}"), 0
    for start in range(0, len(labels), BATCH):
        own = slice(start, start + BATCH)
        said, _ = network.classify(recordings[own])
        right += sum(map(str.__eq__, said, labels[own]))
    return right / len(labels)


def draw_frames(rows: Sequence[Sequence[Axes]], pairs: Sequence[Sequence[Events]]) -> None:
    """Two rows for each pair, real and simulated: brighter events blue, darker ones orange."""
    for number, row in enumerate(rows):
        pair, camera = divmod(number, len(CAMERAS))
        darker, brighter = np.moveaxis(FRAMES.count_events(pairs[pair][camera], NMNIST_SIDE), -1, 0)
        image = np.ones((*darker.shape, 3))
        image[darker > 0], image[brighter > 0] = to_rgb(ORANGE), to_rgb(BLUE)
        for step, ax in enumerate(row):
            ax.imshow(image[step])
            ax.set(xticks=[], yticks=[])
            if number == 0:
                width = FRAMES.duration / FRAMES.length
                ax.set_title(f"{step * width:.0f} to {(step + 1) * width:.0f} ms", fontsize=9)
        row[0].set_ylabel(list(CAMERAS)[camera])


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
    text = "number of the first recording to read; the camera was fitted to earlier ones"
    parser.add_argument("--first", type=int, default=501, help=text)
    results = ROOT / "benchmarks" / "results" / "event_recordings"
    parser.add_argument("--output", type=Path, default=results, help="path without .csv and .png")
    chosen = parser.parse_args()
    paths = recording_files(NMNIST, chosen.folder, "train")
    numbers = [int(path.stem) for path in paths]
    simulated = simulated_recordings(CameraSettings(), chosen.dataset_path, True, max(numbers))
    new = sum(number < chosen.first for number in numbers)
    real = [NMNIST.read(path) for path in paths]
    pairs = [(e, NMNIST.read(simulated[n - 1])) for e, n in zip(real, numbers, strict=True)]
    found = dict(zip(CAMERAS, zip(*pairs, strict=True), strict=True))
    rows = [{"camera": name} | describe(recordings) for name, recordings in found.items()]
    labels = [NMNIST.label(path) for path in paths]
    for row, recordings in zip(rows, found.values(), strict=True):
        for name in NETWORKS:
            row[name] = accuracy(name, recordings[new:], labels[new:])
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

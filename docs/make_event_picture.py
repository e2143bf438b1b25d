"""Plays a recording to a network as if it came live, and draws what it says meanwhile.

    python docs/make_event_picture.py                           # a simulated test recording
    python docs/make_event_picture.py --checkpoint runs/nmnist/TIME/best --recording FOLDER/07.bin

A compiled network runs each step as soon as the events of that step are all there, and keeps its
state. After each step the script prints the network's answer so far, and how long after the end of
the step it came. The upper half of the picture shows the events of each step, brighter in blue and
darker in orange, and the answer. The lower half shows the confidence in each class, the right one
in green.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgb
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of snn_lib
import snn_lib
from snn_lib.data.events import Events
from snn_lib.data.preparation import RecordingPreparation
from snn_lib.data.recordings import SETS
from snn_lib.data.simulated_events import CameraSettings, simulated_recordings
from snn_lib.errors import require
from snn_lib.inference import compiled
from snn_lib.inspection.plotting import BLUE, GREEN, GREY, ORANGE
from snn_lib.training.checkpoints import load_checkpoint
from snn_lib.training.command_line import exit_with
from snn_lib.training.loading import TrainedNetwork

ROOT = Path(__file__).resolve().parents[1]
PAPER, INK = "#ffffff", "#444444"  # opaque, to be read on a dark page as well


class Step(NamedTuple):
    """What there is to tell of a time step.

    Attributes:
        frame: what the network saw, ``(side, side, 2)``.
        confidence: in each class, ``(classes,)``: the softmax of its spikes so far.
        late: seconds from the end of the step to the answer.
    """

    frame: Tensor
    confidence: Tensor
    late: float

    @property
    def answer(self) -> str:
        """The class that it is most confident in; before the first output spike there is none."""
        silent = self.confidence.max() == self.confidence.min()
        return "-" if silent else str(self.confidence.argmax().item())


def live(network: TrainedNetwork, events: Events, speed: float) -> Iterator[Step]:
    """Yields each step of a recording when its time has come.

    Args:
        network: a network of event_vision.py, whose steps are bins of time that run forward.
        events: the recording.
        speed: how many times faster than it was recorded it is played.
    """
    preparation = network.preparation
    width = preparation.duration / preparation.length
    passed = (events.t - events.t[0]) / 1000.0
    stream = compiled(network)
    spikes, begin = 0.0, time.perf_counter()
    for number in range(preparation.length):
        end = (number + 1) * width
        due = begin + end / 1000.0 / speed
        time.sleep(max(due - time.perf_counter(), 0.0))
        so_far = Events(*(values[passed < end] for values in events))
        frame = torch.from_numpy(preparation.count_events(so_far, preparation.sensor)[number])
        x = preparation.encode(frame[None, None])[0, 0]  # (side, side, 2)
        spikes = spikes + torch.from_numpy(stream.step(x.numpy()))
        confidence = (spikes * network.logit_scale).softmax(0)
        yield Step(x, confidence, time.perf_counter() - due)


def draw(steps: list[Step], width: float, label: int | None) -> plt.Figure:
    """The steps' frames above, confidence over time below."""
    figure = plt.figure(figsize=(1.0 + 0.75 * len(steps), 3.8), facecolor=PAPER)
    figure.set_layout_engine("constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.0, 2.8))
    for ax, step in zip(np.ravel(above.subplots(1, len(steps))), steps, strict=True):
        darker, brighter = (step.frame > 0).unbind(-1)
        image = np.ones((*darker.shape, 3))
        image[darker.numpy()], image[brighter.numpy()] = to_rgb(ORANGE), to_rgb(BLUE)
        ax.imshow(image)
        ax.set(xticks=[], yticks=[])
        ax.set_title(step.answer, color=INK)
    ax = below.subplots()
    times = width * np.arange(1, len(steps) + 1)
    for number, values in enumerate(torch.stack([step.confidence for step in steps], 1)):
        style = {"color": GREEN, "lw": 2.5} if number == label else {"color": GREY, "lw": 1}
        ax.plot(times, values, ".-", **style)
        if values[-1] > 0.05 or number == label:
            ax.text(times[-1], values[-1], f"  {number}", va="center", color=style["color"])
    ax.set(xlim=(0, times[-1] + width / 2), ylim=(0, 1.02))
    ax.set_xlabel("ms since the first event", color=INK)
    ax.set_ylabel("confidence", color=INK)
    return figure


def main() -> int:
    """Plays, prints, draws and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "checkpoint" / "pretrained_event_vision"
    parser.add_argument("--checkpoint", type=Path, default=default, help="of event_vision.py")
    parser.add_argument("--recording", type=Path, help="a file of the checkpoint's data set")
    parser.add_argument("--number", type=int, default=7, help="of a simulated test recording")
    parser.add_argument("--dataset_path", type=Path, default=ROOT / "dataset")
    parser.add_argument("--speed", type=float, default=1.0, help="1: as fast as it was recorded")
    default = ROOT / "docs" / "pictures" / "event_vision.png"
    parser.add_argument("--output", type=Path, default=default, help="a .png file")
    chosen = parser.parse_args()
    require(chosen.output.suffix == ".png", f"--output {chosen.output}: expected a .png file")

    network, config = snn_lib.load(chosen.checkpoint), load_checkpoint(chosen.checkpoint)["config"]
    preparation = network.preparation
    if not isinstance(preparation, RecordingPreparation):
        parser.error(f"{chosen.checkpoint} is no network of event_vision.py")
    if (preparation.bins, preparation.order) != ("time", "forward"):
        parser.error("only a network of bins of time that run forward can follow a stream")
    if chosen.speed <= 0:
        parser.error(f"--speed is {chosen.speed}, expected a positive number")
    kind, path = SETS[config["dataset"]], chosen.recording
    if path is None:
        count, camera = chosen.number + 1, CameraSettings(**config["camera"])
        paths = simulated_recordings(camera, chosen.dataset_path, False, max(count, 0))
        if not 0 < count <= len(paths):
            parser.error(f"--number is {chosen.number}, expected that of a test recording, from 0")
        path = paths[-1]
    width, label = preparation.duration / preparation.length, kind.label(path)

    steps = []
    for step in live(network, kind.read(path), chosen.speed):
        steps.append(step)
        sure = 100 * step.confidence.max()
        print(
            f"{width * len(steps):6.0f} ms: {step.answer}, {sure:.0f} % sure, "
            f"said {1000 * step.late:.1f} ms later",
            flush=True,
        )
    figure = draw(steps, width, int(label) if label.isdecimal() else None)
    figure.savefig(chosen.output, dpi=100, facecolor=PAPER)
    print(f"wrote {chosen.output}, {chosen.output.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    exit_with(Path(__file__).name, main)

"""Draws what a convolutional network does with a digit: its first maps' spikes, and its filters.

    python docs/make_conv_picture.py                                   # the pretrained snn_conv
    python docs/make_conv_picture.py --checkpoint runs/try/TIME/best --digit 7

Above, a row is a feature map of the first layer, a column a time step, a dot a neuron that spikes;
before them the weights of the map and the sum of its spikes. Below, what the filters of every layer
answer to one spike: each channel's, their median, and dashed what training began with.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # snn_lib and the script
from snn_conv import SNN, ConvConfig
from snn_lib.cells import IIRSynapse, SpikingNeuron
from snn_lib.errors import require
from snn_lib.inspection import plotting
from snn_lib.inspection.monitor import Monitor, as_numpy
from snn_lib.tasks.digits import DigitClassification
from snn_lib.training.checkpoints import load_checkpoint, load_weights
from snn_lib.training.command_line import exit_with, settings_of
from snn_lib.training.experiment import Experiment

ROOT = Path(__file__).resolve().parents[1]
PAPER, INK = "#ffffff", "#444444"  # opaque, to be read on a dark page as well
MAPS = 6  # at most, those that spike most


def trained(path: Path) -> Experiment:
    """The experiment of a checkpoint, with its weights."""
    checkpoint = load_checkpoint(path)
    local = ConvConfig(device="cpu", dataset_path=str(ROOT / "dataset"))
    config = settings_of(checkpoint, local, [])
    experiment = Experiment(SNN, DigitClassification(ConvConfig), config)
    load_weights(experiment.model, checkpoint)
    return experiment


@torch.inference_mode()
def seen_and_fired(experiment: Experiment, digit: int) -> tuple[Tensor, Tensor]:
    """The first test image of a digit ``(28, 28)``, and the first maps' spikes ``(T, C, H, W)``."""
    (layer, *_) = (n for n, m in experiment.model.named_modules() if isinstance(m, SpikingNeuron))
    for batch in experiment.task.batches("test"):
        for index in (batch.y == digit).nonzero().flatten()[:1]:
            x = batch.x[:, index : index + 1]
            with Monitor(experiment.model.eval(), [layer]) as monitor, experiment.autocast():
                experiment.model(x)
            return x.mean(0).view(28, 28), monitor[layer].spikes[:, 0]
    raise SystemExit(f"there is no {digit} among the test images")


def draw(experiment: Experiment, image: Tensor, spikes: Tensor) -> plt.Figure:
    """Weights and spikes of the first maps above, the digit and all filters below."""
    model, initial = experiment.model, SNN(experiment.config)
    steps, maps = len(spikes), min(MAPS, spikes.shape[1])
    busiest = spikes.sum((0, 2, 3)).argsort(descending=True)[:maps]
    convolution = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    learned, first = (
        [m for m in network.modules() if isinstance(m, IIRSynapse)] for network in (model, initial)
    )

    figure = plt.figure(figsize=(1.0 + 0.75 * steps, 0.75 * maps + 2.8), facecolor=PAPER)
    figure.set_layout_engine("constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(0.75 * maps + 0.4, 2.4))
    grid = above.subplots(maps, steps + 2, squeeze=False)
    limit = convolution.weight.detach().abs().max().item()
    for row, number in zip(grid, busiest.tolist(), strict=True):
        kernel = as_numpy(convolution.weight[number, 0])
        row[0].imshow(kernel, cmap="PuOr", vmin=-limit, vmax=limit)
        row[0].set_ylabel(f"map {number}", fontsize=8, color=INK)
        total = as_numpy(spikes[:, number].sum(0))
        row[1].imshow(total, cmap="Blues", vmin=0, vmax=steps)
        for ax, step in zip(row[2:], as_numpy(spikes[:, number]), strict=True):
            ax.imshow(1 - step, cmap="gray", vmin=0, vmax=1)
        for ax in row:
            ax.set(xticks=[], yticks=[])
    titles = ["weights", "spikes", *(f"t = {t}" for t in range(steps))]
    for ax, title in zip(grid[0], titles, strict=True):
        ax.set_title(title, fontsize=8, color=INK)

    columns = below.subplots(1, 1 + len(learned))
    columns[0].imshow(as_numpy(image), cmap="gray")
    columns[0].set(xticks=[], yticks=[])
    columns[0].set_title("the digit", fontsize=8, color=INK)
    for number, ax in enumerate(columns[1:]):
        plotting.synapse_kernels(learned[number], first[number], steps=25, ax=ax)
        ax.set_title(f"filters of layer {number + 1}", fontsize=8, color=INK)
        ax.tick_params(labelsize=7)
        ax.set(xlabel="", ylabel="")
        ax.get_legend().remove()
    columns[1].set_xlabel("steps after a spike", fontsize=8, color=INK)
    columns[1].set_ylabel("PSP", fontsize=8, color=INK)
    return figure


def main() -> int:
    """Draws and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "checkpoint" / "pretrained_snn_conv"
    parser.add_argument("--checkpoint", type=Path, default=default, help="of snn_conv.py")
    parser.add_argument("--digit", type=int, default=3, choices=range(10))
    default = ROOT / "docs" / "pictures" / "snn_conv.png"
    parser.add_argument("--output", type=Path, default=default, help="a .png file")
    chosen = parser.parse_args()
    require(chosen.output.suffix == ".png", f"--output {chosen.output}: expected a .png file")
    experiment = trained(chosen.checkpoint)
    figure = draw(experiment, *seen_and_fired(experiment, chosen.digit))
    figure.savefig(chosen.output, dpi=100, facecolor=PAPER)
    print(f"wrote {chosen.output}, {chosen.output.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    exit_with(Path(__file__).name, main)

"""Draws the README's picture: the associative memory reads a damaged word, letter by letter.

    python docs/make_pictures.py

The first five patterns are letters. Each is damaged far beyond what training showed, by a fixed
seed, and answered by the pretrained network.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # snn_lib and the script
from associative_memory import SNN
from snn_lib.data.patterns import Damage, damage_patterns
from snn_lib.inspection import plotting
from snn_lib.tasks.association import Association, AssociationConfig
from snn_lib.training.checkpoints import load_checkpoint, load_weights
from snn_lib.training.config import load_config
from snn_lib.training.experiment import Experiment

ROOT = Path(__file__).resolve().parents[1]
LETTERS = torch.arange(5)
# Half of the spike trains are lost (training: 40 of 300), and there is twice the noise.
DAMAGE = Damage(
    modify_probability=1.0,
    jitter_probability=1.0,
    removal_probability=1.0,
    block_probability=0.0,
    rows_removed=150,
    noise_probability=0.01,
)
PAPER, INK = "#ffffff", "#444444"  # opaque, to be read on a dark page as well


@torch.inference_mode()
def damaged_and_answered() -> tuple[Tensor, Tensor]:
    """The damaged letters and the network's answers, both ``(T, 5, 300)``."""
    overrides = ["device=cpu", f"dataset_path={ROOT / 'dataset/associative_target.npy'}"]
    config = load_config(AssociationConfig, ROOT / "associative_memory.yaml", overrides)
    experiment = Experiment(SNN, Association(), config)
    path = ROOT / config.test_checkpoint_path
    load_weights(experiment.model, load_checkpoint(path), path)
    generator = torch.Generator().manual_seed(1)
    damaged = damage_patterns(experiment.task.patterns, LETTERS, DAMAGE, generator).spikes
    with experiment.autocast():
        return damaged, experiment.model.eval()(damaged)[0]


def draw(damaged: Tensor, answered: Tensor) -> plt.Figure:
    """Given above, answered below, a column for each letter."""
    figure, axes = plt.subplots(
        2, len(LETTERS), figsize=(11, 4.9), facecolor=PAPER, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    rows = (
        (damaged, plotting.VERMILION, "what the network is given"),
        (answered, plotting.BLUE, "what it answers"),
    )
    for row, (spikes, color, label) in zip(axes, rows, strict=True):
        for ax, sample in zip(row, spikes.unbind(1), strict=True):
            plotting.raster(sample, ax, color=color).collections[0].set_sizes([2.4])
            ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
            ax.spines[:].set_color("#cccccc")
        row[0].set_ylabel(label, fontsize=12, color=color, labelpad=8)
    small = {"fontsize": 10, "color": INK}
    axes[1, 0].set_xlabel("300 time steps \N{RIGHTWARDS ARROW}", loc="left", **small)
    axes[1, -1].set_xlabel("a row is a spike train, a dot a spike", loc="right", **small)
    return figure


if __name__ == "__main__":
    target = ROOT / "docs" / "pictures" / "associative_memory.png"
    draw(*damaged_and_answered()).savefig(target, dpi=110, facecolor=PAPER)
    print(f"wrote {target.relative_to(ROOT)}, {target.stat().st_size / 1024:.0f} KiB")

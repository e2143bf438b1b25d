"""Draws the README's picture: the associative memory reads a damaged word, letter by letter.

    python docs/make_memory_picture.py

The first five patterns are letters. A block of 160 trains and steps is cut out of each, the other
spikes are jittered, with noise among them, by a fixed seed; the pretrained network answers step by
step.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # snn_lib and the script
from associative_memory import SNN
from snn_lib.data.patterns import Damage, damage_patterns, delay_spikes
from snn_lib.inspection import plotting
from snn_lib.tasks.association import Association, AssociationConfig
from snn_lib.training.checkpoints import load_checkpoint, load_weights
from snn_lib.training.config import load_config
from snn_lib.training.experiment import Experiment

ROOT = Path(__file__).resolve().parents[1]
LETTERS = torch.arange(5)
DAMAGE = Damage(
    modify_probability=1.0,
    jitter_probability=1.0,
    removal_probability=1.0,
    jitter_sigma=2.0,
    block_probability=1.0,
    block_size=160,
    noise_probability=0.005,
)


@torch.inference_mode()
def damaged_and_answered() -> tuple[Tensor, Tensor, Tensor]:
    """The damaged letters, the network's answers, and what of them is new, all ``(T, 5, 300)``."""
    overrides = ["device=cpu", f"dataset_path={ROOT / 'dataset/associative_target.npy'}"]
    config = load_config(AssociationConfig, ROOT / "associative_memory.yaml", overrides)
    experiment = Experiment(SNN, Association(), config)
    path = ROOT / config.test_checkpoint_path
    load_weights(experiment.model, load_checkpoint(path))
    generator = torch.Generator().manual_seed(1)
    spikes, removed = damage_patterns(experiment.task.patterns, LETTERS, DAMAGE, generator)
    with experiment.autocast():
        answered = experiment.model.eval()(spikes)[0]
    return spikes, answered, delay_spikes(removed, config.hyperparameters.delay)


if __name__ == "__main__":
    target = ROOT / "docs" / "pictures" / "associative_memory.gif"
    target.write_bytes(plotting.completion(*damaged_and_answered()))
    print(f"wrote {target.relative_to(ROOT)}, {target.stat().st_size / 1024:.0f} KiB")

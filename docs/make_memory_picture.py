"""Draws the README's picture: the associative memory reads a damaged word, letter by letter.

    python docs/make_memory_picture.py

The first five patterns are letters. A block of 160 trains and steps is cut out of each, the other
spikes are jittered, with noise among them, by a fixed seed; the pretrained network answers step by
step.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of snn_lib
import snn_lib
from snn_lib.data.patterns import Damage, damage_patterns, delay_spikes, load_patterns
from snn_lib.inspection import plotting
from snn_lib.training.checkpoints import load_checkpoint
from snn_lib.training.command_line import exit_with

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "associative_memory_checkpoint" / "pretrained_associative_memory"
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
    patterns = load_patterns(ROOT / "dataset" / "associative_target.npy")
    generator = torch.Generator().manual_seed(1)
    spikes, removed = damage_patterns(patterns, LETTERS, DAMAGE, generator)
    answered = snn_lib.load(MODEL)(spikes)[0]
    delay = load_checkpoint(MODEL)["config"]["hyperparameters"]["delay"]
    return spikes, answered, delay_spikes(removed, delay)


def main() -> int:
    """Draws and saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "docs" / "pictures" / "associative_memory.gif"
    parser.add_argument("--output", type=Path, default=default)
    target = parser.parse_args().output
    target.write_bytes(plotting.completion(*damaged_and_answered()))
    print(f"wrote {target}, {target.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    exit_with(Path(__file__).name, main)

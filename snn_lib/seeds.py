"""What the random numbers of a run follow from: its seed, an epoch, and a number in the epoch.

So a run that resumes in the middle of an epoch draws what an undisturbed run draws. Negative epochs
stand for what is no epoch:

    epoch                number                what is drawn
    trained, or EPOCHS   0                     the order of the samples
    the same             1 + batch             what the library's tasks change in a batch
    the same             -1 - batch            what the loss of a training batch draws *
    the same             MOST_BATCHES + batch  what a user's own ``encode`` draws *
    DATA                 0                     what a task draws as it is set up *
    DATA                 1 + batch             the damage of patterns, where many kinds are measured
    LAYERS               0                     what layers draw as the network is built *
    FIRST_WEIGHTS        0                     what ``initialise`` draws *
    EVALUATION           0                     what losses and layers draw in an evaluation *
    SPLITS               EPOCHS                what a task draws to make a split
    MADE                 0                     what ``make_batch`` draws, with a seed for each batch

* from the generators of NumPy and Python. That of PyTorch begins with the seed itself wherever a
task is set up, a network is built, first weights are found, or a training or a test begins.

A data set of sequences that is read for the first time draws the numbers of epoch 0. Where each of
several processes draws other numbers, its rank is added to the seed. Spikes of images are drawn
with the next seed, by epoch and batch. Samples are held out by the seed alone, and simulated
cameras have a seed of their own.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

EPOCHS = {"train": 0, "validation": -1, "test": -2}
DATA, LAYERS, FIRST_WEIGHTS, EVALUATION, SPLITS, MADE = -3, -4, -5, -6, -7, -8
MOST_BATCHES = 500_000  # of an epoch


def batch_generator(seed: int, epoch: int, batch: int) -> torch.Generator:
    """Makes the generator of a batch, which differs from that of every other batch and epoch."""
    return torch.Generator().manual_seed(mix(seed, epoch, batch))


@contextmanager
def batch_seed(seed: int, epoch: int, batch: int) -> Iterator[None]:
    """Seeds the global generators of PyTorch, NumPy and Python for code that draws from them.

    When the context ends, they are as they were before. Generators of devices other than the CPU
    are not seeded.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(mix(seed, epoch, batch))
    try:
        with other_seeds(seed, epoch, batch):
            yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def other_seeds(seed: int, epoch: int, batch: int) -> Iterator[None]:
    """As :func:`batch_seed`, for the generators of NumPy and Python alone."""
    mixed = mix(seed, epoch, batch)
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    np.random.seed(mixed % 2**32)  # noqa: NPY002 (a user's own code draws from it)
    random.seed(mixed)
    try:
        yield
    finally:
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])


def mix(seed: int, epoch: int, batch: int) -> int:
    """One seed of three numbers."""
    return ((seed * 1_000_003 + epoch) * 1_000_003 + batch) % 2**63

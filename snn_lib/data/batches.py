"""What the batches of every data set have in common.

Every random draw of a batch comes from a generator seeded by (seed, epoch, batch), so a run that
resumes in the middle of an epoch sees the batches that an undisturbed one would, and every process
of several draws the same batch and takes its own share.
"""

import torch


def batch_generator(seed: int, epoch: int, batch: int) -> torch.Generator:
    """A generator of its own for every batch of every epoch."""
    mixed = (seed * 1_000_003 + epoch) * 1_000_003 + batch
    return torch.Generator().manual_seed(mixed % 2**63)

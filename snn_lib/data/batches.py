"""Batches: their order, their random numbers, and their way to the device.

Every random draw of a batch comes from a generator seeded by (seed, epoch, batch), so a run that
resumes in the middle of an epoch sees the batches that an undisturbed one would, and every process
of several draws the same batch and takes its own share. All of them are drawn on the CPU, so that a
seed gives the same batches whatever the device.
"""

import multiprocessing
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from snn_lib.errors import InputError, RunError, require


class Batch(NamedTuple):
    """Input sequences and what the network should answer.

    Attributes:
        x: ``(T, B, *features)``.
        y: ``(B,)`` labels, ``(B, *targets)``, or a target at every step ``(T, B, *targets)``.
        lengths: steps of each sequence, int64 ``(B,)``, those after them being padding; ``None`` if
            every sequence has T.
    """

    x: Tensor
    y: Tensor
    lengths: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device. It is copied from pinned memory, which nothing waits for."""
        if device.type == "cpu":
            return self
        return Batch(
            *(
                None if part is None else part.pin_memory().to(device, non_blocking=True)
                for part in self
            )
        )


class Batches:
    """The samples of a data set in batches, shared out among processes.

    Args:
        count: number of samples.
        batch_size: samples a batch, over all processes; the last batch takes what is left.
        take: makes a batch on the CPU: called with the numbers of its samples ``(B,)``, the slice
            of them that this process is to take, the epoch and the number of the batch. What it
            draws at random, it draws by :func:`batch_generator` for the whole batch.
        seed: of the order.
        shuffle: whether each epoch has an order of its own.
        rank, world: this process takes every ``world``-th sample of a batch, from ``rank`` on.
        workers: processes that make batches ahead of time; 0 makes them when they are asked for.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        take: Callable[[Tensor, slice, int, int], Batch],
        seed: int = 0,
        shuffle: bool = False,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        self.count, self.batch_size, self.take = count, batch_size, take
        self.seed, self.shuffle, self.workers = seed, shuffle, workers
        self.share = slice(rank, None, world)

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yields this process's share of the batches of an epoch, from number ``start`` on.

        Raises:
            InputError: a sample is not what it should be, or ``workers`` are asked for where
                processes do not fork.
            RunError: a worker was killed.
        """
        generator = batch_generator(self.seed, epoch, 0)
        order = (
            torch.randperm(self.count, generator=generator)
            if self.shuffle
            else torch.arange(self.count)
        )
        batches = _Epoch(self, epoch, order.split(self.batch_size))
        numbers = range(start, len(self))
        made = map(batches.__getitem__, numbers)
        for batch in _from_workers(batches, numbers, self.workers) if self.workers else made:
            if isinstance(batch, InputError):
                raise batch
            yield batch


class _Epoch(Dataset):
    """The batches of one epoch by number. A worker hands over what a user did wrong as it is."""

    def __init__(self, batches: Batches, epoch: int, parts: tuple[Tensor, ...]) -> None:
        self.batches, self.epoch, self.parts = batches, epoch, parts

    def __getitem__(self, number: int) -> Batch | InputError:
        try:
            part = self.parts[number]
            return self.batches.take(part, self.batches.share, self.epoch, number)
        except InputError as error:
            return error  # a DataLoader would wrap it in a traceback of text


def _from_workers(batches: _Epoch, numbers: range, workers: int) -> Iterator[Batch | InputError]:
    """The batches of these numbers, which so many processes prepare ahead of time."""
    require(
        "fork" in multiprocessing.get_all_start_methods(),
        "data_workers needs processes that fork, and this system has none: set it to 0",
    )
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        multiprocessing_context="fork",
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # not the one that dropout draws from
    )
    handler = signal.getsignal(signal.SIGCHLD)
    prepared = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)  # PyTorch's own would raise in the middle of a step
    try:
        yield from prepared
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        raise RunError(
            "a process that prepares data was killed, for memory perhaps: set data_workers to a "
            "lower number, or to 0"
        ) from None


def _leave_signals(worker: int) -> None:
    """Ctrl-C is for the process that trains, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def batch_generator(seed: int, epoch: int, batch: int) -> torch.Generator:
    """A generator of its own for every batch of every epoch."""
    return torch.Generator().manual_seed(_mix(seed, epoch, batch))


@contextmanager
def batch_seed(seed: int, epoch: int, batch: int) -> Iterator[None]:
    """The same for code that draws from the global generators of PyTorch, NumPy and Python.

    They are as they were when the context is left. Devices other than the CPU are left alone:
    their numbers may be in use meanwhile.
    """
    mixed = _mix(seed, epoch, batch)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.default_generator.manual_seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002 (a data set's own code draws from it)
    random.seed(mixed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def _mix(seed: int, epoch: int, batch: int) -> int:
    return ((seed * 1_000_003 + epoch) * 1_000_003 + batch) % 2**63


def split_indices(count: int, validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the validation samples, drawn by ``seed``."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[validation:], order[:validation]

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
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from snn_lib.errors import InputError, require


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

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with every tensor handed through a function."""
        return Batch(*(None if part is None else function(part) for part in self))


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
        """Yields this process's share of the batches of an epoch, from number ``start`` on."""
        generator = batch_generator(self.seed, epoch, 0)
        order = (
            torch.randperm(self.count, generator=generator)
            if self.shuffle
            else torch.arange(self.count)
        )
        batches = _Epoch(self, epoch, order.split(self.batch_size))
        if self.workers == 0:
            for number in range(start, len(self)):
                yield batches[number]
        else:
            require(
                "fork" in multiprocessing.get_all_start_methods(),
                "data_workers needs processes that fork, which there are not here: set it to 0",
            )
            loader = DataLoader(
                batches,
                batch_size=None,
                sampler=range(start, len(self)),
                num_workers=self.workers,
                multiprocessing_context="fork",
                worker_init_fn=_leave_signals,
                generator=torch.Generator(),  # not the one that dropout draws from
            )
            for batch in loader:
                if isinstance(batch, InputError):
                    raise batch
                yield batch


class _Epoch(Dataset):
    """The batches of one epoch by number, as a ``DataLoader`` with workers asks for them."""

    def __init__(self, batches: Batches, epoch: int, parts: tuple[Tensor, ...]) -> None:
        self.batches, self.epoch, self.parts = batches, epoch, parts

    def __getitem__(self, number: int) -> Batch | InputError:
        part = self.parts[number]
        try:
            return self.batches.take(part, self.batches.share, self.epoch, number)
        except InputError as error:
            if get_worker_info() is None:
                raise
            return error  # a DataLoader would wrap it in a traceback of text


def _leave_signals(worker: int) -> None:
    """Ctrl-C is for the process that trains, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def batch_generator(seed: int, epoch: int, batch: int) -> torch.Generator:
    """A generator of its own for every batch of every epoch."""
    return torch.Generator().manual_seed(_mixed(seed, epoch, batch))


@contextmanager
def batch_seed(seed: int, epoch: int, batch: int) -> Iterator[None]:
    """The same for code that draws from the global generators of PyTorch, NumPy and Python.

    They are as they were when the context is left. Devices other than the CPU are left alone:
    their numbers may be in use meanwhile.
    """
    mixed = _mixed(seed, epoch, batch)
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


def _mixed(seed: int, epoch: int, batch: int) -> int:
    return ((seed * 1_000_003 + epoch) * 1_000_003 + batch) % 2**63


def split_indices(count: int, validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the validation samples, drawn by ``seed``."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[validation:], order[:validation]


def ahead(batches: Iterator[Batch], device: torch.device, depth: int = 2) -> Iterator[Batch]:
    """The batches of the CPU on the device, prepared while it computes and copied without waiting.

    For the CPU they are handed through as they are. For another device a thread prepares them and
    pins their memory, from the first ``next`` on until the iterator is exhausted or closed; what
    the preparation raises is raised here.

    Args:
        batches: the batches; the thread alone goes through them.
        device: where they are wanted.
        depth: how many are prepared beyond the one that was handed out.
    """
    if device.type == "cpu":
        yield from batches
        return
    prepared: SimpleQueue = SimpleQueue()  # of batches; then None, or what the preparation raised
    room, closed = threading.Semaphore(depth), threading.Event()

    def prepare() -> None:
        try:
            while room.acquire() and not closed.is_set():
                batch = next(batches, None)
                prepared.put(batch and batch.apply(Tensor.pin_memory))
                if batch is None:
                    return
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            prepared.put(error)

    thread = threading.Thread(target=prepare, name="batches", daemon=True)
    thread.start()
    try:
        while (batch := prepared.get()) is not None:
            room.release()
            if isinstance(batch, BaseException):
                raise batch
            yield batch.apply(lambda tensor: tensor.to(device, non_blocking=True))
    finally:
        closed.set()
        room.release()
        thread.join()

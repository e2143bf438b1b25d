"""A split in batches: their order, their random numbers, and their copying to the device.

The random numbers of a batch follow from seed, epoch and batch (``snn_lib.seeds``). Several
processes take their shares of the same samples; what a task draws for a share alone follows from
the process, too. All numbers are drawn on the CPU, so that a seed gives the same batches on every
device.
"""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from snn_lib.errors import InputError, RunError, require
from snn_lib.seeds import MADE, batch_generator, batch_seed, mix


class Batch(NamedTuple):
    """Input sequences and what the network should answer.

    Attributes:
        x: ``(T, B, *features)``, or what the task's preparation makes this of. All steps may lie in
            the same memory, so a layer must not change its input in place.
        y: ``(B,)`` labels, ``(B, *targets)``, or a target at every step ``(T, B, *targets)``. The
            tasks of this library make labels int64, and numbers to predict PyTorch's default dtype.
        lengths: number of steps of each sequence, int64 ``(B,)``. The steps after them are padding.
            ``None`` if every sequence has T steps.
    """

    x: Tensor
    y: Tensor
    lengths: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Copies the batch to a device, from pinned memory, so that the CPU does not wait."""
        if device.type == "cpu":
            return self

        def copy(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.pin_memory().to(device, non_blocking=True)

        return Batch._make(map(copy, self))


def as_batch(made: Any, method: str) -> Batch:
    """Checks that a method, perhaps a user's own, has returned a batch, and returns it.

    Raises:
        InputError: it is none.
    """
    found = all(hasattr(made, name) for name in Batch._fields)
    require(found, f"{method} returned a {type(made).__name__}, expected a Batch")
    return made


@dataclass
class Split:
    """The samples of a split: makes batches of them, and shares these out among processes.

    Attributes:
        count: number of samples.
        batch_size: samples of a batch over all processes. The last batch has those that are left.
        make_batch: a function that makes a batch on the CPU. Its arguments are the numbers of the
            samples ``(B,)``, the slice of them that this process takes, the epoch and the number of
            the batch. It may draw from the generators of PyTorch, NumPy and Python, and draws the
            same for the same batch; in several processes, each draws other numbers, unless it takes
            them from :func:`snn_lib.seeds.batch_generator`.
        shuffle: whether each epoch has an order of its own.
        seed: the seed of the order, and of what ``make_batch`` draws.
        rank, world: this process takes every ``world``-th sample of a batch, from ``rank`` on.
        workers: number of processes that make batches ahead of time. With 0 the process makes each
            batch itself when it is asked for.
    """

    count: int
    batch_size: int
    make_batch: Callable[[Tensor, slice, int, int], Batch]
    shuffle: bool = False
    seed: int = 0
    rank: int = 0
    world: int = 1
    workers: int = 0

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yields this process's share of each batch of an epoch, from number ``start`` on.

        Raises:
            InputError: a sample makes no sense, ``make_batch`` makes no batch, or ``workers`` is
                not 0 on a system whose processes do not fork.
            RunError: a worker was killed.
        """
        order = torch.arange(self.count)
        if self.shuffle:
            order = torch.randperm(self.count, generator=batch_generator(self.seed, epoch, 0))
        parts, share = order.split(self.batch_size), slice(self.rank, None, self.world)

        def make(number: int) -> Batch | InputError:
            # A sample is the same in training and in evaluation, whose modes are for the network.
            # Other numbers than those of batch_generator, which a batch may draw from, too.
            seeded = batch_seed(mix(self.seed + self.rank, epoch, number), MADE, 0)
            with torch.inference_mode(False), torch.autocast("cpu", enabled=False), seeded:
                try:
                    made = self.make_batch(parts[number], share, epoch, number)
                    return as_batch(made, "make_batch")
                except InputError as error:
                    return error  # not raised: a DataLoader would turn it into a traceback's text

        numbers = range(start, len(self))
        made = _from_workers(make, numbers, self.workers) if self.workers else map(make, numbers)
        for batch in made:
            if isinstance(batch, InputError):
                raise batch
            yield batch


def _from_workers(
    make: Callable[[Any], Batch | InputError], numbers: Any, workers: int
) -> Iterator[Batch | InputError]:
    """Yields the batches of these numbers, which worker processes make ahead of time."""
    require(
        "fork" in multiprocessing.get_all_start_methods(),
        "data_workers needs processes that fork, and this system has none: set it to 0",
    )
    loader = DataLoader(
        numbers,
        batch_size=None,
        collate_fn=make,
        num_workers=workers,
        multiprocessing_context="fork",
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # not the one that dropout draws from
    )
    handler = signal.getsignal(signal.SIGCHLD)
    prepared = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # PyTorch's handler would raise an error in the middle of a training step.
        signal.signal(signal.SIGCHLD, handler)
    try:
        yield from prepared
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        raise RunError(
            "a process that prepares data was killed, perhaps because memory ran out: set "
            "data_workers to a lower number or to 0"
        ) from None


def _leave_signals(worker: int) -> None:
    """Ignores Ctrl-C in a worker, because the process that trains ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The context in which PyTorch has this default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def split_indices(count: int, validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Divides samples at random; returns the indices for training and for validation."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[validation:], order[:validation]

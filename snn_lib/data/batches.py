"""What the batches of every data set have in common.

Every random draw of a batch comes from a generator seeded by (seed, epoch, batch), so a run that
resumes in the middle of an epoch sees the batches that an undisturbed one would, and every process
of several draws the same batch and takes its own share. All of them are drawn on the CPU, so that a
seed gives the same batches whatever the device.
"""

import threading
from collections.abc import Iterator
from queue import SimpleQueue

import torch
from torch import Tensor


def batch_generator(seed: int, epoch: int, batch: int) -> torch.Generator:
    """A generator of its own for every batch of every epoch."""
    mixed = (seed * 1_000_003 + epoch) * 1_000_003 + batch
    return torch.Generator().manual_seed(mixed % 2**63)


def ahead(
    batches: Iterator[tuple[Tensor, ...]], device: torch.device, depth: int = 2
) -> Iterator[tuple[Tensor, ...]]:
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
                prepared.put(batch and tuple(tensor.pin_memory() for tensor in batch))
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
            yield tuple(tensor.to(device, non_blocking=True) for tensor in batch)
    finally:
        closed.set()
        room.release()
        thread.join()

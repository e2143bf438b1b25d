"""Training in several processes that ``torchrun`` starts; without it there is one, of rank 0."""

import contextlib
import os
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from snn_lib.errors import InputError, one_line, require
from snn_lib.tasks.base import read_sums


def is_launched() -> bool:
    """Whether ``torchrun`` or the like started this process."""
    return "RANK" in os.environ


def start() -> None:
    """Joins the group of processes that ``torchrun`` has started, if it started this one.

    Raises:
        InputError: something else has set RANK.
    """
    if is_launched() and not dist.is_initialized():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        try:
            dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on a GPU
        except ValueError as error:  # torchrun sets all that it needs
            raise InputError(
                "RANK says that this is one of several processes: start them by torchrun, or unset "
                f"RANK ({one_line(error)})"
            ) from None


def check_joined() -> None:
    """Refuses a process that ``torchrun`` has started and that has not joined the others.

    It would train a whole network of its own, and so would each of them.
    """
    require(
        dist.is_initialized() or not is_launched(),
        "RANK says that this is one of several processes, but it has not joined the others: give "
        "the task to snn_lib.training.main, or call snn_lib.training.distributed.start() before",
    )


def rank_and_world() -> tuple[int, int]:
    """This process's number, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # it would hide the reason why the process ends
            dist.destroy_process_group()


def lost_contact(error: Exception) -> bool:
    """Whether an error says that another process has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def add(*values: float) -> list[float]:
    """Adds up each value over all processes, on the CPU, because not every device has float64."""
    totals = torch.tensor(values, dtype=torch.float64)
    if values and dist.is_initialized():
        dist.all_reduce(totals)
    return totals.tolist()


def total(sums: dict[str, Any]) -> dict[str, float]:
    """Adds up the sums of all processes, by name; one may have names that another has not."""
    read = read_sums(sums)
    names = dict.fromkeys(chain.from_iterable(gather([*read])))
    return dict(zip(names, add(*(read.get(name, 0.0) for name in names)), strict=True))


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def share_buffers(module: torch.nn.Module) -> None:
    """Gives every process the first one's buffers, such as batch normalisation's averages."""
    if not dist.is_initialized():
        return
    for buffer in module.buffers():
        shared = buffer.contiguous()
        dist.broadcast(shared, 0)
        if shared is not buffer:
            buffer.copy_(shared)


def any_process(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set in any process."""
    return tuple(count > 0 for count in add(*flags))

"""Several processes, as ``torchrun`` starts them; without it, one process of rank 0."""

import os
from typing import Any

import torch
import torch.distributed as dist


def launched() -> bool:
    """Whether ``torchrun`` or the like started this process."""
    return "RANK" in os.environ


def start() -> None:
    """Joins the process group that ``torchrun`` announces, if it does."""
    if launched():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on a GPU


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_contact(error: Exception) -> bool:
    """Whether an error tells that another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def total(sums: dict[str, Any]) -> dict[str, float]:
    """The sums over all processes, as floats; what lies on a device comes over in one piece."""
    if not sums:
        return {}
    kinds: dict[torch.device, list[str]] = {}
    for key, value in sums.items():
        device = value.device if isinstance(value, torch.Tensor) else torch.device("cpu")
        kinds.setdefault(device, []).append(key)
    totals = torch.zeros(len(sums), dtype=torch.float64)
    place = {key: index for index, key in enumerate(sums)}
    for device, keys in kinds.items():
        if device.type == "cpu":
            values = [float(sums[key]) for key in keys]
        else:
            values = torch.stack([sums[key].to(torch.float32) for key in keys]).tolist()
        for key, value in zip(keys, values, strict=True):
            totals[place[key]] = value
    if dist.is_initialized():
        dist.all_reduce(totals)  # on the CPU: a process group has gloo for it beside NCCL
    return dict(zip(sums, totals.tolist(), strict=True))


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


def any_process(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set in any process."""
    if not dist.is_initialized():
        return flags
    totals = total({str(index): float(flag) for index, flag in enumerate(flags)})
    return tuple(value > 0 for value in totals.values())

"""Learning rate schedulers by name: ``scheduler.scheduler_choice`` of the YAML."""

from typing import Any

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["get_scheduler", "steps_every_batch"]

CHOICES = ("MultiStepLR", "CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR", "none")


def get_scheduler(optimizer: Optimizer, conf: Any, total_batches: int = 0) -> LRScheduler | None:
    """The chosen scheduler, or ``None`` for the choice ``none``.

    Args:
        optimizer: whose learning rates it drives. A group's learning rate that differs from the
            first group's keeps its ratio to it (but for eta_min, which all groups have alike).
        conf: a configuration with ``scheduler.scheduler_choice`` (MultiStepLR,
            CosineAnnealingWarmRestarts, CyclicLR, OneCycleLR or none) and a section of that name
            with its options.
        total_batches: length of the whole run, which OneCycleLR needs.

    Raises:
        ValueError: the choice is none of them.
    """
    choice = conf.scheduler.scheduler_choice
    if choice in (None, "none"):
        return None
    if choice not in CHOICES:
        raise ValueError(f"scheduler_choice is {choice!r}, expected one of {', '.join(CHOICES)}")
    section = getattr(conf.scheduler, choice)
    options = dict(section if hasattr(section, "items") else vars(section))
    scales = [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups]
    for bound in ("base_lr", "max_lr"):
        if bound in options:
            options[bound] = [options[bound] * scale for scale in scales]
    if choice == "OneCycleLR":
        options.update(total_steps=total_batches, cycle_momentum=False)
    if choice == "CyclicLR":
        options.update(cycle_momentum=False)
    return getattr(lr_scheduler, choice)(optimizer, **options)


def steps_every_batch(scheduler: LRScheduler | None) -> bool:
    """Whether the scheduler counts batches; the others count epochs."""
    return isinstance(scheduler, (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR))

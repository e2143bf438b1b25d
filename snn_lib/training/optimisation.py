"""Makes the optimiser and the learning rate schedule that the configuration chooses by name.

``snn_lib.settings`` lists them with their options.
"""

from collections.abc import Iterable
from typing import Any, get_args

import torch
from omegaconf import OmegaConf
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from snn_lib.settings import OptimizerChoice, SchedulerChoice


def get_optimizer(params: Iterable[Any], conf: Any) -> Optimizer:
    """The chosen optimiser over ``params``.

    Args:
        params: parameters or parameter groups.
        conf: a configuration with ``optimizer.optimizer_choice`` and a section of that name with
            its options, such as ``optimizer.Adam.lr``.

    Raises:
        ValueError: the choice is none of ``settings.OptimizerChoice``.
    """
    choice, options = _chosen(conf.optimizer, "optimizer_choice", get_args(OptimizerChoice))
    fused = {} if choice == "SGD" else {"fused": True}
    return getattr(torch.optim, choice)(params, **fused, **options)


def get_scheduler(optimizer: Optimizer, conf: Any, total_batches: int = 0) -> LRScheduler | None:
    """The chosen scheduler, or ``None`` for the choice ``none``.

    Args:
        optimizer: the optimiser whose learning rates it changes. Each group keeps the ratio of its
            learning rate to the first group's, except that all groups have the same eta_min.
        conf: a configuration with ``scheduler.scheduler_choice`` and a section of that name with
            its options.
        total_batches: batches of the whole run, which OneCycleLR needs.

    Raises:
        ValueError: the choice is none of ``settings.SchedulerChoice``.
    """
    if conf.scheduler.scheduler_choice in (None, "none"):
        return None
    choice, options = _chosen(conf.scheduler, "scheduler_choice", get_args(SchedulerChoice))
    scales = [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups]
    for bound in ("base_lr", "max_lr"):
        if bound in options:
            options[bound] = [options[bound] * scale for scale in scales]
    if choice == "OneCycleLR":
        options["total_steps"] = total_batches
        if options["pct_start"] * total_batches == 1:  # a rise of one step: PyTorch divides by 0
            options["pct_start"] = 0.0
    if choice in ("OneCycleLR", "CyclicLR"):
        options["cycle_momentum"] = False
    return getattr(lr_scheduler, choice)(optimizer, **options)


def steps_every_batch(scheduler: LRScheduler | None) -> bool:
    """Whether the scheduler counts batches; the others count epochs."""
    return isinstance(scheduler, (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR))


def _chosen(section: Any, key: str, choices: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """The name that a section chooses, and the options under this name.

    The section is a dataclass, or a mapping that OmegaConf has read from a YAML file of 2020.
    """
    choice = getattr(section, key)
    if choice not in choices:
        raise ValueError(f"{key} is {choice!r}, expected one of {', '.join(choices)}")
    options = getattr(section, choice)
    if OmegaConf.is_config(options):  # whose lists are not Python's, and would go into checkpoints
        options = OmegaConf.to_container(options, resolve=True, throw_on_missing=True)
    return choice, dict(options if hasattr(options, "items") else vars(options))

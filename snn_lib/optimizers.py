"""Optimisers by name: ``optimizer.optimizer_choice`` of the YAML."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from snn_lib.synapses import IIRSynapse

__all__ = ["get_optimizer", "parameter_groups"]


def get_optimizer(params: Iterable[Any], conf: Any) -> Optimizer:
    """The chosen optimiser over ``params``.

    Args:
        params: parameters or parameter groups.
        conf: a configuration with ``optimizer.optimizer_choice`` (Adam, AdamW or SGD) and a
            section of that name with its options, such as ``optimizer.Adam.lr``.

    Raises:
        ValueError: the choice is none of them.
    """
    choice = conf.optimizer.optimizer_choice
    if choice not in ("Adam", "AdamW", "SGD"):
        raise ValueError(f"optimizer_choice is {choice!r}, expected Adam, AdamW or SGD")
    options = dict(_items(conf.optimizer, choice))
    fused = {} if choice == "SGD" else {"fused": True}
    return getattr(torch.optim, choice)(params, **fused, **options)


def parameter_groups(model: nn.Module, conf: Any) -> list[dict[str, Any]]:
    """Weights and filter coefficients as two groups.

    The coefficients learn at ``optimizer.coefficient_lr_scale`` times the learning rate and never
    decay: weight decay would pull the filters towards no memory.
    """
    section = conf.optimizer
    options = dict(_items(section, section.optimizer_choice))
    coefficients = [
        parameter
        for module in model.modules()
        if isinstance(module, IIRSynapse)
        for parameter in module.parameters()
    ]
    known = {id(parameter) for parameter in coefficients}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in known]
    scaled = {"lr": options["lr"] * section.coefficient_lr_scale, "weight_decay": 0.0}
    groups = [{"params": weights}, {"params": coefficients, **scaled}]
    return [group for group in groups if group["params"]]


def _items(section: Any, name: str) -> Iterable[tuple[str, Any]]:
    options = getattr(section, name)
    return (options if hasattr(options, "items") else vars(options)).items()

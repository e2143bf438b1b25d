"""Builds the model and chooses the device, before an experiment trains."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from snn_lib.containers import batch_first_part
from snn_lib.errors import InputError, require
from snn_lib.seeds import LAYERS, batch_seed
from snn_lib.training.diagnosis import blaming

BuildModel = Callable[..., nn.Module]


def build(build_model: BuildModel, config: Any, task: Any) -> nn.Module:
    """The model that ``build_model`` makes of the configuration, or of configuration and task.

    It is given both if it has a second parameter without a default. What it draws at random, from
    the generators of PyTorch's CPU, NumPy and Python, follows from the seed. So what no checkpoint
    holds, such as a fixed order of the inputs, is the same wherever the network is built again.

    Args:
        build_model: the function, or the class of the model.
        config: the configuration.
        task: the task, set up, or whatever knows its ``preparation`` and ``classes``.

    Raises:
        InputError: it makes no model, or one that does not take time first, has lazy layers, or
            weights or buffers that are expanded; or as
            :func:`snn_lib.training.diagnosis.blaming`.
    """
    model: Any = None
    if callable(build_model) and not isinstance(build_model, nn.Module):
        parameters = inspect.signature(build_model).parameters.values()
        needed = [one for one in parameters if one.default is one.empty and one.kind <= 1]
        seed = getattr(config, "seed", 0)
        with blaming("the model"), batch_seed(seed, LAYERS, 0):
            torch.default_generator.manual_seed(seed)
            model = build_model(config, task) if len(needed) > 1 else build_model(config)
    require(
        isinstance(model, nn.Module),
        "build_model must be a function that takes the configuration and returns the model",
    )
    require(
        not any(is_lazy(parameter) for parameter in model.parameters()),
        "build_model returns a lazy layer, such as nn.LazyLinear, whose size is not known yet",
    )
    kept = (*model.named_parameters(), *model.named_buffers())
    expanded = [name for name, tensor in kept if _is_expanded(tensor)]
    require(
        not expanded,
        f"{min(expanded, default='')} of the model is expanded, and no checkpoint can be read into "
        "it: make it of what clone() returns",
    )
    part = batch_first_part(model)
    require(
        part is None,
        f"the model{part and f', in its part {part},'} has batch_first, but tasks hand out "
        "batches (T, B, *features): build it without, or give the model an attribute "
        "batch_first = False if it takes these",
    )
    return model


def _is_expanded(tensor: Tensor) -> bool:
    """Whether elements share their memory. NumPy may give a dimension of 1 a stride of 0, too."""
    if tensor.layout != torch.strided:
        return False
    dimensions = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in dimensions)


def choose_device(name: str) -> torch.device:
    """The device of a name of PyTorch's; ``auto`` is CUDA if there is a GPU, else the CPU.

    Raises:
        InputError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception:  # every backend fails in its own way
        raise InputError(f"device={name!r} is not available here, use device=cpu") from None
    return device

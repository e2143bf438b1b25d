"""The sums over batches from which a task computes its metrics, and metrics as plain numbers."""

from collections.abc import Mapping
from numbers import Integral, Real
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor


def add_sums(sums: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Adds the sums of one more batch, in place and without waiting for the device."""
    for key, value in more.items():
        sums[key] = sums.get(key, 0) + value  # counts stay integers


def read_sums(sums: Mapping[str, Any]) -> dict[str, float]:
    """The sums as floats. Those on a device come over together, which waits for it only once.

    They come as bytes, since they have several dtypes, and not every device has one for them all. A
    tensor of several numbers raises a TypeError.
    """
    for key, value in sums.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise TypeError(f"sum {key!r} has shape {tuple(value.shape)}, expected a single number")
    read = dict(sums)
    away = {k: v.reshape(1) for k, v in sums.items() if isinstance(v, Tensor) and not v.is_cpu}
    if away:
        together = torch.cat([tensor.view(torch.uint8) for tensor in away.values()]).cpu()
        parts = together.split([tensor.element_size() for tensor in away.values()])
        for (key, tensor), part in zip(away.items(), parts, strict=True):
            read[key] = part.clone().view(tensor.dtype).item()
    return {key: float(value) for key, value in read.items()}


def plain_number(value: Any) -> int | float:
    """A metric as Python's own int or float, which checkpoints, JSON and CSV can hold.

    It may be any real number of Python, NumPy or PyTorch, in an array or tensor of no dimensions,
    too. ``True`` is 1. Anything else raises a TypeError.
    """
    number = value
    if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0:
        number = value.item()
    if isinstance(number, Integral):
        return int(number)
    if isinstance(number, Real):
        return float(number)
    shown = shorten(repr(value), 60, placeholder="...")
    raise TypeError(f"{type(value).__name__} {shown} is no number, expected an int or a float")

"""Backends of the two operators, one file each, chosen by the tensor's device.

Every backend offers the same four functions on flattened features, tensors ``(T, B, N)``:
``filter_forward``, ``filter_backward``, ``neuron_forward``, ``neuron_backward``. ``eager`` is plain
PyTorch, runs on any device in any floating dtype, and is the definition of correct; ``cpu``
(Numba) and ``cuda`` (Triton) must agree with it.
"""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("eager", "cpu", "cuda")
COMPILED_DTYPES = (torch.float32, torch.float64)

_forced: str | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend while the context lasts, in every thread of the process.

    Process-wide, since autograd may run the backward pass on a thread of its own.

    Args:
        name: ``"eager"``, ``"cpu"`` (Numba) or ``"cuda"`` (Triton).

    Raises:
        ValueError: ``name`` is none of them.
        ImportError: the backend's package is not installed.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown, choose one of {', '.join(BACKENDS)}")
    _module(name)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def backend_for(tensor: Tensor) -> ModuleType:
    """The backend that serves ``tensor``: the forced one, or the fastest for its device."""
    if _forced is not None:
        return _module(_forced)
    if tensor.dtype in COMPILED_DTYPES and tensor.device.type in ("cpu", "cuda"):
        return _fastest(tensor.device.type)
    return _module("eager")


@cache
def _fastest(device_type: str) -> ModuleType:
    try:
        return _module(device_type)
    except ImportError as error:
        package = {"cpu": "numba", "cuda": "triton"}[device_type]
        warnings.warn(
            f"{package} cannot be imported ({error}): the slower plain PyTorch backend serves",
            RuntimeWarning,
            stacklevel=2,
        )
        return _module("eager")


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")

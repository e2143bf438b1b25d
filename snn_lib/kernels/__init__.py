"""The backends that run programs over time. A tensor's device decides which one serves it.

A program is the step of a cell, or of two neighbours (``program``). ``trace`` records what the step
and its adjoint compute, ``inputs`` is what a program runs with, and ``operator`` what PyTorch sees.

Every backend has the same two functions of such inputs, ``forward`` and ``backward``. ``eager`` is
the step in a loop of PyTorch's operations, the definition of correct, and serves any device.
``cpu`` (LLVM) and ``cuda`` (Triton) write kernels from the traces and must agree with it. All of
them compute in float32 or in float64. No file here imports a cell: cells hand their steps in.

The compiled backend of a device serves it, and ``eager`` does where there is none or where it
cannot be imported. The environment variable ``SNN_BACKEND`` chooses a backend for the whole
process, and :func:`use_backend` for a context. ``python -m snn_lib.kernels`` says which one serves
each device, and why; with ``--check`` it also compares them.
"""

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("eager", "cpu", "cuda")
COMPUTE_DTYPES = (torch.float32, torch.float64)
AUTO = "auto"  # the choice that leaves it to the device
PACKAGES = {"cpu": "llvmlite", "cuda": "Triton"}
# How long a training step takes if plain PyTorch serves instead. On a GPU it launches a kernel for
# every operation of every time step.
SLOWER = {"cpu": "about three times as long", "cuda": "many times as long"}


@dataclass(eq=False)  # each choice equals itself alone, so a context removes its own
class _Choice:
    name: str


_choices: list[_Choice] = []  # of the contexts of ``use_backend`` that are open, oldest first


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes one backend serve all tensors within a context, in every thread of the process.

    It holds for the whole process, since autograd may run the backward pass on a thread of its own.
    If several contexts are open, the one that was opened last decides.

    Args:
        name: ``"eager"``, ``"cpu"`` (LLVM), ``"cuda"`` (Triton), or ``"auto"`` for the backend
            that serves without this function.

    Raises:
        ValueError: ``name`` is none of them; or, within the context, a tensor is on a device that
            the backend cannot serve.
        ImportError: the backend cannot be imported.
    """
    _check(name, "backend")
    if name != AUTO:
        _module(name)
    choice = _Choice(name)
    _choices.append(choice)
    try:
        yield
    finally:
        _choices.remove(choice)


def choose_backend(device: torch.device | str) -> tuple[str, str]:
    """The name of the backend that serves tensors on ``device``, and the reason in words.

    Raises:
        ValueError: the chosen backend is unknown or cannot serve this device.
        ImportError: the chosen backend cannot be imported.
    """
    return _choose_backend(torch.device(device).type, _newest_choice())


def backend_for(tensor: Tensor) -> ModuleType:
    """The backend that serves ``tensor``, see :func:`choose_backend`."""
    return _module(_choose_backend(tensor.device.type, _newest_choice())[0])


def _newest_choice() -> str:
    for choice in reversed(_choices):  # not [-1], since another thread may empty the list
        return choice.name
    return AUTO


@cache
def _choose_backend(device_type: str, name: str) -> tuple[str, str]:
    reason = "forced by use_backend"
    if name == AUTO:
        name, reason = os.environ.get("SNN_BACKEND") or AUTO, "SNN_BACKEND"
        _check(name, reason)
    if name == AUTO:
        return _fastest(device_type)
    interpreted = name == "cuda" and os.environ.get("TRITON_INTERPRET") == "1"
    if name not in ("eager", device_type) and not (interpreted and device_type == "cpu"):
        remedy = ", or on cpu with TRITON_INTERPRET=1" if name == "cuda" else ""
        raise ValueError(
            f"backend {name!r} ({reason}) cannot serve a tensor on {device_type}, "
            f"only on {name}{remedy}"
        )
    _module(name)
    return name, reason


def _check(name: str, source: str) -> None:
    if name not in (known := (AUTO, *BACKENDS)):
        raise ValueError(f"{source} {name!r} is unknown, choose one of {', '.join(known)}")


def _fastest(device_type: str) -> tuple[str, str]:
    if device_type not in PACKAGES:
        return "eager", f"no backend is compiled for {device_type}"
    try:
        _module(device_type)
    except ImportError as error:
        warnings.warn(
            f"{error}: plain PyTorch serves instead, and a training step takes "
            f"{SLOWER[device_type]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return "eager", str(error)
    return device_type, PACKAGES[device_type]


@cache
def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except Exception as error:  # a broken package raises what it likes, llvmlite an OSError
        raise ImportError(f"{PACKAGES[name]} cannot be imported: {error!r}") from error

"""Checkpoints: plain dicts of tensors and built-in types, written so that a crash leaves none half.

A finished model holds ``epoch, snn_state_dict, metrics``, and of its origin ``config, environment``
and ``script``. The last checkpoint of a run holds ``optimizer_state_dict, average_state_dict, rng``
and ``progress`` as well, with which training goes on in the middle of an epoch; the scheduler's
state follows from the number of steps.
"""

import io
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from snn_lib.errors import InputError, one_line, require
from snn_lib.files import write_atomically

Checkpoint = dict[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint atomically.

    Raises:
        RunError: the disk is full or the folder cannot be written; an older file stays as it was.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint to the CPU, running no code from it (``weights_only``).

    Raises:
        InputError: the file is missing, damaged, holds objects that would run code, or is no
            checkpoint.
    """
    try:
        if not path.exists():
            raise InputError(f"there is no checkpoint {path}")
        if not path.is_file():  # reading a pipe, for example, would never end
            raise InputError(f"checkpoint {path} is not a file")
        if zipfile.is_zipfile(path):  # torch.load does not compare the checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise InputError(f"checkpoint {path} is damaged: its checksums do not match")
        with warnings.catch_warnings():  # about files that are refused anyway
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError:
        raise InputError(
            f"checkpoint {path} is refused: it is damaged, or holds other objects than tensors "
            "and built-in types, which could run code"
        ) from None
    except Exception as error:  # bytes of no checkpoint can fail in the reader in any way
        raise InputError(
            f"checkpoint {path} cannot be read: {type(error).__name__}: {one_line(error)}"
        ) from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("snn_state_dict"), dict):
        raise InputError(f"{path} is no checkpoint of this project: it has no snn_state_dict")
    return checkpoint


def load_weights(model: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Puts a checkpoint's weights into the model.

    Raises:
        InputError: the checkpoint belongs to another model, and the message names what differs; or
            a weight is not finite.
    """
    try:
        model.load_state_dict(checkpoint["snn_state_dict"])
    except Exception as error:  # a key or value that is none can fail in the loader in any way
        lines = str(error).splitlines() or [type(error).__name__]
        difference = shorten(lines[min(1, len(lines) - 1)], 200)  # the first is a title
        origin = describe_origin(checkpoint, path)
        raise InputError(f"{origin} belongs to another model: {difference}") from None
    broken = not_finite(model.state_dict())
    require(not broken, f"checkpoint {path} is of no use: {broken} not finite")


def describe_origin(checkpoint: Checkpoint, path: Path) -> str:
    """The checkpoint's path, and the script that wrote it if the checkpoint tells."""
    script = checkpoint.get("script")
    return f"checkpoint {path}" + (f" (written by {shorten(str(script), 50)})" if script else "")


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The names of those that have an infinite or undefined element, separated by commas."""
    return ", ".join(k for k, values in tensors.items() if not torch.isfinite(values).all())

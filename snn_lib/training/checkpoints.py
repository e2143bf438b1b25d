"""Checkpoints: plain dicts of tensors and built-in types, written so that a crash leaves none half.

Keys: ``epoch, snn_state_dict, optimizer_state_dict, rng, config, environment, metrics`` and what
``experiment`` adds to resume in the middle of an epoch; a scheduler's state follows from the number
of steps. Finished models hold ``epoch, snn_state_dict, config, environment, metrics``.
"""

import io
import pickle
import warnings
import zipfile
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from snn_lib.errors import InputError, one_line
from snn_lib.files import write_atomically


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Writes a checkpoint atomically.

    Raises:
        RunError: the disk is full or the folder cannot be written; an older file stays as it was.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU, running no code from it (``weights_only``).

    Raises:
        InputError: the file is missing, damaged, holds objects that would run code, or is no
            checkpoint.
    """
    try:
        if zipfile.is_zipfile(path):  # torch.load does not compare the checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise InputError(f"checkpoint {path} is damaged: its checksums do not match")
        with warnings.catch_warnings():  # about files that are refused anyway
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}") from None
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


def load_weights(model: nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Puts a checkpoint's weights into the model.

    Raises:
        InputError: the checkpoint belongs to another model; the message names what differs.
    """
    try:
        model.load_state_dict(checkpoint["snn_state_dict"])
    except Exception as error:  # a key or value that is none can fail in the loader in any way
        lines = str(error).splitlines() or [type(error).__name__]
        difference = shorten(lines[min(1, len(lines) - 1)], 200)  # the first is a title
        raise InputError(f"checkpoint {path} belongs to another model: {difference}") from None

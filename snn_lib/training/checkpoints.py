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
    own, loaded = model.state_dict(), checkpoint["snn_state_dict"]
    differences = [f"it lacks {key}" for key in own.keys() - loaded.keys()]
    differences += [f"it has {key}, the model has not" for key in loaded.keys() - own.keys()]
    for key in own.keys() & loaded.keys():
        shape = getattr(loaded[key], "shape", None)
        if shape != own[key].shape:
            found = "no tensor" if shape is None else tuple(shape)
            differences.append(f"{key} is {found}, the model's is {tuple(own[key].shape)}")
    if differences:
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise InputError(f"checkpoint {path} belongs to another model: {min(differences)}{more}")
    try:
        model.load_state_dict(loaded)
    except RuntimeError as error:  # tensors of a kind that cannot be copied
        raise InputError(f"checkpoint {path} cannot be used: {one_line(error)}") from None

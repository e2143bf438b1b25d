"""Checkpoints: plain dicts of tensors and built-in types, which no crash leaves half written.

A finished model holds ``epoch``, ``snn_state_dict`` and ``metrics``. It tells of its origin by
``config``, ``environment``, ``script``, ``build_model`` and ``config_class``, and of its use by
``preparation``, ``prepares`` (whether it is all that prepares input), ``readout``, ``logit_scale``
and ``classes``. The last checkpoint of a run also holds ``optimizer_state_dict``,
``average_state_dict``, ``margins``, ``rng`` and ``progress``, from which training goes on in the
middle of an epoch, and ``metrics`` of all epochs. The scheduler's state follows from the number of
steps.
"""

import copy
import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from snn_lib.cells import Constrained, IIRSynapse
from snn_lib.errors import InputError, out_of_memory, require
from snn_lib.files import read_file, reading, write_atomically

STATISTICS = "running_mean", "running_var"  # of normalisations


class Checkpoint(dict[str, Any]):
    """What a checkpoint holds, and the ``path`` that it was read from."""

    def __init__(self, content: Mapping[str, Any], path: Path) -> None:
        super().__init__(content)
        self.path = path

    @property
    def origin(self) -> str:
        """The path, and the script that wrote the checkpoint if it names one."""
        script = self.get("script")
        named = script if isinstance(script, str) else ""
        written_by = f" (written by {shorten(named, 50)})" if named else ""
        return f"checkpoint {self.path}{written_by}"


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint atomically.

    Raises:
        RunError: the disk is full or the folder cannot be written; an older file stays as it was.
    """
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    write_atomically(path, buffer.getvalue())


def check_readable(content: Mapping[str, Any]) -> None:
    """Refuses what can be written to a checkpoint but not be read from it, before a run begins.

    Raises:
        InputError: a part cannot be written, or holds other than tensors and built-in types.
    """
    for name, part in content.items():
        buffer = io.BytesIO()
        try:
            torch.save(part, buffer)
            buffer.seek(0)
            torch.load(buffer, map_location="cpu", weights_only=True)
        except Exception as error:  # any object can fail to be written or read in any way
            if out_of_memory(error):
                raise
            raise InputError(
                f"checkpoints of this run could not be read: their {name} holds other objects than "
                "tensors and built-in types, such as an array of NumPy's"
            ) from None


def load_checkpoint(path: "Checkpoint | Path | str", which: str = "best") -> Checkpoint:
    """Reads a checkpoint to the CPU, running no code from it (``weights_only``).

    The folder of a run stands for its ``best`` one, or ``last``. One that has been read already is
    returned as it is.

    Raises:
        InputError: the file is missing or damaged, holds objects that would run code, or is no
            checkpoint.
    """
    if isinstance(path, Checkpoint):
        return path
    path = Path(path)
    if path.is_dir():
        runs = [found.parent for found in sorted(path.glob(f"*/{which}"))]
        runs = f", such as {runs[-1]}" if runs else f" that has a {which} checkpoint"
        path = path / which
        require(path.exists(), f"there is no file {path}: expected the folder of a run{runs}")
    file = io.BytesIO(read_file(path))
    with reading(path):
        if zipfile.is_zipfile(file):  # torch.load does not compare the checksums
            with zipfile.ZipFile(file) as archive:
                intact = archive.testzip() is None
            require(intact, f"checkpoint {path} is damaged: its checksums do not match")
        file.seek(0)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a file of any other kind can fail in the loader in any way
            if out_of_memory(error):
                raise
            raise InputError(
                f"checkpoint {path} is refused: it is damaged, or holds other objects than tensors "
                "and built-in types, which could run code"
            ) from None
    require(
        isinstance(content, dict) and isinstance(content.get("snn_state_dict"), dict),
        f"{path} is no checkpoint of this project: it has no snn_state_dict",
    )
    return Checkpoint(content, path)


def load_weights(
    model: nn.Module, checkpoint: Checkpoint | Path | str, averaged: bool = True
) -> None:
    """Puts a checkpoint's weights into the model.

    Args:
        model: a model of the same layers.
        checkpoint: as :func:`load_checkpoint` returns it, or its path.
        averaged: take the moving average that a last checkpoint may hold beside the weights. It is
            what the training evaluates and keeps as the best.

    Raises:
        InputError: the checkpoint belongs to another model (the message names what differs), or a
            weight is not finite. The model keeps its weights.
    """
    checkpoint = load_checkpoint(checkpoint)
    average = checkpoint.get("average_state_dict") if averaged else None
    with unchanged_if_refused(model):
        try:
            weights = checkpoint["snn_state_dict"]
            if average is not None:  # the state of an AveragedModel
                items = average.items()
                weights = {k.removeprefix("module."): v for k, v in items if k != "n_averaged"}
            model.load_state_dict(weights)
        except Exception as error:  # a key or value that is none can fail in the loader in any way
            lines = str(error).splitlines() or [type(error).__name__]
            difference = shorten(lines[min(1, len(lines) - 1)], 200)  # the first is a title
            said = f"{checkpoint.origin} belongs to another model: {difference}"
            raise InputError(said) from None
        broken = not_finite(learned(model))
        require(not broken, f"checkpoint {checkpoint.path} is of no use: {broken} not finite")


@contextmanager
def unchanged_if_refused(model: nn.Module) -> Iterator[None]:
    """The context in which a refusal leaves a model its weights; PyTorch loads what fits first."""
    before = copy.deepcopy(model.state_dict())
    margins = {layer: layer.margin for layer in model.modules() if isinstance(layer, IIRSynapse)}
    try:
        yield
    except InputError:
        model.load_state_dict(before)
        for layer, margin in margins.items():  # which slow filters have made smaller
            layer.margin = margin
        raise


def learned(model: nn.Module) -> dict[str, Tensor]:
    """What training has made of a model, by name.

    That is its weights, the coefficients of filters and neurons, and the running statistics of
    normalisations. Other buffers may be constants, even infinite ones, such as the mask of an
    attention.
    """
    found: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        coefficients = isinstance(module, Constrained)
        for key, buffer in module.named_buffers(name, recurse=False):
            if coefficients or key.endswith(STATISTICS):
                found[key] = buffer
    return found


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The names of the tensors with an infinite or undefined element, separated by commas."""
    return ", ".join(k for k, values in tensors.items() if not torch.isfinite(values).all())

"""Sequences of anyone's: arrays or a data set of them, of equal or of different lengths."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from snn_lib.data.batches import Batch
from snn_lib.errors import InputError, require


class SequenceDataset(Dataset):
    """``(x, y)`` or ``(x, y, lengths)`` as a data set of ``(sequence, target)``.

    Args:
        x: the sequences, samples first: an array or tensor ``(samples, T, *features)``, or a list
            of ``(T, *features)`` that may differ in T. Integers and booleans become float32.
        y: a target for each.
        lengths: how many steps of each sequence are its own, the others being padding.
        targets_are_sequences: whether a target has a value at every step, and the same padding.

    Raises:
        InputError: ``x`` and ``y`` do not fit each other; where another dimension of ``x`` is the
            samples', the message says so.
    """

    def __init__(
        self, x: Any, y: Any, lengths: Any = None, targets_are_sequences: bool = False
    ) -> None:
        self.x = x if isinstance(x, list) else _tensor(x, "x")
        self.y = y if isinstance(y, list) else _tensor(y, "y")
        self.lengths = None if lengths is None else _tensor(lengths, "lengths").tolist()
        self.targets_are_sequences = targets_are_sequences
        if isinstance(self.x, Tensor):
            shape = tuple(self.x.shape)
            require(
                len(shape) >= 3,
                f"x has shape {shape}, expected (samples, T, *features); a single value a step is "
                "x[..., None]",
            )
            transposed = len(shape) > 1 and len(self.y) == shape[1] != shape[0]
            hint = ": time comes second, as in x.transpose(0, 1)" if transposed else ""
            require(
                len(self.y) == shape[0],
                f"x has shape {shape} and y {len(self.y)} targets, expected samples first{hint}",
            )
        require(len(self.x) == len(self.y), f"{len(self.x)} sequences have {len(self.y)} targets")
        require(len(self.x) > 0, "there are no sequences")
        if self.lengths is not None:
            require(
                len(self.lengths) == len(self.x),
                f"{len(self.x)} sequences have {len(self.lengths)} lengths",
            )
            for number, length in enumerate(self.lengths):
                steps = len(self.x[number])
                require(
                    isinstance(length, int) and 0 < length <= steps,
                    f"length {number} is {length}, expected 1 to {steps}",
                )

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        sequence, target = self.x[index], self.y[index]
        if self.lengths is not None:
            own = slice(self.lengths[index])
            sequence, target = sequence[own], target[own] if self.targets_are_sequences else target
        return sequence, target


def sequence_dataset(source: Any, part: str, targets_are_sequences: bool = False) -> Dataset:
    """A data set of ``(sequence, target)`` from what a user may have.

    Args:
        source: a ``torch.utils.data.Dataset`` of them, or a tuple for :class:`SequenceDataset`.
        part: its name, for messages.
        targets_are_sequences: as in :class:`SequenceDataset`.

    Raises:
        InputError: it is neither, or does not fit together.
    """
    if isinstance(source, Dataset):
        require(hasattr(source, "__len__"), f"the {part} data set has no length")
        require(len(source) > 0, f"the {part} data set is empty")
        return source
    require(
        isinstance(source, (tuple, list)) and len(source) in (2, 3),
        f"the {part} data is {type(source).__name__}, expected (x, y), (x, y, lengths) or a "
        "torch.utils.data.Dataset",
    )
    try:
        return SequenceDataset(*source, targets_are_sequences=targets_are_sequences)
    except InputError as error:
        raise InputError(f"{part} data: {error}") from None


def collate(samples: Sequence[tuple[Any, Any]], targets_are_sequences: bool = False) -> Batch:
    """A batch of samples, padded with zeros to the longest.

    Args:
        samples: ``(sequence, target)`` each, sequences ``(T_i, *features)``.
        targets_are_sequences: whether a target has a value at every step, ``(T_i, *targets)``, and
            is padded likewise.

    Raises:
        InputError: a sequence is empty, or has other features than the first.
    """
    sequences = [_sequence(sequence) for sequence, _ in samples]
    targets = [_in_default_precision(torch.as_tensor(target)) for _, target in samples]
    lengths = [len(sequence) for sequence in sequences]
    if targets_are_sequences:
        for length, target in zip(lengths, targets, strict=True):
            require(
                len(target) == length, f"a sequence of {length} steps has {len(target)} targets"
            )
    x = _padded(sequences, max(lengths, default=0))
    y = _padded(targets, len(x)) if targets_are_sequences else torch.stack(targets)
    return Batch(x, y, None if len(set(lengths)) <= 1 else torch.tensor(lengths))


def _padded(sequences: Sequence[Tensor], steps: int) -> Tensor:
    first = sequences[0]
    padded = first.new_zeros(steps, len(sequences), *first.shape[1:])
    for index, sequence in enumerate(sequences):
        require(
            sequence.shape[1:] == first.shape[1:],
            f"sequences have features {tuple(first.shape[1:])} and {tuple(sequence.shape[1:])}",
        )
        padded[: len(sequence), index] = sequence
    return padded


def _sequence(values: Any) -> Tensor:
    sequence = _tensor(values, "a sequence")
    require(
        sequence.dim() >= 2 and len(sequence) > 0,
        f"a sequence has shape {tuple(sequence.shape)}, expected (T, *features) with T > 0",
    )
    return sequence.to(torch.get_default_dtype())  # integers, and float64 as NumPy makes it


def _in_default_precision(values: Tensor) -> Tensor:
    return values.to(torch.get_default_dtype()) if values.is_floating_point() else values


def _tensor(values: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is no array of numbers: {error}") from None

"""A user's own sequences, of equal or different lengths, in arrays or in a data set.

Every sample is checked when it is read, before the network sees it.
"""

import reprlib
import warnings
from collections.abc import Sequence, Sized
from functools import reduce
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from snn_lib.data.batches import Batch
from snn_lib.errors import InputError, one_line, place_of, require

NAMES = "; for names of classes: names, y = np.unique(y, return_inverse=True), and classes=names"


class SequenceDataset(Dataset):
    """``(x, y)`` or ``(x, y, lengths)`` as a data set of ``(sequence, target)``.

    Args:
        x: the sequences, samples first: an array or tensor ``(samples, T, *features)``, or a list
            of ``(T, *features)`` that may differ in T. A tuple, an array of objects and a column
            of objects in a table are such lists.
        y: a target for each.
        lengths: number of steps of each sequence. The steps after them are padding.
        targets_are_sequences: whether a target has a value at every step, padded like ``x``.

    Raises:
        InputError: ``x``, ``y`` and ``lengths`` do not fit each other.
    """

    def __init__(
        self, x: Any, y: Any, lengths: Any = None, targets_are_sequences: bool = False
    ) -> None:
        x, y = (
            list(values) if isinstance(values, tuple) or _is_row_of_objects(values) else values
            for values in (x, y)
        )
        self.x = x if isinstance(x, list) else as_numbers(x, "x").detach()
        self.y = y if isinstance(y, list) else as_numbers(y, "y", NAMES).detach()
        self.lengths, self.targets_are_sequences = None, targets_are_sequences
        hint = ""
        for name, given in ("x", self.x), ("y", self.y):
            require(isinstance(given, list) or given.dim() > 0, f"{name} is a single number")
        if isinstance(self.x, Tensor):
            shape = tuple(self.x.shape)
            require(
                len(shape) >= 3,
                f"x has shape {shape}, expected (samples, T, *features); a single value a step is "
                "x[..., None]",
            )
            if len(self.y) == shape[1]:
                hint = f": x has shape {shape}, expected samples first, as in x.transpose(0, 1)"
                y_shape = tuple(self.y.shape) if isinstance(self.y, Tensor) else ()
                if targets_are_sequences and y_shape[1:2] == shape[:1]:
                    hint = f": x has shape {shape} and y {y_shape}, expected samples first in both"
        require(
            len(self.x) == len(self.y),
            f"{len(self.x)} sequences have {len(self.y)} targets{hint}",
        )
        require(len(self.x) > 0, "there are no sequences")
        if lengths is not None:
            lengths = as_numbers(lengths, "lengths")
            require(
                lengths.shape == (len(self.x),),
                f"lengths has shape {tuple(lengths.shape)}, expected ({len(self.x)},)",
            )
            self.lengths = lengths.tolist()
            for number, length in enumerate(self.lengths):
                require(hasattr(self.x[number], "__len__"), f"sequence {number} is a single number")
                steps = len(self.x[number])
                require(
                    type(length) is int and 0 < length <= steps,
                    f"length {number} is {length}, expected a whole number from 1 to {steps}",
                )

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        sequence, target = self.x[index], self.y[index]
        if self.lengths is not None:
            own = slice(self.lengths[index])
            sequence = sequence[own]
            # A target without steps is refused where it is read.
            has_steps = getattr(target, "ndim", 1 if hasattr(target, "__len__") else 0) > 0
            target = target[own] if self.targets_are_sequences and has_steps else target
        return sequence, target


def sequence_dataset(source: Any, part: str, targets_are_sequences: bool = False) -> Dataset:
    """Makes a data set of ``(sequence, target)`` from the user's data of a part.

    The source is a ``torch.utils.data.Dataset`` of such pairs, or a tuple of the arguments of
    :class:`SequenceDataset`.

    Raises:
        InputError: ``source`` is neither, or its arrays do not fit each other.
    """
    if isinstance(source, Dataset):
        if not isinstance(source, Sized):
            raise InputError(f"the {part} data set has no length")
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


def read_sample(
    data: Dataset, index: int, targets_are_sequences: bool = False
) -> tuple[Tensor, Tensor]:
    """Reads a sequence ``(T, *features)`` and its target.

    The sequence and a real target get PyTorch's default precision. An integer target stays as it
    is. A target may have a value at every step (``targets_are_sequences``).

    Raises:
        InputError: the data set raises an error (the message names the line of the user's code that
            raised it), or the sample is not a sequence of finite numbers with a target.
    """
    try:
        sample = data[index]
    except Exception as error:  # the code of a user's data set may raise anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{reason}{place_of(error)}") from error
    parts = len(sample) if isinstance(sample, (tuple, list)) else None
    found = f"is {type(sample).__name__}" if parts is None else f"has {parts} parts"
    require(parts == 2, f"it {found}, expected (sequence, target)")
    x, y = as_sequence(sample[0], "the sequence"), as_numbers(sample[1], "the target", NAMES)
    x, y = x.detach(), y.detach()  # a user may have computed them
    if y.is_floating_point():
        y = y.to(torch.get_default_dtype())
    elif y.dtype in (torch.uint16, torch.uint32, torch.uint64):  # PyTorch cannot compare these
        y = y.long()
    require(
        bool(y.isfinite().all()),
        f"the target has numbers that are infinite or undefined in {y.dtype}",
    )
    if targets_are_sequences:
        require(
            y.dim() > 0 and len(y) == len(x),
            f"the sequence has {len(x)} steps and the target shape {tuple(y.shape)}, expected a "
            "target for each step",
        )
    return x, y


def as_sequences(
    samples: Any,
    name: str,
    features: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Makes sequences ``(T_i, *features)`` of finite numbers from a user's arrays.

    Args:
        samples: the arrays.
        name: what an error calls a sample; its number follows.
        features: the shape of a step in the training data, by default that of the first sample.
        dtype: the precision, by default PyTorch's.

    Raises:
        InputError: there are no samples, there is one without the dimension of the samples, or as
            :func:`as_sequence`.
    """
    if features is not None and isinstance(samples, (Tensor, np.ndarray)):
        shape = tuple(samples.shape)
        alone = shape[1:] == tuple(features)
        alone = alone or (len(shape) == 1 and not _is_row_of_objects(samples))
        require(
            not alone,
            f"got a single sequence of shape {shape}, expected samples first: give x[None]",
        )
    sequences = []
    for number, values in enumerate(listed(samples)):
        sequences.append(as_sequence(values, f"{name} {number}", features, dtype))
        features = sequences[0].shape[1:]
    require(bool(sequences), "there are no samples")
    return sequences


def listed(samples: Any) -> list[Any]:
    """A user's samples as a list. What is none becomes its only element, to be refused as such."""
    try:
        return list(samples)
    except TypeError:
        return [samples]


def as_sequence(
    values: Any,
    name: str,
    features: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Makes a sequence of finite numbers, ``(T, *features)``, from a user's array.

    Args:
        values: the array. Where ``features`` are known, ``(T,)`` is a single channel.
        name: what an error calls the sequence.
        features: the shape of a step in the training data, if it is known.
        dtype: the precision, by default PyTorch's.

    Raises:
        InputError: ``values`` are not finite numbers, have another shape, or are empty.
    """
    sequence = as_numbers(values, name).to(dtype or torch.get_default_dtype())
    if features is None:
        fits, expected = sequence.dim() >= 2, "(T, *features)"
    else:
        sequence = sequence[:, None] if sequence.dim() == 1 else sequence
        fits = sequence.shape[1:] == tuple(features)
        expected = f"(T, {', '.join(map(str, features))}) as in training,"
    require(
        fits and sequence.numel() > 0,
        f"{name} has shape {tuple(sequence.shape)}, expected {expected} with at least one number",
    )
    finite = sequence.isfinite()
    if not finite.all():
        step, *channel = (~finite).nonzero()[0].tolist()
        raise InputError(
            f"{name} has a number that is infinite or undefined in {sequence.dtype}: step {step}, "
            f"channel {', '.join(map(str, channel))}"
        )
    return sequence


def as_numbers(values: Any, name: str, remedy: str = "") -> Tensor:
    """Makes a tensor on the CPU from a user's array; masked floating-point numbers become nan.

    If the values are no numbers, the error ends with the remedy.

    Raises:
        InputError: ``values`` are not real numbers in the shape of an array, or whole numbers of
            which some are masked.
    """
    if np.ma.is_masked(values):
        require(values.dtype.kind == "f", f"{name} has masked values: fill them first")
        values = values.filled(np.nan)
    if isinstance(values, (np.ndarray, np.generic)):
        values = np.asarray(values)
        # PyTorch takes no longer floats, no other order of bytes, none reversed, none in between.
        own = np.float64 if values.dtype.char == "g" else values.dtype.newbyteorder("=")
        with np.errstate(over="ignore"):  # of numbers that no float64 holds
            values = values.astype(own, copy=False)
        forward = min(values.strides, default=0) >= 0
        values = values if forward and values.flags.aligned else values.copy()
    try:
        if hasattr(values, "to_numpy"):  # a column of a table, whose index would be in the way
            values = np.array(values.to_numpy().tolist())
        with warnings.catch_warnings():  # nothing here writes to what a user gives
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            tensor = _tensor_of(values)
    except (TypeError, ValueError, RuntimeError):
        shown = shorten(reprlib.repr(values), 100, placeholder=" ...")
        raise InputError(f"{name} is {shown}, expected numbers{remedy}") from None
    require(not tensor.is_complex(), f"{name} has complex numbers, expected real ones")
    require(not tensor.is_nested, f"{name} is a nested tensor: give the list unbind() of it")
    dense = tensor.layout == torch.strided and not tensor.is_quantized
    require(dense, f"{name} is sparse or quantised: give to_dense() or dequantize() of it")
    return tensor


def _tensor_of(values: Any) -> Tensor:
    """An array, or numbers in lists, as a tensor; the lists may hold tensors."""
    try:
        return torch.as_tensor(values, device="cpu")
    except ValueError:  # a list of tensors that are more than single numbers
        return torch.stack([torch.as_tensor(one, device="cpu") for one in values])


def _is_row_of_objects(values: Any) -> bool:
    """Whether values are an array, or a column, of objects, such as arrays of several lengths."""
    return str(getattr(values, "dtype", "")) == "object" and values.ndim == 1


def collate(samples: Sequence[tuple[Tensor, Tensor]], targets_are_sequences: bool = False) -> Batch:
    """Makes a batch of samples ``(sequence, target)``, padded with zeros to the longest.

    Sequences are ``(T_i, *features)``. Targets with a value at every step, ``(T_i, *targets)``, are
    padded too. Targets of several types get the type that holds the numbers of all.
    """
    targets = [torch.as_tensor(target) for _, target in samples]
    dtype = reduce(torch.promote_types, (target.dtype for target in targets))
    targets = [target.to(dtype) for target in targets]
    y = pad_sequence(targets) if targets_are_sequences else torch.stack(targets)
    x, lengths = pad([sequence for sequence, _ in samples])
    return Batch(x, y, lengths)


def pad(sequences: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Pads sequences ``(T_i, *features)`` with zeros to the longest, ``(T, B, *features)``.

    Returns:
        The padded sequences, and their lengths, int64 ``(B,)``, or ``None`` if all are T.
    """
    lengths = [len(sequence) for sequence in sequences]
    same = len(set(lengths)) == 1
    return pad_sequence(sequences), None if same else torch.tensor(lengths, device="cpu")

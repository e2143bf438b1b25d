"""Labelled time series: sets of the UCR and UEA archives by name, ``.ts`` files, ``.npz`` arrays.

The package aeon, https://www.aeon-toolkit.org, reads the archives and their files. It contains some
of the sets and downloads the others.
"""

import difflib
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from snn_lib.data.preparation import SeriesPreparation
from snn_lib.data.reading import read_arrays, reading
from snn_lib.errors import InputError, one_line, require

TRAIN, TEST = "_TRAIN.ts", "_TEST.ts"


class SeriesSet(NamedTuple):
    """A data set of labelled time series.

    Attributes:
        parts: ``train``, and ``test`` if there is one: sequences ``(T_i, channels)``, float64, and
            their class numbers, int64 ``(samples,)``.
        classes: the names of the classes, by number.
    """

    parts: dict[str, tuple[list[Tensor], Tensor]]
    classes: list[str]


def load_series(dataset: str, root: Path, missing: str = "refuse") -> SeriesSet:
    """Reads a data set by its name in the archives, or from files of one's own.

    Args:
        dataset: one of

            - the name of a set in the UCR or UEA archive, which aeon downloads to ``root`` unless
              aeon contains it or it is there;
            - the path of ``NAME_TRAIN.ts``, with ``NAME_TEST.ts`` beside it;
            - the path of an ``.npz`` with the arrays ``x``, ``(samples, T)`` or
              ``(samples, T, channels)``, ``y`` with the number or name of each sample's class, and
              ``lengths`` if ``x`` is padded. The arrays of a test part are ``x_test``, ``y_test``
              and ``lengths_test``.
        root: the folder of downloaded sets.
        missing: what to do with missing values (nan). ``"refuse"`` raises an error.
            ``"interpolate"`` fills them linearly between their neighbours in time, and with the
            nearest value at the ends.

    Raises:
        InputError: the set or file does not exist, aeon is not installed, or the content makes no
            sense: missing or infinite values, an empty sequence, a sequence with other channels
            than the first, a single class, or a class in the test part alone.
    """
    if dataset.endswith(".npz"):
        arrays = _npz(Path(dataset))
    elif dataset.endswith(".ts"):
        arrays = _ts(dataset)
    else:
        require(
            not {"/", "\\", "."} & set(dataset),
            f"dataset={dataset}: expected the name of an archive set, NAME{TRAIN} or an .npz file",
        )
        arrays = _archive(dataset, root)
    names, numbers = np.unique(arrays["train"][1], return_inverse=True)
    require(
        len(names) > 1,
        f"{dataset}: all training sequences are of class {names[0]}, expected two classes or more",
    )
    parts = {"train": (_sequences(arrays["train"][0], f"{dataset}, train", missing), numbers)}
    if "test" in arrays:
        x, y = arrays["test"]
        for label in np.unique(y):
            require(
                bool((names == label).any()),
                f"{dataset}: the test part has class {label}, which the training part has not",
            )
        parts["test"] = _sequences(x, f"{dataset}, test", missing), np.searchsorted(names, y)
    channels = parts["train"][0][0].shape[1]
    for part, (sequences, _) in parts.items():
        for index, sequence in enumerate(sequences):
            require(
                sequence.shape[1] == channels,
                f"{dataset}, {part}: sequence {index} has {sequence.shape[1]} channels, the first "
                f"has {channels}",
            )
    return SeriesSet(
        {part: (x, torch.as_tensor(y, dtype=torch.int64)) for part, (x, y) in parts.items()},
        [str(name) for name in names],
    )


def _npz(path: Path) -> dict[str, tuple[Sequence[np.ndarray], np.ndarray]]:
    names = "x", "y", "lengths"
    arrays = read_arrays(path, [name + suffix for suffix in ("", "_test") for name in names])
    parts = {}
    for part, suffix in (("train", ""), ("test", "_test")):
        x, y, lengths = (arrays.get(name + suffix) for name in names)
        missing = [name + suffix for name, array in (("x", x), ("y", y)) if array is None]
        if part == "test" and len(missing) == 2:
            continue
        require(not missing, f"{path} has no array {' and no '.join(missing)}")
        require(
            x.ndim in (2, 3) and x.dtype.kind in "biuf",
            f"{path}: x{suffix} has shape {x.shape} in {x.dtype}, expected numbers (samples, T) or "
            "(samples, T, channels)",
        )
        require(
            y.shape == x.shape[:1] and y.dtype.kind in "biuSU",
            f"{path}: y{suffix} has shape {y.shape} in {y.dtype}, expected the number or name of a "
            f"class for each of the {len(x)} sequences",
        )
        require(len(x) > 0, f"{path}: x{suffix} has no sequences")
        steps = x.shape[1]
        if lengths is None:
            lengths = np.full(len(x), steps)
        require(
            lengths.shape == y.shape and lengths.dtype.kind in "iu",
            f"{path}: lengths{suffix} has shape {lengths.shape} in {lengths.dtype}, expected a "
            f"number of steps for each of the {len(x)} sequences",
        )
        require(steps > 0, f"{path}: the sequences of x{suffix} have no steps")
        for index, length in enumerate(lengths):
            require(
                0 < length <= steps,
                f"{path}: lengths{suffix}[{index}] is {length}, expected 1 to {steps} steps",
            )
        x = x[..., None] if x.ndim == 2 else x
        parts[part] = [own[:length] for own, length in zip(x, lengths, strict=True)], y
    return parts


def _ts(dataset: str) -> dict[str, tuple[Sequence[np.ndarray], np.ndarray]]:
    require(
        dataset.endswith(TRAIN),
        f"dataset={dataset}: expected NAME{TRAIN}, with NAME{TEST} beside it",
    )
    stem = dataset.removesuffix(TRAIN)
    return {
        part: _read_ts(Path(stem + ending)) for part, ending in (("train", TRAIN), ("test", TEST))
    }


def _read_ts(path: Path) -> tuple[Sequence[np.ndarray], np.ndarray]:
    with reading(path):
        content = _aeon(f"{path} is").load_from_ts_file(str(path), return_meta_data=True)
    return _check_classes(path, *content)


def _archive(name: str, root: Path) -> dict[str, tuple[Sequence[np.ndarray], np.ndarray]]:
    aeon = _aeon(f"dataset={name} is")
    contained = Path(aeon.__file__).parent / "data" / name / f"{name}{TRAIN}"
    if os.path.exists(contained):  # unlike Path's, False of a name too long for a file system
        return _ts(str(contained))
    known = aeon.tsc_datasets.tsc_zenodo
    if name not in known and not os.path.exists(root / name / f"{name}{TRAIN}"):
        similar = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        raise InputError(
            f"dataset={name}: the UCR and UEA archives have no such set"
            + "".join(f", but {other}" for other in similar)
        )
    parts = {}
    for part in ("train", "test"):
        options = {"split": part, "extract_path": str(root), "return_metadata": True}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = aeon.load_classification(name, **options)
        except Exception as error:  # the network, an archive or a line of text may fail
            reason = one_line(error)
            raise InputError(f"{name} can be neither read nor downloaded: {reason}") from None
        parts[part] = _check_classes(name, *content)
    return parts


def _check_classes(
    source: Any, x: Sequence[np.ndarray], y: np.ndarray, about: dict[str, Any]
) -> tuple[Sequence[np.ndarray], np.ndarray]:
    """Checks the classes that aeon has read, and turns sequences to ``(T, channels)``."""
    require(about["classlabel"] and len(y) > 0, f"{source} has no classes: it is no classification")
    labels = [str(label).strip() for label in y]
    for index, label in enumerate(labels):
        require(
            label in about["class_values"],
            f"{source}: sequence {index} is of class {label}, expected one of those that "
            f"@classLabel lists: {', '.join(about['class_values'])}",
        )
    return [np.transpose(sequence) for sequence in x], np.array(labels)


def _aeon(what: str) -> Any:
    try:
        import aeon.datasets
        import aeon.datasets.tsc_datasets
    except ImportError:
        raise InputError(f"{what} read by aeon, which is not installed: pip install aeon") from None
    return aeon.datasets


def _sequences(x: Iterable[np.ndarray], part: str, missing: str) -> list[Tensor]:
    sequences = []
    for index, values in enumerate(x):
        with np.errstate(over="ignore"):  # of numbers that no float64 holds
            sequence = np.array(values, dtype=np.float64)
        require(sequence.size > 0, f"{part}: sequence {index} has no steps")
        require(not np.isinf(sequence).any(), f"{part}: sequence {index} has infinite values")
        gaps = np.isnan(sequence)
        if gaps.any():
            require(
                missing == "interpolate",
                f"{part}: sequence {index} has missing values; missing=interpolate fills them",
            )
            require(
                not gaps.all(0).any(),
                f"{part}: sequence {index} has a channel without any value",
            )
            _interpolate(sequence, gaps)
        sequences.append(torch.from_numpy(sequence))
    return sequences


def _interpolate(sequence: np.ndarray, gaps: np.ndarray) -> None:
    """Fills the gaps of each channel, in place."""
    for values, missing in zip(sequence.T, gaps.T, strict=True):
        values[missing] = np.interp(missing.nonzero()[0], (~missing).nonzero()[0], values[~missing])


def prepare_series(
    sequences: Sequence[Tensor],
    length: int,
    encoding: str = "current",
    fields: int = 8,
    threshold: float = 0.25,
) -> SeriesPreparation:
    """Finds on the training sequences how series are standardised, shortened and encoded.

    A channel that never changes is only centred.

    Args:
        sequences: ``(T_i, channels)`` each, float64.
        length: most steps; if a sequence has more, all are averaged over blocks of steps.
        encoding, fields, threshold: as in :class:`SeriesPreparation`.

    Raises:
        InputError: no sequence ever changes, or numbers are too large to be squared.
    """
    mean, deviation = mean_and_deviation(sequences)
    require(
        bool(deviation.isfinite().all()), "the numbers of a channel are too large to be squared"
    )
    require(bool((deviation > 0).any()), "no training sequence ever changes")
    longest = max(map(len, sequences))
    block = -(-longest // length)
    preparation = SeriesPreparation(
        mean,
        torch.where(deviation > 0, deviation, 1.0),
        torch.ones(len(mean)),  # of the changes, until they are known
        block,
        -(-longest // block),
        encoding,
        fields,
        threshold,
    )
    changes = torch.cat([preparation.shorten(sequence).diff(dim=0) for sequence in sequences])
    change = changes.std(0, correction=0) if len(changes) else torch.zeros(len(mean))
    return replace(preparation, change=torch.where(change > 0, change, 1.0))


def mean_and_deviation(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Computes each channel's mean and standard deviation over all steps of all sequences.

    The sums are of differences from the first step. So large numbers that differ little keep their
    digits, and a channel that never changes has a deviation of exactly zero.

    Args:
        sequences: ``(T_i, channels)`` each, float64.
    """
    steps, first = sum(map(len, sequences)), sequences[0][0]
    mean = first + sum((sequence - first).sum(0) for sequence in sequences) / steps
    variance = sum((sequence - mean).square().sum(0) for sequence in sequences) / steps
    return mean, variance.sqrt()

"""Labelled time series: sets of the UCR and UEA archives by name, ``.ts`` files, ``.npz`` arrays.

The package aeon, https://www.aeon-toolkit.org, reads the archives and their files. It contains some
of the sets and downloads the others.
"""

import difflib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from snn_lib.data.sequences import as_sequences, sequence_dataset
from snn_lib.errors import InputError, one_line, require
from snn_lib.files import read_arrays, reading

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
              and, if there are ``lengths``, ``lengths_test``.
        root: the folder of downloaded sets.
        missing: what to do with missing values (nan). ``"refuse"`` raises an error.
            ``"interpolate"`` fills them linearly between their neighbours in time, and with the
            nearest value at the ends.

    Raises:
        InputError: none is named, the set or file does not exist, aeon is not installed, or the
            content makes no sense: missing or infinite values, an empty sequence, a sequence with
            other channels than the first, a single class, or a class in the test part alone.
    """
    require(
        bool(dataset),
        f"no data set is named: give an .npz file, NAME{TRAIN} or the name of an archive set, such "
        "as mine.npz or GunPoint",
    )
    if dataset.endswith(".npz"):
        arrays = _npz(dataset)
    elif dataset.endswith(TRAIN):
        arrays = _ts(dataset)
    else:
        require(
            not {"/", "\\", "."} & set(dataset),
            f"dataset={dataset}: expected NAME{TRAIN} with NAME{TEST} beside it, an .npz file, or "
            "the name of an archive set",
        )
        arrays = _ts(_archive_file(dataset, root))
    names = np.unique(arrays["train"][1])
    require(
        len(names) > 1,
        f"{dataset}: all training sequences are of class {names[0]}, expected two classes or more",
    )
    parts, features = {}, None
    for part, (x, y) in arrays.items():
        unknown = set(y.tolist()) - set(names.tolist())
        require(
            not unknown,
            f"{dataset}: the {part} part has class {min(unknown, default='')!r}, which the "
            "training part has not",
        )
        name = f"{dataset}, {part}: sequence"
        filled = (_fill_gaps(one, f"{name} {index}", missing) for index, one in enumerate(x))
        sequences = as_sequences(filled, name, features, torch.float64)
        features = sequences[0].shape[1:]
        parts[part] = sequences, torch.from_numpy(np.searchsorted(names, y))
    return SeriesSet(parts, [str(name) for name in names])


def _npz(path: str) -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
    names = "x", "y", "lengths"
    arrays = read_arrays(path, [name + suffix for suffix in ("", "_test") for name in names])
    require(
        "x_test" not in arrays or ("lengths" in arrays) == ("lengths_test" in arrays),
        f"{path} has lengths of one part alone: expected lengths and lengths_test, or neither",
    )
    parts = {}
    for part, suffix in (("train", ""), ("test", "_test")):
        missing = [name + suffix for name in ("x", "y") if name + suffix not in arrays]
        if part == "test" and not any(name + suffix in arrays for name in names):
            continue
        require(not missing, f"{path} has no array {' and no '.join(missing)}")
        x, y, lengths = arrays["x" + suffix], arrays["y" + suffix], arrays.get("lengths" + suffix)
        require(
            x.ndim in (2, 3) and x.dtype.kind in "biuf",
            f"{path}: x{suffix} has shape {x.shape} in {x.dtype}, expected numbers (samples, T) or "
            "(samples, T, channels)",
        )
        require(
            y.ndim == 1 and y.dtype.kind in "biuSU",
            f"{path}: y{suffix} has shape {y.shape} in {y.dtype}, expected a whole number or the "
            "name of a class for each sequence; for labels at every step, see docs/data.md",
        )
        y = np.char.decode(y, "utf-8", "backslashreplace") if y.dtype.kind == "S" else y
        x = x[..., None] if x.ndim == 2 else x
        data = sequence_dataset((list(x), y.tolist(), lengths), f"{path}, {part}")
        parts[part] = [sequence for sequence, _ in data], y
    return parts


def _ts(path: str) -> dict[str, tuple[list[np.ndarray], np.ndarray]]:
    """Reads the training file and the test file beside it."""
    parts = {}
    for part, ending in (("train", TRAIN), ("test", TEST)):
        file = path.removesuffix(TRAIN) + ending
        with reading(file):
            x, y, about = _aeon().load_from_ts_file(file, return_meta_data=True)
        require(
            about["classlabel"] and len(y) > 0,
            f"{file} has no classes: it is no classification",
        )
        labels = [str(label).strip() for label in y]
        for index, label in enumerate(labels):
            require(
                label in about["class_values"],
                f"{file}: sequence {index} is of class {label}, expected one of those that "
                f"@classLabel lists: {', '.join(about['class_values'])}",
            )
        parts[part] = [np.transpose(sequence) for sequence in x], np.array(labels)
    return parts


def _archive_file(name: str, root: Path) -> str:
    """The training file of an archive set, which aeon contains or downloads to ``root``."""
    aeon = _aeon()
    for folder in os.path.join(os.path.dirname(aeon.__file__), "data"), os.path.expanduser(root):
        path = os.path.join(folder, name, name)
        # Path's exists would raise an error if a name is too long for the file system.
        if os.path.exists(path + TRAIN) and os.path.exists(path + TEST):
            return path + TRAIN
    known = aeon.tsc_datasets.tsc_zenodo
    if name not in known:
        similar = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        raise InputError(
            f"dataset={name}: the UCR and UEA archives have no such set"
            + "".join(f", but {other}" for other in similar)
        )
    try:
        aeon.load_classification(name, split="train", extract_path=folder)
    except Exception as error:  # the network or an archive may fail
        raise InputError(f"{name} cannot be downloaded: {one_line(error)}") from None
    return path + TRAIN


def _aeon() -> Any:
    try:
        import aeon.datasets
        import aeon.datasets.tsc_datasets
    except ImportError:
        raise InputError(
            "archive sets and .ts files are read by aeon, which is not installed: pip install aeon"
        ) from None
    return aeon.datasets


def _fill_gaps(values: np.ndarray, name: str, missing: str) -> np.ndarray:
    """Copies a sequence in float64, and fills its missing values if they are to be filled."""
    with np.errstate(over="ignore"):  # of numbers that no float64 holds
        sequence = np.array(values, dtype=np.float64)
    for channel in sequence.T:
        gaps = np.isnan(channel)
        if gaps.any():
            require(
                missing == "interpolate",
                f"{name} has missing values; missing=interpolate fills them",
            )
            require(not gaps.all(), f"{name} has a channel without any value")
            channel[gaps] = np.interp(gaps.nonzero()[0], (~gaps).nonzero()[0], channel[~gaps])
    return sequence


def divisors(deviation: Tensor) -> Tensor:
    """Deviations to divide by: 1 instead of 0, so that what never changes stays as it is."""
    return torch.where(deviation > 0, deviation, 1.0)

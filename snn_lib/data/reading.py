"""Reads a user's files. Anything wrong with a file becomes one line that names it."""

import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from snn_lib.errors import InputError, one_line, require


def read_file(path: Path | str) -> bytes:
    """The content of a file.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    with reading(path):
        return Path(path).read_bytes()


def read_array(path: Path | str) -> np.ndarray:
    """The array of an ``.npy`` file.

    Raises:
        InputError: there is no such file, or it holds no array.
    """
    with reading(path), open(path, "rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def read_arrays(path: Path | str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file that have one of these names.

    Raises:
        InputError: there is no such file, it cannot be unpacked, or one of these is no array.
    """
    with reading(path), zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in names if name in archive}
    for name, array in arrays.items():  # NumPy hands out a file of any other kind as bytes
        require(isinstance(array, np.ndarray), f"{path}: {name} is no array that NumPy has saved")
    return arrays


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """A context in which a file is read. Any error becomes one line, and warnings are not shown.

    All errors are caught because readers raise many kinds. NumPy, for example, parses a header as
    Python text, and several libraries unpack archives.

    Raises:
        InputError: there is no such file, or reading it raises an error.
    """
    try:
        here = "" if Path(path).is_absolute() else f", seen from {Path.cwd()}"
        require(Path(path).exists(), f"there is no file {path}{here}")
        require(Path(path).is_file(), f"{path} is not a file")  # a pipe, say, would never end
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        if "Object arrays" in reason:  # NumPy's words
            reason = "it has an array of Python objects: save numbers, and names by astype(str)"
        elif "allow_pickle" in reason or "magic string is not correct" in reason:
            reason = "it is not a NumPy file of numbers"
        elif (mark := getattr(error, "problem_mark", None)) is not None:  # PyYAML's
            reason = f"line {mark.line + 1}: {error.problem}"
        raise InputError(f"{path} cannot be read: {reason}") from None

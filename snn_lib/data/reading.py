"""Reading the files that a user hands in. Whatever is wrong with one is told in one line."""

import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from snn_lib.errors import InputError, one_line

LARGE = 2**30  # bytes of arrays whose reading takes long enough to be announced


def read_file(path: Path | str) -> bytes:
    """The content of a file.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    with _told_in_a_line(path):
        return Path(path).read_bytes()


def read_array(path: Path | str) -> np.ndarray:
    """The array of an ``.npy`` file.

    Raises:
        InputError: there is no such file, or it holds no array.
    """
    with _told_in_a_line(path):
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it holds several arrays, expected the one of an .npy file")
        return array


def read_arrays(path: Path | str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that are in an ``.npz`` file.

    Raises:
        InputError: there is no such file, or it cannot be unpacked.
    """
    with _told_in_a_line(path), zipfile.ZipFile(path) as archive:
        there = set(archive.namelist())
        names = [name for name in names if f"{name}.npy" in there]
        size = sum(archive.getinfo(f"{name}.npy").file_size for name in names)
        if size > LARGE:
            print(f"{path} holds {size / 2**30:.1f} GiB of arrays: reading them", file=sys.stderr)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}


@contextmanager
def _told_in_a_line(path: Path | str) -> Iterator[None]:
    """Turns whatever the reading of a file raises or warns of into one line.

    NumPy parses a header as Python text and unpacks by several libraries: any error may come.
    """
    try:
        if not Path(path).exists():
            raise InputError(f"there is no file {path}")
        if not Path(path).is_file():  # a pipe, for one, would be waited for without an end
            raise InputError(f"{path} is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        if "pickle" in reason:
            reason = "it is not a NumPy file of numbers"
        raise InputError(f"{path} cannot be read: {reason}") from None

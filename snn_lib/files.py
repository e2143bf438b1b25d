"""Files: a user's are read, ours are locked and written.

Anything wrong with a user's file becomes one line that names it. What is written is whole: a crash
leaves the old content or the new, never half.
"""

import contextlib
import csv
import io
import os
import secrets
import shutil
import warnings
import weakref
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from snn_lib.errors import InputError, WriteError, one_line, require

try:
    import fcntl
except ImportError:  # on Windows, where nothing is locked
    fcntl = None
else:
    # Else a process that this one has forked, and that outlives it, would keep its locks.
    os.register_at_fork(after_in_child=lambda: [file.close() for file in _locked])

_locked: "weakref.WeakSet[IO[bytes]]" = weakref.WeakSet()


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
    """The arrays of an ``.npz`` file, which may have these names.

    Raises:
        InputError: there is no such file, it cannot be unpacked, one of these is no array, or there
            is an array of another name.
    """
    with reading(path), zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            require(name in names, f"{path}: unknown array {name!r}, expected {', '.join(names)}")
        arrays = dict(archive)
    for name, array in arrays.items():  # NumPy hands out a file of any other kind as bytes
        require(isinstance(array, np.ndarray), f"{path}: {name} is no array that NumPy has saved")
    return arrays


@contextlib.contextmanager
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
            reason = f"line {mark.line + 1}: {getattr(error, 'problem', '')}"
        raise InputError(f"{path} cannot be read: {reason}") from None


def write_atomically(path: Path, content: bytes, sync: bool = True) -> None:
    """Writes a file beside ``path``, then renames it to ``path``.

    The file is synced before it is renamed, so ``path`` always holds either the old content or the
    new. A replaced file keeps its permissions. A symbolic link stays, and the file that it leads to
    is replaced.

    Args:
        path: the file.
        content: its new content.
        sync: whether to sync the file. It may be left out for one of very many files that have a
            checksum, which shows whether a power failure has damaged the file.

    Raises:
        WriteError: the disk is full or the folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    # Not by the number of the process: another thread, or another container, may have the same.
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise WriteError(
            f"cannot write {path}: {error.strerror}; what was there before is untouched"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # it would hide the error above
            temporary.unlink(missing_ok=True)


def lock(path: Path) -> IO[bytes]:
    """Locks a file until the returned one is closed, or this process ends in any way.

    The lock belongs to the opened file, not to the process, so that two runs of one process, in a
    notebook for example, exclude each other too.

    Raises:
        BlockingIOError: it is locked already.
        OSError: it cannot be written.
    """
    file = open(path, "ab")  # noqa: SIM115 (closed by the caller)
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # one of them, depending on the system
            file.close()
            raise BlockingIOError from None
        except OSError:  # the file system has no locks
            pass
        _locked.add(file)
    return file


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows atomically, with a column for every key; it is empty if a row lacks the key."""
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())

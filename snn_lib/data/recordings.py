"""Labelled recordings of event cameras: which files there are, and all of them as frames.

N-MNIST and DVS128 Gesture lie in the folders in which Tonic, https://tonic.readthedocs.io, unpacks
what it downloads. It is asked for them only where no path is given.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from snn_lib.data.events import (
    GESTURE_SIDE,
    NMNIST_SIDE,
    Events,
    Frames,
    read_gesture,
    read_nmnist,
)
from snn_lib.errors import InputError, one_line, require
from snn_lib.files import write_atomically

SUMS = "SHA256SUMS"
FOLDERS = {"train": "Train", "test": "Test"}  # of N-MNIST


class RecordingSet(NamedTuple):
    """A set of recordings as it lies on the disk.

    Attributes:
        tonic: its name there, and of the folder that Tonic makes for it.
        classes: how many there are.
        sensor: pixels of the camera in each direction.
        folders: of each part.
        files: pattern of their names in there.
        label: the class by the path of a file.
        read: reads a file.
    """

    tonic: str
    classes: int
    sensor: int
    folders: dict[str, str]
    files: str
    label: Callable[[Path], str]
    read: Callable[..., Events]


NMNIST = RecordingSet(
    "NMNIST", 10, NMNIST_SIDE, FOLDERS, "*/*.bin", lambda path: path.parent.name, read_nmnist
)
GESTURE = RecordingSet(
    "DVSGesture",
    11,
    GESTURE_SIDE,
    {"train": "ibmGestureTrain", "test": "ibmGestureTest"},
    "*/*.npy",
    lambda path: path.stem,
    read_gesture,
)
SETS = {"simulated": NMNIST, "nmnist": NMNIST, "dvs_gesture": GESTURE}


def downloaded(kind: RecordingSet, root: Path) -> Path:
    """The folder of a set that Tonic has under ``root``, or downloads to there.

    Raises:
        InputError: Tonic is not installed, or can neither find nor download the set.
    """
    try:
        import tonic.datasets
    except ImportError:
        raise InputError(
            f"{kind.tonic} is downloaded by Tonic, which is not installed: pip install tonic, or "
            "set events.path to the folder of the files"
        ) from None
    for train in (True, False):
        try:
            getattr(tonic.datasets, kind.tonic)(str(root), train=train)
        except Exception as error:  # of network, archive, checksum, disk: what its downloads raise
            raise InputError(
                f"Tonic can neither find nor download {kind.tonic} under {root}: {one_line(error)}"
            ) from None
    return root / kind.tonic


def recording_files(kind: RecordingSet, folder: Path, part: str) -> list[Path]:
    """The files of a part, by name.

    Where the folder has a list of checksums, they are those that it names.

    Raises:
        InputError: there are none, or the list is damaged.
    """
    sums, within = read_sums(folder), folder / kind.folders[part]
    if sums:
        paths = [path for name in sums if (path := folder / name).is_relative_to(within)]
    else:
        paths = list(within.glob(kind.files))
    require(bool(paths), f"there are no recordings {within / kind.files}")
    return sorted(paths, key=lambda path: (path.stem, path.parent.name))


def load_recordings(
    kind: RecordingSet, folder: Path, part: str, frames: Frames, count: int | None = None
) -> tuple[Tensor, Tensor]:
    """The recordings of a part as frames.

    Args:
        kind: the set.
        folder: of its files.
        part: ``"train"`` or ``"test"``.
        frames: how a recording becomes frames.
        count: the first so many by name, all if ``None``.

    Returns:
        Frames, uint8 ``(N, T, side, side, 2)``, and class numbers, int64 ``(N,)``.

    Raises:
        InputError: there are no files, a file makes no sense or is not what its checksum says, or
            its class is none.
    """
    sums, paths = read_sums(folder), recording_files(kind, folder, part)[:count]
    shape = len(paths), frames.length, frames.side, frames.side, 2
    x, y = np.empty(shape, np.uint8), np.empty(len(paths), np.int64)
    classes = {str(number): number for number in range(kind.classes)}
    for number, path in enumerate(paths):
        label = kind.label(path)
        require(label in classes, f"{path} is of class {label}, expected 0 to {kind.classes - 1}")
        y[number] = classes[label]
        x[number] = frames.of(kind.read(path, _verified(path, folder, sums)), kind.sensor)
    return torch.from_numpy(x), torch.from_numpy(y)


def _verified(path: Path, folder: Path, sums: dict[str, str]) -> bytes | None:
    """What is in a file of a list of checksums; ``None`` where there is no list."""
    if not sums:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}), but is in {SUMS}: delete {folder} to have "
            "it made again"
        ) from None
    require(
        hashlib.sha256(content).hexdigest() == sums[path.relative_to(folder).as_posix()],
        f"{path} is not what its checksum in {SUMS} says: delete {folder} to have it made again",
    )
    return content


def read_sums(folder: Path) -> dict[str, str]:
    """The checksums by the path of each file in a folder, as ``sha256sum`` lists them.

    Raises:
        InputError: the list is damaged.
    """
    path = folder / SUMS
    if not path.exists():
        return {}
    try:
        lines = path.read_text().splitlines()
        sums = dict(reversed(line.split("  ", 1)) for line in lines)
        if not all(len(total) == 64 for total in sums.values()):
            raise ValueError
    except (OSError, ValueError):
        raise InputError(f"{path} is damaged: delete {folder} to have it made again") from None
    return sums


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Writes what :func:`read_sums` reads."""
    text = "".join(f"{total}  {path}\n" for path, total in sorted(sums.items()))
    write_atomically(folder / SUMS, text.encode())

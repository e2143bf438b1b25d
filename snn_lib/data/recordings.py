"""Labelled recordings of event cameras: finds their files and reads them as frames.

N-MNIST and DVS128 Gesture lie in folders as Tonic, https://tonic.readthedocs.io, unpacks them.
Tonic downloads them if the user names no folder.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from snn_lib.data.events import GESTURE_SIDE, NMNIST_SIDE, Events, Frames, read_gesture, read_nmnist
from snn_lib.errors import InputError, one_line, require


class RecordingSet(NamedTuple):
    """A set of recordings as it lies on the disk.

    Attributes:
        tonic: the set's name in Tonic, which is also the name of the folder that Tonic makes.
        classes: number of classes.
        sensor: pixels of the camera in each direction.
        files: pattern of the files' paths, where ``{}`` stands for ``Train`` or ``Test``.
        label: a function that tells the class by the path of a file.
        read: a function that reads a file.
    """

    tonic: str
    classes: int
    sensor: int
    files: str
    label: Callable[[Path], str]
    read: Callable[..., Events]


NMNIST = RecordingSet(
    "NMNIST", 10, NMNIST_SIDE, "{}/*/*.bin", lambda path: path.parent.name, read_nmnist
)
GESTURE = RecordingSet(
    "DVSGesture", 11, GESTURE_SIDE, "ibmGesture{}/*/*.npy", lambda path: path.stem, read_gesture
)
SETS = {"simulated": NMNIST, "nmnist": NMNIST, "dvs_gesture": GESTURE}


def download_recordings(kind: RecordingSet, root: Path) -> Path:
    """Downloads a set by Tonic if it is not under ``root`` yet; returns its folder.

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
        except Exception as error:  # the network, an archive, a checksum or the disk may fail
            raise InputError(
                f"Tonic can neither find nor download {kind.tonic} under {root}: {one_line(error)}"
            ) from None
    return root / kind.tonic


def recording_files(kind: RecordingSet, folder: Path, part: str) -> list[Path]:
    """Lists the files of the part ``"train"`` or ``"test"`` in the order of their names.

    Raises:
        InputError: there are no files, a class has no file, or a file's class does not exist.
    """
    files = kind.files.format(part.capitalize())
    paths = sorted(folder.glob(files), key=lambda path: (path.stem, path.parent.name))
    require(bool(paths), f"there are no recordings {folder / files}")
    classes = {str(number) for number in range(kind.classes)}
    for path in paths:
        label = kind.label(path)
        require(label in classes, f"{path} is of class {label}, expected 0 to {kind.classes - 1}")
    missing = classes - {kind.label(path) for path in paths}
    require(
        not missing,
        f"there are no recordings {folder / files} of class "
        f"{', '.join(sorted(missing, key=int))}: unpack the whole set",
    )
    return paths


def load_recordings(
    kind: RecordingSet, paths: Sequence[Path], frames: Frames
) -> tuple[Tensor, Tensor]:
    """Reads recordings as frames.

    Returns:
        Frames, uint8 ``(N, T, side, side, 2)``, and class numbers, int64 ``(N,)``.

    Raises:
        InputError: a file cannot be read or makes no sense.
    """
    x = np.empty((len(paths), frames.length, frames.side, frames.side, 2), np.uint8)
    for number, path in enumerate(paths):
        x[number] = frames.count_events(kind.read(path), kind.sensor)
    return torch.from_numpy(x), torch.tensor([int(kind.label(path)) for path in paths])

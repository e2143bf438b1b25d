"""Electrocardiograms of the QT database as events, with the wave that each step belongs to.

Bojian Yin, Federico Corradi and Sander Bohté encoded them for "Accurate and efficient time-domain
classification with adaptive spiking recurrent neural networks", Nature Machine Intelligence 2021,
doi 10.1038/s42256-021-00397-w. Their two files, ``QTDB_train.mat`` and ``QTDB_test.mat``, are in
the folder ``data`` of https://github.com/byin-cwi/Efficient-spiking-networks. The recordings come
from PhysioNet: Laguna et al., Computers in Cardiology 1997.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from snn_lib.data.batches import split_indices
from snn_lib.data.sequences import as_numbers
from snn_lib.errors import InputError, require
from snn_lib.files import reading

WAVES = ["P", "PQ", "QR", "RS", "ST", "TP"]  # between these points of a heartbeat
STRIDE = 1_000  # steps from the beginning of a sequence to that of the next in the same recording


def load_ecg(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Reads the part ``"train"`` or ``"test"``.

    Returns:
        Events, -1, 0 or 1, ``(sequences, T, 4)``, float32; and the number of the wave at each step,
        int64 ``(sequences, T)``, -1 where it has no label.

    Raises:
        InputError: SciPy is not installed, the file is missing, or it is another one.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(
            "the recordings are read by SciPy, which is not installed: pip install scipy"
        ) from None
    path = folder / f"QTDB_{part}.mat"
    require(
        path.exists(),
        f"there is no file {path}: set dataset_path to its folder, or take it from the folder data "
        "of https://github.com/byin-cwi/Efficient-spiking-networks",
    )
    with reading(path):
        content = loadmat(path)
        require(
            {"x", "y"} <= content.keys(),
            f"{path} has no arrays x and y: is it one of QTDB's files?",
        )
        x, waves = (as_numbers(content[name], f"{path}: {name}") for name in ("x", "y"))
    require(
        x.dim() == 3
        and x.shape[2] == 4
        and waves.shape == (*x.shape[:2], len(WAVES))
        and len(x) > 0,
        f"{path}: x has shape {tuple(x.shape)} and y {tuple(waves.shape)}, expected (sequences, T, "
        f"4) and (sequences, T, {len(WAVES)})",
    )
    require(
        bool(torch.isin(x, torch.tensor([-1, 0, 1])).all())
        and bool(((waves == 0) | (waves == 1)).all())
        and bool((waves.sum(2) <= 1).all()),
        f"{path}: expected events of -1, 0 and 1, and a single 1 in y at each step with a label",
    )
    return x.float(), torch.where((waves != 0).any(2), waves.argmax(2), -1)


def recordings(labels: Tensor) -> Tensor:
    """The number of the recording that each sequence is a part of, int64 ``(sequences,)``.

    The sequences of a recording follow one another and overlap. Where they do, they have the same
    labels. Only around the beginning of a sequence the files have others.

    Args:
        labels: as :func:`load_ecg` returns them.
    """
    last = labels[:-1, STRIDE:]
    first = labels[1:, : last.shape[1]]
    same = ((last == first) & (last >= 0)).float().mean(1) > 0.2  # nan if nothing overlaps
    return F.pad((~same).cumsum(0), (1, 0))


def hold_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Draws this share of the recordings; returns which sequences are theirs, bool.

    No heart is then both trained on and validated on.

    Raises:
        InputError: all sequences are of one recording, or the share is not between 0 and 1.
    """
    require(0 < share < 1, f"share is {share}, expected a part of the recordings")
    numbers = recordings(labels)
    count = int(numbers[-1]) + 1
    require(count > 1, "all sequences are of one recording, so none can be held out")
    _, drawn = split_indices(count, max(1, round(share * count)), seed)
    return torch.isin(numbers, drawn)

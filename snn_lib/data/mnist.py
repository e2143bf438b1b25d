"""MNIST, read into memory."""

import gzip
from pathlib import Path

from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity

from snn_lib.errors import InputError, one_line
from snn_lib.files import write_atomically

CLASSES = 10
PIXELS = 28 * 28


def load_mnist(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST's images ``(N, 28, 28)``, uint8, and labels ``(N,)``.

    The archives under ``root/MNIST/raw`` are verified and unpacked; where they are missing,
    torchvision downloads them.

    Raises:
        InputError: a file is corrupt, or there is neither data nor a network.
    """
    raw = root / "MNIST" / "raw"
    for name, md5 in MNIST.resources:
        archive = raw / name
        if archive.exists() and not check_integrity(str(archive), md5):
            raise InputError(
                f"{archive} is corrupt: restore it with 'git checkout {archive}', or delete it to "
                "have it downloaded"
            )
        unpacked = archive.with_suffix("")
        if archive.exists() and not unpacked.exists():
            # torchvision would do it, but not so that another process or a crash may come between
            write_atomically(unpacked, gzip.decompress(archive.read_bytes()))
    try:
        digits = MNIST(str(root), train=train, download=True)
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
        if raw.exists() and any(raw.glob("*-ubyte")):
            raise InputError(
                f"MNIST under {raw} cannot be read ({one_line(error)}): delete the *-ubyte files "
                "there to have them unpacked again"
            ) from None
        raise InputError(
            f"there is no MNIST under {raw} and it cannot be downloaded "
            f"({one_line(error).rstrip(':')}): put the four .gz files there or set dataset_path"
        ) from None
    return digits.data, digits.targets

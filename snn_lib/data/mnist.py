"""Reads MNIST, or another set whose files have the same form."""

import gzip
import math
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from snn_lib.errors import InputError, RunError, one_line, require
from snn_lib.files import read_file, write_atomically

CLASSES = 10
IMAGES = {True: 60_000, False: 10_000}  # to train on, and to test on
CHECKSUMS = {  # CRC-32 of the unpacked files
    "train-images-idx3-ubyte": 0xE9F4D8B3,
    "train-labels-idx1-ubyte": 0xE0CB4AD2,
    "t10k-images-idx3-ubyte": 0x91373BDF,
    "t10k-labels-idx1-ubyte": 0x4AB9EFF9,
}


def load_mnist(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Reads MNIST's images ``(N, 28, 28)``, uint8, and labels ``(N,)``, int64.

    It unpacks the archives under ``root/MNIST/raw`` and verifies what they hold, and downloads them
    if they are missing. If there are unpacked files alone, they may be those of another set in the
    same form. Both parts are of one set, and training files come with files to test with.

    Raises:
        InputError: a file is corrupt, or there is neither data nor a network.
    """
    raw, part = root / "MNIST" / "raw", "train" if train else "t10k"
    names = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    (pixels, own_images), (numbers, own_labels) = (_content(raw, name) for name in names)
    require(
        own_images == own_labels,
        f"only one of {names[0]} and {names[1]} in {raw} is MNIST's: the other is corrupt, or of "
        "another set",
    )
    other = raw / f"{'t10k' if train else 'train'}-labels-idx1-ubyte"
    packed = other.with_name(f"{other.name}.gz").exists()
    if packed or other.exists():
        theirs = packed or zlib.crc32(read_file(other)) == CHECKSUMS[other.name]
        require(
            own_labels == theirs,
            f"only one of {names[1]} and {other.name} in {raw} is MNIST's: to train and to test "
            "takes both parts of one set",
        )
    else:
        require(
            own_labels or not train,
            f"{names[1]} in {raw} is not MNIST's, and there is no {other.name} to test with",
        )
    images = _array(raw / names[0], pixels, (IMAGES[train], 28, 28))
    labels = _array(raw / names[1], numbers, (IMAGES[train],))
    classes = labels.unique().tolist()
    require(
        classes == list(range(CLASSES)),
        f"{raw / names[1]} has the labels {classes}, expected all from 0 to {CLASSES - 1}",
    )
    return images, labels.long()


def _content(raw: Path, name: str) -> tuple[bytes, bool]:
    """Reads an unpacked file, and whether it is MNIST's; downloads and unpacks what is missing."""
    path, archive = raw / name, raw / f"{name}.gz"
    if path.exists():
        content = read_file(path)
        own = zlib.crc32(content) == CHECKSUMS[name]
        require(
            own or not archive.exists(),
            f"{path} is not what {archive.name} beside it holds: move it away to have that "
            "unpacked",
        )
        return content, own
    if not archive.exists():
        _download(archive)
    packed, content = read_file(archive), b""
    with suppress(OSError, EOFError, zlib.error):  # of an archive that is corrupt
        content = gzip.decompress(packed)
    require(
        zlib.crc32(content) == CHECKSUMS[name],
        f"{archive} is corrupt: restore it with 'git checkout {archive}', or move it away to "
        "have it downloaded",
    )
    with suppress(RunError):  # where it can be written, the next run need not unpack it
        write_atomically(path, content)
    return content, True


def _array(path: Path, content: bytes, shape: tuple[int, ...]) -> Tensor:
    """Makes a tensor of the bytes after the header, which must state this shape."""
    header = b"".join(size.to_bytes(4, "big") for size in (0x800 + len(shape), *shape))
    require(
        content.startswith(header) and len(content) == len(header) + math.prod(shape),
        f"{path} does not hold bytes of shape {shape} in MNIST's form",
    )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=len(header)).view(shape)


def _download(archive: Path) -> None:
    # Imported here, because it takes longer than all that a script imports beside PyTorch.
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import download_url

    md5 = dict(MNIST.resources)[archive.name]
    for mirror in MNIST.mirrors:
        try:
            return download_url(f"{mirror}{archive.name}", archive.parent, archive.name, md5)
        except (OSError, RuntimeError, ValueError) as error:
            reason = one_line(error)
    raise InputError(
        f"there is no MNIST under {archive.parent}: {archive.name} is missing and cannot be "
        f"downloaded ({reason.rstrip(':')}). Put it there, or set dataset_path"
    )

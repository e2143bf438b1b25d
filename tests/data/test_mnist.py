"""MNIST: read and verified."""

import gzip
import os

import numpy as np
import pytest
import torch
from running import ROOT
from torchvision.datasets import MNIST

from snn_lib.data.mnist import load_mnist
from snn_lib.errors import InputError

RAW = ROOT / "dataset" / "MNIST" / "raw"


def raw_copy(tmp_path, without=()):
    """A data folder with links to the archives."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in RAW.glob("*.gz"):
        if archive.name not in without:
            (raw / archive.name).symlink_to(archive)
    return raw


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there


def test_images_and_labels_are_those_of_the_archives(tmp_path):
    raw = raw_copy(tmp_path)
    pictures, labels = load_mnist(tmp_path, train=False)
    content = gzip.decompress((raw / "t10k-images-idx3-ubyte.gz").read_bytes())
    expected = np.frombuffer(content, np.uint8, offset=16).reshape(10_000, 28, 28)
    assert pictures.dtype == torch.uint8
    assert np.array_equal(pictures.numpy(), expected)
    content = gzip.decompress((raw / "t10k-labels-idx1-ubyte.gz").read_bytes())
    assert np.array_equal(labels.numpy(), np.frombuffer(content, np.uint8, offset=8))
    assert not list(raw.glob("*.tmp"))


def test_a_corrupt_archive_is_named_and_left_alone(tmp_path, no_network):
    name = "t10k-labels-idx1-ubyte.gz"
    raw = raw_copy(tmp_path, without=[name])
    content = bytearray((RAW / name).read_bytes())
    content[2000] ^= 4
    (raw / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is corrupt: restore it with 'git checkout"):
        load_mnist(tmp_path, train=True)
    assert (raw / name).read_bytes() == content


def test_a_missing_archive_without_a_network_is_told(tmp_path, no_network):
    raw_copy(tmp_path, without=["train-labels-idx1-ubyte.gz"])
    with pytest.raises(InputError, match=r"cannot be (read|downloaded)"):
        load_mnist(tmp_path, train=True)


def test_no_data_and_no_network_is_told(tmp_path, no_network):
    with pytest.raises(
        InputError, match=r"there is no MNIST under .* put the four \.gz files there"
    ):
        load_mnist(tmp_path, train=True)


def test_a_damaged_unpacked_file_is_told(tmp_path):
    raw = raw_copy(tmp_path)
    (raw / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03 short")
    with pytest.raises(InputError, match=r"delete the \*-ubyte files"):
        load_mnist(tmp_path, train=False)


def test_a_crash_while_unpacking_leaves_no_half_of_a_file(tmp_path, monkeypatch):
    raw = raw_copy(tmp_path)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        load_mnist(tmp_path, train=False)
    monkeypatch.undo()
    assert not list(raw.glob("*-ubyte"))
    assert len(load_mnist(tmp_path, train=False)[1]) == 10_000

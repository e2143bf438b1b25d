"""MNIST: read, verified, and told from what is not MNIST."""

import gzip
import os

import numpy as np
import pytest
import refusing
import torch
from recorded import served
from running import ROOT
from torchvision.datasets import MNIST

from snn_lib.data import mnist
from snn_lib.data.mnist import load_mnist
from snn_lib.errors import RunError

RAW = ROOT / "dataset" / "MNIST" / "raw"
IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.fixture(scope="module")
def unpacked():
    """The content of the two files of the test part."""
    return {name: gzip.decompress((RAW / f"{name}.gz").read_bytes()) for name in (IMAGES, LABELS)}


@pytest.fixture
def raw(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    return raw


def link_archives(raw, *names):
    for name in names:
        (raw / f"{name}.gz").symlink_to(RAW / f"{name}.gz")


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there


def refusal(raw):
    return refusing.refusal(load_mnist, raw.parent.parent, train=False)


def test_images_and_labels_are_those_of_the_archives(raw, unpacked):
    link_archives(raw, IMAGES, LABELS)
    for _ in range(2):  # unpacked, then as they were unpacked
        images, labels = load_mnist(raw.parent.parent, train=False)
        expected = np.frombuffer(unpacked[IMAGES], np.uint8, offset=16).reshape(10_000, 28, 28)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert np.array_equal(images.numpy(), expected)
        assert np.array_equal(labels.numpy(), np.frombuffer(unpacked[LABELS], np.uint8, offset=8))
        assert {path.name for path in raw.glob("*-ubyte*")} == {
            name + ending for name in (IMAGES, LABELS) for ending in ("", ".gz")
        }


def test_archives_are_read_where_nothing_can_be_written(raw, monkeypatch):
    def refuse(path, content):
        raise RunError(f"cannot write {path}")

    link_archives(raw, IMAGES, LABELS)
    monkeypatch.setattr(mnist, "write_atomically", refuse)
    assert len(load_mnist(raw.parent.parent, train=False)[1]) == 10_000
    assert not list(raw.glob("*-ubyte"))


@pytest.mark.parametrize("damage", ["a bit", "the end", "no archive", "another archive"])
def test_a_corrupt_archive_is_named_and_left_alone(raw, no_network, damage):
    link_archives(raw, IMAGES)
    archive = (RAW / f"{LABELS}.gz").read_bytes()
    content = {
        "a bit": archive[:2000] + bytes([archive[2000] ^ 4]) + archive[2001:],
        "the end": archive[:-9],
        "no archive": b"<html>not found</html>",
        "another archive": (RAW / f"{IMAGES}.gz").read_bytes(),
    }[damage]
    (raw / f"{LABELS}.gz").write_bytes(content)
    assert f"{LABELS}.gz is corrupt: restore it with 'git checkout" in refusal(raw)
    assert (raw / f"{LABELS}.gz").read_bytes() == content
    assert not (raw / LABELS).exists()


def test_a_missing_archive_without_a_network_is_told(raw, no_network):
    link_archives(raw, LABELS)
    expected = f"there is no MNIST under {raw}: {IMAGES}.gz is missing and cannot be downloaded ("
    assert refusal(raw).startswith(expected)


def test_missing_archives_are_downloaded(raw, monkeypatch):
    link_archives(raw, IMAGES)
    with served(RAW) as address:
        monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/", f"{address}/"])
        assert len(load_mnist(raw.parent.parent, train=False)[1]) == 10_000
    assert (raw / f"{LABELS}.gz").read_bytes() == (RAW / f"{LABELS}.gz").read_bytes()


@pytest.mark.parametrize("name", [IMAGES, LABELS])
@pytest.mark.parametrize("archives", [True, False])
def test_a_damaged_unpacked_file_is_told(raw, unpacked, name, archives):
    if archives:
        link_archives(raw, IMAGES, LABELS)
    for other in (IMAGES, LABELS):
        content = bytearray(unpacked[other])
        content[-5] ^= other == name  # a pixel or a label that might as well be
        (raw / other).write_bytes(content)
    message = refusal(raw)
    if archives:
        assert message.startswith(f"{raw}/{name} is not what {name}.gz beside it holds")
    else:
        assert message.startswith(f"only one of {IMAGES} and {LABELS} in {raw} is MNIST's")


def test_another_data_set_in_the_form_of_mnist_is_read_if_it_makes_sense(raw, unpacked):
    def write(images=unpacked[IMAGES], labels=unpacked[LABELS]):
        # Turned around, images and labels still belong together.
        (raw / IMAGES).write_bytes(images[:16] + images[:15:-1])
        (raw / LABELS).write_bytes(labels[:8] + labels[:7:-1])

    write()
    expected = np.frombuffer(unpacked[LABELS], np.uint8, offset=8)[::-1]
    assert np.array_equal(load_mnist(raw.parent.parent, train=False)[1].numpy(), expected)
    write(labels=unpacked[LABELS].replace(b"\x09", b"\xc8"))
    assert f"{LABELS} has the labels [0, 1, 2, 3, 4, 5, 6, 7, 8, 200], expected all" in refusal(raw)
    write(labels=unpacked[LABELS][:8] + bytes(10_000))
    assert "has the labels [0], expected all from 0 to 9" in refusal(raw)
    write(images=unpacked[IMAGES][:-1])
    assert f"{IMAGES} does not hold bytes of shape (10000, 28, 28)" in refusal(raw)
    write(images=b"\0\0\x08\x04" + unpacked[IMAGES][4:])
    assert f"{IMAGES} does not hold bytes of shape" in refusal(raw)


@pytest.mark.parametrize("other", ["archive", "unpacked"])
@pytest.mark.parametrize("own", [False, True])
def test_the_parts_of_two_sets_are_refused(raw, unpacked, own, other):
    """They would train on the one and test on the other."""
    for name in (IMAGES, LABELS):
        content = unpacked[name]
        (raw / name).write_bytes(content if own else content[:16] + content[:15:-1])
    if other == "archive":
        link_archives(raw, "train-labels-idx1-ubyte")
    else:
        (raw / "train-labels-idx1-ubyte").write_bytes(b"of another set")
    said = f"only one of {LABELS} and train-labels-idx1-ubyte in {raw} is MNIST's: "
    if own == (other == "archive"):
        load_mnist(raw.parent.parent, train=False)
    else:
        assert refusal(raw).startswith(said)


def test_training_files_of_another_set_alone_are_refused_before_training(raw):
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (raw / name).write_bytes(b"of another set")
    said = refusing.refusal(load_mnist, raw.parent.parent, train=True)
    assert said.endswith(f"is not MNIST's, and there is no {LABELS} to test with")


def test_a_crash_while_unpacking_leaves_no_half_of_a_file(raw, monkeypatch):
    link_archives(raw, IMAGES, LABELS)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        load_mnist(raw.parent.parent, train=False)
    monkeypatch.undo()
    assert not list(raw.glob("*-ubyte"))
    assert len(load_mnist(raw.parent.parent, train=False)[1]) == 10_000

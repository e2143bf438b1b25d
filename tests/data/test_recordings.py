"""Sets of recordings: found, labelled, read, and downloaded by Tonic."""

import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import refusing
import torch
from recorded import gesture_files, nmnist_files, some_events, tonic_downloads

from snn_lib.data.events import Events, Frames, nmnist_bytes
from snn_lib.data.recordings import (
    GESTURE,
    NMNIST,
    download_recordings,
    load_recordings,
    recording_files,
)
from snn_lib.errors import InputError

FRAMES = Frames(3, 30.0)


def load(kind, folder, part, frames=FRAMES):
    return load_recordings(kind, recording_files(kind, folder, part), frames)


def refusal(*arguments):
    return refusing.refusal(load, *arguments)


def test_n_mnist_s_files_are_read_in_the_order_of_their_numbers(tmp_path):
    x, y = load(NMNIST, nmnist_files(tmp_path), "train")
    assert y.tolist() == [n * 7 % 10 for n in range(20)]
    assert (x.dtype, x.shape) == (torch.uint8, (20, 3, 34, 34, 2))
    for number in range(20):
        expected = FRAMES.count_events(some_events(number), 34)
        assert torch.equal(x[number], torch.from_numpy(expected))


def test_gestures_have_the_class_that_their_file_is_named_after(tmp_path):
    frames = replace(FRAMES, merge=4, side=32)
    x, y = load(GESTURE, gesture_files(tmp_path), "test", frames)
    assert y.bincount().tolist() == [2] * 11
    assert x.shape == (22, 3, 32, 32, 2)
    assert x.sum((1, 2, 3, 4)).tolist() == [40] * 22


def test_a_folder_without_recordings_or_of_no_class_is_refused(tmp_path):
    assert refusal(NMNIST, tmp_path, "test") == (f"there are no recordings {tmp_path}/Test/*/*.bin")
    (tmp_path / "Test" / "x").mkdir(parents=True)
    path = tmp_path / "Test" / "x" / "1.bin"
    path.write_bytes(nmnist_bytes(some_events(0)))
    assert refusal(NMNIST, tmp_path, "test") == f"{path} is of class x, expected 0 to 9"
    folder = gesture_files(tmp_path)
    path = folder / "ibmGestureTrain" / "user01_led" / "11.npy"
    np.save(path, np.zeros((1, 4)))
    assert refusal(GESTURE, folder, "train") == f"{path} is of class 11, expected 0 to 10"


def test_classes_without_a_recording_are_named(tmp_path):
    shutil.rmtree(nmnist_files(tmp_path) / "Train" / "3")
    for path in (tmp_path / "Train" / "8").iterdir():
        path.unlink()
    assert refusal(NMNIST, tmp_path, "train") == (
        f"there are no recordings {tmp_path}/Train/*/*.bin of class 3, 8: unpack the whole set"
    )
    assert len(load(NMNIST, tmp_path, "test")[1]) == 20
    folder = gesture_files(tmp_path)
    for path in folder.glob("ibmGestureTest/*/10.npy"):
        path.unlink()
    assert "ibmGestureTest/*/*.npy of class 10:" in refusal(GESTURE, folder, "test")


def test_a_damaged_file_and_a_pipe_are_named(tmp_path):
    path = nmnist_files(tmp_path) / "Train" / "7" / "00002.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(NMNIST, tmp_path, "train").startswith(f"{path} is cut in the middle")
    path.unlink()
    os.mkfifo(path)  # whose reading would never end
    assert refusal(NMNIST, tmp_path, "train") == f"{path} is not a file"


def test_without_tonic_it_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tonic", None)  # as if there were none
    assert refusing.refusal(download_recordings, NMNIST, tmp_path) == (
        "NMNIST is downloaded by Tonic, which is not installed: pip install tonic, or set "
        "events.path to the folder of the files"
    )


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder for what Tonic downloads from here."""
    with tonic_downloads(tmp_path, monkeypatch):
        yield tmp_path / "dataset"


def test_tonic_downloads_and_reads_the_same_events(root):
    import tonic

    folder = download_recordings(NMNIST, root)
    assert folder == root / "NMNIST"
    for part in ("train", "test"):
        x, y = load(NMNIST, folder, part)
        theirs = tonic.datasets.NMNIST(str(root), train=part == "train")
        assert len(theirs) == len(y) == 20
        assert sorted(theirs.targets) == sorted(y.tolist())
        for path, (events, label) in zip(theirs.data, theirs, strict=True):
            number = int(path[-9:-4]) - 1
            assert y[number] == label
            ours = Events(*(events[key].astype(np.int64) for key in "xytp"))
            assert torch.equal(x[number], torch.from_numpy(FRAMES.count_events(ours, 34)))


def test_a_download_with_a_wrong_checksum_or_without_a_network_is_told(root, monkeypatch):
    import tonic

    monkeypatch.setattr(tonic.datasets.NMNIST, "train_md5", "0" * 32)
    with pytest.raises(InputError, match="Tonic can neither find nor download NMNIST under"):
        download_recordings(NMNIST, root)
    monkeypatch.setattr(tonic.datasets.NMNIST, "train_url", "http://127.0.0.1:9/train.zip")
    with pytest.raises(InputError, match="Tonic can neither find nor download NMNIST under"):
        download_recordings(NMNIST, root / "other")


def test_gestures_are_found_where_tonic_has_them(tmp_path, monkeypatch):
    datasets = pytest.importorskip("tonic.datasets")

    def unpack(self):
        if not (tmp_path / "DVSGesture").exists():
            gesture_files(tmp_path / "DVSGesture")

    monkeypatch.setattr(datasets.DVSGesture, "download", unpack)
    folder = download_recordings(GESTURE, tmp_path)
    frames = Frames(3, 30.0, merge=4, side=32)
    x, y = load(GESTURE, folder, "train", frames)
    theirs = datasets.DVSGesture(str(tmp_path), train=True)
    assert sorted(theirs.targets) == sorted(y.tolist())
    for events, label in theirs:
        ours = Events(*(events[key].astype(np.int64) for key in "xytp"))
        expected = torch.from_numpy(frames.count_events(ours, 128))
        assert any(torch.equal(x[n], expected) for n in (y == label).nonzero().flatten())

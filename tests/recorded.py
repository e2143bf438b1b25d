"""Recordings for the tests: files of events and of electrocardiograms, and Tonic's download."""

import zipfile
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from scipy.io import savemat

from snn_lib.data.events import Events, nmnist_bytes


def some_events(seed, side=34, count=40):
    generator = np.random.default_rng(seed)
    x, y = generator.integers(0, side, (2, count))
    t = np.sort(generator.integers(0, 30_000, count))
    return Events(x, y, t, generator.integers(0, 2, count))


def nmnist_files(folder, a_class=2):
    """Two files a class in both parts, numbered as those of MNIST are: not by class."""
    for part in ("Train", "Test"):
        for number in range(10 * a_class):
            path = folder / part / str(number * 7 % 10) / f"{number + 1:05d}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(nmnist_bytes(some_events(number)))
    return folder


def gesture_files(folder, users=("user01_led", "user02_fluorescent")):
    """A file for every class and user, in the form in which Tonic has them."""
    for part in ("ibmGestureTrain", "ibmGestureTest"):
        for user in users:
            (folder / part / user).mkdir(parents=True)
            for label in range(11):
                x, y, t, p = some_events(label, 128)
                rows = np.stack([x, y, p, t // 1000], 1)
                np.save(folder / part / user / f"{label}.npy", rows)
    return folder


def qtdb_files(folder, x, labels):
    """Both files of electrocardiograms, with the same sequences; a label of -1 is none.

    Args:
        x: events, ``(sequences, T, 4)``.
        labels: numbers of waves, ``(sequences, T)``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waves = (labels[..., None] == np.arange(6)).astype(np.uint8)
    for part in ("train", "test"):
        savemat(folder / f"QTDB_{part}.mat", {"x": x.astype(np.int16), "y": waves})
    return folder


def some_beats(count=24, steps=40, seed=0):
    """Events at random, and the wave of each step; each heart has its own rate."""
    generator = np.random.default_rng(seed)
    labels = np.arange(steps) // generator.integers(2, 6, (count, 1)) % 6
    x = (generator.random((count, steps, 4)) < 0.1 + 0.1 * labels[..., None]) * 1
    return x, np.where(generator.random(labels.shape) < 0.1, -1, labels)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def served(folder):
    """A server of the files in a folder; gives its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def tonic_downloads(tmp_path, monkeypatch):
    """Tonic's own download of N-MNIST, two files a class, from here instead of its host."""
    datasets = pytest.importorskip("tonic.datasets")
    from tonic.download_utils import calculate_md5

    files = nmnist_files(tmp_path / "files")
    with served(tmp_path) as address:
        for part in ("train", "test"):
            archive = tmp_path / f"{part}.zip"
            with zipfile.ZipFile(archive, "w") as file:
                for path in sorted((files / part.title()).rglob("*.bin")):
                    file.write(path, path.relative_to(files))
            monkeypatch.setattr(datasets.NMNIST, f"{part}_url", f"{address}/{archive.name}")
            monkeypatch.setattr(datasets.NMNIST, f"{part}_md5", calculate_md5(str(archive)))
        yield

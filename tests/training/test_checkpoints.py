"""Checkpoints: whole or not there, plain, and never a way for a file to run code."""

import errno
import io
import os
import pickle
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from refusing import refusal
from torch import nn

from snn_lib import LowPassSynapse, PerStep, Sequential
from snn_lib.errors import RunError
from snn_lib.files import write_atomically
from snn_lib.stability import MARGIN
from snn_lib.training.checkpoints import Checkpoint, load_checkpoint, load_weights, save_checkpoint
from snn_lib.training.state import MovingAverage

CHECKPOINT = {
    "epoch": 3,
    "snn_state_dict": {"weight": torch.arange(2000.0), "count": torch.tensor(7)},
    "metrics": [{"loss": 0.5, "name": "x"}],
    "rng": None,
}


def full(*_):
    """What the system says of a write if the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model_last"


def test_a_checkpoint_is_loaded_as_it_was_saved(path):
    save_checkpoint(path, CHECKPOINT)
    loaded = load_checkpoint(path)
    assert loaded.keys() == CHECKPOINT.keys()
    assert torch.equal(loaded["snn_state_dict"]["weight"], torch.arange(2000.0))
    for key in ("epoch", "metrics", "rng"):
        assert loaded[key] == CHECKPOINT[key]
    assert os.listdir(path.parent) == ["model_last"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(path, monkeypatch, call):
    save_checkpoint(path, CHECKPOINT)
    before = path.read_bytes()

    monkeypatch.setattr(os, call, full)
    with pytest.raises(RunError, match=f"cannot write {re.escape(str(path))}: No space left"):
        save_checkpoint(path, {**CHECKPOINT, "epoch": 4})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["model_last"]


def test_a_file_is_synced_before_it_takes_its_name(path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("synced"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("renamed"), replace(*a)))
    write_atomically(path, b"content")
    assert calls == ["synced", "renamed"]
    assert path.read_bytes() == b"content"


def test_threads_that_write_a_file_at_once_do_not_mix_it(path):
    contents = [bytes([number]) * 2**18 for number in range(4)]

    def write(content):
        for _ in range(50):
            write_atomically(path, content, sync=False)
            assert path.read_bytes() in contents

    with ThreadPoolExecutor() as threads:
        list(threads.map(write, contents))
    assert os.listdir(path.parent) == [path.name]


def test_a_failed_write_names_its_reason_even_if_its_half_file_cannot_be_removed(path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr("pathlib.Path.unlink", read_only)
    with pytest.raises(RunError, match="No space left"):
        write_atomically(path, b"content")


def test_a_symbolic_link_stays_one_and_permissions_stay_as_they_are(path, tmp_path):
    real = tmp_path / "elsewhere/model"
    real.parent.mkdir()
    real.write_bytes(b"old")
    real.chmod(0o640)
    path.symlink_to(real)
    write_atomically(path, b"new")
    assert path.is_symlink()
    assert path.resolve() == real
    assert real.read_bytes() == b"new"
    assert real.stat().st_mode & 0o777 == 0o640
    assert os.listdir(real.parent) == ["model"]


def flip_a_bit(content):
    """Of one of the weights."""
    place = content.find(torch.tensor(1234.0).numpy().tobytes())
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def another_archive(_):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return file.getvalue()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: b"", "is refused: it is damaged, or holds"),
        (lambda content: content[: len(content) // 100], "is refused: it is damaged"),
        (lambda content: content[: len(content) // 2], "is refused: it is damaged"),
        (lambda content: content[:-50], "is refused: it is damaged"),
        (flip_a_bit, "is damaged: its checksums do not match"),
        (another_archive, "is refused: it is damaged"),
        (lambda content: b"epoch,learning_rate\n1,0.002\n", "is refused: it is damaged"),  # a table
    ],
)
def test_a_damaged_checkpoint_is_refused_by_its_name(path, damage, words):
    save_checkpoint(path, CHECKPOINT)
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(load_checkpoint, path)
    assert str(path) in message
    assert words in message


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_a_checkpoint_that_does_not_fit_into_the_memory_is_not_called_damaged(
    path, error, monkeypatch
):
    def load(*args, **kwargs):
        raise error("can't allocate memory")

    save_checkpoint(path, CHECKPOINT)
    monkeypatch.setattr(torch, "load", load)
    assert "cannot be read: can't allocate memory" in refusal(load_checkpoint, path)


class Malicious:
    """A pickle that would make a file when it is read."""

    def __init__(self, touched):
        self.touched = str(touched)

    def __reduce__(self):
        return open, (self.touched, "w")


@pytest.mark.parametrize("pickled", ["zip", "legacy", "bare"])
def test_a_malicious_pickle_is_refused_and_its_code_not_run(path, tmp_path, pickled):
    touched = tmp_path / "touched"
    content = {"snn_state_dict": {"weight": Malicious(touched)}}
    if pickled == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=pickled == "zip")
    assert "which could run code" in refusal(load_checkpoint, path)
    assert not touched.exists()
    if pickled == "bare":  # it is malicious indeed
        pickle.loads(path.read_bytes())
        assert touched.exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 1}, {"snn_state_dict": 3}, torch.zeros(2)])
def test_a_file_without_weights_is_no_checkpoint(path, content):
    torch.save(content, path)
    assert "is no checkpoint of this project" in refusal(load_checkpoint, path)


def test_what_is_no_file_is_no_checkpoint(tmp_path):
    assert f"there is no file {tmp_path}/none" in refusal(load_checkpoint, tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")  # whose reading would never end
    assert refusal(load_checkpoint, tmp_path / "pipe") == f"{tmp_path}/pipe is not a file"
    assert f"{tmp_path}/best" in refusal(load_checkpoint, tmp_path)


def test_the_average_of_a_model_with_a_part_named_module_is_loaded(path):
    model = Sequential(PerStep(nn.Linear(3, 2)))
    average = MovingAverage(model, 0.9)
    nn.init.constant_(average.module[0].module.weight, 7.0)
    states = {"snn_state_dict": model.state_dict(), "average_state_dict": average.state_dict()}
    load_weights(model, Checkpoint(states, path))
    assert (model[0].module.weight == 7.0).all()


def test_a_checkpoint_that_was_written_on_a_gpu_is_read_where_there_is_none(path, monkeypatch):
    with monkeypatch.context() as there:
        there.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
        save_checkpoint(path, {"snn_state_dict": {"weight": torch.arange(5.0)}})
    weight = load_checkpoint(path)["snn_state_dict"]["weight"]
    assert weight.device.type == "cpu"
    assert weight.tolist() == [0, 1, 2, 3, 4]


def test_a_checkpoint_that_is_refused_leaves_filters_their_margin(path):
    model, slow = (Sequential(LowPassSynapse(2, tau, constraint="stable")) for tau in (3.0, 3000.0))
    states = {"snn_state_dict": {**slow.state_dict(), "more": torch.zeros(1)}}
    refusal(load_weights, model, Checkpoint(states, path))
    assert model[0].margin == MARGIN


OTHER = r"\(written by snn_conv\.py\) belongs to another model: .*"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(2, 4)}, f"{OTHER}size mismatch for weight"),
        ({"weight": "text"}, f"{OTHER}weight.*expected torch.Tensor"),
        ({"bias": None}, f'{OTHER}Missing key.*"bias"'),
        ({"more": torch.zeros(1)}, f'{OTHER}Unexpected key.*"more"'),
        ({7: torch.zeros(1)}, f"{OTHER}(no attribute|not iterable|str)"),
        ({"bias": torch.tensor([0.0, torch.nan])}, "bias not finite"),
        ({"bias": torch.tensor([0.0, torch.inf])}, "bias not finite"),
    ],
)
def test_weights_that_are_none_of_the_model_are_refused(path, change, message):
    model = nn.Linear(3, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = {key: value + 1 for key, value in before.items()} | change
    weights = {key: value for key, value in weights.items() if value is not None}
    checkpoint = Checkpoint({"snn_state_dict": weights, "script": "snn_conv.py"}, path)
    said = refusal(load_weights, model, checkpoint)
    assert said.startswith(f"checkpoint {path} ")
    assert re.search(message, said)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])

"""Faults: killed at any moment, asked to stop, a full disk, numbers that explode. Nothing is lost.

SNN_KILLS sets how often the run is killed before it may finish (default 5), for a longer test:

    SNN_KILLS=20 python -m pytest tests/training/test_faults.py
"""

import functools
import itertools
import os
import random
import resource
import shlex
import shutil
import signal
import time

import pytest
from running import Process, assert_same_weights, load, metrics_of, the_run, tiny

from snn_lib.training.command_line import ONCE_MORE, STOPPING
from snn_lib.training.state import TrainingState

KILLS = int(os.environ.get("SNN_KILLS", "5"))


AT_A_WRITE = (3, 4, 4, 7)  # the first kills come in the middle of these writes of files


def settings(folder, *overrides):
    """Enough epochs for every kill to find the run under way."""
    images = ("mnist_config.training_size=128", "mnist_config.validation_size=50")
    epochs = 6 + 6 * max(KILLS - len(AT_A_WRITE), 0)
    return tiny(folder, f"hyperparameters.epoch={epochs}", *images, *overrides)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert Process(folder, "--train", *settings(folder)).wait().code == 0
    return folder


def assert_nothing_lost(undisturbed, folder):
    for checkpoint in ("last", "best"):
        assert_same_weights(the_run(undisturbed) / checkpoint, the_run(folder) / checkpoint)
    assert metrics_of(undisturbed) == metrics_of(folder)
    assert not list(folder.rglob("*.tmp"))


def die_at_write(number):
    """Kills this process in the middle of its n-th write of a file."""
    calls, sync = itertools.count(1), os.fsync

    def fsync(file):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(file)

    os.fsync = fsync


def signal_at_batch(number, batch):
    """Sends this process a signal in its n-th training batch."""
    calls, step = itertools.count(1), TrainingState.step

    def signalled(self):
        if next(calls) == batch:
            os.kill(os.getpid(), number)
        step(self)

    TrainingState.step = signalled


def limit_files():
    """No file of this process may grow beyond 20 kB, as on a disk with no more left."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path, undisturbed):
    # After two files of the run's start an epoch writes its last checkpoint, its best one and
    # metrics.csv; a resumed run's start writes metrics.csv too, and the best checkpoint once more.
    # The first kills hit each of them, the others come at any time.
    writes = [functools.partial(die_at_write, number) for number in AT_A_WRITE]
    for kill in range(KILLS):
        resume = ["--resume"] if list(tmp_path.glob("runs/*/*/last")) else []
        if not resume:  # the run before was killed before its first checkpoint
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        prepare = writes[kill] if kill < len(writes) else None
        process = Process(tmp_path, "--train", *resume, *settings(tmp_path), prepare=prepare)
        if prepare is None:
            process.wait_for("\n", times=random.randint(1, 4))
            time.sleep(random.uniform(0.0, 0.1))
            process.send(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL, process.err
        for which in ("last", "best"):  # whatever is there is whole
            for checkpoint in tmp_path.glob(f"runs/*/*/{which}"):
                load(checkpoint)
    finished = Process(tmp_path, "--train", "--resume", *settings(tmp_path)).wait()
    assert finished.code == 0, finished
    assert_nothing_lost(undisturbed, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_asked_to_stop_writes_a_checkpoint_and_tells_how_to_go_on(
    tmp_path, undisturbed, number
):
    ask = functools.partial(signal_at_batch, number, 3)  # of 2 an epoch
    stopped = Process(tmp_path, "--train", *settings(tmp_path), prepare=ask).wait()
    assert stopped.code == 128 + number
    assert stopped.err.encode() == STOPPING + ONCE_MORE + b"\n"
    *_, line = stopped.out.splitlines()
    assert line.startswith("stopped; continue with: python snn_mlp_1.py --train --resume ")
    arguments = shlex.split(line.partition("snn_mlp_1.py ")[2])
    finished = Process(tmp_path, *arguments).wait()
    assert finished.code == 0, finished
    assert_nothing_lost(undisturbed, tmp_path)


def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(tmp_path, undisturbed):
    stop = functools.partial(signal_at_batch, signal.SIGTERM, 3)
    assert Process(tmp_path, "--train", *settings(tmp_path), prepare=stop).wait().code == 143
    before = (the_run(tmp_path) / "last").read_bytes()
    resume = "--train", "--resume", *settings(tmp_path)
    full = Process(tmp_path, *resume, prepare=limit_files).wait()
    assert full.code == 1
    assert full.err.count("\n") == 1
    assert full.err.startswith(f"snn_mlp_1.py: the run failed: cannot write {the_run(tmp_path)}/")
    assert "File too large; what was there before is untouched" in full.err
    assert (the_run(tmp_path) / "last").read_bytes() == before
    finished = Process(tmp_path, *resume).wait()
    assert finished.code == 0, finished
    assert_nothing_lost(undisturbed, tmp_path)


def test_numbers_that_explode_end_the_run_with_one_line(tmp_path):
    overrides = ("optimizer.optimizer_choice=SGD", "optimizer.SGD.lr=1e30", "seed=3")
    plan = ("scheduler.scheduler_choice=none", "hyperparameters.constraint=none")
    finished = Process(tmp_path, "--train", *settings(tmp_path, *overrides, *plan)).wait()
    assert finished.code == 1
    assert len(finished.out.splitlines()) == 2, finished.out  # none of the library's own noise
    assert finished.err.count("\n") == 1
    assert "the run failed: epoch 1, batch " in finished.err
    assert "not finite: " in finished.err
    assert "layers." in finished.err
    assert not (the_run(tmp_path) / "last").exists()

"""Several processes: the numbers of one, resumed by any number, no hang when one of them dies."""

import os
import re
import signal
import socket
import sys
import time

import pytest
import torch
from refusing import refusal
from running import SCRIPT, Process, SmallSNN, experiment, load, metrics_of, shell, the_run, tiny
from torch import nn

import snn_lib
from snn_lib.tasks.digits import DigitConfig
from snn_lib.training import distributed
from snn_lib.training.checkpoints import load_checkpoint, load_weights
from snn_lib.training.config import load_config
from snn_lib.training.run_folder import RunFolder


def settings(folder, *overrides):
    """Runs whose numbers do not depend on who draws which dropout."""
    return tiny(
        folder,
        "hyperparameters.dropout=0",
        "optimizer.optimizer_choice=SGD",
        "scheduler.scheduler_choice=none",
        "mnist_config.training_size=321",  # a last batch of a single image
        *overrides,
    )


def start(folder, world, *arguments, prepare=None):
    """The processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own = [{**together, "RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(world))]
    return [Process(folder, *arguments, environment=one, prepare=prepare) for one in own]


def test_a_rank_without_the_rest_is_refused_in_a_line(tmp_path):
    refused = Process(tmp_path, "--train", *tiny(tmp_path), environment={"RANK": "0"}).wait()
    assert refused.code == 2
    assert "RANK says that this is one of several processes: start them by torchrun" in refused.err
    assert refused.err.count("\n") == 1


def test_an_experiment_refuses_a_process_that_has_not_joined_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "RANK says that this is one of several" in refusal(experiment, tiny(tmp_path))


def test_a_process_that_has_joined_the_others_may_join_again(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    distributed.start()
    distributed.check_joined()


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    done = []
    monkeypatch.setenv("RANK", "5")  # on the second machine
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda: done.append("joined"))
    distributed.start()
    assert done == [1, "joined"]


def finish(processes):
    finished = [process.wait() for process in processes]
    assert [each.code for each in finished] == [0] * len(processes), finished
    return finished


def assert_close_runs(one, other):
    """The same weights within 1e-5, and the same metrics but for rounding."""
    weights, others = (load(the_run(folder) / "last")["snn_state_dict"] for folder in (one, other))
    for key in weights:
        torch.testing.assert_close(weights[key], others[key], rtol=0, atol=1e-5, msg=key)
    for row, row_of_other in zip(metrics_of(one)[1:], metrics_of(other)[1:], strict=True):
        assert list(map(float, row)) == pytest.approx(list(map(float, row_of_other)), rel=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    finish([Process(folder, "--train", *settings(folder))])
    return folder


def test_two_processes_train_as_one_and_one_of_them_writes(tmp_path, alone):
    first, second = finish(start(tmp_path, 2, "--train", *settings(tmp_path)))
    assert_close_runs(alone, tmp_path)
    torch.manual_seed(2)
    before = SmallSNN(load_config(DigitConfig, SCRIPT.with_suffix(".yaml"), [])).layers[4].weight
    last = load(the_run(tmp_path) / "last")
    moved = (last["snn_state_dict"]["layers.4.weight"] - before).abs().max()
    assert moved > 1e-3  # far more than the tolerance
    assert "2 processes, batches of 64" in first.out
    assert (second.out, second.err) == ("", "")
    assert (len(last["rng"]), last["environment"]["processes"]) == (2, 2)


def test_a_run_is_stopped_together_and_resumed_by_another_number_of_processes(tmp_path):
    more = settings(tmp_path, "hyperparameters.epoch=200")
    processes = start(tmp_path, 2, "--train", *more)
    processes[0].wait_for("epoch 1/")
    processes[1].send(signal.SIGTERM)  # one is asked, all stop
    stopped = [process.wait() for process in processes]
    assert [each.code for each in stopped] == [130, 143]
    assert "continue with: torchrun --nproc-per-node=2 snn_mlp_1.py --train" in stopped[0].out
    progress = load(the_run(tmp_path) / "last")["progress"]

    epochs = progress["epoch"] + 1
    settings_of_both = f"hyperparameters.epoch={epochs}"
    finish([Process(tmp_path, "--train", "--resume", *more, settings_of_both)])
    whole = tmp_path / "whole"
    finish([Process(tmp_path, "--train", *settings(whole, settings_of_both))])
    assert_close_runs(whole, tmp_path)


def write_slowly():
    """Checkpoints take a second longer, and a process that stops does not wait for the others."""

    def write(*arguments):
        time.sleep(1 if os.environ["RANK"] == "0" else 0)  # which writes
        plain(*arguments)

    plain, RunFolder.write = RunFolder.write, write
    distributed.stop = lambda: None


def test_no_process_stops_before_the_checkpoint_is_written(tmp_path):
    more = settings(tmp_path, "hyperparameters.epoch=200")
    processes = start(tmp_path, 2, "--train", *more, prepare=write_slowly)
    processes[0].wait_for("epoch 1/")
    processes[1].send(signal.SIGTERM)
    processes[1].wait()
    found = load(the_run(tmp_path) / "last")["progress"]
    processes[0].wait()
    expected = load(the_run(tmp_path) / "last")["progress"]
    assert (found["epoch"], found["batch"]) == (expected["epoch"], expected["batch"])


def test_one_process_is_resumed_by_two(tmp_path, alone):
    finish([Process(tmp_path, "--train", *settings(tmp_path, "hyperparameters.epoch=1"))])
    finish(start(tmp_path, 2, "--train", "--resume", *settings(tmp_path)))
    assert_close_runs(alone, tmp_path)


def normalise():
    """Gives SmallSNN a layer that keeps averages of the batches, of each process's own ones."""

    def __init__(self, config):
        plain(self, config)
        normalisation = snn_lib.PerStep(nn.BatchNorm1d(20))
        self.layers = snn_lib.Sequential(*self.layers[:2], normalisation, *self.layers[2:])

    plain, SmallSNN.__init__ = SmallSNN.__init__, __init__


@pytest.mark.parametrize(("averaging", "bits"), [(0, 0), (0.9, 2)])
def test_several_processes_write_the_weights_that_they_evaluated(
    tmp_path, monkeypatch, averaging, bits
):
    averaged = f"hyperparameters.weight_averaging={averaging}"
    more = settings(tmp_path, averaged, f"hyperparameters.weight_bits={bits}")
    finish(start(tmp_path, 2, "--train", *more, prepare=normalise))
    monkeypatch.setattr(SmallSNN, "__init__", SmallSNN.__init__)  # is put back
    normalise()
    best = load_checkpoint(the_run(tmp_path) / "best")
    one = experiment(more)
    load_weights(one.model, best)
    found, activity = one.evaluate("validation")
    rates = {f"firing_rate_{name}": rate for name, rate in activity.firing_rates().items()}
    expected = {"validation_loss": found["loss"], **rates}
    assert {key: best["metrics"][key] for key in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run_with_a_line(tmp_path, victim):
    processes = start(tmp_path, 2, "--train", *settings(tmp_path, "hyperparameters.epoch=500"))
    processes[0].wait_for("epoch 1/")
    processes[victim].send(signal.SIGKILL)
    left = processes[1 - victim].wait(timeout=60)
    assert left.code == 1
    assert left.err.count("\n") == 1, left.err
    assert f"snn_mlp_1.py: process {1 - victim}: the run failed: another process" in left.err
    load(the_run(tmp_path) / "last")  # the last good checkpoint is there


@pytest.mark.parametrize(
    ("action", "override", "message"),
    [
        ("--train", "hyperparameters.dropout=1", "hyperparameters.dropout is 1.0"),
        ("--test", "seed=3", "--test and --export take one process: start the script with python"),
    ],
)
def test_bad_input_ends_all_processes(tmp_path, action, override, message):
    for rank, process in enumerate(start(tmp_path, 2, action, *settings(tmp_path, override))):
        finished = process.wait(timeout=60)
        assert finished.code == 2
        assert finished.err.startswith(f"snn_mlp_1.py: process {rank}: {message}")
        assert finished.err.count("\n") == 1


def test_a_process_that_cannot_write_ends_the_others_too(tmp_path):
    (tmp_path / "file").write_text("in the way")
    overrides = settings(tmp_path, f"runs_path={tmp_path}/file/x")
    first, second = (p.wait(timeout=60) for p in start(tmp_path, 2, "--train", *overrides))
    assert (first.code, second.code) == (2, 1)
    assert "process 0: cannot write to" in first.err
    assert "process 1: the run failed: another process" in second.err


def test_torchrun_trains_the_script(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    finished = shell(*torchrun, SCRIPT, "--train", *settings(tmp_path, "hyperparameters.epoch=1"))
    assert finished.code == 0, finished.err
    assert "2 processes" in finished.out
    assert len(re.findall("^epoch 1/1: ", finished.out, re.MULTILINE)) == 1
    assert len(re.findall("^best epoch 1: ", finished.out, re.MULTILINE)) == 1


def test_buffers_are_shared_however_they_lie_in_memory(monkeypatch):
    def broadcast(buffer, source):
        assert buffer.is_contiguous()
        buffer.fill_(7.0)

    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "broadcast", broadcast)
    module = nn.Module()
    module.register_buffer("turned", torch.zeros(2, 3).t())
    module.register_buffer("plain", torch.zeros(2))
    distributed.share_buffers(module)
    assert module.turned.eq(7).all()
    assert module.plain.eq(7).all()


def test_sums_over_processes_keep_all_digits():
    assert distributed.add(2**24 + 1, 0.1, 2**53 - 1) == [2**24 + 1, 0.1, 2**53 - 1]


def test_sums_over_processes_are_added_up_by_name(monkeypatch):
    """Another process may have met them in another order, and some that this one has not met."""
    ours, theirs = {"a": torch.tensor(1), "b": 2.0}, {"b": 20.0, "a": 10.0, "c": 5.0}
    for mine, other, added in ((ours, theirs, (10, 20, 5)), (theirs, ours, (1, 2, 0))):
        keys = [[*mine], [*other]] if mine is ours else [[*other], [*mine]]
        monkeypatch.setattr(distributed, "gather", lambda names, keys=keys: keys)
        monkeypatch.setattr(
            distributed,
            "add",
            lambda *values, added=added: [a + b for a, b in zip(values, added, strict=True)],
        )
        assert distributed.total(mine) == {"a": 11.0, "b": 22.0, "c": 5.0}


def test_one_process_needs_no_group():
    assert "RANK" not in os.environ
    assert not distributed.is_launched()
    assert distributed.rank_and_world() == (0, 1)
    assert distributed.total({"a": torch.tensor(2), "b": 0.5}) == {"a": 2.0, "b": 0.5}
    assert distributed.total({}) == {}
    assert distributed.gather("x") == ["x"]
    assert distributed.any_process(True, False) == (True, False)

"""The folder of a run: what is in it, and that no other run ever writes there."""

import csv
import multiprocessing
import os
import shutil
import subprocess
import sys
import time

import pytest
import running
import torch
import yaml
from refusing import refusal
from running import (
    Process,
    SmallSNN,
    assert_same_weights,
    experiment,
    load,
    refused,
    the_run,
    tiny,
    train,
)

from snn_lib.errors import BusyError, InputError, RunError
from snn_lib.settings import ExperimentConfig
from snn_lib.tasks.digits import DigitClassification
from snn_lib.training import distributed, run_folder
from snn_lib.training.checkpoints import load_checkpoint
from snn_lib.training.experiment import Stopped
from snn_lib.training.run_folder import RunFolder, environment, new_folder, newest

HISTORY = [{"epoch": 1, "loss": 0.5, "seconds": 1.25}, {"epoch": 2, "loss": 0.25, "seconds": 1.5}]
CONFIG = ExperimentConfig(name="trial")


def opened(folder, config=CONFIG):
    one = RunFolder(folder, config, {"environment": {"torch": "2"}})
    one.lock()
    one.open()
    return one


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------
# What is in it


def test_metrics_csv_has_one_row_an_epoch_after_resuming_too(tmp_path):
    with opened(tmp_path) as one:
        one.write_metrics(HISTORY[:1])
        assert rows(tmp_path) == [{"epoch": "1", "loss": "0.5", "seconds": "1.25"}]
        one.write_metrics(HISTORY)
    with opened(tmp_path) as again:  # the run is resumed
        again.write_metrics(HISTORY)
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]


def test_a_metric_that_came_later_is_empty_in_earlier_rows(tmp_path):
    with opened(tmp_path) as one:
        one.write_metrics([HISTORY[0], {**HISTORY[1], "rate": 0.1}])
    assert [row["rate"] for row in rows(tmp_path)] == ["", "0.1"]


def test_settings_and_environment_are_readable_yaml(tmp_path):
    with opened(tmp_path):
        pass
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert ExperimentConfig(**{**vars(CONFIG), "name": written["name"]}).name == "trial"
    assert written["optimizer"]["Adam"]["betas"] == [0.9, 0.999]
    assert yaml.safe_load((tmp_path / "environment.yaml").read_text()) == {"torch": "2"}


def test_files_that_a_killed_process_left_half_written_are_removed(tmp_path):
    for name in ("config.yaml", "last", "metrics.csv"):
        (tmp_path / f"{name}.123.tmp").write_text("half")
    (tmp_path / "notes.txt").write_text("the user's own")
    with opened(tmp_path):
        found = sorted(file.name for file in tmp_path.iterdir())
    assert found == ["config.yaml", "environment.yaml", "lock", "notes.txt"]


def test_the_environment_names_what_decides_the_numbers():
    found = environment(torch.device("cpu"), 2)
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert (found["device"], found["processes"], found["cuda"]) == ("cpu", 2, None)
    yaml.safe_dump(found)  # built-in types only


def test_the_environment_names_no_revision_without_git(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert environment(torch.device("cpu"), 1)["revision"] is None


def test_the_revision_is_that_of_the_library_wherever_a_run_starts(tmp_path, monkeypatch):
    here = environment(torch.device("cpu"), 1)["revision"]
    git = "git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@here"
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "run_folder.py").touch()
    subprocess.run([*git, "add", "run_folder.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "theirs"], check=True)
    monkeypatch.chdir(tmp_path)
    assert environment(torch.device("cpu"), 1)["revision"] == here
    # An environment within their repository holds the library.
    (tmp_path / "environment").mkdir()
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "environment" / "run_folder.py"))
    assert environment(torch.device("cpu"), 1)["revision"] is None


def test_tensorboard_events_hold_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with opened(tmp_path, ExperimentConfig(tensorboard=True)) as one:
        one.write_metrics(HISTORY[:1])
        one.write_metrics(HISTORY)
    resumed = RunFolder(tmp_path, ExperimentConfig(tensorboard=True), one.made_by)
    with resumed:
        resumed.lock()
        resumed.open()
        resumed.write_metrics([*HISTORY, {**HISTORY[0], "epoch": 3}])
    events = EventAccumulator(str(tmp_path)).Reload()
    seen = [(e.step, e.value) for e in events.Scalars("loss")]
    assert seen == [(1, 0.5), (2, 0.25), (3, 0.5)]


@pytest.mark.parametrize("from_the_start", [True, False])
def test_tensorboard_has_every_epoch_once_after_resuming_too(tmp_path, from_the_start):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = small(tmp_path)
    shown = [*settings, "tensorboard=true"]
    running.stopped(shown if from_the_start else settings, after=9)  # in the third epoch
    train("--resume", *shown, model=SmallSNN)
    events = EventAccumulator(str(the_run(tmp_path))).Reload()
    assert [event.step for event in events.Scalars("validation_loss")] == [1, 2, 3]


def test_tensorboard_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails
    config = ExperimentConfig(tensorboard=True)
    assert "pip install tensorboard" in refusal(opened, tmp_path, config)
    assert not (tmp_path / "config.yaml").exists()


# ---------------------------------------------------------------------------------------------
# Which one it is


def test_runs_of_the_same_second_have_folders_of_their_own_in_the_order_of_their_start(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(run_folder.time, "strftime", lambda *_: "2026-01-01_00-00-00")
    folders = [new_folder(tmp_path / "trial") for _ in range(11)]
    assert folders == sorted(set(folders))
    assert all(folder.is_dir() for folder in folders)


def test_runs_keep_their_order_when_summer_time_ends(tmp_path, monkeypatch):
    made = []
    for now in map(time.gmtime, (1792888200, 1792891800)):  # both are half past two in Berlin
        monkeypatch.setattr(run_folder.time, "gmtime", lambda now=now: now)
        made.append(new_folder(tmp_path / "trial").name)
        monkeypatch.undo()
    assert made == ["2026-10-25_00-30-00", "2026-10-25_01-30-00"]


def test_the_newest_run_with_a_checkpoint_is_taken(tmp_path):
    config = ExperimentConfig(runs_path=str(tmp_path), name="trial")
    for name in ("2026-01-02_00-00-00_002", "2026-01-02_00-00-00", "2026-01-01_09-00-00"):
        (tmp_path / "trial" / name).mkdir(parents=True)
        (tmp_path / "trial" / name / "last").touch()
    copy = tmp_path / "trial/backup"
    shutil.copytree(tmp_path / "trial/2026-01-01_09-00-00", copy)
    (tmp_path / "trial/2026-01-03_00-00-00").mkdir()  # failed before its first checkpoint
    (tmp_path / "other/2026-01-04_00-00-00").mkdir(parents=True)
    (tmp_path / "other/2026-01-04_00-00-00/last").touch()
    older = tmp_path / "trial/2026-01-01_09-00-00"  # was resumed later
    os.utime(older / "last", (2e9, 2e9))
    os.utime(older, (2e9, 2e9))
    assert newest(config, "last") == tmp_path / "trial/2026-01-02_00-00-00_002/last"
    assert "trial/*/best: train trial first" in refusal(newest, config, "best")
    (copy / "best").touch()
    assert newest(config, "best") == copy / "best"  # there is no other
    for last in tmp_path.glob("trial/*/last"):
        last.unlink()
    assert "a run of hyperparameters.epoch=0 has none" in refusal(newest, config, "last")


# ---------------------------------------------------------------------------------------------
# No other run writes there


class FirstIsBest(DigitClassification):
    def score(self, metrics):
        return (0.0,)


def small(folder, *overrides):
    """Overrides for 3 epochs of 4 batches; with SmallSNN they take a fraction of a second."""
    plan = "scheduler.scheduler_choice=none"
    return tiny(folder, plan, "hyperparameters.epoch=3", *overrides)


def runs(folder):
    """The folders of all runs, the oldest first."""
    return sorted(folder.glob("runs/*/*/"))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    running.stopped(small(folder), after=6)
    return folder


@pytest.fixture(scope="module")
def finished(stopped, tmp_path_factory):
    """The same run, gone on to its end."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    train("--resume", *small(folder), model=SmallSNN)
    return folder


def test_a_run_writes_to_its_own_folder_and_to_no_other(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    running.stopped(small(tmp_path), after=1)  # before its first best model
    with pytest.raises(RunError):
        experiment(small(tmp_path, "optimizer.AdamW.lr=1e30")).train()  # fails at once
    train(*small(tmp_path), model=SmallSNN)
    train("--resume", *small(tmp_path), model=SmallSNN)  # which is finished
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    assert len(runs(tmp_path)) == 4
    assert {path.parent.parent for path in after} == {tmp_path / "runs/snn_mlp_1"}


def test_a_checkpoint_that_is_named_is_resumed_whatever_the_newest_run_is(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    train(*small(tmp_path), model=SmallSNN)
    first, second = runs(tmp_path)
    newer = contents(second)
    train("--resume", first / "last", *small(tmp_path), model=SmallSNN)
    assert_same_weights(first / "best", second / "best")
    assert_same_weights(first / "last", second / "last")
    assert contents(second) == newer
    assert runs(tmp_path) == [first, second]


def test_a_copy_of_a_run_goes_on_beside_it(stopped, finished, tmp_path):
    shutil.copytree(stopped, tmp_path / "one")
    shutil.copytree(the_run(tmp_path / "one"), tmp_path / "two")
    before = contents(tmp_path / "one")
    last = tmp_path / "two" / "last"
    train("--resume", last, *small(tmp_path / "one"), model=SmallSNN)
    assert contents(tmp_path / "one") == before
    for which in ("last", "best"):
        assert_same_weights(tmp_path / "two" / which, the_run(finished) / which)
    assert [row["epoch"] for row in rows(tmp_path / "two")] == ["1", "2", "3"]
    message = refused("--train", "--resume", last, *small(tmp_path, "name=other"), model=SmallSNN)
    assert message == f"name has no effect with --resume {last}: the run goes on in its folder"
    shutil.copy(last, tmp_path / "sent")
    message = refused("--train", "--resume", tmp_path / "sent", *small(tmp_path), model=SmallSNN)
    assert message.startswith(f"{tmp_path / 'sent'} is not in the folder of its run: ")


@pytest.mark.parametrize("task", [DigitClassification, FirstIsBest])
def test_a_run_of_an_earlier_version_goes_on(tmp_path, task):
    """Its checkpoints have other settings, and its progress has more."""
    running.stopped(small(tmp_path), after=9, task=task())
    for which in ("last", "best"):
        checkpoint = load(the_run(tmp_path) / which)
        for key in ("script", "build_model", "config_class"):
            del checkpoint[key]
        checkpoint["config"]["checkpoint_base_path"] = "checkpoint"
        if which == "last":
            checkpoint["progress"]["folder"] = "runs/x/2026-01-01_00-00-00"
            checkpoint["progress"] |= {"samples": 100, "held_out": 50}
        torch.save(checkpoint, the_run(tmp_path) / which)
    resumed = train("--resume", *small(tmp_path), model=SmallSNN, task=task())
    assert "after 2 epochs and 1 batches" in resumed.out
    assert [row["epoch"] for row in rows(the_run(tmp_path))] == ["1", "2", "3"]
    best = load(the_run(tmp_path) / "best")
    assert best["epoch"] == (1 if task is FirstIsBest else best["metrics"]["epoch"])


def test_the_best_model_of_another_run_is_not_taken_for_its_own(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    best = the_run(tmp_path) / "best"
    content = load(best)
    torch.save({**content, "metrics": {**content["metrics"], "validation_loss": 0.1}}, best)
    message = f"the best epoch so far, 1, is not at {best}: put it there"
    assert refused("--train", "--resume", *small(tmp_path), model=SmallSNN) == message
    best.unlink()
    assert refused("--train", "--resume", *small(tmp_path), model=SmallSNN) == message


def test_two_runs_of_one_name_at_a_time_keep_both_models(tmp_path):
    second = []

    class Twofold(DigitClassification):
        def batches(self, split, epoch=None, start=0):
            if epoch == 1 and not second:
                second.append(experiment(small(tmp_path, "seed=7")))
                second[0].train()
            return super().batches(split, epoch, start)

    first = experiment(small(tmp_path), task=Twofold())
    first.train()
    assert runs(tmp_path) == [first.run.path, second[0].run.path]
    for one in (first, second[0]):
        own = load(one.run.best)["snn_state_dict"]
        assert all(torch.equal(own[key], value) for key, value in one.model.state_dict().items())
        assert load(one.run.best)["config"]["seed"] == one.config.seed


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    more = small(tmp_path, "hyperparameters.epoch=1000")
    first = running.stopped(more, after=5)  # which lets go of the run, though it is still there
    earlier = load_checkpoint(the_run(tmp_path) / "last")
    process = Process(tmp_path, "--train", "--resume", *more)
    process.wait_for("epoch 2/")
    path = first.run.path
    message = f"the run {path} is being trained already, by another process or in this one"
    assert refused("--train", "--resume", *more, model=SmallSNN) == message
    # Also if the process has written another best epoch since the last checkpoint was read.
    earlier["progress"]["history"][0]["validation_loss"] = 0.1
    assert refusal(experiment(more).train, earlier) == message
    process.kill()  # the lock dies with the process
    process.wait()
    experiment(small(tmp_path)).train(load_checkpoint(the_run(tmp_path) / "last"))


def test_two_runs_of_one_process_exclude_each_other(tmp_path):
    first = opened(tmp_path)
    for _ in range(2):  # the refused one must not free it either
        with pytest.raises(BusyError, match="is being trained already"):
            opened(tmp_path)
    with first:
        pass
    with opened(tmp_path):
        pass


def test_a_process_that_was_forked_does_not_keep_the_run(tmp_path):
    context = multiprocessing.get_context("fork")
    begun, end = context.Event(), context.Event()
    with opened(tmp_path):
        child = context.Process(target=lambda: begun.set() or end.wait(60))
        child.start()
        assert begun.wait(60)
    with opened(tmp_path):
        end.set()
    child.join()


def test_a_checkpoint_that_another_process_has_replaced_since_it_was_read_is_refused(tmp_path):
    experiment(small(tmp_path, "hyperparameters.epoch=1")).train()
    last = the_run(tmp_path) / "last"
    earlier = load_checkpoint(last)
    train("--resume", *small(tmp_path), model=SmallSNN)
    before = contents(the_run(tmp_path))
    with pytest.raises(InputError, match="was continued meanwhile: resume it again"):
        experiment(small(tmp_path, "hyperparameters.dropout=0.25")).train(earlier)
    assert contents(the_run(tmp_path)) == before


@pytest.mark.parametrize(("batches", "history"), [(1, ""), (0, "of another run")])
def test_processes_that_read_other_checkpoints_are_refused(
    stopped, tmp_path, monkeypatch, batches, history
):
    def gather(found):
        epoch, batch, past = found
        assert past == repr(last["progress"]["history"])
        return [found, (epoch, batch + batches, past + history)]

    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    last = load_checkpoint(the_run(tmp_path) / "last")
    going_on = experiment(small(tmp_path))
    monkeypatch.setattr(distributed, "gather", gather)
    with pytest.raises(InputError, match="the processes find other states in "):
        going_on.train(last)


def test_a_run_that_went_on_within_the_epoch_since_it_was_read_is_refused(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    earlier = load_checkpoint(the_run(tmp_path) / "last")
    going_on = experiment(small(tmp_path))
    going_on.stop_requested = lambda: True
    with pytest.raises(Stopped):
        going_on.train(earlier)
    newer = load_checkpoint(the_run(tmp_path) / "last")
    assert newer["progress"]["epoch"] == earlier["progress"]["epoch"]
    with pytest.raises(InputError, match="was continued meanwhile: resume it again"):
        experiment(small(tmp_path)).train(earlier)


def test_a_run_whose_resuming_was_refused_can_be_resumed_elsewhere(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (the_run(tmp_path) / "best").rename(tmp_path / "best")
    refused = experiment(small(tmp_path))
    with pytest.raises(InputError, match="put it there") as error:  # which keeps the traceback
        refused.train(load_checkpoint(the_run(tmp_path) / "last"))
    (tmp_path / "best").rename(the_run(tmp_path) / "best")
    process = Process(tmp_path, "--train", "--resume", *small(tmp_path))
    assert process.wait().code == 0, process.err
    assert error.tb

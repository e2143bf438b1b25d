"""The folder of a run: every epoch once in metrics.csv, the configuration, the environment."""

import csv
import shutil

import pytest
import torch
import yaml

from snn_lib.training import run_log
from snn_lib.training.run_log import RunLog, environment, new_folder

HISTORY = [{"epoch": 1, "loss": 0.5, "seconds": 1.25}, {"epoch": 2, "loss": 0.25, "seconds": 1.5}]
CONFIG = {"name": "trial", "hyperparameters": {"tau_m": 4.0, "betas": [0.9, 0.999]}}


def log(folder, **options):
    return RunLog(folder, CONFIG, {"torch": "2"}, **{"tensorboard": False, **options})


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_are_written_as_a_whole_each_time(tmp_path):
    writer = log(tmp_path)
    writer.write(HISTORY[:1])
    assert rows(tmp_path) == [{"epoch": "1", "loss": "0.5", "seconds": "1.25"}]
    writer.write(HISTORY)
    log(tmp_path).write(HISTORY)  # a run that is resumed writes to the same folder
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]


def test_a_column_that_came_later_is_empty_before(tmp_path):
    log(tmp_path).write([HISTORY[0], {**HISTORY[1], "rate": 0.1}])
    assert [row["rate"] for row in rows(tmp_path)] == ["", "0.1"]


def test_configuration_and_environment_are_readable_yaml(tmp_path):
    log(tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == CONFIG
    assert yaml.safe_load((tmp_path / "environment.yaml").read_text()) == {"torch": "2"}


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    for name in ("config.yaml", "environment.yaml", "metrics.csv"):
        (tmp_path / f"{name}.123.tmp").write_text("half")
    log(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "environment.yaml"]


def test_the_environment_names_what_decides_the_numbers():
    found = environment(torch.device("cpu"), 2)
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert (found["device"], found["processes"], found["cuda"]) == ("cpu", 2, None)
    yaml.safe_dump(found)  # built-in types only


def test_the_environment_without_git(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert environment(torch.device("cpu"), 1)["revision"] is None


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log.time, "strftime", lambda _: "now")
    folders = [new_folder(tmp_path / "runs" / "trial") for _ in range(3)]
    assert [folder.name for folder in folders] == ["now", "now_2", "now_3"]
    assert all(folder.is_dir() for folder in folders)


def test_tensorboard_events_hold_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = log(tmp_path, tensorboard=True)
    writer.write(HISTORY[:1])
    writer.write(HISTORY)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_without_tensorboard_the_run_goes_on_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "find_spec", lambda _: None)
    with pytest.warns(RuntimeWarning, match="tensorboard is true but the package is not installed"):
        writer = log(tmp_path, tensorboard=True)
    writer.write(HISTORY)
    assert len(rows(tmp_path)) == 2

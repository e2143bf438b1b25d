"""Sweeps of the command line: any number of processes on one study, killed and resumed."""

import csv
import os
import signal
import sqlite3
import sys
import time
from subprocess import DEVNULL, PIPE, Popen
from types import SimpleNamespace

import pytest
import yaml
from running import ONE_THREAD, ROOT, run_script
from sweeping import SCRIPT, start_sweep, sweep

from snn_lib.sweep import STOPPED, kill, save_best
from snn_lib.tasks.digits import DigitConfig
from snn_lib.training.config import load_config

pytest.importorskip("optuna")


@pytest.fixture
def study(tmp_path):
    """The arguments of a sweep, to be followed by others, and its folder."""
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    settings = "hyperparameters.tau_m=4..16", "hyperparameters.epoch=2", "device=cpu"
    return [script, *settings, f"runs_path={tmp_path}"], tmp_path / "sweep_mine"


def runs(folder):
    """The settings of all runs, by the names of their trials."""
    found = sorted(folder.glob("trial_*/*/config.yaml"))
    return {path.parts[-3]: yaml.safe_load(path.read_text()) for path in found}


def epochs(run):
    """The epochs of a run that are in its metrics."""
    for path in run.glob("*/metrics.csv"):
        with path.open() as file:
            return [int(row["epoch"]) for row in csv.DictReader(file)]
    return []


def test_the_best_settings_are_a_yaml_file_with_which_the_script_trains(study, tmp_path):
    arguments, folder = study
    for name, seed in (("mine", 6), ("other", 5)):
        (tmp_path / f"{name}.yaml").write_text(f"seed: {seed}\n")
    assert sweep(*arguments, "--config_file", tmp_path / "other.yaml", "--trials", 3).code == 0
    taus = {run["hyperparameters"]["tau_m"] for run in runs(folder).values()}
    assert len(taus) == 3
    best = yaml.safe_load((folder / "best.yaml").read_text())
    nearest = min(taus, key=lambda tau: abs(tau - 5))
    assert best == {"base": "../other.yaml", "hyperparameters": {"tau_m": nearest, "epoch": 2}}
    arguments = "--train", "--config_file", folder / "best.yaml", "device=cpu"
    trained = run_script(tmp_path / "mine.py", *arguments, f"runs_path={tmp_path}")
    assert trained.code == 0, trained.err
    (path,) = tmp_path.glob("mine/*/config.yaml")
    config = yaml.safe_load(path.read_text())
    assert (config["seed"], config["hyperparameters"]["tau_m"]) == (5, nearest)


def test_a_sweep_goes_on_until_there_are_as_many_trials_as_asked(study, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # as some clusters set it for each process
    arguments, folder = study
    for trials in (1, 1, 2):
        assert sweep(*arguments, "--trials", trials).code == 0
        assert len(runs(folder)) == trials
    # Machines may differ in the device, but not in what is searched.
    assert sweep(*arguments, "device=auto", "--trials", 2).code == 0
    refused = sweep(*arguments, "hyperparameters.dropout=0..0.5", "--trials", 3)
    assert refused.code == 2
    began = "sweep: sweep_mine began with hyperparameters.dropout=0.0, now it is 0..0.5: "
    assert refused.err.startswith(began)
    assert len(runs(folder)) == 2


def test_a_script_may_import_what_lies_beside_it_where_it_needs_it(study, tmp_path):
    arguments, _ = study
    (tmp_path / "own_outputs.py").write_text("outputs = 2\n")
    line = "def build_model(config):\n"
    late = f"{line}    from own_outputs import outputs\n\n"
    arguments[0].write_text(SCRIPT.replace(line, late))
    assert sweep(*arguments, "--trials", 1).code == 0


def test_trials_that_end_early_are_among_those_asked_for(study):
    arguments, folder = study
    defined = "return -abs(self.config.hyperparameters.tau_m - 5)"
    early = "len([*Path(self.config.runs_path).glob('trial_*')]) < 3"
    undefined = f"return float('nan') if {early} else 1.0"
    script = SCRIPT.replace(defined, undefined)
    assert script != SCRIPT
    arguments[0].write_text("from pathlib import Path\n" + script)
    done = sweep(*arguments, "--trials", 3)
    assert done.code == 0
    assert [done.out.count(f"trial_000{number} ends early") for number in range(3)] == [1, 1, 0]
    assert len(runs(folder)) == 3


def test_a_yaml_file_that_has_changed_does_not_join_the_study(study, tmp_path):
    arguments, _ = study
    (tmp_path / "mine.yaml").write_text("seed: 5\ndevice: cpu\n")
    assert sweep(*arguments, "--trials", 1).code == 0
    (tmp_path / "mine.yaml").write_text("seed: 6\ndevice: auto\n")
    refused = sweep(*arguments, "--trials", 2)
    assert refused.code == 2
    assert refused.err.startswith("sweep: sweep_mine began with seed=5, now it is 6: ")
    (tmp_path / "mine.yaml").write_text("seed: 5\n")  # the device may differ
    assert sweep(*arguments, "--trials", 2).code == 0


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["hyperparameters.tau=1..2"], "unknown key 'hyperparameters.tau'"),
        (["--storage", "nothing://here"], "the study cannot be kept in nothing://here: "),
        (
            ["--storage", "sqlite://"],
            "sqlite:// is a database in memory, which ends with this proc",
        ),
        (["--storage", "sqlite:///:memory:"], "sqlite:///:memory: is a database in memory"),
        (
            ["--storage", "sqlite:///file:x?mode=memory&uri=true"],
            "&uri=true is a database in memory",
        ),
        (["--trials", "many"], "invalid int value: 'many'"),
        (["--trials", "0"], "--trials is 0, expected at least 1"),
        (["hyperparameters.tau_m=4"], "all trials would be the same: give a range"),
        (["hyperparameters.tau_m=4", "seed=1,1"], "all trials would be the same: give a range"),
    ],
)
def test_wrong_input_is_one_line(study, others, message):
    arguments, _ = study
    refused = sweep(*arguments, *others)
    assert refused.code == 2
    assert refused.err.startswith("sweep: ")
    assert refused.err.count("\n") == 1
    assert message in refused.err


@pytest.mark.parametrize("name", ["", ".", "none.py"])
def test_a_script_that_is_none_is_refused(name):
    refused = sweep(name, "seed=1,2")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert refused.err.startswith("sweep: there is no script ")


def test_a_script_or_settings_that_are_forgotten_are_asked_for(study):
    for word, asked in (
        ("hyperparameters.tau_m=2..4", "there is no script hyperparameters.tau_m=2..4"),
        (study[0][0], "no setting is given: expected key=low..high or key=a,b,c"),
    ):
        refused = sweep(word)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert refused.err.startswith(f"sweep: {asked}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("snn_mlp_1.yaml", "is no script, expected a file that ends in .py\n"),
        ("README.md", "is no script, expected a file that ends in .py\n"),
        ("checkpoint/pretrained_snn_mlp_1", "cannot be read as Python: "),
    ],
)
def test_another_file_in_the_place_of_the_script_is_refused_in_a_line(name, reason):
    refused = sweep(str(ROOT / name), "seed=1,2")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert f"{name} {reason}" in refused.err


def test_a_script_with_a_typing_error_is_refused_by_its_line(tmp_path):
    (tmp_path / "mine.py").write_text("import torch\nreturn 3\n")
    refused = sweep(tmp_path / "mine.py", "seed=1,2")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert refused.err.endswith("'return' outside function (mine.py, line 2)\n")


def test_without_optuna_a_line_says_what_to_install(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    refused = sweep(*study[0])
    assert (refused.code, refused.err) == (
        2,
        "sweep: a sweep needs the package optuna: pip install optuna\n",
    )


def test_the_best_settings_name_a_base_in_a_folder_of_any_name(tmp_path):
    attributes = {"settings": ["seed=3", "first_weights=a #1"], "run": "trial_0000"}
    trial = SimpleNamespace(value=1.0, user_attrs=attributes)
    space = SimpleNamespace(base=tmp_path / "exp #1" / "mine.yaml", config=DigitConfig(name="a"))
    save_best(trial, space, tmp_path / "best.yaml")
    written = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert written == {"base": "exp #1/mine.yaml", "seed": 3, "first_weights": "a #1"}
    assert "# trial_0000 of " in (tmp_path / "best.yaml").read_text()


def test_the_best_settings_name_their_base_where_runs_is_a_link(tmp_path):
    base, there, runs = tmp_path / "mine.yaml", tmp_path / "deep" / "er" / "runs", tmp_path / "runs"
    base.write_text("hyperparameters: {length: 7}\n")
    there.mkdir(parents=True)
    runs.symlink_to(there)
    trial = SimpleNamespace(value=1.0, user_attrs={"settings": ["seed=3"], "run": "trial_0000"})
    save_best(trial, SimpleNamespace(base=base, config=DigitConfig(name="a")), runs / "best.yaml")
    assert load_config(DigitConfig, runs / "best.yaml", ["name=b"]).hyperparameters.length == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_sweep_with_a_line_and_its_trial_is_left_running(study, number):
    arguments, folder = study
    arguments[2] = "hyperparameters.epoch=1000"
    command = [sys.executable, "-m", "snn_lib.sweep", *map(str, arguments)]
    with Popen(command, cwd=ROOT, env=ONE_THREAD, stderr=PIPE, stdout=DEVNULL, text=True) as sweep:
        wait_for(lambda: epochs(folder / "trial_0000"))
        sweep.send_signal(number)
        _, said = sweep.communicate(timeout=60)
    assert (sweep.returncode, said) == (-number, f"{STOPPED.decode()}\n")
    assert said.count("\n") == 1
    with sqlite3.connect(folder / "study.db") as database:
        assert database.execute("select state from trials").fetchall() == [("RUNNING",)]


def test_a_signal_ends_a_sweep_though_nobody_reads_what_it_says(monkeypatch):
    def refuse(file, line):
        raise BrokenPipeError

    raised = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", refuse)
        kill(signal.SIGTERM, None)
    assert raised == [signal.SIGTERM]


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_processes_share_a_study_and_a_killed_trial_goes_on_elsewhere(study):
    arguments, folder = study
    arguments[2] = "hyperparameters.epoch=10"
    other = start_sweep(*arguments, "--trials", 99)
    wait_for(lambda: epochs(folder / "trial_0000"))
    mine = sweep(*arguments, "--trials", 4)  # while the other process is at work
    assert mine.code == 0
    assert 1 <= mine.out.count("\nbest epoch") <= 4
    assert "trial_0000: " not in mine.out

    wait_for(lambda: 2 <= len(epochs(folder / max(runs(folder)))) < 8)
    other.kill()
    other.join()
    before, killed = runs(folder), max(runs(folder))
    assert 2 <= len(epochs(folder / killed)) < 10
    with sqlite3.connect(folder / "study.db") as database:  # as if time had passed
        database.execute("update trial_heartbeats set heartbeat = datetime(heartbeat, '-1 hour')")
    resumed = sweep(*arguments, "checkpoint_minutes=7", "--trials", len(before))
    assert resumed.code == 0
    assert f"resumed from {folder / killed}" in resumed.out
    assert "reported" not in resumed.err
    before[killed]["checkpoint_minutes"] = 7  # which machines may set as they like
    assert runs(folder) == before
    assert epochs(folder / killed) == list(range(1, 11))

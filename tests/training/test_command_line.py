"""The command line: bad input gives one line and exit code 2, and leaves nothing half written."""

import dataclasses
import importlib.util
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import SCRIPT, TINY, Process, load, refused, run, shell, the_run, tiny, train
from torch import nn
from torchvision.datasets import MNIST

import snn_mlp_2
from snn_lib.settings import list_settings
from snn_lib.tasks.digits import DigitClassification, DigitConfig
from snn_lib.training import distributed
from snn_lib.training.checkpoints import Checkpoint
from snn_lib.training.command_line import _resume_command, settings_of
from snn_lib.training.config import load_config
from snn_lib.training.experiment import Experiment


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    train(*tiny(folder, "hyperparameters.epoch=1"))
    return folder


EMPTY = "test_checkpoint_path=''"


def everything_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ---------------------------------------------------------------------------------------------
# What to do


@pytest.mark.parametrize("arguments", [(), ("--train", "--test"), ("seed=3",)])
def test_one_of_train_and_test_must_be_chosen(arguments):
    assert refused(*arguments) == "choose one of --train, --test and --export (see --help)"


@pytest.mark.parametrize("place", ["none/step.onnx", "."])
def test_a_graph_is_exported_to_a_file_in_a_folder_that_exists(tmp_path, place):
    assert refused("--export", tmp_path / place).startswith(f"--export {tmp_path}")


@pytest.mark.parametrize("name", ["network", "network.txt", "network.C"])
def test_a_network_is_exported_only_where_the_ending_says_how(tmp_path, name):
    expected = f"--export {tmp_path / name}: expected a name with the ending .onnx or .c"
    assert refused("--export", tmp_path / name) == expected
    assert not (tmp_path / name).exists()


def test_resume_goes_with_train():
    assert refused("--test", "--resume", "x") == "--resume goes with --train"


@pytest.mark.parametrize("argument", ["--tset", "-x", "--config_file"])
def test_an_unknown_option_is_refused(argument):
    message = refused("--train", argument)
    assert argument in message
    assert message.endswith("(see --help)")


def test_help_explains_every_setting():
    finished = run("--help")
    assert finished.code == 0
    settings = {
        k: v for k, v in list_settings(DigitConfig()) if not hasattr(v, "__dataclass_fields__")
    }
    lines = finished.out.splitlines()
    for key in settings:
        (line,) = [line for line in lines if line.startswith(f"  {key}=")]
        explanation = re.fullmatch(r"  \S+=(?:\[.*\]|\S*) +(.*)", line).group(1)
        assert len(explanation.split()) > 1, line
    own = load_config(DigitConfig, SCRIPT.with_suffix(".yaml"), [])
    assert own.hyperparameters.epoch != DigitConfig().hyperparameters.epoch
    assert f"hyperparameters.epoch={own.hyperparameters.epoch} " in finished.out
    assert "(constant, poisson, latency)" in finished.out
    assert "hidden spikes dropped in training (at least 0 and below 1)\n" in finished.out
    for option in ("--train", "--test", "--config_file", "--resume", "key=value", "exit codes"):
        assert option in finished.out


def test_help_shows_the_values_of_the_file_and_the_overrides_that_are_named(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("hyperparameters: {epoch: 77}")
    said = run("--config_file", path, "--help", "hyperparameters.tau_m=9.5").out
    assert "the values from own.yaml and defaults" in said
    assert "  hyperparameters.epoch=77 " in said
    assert "  hyperparameters.tau_m=9.5 " in said


def test_help_works_without_a_yaml_file(tmp_path):
    finished = run("--help", script=tmp_path / "own.py")
    assert finished.code == 0
    assert "  hyperparameters.tau_m=4.0 " in finished.out


# ---------------------------------------------------------------------------------------------
# Bad settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hyperparameters.droput=0.1", "did you mean 'hyperparameters.dropout'?"),
        ("hyperparameters.length=long", "could not be converted to Integer"),
        ("hyperparameters.tau_s=4", "tau_m is 4.0 and tau_s 4.0, expected 0 < tau_s < tau_m"),
        ("hyperparameters.dropout=1", "dropout is 1.0, expected at least 0 and below 1"),
        ("device=cuda:77", "device='cuda:77' is not available here, use device=cpu"),
        ("optimizer.AdamW.betas=[2,3]", "optimizer.AdamW"),
        ("optimizer.AdamW.eps=-1", "optimizer.AdamW"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, override, message):
    assert message in refused("--train", *tiny(tmp_path, override))
    assert everything_in(tmp_path) == {}


@pytest.mark.parametrize("override", ["name=%s/", "device=%s", "%s=3"])
def test_a_name_of_thousands_of_characters_is_cut(tmp_path, override):
    line = refused("--train", *tiny(tmp_path, override % ("long" * 2000)))
    assert 900 < len(line) < 1100
    assert " ... " in line
    assert "longlong" in line.partition(" ... ")[0]


def test_another_config_file_is_read(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("name: own\nhyperparameters: {epoch: 1, train_bias: false}")
    train("--config_file", path, *[o for o in tiny(tmp_path) if "epoch" not in o])
    weights = load(the_run(tmp_path, "own") / "last")["snn_state_dict"]
    assert "layers.1.weight" in weights
    assert "layers.1.bias" not in weights


# ---------------------------------------------------------------------------------------------
# Bad checkpoints


def test_a_missing_checkpoint_is_refused(tmp_path):
    for arguments in (("--test",), ("--train", "--resume")):
        assert "there is no checkpoint" in refused(*arguments, *tiny(tmp_path))
    named = "--train", "--resume", "nowhere"
    assert refused(*named, *tiny(tmp_path)) == f"there is no file nowhere, seen from {Path.cwd()}"
    message = refused("--train", "--resume", *tiny(tmp_path, "name=mine"))
    assert f"{tmp_path}/runs/mine/*/last: train mine first, or name a checkpoint" in message
    assert everything_in(tmp_path) == {}


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty"])
@pytest.mark.parametrize("action", [("--test",), ("--train", "--resume")])
def test_a_damaged_checkpoint_is_refused(trained, tmp_path, damage, action):
    content = (the_run(trained) / "best").read_bytes()
    content = {"truncated": content[:-1000], "noise": os.urandom(5000), "empty": b""}[damage]
    folder = tmp_path / "runs/snn_mlp_1/2026-01-01_00-00-00"
    folder.mkdir(parents=True)
    for which in ("last", "best"):
        (folder / which).write_bytes(content)
    before = everything_in(tmp_path)
    assert f"{folder}/" in refused(*action, *tiny(tmp_path))
    assert everything_in(tmp_path) == before


def test_a_checkpoint_of_another_script_is_refused_by_its_name(trained, tmp_path):
    written = load(the_run(trained) / "best")
    assert written["script"] == "snn_mlp_1.py"
    written["config"]["mnist_config"]["permuted"] = True
    path = tmp_path / "best"
    torch.save({**written, "script": "sequential_mnist.py"}, path)
    message = refused("--test", *tiny(trained, f"test_checkpoint_path={path}"))
    begin, _, end = message.partition(" (written by sequential_mnist.py): ")
    assert begin == f"the configuration of checkpoint {path}"
    assert "mnist_config.permuted" in end


@pytest.mark.parametrize("action", ["--test", "--resume"])
def test_a_checkpoint_whose_weights_are_not_finite_is_refused(trained, tmp_path, action):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    path = the_run(tmp_path) / ("best" if action == "--test" else "last")
    checkpoint = load(path)
    checkpoint["snn_state_dict"]["layers.4.weight"][0, 0] = math.nan
    torch.save(checkpoint, path)
    before = everything_in(tmp_path)
    arguments = ["--test"] if action == "--test" else ["--train", "--resume"]
    message = refused(*arguments, *tiny(tmp_path, "hyperparameters.epoch=1"))
    assert message == f"checkpoint {path} is of no use: layers.4.weight not finite"
    assert everything_in(tmp_path) == before


def test_a_checkpoint_of_another_model_is_refused(trained):
    message = refused("--test", f"runs_path={trained}/runs", EMPTY, model=snn_mlp_2.SNN)
    assert "belongs to another model" in message
    assert "size mismatch for layers.0.alpha" in message


# ---------------------------------------------------------------------------------------------
# Bad places


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = refused("--train", *tiny(tmp_path / "out", f"runs_path={tmp_path}/file/folder"))
    assert f"cannot write to {tmp_path}/file" in message
    assert message.endswith("set runs_path to a folder that can be written")
    assert not list(tmp_path.rglob("*.csv"))


def test_a_read_only_output_folder_is_refused(tmp_path, monkeypatch):
    def read_only(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    message = refused("--train", *tiny(tmp_path))
    assert f"cannot write to {tmp_path}/runs/snn_mlp_1" in message
    assert "Permission denied" in message
    assert not (tmp_path / "runs").exists()


def test_missing_and_corrupt_data_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    settings = [o for o in tiny(tmp_path) if not o.startswith("dataset_path")]
    empty = f"dataset_path={tmp_path}/none"
    assert "there is no MNIST under" in refused("--train", *settings, empty)
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"no archive")
    message = refused("--train", *settings, f"dataset_path={tmp_path}/data")
    assert "train-images-idx3-ubyte.gz is corrupt" in message
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------
# What works


def test_test_finds_the_checkpoint_of_the_run_and_prints_its_activity(trained):
    finished = run("--test", *tiny(trained, "hyperparameters.epoch=1"))
    assert finished.code == 0
    assert f"{the_run(trained)}/best, epoch 1: test loss" in finished.out
    assert (
        len(re.findall(r"layer layers\.\d: 0\.\d{4} spikes per neuron and step", finished.out)) == 3
    )
    assert "a dense network of this size takes 647,000 multiply-accumulates" in finished.out


def test_a_checkpoint_brings_its_settings_and_overrides_win(tmp_path):
    train(*tiny(tmp_path, "hyperparameters.train_bias=false", "hyperparameters.epoch=1"))
    overrides = [o for o in tiny(tmp_path) if not o.startswith(("hyper", "mnist"))]
    # A model with biases would not fit the checkpoint.
    assert run("--test", *overrides).code == 0
    message = refused("--test", *overrides, "hyperparameters.train_bias=true")
    assert 'Missing key(s) in state_dict: "layers.1.bias"' in message


def test_resume_without_a_checkpoint_can_be_followed_by_overrides(tmp_path):
    settings = [o for o in tiny(tmp_path, "scheduler.scheduler_choice=none") if "epoch" not in o]
    train("hyperparameters.epoch=1", *settings)
    finished = run("--train", *settings, "--resume", "hyperparameters.epoch=2")
    assert finished.code == 0, finished
    assert "epoch 2/2" in finished.out


def test_a_module_of_the_library_is_resumed_as_it_was_started(monkeypatch):
    """As a file, it would not find the library."""
    spec = importlib.util.find_spec("snn_lib.time_series")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    options = SimpleNamespace(config_file=None, overrides=["dataset=mine.npz"])
    command = _resume_command(Path(spec.origin), options, Path("runs/mine/last"), 1)
    assert command == (
        "python -m snn_lib.time_series --train --resume runs/mine/last dataset=mine.npz"
    )


def test_a_second_ctrl_c_stops_at_once_with_a_line(tmp_path, monkeypatch):
    def interrupted(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Experiment, "_train_batch", interrupted)
    finished = run("--train", *tiny(tmp_path))
    assert finished.code == 130
    assert finished.err == "snn_mlp_1.py: stopped at once\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("action", ["--train", "--test"])
def test_a_signal_before_the_first_batch_stops_at_once_with_a_line(
    trained, monkeypatch, action, number
):
    class Slow(DigitClassification):
        """Simulates its data, say, until a signal comes."""

        def make_split(self, split):
            os.kill(os.getpid(), number)
            return super().make_split(split)

    finished = run(action, *tiny(trained, "hyperparameters.epoch=1"), task=Slow())
    assert finished.code == 128 + number
    assert finished.err == "snn_mlp_1.py: stopped at once\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 10 bytes"),
    ],
)
def test_too_little_memory_is_told_with_what_to_change(tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(DigitClassification, "loss", full)
    finished = run("--train", *tiny(tmp_path))
    assert finished.code == 1
    assert finished.err.count("\n") == 1
    assert "out of memory; lower hyperparameters.batch_size" in finished.err


def test_an_error_of_the_code_keeps_its_traceback(tmp_path):
    class Wrong(nn.Module):
        def __init__(self, config):
            super().__init__()
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run("--train", *tiny(tmp_path), model=Wrong)
    assert not distributed.is_launched()


def test_bad_input_in_a_process_of_its_own(tmp_path):
    """As a user sees it: nothing but the line, and the exit code."""
    for arguments, line in [
        (("--train", "hyperparameters.lenght=3"), "did you mean 'hyperparameters.length'?"),
        (("--test", "test_checkpoint_path=nowhere"), "there is no file nowhere"),
    ]:
        finished = Process(tmp_path, *arguments).wait()
        assert (finished.code, finished.out) == (2, "")
        assert line in finished.err
        assert finished.err.count("\n") == 1
    finished = shell(sys.executable, SCRIPT, "--train", "--test", *TINY)
    assert (finished.code, finished.out) == (2, "")
    assert finished.err == "snn_mlp_1.py: choose one of --train, --test and --export (see --help)\n"


@pytest.mark.parametrize(
    ("key", "here"),
    [
        ("device", "cpu"),
        ("backend", "eager"),
        ("data_workers", 2),
        ("dataset_path", "here"),
        ("checkpoint_minutes", 3.0),
        ("runs_path", "here"),
        ("tensorboard", True),
    ],
)
def test_a_checkpoint_does_not_say_where_a_run_goes_on(key, here):
    config = DigitConfig(**{key: here})
    there = dataclasses.asdict(DigitConfig(device="cuda", seed=7))
    resumed = settings_of(Checkpoint({"config": there}, Path("x")), config, [])
    assert getattr(resumed, key) == here
    assert resumed.seed == 7


def test_a_run_is_named_as_its_script_where_no_yaml_file_says_otherwise(tmp_path):
    script = tmp_path / "mine.py"
    for text in (None, "seed: 3\n", "name: other\n"):
        if text is not None:
            script.with_suffix(".yaml").write_text(text)
        finished = run("--test", *TINY, "test_checkpoint_path=none", script=script)
        assert finished.err.startswith("mine.py: there is no file none, seen from ")
        help_text = run("--help", script=script).out
        assert ("name=other" if text == "name: other\n" else "name=mine ") in help_text
        assert ("their defaults" in help_text) is (text is None)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("hyperparameters.tau_m=8", "weights and coefficients are those of {path}"),
        ("hyperparameters.tau_s=2", "weights and coefficients are those of {path}"),
        ("hyperparameters.membrane_filter=true", "weights and coefficients are those of {path}"),
        ("first_weights={path}", "weights and coefficients are those of {path}"),
        ("hyperparameters.dropout=0.5", "which does not train"),
        ("hyperparameters.constraint=none", "which does not train"),
        ("hyperparameters.epoch=2", "which does not train"),
        ("mnist_config.use_transform=false", "which does not train"),
        ("optimizer.AdamW.weight_decay=0", "which does not train"),
    ],
)
def test_what_a_trained_network_does_not_read_is_refused(trained, override, why):
    settings = [f"dataset_path={SCRIPT.parent / 'dataset'}", f"runs_path={trained}/runs", EMPTY]
    for action, path in (("--test", "best"), ("--resume", "last")):
        path = the_run(trained) / path
        typed = override.format(path=path)
        if action == "--test" or "coefficients" in why:
            key, _, _ = typed.partition("=")
            message = refused(*(["--train"] * (action == "--resume")), action, *settings, typed)
            assert message.startswith(f"{key} has no effect with {action}")
            assert message.endswith(why.format(path=path))


def test_what_a_network_was_trained_with_may_be_typed_again(tmp_path):
    typed = tiny(tmp_path, "hyperparameters.tau_m=8.0", "hyperparameters.epoch=1", "name=mine")
    train(*typed)
    for action in (["--test"], ["--train", "--resume"]):
        assert run(*action, *typed).code == 0
    given = f"first_weights={the_run(tmp_path) / 'best'}"
    message = refused("--train", *typed, given)
    assert message == f"hyperparameters.tau_m has no effect with {given}"
    typed = tiny(tmp_path / "second", "hyperparameters.epoch=1", given)
    train(*typed)
    assert run("--train", "--resume", *typed).code == 0


def test_a_name_is_refused_where_it_does_not_choose_the_network(trained, tmp_path):
    best, there = the_run(trained) / "best", f"runs_path={trained}/runs"
    for action in (["--test"], ["--export", tmp_path / "network.onnx"]):
        why = f"test_checkpoint_path={best}: empty it, test_checkpoint_path='', to take the newest"
        message = refused(*action, "name=mine", f"test_checkpoint_path={best}")
        assert message == f"name has no effect with {why} run of a name"
        assert f"{trained}/runs/mine/*/best" in refused(*action, "name=mine", EMPTY, there)
    message = refused("--export", tmp_path / "network.onnx", EMPTY, there, "device=cpu", "seed=5")
    assert message.startswith("seed has no effect with --export, which writes the network of ")
    renamed = tmp_path / "renamed" / best.parent.name
    shutil.copytree(best.parent, renamed)
    few = "mnist_config.test_size=100", f"dataset_path={SCRIPT.parent / 'dataset'}"
    assert run("--test", "name=renamed", EMPTY, f"runs_path={tmp_path}", *few).code == 0
    assert everything_in(tmp_path).keys() == {renamed.parent, renamed, *renamed.iterdir()}


@pytest.mark.parametrize("which", ["best", "last"])
def test_the_folder_of_a_name_is_refused_with_a_run_in_it(trained, tmp_path, which):
    action = ["--test"] if which == "best" else ["--train", "--resume"]
    for folder, runs in (
        (trained / "runs/snn_mlp_1", f"such as {the_run(trained)}"),
        (tmp_path, f"that has a {which} checkpoint"),
    ):
        place = f"test_checkpoint_path={folder}" if which == "best" else folder
        message = refused(*action, place)
        assert message.startswith(
            f"there is no file {folder}/{which}: expected the folder of a run"
        )
        assert message.endswith(runs)


def test_a_setting_that_nothing_reads_is_refused_and_help_says_so(tmp_path):
    why = "has no effect with optimizer.optimizer_choice=AdamW"
    typed = tiny(tmp_path, "optimizer.SGD.momentum=0.5")
    assert refused("--train", *typed) == f"optimizer.SGD.momentum {why}"
    assert f"Options of SGD, as PyTorch names them. (this {why})" in run("--help", *typed).out

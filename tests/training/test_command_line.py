"""The command line: bad input gives one line and exit code 2, and leaves nothing half written."""

import dataclasses
import importlib.util
import math
import os
import re
import shlex
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from refusing import refusal
from running import (
    SCRIPT,
    TINY,
    SmallSNN,
    load,
    refused,
    run,
    run_script,
    shell,
    the_run,
    tiny,
    train,
)
from torch import nn

from snn_lib import Sequential, SpikingNeuron
from snn_lib.settings import Settings, list_settings, section, setting
from snn_lib.tasks.digits import DigitClassification, DigitConfig, DigitHyperparameters
from snn_lib.training import command_line, distributed
from snn_lib.training.checkpoints import Checkpoint
from snn_lib.training.command_line import (
    StopSignals,
    _explain,
    _resume_command,
    main,
    settings_of,
)
from snn_lib.training.config import load_config
from snn_lib.training.experiment import Experiment
from snn_lib.training.loading import arguments_of_main


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


CHOOSE = "choose one of --train, --test and --export (see --help)"
NO_EFFECT = "has no effect with optimizer.optimizer_choice=AdamW"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("", CHOOSE),
        ("--train --test", CHOOSE),
        ("seed=3", CHOOSE),
        ("--test --resume x", "--resume goes with --train"),
        ("--train --tset", "unrecognized arguments: --tset (see --help)"),
        ("--train -x", "unrecognized arguments: -x (see --help)"),
        ("--train --config_file", "--config_file: expected one argument (see --help)"),
        (
            "--export none/x.onnx",
            "none/x.onnx: expected the name of a file in a folder that exists",
        ),
        ("--export .", "--export .: expected the name of a file in a folder that exists"),
        ("--export network", "--export network: expected a name with the ending .onnx or .c"),
        ("--export network.C", "--export network.C: expected a name with the ending .onnx or .c"),
        ("--test", "there is no checkpoint"),
        ("--train --resume", "there is no checkpoint"),
        ("--train --resume name=mine", "/runs/mine/*/last: train mine first, or name a checkpoint"),
        ("--train name=other --resume name=mine", "/runs/mine/*/last: train mine first, or name a"),
        ("--tes", "unrecognized arguments: --tes"),
        ("--train --resume a=b", "unknown key 'a': --help lists"),
        ("--train --resume nowhere", "there is no file nowhere, seen from "),
        ("--train hyperparameters.droput=0.1", "did you mean 'hyperparameters.dropout'?"),
        ("--train hyperparameters.length=long", "could not be converted to Integer"),
        ("--train hyperparameters.tau_s=4", "and tau_s 4.0, expected 0 < tau_s < tau_m"),
        ("--train hyperparameters.dropout=1", "dropout is 1.0, expected at least 0 and below 1"),
        ("--train device=cuda:77", "device='cuda:77' is not available here, use device=cpu"),
        ("--train optimizer.AdamW.betas=[2,3]", "optimizer.AdamW"),
        ("--train optimizer.AdamW.eps=-1", "optimizer.AdamW"),
        (
            "--train --resume x test_checkpoint_path=x",
            "has no effect with --train, which tests",
        ),
        ("--train test_checkpoint_path=x", "has no effect with --train, which tests the network"),
        ("--train optimizer.SGD.momentum=0.5", f"optimizer.SGD.momentum {NO_EFFECT}"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, monkeypatch, typed, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*tiny(tmp_path), *typed.split())
    assert everything_in(tmp_path) == {}


@pytest.mark.parametrize("task", [DigitClassification, lambda config: None])
def test_main_wants_a_task_and_not_its_class(task):
    message = refusal(main, "script.py", lambda config: None, task)
    assert "expected a task: main(__file__, build_model, task)" in message


def test_help_begins_with_what_the_script_says_of_itself():
    said = run_script("snn_lib/time_series.py", "--help").out
    assert "\n\nThe network for time series, and the command that trains it:" in said
    assert (
        '\n    python -m snn_lib.time_series mine.npz        # trains; np.savez("mine.npz",' in said
    )


def test_help_explains_every_setting():
    finished = run("--help")
    assert finished.code == 0
    lines = finished.out.splitlines()
    for key, value in list_settings(DigitConfig()):
        if dataclasses.is_dataclass(value):
            continue
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


@dataclasses.dataclass
class Chosen(DigitConfig):
    size: "Literal[8, 16]" = setting(8, "of a kernel")


def test_help_names_choices_that_are_numbers_and_types_that_are_written_as_text():
    (line,) = (line for line in _explain(Chosen(), {}) if "size=8" in line and "kernel" in line)
    assert line.endswith("of a kernel (8, 16)")


def test_help_heads_settings_without_a_docstring_as_those_that_they_derive_from():
    @dataclasses.dataclass
    class Own(DigitHyperparameters):
        more: int = setting(3, "what is added")

    @dataclasses.dataclass
    class Blocks(Settings):
        depth: int = setting(2, "how many")

    @dataclasses.dataclass
    class OwnConfig(DigitConfig):
        hyperparameters: Own = section(Own)
        blocks: Blocks = section(Blocks)

    lines = list(_explain(OwnConfig(), {}))
    assert f"\n{DigitHyperparameters.__doc__.splitlines()[0]}" in lines
    assert "\nblocks" in lines
    assert not any("Own(" in line for line in lines)


def test_help_shows_values_of_the_file_and_of_overrides_and_what_has_no_effect(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("hyperparameters: {epoch: 77}\noptimizer: {optimizer_choice: AdamW}")
    said = run("--config_file", path, "--help", "hyperparameters.tau_m=9.5").out
    assert "the values from own.yaml and defaults" in said
    assert "  hyperparameters.epoch=77 " in said
    assert "  hyperparameters.tau_m=9.5 " in said
    assert f"Options of SGD, as PyTorch names them. (this {NO_EFFECT})" in said


@pytest.mark.parametrize("override", ["name=%s/", "device=%s", "%s=3"])
def test_a_message_about_thousands_of_characters_is_cut(tmp_path, override):
    line = refused("--train", *tiny(tmp_path, override % ("long" * 2000)))
    assert 900 < len(line) < 1100
    assert " ... " in line
    assert "longlong" in line.partition(" ... ")[0]


# ---------------------------------------------------------------------------------------------
# Bad checkpoints and places


@pytest.mark.parametrize("damage", ["truncated", "not finite"])
@pytest.mark.parametrize("action", ["--test", "--train --resume"])
def test_a_damaged_checkpoint_is_refused_and_stays_as_it_is(trained, tmp_path, damage, action):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    path = the_run(tmp_path) / ("best" if action == "--test" else "last")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        checkpoint = load(path)
        checkpoint["snn_state_dict"]["layers.4.weight"][0, 0] = math.nan
        torch.save(checkpoint, path)
    before = everything_in(tmp_path)
    message = refused(*action.split(), *tiny(tmp_path, "hyperparameters.epoch=1"))
    reason = " is of no use: layers.4.weight not finite" if damage == "not finite" else ""
    assert f"{path}{reason}" in message
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


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = refused("--train", *tiny(tmp_path / "out", f"runs_path={tmp_path}/file/folder"))
    assert f"cannot write to {tmp_path}/file" in message
    assert "Not a directory" in message
    assert message.endswith("set runs_path to a folder that can be written")
    assert not list(tmp_path.rglob("*.csv"))


# ---------------------------------------------------------------------------------------------
# What works


def test_a_run_is_tested_with_its_best_checkpoint_and_its_activity_printed(trained):
    finished = run("--test", *tiny(trained, "hyperparameters.epoch=1"))
    assert finished.code == 0
    assert f"{the_run(trained)}/best, epoch 1: test loss" in finished.out
    activity = re.findall(r"layer layers\.\d: 0\.\d{4} spikes per neuron and step", finished.out)
    assert len(activity) == 3
    assert "a dense network of this size takes 647,000 multiply-accumulates" in finished.out


def test_a_checkpoint_brings_its_settings_and_overrides_win(tmp_path):
    train(*tiny(tmp_path, "hyperparameters.train_bias=false", "hyperparameters.epoch=1"))
    overrides = [o for o in tiny(tmp_path) if not o.startswith(("hyper", "mnist"))]
    # A model with biases would not fit the checkpoint.
    assert run("--test", *overrides).code == 0
    message = refused("--test", *overrides, "hyperparameters.train_bias=true")
    assert 'Missing key(s) in state_dict: "layers.1.bias"' in message


def test_a_run_that_is_trained_to_its_end_takes_no_other_settings(trained):
    last = the_run(trained) / "last"
    before = everything_in(trained)
    settings = tiny(trained, "hyperparameters.epoch=1")
    message = refused("--train", "--resume", last, *settings, "hyperparameters.dropout=0.3")
    assert f"dropout has no effect with --resume {last}, which has been trained up" in message
    longer = trained / "longer"
    torch.save({**torch.load(last), "epoch": 2}, longer)
    message = refused("--train", "--resume", longer, *settings, "hyperparameters.dropout=0.3")
    assert "which has been trained up to epoch 2" in message
    longer.unlink()
    assert everything_in(trained) == before
    assert run("--train", "--resume", last, *settings).code == 0


def test_a_module_of_the_library_is_resumed_as_it_was_started(monkeypatch):
    """As a file, it would not find the library."""
    spec = importlib.util.find_spec("snn_lib.time_series")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    options = SimpleNamespace(config_file=None, overrides=["dataset=mine.npz"])
    command = _resume_command(Path(spec.origin), options, Path("runs/mine/last"), 1)
    assert command == (
        "python -m snn_lib.time_series --train --resume runs/mine/last dataset=mine.npz"
    )


def test_the_command_that_goes_on_names_the_file_of_the_settings():
    options = SimpleNamespace(config_file=Path("mine.yaml"), overrides=["seed=3"])
    command = _resume_command(Path("own.py"), options, Path("runs/own/last"), 1)
    words = "--train --resume runs/own/last --config_file mine.yaml seed=3"
    assert command == f"python own.py {words}"


def test_the_command_that_goes_on_finds_the_script_from_where_it_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = SimpleNamespace(config_file=None, overrides=[])
    command = _resume_command(tmp_path / "models" / "own.py", options, Path("runs/own/last"), 1)
    assert command == "python models/own.py --train --resume runs/own/last"


def test_a_second_ctrl_c_stops_at_once_with_a_line(tmp_path, monkeypatch):
    def interrupted(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Experiment, "_train_batch", interrupted)
    finished = run("--train", *tiny(tmp_path))
    assert finished.code == 130
    assert finished.err == "snn_mlp_1.py: stopped at once\n"


def test_after_a_run_signals_do_what_they_did_before(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run("--train", *tiny(tmp_path)).code == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_run_in_another_thread_is_refused_but_its_help_is_not(tmp_path):
    with ThreadPoolExecutor(1) as other:
        assert other.submit(run, "--help").result().code == 0
        refused = other.submit(run, "--train", *tiny(tmp_path)).result()
    assert refused.code == 2
    assert "as only Python's main thread can" in refused.err


def test_another_thread_may_learn_what_a_script_gives():
    with ThreadPoolExecutor(1) as other:
        build_model, _, _ = other.submit(arguments_of_main, SCRIPT).result()
    assert build_model.__name__ == "SNN"


@pytest.mark.parametrize("launched", [False, True])
def test_a_process_of_torchrun_promises_no_stop_at_a_second_signal(monkeypatch, capfd, launched):
    """It gets each signal twice."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    if launched:
        monkeypatch.setenv("RANK", "0")
    stop = StopSignals()
    stop.asked_after_a_batch()
    stop._receive(signal.SIGINT, None)
    with nullcontext() if launched else pytest.raises(KeyboardInterrupt):
        stop._receive(signal.SIGINT, None)
    assert ("once more stops at once" in capfd.readouterr().err) == (not launched)
    assert stop.asked_after_a_batch()


def test_a_run_stops_after_its_batch_though_nobody_reads_what_it_says(monkeypatch):
    """As with ``2>&1 | tee log``, where Ctrl-C ends tee as well."""

    def refuse(file, line):
        raise BrokenPipeError

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with StopSignals() as stop, monkeypatch.context() as broken:
        stop.asked_after_a_batch()
        broken.setattr(os, "write", refuse)
        stop._receive(signal.SIGINT, None)
    assert stop.asked_after_a_batch()


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
    assert "out of memory; set hyperparameters.chunk, or lower" in finished.err


def test_an_error_in_the_user_s_own_code_keeps_its_traceback(tmp_path):
    class Wrong(nn.Module):
        def __init__(self, config):
            super().__init__()
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run("--train", *tiny(tmp_path), model=Wrong)
    assert not distributed.is_launched()


def test_a_user_sees_nothing_but_the_line_and_the_exit_code():
    finished = shell(sys.executable, SCRIPT, "--train", "--test", *TINY)
    assert (finished.code, finished.out, finished.err) == (2, "", f"snn_mlp_1.py: {CHOOSE}\n")


def test_a_run_without_standard_output_goes_on(tmp_path):
    command = [sys.executable, str(SCRIPT), "--train", *tiny(tmp_path)]
    closed = shell("sh", "-c", f"{shlex.join(command)} >&-")
    assert (closed.code, closed.out, closed.err) == (0, "", "")


def test_a_resumed_run_takes_its_machine_from_here_and_the_rest_from_its_checkpoint():
    here = {"device": "cpu", "backend": "eager", "data_workers": 2, "dataset_path": "here"}
    here |= {"checkpoint_minutes": 3.0, "runs_path": "here", "tensorboard": True}
    there = dataclasses.asdict(DigitConfig(device="cuda", seed=7))
    resumed = settings_of(Checkpoint({"config": there}, Path("x")), DigitConfig(**here), [])
    assert resumed == DigitConfig(**here, seed=7)


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


@dataclasses.dataclass
class Sized(DigitConfig):
    @property
    def hidden(self):
        return 2 * self.hyperparameters.length


def test_a_network_is_exported_with_the_task_s_class_of_settings(tmp_path):
    def build_model(config):
        hidden = config.hidden  # which no checkpoint holds
        return Sequential(nn.Linear(784, hidden), SpikingNeuron(hidden, 4.0), nn.Linear(hidden, 10))

    options = {"model": build_model, "task": DigitClassification(config_class=Sized)}
    settings = tiny(tmp_path, "hyperparameters.epoch=1")
    train(*settings, **options)
    exported = run("--export", tmp_path / "own.c", *settings, **options)
    assert exported.code == 0, exported.err
    assert "#define OWN_OUTPUTS 10" in (tmp_path / "own.h").read_text()


def test_a_path_with_a_sign_of_equality_is_resumed(tmp_path):
    settings = tiny(tmp_path / "lr=0.01", "hyperparameters.epoch=1")
    train(*settings, model=SmallSNN)
    train("--resume", the_run(tmp_path / "lr=0.01") / "last", *settings, model=SmallSNN)


LOADED = ("tau_m=8", "tau_s=2", "membrane_filter=true")
OF_TRAINING = ("dropout=0.5", "constraint=none", "epoch=2")


@pytest.mark.parametrize(
    ("override", "loaded"),
    [
        *((f"hyperparameters.{override}", True) for override in LOADED),
        ("first_weights={path}", True),
        *((f"hyperparameters.{override}", False) for override in OF_TRAINING),
        ("mnist_config.use_transform=false", False),
        ("optimizer.AdamW.weight_decay=0", False),
    ],
)
def test_settings_that_a_trained_network_does_not_read_are_refused(trained, override, loaded):
    settings = [f"dataset_path={SCRIPT.parent / 'dataset'}", f"runs_path={trained}/runs", EMPTY]
    longer = "hyperparameters.epoch=2"
    for action, which in (("--test", "best"), (f"--train {longer} --resume", "last")):
        path = the_run(trained) / which
        typed = override.format(path=path)
        if action == "--test" or loaded:
            message = refused(*action.split(), *settings, typed)
            begin = f"{typed.partition('=')[0]} has no effect with {action.split()[-1]}"
            why = f"weights and coefficients are those of {path}"
            assert message.startswith(begin)
            assert message.endswith(why if loaded else "which does not train")


def test_settings_of_a_trained_network_may_be_typed_again(tmp_path):
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


def test_a_file_that_a_trained_network_differs_from_is_told(trained, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        f"base: {SCRIPT.with_suffix('.yaml')}\nmnist_config: {{test_size: 50}}\n"
        "hyperparameters: {weight_bits: 2, dropout: 0.5, length: 7}"
    )
    there = f"runs_path={trained}/runs", EMPTY, f"dataset_path={SCRIPT.parent / 'dataset'}"
    finished = run("--test", "--config_file", path, *there, "hyperparameters.length=7")
    first, *_ = finished.out.splitlines()
    best = the_run(trained) / "best"
    assert first.startswith(f"own.yaml differs from {best}, whose settings count: ")
    shown = first.partition("count: ")[2].split()
    assert shown == ["mnist_config.test_size=100", "hyperparameters.weight_bits=0"]
    assert "differs from" not in run("--test", *there).out
    written = run("--export", tmp_path / "m.onnx", "--config_file", path, *there)
    assert "hyperparameters.length=6" in written.out.splitlines()[0]
    copy = shutil.copytree(trained / "runs", tmp_path / "runs")
    resumed = run("--train", "--resume", f"runs_path={copy}", *there[1:])
    assert f"{SCRIPT.stem}.yaml differs from {copy}" in resumed.out


def test_one_of_several_processes_tells_that_a_file_differs(trained, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "StopSignals", lambda: 1 / 0)  # behind what is looked at
    there = ["--train", "--resume", f"runs_path={trained}/runs", f"dataset_path={trained}"]
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ZeroDivisionError):
            command_line._run(SCRIPT, None, SmallSNN, DigitClassification(), None, there)
        assert ("differs from" in capsys.readouterr().out) == (rank == "0")


def test_a_name_is_refused_where_it_does_not_choose_the_network(trained, tmp_path):
    best, there = the_run(trained) / "best", f"runs_path={trained}/runs"
    for action in (["--test"], ["--export", tmp_path / "network.onnx"]):
        why = f"test_checkpoint_path={best}: empty it, test_checkpoint_path=, to take the newest"
        message = refused(*action, "name=mine", f"test_checkpoint_path={best}")
        assert message == f"name has no effect with {why} run of a name"
        assert f"{trained}/runs/mine/*/best" in refused(*action, "name=mine", EMPTY, there)
    message = refused("--export", tmp_path / "network.onnx", EMPTY, there, "device=cpu", "seed=5")
    assert message.startswith("seed has no effect with --export, which writes the network of ")
    message = refused("--test", f"test_checkpoint_path={best}", "seed=5")
    assert message.startswith(f"seed has to be that of {best} with --test, since the parts of the")
    renamed = tmp_path / "renamed" / best.parent.name
    shutil.copytree(best.parent, renamed)
    few = "mnist_config.test_size=100", f"dataset_path={SCRIPT.parent / 'dataset'}"
    assert run("--test", "name=renamed", EMPTY, f"runs_path={tmp_path}", *few).code == 0
    assert everything_in(tmp_path).keys() == {renamed.parent, renamed, *renamed.iterdir()}


@pytest.mark.parametrize("which", ["best", "last"])
def test_the_folder_above_runs_is_refused_and_a_run_in_it_named(trained, tmp_path, which):
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

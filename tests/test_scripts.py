"""The real scripts, started as a user starts them, on real digits with tiny settings."""

import re
import shlex
import subprocess
import sys

import pytest
from running import ONE_THREAD, ROOT, assert_same_weights, metrics_of, shell, tiny


def accuracy(text):
    """The test accuracy that a script printed."""
    (found,) = re.findall(r"test loss [\d.]+, accuracy ([\d.]+) %", text)
    return found


@pytest.mark.parametrize(
    ("script", "overrides"),
    [
        ("snn_mlp_1.py", ()),
        (
            "snn_mlp_2.py",
            (
                "hyperparameters.encoding=poisson",
                "hyperparameters.precision=bfloat16",
                "hyperparameters.weight_averaging=0.9",
                "transform.elastic.alpha=1",
            ),
        ),
    ],
)
def test_a_script_trains_and_tests_to_the_same_accuracy(tmp_path, script, overrides):
    name = script.removesuffix(".py")
    best = f"test_checkpoint_path={tmp_path}/checkpoint/{name}_best"
    settings = [*tiny(tmp_path, "hyperparameters.epoch=3", *overrides), best]
    trained = shell(sys.executable, script, "--train", *settings)
    assert trained.code == 0, trained.err
    assert trained.err == ""
    assert len(metrics_of(tmp_path)) == 1 + 3
    tested = shell(sys.executable, script, "--test", *settings)
    assert tested.code == 0, tested.err
    assert accuracy(tested.out) == accuracy(trained.out)
    assert float(accuracy(tested.out)) > 15  # chance is 10


def test_a_script_that_is_stopped_goes_on_by_the_command_that_it_prints(tmp_path):
    command = [sys.executable, "snn_mlp_1.py", "--train"]
    overrides = ("hyperparameters.epoch=4", "hyperparameters.batch_size=16")
    halves, whole = (tiny(tmp_path / way, *overrides) for way in ("halves", "whole"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([*command, *halves], cwd=ROOT, env=ONE_THREAD, **pipes) as process:
        printed = ""
        while "epoch 1/4" not in printed:
            line = process.stdout.readline()
            assert line, printed
            printed += line
        process.terminate()
        printed += process.stdout.read()
    assert process.returncode == 143
    shown = printed.partition("continue with: python ")[2]
    resumed = shell(sys.executable, *shlex.split(shown))
    assert resumed.code == 0, resumed.err
    undisturbed = shell(*command, *whole)
    assert accuracy(undisturbed.out) == accuracy(resumed.out)
    last = "checkpoint/snn_mlp_1_last"
    assert_same_weights(tmp_path / "whole" / last, tmp_path / "halves" / last)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "halves")


@pytest.mark.parametrize("config", sorted(path.name for path in ROOT.glob("snn_mlp_*.yaml")))
def test_the_pretrained_model_of_each_config_file(config):
    script = config[: len("snn_mlp_1")] + ".py"
    few = "mnist_config.test_size=500"
    tested = shell(sys.executable, script, "--test", "--config_file", config, few)
    assert tested.code == 0, tested.err
    assert f"checkpoint/pretrained_{config.removesuffix('.yaml')}" in tested.out
    assert float(accuracy(tested.out)) > 97


def test_the_pretrained_model_of_time_series():
    pytest.importorskip("aeon")
    tested = shell(sys.executable, "time_series.py", "--test")
    assert tested.code == 0, tested.err
    assert "checkpoint/pretrained_time_series" in tested.out
    assert float(accuracy(tested.out)) > 95


def test_help(tmp_path):
    shown = shell(sys.executable, ROOT / "snn_mlp_2.py", "--help", cwd=tmp_path)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith("usage: python snn_mlp_2.py")
    assert "hyperparameters.tau_m=4.0 " in shown.out

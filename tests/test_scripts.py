"""The real scripts on real digits with tiny settings."""

import re
import shlex
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from recorded import qtdb_files, some_beats
from running import (
    ONE_THREAD,
    ROOT,
    YAML,
    accuracy,
    assert_same_weights,
    metrics_of,
    run_script,
    shell,
    the_run,
    tiny,
)

import ecg
import event_vision
import sequential_mnist
import snn_conv
import snn_mlp_1
import snn_mlp_2
from snn_lib import SpikingNeuron, fire_from_the_start
from snn_lib.inspection.operations import CountedNetwork
from snn_lib.tasks.digits import DigitConfig
from snn_lib.tasks.sequential_digits import SequentialConfig
from snn_lib.training.config import load_config
from snn_lib.training.loading import load


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
        (
            "snn_conv.py",
            (
                "hyperparameters.channels=[4,8,8]",
                "hyperparameters.hidden=32",
                "hyperparameters.batch_size=8",
            ),
        ),
    ],
)
def test_a_script_trains_and_tests_to_the_same_accuracy(tmp_path, script, overrides):
    settings = tiny(tmp_path, "hyperparameters.epoch=3", *overrides)
    # One as a user starts it, the others without the seconds that each start of Python takes.
    start = partial(shell, sys.executable) if script == "snn_mlp_1.py" else run_script
    trained = start(script, "--train", *settings)
    assert trained.code == 0, trained.err
    assert trained.err == ""
    assert len(metrics_of(tmp_path)) == 1 + 3
    tested = start(script, "--test", *settings)
    assert tested.code == 0, tested.err
    assert accuracy(tested) == accuracy(trained)
    assert accuracy(tested) > 15  # chance is 10


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
    assert accuracy(undisturbed) == accuracy(resumed)
    assert_same_weights(*(the_run(tmp_path / way) / "last" for way in ("whole", "halves")))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "halves")


@pytest.mark.parametrize(
    "config", [path.name for name, path in YAML.items() if name.startswith("snn_")]
)
def test_the_pretrained_model_of_each_config_file(config):
    script = re.match(r"snn_mlp_\d|snn_conv", config)[0] + ".py"
    few = "mnist_config.test_size=500", "hyperparameters.precision=float32"
    tested = run_script(script, "--test", "--config_file", config, *few)
    assert tested.code == 0, tested.err
    assert f"checkpoint/pretrained_{config.removesuffix('.yaml')}" in tested.out
    assert accuracy(tested) > 97


# Without the last of the four moments these would be 94.4 and 99.6 %.
@pytest.mark.parametrize(
    ("name", "least"), [("sequential_mnist", 97), ("sequential_mnist_in_order", 99.7)]
)
def test_the_pretrained_model_of_sequential_mnist(name, least):
    config, few = f"{name}.yaml", "mnist_config.test_size=250"
    quick = "hyperparameters.precision=float32"  # everywhere
    tested = run_script("sequential_mnist.py", "--test", "--config_file", config, few, quick)
    assert tested.code == 0, tested.err
    assert f"checkpoint/pretrained_{name}," in tested.out
    assert accuracy(tested) > least


def test_the_pretrained_model_of_time_series():
    pytest.importorskip("aeon")
    tested = run_script("time_series.py", "--test")
    assert tested.code == 0, tested.err
    assert "checkpoint/pretrained_time_series" in tested.out
    assert accuracy(tested) > 95


def test_the_pretrained_model_of_event_vision(tmp_path):
    (tmp_path / "MNIST").symlink_to(ROOT / "dataset" / "MNIST")
    few = "events.test_size=200", f"dataset_path={tmp_path}"
    tested = run_script("event_vision.py", "--test", *few)
    assert tested.code == 0, tested.err
    assert "checkpoint/pretrained_event_vision" in tested.out
    assert accuracy(tested) > 94


def test_event_vision_records_what_it_needs_trains_and_tests_to_the_same_accuracy(tmp_path):
    (tmp_path / "MNIST").symlink_to(ROOT / "dataset" / "MNIST")
    settings = [
        "hyperparameters.channels=[2,2,4]",
        "hyperparameters.batch_size=10",
        "hyperparameters.epoch=1",
        "events.training_size=150",
        "events.validation_size=50",
        "events.test_size=50",
        f"dataset_path={tmp_path}",
        f"runs_path={tmp_path}/runs",
        "test_checkpoint_path=''",
    ]
    trained = run_script("event_vision.py", "--train", *settings)
    assert (trained.code, trained.err) == (0, "")
    tested = run_script("event_vision.py", "--test", *settings)
    assert (tested.code, tested.err) == (0, "")
    assert accuracy(tested) == accuracy(trained)


def test_ecg_trains_and_tests_to_the_same_accuracy_both_ways_of_counting(tmp_path):
    x, labels = some_beats()
    qtdb_files(tmp_path / "qtdb", x, labels)
    settings = [
        "hyperparameters.neurons=[12]",
        "hyperparameters.epoch=2",
        f"dataset_path={tmp_path}/qtdb",
        f"runs_path={tmp_path}/runs",
        "test_checkpoint_path=''",
    ]
    trained = run_script("ecg.py", "--train", *settings)
    assert (trained.code, trained.err) == (0, "")
    for unlabelled in ("ignored", "first"):
        tested = run_script("ecg.py", "--test", *settings, f"unlabelled={unlabelled}")
        assert (tested.code, tested.err) == (0, "")
        network = load(the_run(tmp_path) / "best")
        answers = np.array(network.classify(x)[0])
        assert set(answers.flat) <= {"P", "PQ", "QR", "RS", "ST", "TP"}
        names = np.array(["P", "PQ", "QR", "RS", "ST", "TP", "P"])[labels]
        counted = (labels >= 0) | (unlabelled == "first")
        assert accuracy(tested) == pytest.approx(100 * (answers == names)[counted].mean(), abs=0.01)
        assert f"P: {100 * (answers == 'P')[counted & (names == 'P')].mean():.2f} %" in tested.out
        if unlabelled == "ignored":
            assert accuracy(tested) == accuracy(trained)


def test_ecg_trains_on_exchanged_leads_alone_beside_what_it_is_given(tmp_path):
    qtdb_files(tmp_path, *some_beats())
    usual, exchanged = (
        ecg.data(ecg.ECGConfig(name="leads", dataset_path=str(tmp_path), exchange_leads=exchange))
        for exchange in (False, True)
    )
    x, y = usual["train"]
    both, labels = exchanged["train"]
    left, right = x[..., :2], x[..., 2:]
    assert torch.equal(both, torch.cat([x, torch.cat([right, left], 2)]))
    assert torch.equal(labels, torch.cat([y, y]))
    for part in ("validation", "test"):
        assert all(map(torch.equal, exchanged[part], usual[part]))


def test_help(tmp_path):
    shown = shell(sys.executable, ROOT / "snn_mlp_2.py", "--help", cwd=tmp_path)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith("usage: python snn_mlp_2.py")
    assert "hyperparameters.tau_m=4.0 " in shown.out
    own = load_config(DigitConfig, ROOT / "snn_mlp_1.yaml", [])  # the base of snn_mlp_2.yaml
    assert f"hyperparameters.epoch={own.hyperparameters.epoch} " in shown.out


@pytest.mark.parametrize(
    ("build", "config", "steps", "features"),
    [
        (sequential_mnist.SNN, SequentialConfig(name="stream"), 784, (1,)),
        (snn_mlp_1.SNN, DigitConfig(name="stream"), 25, (784,)),
        (snn_conv.SNN, snn_conv.ConvConfig(name="stream"), 10, (784,)),
        (event_vision.SNN, event_vision.EventConvConfig(name="stream"), 12, (34, 34, 2)),
    ],
)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_network_that_sees_one_step_at_a_time_says_what_it_says_of_the_whole(
    build, config, steps, features, context
):
    torch.manual_seed(0)
    # In float64, where the products of one step and of all round alike but for 1e-16.
    model = build(config).double().eval()
    x = torch.rand(steps, 2, *features, dtype=torch.float64)
    spikes_of_a_layer = []
    neuron = next(m for m in model.layers if isinstance(m, SpikingNeuron))
    neuron.register_forward_hook(lambda *call: spikes_of_a_layer.append(call[-1].output))
    with context():
        whole, last = model(x)
        outputs, state = [], None
        for step in x.split(1):
            output, state = model(step, state)
            outputs.append(output)
    first, *others = spikes_of_a_layer
    assert 0 < first.mean() < 1
    assert torch.equal(torch.cat(others), first)
    torch.testing.assert_close(torch.cat(outputs), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("script", "task"),
    [
        (snn_mlp_1, DigitConfig),
        (snn_mlp_2, DigitConfig),
        (snn_conv, snn_conv.ConvConfig),
        (event_vision, event_vision.EventConvConfig),
    ],
)
def test_filters_stand_before_the_weights_or_behind_them(script, task):
    counts = {}
    for position in ("before", "behind"):
        torch.manual_seed(0)
        config = task(name=position)
        config.hyperparameters.filter_position = position
        model = script.SNN(config).eval()
        features = (34, 34, 2) if script is event_vision else (784,)
        x = (torch.rand(10, 2, *features) < 0.5).float()
        fire_from_the_start(model, x)
        counted = CountedNetwork(model)
        counted(x.byte() if script is event_vision else x)
        assert all(rate > 0 for rate in counted.activity.firing_rates().values())
        counts[position] = counted.operations()
    assert counts["before"].multiply_accumulates > counts["before"].additions == 0
    assert counts["behind"].additions > counts["behind"].multiply_accumulates == 0


def test_filters_of_the_convolutional_network_belong_to_maps_or_to_pixels():
    maps, pixels = (snn_conv.ConvConfig(name=filters) for filters in ("map", "pixel"))
    pixels.hyperparameters.filters = "pixel"
    shapes = [
        [
            tuple(synapse.shape)
            for synapse in snn_conv.SNN(config).layers
            if hasattr(synapse, "beta")
        ]
        for config in (maps, pixels)
    ]
    assert shapes[0] == [(1, 1, 1), (16, 1, 1), (32, 1, 1), (64, 1, 1), (256,)]
    assert shapes[1] == [(1, 28, 28), (16, 14, 14), (32, 7, 7), (64, 3, 3), (256,)]
    torch.manual_seed(0)
    one, other = (snn_conv.SNN(config).eval() for config in (maps, pixels))
    weights = {k: v for k, v in one.state_dict().items() if "alpha" not in k and "beta" not in k}
    other.load_state_dict(weights, strict=False)
    x = torch.rand(10, 2, 784)
    fired, _ = one(x)
    assert 0 < fired.mean() < 1  # from the start
    assert torch.equal(other(x)[0], fired)  # before training all pixels' filters are alike


def test_maps_of_the_convolutional_network_keep_their_channels_last():
    model = snn_conv.SNN(snn_conv.ConvConfig(name="layout"))
    maps = torch.rand(10, 2, 784).unflatten(2, (28, 28, 1)).movedim(-1, 2)
    outputs, _ = model.layers.layerwise(maps)
    assert [o.shape[2:] for o in outputs[:4]] == [(1, 28, 28), (16, 28, 28), *[(16, 14, 14)] * 2]
    for output in outputs[:13]:
        assert output.movedim(2, -1).is_contiguous()


def test_the_convolutional_network_adds_up_the_spikes_of_each_class_s_voters():
    torch.manual_seed(0)
    model = snn_conv.SNN(snn_conv.ConvConfig(name="votes")).eval()
    last = model.layers[-1]
    assert isinstance(last, SpikingNeuron)
    fired = []
    last.register_forward_hook(lambda *call: fired.append(call[-1][0]))
    votes, _ = model(torch.rand(10, 3, 784))
    assert votes.shape == (10, 3, 10)
    assert votes.max() > 1
    for number in range(10):
        assert torch.equal(
            votes[..., number], sum(fired[0][..., 10 * number + v] for v in range(10))
        )


@pytest.mark.parametrize("encoding", ["constant", "poisson"])
def test_config_files_of_the_convolutional_network(encoding):
    name = "snn_conv" if encoding == "constant" else f"snn_conv_{encoding}"
    config = load_config(snn_conv.ConvConfig, YAML[name], [])
    assert config.name == name
    assert config.hyperparameters.encoding == encoding

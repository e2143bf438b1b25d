"""The real scripts on real digits with tiny settings."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from recorded import qtdb_files, some_beats
from running import ROOT, YAML, accuracy, metrics_of, run_script, shell, the_run, tiny

import ecg
import event_vision
import sequential_mnist
import snn_conv
import snn_mlp_1
import snn_mlp_2
from snn_lib import LowPassSynapse, SpikingNeuron, fire_from_the_start
from snn_lib.data.ecg import hold_out
from snn_lib.inspection import plotting
from snn_lib.inspection.operations import CountedNetwork
from snn_lib.tasks import SequenceClassification
from snn_lib.tasks.digits import DigitConfig
from snn_lib.tasks.sequential_digits import SequentialConfig
from snn_lib.training.checkpoints import load_checkpoint
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
        ("snn_conv.py", ("hyperparameters.channels=[4,8,8]", "hyperparameters.batch_size=8")),
    ],
)
def test_a_script_trains_and_tests_to_the_same_accuracy(tmp_path, script, overrides):
    settings = tiny(tmp_path, "hyperparameters.epoch=3", *overrides)
    # One as a user starts it, the others without the seconds that each start of Python takes.
    start = partial(shell, sys.executable) if script == "snn_mlp_1.py" else run_script
    trained = start(script, "--train", *settings)
    assert (trained.code, trained.err) == (0, "")
    assert len(metrics_of(tmp_path)) == 1 + 3
    tested = run_script(script, "--test", *settings)
    assert accuracy(tested) == accuracy(trained)
    assert accuracy(tested) > 15  # chance is 10


DIGITS = [name for name in YAML if name.startswith("snn_")]
FEW = "mnist_config.test_size"


# Without the last of its four moments sequential_mnist would have 94.4 %, and 99.6 % in order.
@pytest.mark.parametrize(
    ("name", "few", "least"),
    [
        *((name, f"{FEW}=300", 97) for name in DIGITS),
        ("sequential_mnist", f"{FEW}=250", 97),
        ("sequential_mnist_in_order", f"{FEW}=250", 99.7),
        ("time_series", "device=cpu", 95),
        ("event_vision", "events.test_size=200", 94),
    ],
)
def test_the_pretrained_model_of_each_config_file_is_as_accurate_as_it_was(
    tmp_path, name, few, least
):
    if name == "time_series":
        pytest.importorskip("aeon")
    script = load_checkpoint(ROOT / "checkpoint" / f"pretrained_{name}")["script"]
    (tmp_path / "MNIST").symlink_to(ROOT / "dataset" / "MNIST")
    settings = "hyperparameters.precision=float32", few, f"dataset_path={tmp_path}"
    config_file = "--config_file", f"{name}.yaml"
    tested = run_script(script, "--test", *config_file, *settings)
    assert f"checkpoint/pretrained_{name}," in tested.out
    assert accuracy(tested) > least


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
    for unlabelled in ("ignored", "first"):
        tested = run_script("ecg.py", "--test", *settings, f"unlabelled={unlabelled}")
        network = load(the_run(tmp_path) / "best")
        answers = np.array(network.classify(x)[0])
        assert set(answers.flat) <= {"P", "PQ", "QR", "RS", "ST", "TP"}
        names = np.array(["P", "PQ", "QR", "RS", "ST", "TP", "P"])[labels]
        counted = (labels >= 0) | (unlabelled == "first")
        assert accuracy(tested) == pytest.approx(100 * (answers == names)[counted].mean(), abs=0.01)
        assert f"P: {100 * (answers == 'P')[counted & (names == 'P')].mean():.2f} %" in tested.out
        if unlabelled == "ignored":
            assert accuracy(tested) == accuracy(trained)


def test_the_first_weights_of_ecg_are_those_of_the_sequences_own_steps():
    config = ecg.ECGConfig(name="rates")
    config.augmentation.stretch, config.hyperparameters.batch_size = 2.0, 16
    x, y = torch.randint(-1, 2, (40, 200, 4)).float(), torch.randint(6, (40, 200))
    task = SequenceClassification({"train": (x, y)}, None, config_class=ecg.ECGConfig)
    task.setup(config, torch.device("cpu"))
    model = ecg.SNN(config).eval()
    ecg.initialise(model, task)
    batch = next(task.batches("train"))
    assert batch.lengths.min() < 0.8 * len(batch.x)  # much of it is padding
    outputs, _ = model.layerwise(batch.x, lengths=batch.lengths)
    for layer, output in zip(model, outputs, strict=True):
        if isinstance(layer, SpikingNeuron):
            own = [output[:n, number] for number, n in enumerate(batch.lengths)]
            assert torch.cat(own).mean().item() == pytest.approx(0.1, rel=0.05)


def test_the_traces_of_spikes_in_ecg_begin_with_unit_energy():
    """So that a slow trace is no louder than a fast one."""
    traces = [one for one in ecg.SNN(ecg.ECGConfig(name="t")) if isinstance(one, LowPassSynapse)]
    assert len(traces) == 2
    for trace in traces:
        response = plotting.impulse_response(trace, 1000)
        np.testing.assert_allclose(np.square(response).sum(0), 1, rtol=1e-3)


def test_ecg_learns_of_the_training_file_and_holds_out_recordings_by_the_seed(tmp_path):
    x, labels = some_beats(count=60)
    unknown, waves = some_beats(count=20, seed=1)
    qtdb_files(tmp_path / "test", unknown, waves)
    qtdb_files(tmp_path, x, labels)
    (tmp_path / "test" / "QTDB_test.mat").replace(tmp_path / "QTDB_test.mat")
    held_out = {}
    for seed in (3, 4):
        parts = ecg.data(ecg.ECGConfig(name="parts", dataset_path=str(tmp_path), seed=seed))
        (train, _), (validation, names) = parts["train"], parts["validation"]
        expected = hold_out(torch.from_numpy(labels), 0.1, seed)
        assert torch.equal(train, torch.from_numpy(x).float()[~expected])
        assert torch.equal(validation, torch.from_numpy(x).float()[expected])
        assert torch.equal(names, torch.from_numpy(labels)[expected])
        assert torch.equal(parts["test"][0], torch.from_numpy(unknown).float())
        held_out[seed] = validation
    assert not torch.equal(held_out[3], held_out[4])


def test_ecg_adds_sequences_with_exchanged_leads_to_the_training_data_alone(tmp_path):
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
def test_a_script_s_network_says_step_by_step_what_it_says_of_the_whole(
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
        [tuple(layer.shape) for layer in snn_conv.SNN(config).layers if hasattr(layer, "beta")]
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


def test_filters_of_pixels_may_stand_behind_the_weights():
    config = snn_conv.ConvConfig(name="behind")
    config.hyperparameters.filters, config.hyperparameters.filter_position = "pixel", "behind"
    model = snn_conv.SNN(config).eval()
    shapes = [tuple(layer.shape) for layer in model.layers if hasattr(layer, "beta")]
    assert shapes == [(16, 14, 14), (32, 7, 7), (64, 3, 3), (256,), (100,)]
    assert model(torch.rand(2, 1, 784))[0].shape == (2, 1, 10)


def test_feature_maps_of_the_convolutional_network_keep_their_channels_last():
    model = snn_conv.SNN(snn_conv.ConvConfig(name="layout"))
    maps = torch.rand(10, 2, 784).unflatten(2, (28, 28, 1)).movedim(-1, 2)
    outputs, _ = model.layers.layerwise(maps)
    assert [o.shape[2:] for o in outputs[:4]] == [(1, 28, 28), (16, 28, 28), *[(16, 14, 14)] * 2]
    for output in outputs[:13]:
        assert output.movedim(2, -1).is_contiguous()


def test_a_class_of_the_convolutional_network_has_the_spikes_of_its_voters():
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
        own = fired[0][..., 10 * number : 10 * (number + 1)]
        assert torch.equal(votes[..., number], own.sum(-1))

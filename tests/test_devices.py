"""Everything on a device that is not the CPU, which is only claimed: nothing mixes the two.

Whole runs train, stop, resume and test there as a user starts them.
"""

import dataclasses
import functools
import itertools
import signal
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from claimed_device import ClaimedDevice
from recorded import nmnist_files
from running import ROOT, SmallSNN, assert_same_weights, load, run, the_run, tiny
from small_networks import Integrator, in_parts
from torch import nn

import event_vision
import time_series
from snn_lib import (
    Delay,
    DualExponentialSynapse,
    FastSigmoid,
    IIRSynapse,
    LowPassSynapse,
    PerStep,
    Recurrent,
    Sequential,
    SpikingNeuron,
    answer_from_the_start,
    encoding,
    fire_from_the_start,
    snn_layers,
)
from snn_lib.inference import compiled, quantise
from snn_lib.inspection import plotting
from snn_lib.inspection.activity import count_activity
from snn_lib.inspection.monitor import Monitor
from snn_lib.inspection.operations import CountedNetwork
from snn_lib.penalties import rate_penalty
from snn_lib.readout import Snapshots
from snn_lib.tasks import (
    ClassificationConfig,
    SequenceClassification,
    SequenceRegression,
    digits,
)
from snn_lib.tasks.association import Association
from snn_lib.tasks.base import read_sums
from snn_lib.tasks.digits import DigitClassification
from snn_lib.tasks.event_vision import EventVision
from snn_lib.tasks.time_series import TimeSeries, TimeSeriesConfig
from snn_lib.training import Experiment
from snn_lib.training.distributed import total
from snn_lib.training.state import rng_state, set_rng_state

CUDA = torch.device("cuda")
TRAINS = 12


@pytest.fixture
def claimed():
    with ClaimedDevice() as device:
        yield device


def is_there(value):
    """Whether every tensor of a nested tuple is on the device."""
    if isinstance(value, torch.Tensor):
        return value.device.type == "cuda"
    return all(map(is_there, value))


# ---------------------------------------------------------------------------------------------
# Layers


def network():
    return Sequential(
        DualExponentialSynapse(6, 4.0, 1.0, constraint="stable"),
        nn.Linear(6, 5),
        SpikingNeuron(5, 4.0, dropout=0.3, surrogate=FastSigmoid()),
        LowPassSynapse(5, 3.0, constraint="stable"),
        nn.Linear(5, 4),
        SpikingNeuron(4, 3.0, membrane_filter=True),
        IIRSynapse(4, (1.2, -0.5, 0.1), (1.0, 0.3), constraint="stable"),
        Snapshots([4, 8]),
    )


def test_layers_run_in_chunks_and_learn_on_the_device(claimed):
    model = network().to(CUDA)
    x = torch.rand(8, 2, 6, device=CUDA)
    claimed.waits.clear()
    output, state = in_parts(model, x, [5, 3])
    output.square().mean().backward()
    for synapse in (model[0], model[3]):
        synapse.project_()
    assert not claimed.waits
    assert is_there((output, tuple(part for part in state if part is not None)))
    assert is_there([parameter.grad for parameter in model.parameters()])
    with torch.no_grad():
        model[6].alpha *= 2
    model[6].project_()
    assert model[6].pole_radius() < 1


@pytest.mark.usefixtures("claimed")
@pytest.mark.parametrize(
    ("weights", "shape"),
    [(lambda: nn.Linear(4, 4), (4,)), (lambda: PerStep(nn.Conv2d(2, 2, 3, padding=1)), (2, 1, 1))],
    ids=["rows", "maps"],
)
def test_recurrent_layers_and_cells_without_coefficients_run_on_the_device(weights, shape):
    recurrent = Recurrent(weights(), SpikingNeuron(shape, 4.0), LowPassSynapse(shape, 3.0))
    model = Sequential(recurrent, Integrator(shape)).to(CUDA)
    x = 2 * torch.rand(8, 2, *shape[:1], *(3 for _ in shape[1:]), device=CUDA)
    output, state = model(x, lengths=torch.tensor([8, 5]))
    again, state = model(x, state)
    assert is_there((output, again, *state[1], state[0][0], *state[0][1], *state[0][2]))
    again.square().mean().backward()
    assert is_there([parameter.grad for parameter in model.parameters()])


@pytest.mark.usefixtures("claimed")
def test_the_layers_of_2020_run_on_the_device():
    chain = [
        snn_layers.dual_exp_iir_layer((6,), 8, 2, 4, 1, True),
        snn_layers.neuron_layer(6, 6, 8, 2, 4, True, True),
        snn_layers.first_order_low_pass_layer((6,), 8, 2, 4, True),
        snn_layers.neuron_layer_dot_product(6, 6, 8, 2, 4, True, False),
        snn_layers.axon_layer((6,), 8, 2, 4, 1, True, True),
        snn_layers.snn_layer(6, 6, 8, 2, 4, 1, True, True),
        snn_layers.synapse_layer(6, 5, 8, 2, 4, 1, True, True),
        snn_layers.neuron_layer(6, 5, 8, 2, 4, False, False, input_type="synapse"),
    ]
    x = torch.rand(2, 6, 8, device=CUDA)
    for layer in map(torch.nn.Module.cuda, chain):
        start = layer.create_init_states()
        fresh = layer(x)[0]
        x, states = layer(x, start)
        assert is_there((x, states, start))
        assert torch.equal(fresh, x)
    for layer in (
        snn_layers.filter_layer(5, 8, 2, 4, 1, device="cuda"),
        snn_layers.exponential_filter_layer(5, 8, 2, 0.3, device="cuda"),
        snn_layers.threshold_layer(0.4),
    ):
        x = layer(x)
        assert is_there(x)
    x.sum().backward()
    assert all(is_there(p.grad) for p in chain[0].parameters() if p.grad is not None)

    convolution = snn_layers.conv2d_layer(
        6, 6, 1, 2, 3, 1, 0, 1, 8, 2, tau_m=4, train_bias=True, membrane_filter=False
    ).cuda()
    monitor = snn_layers.SNN_Monitor(convolution)
    spikes, _ = convolution(torch.rand(2, 1, 6, 6, 8, device=CUDA))
    assert is_there(spikes)
    np.testing.assert_array_equal(monitor.record["spike"][0], spikes.detach().cpu().numpy())


def test_poisson_spikes_are_drawn_on_the_device(claimed):
    spikes = encoding.poisson(torch.full((2, 3), 0.5, device=CUDA), 10)
    assert is_there(spikes)
    assert not claimed.waits
    rates = torch.rand(2, 3)
    drawn = encoding.poisson(rates.to(CUDA), 10, torch.Generator().manual_seed(1))
    assert is_there(drawn)
    assert torch.equal(
        drawn.cpu(), encoding.poisson(rates, 10, torch.Generator().manual_seed(1))
    )  # a generator of the CPU gives the same spikes on every device


# ---------------------------------------------------------------------------------------------
# Inspection


@pytest.mark.usefixtures("claimed")
def test_a_network_on_the_device_is_recorded_counted_and_drawn():
    plt.switch_backend("Agg")
    model = network().to(CUDA).eval()
    x = (torch.rand(9, 2, 6, device=CUDA) < 0.5).float()
    counted = CountedNetwork(model)
    with Monitor(model) as monitor, count_activity(model) as activity:
        counted(x)
    assert is_there((monitor["0"].psp, monitor["2"].membrane))
    activity.sum_by(total)
    assert activity.spike_counts["2"] == monitor["2"].spikes.sum().item()
    assert is_there(counted.per_step)
    assert counted.synaptic_operations() > 0
    assert 0 <= activity.firing_rates()["2"] <= 1
    record = monitor["2"]
    spikes, membrane, reset = (t[:, 0] for t in (record.spikes, record.membrane, record.reset))
    plotting.membranes(spikes, membrane, reset, [0, 1])
    plotting.reconstructions(x, x, x, ["a", "b"])
    plotting.synapse_layers([model[0]], [DualExponentialSynapse(6, 4.0, 1.0)], ["first"])
    plt.close("all")


@pytest.mark.usefixtures("claimed")
def test_sums_of_all_dtypes_are_read_from_the_device():
    sums = {
        "images": 3,
        "spikes": torch.tensor(2**40 + 1, device=CUDA),
        "loss": torch.tensor(0.1, device=CUDA),
        "rate": 0.5,
        "exact": torch.tensor(0.1, dtype=torch.float64, device=CUDA),
        "hits": torch.tensor(True, device=CUDA),
    }
    expected = {
        "images": 3.0,
        "spikes": float(2**40 + 1),
        "loss": float(np.float32(0.1)),
        "rate": 0.5,
        "exact": 0.1,
        "hits": 1.0,
    }
    assert read_sums(sums) == expected
    on_the_cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in sums.items()}
    assert read_sums(on_the_cpu) == expected
    assert read_sums({"images": 3}) == {"images": 3.0}


# ---------------------------------------------------------------------------------------------
# Data


@pytest.mark.usefixtures("claimed")
@pytest.mark.parametrize("chosen", ["constant", "poisson"])
def test_batches_of_digits_on_the_device_are_those_of_the_cpu(chosen):
    config = digits.DigitConfig(dataset_path=str(ROOT / "dataset"))
    config.hyperparameters.encoding, config.hyperparameters.length = chosen, 4
    here, there = DigitClassification(), DigitClassification()
    here.setup(config, torch.device("cpu"))
    there.setup(config, CUDA)
    batches = there.batches("train", 0, 1)
    for expected in itertools.islice(here.batches("train", 0, 1), 3):
        x, labels, _ = next(batches)
        assert is_there((x, labels))
        assert torch.equal(x.cpu(), expected[0])
        assert torch.equal(labels.cpu(), expected[1])
        assert (x.stride(0) == 0) == (chosen == "constant")  # the images alone have travelled


# ---------------------------------------------------------------------------------------------
# MPS, which has no float64


def test_poles_and_sums_need_no_float64_of_mps():
    with ClaimedDevice("mps"):
        model = network().to("mps")
        assert 0 < model[0].pole_radius() < 1
        model[6].project_()
        assert read_sums({"n": torch.tensor(2.0, device="mps"), "m": 1}) == {"n": 2.0, "m": 1.0}


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_first_weights_are_found_on_the_device(kind):
    model, x = network().append(torch.nn.Linear(2, 3)), torch.rand(8, 5, 6)
    with ClaimedDevice(kind):
        model, there = model.to(kind), x.to(kind)
        rates = fire_from_the_start(model, there, 0.2)
        y, lengths = torch.tensor([0, 1, 2, 0, 1]).to(kind), torch.tensor([8, 5, 8, 3, 8]).to(kind)
        answer_from_the_start(model, model[-1], [(there, y, lengths)])
        penalty = rate_penalty(model[:3](there)[0], 0.1, 0.3, lengths)
        assert {penalty.device.type, model[-1].weight.device.type} == {kind}
        model = model.cpu()
    assert rates.keys() == {"2", "5"}
    assert model.eval()[:3](x)[0].mean().item() == pytest.approx(rates["2"])


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_state_of_the_devices_random_numbers_comes_back(kind):
    with ClaimedDevice(kind):
        device = torch.device(kind)
        state = rng_state(device)
        assert state.keys() == {"cpu", kind}
        drawn = torch.rand(3).tolist(), torch.rand(3, device=device).tolist()
        set_rng_state(state, device)
        assert (torch.rand(3).tolist(), torch.rand(3, device=device).tolist()) == drawn


# ---------------------------------------------------------------------------------------------
# Whole runs


class Memory(nn.Module):
    """Patterns of a few trains to themselves."""

    def __init__(self, config):
        super().__init__()
        self.layers = Sequential(
            DualExponentialSynapse(TRAINS, 8.0, 2.0, constraint=config.hyperparameters.constraint),
            nn.Linear(TRAINS, TRAINS),
            SpikingNeuron(TRAINS, 8.0, dropout=0.1),
        )

    def forward(self, x, state=None):
        return self.layers(x, state)


def digit_settings(folder, *overrides):
    return tiny(
        folder,
        "mnist_config.training_size=96",
        "mnist_config.validation_size=40",
        "mnist_config.test_size=40",
        "hyperparameters.batch_size=32",
        "hyperparameters.length=5",
        "hyperparameters.dropout=0.1",
        *overrides,
    )


def memory_settings(folder, *overrides):
    patterns = folder / "patterns.npy"
    np.save(patterns, np.random.default_rng(0).random((3, TRAINS, 10)) < 0.2)
    return [
        f"dataset_path={patterns}",
        "hyperparameters.length=10",
        "hyperparameters.epoch=2",
        "hyperparameters.batch_size=4",
        "pattern_config.training_samples=4",
        "pattern_config.validation_samples=2",
        "pattern_config.test_samples=2",
        "damage.block_size=3",
        "damage.rows_removed=3",
        "hyperparameters.delay=4",
        "test_checkpoint_path=''",
        f"runs_path={folder}/runs",
        *overrides,
    ]


DIGITS = DigitClassification, SmallSNN, digit_settings, ROOT / "snn_mlp_1.py"
MEMORY = Association, Memory, memory_settings, ROOT / "associative_memory.py"


@pytest.fixture(scope="module", autouse=True)
def _small_data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "load_mnist", functools.cache(digits.load_mnist))
        yield


def on_the_device(experiment, action, folder, *overrides, training_step=None):
    """Runs an experiment's script on the device that ``auto`` finds; returns what waited for it.

    ``training_step`` is called at each of them.
    """
    task, model, settings, script = experiment
    Path(folder).mkdir(exist_ok=True)

    class Watched(task):
        def loss(self, model, batch):
            if model.training and training_step is not None:
                training_step()
            return super().loss(model, batch)

    common = "hyperparameters.weight_averaging=0.9", "optimizer.gradient_clipping=1", "device=auto"
    arguments = settings(folder, *common, *overrides)
    finished = run(*action, *arguments, model=model, task=Watched(), script=script)
    assert "on cuda, batches of" in finished.out, finished
    return finished


@pytest.mark.parametrize(
    ("experiment", "overrides"),
    [
        (DIGITS, ["hyperparameters.precision=float32"]),
        (DIGITS, ["hyperparameters.precision=bfloat16", "hyperparameters.encoding=poisson"]),
        (MEMORY, ["hyperparameters.precision=bfloat16"]),
    ],
)
@pytest.mark.usefixtures("claimed")
def test_a_run_that_is_stopped_and_resumed_ends_as_an_unbroken_one(tmp_path, experiment, overrides):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finished = on_the_device(experiment, ["--train"], whole, *overrides)
    assert (finished.code, finished.err) == (0, "")

    steps = []

    def stop_in_the_second_epoch():
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)

    interrupt = {"training_step": stop_in_the_second_epoch}
    stopped = on_the_device(experiment, ["--train"], parts, *overrides, **interrupt)
    assert stopped.code == 130
    assert load(the_run(parts) / "last")["progress"]["batch"] == 2
    resumed = on_the_device(experiment, ["--train", "--resume"], parts, *overrides)
    assert (resumed.code, resumed.err) == (0, "")
    for which in ("last", "best"):
        assert_same_weights(*(the_run(folder) / which for folder in (whole, parts)))

    tested = on_the_device(experiment, ["--test"], parts, *overrides)
    assert (tested.code, tested.err) == (0, "")
    of_training = finished.out.partition("; test ")[2].splitlines()[0]
    assert f": test {of_training}\n" in tested.out


@pytest.fixture(scope="module", params=[DIGITS, MEMORY], ids=["digits", "memory"])
def waits_of_a_step(request, tmp_path_factory):
    """What a training step waits for, by line, when the first ones are over."""
    seen = []
    with ClaimedDevice() as claimed:
        finished = on_the_device(
            request.param,
            ["--train"],
            tmp_path_factory.mktemp("waits"),
            "hyperparameters.epoch=1",
            training_step=lambda: seen.append(Counter(claimed.waits)),
        )
    assert finished.code == 0, finished.err
    return seen[-1] - seen[-2]


def test_data_model_and_task_never_wait_for_the_device(waits_of_a_step):
    assert not [line for line, _ in waits_of_a_step if not line.startswith("snn_lib/training/")]


def test_a_training_step_never_waits_for_the_device(waits_of_a_step):
    assert not waits_of_a_step


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_lengths_may_lie_on_the_cpu(kind):
    model, x = Sequential(LowPassSynapse(3, 4.0), Delay(3, 1.0, 2)), torch.rand(6, 2, 3)
    lengths = torch.tensor([6, 2])
    _, expected = model(x, lengths=lengths)
    with ClaimedDevice(kind):
        _, found = model.to(kind)(x.to(kind), lengths=lengths)
        found = [part.cpu() for part in (*found[0], *found[1])]
    torch.testing.assert_close(found, [*expected[0], *expected[1]])


def learned_on_both(build_model, task_of, config, initialise=None):
    """The metrics on the test data after a run on the CPU, and after one on the device."""
    for device in ("cpu", "cuda"):
        with ClaimedDevice():
            there = dataclasses.replace(config, device=device)
            trial = Experiment(build_model, task_of(), there, initialise)
            trial.train()
            yield trial.test()


@pytest.mark.parametrize("encoding", ["current", "population", "delta"])
def test_series_are_learned_on_the_device_as_on_the_cpu(encoding, tmp_path):
    generator = np.random.default_rng(0)
    parts = {"x": generator.normal(size=(24, 12, 2)).cumsum(1), "y": np.arange(24) % 3}
    parts["lengths"] = generator.integers(6, 13, 24)
    parts |= {f"{name}_test": values for name, values in parts.items()}
    np.savez(tmp_path / "mine.npz", **parts)
    config = TimeSeriesConfig(dataset=str(tmp_path / "mine.npz"), runs_path=str(tmp_path))
    options = config.hyperparameters
    options.encoding, options.neurons, options.epoch = encoding, 16, 1
    script = time_series.build_model, TimeSeries, config, time_series.initialise
    here, there = learned_on_both(*script)
    assert there == pytest.approx(here, rel=1e-3)


class Shifted(nn.Module):
    """A readout that has a tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.ones(2))

    def forward(self, output, lengths=None):
        return output[0] + self.shift


@pytest.mark.parametrize("readout", ["mean", "leaky", None, Shifted()])
@pytest.mark.parametrize("kind", [SequenceClassification, SequenceRegression])
def test_sequences_are_learned_on_the_device_as_on_the_cpu(kind, readout, tmp_path):
    x = [torch.rand(steps, 3) for steps in (6, 4, 5) * 7]
    y = [one[:, :2] for one in x]
    if kind is SequenceClassification:
        y = [(one[:, 0] > 0.5).long() for one in x]
    data = {"train": (x, y if readout is None else [one[0] for one in y])}
    config = ClassificationConfig(runs_path=str(tmp_path))
    config.hyperparameters.epoch, config.hyperparameters.batch_size = 1, 8

    def build_model(config):
        return Sequential(LowPassSynapse(3, 4.0), nn.Linear(3, 2))

    parts = {**data, "test": data["train"]}
    here, there = learned_on_both(build_model, lambda: kind(parts, readout), config)
    assert there == pytest.approx(here, rel=1e-3)


def test_recordings_are_learned_on_the_device_as_on_the_cpu(tmp_path):
    files = str(nmnist_files(tmp_path / "mine"))
    config = event_vision.EventConvConfig(dataset="nmnist", runs_path=str(tmp_path))
    config.events.path, config.events.validation_size = files, 4
    options = config.hyperparameters
    options.length, options.epoch, options.batch_size = 3, 1, 8
    options.channels, options.hidden = [4, 4, 8], 16
    task = functools.partial(EventVision, event_vision.EventConvConfig)
    here, there = learned_on_both(event_vision.SNN, task, config, event_vision.initialise)
    assert there == pytest.approx(here, rel=1e-3)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_network_on_a_device_leaves_pytorch_as_one_of_the_cpu(kind):
    model, x = Sequential(nn.Linear(3, 4), LowPassSynapse(4, 4.0)), torch.rand(6, 2, 3)
    expected = compiled(model).run(x[:, 0].numpy())
    made = quantise(model, x)
    exact = made.run(made.integers(x.numpy()))
    with ClaimedDevice(kind):
        model.to(kind)
        np.testing.assert_array_equal(compiled(model).run(x[:, 0].numpy()), expected)
        made = quantise(model, x.to(kind))
        np.testing.assert_array_equal(made.run(made.integers(x.numpy())), exact)
        assert model[0].weight.device.type == kind

"""The training loop: the same numbers again, and on from anywhere; trouble is told, not hidden."""

import copy
import csv
import dataclasses
import functools
import inspect
import itertools
import math
import shutil
import time
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from refusing import refusal
from running import (
    SCRIPT,
    SmallSNN,
    assert_same_weights,
    experiment,
    load,
    metrics_of,
    refused,
    run,
    stopped,
    the_run,
    tiny,
    train,
)
from torch import nn
from torch.nn.utils import prune

import snn_mlp_1
from snn_lib import DualExponentialSynapse, PerStep, Sequential, SpikingNeuron
from snn_lib.data.batches import Batch
from snn_lib.errors import InputError, RunError, SettingsError
from snn_lib.kernels import choose_backend, eager
from snn_lib.penalties import collect_spikes, rate_penalty
from snn_lib.readout import SpikeCount
from snn_lib.tasks import SequenceClassification, digits
from snn_lib.tasks.digits import DigitClassification, DigitConfig
from snn_lib.training import distributed
from snn_lib.training.building import build, choose_device
from snn_lib.training.checkpoints import load_checkpoint
from snn_lib.training.config import load_config
from snn_lib.training.diagnosis import synapses
from snn_lib.training.experiment import Experiment, Stopped
from snn_lib.training.loading import trained_network
from snn_lib.training.run_folder import RunFolder
from snn_lib.training.state import MovingAverage, TrainingState


@pytest.fixture(scope="module", autouse=True)
def _read_mnist_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "load_mnist", functools.cache(digits.load_mnist))
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


AVERAGING = "hyperparameters.weight_averaging=0.9"
BITS = "hyperparameters.weight_bits=2"


def small(folder, *overrides):
    """Overrides for 3 epochs of 4 batches; with SmallSNN they take a fraction of a second."""
    return tiny(folder, "hyperparameters.epoch=3", "hyperparameters.dropout=0.1", *overrides)


def assert_equal_states(one, other):
    """Whether two nested structures of tensors and numbers are equal, bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal_states(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal_states(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


# ---------------------------------------------------------------------------------------------
# The same numbers


SETTINGS = {
    "OneCycleLR": ("scheduler.scheduler_choice=OneCycleLR",),
    "MultiStepLR, averaging, poisson, rounded": (
        "scheduler.scheduler_choice=MultiStepLR",
        "scheduler.MultiStepLR.milestones=[1,2]",
        "hyperparameters.weight_averaging=0.9",
        "optimizer.coefficient_lr_scale=100",  # to the edge of the stable set
        "hyperparameters.encoding=poisson",
        "hyperparameters.weight_bits=4",
    ),
}


@pytest.fixture(scope="module", params=SETTINGS)
def undisturbed(request, tmp_path_factory):
    """A run that nothing stopped: its settings, its folder and what it returned."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = SETTINGS[request.param]
    return settings, folder, experiment(small(folder, *settings)).train()


@pytest.mark.parametrize("stop_after", [1, 4, 6, 9])
def test_a_run_that_stops_and_resumes_equals_one_that_does_not(tmp_path, undisturbed, stop_after):
    settings, whole, finished = undisturbed
    overrides = small(tmp_path, *settings)
    stopped(overrides, stop_after)
    last = the_run(tmp_path) / "last"
    torch.rand(3)  # the generators' states are the checkpoint's
    resumed = experiment(overrides).train(load_checkpoint(last))

    one, other = (load(the_run(folder) / "last") for folder in (whole, tmp_path))
    for part in ("snn", "average", "optimizer"):
        assert_equal_states(one[f"{part}_state_dict"], other[f"{part}_state_dict"])
    assert_equal_states(one["rng"], other["rng"])
    assert_same_weights(*(the_run(folder) / "best" for folder in (whole, tmp_path)))
    assert metrics_of(whole) == metrics_of(tmp_path)
    assert len(metrics_of(tmp_path)) == 1 + 3
    assert finished["test"] == resumed["test"]


def test_the_same_seed_gives_the_same_bits_and_another_one_others(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        experiment(
            small(tmp_path / name, f"seed={seed}", "hyperparameters.encoding=poisson")
        ).train()
    last = [the_run(tmp_path / name) / "last" for name in "abc"]
    assert_same_weights(last[0], last[1])
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b") != metrics_of(tmp_path / "c")


def test_a_run_in_chunks_of_time_learns_as_a_whole_one(tmp_path):
    """Of chunks of one size: their dropout, and all that is evaluated, is that of a whole run."""
    losses, rates = [], []
    for chunk in (0, 4):
        # The last two are for training alone, so an evaluation in chunks must leave them out.
        settings = f"chunk={chunk}", "label_smoothing=0.3", "early_answers=0.5"
        overrides = (f"hyperparameters.{setting}" for setting in settings)
        train(*tiny(tmp_path / str(chunk), *overrides), model=SmallSNN)
        header, *rows = metrics_of(tmp_path / str(chunk))
        first, _ = ({k: float(v) for k, v in zip(header, row, strict=True)} for row in rows)
        losses.append({key: value for key, value in first.items() if "loss" in key})
        rates.append({key: value for key, value in first.items() if "firing" in key})
    assert losses[1] == pytest.approx(losses[0], rel=0.005)
    assert rates[1] == pytest.approx(rates[0], rel=0.02)


def test_a_finished_run_can_be_given_more_epochs(tmp_path):
    settings = ("scheduler.scheduler_choice=none",)
    experiment(small(tmp_path / "whole", *settings)).train()
    halves = small(tmp_path / "halves", *settings)
    experiment([*halves, "hyperparameters.epoch=2"]).train()
    last = the_run(tmp_path / "halves") / "last"
    experiment(halves).train(load_checkpoint(last))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "halves")


def test_training_starts_from_the_weights_of_a_checkpoint(tmp_path):
    def initialise(model, task):
        raise AssertionError("the first weights are given")

    train(*tiny(tmp_path / "first", "seed=3"), model=SmallSNN)
    best = the_run(tmp_path / "first") / "best"
    settings = tiny(
        tmp_path / "second",
        f"first_weights={best}",
        "optimizer.AdamW.lr=1e-12",  # so that all weights stay where they start
        "scheduler.scheduler_choice=none",
    )
    train(*settings, model=SmallSNN, initialise=initialise)
    theirs, ours = (load(the_run(tmp_path / name) / "best") for name in ("first", "second"))
    torch.testing.assert_close(ours["snn_state_dict"], theirs["snn_state_dict"])
    assert ours["config"]["first_weights"] == str(best)

    best.unlink()  # a resumed run has its own weights
    last = load_checkpoint(the_run(tmp_path / "second") / "last")
    experiment([*settings, "hyperparameters.epoch=3"]).train(last)
    assert "there is no file" in refused("--train", *settings, model=SmallSNN)


def test_training_learns_and_reports_its_best_epoch(tmp_path):
    finished = run("--train", *small(tmp_path, "hyperparameters.epoch=6"), model=SmallSNN)
    assert (finished.code, finished.err) == (0, "")
    assert "\n256 images to train on, 100 to validate on\n" in finished.out
    rows = metrics_of(tmp_path)
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert [row["epoch"] for row in table] == list("123456")
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])
    score = [(float(row["validation_accuracy"]), -float(row["validation_loss"])) for row in table]
    best = 1 + score.index(max(score))
    assert f"best epoch {best}: validation loss" in finished.out
    assert load(the_run(tmp_path) / "best")["epoch"] == best


@pytest.mark.parametrize(
    ("choice", "options", "expected"),
    [
        ("MultiStepLR", ["MultiStepLR.milestones=[2]"], [0.01, 0.01, 0.001]),
        ("OneCycleLR", ["OneCycleLR.max_lr=0.01", "OneCycleLR.pct_start=0"], [None, None, 4e-8]),
        ("CyclicLR", ["CyclicLR.base_lr=0.001", "CyclicLR.max_lr=0.003"], [None, None, None]),
    ],
)
def test_the_log_has_the_learning_rate_that_an_epoch_has_ended_with(
    choice, options, expected, tmp_path, monkeypatch
):
    options = [f"scheduler.{option}" for option in (f"scheduler_choice={choice}", *options)]
    options += ["optimizer.AdamW.lr=0.01"] * (choice == "MultiStepLR")
    options += ["optimizer.coefficient_lr_scale=0.5"]  # the filters' rate is another
    trial, used, step = experiment(small(tmp_path, *options)), [], torch.optim.AdamW.step

    def noted(self, *arguments):
        used.append((trial.progress.epoch, self.param_groups[0]["lr"]))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    trial.train()
    with open(trial.run.path / "metrics.csv", newline="") as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx(list(dict(used).values()), rel=1e-12)
    assert all(
        known in (None, pytest.approx(rate)) for rate, known in zip(rates, expected, strict=True)
    )


def test_checkpoint_and_log_record_what_decides_the_numbers(tmp_path):
    experiment(small(tmp_path, "seed=11", "hyperparameters.epoch=1")).train()
    for which in ("last", "best"):
        checkpoint = load(the_run(tmp_path) / which)
        assert checkpoint["config"]["seed"] == 11
        assert checkpoint["environment"]["threads"] == 1
    log = the_run(tmp_path)
    assert {"config.yaml", "environment.yaml", "metrics.csv"} <= {f.name for f in log.iterdir()}
    with open(log / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0 <= float(row["data_seconds"]) <= float(row["seconds"])
    assert 0 < float(row["firing_rate_layers.2"]) < 1
    assert 0 < float(row["pole_radius_layers.0"]) < 1


def test_averaged_weights_are_evaluated_saved_as_best_and_used_of_a_last_checkpoint(tmp_path):
    trial = experiment(small(tmp_path, AVERAGING, "hyperparameters.epoch=1"))
    trial.train()
    last, best = load_checkpoint(trial.run.last), load(trial.run.best)["snn_state_dict"]
    radius = load(trial.run.best)["metrics"]["pole_radius_layers.0"]
    assert radius == synapses(trial.model)["layers.0"].pole_radius()  # which has these weights now
    for name, weights in best.items():
        assert torch.equal(weights, last["average_state_dict"][f"module.{name}"])
    assert not torch.equal(best["layers.1.weight"], last["snn_state_dict"]["layers.1.weight"])
    trial.test(last)
    assert_equal_states(trial.model.state_dict(), best)
    assert_equal_states(trained_network(last, SmallSNN).model.state_dict(), best)


def test_rounded_weights_are_trained_evaluated_and_saved_as_best(tmp_path):
    trial = experiment(small(tmp_path, BITS, AVERAGING, "hyperparameters.epoch=1"))
    trial.train()
    last, best = (load_checkpoint(the_run(tmp_path) / which) for which in ("last", "best"))
    for layer in ("layers.1.weight", "layers.4.weight"):
        assert all(len(row.abs().unique()) > 2 for row in last["snn_state_dict"][layer])
        assert all(len(row[row != 0].abs().unique()) == 1 for row in best["snn_state_dict"][layer])
    assert_equal_states(trial.model.state_dict(), best["snn_state_dict"])
    (again, _), metrics = trial.evaluate("validation"), best["metrics"]
    assert again["loss"] == metrics["validation_loss"]  # rounded once more, they are the same
    assert trial.test(last) == trial.test(best)
    one, other = (trained_network(found, SmallSNN).state_dict() for found in (last, best))
    assert_equal_states(dict(one), dict(other))


class Rows(DigitClassification):
    def report(self, model, activity):
        yield f"at most {max(len(row.unique()) for row in model.layers[1].weight)} values in a row"


def test_the_report_of_a_test_is_of_rounded_weights(tmp_path, capsys):
    made = experiment(small(tmp_path, "hyperparameters.weight_bits=2"), task=Rows())
    made.train()
    last = load_checkpoint(made.run.last)  # of weights that are not rounded
    made.test(last)
    assert "at most 3 values in a row" in capsys.readouterr().out


def test_gradients_of_rounded_weights_change_the_weights_before_rounding(tmp_path):
    """The first batch's step, of an optimiser that subtracts the gradient."""
    sgd = "optimizer.optimizer_choice=SGD", "optimizer.SGD.lr=0.5", "optimizer.SGD.momentum=0"
    settings = small(tmp_path, BITS, *sgd, "scheduler.scheduler_choice=none")
    trial = experiment(settings)
    weight, seen = trial.model.layers[1].weight, []

    def look(module, args, output):
        if torch.is_grad_enabled():
            seen.append(module.weight.detach().clone())

    trial.model.layers[1].register_forward_hook(look)
    own = weight.detach().clone()
    trial.stop_requested = lambda: True
    with pytest.raises(Stopped):
        trial.train()
    assert all(len(row[row != 0].abs().unique()) == 1 for row in seen[0])
    assert weight.grad.abs().max() > 0
    torch.testing.assert_close(weight, own - 0.5 * weight.grad)


def test_the_average_is_of_filters_that_are_stable_already(tmp_path, monkeypatch):
    seen, update = [], MovingAverage.update_parameters

    def spy(self, model):
        for module in model.modules():
            if isinstance(module, DualExponentialSynapse):
                seen.append(torch.equal(module.alpha, module.effective_alpha()))
        update(self, model)

    monkeypatch.setattr(MovingAverage, "update_parameters", spy)
    experiment(small(tmp_path, AVERAGING, "optimizer.coefficient_lr_scale=300")).train()
    assert seen
    assert all(seen)


def test_filters_of_the_average_are_pulled_back_to_the_stable_set_before_they_are_averaged(
    tmp_path,
):
    settings = small(tmp_path, AVERAGING)
    config = load_config(DigitConfig, SCRIPT.with_suffix(".yaml"), settings)
    model = SmallSNN(config)
    state = TrainingState(model, config, torch.device("cpu"), 4)
    state.step()  # the first weights replace what the average began with
    averaged = state.average.module.layers[0]
    averaged.alpha.data[0] = 1.9
    pulled_back = averaged.effective_alpha().clone()
    assert not torch.equal(pulled_back, averaged.alpha)
    state.step()
    decay = 2 / 11  # of the second update
    expected = decay * pulled_back + (1 - decay) * model.layers[0].alpha
    torch.testing.assert_close(averaged.alpha.data, expected.data)


def test_a_penalty_holds_the_hidden_layers_down_and_leaves_the_answer(tmp_path):
    def rates(*overrides):
        row = experiment(small(tmp_path, *overrides)).train()["best"]
        return [rate for name, rate in row.items() if name.startswith("firing_rate")]

    *free, _ = rates()
    *held, _ = rates("hyperparameters.rate_penalty=10", "hyperparameters.rate_limit=0.001")
    assert free
    assert all(less < 0.8 * more for less, more in zip(held, free, strict=True))


@pytest.mark.parametrize(
    "penalty",
    [{}, {"target_rate": 0.1}, {"rate_limit": 0.2}, {"target_rate": 0.1, "penalty_by_cost": True}],
)
def test_a_step_goes_down_the_loss_and_the_penalty(tmp_path, penalty):
    def build_model(config):
        model = Sequential()
        for inputs, neurons in (3, 5), (5, 4), (4, 2):
            model.append(nn.Linear(inputs, neurons)).append(SpikingNeuron(neurons, 3.0))
            nn.init.normal_(model[-2].weight, 0.6, 0.6)
        return model

    lengths = torch.tensor([2, 6, 4, 5])
    x, y = 3 * torch.rand(4, 6, 3), torch.tensor([0, 1, 1, 0])
    task = SequenceClassification(dict.fromkeys(["train", "validation"], (x, y, lengths)))
    config = task.config_class(device="cpu", runs_path=str(tmp_path))
    config.hyperparameters.epoch, config.hyperparameters.batch_size = 1, 4
    config.hyperparameters.rate_penalty = 0.5 if penalty else 0.0
    vars(config.hyperparameters).update(penalty)
    config.optimizer.optimizer_choice, config.optimizer.SGD.lr = "SGD", 0.2
    trained = Experiment(build_model, task, config)
    model = copy.deepcopy(trained.model)
    trained.train()
    with collect_spikes(model) as spikes:
        output, _ = model(x.transpose(0, 1))
    loss = nn.functional.cross_entropy(SpikeCount()(output, lengths), y)
    rates = penalty.get("target_rate", 0.0), penalty.get("rate_limit", 0.0)
    first, second = (rate_penalty(spikes[layer], *rates, lengths) for layer in ("1", "3"))
    # All spikes of a step meet 5 * 4 weights behind the first layer, and 4 * 2 behind the second.
    cost = 4 * 2 / (5 * 4) if penalty.get("penalty_by_cost") else 1.0
    (loss + 0.5 * (first + cost * second)).backward()
    for after, before in zip(trained.model.parameters(), model.parameters(), strict=True):
        assert before.grad.abs().max() > 0.01
        torch.testing.assert_close(after, before - 0.2 * before.grad)


def test_the_average_of_weights_and_running_averages_forgets_faster_at_first():
    model = nn.BatchNorm1d(1)
    average = MovingAverage(model, 0.9)
    values = [0.5, 3.0, -1.0, 4.0, 1.0, 5.0, *[2.0, 7.0] * 50]
    expected = None
    for count, value in enumerate(values):
        model.num_batches_tracked.fill_(count)
        for tensor in (model.running_mean, model.weight.data):
            tensor.fill_(value)
        average.update_parameters(model)
        decay = min(0.9, (1 + count) / (10 + count)) if count else 0.0
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)
        assert average.module.running_mean.item() == pytest.approx(expected, rel=1e-5)
        assert average.module.num_batches_tracked == count


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_the_matrix_products_of_training_and_evaluation_have_the_precision(tmp_path, precision):
    name = str(precision).removeprefix("torch.")
    once = "hyperparameters.epoch=1", "mnist_config.training_size=64", "hyperparameters.length=2"
    trial = experiment(small(tmp_path, f"hyperparameters.precision={name}", *once))
    products = set()
    for index in (1, 4):
        trial.model.layers[index].register_forward_hook(
            lambda module, inputs, output: products.add((module.training, output.dtype))
        )
    trial.train()
    assert products == {(True, precision), (False, precision)}


def test_an_epoch_whose_score_is_undefined_is_not_the_best(tmp_path):
    class Undefined(DigitClassification):
        def metrics(self, sums):
            metrics = super().metrics(sums)
            first = trial.state is not None and trial.progress.epoch == 0
            return dict.fromkeys(metrics, math.nan) if first else metrics

    trial = experiment(small(tmp_path), task=Undefined())
    best = trial.train()["best"]
    _, first, *_ = (trial.run.path / "metrics.csv").read_text().splitlines()
    assert "nan" in first
    assert best["epoch"] > 1


def test_an_average_of_a_model_that_cannot_be_copied_is_refused(tmp_path):
    def pruned(config):
        model = SmallSNN(config)
        prune.l1_unstructured(model.layers[1], "weight", 0.5)
        return model

    settings = tiny(tmp_path, AVERAGING)
    message = refused("--train", *settings, model=pruned)
    assert message.startswith(
        "hyperparameters.weight_averaging needs a copy of the model, which ca"
    )


def test_an_average_of_a_model_with_extra_state_is_refused(tmp_path):
    class Counting(nn.Identity):
        def get_extra_state(self):
            return 0

        def set_extra_state(self, state):
            pass

    def counting(config):
        model = SmallSNN(config)
        model.layers.append(Counting())
        return model

    message = refused("--train", *tiny(tmp_path, AVERAGING), model=counting)
    assert "no extra state (get_extra_state), as Counting has: keep it in a buffer" in message


def test_a_buffer_that_is_no_statistic_is_copied_into_the_average():
    model = nn.Linear(1, 1)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    average = MovingAverage(model, 0.9)
    for value in (1.0, 5.0, 2.0):
        model.mask[0] = value
        average.update_parameters(model)
        assert average.module.mask.tolist() == [value, -math.inf]


def test_a_buffer_that_is_made_or_resized_in_training_cannot_be_averaged():
    model = nn.Linear(1, 1)
    model.register_buffer("code", torch.zeros(1))
    average = MovingAverage(model, 0.9)
    average.update_parameters(model)
    for name, buffer in (("code", torch.zeros(3)), ("another", torch.zeros(1))):
        changed = copy.deepcopy(model)
        changed.register_buffer(name, buffer)
        with pytest.raises(SettingsError, match=f"made, resized or dropped {name} as it ran"):
            average.update_parameters(changed)


def test_a_model_with_a_mask_is_trained_resumed_and_tested(tmp_path):
    class Masked(SmallSNN):
        """Has a constant with infinities, as the mask of an attention is, and what is undefined."""

        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.nan]))

    settings = tiny(tmp_path, AVERAGING, "scheduler.scheduler_choice=none")
    train(*settings, "hyperparameters.epoch=1", model=Masked)
    last = the_run(tmp_path) / "last"
    train(*settings, "--resume", last, "hyperparameters.epoch=2", model=Masked)
    assert load(last)["epoch"] == 2
    assert run("--test", *settings, model=Masked).code == 0


def test_an_experiment_leaves_the_warning_of_instability_to_a_user_s_own_loop(tmp_path):
    settings = "optimizer.coefficient_lr_scale=300", "hyperparameters.constraint=none"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experiment(small(tmp_path, *settings)).train()
    synapse = DualExponentialSynapse(3, 4.0, 1.0)
    synapse.alpha.data.fill_(1.5)
    with pytest.warns(RuntimeWarning, match="outside the unit circle"):
        synapse(torch.rand(5, 2, 3))[0].sum().backward()


class Dense(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x):
        return self.layer(x)


def test_a_model_is_given_the_task_only_where_it_asks_for_it():
    def build_wide(config, width=3, *layers, deep=False, **others):
        assert not layers
        return nn.Linear(2, width)

    assert build(build_wide, None, object()).out_features == 3
    assert build(lambda config, task: nn.Linear(2, task), None, 4).out_features == 4


NO_BUILDER = "build_model must be a function that takes the config"
PENALTY = {"hyperparameters.rate_penalty": 1.0, "hyperparameters.rate_limit": 0.1}


@pytest.mark.parametrize(
    ("build_model", "changes", "message"),
    [
        (SmallSNN, {"seed": "three"}, "seed"),
        (SmallSNN, {"checkpoint_minutes": -1.0}, "checkpoint_minutes"),
        (SmallSNN, {"hyperparameters.epochs": 3}, "'hyperparameters.epochs', did you mean 'hyper"),
        (Dense, {"hyperparameters.chunk": 4}, "chunk is 4: Dense takes no state, so it"),
        (
            lambda config: Sequential(nn.Linear(784, 10), SpikingNeuron(10, 4.0)),
            PENALTY,
            "no hidden layer of neurons to be penalised",
        ),
        (lambda config: None, {}, NO_BUILDER),
        (lambda config: nn.LazyLinear(10), {}, "build_model returns a lazy layer"),
        (nn.Linear(2, 2), {}, NO_BUILDER),
        (3, {}, NO_BUILDER),
    ],
)
def test_a_configuration_made_in_python_and_its_model_are_checked(build_model, changes, message):
    config = DigitConfig(dataset_path=str(SCRIPT.parent / "dataset"), device="cpu")
    for key, value in changes.items():
        *section, name = key.split(".")
        setattr(config.hyperparameters if section else config, name, value)
    assert message in refusal(Experiment, build_model, DigitClassification(), config)


def test_a_configuration_is_no_dict():
    message = refusal(Experiment, SmallSNN, DigitClassification(), {})
    assert message == "config is a dict, expected a DigitConfig"
    message = refusal(Experiment, SmallSNN, DigitClassification(), DigitConfig)
    assert message == "config is a type, expected a DigitConfig"
    own = dataclasses.make_dataclass("Own", [("seed", int, 0)])
    for wrong in (own, DigitConfig()):
        message = refusal(Experiment, SmallSNN, DigitClassification(config_class=wrong))
        assert message.startswith("DigitClassification has the config_class ")
        assert message.endswith("expected a class derived from ExperimentConfig")
    message = refusal(Experiment, SmallSNN, DigitClassification)
    assert message.endswith("expected a Task")


@dataclasses.dataclass
class Derived(DigitConfig):
    def __post_init__(self):
        super().__post_init__()
        self.twice = 2 * self.seed

    @functools.cached_property
    def later(self):
        return 3 * self.seed


def test_a_class_of_settings_may_derive_an_attribute():
    config = Derived(dataset_path=str(SCRIPT.parent / "dataset"), device="cpu", seed=4)
    found = Experiment(SmallSNN, DigitClassification(), config).config
    assert found.twice == 8
    assert config.later == 12  # read before the experiment is made
    assert Experiment(SmallSNN, DigitClassification(), config).config.later == 12
    config.seed = 5  # in Python, after the class has derived what follows from it
    assert Experiment(SmallSNN, DigitClassification(), config).config.twice == 10
    config.twicce = 3
    assert "unknown key 'twicce'" in refusal(Experiment, SmallSNN, DigitClassification(), config)


def test_a_setting_may_be_a_number_of_numpy():
    config = DigitConfig(dataset_path=str(SCRIPT.parent / "dataset"), device="cpu")
    config.hyperparameters.epoch, config.optimizer.AdamW.lr = np.int64(3), np.float64(0.5)
    found = Experiment(SmallSNN, DigitClassification(), config).config
    assert (found.hyperparameters.epoch, found.optimizer.AdamW.lr) == (3, 0.5)
    assert type(found.hyperparameters.epoch) is int


def test_on_resuming_the_sums_of_all_processes_go_on_in_the_first(tmp_path, monkeypatch):
    stopped(small(tmp_path), after=2)
    last = the_run(tmp_path) / "last"
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank_and_world", lambda rank=rank: (rank, 2))
        trial = experiment(small(tmp_path))
        trial.state = TrainingState(trial.model, trial.config, trial.device, 4)
        trial.state.restore(load_checkpoint(last), trial.task)
        assert (trial.progress.sums["samples"] > 0) is (rank == 0)
        assert trial.progress.batch == 2


def test_a_run_is_resumed_and_tested_by_the_path_of_a_checkpoint(tmp_path):
    first = stopped(small(tmp_path), after=5)
    again = experiment(small(tmp_path))
    row = again.train(first.run.last)
    assert load_checkpoint(again.run.last)["metrics"][-1]["epoch"] == again.settings.epoch
    assert again.test(str(again.run.best)) == row["test"]


def test_the_best_epoch_is_tested_where_no_checkpoint_is_named(tmp_path):
    trial = experiment(small(tmp_path))
    assert trial.train()["test"] == trial.test()


def test_gradient_clipping_bounds_the_step(tmp_path):
    settings = small(
        tmp_path,
        "optimizer.optimizer_choice=SGD",
        "optimizer.SGD={lr: 1.0, momentum: 0.0}",
        "optimizer.gradient_clipping=0.001",
        "hyperparameters.constraint=none",
        "scheduler.scheduler_choice=none",
    )
    trial = experiment(settings, stop_after=1)
    before = [parameter.detach().clone() for parameter in trial.model.parameters()]
    with pytest.raises(Stopped):
        trial.train()
    steps = [p - b for p, b in zip(trial.model.parameters(), before, strict=True)]
    assert nn.utils.get_total_norm(steps).item() == pytest.approx(0.001, rel=1e-2)


def test_the_stable_constraint_is_applied_after_every_step(tmp_path):
    settings = small(
        tmp_path, "optimizer.coefficient_lr_scale=300", "scheduler.scheduler_choice=none"
    )
    for constraint, stable in (("stable", True), ("none", False)):
        trial = experiment([*settings, f"hyperparameters.constraint={constraint}"])
        trial.train()
        radius = max(module.pole_radius() for module in synapses(trial.model).values())
        assert (radius < 1) is stable


def test_the_last_checkpoint_is_written_within_an_epoch_too(tmp_path, monkeypatch):
    clock = iter(range(0, 10**9, 70))  # seconds, that pass between two looks at it
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    written, write = [], RunFolder.write

    def spy(self, path, content):
        write(self, path, content)
        if path.name == "last":
            written.append((content["progress"]["epoch"], content["progress"]["batch"]))
            if len(written) == 3:  # killed right after it
                raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "write", spy)
    overrides = small(tmp_path / "killed", "checkpoint_minutes=2")
    with pytest.raises(KeyboardInterrupt):
        experiment(overrides).train()
    assert written == [(0, 2), (1, 0), (1, 2)]
    monkeypatch.undo()
    last = the_run(tmp_path / "killed") / "last"
    experiment(overrides).train(load_checkpoint(last))
    experiment(small(tmp_path / "whole")).train()
    best = [the_run(tmp_path / name) / "best" for name in ("killed", "whole")]
    assert_same_weights(*best)
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")


def test_all_processes_write_a_checkpoint_when_one_of_them_says_that_it_is_time(
    tmp_path, monkeypatch
):
    """Each has a clock of its own, and the state is gathered from all."""
    written, write = [], RunFolder.write

    def spy(self, path, content):
        write(self, path, content)
        if path.name == "last":
            written.append((content["progress"]["epoch"], content["progress"]["batch"]))

    monkeypatch.setattr(RunFolder, "write", spy)
    monkeypatch.setattr(distributed, "any_process", lambda stop, due: (stop, True))
    experiment(small(tmp_path, "hyperparameters.epoch=1")).train()
    assert written == [(0, 1), (0, 2), (0, 3), (1, 0)]


def test_losses_of_processes_are_weighed_by_what_their_means_are_over(monkeypatch, tmp_path):
    """Here by labelled steps, of which one process has far fewer."""
    x, y = torch.rand(8, 6, 3), torch.arange(48).view(8, 6) % 2
    y[::2, 1:] = -1
    task = SequenceClassification(dict.fromkeys(["train", "validation"], (x, y)), None)
    config = task.config_class(device="cpu", runs_path=str(tmp_path))
    trial = Experiment(lambda config: Sequential(nn.Linear(3, 2)), task, config)
    whole = Batch(x.transpose(0, 1), y.T)
    expected, sums = task.loss(trial.model, whole)
    monkeypatch.setattr(distributed, "add", lambda own: [float(sums["labels"])])
    trial.trained, trial.world = trial.model, 2
    shares = [Batch(whole.x[:, rank::2], whole.y[:, rank::2]) for rank in (0, 1)]
    first, second = (trial._training_loss(share)[0] for share in shares)
    torch.testing.assert_close((first + second) / 2, expected)  # as gradients are averaged


def test_each_process_goes_on_with_random_numbers_of_its_own(tmp_path, monkeypatch):
    checkpoint = load_checkpoint(stopped(small(tmp_path), after=2).run.last)
    states = [torch.Generator().manual_seed(seed).get_state() for seed in (1, 2)]
    checkpoint["rng"] = [{"cpu": state} for state in states]
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank_and_world", lambda rank=rank: (rank, 2))
        trial = experiment(small(tmp_path))
        trial.state = TrainingState(trial.model, trial.config, trial.device, 4)
        trial.state.restore(checkpoint, trial.task)
        assert torch.equal(torch.get_rng_state(), states[rank])


def test_whatever_runs_the_network_runs_it_on_the_backend_of_the_settings(tmp_path):
    seen = []

    def watched(config):
        model = SmallSNN(config)
        model.layers[1].register_forward_pre_hook(
            lambda layer, inputs: seen.append(choose_backend(inputs[0].device)[0])
        )
        return model

    def initialise(model, task):
        model(next(task.batches("train")).x)

    settings = small(tmp_path, "hyperparameters.epoch=1", "backend=eager")
    for action, calls in (("--train", 1 + 4 + 1 + 1), ("--test", 1 + 1)):
        seen.clear()
        finished = run(action, *settings, model=watched, initialise=initialise)
        assert finished.code == 0, finished.err
        assert seen == ["eager"] * calls


def test_whatever_runs_the_network_runs_it_in_chunks_and_in_the_precision(tmp_path):
    seen = []

    def watched(config):
        model = SmallSNN(config)
        model.layers[1].register_forward_hook(
            lambda layer, inputs, output: seen.append((len(output), output.dtype))
        )
        return model

    own = "chunk=4", "precision=bfloat16", "length=6", "epoch=1"
    settings = small(tmp_path, *(f"hyperparameters.{one}" for one in own))
    for action, fewest in (("--train", 2 * 4 + 2 + 2), ("--test", 2 + 2)):
        seen.clear()
        assert run(action, *settings, model=watched).code == 0
        assert len(seen) >= fewest
        assert set(seen) == {(4, torch.bfloat16), (2, torch.bfloat16)}


def test_a_run_says_how_many_parameters_the_network_has(tmp_path, capsys):
    experiment(small(tmp_path))
    count = 3 * 784 + 785 * 20 + 3 * 20 + 21 * 10  # of filters, and of weights and biases
    assert f"snn_mlp_1: {count:,} parameters on cpu, " in capsys.readouterr().out


def test_a_run_that_is_asked_to_stop_in_its_last_batch_ends_with_its_test(tmp_path):
    assert experiment(small(tmp_path), stop_after=12).train()["test"]


# ---------------------------------------------------------------------------------------------
# Trouble


def test_data_that_end_within_an_epoch_end_the_run(tmp_path):
    class Short(DigitClassification):
        def batches(self, split, epoch=None, start=0):
            return itertools.islice(super().batches(split, epoch, start), 2)

    finished = run("--train", *small(tmp_path), model=SmallSNN, task=Short())
    assert finished.code == 1
    assert "the run failed: the data ended after 2 of 4 batches" in finished.err


def test_a_file_that_the_user_s_code_cannot_read_is_reported_with_the_line(tmp_path):
    class Missing(DigitClassification):
        def setup(self, config, device):
            raise OSError("no such recording")

    line = inspect.getsourcelines(Missing.setup)[1] + 1
    finished = run("--train", *small(tmp_path), model=SmallSNN, task=Missing())
    assert finished.code == 1
    assert finished.err.endswith(f"the run failed: no such recording ({__file__}, line {line})\n")


class Keeping(SmallSNN):
    """Keeps tensors that it made in an evaluation, and has a complex weight."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("seen", torch.zeros(()))
        self.turn = nn.Parameter(torch.ones((), dtype=torch.complex64))
        self.scales = {}

    def forward(self, x):
        self.seen = self.seen + x.shape[1]
        output, *rest = super().forward(x)
        if output.shape[1:] not in self.scales:
            self.scales[output.shape[1:]] = torch.ones(output.shape[1:])
        return output * self.scales[output.shape[1:]] * self.turn.abs(), *rest


@pytest.mark.parametrize("averaging", [0.0, 0.9])
def test_a_model_may_keep_what_it_has_made_in_an_evaluation(tmp_path, averaging):
    settings = small(tmp_path, f"hyperparameters.weight_averaging={averaging}")
    config = load_config(DigitConfig, SCRIPT.with_suffix(".yaml"), settings)
    trial = Experiment(Keeping, DigitClassification(), config)
    trial.evaluate("validation")
    assert trial.train()["test"]
    assert trial.model.turn != 1


def test_metrics_may_be_numbers_of_numpy(tmp_path):
    class Measured(DigitClassification):
        def metrics(self, sums):
            metrics = super().metrics(sums)
            return {"accuracy": np.float32(metrics["accuracy"]), "loss": np.array(metrics["loss"])}

    settings = small(tmp_path)
    experiment(settings, task=Measured()).train()
    last = the_run(tmp_path) / "last"
    assert {type(value) for row in load(last)["metrics"] for value in row.values()} == {int, float}
    assert load(the_run(tmp_path) / "best")["metrics"]["validation_accuracy"] > 0


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    class Broken(DigitClassification):
        trained = 0

        def loss(self, model, batch):
            loss, sums = super().loss(model, batch)
            self.trained += model.training
            return loss * (math.nan if model.training and self.trained >= 6 else 1), sums

    constant = "scheduler.scheduler_choice=none"
    experiment(small(tmp_path / "good", "hyperparameters.epoch=1", constant)).train()
    settings = small(tmp_path / "bad", constant)
    finished = run("--train", *settings, model=SmallSNN, task=Broken())
    assert finished.code == 1
    assert finished.err.count("\n") == 1
    assert "the run failed: epoch 2, batch 2: the loss is nan" in finished.err
    assert "gradient of layers.1.weight" in finished.err
    assert "; the largest pole radius is 0." in finished.err
    assert "lower learning rate" in finished.err
    for which in ("last", "best"):
        assert_same_weights(*(the_run(tmp_path / run) / which for run in ("good", "bad")))
    assert len(metrics_of(tmp_path / "bad")) == 1 + 1


@pytest.mark.parametrize("batches", [2, 4])
def test_weights_that_the_last_batch_made_infinite_are_not_saved(tmp_path, monkeypatch, batches):
    trial = experiment(small(tmp_path), stop_after=batches)  # of 4 in an epoch
    step = Experiment._train_batch

    def explode(self, batch):
        sums = step(self, batch)
        if self.progress.batch == batches - 1:
            self.model.layers[1].weight.data[0, 0] = math.inf
        return sums

    monkeypatch.setattr(Experiment, "_train_batch", explode)
    with pytest.raises(RunError, match=r"epoch 1: layers\.1\.weight not finite"):
        trial.train()
    assert not (the_run(tmp_path) / "last").exists()
    assert not (the_run(tmp_path) / "best").exists()


def test_silent_saturated_and_unstable_layers_are_told_once(tmp_path):
    class Extreme(SmallSNN):
        def __init__(self, config):
            super().__init__(config)
            self.layers[0].alpha.data[0, 3] = 1.5
            for index, bias in ((1, -1000.0), (4, 1000.0)):
                nn.init.zeros_(self.layers[index].weight)
                nn.init.constant_(self.layers[index].bias, bias)

    finished = train(*small(tmp_path, "hyperparameters.constraint=none"), model=Extreme)
    *firing, last = [line for line in finished.out.splitlines() if line.startswith("warning:")]
    rates = "firing rates, in spikes per neuron and step: layers.2 0.0000, layers.5 1.0000"
    assert firing == [
        f"warning: epoch 1: layer layers.2 is silent; {rates}",
        f"warning: epoch 1: layer layers.5 fires at almost every step; {rates}",
    ]
    unstable = "warning: epoch 1: a filter of layer layers.0 is unstable, its pole radius is"
    assert last.startswith(unstable)


class Forgetful(DigitClassification):
    """A task that lacks what it is told to forget."""

    def __init__(self, forgotten):
        super().__init__()
        self.forgotten = forgotten

    def without(self, made):
        return {key: value for key, value in made.items() if key != self.forgotten}

    def loss(self, model, batch):
        loss, sums = super().loss(model, batch)
        return loss, self.without(sums)

    def metrics(self, sums):
        return self.without(super().metrics(sums))


@pytest.mark.parametrize("forgotten", ["correct", "accuracy"])
def test_a_task_that_lacks_what_it_reads_fails_after_its_first_batch(tmp_path, forgotten):
    with pytest.raises(KeyError, match=forgotten):
        run("--train", *small(tmp_path), model=SmallSNN, task=Forgetful(forgotten))
    assert not (the_run(tmp_path) / "last").exists()


def test_a_task_that_counts_no_samples_is_refused(tmp_path):
    message = refused("--train", *small(tmp_path), model=SmallSNN, task=Forgetful("samples"))
    assert message == "Forgetful.loss returns no sum 'samples'"


@pytest.mark.parametrize(
    "returns",
    [
        lambda loss, sums: loss,
        lambda loss, sums: (loss, [sums]),
        lambda loss, sums: (loss.expand(3), sums),
        lambda loss, sums: (loss.item(), sums),
    ],
)
def test_a_loss_without_its_sums_is_refused(tmp_path, returns):
    class Alone(DigitClassification):
        def loss(self, model, batch):
            return returns(*super().loss(model, batch))

    message = refused("--train", *small(tmp_path), model=SmallSNN, task=Alone())
    assert message.startswith("Alone.loss returns no pair of a loss, a tensor of one number, and a")


def test_a_loss_of_one_number_may_have_dimensions(tmp_path):
    class Kept(DigitClassification):
        def loss(self, model, batch):
            loss, sums = super().loss(model, batch)
            return loss.reshape(1, 1), sums

    for name, task in (("kept", Kept()), ("plain", DigitClassification())):
        run("--train", *small(tmp_path / name), model=SmallSNN, task=task)
    kept, plain = (the_run(tmp_path / name) / "last" for name in ("kept", "plain"))
    assert_same_weights(kept, plain)


def test_the_folder_of_a_run_is_tested_and_resumed(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    folder = the_run(tmp_path)
    tested = run("--test", *small(tmp_path, f"test_checkpoint_path={folder}"), model=SmallSNN)
    assert f"{folder / 'best'}, epoch 1: test" in tested.out
    assert "resumed from" in train("--resume", folder, *small(tmp_path), model=SmallSNN).out


# ---------------------------------------------------------------------------------------------
# Resuming what does not fit


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was stopped in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp("trained")
    stopped(small(folder), after=6)
    return folder


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """The same, with a moving average of the weights."""
    folder = tmp_path_factory.mktemp("averaged")
    stopped(small(folder, AVERAGING), after=6)
    return folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hyperparameters.epoch=9", "hyperparameters.epoch cannot change when"),
        ("hyperparameters.batch_size=32", "batch_size or the number of samples cannot change when"),
        ("optimizer.AdamW.eps=0.5", "the optimizer with its options cannot change when"),
        ("optimizer.coefficient_lr_scale=0.5", "the optimizer with its options cannot change when"),
        ("seed=5", "seed cannot change when"),
        ("first_weights=there", "first_weights has no effect with --resume"),
        ("hyperparameters.train_coefficients=false", "train_coefficients cannot change when"),
        ("mnist_config.validation_size=101", "mnist_config.validation_size cannot change when"),
        ("scheduler.OneCycleLR.max_lr=0.5", "the scheduler with its options cannot change when"),
        ("optimizer.optimizer_choice=SGD", "the optimizer with its options cannot change when"),
        ("scheduler.scheduler_choice=none", "the scheduler with its options cannot change when"),
        (AVERAGING, "hyperparameters.weight_averaging cannot change when"),
        ("hyperparameters.weight_bits=2", "hyperparameters.weight_bits cannot change when"),
        ("hyperparameters.length=7", "hyperparameters.length cannot change when"),
        ("mnist_config.max_rate=0.5", "mnist_config.max_rate cannot change when"),
        ("hyperparameters.constraint=none", "hyperparameters.constraint cannot change when"),
    ],
)
def test_settings_that_cannot_change_on_resuming_are_refused(trained, override, message):
    last = the_run(trained) / "last"
    before = last.read_bytes()
    settings = small(trained, override)
    assert message in refused("--train", "--resume", last, *settings, model=SmallSNN)
    assert last.read_bytes() == before


def test_the_batch_size_cannot_change_in_the_middle_of_an_epoch(tmp_path):
    settings = small(tmp_path, "scheduler.scheduler_choice=none")
    stopped(settings, after=2)
    as_many = "hyperparameters.batch_size=65"  # as many batches an epoch
    message = refused("--train", "--resume", *settings, as_many, model=SmallSNN)
    assert "batch_size or the number of samples cannot change when" in message


def test_a_run_is_resumed_with_as_many_samples(tmp_path):
    """Of more, or of fewer, others would be held out."""

    def trial(count, epochs, **parts):
        x, y = torch.rand(count, 5, 784), torch.arange(count) % 10
        config = load_config(DigitConfig, SCRIPT.with_suffix(".yaml"), settings)
        config.hyperparameters.epoch = epochs
        data = {"train": (x, y), **parts}
        task = SequenceClassification(data, "mean", config_class=DigitConfig)
        return Experiment(SmallSNN, task, config)

    settings = small(tmp_path, "scheduler.scheduler_choice=none", "hyperparameters.batch_size=9")
    first = trial(100, 1)
    first.train()
    last = load_checkpoint(first.run.last)
    message = refusal(lambda: trial(110, 2).train(last))
    assert "the number of samples cannot change when" in message
    del last["progress"]["divided"], last["config"]["hyperparameters"]["weight_bits"]  # not yet
    assert trial(110, 2).train(last)["best"]
    own = {"validation": (torch.rand(9, 5, 784), torch.arange(9))}
    first = trial(100, 1, **own)
    first.train()
    assert trial(110, 2, **own).train(load_checkpoint(first.run.last))["best"]


def test_a_run_whose_metrics_grow_can_be_resumed(tmp_path):
    class Growing(DigitClassification):
        calls = 0

        def metrics(self, sums):
            Growing.calls += 1
            return super().metrics(sums) | ({"late": 1.0} if Growing.calls > 3 else {})

    settings = small(tmp_path, "scheduler.scheduler_choice=none")
    train(*settings, "hyperparameters.epoch=2", model=SmallSNN, task=Growing())
    longer = train(
        *("--resume", *settings, "hyperparameters.epoch=3"), model=SmallSNN, task=Growing()
    )
    assert "epoch 3/3" in longer.out


def test_after_a_stopped_training_the_given_checkpoint_is_tested(tmp_path):
    settings = small(tmp_path, AVERAGING)
    trial = stopped(settings, after=6)
    best = load_checkpoint(trial.run.best)
    assert trial.test(best) == experiment(settings).test(best)


def test_a_layer_of_neurons_that_does_not_run_is_not_penalised(tmp_path):
    class Unused(SmallSNN):
        def __init__(self, config):
            super().__init__(config)
            self.unused = nn.Sequential(SpikingNeuron(3, 4.0), nn.Linear(3, 1))

    overrides = small(tmp_path, "hyperparameters.rate_penalty=1", "hyperparameters.rate_limit=0.1")
    train(*overrides, model=Unused)
    train("--resume", *overrides, model=Unused)  # though its optimiser has no state for them


def test_a_finished_model_cannot_be_resumed(trained):
    best = the_run(trained) / "best"
    message = refused("--train", "--resume", best, *small(trained), model=SmallSNN)
    assert "is a finished model" in message
    assert "resume from the checkpoint named last, or start a new run with" in message
    assert f"first_weights={best}" in message


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("config", {}),
        ("config", {"hyperparameters": {"length": "long"}}),
        ("rng", []),
        ("rng", [{"cpu": torch.zeros(3)}]),
        ("optimizer_state_dict", {}),
        ("optimizer_state_dict", {"state": {77: {}}}),
        ("optimizer_state_dict", {"state": {0: {"step": torch.tensor(6.0)}}}),
        ("progress", None),
        ("progress", {"surprise": 1}),
        ("progress", {"history": []}),
        ("progress", {"history": [{"validation_loss": "low"}]}),
        ("progress", {"epoch": "two"}),
        ("progress", {"epoch": 10**9}),
        ("progress", {"batch": -3}),
        ("progress", {"batch": 5}),
        ("progress", {"seconds": math.nan}),
        ("progress", {"data_seconds": math.nan}),
        ("progress", {"sums": {"samples": -16}}),
        ("progress", {"sums": {}}),
        ("progress", {"sums": {"samples": 128, "loss": 250.0}}),
        ("state", {}),
        ("progress", {"sums": {"loss": 10**25}}),
        ("progress", {"sums": {"loss": "low"}}),
        ("progress", {"seconds": "long"}),
        ("progress", {"warned": [1]}),
        ("history", {"epoch": 2}),
        ("history", {"seconds": "long"}),
        ("margins", {"layers.0": 1.0}),
        ("margins", {"layers.0": "wide"}),
        ("margins", {"layers.9": 0.1}),
        ("average", math.nan),
        ("exp_avg", torch.zeros(3)),
        ("exp_avg", torch.zeros(20, 784).to_sparse()),
        ("exp_avg", torch.full((20, 784), math.nan)),
        ("exp_avg", 0.5),
        ("step", torch.zeros(2, 3)),
    ],
)
def test_a_state_that_cannot_be_that_of_the_run_is_refused(averaged, tmp_path, part, values):
    """PyTorch would compute with it, or crash."""
    checkpoint = load(the_run(averaged) / "last")
    states = checkpoint["optimizer_state_dict"]["state"].values()
    (weights,) = (state for state in states if state["exp_avg"].shape == (20, 784))
    if part == "state":
        checkpoint["optimizer_state_dict"]["state"].popitem()
    elif part in ("progress", "margins") and values:
        checkpoint[part].update(values)
    elif part == "history":
        checkpoint["progress"]["history"][0].update(values)
    elif part == "average":
        checkpoint["average_state_dict"]["module.layers.1.weight"][0, 0] = values
    elif part in weights:
        weights[part] = values
    else:
        checkpoint[part] = values
    torch.save(checkpoint, tmp_path / "changed_last")
    arguments = "--train", "--resume", tmp_path / "changed_last", *small(averaged, AVERAGING)
    message = refused(*arguments, model=SmallSNN)
    assert "cannot be resumed" in message or "the configuration of checkpoint" in message


def test_a_resumed_run_keeps_the_margin_of_stability_that_it_began_with(tmp_path):
    settings = small(tmp_path, AVERAGING)
    path = stopped(settings, after=2).run.last
    checkpoint = load(path)
    trial = experiment(settings, stop_after=2)
    synapses = {name: trial.model.get_submodule(name) for name in ("layers.0", "layers.3")}
    assert checkpoint["margins"] == {name: one.margin for name, one in synapses.items()}
    checkpoint["margins"]["layers.3"] = 2e-4
    torch.save(checkpoint, path)
    with pytest.raises(Stopped):
        trial.train(load_checkpoint(path))
    for model in (trial.model, trial.state.average.module):
        assert model.get_submodule("layers.3").margin == 2e-4
    assert load(trial.run.last)["margins"] == checkpoint["margins"]
    del checkpoint["margins"]  # as earlier versions wrote it
    torch.save(checkpoint, path)
    with pytest.raises(Stopped):
        experiment(settings, stop_after=2).train(load_checkpoint(path))


class LastIsBest(DigitClassification):
    scored = 0.0

    def score(self, metrics):
        self.scored += 1
        return (self.scored,)


def test_a_best_checkpoint_that_a_kill_prevented_is_written_on_resuming(tmp_path):
    settings = small(tmp_path, AVERAGING)
    experiment(settings, task=LastIsBest()).train()
    best, last = (the_run(tmp_path) / which for which in ("best", "last"))
    written = load(best)
    best.unlink()
    experiment(settings, task=LastIsBest()).train(load_checkpoint(last))
    for key in ("epoch", "metrics", "snn_state_dict"):
        assert_equal_states(load(best)[key], written[key])


def test_a_scheduler_that_counts_batches_needs_as_many_an_epoch(tmp_path):
    settings = small(tmp_path, "scheduler.scheduler_choice=CyclicLR", "hyperparameters.epoch=1")
    experiment(settings).train()
    longer = [*settings, "hyperparameters.epoch=2"]
    message = refused(
        "--train", "--resume", *longer, "hyperparameters.batch_size=32", model=SmallSNN
    )
    assert "batch_size or the number of samples cannot change when" in message
    train("--resume", *longer, model=SmallSNN)


def test_gradients_too_large_only_together_are_traced_to_the_largest_one(tmp_path):
    class Steep(DigitClassification):
        def loss(self, model, batch):
            loss, sums = super().loss(model, batch)
            return loss * 1e25, sums

    finished = run("--train", *small(tmp_path), model=SmallSNN, task=Steep())
    assert finished.code == 1
    assert "the gradient's norm inf (the largest is " in finished.err
    assert "in the gradient of layers." in finished.err


def test_chunks_of_a_network_that_normalises_over_all_steps_are_refused(tmp_path):
    def normalised(config):
        batch = nn.BatchNorm1d(784, track_running_stats=False)
        return Sequential(PerStep(batch), nn.Linear(784, 10))

    message = refused("--train", *small(tmp_path, "hyperparameters.chunk=2"), model=normalised)
    assert message == "hyperparameters.chunk is 2, but a layer normalises over all steps"


@pytest.mark.parametrize(
    "use",
    [
        "--train --resume {}/last",
        "--train first_weights={}/best",
        "--test test_checkpoint_path={}/best",
    ],
)
def test_weights_of_another_model_are_refused(trained, use):
    typed = use.format(the_run(trained)).split()
    message = refused(*small(trained), *typed, model=snn_mlp_1.SNN)
    assert "belongs to another model: " in message
    assert "layers." in message


@pytest.mark.parametrize("part", ["optimizer_state_dict", "snn_state_dict", "rng", "data"])
def test_a_checkpoint_that_is_refused_leaves_the_model_as_it_was(averaged, part):
    trial = experiment(small(averaged, AVERAGING))
    before, found = copy.deepcopy(trial.model.state_dict()), trial.evaluate("validation")[0]
    checkpoint = load_checkpoint(the_run(averaged) / "last")
    if part == "data":
        trial.task.check_data = Mock(side_effect=InputError("another readout"))
    else:
        checkpoint[part] = {}
    with pytest.raises(InputError):
        trial.train(checkpoint)
    assert_equal_states(dict(trial.model.state_dict()), dict(before))
    assert trial.evaluate("validation")[0] == found
    assert trial.has_first_weights


def test_a_network_of_other_data_is_refused_before_it_is_loaded(averaged):
    trial = experiment(small(averaged))
    before = copy.deepcopy(trial.model.state_dict())
    trial.task.check_data = Mock(side_effect=InputError("another readout"))
    with pytest.raises(InputError, match="another readout"):
        trial.test(the_run(averaged) / "best")
    assert_equal_states(dict(trial.model.state_dict()), dict(before))


WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@pytest.mark.parametrize(
    "name", [pytest.param("cuda", marks=WITHOUT_CUDA), "cuda:77", "meta", "gpu", "", "cpu:x"]
)
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(InputError, match=f"device={name!r} is not available here, use device=cpu"):
        choose_device(name)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_modes_around_an_experiment_change_nothing(tmp_path, mode):
    plain = experiment(small(tmp_path, "name=plain"))
    plain.train()
    with mode():
        around = experiment(small(tmp_path, "name=around"))
        around.train()
        around.test()
    assert_equal_states(dict(around.model.state_dict()), dict(plain.model.state_dict()))


def test_an_experiment_leaves_the_draws_of_a_loop_around_it_as_they_are(tmp_path):
    before = torch.get_rng_state()
    trial = experiment(small(tmp_path))
    trial.train()
    trial.test()
    assert torch.equal(torch.get_rng_state(), before)


class Draws(DigitClassification):
    def loss(self, model, batch):
        loss, sums = super().loss(model, batch)
        return loss, sums | {"loss": torch.rand(()) * sums["samples"]}


def test_a_loss_that_draws_is_the_same_in_every_test_of_a_checkpoint(tmp_path):
    trial = experiment(small(tmp_path), task=Draws())
    tested = trial.train()["test"]
    assert tested == trial.test() == experiment(small(tmp_path), task=Draws()).test()


def test_another_default_device_is_refused():
    with torch.device("meta"), pytest.raises(InputError, match="leave PyTorch's default device"):
        Experiment(SmallSNN, DigitClassification())


def test_the_device_is_chosen_by_itself():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_kernels_are_chosen_and_named(tmp_path, monkeypatch):
    settings = small(tmp_path, "hyperparameters.epoch=1")
    assert "kernels cpu (llvmlite)" in train(*settings, model=SmallSNN).out
    monkeypatch.setattr(eager, "backward", Mock(wraps=eager.backward))
    chosen = train(*settings, "backend=eager", model=SmallSNN)
    assert "kernels eager (forced by use_backend)" in chosen.out
    assert eager.backward.called


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hyperparameters.batch_size=257", "there are 256 images to train on: set it to that or l"),
        ("backend=cuda", "backend=cuda: "),
        ("backend=fast", "backend"),
    ],
)
def test_settings_that_neither_data_nor_machine_allow_are_refused(tmp_path, override, message):
    assert message in refused("--train", *small(tmp_path, override), model=SmallSNN)


def test_a_backend_whose_package_is_missing_is_refused(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"{name} cannot be imported")

    monkeypatch.setattr("snn_lib.kernels._module", missing)
    said = refused("--train", *small(tmp_path, "backend=cuda"), model=SmallSNN)
    assert "backend=cuda: cuda cannot be imported" in said

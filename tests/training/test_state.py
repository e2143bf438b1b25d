"""What training holds beside the model: optimiser, learning rates, and the best epoch."""

import csv
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from running import load
from torch import nn
from torch.optim import SGD, lr_scheduler

from snn_lib import LowPassSynapse, Sequential
from snn_lib.settings import ExperimentConfig, setting
from snn_lib.tasks import SequenceClassification
from snn_lib.tasks.association import AssociationConfig
from snn_lib.tasks.base import add_sums, read_sums
from snn_lib.tasks.digits import DigitConfig
from snn_lib.tasks.event_vision import EventConfig
from snn_lib.training import Experiment
from snn_lib.training.config import load_config
from snn_lib.training.state import (
    Progress,
    TrainingState,
    decisive_settings,
    get_optimizer,
    get_scheduler,
    progress_of,
    steps_every_batch,
)

STEPS = 40
OPTIONS = {
    "MultiStepLR": {"milestones": [5, 12], "gamma": 0.3},
    "CosineAnnealingWarmRestarts": {"T_0": 4, "T_mult": 2, "eta_min": 0.0},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.4, "step_size_up": 7},
    "OneCycleLR": {"max_lr": 0.4, "pct_start": 0.2, "div_factor": 5.0, "final_div_factor": 50.0},
}
EXTRA = {
    "CyclicLR": {"cycle_momentum": False},
    "OneCycleLR": {"cycle_momentum": False, "total_steps": STEPS},
}


def config(section, choice, **options):
    conf = DigitConfig()
    setattr(getattr(conf, section), f"{section}_choice", choice)
    for key, value in options.items():
        setattr(getattr(getattr(conf, section), choice), key, value)
    return conf


def scheduling(choice):
    return config("scheduler", choice, **OPTIONS.get(choice, {}))


def sgd(*rates):
    return SGD([{"params": nn.Linear(1, 1).parameters(), "lr": rate} for rate in rates])


@pytest.mark.parametrize(
    ("choice", "options"),
    [
        ("Adam", {"lr": 0.02, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.3}),
        ("AdamW", {"lr": 0.02, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.3}),
        ("SGD", {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.3, "nesterov": True}),
    ],
)
def test_steps_are_those_of_pytorchs_optimiser_with_these_options(choice, options):
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    pairs = [
        (ours, get_optimizer(ours.parameters(), config("optimizer", choice, **options))),
        (theirs, getattr(torch.optim, choice)(theirs.parameters(), **options)),
    ]
    for _ in range(5):
        x = torch.randn(8, 5)
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"fused": False}, False),
        ({"foreach": True}, None),
        ({"foreach": None}, True),
        ({"differentiable": True}, None),
    ],
)
def test_a_configuration_of_2020_may_choose_how_adam_computes(options, fused):
    options = SimpleNamespace(optimizer_choice="Adam", Adam={"lr": 0.1, **options})
    made = get_optimizer(nn.Linear(5, 3).parameters(), SimpleNamespace(optimizer=options))
    assert made.defaults["fused"] is fused


def test_a_schedule_of_2020_may_change_the_momentum():
    plan = {"base_lr": 0.1, "max_lr": 0.2, "cycle_momentum": True, "base_momentum": 0.8}
    options = SimpleNamespace(scheduler_choice="CyclicLR", CyclicLR=plan)
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=0.1, momentum=0.9)
    get_scheduler(optimizer, SimpleNamespace(scheduler=options))
    optimizer.step()
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.9)
    assert "base_momentum" in optimizer.param_groups[0]


@pytest.mark.parametrize("choice", ["Adam", "AdamW"])
def test_options_that_nobody_sets_are_those_of_pytorch(choice):
    """But for the learning rate, which everybody sets, and SGD's momentum."""
    weights = nn.Linear(5, 3).parameters()
    ours = get_optimizer(weights, config("optimizer", choice)).defaults
    theirs = getattr(torch.optim, choice)(nn.Linear(5, 3).parameters()).defaults
    for name in ("betas", "eps", "weight_decay"):
        assert tuple(np.atleast_1d(ours[name])) == tuple(np.atleast_1d(theirs[name])), name


def rates(optimizer, scheduler):
    seen = []
    for _ in range(STEPS):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return torch.tensor(seen, dtype=torch.float64)


@pytest.mark.parametrize("choice", OPTIONS)
def test_learning_rates_are_pytorchs_and_groups_keep_their_ratio(choice):
    ours, theirs = sgd(0.1, 0.02), sgd(0.1)
    options = {**OPTIONS[choice], **EXTRA.get(choice, {})}
    expected = rates(theirs, getattr(lr_scheduler, choice)(theirs, **options))
    measured = rates(ours, get_scheduler(ours, scheduling(choice), STEPS))
    assert expected.unique().numel() > 2
    torch.testing.assert_close(measured[:, :1], expected)
    torch.testing.assert_close(measured[:, 1:], expected * 0.2)
    alone = sgd(0.02)  # of coefficients, without weights
    measured = rates(alone, get_scheduler(alone, scheduling(choice), STEPS, lr=0.1))
    torch.testing.assert_close(measured, expected * 0.2)


def test_the_rate_of_a_short_run_is_highest_at_its_first_step():
    scheduled = sgd(0.1)
    scheduler = get_scheduler(scheduled, scheduling("OneCycleLR"), 5)  # of which a fifth is one
    seen = []
    for _ in range(5):
        seen.append(scheduled.param_groups[0]["lr"])
        scheduled.step()
        scheduler.step()
    assert seen == sorted(seen, reverse=True)
    assert 0.3 < seen[0] <= 0.4
    assert seen[-1] < 0.02


@pytest.mark.parametrize(
    ("choice", "every_batch"),
    [
        ("MultiStepLR", False),
        ("CosineAnnealingWarmRestarts", False),
        ("CyclicLR", True),
        ("OneCycleLR", True),
        ("none", False),
    ],
)
def test_which_schedulers_count_batches(choice, every_batch):
    assert steps_every_batch(get_scheduler(sgd(0.1), scheduling(choice), STEPS)) is every_batch


def test_without_a_scheduler_the_learning_rate_stays():
    assert get_scheduler(sgd(0.1), scheduling("none")) is None


def test_the_rate_of_filters_alone_is_a_share_of_the_schedule_s():
    config = load_config(DigitConfig, None, ["name=alone", "scheduler.scheduler_choice=OneCycleLR"])
    config.optimizer.coefficient_lr_scale = 0.1
    config.scheduler.OneCycleLR.max_lr, config.scheduler.OneCycleLR.div_factor = 0.5, 1.0
    state = TrainingState(LowPassSynapse(3, 4.0), config, torch.device("cpu"), 3)
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_a_path_that_an_earlier_version_kept_as_it_was_typed_is_the_same(monkeypatch):
    @dataclasses.dataclass
    class Own(ExperimentConfig):
        data_folder: str = setting("", "where my data is")
        folders: list[str] = setting([], "other places")

    monkeypatch.setenv("HOME", "/somewhere")
    ours = Own(data_folder="/somewhere/data", folders=["/somewhere/a"])
    state = TrainingState(nn.Linear(2, 2), ours, torch.device("cpu"), 3)
    theirs = dataclasses.asdict(Own(data_folder="~/data", folders=["~/a"]))
    fixed = [state._fixed_settings(one, Progress()) for one in (theirs, dataclasses.asdict(ours))]
    assert fixed[0] == fixed[1]
    assert fixed[0]["data_folder"] == "/somewhere/data"


def test_optimiser_and_scheduler_take_a_plain_omegaconf_configuration():
    conf = OmegaConf.create(
        {
            "optimizer": {"optimizer_choice": "Adam", "Adam": {"lr": 0.5}},
            "scheduler": {"scheduler_choice": "MultiStepLR", "MultiStepLR": {"milestones": [2]}},
        }
    )
    optimizer = get_optimizer(nn.Linear(2, 2).parameters(), conf)
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert dict(get_scheduler(optimizer, conf).milestones) == {2: 1}


@pytest.mark.parametrize(
    ("choose", "section", "choice", "expected"),
    [
        (get_optimizer, "optimizer", "Adma", "Adam, AdamW, SGD"),
        (get_scheduler, "scheduler", "MultStepLR", "MultiStepLR, "),
        (get_scheduler, "scheduler", "Optimizer", "MultiStepLR, "),  # a class of PyTorch's as well
    ],
)
def test_an_unknown_choice_is_refused(choose, section, choice, expected):
    conf = OmegaConf.create({section: {f"{section}_choice": choice, choice: {}}})
    given = sgd(0.1) if section == "scheduler" else nn.Linear(2, 2).parameters()
    with pytest.raises(ValueError, match=f"{choice!r}, expected one of {expected}"):
        choose(given, conf)


def test_an_epoch_begins_without_sums_and_times():
    progress = Progress(batch=3, batches=3, sums={"samples": 9}, seconds=2.0, data_seconds=1.0)
    progress.finish_epoch({"epoch": 1})
    assert progress == Progress(epoch=1, batches=3, history=[{"epoch": 1}])


def test_counts_of_a_resumed_epoch_are_added_up_exactly():
    sums = {"samples": 8.0, "loss": 0.5, "correct": 2.0**24 + 1}  # as a checkpoint has them
    values = {**vars(Progress(batch=3, batches=9)), "sums": sums}
    progress = progress_of({"progress": values}, SequenceClassification({}))
    add_sums(progress.sums, {"correct": torch.tensor(2)})
    assert read_sums(progress.sums)["correct"] == 2**24 + 3


class Popping(SequenceClassification):
    def metrics(self, sums):
        count = sums.pop("samples")
        return {"loss": sums.pop("loss") / count, "accuracy": sums.pop("correct") / count}


@pytest.mark.parametrize("loss", [0.5, math.inf, -math.inf, math.nan])
def test_a_resumed_epoch_has_its_sums_whatever_they_are_and_metrics_do_with_them(loss):
    sums = {"samples": 8.0, "loss": loss, "correct": 2.0}
    values = {**vars(Progress(batch=3, batches=9)), "sums": sums}
    found = progress_of({"progress": values}, Popping({})).sums
    assert found == pytest.approx(sums, nan_ok=True)


def build_model(config):
    return Sequential(LowPassSynapse(2, tau=3), nn.Linear(2, 2))


def test_the_best_epoch_is_that_of_the_validation_and_not_of_the_training(tmp_path):
    y = torch.arange(64) % 2
    x = torch.rand(64, 5, 2) + nn.functional.one_hot(y)[:, None]
    opposite = x, 1 - y  # what is learned is wrong here
    task = SequenceClassification({"train": (x, y), "validation": opposite}, "mean")
    config = task.config_class(name="mine", device="cpu", runs_path=str(tmp_path))
    config.hyperparameters.epoch = 4
    config.optimizer.Adam.lr = 0.05
    experiment = Experiment(build_model, task, config)
    finished = experiment.train()
    with open(experiment.run.best.parent / "metrics.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]

    def best_of(split):
        scores = [(row[f"{split}_accuracy"], -row[f"{split}_loss"]) for row in rows]
        return 1 + scores.index(max(scores))

    assert best_of("train") == 4
    assert best_of("validation") == 1
    assert load(experiment.run.best)["epoch"] == finished["best"]["epoch"] == 1


@pytest.mark.parametrize(
    ("config", "decisive", "others"),
    [
        (
            EventConfig(),
            {"seed", "dataset", "events.order", "events.validation_size", "camera.noise"},
            {"name", "device", "dataset_path", "events.path", "events.test_size", "events"},
        ),
        (
            AssociationConfig(),
            {"pattern_config.validation_samples", "damage.varied", "hyperparameters.weight_bits"},
            {"pattern_config.test_samples", "hyperparameters.dropout", "optimizer.AdamW.lr"},
        ),
    ],
)
def test_what_decides_the_validation_is_neither_where_nor_how_a_network_is_trained(
    config, decisive, others
):
    found = {*decisive_settings(config)}
    assert decisive <= found
    assert not others & found
    assert not found & {f"hyperparameters.{name}" for name in ("epoch", "batch_size", "chunk")}


@pytest.mark.parametrize("kind", [iter, list, dict.fromkeys, torch.nn.ParameterList])
def test_groups_of_parameters_are_learned_in_any_form(kind):
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(()))]
    group = get_optimizer(
        [{"params": kind(weights)}, {"params": torch.nn.Parameter(torch.ones(()))}], DigitConfig()
    )
    assert [len(one["params"]) for one in group.param_groups] == [2, 1]
    named = get_optimizer([(str(n), w) for n, w in enumerate(weights)], DigitConfig())
    assert len(named.param_groups[0]["params"]) == 2

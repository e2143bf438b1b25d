"""Schedulers: PyTorch's learning rates for every group, stepped by the batch or by the epoch."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.optim import SGD, lr_scheduler

from snn_lib.tasks.digits import DigitConfig
from snn_lib.training.state import get_scheduler, steps_every_batch

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


def optimizer(*rates):
    return SGD([{"params": nn.Linear(1, 1).parameters(), "lr": rate} for rate in rates])


def config(choice):
    conf = DigitConfig()
    conf.scheduler.scheduler_choice = choice
    for key, value in OPTIONS.get(choice, {}).items():
        setattr(getattr(conf.scheduler, choice), key, value)
    return conf


def rates(optimizer, scheduler):
    seen = []
    for _ in range(STEPS):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return torch.tensor(seen, dtype=torch.float64)


@pytest.mark.parametrize("choice", OPTIONS)
def test_learning_rates_are_pytorchs_and_groups_keep_their_ratio(choice):
    ours, theirs = optimizer(0.1, 0.02), optimizer(0.1)
    options = {**OPTIONS[choice], **EXTRA.get(choice, {})}
    expected = rates(theirs, getattr(lr_scheduler, choice)(theirs, **options))
    measured = rates(ours, get_scheduler(ours, config(choice), STEPS))
    assert expected.unique().numel() > 2
    torch.testing.assert_close(measured[:, :1], expected)
    torch.testing.assert_close(measured[:, 1:], expected * 0.2)


def test_a_run_so_short_that_the_rate_rises_within_its_first_step():
    scheduled = optimizer(0.1)
    scheduler = get_scheduler(scheduled, config("OneCycleLR"), 5)  # of which a fifth is one
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
    assert steps_every_batch(get_scheduler(optimizer(0.1), config(choice), STEPS)) is every_batch


def test_none_leaves_the_learning_rate_alone():
    assert get_scheduler(optimizer(0.1), config("none")) is None


def test_a_plain_omegaconf_configuration_does_as_well():
    conf = OmegaConf.create(
        {"scheduler": {"scheduler_choice": "MultiStepLR", "MultiStepLR": {"milestones": [2]}}}
    )
    assert dict(get_scheduler(optimizer(0.1), conf).milestones) == {2: 1}


@pytest.mark.parametrize("choice", ["MultStepLR", "Optimizer"])
def test_an_unknown_choice_is_refused(choice):
    conf = OmegaConf.create({"scheduler": {"scheduler_choice": choice, "Optimizer": {}}})
    with pytest.raises(ValueError, match=f"{choice!r}, expected one of MultiStepLR, "):
        get_scheduler(optimizer(0.1), conf)

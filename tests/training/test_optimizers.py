"""Optimisers: the chosen one with its options."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from snn_lib.tasks.digits import DigitConfig
from snn_lib.training.state import get_optimizer


def config(choice, **options):
    conf = DigitConfig()
    conf.optimizer.optimizer_choice = choice
    for key, value in options.items():
        setattr(getattr(conf.optimizer, choice), key, value)
    return conf


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
        (ours, get_optimizer(ours.parameters(), config(choice, **options))),
        (theirs, getattr(torch.optim, choice)(theirs.parameters(), **options)),
    ]
    for _ in range(5):
        x = torch.randn(8, 5)
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choice", ["Adam", "AdamW"])
def test_options_that_nobody_sets_are_pytorch_s(choice):
    """But for the learning rate, which everybody sets, and SGD's momentum."""
    weights = nn.Linear(5, 3).parameters()
    ours = get_optimizer(weights, config(choice)).defaults
    theirs = getattr(torch.optim, choice)(nn.Linear(5, 3).parameters()).defaults
    for name in ("betas", "eps", "weight_decay"):
        assert tuple(np.atleast_1d(ours[name])) == tuple(np.atleast_1d(theirs[name])), name


def test_a_plain_omegaconf_configuration_does_as_well():
    conf = OmegaConf.create({"optimizer": {"optimizer_choice": "Adam", "Adam": {"lr": 0.5}}})
    optimizer = get_optimizer(nn.Linear(2, 2).parameters(), conf)
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_an_unknown_choice_is_refused():
    conf = OmegaConf.create({"optimizer": {"optimizer_choice": "Adma"}})
    with pytest.raises(ValueError, match="'Adma', expected one of Adam, AdamW, SGD"):
        get_optimizer(nn.Linear(2, 2).parameters(), conf)

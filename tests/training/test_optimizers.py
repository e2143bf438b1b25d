"""Optimisers: the chosen one with its options, and the group of filter coefficients."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from snn_lib import DualExponentialSynapse, IIRSynapse, LowPassSynapse, Sequential, SpikingNeuron
from snn_lib.tasks.digits import DigitConfig
from snn_lib.training.optimisation import get_optimizer, parameter_groups


def network():
    return Sequential(
        DualExponentialSynapse(6, 4.0, 1.0),
        nn.Linear(6, 5),
        SpikingNeuron(5, 4.0),
        LowPassSynapse(5, 4.0),
        nn.Linear(5, 4, bias=False),
        IIRSynapse(4, (0.5,), (1.0, 0.2), train_beta=False),
    )


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


def test_a_plain_omegaconf_configuration_does_as_well():
    conf = OmegaConf.create({"optimizer": {"optimizer_choice": "Adam", "Adam": {"lr": 0.5}}})
    optimizer = get_optimizer(nn.Linear(2, 2).parameters(), conf)
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_an_unknown_choice_is_refused():
    conf = OmegaConf.create({"optimizer": {"optimizer_choice": "Adma"}})
    with pytest.raises(ValueError, match="'Adma', expected one of Adam, AdamW, SGD"):
        get_optimizer(nn.Linear(2, 2).parameters(), conf)


def test_every_parameter_is_in_one_group_and_coefficients_in_theirs():
    model = network()
    weights, coefficients = parameter_groups(model, config("AdamW"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(p)] for p in weights["params"]] == ["1.weight", "1.bias", "4.weight"]
    expected = ["0.alpha", "0.beta", "3.alpha", "5.alpha"]
    assert [names[id(p)] for p in coefficients["params"]] == expected


def test_coefficients_learn_at_the_scaled_rate_and_never_decay():
    conf = config("AdamW", lr=0.04, weight_decay=0.5)
    conf.optimizer.coefficient_lr_scale = 0.25
    model = network()
    optimizer = get_optimizer(parameter_groups(model, conf), conf)
    weights, coefficients = optimizer.param_groups
    assert (weights["lr"], weights["weight_decay"]) == (0.04, 0.5)
    assert (coefficients["lr"], coefficients["weight_decay"]) == (0.01, 0.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = (
            before[name] * (1 - 0.04 * 0.5) if "weight" in name or "bias" in name else before[name]
        )
        torch.testing.assert_close(parameter, expected)


def test_a_network_without_trained_filters_has_one_group():
    model = Sequential(
        DualExponentialSynapse(3, 4.0, 1.0, train_coefficients=False), nn.Linear(3, 2)
    )
    (group,) = parameter_groups(model, config("SGD"))
    assert len(group["params"]) == 2

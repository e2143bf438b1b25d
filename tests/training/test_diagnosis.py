"""Finding out what broke: the first batch that is not finite, and settings that no layer takes."""

import math
import re

import pytest
import torch
from claimed_device import ClaimedDevice
from running import SmallSNN, refused, tiny
from torch import nn

import snn_mlp_1
from snn_lib import LowPassSynapse, Sequential, SpikingNeuron, fire_from_the_start
from snn_lib.errors import InputError, RunError
from snn_lib.training.diagnosis import FiniteCheck, blaming, troubled_layers

CPU = torch.device("cpu")


def network(inputs=20, neurons=30):
    return Sequential(
        LowPassSynapse(inputs, 4.0), nn.Linear(inputs, neurons), SpikingNeuron(neurons, 4.0)
    )


def test_a_loss_may_lie_on_another_device_than_the_network():
    with ClaimedDevice():
        device = torch.device("cuda", 0)
        check = FiniteCheck(network(), device)
        check.watch(1, 1, torch.tensor(0.5), torch.tensor(0.1, device=device))
        assert check.first_broken.device == device


def number(value):
    return torch.tensor(value)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, 2.0)])
def test_on_a_cpu_a_batch_that_is_not_finite_is_told_at_once(loss, norm):
    model = network()
    model(torch.rand(5, 2, 20))[0].sum().backward()
    numbers = FiniteCheck(model, CPU)
    numbers.watch(1, 1, number(0.5), number(1.0))
    with pytest.raises(RunError, match=f"epoch 2, batch 3: the loss is {loss:g} .* norm {norm:g}"):
        numbers.watch(2, 3, number(loss), number(norm))


def test_on_a_device_the_first_batch_that_is_not_finite_is_told_some_batches_later():
    numbers = FiniteCheck(network(), CPU)
    numbers.patience = FiniteCheck(network(), torch.device("meta")).patience  # a device to wait for
    assert numbers.patience > 7
    for batch in range(1, numbers.patience):
        numbers.watch(1, batch, number(math.nan if batch >= 7 else 0.1), number(2.0))
    message = "epoch 1, batch 7: the loss is nan and the gradient's norm 2"
    with pytest.raises(RunError, match=message):
        numbers.watch(1, numbers.patience, number(0.1), number(2.0))
    with pytest.raises(RunError, match=message):
        numbers.check()


def test_weights_and_buffers_that_are_not_finite_are_named():
    model = network()
    numbers = FiniteCheck(model, CPU)
    numbers.check_weights(1)
    model[1].bias.data[3] = math.inf
    with pytest.raises(RunError, match=r"epoch 4: 1\.bias not finite"):
        numbers.check_weights(4)
    model = nn.Sequential(LowPassSynapse(2, 5.0, train_coefficients=False), nn.BatchNorm1d(2))
    model[0].beta.fill_(math.nan)
    model[1].running_var[1] = math.inf
    with pytest.raises(RunError, match=r"epoch 5: 0\.beta, 1\.running_var not finite"):
        FiniteCheck(model, CPU).check_weights(5)


def test_the_widest_filter_and_the_largest_gradient_are_named():
    model = Sequential(LowPassSynapse(2, 30.0), nn.Linear(2, 2), LowPassSynapse(2, 3.0))
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, -1000.0 if name == "1.weight" else 1.0)
    words = r"the largest is 1000, in the gradient of 1\.weight\); .* 0\.9672, in layer 0\."
    with pytest.raises(RunError, match=words):
        FiniteCheck(model, CPU).watch(1, 1, number(0.5), number(math.inf))


def test_a_filter_whose_coefficients_are_not_finite_has_no_pole_radius():
    model = Sequential(LowPassSynapse(2, 30.0), LowPassSynapse(2, 3.0))
    model[1].alpha.data[0, 0] = math.nan
    with pytest.raises(RunError, match=r"the largest pole radius is 0\.9672, in layer 0\."):
        FiniteCheck(model, CPU).watch(1, 1, number(0.5), number(math.inf))


def test_silent_saturated_and_unstable_layers_are_named_with_their_numbers():
    found = dict(troubled_layers({"a": 0.0, "b": 0.9, "c": 0.99}, {"d": 0.9, "e": 1.2, "f": 1.0}))
    assert list(found) == [
        "layer a is silent",
        "layer c fires at almost every step",
        "layer e is unstable",
        "layer f is unstable",
    ]
    assert "a 0.0000, b 0.9000, c 0.9900" in found["layer a is silent"]
    assert "its pole radius is 1.2000" in found["layer e is unstable"]


# ---------------------------------------------------------------------------------------------
# Settings with which a model cannot be built


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hyperparameters.tau_m=1e6", "the model: a filter is too near the edge of the stable"),
        ("hyperparameters.dropout=0.5", "the model: dropout is 1.5, expected a probability"),
    ],
)
def test_a_setting_that_a_layer_refuses_is_told_of_the_model_in_a_line(tmp_path, override, message):
    class Demanding(snn_mlp_1.SNN):
        def __init__(self, config):
            config.hyperparameters.dropout += config.hyperparameters.dropout == 0.5
            super().__init__(config)

    line = refused("--train", *tiny(tmp_path, override), model=Demanding)
    assert line.startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_what_first_weights_cannot_do_is_told_of_them(tmp_path):
    def initialise(model, task):
        fire_from_the_start(model, next(task.batches("train")).x, 0.999999)

    arguments = "--train", *tiny(tmp_path)
    line = refused(*arguments, model=SmallSNN, initialise=initialise)
    assert re.fullmatch(r"first weights: .* cannot be made to fire at 0.999999: .*", line)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(2**32, 2**32),
        lambda: nn.Linear(10**8, 10**7),
        lambda: torch.empty(2**62),
    ],
)
def test_layers_that_do_not_fit_into_the_memory_are_blamed(make):
    told = "^the model does not fit into the memory, make its layers smaller"
    with pytest.raises(InputError, match=told), blaming("the model"):
        make()


@pytest.mark.parametrize("error", [ValueError("too many values"), RuntimeError("a bug")])
def test_an_error_of_the_user_s_own_code_passes_through(error):
    def wrong():
        raise error

    with pytest.raises(type(error), match=str(error)), blaming("the model"):
        wrong()

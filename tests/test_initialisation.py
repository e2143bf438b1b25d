"""First weights: every layer fires at the rate asked for, and the last one answers already."""

import copy

import numpy as np
import pytest
import torch
from small_networks import RenamedInput
from torch import nn
from torch.nn.utils import parametrizations, prune

from snn_lib import (
    Cell,
    Chunked,
    DualExponentialSynapse,
    LowPassSynapse,
    PerStep,
    Recurrent,
    Sequential,
    SpikingNeuron,
    answer_from_the_start,
    fire_from_the_start,
)
from snn_lib.initialisation import PENALTIES, fit_readout, ridge_regression, scale_of_logits
from snn_lib.readout import Mean

DEPTH = 5


def deep(**options):
    layers = []
    for _ in range(DEPTH):
        layers += [
            DualExponentialSynapse(30, 8.0, 2.0),
            nn.Linear(30, 30, **options),
            SpikingNeuron(30, 8.0),
        ]
    return Sequential(*layers)


def spikes():
    return (torch.rand(60, 16, 30) < 0.05).float()


def rates(model, x):
    return [
        output.mean().item()
        for module, output in zip(model, model.layerwise(x)[0], strict=True)
        if isinstance(module, SpikingNeuron)
    ]


@pytest.mark.parametrize("rate", [0.02, 0.2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_deep_network_fires_at_the_rate_in_every_layer(rate, bias):
    model, x = deep(bias=bias), spikes()
    assert rates(model, x)[-1] == 0  # with PyTorch's first weights
    found = fire_from_the_start(model, x, rate)
    assert list(found) == [str(3 * k + 2) for k in range(DEPTH)]
    torch.testing.assert_close(rates(model, x), list(found.values()), rtol=0.05, atol=0)
    assert all(0.8 * rate < one < 1.3 * rate for one in found.values())
    assert all(one == pytest.approx(rate, rel=0.4) for one in rates(model, spikes()))


def test_an_autocast_that_has_run_the_network_sees_the_scaled_weights():
    model, x = deep(), spikes()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        found = list(fire_from_the_start(model, x, 0.1).values())
        seen = rates(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert seen == rates(model, x)
    torch.testing.assert_close(seen, found)
    assert all(0.08 < one < 0.13 for one in found)


def test_padding_does_not_count_in_first_rates():
    model, lengths = deep(), torch.arange(10, 58, 3)
    x = torch.cat([spikes(), torch.zeros(200, 16, 30)])
    within = torch.arange(260)[:, None] < lengths
    found = fire_from_the_start(model, x, 0.1, lengths)
    for name, layer in zip(found, range(2, 3 * DEPTH, 3), strict=True):
        own = model.layerwise(x)[0][layer][within].mean().item()
        assert found[name] == pytest.approx(own)
        assert 0.08 < own < 0.13


def test_the_rates_that_are_returned_are_those_of_a_run():
    """Also where a normalisation undoes the scale, and where the current comes by keyword."""

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights, self.neurons = nn.Linear(30, 20), SpikingNeuron(20, 4.0)

        def forward(self, x):
            current = self.weights(x)
            return self.neurons(x=(current - current.mean()) / current.std())

    model, x = Normalised(), spikes()
    found = fire_from_the_start(model, x, 0.02)
    assert found == {"neurons": pytest.approx(model(x)[0].mean().item())}
    assert found["neurons"] > 0.05


def test_weights_are_scaled_by_one_number_a_layer_and_nothing_else_changes():
    model = deep()
    before = copy.deepcopy(model.state_dict())
    fire_from_the_start(model, spikes())
    for name, value in model.state_dict().items():
        if name.endswith(("weight", "bias")):
            ratio = value / before[name]
            torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.flatten()[0].item()))
        else:
            assert torch.equal(value, before[name])
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_of_several_layers_before_neurons_the_last_is_scaled():
    model = Sequential(nn.Linear(30, 10), nn.Linear(10, 20), SpikingNeuron(20, 8.0))
    first = copy.deepcopy(model[0].state_dict())
    found = fire_from_the_start(model, spikes(), 0.1)
    assert found == {"2": pytest.approx(0.1, rel=0.05)}
    torch.testing.assert_close(model[0].state_dict(), first, rtol=0, atol=0)


def test_convolutions_fire_at_the_rate():
    model = Sequential(
        PerStep(nn.Conv2d(1, 4, 3)),
        SpikingNeuron((4, 6, 6), 4.0),
        LowPassSynapse((4, 6, 6), 4.0),
        PerStep(nn.Conv2d(4, 2, 3)),
        SpikingNeuron((2, 4, 4), 4.0),
    )
    found = fire_from_the_start(model, torch.rand(10, 3, 1, 8, 8), 0.1)
    assert all(rate == pytest.approx(0.1, rel=0.2) for rate in found.values())


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e7])
@pytest.mark.parametrize("membrane_filter", [False, True])
def test_input_of_any_size_makes_neurons_fire_at_the_rate(scale, membrane_filter):
    model = Sequential(nn.Linear(30, 20, bias=False), SpikingNeuron(20, 8.0, membrane_filter))
    found = fire_from_the_start(model, scale * 3 * torch.rand(100, 10, 30), 0.05)
    assert found == {"1": pytest.approx(0.05, rel=3e-3)}


def test_first_weights_are_found_without_dropout_and_random_numbers():
    model = Sequential(nn.Dropout(0.5), *deep()[1:3])
    model[-1].dropout = 0.5
    model[0].eval()  # of one's own choice
    modes = [module.training for module in model.modules()]
    x, before = spikes(), torch.get_rng_state()
    found = fire_from_the_start(model, x, 0.1)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert found == {"2": pytest.approx(0.1, rel=0.05)}
    assert model.eval()(x)[0].mean().item() == pytest.approx(found["2"])


class Fails(nn.Module):
    def __init__(self, at):
        super().__init__()
        self.runs, self.at = 0, at

    def forward(self, x):
        self.runs += 1
        if self.runs == self.at:
            raise KeyboardInterrupt
        return x


@pytest.mark.parametrize("at", [1, 2])
def test_an_error_leaves_the_network_as_it_was(at):
    model = deep().append(Fails(at))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        fire_from_the_start(model, spikes())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_leaves_convolutions_as_they_were():
    model = Sequential(PerStep(nn.Conv2d(1, 4, 3)), SpikingNeuron((4, 6, 6), 4.0), Fails(1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        fire_from_the_start(model, torch.rand(10, 3, 1, 8, 8), 0.1)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def deep_with(parametrise, name):
    """The network, in which something computes the weight or bias of a layer from others."""
    model = deep()
    parametrise(model[4], name)
    return model


def fire(model=None, x=None, rate=0.1, lengths=None):
    fire_from_the_start(model or deep(), spikes() if x is None else x, rate, lengths)


def kept_alive():
    """Neurons whose own bias makes them fire at every step."""
    back = nn.Linear(30, 30)
    nn.init.constant_(back.bias, 9.0)
    return Sequential(nn.Linear(30, 30), Recurrent(back, SpikingNeuron(30, 4.0)))


def tied(name):
    """Two layers of weights, each before neurons of its own, that share a parameter."""
    layers = nn.Linear(30, 30), nn.Linear(30, 30)
    setattr(layers[1], name, getattr(layers[0], name))
    return Sequential(layers[0], SpikingNeuron(30, 4.0), layers[1], SpikingNeuron(30, 4.0))


class Sign(Cell):
    """Neurons that fire where the current is positive."""

    @staticmethod
    def step(x, state, coefficients, fire):
        return fire(x + 1), ()


class Loud(Cell):
    """Neurons that fire where the current is above a small threshold."""

    @staticmethod
    def step(x, state, coefficients, fire):
        return fire(1e4 * x), ()


def test_neurons_that_small_currents_make_fire_get_small_weights():
    model = Sequential(nn.Linear(30, 30), Loud(30))
    rates = fire_from_the_start(model, spikes(), 0.1)
    assert rates["1"] == pytest.approx(0.1, abs=0.01)


def shared_with_what_comes_back():
    back = nn.Linear(30, 30)
    layer = nn.Linear(30, 30)
    layer.weight = back.weight
    return Sequential(layer, Recurrent(back, SpikingNeuron(30, 4.0)))


NEURONS_TWICE = Sequential(nn.Linear(30, 20), SpikingNeuron(20, 4.0), SpikingNeuron(20, 4.0))
REFUSED = [  # what is asked for, and the words
    (lambda: fire(x=torch.zeros(0, 2, 30)), r"x has shape \(0, 2, 30\), expected steps and"),
    (lambda: fire(x=torch.zeros(5, 0, 30)), r"x has shape \(5, 0, 30\), expected steps and"),
    (lambda: fire(x=torch.zeros(5, 2, 30).numpy()), "found ndarray, expected a tensor"),
    (lambda: fire(x=torch.zeros(5, 2, 30) * 1j), r"x is torch\.complex64, expected real numbers"),
    (lambda: fire(x=torch.full((5, 2, 30), torch.nan)), "the current of layer 2 is not finite"),
    (lambda: fire(x=torch.full((5, 2, 30), torch.inf)), "the current of layer 2 is not finite"),
    (lambda: fire(lengths=torch.zeros(16, dtype=torch.int64)), "all lengths are 0"),
    *((lambda rate=rate: fire(rate=rate), "expected spikes per neuron and step")
      for rate in (0.0, 1.0, -1.0)),
    (lambda: fire(deep(bias=False), torch.zeros(5, 2, 30), 0.05),
     r"layer 2 cannot be made to fire at 0\.05"),
    (lambda: fire(kept_alive()), "layer 1 cannot be made to fire at 0.1: it fires as often with"),
    (lambda: fire(Sequential(nn.Linear(30, 30), Sign(30))), "as often with currents of 1e-06"),
    (lambda: fire(Sequential(SpikingNeuron(30, 4.0))),
     r"no nn\.Linear or convolution of its own runs .* layer 0"),
    (lambda: fire(rate=0.95), "layer 2 .* fire at 0.95: it fires less .* too seldom positive"),
    (lambda: fire(NEURONS_TWICE), r"no nn\.Linear or convolution of its own runs .* layer 2"),
    *((lambda name=name: fire(tied(name)), "before the neurons of layer 3 are used at another pl")
      for name in ("weight", "bias")),
    (lambda: fire(shared_with_what_comes_back()), "of layer 1 are used at another place, too"),
    (lambda: fire(deep_with(parametrizations.weight_norm, "weight")),
     "are computed from others, by a parametrisation or"),
    (lambda: fire(deep_with(prune.identity, "weight")), "are computed from others"),
    (lambda: fire(deep_with(prune.identity, "bias")), "computed from others"),
    (lambda: fire(Chunked(deep(), 5)), "run several times, in chunks, a loop or several places"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_networks_inputs_and_rates_that_cannot_be_made_to_fire_are_refused(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def ridge(x, y, penalty):
    """Normal equations of a fit with a bias that no penalty holds back."""
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    held = torch.eye(ones.shape[1], dtype=x.dtype) * penalty
    held[-1, -1] = 0
    return torch.linalg.solve(ones.T @ ones + held, ones.T @ y)


@pytest.mark.parametrize("noise", [0.1, 3.0])
@pytest.mark.parametrize("inputs", [5, 19, 20, 40])
def test_ridge_regression_takes_the_penalty_that_predicts_left_out_samples_best(inputs, noise):
    x = torch.randn(20, inputs, dtype=torch.float64) * 3 + 1
    y = x[:, :2] + noise * torch.randn(20, 2, dtype=torch.float64)
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    leave_one_out = torch.empty(len(PENALTIES), 20, 2, dtype=torch.float64)
    for number, share in enumerate(PENALTIES):
        for index in range(20):
            others = torch.arange(20) != index
            fit = ridge(standard[others], y[others], share * inputs)
            leave_one_out[number, index] = standard[index] @ fit[:-1] + fit[-1]
    best = (leave_one_out - y).square().sum((1, 2)).argmin().item()
    expected = ridge(standard, y, PENALTIES[best] * inputs)
    found = ridge_regression(x, y)
    said = x @ found.weight.T + found.bias
    torch.testing.assert_close(said, standard @ expected[:-1] + expected[-1])
    torch.testing.assert_close(found.leave_one_out, leave_one_out[best])


def test_ridge_regression_holds_back_as_little_or_as_much_as_the_noise_asks_for():
    x, noise = torch.randn(200, 20).double(), torch.randn(200, 1).double()
    exact = x @ torch.randn(20, 1).double()

    def share(y, of):
        fit = ridge_regression(x, y)
        return (((x @ fit.weight.T + fit.bias) - of).std() / y.std()).item()

    assert share(exact, of=exact) < 1e-4
    assert share(noise, of=0.0) < 0.1  # of least squares: 0.32, the root of 20 / 200


def test_ridge_regression_keeps_its_digits_with_as_many_features_as_samples():
    x = torch.randn(400, 400)
    y = x[:, :1] + 0.01 * torch.randn(400, 1)
    found = ridge_regression(x, y)
    torch.testing.assert_close(ridge_regression(x.double(), y.double()), found)
    assert found.weight.dtype == torch.float64


def test_features_that_differ_by_rounding_alone_get_no_weight():
    x = torch.randn(30, 5, dtype=torch.float64)
    x[:, 0] = 0.3 + 1e-8 * torch.randn(30, dtype=torch.float64)
    weight, *_ = ridge_regression(x, torch.randn(30, 2, dtype=torch.float64))
    assert weight[:, 0].norm() < 1e-3 * weight[:, 1:].norm()


def test_an_autocast_that_has_run_the_last_layer_sees_its_new_weights():
    layer, features = nn.Linear(3, 2), torch.randn(40, 3)
    with torch.autocast("cpu", torch.bfloat16):
        layer(features)
        fit_readout(layer, features, (features[:, 0] > 0).long())
        seen = layer(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(seen, layer(features))


def test_the_last_layer_answers_from_the_start():
    """Of sequences of their own lengths, each by the mean over its own steps."""
    model = Sequential(
        nn.Linear(3, 40),
        SpikingNeuron(40, 4.0, dropout=0.5),
        LowPassSynapse(40, 2.0),
        nn.Linear(40, 3),
    )
    y, lengths = torch.arange(30) % 3, torch.randint(10, 21, (30,))
    x = torch.randn(20, 30, 3) + 3 * nn.functional.one_hot(y, 3)
    x[torch.arange(20)[:, None] >= lengths] = 100.0  # padding
    fire_from_the_start(model[:2], x[:10], 0.1)
    hidden = copy.deepcopy(model[:3].state_dict())
    batches = [(x[:, :12], y[:12], lengths[:12]), (x[:, 12:], y[12:], lengths[12:])]
    answer_from_the_start(model, model[3], batches)
    torch.testing.assert_close(model[:3].state_dict(), hidden, rtol=0, atol=0)
    assert not model[3]._forward_pre_hooks
    assert model.training
    model.eval()
    logits = Mean()(model(x)[0], lengths)
    assert logits.abs().mean() > 1
    signs = 2.0 * nn.functional.one_hot(y, 3) - 1.0
    torch.testing.assert_close(logits / logits.abs().mean(), signs, atol=0.25, rtol=0)
    one = x[: lengths[5], 5:6]
    torch.testing.assert_close(model(one)[0].mean(0), logits[5:6])


class OwnLinear(nn.Linear):
    def forward(self, spikes):
        return super().forward(spikes)


def test_layers_may_name_their_input_as_they_like_and_batches_share_their_memory():
    x, y = 3 * torch.rand(20, 8, 3), torch.arange(8) % 3
    found = []
    for neuron, linear in ((SpikingNeuron, nn.Linear), (RenamedInput, OwnLinear)):
        torch.manual_seed(0)
        model = Sequential(nn.Linear(3, 40), neuron(40, 4.0), linear(40, 3))
        rates = fire_from_the_start(model, x, 0.1)
        label = torch.empty(4, dtype=torch.int64)  # of all batches
        parts = ((x[:, k : k + 4], label.copy_(y[k : k + 4]), None) for k in (0, 4))
        answer_from_the_start(model, model[2], parts if linear is OwnLinear else [(x, y, None)])
        found.append((rates, model[2].weight.detach()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("size", [0.1, 1.0, 100.0])
def test_logits_have_the_scale_that_makes_the_classes_most_probable(size):
    classes = torch.arange(60) % 3
    predicted = size * (nn.functional.one_hot(classes, 3) + torch.randn(60, 3).double())
    targets = nn.functional.one_hot(classes, 3) * (1 - 1 / 61) + 1 / 61 / 3

    def surprise(scale):
        return -((scale * predicted).log_softmax(1) * targets).sum().item()

    best = min(np.logspace(-3, 3, 2000), key=surprise)
    assert 2**-0.3 < scale_of_logits(predicted, classes) / best < 2**0.3


def test_a_single_sample_that_is_right_is_believed_as_if_another_one_were_wrong():
    scale = scale_of_logits(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([0]))
    assert scale == 1.0  # next to log 3, which gives the class 3/4


@pytest.mark.parametrize("clear", [True, False])
def test_the_last_layer_is_as_sure_as_the_sequences_left_out_allow(clear):
    y = torch.arange(60) % 2
    x = torch.randn(8, 60, 3) + (4.0 * y[:, None] if clear else 0.0)
    layer = nn.Linear(3, 2)
    answers = answer_from_the_start(Sequential(layer), layer, [(x, y, None)])
    without = nn.Linear(3, 2)
    answer_from_the_start(Sequential(without), without, [(x[:, 1:], y[1:], None)])
    torch.testing.assert_close(answers[0].float(), without(x[:, 0]).mean(0), rtol=1e-3, atol=3e-4)
    right = layer(x).mean(0).softmax(1)[torch.arange(60), y]
    least, most = (0.95, 0.999) if clear else (0.4, 0.65)
    assert least < right.mean() < most


def test_the_last_layer_of_a_regression_predicts_numbers_from_the_start():
    x = torch.randn(8, 60, 3)
    y = x.mean(0) @ torch.tensor([[30.0], [0.0], [-10.0]]) + 500
    layer = nn.Linear(3, 1)
    answer_from_the_start(Sequential(layer), layer, [(x, y, None)])
    torch.testing.assert_close(layer(x).mean(0), y, atol=0.1, rtol=0)


CLASSES = torch.arange(4) % 2


@pytest.mark.parametrize(
    ("layer", "targets", "words"),
    [
        (nn.Linear(3, 2, bias=False), CLASSES, "has no bias"),
        (parametrizations.weight_norm(nn.Linear(3, 2)), CLASSES, "computed from others"),
        (prune.identity(nn.Linear(3, 2), "bias"), CLASSES, "computed from others"),
        (nn.Linear(3, 2), torch.rand(4, 1), r"shape \(4, 1\) in torch.float32, expected \(4, 2\)"),
        (nn.Linear(3, 2), torch.rand(4), r"shape \(4,\) in torch.float32, expected \(4, 2\)"),
        (nn.Linear(3, 2), torch.ones(4, 1).int(), r"shape \(4, 1\) in torch.int32, exp.* \(4,\)"),
        (nn.Linear(3, 1), torch.tensor([[1.0], [torch.nan]]), "or the targets are not finite"),
        (nn.Linear(3, 2), torch.tensor([1]), "number of samples is 1, expected two or more"),
        (nn.Linear(3, 2), torch.tensor([0, 1, 2]), "classes from 0 to 2, .* 2 ou"),
        (nn.Linear(3, 2), torch.tensor([-1, 0, 1]), "classes from -1 to 1, .* 2 ou"),
    ],
)
def test_a_last_layer_that_cannot_be_set_is_refused_and_stays_as_it_was(layer, targets, words):
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=words):
        fit_readout(layer, torch.rand(len(targets), 3), targets)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_a_last_layer_that_answers_no_batches_or_runs_several_times_is_refused():
    model, x = deep(), spikes()
    with pytest.raises(ValueError, match="there are no batches"):
        answer_from_the_start(model, model[-2], [])
    with pytest.raises(ValueError, match="runs 0 times for a batch, expected once: give a layer"):
        answer_from_the_start(model, nn.Linear(3, 2), [(x, torch.zeros(16), None)])
    with pytest.raises(ValueError, match=r"runs \d times for a batch, expected once"):
        answer_from_the_start(Chunked(model, 15), model[-2], [(x, torch.zeros(16), None)])
    with pytest.raises(ValueError, match="the last layer is a SpikingNeuron, expected an nn"):
        answer_from_the_start(model, model[-1], [(x, torch.zeros(16), None)])
    per_step = Sequential(PerStep(model[-2]))
    with pytest.raises(ValueError, match=r"is given the shape \(\d+, 30\), expected all steps"):
        answer_from_the_start(per_step, model[-2], [(x, torch.zeros(16), None)])


def test_a_model_that_has_run_compiled_is_refused_with_this_cause():
    model, x = deep(), spikes()
    compiled = torch.compile(model.eval(), backend="eager")
    with torch.no_grad():
        compiled(x)
    with pytest.raises(ValueError, match=r"torch\.compile runs (it unseen|the model or a part)"):
        fire(compiled)
    with pytest.raises(ValueError, match=r"the last layer runs 0 times .* is not compiled"):
        answer_from_the_start(compiled, model[-2], [(x, torch.zeros(16), None)])


def test_classes_may_be_whole_numbers_of_any_dtype():
    features, layers = torch.rand(6, 3), [nn.Linear(3, 2) for _ in range(2)]
    for layer, dtype in zip(layers, (torch.int64, torch.uint8), strict=True):
        fit_readout(layer, features, (torch.arange(6) % 2).to(dtype))
    assert torch.equal(layers[0].weight, layers[1].weight)

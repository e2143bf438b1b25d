"""Weights of few bits: as integers make them, and only inside their context."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from leaving_pytorch import network, spikes
from torch import nn

from snn_lib.inference import quantise
from snn_lib.rounding import integer_weights, rounded_weights


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", ["linear", "groups", "normalised maps"])
def test_training_computes_with_the_rounded_weights_of_the_integer_network(name, bits):
    model, features = network(name)
    x = spikes(30, *features)
    with torch.no_grad():
        exact = model(x)[0].numpy()
        with rounded_weights(model, bits):
            target, rounded = model(x)[0].numpy(), copy.deepcopy(model)
    for trained in (model, rounded):
        made = quantise(trained, x, bits, features)
        output = made.run(made.integers(x.numpy())) * made.output_scale
        assert np.std(output - target) < 1e-3 * np.std(target)
    assert np.std(target - exact) > {8: 1e-3, 4: 0.02, 2: 0.2}[bits] * np.std(exact)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("inputs", [30, 500, 4000])
def test_no_other_scale_has_a_much_smaller_error(bits, inputs):
    weights, most = torch.randn(50, inputs), (1 << (bits - 1)) - 1
    integers, scale = integer_weights(weights, bits)
    found = (weights - scale * integers).square().sum(1)
    for share in torch.linspace(0.02, 1.0, 99):
        other = share * weights.abs().amax(1, keepdim=True) / most
        rounded = other * (weights / other).round().clamp(-most, most)
        error = (weights - rounded).square().sum(1)
        assert found.sum() < 1.02 * error.sum() + 1e-3 * weights.square().sum() / most


@pytest.mark.parametrize("bits", [8, 4])
def test_multiples_of_a_number_stay_the_same_bits(bits):
    layer = nn.Linear(7, 1)
    layer.weight.data = torch.arange(1, 8)[None] / 3
    own = layer.weight.detach().clone()
    assert not torch.equal(own, own[:, :1] * torch.arange(1, 8))  # in float32
    with rounded_weights(layer, bits):
        assert torch.equal(layer.weight, own)


def test_small_weights_in_float16_are_rounded():
    layer = nn.Linear(784, 500).half()
    with rounded_weights(layer, 8):
        assert max(len(row.unique()) for row in layer.weight) <= 255


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_weights_that_are_computed_are_refused_and_stay(wrap):
    model = nn.Sequential(wrap(nn.Linear(6, 5))).eval()
    own = copy.deepcopy(model.state_dict())
    with rounded_weights(model, 0):
        pass
    with pytest.raises(ValueError, match="layer 0 computes"), rounded_weights(model, 8):
        pass
    assert all(torch.equal(values, own[name]) for name, values in model.state_dict().items())


def test_weights_are_as_before_behind_the_context_even_if_it_fails():
    model = nn.ModuleList([nn.Linear(6, 5), nn.Conv2d(3, 4, 2), nn.Linear(6, 5)])
    model[2].weight = model[0].weight
    own = copy.deepcopy(model.state_dict())
    for error in (None, KeyError):
        with contextlib.suppress(KeyError), rounded_weights(model, 2):
            rows = [row for layer in model for row in layer.weight.flatten(1)]
            assert all(len(row[row != 0].abs().unique()) == 1 for row in rows)
            if error:
                raise error
        for name, values in model.state_dict().items():
            assert torch.equal(values, own[name])


def test_an_autocast_that_has_run_the_network_sees_rounded_weights_inside_alone():
    layer, x = nn.Linear(6, 5), torch.randn(9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        with rounded_weights(layer, 2):
            inside, rounded = layer(x), copy.deepcopy(layer)
        assert torch.equal(inside, rounded(x))
        assert torch.equal(layer(x), before)
    assert not torch.equal(inside, before)

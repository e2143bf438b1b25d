"""The network for time series: its first weights suit the data, and nothing but the data."""

import math

import pytest
import torch

from snn_lib.data.preparation import NetworkInput
from snn_lib.tasks.time_series import TimeSeriesHyperparameters, prepare_series
from snn_lib.time_series import build_network, draw_weights

STEPS = 300


def drawn(sample, sequences, **options):
    """A network whose weights are drawn on a sample."""
    options = TimeSeriesHyperparameters(neurons=60, filters=16, **options)
    torch.manual_seed(0)
    network = build_network(options, prepare_series(sequences, options), 2)
    draw_weights(network, options, sample)
    return network


@pytest.fixture
def sequences():
    return list(torch.randn(4, STEPS, 2, dtype=torch.float64))


@pytest.mark.parametrize("low", [False, True])
def test_a_neuron_s_current_is_high_in_its_share_of_the_steps(sequences, low):
    sample = NetworkInput(torch.randn(STEPS, 4, 4), None)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        network = drawn(sample, sequences, lowest_rate=0.05, highest_rate=0.15)
    with torch.no_grad():
        current, _ = network[:3](sample.x)
    shares = (current > 1).double().mean((0, 1))
    assert 0.045 < shares.min() < 0.07
    assert 0.13 < shares.max() < 0.155
    torch.testing.assert_close(
        current.std((0, 1)), torch.ones(60), rtol=0.01 if low else 1e-3, atol=0
    )


def test_thresholds_are_found_on_steps_from_all_over_the_sample(sequences, monkeypatch):
    """Where only a few are looked at: here the second half is much louder."""
    monkeypatch.setattr("snn_lib.time_series.CALIBRATION", 76 * STEPS)
    x = torch.randn(STEPS, 8, 4)
    x[STEPS // 2 :] *= 10
    network = drawn(NetworkInput(x, None), sequences)
    with torch.no_grad():
        current, _ = network[:3](x)
    deviation = current.std((0, 1), correction=0)
    torch.testing.assert_close(deviation, torch.ones(60), rtol=0.5, atol=0)


def test_each_neuron_hears_as_many_filters_as_the_settings_say(sequences):
    sample = NetworkInput(torch.randn(STEPS, 4, 4), None)
    weights = drawn(sample, sequences, heard=3)[2].weight
    assert (weights != 0).sum(1).tolist() == [3] * 60
    assert len({tuple(row.nonzero().flatten().tolist()) for row in weights}) > 40


def test_the_filters_of_short_series_have_different_memories_and_spikes_have_unit_energy():
    options = TimeSeriesHyperparameters(neurons=60, filters=16)
    short = list(torch.randn(4, 3, 2, dtype=torch.float64))
    network = build_network(options, prepare_series(short, options), 2)
    decays = (-network[1].alpha[1]).sqrt()
    memories = -1 / decays.double().log()
    low = options.shortest_memory
    torch.testing.assert_close(memories.min().item(), low, rtol=1e-3, atol=0)
    torch.testing.assert_close(memories.max().item(), 2 * low, rtol=1e-3, atol=0)
    alpha, beta = network[4].alpha[0], network[4].beta[0]
    torch.testing.assert_close(beta, (1 - alpha.double() ** 2).sqrt().float(), rtol=1e-4, atol=0)


def test_the_filters_oscillate_from_the_fewest_cycles_to_one_in_four_steps(sequences):
    options = TimeSeriesHyperparameters(neurons=60, filters=16)
    first, second = build_network(options, prepare_series(sequences, options), 2)[1].alpha.double()
    cycles = (first / (2 * (-second).sqrt())).arccos() / (2 * math.pi)
    expected = min(options.fewest_cycles / STEPS, 0.25)
    torch.testing.assert_close(cycles.min().item(), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(cycles.max().item(), 0.25, rtol=1e-3, atol=0)


def test_the_filters_are_equally_loud_on_the_sample(sequences):
    options = TimeSeriesHyperparameters(neurons=60, filters=16)
    network = build_network(options, prepare_series(sequences, options), 2)
    sample = NetworkInput(3.0 * torch.randn(STEPS, 6, 4) + 1.0, None)
    draw_weights(network, options, sample)
    with torch.no_grad():
        loud = network[1](network[0](sample.x))[0].flatten(0, 1).std(0, correction=0)
    torch.testing.assert_close(loud, torch.ones_like(loud), rtol=1e-4, atol=0)


def test_the_synapses_of_the_neurons_remember_from_nothing_to_the_longest_sequence(sequences):
    options = TimeSeriesHyperparameters(neurons=60)
    alpha = build_network(options, prepare_series(sequences, options), 2)[4].alpha[0]
    logarithms = torch.linspace(-1, 1, 60, dtype=torch.float64) * math.log(STEPS)
    expected = (-1 / logarithms.exp()).exp()
    torch.testing.assert_close(alpha.double().sort()[0], expected, rtol=1e-5, atol=1e-7)


def test_no_current_is_so_near_to_its_threshold_that_rounding_decides(sequences):
    sample = NetworkInput(torch.randn(STEPS, 4, 4), None)
    with torch.no_grad():
        current, _ = drawn(sample, sequences)[:3](sample.x)
    assert (current - 1).abs().min() > 1e-4


def test_no_threshold_lies_among_the_values_of_steps_in_which_channels_rest(sequences):
    x = torch.zeros(STEPS, 4, 4)
    x[: STEPS // 4] = torch.randn(STEPS // 4, 4, 4)
    with torch.no_grad():
        current, _ = drawn(NetworkInput(x, None), sequences)[:3](x)
    assert (current - 1).abs().min() > 3e-6
    assert (current > 1).any(0).any(0).all()


def test_a_single_large_value_leaves_the_shares_of_steps_above_the_thresholds_alone(sequences):
    x = torch.randn(STEPS, 4, 4)
    x[7, 2] = 1e5
    network = drawn(NetworkInput(x, None), sequences, lowest_rate=0.4, highest_rate=0.6)
    with torch.no_grad():
        current, _ = network[:3](x)
    shares = (current > 1).float().mean((0, 1))
    assert shares.min() > 0.35
    assert shares.max() < 0.65


def test_padding_does_not_matter_to_first_weights(sequences):
    lengths = torch.tensor([STEPS, 20, 150, 90])
    x = torch.randn(STEPS, 4, 4)
    padded = x.clone()
    for number, length in enumerate(lengths):
        padded[length:, number] = 100 * torch.randn(STEPS - length, 4)
    one, other = (drawn(NetworkInput(each, lengths), sequences) for each in (x, padded))
    for name, weights in one.state_dict().items():
        assert torch.equal(weights, other.state_dict()[name]), name

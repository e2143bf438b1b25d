"""What is measured of output: filtered spikes, the nearest pattern, spikes that coincide."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from snn_lib.data.patterns import Damage, damage_patterns, load_patterns
from snn_lib.inspection.metrics import OutputFilter, match_spikes, nearest_pattern, spike_scores

DATASET = Path(__file__).parents[2] / "dataset"


def spikes_at(*times, steps=20):
    train = torch.zeros(steps, 1, 1)
    train[list(times)] = 1.0
    return train


def counts(output, target, **options):
    return tuple(count.item() for count in match_spikes(output, target, **options).values())


# output filter


def test_output_filter_is_the_normalised_difference_of_two_leaky_integrators():
    x = torch.rand(60, 2, 3, dtype=torch.float64)
    output, _ = OutputFilter(8.0, 2.0, 3).double()(x)
    v0 = 4 ** (4 / 3) / 3
    m = s = torch.zeros(2, 3, dtype=torch.float64)
    for t in range(60):
        m = math.exp(-1 / 8) * m + x[t]
        s = math.exp(-1 / 2) * s + x[t]
        torch.testing.assert_close(output[t], v0 * (m - s), rtol=1e-6, atol=1e-6)
    assert not output[0].any()  # it is felt one step later


def test_output_filter_that_is_not_normalised_starts_with_p_minus_q():
    impulse = torch.zeros(40, 1, 1)
    impulse[0] = 1.0
    response = OutputFilter(8, 2, 1, normalize=False)(impulse)[0].flatten()
    k = torch.arange(40.0)
    torch.testing.assert_close(response, torch.exp(-k / 8) - torch.exp(-k / 2))


def test_output_filter_is_not_trained_but_lets_gradients_through():
    output_filter = OutputFilter(8, 2, 3)
    assert list(output_filter.parameters()) == []
    x = torch.rand(10, 2, 3, requires_grad=True)
    output_filter(x)[0].square().mean().backward()
    assert x.grad[:-1].abs().min() > 0
    assert not x.grad[-1].any()  # felt one step later, after the end


def test_output_filter_refuses_time_constants_out_of_order():
    with pytest.raises(ValueError, match="expected 0 < tau_s < tau_m"):
        OutputFilter(2, 8, 3)


# retrieval


def test_nearest_pattern_has_the_least_euclidean_distance():
    output, patterns = torch.randn(7, 40, 5), torch.randn(7, 6, 5) * torch.rand(6, 1)
    nearest = nearest_pattern(output, patterns)
    for sample in range(40):
        distances = [(output[:, sample] - patterns[:, k]).norm() for k in range(6)]
        assert nearest[sample] == torch.stack(distances).argmin()


def test_nearest_pattern_keeps_its_digits_under_autocast():
    patterns = 1 + 1e-2 * torch.randn(7, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_pattern(patterns, patterns).tolist() == list(range(6))


def test_damaged_patterns_are_nearest_to_their_own():
    patterns = load_patterns(DATASET / "associative_target.npy")
    labels = torch.arange(30) % 10
    damage = Damage(modify_probability=1.0, removal_probability=1.0)
    damaged = damage_patterns(patterns, labels, damage, torch.Generator().manual_seed(0)).spikes
    output_filter = OutputFilter(8, 2, patterns.shape[2])
    filtered = [output_filter(x)[0] for x in (damaged, patterns)]
    assert nearest_pattern(*filtered).equal(labels)


# coincident spikes


@pytest.mark.parametrize(
    ("output", "target", "pairs"),
    [
        ((5,), (5,), 1),
        ((3,), (5,), 1),
        ((7,), (5,), 1),
        ((2,), (5,), 0),
        ((8,), (5,), 0),
        ((), (5,), 0),
        ((5,), (), 0),
        ((), (), 0),
        ((4, 5, 6), (5,), 1),  # a burst counts once
        ((5,), (4, 5, 6), 1),
        ((4, 6), (5,), 1),
        ((5, 6), (5, 6), 2),
        ((6, 7), (5, 6), 2),
        ((6, 8), (4, 6), 1),  # 6 goes with 6, which leaves 8 and 4
        ((0, 19), (2, 17), 2),  # at both ends
        ((0,), (19,), 0),  # nothing wraps around
    ],
)
def test_spikes_that_coincide_are_paired_once(output, target, pairs):
    expected = (pairs, len(output), len(target))
    assert counts(spikes_at(*output), spikes_at(*target)) == expected


def greedy_pairs(output, target, tolerance):
    """The definition, one train after the other, on lists of times."""
    pairs = 0
    for sample in range(output.shape[1]):
        for train in range(output.shape[2]):
            outputs = set(output[:, sample, train].nonzero().flatten().tolist())
            targets = set(target[:, sample, train].nonzero().flatten().tolist())
            for distance in range(tolerance + 1):
                for sign in (1, -1):
                    found = {t for t in targets if t + sign * distance in outputs}
                    targets -= found
                    outputs -= {t + sign * distance for t in found}
                    pairs += len(found)
    return pairs


@pytest.mark.parametrize("tolerance", [0, 1, 2, 5, 100])
def test_pairs_within_any_tolerance_are_those_of_the_definition(tolerance):
    generator = torch.Generator().manual_seed(tolerance)
    output = (torch.rand(30, 4, 6, generator=generator) < 0.3).float()
    target = (torch.rand(30, 4, 6, generator=generator) < 0.2).float()
    before = output.clone(), target.clone()
    expected = (greedy_pairs(output, target, tolerance), output.sum().item(), target.sum().item())
    assert counts(output, target, tolerance=tolerance) == expected
    assert output.equal(before[0])
    assert target.equal(before[1])


@pytest.mark.parametrize("tolerance", [-1, 1.5])
def test_a_tolerance_that_is_no_number_of_steps_is_refused(tolerance):
    with pytest.raises(ValueError, match=f"tolerance is {tolerance}, expected a whole number"):
        match_spikes(torch.ones(5, 2, 2), torch.ones(5, 2, 2), tolerance)


@pytest.mark.parametrize("call", [OutputFilter(4.0, 1.0, 3), lambda x: nearest_pattern(x, x)])
def test_arrays_are_refused(call):
    with pytest.raises(TypeError, match="is a ndarray, expected a tensor"):
        call(np.zeros((5, 2, 3), np.float32))


def test_scores_are_precision_recall_and_f1():
    scores = spike_scores({"pairs": 6, "output_spikes": 8, "target_spikes": 12, "samples": 3})
    assert scores == pytest.approx({"precision": 0.75, "recall": 0.5, "f1": 0.6})
    alone = spike_scores(match_spikes(spikes_at(0, steps=2), spikes_at(1, steps=2)))
    assert alone == {"precision": 1.0, "recall": 1.0, "f1": 1.0}


def test_scores_of_silence_are_zero():
    silence = torch.zeros(5, 2, 2)
    for output, target in ((silence, silence), (silence, silence + 1), (silence + 1, silence)):
        assert set(spike_scores(match_spikes(output, target)).values()) == {0.0}

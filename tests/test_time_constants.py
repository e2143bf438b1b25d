"""Time constants against the exponentials that they stand for."""

import math

import numpy as np
import pytest
import torch

from snn_lib.time_constants import decay_of, decays_of, log_spaced, peak_scale, per_channel


def test_a_trace_falls_to_1_over_e_within_its_time_constant():
    assert decay_of(7.0) ** 7 == pytest.approx(math.exp(-1))
    assert decay_of(0.5) == pytest.approx(math.exp(-1) ** 2)
    assert decay_of(math.inf) == 1.0


def test_a_pair_is_the_slow_decay_and_the_fast_one():
    assert decays_of(8.0, 2.0) == (decay_of(8.0), decay_of(2.0))


@pytest.mark.parametrize(("tau_m", "tau_s"), [(8.0, 2.0), (10.0, 2.5), (3.0, 2.9), (500.0, 1.0)])
def test_the_scaled_difference_peaks_at_one(tau_m, tau_s):
    time = np.linspace(0.0, 20 * tau_s, 200_001)
    difference = np.exp(-time / tau_m) - np.exp(-time / tau_s)
    assert peak_scale(tau_m, tau_s) * difference.max() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("tau", [0.0, -2.0, math.nan])
def test_what_is_no_time_constant_is_refused_by_its_name(tau):
    with pytest.raises(ValueError, match=f"tau_m is {tau}, expected a positive number of steps"):
        decay_of(tau, "tau_m")


@pytest.mark.parametrize("function", [decays_of, peak_scale])
@pytest.mark.parametrize(
    ("tau_m", "tau_s"),
    [(2, 2), (2, 8), (2, 0), (2, -1), (math.nan, 2), (2, math.nan), (math.inf, 2)],
)
def test_a_pair_out_of_order_is_refused(function, tau_m, tau_s):
    expected = f"tau_m is {tau_m} and tau_s {tau_s}, expected 0 < tau_s < tau_m, both finite"
    with pytest.raises(ValueError, match=expected):
        function(tau_m, tau_s)


# A value for every channel


def test_a_number_stays_one_and_a_tensor_is_exact_and_on_the_cpu():
    assert per_channel(4, (2, 3), "tau") == 4
    for value in (torch.ones(2, 3, requires_grad=True), np.ones((2, 3)), torch.ones):
        found = per_channel(value, (2, 3), "tau")
        assert torch.equal(found, torch.ones(2, 3, dtype=torch.float64))
        assert not found.requires_grad


@pytest.mark.parametrize("value", [torch.ones(3), np.ones((3, 2)), lambda shape: torch.ones(6)])
def test_another_shape_is_refused(value):
    expected = r"tau has the shape \([\d, ]+\), expected \(2, 3\) or a number"
    with pytest.raises(ValueError, match=expected):
        per_channel(value, (2, 3), "tau")


def test_tensors_decay_as_their_numbers_do():
    taus = torch.tensor([0.5, 7.0, 900.0], dtype=torch.float64)
    one_by_one = [decay_of(tau) for tau in taus.tolist()]
    np.testing.assert_allclose(decay_of(taus), one_by_one, rtol=1e-15)
    slow, fast = decays_of(taus + 1, 0.4)
    assert torch.equal(slow, decay_of(taus + 1))
    assert fast == decay_of(0.4)


def test_the_number_in_a_tensor_that_is_wrong_is_named():
    with pytest.raises(ValueError, match=r"tau is -2\.0, expected a positive"):
        decay_of(torch.tensor([4.0, -2.0, math.nan]))
    with pytest.raises(ValueError, match=r"tau_m is 3\.0 and tau_s 5\.0, expected 0 < tau_s"):
        decays_of(torch.tensor([9.0, 3.0]), 5.0)


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 3, 2)])
def test_log_spaced_values_lie_evenly_on_a_logarithmic_scale_in_another_order_each_time(shape):
    draw = log_spaced(10, 800)
    first, second = draw(shape), draw(shape)
    count = math.prod(shape)
    for values in (first, second):
        assert values.shape == shape
        np.testing.assert_allclose(np.sort(values.flatten()), np.geomspace(10, 800, count))
    assert count == 1 or not torch.equal(first, second)


@pytest.mark.parametrize(
    "ends", [(0, 1), (-1, 1), (2, 1), (math.nan, 1), (1, math.nan), (1, math.inf)]
)
def test_ends_out_of_order_are_refused(ends):
    with pytest.raises(ValueError, match=f"low is {ends[0]} and high {ends[1]}, expected 0 < low"):
        log_spaced(*ends)

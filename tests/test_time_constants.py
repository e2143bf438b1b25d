"""Time constants against the exponentials that they stand for."""

import math

import numpy as np
import pytest

from snn_lib.time_constants import decay_of, decays_of, peak_scale


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

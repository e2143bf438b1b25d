"""Time constants against the exponentials that they stand for."""

import math

import numpy as np
import pytest
import torch

from snn_lib.time_constants import (
    cycles_per_step,
    decay_of,
    decays_of,
    log_spaced,
    peak_scale,
    per_channel,
)


def test_a_trace_falls_to_1_over_e_in_its_time_constant():
    assert decay_of(7.0) ** 7 == pytest.approx(math.exp(-1))
    assert decay_of(0.5) == pytest.approx(math.exp(-1) ** 2)
    assert decay_of(math.inf) == 1.0


@pytest.mark.parametrize(("tau_m", "tau_s"), [(8.0, 2.0), (10.0, 2.5), (3.0, 2.9), (500.0, 1.0)])
def test_the_scaled_difference_peaks_at_one(tau_m, tau_s):
    time = np.linspace(0.0, 20 * tau_s, 200_001)
    difference = np.exp(-time / tau_m) - np.exp(-time / tau_s)
    assert peak_scale(tau_m, tau_s) * difference.max() == pytest.approx(1.0, abs=1e-6)


# A value for every channel


def test_a_value_for_every_channel_is_a_number_or_a_tensor_in_float64_on_the_cpu():
    assert per_channel(4, (2, 3), "tau") == 4
    for value in (torch.ones(2, 3, requires_grad=True), np.ones((2, 3)), torch.ones):
        found = per_channel(value, (2, 3), "tau")
        assert torch.equal(found, torch.ones(2, 3, dtype=torch.float64))
        assert not found.requires_grad


def test_decays_of_tensors_are_those_of_their_numbers():
    taus = torch.tensor([0.5, 7.0, 900.0], dtype=torch.float64)
    one_by_one = [decay_of(tau) for tau in taus.tolist()]
    np.testing.assert_allclose(decay_of(taus), one_by_one, rtol=1e-15)
    slow, fast = decays_of(taus + 1, 0.4)
    assert torch.equal(slow, decay_of(taus + 1))
    assert fast == decay_of(0.4)


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 3, 2)])
def test_log_spaced_values_lie_evenly_on_a_logarithmic_scale_in_another_order_each_time(shape):
    draw = log_spaced(10, 800)
    first, second = draw(shape), draw(shape)
    count = math.prod(shape)
    for values in (first, second):
        assert values.shape == shape
        np.testing.assert_allclose(np.sort(values.flatten()), np.geomspace(10, 800, count))
    assert count == 1 or not torch.equal(first, second)


def test_log_spaced_values_lie_within_their_ends_though_logarithms_are_rounded():
    for longest in range(2, 200):
        values = log_spaced(1 / longest, longest)((9,))
        assert values.min() >= 1 / longest
        assert values.max() <= longest


NAN, INF = math.nan, math.inf
PAIRS = (2, 2), (2, 8), (2, 0), (2, -1), (NAN, 2), (2, NAN), (INF, 2)
REFUSED = [  # what is computed, and the words
    *((lambda tau=tau: decay_of(tau, "tau_m"), f"tau_m is {tau}, expected a positive number of st")
      for tau in (0.0, -2.0, NAN)),
    (lambda: decay_of(torch.tensor([4.0, -2.0, NAN])), r"tau is -2\.0, expected a positive"),
    *((lambda f=f, pair=pair: f(*pair), "tau_m is {} and tau_s {}, expected 0 < ".format(*pair))
      for f in (decays_of, peak_scale) for pair in PAIRS),
    (lambda: decays_of(torch.tensor([9.0, 3.0]), 5.0), r"tau_m is 3\.0 and tau_s 5\.0, expected"),
    *((lambda value=value: per_channel(value, (2, 3), "tau"), r"expected \(2, 3\) or a number")
      for value in (torch.ones(3), np.ones((3, 2)), lambda shape: torch.ones(6))),
    (lambda: per_channel(torch.ones(3, device="meta"), (3,), "tau"), "tau is a tensor without val"),
    *((lambda ends=ends: log_spaced(*ends), "low is {} and high {}, expected 0 < l".format(*ends))
      for ends in ((0, 1), (-1, 1), (2, 1), (NAN, 1), (1, NAN), (1, INF))),
    *((lambda f=f: cycles_per_step(f, ()), rf"frequency is {f}, expected cycles per step in \[0")
      for f in (-0.01, 0.51, NAN)),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_bad_time_constants_shapes_and_ranges_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_highest_frequency_turns_half_a_cycle_in_a_step():
    assert cycles_per_step(0.5, ()) == 0.5


def test_numbers_of_numpy_go_with_tensors_and_functions_with_a_device():
    taus = np.array([4.0, 6.0, 9.0])
    slow, fast = per_channel(taus, (3,), "tau_m"), per_channel(taus.min() / 4, (3,), "tau_s")
    for found, tau in zip(decays_of(slow, fast), (taus, 1.0), strict=True):
        np.testing.assert_allclose(found, np.exp(-1 / tau))
    with torch.device("meta"):
        assert per_channel(lambda shape: torch.full(shape, 2.0), (3,), "tau").tolist() == [2.0] * 3

"""Encodings: currents, Poisson spikes, one spike at the right time, and values that change."""

import math
from functools import partial

import pytest
import torch

from snn_lib.encoding import constant, delta, latency, poisson, population


def test_a_constant_encoding_repeats_the_values_without_a_copy():
    values = torch.rand(3, 4, 5)
    x = constant(values, 7)
    assert x.shape == (7, 3, 4, 5)
    assert all(torch.equal(step, values) for step in x)
    assert x.data_ptr() == values.data_ptr()


@pytest.mark.parametrize("rate", [0.0001, 0.01, 0.3, 0.5, 0.999])
def test_poisson_spikes_have_the_asked_rate(rate):
    count = 2_000_000
    rates = torch.tensor([rate, 0.0]).expand(count // 100, 2)  # each element has its own
    spikes, silence = poisson(rates, 100).unbind(2)
    deviation = math.sqrt(rate * (1 - rate) / count)
    assert abs(spikes.double().mean().item() - rate) < 5 * deviation + 0.5 / 65536
    assert not silence.any()


@pytest.mark.parametrize(("rate", "spikes"), [(0, 0), (-1, 0), (-1e9, 0), (1, 1), (3, 1), (1e9, 1)])
def test_rates_of_0_and_1_and_beyond_are_certain(rate, spikes):
    assert (poisson(torch.full((1000,), float(rate)), 50) == spikes).all()


def test_poisson_spikes_are_independent_over_time_and_elements():
    steps, elements, rate = 4000, 64, 0.3
    spikes = poisson(torch.full((elements,), rate), steps).double()
    centred = (spikes - rate) / math.sqrt(rate * (1 - rate))  # mean 0, variance 1
    between = centred.T @ centred / steps
    off_diagonal = between[~torch.eye(elements, dtype=torch.bool)]
    # Correlations of independent series are normal with a deviation of 1 / sqrt(steps).
    assert off_diagonal.abs().max() < 5 / math.sqrt(steps)
    assert off_diagonal.std().item() == pytest.approx(1 / math.sqrt(steps), rel=0.1)
    for lag in (1, 2, 3, 4, 8):  # four draws share a random word
        in_time = (centred[lag:] * centred[:-lag]).mean()
        assert abs(in_time) < 5 / math.sqrt(steps * elements)
        flat = centred.flatten()
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 / math.sqrt(steps * elements)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rates_in_low_precision_draw_the_spikes_of_the_same_rates_in_float32(dtype):
    rates = torch.linspace(-0.1, 1.1, 1000).to(dtype)
    low, full = (
        poisson(values, 300, torch.Generator().manual_seed(5)) for values in (rates, rates.float())
    )
    assert low.dtype == dtype
    assert torch.equal(low.float(), full)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_poisson_is_zero_or_one_in_the_dtype_of_the_values(dtype):
    spikes = poisson(torch.rand(3, 5, 7, dtype=dtype), 11)
    assert spikes.shape == (11, 3, 5, 7)
    assert spikes.dtype == dtype
    assert set(spikes.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("encode", [poisson, partial(latency, jitter=1.0)])
def test_a_generator_decides_spikes_and_jitter_on_every_device(encode):
    values, state = torch.rand(30), torch.get_rng_state()

    def drawn(seed, values=values):
        return encode(values, 20, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(torch.get_rng_state(), state)  # the default generator is left alone
    assert drawn(1, values.to("meta")).is_meta


def times(spikes):
    """The step of each element's spike, -1 where there is none; there is at most one."""
    assert set(spikes.unique().tolist()) <= {0.0, 1.0}
    assert (spikes.sum(0) <= 1).all()
    return torch.where(spikes.sum(0) > 0, spikes.argmax(0), -1)


def test_a_brighter_value_spikes_earlier_and_a_dark_one_never():
    values = torch.tensor([1.3, 1.0, 0.9, 0.6, 0.21, 0.2, 0.0, -1.0])
    assert times(latency(values, 9)).tolist() == [0, 0, 1, 4, 8, -1, -1, -1]
    assert times(latency(values, 1)).tolist() == [0, 0, 0, 0, 0, -1, -1, -1]


@pytest.mark.parametrize("threshold", [0.1, 0.5])
@pytest.mark.parametrize("tau", [3.0, 8.0])
def test_the_logarithmic_law_is_the_first_spike_of_a_leaky_membrane(threshold, tau):
    values, length, fine = torch.linspace(0, 1, 41, dtype=torch.float64), 20, 1000
    found = times(latency(values, length, threshold, "logarithmic", tau))
    for value, step in zip(values.tolist(), found.tolist(), strict=True):
        membrane, time = 0.0, 0
        while membrane < threshold and time <= fine * length:  # tau dV/dt = x - V, in small steps
            time += 1
            membrane += (value - membrane) / (tau * fine)
        expected = time / fine
        if step == -1:
            assert expected > length - 0.51
        else:
            assert abs(step - expected) < 0.51


def test_jitter_moves_the_spikes_by_its_deviation_and_keeps_them_within():
    values = torch.full((100_000,), 0.6)
    moved = times(latency(values, 21, 0.2, jitter=2.0)) - 10
    assert moved.double().mean().abs() < 0.05
    assert moved.double().std().item() == pytest.approx(math.sqrt(4 + 1 / 12), rel=0.02)
    between = times(latency(torch.full((100_000,), 1 - 2.4 * 0.8 / 20), 21, 0.2, jitter=0.3))
    later = 0.5 * math.erfc((2.5 - 2.4) / 0.3 / math.sqrt(2))  # the noise is on the time, 2.4
    assert (between == 3).double().mean().item() == pytest.approx(later, abs=0.01)
    early = times(latency(torch.ones(1000), 21, 0.2, jitter=2.0))
    assert early.amin() == 0
    assert early.amax() > 0
    late = times(latency(torch.full((1000,), 0.2001), 21, 0.2, jitter=2.0))
    assert late.amax() == 20
    assert late.amin() < 20


def test_a_time_that_is_rounded_to_one_step_too_late_never_comes():
    tau, threshold, length = 5.0, 0.2, 10
    values = [threshold / (1 - math.exp(-time / tau)) for time in (9.3, 9.7)]  # of the law, solved
    spikes = latency(torch.tensor(values), length, threshold, "logarithmic", tau)
    assert times(spikes).tolist() == [9, -1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latencies_are_the_same_in_any_precision(dtype):
    values = torch.rand(300).to(dtype)
    low = latency(values, 12)
    assert low.dtype == dtype
    assert torch.equal(times(low), times(latency(values.double(), 12)))


REFUSED = [  # what is encoded, and the words
    *((lambda dtype=dtype: poisson(torch.ones(3, dtype=dtype), 5),
       f"values are {dtype}, expected probabilities")
      for dtype in (torch.uint8, torch.int64, torch.bool)),
    (lambda: latency(torch.ones(3, dtype=torch.uint8), 5), "are torch.uint8, expected fractions"),
    (lambda: latency(torch.rand(3), 0), "length is 0, expected at least one step"),
    *((lambda settings=settings: latency(torch.rand(3), 5, **settings), words)
      for settings, words in (
        ({"threshold": -0.1}, "is -0.1, tau 5.0, jitter 0.0, expected 0 <= threshold < 1"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"threshold": 0.0, "law": "logarithmic"}, "threshold is 0, which every membrane reaches"),
        ({"tau": 0.0}, "tau 0.0"),
        ({"jitter": math.nan}, "jitter nan"),
        ({"law": "square"}, "law is 'square', expected one of linear, logarithmic"))),
    (lambda: population(torch.rand(5, 1, 2), torch.zeros(1)), r"centres have shape \(1,\)"),
    (lambda: population(torch.rand(5, 1, 2), torch.rand(2, 3)), r"centres have shape \(2, 3\)"),
    *((lambda f=f: f(torch.rand(3).numpy(), 5), "values is a ndarray, expected a tensor")
      for f in (constant, poisson, latency, delta)),
    (lambda: constant(torch.rand(3), 0), "length is 0, expected at least one step"),
    (lambda: poisson(torch.rand(3), -1), "length is -1, expected at least one"),
    (lambda: delta(torch.rand(5, 1, 2), 0.0), r"threshold is 0\.0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_bad_settings_and_values_are_refused(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


# Values that change over time


def test_a_population_answers_by_a_gaussian_of_the_distance_to_each_centre():
    centres = torch.linspace(-2, 2, 5)
    values = torch.linspace(-2.5, 2.5, 101).view(101, 1, 1) * torch.tensor([1.0, -1.0])
    fields = population(values, centres)
    assert fields.shape == (101, 1, 10)
    for channel in range(2):
        for step in (0, 13, 50, 77):
            for field in range(5):
                distance = (values[step, 0, channel] - centres[field]).item()
                expected = math.exp(-(distance**2) / 2)
                found = fields[step, 0, 5 * channel + field].item()
                assert found == pytest.approx(expected, rel=1e-5)
    half = population(values / 2, centres / 2)  # neighbours at half the distance are as wide apart
    torch.testing.assert_close(half, fields)
    torch.testing.assert_close(population(values, centres[:2]), fields[..., [0, 1, 5, 6]])


@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_delta_events_add_up_to_the_values_within_a_threshold(threshold):
    values = torch.randn(50, 4, 3).cumsum(0) * 0.3
    events = delta(values, threshold)
    rises, falls = events.split(3, -1)
    assert torch.equal(events, events.round())
    assert (events >= 0).all()
    assert not (rises * falls).any()
    told = threshold * (rises - falls).cumsum(0)
    assert (told - values).abs().max() < threshold * (1 + 1e-4)


def test_no_steps_have_no_delta_events():
    assert delta(torch.zeros(0, 2, 3), 0.1).shape == (0, 2, 6)


def test_delta_events_are_those_of_a_level_that_follows():
    values = torch.tensor([0.4, 0.6, 1.7, 1.2, 0.9, -0.3]).view(-1, 1, 1)
    rises, falls = delta(values, 0.5).unbind(-1)
    assert rises.flatten().tolist() == [0, 1, 2, 0, 0, 0]
    assert falls.flatten().tolist() == [0, 0, 0, 0, 1, 2]
    assert delta(torch.full((5, 2, 1), 0.3), 0.5).sum() == 0  # no change, no event


@pytest.mark.parametrize(
    "encode", [lambda x: population(x, torch.linspace(-2, 2, 4)), lambda x: delta(x, 0.3)]
)
def test_an_encoding_of_a_step_depends_on_no_later_step(encode):
    values = torch.rand(8, 2, 3)
    whole, part = encode(values), encode(values[:5])
    assert torch.equal(whole[: len(part)], part)

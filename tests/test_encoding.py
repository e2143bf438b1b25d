"""Encodings: a constant current, and independent Poisson spikes with the asked rates."""

import math

import pytest
import torch

from snn_lib.encoding import constant, poisson


def test_constant_repeats_the_values_without_a_copy():
    values = torch.rand(3, 4, 5)
    x = constant(values, 7)
    assert x.shape == (7, 3, 4, 5)
    assert all(torch.equal(step, values) for step in x)
    assert x.data_ptr() == values.data_ptr()


@pytest.mark.parametrize("rate", [0.0001, 0.01, 0.3, 0.5, 0.999])
def test_poisson_spikes_have_the_asked_rate(rate):
    count = 2_000_000
    spikes = poisson(torch.full((count // 100,), rate), 100)
    deviation = math.sqrt(rate * (1 - rate) / count)
    assert abs(spikes.double().mean().item() - rate) < 5 * deviation + 0.5 / 65536


@pytest.mark.parametrize(("rate", "spikes"), [(0.0, 0.0), (-1.0, 0.0), (1.0, 1.0), (3.0, 1.0)])
def test_poisson_is_certain_at_the_ends(rate, spikes):
    assert (poisson(torch.full((1000,), rate), 50) == spikes).all()


def test_every_element_has_its_own_rate():
    rates = torch.tensor([[0.1, 0.9], [0.5, 0.0]])
    measured = poisson(rates, 20_000).mean(0)
    assert torch.allclose(measured, rates, atol=0.02)


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
def test_lower_precisions_draw_the_spikes_of_the_rates_that_they_hold(dtype):
    rates = torch.linspace(-0.1, 1.1, 1000).to(dtype)
    low, full = (
        poisson(values, 300, torch.Generator().manual_seed(5)) for values in (rates, rates.float())
    )
    assert low.dtype == dtype
    assert torch.equal(low.float(), full)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_poisson_refuses_what_are_no_probabilities(dtype):
    with pytest.raises(TypeError, match=f"values are {dtype}, expected probabilities"):
        poisson(torch.ones(3, dtype=dtype), 5)


def test_the_generator_may_be_of_another_device_than_the_values():
    generator = torch.Generator("cpu").manual_seed(1)
    before = generator.get_state()
    spikes = poisson(torch.rand(3, 5, device="meta"), 7, generator)
    assert not torch.equal(generator.get_state(), before)  # it drew, on its own device
    assert spikes.shape == (7, 3, 5)
    assert spikes.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_poisson_is_zero_or_one_in_the_dtype_of_the_values(dtype):
    spikes = poisson(torch.rand(3, 5, 7, dtype=dtype), 11)
    assert spikes.shape == (11, 3, 5, 7)
    assert spikes.dtype == dtype
    assert set(spikes.unique().tolist()) == {0.0, 1.0}


def test_a_generator_decides_the_spikes():
    values = torch.rand(30)

    def drawn(seed):
        return poisson(values, 20, torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    state = torch.get_rng_state()
    drawn(3)
    assert torch.equal(torch.get_rng_state(), state)  # the default generator is left alone

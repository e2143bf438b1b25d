"""Surrogate gradients: their formulas, computed here with scipy and by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from snn_lib.surrogate import SURROGATES, THRESHOLD, FastSigmoid, Gaussian

MEMBRANE = torch.linspace(-4.0, 6.0, 101, dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.1, 0.4, 2.0])
def test_gaussian_is_the_normal_density_around_the_threshold(sigma):
    expected = norm.pdf(MEMBRANE.numpy(), loc=1.0, scale=sigma)
    np.testing.assert_allclose(
        Gaussian(sigma).derivative(MEMBRANE), expected, rtol=1e-12, atol=1e-300
    )


@pytest.mark.parametrize("width", [0.1, 0.5])
def test_fast_sigmoid_is_one_at_the_threshold_and_a_quarter_at_its_width(width):
    membrane = torch.tensor([1.0, 1.0 - width, 1.0 + width, 1.0 + 9 * width], dtype=torch.float64)
    derivative = FastSigmoid(width).derivative(membrane)
    np.testing.assert_allclose(derivative, [1.0, 0.25, 0.25, 0.01], rtol=1e-12)


def test_gaussian_integrates_to_the_height_of_the_spike():
    area, _ = quad(lambda v: Gaussian().derivative(torch.tensor(v)).item(), -3.0, 5.0)
    assert area == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("surrogate", [Gaussian(), FastSigmoid()])
def test_symmetric_with_its_peak_at_the_threshold(surrogate):
    distance = torch.linspace(0.0, 3.0, 50, dtype=torch.float64)
    above, below = (surrogate.derivative(THRESHOLD + side * distance) for side in (1, -1))
    torch.testing.assert_close(above, below, rtol=1e-12, atol=0.0)
    assert (above.diff() < 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("surrogate", [Gaussian(), FastSigmoid()])
def test_finite_and_of_the_membrane_s_dtype_far_from_the_threshold(surrogate, dtype):
    derivative = surrogate.derivative(torch.tensor([-1e4, 0.0, 1.0, 1e4], dtype=dtype))
    assert derivative.dtype == dtype
    assert torch.isfinite(derivative).all()
    assert (derivative >= 0).all()


def test_found_by_name_and_immutable():
    assert SURROGATES["gaussian"] is Gaussian
    assert SURROGATES["fast_sigmoid"] is FastSigmoid
    assert Gaussian().width == 0.4  # the paper's
    with pytest.raises(dataclasses.FrozenInstanceError):
        Gaussian().width = 1.0


@pytest.mark.parametrize("surrogate", [Gaussian, FastSigmoid])
@pytest.mark.parametrize("width", [-0.4, 0.0, float("nan"), float("inf")])
def test_a_width_that_is_no_positive_number_is_refused(surrogate, width):
    with pytest.raises(ValueError, match=f"width is {width}, expected a positive number"):
        surrogate(width)

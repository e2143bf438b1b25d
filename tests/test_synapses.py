"""Synapses: their impulse responses, states, poles and the projection that keeps them stable."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.signal import lfilter

from snn_lib.synapses import DualExponentialSynapse, IIRSynapse, LowPassSynapse

MARGIN = 1e-3


def impulse_response(synapse, steps=60):
    impulse = torch.zeros(steps, 1, *synapse.shape, dtype=torch.float64)
    impulse[0] = 1.0
    return synapse(impulse)[0].detach()[:, 0]


def filters(alphas, dtype=torch.float64, constraint="stable"):
    """A synapse whose channel i has the coefficients ``alphas[i]``."""
    synapse = IIRSynapse(len(alphas), alphas[0], (1.0,), constraint=constraint, margin=MARGIN)
    synapse.to(dtype)
    with torch.no_grad():
        synapse.alpha.copy_(torch.tensor(alphas).T)
    return synapse


def numpy_poles(alpha):
    return np.roots([1.0, *(-np.asarray(alpha, dtype=np.float64))])


def from_poles(*poles):
    """alpha_1 ... alpha_P of the filter with these poles."""
    return tuple(-np.poly(poles).real[1:])


# Impulse responses


@pytest.mark.parametrize(("tau_m", "tau_s"), [(4.0, 1.0), (8.0, 2.0), (20.0, 0.3)])
def test_dual_exponential_impulse_response(tau_m, tau_s):
    response = impulse_response(DualExponentialSynapse(3, tau_m, tau_s).double())
    p, q = math.exp(-1 / tau_m), math.exp(-1 / tau_s)
    k = np.arange(len(response))
    impulse = np.eye(len(response))[0]
    by_scipy = lfilter([p - q], [1.0, -(p + q), p * q], impulse)
    for channel in response.T:
        # the coefficients are initialised in float32
        np.testing.assert_allclose(channel, p ** (k + 1) - q ** (k + 1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(channel, by_scipy, rtol=1e-4, atol=1e-6)


def test_low_pass_impulse_response():
    response = impulse_response(LowPassSynapse((2, 2), 4.0).double())
    expected = np.exp(-np.arange(len(response)) / 4.0)
    np.testing.assert_allclose(response[:, 1, 0], expected, rtol=1e-5)
    by_scipy = lfilter([1.0], [1.0, -math.exp(-1 / 4.0)], np.eye(len(response))[0])
    np.testing.assert_allclose(response[:, 0, 1], by_scipy, rtol=1e-5)


def test_dual_exponential_impulse_response_of_a_double_precision_module():
    torch.set_default_dtype(torch.float64)
    try:
        synapse = DualExponentialSynapse(1, 4.0, 1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    k = np.arange(60)
    expected = math.exp(-1 / 4) ** (k + 1) - math.exp(-1) ** (k + 1)
    np.testing.assert_allclose(impulse_response(synapse)[:, 0], expected, rtol=1e-12, atol=1e-14)


@given(
    alpha=st.lists(st.floats(-0.3, 0.3), max_size=3),
    beta=st.lists(st.floats(-2.0, 2.0), min_size=1, max_size=3),
)
def test_iir_impulse_response_equals_scipy(alpha, beta):
    synapse = IIRSynapse((2,), alpha, beta).double()
    coefficients = [c.detach()[:, 0].numpy() for c in (synapse.alpha, synapse.beta)]
    expected = lfilter(coefficients[1], np.concatenate([[1.0], -coefficients[0]]), np.eye(60)[0])
    for channel in impulse_response(synapse).T:
        np.testing.assert_allclose(channel, expected, rtol=1e-10, atol=1e-12)


def test_every_channel_has_coefficients_of_its_own():
    synapse = LowPassSynapse(2, 4.0)
    with torch.no_grad():
        synapse.alpha[0, 1] = 0.5
    response = impulse_response(synapse)
    np.testing.assert_allclose(response[:5, 0], np.exp(-np.arange(5) / 4.0), rtol=1e-6)
    np.testing.assert_allclose(response[:5, 1], 0.5 ** np.arange(5), rtol=1e-6)


# Parameters and state


@pytest.mark.parametrize(
    ("synapse", "trained", "fixed"),
    [
        (DualExponentialSynapse(3, 4.0, 1.0), {"alpha", "beta"}, set()),
        (DualExponentialSynapse(3, 4.0, 1.0, train_coefficients=False), set(), {"alpha", "beta"}),
        (LowPassSynapse(3, 4.0), {"alpha"}, {"beta"}),
        (LowPassSynapse(3, 4.0, train_coefficients=False), set(), {"alpha", "beta"}),
        (IIRSynapse(3, (0.5,), (1.0,), train_alpha=False), {"beta"}, {"alpha"}),
    ],
)
def test_coefficients_are_parameters_where_trained_and_buffers_elsewhere(synapse, trained, fixed):
    assert {name for name, _ in synapse.named_parameters()} == trained
    assert {name for name, _ in synapse.named_buffers()} == fixed
    x = torch.randn(4, 2, 3)
    synapse(x)[0]  # a run leaves nothing behind: the state is no buffer
    assert set(synapse.state_dict()) == {"alpha", "beta"}
    if trained:
        synapse(x)[0].sum().backward()
        assert all((parameter.grad != 0).any() for parameter in synapse.parameters())


@pytest.mark.parametrize("shape", [3, (3,), (2, 3), (2, 3, 4)])
def test_shapes(shape):
    features = (shape,) if isinstance(shape, int) else shape
    synapse = IIRSynapse(shape, (0.5, -0.1), (1.0, 0.2, 0.1, 0.3))
    assert synapse.alpha.shape == (2, *features)
    assert synapse.beta.shape == (4, *features)
    psp, (past_output, past_input) = synapse(torch.randn(6, 5, *features))
    assert psp.shape == (6, 5, *features)
    assert past_output.shape == (2, 5, *features)
    assert past_input.shape == (3, 5, *features)


@given(cut=st.integers(0, 9), seed=st.integers(0, 2**32 - 1))
def test_chunks_with_the_state_carried_over_are_the_whole_run(cut, seed):
    torch.manual_seed(seed)
    x = (torch.rand(9, 2, 3) > 0.7).float()
    for synapse in (
        DualExponentialSynapse(3, 4.0, 1.0),
        LowPassSynapse(3, 4.0),
        IIRSynapse(3, (0.5, -0.2, 0.1), (1.0, 0.5)),
    ):
        whole, end = synapse(x)
        first, state = synapse(x[:cut])
        second, state = synapse(x[cut:], state)
        torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0.0, atol=0.0)
        torch.testing.assert_close(state, end, rtol=0.0, atol=0.0)


# Poles


@given(
    st.lists(st.floats(-3.0, 3.0), max_size=5).flatmap(
        lambda alpha: st.lists(
            st.lists(st.floats(-3.0, 3.0), min_size=len(alpha), max_size=len(alpha)),
            min_size=1,
            max_size=3,
        )
    )
)
def test_pole_radius_equals_numpy_roots(alphas):
    radius = filters(alphas).pole_radius()
    expected = max(abs(numpy_poles(alpha)).max(initial=0.0) for alpha in alphas)
    # a cluster of P poles is known to eps^(1/P) only
    assert radius == pytest.approx(expected, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize(
    "poles",
    [
        (0.5,),
        (-0.9,),
        (0.9, 0.3),
        (0.6 + 0.7j, 0.6 - 0.7j),
        (0.8, 0.2 + 0.9j, 0.2 - 0.9j),
        (1.2, 0),
    ],
)
def test_poles_are_those_the_filter_was_made_of(poles):
    synapse = filters([from_poles(*poles)])
    found = synapse.poles()
    assert found.shape == (1, len(poles))
    np.testing.assert_allclose(
        np.sort_complex(found[0].numpy()), np.sort_complex(poles), rtol=1e-6, atol=1e-6
    )
    assert synapse.pole_radius() == pytest.approx(max(abs(np.array(poles))), rel=1e-6)


def test_pole_radius_of_the_time_constants_and_of_a_filter_without_poles():
    slow = math.exp(-1 / 4)
    assert DualExponentialSynapse(3, 4.0, 1.0).pole_radius() == pytest.approx(slow, rel=1e-6)
    assert LowPassSynapse((2, 2), 4.0).pole_radius() == pytest.approx(slow, rel=1e-6)
    assert IIRSynapse(3, (), (1.0,)).pole_radius() == 0.0
    assert IIRSynapse((2, 3), (), (1.0,)).poles().shape == (2, 3, 0)


def test_pole_radius_is_the_largest_of_all_channels():
    assert filters([(0.5,), (-1.5,), (0.9,)]).pole_radius() == pytest.approx(1.5)


# The projection

orders_of_alpha = st.integers(1, 4).flatmap(
    lambda order: st.lists(st.floats(-5.0, 5.0, width=32), min_size=order, max_size=order)
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(alpha=orders_of_alpha)
@example(alpha=[3.0, -3.0, 1.0])  # a triple pole at 1, which rounding splits and moves
@example(alpha=[2.0, -1.0])
@example(alpha=[0.0, 0.0, 0.0])
def test_projected_filters_are_stable(dtype, alpha):
    synapse = filters([alpha, alpha[::-1]], dtype)
    before = synapse.alpha.detach().clone()
    synapse.project_()
    assert synapse.pole_radius() < 1.0
    for channel in range(2):
        if abs(numpy_poles(before[:, channel])).max() < 0.9:
            torch.testing.assert_close(
                synapse.alpha[:, channel], before[:, channel], rtol=0.0, atol=0.0
            )


@pytest.mark.parametrize(
    "poles",
    [
        (0.9,),
        (-0.998,),
        (0.9, -0.5),
        (0.7 + 0.7j, 0.7 - 0.7j),
        (-0.7 + 0.7j, -0.7 - 0.7j),
        (0.3, 0.5 + 0.8j, 0.5 - 0.8j),
    ],
)
def test_filters_stable_by_more_than_the_margin_stay_as_they_are(poles):
    synapse = filters([from_poles(*poles)])
    before = synapse.alpha.detach().clone()
    synapse.project_()
    torch.testing.assert_close(synapse.alpha.detach(), before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        ((1.5,), (1 - MARGIN,)),
        ((-1.5,), (-(1 - MARGIN),)),
        ((1.9, -1.2), (1.9, -(1 - MARGIN))),  # complex poles outside: onto the base
        ((1.2, 0.5), (0.5 - MARGIN, 0.5)),  # a real pole beyond 1: onto the right side
        ((-1.2, 0.5), (-(0.5 - MARGIN), 0.5)),
        ((0.3, 1.7), (0.0, 1 - MARGIN)),  # beyond the apex
        ((5.0, -5.0), (2 - 2 * MARGIN, -(1 - MARGIN))),  # beyond a corner
    ],
)
def test_orders_one_and_two_land_on_the_edge_of_the_triangle(alpha, expected):
    synapse = filters([alpha])
    synapse.project_()
    np.testing.assert_allclose(synapse.alpha.detach()[:, 0], expected, rtol=1e-6, atol=1e-6)


def test_complex_poles_stay_complex():
    synapse = filters([from_poles(0.9 + 0.6j, 0.9 - 0.6j)])
    assert synapse.pole_radius() > 1.0
    synapse.project_()
    poles = synapse.poles()[0]
    assert (poles.imag.abs() > 0.1).all()
    assert synapse.pole_radius() < 1.0


def test_higher_orders_have_all_poles_scaled_alike():
    poles = np.array([1.1, 0.5 + 1.0j, 0.5 - 1.0j])
    synapse = filters([from_poles(*poles), from_poles(0.5, 0.2, 0.1)])
    untouched = synapse.alpha.detach()[:, 1].clone()
    synapse.project_()
    scaled = poles * (1 - MARGIN) / abs(poles).max()
    np.testing.assert_allclose(
        np.sort_complex(synapse.poles()[0].numpy()), np.sort_complex(scaled), rtol=1e-6
    )
    torch.testing.assert_close(synapse.alpha.detach()[:, 1], untouched, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("alpha", [(1.5,), (1.9, -1.2), (3.0, -3.0, 2.0)])
def test_without_a_constraint_nothing_moves(alpha):
    synapse = filters([alpha], constraint="none")
    before = synapse.alpha.detach().clone()
    synapse.project_()
    torch.testing.assert_close(synapse.alpha.detach(), before, rtol=0.0, atol=0.0)


def test_projection_keeps_the_parameter_and_its_training():
    synapse = LowPassSynapse(3, 4.0, constraint="stable")
    optimizer = torch.optim.SGD(synapse.parameters(), lr=10.0)
    parameter = synapse.alpha
    synapse(torch.ones(9, 2, 3))[0].sum().neg().backward()
    optimizer.step()
    assert synapse.pole_radius() > 1.0
    synapse.project_()
    assert synapse.alpha is parameter
    assert parameter.requires_grad
    assert synapse.pole_radius() < 1.0


@pytest.mark.parametrize(
    ("order", "value"), [(1, math.nan), (2, math.nan), (3, math.nan), (3, math.inf)]
)
def test_projection_hides_no_coefficient_that_is_not_finite_and_ends(order, value):
    synapse = IIRSynapse(2, (0.5,) * order, (1.0,), constraint="stable")
    with torch.no_grad():
        synapse.alpha[-1, 0] = value
    synapse.project_()
    assert not torch.isfinite(synapse.alpha[-1, 0])


def test_projection_of_a_filter_without_poles_does_nothing():
    IIRSynapse(3, (), (1.0,), constraint="stable").project_()


def test_copies_are_independent():
    synapse = DualExponentialSynapse(3, 4.0, 1.0)
    other = copy.deepcopy(synapse)
    with torch.no_grad():
        other.alpha.zero_()
    assert (synapse.alpha != 0).all()


# Errors


@pytest.mark.parametrize(
    ("tau_m", "tau_s"), [(1.0, 1.0), (1.0, 4.0), (4.0, 0.0), (4.0, -1.0), (-1.0, -4.0), (0.0, 0.0)]
)
def test_time_constants_out_of_order_are_refused(tau_m, tau_s):
    with pytest.raises(ValueError, match=f"tau_m is {tau_m} and tau_s {tau_s}"):
        DualExponentialSynapse(3, tau_m, tau_s)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_a_time_constant_that_is_not_positive_is_refused(tau):
    with pytest.raises(ValueError, match=f"tau is {tau}"):
        LowPassSynapse(3, tau)


def test_an_unknown_constraint_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match=r"stabel.*none.*stable"):
        LowPassSynapse(3, 4.0, constraint="stabel")


def test_a_filter_without_beta_is_refused():
    with pytest.raises(ValueError, match="beta_0"):
        IIRSynapse(3, (0.5,), ())


def test_channels_and_states_that_do_not_fit_are_refused():
    synapse = DualExponentialSynapse(3, 4.0, 1.0)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(5, 2, 4\)"):
        synapse(torch.randn(5, 2, 4))
    _, state = synapse(torch.randn(5, 2, 3))
    with pytest.raises(ValueError, match=r"\(2, 2, 3\).*\(2, 1, 3\)"):
        synapse(torch.randn(5, 1, 3), state)

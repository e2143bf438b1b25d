"""The stable set, what lies next to it, and the warning, against the poles by NumPy."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from claimed_device import ClaimedDevice
from filters import MARGIN, filters, from_poles, numpy_poles
from hypothesis import example, given
from hypothesis import strategies as st

from snn_lib import IIRSynapse, stability
from snn_lib.data.batches import default_dtype
from snn_lib.functional import iir_filter
from snn_lib.stability import has_stable_poles, stabilise

ORDERS = st.integers(1, 6)
COEFFICIENTS = st.one_of(
    st.floats(-5.0, 5.0, width=16),
    st.sampled_from([1.0, -1.0, 3e4, -3e4, 1e-4, math.inf, -math.inf]),
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(alpha=ORDERS.flatmap(lambda n: st.lists(COEFFICIENTS, min_size=n, max_size=n)))
@example(alpha=[0.0, 0.0, 0.0])
@example(alpha=[math.inf] * 4)
def test_stabilise_makes_every_filter_stable_and_keeps_those_well_inside(dtype, alpha):
    before = torch.tensor([alpha, alpha[::-1]], dtype=dtype).T
    after = stabilise(before, MARGIN)
    assert after.dtype == dtype
    for old, new in zip(before.double().T, after.double().T, strict=True):
        assert abs(numpy_poles(new)).max() < 1.0
        if torch.isfinite(old).all() and abs(numpy_poles(old)).max() < 0.9 and len(alpha) <= 4:
            assert torch.equal(new, old)
    assert torch.equal(stabilise(after, MARGIN), after)


def test_oscillators_that_do_not_decay_are_no_cluster():
    alpha = (-np.poly(np.exp([0.5j, -0.5j, 1.5j, -1.5j])).real[1:]).tolist()
    assert 0.99 < IIRSynapse(2, alpha, [1.0], constraint="stable").pole_radius() < 1


def clusters(order):
    """Filters with all poles near 1 or near -1, some inside the unit circle, some outside."""
    spread = (
        np.random.default_rng(order).normal(size=(60, order)) * np.logspace(-8, -1, 60)[:, None]
    )
    side = np.array([[1.0], [-1.0]] * 30)
    return torch.tensor([from_poles(*poles) for poles in side * (1.0 + spread)]).T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
def test_clusters_of_poles_are_stable_after_rounding_in_every_dtype(dtype, order):
    after = stabilise(clusters(order).to(dtype), MARGIN)
    assert max(abs(numpy_poles(alpha)).max() for alpha in after.double().T) < 1.0
    assert torch.equal(stabilise(after, MARGIN), after)


@pytest.mark.parametrize(
    "poles",
    [
        (0.9,),
        (-0.998,),
        (0.9, -0.5),
        (0.7 + 0.7j, 0.7 - 0.7j),
        (-0.7 + 0.7j, -0.7 - 0.7j),
        (0.3, 0.5 + 0.8j, 0.5 - 0.8j),
        (0.998, 0.6, -0.998),
        (0.9, -0.9, 0.8j, -0.8j, 0.1, 0.2),
    ],
)
def test_filters_stable_by_more_than_the_margin_stay_as_they_are(poles):
    alpha = torch.tensor([from_poles(*poles)]).T
    assert torch.equal(stabilise(alpha, MARGIN), alpha)


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
def test_filters_of_order_one_and_two_move_to_the_nearest_edge_of_the_triangle(alpha, expected):
    moved = stabilise(torch.tensor([alpha]).T, MARGIN)
    np.testing.assert_allclose(moved[:, 0], expected, rtol=1e-6, atol=1e-6)


def is_stable(alpha):
    """The recursion of Schur and Cohn on Python's fractions, which are exact."""
    rows = [Fraction(value) for value in alpha]
    while rows:
        *rows, k = rows
        if abs(k) >= 1:
            return False
        rows = [(a + k * b) / (1 - k * k) for a, b in zip(rows, reversed(rows), strict=True)]
    return True


@pytest.mark.parametrize(
    "alpha",  # in float32, found by a search: of all of them the recursion's product is above 0
    [
        (1.9995757341384888, -0.9995757341384888),  # a pole at 1
        (2.023313283920288, -2.023282527923584, 0.9999693036079407),
        (-1.2142740488052368, -2.367109537124634, -1.2142714262008667, -0.999995231628418),
    ],
)
def test_filters_whose_instability_is_hidden_by_rounding_do_not_pass_as_stable(alpha):
    assert not is_stable(alpha)
    assert not has_stable_poles(torch.tensor([alpha], dtype=torch.float32).T)
    assert not has_stable_poles(np.array([alpha], np.float32).T)
    inside = [float(a) * 0.99 ** (p + 1) for p, a in enumerate(alpha)]  # all poles are scaled
    assert is_stable(inside)
    assert has_stable_poles(torch.tensor([inside], dtype=torch.float64).T)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_no_unstable_filter_near_the_edge_passes_as_stable(order):
    generator = np.random.default_rng(order)
    for distance in (1e-7, 1e-6, 1e-5, 1e-4):
        radius = 1 + distance * generator.normal(size=(100, order))
        near = generator.choice([1, -1], (100, 1))
        alpha = np.array([from_poles(*poles) for poles in near * radius], np.float32).T
        with np.errstate(all="ignore"):
            said = has_stable_poles(alpha)
        assert all(is_stable(own.tolist()) for own in alpha.T[said])


def test_all_poles_of_filters_of_higher_order_are_scaled_by_one_number():
    poles = np.array([1.05, 0.5 + 0.8j, 0.5 - 0.8j])
    alpha = torch.tensor([from_poles(*poles), from_poles(0.5, 0.2, 0.1)]).T
    moved = stabilise(alpha, MARGIN)
    scaled = poles * (1 - MARGIN) / abs(poles).max()
    found = np.sort_complex(numpy_poles(moved[:, 0]))
    np.testing.assert_allclose(found, np.sort_complex(scaled), rtol=1e-4)
    assert torch.equal(moved[:, 1], alpha[:, 1])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_nan_in_a_coefficient_stays_and_moves_no_other_filter(order):
    synapse = filters([(0.5,) * order] * 2, constraint="stable")
    with torch.no_grad():
        synapse.alpha[-1, 0] = math.nan
    synapse(torch.ones(2, 1, 2))
    assert synapse.alpha.isnan().any(0).tolist() == [True, False]
    assert synapse.pole_radius() == math.inf


@pytest.mark.parametrize("order", [1, 2, 3])
def test_stabilise_reads_no_values_back_from_a_device(order):
    assert stabilise(torch.empty(order, 4, device="meta"), MARGIN).shape == (order, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_stabilise_computes_the_same_under_autocast(dtype, lower):
    alpha = clusters(3).to(dtype)
    with torch.autocast("cpu", lower):
        found = stabilise(alpha, MARGIN)
    assert found.dtype == dtype
    assert torch.equal(found, stabilise(alpha, MARGIN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
def test_stabilise_needs_no_float64_of_mps(dtype, order):
    alpha = torch.cat([clusters(order), 2 * torch.randn(order, 60)], 1).to(dtype)
    with ClaimedDevice("mps"):
        after = stabilise(alpha.to("mps"), MARGIN).cpu()
    assert max(abs(numpy_poles(alpha)).max() for alpha in after.double().T) < 1.0


# Training that leaves the stable region is told of once


def train_filter(alpha):
    alpha = torch.as_tensor(alpha, dtype=torch.float32).view(-1, 1).requires_grad_()
    output, _ = iir_filter(torch.ones(2, 1, 1), alpha, torch.ones(1, 1))
    output.sum().backward()


def test_a_pole_outside_the_unit_circle_is_warned_of_once():
    stability._warn_of_instability.cache_clear()
    with pytest.warns(RuntimeWarning, match='pole.*constraint="stable"'):
        train_filter([1.2, -0.1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_filter([1.2, -0.1])
        stability._warn_of_instability.cache_clear()
        train_filter([1.7, -0.9])
        iir_filter(torch.ones(2, 1, 1), torch.full((1, 1), 2.0), torch.ones(1, 1))


def test_the_warning_comes_back_after_without_warning():
    stability._warn_of_instability.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with stability.without_warning():
            train_filter([1.2, -0.1])
    with pytest.warns(RuntimeWarning, match="pole"):
        train_filter([1.2, -0.1])


def test_coefficients_on_a_device_are_checked_now_and_then(monkeypatch):
    looked = []
    monkeypatch.setattr(
        stability, "has_stable_poles", lambda alpha: looked.append(alpha) or np.array([True])
    )
    with ClaimedDevice() as device:
        alpha = torch.zeros(1, 1, device="cuda")
        device.waits.clear()
        for _ in range(3 * stability.CHECKED):
            stability.warn_if_unstable(alpha)
        assert len(looked) == sum(device.waits.values()) == 3
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for _ in range(stability.CHECKED):  # A CUDA graph cannot record what waits.
            stability.warn_if_unstable(alpha)
        assert len(looked) == 3
    stability.warn_if_unstable(torch.zeros(1, 1))
    stability.warn_if_unstable(torch.zeros(1, 1))
    assert len(looked) == 5


@pytest.mark.parametrize("form", [torch.Tensor.double, torch.Tensor.numpy])
@given(order=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
def test_has_stable_poles_tells_each_filter_by_its_roots(form, order, seed):
    """Against the roots of z^P - sum_p alpha_p z^(P-p)."""
    generator = np.random.default_rng(seed)
    radius = generator.choice([0.7, 0.999, 1.001, 1.5], size=order // 2)
    pairs = radius * np.exp(1j * generator.uniform(0, np.pi, order // 2))
    real = generator.choice([-1.1, -0.9, 0.5, 0.99, 1.01], size=order % 2)
    poles = np.concatenate([pairs, pairs.conj(), real])
    alpha = torch.from_numpy(-np.atleast_1d(np.poly(poles)).real[1:]).view(-1, 1)
    beside = torch.zeros(order, 2, dtype=torch.float64)  # a stable filter on either side
    found = has_stable_poles(form(torch.cat([beside, alpha, beside], 1)))
    assert found.tolist() == [True, True, (abs(poles) < 1).all(), True, True]


@pytest.mark.parametrize("form", [torch.Tensor.double, torch.Tensor.numpy])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_coefficients_that_are_not_finite_are_not_stable(order, value, form):
    for p in range(order):
        alpha = torch.zeros(order, 2)
        alpha[p, 1] = value
        with np.errstate(all="ignore"):
            assert has_stable_poles(form(alpha)).tolist() == [True, False]


CLUSTERS = [
    np.array([0.98 + 0.02j, 0.97 + 0.015j, 0.96 + 0.005j]),
    # a Butterworth filter of order 8, whose poles seem to lie outside in double precision
    1 - 0.006 * np.exp(1j * np.pi / 16 * np.array([1, 3, 5, 7])),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("poles", CLUSTERS, ids=len)
def test_a_first_filter_whose_poles_lie_in_a_cluster_is_refused(dtype, poles):
    alpha = (-np.poly([*poles, *poles.conj()]).real[1:]).tolist()
    message = "the poles of a filter are so close together that"
    with default_dtype(dtype), pytest.raises(ValueError, match=message):
        IIRSynapse(2, alpha, [1.0], constraint="stable")


def test_a_filter_whose_poles_lie_in_a_cluster_is_not_called_unstable():
    poles = CLUSTERS[0]
    alpha = (-np.poly([*poles, *poles.conj()]).real[1:]).tolist()
    free = IIRSynapse(2, alpha, [1.0]).double()
    free.alpha.data = torch.tensor(alpha, dtype=torch.float64)[:, None].repeat(1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        free(torch.zeros(1, 1, 2).double())
    assert free.pole_radius() == pytest.approx(abs(poles).max(), abs=1e-3)

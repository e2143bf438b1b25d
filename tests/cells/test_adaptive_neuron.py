"""The adaptive neuron, by hand, and that its threshold rises."""

import numpy as np
import pytest
import torch

from snn_lib import AdaptiveNeuron


def by_hand(current, lambda_, theta, strength, rho, rise):
    """S, and the last V, R and A, in NumPy."""
    membrane, reset, adaptation = np.zeros((3, *current.shape[1:]))
    spikes = []
    for current_t in current:
        membrane = lambda_ * membrane + current_t - reset
        spikes.append((membrane > 1 + adaptation).astype(float))
        reset = theta * reset + strength * spikes[-1]
        adaptation = rho * adaptation + rise * spikes[-1]
    return np.stack(spikes), (membrane, reset, adaptation)


@pytest.mark.parametrize("membrane_filter", [False, True])
def test_an_adaptive_neuron_follows_its_equations(membrane_filter):
    tau, tau_a = torch.tensor([3.0, 5.0, 9.0]), torch.tensor([20.0, 50.0, 90.0])
    neuron = AdaptiveNeuron(3, tau, tau_a, 0.3, membrane_filter, reset_strength=0.7).double()
    current = 2 * torch.rand(40, 2, 3, dtype=torch.float64)
    theta, rho = (np.exp(-1 / t.double().numpy()) for t in (tau, tau_a))
    spikes, state = by_hand(current.numpy(), theta * membrane_filter, theta, 0.7, rho, 0.3)
    output, found = neuron(current)
    np.testing.assert_array_equal(output, spikes)
    # the coefficients were rounded to float32
    for one, expected in zip(found, state, strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-5)
    assert 0.05 < spikes.mean() < 0.9


def test_a_constant_current_makes_it_fire_less_and_less():
    current = torch.full((200, 1, 1), 1.6)
    spikes, (*_, adaptation) = AdaptiveNeuron(1, 2.0, 100.0, 0.05)(current)
    assert spikes[:50].sum() > 1.5 * spikes[150:].sum() > 0
    assert adaptation > 0.3


def test_the_gradient_flows_through_the_reset_and_the_raised_threshold():
    """Two steps: the second spike sees the first one in V and in A."""
    neuron = AdaptiveNeuron(1, 4.0, 50.0, 0.25, train=["adaptation_strength"])
    current = torch.tensor([1.2, 2.3]).view(2, 1, 1).requires_grad_()
    neuron(current)[0][1].sum().backward()
    slope = neuron.surrogate.derivative(torch.tensor([1.2, 2.3 - 1.0 - 0.25]))
    expected = torch.stack([-(1.0 + 0.25) * slope[0] * slope[1], slope[1]])
    torch.testing.assert_close(current.grad.flatten(), expected)
    torch.testing.assert_close(neuron.adaptation_strength.grad, -slope[1:])


@pytest.mark.parametrize(
    ("tau_m", "tau_adaptation", "words"),
    [(0.0, 5.0, "tau_m is 0"), (4.0, -1.0, "tau_adaptation is -1"), (4.0, 1e9, "too long")],
)
def test_bad_time_constants_are_refused(tau_m, tau_adaptation, words):
    with pytest.raises(ValueError, match=words):
        AdaptiveNeuron(3, tau_m, tau_adaptation, 0.1)

"""The resonate-and-fire neuron, by hand in complex numbers, and that it prefers its frequency."""

import numpy as np
import pytest
import torch

from snn_lib import ResonateAndFireNeuron


def by_hand(current, decay, frequency, theta, strength):
    """S, Z and R, with a complex membrane, in NumPy."""
    pole = decay * np.exp(2j * np.pi * frequency)
    z, reset, spikes = 0j, 0.0, []
    for current_t in current:
        z = pole * (z + current_t - reset)
        spikes.append((z.imag > 1).astype(float))
        reset = theta * reset + strength * spikes[-1]
    return np.stack(spikes), z, reset


def test_a_resonate_and_fire_neuron_follows_its_equations():
    tau, frequency = torch.tensor([5.0, 9.0, 30.0]), torch.tensor([0.05, 0.1, 0.2])
    neuron = ResonateAndFireNeuron(3, tau, frequency, tau_reset=4.0, reset_strength=0.7).double()
    current = 2 * torch.randn(40, 2, 3, dtype=torch.float64)
    decay, frequency = np.exp(-1 / tau.double().numpy()), frequency.double().numpy()
    spikes, z, reset = by_hand(current.numpy(), decay, frequency, np.exp(-1 / 4), 0.7)
    output, found = neuron(current)
    np.testing.assert_array_equal(output, spikes)
    # the coefficients were rounded to float32
    for one, expected in zip(found, (z.real, z.imag, reset), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-5)
    assert 0.05 < spikes.mean() < 0.9


def test_it_rings_after_a_pulse_and_prefers_its_own_frequency():
    neuron = ResonateAndFireNeuron(1, 40.0, 0.05)
    pulse = torch.zeros(30, 1, 1)
    pulse[0] = 0.5
    with torch.no_grad():
        _, ringing, _ = neuron.traces(pulse)
        k = torch.arange(1, 31)
        expected = 0.5 * torch.exp(-k / 40.0) * torch.sin(2 * torch.pi * 0.05 * k)
        torch.testing.assert_close(ringing[:, 0, 0], expected)
        t = torch.arange(200.0)
        rates = [
            neuron(0.15 * torch.sin(2 * torch.pi * f * t).view(-1, 1, 1))[0].mean()
            for f in (0.01, 0.05, 0.2)
        ]
    assert rates[1] > 0
    assert rates[0] == rates[2] == 0


def test_the_reset_decays_as_the_membrane_unless_it_has_a_time_constant_of_its_own():
    same, other = (ResonateAndFireNeuron(2, 9.0, 0.1, tau) for tau in (None, 3.0))
    assert torch.equal(same.reset_decay, same.membrane_decay)
    assert (other.reset_decay < other.membrane_decay).all()
    assert (same.reset_strength == 1).all()


def test_both_of_its_decays_are_trained_and_kept_below_one():
    neuron = ResonateAndFireNeuron(2, 9.0, 0.1, tau_reset=3.0, train_decay=True)
    trained = {name for name, one in neuron.named_parameters() if one.requires_grad}
    assert trained == {"membrane_decay", "reset_decay"}
    with torch.no_grad():
        neuron.reset_decay.fill_(1.5)
        neuron.membrane_decay.fill_(1.5)
    neuron(torch.zeros(1, 1, 2))
    assert (neuron.reset_decay < 1).all()
    assert (neuron.membrane_decay < 1).all()
    with pytest.raises(ValueError, match="its filter does not decay"):
        ResonateAndFireNeuron(2, 9.0, 0.1, tau_reset=1e9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((0.0, 0.1), "tau_m is 0"),
        ((4.0, 0.1, -1.0), "tau_reset is -1"),
        ((4.0, torch.zeros(2)), "frequency has the shape"),
        ((4.0, 20.0), r"frequency is 20\.0, expected cycles per step in \[0, 0\.5\]"),
        ((4.0, -0.1), r"frequency is -0\.1, expected cycles"),
    ],
)
def test_bad_time_constants_and_frequencies_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ResonateAndFireNeuron(3, *settings)

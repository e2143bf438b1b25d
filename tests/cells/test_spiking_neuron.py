"""The neuron's module: its equations by hand, its buffers, dropout in training only, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from snn_lib.cells import SpikingNeuron
from snn_lib.surrogate import FastSigmoid, Gaussian


def by_hand(current, tau_m, membrane_filter, reset_strength):
    """Spikes, V and R of a single neuron, in plain Python numbers."""
    theta = math.exp(-1.0 / tau_m)
    membrane = reset = 0.0
    spikes = []
    for current_t in current:
        membrane = (theta * membrane if membrane_filter else 0.0) + current_t - reset
        spikes.append(1.0 if membrane > 1.0 else 0.0)
        reset = theta * reset + reset_strength * spikes[-1]
    return spikes, membrane, reset


@given(
    current=st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=30),
    tau_m=st.floats(0.2, 50.0),
    membrane_filter=st.booleans(),
    reset_strength=st.floats(0.0, 2.0),
)
def test_a_neuron_follows_its_equations(current, tau_m, membrane_filter, reset_strength):
    neuron = SpikingNeuron(1, tau_m, membrane_filter, reset_strength).double()
    # the module's coefficients were rounded to float32
    tau_m = -1.0 / math.log(neuron.reset_decay.item())
    expected, membrane, reset = by_hand(
        current, tau_m, membrane_filter, neuron.reset_strength.item()
    )
    spikes, state = neuron(torch.tensor(current, dtype=torch.float64).view(-1, 1, 1))
    assert spikes.flatten().tolist() == expected
    assert state[0].item() == pytest.approx(membrane, rel=1e-9, abs=1e-9)
    assert state[1].item() == pytest.approx(reset, rel=1e-9, abs=1e-9)


def test_a_spike_lowers_the_potential_and_the_reset_decays():
    theta = math.exp(-1 / 4)
    neuron = SpikingNeuron(1, tau_m=4.0, reset_strength=2.0)
    current = torch.tensor([1.5, 0.0, 0.0]).view(-1, 1, 1)
    for steps, membrane, reset in ((1, 1.5, 2.0), (2, -2.0, 2.0 * theta), (3, -2.0 * theta, None)):
        spikes, state = neuron(current[:steps])
        assert spikes.flatten().tolist() == [1.0, 0.0, 0.0][:steps]
        assert state[0].item() == pytest.approx(membrane, rel=1e-6)
        assert state[1].item() == pytest.approx(reset or 2.0 * theta**2, rel=1e-6)


@pytest.mark.parametrize("membrane_filter", [False, True])
def test_the_state_at_a_sequence_s_own_end_has_the_reset_of_this_strength(membrane_filter):
    neuron = SpikingNeuron(1, 4.0, membrane_filter, reset_strength=0.3).double()
    current, lengths = 3 * torch.rand(12, 3, 1, dtype=torch.float64), torch.tensor([12, 5, 8])
    _, (membranes, resets) = neuron(current, lengths=lengths)
    tau_m = -1.0 / math.log(neuron.reset_decay.item())
    strength = neuron.reset_strength.item()  # which was rounded to float32
    for number, length in enumerate(lengths):
        own = current[:length, number, 0].tolist()
        spikes, membrane, reset = by_hand(own, tau_m, membrane_filter, strength)
        assert sum(spikes) > 1
        assert membranes[number].item() == pytest.approx(membrane, rel=1e-9, abs=1e-9)
        assert resets[number].item() == pytest.approx(reset, rel=1e-9)


def test_only_the_membrane_filter_adds_up_small_currents():
    current = torch.full((20, 1, 1), 0.5)
    assert SpikingNeuron(1, 4.0, membrane_filter=False)(current)[0].sum() == 0
    assert SpikingNeuron(1, 4.0, membrane_filter=True)(current)[0].sum() > 0


@pytest.mark.parametrize("membrane_filter", [False, True])
@pytest.mark.parametrize("shape", [3, (2, 3), (2, 3, 4)])
def test_coefficients_are_buffers_of_the_neurons_shape(shape, membrane_filter):
    features = (shape,) if isinstance(shape, int) else shape
    neuron = SpikingNeuron(shape, 4.0, membrane_filter)
    spikes, state = neuron(torch.randn(5, 2, *features))
    assert spikes.shape == (5, 2, *features)
    assert [part.shape for part in state] == [(2, *features)] * 2
    assert not list(neuron.parameters())
    assert set(neuron.state_dict()) == {"reset_decay", "reset_strength", "membrane_decay"}
    decay = torch.full(features, math.exp(-1 / 4))
    torch.testing.assert_close(neuron.reset_decay, decay)
    torch.testing.assert_close(neuron.reset_strength, torch.ones(features))
    torch.testing.assert_close(neuron.membrane_decay, decay * membrane_filter)


@pytest.mark.parametrize("membrane_filter", [False, True])
def test_a_decay_that_rounding_would_end_is_refused(membrane_filter):
    neuron = SpikingNeuron(3, 1000.0, membrane_filter)
    assert neuron.half().reset_decay.max() < 1
    with pytest.raises(ValueError, match=r"rounded to torch\.bfloat16, it does not decay"):
        SpikingNeuron(3, 1000.0, membrane_filter).bfloat16()
    with pytest.raises(RuntimeError, match=r"reset_decay: a filter .* rounded to torch\.bfloat16"):
        SpikingNeuron(3, 5.0).bfloat16().load_state_dict(SpikingNeuron(3, 1000.0).state_dict())
    with pytest.raises(ValueError, match=r"a time constant is too long: in torch\.float32"):
        SpikingNeuron(3, 1e9)


def test_what_is_no_surrogate_is_refused():
    with pytest.raises(TypeError, match="surrogate is 'gaussian', expected an object with deriv"):
        SpikingNeuron(3, 4.0, surrogate="gaussian")


def test_sequences_without_steps_leave_the_state_as_it_was():
    state = torch.randn(2, 3), torch.rand(2, 3)
    nothing, lengths = torch.zeros(0, 2, 3), torch.zeros(2, dtype=torch.int64)
    assert torch.equal(SpikingNeuron(3, 4.0)(nothing, None, lengths)[1][0], torch.zeros(2, 3))
    torch.testing.assert_close(SpikingNeuron(3, 4.0)(nothing, state, lengths)[1], state)


class Triangle:
    """A surrogate of one's own."""

    def derivative(self, membrane):
        return torch.relu(1.0 - torch.abs(membrane - 1.0))


@pytest.mark.parametrize("surrogate", [Gaussian(), Gaussian(1.0), FastSigmoid(0.3), Triangle()])
def test_the_surrogate_is_the_gradient_of_a_single_step(surrogate):
    neuron = SpikingNeuron(50, 4.0, surrogate=surrogate)
    current = torch.linspace(-1.0, 3.0, 50).view(1, 1, 50).requires_grad_()
    spikes, _ = neuron(current)
    spikes.sum().backward()
    torch.testing.assert_close(current.grad, surrogate.derivative(current.detach()))


def test_the_gradient_flows_through_the_reset():
    neuron = SpikingNeuron(1, 4.0)
    current = torch.tensor([1.2, 1.4]).view(2, 1, 1).requires_grad_()
    spikes, _ = neuron(current)
    spikes[1].sum().backward()
    slope = Gaussian().derivative(torch.tensor([1.2, 1.4 - 1.0]))
    torch.testing.assert_close(
        current.grad.flatten(), torch.stack([-slope[1] * slope[0], slope[1]])
    )


def test_dropout_acts_in_training_only():
    current = torch.full((20, 8, 50), 100.0)
    neuron = SpikingNeuron(50, 4.0, dropout=0.5)
    assert set(neuron.train()(current)[0].unique().tolist()) == {0.0, 2.0}
    assert (neuron.eval()(current)[0] == 1.0).all()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    neuron(current)
    assert torch.equal(torch.get_rng_state(), before)  # evaluation draws no random number


@pytest.mark.parametrize(
    ("decays", "shown"),
    [
        ({}, "tau_m=4, membrane_filter=True"),
        ({"membrane_decay": 0.0}, "tau_m=4, membrane_filter=False"),
        ({"reset_decay": math.exp(-1 / 8)}, "tau_m=8, membrane_filter=4"),
        (
            {"reset_decay": [math.exp(-1 / 2), math.exp(-1 / 20)]},
            "tau_m=2 to 20, membrane_filter=4",
        ),
    ],
)
def test_what_is_printed_is_what_was_loaded(decays, shown):
    neuron = SpikingNeuron(2, 4.0, membrane_filter=True)
    loaded = {name: torch.tensor(decay).expand(2) for name, decay in decays.items()}
    neuron.load_state_dict(neuron.state_dict() | loaded)
    assert f"{shown}, surrogate=" in str(neuron)
    assert "tau_m=unknown" in str(neuron.to("meta"))


@pytest.mark.parametrize("tau_m", [0.0, -1.0, math.nan])
def test_a_time_constant_that_is_not_positive_is_refused(tau_m):
    with pytest.raises(ValueError, match=f"tau_m is {tau_m}"):
        SpikingNeuron(3, tau_m)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2.0, math.nan])
def test_dropout_outside_its_range_is_refused(dropout):
    with pytest.raises(ValueError, match=f"dropout is {dropout}.*\\[0, 1\\)"):
        SpikingNeuron(3, 4.0, dropout=dropout)


def test_neurons_and_states_that_do_not_fit_are_refused():
    neuron = SpikingNeuron(3, 4.0)
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\).*\(5, 2, 4\)"):
        neuron(torch.randn(5, 2, 4))
    _, state = neuron(torch.randn(5, 2, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(1, 3\)"):
        neuron(torch.randn(5, 1, 3), state)


@pytest.mark.parametrize("membrane_filter", [False, True])
def test_neurons_of_maps_of_any_size(membrane_filter):
    options = {"tau_m": 4.0, "membrane_filter": membrane_filter, "dropout": 0.3}
    anywhere = SpikingNeuron((3, 1, 1), **options)
    for size in (2, 5):
        neuron = SpikingNeuron((3, size, size), **options)
        current = 2 * torch.randn(7, 2, 3, size, size)
        results = []
        for layer in (anywhere, neuron):
            torch.manual_seed(0)
            results.append(layer(current, lengths=torch.tensor([7, 3])))
        torch.testing.assert_close(*results, rtol=0.0, atol=0.0)
        traces = [layer.traces(current) for layer in (anywhere, neuron)]
        torch.testing.assert_close(*traces, rtol=0.0, atol=0.0)

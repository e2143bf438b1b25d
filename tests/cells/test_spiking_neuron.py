"""The neuron's module: its equations by hand, its buffers, dropout in training only, errors."""

import math

import pytest
import torch
from definitions import Triangle, with_channels_last
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


@pytest.mark.parametrize("membrane_filter", [False, True])
@pytest.mark.parametrize("shape", [3, (2, 3), (2, 3, 4)])
def test_coefficients_are_buffers_of_the_shape_of_the_neurons(shape, membrane_filter):
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


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_each_neuron_may_have_a_reset_of_its_own(kind):
    strengths = [0.1, 0.2, 0.9]
    neuron = SpikingNeuron(3, 4.0, reset_strength=kind(strengths))
    _, (_, reset) = neuron(torch.full((1, 1, 3), 2.0))
    assert reset.tolist() == torch.tensor([strengths]).tolist()


@pytest.mark.parametrize("membrane_filter", [False, True])
def test_a_decay_that_low_precision_rounds_to_1_is_refused(membrane_filter):
    neuron = SpikingNeuron(3, 1000.0, membrane_filter)
    assert neuron.half().reset_decay.max() < 1
    with pytest.raises(ValueError, match=r"rounded to torch\.bfloat16, it does not decay"):
        SpikingNeuron(3, 1000.0, membrane_filter).bfloat16()
    with pytest.raises(RuntimeError, match=r"reset_decay: a filter .* rounded to torch\.bfloat16"):
        SpikingNeuron(3, 5.0).bfloat16().load_state_dict(SpikingNeuron(3, 1000.0).state_dict())


@pytest.mark.parametrize("surrogate", [Gaussian(), Gaussian(1.0), FastSigmoid(0.3), Triangle()])
def test_the_gradient_of_a_single_step_is_the_surrogate(surrogate):
    neuron = SpikingNeuron(50, 4.0, surrogate=surrogate)
    current = torch.linspace(-1.0, 3.0, 50).view(1, 1, 50).requires_grad_()
    spikes, _ = neuron(current)
    spikes.sum().backward()
    torch.testing.assert_close(current.grad, surrogate.derivative(current.detach()))


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
def test_print_shows_the_time_constants_that_were_loaded(decays, shown):
    neuron = SpikingNeuron(2, 4.0, membrane_filter=True)
    loaded = {name: torch.tensor(decay).expand(2) for name, decay in decays.items()}
    neuron.load_state_dict(neuron.state_dict() | loaded)
    assert f"{shown}, surrogate=" in str(neuron)
    assert "tau_m=unknown" in str(neuron.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_trained_decays_stay_below_1_in_every_precision(dtype):
    neuron = SpikingNeuron(3, 4.0, membrane_filter=True, train_decay=True).to(dtype)
    for decay in (neuron.reset_decay, neuron.membrane_decay):
        decay.data.fill_(1.7)
    for decay in (neuron.effective_coefficients()[name].double() for name in neuron.decays):
        assert 0.99 < decay.min() <= decay.max() < 0.9991


def test_a_loaded_decay_that_training_would_move_is_refused():
    slow, trained = SpikingNeuron(3, 5e3), SpikingNeuron(3, 5.0, train_decay=True)
    with pytest.raises(RuntimeError, match=r"reset_decay is trained, and 0\.9998: expected a"):
        trained.load_state_dict(slow.state_dict())
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        at_the_edge = SpikingNeuron(3, 4.0, train_decay=True).to(dtype)
        at_the_edge.reset_decay.data.fill_(2.0)
        trained.load_state_dict(at_the_edge.state_dict())  # what training saves
        slow = SpikingNeuron(3, 200.0, train_decay=True).state_dict()
        trained.load_state_dict({name: decay.to(dtype) for name, decay in slow.items()})


REFUSED = [  # what is built or run, and the words
    *((lambda t=t: SpikingNeuron(3, t), f"tau_m is {t}") for t in (0.0, -1.0, math.nan)),
    (lambda: SpikingNeuron(3, 1e9), r"a time constant is too long, .*: in torch\.float32"),
    (lambda: SpikingNeuron(3, 5e3, train_decay=True), "reset_decay is trained, and 0.9998: expect"),
    *((lambda p=p: SpikingNeuron(3, 4.0, dropout=p), rf"dropout is {p}.*\[0, 1\)")
      for p in (-0.1, 1.0, 2.0, math.nan)),
    (lambda: SpikingNeuron(3, 4.0, surrogate="gaussian"), "'gaussian', expected an object with d"),
    (lambda: SpikingNeuron(3, 4.0, surrogate=Gaussian), "Gaussian'>, expected an object with der"),
    (lambda: SpikingNeuron(3, 4.0)(torch.zeros(5, 2, 4)), r"x has shape \(5, 2, 4\), .* \(3,\)"),
    (lambda: SpikingNeuron(3, 4.0)(torch.zeros(5, 1, 3), torch.zeros(2, 2, 3).unbind()),
     r"\(2, 3\).*\(1, 3\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_bad_settings_and_inputs_are_refused(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize("membrane_filter", [False, True])
def test_positions_of_a_map_of_any_size_share_a_neuron_s_coefficients(membrane_filter):
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


def test_traces_of_maps_are_the_same_however_the_maps_lie_in_memory():
    neuron, current = SpikingNeuron((2, 1, 1), 4.0, True), 2 * torch.rand(7, 3, 2, 4, 5)
    found = neuron.traces(with_channels_last(current))
    torch.testing.assert_close(found, neuron.traces(current), rtol=0.0, atol=0.0)

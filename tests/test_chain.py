"""Which networks are a chain of layers, and what is said of the others."""

import pytest
import torch
from torch import nn

from snn_lib import Chunked, LowPassSynapse, Sequential
from snn_lib.chain import chain_of


class Around(nn.Module):
    """A network whose ``forward`` is given."""

    def __init__(self, run, parts=1):
        super().__init__()
        self.layers = Sequential(nn.Linear(4, 4), Sequential(LowPassSynapse(4, 2.0)))
        self.others = nn.ModuleList([Sequential(nn.Linear(4, 4)) for _ in range(parts - 1)])
        self.run = run

    def forward(self, x, state=None):
        return self.run(self.layers, x, state)


def rewrapped(layers, x, state):
    y, state = layers(x, state)
    return y, state


def twice(layers, x, state):
    _, state = layers(x, state)
    return layers(x, state)


def after(change):
    def run(layers, x, state):
        y, state = layers(x, state)
        return change(y), state

    return run


@pytest.mark.parametrize(
    "run",
    [
        lambda layers, x, state: layers(x, state),
        rewrapped,
        lambda layers, x, _: layers(x)[0],
        lambda layers, x, _: layers(x, (None,) * 2),
    ],
)
def test_a_network_that_hands_its_input_to_a_chain_is_that_chain(run):
    network = Around(run)
    loaded = nn.Module()
    loaded.model, loaded.forward = network, lambda *given: network(*given)
    for name, whole in (("", network), ("model.", loaded), ("module.", Chunked(network, 3))):
        assert chain_of(whole) == (f"{name}layers", network.layers)
    assert "forward" not in vars(network.layers)
    assert chain_of(network.layers) == ("", network.layers)


def test_a_network_may_hold_its_chain_in_chunks():
    network = Around(rewrapped)
    network.layers, inner = Chunked(network.layers, 3), network.layers
    assert chain_of(network) == ("layers.module", inner)


@pytest.mark.parametrize(
    "run",
    [
        twice,
        lambda layers, x, state: layers(2 * x, state),
        lambda layers, x, state: layers(x.clamp(-100, 100), state),
        lambda layers, x, state: layers(x.unflatten(2, (2, 2)).flatten(2), state),
        lambda layers, x, state: layers(torch.relu(x), state),
        lambda layers, x, state: (x, state),
        lambda layers, x, state: (layers(x, state)[0], layers),
        lambda layers, x, _: layers(x, (None, (torch.zeros(4),))),
        lambda layers, x, state: layers(x, state, torch.tensor([2])),
        after(lambda y: y + 1),
        after(lambda y: torch.cat([0 * y[:10], y[10:]])),
        after(lambda y: y.sum(2)),
        after(torch.relu),
    ],
)
def test_a_forward_that_does_more_is_refused_with_the_remedy(run):
    network = Around(run)
    with pytest.raises(ValueError, match=r"Around.forward does more than .* make what") as caught:
        chain_of(network)
    assert "\n" not in str(caught.value)
    assert "forward" not in vars(network.layers)


class Keeping(Around):
    """Keeps the state for the next call, and what it has seen."""

    def __init__(self):
        super().__init__(None)
        self.state, self.seen = None, []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        output, self.state = self.layers(x, self.state)
        self.seen.append(output)
        return output


def test_a_network_is_left_as_it_was_whatever_its_forward_keeps():
    network, x = Keeping(), torch.rand(3, 2, 4)
    assert chain_of(network)[1] is network.layers
    assert network.state is None
    assert network.seen == []
    assert network.calls == 0
    network(x)
    with pytest.raises(ValueError, match=r"Keeping.forward does more than"):
        chain_of(network)  # from now on it hands on a state
    network.state = None
    assert chain_of(network)[1] is network.layers
    assert torch.equal(network.seen[0], network.layers(x).output)
    assert len(network.seen) == 1


def test_a_network_may_hold_what_nobody_can_copy():
    network = Keeping()
    with open(__file__) as network.file:
        assert chain_of(network)[1] is network.layers


class Demanding(dict):
    def __copy__(self):
        raise TypeError


def test_a_network_that_cannot_be_tried_is_refused_in_a_line():
    network = Around(rewrapped)
    network.table = Demanding()
    with pytest.raises(ValueError, match=r"Around.forward does more than"):
        chain_of(network)
    assert "forward" not in vars(network.layers)


class Backwards(Sequential):
    def forward(self, x, state=None, lengths=None):
        return super().forward(x.flip(0), state, lengths)


@pytest.mark.parametrize(
    ("network", "parts"),
    [
        (Around(rewrapped, parts=2), 2),
        (nn.Linear(4, 4), 0),
        (nn.Sequential(nn.Linear(4, 4)), 0),
        (Backwards(nn.Linear(4, 4)), 0),
        (Backwards(Sequential(nn.Linear(4, 4))), 1),
    ],
)
def test_a_network_that_holds_no_or_several_chains_is_refused(network, parts):
    kind = type(network).__name__
    with pytest.raises(ValueError, match=f"{kind} is no chain of layers: .* {parts} parts"):
        chain_of(network)

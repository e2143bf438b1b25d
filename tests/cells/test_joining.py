"""A cell that spikes and a filter, as neighbours that run as one: the same bits as one by one."""

from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import parts
from torch import nn

from snn_lib import (
    AdaptiveNeuron,
    Cell,
    Chunked,
    DualExponentialSynapse,
    FastSigmoid,
    IIRSynapse,
    LowPassSynapse,
    ResonateAndFireNeuron,
    Sequential,
    SpikingNeuron,
)
from snn_lib.cells import cell as cells

N = 19  # channels, of which the last ones fill no vector
FILTERS = {
    "low pass": lambda: LowPassSynapse(N, 5.0),
    "stable": lambda: DualExponentialSynapse(N, 4.0, 1.0, constraint="stable"),
    "past inputs": lambda: IIRSynapse(N, (0.5, -0.25), (0.5, 0.25)),
}
NEURONS = {
    "spiking": lambda p: SpikingNeuron(N, 4.0, True, dropout=p, train_decay=True),
    "adaptive": lambda p: AdaptiveNeuron(N, 4.0, 20.0, 0.3, dropout=p, surrogate=FastSigmoid(0.3)),
    "resonate": lambda p: ResonateAndFireNeuron(N, 9.0, 0.1, dropout=p, train=["sine"]),
}


def pair_of(filter_name="past inputs", neuron_name="spiking", filter_first=False, dropout=0.0):
    pair = FILTERS[filter_name](), NEURONS[neuron_name](dropout)
    return Sequential(*pair) if filter_first else Sequential(*pair[::-1])


def inputs_of(model, steps=40, batch=3):
    """A sequence that makes neurons fire, and states as they are after another one."""
    x = 1.5 * torch.rand(steps, batch, N) + 0.2
    with torch.no_grad():
        _, states = model.eval()(0.5 * x[:5])
    model.train()
    return x.requires_grad_(), tuple(tuple(t.requires_grad_() for t in own) for own in states)


@contextmanager
def runs():
    """How many cells each call of ``run_cells`` runs."""
    counts, run = [], cells.run_cells

    def counting(calls, *arguments):
        counts.append(len(calls))
        return run(calls, *arguments)

    with mock.patch.object(cells, "run_cells", counting):
        yield counts


def one_by_one():
    return mock.patch.object(Cell, "_joins", return_value=False)


def outcome(model, x, states=None, lengths=None):
    """The output, the states, and the gradients of all that has some."""
    torch.manual_seed(3)
    output, after = model(x, states, lengths)
    results = [output, *parts(after)]
    loss = sum((r * torch.linspace(-1, 1, r.numel()).view(r.shape)).sum() for r in results)
    leaves = [x, *parts(states), *model.parameters()]
    return results + list(torch.autograd.grad(loss, leaves, allow_unused=True))


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@settings(max_examples=settings().max_examples // 2)  # each compiles kernels of its own
@given(
    filter_name=st.sampled_from([*FILTERS]),
    neuron_name=st.sampled_from([*NEURONS]),
    filter_first=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
    steps=st.sampled_from([1, 2, 5, 33, 70]),
    padded=st.booleans(),
    given_states=st.booleans(),
    low=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_joined_cells_give_the_bits_of_cells_run_one_by_one(
    filter_name, neuron_name, filter_first, dropout, steps, padded, given_states, low, seed
):
    torch.manual_seed(seed)
    model = pair_of(filter_name, neuron_name, filter_first, dropout)
    x, states = inputs_of(model, steps)
    states = states if given_states else None
    lengths = torch.tensor([steps, 0, (steps + 1) // 2]) if padded else None
    autocast = torch.autocast("cpu", torch.bfloat16) if low else nullcontext()
    with autocast, runs() as counts:
        found = outcome(model, x, states, lengths)
        with one_by_one():
            expected = outcome(model, x, states, lengths)
    assert counts == [2, 1, 1]
    assert_same_bits(found, expected)
    assert found[0].isfinite().all()


@pytest.mark.parametrize("rests", [0, 1])
def test_one_of_two_joined_cells_may_begin_at_rest(rests):
    model = pair_of()
    x, states = inputs_of(model)
    states = tuple(None if number == rests else own for number, own in enumerate(states))
    with runs() as counts:
        found = outcome(model, x, states)
    with one_by_one():
        assert_same_bits(found, outcome(model, x, states))
    assert counts == [2]


@pytest.mark.parametrize("filter_first", [False, True])
def test_a_chunk_that_runs_again_is_joined_as_it_was_before(filter_first):
    """Whatever is observed by then: the tensors that are kept must be the same."""
    model = pair_of(filter_first=filter_first, dropout=0.3)
    x, states = inputs_of(model)
    chunked = Chunked(model, 9)
    with one_by_one():
        expected = outcome(chunked, x, states)
    with runs() as counts:
        assert_same_bits(outcome(chunked, x, states), expected)
    assert counts == [2] * 10
    torch.manual_seed(3)
    output, _ = chunked(x, states)
    with model[0].register_forward_hook(lambda *_: None), runs() as counts:
        output.sum().backward()
    assert counts == [2] * 5


def test_joined_filters_are_pulled_back_to_the_stable_set():
    model = pair_of("stable", filter_first=True)
    x, _ = inputs_of(model)
    with torch.no_grad():
        model[0].alpha.add_(1.0)
    with runs() as counts:
        model(x)
    assert counts == [2]
    assert torch.equal(model[0].alpha, model[0].effective_alpha())
    assert model[0].pole_radius() < 1


# Who looks between them sees what there is


def see(seen):
    return lambda *arguments: seen.append(arguments) and None


def replace_forward(module, seen):
    def forward(*arguments):
        seen.append(arguments)
        return type(module).forward(module, *arguments)

    module.forward = forward
    stack = ExitStack()
    stack.callback(lambda: delattr(module, "forward"))
    return stack


OBSERVERS = {
    "hook": lambda module, seen: module.register_forward_hook(see(seen)),
    "pre-hook": lambda module, seen: module.register_forward_pre_hook(see(seen)),
    "backward hook": lambda module, seen: module.register_full_backward_hook(see(seen)),
    "backward pre-hook": lambda module, seen: module.register_full_backward_pre_hook(see(seen)),
    "global hook": lambda _, seen: nn.modules.module.register_module_forward_hook(see(seen)),
    "forward of its own": replace_forward,
}


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("place", [0, 1])
def test_cells_that_are_observed_run_one_by_one(name, place):
    model = pair_of(dropout=0.3)
    x, states = inputs_of(model)
    expected, seen = outcome(model, x, states), []
    with OBSERVERS[name](model[place], seen), runs() as counts:
        found = outcome(model, x, states)
    assert counts == [1, 1]
    assert seen
    assert_same_bits(found, expected)
    with runs() as counts:
        outcome(model, x, states)
    assert counts == [2]


class Own(SpikingNeuron):
    """A forward of its own, which a kernel would not call."""

    def forward(self, x, state=None, lengths=None):
        return super().forward(2 * x, state, lengths)


class Fires(Cell):
    """It resets, and hands on its potential."""

    states, coefficients = ("membrane",), ("decay",)

    @staticmethod
    def step(x, state, coefficients, fire):
        membrane = coefficients[0] * state[0] + x
        return membrane, (membrane - fire(membrane),)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (FILTERS["low pass"](), FILTERS["stable"]()),
        (NEURONS["spiking"](0.0), NEURONS["adaptive"](0.0)),
        (Own(N, 4.0), FILTERS["low pass"]()),
        (NEURONS["spiking"](0.0).double(), FILTERS["low pass"]()),
        (NEURONS["spiking"](0.0).bfloat16(), FILTERS["low pass"]().bfloat16()),
        (NEURONS["spiking"](0.0), Fires(N, decay=0.5, surrogate=FastSigmoid())),
        (NEURONS["spiking"](0.0), nn.Linear(N, N)),
        (NEURONS["spiking"](0.0), None),
    ],
    ids=lambda cell: type(cell).__name__,
)
def test_cells_that_one_kernel_cannot_run_do_not_join(first, second):
    assert not first.joins(second)


def test_cells_do_not_join_under_modes_transforms_and_the_compiler():
    first, second = pair_of()
    assert first.joins(second)
    assert first.joins(Fires(N, decay=0.5))  # with the same surrogate
    with torch.autocast("cpu", torch.float16):
        assert not first.joins(second)
    with torch.device("cpu"):  # a mode
        assert not first.joins(second)
    assert torch.func.vmap(lambda x: x + first.joins(second))(torch.zeros(2)).tolist() == [0, 0]
    assert not torch.compile(lambda: first.joins(second), backend="eager")()

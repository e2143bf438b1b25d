"""Whole networks: against a plain step by step implementation, in chunks, compiled, exported."""

import dataclasses
import math
import weakref
from collections import OrderedDict, defaultdict
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from definitions import fire
from hypothesis import given
from hypothesis import strategies as st
from small_networks import (
    TAU_M,
    dual_exponential,
    in_parts,
    low_pass,
    parts,
    ragged_network,
    spike_trains,
    two_layers,
)
from torch import nn
from torch.nn import functional as F

from snn_lib import IIRSynapse, LowPassSynapse, Recurrent, Repeat
from snn_lib.cells import SpikingNeuron
from snn_lib.chunks import Chunked
from snn_lib.containers import (
    ChannelsFirst,
    Output,
    PerStep,
    Sequential,
    StatefulModule,
    Votes,
    batch_first_part,
    detach,
    last_steps,
)
from snn_lib.readout import Mean

EXACT = {"rtol": 0.0, "atol": 0.0}


def step_by_step(x, layers, membrane_filter):
    """The paper's network, one time step after the other; a layer is alpha, beta, weight, bias."""
    theta = math.exp(-1 / TAU_M)
    psps = [[x.new_zeros(x.shape[1], alpha.shape[1])] * len(alpha) for alpha, *_ in layers]
    membranes = [x.new_zeros(x.shape[1], len(bias)) for *_, bias in layers]
    resets = list(membranes)
    output = []
    for spikes in x:
        for i, (alpha, beta, weight, bias) in enumerate(layers):
            psp = beta[0] * spikes + sum(a * past for a, past in zip(alpha, psps[i], strict=True))
            psps[i] = [psp, *psps[i][:-1]]
            current = F.linear(psp, weight, bias)
            membranes[i] = (theta * membranes[i] if membrane_filter else 0) + current - resets[i]
            spikes = fire(membranes[i])
            resets[i] = theta * resets[i] + spikes
        output.append(spikes)
    return torch.stack(output)


@pytest.mark.parametrize("membrane_filter", [False, True])
@pytest.mark.parametrize("synapse", [dual_exponential, low_pass])
def test_a_network_computes_and_learns_as_its_equations_step_by_step(synapse, membrane_filter):
    network = two_layers(synapse, membrane_filter)
    layers = [
        (network[i].alpha, network[i].beta, network[i + 1].weight, network[i + 1].bias)
        for i in (0, 3)
    ]
    x = spike_trains().requires_grad_()
    results = network(x)[0], step_by_step(x, layers, membrane_filter)
    assert 0.05 < results[1].mean() < 0.95
    torch.testing.assert_close(*results, **EXACT)

    labels = torch.arange(8) % 5
    gradients = [
        torch.autograd.grad(F.cross_entropy(spikes.sum(0), labels), [x, *network.parameters()])
        for spikes in results
    ]
    for gradient, reference in zip(*gradients, strict=True):
        assert reference.norm() > 0
        assert (gradient - reference).norm() <= 1e-5 * reference.norm()


# Chunks


@given(cuts=st.lists(st.integers(0, 10), max_size=3), seed=st.integers(0, 2**32 - 1))
def test_a_network_in_chunks_is_the_whole_run(cuts, seed):
    """Dyadic coefficients and weights make the products exact in whatever order BLAS sums them."""
    torch.manual_seed(seed)
    network = Sequential(
        IIRSynapse(6, (0.5, -0.25), (0.5,)),
        nn.Linear(6, 5),
        SpikingNeuron(5, TAU_M),
        Sequential(LowPassSynapse(5, 1 / math.log(2)), nn.Linear(5, 4), nn.ReLU(inplace=True)),
        IIRSynapse(4, (), (1.0, 0.5)),
        SpikingNeuron(4, TAU_M, membrane_filter=True),
    ).double()
    network[3][0].alpha.data.fill_(0.5)
    for linear in (network[1], network[3][1]):
        for parameter in linear.parameters():
            parameter.data = torch.randint(-16, 24, parameter.shape).double() / 16
    x = spike_trains(10, 2, 6).double()
    with torch.no_grad():
        whole, end = network(x)
        sizes = [stop - start for start, stop in pairwise([0, *sorted(cuts), 10])]
        chunks = in_parts(network, x, sizes)
    torch.testing.assert_close(chunks, (whole, end), **EXACT)
    assert end[1] is None
    assert len(end[3]) == 3


def test_a_state_is_no_view_of_what_later_modules_change_in_place():
    network = Sequential(IIRSynapse(3, (0.5,), (1.0, 0.5)), nn.ReLU(inplace=True))
    x = torch.randn(6, 2, 3)
    with torch.no_grad():
        whole, _ = network(x.clone())
        buffer = x[:3].clone()
        first, state = network(buffer)
        buffer.copy_(x[3:])  # a streaming user refills the same memory
        second, _ = network(buffer, state)
    torch.testing.assert_close(torch.cat([first, second]), whole, **EXACT)


@pytest.mark.parametrize("recurrent", [nn.RNN, nn.GRU, nn.LSTM])
def test_pytorch_s_recurrent_layers_are_stateful_modules_too(recurrent):
    network = Sequential(LowPassSynapse(3, TAU_M), recurrent(3, 4), nn.Linear(4, 2))
    x = torch.randn(7, 2, 3)
    whole, _ = network(x)
    expected = network[2](network[1](network[0](x)[0])[0])
    torch.testing.assert_close(whole, expected, **EXACT)
    torch.testing.assert_close(in_parts(network, x, [3, 4])[0], whole)


# The container itself


def test_an_error_inside_names_the_layer():
    network = Sequential(
        OrderedDict(weights=nn.Linear(3, 2), deeper=Sequential(nn.Identity(), low_pass(5)))
    )
    with pytest.raises(ValueError, match=r"^layer deeper: layer 1: x has shape \(4, 2, 2\), exp"):
        network(torch.rand(4, 2, 3))


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (0, 2), (4, 0)])
def test_a_network_runs_without_steps_sequences_or_with_one_of_each(steps, batch):
    network = two_layers()
    spikes, state = network(torch.zeros(steps, batch, 12))
    assert spikes.shape == (steps, batch, 5)
    assert state[2][0].shape == (batch, 10)
    spikes.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


def test_under_autocast_neurons_keep_their_precision():
    network, x = two_layers().eval(), spike_trains()
    with torch.autocast("cpu", torch.bfloat16):
        spikes, state = network(x)
    assert spikes.dtype == torch.float32
    assert state[2][0].dtype == torch.float32
    gradients = torch.autograd.grad(spikes.square().sum(), network.parameters())
    exact, _ = network(x)
    exact_gradients = torch.autograd.grad(exact.square().sum(), network.parameters())
    assert (spikes != exact).float().mean() < 0.05  # of those at the threshold
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.linalg.norm(gradient - expected) < 0.25 * torch.linalg.norm(expected)


# PerStep


@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Sequential(nn.Conv2d(2, 3, 3), nn.AvgPool2d(2))],
)
def test_per_step_equals_a_loop_over_time(module):
    x = torch.randn(5, 3, 2, 8, 8)
    expected = torch.stack([module(x_t) for x_t in x])
    torch.testing.assert_close(PerStep(module)(x), expected)


def test_per_step_calls_the_module_once():
    calls = []
    conv = nn.Conv2d(2, 4, 3)
    conv.register_forward_hook(lambda *_: calls.append(1))
    PerStep(conv)(torch.randn(5, 3, 2, 8, 8))
    assert len(calls) == 1


@pytest.mark.parametrize("channels", [1, 2])
def test_per_step_leaves_channels_last_in_memory(channels):
    strides = []
    conv = nn.Conv2d(channels, 4, 3)
    conv.register_forward_pre_hook(lambda _, args: strides.append(args[0].stride(1)))
    x = torch.randn(5, 3, 8, 8, channels).movedim(-1, 2)
    torch.testing.assert_close(PerStep(conv)(x), torch.stack([conv(x_t) for x_t in x]))
    assert strides[0] == 1
    torch.testing.assert_close(PerStep(conv)(x.contiguous()), PerStep(conv)(x))


def test_channels_come_first_and_stay_last_in_memory():
    x = torch.rand(3, 2, 5, 4, 6)
    maps = ChannelsFirst()(x)
    assert maps.shape == (3, 2, 6, 5, 4)
    for t, b, h, w, c in torch.cartesian_prod(*map(torch.arange, x.shape))[::37]:
        assert maps[t, b, c, h, w] == x[t, b, h, w, c]
    assert maps.data_ptr() == x.data_ptr()


def test_neurons_side_by_side_vote_for_a_class():
    spikes = (torch.rand(4, 2, 6) < 0.5).float()
    votes = Votes(3)(spikes)
    for number in range(3):
        assert torch.equal(
            votes[..., number], spikes[..., 2 * number] + spikes[..., 2 * number + 1]
        )


def test_neurons_that_cannot_be_shared_out_among_the_classes_are_refused():
    with pytest.raises(
        ValueError, match="layer 1: got 10 channels, expected a multiple of the 3 cl"
    ):
        Sequential(nn.Linear(6, 10), Votes(3))(torch.rand(4, 2, 6))


@pytest.mark.parametrize("layer", [Repeat(2), ChannelsFirst(), Votes(3)])
def test_a_sequence_without_its_batch_axis_and_an_array_are_refused(layer):
    with pytest.raises(ValueError, match=r"layer 0: x has shape \(20, 6\), exp"):
        Sequential(layer)(torch.rand(20, 6))
    for kind in (layer, PerStep(nn.Conv1d(2, 2, 1)), Sequential(nn.Linear(6, 2))):
        with pytest.raises(TypeError, match="x is a ndarray, expected a tensor"):
            kind(torch.rand(20, 1, 6).numpy())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
@pytest.mark.parametrize("exact", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [nn.Linear(5, 3), PerStep(nn.Conv1d(4, 2, 3))])
def test_weights_take_spikes_of_one_byte(layer, exact, dtype):
    model, spikes = Sequential(layer).to(exact), torch.rand(6, 2, 4, 5) < 0.5
    assert torch.equal(model(spikes.to(dtype))[0], model(spikes.to(exact))[0])
    once, exactly = (spikes[:1].to(kind).expand(6, 2, 4, 5) for kind in (dtype, exact))
    assert torch.equal(model(once)[0], model(exactly)[0])
    layer.forward = partial(type(layer).forward, layer)  # set on the module
    assert torch.equal(model(once)[0], model(exactly)[0])
    del layer.forward


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_an_average_of_whole_numbers_is_refused(dtype):
    model = Sequential(PerStep(nn.AvgPool2d(2)), nn.Flatten(2))
    with pytest.raises(ValueError, match=f"layer 0: x is {dtype}, .* give floats"):
        model(torch.ones(4, 1, 1, 2, 2, dtype=dtype))


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (0, 2), (4, 0)])
def test_per_step_runs_without_steps_or_sequences(steps, batch):
    output = PerStep(nn.Conv2d(2, 4, 3))(torch.randn(steps, batch, 2, 8, 8))
    assert output.shape == (steps, batch, 4, 6, 6)


# One operator to the compiler


def test_a_compiled_network_gives_the_same_numbers():
    torch.compiler.reset()
    network = two_layers()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x = spike_trains()
    results = []
    for function in (network, compiled):
        spikes, state = function(x)
        gradients = torch.autograd.grad(
            spikes.sum() + state[2][0].sum(), list(network.parameters())
        )
        results.append((spikes, state, gradients))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[1][0], results[0][0], **EXACT)


def test_a_compiled_network_draws_its_dropout():
    torch.compiler.reset()
    compiled = torch.compile(two_layers(dropout=0.5), backend="aot_eager", fullgraph=True)
    x = spike_trains()
    spikes = [compiled(x)[0] for _ in range(2)]
    assert (spikes[0] != spikes[1]).any()
    assert set(spikes[0].unique().tolist()) == {0.0, 2.0}


def test_an_exported_network_is_saved_and_takes_any_number_of_steps_and_samples(tmp_path):
    network = two_layers()
    dynamic = {0: torch.export.Dim("steps", min=2), 1: torch.export.Dim("batch", min=2)}
    program = torch.export.export(network, (spike_trains(),), dynamic_shapes=(dynamic,))
    nodes = [str(node.target) for node in program.graph.nodes]
    assert [name for name in nodes if name.startswith("snn.")] == ["snn.run.default"] * 4
    torch.export.save(program, tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    for x in (spike_trains(40, 3), spike_trains(3, 20)):
        found = loaded(x)
        assert isinstance(found, Output)
        torch.testing.assert_close(found, network(x))


# Lengths: the state at each sequence's own end


@pytest.mark.parametrize("with_state", [False, True])
def test_with_lengths_the_state_is_that_at_each_sequence_s_own_end(with_state):
    network = ragged_network()
    nn.init.normal_(network[1].weight, 0.5)
    x, lengths = 2 * torch.rand(9, 4, 6).double(), torch.tensor([9, 1, 4, 0 if with_state else 2])
    before = network(torch.rand(3, 4, 6).double())[1] if with_state else None
    output, state = network(x, before, lengths)
    torch.testing.assert_close(output, network(x, before)[0], **EXACT)
    assert output.mean() > 0
    for b, length in enumerate(lengths.tolist()):
        alone = None if before is None else _sample(before, b)
        _, expected = network(x[:length, b : b + 1], alone)
        for found, one in zip(parts(_sample(state, b)), parts(expected), strict=True):
            torch.testing.assert_close(found, one, rtol=1e-12, atol=1e-12)


def _sample(state, b):
    """One sample of a state; the batch is the first dimension of a neuron's, a filter's second."""
    if state is None:
        return None
    if isinstance(state, torch.Tensor):
        return state[b : b + 1] if state.dim() == 2 else state[:, b : b + 1]
    return tuple(_sample(part, b) for part in state)


# What one expects of nn.Sequential


def test_a_network_is_sliced_named_and_appended_to_as_in_pytorch():
    layers = [low_pass(3), nn.Linear(3, 4), SpikingNeuron(4, 4.0)]
    network = Sequential(*layers)
    assert list(network) == layers
    assert list(network[1:]) == layers[1:]
    assert network[-1] is layers[2]
    assert list(network[1:].state_dict()) == [
        key for key in network.state_dict() if not key.startswith("0.")
    ]
    assert list(Sequential().append(layers[0]).extend(layers[1:])) == layers
    named = Sequential(OrderedDict(psp=layers[0], weights=layers[1]))
    assert named.weights is layers[1]
    assert [name for name, _ in named.named_children()] == ["psp", "weights"]
    x = torch.rand(5, 2, 3)
    torch.testing.assert_close(named(x)[0], network[:2](x)[0], **EXACT)


def test_items_are_replaced_as_in_pytorch():
    a, b, c, d, e = (nn.Linear(1, 1) for _ in range(5))
    for kind in (Sequential, nn.Sequential):
        network = kind(a, b, c, d)
        network[1] = e
        network[-1] = b
        assert list(network) == [a, e, c, b]
        for wrong in (4, -5):
            with pytest.raises(IndexError):
                network[wrong] = a


def test_an_item_that_is_no_module_is_refused_and_changes_nothing():
    network = Sequential(OrderedDict(psp=low_pass(3), weights=nn.Linear(3, 2)))
    before = list(network.named_children())
    for change in (lambda: network.append("x"), lambda: network.__setitem__(0, "x")):
        with pytest.raises(TypeError, match="not a Module"):
            change()
        assert list(network.named_children()) == before


def test_a_module_may_be_appended_to_a_slice():
    a, b, c, d, e = (nn.Identity() for _ in range(5))
    assert list(Sequential(a, b, c, d)[2:].append(e)) == [c, d, e]


class Holder(nn.Module):
    """A module that holds another."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x, state=None):
        return self.part(x, state)


class Residual(nn.Module):
    """A plain module that drops the state of the layers that it holds."""

    def __init__(self):
        super().__init__()
        self.body = Sequential(nn.Linear(4, 4), SpikingNeuron(4, TAU_M))

    def forward(self, x):
        return x + self.body(x)[0]


def in_chunks(module, container=None):
    """Runs a network that is given a state, or runs in a container's chunks."""
    network, x = Sequential(module, nn.Linear(4, 3)), torch.rand(6, 2, 4)
    return network(x, (None, None)) if container is None else container(network, 3)(x)


def test_a_plain_module_with_neurons_runs_over_a_whole_sequence():
    network, x = Sequential(Residual(), nn.Linear(4, 3)), torch.rand(6, 2, 4)
    _, state = network(x)
    assert state == (None, None)


class Block(Residual):
    """One whose parts need no state."""

    def __init__(self):
        super().__init__()
        self.body = Sequential(nn.Linear(4, 4), nn.ReLU())


def test_what_needs_no_state_runs_in_chunks():
    tokens = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    for part, x in ((PerStep(tokens), torch.rand(6, 2, 5, 4)), (Block(), torch.rand(6, 2, 4))):
        network = Sequential(part)
        torch.testing.assert_close(Chunked(network, 3)(x)[0], network(x)[0])


def run(state=None, lengths=None):
    return two_layers()(spike_trains(), state, lengths)


REFUSED = [  # what is built or run, and the words
    *((lambda n=n: run((None,) * n), f"{n} entries.* 6 modules") for n in (0, 2, 7)),
    *((lambda lengths=lengths: run(lengths=lengths), "layer 0: lengths (have shape|are a list)")
      for lengths in (torch.tensor([2]), torch.tensor(2), torch.ones(8), torch.ones(8).bool(),
                      [2] * 8)),
    (lambda: Sequential(nn.GRU(3, 4))(torch.rand(3, 2, 3), lengths=torch.tensor([2, 3])),
     r"nn\.GRU takes no lengths"),
    (lambda: Votes(0), "classes is 0, expected a whole number"),
    (lambda: in_chunks(Residual()), "layer 0: the SpikingNeuron in this Residual begins anew"),
    (lambda: in_chunks(Residual(), Chunked), "layer 0: the SpikingNeuron in this Residual beg"),
    (lambda: in_chunks(nn.TransformerEncoderLayer(4, 2, 8)),
     "layer 0: the MultiheadAttention in this TransformerEncoderLayer begins anew"),
    *((lambda layer=layer: Sequential(layer), "put it into a PerStep")
      for layer in (nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3),
                    nn.Dropout1d(), nn.Dropout3d(),
                    nn.Conv1d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv3d(3, 3, 1),
                    nn.ConvTranspose1d(3, 3, 1), nn.ConvTranspose2d(3, 3, 1),
                    nn.ConvTranspose3d(3, 3, 1),
                    nn.Sequential(nn.ReLU(), nn.Sequential(nn.BatchNorm1d(3))),
                    *(nn.Sequential(part, nn.BatchNorm1d(3))
                      for part in (nn.GELU(), nn.LayerNorm(3), nn.RMSNorm(3), nn.Softmax(-1))))),
    (lambda: Sequential(nn.ReLU())(torch.zeros(2, 3, 4), torch.ones(3)), "state is a tensor, ex"),
    (lambda: Sequential(nn.ReLU())(torch.zeros(2, 3, 4), (torch.ones(3),)), "layer 0: ReLU has no"),
    *((lambda part=part: Sequential(torch.compile(part)), f"returned this {type(part).__name__}: c")
      for part in (nn.GRU(3, 4), low_pass(3), Sequential(nn.Linear(2, 3)), Mean())),
    *((lambda module=module: PerStep(module), "knows the time axis, which PerStep hides")
      for module in (
        SpikingNeuron((4, 6, 6), TAU_M),
        nn.Sequential(nn.Conv2d(2, 4, 3), SpikingNeuron((4, 1, 1), TAU_M)),
        Sequential(nn.Linear(2, 4)),
        nn.GRU(2, 3))),
]  # fmt: skip


def test_other_things_than_modules_and_tensors_are_refused_by_their_names():
    for build in (PerStep, partial(Recurrent, neuron=SpikingNeuron(3, TAU_M))):
        with pytest.raises(TypeError, match=r"is a function, expected a torch\.nn\.Module"):
            build(lambda x: x)
    packed = nn.utils.rnn.pack_sequence([torch.zeros(4, 3)])
    with pytest.raises(TypeError, match=r"x is a PackedSequence, expected a tensor$"):
        low_pass(3)(packed)


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_pair_in_the_place_of_a_sequence_is_refused(batch_first):
    with pytest.raises(TypeError, match="x is a tuple, expected a tensor"):
        Sequential(nn.ReLU(), batch_first=batch_first)((torch.zeros(2, 3, 4), None))


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_bad_states_lengths_and_parts_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


HIDE_BATCH_FIRST = {
    "a slice": lambda network: network[:2],
    "a recurrent layer": lambda network: nn.GRU(12, 5, batch_first=True),
    "in a module": lambda network: Holder(nn.Sequential(nn.Identity(), network)),
    "in chunks": lambda network: Chunked(network, 5),
}


@pytest.mark.parametrize("hide", HIDE_BATCH_FIRST.values(), ids=HIDE_BATCH_FIRST)
@pytest.mark.parametrize("batch_first", [True, False])
def test_batch_first_inside_is_refused_wherever_modules_are_combined(hide, batch_first):
    hidden = hide(Sequential(*two_layers(), batch_first=True))
    linear = nn.Linear(12, 12)
    network = Sequential(linear, batch_first=batch_first)
    for combine in (
        lambda: Sequential(hidden, linear, batch_first=batch_first),
        lambda: Sequential(OrderedDict(first=hidden)),
        lambda: network.append(hidden),
        lambda: network.__setitem__(0, hidden),
        lambda: network.add_module("0", hidden),
    ):
        with pytest.raises(ValueError, match="has batch_first, but Sequential hands"):
            combine()
        assert list(network) == [linear]


class Forgetful(StatefulModule):
    def forward(self, x, state=None, lengths=None):
        return x


class Pair(nn.Module):
    def forward(self, x):
        return x, None


@pytest.mark.parametrize(
    ("modules", "batch_first", "words"),
    [
        ([Forgetful()], False, r"layer 0: Forgetful returned a Tensor, expected \(output, state\)"),
        ([Pair(), nn.Identity()], False, "layer 1 is given a tuple, .* snn_lib.StatefulModule"),
        ([Pair()], True, "layer 0 returned a tuple, expected a tensor"),
        ([Pair(), nn.Identity()], True, "layer 0 returned a tuple, expected a tensor"),
    ],
)
def test_modules_that_return_something_else_are_refused_by_name(modules, batch_first, words):
    with pytest.raises(ValueError, match=words):  # of as many steps as a pair has parts
        Sequential(*modules, batch_first=batch_first)(torch.zeros(2, 3, 4))


def test_the_last_module_may_return_anything():
    assert Sequential(Pair())(torch.zeros(2, 3, 4))[0][1] is None


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        (LowPassSynapse(3, TAU_M), TypeError, "chain layers with snn_lib.Sequential"),
        (SpikingNeuron(3, TAU_M), TypeError, "chain layers with snn_lib.Sequential"),
        (Repeat(2), TypeError, "chain layers with snn_lib.Sequential"),
        (PerStep(nn.Identity()), TypeError, "chain layers with snn_lib.Sequential"),
        *(
            (plain, TypeError, r"snn_lib\.Sequential instead of nn\.Sequential")
            for plain in (nn.Linear(3, 4), nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Dropout())
        ),
    ],
)
def test_pytorch_s_sequential_is_refused_with_the_name_of_ours(layer, error, words):
    with pytest.raises(error, match=words):
        nn.Sequential(SpikingNeuron(3, TAU_M), layer)(torch.zeros(4, 2, 3))


def test_a_block_that_moves_the_axes_itself_is_taken():
    class Moved(nn.Module):
        def __init__(self, *order):
            super().__init__()
            self.order = order

        def forward(self, x):
            return x.permute(self.order)

    block = nn.Sequential(Moved(1, 2, 0), nn.Conv1d(4, 4, 3), Moved(2, 0, 1))
    x = torch.rand(9, 2, 4)
    assert torch.equal(Sequential(block)(x)[0], block(x))


def test_a_convolution_with_a_forward_of_its_own_may_take_time_first():
    class Causal(nn.Conv1d):
        def forward(self, x):
            padded = nn.functional.pad(x.permute(1, 2, 0), (self.kernel_size[0] - 1, 0))
            return super().forward(padded).permute(2, 0, 1)

    x = torch.rand(9, 2, 4)
    model = Sequential(Causal(4, 4, 3))
    assert torch.equal(model(x)[0], model[0](x))


@pytest.mark.parametrize("number", [np.int64(4), torch.tensor(4)])
def test_sizes_may_be_whole_numbers_of_numpy_and_pytorch(number):
    for layer in (LowPassSynapse(number, TAU_M), SpikingNeuron((number, number), TAU_M)):
        assert set(layer.shape) == {4}
        assert all(type(size) is int for size in layer.shape)
    assert type(Repeat(number).copies) is type(Chunked(LowPassSynapse(3, 2.0), number).steps) is int


def test_a_length_beyond_the_steps_counts_as_all_of_them():
    network, x = two_layers(), spike_trains()
    beyond = torch.full((x.shape[1],), len(x) + 5, dtype=torch.uint8)
    found, expected = network(x, lengths=beyond)[1], network(x, lengths=beyond.long() - 5)[1]
    torch.testing.assert_close(parts(found), parts(expected), **EXACT)


def test_a_module_that_says_batch_first_says_it_for_its_parts():
    holder = Holder(nn.GRU(3, 4, batch_first=True))
    assert batch_first_part(holder) == "part"
    assert batch_first_part(nn.Sequential(nn.Identity(), holder)) == "1.part"
    assert batch_first_part(holder.part) == ""
    holder.batch_first = False
    assert batch_first_part(nn.Sequential(nn.Identity(), holder)) is None
    attention = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)  # of positions, not of time
    assert batch_first_part(Sequential(PerStep(attention))) is None


@pytest.mark.parametrize("layers", [6, 4])  # of which the last two run as one, or do not
def test_batch_first_transposes_input_and_output(layers):
    network = two_layers()[:layers]
    other = Sequential(*network, batch_first=True)
    x = spike_trains()
    output, state = network(x)
    found, other_state = other(x.transpose(0, 1))
    torch.testing.assert_close(found, output.transpose(0, 1), **EXACT)
    torch.testing.assert_close(parts(other_state), parts(state), **EXACT)
    torch.testing.assert_close(
        other.layerwise(x.transpose(0, 1))[0][1],
        network.layerwise(x)[0][1].transpose(0, 1),
        **EXACT,
    )
    assert other[:2].batch_first


def test_layerwise_returns_every_module_s_output_with_its_gradient():
    network, x = two_layers(), spike_trains()
    outputs, state = network.layerwise(x)
    assert len(outputs) == len(network)
    torch.testing.assert_close(outputs[-1], network(x)[0], **EXACT)
    torch.testing.assert_close(parts(state), parts(network(x)[1]), **EXACT)
    outputs[2].mean().backward(retain_graph=True)  # a penalty on hidden spikes
    assert network[1].weight.grad.abs().sum() > 0
    assert network[4].weight.grad is None
    spikes, membrane, reset = network[2].traces(outputs[1])
    torch.testing.assert_close(spikes, outputs[2], **EXACT)
    torch.testing.assert_close(membrane, outputs[1] - reset)
    membrane.square().mean().backward()


def test_layerwise_hands_out_no_spikes_that_a_layer_has_changed_in_place():
    x = spike_trains()
    layers = LowPassSynapse(x.shape[2], 4.0), SpikingNeuron(x.shape[2], 4.0), nn.Dropout(0.5, True)
    network = Sequential(*layers)
    expected = Sequential(*layers[:2])(x)[0]
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            outputs, _ = network.layerwise(x)
        assert torch.equal(outputs[1], expected)
        assert not torch.equal(outputs[2], expected)


def test_layerwise_hands_out_no_output_that_shares_what_a_later_layer_changes_in_place():
    x, layer = torch.randn(9, 4, 3, 2, 2), LowPassSynapse((3, 2, 2), 3.0)
    expected, _ = layer(x)
    rectify = nn.ReLU(inplace=True)
    for between in ([], [nn.Identity()], [nn.Flatten(2)], [nn.Dropout().eval(), ChannelsFirst()]):
        for last in (rectify, PerStep(rectify)):
            outputs, _ = Sequential(layer, *between, last).layerwise(x)
            assert torch.equal(outputs[0], expected)
            assert outputs[-1].min() == 0


def test_layerwise_begins_with_a_state_and_ends_at_the_lengths_as_a_run_does():
    network, x = ragged_network(), 2 * torch.rand(9, 3, 6).double()
    nn.init.normal_(network[1].weight, 0.5)
    _, state = network(x[:4])
    expected, end = network(x[4:], state, torch.tensor([5, 0, 3]))
    outputs, found = network.layerwise(x[4:], state, torch.tensor([5, 0, 3]))
    torch.testing.assert_close(outputs[-1], expected, **EXACT)
    torch.testing.assert_close(parts(found), parts(end), **EXACT)


@dataclasses.dataclass(frozen=True)
class Memory:
    """A state of another form."""

    trace: torch.Tensor
    count: int = 3


def test_states_of_every_form_are_detached():
    tensor = torch.ones(2, requires_grad=True) * 2
    state = [
        {"a": tensor, "deep": (tensor, None)},
        OrderedDict(b=[tensor]),
        defaultdict(list, c=Memory(tensor)),
        Output(tensor, 0.5),
    ]
    cut = detach(state)
    assert [type(part) for part in cut] == [type(part) for part in state]
    assert isinstance(cut[2]["c"], Memory)
    assert cut[2]["c"].count == 3
    found = cut[0]["a"], cut[0]["deep"][0], cut[1]["b"][0], cut[2]["c"].trace, cut[3].output
    assert all(torch.equal(part, tensor) and not part.requires_grad for part in found)
    assert state[0]["a"] is tensor
    assert state[2]["c"].trace is tensor
    assert detach(None) is None
    with pytest.raises(TypeError, match="found object, expected a tensor"):
        detach((tensor, object()))


def test_the_last_steps_that_a_state_keeps_are_a_copy():
    sequence = torch.rand(100, 2, 3)
    for lengths in (None, torch.tensor([97, 97])):
        last = last_steps(sequence, 3, lengths)
        assert torch.equal(last, sequence[97:])
        assert last.untyped_storage().nbytes() == last.nbytes
        assert last.data_ptr() != sequence[97:].data_ptr()


def test_an_output_is_saved_and_loaded(tmp_path):
    network, x = two_layers(), spike_trains()
    torch.save(network(x), tmp_path / "output")
    loaded = torch.load(tmp_path / "output", weights_only=True)
    assert isinstance(loaded, Output)
    torch.testing.assert_close(loaded, network(x), **EXACT)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize(("shape", "features"), [((5,), (5,)), ((5, 1, 1), (5, 3, 3))])
def test_a_network_is_compiled_once_for_any_numbers_of_steps_and_sequences(shape, features):
    torch.compiler.reset()
    linear = nn.Linear(math.prod(features), 4)
    network = Sequential(LowPassSynapse(shape, 3.0), nn.Flatten(2), linear, SpikingNeuron(4, 2.0))
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    for stance, steps, batch in (("default", 9, 4), ("fail_on_recompile", 6, 3)):
        x = torch.rand(steps, batch, *features)
        with torch.compiler.set_stance(stance):
            torch.testing.assert_close(compiled(x)[0], network(x)[0])


def test_jit_trace_is_refused_in_favour_of_export():
    with pytest.raises(RuntimeError, match=r"use torch\.export\.export"):
        torch.jit.trace(two_layers(), (spike_trains(),))


def test_a_stateful_layer_of_one_s_own_runs_in_chunks():
    """The example of the docstring."""

    class PairMean(StatefulModule):
        def forward(self, x, state=None, lengths=None):
            (before,) = state or (x.new_zeros(1, *x.shape[1:]),)
            steps = torch.cat([before, x])
            return Output((steps[1:] + steps[:-1]) / 2, (last_steps(steps, 1, lengths),))

    network, x = Sequential(PairMean(), nn.Identity(), PairMean()), torch.rand(6, 3, 2)
    whole, _ = network(x)
    first, state = network(x[:4], lengths=torch.tensor([4, 4, 4]))
    torch.testing.assert_close(torch.cat([first, network(x[4:], state)[0]]), whole, **EXACT)
    torch.testing.assert_close(whole[2], (x[2] + 2 * x[1] + x[0]) / 4)


def test_without_gradients_no_output_outlives_the_next_module():
    alive = []

    class Watch(nn.Module):
        def forward(self, x):
            assert sum(reference() is not None for reference in alive) <= 1  # its own input
            output = x + 1
            alive.append(weakref.ref(output))
            return output

    with torch.no_grad():
        output, _ = Sequential(Watch(), Watch(), Watch(), Watch())(torch.zeros(2, 1, 3))
    assert torch.equal(output, torch.full((2, 1, 3), 4.0))
    assert len(alive) == 4


def watched_steps(model):
    """How many steps each layer of weights is given, as a list that grows with every call."""
    seen = []
    for module in model:
        if isinstance(module, (nn.Linear, PerStep)):
            module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("features", [(8,), (2, 4, 4)])
def test_an_input_that_repeats_is_weighed_once(features, batch_first):
    torch.manual_seed(0)
    if len(features) == 1:
        first, second = nn.Linear(8, 6), nn.Linear(6, 3)
    else:
        first = PerStep(nn.Conv2d(2, 6, 3))
        second = PerStep(nn.Conv2d(6, 3, 2))
    shape = (6,) + (1,) * len(features[1:])
    layers = (first, LowPassSynapse(shape, 4.0), SpikingNeuron(shape, 4.0), second)
    model = Sequential(*layers, batch_first=batch_first).double()
    image = 4 * torch.rand(1, 5, *features, dtype=torch.float64)
    expanded, copied = image.expand(7, 5, *features), image.repeat(7, *[1] * image[0].dim())
    if batch_first:
        expanded, copied = expanded.transpose(0, 1), copied.transpose(0, 1)
    seen, found = watched_steps(model), []
    for x in (copied, expanded):
        model.zero_grad()
        output, state = model(x)
        output.square().sum().backward()
        found.append([output, *state[1], *state[2], *(p.grad for p in model.parameters())])
    assert seen == [7, 7, 1, 7]
    for copy, once in zip(*found, strict=True):
        torch.testing.assert_close(once, copy)


class Fading(PerStep):
    def forward(self, x):
        return fade(super().forward(x))


def fade(x):
    return x * 0.5 ** torch.arange(len(x)).view(-1, *[1] * (x.dim() - 1))


def test_a_forward_of_one_s_own_runs_on_every_step_of_an_input_that_repeats():
    linear = nn.Linear(8, 6)
    plain = linear.forward
    linear.forward = lambda x: fade(plain(x))
    for layer in (linear, Fading(nn.Linear(8, 6))):
        x = torch.rand(1, 5, 8).expand(7, 5, 8)
        torch.testing.assert_close(Sequential(layer)(x)[0], layer(x))


class Adds(nn.Module):
    """Writes to its input, and asks how it lies in memory."""

    def forward(self, x):
        x += 1
        return x.view(-1, *x.shape[2:]).view(x.shape)


class OwnState(StatefulModule):
    """A stateful layer of one's own around a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, state=None, lengths=None):
        return Output(self.module(x), state)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "behind",
    [
        (),
        (nn.ReLU(inplace=True),),
        (PerStep(nn.ReLU(inplace=True)),),
        (nn.Flatten(2), Adds()),
        (Sequential(nn.ReLU(inplace=True)),),
        (OwnState(Adds()),),
        (OwnState(nn.Identity()), nn.ReLU(inplace=True)),
        (Sequential(nn.Flatten(2)),),
    ],
    ids=str,
)
def test_the_output_of_an_input_that_repeats_may_be_changed_in_place(behind, batch):
    layers = (nn.Linear(8, 6), *behind)
    x = torch.randn(1, batch, 8).expand(5, batch, 8)
    expected, _ = Sequential(*layers)(x.clone())
    expected += 1
    output, _ = Sequential(*layers)(x)
    output += 1
    torch.testing.assert_close(output, expected)


def test_each_step_of_an_input_that_repeats_has_a_gradient_of_its_own():
    model = Sequential(nn.Linear(8, 6), LowPassSynapse(6, 4.0)).double()
    seen = watched_steps(model)
    gradients = []
    for x in (torch.ones(1, 5, 8).double().expand(7, 5, 8), torch.ones(7, 5, 8).double()):
        x = x.detach().requires_grad_()
        gradients += torch.autograd.grad(model(x)[0][-1].sum(), x)
    assert seen == [7, 7]
    torch.testing.assert_close(*gradients)
    assert not torch.allclose(gradients[0][0], gradients[0][1])


def test_programs_exported_or_compiled_with_an_input_that_repeats_serve_any_input():
    model = Sequential(nn.Linear(8, 6), SpikingNeuron(6, 4.0))
    repeats, other = torch.ones(1, 5, 8).expand(7, 5, 8), 4 * torch.rand(7, 5, 8)
    exported = torch.export.export(model, (repeats,)).module()
    compiled = torch.compile(model, backend="eager")
    for program in (exported, compiled):
        assert torch.equal(program(repeats)[0], model(repeats)[0])
        assert torch.equal(program(other)[0], model(other)[0])

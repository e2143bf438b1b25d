"""Filter and neuron as functions: their equations, gradients and states, and what PyTorch sees."""

import math
import re
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from definitions import (
    Triangle,
    filter_by_hand,
    filter_inputs,
    gradients,
    neuron_by_hand,
    neuron_inputs,
    run_filter,
    run_neuron,
    traces_by_hand,
    with_channels_last,
)
from hypothesis import given
from hypothesis import strategies as st
from small_networks import Operators
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from snn_lib import FastSigmoid, Gaussian, SpikingNeuron, use_backend
from snn_lib.functional import Call, iir_filter, neuron_traces, run_cells, spiking_neuron
from snn_lib.kernels import operator as kernels_operator

FLOAT64 = torch.float64
LOW_PRECISION = [torch.float16, torch.bfloat16]
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


own_neuron = partial(run_neuron, surrogate=Triangle())
own_by_hand = partial(neuron_by_hand, derivative=Triangle().derivative)
FUNCTIONS = {
    "filter": (run_filter, filter_by_hand, filter_inputs),
    "neuron": (run_neuron, neuron_by_hand, neuron_inputs),
    "own surrogate": (own_neuron, own_by_hand, neuron_inputs),
}
each = pytest.mark.parametrize(
    ("function", "definition", "make"), FUNCTIONS.values(), ids=FUNCTIONS
)
both = pytest.mark.parametrize(
    ("function", "make"), [(run_filter, filter_inputs), (run_neuron, neuron_inputs)]
)
sizes = {
    "steps": st.integers(0, 8),
    "batch": st.integers(0, 3),
    "features": st.tuples(st.integers(0, 4)),
}
orders = st.sampled_from([(0, 0), (1, 0), (2, 0), (1, 2), (3, 1)])
seeds = st.integers(0, 2**32 - 1)


# Equations and gradients


def check(function, definition, inputs):
    """A function against its definition: values by NumPy, gradients by autograd."""
    found = function(*inputs)
    for one, expected in zip(found, definition(*(t.numpy() for t in inputs)), strict=True):
        torch.testing.assert_close(one, torch.as_tensor(expected), **CLOSE)
    torch.testing.assert_close(gradients(function, inputs), gradients(definition, inputs), **CLOSE)


@given(orders=orders, seed=seeds, **sizes)
def test_the_filter_follows_its_equation(orders, seed, steps, batch, features):
    torch.manual_seed(seed)
    check(run_filter, filter_by_hand, filter_inputs(*orders, steps, batch, features))


@pytest.mark.parametrize("surrogate", [Gaussian(), Gaussian(1.0), FastSigmoid(), Triangle()])
@given(seed=seeds, **sizes)
def test_the_neuron_follows_its_equation(surrogate, seed, steps, batch, features):
    torch.manual_seed(seed)
    definition = partial(neuron_by_hand, derivative=surrogate.derivative)
    inputs = neuron_inputs(steps, batch, features)
    check(partial(run_neuron, surrogate=surrogate), definition, inputs)


@each
def test_a_gradient_asked_for_alone_is_the_same(function, definition, make):
    inputs = make()
    expected = gradients(function, inputs)
    for index in range(len(inputs)):
        (alone,) = gradients(function, inputs, [index])
        torch.testing.assert_close(alone, expected[index], **EXACT)


@pytest.mark.parametrize("surrogate", [Gaussian(), Triangle()])
def test_traces_are_those_of_each_step_and_have_gradients(surrogate):
    inputs = neuron_inputs(features=(2, 2))
    by_hand = partial(traces_by_hand, derivative=surrogate.derivative)

    def traces(*tensors):
        *inputs, membrane, reset = tensors
        return neuron_traces(*inputs, (membrane, reset), surrogate)

    torch.testing.assert_close(traces(*inputs), by_hand(*inputs), **CLOSE)
    torch.testing.assert_close(gradients(traces, inputs), gradients(by_hand, inputs), **CLOSE)


# States, chunks and lengths


@both
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64, *LOW_PRECISION])
@given(cuts=st.lists(st.integers(0, 9), max_size=4), seed=seeds)
def test_chunks_are_the_whole_run(function, make, dtype, cuts, seed):
    torch.manual_seed(seed)
    x, *coefficients, past, more = (tensor.to(dtype) for tensor in make(steps=9))
    whole, *end = function(x, *coefficients, past, more)
    chunks, state = [], (past, more)
    for start, stop in pairwise([0, *sorted(cuts), 9]):
        chunk, *state = function(x[start:stop], *coefficients, *state)
        chunks.append(chunk)
    assert torch.equal(torch.cat(chunks), whole)
    assert {part.dtype for part in end} == {torch.promote_types(dtype, torch.float32)}
    torch.testing.assert_close([part.to(end[0]) for part in state], end, **EXACT)


@each
def test_states_are_copies_that_may_be_changed(function, definition, make):
    """A user may reset them, and refill the input, before the backward pass or the next chunk."""
    inputs = [make()[0], *(tensor.requires_grad_() for tensor in make()[1:-2]), *make()[-2:]]
    expected = torch.autograd.grad(function(*inputs)[0].sum(), inputs[1:-2])
    output, *state = function(*inputs)
    kept = [part.detach().clone() for part in state]
    with torch.no_grad():
        output.detach().zero_()
        torch.testing.assert_close([part.detach() for part in state], kept, **EXACT)
        for part in state:
            part.zero_()
    torch.testing.assert_close(torch.autograd.grad(output.sum(), inputs[1:-2]), expected, **EXACT)


def with_lengths(function, lengths):
    """The function with the states at the lengths."""

    def run(x, *others):
        if function is run_filter:
            alpha, beta, *given = others
            coefficients = {"alpha": alpha, "beta": beta}
            rows = {"past_output": len(alpha), "past_input": len(beta) - 1}
            call = Call("IIRSynapse", coefficients, rows, tuple(given), Gaussian())
        else:
            *values, membrane, reset = others
            names = "reset_decay", "reset_strength", "membrane_decay"
            coefficients = dict(zip(names, values, strict=True))
            rows = {"membrane": None, "reset": None}
            call = Call("SpikingNeuron", coefficients, rows, (membrane, reset), Gaussian())
        output, (state,) = run_cells([call], x, lengths)
        return output, *state

    return run


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("steps", [0, 2, 40])
@pytest.mark.parametrize(("function", "definition", "make"), [*FUNCTIONS.values()][:2])
def test_the_state_is_that_at_each_sequence_s_own_end(function, definition, make, steps, backend):
    """And a gradient that arrives at it goes to the steps before that end alone."""
    inputs, lengths = make(steps=steps, batch=6), torch.tensor([0, 1, 2, 32, 33, 99])
    batch = 1 if function is run_filter else 0  # the dimension of a state

    def by_hand(x, *others):
        *coefficients, past, more = others
        output, *_ = definition(x, *others)
        ends = [
            definition(
                x[: int(length), b : b + 1],
                *coefficients,
                *(part.narrow(batch, b, 1) for part in (past, more)),
            )[1:]
            for b, length in enumerate(lengths)
        ]
        return output, *(torch.cat(parts, batch) for parts in zip(*ends, strict=True))

    with use_backend(backend):
        run = with_lengths(function, lengths.to(torch.uint8))
        torch.testing.assert_close(run(*inputs), by_hand(*inputs), **CLOSE)
        torch.testing.assert_close(gradients(run, inputs), gradients(by_hand, inputs), **CLOSE)


# Dtypes


@both
@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.int32, torch.uint8, torch.bool, FLOAT64])
def test_inputs_are_converted_to_the_dtype_of_the_coefficients(function, make, dtype):
    x, *others = make(dtype=torch.float32)
    x = x.abs().to(dtype)
    torch.testing.assert_close(function(x, *others), function(x.float(), *others), **EXACT)
    if dtype.is_floating_point:
        (gradient,) = gradients(function, (x, *others), [0])
        (expected,) = gradients(function, (x.float(), *others), [0])
        torch.testing.assert_close(gradient, expected.to(dtype), **EXACT)


@both
@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.float32, FLOAT64, FLOAT64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_coefficients_are_promoted_and_computed_in_at_least_float32(
    function, make, one, other, together
):
    x, first, *others, past, more = make(dtype=torch.float32)
    mixed = [x.to(one), first.to(one), *(tensor.to(other) for tensor in others)]
    own = FLOAT64 if together == FLOAT64 else torch.float32
    exact = [tensor.to(own) for tensor in (*mixed, past, more)]
    output, *state = function(*mixed, past, more)
    expected, *end = function(*exact)
    torch.testing.assert_close((output, *state), (expected.to(together), *end), **EXACT)
    found = gradients(function, [*mixed, past, more])
    assert [gradient.dtype for gradient in found[1:-2]] == [one, *[other] * len(others)]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_the_filter_rounds_its_output_and_not_its_state(dtype):
    inputs = filter_inputs(dtype=torch.float32)
    exact, *end = run_filter(*inputs)
    output, *state = run_filter(*inputs, dtype=dtype)
    torch.testing.assert_close((output, *state), (exact.to(dtype), *end), **EXACT)
    # alpha's gradient is computed from the outputs before they are rounded
    weights = torch.randn(output.shape).to(dtype)
    alpha = inputs[1].requires_grad_()
    found, expected = (
        torch.autograd.grad(run_filter(*inputs, dtype=d)[0], alpha, weights.to(d))[0]
        for d in (dtype, torch.float32)
    )
    torch.testing.assert_close(found, expected, **EXACT)


# How sequences lie in memory


@each
@pytest.mark.parametrize("shared", [(4, 5), (1, 1), (1, 5), (4, 1)])
@pytest.mark.parametrize("last", [False, True])
def test_positions_of_maps_are_channels_that_may_share_coefficients(
    function, definition, make, shared, last
):
    inputs = list(make(features=(3, 4, 5)))
    rows = slice(1, -2)
    inputs[rows] = [tensor[..., : shared[0], : shared[1]].clone() for tensor in inputs[rows]]

    def flat(x, *others):
        *coefficients, past, more = others
        spread = (c.expand(*c.shape[:-2], 4, 5) for c in coefficients)
        results = function(*(tensor.flatten(-3) for tensor in (x, *spread, past, more)))
        return tuple(result.unflatten(-1, (3, 4, 5)) for result in results)

    def maps(x, *others):
        return function(with_channels_last(x) if last else x, *others)

    found = maps(*inputs)
    torch.testing.assert_close(found, flat(*inputs), **EXACT)
    torch.testing.assert_close(gradients(maps, inputs), gradients(flat, inputs), **CLOSE)
    assert found[0].movedim(2, -1).is_contiguous() == last  # as the next convolution takes it


@both
def test_maps_are_not_copied(function, make):
    inputs = list(make(features=(3, 4, 5)))
    inputs[1:-2] = [tensor[..., :1, :1].clone() for tensor in inputs[1:-2]]
    sequence = with_channels_last(inputs[0]).requires_grad_()
    weights = with_channels_last(torch.randn_like(inputs[0]))
    with Operators() as seen:
        output, *_ = function(sequence, *inputs[1:])
        torch.autograd.grad((output * weights).sum(), sequence)
    copying = re.compile("clone|copy|contiguous")
    copied = [count for name, count in seen.calls if copying.search(name)]
    assert max(copied, default=0) < sequence.numel()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT64])
def test_an_input_that_is_constant_over_time_is_not_copied(function, make, dtype, monkeypatch):
    inputs = make(dtype=torch.float32)
    x = inputs[0][:1].to(dtype).expand(50, *inputs[0].shape[1:])
    seen, run = [], kernels_operator.run
    monkeypatch.setattr(
        "snn_lib.functional.run", lambda inputs, *o: seen.append(inputs.x) or run(inputs, *o)
    )
    expected = function(x.contiguous(), *inputs[1:])
    torch.testing.assert_close(function(x, *inputs[1:]), expected, **EXACT)
    assert seen[1].stride(0) == 0


# Dropout. A neuron driven hard fires at every step, so that its output is the mask itself.


def mask(shape, dropout, seed=None, start=0):
    current, zeros = torch.full(shape, 100.0, dtype=FLOAT64), torch.zeros(shape[2:], dtype=FLOAT64)
    seed = None if seed is None else torch.tensor([seed, start])
    return spiking_neuron(current, zeros, zeros, zeros, dropout=dropout, seed=seed)[0]


def hashed(number, key):
    """MurmurHash3's finaliser of an element's number, once for each half of the key."""
    h, bits = number, 2**32 - 1
    for half in (key & bits, key >> 32 & bits):
        h ^= half
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = (h ^ h >> shift) * factor & bits
        h ^= h >> 16
    return h


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.8])
def test_an_element_is_dropped_by_the_hash_of_its_number(dropout, backend):
    key, start = 0x1234_5678_9ABC_DEF0, 2**32 - 40  # numbers wrap around
    with use_backend(backend):
        found = mask((5, 3, 7), dropout, key, start).flatten().tolist()
    kept = [hashed((start + n) % 2**32, key) >= int(dropout * 2**32) for n in range(105)]
    assert found == [pytest.approx(1 / (1 - dropout)) if one else 0.0 for one in kept]


@pytest.mark.parametrize("dropout", [0.1, 0.8])
def test_dropout_keeps_the_asked_share_independently_over_time_batch_and_channels(dropout):
    kept = (mask((50, 40, 30), dropout) > 0).double()
    share, deviation = 1 - dropout, math.sqrt(dropout * (1 - dropout) / kept.numel())
    assert abs(kept.mean() - share) < 4 * deviation
    for dim in range(3):  # time, batch and channels
        one, other = kept.narrow(dim, 0, 25), kept.narrow(dim, 3, 25)
        assert abs((one * other).mean() - share**2) < 5 * 0.5 / math.sqrt(one.numel() / 2)


def test_seeds_come_from_pytorch_s_generator_and_chunks_continue_the_mask():
    torch.manual_seed(1)
    first, other = mask((6, 2, 30), 0.5), mask((6, 2, 30), 0.5)
    torch.manual_seed(1)
    assert torch.equal(mask((6, 2, 30), 0.5), first)
    assert (first != other).any()
    whole = mask((6, 2, 30), 0.5, seed=5)
    chunks = mask((4, 2, 30), 0.5, seed=5), mask((2, 2, 30), 0.5, seed=5, start=240)
    assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("last", [False, True])
def test_dropout_changes_the_spikes_passed_on_and_not_the_neuron_s_own_reset(last, backend):
    """The reset sees every spike; a spike that was dropped gets no gradient, nor a tangent."""
    inputs, seed = neuron_inputs(features=(3, 4, 5)), torch.tensor([5, 0])
    lay = with_channels_last if last else torch.Tensor.contiguous

    def dropping(current, *others):
        return run_neuron(lay(current), *others, dropout=0.4, seed=seed)

    hard = torch.full_like(inputs[0], 100.0), *(torch.zeros_like(t) for t in inputs[1:])
    kept = dropping(*hard)[0]

    def by_hand(*tensors):
        spikes, *state = neuron_by_hand(*tensors)
        return spikes * kept, *state

    with use_backend(backend):
        torch.testing.assert_close(dropping(*inputs), by_hand(*inputs), **CLOSE)
        torch.testing.assert_close(gradients(dropping, inputs), gradients(by_hand, inputs), **CLOSE)
    if not last:  # forward mode does not see how a tensor lies in memory
        tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
        whole = torch.func.jvp(run_neuron, inputs, tangents)[1]
        found = torch.func.jvp(dropping, inputs, tangents)[1]
        torch.testing.assert_close(found, (whole[0] * kept, *whole[1:]), **CLOSE)


def test_dropout_under_vmap_follows_the_setting_randomness():
    inputs = neuron_inputs(features=(30,))
    loud = torch.full((3, *inputs[0].shape), 100.0, dtype=FLOAT64)

    def passed(current):
        return run_neuron(current, *inputs[1:], dropout=0.5)[0]

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(passed)(loud)
    different = torch.func.vmap(passed, randomness="different")(loud)
    assert (different[0] != different[1]).any()
    torch.manual_seed(5)
    same = torch.func.vmap(passed, randomness="same")(loud)
    torch.manual_seed(5)
    torch.testing.assert_close(same, passed(loud[0]).expand_as(same), **EXACT)


# The transforms of torch.func, forward mode and second derivatives: plain PyTorch


@each
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobians_are_those_of_the_definitions(function, definition, make, transform):
    inputs = make(steps=3)
    found = transform(function, tuple(range(len(inputs))))(*inputs)
    expected = torch.autograd.functional.jacobian(definition, tuple(inputs))
    torch.testing.assert_close(found, expected, **CLOSE)


@each
def test_forward_mode_is_a_product_with_the_jacobian(function, definition, make):
    inputs = make(steps=3)
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    jacobian = torch.autograd.functional.jacobian(definition, tuple(inputs))
    expected = [
        sum(
            part.flatten(-tensor.dim()) @ tangent.flatten()
            for part, tensor, tangent in zip(row, inputs, tangents, strict=True)
        )
        for row in jacobian
    ]
    outputs, found = torch.func.jvp(function, tuple(inputs), tangents)
    torch.testing.assert_close(outputs, function(*inputs), **CLOSE)
    torch.testing.assert_close(list(found), expected, **CLOSE)
    with forward_ad.dual_level():  # and where a gradient could be asked for
        pairs = zip((t.requires_grad_() for t in inputs), tangents, strict=True)
        duals = [forward_ad.make_dual(tensor, tangent) for tensor, tangent in pairs]
        found = [forward_ad.unpack_dual(output).tangent for output in function(*duals)]
        torch.testing.assert_close(found, expected, **CLOSE)


@each
def test_vmap_and_gradients_of_each_sample_are_those_of_the_definitions(function, definition, make):
    stacked = [torch.stack(pair) for pair in zip(make(), make(), strict=True)]
    numbers = tuple(range(len(stacked)))

    def loss_of(one):
        return lambda *inputs: sum(output.square().sum() for output in one(*inputs))

    found = torch.func.vmap(function)(*stacked)
    slopes = torch.func.vmap(torch.func.grad(loss_of(function), numbers))(*stacked)
    for n in range(2):
        inputs = [tensor[n] for tensor in stacked]
        expected = definition(*inputs), torch.func.grad(loss_of(function), numbers)(*inputs)
        torch.testing.assert_close(tuple(part[n] for part in found), expected[0], **CLOSE)
        torch.testing.assert_close(tuple(part[n] for part in slopes), expected[1], **CLOSE)


@each
def test_second_derivatives_are_those_of_the_definitions(function, definition, make):
    """A penalty on a gradient, of which every input has a share."""
    inputs = make()

    def penalty(one):
        def run(x, *others):
            x = x.clone()
            loss = sum(output.square().sum() for output in one(x, *others))
            return torch.autograd.grad(loss, x, create_graph=True)

        return gradients(run, inputs)

    torch.testing.assert_close(penalty(function), penalty(definition), **CLOSE)

    def loss(x):
        return function(x, *inputs[1:])[0].square().sum()

    hessian, again = torch.func.hessian(loss), torch.func.jacrev(torch.func.jacrev(loss))
    torch.testing.assert_close(hessian(inputs[0]), again(inputs[0]), **CLOSE)


def test_a_gradient_that_is_differentiated_counts_an_input_in_a_state_once():
    x, neuron = torch.randn(5, 2, 3, requires_grad=True), SpikingNeuron(3, 4.0)

    def slope(again):
        given = 2.0 * x
        spikes, _ = neuron(given, (given.mean(0), given[0]))
        return torch.autograd.grad((spikes * spikes.cos()).sum(), x, create_graph=again)[0]

    torch.testing.assert_close(slope(True), slope(False))


def test_a_gradient_that_is_differentiated_is_that_of_the_same_dropout_and_lengths():
    neuron = SpikingNeuron(3, 4.0, membrane_filter=True, dropout=0.5)
    x = (2 * torch.rand(9, 4, 3)).requires_grad_()

    def slope(again):
        torch.manual_seed(0)
        spikes, state = neuron(x, lengths=torch.tensor([5, 0, 2, 9]))
        loss = spikes.square().sum() + sum(part.square().sum() for part in state)
        return torch.autograd.grad(loss, x, create_graph=again)[0]

    torch.testing.assert_close(slope(True), slope(False))


def test_a_gradient_through_no_steps_can_be_differentiated():
    neuron = SpikingNeuron(3, 4.0, train_decay=True)
    _, state = neuron(torch.zeros(0, 2, 3))
    spikes, _ = neuron(2 * torch.rand(9, 2, 3), state)
    slopes = [
        torch.autograd.grad(spikes.sum(), neuron.reset_decay, create_graph=again)[0]
        for again in (True, False)
    ]
    torch.testing.assert_close(*slopes)
    assert slopes[0].any()


# What PyTorch sees: one node


@each
def test_a_function_is_compiled_as_one_node_for_any_number_of_steps(function, definition, make):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(
            [str(node.target) for node in graph.graph.nodes if "snn." in str(node.target)]
        )
        return graph

    run = torch.compile(
        function, backend=aot_autograd(fw_compiler=backend), fullgraph=True, dynamic=True
    )
    for steps in (5, 9):
        inputs = make(steps=steps)
        torch.testing.assert_close(gradients(run, inputs), gradients(definition, inputs), **CLOSE)
    assert graphs == [["snn.run.default"], ["snn.run_backward.default"]]
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs), definition(*inputs), **CLOSE)


class Both(torch.nn.Module):
    """Filter and neuron as they stand in a model."""

    def forward(self, x, alpha, beta, theta):
        output, _ = iir_filter(x, alpha, beta)
        return spiking_neuron(output, theta, theta, theta)[0]


def test_an_exported_program_is_saved_and_runs_in_a_new_process(tmp_path):
    x, alpha, beta, *_ = filter_inputs(dtype=torch.float32)
    inputs = x, alpha, beta, torch.rand(3)
    steps = {0: torch.export.Dim("steps", min=2)}
    shapes = {"x": steps, "alpha": {}, "beta": {}, "theta": {}}
    program = torch.export.export(Both(), inputs, dynamic_shapes=shapes)
    longer = 2 * torch.randn(20, 2, 3), *inputs[1:]
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((longer, Both()(*longer)), tmp_path / "numbers")
    code = (
        "import torch, snn_lib; program = torch.export.load('program.pt2').module(); "
        "inputs, expected = torch.load('numbers'); assert torch.equal(program(*inputs), expected)"
    )
    root = Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PYTHONPATH": str(root)}
    )


@both
def test_hooks_on_saved_tensors_and_checkpoints_give_the_same_gradients(function, make):
    """What is saved does not grow with a graph of every step, and may come back as another copy."""
    inputs = make(steps=50)
    expected, sizes = gradients(function, inputs), []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.Tensor.clone):
        torch.testing.assert_close(gradients(function, inputs), expected, **EXACT)
    whole = sum(size >= inputs[0].numel() for size in sizes)
    assert whole == 2  # the input, and the weights of the loss
    again = partial(checkpoint, function, use_reentrant=False)
    torch.testing.assert_close(gradients(again, inputs), expected, **EXACT)


# Refusals: each names what is wrong and what is expected


def on_meta(tensor):
    return tensor.to("meta")


REFUSED = [  # the function, the input that is changed and its new value, or settings; the words
    (run_filter, 0, torch.zeros(6, 3), r"x has shape \(6, 3\), expected .* \(T, B, \*features\)"),
    (run_filter, 1, torch.zeros(2), r"alpha has shape \(2,\), expected \(order, \*features\)"),
    (run_filter, 1, torch.zeros(2, 4), r"alpha has shape \(2, 4\), .* \(6, 2, 3\) \(T, B, \*feat"),
    (run_filter, 2, torch.zeros(0, 3), r"beta has shape \(0, 3\), expected \(order, \*features\)"),
    (run_filter, 2, torch.zeros(3, 1), r"beta has shape \(3, 1\), expected \(3,\)"),
    (run_filter, 3, torch.zeros(1, 2, 3), r"past_output has shape .*, expected \(2, 2, 3\)"),
    (run_filter, 4, torch.zeros(2, 3), r"past_input has shape \(2, 3\), expected \(2, 2, 3\)"),
    (run_neuron, 0, torch.zeros(6, 3), r"current has shape \(6, 3\), expected .* \(T, B, \*feat"),
    (run_neuron, 1, torch.zeros(1), r"reset_decay has shape \(1,\), expected \(3,\)"),
    (run_neuron, 2, torch.zeros(()), r"reset_strength has shape \(\), expected \(3,\)"),
    (run_neuron, 3, torch.zeros(2, 2, 3), r"membrane_decay has shape \(2, 2, 3\), expected \(3,\)"),
    (run_neuron, 4, torch.zeros(1, 3), r"membrane has shape \(1, 3\), expected \(2, 3\)"),
    (run_neuron, 5, torch.zeros(3), r"reset has shape \(3,\), expected \(2, 3\)"),
    *((f, 1, torch.zeros(2, 3, dtype=d), f"alpha is in {d}, expected float32, float64, bf")
      for f, d in ((run_filter, torch.int64), (run_filter, torch.bool))),
    (run_neuron, 1, torch.zeros(3, dtype=torch.complex64), "reset_decay is in torch.complex64"),
    *((f, n, torch.zeros(6, 2, 3) + 1j, " is in torch.complex64, expected real numbers")
      for f, n in ((run_filter, 0), (run_neuron, 0))),
    (run_filter, 3, torch.zeros(2, 2, 3) + 1j, "past_output is in torch.complex64, expected real"),
    (run_neuron, 5, torch.zeros(2, 3) + 1j, "reset is in torch.complex64, expected real numbers"),
    *((f, n, on_meta, " is on (meta, expected cpu|cpu, expected meta) as ")
      for f in (run_filter, run_neuron) for n in (0, 1, -2, -1)),
    *((f, n, Tensor.numpy, "is a ndarray, expected a tensor")
      for f in (run_filter, run_neuron) for n in (0, 1, -1)),
    *((run_neuron, {"dropout": p}, None, rf"dropout is {p}, expected a probability in \[0, 1\)")
      for p in (-0.1, 1.0, math.nan)),
    *((run_neuron, {"dropout": 0.5, "seed": seed}, None, r"seed has shape .*, expected \(2,\) in")
      for seed in (torch.tensor(3), torch.rand(2))),
    (run_neuron, {"surrogate": "gaussian"}, None, r"surrogate is 'gaussian', .* derivative\(m"),
    *((run_filter, {"dtype": d}, None, f"dtype is {d}, expected torch.float64")
      for d in (torch.float16, torch.int64)),
]  # fmt: skip


@pytest.mark.parametrize(("function", "change", "value", "words"), REFUSED)
def test_bad_inputs_and_settings_are_refused(function, change, value, words):
    inputs = list(filter_inputs() if function is run_filter else neuron_inputs())
    settings = change if isinstance(change, dict) else {}
    if not settings:
        inputs[change] = value(inputs[change]) if callable(value) else value
    with pytest.raises((ValueError, TypeError), match=words) as error:
        function(*inputs, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 2, 5), (3, 1), (1, 1, 1)])
def test_coefficients_that_positions_of_a_map_cannot_share_are_refused(shape):
    inputs = list(neuron_inputs(features=(3, 4, 5)))
    inputs[2] = torch.zeros(*shape)
    with pytest.raises(ValueError, match="reset_strength has shape"):
        run_neuron(*inputs)


def test_a_state_of_another_number_of_entries_is_refused():
    x, alpha, beta, past, _ = filter_inputs()
    words = r"state has 1 entries, expected 2: \(past_output, past_in"
    with pytest.raises(ValueError, match=words):
        iir_filter(x, alpha, beta, (past,))

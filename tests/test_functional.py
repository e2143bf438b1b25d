"""The two operators against definitions written here, one time step after the other."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import lfilter
from snn_lib.operators import iir_filter as filter_operator
from snn_lib.operators import spiking_neuron as neuron_operator
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from snn_lib import functional, use_backend
from snn_lib.functional import iir_filter, neuron_traces, spiking_neuron
from snn_lib.surrogate import FastSigmoid, Gaussian

FLOAT64 = torch.float64
LOW_PRECISION = [torch.float16, torch.bfloat16]
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def filter_per_step(x, alpha, beta, past_output, past_input):
    outputs, inputs = [*past_output], [*past_input]
    for x_t in x:
        inputs.append(x_t)
        f = sum(beta[q] * inputs[-1 - q] for q in range(len(beta)))
        outputs.append(f + sum(alpha[p - 1] * outputs[-p] for p in range(1, len(alpha) + 1)))
    return torch.stack(outputs[len(past_output) :])


class Spike(torch.autograd.Function):
    """A step at 1 whose derivative is the surrogate."""

    @staticmethod
    def forward(ctx, membrane, derivative):
        ctx.save_for_backward(membrane)
        ctx.derivative = derivative
        return (membrane > 1).to(membrane)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.derivative(*ctx.saved_tensors), None


def gaussian(membrane, sigma=0.4):
    return torch.exp(-((membrane - 1) ** 2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)


def fast_sigmoid(membrane, width=0.1):
    return (1 + (membrane - 1).abs() / width) ** -2


def exponential(membrane):
    return torch.exp(-3 * (membrane - 1).abs())


class Exponential:
    """A surrogate of one's own."""

    def derivative(self, membrane):
        return exponential(membrane)


class TwoGaussians(Gaussian):
    """A subclass that keeps the name of the compiled one."""

    def derivative(self, membrane):
        return super().derivative(membrane) + super().derivative(-membrane)


def neuron_per_step(current, theta, strength, decay, membrane, reset, derivative=gaussian):
    spikes = []
    for current_t in current:
        membrane = decay * membrane + current_t - reset
        spikes.append(Spike.apply(membrane, derivative))
        reset = theta * reset + strength * spikes[-1]
    return torch.stack(spikes), membrane, reset


def filter_inputs(order_p, order_q, steps=6, batch=2, features=(3,), dtype=FLOAT64):
    """x, alpha, beta, past_output, past_input; sum |alpha_p| < 1, so the filters are stable."""
    return (
        torch.randn(steps, batch, *features, dtype=dtype),
        (2 * torch.rand(order_p, *features, dtype=dtype) - 1) / max(order_p, 1),
        torch.randn(order_q + 1, *features, dtype=dtype),
        torch.randn(order_p, batch, *features, dtype=dtype),
        torch.randn(order_q, batch, *features, dtype=dtype),
    )


def neuron_inputs(steps=20, batch=3, features=(4,), dtype=FLOAT64):
    """current, theta, v_reset, lambda, membrane, reset; neurons that fire now and then."""
    return (
        2 * torch.randn(steps, batch, *features, dtype=dtype),
        *(torch.rand(features, dtype=dtype) for _ in range(3)),
        *(torch.randn(batch, *features, dtype=dtype) for _ in range(2)),
    )


def run_filter(x, alpha, beta, past_output, past_input):
    """The operator with its outputs in one flat tuple: F, and the state."""
    output, state = iir_filter(x, alpha, beta, (past_output, past_input))
    return output, *state


def run_neuron(current, theta, strength, decay, membrane, reset, **settings):
    spikes, state = spiking_neuron(current, theta, strength, decay, (membrane, reset), **settings)
    return spikes, *state


def gradients(function, inputs, which=None):
    """Gradients of a random projection of all outputs, for the inputs in ``which`` (all)."""
    which = range(len(inputs)) if which is None else which
    inputs = [
        tensor.detach().clone().requires_grad_(index in which)
        for index, tensor in enumerate(inputs)
    ]
    outputs = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (torch.randn(output.shape, dtype=output.dtype, generator=generator) * output).sum()
        for output in outputs
    )
    return torch.autograd.grad(loss, [inputs[index] for index in which])


def nodes_behind(tensor):
    """The number of autograd nodes that the backward pass from ``tensor`` visits."""
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return len(seen)


sizes = st.integers(1, 4)
seeds = st.integers(0, 2**32 - 1)
orders = {"order_p": st.integers(0, 3), "order_q": st.integers(0, 3)}


# The filter


@given(steps=st.integers(0, 8), batch=sizes, channels=sizes, seed=seeds, **orders)
def test_filter_follows_its_equation(order_p, order_q, steps, batch, channels, seed):
    torch.manual_seed(seed)
    inputs = filter_inputs(order_p, order_q, steps, batch, (channels,))
    output, past_output, past_input = run_filter(*inputs)
    x, *_, old_output, old_input = inputs
    if steps:
        torch.testing.assert_close(output, filter_per_step(*inputs), **CLOSE)
    assert output.shape == x.shape
    outputs, seen = torch.cat([old_output, output]), torch.cat([old_input, x])
    torch.testing.assert_close(past_output, outputs[len(outputs) - order_p :], **EXACT)
    torch.testing.assert_close(past_input, seen[len(seen) - order_q :], **EXACT)


@given(steps=st.integers(0, 5), batch=st.integers(1, 2), seed=seeds, **orders)
def test_filter_passes_gradcheck(order_p, order_q, steps, batch, seed):
    torch.manual_seed(seed)
    inputs = filter_inputs(order_p, order_q, steps, batch, (1,))  # channels are apart, see above
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(run_filter, inputs, check_forward_ad=True)


@given(seed=seeds, **orders)
def test_filter_equals_scipy(order_p, order_q, seed):
    torch.manual_seed(seed)
    x, alpha, beta, *_ = filter_inputs(order_p, order_q, steps=30)
    output, _ = iir_filter(x, alpha, beta)
    for channel in range(x.shape[2]):
        denominator = np.concatenate([[1.0], -alpha[:, channel].numpy()])
        expected = lfilter(beta[:, channel].numpy(), denominator, x[..., channel].numpy(), axis=0)
        np.testing.assert_allclose(output[..., channel], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(cuts=st.lists(st.integers(0, 12), max_size=4), seed=seeds, **orders)
def test_filter_in_chunks_is_the_whole_run(dtype, order_p, order_q, cuts, seed):
    torch.manual_seed(seed)
    x, alpha, beta, *state = filter_inputs(order_p, order_q, steps=12, dtype=dtype)
    whole, whole_state = iir_filter(x, alpha, beta, state)
    cuts, chunks = [0, *sorted(cuts), 12], []
    for start, stop in pairwise(cuts):
        chunk, state = iir_filter(x[start:stop], alpha, beta, state)
        chunks.append(chunk)
    torch.testing.assert_close(torch.cat(chunks), whole, **EXACT)
    torch.testing.assert_close(state, whole_state, **EXACT)


def test_a_state_may_be_reset_in_place_before_the_backward_pass():
    x, alpha, beta, *_ = filter_inputs(1, 0)
    alpha.requires_grad_()
    (expected,) = torch.autograd.grad(iir_filter(x, alpha, beta)[0].sum(), alpha)
    output, state = iir_filter(x, alpha, beta)
    for past in state:
        past.zero_()
    assert torch.equal(torch.autograd.grad(output.sum(), alpha)[0], expected)


def test_filter_state_is_a_copy():
    x, alpha, beta, *_ = filter_inputs(2, 2)
    output, state = iir_filter(x, alpha, beta)
    kept = [past.clone() for past in state]
    output.zero_()
    x.zero_()
    torch.testing.assert_close(list(state), kept, **EXACT)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_the_filter_rounds_what_it_hands_out_and_no_more(dtype):
    x, alpha, beta, *_ = filter_inputs(2, 1, dtype=torch.float32)
    exact, exact_state = iir_filter(x, alpha, beta)
    output, state = iir_filter(x, alpha, beta, dtype=dtype)
    first, between = iir_filter(x[:2], alpha, beta, dtype=dtype)
    second, end = iir_filter(x[2:], alpha, beta, between, dtype=dtype)
    torch.testing.assert_close(output, exact.to(dtype), **EXACT)
    torch.testing.assert_close(state, exact_state, **EXACT)
    torch.testing.assert_close(torch.cat([first, second]), output, **EXACT)
    torch.testing.assert_close(end, exact_state, **EXACT)


@pytest.mark.parametrize(
    ("own", "dtype"),
    [(FLOAT64, torch.float16), (FLOAT64, torch.bfloat16), (torch.float32, torch.int64)],
)
def test_the_filter_rounds_from_float32_to_low_precision_only(own, dtype):
    x, alpha, beta, *_ = filter_inputs(2, 1, dtype=own)
    with pytest.raises(ValueError, match=f"dtype is {dtype}, expected {own}"):
        iir_filter(x, alpha, beta, dtype=dtype)


@pytest.mark.parametrize("t", [0, 3, 5])
def test_filter_is_causal(t):
    inputs = filter_inputs(2, 2)
    output = run_filter(*inputs)[0]
    changed = [tensor.clone() for tensor in inputs]
    changed[0][t] += 1.0
    difference = run_filter(*changed)[0] - output
    assert (difference[:t] == 0).all()
    assert (difference[t:] != 0).any(0).all()
    (grad_x,) = gradients(lambda *tensors: run_filter(*tensors)[0][t : t + 1], inputs, [0])
    assert (grad_x[t + 1 :] == 0).all()
    assert (grad_x[: t + 1] != 0).all()


@pytest.mark.parametrize("index", range(5))
def test_filter_gradient_alone_is_the_one_among_all(index):
    inputs = filter_inputs(2, 2)
    (alone,) = gradients(run_filter, inputs, [index])
    torch.testing.assert_close(alone, gradients(run_filter, inputs)[index], **CLOSE)


def test_filter_of_a_constant_input_needs_no_copy():
    image = torch.randn(1, 2, 3, dtype=FLOAT64)
    _, alpha, beta, *state = filter_inputs(2, 1)

    def expanded(image, *others):
        return run_filter(image.expand(7, -1, -1), *others)

    def copied(image, *others):
        return run_filter(image.repeat(7, 1, 1), *others)

    inputs = (image, alpha, beta, *state)
    torch.testing.assert_close(expanded(*inputs), copied(*inputs), **CLOSE)
    torch.testing.assert_close(gradients(expanded, inputs), gradients(copied, inputs), **CLOSE)


# The neuron


@pytest.mark.parametrize(
    ("surrogate", "derivative"),
    [
        (Gaussian(), gaussian),
        (Gaussian(1.0), lambda v: gaussian(v, 1.0)),
        (FastSigmoid(), fast_sigmoid),
        (Exponential(), exponential),
        (TwoGaussians(), lambda v: gaussian(v) + gaussian(-v)),
    ],
)
@given(steps=st.integers(1, 20), batch=sizes, channels=sizes, seed=seeds)
def test_neuron_follows_its_equation(surrogate, derivative, steps, batch, channels, seed):
    torch.manual_seed(seed)
    inputs = neuron_inputs(steps, batch, (channels,))

    def operator(*tensors):
        return run_neuron(*tensors, surrogate=surrogate)

    def definition(*tensors):
        return neuron_per_step(*tensors, derivative)

    torch.testing.assert_close(operator(*inputs)[0], definition(*inputs)[0], **EXACT)
    torch.testing.assert_close(operator(*inputs)[1:], definition(*inputs)[1:], **CLOSE)
    torch.testing.assert_close(gradients(operator, inputs), gradients(definition, inputs), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(cuts=st.lists(st.integers(0, 12), max_size=4), seed=seeds)
def test_neuron_in_chunks_is_the_whole_run(dtype, cuts, seed):
    torch.manual_seed(seed)
    current, *coefficients, membrane, reset = neuron_inputs(steps=12, dtype=dtype)
    whole, whole_state = spiking_neuron(current, *coefficients, (membrane, reset))
    cuts, chunks, state = [0, *sorted(cuts), 12], [], (membrane, reset)
    for start, stop in pairwise(cuts):
        chunk, state = spiking_neuron(current[start:stop], *coefficients, state)
        chunks.append(chunk)
    torch.testing.assert_close(torch.cat(chunks), whole, **EXACT)
    torch.testing.assert_close(state, whole_state, **EXACT)


def test_neuron_is_causal():
    current, *others = neuron_inputs()
    spikes = run_neuron(current, *others)[0]
    changed = current.clone()
    changed[10:] = 5.0 - changed[10:]
    changed_spikes = run_neuron(changed, *others)[0]
    assert (spikes[:10] == changed_spikes[:10]).all()
    assert (spikes[10] != changed_spikes[10]).any()
    (grad_current,) = gradients(
        lambda *tensors: run_neuron(*tensors)[0][10:11], (current, *others), [0]
    )
    assert (grad_current[11:] == 0).all()
    assert (grad_current[10] != 0).all()
    assert (grad_current[9] != 0).any()  # through the reset


@pytest.mark.parametrize("index", range(6))
def test_neuron_gradient_alone_is_the_one_among_all(index):
    inputs = neuron_inputs()
    (alone,) = gradients(run_neuron, inputs, [index])
    torch.testing.assert_close(alone, gradients(run_neuron, inputs)[index], **CLOSE)


@pytest.mark.parametrize("surrogate", [Gaussian(), Exponential()])
def test_traces_are_those_of_each_step_and_have_gradients(surrogate):
    inputs = neuron_inputs(features=(2, 2))

    def operator(*tensors):
        *inputs, membrane, reset = tensors
        return neuron_traces(*inputs, (membrane, reset), surrogate)

    def definition(current, theta, strength, decay, membrane, reset):
        traces = []
        for current_t in current:
            membrane = decay * membrane + current_t - reset
            traces.append((Spike.apply(membrane, surrogate.derivative), membrane, reset))
            reset = theta * reset + strength * traces[-1][0]
        return [torch.stack(trace) for trace in zip(*traces, strict=True)]

    torch.testing.assert_close(list(operator(*inputs)), definition(*inputs), **CLOSE)
    torch.testing.assert_close(gradients(operator, inputs), gradients(definition, inputs), **CLOSE)


def test_a_surrogate_is_asked_only_where_a_gradient_is_needed():
    calls = []

    class Counting(Exponential):
        def derivative(self, membrane):
            calls.append(membrane)
            return super().derivative(membrane)

    inputs = neuron_inputs()
    run_neuron(*inputs, surrogate=Counting())
    with torch.no_grad():
        run_neuron(inputs[0].requires_grad_(), *inputs[1:], surrogate=Counting())
    assert not calls
    run_neuron(*inputs, surrogate=Counting())
    assert [membrane.shape for membrane in calls] == [inputs[0].shape]
    assert not calls[0].requires_grad


def test_what_is_no_surrogate_is_refused():
    inputs = [tensor.requires_grad_() for tensor in neuron_inputs()]
    with pytest.raises(TypeError, match=r"surrogate is 'gaussian', .* derivative\(membrane\)"):
        run_neuron(*inputs, surrogate="gaussian")

    class Constant:
        def derivative(self, membrane):
            return 0.5

    with pytest.raises(ValueError, match=r"Constant.derivative .* \(\), expected \(20, 3, 4\)"):
        run_neuron(*inputs, surrogate=Constant())

    class Mean:
        def derivative(self, membrane):
            return membrane.mean(0)

    with pytest.raises(ValueError, match=r"Mean.derivative .* \(3, 4\), expected \(20, 3, 4\)"):
        run_neuron(*inputs, surrogate=Mean())


# Dropout. A neuron driven hard fires at every step, so that its output is the mask itself.


def mask(shape, dropout, seed):
    torch.manual_seed(seed)
    current, zeros = torch.full(shape, 100.0, dtype=FLOAT64), torch.zeros(shape[2:], dtype=FLOAT64)
    return spiking_neuron(current, zeros, zeros, zeros, dropout=dropout)[0]


@pytest.mark.parametrize("dropout", [0.1, 0.3, 0.8])
def test_dropout_keeps_its_share_and_the_mean(dropout):
    passed = mask((25, 16, 100), dropout, seed=0)
    torch.testing.assert_close(
        passed.unique(), torch.tensor([0.0, 1.0 / (1.0 - dropout)], dtype=FLOAT64), **CLOSE
    )
    deviation = math.sqrt(dropout * (1 - dropout) / passed.numel())
    assert abs((passed == 0).double().mean() - dropout) < 4 * deviation
    assert abs(passed.mean() - 1.0) < 4 * deviation / (1 - dropout)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_dropout_is_independent_along_time_batch_and_channels(dim):
    kept = mask((50, 40, 30), 0.3, seed=0) > 0
    length = kept.shape[dim]
    for lag in (1, 2, 7):
        pair = kept.narrow(dim, 0, length - lag) & kept.narrow(dim, lag, length - lag)
        # about 60,000 pairs, each both kept with probability 0.49
        assert abs(pair.double().mean() - 0.7**2) < 5 * 0.5 / math.sqrt(pair.numel() / 2)


def test_dropout_is_drawn_from_pytorch_s_generator():
    first, again = mask((5, 4, 30), 0.5, seed=1), mask((5, 4, 30), 0.5, seed=1)
    torch.testing.assert_close(first, again, **EXACT)
    assert (first != mask((5, 4, 30), 0.5, seed=2)).any()
    torch.manual_seed(1)
    inputs = neuron_inputs(features=(30,))
    calls = [run_neuron(*inputs, dropout=0.5)[0] for _ in range(2)]
    assert (calls[0] != calls[1]).any()


def test_dropout_is_hidden_from_the_reset():
    inputs = neuron_inputs()
    with_dropout, without = run_neuron(*inputs, dropout=0.5), run_neuron(*inputs)
    torch.testing.assert_close(with_dropout[1:], without[1:], **EXACT)
    assert (with_dropout[0] != 0).sum() < (without[0] != 0).sum()
    assert ((with_dropout[0] == 0) | (without[0] == 1)).all()


def test_dropout_s_backward_draws_the_same_mask():
    inputs = neuron_inputs()
    passed = mask(inputs[0].shape, 0.4, seed=3)

    def operator(*tensors):
        torch.manual_seed(3)
        return run_neuron(*tensors, dropout=0.4)

    def definition(*tensors):
        spikes, *state = neuron_per_step(*tensors)
        return spikes * passed, *state

    torch.testing.assert_close(operator(*inputs), definition(*inputs), **CLOSE)
    torch.testing.assert_close(gradients(operator, inputs), gradients(definition, inputs), **CLOSE)


# Both operators

OPERATORS = [
    pytest.param(run_filter, lambda **sizes: filter_inputs(2, 2, **sizes), id="filter"),
    pytest.param(run_neuron, neuron_inputs, id="neuron"),
]
both = pytest.mark.parametrize(("operator", "make"), OPERATORS)


def filter_definition(x, alpha, beta, past_output, past_input):
    output = filter_per_step(x, alpha, beta, past_output, past_input)
    outputs, inputs = torch.cat([past_output, output]), torch.cat([past_input, x])
    return output, outputs[len(x) :], inputs[len(x) :]


def own_neuron(*inputs):
    return run_neuron(*inputs, surrogate=Exponential())


def own_definition(*inputs):
    return neuron_per_step(*inputs, exponential)


# Every operator with its definition, for the derivatives.
DEFINED = [
    pytest.param(run_filter, filter_definition, lambda: filter_inputs(2, 2), id="filter"),
    pytest.param(run_neuron, neuron_per_step, lambda: neuron_inputs(6), id="neuron"),
    pytest.param(own_neuron, own_definition, lambda: neuron_inputs(6), id="own surrogate"),
]
defined = pytest.mark.parametrize(("operator", "definition", "make"), DEFINED)


@both
def test_thousands_of_steps(operator, make):
    inputs = make(steps=3_000, batch=1, features=(2,))
    with use_backend("eager"):
        expected, expected_gradients = operator(*inputs), gradients(operator, inputs)
    loose = {"rtol": 1e-9, "atol": 1e-9}  # the coefficients' gradients are sums over all steps
    torch.testing.assert_close(operator(*inputs), expected, **CLOSE)
    torch.testing.assert_close(gradients(operator, inputs), expected_gradients, **loose)


@both
@pytest.mark.parametrize(
    ("steps", "batch", "features"),
    [(1, 1, (1,)), (0, 2, (3,)), (4, 0, (3,)), (4, 2, (0,)), (0, 0, (0,)), (1, 2, (3,))],
)
def test_odd_sizes(operator, make, steps, batch, features):
    inputs = make(steps=steps, batch=batch, features=features)
    output, *state = operator(*inputs)
    assert output.shape == (steps, batch, *features)
    assert [part.shape for part in state] == [old.shape for old in inputs[-2:]]
    for gradient, tensor in zip(gradients(operator, inputs), inputs, strict=True):
        assert gradient.shape == tensor.shape
        assert torch.isfinite(gradient).all()
    if steps == 0:
        torch.testing.assert_close(state, list(inputs[-2:]), **EXACT)


@both
@given(features=st.lists(sizes, min_size=2, max_size=3), seed=seeds)
def test_features_of_any_shape_are_as_many_channels(operator, make, features, seed):
    torch.manual_seed(seed)
    inputs = make(features=tuple(features))
    flat = [tensor.reshape(*tensor.shape[: tensor.dim() - len(features)], -1) for tensor in inputs]
    for result, flat_result in zip(operator(*inputs), operator(*flat), strict=True):
        torch.testing.assert_close(result.flatten(-len(features)), flat_result, **EXACT)
    for result, flat_result in zip(
        gradients(operator, inputs), gradients(operator, flat), strict=True
    ):
        torch.testing.assert_close(result.flatten(-len(features)), flat_result, **CLOSE)


def with_channels_last(tensor, leading):
    """The same feature maps ``(..., C, H, W)`` with the channels side by side in memory."""
    return tensor.movedim(leading, -1).contiguous().movedim(-1, leading)


def in_maps(operator, inputs):
    """The operator with its sequence, the first of the inputs, laid out as convolutions do."""

    def laid_out(sequence, *others):
        return operator(with_channels_last(sequence, 2), *others)

    return laid_out(*inputs), gradients(laid_out, inputs)


@pytest.mark.parametrize(
    ("operator", "make"), [*OPERATORS, pytest.param(own_neuron, neuron_inputs, id="own surrogate")]
)
def test_maps_with_channels_last_in_memory_are_the_same_maps(operator, make):
    inputs = make(features=(3, 4, 5))
    outputs, found = in_maps(operator, inputs)
    torch.testing.assert_close(outputs, operator(*inputs), **EXACT)
    torch.testing.assert_close(found, gradients(operator, inputs), **CLOSE)
    sequence, *_ = outputs
    assert sequence.movedim(2, -1).is_contiguous()  # as the next convolution takes it


def test_dropout_in_maps_with_channels_last_is_that_of_the_backward_pass():
    inputs = neuron_inputs(features=(3, 4, 5))
    seed = torch.tensor([5, 0])
    current = with_channels_last(inputs[0], 2).requires_grad_()
    passed, _ = run_neuron(current, *inputs[1:], dropout=0.4, seed=seed)[:2]
    fired, _ = run_neuron(*inputs)[:2]
    kept = (passed != 0) | (fired == 0)
    assert kept.any()
    assert not kept.all()
    # A spike that was dropped gets no gradient, whatever it was worth.
    worth = torch.randn_like(passed)
    (found,) = torch.autograd.grad((worth * passed).sum(), current, retain_graph=True)
    (again,) = torch.autograd.grad((worth * kept * passed).sum(), current)
    torch.testing.assert_close(again[-1], found[-1], **CLOSE)


class Copies(TorchDispatchMode):
    """The numbers of elements that PyTorch's own operators copy."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(name in str(function) for name in ("clone", "copy", "contiguous")):
            self.elements.append(result.numel())
        return result


@both
def test_maps_are_not_copied(operator, make):
    inputs = list(make(features=(3, 4, 5)))
    for coefficient in (1, 2):  # shared by the positions
        inputs[coefficient] = inputs[coefficient][..., :1, :1].clone()
    sequence = with_channels_last(inputs[0], 2).requires_grad_()
    weights = with_channels_last(torch.randn_like(inputs[0]), 2)
    with Copies() as copies:
        output, *_ = operator(sequence, *inputs[1:])
        torch.autograd.grad((output * weights).sum(), sequence)
    assert max(copies.elements, default=0) < sequence.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT64])
def test_a_constant_input_is_not_copied_in_any_dtype(dtype, monkeypatch):
    _, alpha, beta, *state = (tensor.float() for tensor in filter_inputs(2, 1))
    x = torch.randn(1, *state[0].shape[1:]).to(dtype).expand(50, *state[0].shape[1:])
    seen, run = [], functional.run_filter
    monkeypatch.setattr(functional, "run_filter", lambda *args: seen.append(args) or run(*args))
    output, _ = iir_filter(x, alpha, beta, tuple(state))
    assert seen[0][0].stride(0) == 0
    expected, _ = iir_filter(x.float().contiguous(), alpha, beta, tuple(state))
    torch.testing.assert_close(output, expected, **EXACT)


def test_the_steps_of_a_constant_input_of_another_dtype_have_gradients_of_their_own():
    _, alpha, beta, *state = (tensor.float() for tensor in filter_inputs(2, 1))
    image = torch.randn(1, *state[0].shape[1:], dtype=FLOAT64)

    def gradient(x):
        x = x.detach().requires_grad_()
        output, _ = iir_filter(x, alpha, beta, tuple(state))
        return torch.autograd.grad(output.square().sum(), x)[0]

    expanded = image.expand(9, *image.shape[1:])
    torch.testing.assert_close(gradient(expanded), gradient(expanded.contiguous()), **EXACT)


@both
@pytest.mark.parametrize("shared", [(1, 1), (1, 5), (4, 1)])
@pytest.mark.parametrize("last", [False, True])
def test_positions_share_coefficients(operator, make, shared, last):
    inputs = list(make(features=(3, 4, 5)))
    which = (1, 2) if operator is run_filter else (1, 2, 3)
    for index in which:
        own = inputs[index].shape[:-2]
        inputs[index] = inputs[index][..., : shared[0], : shared[1]].clone()
        assert inputs[index].shape == (*own, *shared)

    def repeated(*tensors):
        tensors = list(tensors)
        for index in which:
            tensors[index] = tensors[index].expand(*tensors[index].shape[:-2], 4, 5).contiguous()
        return operator(*tensors)

    expected, expected_gradients = repeated(*inputs), gradients(repeated, inputs)
    if last:
        outputs, found = in_maps(operator, inputs)
    else:
        outputs, found = operator(*inputs), gradients(operator, inputs)
    torch.testing.assert_close(outputs, expected, **EXACT)
    torch.testing.assert_close(found, expected_gradients, **CLOSE)


@both
@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 2, 5), (3, 1), (1, 1, 1)])
def test_coefficients_that_no_position_could_share_are_refused(operator, make, shape):
    inputs = list(make(features=(3, 4, 5)))
    leading = inputs[2].shape[: inputs[2].dim() - 3]
    inputs[2] = torch.zeros(*leading, *shape, dtype=FLOAT64)
    with pytest.raises(ValueError, match=r"beta|reset_strength") as error:
        operator(*inputs)
    assert str((*leading, *shape)) in str(error.value)


@both
def test_memory_layout_does_not_matter(operator, make):
    inputs = make()

    def strided(*tensors):
        return operator(*(tensor.movedim(0, -1).contiguous().movedim(-1, 0) for tensor in tensors))

    torch.testing.assert_close(strided(*inputs), operator(*inputs), **EXACT)
    torch.testing.assert_close(gradients(strided, inputs), gradients(operator, inputs), **CLOSE)


@both
def test_memory_layout_of_the_gradient_does_not_matter(operator, make):
    inputs = [tensor.requires_grad_() for tensor in make()]
    output = operator(*inputs)[0]
    upstream = torch.randn(output.shape[::-1], dtype=FLOAT64).permute(2, 1, 0)
    strided = torch.autograd.grad(output, inputs, upstream, retain_graph=True)
    contiguous = torch.autograd.grad(output, inputs, upstream.contiguous())
    torch.testing.assert_close(strided, contiguous, **CLOSE)


@both
def test_gradient_of_a_sum(operator, make):
    """``sum`` sends an expanded gradient back."""
    inputs = make()
    ones = gradients(lambda *tensors: (operator(*tensors)[0].sum().view(1),), inputs)
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(1, dtype=FLOAT64, generator=generator)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = operator(*leaves)[0]
    torch.testing.assert_close(
        ones, torch.autograd.grad(output, leaves, factor * torch.ones_like(output)), **CLOSE
    )


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.bool])
def test_input_is_converted_to_the_dtype_of_the_coefficients(operator, make, dtype):
    x, *others = make(dtype=torch.float32)
    x = x.abs().to(dtype)
    output, *state = operator(x, *others)
    expected, *expected_state = operator(x.float(), *others)
    torch.testing.assert_close(output, expected, **EXACT)
    torch.testing.assert_close(state, expected_state, **EXACT)
    assert output.dtype == torch.float32
    if dtype.is_floating_point:
        (gradient,) = torch.autograd.grad(operator(x.requires_grad_(), *others)[0].sum(), x)
        assert gradient.dtype == dtype


@both
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_is_computed_in_float32(operator, make, dtype):
    inputs = [tensor.to(dtype) for tensor in make(steps=5)]
    single = [tensor.float() for tensor in inputs]
    output, *state = operator(*inputs)
    expected, *expected_state = operator(*single)
    torch.testing.assert_close(output, expected.to(dtype), **EXACT)
    torch.testing.assert_close(state, expected_state, **EXACT)  # and so they are in float32
    assert {gradient.dtype for gradient in gradients(operator, inputs)} == {dtype}


@both
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_in_chunks_is_the_whole_run(operator, make, dtype):
    x, *coefficients, past, more = (tensor.to(dtype) for tensor in make(steps=9))
    whole, *end = operator(x, *coefficients, past, more)
    first, *state = operator(x[:4], *coefficients, past, more)
    second, *state = operator(x[4:], *coefficients, *state)
    torch.testing.assert_close(torch.cat([first, second]), whole, **EXACT)
    torch.testing.assert_close(state, end, **EXACT)


@both
@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        (torch.float32, FLOAT64, FLOAT64),
        (FLOAT64, torch.float32, FLOAT64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_coefficients_of_two_dtypes_are_promoted(operator, make, one, other, together):
    x, first, *others, past, more = make(steps=5, dtype=torch.float32)
    first, others = first.to(one), [tensor.to(other) for tensor in others]
    inputs = [first, *others]
    promoted = [tensor.to(together) for tensor in inputs]
    torch.testing.assert_close(
        operator(x, *inputs, past, more), operator(x, *promoted, past, more), **EXACT
    )
    found = gradients(operator, [x, *inputs, past, more])
    assert [gradient.dtype for gradient in found[1:-2]] == [one, *[other] * len(others)]


@both
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_coefficients_that_are_no_real_numbers_are_refused(operator, make, dtype):
    x, first, *others = make()
    with pytest.raises(ValueError, match=rf"(alpha|reset_decay) is in {dtype}, expected float32"):
        operator(x, first.to(dtype), *others)


@both
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_under_autocast(operator, make, dtype):
    """The input comes from a matrix product that autocast has rounded."""
    x, *others = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        rounded = x @ torch.eye(x.shape[-1])
        output, *state = operator(rounded, *others)
    assert rounded.dtype == dtype
    expected, *expected_state = operator(rounded.float(), *others)
    torch.testing.assert_close(output, expected, **EXACT)
    torch.testing.assert_close(state, expected_state, **EXACT)


@both
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_autograd(operator, make, context):
    inputs = [tensor.requires_grad_() for tensor in make()]
    expected = operator(*inputs)
    with context():
        results = operator(*inputs)
    torch.testing.assert_close(results, tuple(t.detach() for t in expected), **EXACT)
    assert not any(result.requires_grad for result in results)


@both
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_what_nothing_observes_is_what_the_operator_gives(operator, make, backend, monkeypatch):
    inputs = make(dtype=torch.float32)
    with use_backend(backend):
        short = operator(*inputs)
        for module in (filter_operator, neuron_operator):
            monkeypatch.setattr(module, "can_skip_dispatch", lambda inputs: False)
        torch.testing.assert_close(operator(*inputs), short, **EXACT)


class Names:
    """Lists the names of what is called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def note(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


class Seen(Names, TorchDispatchMode):
    """All operators."""

    __torch_dispatch__ = Names.note


class Called(Names, TorchFunctionMode):
    """All functions."""

    __torch_function__ = Names.note


@both
@pytest.mark.filterwarnings("ignore")  # of torch.jit: it is deprecated, and shapes become constants
def test_whoever_observes_sees_one_operator(operator, make):
    with Seen() as seen, torch.no_grad():
        operator(*make())
    assert sum(name.startswith("snn.") for name in seen.names) == 1
    with torch.profiler.profile() as profile, torch.no_grad():
        operator(*make())
    assert sum(event.name.startswith("snn::") for event in profile.events()) == 1
    with torch._subclasses.FakeTensorMode() as mode, torch.no_grad():
        inputs = [mode.from_tensor(tensor) for tensor in make()]
        assert operator(*inputs)[0].shape == inputs[0].shape
    on_meta = operator(*(tensor.to("meta") for tensor in make()))
    assert on_meta[0].is_meta
    traced = torch.jit.trace(lambda *inputs: operator(*inputs)[0], make(), check_trace=False)
    assert "snn::" in str(traced.graph)
    with torch.no_grad():
        graph = make_fx(lambda *inputs: operator(*inputs)[0], pre_dispatch=True)(*make()).graph
    assert "snn." in str(graph)
    with Called() as called, torch.no_grad():
        operator(*make())
    assert sum("snn." in name for name in called.names) == 1


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_tensor_whose_sign_is_still_to_be_turned(backend):
    """PyTorch has the imaginary part of a conjugate so: with the memory of the opposite number."""
    x = torch.complex(torch.zeros(1, 1, 1), torch.full((1, 1, 1), -2.0)).conj().imag
    assert x.is_neg()
    assert x.is_contiguous()
    one, half = torch.ones(1, 1), torch.full((1,), 0.5)
    with use_backend(backend), torch.no_grad():
        assert iir_filter(x, one, one)[0].item() == 2
        assert spiking_neuron(x, half, half, half)[0].item() == 1


@both
def test_no_autograd_node_per_time_step(operator, make):
    counts = {
        nodes_behind(operator(*(tensor.requires_grad_() for tensor in make(steps=steps)))[0])
        for steps in (2, 50)
    }
    assert len(counts) == 1


@defined
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobians(operator, definition, make, transform):
    inputs = make()
    found = transform(operator, tuple(range(len(inputs))))(*inputs)
    expected = torch.autograd.functional.jacobian(definition, tuple(inputs))
    torch.testing.assert_close(found, expected, **CLOSE)


@defined
def test_forward_mode_is_a_product_with_the_jacobian(operator, definition, make):
    """Of ``torch.func`` and of dual numbers, also where a gradient could be asked for."""
    inputs = make()
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    jacobian = torch.autograd.functional.jacobian(definition, tuple(inputs))
    expected = [
        sum(
            part.flatten(-tensor.dim()) @ tangent.flatten()
            for part, tensor, tangent in zip(row, inputs, tangents, strict=True)
        )
        for row in jacobian
    ]
    outputs, found = torch.func.jvp(operator, tuple(inputs), tangents)
    torch.testing.assert_close(outputs, operator(*inputs), **EXACT)
    torch.testing.assert_close(list(found), expected, **CLOSE)
    with forward_ad.dual_level():
        dual = [
            forward_ad.make_dual(tensor.requires_grad_(), tangent)
            for tensor, tangent in zip(inputs, tangents, strict=True)
        ]
        found = [forward_ad.unpack_dual(output).tangent for output in operator(*dual)]
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("dropout", [0.3, 0.7])
def test_forward_mode_passes_on_what_dropout_does(dropout):
    """The tangents of spikes are dropped and scaled as the spikes are; the reset sees them all."""
    inputs, seed = neuron_inputs(), torch.tensor([5, 0])
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    dropping = partial(run_neuron, dropout=dropout, seed=seed)
    ones = torch.ones_like(inputs[0])
    kept, *_ = dropping(9 * ones, *(torch.zeros_like(tensor) for tensor in inputs[1:]))
    assert set(kept.unique().tolist()) == {0.0, 1 / (1 - dropout)}
    _, whole = torch.func.jvp(run_neuron, inputs, tangents)
    _, found = torch.func.jvp(dropping, inputs, tangents)
    torch.testing.assert_close(found, (whole[0] * kept, *whole[1:]), **CLOSE)


@defined
def test_gradients_of_each_sample(operator, definition, make):
    """``vmap`` over the batch, of ``grad`` for the input and all coefficients."""
    x, *coefficients, past, more = make()
    mapped = 1 if operator is run_filter else 0  # the states' batch dimension

    def loss_of(function):
        def loss(x, past, more, *coefficients):
            states = (state.unsqueeze(mapped) for state in (past, more))
            return sum(o.square().sum() for o in function(x[:, None], *coefficients, *states))

        return loss

    numbers = tuple(range(3 + len(coefficients)))
    in_dims = (1, mapped, mapped, *[None] * len(coefficients))
    found = torch.func.vmap(torch.func.grad(loss_of(operator), numbers), in_dims)(
        x, past, more, *coefficients
    )
    for b in range(x.shape[1]):
        sample = [x[:, b], past.select(mapped, b), more.select(mapped, b), *coefficients]
        leaves = [tensor.clone().requires_grad_() for tensor in sample]
        expected = torch.autograd.grad(loss_of(definition)(*leaves), leaves)
        torch.testing.assert_close([gradient[b] for gradient in found], list(expected), **CLOSE)


@both
def test_second_derivatives_are_refused(operator, make):
    x, *others = make()
    x.requires_grad_()
    (first,) = torch.autograd.grad(operator(x, *others)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backward through snn"):
        first.sum().backward()


@both
@pytest.mark.parametrize("outer", [torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("inner", [torch.func.jacrev, torch.func.jacfwd])
def test_a_derivative_of_a_derivative_is_refused(operator, make, outer, inner):
    x, *others = make(steps=3, batch=1)

    def loss(x):
        return operator(x, *others)[0].square().sum()

    with pytest.raises(NotImplementedError, match=r"second derivative.*snn\."):
        outer(inner(loss))(x)


@both
def test_forward_over_reverse_is_refused(operator, make):
    x, *others = make()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), torch.ones_like(x))
        loss = operator(dual, *others)[0].square().sum()
        with pytest.raises(NotImplementedError, match=r"second derivative.*snn\."):
            torch.autograd.grad(loss, x)


def test_forward_mode_that_would_be_silent_is_refused():
    """The operators called directly, and under the compiler."""
    x, *others = filter_inputs(2, 1)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"forward mode through torch\.ops\.snn"),
    ):
        torch.ops.snn.iir_filter(forward_ad.make_dual(x, x), *others, FLOAT64)
    torch.compiler.reset()

    def tangent(x):
        return torch.func.jvp(lambda x: run_filter(x, *others)[0], (x,), (x,))[1]

    with pytest.raises(Exception, match=r"forward mode through torch\.ops\.snn"):
        torch.compile(tangent, backend="eager", fullgraph=True)(x)


@both
def test_vmap_equals_a_loop(operator, make):
    stacked = [torch.stack(pair) for pair in zip(make(), make(), strict=True)]
    loop = [operator(*(tensor[i] for tensor in stacked)) for i in range(2)]
    expected = tuple(torch.stack(pair) for pair in zip(*loop, strict=True))
    torch.testing.assert_close(torch.func.vmap(operator)(*stacked), expected, **EXACT)


@both
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap_over_one_argument(operator, make, index, dim):
    """An ensemble of coefficients, say, on the same input."""
    inputs = list(make())
    pair = [inputs[index], 0.5 * inputs[index]]
    in_dims = [None] * len(inputs)
    inputs[index], in_dims[index] = torch.stack(pair, dim), dim
    found = torch.func.vmap(operator, tuple(in_dims))(*inputs)
    for number, tensor in enumerate(pair):
        expected = operator(*inputs[:index], tensor, *inputs[index + 1 :])
        torch.testing.assert_close(tuple(part[number] for part in found), expected, **EXACT)


def test_dropout_under_vmap_follows_its_randomness():
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

    def gradient(current):
        return torch.func.grad(lambda current: passed(current).sum())(current)

    torch.manual_seed(5)
    same = torch.func.vmap(gradient, randomness="same")(inputs[0].expand_as(loud))
    torch.manual_seed(5)
    torch.testing.assert_close(same, gradient(inputs[0]).expand_as(same), **EXACT)


@defined
def test_compiled_as_one_graph(operator, definition, make):
    inputs = make()
    torch.compiler.reset()
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled, inputs), gradients(definition, inputs), **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), definition(*inputs), **CLOSE)


def test_the_filter_keeps_only_what_its_gradients_read():
    x, alpha, beta, *_ = filter_inputs(1, 0, steps=100)

    def kept(*trained):
        sizes = []
        for tensor in (x, alpha, beta):
            tensor.requires_grad_(any(tensor is one for one in trained))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()), lambda tensor: tensor
        ):
            iir_filter(x, alpha, beta)
        return sum(size == x.numel() for size in sizes)

    assert [kept(x), kept(x, alpha), kept(x, beta), kept(x, alpha, beta)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("dropout", "surrogate", "dtype"),
    [(0.0, "gaussian", torch.float32), (0.5, "given", torch.float64)],
)
def test_neuron_is_a_well_behaved_operator(dtype, dropout, surrogate):
    *tensors, membrane, reset = (tensor.requires_grad_() for tensor in neuron_inputs(dtype=dtype))
    slope = torch.rand_like(tensors[0]) if surrogate == "given" else None
    settings = (surrogate, 0.4, slope, dropout, torch.tensor([7, 0]))
    opcheck(torch.ops.snn.spiking_neuron.default, (*tensors, membrane, reset, *settings))
    current, *rest = (tensor.detach() for tensor in (*tensors, membrane, reset))
    for needed in ([True] * 6, [True] + [False] * 5):
        opcheck(
            torch.ops.snn.spiking_neuron_backward.default,
            (torch.randn_like(current), rest[-1], rest[-2], current, *rest, *settings, needed),
        )


@pytest.mark.parametrize(
    ("orders", "dtype"),
    [((0, 0), torch.float64), ((2, 0), torch.float32), ((3, 2), torch.float64)],
)
def test_filter_is_a_well_behaved_operator(dtype, orders):
    inputs = [tensor.requires_grad_() for tensor in filter_inputs(*orders, dtype=dtype)]
    opcheck(torch.ops.snn.iir_filter.default, (*inputs, dtype))
    x, alpha, beta, *past = (tensor.detach() for tensor in inputs)
    for needed in ([True] * 5, [True] + [False] * 4):
        opcheck(
            torch.ops.snn.iir_filter_backward.default,
            (
                torch.randn_like(x),
                torch.randn_like(past[0]),
                x,
                alpha,
                beta,
                torch.randn_like(x),
                *past,
                needed,
            ),
        )


# Wrong shapes: each error names the shape given and the one expected, or those it does not fit.


@pytest.mark.parametrize(
    ("index", "shape", "fits"),
    [
        (0, (6, 3), "(T, B, *features)"),
        (0, (6,), "(T, B, *features)"),
        (1, (2, 4), "(6, 2, 3)"),
        (1, (2,), "(6, 2, 3)"),
        (1, (), "(6, 2, 3)"),
        (2, (3, 1), "(6, 2, 3)"),
        (2, (0, 3), "(6, 2, 3)"),
        (3, (1, 2, 3), "(2, 2, 3)"),
        (3, (2, 1, 3), "(2, 2, 3)"),
        (3, (2, 2, 1), "(2, 2, 3)"),
        (4, (2, 3), "(1, 2, 3)"),
        (4, (0, 2, 3), "(1, 2, 3)"),
    ],
)
def test_filter_names_both_shapes(index, shape, fits):
    inputs = list(filter_inputs(2, 1))
    inputs[index] = torch.zeros(shape)
    name = ("x", "alpha", "beta", "past_output", "past_input")[index]
    with pytest.raises(ValueError, match=name) as error:
        run_filter(*inputs)
    assert str(shape) in str(error.value)
    assert fits in str(error.value)


@pytest.mark.parametrize(
    ("index", "shape", "fits"),
    [
        (0, (20, 4), "(T, B, *features)"),
        (1, (1,), "(4,)"),
        (2, (), "(4,)"),
        (3, (4, 1), "(4,)"),
        (4, (1, 4), "(3, 4)"),
        (5, (4,), "(3, 4)"),
    ],
)
def test_neuron_names_both_shapes(index, shape, fits):
    inputs = list(neuron_inputs())
    inputs[index] = torch.zeros(shape)
    names = ("current", "reset_decay", "reset_strength", "membrane_decay", "membrane", "reset")
    with pytest.raises(ValueError, match=names[index]) as error:
        run_neuron(*inputs)
    assert str(shape) in str(error.value)
    assert fits in str(error.value)


def filter_operands():
    """Of the operator and of its backward pass, by name."""
    x, alpha, beta, past_output, past_input = filter_inputs(2, 1, dtype=torch.float32)
    states = {"past_output": past_output, "past_input": past_input}
    forward = {"x": x, "alpha": alpha, "beta": beta, **states, "dtype": torch.float32}
    grad = {"grad_output": x, "grad_last": past_output}
    backward = grad | {"x": x, "alpha": alpha, "beta": beta, "output": x}
    return forward, backward | states | {"needed": [True] * 5}


def neuron_operands():
    names = ["current", "reset_decay", "reset_strength", "membrane_decay", "membrane", "reset"]
    tensors = dict(zip(names, neuron_inputs(dtype=torch.float32), strict=True))
    settings = {"surrogate": "given", "width": 0.0, "slope": tensors["current"], "dropout": 0.0}
    forward = tensors | settings | {"seed": torch.tensor([0, 0])}
    grad = {"grad_membrane": tensors["membrane"], "grad_reset": tensors["reset"]}
    grad = {"grad_spikes": tensors["current"]} | grad
    return forward, grad | forward | {"needed": [True] * 6}


def tensor_operands():
    operators = torch.ops.snn
    for operator, arguments in (
        *zip((operators.iir_filter, operators.iir_filter_backward), filter_operands(), strict=True),
        *zip(
            (operators.spiking_neuron, operators.spiking_neuron_backward),
            neuron_operands(),
            strict=True,
        ),
    ):
        for name, value in arguments.items():
            unread = operator == operators.spiking_neuron and name == "slope"
            if isinstance(value, torch.Tensor) and not unread:
                yield pytest.param(operator, arguments, name, id=f"{operator}-{name}")


@pytest.mark.parametrize(("operator", "arguments", "name"), list(tensor_operands()))
def test_operators_called_directly_check_each_tensor(operator, arguments, name):
    """Their kernels would read out of bounds."""
    operator(*arguments.values())
    tensor = arguments[name]
    for wrong, words in (
        (tensor[..., None], r"\(.*1,?\)"),
        (tensor[..., 1:] if tensor.dim() else tensor[None], r"\(.*\)"),
        (tensor.int(), "torch.int32"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            operator(*(arguments | {name: wrong}).values())
        assert "expected" in str(error.value)
        assert "\n" not in str(error.value)


def test_operators_called_directly_refuse_features_of_two_dimensions():
    with pytest.raises(ValueError, match=r"x has shape \(6, 2, 3, 4\), expected \(T, B, N\)"):
        torch.ops.snn.iir_filter(*filter_inputs(1, 0, features=(3, 4)), FLOAT64)


@both
@pytest.mark.parametrize("wrong", [0, 1, -2, -1])
def test_a_tensor_on_the_meta_device_among_others_is_refused(operator, make, wrong):
    """PyTorch would ask the operator for its shapes alone and return memory that nobody wrote."""
    inputs = list(make())
    inputs[wrong] = inputs[wrong].to("meta")
    with pytest.raises(ValueError, match=r" is on (meta, expected cpu|cpu, expected meta) as "):
        operator(*inputs)


@both
@pytest.mark.parametrize("index", [0, -2, -1])
def test_complex_numbers_are_refused(operator, make, index):
    """A conversion would lose their imaginary parts."""
    inputs = list(make())
    inputs[index] = inputs[index] + 1j
    with pytest.raises(ValueError, match=r" is in torch\.complex128, expected real numbers"):
        operator(*inputs)


@both
@pytest.mark.parametrize("index", [0, 1, -1])
@pytest.mark.parametrize("convert", [torch.Tensor.numpy, torch.Tensor.tolist])
def test_what_is_no_tensor_is_refused(operator, make, index, convert):
    inputs = list(make())
    inputs[index] = convert(inputs[index])
    kind = type(inputs[index]).__name__
    with pytest.raises(TypeError, match=f"is a {kind}, expected a tensor"):
        operator(*inputs)


def test_operators_called_directly_refuse_a_surrogate_that_is_not_compiled():
    _, arguments = neuron_operands()
    for surrogate, slope in (("arctan", None), ("given", None)):
        with pytest.raises(ValueError, match=f"surrogate is '{surrogate}', expected gaussian"):
            torch.ops.snn.spiking_neuron_backward(
                *(arguments | {"surrogate": surrogate, "slope": slope}).values()
            )


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, math.nan])
def test_dropout_outside_its_range_is_refused(dropout):
    with pytest.raises(ValueError, match=r"dropout .* \[0, 1\)"):
        run_neuron(*neuron_inputs(), dropout=dropout)


def test_the_operator_asks_for_a_seed_only_with_dropout():
    current, state = torch.full((2, 1, 3), 2.0), torch.zeros(1, 3)
    tensors = current, *torch.zeros(3, 3), state, state
    spikes, *_ = torch.ops.snn.spiking_neuron(*tensors, "gaussian", 0.4, None, 0.0, None)
    assert torch.equal(spikes, torch.ones(2, 1, 3))
    with pytest.raises(ValueError, match="seed is None"):
        torch.ops.snn.spiking_neuron(*tensors, "gaussian", 0.4, None, 0.5, None)

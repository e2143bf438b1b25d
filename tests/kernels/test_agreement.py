"""Every backend computes what ``eager`` computes, on the same cases.

The cases of the ``cuda`` backend run on the GPU. Where there is none they run in a process of their
own, through Triton's interpreter, which has to be chosen before triton is imported.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from snn_lib import FastSigmoid, Gaussian, use_backend
from snn_lib.functional import iir_filter, spiking_neuron
from snn_lib.kernels import eager
from snn_lib.kernels.check import Draw

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the tensor's largest magnitude
GPU = torch.cuda.is_available()
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
DROPOUT_SEED = [0x1234_5678_9ABC_DEF0, 3]  # the key, and the first element's number

ORDERS = [(0, 0), (1, 0), (2, 0), (2, 1), (3, 2)]
LAYOUTS = [  # (T, B, N) and how the input lies in memory
    ((9, 3, 7), "contiguous"),
    ((3, 2, 70), "constant in time"),
    ((2, 2, 70), "transposed"),
    ((1, 2, 1), "contiguous"),
    ((2, 33, 3), "constant in time"),  # with a last tile that is not full
]
EMPTY = [((0, 2, 7), "contiguous"), ((3, 0, 7), "contiguous")]


@pytest.fixture(params=["cpu", "cuda"])
def name(request):
    return request.param


@pytest.fixture
def backend(name):
    if name != "eager":
        pytest.importorskip({"cpu": "numba", "cuda": "triton"}[name], exc_type=ImportError)
    if name == "cuda" and not (GPU or INTERPRETER):
        pytest.skip("no GPU; runs through Triton's interpreter in test_triton_interpreter")
    return importlib.import_module(f"snn_lib.kernels.{name}")


every_backend = pytest.mark.parametrize("name", ["eager", "cpu", "cuda"])


@pytest.fixture
def draw(name, dtype):
    """Draws normally distributed tensors, on the backend's device, the same in every run."""
    return Draw(dtype, "cuda" if name == "cuda" and GPU else "cpu")


def assert_agree(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        if e.dtype == torch.bfloat16:  # the neighbouring number where the sums round differently
            torch.testing.assert_close(a, e, rtol=2**-7, atol=1e-5)
            continue
        scale = e.abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(a, e, rtol=0.0, atol=TOLERANCE[e.dtype] * scale)


def filter_case(draw, order, shape, layout, zero_state=False):
    """Arguments of ``filter_forward`` but the last: a stable filter, its input and state."""
    (p, q), (_, batch, channels) = order, shape
    alpha = 0.9 * torch.tanh(draw(p, channels)) / max(p, 1)
    state = draw(p, batch, channels), draw(q, batch, channels)
    if zero_state:
        state = tuple(draw(1)[0].mul(0.0).expand(past.shape) for past in state)
    return draw(*shape, layout=layout), alpha, draw(q + 1, channels), *state


def neuron_case(draw, shape, layout, zero_state=False):
    """The first six arguments of ``neuron_forward``, with currents around the threshold.

    The membrane filters in every other channel.
    """
    _, batch, channels = shape
    theta, strength, decay = (torch.sigmoid(draw(channels)) for _ in range(3))
    state = draw(batch, channels), draw(batch, channels)
    if zero_state:
        state = (draw(1)[0].mul(0.0).expand(batch, channels),) * 2
    decay[1::2] = 0.0
    return 1.0 + draw(*shape, layout=layout), theta, strength, decay, *state


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("case", LAYOUTS + EMPTY, ids=str)
def test_filter(backend, draw, order, case):
    shape, layout = case
    arguments = x, alpha, beta, *past = filter_case(draw, order, shape, layout, order == (2, 0))
    output, last = eager.filter_forward(*arguments, x.dtype)
    assert_agree(backend.filter_forward(*arguments, x.dtype), [output, last])
    gradients = draw(*shape, layout=layout), draw(*last.shape)
    arguments = *gradients, x, alpha, beta, output, *past, [True] * 5
    assert_agree(backend.filter_backward(*arguments), eager.filter_backward(*arguments))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_filter_with_coefficients_that_are_alike_for_all_lags(backend, draw):
    """A moving average, say, whose coefficients lie in memory once."""
    x, _, _, *past = filter_case(draw, (3, 2), (5, 3, 7), "contiguous")
    alpha, beta = (coefficient.expand(3, 7) for coefficient in (0.2 * draw(1, 7), draw(1, 7)))
    output, last = eager.filter_forward(x, alpha, beta, *past, x.dtype)
    assert_agree(backend.filter_forward(x, alpha, beta, *past, x.dtype), [output, last])
    arguments = draw(5, 3, 7), draw(3, 3, 7), x, alpha, beta, output, *past, [True] * 5
    assert_agree(backend.filter_backward(*arguments), eager.filter_backward(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("order", [(2, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("case", LAYOUTS + EMPTY, ids=str)
def test_filter_between_products_in_bfloat16(backend, draw, order, case):
    """What goes to the matrix product and comes back from it is in bfloat16."""
    shape, layout = case
    arguments = x, alpha, beta, *past = filter_case(draw, order, shape, layout)
    output, last = eager.filter_forward(*arguments, torch.bfloat16)
    assert output.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    assert_agree(backend.filter_forward(*arguments, torch.bfloat16), [output, last])
    gradients = draw(*shape, layout=layout).bfloat16(), draw(*last.shape)
    arguments = *gradients, x, alpha, beta, output, *past, [True] * 5
    assert_agree(backend.filter_backward(*arguments), eager.filter_backward(*arguments))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("surrogate", "dropout"), [("gaussian", 0.0), ("fast_sigmoid", 0.3), ("given", 0.3)]
)
@pytest.mark.parametrize("case", LAYOUTS + EMPTY, ids=str)
def test_neuron(backend, draw, surrogate, dropout, case):
    shape, layout = case
    neuron = neuron_case(draw, shape, layout, zero_state=shape[1] == 3)
    seed = torch.tensor(DROPOUT_SEED, device=neuron[0].device)
    spikes, *state = backend.neuron_forward(*neuron, dropout, seed)
    expected_spikes, *expected_state = eager.neuron_forward(*neuron, dropout, seed)
    assert torch.equal(spikes, expected_spikes)
    assert_agree(state, expected_state)

    gradients = draw(*shape, layout=layout), draw(*shape[1:]), draw(*shape[1:])
    slope = draw(*shape, layout=layout) if surrogate == "given" else None
    arguments = *gradients, *neuron, surrogate, 0.4, slope, dropout, seed, [True] * 6
    assert_agree(backend.neuron_backward(*arguments), eager.neuron_backward(*arguments))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("surrogate", [Gaussian(), FastSigmoid()], ids=lambda s: s.name)
def test_what_is_not_finite_is_not_hidden(backend, draw, surrogate):
    current, *neuron = neuron_case(draw, (6, 2, 9), "contiguous")
    current[2, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    seed = torch.tensor(DROPOUT_SEED, device=current.device)
    gradients = draw(6, 2, 9), draw(2, 9), draw(2, 9)
    options = surrogate.name, surrogate.width, None, 0.0, seed, [True] * 6
    found = backend.neuron_backward(*gradients, current, *neuron, *options)
    expected = eager.neuron_backward(*gradients, current, *neuron, *options)
    assert expected[0][:3, 0, 0].isnan().all()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("case", LAYOUTS + EMPTY, ids=str)
def test_neuron_between_products_in_bfloat16(backend, draw, case):
    shape, layout = case
    current, *neuron = neuron_case(draw, shape, layout)
    neuron = current.bfloat16(), *neuron
    seed = torch.tensor(DROPOUT_SEED, device=current.device)
    spikes, *state = backend.neuron_forward(*neuron, 0.3, seed)
    expected_spikes, *expected_state = eager.neuron_forward(*neuron, 0.3, seed)
    assert torch.equal(spikes, expected_spikes)
    assert spikes.dtype == torch.float32
    assert_agree(state, expected_state)

    gradients = draw(*shape, layout=layout), draw(*shape[1:]), draw(*shape[1:])
    arguments = *gradients, *neuron, "gaussian", 0.4, None, 0.3, seed, [True] * 6
    expected = eager.neuron_backward(*arguments)
    assert expected[0].dtype == torch.bfloat16
    assert_agree(backend.neuron_backward(*arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_rounding_to_bfloat16_is_that_of_pytorch(backend, draw):
    """To the nearest, to the even one on a tie, and neither nan nor infinity is lost."""
    if backend.__name__.endswith("cuda") and INTERPRETER:
        pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding it")
    values = torch.tensor([1.0, 1.00390625, 1.01171875, 3.3895314e38, torch.inf, torch.nan])
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)  # nans
    x = torch.cat([values, -values, bits, draw(50).cpu()]).view(1, 1, -1).to(draw(1).device)
    one, none = torch.ones_like(x[0]), x[:0]
    output, _ = backend.filter_forward(x, one[:0], one, none, none, torch.bfloat16)
    torch.testing.assert_close(output, x.bfloat16(), rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
@pytest.mark.parametrize("wanted", range(6))
def test_gradients_not_needed_are_empty(backend, draw, wanted):
    """Each gradient alone; the tensors that it does not depend on may then be anything."""
    shape = (3, 2, 7)
    neuron, grad = neuron_case(draw, shape, "contiguous"), draw(*shape)
    needed = [index == wanted for index in range(6)]
    seed = torch.tensor([0, 0], device=grad.device)
    arguments = grad, *draw(2, 2, 7), *neuron, "gaussian", 0.4, None, 0.0, seed, needed
    assert_agree(backend.neuron_backward(*arguments), eager.neuron_backward(*arguments))

    needed = needed[:5]  # none of them, the last time
    x, alpha, beta, *past = filter_case(draw, (2, 1), shape, "contiguous")
    output = draw(*shape) if needed[1] else beta
    x = x if needed[2] else beta
    arguments = grad, draw(2, 2, 7), x, alpha, beta, output, *past, needed
    assert_agree(backend.filter_backward(*arguments), eager.filter_backward(*arguments))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dropout", [0.25, 0.7])
def test_dropout_mask(backend, draw, dropout):
    """Neurons that always fire show the whole mask."""
    shape = (3, 2, 70)
    one, zero = torch.ones_like(draw(70)), torch.zeros_like(draw(70))
    state = (zero.expand(2, 70),) * 2
    seed = torch.tensor(DROPOUT_SEED, device=one.device)
    spikes, *_ = backend.neuron_forward(
        2.0 * one.expand(shape), one, zero, zero, *state, dropout, seed
    )
    mask = eager.dropout_scale(spikes, dropout, seed)
    assert torch.equal(spikes, mask)
    assert 0.0 < mask.count_nonzero() / mask.numel() < 1.0


@every_backend
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_threshold_is_strict(backend, draw, dtype):
    above = torch.nextafter(torch.ones((), dtype=dtype), torch.full((), 2.0, dtype=dtype))
    current = torch.stack([torch.ones_like(above), above]).view(1, 1, 2).to(draw(1).device)
    zero = torch.zeros_like(current[0, 0])
    seed = torch.tensor([0, 0], device=current.device)
    spikes, *_ = backend.neuron_forward(current, *[zero] * 3, *[zero[None]] * 2, 0.0, seed)
    assert spikes.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_state", [False, True])
def test_public_functions(name, backend, draw, with_state):
    """Forward and backward through autograd, with features of two dimensions."""
    x, alpha, beta, *past = filter_case(draw, (2, 1), (4, 3, 6), "transposed")
    current, *coefficients, membrane, reset = neuron_case(draw, (4, 3, 6), "constant in time")
    sequences = [tensor.unflatten(-1, (2, 3)) for tensor in (x, current)]
    filters = [tensor.unflatten(-1, (2, 3)) for tensor in (alpha, beta)]
    neurons = [tensor.unflatten(-1, (2, 3)) for tensor in coefficients]
    states = [tensor.unflatten(-1, (2, 3)) for tensor in (*past, membrane, reset)]
    inputs = [*sequences, *filters, *neurons, *(states if with_state else ())]

    def run(backend_name):
        x, current, alpha, beta, *coefficients = leaves = [
            tensor.detach().requires_grad_() for tensor in inputs
        ]
        filter_state = neuron_state = None
        if with_state:
            *coefficients, past_output, past_input, membrane, reset = coefficients
            filter_state, neuron_state = (past_output, past_input), (membrane, reset)
        torch.manual_seed(0)  # for dropout
        with use_backend(backend_name):
            psp, filter_state = iir_filter(x, alpha, beta, filter_state)
            spikes, neuron_state = spiking_neuron(
                current, *coefficients, neuron_state, FastSigmoid(), dropout=0.3
            )
            outputs = psp, *filter_state, spikes, *neuron_state
            loss = sum((output * output).sum() for output in outputs)
            return outputs, torch.autograd.grad(loss, leaves)

    for actual, expected in zip(run(name), run("eager"), strict=True):
        assert_agree(actual, expected)


@pytest.mark.skipif(GPU or INTERPRETER, reason="the cuda cases run in this process")
def test_triton_interpreter():
    """The cuda cases on a machine without a GPU."""
    pytest.importorskip("triton", exc_type=ImportError)
    options = "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "cuda"
    here = Path(__file__)
    files = here, here.with_name("test_check.py"), here.parents[1] / "test_golden.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    # the rounding to bfloat16
    assert re.search(r"\b1 skipped\b", result.stdout), result.stdout


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 3, 7), (2, 2, 34)], ids=str)
def test_given_slopes_serve_as_those_of_a_surrogate(backend, draw, shape):
    current, *coefficients, membrane, reset = neuron_case(draw, shape, "contiguous")
    seed = torch.tensor(DROPOUT_SEED, device=current.device)
    membranes, state = [], (membrane, reset)
    for step in current.split(1):
        _, *state = eager.neuron_forward(step, *coefficients, *state, 0.0, seed)
        membranes.append(state[0])
    slope = Gaussian().derivative(torch.stack(membranes, -1)).movedim(-1, 0)  # time last in memory

    gradients = draw(*shape), draw(*shape[1:]), draw(*shape[1:])
    arguments = *gradients, current, *coefficients, membrane, reset
    rest = 0.3, seed, [True] * 6
    actual = backend.neuron_backward(*arguments, "given", 0.0, slope, *rest)
    assert_agree(actual, backend.neuron_backward(*arguments, "gaussian", 0.4, None, *rest))

    constant = draw(1, *shape[1:]).expand(shape)
    actual, expected = (
        one.neuron_backward(*arguments, "given", 0.0, slope, *rest)
        for one, slope in ((backend, constant), (eager, constant.contiguous()))
    )
    assert_agree(actual, expected)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_gradients_of_coefficients_are_summed_in_double_precision(backend, draw):
    """Of terms that cancel, between which single precision loses the small ones."""
    zero, one = draw(1).mul(0.0), draw(1).mul(0.0).add(1.0)
    state = zero.expand(1, 1)

    terms = torch.tensor([2.0**30, 1.0, 1.0, -(2.0**30)], device=zero.device).view(-1, 1, 1)
    ones, past = one.expand(4, 1, 1), one.expand(1, 1, 1)
    filter_ = state, one.expand(1, 1), ones, past, past[:0]  # alpha is 0
    _, grad_alpha, grad_beta, *_ = backend.filter_backward(
        terms, zero.expand(1, 1, 1), ones, *filter_, [True] * 5
    )
    assert (grad_alpha.item(), grad_beta.item()) == (2.0, 2.0)

    # Theta and lambda are 0, v_reset is 1: after the first step R is 1, and V is 2. The slope is
    # 0 in every other step, in which nothing flows back: v[t] is a term, r[t] its negative.
    slope = (one * torch.tensor([1.0, 0.0], device=zero.device)).repeat(5).view(-1, 1, 1)
    grad_spikes = torch.cat([state[None], terms]).repeat_interleave(2, 0)
    neuron = 3.0 * one.expand(10, 1, 1), zero, one, zero, state, state
    seed = torch.tensor([0, 0], device=zero.device)
    _, *sums, _, _ = backend.neuron_backward(
        grad_spikes, state, state, *neuron, "given", 0.0, slope, 0.0, seed, [True] * 6
    )
    assert [total.item() for total in sums] == [-2.0, -2.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_sums_over_the_batch_are_in_double_precision(backend, draw):
    """Also between the programs, or groups of batch rows, that sum a part of it each."""
    ones, none = torch.ones_like(draw(1, 64, 1)), draw(0, 64, 1)
    terms = 0.0 * ones
    for row, term in {0: 2.0**30, 1: 1.0, 62: 1.0, 63: -(2.0**30)}.items():
        terms[0, row] = term
    coefficients = ones[:0, 0], ones[0, :1]
    _, _, grad_beta, *_ = backend.filter_backward(
        terms, none, ones, *coefficients, ones, none, none, [True] * 5
    )
    assert grad_beta.item() == 2.0

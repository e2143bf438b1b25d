"""Weights that receive spikes: what is zero is left out, and nothing else changes."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.library import opcheck
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("llvmlite")

from snn_lib import (
    ChannelsFirst,
    Chunked,
    LowPassSynapse,
    PerStep,
    Sequential,
    SpikingNeuron,
    use_backend,
)
from snn_lib.kernels.cpu import convolutions as patches
from snn_lib.kernels.cpu import products as kernels
from snn_lib.kernels.cpu.products import BLOCK, ROWS
from snn_lib.products import SkippingZeros, linear

INPUTS, OUTPUTS = 130, 200  # neither is a multiple of what the kernels take at once
CHANNELS, MAPS = 25, 37  # nor is either of these, of convolutions
STEPS, BATCH = 6, 4


@pytest.fixture(autouse=True)
def without_tiles(monkeypatch):
    """A CPU that multiplies tiles of bfloat16 runs the kernels of others here."""
    monkeypatch.setattr(kernels, "has", lambda feature: False)


@pytest.fixture
def calls(monkeypatch):
    """The kernels that were called, and with how many rows."""
    found = []
    for module, name in [
        *((kernels, name) for name in ("weigh", "gradient")),
        *((patches, name) for name in ("convolve", "gradient")),
    ]:
        kernel = getattr(module, name)

        def call(first, *others, name=name, kernel=kernel):
            found.append((name, len(first)))
            return kernel(first, *others)

        monkeypatch.setattr(module, name, call)
    return found


def spikes(*shape, rate=0.1):
    """Zeros and, at a rate, numbers of either sign, of which most are one."""
    fired = torch.rand(shape) < rate
    return fired * torch.where(torch.rand(shape) < 0.2, torch.randn(shape), 1.0)


def assert_nearly_exact(found, expected, given, exact, direction):
    """A result and its gradients are those in float64, but for the rounding of their sums."""
    gradients = torch.autograd.grad(found, given, direction)
    expected_gradients = torch.autograd.grad(expected, exact, direction.double())
    unit = torch.finfo(found.dtype).eps
    for one, other in zip((found, *gradients), (expected, *expected_gradients), strict=True):
        assert one.shape == other.shape
        scale = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(one.double(), other, rtol=unit, atol=16 * unit * scale)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


@given(
    rows=st.integers(1, 3 * ROWS),
    inputs=st.integers(64, 700),
    outputs=st.integers(128, 400),
    rate=st.sampled_from([0.0, 0.02, 0.2, 0.5, 0.6, 1.0]),
    back=st.sampled_from([0.02, 0.5, 1.0]),
    layout=st.sampled_from([*LAYOUTS]),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
@example(0, 64, 128, 0.1, 1.0, "contiguous", True, torch.float32, 0)
@example(1, 64, 128, 1.0, 1.0, "contiguous", True, torch.float32, 0)
@example(2 * BLOCK + 1, 2 * BLOCK + 1, 128, 0.1, 0.1, "contiguous", False, torch.float32, 0)
def test_products_and_their_gradients_are_pytorch_s(
    rows, inputs, outputs, rate, back, layout, biased, dtype, seed
):
    torch.manual_seed(seed)
    x = (
        LAYOUTS[layout](spikes(rows, inputs, rate=rate)).to(dtype)
        if rows
        else torch.ones(0, inputs)
    )
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs) if biased else None
    given = [None if one is None else one.to(dtype).requires_grad_() for one in (x, weight, bias)]
    exact = [None if one is None else one.detach().double().requires_grad_() for one in given]
    found, expected = linear(*given), F.linear(*exact)
    direction = (torch.randn(rows, outputs) * (torch.rand(rows, outputs) < back)).to(dtype)
    assert found.dtype == dtype
    leaves = [[one for one in side if one is not None] for side in (given, exact)]
    assert_nearly_exact(found, expected, *leaves, direction)


def test_the_gradient_of_many_spikes_is_left_to_pytorch(calls):
    weight = torch.randn(OUTPUTS, INPUTS, requires_grad=True)
    for rate in (0.1, 0.9):
        linear(spikes(50, INPUTS, rate=rate), weight).sum().backward()
    assert [name for name, _ in calls] == ["weigh", "gradient", "weigh"]


def test_weights_of_zeros_are_not_read():
    weight = torch.full((OUTPUTS, INPUTS), torch.nan)
    weight[:, 0] = 2.0
    x = torch.zeros(1, INPUTS)
    x[0, 0] = 3.0
    assert torch.equal(linear(x, weight), torch.full((1, OUTPUTS), 6.0))


def test_the_gradient_of_the_input_reads_no_weights_of_zeros_in_that_of_the_output(calls):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = spikes(1, INPUTS), torch.full((OUTPUTS, INPUTS), torch.nan)
        weight[3] = torch.arange(INPUTS)
        direction = torch.zeros(1, OUTPUTS)
        direction[0, 3] = 2.0
        x, weight, direction = (one.to(dtype) for one in (x, weight, direction))
        (found,) = torch.autograd.grad(linear(x.requires_grad_(), weight), x, direction)
        left_out = dtype == torch.float32
        assert torch.equal(found, 2 * weight[3:4]) == left_out
        assert [name for name, _ in calls] == ["weigh"] * (1 + left_out)
        calls.clear()


def test_under_autocast_weights_are_rounded_and_sums_are_not():
    x, layer = spikes(40, INPUTS), nn.Linear(INPUTS, OUTPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(x, layer.weight, layer.bias)
    rounded = layer.weight.bfloat16().double()
    exact = F.linear(x.double(), rounded, layer.bias.double())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)
    found.float().square().sum().backward()
    expected = 2 * found.detach().double().t() @ x.double()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=2**-7, atol=1e-2)


def test_another_backend_may_serve_the_backward_pass():
    x, weight = spikes(40, INPUTS), torch.randn(OUTPUTS, INPUTS, requires_grad=True)
    output = linear(x, weight)
    with use_backend("eager"):
        (found,) = torch.autograd.grad(output.square().sum(), weight)
    torch.testing.assert_close(found, 2 * output.detach().t() @ x, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("learns", [0, 1])
def test_a_tensor_that_no_gradient_reads_may_be_changed_in_place(learns):
    given, found = (spikes(9, INPUTS), torch.randn(OUTPUTS, INPUTS)), []
    for function in (linear, F.linear):
        copies = [one.clone() for one in given]
        output = function(*copies[:learns], copies[learns].requires_grad_(), *copies[learns + 1 :])
        with torch.no_grad():
            copies[learns].zero_()
        found += torch.autograd.grad(output.sum(), copies[learns])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_the_operators_of_products_pass_pytorch_s_checks():
    x, weight = spikes(9, INPUTS), torch.randn(OUTPUTS, INPUTS, requires_grad=True)
    opcheck(torch.ops.snn.weigh.default, (x, weight, torch.randn(OUTPUTS, requires_grad=True)))
    opcheck(torch.ops.snn.weigh_backward.default, (torch.randn(9, OUTPUTS), x, torch.tensor(9)))


def test_the_operator_multiplies_densely_where_there_is_no_kernel(calls):
    x, weight, bias = spikes(9, 5), torch.randn(3, 5).bfloat16().requires_grad_(), torch.randn(3)
    output, fired = torch.ops.snn.weigh(x, weight, bias)
    (found,) = torch.autograd.grad(output.sum(), weight)
    assert torch.equal(output, F.linear(x.bfloat16(), weight, bias.bfloat16()))
    assert torch.equal(found, x.bfloat16().sum(0).expand(3, 5))
    assert fired == x.count_nonzero()
    assert calls == []


ONES = torch.ones(3, INPUTS)


@pytest.mark.parametrize(
    ("function", "x", "words"),
    [
        (torch.ops.snn.weigh, torch.ones(3, INPUTS - 1), "shapes"),
        (torch.ops.snn.weigh, torch.ones(3, INPUTS + 1), "shapes"),
        (linear, torch.ones(3, 5), "shapes"),
        (linear, ONES.bfloat16(), "dtype"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_as_by_pytorch(function, x, words):
    with pytest.raises(RuntimeError, match=words):
        function(x, torch.ones(OUTPUTS, INPUTS), None)


# Where PyTorch multiplies


class Marked(torch.Tensor):
    """A tensor of a user's own class."""


class Counting(FlopCounterMode):
    """A mode that goes on at work within a backward pass."""

    def __init__(self):
        super().__init__(display=False)


class Watching(TorchFunctionMode):
    """A user's own mode, which sees every function."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def in_mode(function, *given):
    with Watching():
        return function(*given)


def on_eager(function, *given):
    with use_backend("eager"):
        return function(*given)


OTHERS = {
    "float64": lambda f, x, w: f(x.double(), w.double()),
    "few inputs": lambda f, x, w: f(x[:, :63], w[:, :63]),
    "one column": lambda f, x, w: f(x, w[:1]),
    "sparse weights": lambda f, x, w: f(x, w.to_sparse_csr()),
    "a tensor's subclass": lambda f, x, w: f(x, w.as_subclass(Marked)),
    "vmap": lambda f, x, w: torch.func.vmap(f, (0, None))(x[:, None], w),
    "jvp": lambda f, x, w: torch.func.jvp(lambda w: f(x, w), (w,), (w,))[1],
    "grad": lambda f, x, w: torch.func.grad(lambda w: f(x, w).sum())(w),
    "compile": lambda f, x, w: torch.compile(f, backend="eager")(x, w),
    "a mode": in_mode,
    "backend": on_eager,
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("situation", [*OTHERS])
def test_all_other_products_are_left_to_pytorch(situation, calls):
    x, weight, use = spikes(5, INPUTS), torch.randn(OUTPUTS, INPUTS), OTHERS[situation]
    assert torch.equal(use(linear, x, weight), use(F.linear, x, weight))
    assert calls == []


# In a Sequential


def behind(*modules):
    """A network with ``modules``, the last of which weighs 130 channels, behind 130 neurons."""
    return Sequential(SpikingNeuron(INPUTS, 4.0, dropout=0.2), *modules)


def current(steps=STEPS):
    """An input that is mostly zero, with which neurons fire."""
    return 1.5 * (torch.rand(steps, BATCH, INPUTS) < 0.2)


class Own(nn.Linear):
    """A layer whose own forward changes the weights, and calls PyTorch by keywords."""

    def forward(self, x):
        return F.linear(input=x, weight=2 * self.weight, bias=self.bias)


class OwnMaps(nn.Conv2d):
    """The same as a convolution."""

    def forward(self, x):
        return F.conv2d(input=x, weight=2 * self.weight, bias=self.bias)


def pruned():
    return prune.l1_unstructured(nn.Linear(INPUTS, OUTPUTS), "weight", 0.5)


SKIPPING = {
    "behind a neuron": lambda: behind(nn.Linear(INPUTS, OUTPUTS)),
    "without a bias": lambda: behind(nn.Linear(INPUTS, OUTPUTS, bias=False)),
    "behind flattened spikes": lambda: behind(nn.Flatten(2), nn.Linear(INPUTS, OUTPUTS)),
    "an input": lambda: Sequential(nn.Linear(INPUTS, OUTPUTS)),
    "parametrized": lambda: behind(parametrizations.weight_norm(nn.Linear(INPUTS, OUTPUTS))),
    "pruned": lambda: behind(pruned()),
    "of one's own": lambda: behind(Own(INPUTS, OUTPUTS)),
    "joined": lambda: Sequential(
        LowPassSynapse(INPUTS, 4.0), SpikingNeuron(INPUTS, 4.0), nn.Linear(INPUTS, OUTPUTS)
    ),
}


@pytest.mark.parametrize("situation", [*SKIPPING])
def test_weights_of_spikes_leave_out_zeros_and_give_pytorch_s_result(situation, calls):
    model, x = SKIPPING[situation](), current()
    names = [*model.state_dict()]
    found = []
    for way in ("auto", "eager"):
        torch.manual_seed(1)
        with use_backend(way):
            output, _ = model(x)
            found.append([output, *torch.autograd.grad(output.square().sum(), model.parameters())])
    torch.testing.assert_close(*found)
    back = ["weigh"] * (situation == "joined")  # to the filter before the neuron, which learns
    assert calls == [(name, STEPS * BATCH) for name in ("weigh", *back, "gradient")]
    assert [*model.state_dict()] == names


@pytest.mark.parametrize(
    "modules",
    [
        (LowPassSynapse(INPUTS, 4.0), nn.Linear(INPUTS, OUTPUTS)),
        (nn.Tanh(), nn.Linear(INPUTS, OUTPUTS)),
        (PerStep(nn.Linear(INPUTS, OUTPUTS)),),
        (torch.compile(nn.Linear(INPUTS, OUTPUTS), backend="eager"),),
    ],
    ids=["filter", "activation", "PerStep", "compiled"],
)
def test_weights_behind_other_layers_multiply_as_pytorch_does(modules, calls):
    behind(*modules)(current())
    assert calls == []


def test_in_bfloat16_an_input_that_comes_from_no_neuron_is_left_to_pytorch(calls):
    weights = nn.Linear(INPUTS, OUTPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        Sequential(weights)(current())
        assert calls == []
        behind(weights)(current())
    assert calls == [("weigh", STEPS * BATCH)]


def test_a_cpu_that_multiplies_tiles_of_bfloat16_does_so(calls, monkeypatch):
    monkeypatch.setattr(kernels, "has", lambda feature: feature == "amx-bf16")
    network = behind(nn.Linear(INPUTS, OUTPUTS))
    with torch.autocast("cpu", torch.bfloat16):
        network(current())
    assert calls == []
    network(current())
    assert calls == [("weigh", STEPS * BATCH)]


def test_hooks_see_the_same_tensors_and_change_nothing(calls):
    model, x, seen = behind(nn.Linear(INPUTS, OUTPUTS)).eval(), current(), []
    expected, _ = model(x)
    model[1].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    model[1].register_forward_hook(lambda *given: seen.append(given[2].shape))
    model[1].register_full_backward_hook(lambda *given: seen.append(given[2][0].shape))
    output, _ = model(x.requires_grad_())
    output.sum().backward()
    assert torch.equal(output, expected)
    assert seen == [(STEPS, BATCH, INPUTS), *[(STEPS, BATCH, OUTPUTS)] * 2]
    assert [name for name, _ in calls] == ["weigh", "weigh", "weigh", "gradient"]


def test_compiled_and_exported_networks_multiply_as_pytorch_does():
    model, x = behind(nn.Linear(INPUTS, OUTPUTS)).eval(), current()
    expected, _ = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x)[0], expected)
    program = torch.export.export(model, (x,))
    assert not [node for node in program.graph.nodes if str(node.target).startswith("snn.weigh")]
    torch.testing.assert_close(program.module()(x)[0], expected)


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_a_network_in_chunks_has_the_bits_of_the_whole_run(rate):
    model = Sequential(
        nn.Linear(INPUTS, OUTPUTS),
        LowPassSynapse(OUTPUTS, 4.0),
        SpikingNeuron(OUTPUTS, 4.0, dropout=0.2),
        nn.Linear(OUTPUTS, 150),
        SpikingNeuron(150, 4.0),
    )
    for layer in (model[0], model[3]):
        nn.init.normal_(layer.weight, 0.0, 0.2)
    x, found = (torch.rand(23, 3, INPUTS) < rate).float(), []
    for run in (model, Chunked(model, 1), Chunked(model, 5)):
        torch.manual_seed(1)
        output, state = run(x)
        gradients = torch.autograd.grad(output.square().sum(), model.parameters())
        found.append([output, *state[1], *state[2], *state[4], gradients])
    assert 0.02 < found[0][0].mean() < 0.6
    for other in found[1:]:
        *bits, gradients = other
        assert all(torch.equal(*pair) for pair in zip(found[0][:-1], bits, strict=True))
        torch.testing.assert_close(gradients, found[0][-1], rtol=1e-4, atol=1e-3)


def eager():
    return use_backend("eager")


@pytest.mark.parametrize(
    "contexts",
    [(Watching, nullcontext), (nullcontext, Counting), (eager, nullcontext), (nullcontext, eager)],
)
def test_a_chunk_runs_again_as_before_though_the_mode_or_backend_has_changed(contexts):
    neurons = SpikingNeuron((CHANNELS, 2, 5), 4.0)
    convolution = PerStep(nn.Conv2d(CHANNELS, MAPS, 2))
    model = behind(
        nn.Linear(INPUTS, 10 * CHANNELS), nn.Unflatten(2, neurons.shape), neurons, convolution
    )
    model, x = model.eval(), current()
    expected = torch.autograd.grad(model(x)[0].square().sum(), model.parameters())
    forward, backward = contexts
    with forward():
        output, _ = Chunked(model, 2)(x)
    with backward():
        found = torch.autograd.grad(output.square().sum(), model.parameters())
    torch.testing.assert_close(found, expected)


# Convolutions


def conv2d(*given, **options):
    with SkippingZeros(known=True):
        return F.conv2d(*given, **options)


def maps(images, channels, height, width, rate=0.1):
    """Maps of spikes, whose channels lie last in memory."""
    return spikes(images, height, width, channels, rate=rate).movedim(-1, 1)


@st.composite
def convolutions(draw):
    """Height or width of maps, its patch and its padding."""
    length = draw(st.integers(1, 4))
    padding = draw(st.integers(0, length - 1))
    return draw(st.integers(max(1, length - 2 * padding), 9)), length, padding


@given(
    images=st.integers(1, 20),
    inputs=st.integers(16, 70),
    outputs=st.integers(16, 70),
    vertical=convolutions(),
    horizontal=convolutions(),
    rate=st.sampled_from([0.0, 0.02, 0.2, 1.0]),
    back=st.sampled_from([0.02, 0.2, 1.0]),
    biased=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(0, 16, 16, (5, 3, 1), (5, 3, 1), 0.1, 0.1, True, 0)
@example(17, 64, 128, (7, 3, 1), (7, 3, 1), 0.1, 0.1, True, 0)
def test_convolutions_and_their_gradients_are_pytorch_s(
    images, inputs, outputs, vertical, horizontal, rate, back, biased, seed
):
    torch.manual_seed(seed)
    (height, *_), (width, *_) = vertical, horizontal
    patch, padding = zip(vertical[1:], horizontal[1:], strict=True)
    given = [maps(images, inputs, height, width, rate), torch.randn(outputs, inputs, *patch)]
    given = [one.requires_grad_() for one in [*given, *[torch.randn(outputs)] * biased]]
    exact = [one.detach().double().requires_grad_() for one in given]
    found, expected = conv2d(*given, padding=padding), F.conv2d(*exact, padding=padding)
    assert found.is_contiguous(memory_format=torch.channels_last)
    direction = torch.randn(found.shape) * (torch.rand(found.shape) < back)
    assert_nearly_exact(found, expected, given, exact, direction)


# The same bits, whatever is beside a sample and however it is computed


def product(x, weight, bias=None):
    output, fired = kernels.weigh(x, weight, bias)
    assert fired == x.count_nonzero()
    return output, kernels.gradient(output, x)


def convolution(x, weight, bias=None):
    output = patches.convolve(x, weight, bias, (1, 1))
    return output, patches.gradient(output, x, weight.shape, (1, 1))


KERNELS = {
    "sparse": (product, lambda: (spikes(2 * BLOCK + 3, 330), torch.randn(200, 330))),
    "dense": (product, lambda: (spikes(ROWS + 50, 330, rate=0.6), torch.randn(200, 330))),
    "maps": (convolution, lambda: (maps(70, CHANNELS, 9, 9), torch.randn(MAPS, CHANNELS, 3, 2))),
}
each_kernel = pytest.mark.parametrize(("compute", "make"), KERNELS.values(), ids=KERNELS)


@each_kernel
def test_a_sample_has_the_same_bits_in_any_batch(compute, make):
    x, weight = make()
    bias = torch.randn(len(weight))
    whole, _ = compute(x, weight, bias)
    for begin, end in ((0, 1), (1, 3), (3, 60), (60, len(x) - 1), (len(x) - 1, len(x))):
        assert torch.equal(compute(x[begin:end], weight, bias)[0], whole[begin:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_kernel
def test_results_do_not_depend_on_the_number_of_threads(compute, make, dtype, threads):
    (x, weight), found = make(), []
    if compute is product:
        weight = weight.to(dtype)
    for count in (1, 2, 3, 7):
        threads(count)
        found.append(compute(x, weight))
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("lanes", "registers"), [(8, 4), (8, 8), (16, 8)])
@each_kernel
def test_cpus_with_other_registers_give_the_same_bits(compute, make, lanes, registers, monkeypatch):
    given = make()
    expected = compute(*given)
    variant = kernels.Variant("float32", "float32", lanes, registers)
    for module in (kernels, patches):
        monkeypatch.setattr(module, "variant_of", lambda spikes, weights: variant)
    assert all(torch.equal(*pair) for pair in zip(compute(*given), expected, strict=True))


@pytest.mark.parametrize(
    ("rate", "back", "called"),
    [
        (0.1, 0.1, ["convolve", "convolve", "gradient"]),
        (0.1, 0.9, ["convolve", "gradient"]),
        (0.9, 0.1, ["convolve", "convolve"]),
    ],
)
def test_gradients_of_convolutions_are_left_to_pytorch_where_little_is_zero(
    rate, back, called, calls
):
    x = maps(20, CHANNELS, 9, 9, rate).requires_grad_()
    output = conv2d(x, torch.randn(MAPS, CHANNELS, 3, 3, requires_grad=True))
    output.backward(maps(*output.shape, rate=back))
    assert [name for name, _ in calls] == called


def test_weights_of_zeros_are_not_read_by_convolutions():
    weight = torch.full((MAPS, CHANNELS, 2, 2), torch.nan)
    weight[:, 5] = weight[7] = 2.0
    x, direction = torch.zeros(1, 3, 3, CHANNELS).movedim(-1, 1), torch.zeros(1, MAPS, 2, 2)
    x[:, 5], direction[:, 7] = 3.0, 1.0
    x.requires_grad_()
    found, expected = conv2d(x, weight), F.conv2d(x, weight.nan_to_num())
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(output, x, direction)[0] for output in (found, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("functions", "make", "weight"),
    [
        ((linear, F.linear), lambda: spikes(9, INPUTS), (OUTPUTS, INPUTS)),
        ((conv2d, F.conv2d), lambda: maps(5, CHANNELS, 4, 4), (MAPS, CHANNELS, 3, 3)),
    ],
)
def test_gradients_of_products_and_convolutions_have_derivatives(functions, make, weight):
    given, found = (make(), torch.randn(weight)), []
    for function in functions:
        leaves = [one.clone().requires_grad_() for one in given]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(one.square().sum() for one in first), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * other.abs().max().item())


def test_several_gradients_of_products_may_be_computed_at_once():
    x, weight = spikes(9, INPUTS).requires_grad_(), torch.randn(OUTPUTS, INPUTS, requires_grad=True)
    output, directions = linear(x, weight), torch.randn(3, 9, OUTPUTS)
    found = torch.autograd.grad(
        output, (x, weight), directions, is_grads_batched=True, retain_graph=True
    )
    for number, direction in enumerate(directions):
        alone = torch.autograd.grad(output, (x, weight), direction, retain_graph=True)
        torch.testing.assert_close([one[number] for one in found], [*alone])


def test_the_operators_of_convolutions_pass_pytorch_s_checks():
    x, weight = maps(3, CHANNELS, 4, 4), torch.randn(MAPS, CHANNELS, 3, 3, requires_grad=True)
    bias = torch.randn(MAPS, requires_grad=True)
    opcheck(torch.ops.snn.convolve.default, (x, weight, bias, [1, 1], True))
    given = maps(3, MAPS, 4, 4), x, weight.detach(), [1, 1]
    opcheck(torch.ops.snn.convolve_backward.default, given)


OTHER_CONVOLUTIONS = {
    "float64": lambda f, x, w: f(x.double(), w.double()),
    "few channels": lambda f, x, w: f(x[:, :15], w[:, :15]),
    "few maps": lambda f, x, w: f(x, w[:15]),
    "channels first": lambda f, x, w: f(x.contiguous(), w),
    "no batch": lambda f, x, w: f(x[0], w),
    "stride": lambda f, x, w: f(x, w, None, 2),
    "dilation": lambda f, x, w: f(x, w, None, 1, 0, (1, 2)),
    "groups": lambda f, x, w: f(x.repeat(1, 2, 1, 1), w, None, 1, 0, 1, 2),
    "same": lambda f, x, w: f(x, w, None, 1, "same"),
    "wide padding": lambda f, x, w: f(x, w, None, 1, 3),
    "a tensor's subclass": lambda f, x, w: f(x, w.as_subclass(Marked)),
    "vmap": lambda f, x, w: torch.func.vmap(f, (0, None))(x[:, None], w),
    "backend": on_eager,
    "autocast": lambda f, x, w: torch.autocast("cpu", torch.bfloat16)(f)(x, w),
}


@pytest.mark.parametrize("situation", [*OTHER_CONVOLUTIONS])
def test_all_other_convolutions_are_left_to_pytorch(situation, calls):
    x, weight = maps(3, CHANNELS, 6, 6), torch.randn(MAPS - 1, CHANNELS, 3, 3)
    if situation == "groups":
        weight = weight[:, :CHANNELS]
    use = OTHER_CONVOLUTIONS[situation]
    assert torch.equal(use(conv2d, x, weight), use(F.conv2d, x, weight))
    assert calls == []


def image_network(*modules):
    """A network with ``modules`` behind neurons of maps of 8 x 8, channels last in memory."""
    return Sequential(
        nn.Unflatten(2, (8, 8, CHANNELS)),
        ChannelsFirst(),
        SpikingNeuron((CHANNELS, 1, 1), 4.0),
        *modules,
    )


def image_current(steps=STEPS):
    return 1.5 * (torch.rand(steps, BATCH, 64 * CHANNELS) < 0.05)


@pytest.mark.parametrize(
    "modules",
    [
        (PerStep(nn.Conv2d(CHANNELS, MAPS, 3)),),
        (PerStep(nn.MaxPool2d(2)), PerStep(nn.Conv2d(CHANNELS, MAPS, 3, padding=1, bias=False))),
        (PerStep(OwnMaps(CHANNELS, MAPS, 3)),),
    ],
    ids=["neurons", "pooled", "of one's own"],
)
def test_convolutions_of_spikes_leave_out_zeros_and_give_pytorch_s_result(modules, calls):
    model, x = image_network(*modules), image_current()
    found = []
    for way in ("auto", "eager"):
        with use_backend(way):
            output, _ = model(x)
            found.append([output, *torch.autograd.grad(output.square().sum(), model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)
    assert calls == [("convolve", STEPS * BATCH), ("gradient", STEPS * BATCH)]


def test_a_convolution_of_an_input_that_comes_from_no_neuron_is_left_to_pytorch(calls):
    Sequential(PerStep(nn.Conv2d(CHANNELS, MAPS, 3)))(maps(20, CHANNELS, 8, 8)[None])
    assert calls == []


def test_a_network_of_maps_in_chunks_has_the_bits_of_the_whole_run():
    model = image_network(
        PerStep(nn.Conv2d(CHANNELS, MAPS, 3)),
        SpikingNeuron((MAPS, 1, 1), 4.0),
        PerStep(nn.Conv2d(MAPS, 20, 3)),
    )
    nn.init.normal_(model[3].module.weight, 0.0, 0.2)
    x = image_current(11)
    whole = model(x)[0]
    gradients = torch.autograd.grad(whole.square().sum(), model.parameters())
    for steps in (1, 4):
        output, _ = Chunked(model, steps)(x)
        assert torch.equal(output, whole)
        found = torch.autograd.grad(output.square().sum(), model.parameters())
        torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-3)

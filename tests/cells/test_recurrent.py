"""Recurrence against a loop over the steps, and what a layer with a memory has to keep."""

import copy

import pytest
import torch
from definitions import filter_by_hand, fire, gradients, with_channels_last
from small_networks import Held, Threshold, assert_chunks_and_lengths_change_nothing, parts
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp
from torch.library import opcheck
from torch.nn.utils import prune

from snn_lib import (
    AdaptiveNeuron,
    Chunked,
    LowPassSynapse,
    PerStep,
    Recurrent,
    Sequential,
    SpikingNeuron,
    fire_from_the_start,
)
from snn_lib.containers import map_tensors
from snn_lib.inspection.activity import count_activity
from snn_lib.inspection.monitor import Monitor
from snn_lib.kernels.inputs import Inputs

DOUBLE = torch.float64


def by_hand(layer, x, fed, membrane, reset, past, weight, bias, decay):
    """The spikes, what comes back last, and the states, by the equations of the layer."""
    neuron, spikes = layer.neuron, []
    for x_t in x:
        membrane = decay * membrane + x_t + fed @ weight.t() + bias - reset
        spikes.append(fire(membrane))
        reset = neuron.reset_decay * reset + neuron.reset_strength * spikes[-1]
        fed = spikes[-1]
        if layer.synapse is not None:
            coefficients = layer.synapse.alpha, layer.synapse.beta
            (fed,), past, _ = filter_by_hand(fed[None], *coefficients, past, fed[None][:0])
    return torch.stack(spikes), fed, membrane, reset, past


def build(channels, synapse=False, dtype=DOUBLE, **settings):
    """A layer whose neurons fire now and then, and excite and inhibit each other."""
    neuron = SpikingNeuron(channels, 5.0, membrane_filter=True, train_decay=True, **settings)
    filtered = LowPassSynapse(channels, 3.0) if synapse else None
    layer = Recurrent(nn.Linear(channels, channels), neuron, filtered).to(dtype)
    with torch.no_grad():
        layer.weights.weight.normal_().mul_(2 / max(channels, 1) ** 0.5)
    return layer


def inputs_of(layer, steps, batch):
    """x, what comes back first, and the states, in the dtype of the layer."""
    shape, dtype = (batch, *layer.neuron.shape), layer.weights.weight.dtype
    x, membrane, reset = (torch.randn(n, *shape, dtype=dtype) for n in (steps, 1, 1))
    fed = (torch.rand(shape) < 0.3).to(dtype)
    past = torch.rand(1 if layer.synapse else 0, *shape, dtype=dtype)
    parameters = layer.weights.weight, layer.weights.bias, layer.neuron.membrane_decay
    return x, fed, membrane[0], reset[0], past, *(p.detach() for p in parameters)


def run(layer, x, fed, membrane, reset, past, weight, bias, decay):
    """The same as ``by_hand``, by the layer."""
    filtered = (past, past[:0]) if layer.synapse else None
    names = "weights.weight", "weights.bias", "neuron.membrane_decay"
    parameters = dict(zip(names, (weight, bias, decay), strict=True))
    state = fed, (membrane, reset), filtered
    spikes, (fed, own, filtered) = functional_call(layer, parameters, (x, state))
    return spikes, fed, *own, filtered[0] if layer.synapse else past


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("synapse", [False, True])
@pytest.mark.parametrize(
    ("steps", "batch", "channels"), [(9, 2, 7), (6, 2, 150), (0, 3, 7), (4, 2, 0)]
)
def test_spikes_states_and_gradients_are_those_of_a_loop_over_the_steps(
    steps, batch, channels, synapse
):
    layer = build(channels, synapse)
    inputs = inputs_of(layer, steps, batch)
    found = run(layer, *inputs)
    slopes = gradients(lambda *given: run(layer, *given), inputs)
    if steps == 0:
        assert all(torch.equal(*pair) for pair in zip(found[1:], inputs[1:5], strict=True))
        return
    expected = by_hand(layer, *inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slopes, gradients(lambda *given: by_hand(layer, *given), inputs))


def test_float32_is_close_to_float64_and_reads_no_weights_of_silent_neurons():
    layer = build(200, dtype=torch.float32)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(20, 3, 200)
    spikes, _ = layer(x)
    expected, _ = exact(x.double())
    assert 0.01 < spikes.mean() < 0.3
    assert torch.equal(spikes.double(), expected)
    for module, output in ((layer, spikes), (exact, expected)):
        (output * torch.arange(20).view(20, 1, 1).to(output)).sum().backward()
        assert module.weights.weight.grad.any()
    for own, other in zip(layer.parameters(), exact.parameters(), strict=True):
        scale = other.grad.abs().max()
        torch.testing.assert_close(own.grad.double() / scale, other.grad / scale, rtol=0, atol=1e-5)
    with torch.no_grad():
        layer.weights.weight[:, 0] = torch.nan  # of a neuron that never fires
        x[..., 0] = -100.0
        assert layer(x)[0].sum() > 0


class Smooth:
    """A surrogate that is the derivative of what fires, so that numbers can check it."""

    def derivative(self, membrane):
        return torch.zeros_like(membrane)


@pytest.mark.usefixtures("backend")
def test_gradients_between_spikes_are_finite_differences():
    layer = build(3, synapse=True, surrogate=Smooth())
    inputs = [tensor.requires_grad_() for tensor in inputs_of(layer, 4, 1)]
    assert by_hand(layer, *inputs)[0].any()
    assert gradcheck(lambda *given: run(layer, *given), inputs)
    assert gradgradcheck(lambda *given: run(layer, *given)[1:], inputs)


def test_second_derivatives_are_those_of_a_loop_over_the_steps():
    layer = build(6)
    inputs = inputs_of(layer, 5, 2)

    def slopes(function):
        def first(*given):
            loss = sum((output * output).sum() for output in function(layer, *given))
            return torch.autograd.grad(loss, given[:1] + given[5:], create_graph=True)

        return gradients(first, inputs, which=(0, 5, 6, 7))

    torch.testing.assert_close(slopes(run), slopes(by_hand))


def test_gradients_of_weights_in_low_precision_are_added_up_in_that_of_the_weights():
    def slopes(enabled):
        torch.manual_seed(0)
        back = nn.Conv1d(2, 2, 3, padding=1)
        layer, x = Recurrent(PerStep(back), SpikingNeuron((2, 5), 4.0)), torch.randn(800, 3, 2, 5)
        nn.init.zeros_(back.weight)  # so that the spikes are the same
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer(x)[0].float().mean().backward()
        return back.bias.grad

    exact = slopes(False)
    assert (slopes(True) - exact).norm() < 0.01 * exact.norm()


def test_a_gradient_that_is_differentiated_counts_weights_in_a_state_once():
    layer, x = build(6), 2 * torch.randn(10, 2, 6, dtype=DOUBLE)
    _, state = layer(x[:5])
    spikes, _ = layer(x[5:], state)
    loss, weights = (spikes * spikes.cos()).sum(), layer.weights.weight
    slopes = [torch.autograd.grad(loss, weights, create_graph=again)[0] for again in (True, False)]
    torch.testing.assert_close(*slopes)
    assert slopes[0].any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("synapse", [False, True])
def test_chunks_and_lengths_change_nothing(synapse):
    layer, x = build(9, synapse), torch.randn(20, 4, 9, dtype=DOUBLE)
    lengths = torch.tensor([20, 5, 0, 99])
    assert_chunks_and_lengths_change_nothing(layer, x, 6, lengths)
    # The gradient of a state begins at the sequence's own end.
    (slope,) = gradients(lambda x: parts(layer(x, lengths=lengths)[1]), [x])
    assert not slope[5:, 1].any()
    assert not slope[:, 2].any()
    (whole,) = gradients(lambda x: parts(layer(x)[1]), [x])
    torch.testing.assert_close(slope[:, [0, 3]], whole[:, [0, 3]])  # T, and more than T
    (expected,) = gradients(lambda x: parts(layer(x[:5], lengths=lengths)[1]), [x])
    torch.testing.assert_close(slope[:, 1], expected[:, 1])


def test_dropout_takes_spikes_from_the_next_layer_and_not_from_the_layer_itself():
    layer, x = build(9, dropout=0.5), torch.randn(30, 4, 9, dtype=DOUBLE)
    every, state = copy.deepcopy(layer).eval()(x)
    passed, after = layer(x)
    assert torch.equal(passed, torch.where(passed != 0, 2 * every, 0.0))
    assert 0.3 < passed.count_nonzero() / every.count_nonzero() < 0.7
    torch.testing.assert_close(after, state, rtol=0, atol=0)
    torch.manual_seed(3)
    whole, _ = layer(x)
    torch.manual_seed(3)
    assert torch.equal(Chunked(layer, 7)(x)[0], whole)


def test_convolutions_and_weights_with_hooks_run_step_by_step():
    torch.manual_seed(0)
    maps = Recurrent(
        PerStep(nn.Conv2d(2, 2, 1, bias=False)), SpikingNeuron((2, 1, 1), 4.0)
    ).double()
    rows = Recurrent(nn.Linear(2, 2, bias=False), SpikingNeuron(2, 4.0)).double()
    with torch.no_grad():
        rows.weights.weight.copy_(maps.weights.module.weight[..., 0, 0])
    x = torch.randn(9, 3, 2, 2, 2, dtype=DOUBLE)
    spikes, _ = maps(x)
    assert torch.equal(spikes[..., 1, 0], rows(x[..., 1, 0])[0])
    assert torch.equal(maps(x[4:], maps(x[:4])[1])[0], spikes[4:])
    seen = []
    rows.weights.register_forward_hook(lambda *call: seen.append(call))
    assert torch.equal(rows(x[..., 1, 0])[0], spikes[..., 1, 0])
    assert len(seen) == 9


def test_maps_in_any_order_of_memory_go_on_from_a_state_and_end_at_their_lengths():
    cells = SpikingNeuron((2, 1, 1), 4.0), LowPassSynapse((2, 1, 1), 3.0)
    layer = Recurrent(PerStep(nn.Conv2d(2, 2, 3, padding=1)), *cells).double()
    x, lengths = 2 * torch.randn(12, 3, 2, 4, 5, dtype=DOUBLE), torch.tensor([9, 0, 4])
    whole, _ = layer(x)
    _, before = layer(x[:3])

    def of(state, row):
        return map_tensors(lambda part: part.narrow(part.dim() - 4, row, 1), state)

    for lay in (torch.Tensor.contiguous, with_channels_last):
        spikes, ends = layer(lay(x[3:]), before, lengths)
        assert torch.equal(spikes, whole[3:])
        for row, length in enumerate(lengths):
            _, alone = layer(x[3 : 3 + length, row : row + 1], of(before, row))
            torch.testing.assert_close(parts(of(ends, row)), parts(alone))


class OthersAlone(nn.Linear):
    """Weights of one's own, by which no neuron reaches itself."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * (1 - torch.eye(len(self.weight))), self.bias)


def test_weights_with_a_forward_of_their_own_and_of_rows_in_several_dimensions_are_called():
    x = 2 * torch.rand(12, 2, 3, 4)
    own, plain = OthersAlone(4, 4), nn.Linear(4, 4)
    nn.init.constant_(own.weight, 1.0)
    plain.weight.data, plain.bias.data = 1 - torch.eye(4), own.bias.data
    for weights in (own, plain):
        rows, _ = Recurrent(weights, SpikingNeuron((3, 4), 4.0))(x)
        for n in range(3):
            expected, _ = Recurrent(plain, SpikingNeuron(4, 4.0))(x[:, :, n])
            assert torch.equal(rows[:, :, n], expected)
            assert torch.equal(Recurrent(weights, SpikingNeuron(4, 4.0))(x[:, :, n])[0], expected)


def test_any_cell_that_spikes_may_be_recurrent():
    neuron = AdaptiveNeuron(3, tau_m=5.0, tau_adaptation=20.0, adaptation_strength=0.1)
    layer = Recurrent(nn.Linear(3, 3), neuron)
    x = 2 * torch.rand(12, 2, 3)
    spikes, _ = layer(x)
    current = x[1:] + layer.weights(spikes[:-1])
    first = x[:1] + layer.weights.bias
    assert torch.equal(neuron(torch.cat([first, current]))[0], spikes)


def test_first_weights_the_monitor_and_firing_rates_know_its_neurons():
    model = Sequential(nn.Linear(5, 9), Recurrent(nn.Linear(9, 9), SpikingNeuron(9, 4.0)))
    x = torch.randn(40, 6, 5)
    before = copy.deepcopy(model[1].weights.state_dict())
    rates = fire_from_the_start(model, x, rate=0.1)
    assert 0.05 < rates["1.neuron"] < 0.2
    torch.testing.assert_close(dict(model[1].weights.state_dict()), dict(before), rtol=0, atol=0)
    with Monitor(model) as monitor, count_activity(model) as activity:
        spikes, _ = model(x)
    assert torch.equal(monitor["1.neuron"].spikes, spikes)
    assert torch.equal(monitor["1.neuron"].membrane > 1, spikes > 0)
    assert activity.spike_counts["1.neuron"] == spikes.sum()


@pytest.mark.parametrize("mean", [-0.3, 0.0, 0.05])
def test_first_weights_count_on_what_comes_back(mean):
    recurrent = Recurrent(nn.Linear(50, 50), SpikingNeuron(50, 5.0))
    nn.init.normal_(recurrent.weights.weight, mean, 0.2)
    x = (torch.rand(60, 16, 20) < 0.1).float()
    rates = fire_from_the_start(Sequential(nn.Linear(20, 50), recurrent), x, rate=0.05)
    assert rates["1.neuron"] == pytest.approx(0.05, rel=0.05)


def test_spikes_and_states_keep_float32_under_autocast_and_in_bfloat16():
    layer, x = build(9, synapse=True, dtype=torch.float32), torch.randn(9, 2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        spikes, (fed, _, _) = layer(x)
    assert (spikes.dtype, fed.dtype) == (torch.float32, torch.float32)
    assert torch.equal(spikes, layer(x)[0])
    spikes, (fed, _, _) = layer.bfloat16()(x.bfloat16())
    assert (spikes.dtype, fed.dtype) == (torch.bfloat16, torch.float32)


def test_transforms_and_the_compiler_give_the_same():
    layer = build(5)
    inputs = inputs_of(layer, 6, 2)
    tangents = [torch.randn_like(tensor) for tensor in inputs[:1]]

    def loss(x):
        return run(layer, x, *inputs[1:])[2].square().sum()  # of the membranes

    slope = grad(loss)(inputs[0])
    x = inputs[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(by_hand(layer, x, *inputs[1:])[2].square().sum(), [x])
    torch.testing.assert_close(slope, expected)
    _, change = jvp(loss, (inputs[0],), (tangents[0],))
    torch.testing.assert_close(change, (expected * tangents[0]).sum())
    compiled = torch.compile(layer.eval(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(inputs[0])[0], layer(inputs[0])[0])


def test_the_operator_passes_pytorch_s_checks_and_refuses_weights_that_do_not_fit():
    layer = build(4)
    call = layer.neuron.call(torch.zeros(5, 2, 4, dtype=DOUBLE))
    coefficients = torch.stack([*call.coefficients.values()]).detach().requires_grad_()
    inputs = Inputs(
        "SpikingNeuron[-,-;-,-,-]",
        torch.randn(5, 2, 4, dtype=DOUBLE, requires_grad=True),
        coefficients,
        lengths=torch.tensor([5, 3]),
        surrogate="gaussian",
        numbers=(0.4,),
        dtype=DOUBLE,
        keep=True,
        needed=(True,) * 3,
    )
    weight, fed = layer.weights.weight, torch.zeros(2, 4, dtype=DOUBLE, requires_grad=True)
    opcheck(torch.ops.snn.recur, (weight, fed, *inputs))
    for wrong in (weight[:3], weight.float()):
        with pytest.raises(ValueError, match="weight has shape"):
            torch.ops.snn.recur(wrong, fed, *inputs)


NEURON, SYNAPSE, WEIGHTS = SpikingNeuron(3, 4.0), LowPassSynapse(3, 4.0), nn.Linear(3, 3)
X = torch.zeros(5, 2, 3)


class Silent(LowPassSynapse):
    """A synapse that nothing leaves."""

    def forward(self, x, state=None, lengths=None):
        return 0 * x, state


REFUSED = [  # what is built or run, and the words
    (lambda: Recurrent(WEIGHTS, NEURON, Silent(3, 4.0)), "synapse has a forward of its own, which"),
    (lambda: Recurrent(WEIGHTS, SYNAPSE), r"neuron is .*, expected a cell that spikes"),
    (lambda: Recurrent(Sequential(WEIGHTS), NEURON), "weights hold a Sequential, expected a mod"),
    (lambda: Recurrent(WEIGHTS, NEURON, NEURON), "synapse is .*, expected a cell that does not sp"),
    (lambda: Recurrent(nn.Linear(4, 4), NEURON)(X), "the weights have shape"),
    (lambda: Recurrent(WEIGHTS, NEURON)(X, (torch.zeros(2, 4), None, None)), "state fed has shape"),
    (lambda: Recurrent(WEIGHTS, NEURON)(X, (torch.zeros(2, 5),)), "has 1 entries, expected 3"),
    (lambda: Recurrent(WEIGHTS, NEURON)(X, (None, None, (torch.zeros(2, 5),))), "is no synapse"),
    (lambda: Recurrent(WEIGHTS, NEURON)(X, torch.zeros(2, 5)), "state is a Tensor, expected"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_parts_and_states_that_do_not_fit_are_refused(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_weights_that_run_step_by_step_may_be_in_low_precision():
    layer = Recurrent(PerStep(nn.Conv2d(2, 2, 3, padding=1)), SpikingNeuron((2, 1, 1), 4.0))
    x = torch.randn(9, 3, 2, 4, 4).bfloat16()
    spikes, (fed, _, _) = layer.bfloat16()(x)
    assert (spikes.dtype, fed.dtype) == (torch.bfloat16, torch.float32)
    current = x[1:] + layer.weights(spikes[:-1])
    first = x[:1] + layer.weights(0 * spikes[:1])
    expected, _ = layer.neuron(torch.cat([first, current]))
    assert (expected != spikes).float().mean() < 0.02  # of those at the threshold


def test_any_number_of_threads_gives_the_same_bits(threads):
    """Of so many elements that several threads share them."""
    layer, x = build(200, dtype=torch.float32), torch.randn(20, 9, 200)
    threads(1)
    expected = layer(x, lengths=torch.arange(12, 21))
    for count in (2, 3, 7):
        threads(count)
        found = layer(x, lengths=torch.arange(12, 21))
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


def test_weights_without_a_bias_learn_where_nothing_else_does():
    layer = Recurrent(nn.Linear(6, 6, bias=False), SpikingNeuron(6, 4.0)).double()
    x = 2 * torch.rand(9, 2, 6, dtype=DOUBLE)
    (found,) = torch.autograd.grad(layer(x)[0].sum(), layer.weights.weight)
    assert found.any()
    (expected,) = torch.autograd.grad(layer(x.requires_grad_())[0].sum(), layer.weights.weight)
    assert torch.equal(found, expected)


def test_weights_without_a_bias_take_a_current_of_autocast():
    """As a layer of weights before them returns it."""
    layer = Recurrent(nn.Linear(6, 6, bias=False), SpikingNeuron(6, 4.0))
    x = 2 * torch.rand(9, 2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        spikes, _ = layer(x.bfloat16())
    assert torch.equal(spikes, layer(x.bfloat16().float())[0])


def test_a_layer_is_exported_and_saved_before_it_has_run(tmp_path):
    class New(LowPassSynapse):
        """A cell that no test has run, as all are in a new process."""

    layer = Recurrent(nn.Linear(6, 6), SpikingNeuron(6, 4.0), New(6, 3.0)).eval()
    x = 2 * torch.rand(9, 2, 6)
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    assert torch.equal(loaded(x)[0], layer(x)[0])


def test_a_gradient_that_is_differentiated_is_that_of_the_same_lengths():
    layer, x = build(6), torch.randn(10, 3, 6, dtype=DOUBLE, requires_grad=True)

    def slope(again):
        _, state = layer(x, lengths=torch.tensor([4, 0, 10]))
        loss = sum(part.square().sum() for part in parts(state))
        return torch.autograd.grad(loss, x, create_graph=again)[0]

    torch.testing.assert_close(slope(True), slope(False))


@pytest.mark.parametrize("part", ["neuron", "synapse"])
def test_coefficients_of_its_parts_may_be_pruned_and_learn_on(part):
    weights = nn.Sequential(nn.Linear(6, 6))  # by steps
    neuron = SpikingNeuron(6, 4.0, membrane_filter=True, train_decay=True)
    layer, x = Recurrent(weights, neuron, LowPassSynapse(6, 3.0)), 2 * torch.rand(9, 3, 6)
    name = "reset_decay" if part == "neuron" else "alpha"
    cell = getattr(layer, part)
    prune.random_unstructured(cell, name, 0.5)
    original = getattr(cell, f"{name}_orig")
    gradients = []
    for _ in range(2):
        layer.zero_grad()
        layer(x).output.sum().backward()
        gradients.append(original.grad.clone())
    assert torch.equal(*gradients)
    with torch.no_grad():
        original.mul_(0.5)
    found, _ = layer(x)
    prune.remove(cell, name)
    torch.testing.assert_close(layer(x).output, found)


def test_a_state_that_is_a_coefficient_comes_back_alike_at_once_and_by_steps():
    weights, x = nn.Linear(8, 8), 2 * torch.rand(9, 4, 8)
    cell = Held(8, jump=torch.linspace(0.1, 0.5, 8), decay=0.9)
    expected, (fed, state, _) = Recurrent(weights, cell)(x)
    found, (fed_again, again, _) = Recurrent(nn.Sequential(weights), cell)(x)
    torch.testing.assert_close((found, fed_again, again), (expected, fed, state))


@pytest.mark.parametrize(
    "weights", [nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))], ids=["at once", "by steps"]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.bfloat16])
def test_neurons_without_coefficients_read_numbers_of_any_dtype(weights, dtype):
    layer = Recurrent(weights, Threshold(8))
    x = torch.randint(3, (9, 4, 8), dtype=dtype)
    torch.testing.assert_close(layer(x).output, layer(x.float()).output, check_dtype=False)

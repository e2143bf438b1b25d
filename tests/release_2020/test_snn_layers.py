"""The 2020 interface against its equations, written here step by step on time-last tensors."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from snn_lib.errors import out_of_memory
from snn_lib.release_2020 import snn_layers as layers

STEPS, BATCH = 12, 3
CONSTRUCTED_BATCH = 5


# Per-step definitions: (layer, x, states) -> (output, states), states None at rest.


def spike(v, sigma):
    """A step whose gradient is the Gaussian density: that of the normal distribution function."""
    soft = 0.5 * torch.erf((v - 1) / (math.sqrt(2) * sigma))
    return (v > 1).to(v.dtype) + (soft - soft.detach())


def dual_exp_steps(layer, x, states):
    cell = layer.dual_exp_iir_cell
    last, before = states or (torch.zeros_like(x[..., 0]),) * 2
    psp = []
    for t in range(x.shape[-1]):
        now = cell.alpha_1 * last + cell.alpha_2 * before + cell.beta_1 * x[..., t]
        last, before = now, last
        psp.append(now)
    return torch.stack(psp, -1), (last, before)


def low_pass_steps(layer, x, states):
    f = torch.zeros_like(x[..., 0]) if states is None else states
    psp = []
    for t in range(x.shape[-1]):
        f = layer.first_order_low_pass_cell.alpha_1 * f + x[..., t]
        psp.append(f)
    return torch.stack(psp, -1), f


def traces_steps(cell, x, states):
    m, s = states or (torch.zeros_like(x[..., 0]),) * 2
    difference = []
    for t in range(x.shape[-1]):
        m = cell.decay_m * m + x[..., t]
        s = cell.decay_s * s + x[..., t]
        difference.append(m - s)
    return torch.stack(difference, -1), (m, s)


def axon_steps(layer, x, states):
    difference, states = traces_steps(layer.axon_cell, x, states)
    return layer.axon_cell.v_0 * difference, states


def synapse_steps(layer, x, states):
    cell = layer.synapse_cell
    connections = x[:, :, None].repeat(1, 1, cell.decay_m.shape[1], 1)
    difference, states = traces_steps(cell, connections, states)
    return cell.v_0 * difference, states


def neuron_steps(cell, current, states, membrane_filter):
    v, r = states or (torch.zeros_like(current[..., 0]),) * 2
    spikes = []
    for t in range(current.shape[-1]):
        v = (cell.decay_v * v if membrane_filter else 0.0) + current[..., t] - r
        s = spike(v, cell.sigma)
        r = cell.reset_decay * r + cell.reset_v * s
        spikes.append(s)
    return torch.stack(spikes, -1), (v, r)


def per_step(function, x):
    return torch.stack([function(x[..., t]) for t in range(x.shape[-1])], -1)


def fully_connected_steps(filters):
    def steps(layer, x, states):
        cell = layer.neuron_cell
        return neuron_steps(cell, per_step(cell.weight, x), states, filters)

    return steps


def per_connection_steps(filters):
    def steps(layer, x, states):
        cell = layer.neuron_cell
        current = torch.einsum("biot,io->bot", x, cell.weight)
        return neuron_steps(cell, current, states, filters)

    return steps


def dot_product_steps(filters):
    def steps(layer, x, states):
        cell = layer.neuron_cell
        return neuron_steps(cell, x * cell.weight[..., None], states, filters)

    return steps


def conv2d_steps(filters):
    def steps(layer, x, states):
        cell = layer.conv2d_cell
        return neuron_steps(cell, per_step(cell.conv, x), states, filters)

    return steps


def snn_steps(layer, x, states):
    cell = layer.snn_cell
    neurons, traces = (None, None) if states is None else (states[:2], states[2:])
    difference, traces = traces_steps(cell, x, traces)
    current = per_step(lambda d: cell.v_0 * cell.weight(d), difference)
    spikes, neurons = neuron_steps(cell, current, neurons, False)
    return spikes, (*neurons, *traces)


# name: constructor, features of its input, the definition, shapes of its state dict
SIZES = (STEPS, CONSTRUCTED_BATCH)
NEURON = {"sigma": (), "reset_decay": (4,), "reset_v": (4,), "decay_v": (4,)}
LINEAR = {"weight.weight": (4, 6), "weight.bias": (4,)}
IMAGE = (3, 2, 2)  # what the convolution below makes of (2, 5, 6)


def keys(cell, shapes):
    return {f"{cell}.{name}": shape for name, shape in shapes.items()}


def traces(shape):
    return {"v_0": (), "decay_m": shape, "decay_s": shape}


LAYERS = {
    "dual_exp_iir": (
        lambda: layers.dual_exp_iir_layer((2, 3), *SIZES, 4, 1, True),
        (2, 3),
        dual_exp_steps,
        keys(
            "dual_exp_iir_cell", {"v_0": (), "alpha_1": (2, 3), "alpha_2": (2, 3), "beta_1": (2, 3)}
        ),
    ),
    "first_order_low_pass": (
        lambda: layers.first_order_low_pass_layer((6,), *SIZES, 4, True),
        (6,),
        low_pass_steps,
        keys("first_order_low_pass_cell", {"alpha_1": (6,)}),
    ),
    "axon": (
        lambda: layers.axon_layer((6,), *SIZES, 4, 1, True, True),
        (6,),
        axon_steps,
        keys("axon_cell", traces((6,))),
    ),
    "synapse": (
        lambda: layers.synapse_layer(6, 4, *SIZES, 4, 1, True, True),
        (6,),
        synapse_steps,
        keys("synapse_cell", traces((6, 4))),
    ),
    "snn": (
        lambda: layers.snn_layer(6, 4, *SIZES, 4, 1, True, True),
        (6,),
        snn_steps,
        keys("snn_cell", {**NEURON, **traces((6,)), **LINEAR}),
    ),
}
for filters in (False, True):
    name = "_membrane_filter" if filters else ""
    LAYERS |= {
        f"neuron{name}": (
            lambda filters=filters: layers.neuron_layer(6, 4, *SIZES, 4, True, filters),
            (6,),
            fully_connected_steps(filters),
            keys("neuron_cell", {**NEURON, **LINEAR}),
        ),
        f"neuron_per_connection{name}": (
            lambda filters=filters: layers.neuron_layer(
                6, 4, *SIZES, 4, True, filters, input_type="synapse", reset_v=0.5
            ),
            (6, 4),
            per_connection_steps(filters),
            keys("neuron_cell", {**NEURON, "weight": (6, 4)}),
        ),
        f"neuron_dot_product{name}": (
            lambda filters=filters: layers.neuron_layer_dot_product(4, 4, *SIZES, 4, True, filters),
            (4,),
            dot_product_steps(filters),
            keys("neuron_cell", {**NEURON, "weight": (1, 4)}),
        ),
        f"conv2d{name}": (
            lambda filters=filters: layers.conv2d_layer(
                5, 6, 2, 3, (3, 2), 2, (1, 0), 2, *SIZES, 4, True, filters
            ),
            (2, 5, 6),
            conv2d_steps(filters),
            keys(
                "conv2d_cell",
                {
                    **dict.fromkeys(NEURON, IMAGE),
                    "sigma": (),
                    "conv.weight": (3, 2, 3, 2),
                    "conv.bias": (3,),
                },
            ),
        ),
    }
NEURON_LAYERS = [name for name in LAYERS if name.startswith(("neuron", "conv2d", "snn"))]


def made(name):
    """The layer with values that differ from channel to channel, and an input."""
    build, features, *_ = LAYERS[name]
    layer = build()
    with torch.no_grad():
        for key, value in layer.named_parameters():
            if key.endswith("sigma"):
                value.fill_(0.3)
            elif not key.endswith("v_0"):
                value.mul_(torch.empty_like(value).uniform_(0.8, 1.0))
    x = torch.rand(BATCH, *features, STEPS)
    for key, weight in layer.named_parameters():
        if key.endswith("weight"):  # such that neurons fire often, and not always
            inputs = {(1, 4): 1, (3, 2, 3, 2): 8}.get(tuple(weight.shape), 6)
            nn.init.uniform_(weight, 0.0, (2.0 if name == "snn" else 5.0) / inputs)
    return layer, x


def as_tuple(states):
    return (states,) if isinstance(states, torch.Tensor) else tuple(states)


def outcome(function, layer, x, states):
    """Output, states, and gradients of a loss that weighs all of them."""
    x = x.clone().requires_grad_()
    given = states
    if states is not None:
        given = tuple(state.clone().requires_grad_() for state in as_tuple(states))
        states = given[0] if isinstance(states, torch.Tensor) else given
    output, last = function(x, states)
    last = as_tuple(last)
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(p.shape, generator=generator) * p).sum() for p in (output, *last))
    inputs = [x, *(given or ()), *(p for p in layer.parameters() if p.requires_grad)]
    return output.detach(), last, torch.autograd.grad(loss, inputs, materialize_grads=True)


def assert_close(found, expected):
    assert found.shape == expected.shape
    torch.testing.assert_close(
        found, expected, rtol=0, atol=1e-5 * expected.abs().max().item() + 1e-30
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_states", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_computes_its_equations_step_by_step(name, with_states, training):
    definition = LAYERS[name][2]
    layer, x = made(name)
    layer.train(training)
    states = None
    if with_states:
        resting = layer.create_init_states()
        assert all(not state.any() for state in as_tuple(resting))
        states = tuple(0.5 * torch.rand(BATCH, *s.shape) for s in as_tuple(resting))
        states = states[0] if isinstance(resting, torch.Tensor) else states

    output, last, gradients = outcome(layer, layer, x, states)
    wanted = outcome(lambda *inputs: definition(layer, *inputs), layer, x, states)

    if name in NEURON_LAYERS:
        assert 0.1 < output.mean() < 0.9
        assert torch.equal(output, wanted[0])
    assert_close(output, wanted[0])
    assert len(last) == len(wanted[1])
    for found, expected in zip((*last, *gradients), (*wanted[1], *wanted[2]), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_states_without_a_batch_or_of_one_sequence_are_those_of_every_sequence(name):
    layer, x = made(name)
    resting = layer.create_init_states()
    assert torch.equal(layer(x, resting)[0], layer(x)[0])
    alone = tuple(0.5 * torch.rand(s.shape) for s in as_tuple(resting))
    one, whole = (tuple(s.expand(size, *s.shape) for s in alone) for size in (1, BATCH))
    if isinstance(resting, torch.Tensor):
        (alone,), (one,), (whole,) = alone, one, whole
    expected = layer(x, whole)[0]
    assert torch.equal(layer(x, alone)[0], expected)
    assert torch.equal(layer(x, one)[0], expected)  # as what has one sequence broadcasts
    too_many = (*as_tuple(resting), torch.zeros(3))
    count = len(too_many)
    with pytest.raises(ValueError, match=f"is given {count} states, expected {count - 1}"):
        layer(x, too_many)


def test_the_low_pass_has_its_first_name_too():
    layer = layers.firsr_order_low_pass_layer((4,), STEPS, BATCH, 4, True)
    assert list(layer.state_dict()) == ["firsr_order_low_pass_cell.alpha_1"]
    x = torch.rand(BATCH, 4, STEPS)
    same = layers.first_order_low_pass_layer((4,), STEPS, BATCH, 4, True)
    assert torch.equal(layer(x)[0], same(x)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_chunks_with_states_are_the_whole_run(name):
    layer, x = made(name)
    whole, last = layer(x)
    first, states = layer(x[..., :5])
    second, states = layer(x[..., 5:], states)
    assert torch.equal(torch.cat([first, second], -1), whole)
    for found, expected in zip(as_tuple(states), as_tuple(last), strict=True):
        torch.testing.assert_close(found, expected)  # products of fewer rows round differently


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_has_the_keys_and_shapes_of_the_release(name):
    state = LAYERS[name][0]().state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == LAYERS[name][3]


def test_first_coefficients_are_those_of_the_time_constants():
    p, q = math.exp(-1 / 4), math.exp(-1)
    v_0 = 4 ** (4 / 3) / 3
    expected = {
        "dual_exp_iir": {"v_0": v_0, "alpha_1": p + q, "alpha_2": -p * q, "beta_1": p - q},
        "first_order_low_pass": {"alpha_1": p},
        "axon": {"v_0": v_0, "decay_m": p, "decay_s": q},
        "synapse": {"v_0": v_0, "decay_m": p, "decay_s": q},
        "neuron": {"sigma": 0.4, "reset_decay": p, "reset_v": 1.0, "decay_v": p},
        "neuron_per_connection": {"reset_v": 0.5, "reset_decay": p},
        "neuron_dot_product": {"reset_decay": p, "reset_v": 1.0, "decay_v": p},
        "conv2d": {"reset_decay": p, "reset_v": 1.0, "decay_v": p},
        "snn": {"v_0": v_0, "decay_m": p, "decay_s": q, "decay_v": p, "reset_decay": p},
    }
    for name, values in expected.items():
        state = LAYERS[name][0]().state_dict()
        for key, value in values.items():
            (found,) = (state[full] for full in state if full.split(".")[1] == key)
            assert_close(found, torch.full_like(found, value))


@pytest.mark.parametrize("name", NEURON_LAYERS)
def test_only_the_weights_of_neurons_are_trained(name):
    names = {key for key, value in made(name)[0].named_parameters() if value.requires_grad}
    assert {key.split(".")[1] for key in names} <= {"weight", "conv", "decay_m", "decay_s"}
    assert any("weight" in key for key in names)


def test_coefficients_and_biases_are_trained_if_asked():
    fixed = (
        layers.dual_exp_iir_layer((3,), *SIZES, 4, 1, False),
        layers.first_order_low_pass_layer((3,), *SIZES, 4, False),
        layers.axon_layer((3,), *SIZES, 4, 1, False, False),
    )
    assert not any(p.requires_grad for layer in fixed for p in layer.parameters())
    cell = layers.axon_layer((3,), *SIZES, 4, 1, True, False).axon_cell
    assert [n for n, p in cell.named_parameters() if p.requires_grad] == ["decay_m"]
    cell = layers.snn_layer(3, 2, *SIZES, 4, 1, False, True).snn_cell
    assert cell.decay_s.requires_grad
    assert not cell.decay_m.requires_grad
    neurons = layers.neuron_layer(6, 4, *SIZES, 4, False, False)
    assert "neuron_cell.weight.bias" not in neurons.state_dict()
    maps = layers.conv2d_layer(5, 6, 2, 3, 3, 1, 0, 1, *SIZES, 4, False, False)
    assert "conv2d_cell.conv.bias" not in maps.state_dict()


def test_sequences_are_not_copied_between_layers(monkeypatch):
    consumed = []
    for operator in ("iir_filter", "spiking_neuron"):
        real = getattr(layers, operator)

        def spy(x, *rest, real=real):
            consumed.append(x)
            return real(x, *rest)

        monkeypatch.setattr(layers, operator, spy)
    network = [
        layers.dual_exp_iir_layer((6,), *SIZES, 4, 1, True),
        layers.neuron_layer(6, 4, *SIZES, 4, True, False),
        layers.first_order_low_pass_layer((4,), *SIZES, 4, True),
    ]
    x = torch.rand(STEPS, BATCH, 6).movedim(0, -1)
    given = [x]
    for layer in network:
        given.append(layer(given[-1])[0])
    for sequence, passed_on in ((consumed[0], given[0]), (consumed[2], given[2])):
        assert sequence.is_contiguous()
        assert sequence.data_ptr() == passed_on.data_ptr()
    assert given[1].movedim(-1, 0).is_contiguous()
    # dropout between two layers keeps the layout
    assert nn.Dropout(0.5)(given[2]).movedim(-1, 0).is_contiguous()


def test_input_may_have_another_batch_and_length_than_the_layer_was_made_for():
    layer = layers.neuron_layer(6, 4, *SIZES, 4, True, False)
    assert (layer.step_num, layer.batch_size) == (STEPS, CONSTRUCTED_BATCH)
    spikes, (v, r) = layer(torch.rand(2, 6, 31))
    assert spikes.shape == (2, 4, 31)
    assert v.shape == r.shape == (2, 4)
    assert made("conv2d")[0].output_shape == IMAGE


def test_threshold_has_a_gaussian_gradient():
    v = torch.tensor([-1.0, 0.9, 1.0, 1.1, 3.0], dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor(0.3, dtype=torch.float64)
    density = torch.exp(-((v - 1) ** 2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)
    weight = torch.arange(1.0, 6.0, dtype=torch.float64)
    for spikes in (layers.threshold.apply(v, sigma), layers.threshold_layer(0.3)(v)):
        assert spikes.tolist() == [0, 0, 0, 1, 1]
        (gradient,) = torch.autograd.grad((weight * spikes).sum(), v)
        torch.testing.assert_close(gradient, weight * density)


@pytest.mark.parametrize(
    "window", [(0, 3, 1, 1), (1, 3, 2, 1), (2, 5, 3, 1), ((1, 0), (3, 2), (2, 1), (2, 3))]
)
def test_output_sizes_of_convolutions_and_pooling_are_pytorch_s(window):
    padding, kernel_size, stride, dilation = window
    x = torch.rand(1, 1, 12, 17)
    conv = nn.Conv2d(1, 1, kernel_size, stride, padding, dilation)
    pool = nn.MaxPool2d(kernel_size, stride, padding, dilation)
    assert layers.calculate_conv2d_outsize(12, 17, *window) == conv(x).shape[2:]
    assert layers.calculate_maxpooling2d_outsize(12, 17, *window) == pool(x).shape[2:]
    if dilation == 1:
        assert layers.calculate_conv2d_outsize(12, 17, *window[:3]) == conv(x).shape[2:]


@pytest.mark.parametrize(("dilation", "shape"), [(1, (3, 4)), (2, (3, 3))])
def test_maxpooling_pools_every_step(dilation, shape):
    layer = layers.maxpooling2d_layer(5, 6, 2, 2, 2, 1, dilation, *SIZES)
    x = torch.rand(BATCH, 2, 5, 6, STEPS)
    pooled = layer(x)
    by_hand = per_step(lambda f: nn.functional.max_pool2d(f, 2, 2, 1, dilation), x)
    assert torch.equal(pooled, by_hand)
    assert layer.output_shape == pooled.shape[2:4] == shape


def test_filter_layer_is_the_output_filter():
    layer = layers.filter_layer(6, *SIZES, 8, 2, "cpu")
    p, q, v0 = math.exp(-1 / 8), math.exp(-1 / 2), 4 ** (4 / 3) / 3
    x = (torch.rand(BATCH, 6, STEPS) < 0.3).float().requires_grad_()
    m = s = torch.zeros(BATCH, 6)
    filtered = []
    for t in range(STEPS):
        m, s = p * m + x[..., t], q * s + x[..., t]
        filtered.append(v0 * (m - s))
    expected = torch.stack(filtered, -1)
    found = layer(x)
    assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    assert_close(*gradients)
    values = {key: value.item() for key, value in layer.state_dict().items()}
    assert values == pytest.approx(
        {"filter_v0": v0, "filter_decay_m": p, "filter_decay_s": q}, rel=1e-6
    )
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_the_exponential_filter_is_a_leaky_average():
    layer = layers.exponential_filter_layer(6, *SIZES, 0.3, "cpu")
    x = torch.rand(BATCH, 6, STEPS)
    y, expected = torch.zeros(BATCH, 6), []
    for t in range(STEPS):
        y = 0.7 * y + 0.3 * x[..., t]
        expected.append(y)
    assert_close(layer(x), torch.stack(expected, -1))
    assert not layer.state_dict()


def test_monitor_records_neurons():
    layer, x = made("neuron_membrane_filter")
    states = (torch.rand(BATCH, 4), torch.rand(BATCH, 4))
    monitor = layers.SNN_Monitor(layer, max_iteration=2)
    spikes, (_, last_reset) = layer(x, states)
    layer(0.5 * x)
    layer(2.0 * x)  # one too many: not recorded
    assert set(monitor.record) == {"v", "reset_v", "spike"}
    assert all(r.shape == (2, BATCH, 4, STEPS) for r in monitor.record.values())
    assert all(isinstance(r, np.ndarray) for r in monitor.record.values())

    cell, (v, r) = layer.neuron_cell, states
    record = {name: torch.from_numpy(value[0]) for name, value in monitor.record.items()}
    assert torch.equal(record["spike"], spikes)
    assert_close(record["reset_v"][..., -1], last_reset)
    for t in range(STEPS):
        v = cell.decay_v * v + cell.weight(x[..., t]) - r
        r = cell.reset_decay * r + cell.reset_v * (v > 1)
        assert_close(record["v"][..., t], v.detach())
        assert_close(record["reset_v"][..., t], r.detach())  # after the step: R[t+1]
    assert np.array_equal(monitor.record["spike"][1], layer(0.5 * x)[0].detach())


@pytest.mark.parametrize("name", ["dual_exp_iir", "first_order_low_pass", "axon", "synapse"])
def test_monitor_records_the_psp(name):
    layer, x = made(name)
    monitor = layers.SNN_Monitor(layer)
    psp, _ = layer(x)
    recorded = psp.detach().clone()
    psp.detach().zero_()  # what a script does to the output later is its own affair
    layer(2.0 * x)
    assert list(monitor.record) == ["psp"]
    assert np.array_equal(monitor.record["psp"], recorded[None])


def test_the_monitor_continues_over_chunks():
    layer, x = made("neuron")
    monitor = layers.SNN_Monitor(layer, max_iteration=2)
    _, states = layer(x, states=None)
    layer(x, states=states)
    whole = layers.SNN_Monitor(layer)
    layer(torch.cat([x, x], -1))
    for name, record in monitor.record.items():
        np.testing.assert_allclose(
            np.concatenate(list(record), -1), whole.record[name][0], rtol=1e-5, atol=1e-5
        )


def test_monitor_refuses_other_layers():
    for module in (nn.Linear(2, 2), LAYERS["snn"][0]()):
        with pytest.raises(TypeError, match="no layer that can be monitored"):
            layers.SNN_Monitor(module)


@pytest.mark.parametrize("name", LAYERS)
def test_an_input_of_another_shape_is_refused_in_the_order_of_the_release(name):
    layer, x = made(name)
    sizes = ", ".join(str(size) for size in x.shape[1:-1])
    expected = rf"{type(layer).__name__} is given an input of shape .*, expected \(B, {sizes}, T\)"
    wide = torch.rand(BATCH, x.shape[1] + 1, *x.shape[2:])
    for wrong in (x[0], wide, x.movedim(-1, 0)):
        with pytest.raises(ValueError, match=expected) as refused:
            layer(wrong)
        assert str(tuple(wrong.shape)) in str(refused.value)
        with pytest.raises(ValueError, match=expected):
            layer(wrong, layer.create_init_states())


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: layers.conv2d_layer(5, 6, 1, 3, 3, 1, 1, 1, *SIZES, 4, True, True), (3, 5, 6)),
        (lambda: layers.neuron_layer(6, 4, *SIZES, 4, True, True), (1,)),
        (lambda: layers.axon_layer((1,), *SIZES, 4, 1, False, False), (6,)),
    ],
)
def test_an_input_is_refused_in_this_way_too_if_a_size_is_1(build, shape):
    layer = build()
    expected = rf"{type(layer).__name__} is given an input of shape .*, expected \(B, .*, T\): "
    with pytest.raises(ValueError, match=expected):
        layer(torch.rand(BATCH, *shape, STEPS))


@pytest.mark.parametrize(
    "build",
    [
        lambda: layers.dual_exp_iir_layer((5,), *SIZES, 4, 1, True),
        lambda: layers.first_order_low_pass_layer((5,), *SIZES, 4, True),
        lambda: layers.synapse_layer(5, 2, *SIZES, 4, 1, False, False),
        lambda: layers.neuron_layer(5, 4, *SIZES, 4, True, True),
    ],
)
def test_states_of_another_batch_are_refused_in_the_order_of_the_release(build):
    layer = build()
    x = torch.rand(BATCH, 5, STEPS)
    _, states = layer(x)
    first = states if isinstance(states, torch.Tensor) else states[0]
    others = first[:2] if isinstance(states, torch.Tensor) else (first[:2], *states[1:])
    shape = ", ".join(map(str, first.shape[1:]))
    told = rf"is given a state of shape \(2, {shape}\), expected \({BATCH}, {shape}\)$"
    with pytest.raises(ValueError, match=told):
        layer(x, others)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((2, 5, 6), r"given a state of shape \(3, 2, 5, 6\), expected \(2, 2, 5, 6\)"),
        ((2, 1, 1), r"state past_output has shape \(1, 3, 2, 5, 6\)"),
    ],
)
def test_another_error_of_a_layer_is_told(shape, told):
    """Also if the input only broadcasts with the layer."""
    layer = layers.axon_layer(shape, *SIZES, 4, 1, False, False)
    x = torch.rand(BATCH, 2, 5, 6, STEPS)
    _, states = layer(x)
    with pytest.raises(ValueError, match=told):
        layer(x[:2], states)
    huge = torch.zeros(1, 1, 1, 1, 1).expand(10**9, 2, 5, 6, 10**4)
    with pytest.raises(RuntimeError, match="allocate memory") as refused:
        layer(huge)
    assert out_of_memory(refused.value)
    assert type(refused.value) is RuntimeError


def test_wrong_time_constants_are_refused():
    for build in (layers.dual_exp_iir_layer, layers.filter_layer):
        with pytest.raises(ValueError, match="expected 0 < tau_s < tau_m"):
            build((6,), *SIZES, 1, 4, False)


def test_star_import_gives_the_names_of_the_release():
    names = {}
    exec("from snn_lib.snn_layers import *", names)
    assert names["np"] is np
    assert names["torch"] is torch
    assert {
        "threshold",
        "threshold_layer",
        "dual_exp_iir_layer",
        "first_order_low_pass_layer",
        "axon_layer",
        "synapse_layer",
        "neuron_layer",
        "neuron_layer_dot_product",
        "conv2d_layer",
        "maxpooling2d_layer",
        "snn_layer",
        "filter_layer",
        "exponential_filter_layer",
        "SNN_Monitor",
        "calculate_conv2d_outsize",
        "calculate_maxpooling2d_outsize",
    } <= names.keys()

"""What a cell of one's own does, from its step alone."""

import copy
import pickle

import numpy as np
import pytest
import torch
from definitions import fire, gradients, stack
from small_networks import Integrator, in_parts
from torch import nn
from torch.func import functional_call

from snn_lib import (
    AdaptiveNeuron,
    Cell,
    Chunked,
    DualExponentialSynapse,
    FastSigmoid,
    LowPassSynapse,
    ResonateAndFireNeuron,
    Sequential,
    SpikingNeuron,
    fire_from_the_start,
    parameter_groups,
)
from snn_lib.cells import is_spiking
from snn_lib.inference import compiled, to_onnx
from snn_lib.inspection.activity import count_activity
from snn_lib.inspection.monitor import Monitor
from snn_lib.inspection.operations import CountedNetwork
from snn_lib.kernels import use_backend
from snn_lib.penalties import collect_spikes

EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class SoftReset(Cell):
    """A neuron whose spikes are subtracted; a trace of them makes its input smaller."""

    states = ("membrane", "trace")
    coefficients = ("decay", "gains")
    decays = ("decay",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (membrane, trace), (decay, gains) = state, coefficients
        membrane = decay * membrane + gains[0] * torch.tanh(x) - gains[1] * trace
        spikes = fire(membrane)
        return spikes, (membrane - spikes, 0.5 * trace + spikes)


class More(SoftReset):
    """Names a state that its step does not take, for what derives from it and has another."""

    states = ("membrane", "trace", "other")


class Leak(Cell):
    """A filter whose rows are a delay line: what came two steps ago counts."""

    states = ("past",)
    coefficients = ("weights",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (past,), (weights,) = state, coefficients
        return weights[0] * x + weights[1] * past[0], ((*past, x)[1:],)

    def state_rows(self):
        return {"past": 2}


class Gate(Cell):
    """A cell without a state: a threshold of its input."""

    coefficients = ("gain",)

    @staticmethod
    def step(x, state, coefficients, fire):
        return fire(coefficients[0] * x), ()


class Odd(Cell):
    """What no kernel can compute."""

    states = ("membrane",)
    coefficients = ("decay",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (membrane,), (decay,) = state, coefficients
        membrane = decay * membrane + torch.erf(x)
        spikes = fire(membrane)
        return spikes, (membrane - spikes,)


def soft_reset(shape=5, **options):
    torch.manual_seed(1)
    values = {"decay": torch.rand(shape), "gains": [3 * torch.rand(shape), torch.rand(shape)]}
    return SoftReset(shape, train=["gains"], train_decay=True, **values, **options)


def test_the_names_of_what_is_trained_may_come_one_by_one():
    gains = [torch.ones(5), torch.ones(5)]
    cell = SoftReset(5, decay=0.9, gains=gains, train=(name for name in ["gains"]))
    assert [name for name, _ in cell.named_parameters()] == ["gains"]


def network(**options):
    """8-5-3, loud enough to fire."""
    layers = nn.Linear(8, 5), soft_reset(**options), LowPassSynapse(5, 5.0), nn.Linear(5, 3)
    nn.init.normal_(layers[0].weight, 0.2, 0.5)
    return Sequential(*layers)


def soft_reset_by_hand(x, decay, gains, membrane, trace):
    tanh, spikes = (torch.tanh if isinstance(x, torch.Tensor) else np.tanh), []
    for x_t in x:
        membrane = decay * membrane + gains[0] * tanh(x_t) - gains[1] * trace
        spikes.append(fire(membrane))
        membrane, trace = membrane - spikes[-1], 0.5 * trace + spikes[-1]
    return stack(spikes, x), membrane, trace


@pytest.mark.usefixtures("backend")
def test_a_cell_computes_its_step_and_learns_from_its_derivatives():
    cell = soft_reset().double()
    x, *state = 2 * torch.randn(40, 3, 5).double(), *torch.rand(2, 3, 5).double()
    inputs = x, cell.decay.detach(), cell.gains.detach(), *state

    def run(x, decay, gains, *state):
        output, state = functional_call(cell, {"decay": decay, "gains": gains}, (x, state))
        return output, *state

    found = run(*inputs)
    expected = gradients(soft_reset_by_hand, inputs)
    torch.testing.assert_close(gradients(run, inputs), expected, **CLOSE)
    for one, expected in zip(found, soft_reset_by_hand(*(t.numpy() for t in inputs)), strict=True):
        torch.testing.assert_close(one, torch.as_tensor(expected), **CLOSE)
    assert 0.1 < found[0].mean() < 0.9


def test_a_cell_says_whether_it_spikes_and_how_much_arithmetic_it_takes():
    cell = soft_reset((5, 2), dropout=0.5, surrogate=FastSigmoid(0.3))
    assert is_spiking(cell)
    assert not is_spiking(Leak(3, weights=[1.0, 0.5]))
    assert not is_spiking(Integrator(3))
    assert not is_spiking(nn.Linear(3, 3))
    assert cell.key == f"{__name__}.SoftReset[-,-;-,2]"
    assert dict(cell.named_parameters()).keys() == {"decay", "gains"} == cell.state_dict().keys()
    assert cell.gains.shape == (2, 5, 2)
    # decay, two gains and 0.5; a gain of zero multiplies nothing
    assert cell.products == 4
    cell.gains.data[1, :4] = 0.0  # but not in all channels
    assert cell.products == 4
    cell.gains.data[1] = 0.0
    assert cell.products == 3
    assert set(cell.train()(torch.full((9, 4, 5, 2), 9.0))[0].unique().tolist()) <= {0.0, 2.0}


class ThreeThresholds(Cell):
    """Neurons with a trace, which thresholds of its own drive."""

    states, coefficients = ("trace",), ()

    @staticmethod
    def step(x, state, coefficients, fire):
        loud = fire(0.7 * x)
        spikes = fire(x)
        return spikes, (0.5 * state[0] + loud + fire(2.0 * x),)


def test_the_potential_of_a_cell_with_several_thresholds_is_that_of_its_output():
    cell, x = ThreeThresholds(3), 2 * torch.rand(9, 2, 3)
    assert cell.spikes
    spikes, potential, _ = cell.traces(x)
    assert torch.equal(potential, x)
    assert torch.equal(spikes, cell(x)[0])


def test_a_state_may_have_rows_and_a_cell_may_lack_coefficients():
    x = torch.randn(6, 2, 3)
    output, (past,) = Leak(3, weights=[1.0, 0.5])(x)
    torch.testing.assert_close(output[2:], x[2:] + 0.5 * x[:-2])
    torch.testing.assert_close(past, x[-2:], **EXACT)
    membrane, outputs = torch.zeros(2, 3), []
    for x_t in x:
        outputs.append(0.75 * membrane + x_t)
        membrane = outputs[-1] - (outputs[-1] > 1).float()
    output, (after,) = Integrator(3)(x)
    torch.testing.assert_close((output, after), (torch.stack(outputs), membrane))
    for dtype, own in ((torch.uint8, torch.float32), (torch.float64, torch.float64)):
        assert Integrator(3)(x.to(dtype))[0].dtype == own


def test_a_cell_without_a_state_runs_in_chunks():
    x = torch.randn(6, 2, 3)
    for model in (Gate(3, gain=2.0), Sequential(Gate(3, gain=2.0), LowPassSynapse(3, 4.0))):
        torch.testing.assert_close(in_parts(model, x, [2, 4])[0], model(x)[0], **EXACT)


def test_a_network_with_a_cell_of_one_s_own_trains_in_chunks_and_compiled():
    model, x = network(dropout=0.3), (torch.rand(25, 4, 8) < 0.4).float()
    found = []
    torch.compiler.reset()
    compiling = torch.compile(model, backend="aot_eager", fullgraph=True)
    for run in (model, Chunked(model, 10), compiling):
        torch.manual_seed(3)
        output, state = run(x)
        loss = output.square().sum() + state[1][0].sum()
        found.append((output, torch.autograd.grad(loss, list(model.parameters()))))
    assert all((gradient != 0).any() for gradient in found[0][1])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    with torch.no_grad():
        torch.testing.assert_close(in_parts(model.eval(), x, [1, 8, 16]), model(x))


def test_the_coefficients_of_a_cell_are_a_group_of_parameters():
    model = network()
    weights, coefficients = parameter_groups(model, lr=0.03)
    assert weights["lr"] == coefficients["lr"] == 0.03
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in coefficients["params"]] == ["1.decay", "1.gains", "2.alpha"]


@pytest.mark.parametrize("odd", [False, True])
def test_a_cell_is_exported_and_runs_as_a_stream_unless_no_kernel_can_compute_it(odd, tmp_path):
    model = network().double().eval()
    if odd:
        model[1] = Odd(5, decay=0.8).double()
    x = (torch.rand(30, 1, 8) < 0.4).double()
    with torch.no_grad():
        expected = model(x)[0]
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x)[0], expected, **CLOSE)
    if odd:
        for make in (compiled, lambda model: to_onnx(model, tmp_path / "network.onnx")):
            with pytest.raises(ValueError, match=r"^1 \(Odd\) runs only in PyTorch: .* calls erf"):
                make(model)
        with pytest.raises(ValueError, match=r"^layer 1 \(Odd\): a step calls erf"):
            CountedNetwork(model)
        return
    assert sum("snn.run" in str(node.target) for node in program.graph.nodes) == 2
    np.testing.assert_allclose(compiled(model).run(x[:, 0].numpy()), expected[:, 0], rtol=1e-11)
    runtime = pytest.importorskip("onnxruntime")
    to_onnx(model, tmp_path / "network.onnx")
    session = runtime.InferenceSession(str(tmp_path / "network.onnx"))
    _, *states = session.get_inputs()
    state = {one.name: np.zeros((1, *one.shape[1:])) for one in states}
    for step, target in zip(x.numpy(), expected, strict=True):
        y, *new = session.run(None, {"x": step, **state})
        state = dict(zip(state, new, strict=True))
        np.testing.assert_allclose(y, target, rtol=1e-11)


def test_first_weights_rates_penalties_and_the_monitor_know_a_cell_of_one_s_own():
    model, x = network(), (torch.rand(40, 8, 8) < 0.3).float()
    rates = fire_from_the_start(model, x, rate=0.1)
    assert rates == {"1": pytest.approx(0.1, abs=0.02)}
    with (
        Monitor(model) as monitor,
        count_activity(model) as activity,
        collect_spikes(model) as kept,
    ):
        model(x)
    membrane, trace, current = torch.zeros(8, 5), torch.zeros(8, 5), model[0](x)
    for t, spikes in enumerate(monitor["1"].spikes):
        membrane = model[1].decay * membrane + model[1].gains[0] * torch.tanh(current[t])
        membrane = membrane - model[1].gains[1] * trace
        torch.testing.assert_close(monitor["1"].membrane[t], membrane)
        assert torch.equal(spikes, (membrane > 1).float())
        membrane, trace = membrane - spikes, 0.5 * trace + spikes
    assert torch.equal(kept["1"], monitor["1"].spikes)
    assert kept["1"].requires_grad
    assert not monitor["1"].reset.any()  # it has no state of this name
    assert activity.firing_rates()["1"] == pytest.approx(monitor["1"].spikes.mean().item())
    counted = CountedNetwork(model)
    counted(x)
    assert counted.operations().neurons == 40 * 5 * model[1].products


def test_a_step_that_no_kernel_can_compute_runs_in_plain_pytorch():
    cell, x = Odd(5, decay=0.8).double(), 2 * torch.randn(9, 3, 5).double()

    def by_hand(x):
        membrane, spikes = torch.zeros_like(x[0]), []
        for x_t in x:
            membrane = 0.8 * membrane + torch.erf(x_t)
            spikes.append(fire(membrane))
            membrane = membrane - spikes[-1]
        return [torch.stack(spikes)]

    cell.decay.fill_(0.8)
    torch.testing.assert_close([cell(x)[0]], by_hand(x), **EXACT)
    expected = gradients(by_hand, [x])
    torch.testing.assert_close(gradients(lambda x: cell(x)[:1], [x]), expected, **CLOSE)
    torch.compiler.reset()
    compiling = torch.compile(cell, backend="aot_eager")
    torch.testing.assert_close(gradients(lambda x: compiling(x)[:1], [x]), expected, **CLOSE)


# Decays that are trained


NEURONS = [  # and one of one's own
    soft_reset,
    lambda: SpikingNeuron(5, 4.0, membrane_filter=True, train_decay=True),
    lambda: AdaptiveNeuron(5, 4.0, 50.0, 0.2, membrane_filter=True, train_decay=True),
    lambda: ResonateAndFireNeuron(5, 9.0, 0.1, train_decay=True),
]


@pytest.mark.parametrize("through", ["parameters", "a state dict in between"])
def test_trained_decays_stay_in_their_range_in_any_loop(through):
    x = 2 * torch.randn(20, 4, 5)
    for cell in (build() for build in NEURONS):
        decays = {name: getattr(cell, name) for name in cell.decays}
        assert all(isinstance(decay, nn.Parameter) for decay in decays.values())
        left = set()
        for number in range(6):
            cell.zero_grad()
            output, state = cell(x)
            (output.sum() + sum(part.square().sum() for part in state)).backward()
            with torch.no_grad():
                for decay in decays.values():
                    sign = 1 if number % 2 else -1
                    decay += sign * 100.0 * decay.grad + sign * 0.01
                    left |= {bool((decay < 0).any()), bool((decay >= 1).any())}
            at_work = cell.effective_coefficients()
            if through != "parameters":
                cell.load_state_dict(copy.deepcopy(cell.state_dict()))
                at_work |= {name: cell.state_dict()[name] for name in decays}
            for name in decays:
                assert (at_work[name] >= 0).all()
                assert (at_work[name] <= 1 - 1e-3).all()
            assert cell.eval()(torch.ones(3000, 1, 5))[0].isfinite().all()
            cell.train()
        assert True in left  # the parameters, not the cell


def test_the_gradient_of_a_decay_out_of_range_is_that_of_the_decay_at_work():
    outside, at_work = soft_reset().double().eval(), soft_reset().double().eval()
    outside.decay.data.fill_(1.5)
    at_work.load_state_dict(copy.deepcopy(outside).state_dict())
    assert (at_work.decay == 1 - 1e-3).all()
    assert (outside.decay == 1.5).all()
    x = torch.randn(9, 2, 5).double()
    for cell in (outside, at_work):
        cell(x)[0].sum().backward()
    assert torch.equal(outside.decay.grad, at_work.decay.grad)
    assert at_work.decay.grad.any()
    # and where other tensors stand in its place
    given = torch.zeros(1, 1, 5), (torch.ones(1, 5), torch.zeros(1, 5))
    _, (membrane, _) = functional_call(soft_reset(), {"decay": torch.full((5,), 1.5)}, given)
    torch.testing.assert_close(membrane, torch.full((1, 5), 1 - 1e-3))
    outside.train()(x)
    assert (outside.decay == 1 - 1e-3).all()


def test_decays_that_are_zero_or_not_trained_are_no_parameters_and_stay_as_they_are():
    neuron = SpikingNeuron(3, 5000.0, train_reset_strength=True)
    assert dict(neuron.named_parameters()).keys() == {"reset_strength"}
    assert neuron.effective_coefficients()["reset_decay"] is neuron.reset_decay
    assert (neuron.reset_decay > 1 - 1e-3).all()
    trained = SpikingNeuron(3, 4.0, train_decay=True)
    assert dict(trained.named_parameters()).keys() == {"reset_decay"}  # no membrane filter


# Copies and files


@pytest.mark.parametrize(
    ("cell", "keys"),
    [
        (SpikingNeuron(3, 4.0), ["reset_decay", "reset_strength", "membrane_decay"]),
        (DualExponentialSynapse(3, 4.0, 1.0), ["alpha", "beta"]),
        (soft_reset(3), ["decay", "gains"]),
    ],
)
def test_a_state_dict_holds_the_coefficients_and_copies_and_pickles_run_alike(cell, keys):
    assert list(cell.state_dict()) == keys
    x = torch.randn(9, 2, 3)
    expected = cell(x)
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        torch.testing.assert_close(other(x), expected, **EXACT)
        getattr(other, keys[0]).data.zero_()
    torch.testing.assert_close(cell(x), expected, **EXACT)


def mine(after):
    """A class of its own, which has the name of all that are made here."""
    scope = {"Cell": Cell, "__name__": __name__}
    exec(
        "class Mine(Cell):\n"
        "    states = ('membrane',)\n"
        "    @staticmethod\n"
        "    def step(x, state, coefficients, fire):\n"
        "        membrane = state[0] + x\n"
        "        spikes = fire(membrane)\n"
        f"        return spikes, ({after},)\n",
        scope,
    )
    return scope["Mine"]


def test_a_layer_keeps_its_step_where_another_cell_of_its_name_is_defined():
    x = torch.rand(30, 2, 3, requires_grad=True)
    first = mine("membrane - spikes")(3)
    output, (last,) = first(x)
    (gradient,) = torch.autograd.grad(last.sum(), x, retain_graph=True)
    second = mine("membrane * (1 - spikes)")(3)
    assert not torch.equal(second(x)[0], output)
    assert torch.equal(first(x)[0], output)
    assert torch.equal(torch.autograd.grad(last.sum(), x)[0], gradient)
    for layer in (first, second):
        stream = compiled(Sequential(layer), (3,))
        assert np.array_equal(stream.run(x.detach()[:, 0].numpy()), layer(x)[0].detach()[:, 0])


# Refusals


class NoStates(Cell):
    """Its step forgets to return the states."""

    @staticmethod
    def step(x, state, coefficients, fire):
        return fire(x)


def leak(x, state, coefficients, fire):
    """Half of what was remembered, and the input."""
    level = 0.5 * state[0] + x
    return level, (level,)


def test_a_step_may_come_from_a_class_that_is_no_cell():
    step = type("Leaky", (), {"step": staticmethod(leak)})
    made, x = type("Mixed", (step, Cell), {"states": ("level",)})(3), torch.randn(9, 2, 3)
    output, (last,) = made(x)
    expected = [x[0]]
    for now in x[1:]:
        expected.append(0.5 * expected[-1] + now)
    torch.testing.assert_close(output, torch.stack(expected))
    assert torch.equal(last, output[-1])


class NoComma(Cell):
    """Its step returns its only state without a tuple."""

    states = ("membrane",)

    @staticmethod
    def step(x, state, coefficients, fire):
        return fire(state[0] + x), state[0] + x


X = torch.zeros(4, 2, 3)
REFUSED = [  # what is built or run, and the words
    (lambda: SoftReset(3, decay=0.5), "gains has no value or is unknown: .* decay, gains"),
    (lambda: Odd(3, decay=0.5, gain=1.0), "gain has no value or is unknown: .* are decay"),
    (lambda: Odd(3, decay=0.5, train=["gain"]), "gain has no value or is unknown"),
    (lambda: Odd(3, decay=torch.ones(2)), r"decay has the shape \(2,\), expected \(3,\)"),
    (lambda: soft_reset(3, dropout=1.0), r"dropout is 1.0, expected a probability in \[0, 1\)"),
    (lambda: SoftReset(3, decay=1.0, gains=[1.0, 1.0]), "does not decay"),
    (lambda: SoftReset(3, decay=-0.5, gains=[1.0, 1.0], train_decay=True),
     r"decay is trained, and -0\.5: expected a decay in \[0, 0\.999\]"),
    (lambda: Odd(3, decay="fast"), "decay is 'fast', expected numbers"),
    (lambda: SpikingNeuron(3, 4.0, reset_strength=torch.inf), "strength is inf, expected finite"),
    (lambda: Odd(3, decay=[0.1, 0.2, 0.3]), "the step of .*Odd: .* given decay as a tup"),
    (lambda: Odd(3, decay=0.5, train="decay"), r"train is 'decay', expected .* \['decay'\]"),
    (lambda: NoStates(3)(X), "the step of .*NoStates returns Tensor, expected a tuple of"),
    (lambda: type("Twice", (Cell,), {"states": ("a", "a")}), "Twice.states names 'a' twice"),
    (lambda: type("Stepless", (Cell,), {})(3), "Stepless has no step"),
    (lambda: type("Method", (Cell,), {"step": leak}), "Method.step is a method: write @static"),
    (lambda: More(3, decay=0.5, gains=[1.0, 1.0]),
     "More.states names 3, but its step is that of SoftReset, which takes 2: define a step"),
    (lambda: type("Fewer", (SoftReset,), {"coefficients": ("decay",)})(3, decay=0.5),
     "Fewer.coefficients names 1, but its step is that of SoftReset, which takes 2: define"),
    (lambda: type("Fireless", (Cell,), {"step": staticmethod(lambda x, state, coefficients: x)}),
     r"Fireless.step\(x, state, coefficients\): expected four arguments, x, state"),
    (lambda: NoComma(3)(X), r"NoComma returns its states as Tensor, .* such as \(state,\) for a"),
    (lambda: NoComma(3, train_decay=True), "train_decay has no effect: NoComma names no decays"),
    (lambda: SpikingNeuron(6 / 2, 5.0), "shape is 3.0, expected a whole number of at least 0"),
    (lambda: SpikingNeuron(-3, 5.0), "shape is -3, expected a whole number of at least 0"),
    (lambda: SpikingNeuron((2, 3.0), 5.0), "shape is 3.0, expected a whole number of at least 0"),
    (lambda: type("One", (Cell,), {"states": "v"}), r"One.states is 'v', expected .* \('v',\)"),
    (lambda: type("One", (Cell,), {"coefficients": "d"}), "One.coefficients is 'd', expected"),
    (lambda: type("Misspelt", (Cell,), {"decays": ("decya",)}), "decays names 'decya', which is"),
    (lambda: soft_reset(3)(torch.zeros(4, 2, 5)), r"x has shape \(4, 2, 5\), .*shape \(3,\)"),
    (lambda: soft_reset(3)(X[:, 0]), r"x has shape \(4, 3\)"),
    (lambda: soft_reset((2, 3))(X), r"x has shape \(4, 2, 3\), expected .* shape \(2, 3\)"),
    (lambda: soft_reset(3)(X[None]), r"x has shape \(1, 4, 2, 3\), expected .* shape \(3,\)"),
    (lambda: soft_reset(3)(X, (X[0],)), r"state has 1 entries, expected 2: \(membrane, trace\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_bad_settings_and_inputs_are_refused(call, words):
    with pytest.raises((TypeError, ValueError), match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_step_that_reads_what_surrounds_it_is_refused_where_it_is_defined():
    factor = 0.5
    with pytest.raises(ValueError, match=r"Closure reads variables .*: make them coefficients"):

        class Closure(Cell):
            @staticmethod
            def step(x, state, coefficients, fire):
                return factor * x, ()


def test_a_step_with_branches_or_changes_in_place_is_refused_where_it_runs():
    class If(Cell):
        states = ("membrane",)

        @staticmethod
        def step(x, state, coefficients, fire):
            membrane = state[0] + x
            if membrane > 1:
                membrane = membrane - 1
            return fire(membrane), (membrane,)

    class InPlace(Cell):
        states = ("membrane",)

        @staticmethod
        def step(x, state, coefficients, fire):
            (membrane,) = state
            membrane += x
            return fire(membrane), (membrane,)

    x = torch.zeros(4, 2, 3)
    for cell, words in ((If, "course depends on values"), (InPlace, "in place, by add_")):
        with pytest.raises(ValueError, match=f"^layer 0: a step.*{words}"):
            Sequential(cell(3))(x)


@pytest.mark.parametrize(
    "name", ["step", "key", "products", "dropout", "train", "shape", "training", "kind"]
)
def test_a_coefficient_has_no_name_of_the_cell_s_own(name):
    with pytest.raises(ValueError, match=f"coefficients names '{name}', which every Cell has"):
        type("Own", (Cell,), {"coefficients": (name,), "step": staticmethod(lambda *a: a)})


def test_parameters_are_divided_of_a_module_alone():
    with pytest.raises(TypeError, match="model is a generator, expected a torch"):
        parameter_groups(nn.Linear(2, 2).parameters(), 0.1)
    for lr, scale in ((-0.1, 1.0), (0.1, -1.0), (0.1, torch.nan)):
        with pytest.raises(ValueError, match=f"lr is {lr} and coefficient_lr_scale {scale}, exp"):
            parameter_groups(nn.Linear(2, 2), lr, scale)


class Flagged(Cell):
    """A bool of Python's in a condition, which no kernel computes."""

    states = ("rest",)

    @staticmethod
    def step(x, state, coefficients, fire):
        blocked = (state[0] > 0.5) & torch.tensor(True)
        spikes = fire(torch.where(blocked, 0.0 * x, x))
        return spikes, (0.5 * state[0] + spikes,)


def test_a_condition_with_a_bool_of_python_s_runs_in_plain_pytorch():
    x = 3 * torch.rand(20, 2, 5)
    with use_backend("eager"):
        expected, _ = Flagged(5)(x)
    assert torch.equal(Flagged(5)(x)[0], expected)
    assert 0 < expected.mean() < 1

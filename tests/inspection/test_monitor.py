"""What the monitor records of synapses and neurons, against their equations step by step."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from definitions import traces_by_hand
from small_networks import Held, RenamedInput, Threshold
from torch import nn

from snn_lib import Chunked, DualExponentialSynapse, LowPassSynapse, Sequential, SpikingNeuron
from snn_lib.containers import Output, StatefulModule
from snn_lib.inspection.monitor import Monitor, as_numpy


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Sequential(
        DualExponentialSynapse(6, 4.0, 1.0),
        nn.Linear(6, 5),
        SpikingNeuron(5, 4.0, dropout=0.4),
        LowPassSynapse(5, 3.0),
        nn.Linear(5, 4),
        SpikingNeuron(4, 3.0, membrane_filter=True, reset_strength=0.7),
    )
    with torch.no_grad():
        model[1].weight *= 6
        model[4].weight *= 4
    return model.eval()


@pytest.fixture
def x():
    return (torch.rand(30, 3, 6, generator=torch.Generator().manual_seed(1)) < 0.3).float()


def test_padding_is_recorded_like_the_rest(model, x):
    with Monitor(model) as whole:
        model(x)
    with Monitor(model) as padded:
        model(x, lengths=torch.tensor([30, 7, 12]))
    for name in ("0", "2", "3", "5"):
        torch.testing.assert_close(vars(padded[name]), vars(whole[name]), rtol=0, atol=0)


def test_a_record_is_what_a_layer_has_returned_though_the_next_works_in_place():
    model, x = Sequential(LowPassSynapse(5, 3.0), nn.ReLU(inplace=True)), torch.randn(9, 2, 5)
    with Monitor(model) as monitor:
        model(x)
    psp, _ = model[0](x)
    assert psp.min() < 0
    assert monitor["0"].psp.equal(psp)


class HandingOn(SpikingNeuron):
    def traces(self, *given, **named):
        return super().traces(*given, **named)


@pytest.mark.parametrize("kind", [SpikingNeuron, HandingOn])
def test_lengths_are_no_state(x, kind):
    neuron = kind(6, 4.0)
    with Monitor(neuron) as monitor:
        neuron(2 * x, lengths=torch.tensor([4, 30, 9]))
    assert torch.equal(monitor[""].spikes, neuron(2 * x).output)


def test_layers_of_a_user_s_own_may_name_their_input_as_they_like():
    x, plain = 2 * torch.rand(9, 2, 5), SpikingNeuron(5, 4.0)
    model = Sequential(RenamedInput(5, 4.0))
    with Monitor(model) as monitor:
        model(x)
    torch.testing.assert_close(monitor["0"].membrane, plain.traces(x)[1])


class Noisy(SpikingNeuron):
    """Neurons whose own forward gives them something else than it is given."""

    def forward(self, x, before=None):
        return super().forward(3 * x + torch.rand_like(x), before)


def test_neurons_with_a_forward_of_their_own_are_recorded_as_they_ran(x):
    model = Sequential(nn.Linear(6, 5), Noisy(5, 4.0))
    with Monitor(model) as outer, Monitor(model) as monitor:
        _, state = model(x)
        spikes, _ = model(x, state)
    assert spikes.any()
    for one in (outer, monitor):
        assert torch.equal(one["1"].spikes, spikes)
        assert ((one["1"].membrane > 1) == one["1"].spikes.bool()).all()
    assert "call" not in vars(model[1])


def test_neurons_with_a_forward_of_their_own_are_recorded_while_they_train_in_chunks(x):
    model = Sequential(nn.Linear(6, 5), Noisy(5, 4.0))
    with Monitor(model) as monitor:
        for _ in range(2):
            spikes, _ = Chunked(model, 7)(x)
            spikes.sum().backward()  # runs each chunk again
            model[1].forward(x[..., :5])  # without hooks
    assert torch.equal(monitor["1"].spikes, spikes)


def test_what_a_step_returns_of_its_coefficients_is_recorded_of_every_sequence(x):
    jump = torch.linspace(0.5, 1.5, 6)
    model = Sequential(Held(6, jump=jump, decay=0.5))
    with Monitor(model) as monitor:
        output, _ = model(x)
    record = monitor["0"]
    assert torch.equal(record.spikes, output)
    assert torch.equal(record.membrane, jump.expand_as(x))
    assert torch.equal(record.reset[1:], jump.expand_as(x)[1:])


class Traced(Noisy):
    def traces(self, x, *, before=None):
        return tuple(x.new_full(x.shape, number) for number in range(3))


class Amplified(SpikingNeuron):
    def forward(self, x, state=None, gain=3.0):
        return super().forward(gain * x, state)


@pytest.mark.parametrize("compiling", [False, True])
def test_neurons_with_a_forward_of_their_own_are_recorded_in_a_compiled_model(x, compiling):
    model = Sequential(nn.Linear(6, 5), Amplified(5, 4.0))
    torch.compiler.reset()
    run = torch.compile(model, backend="eager") if compiling else model
    run(x)
    with Monitor(model) as monitor:
        output, _ = run(3 * x)
    assert output.any()
    assert torch.equal(monitor["1"].spikes, output)
    with Monitor(model[1]) as monitor:
        output, _ = model[1](x[..., :5], gain=2.0)
    assert torch.equal(monitor[""].spikes, output)
    expected = SpikingNeuron(5, 4.0).traces(2 * x[..., :5])[1]
    torch.testing.assert_close(monitor[""].membrane, expected)


class TracedByItsName(SpikingNeuron):
    def forward(self, x, s=None):
        return super().forward(x, s)

    def traces(self, x, s=None, **others):
        return super().traces(x, s, **others)


class TracedByPlace(SpikingNeuron):
    def traces(self, x, *state):
        return super().traces(x, *state)


def test_traces_that_take_the_state_by_its_place_record_what_begins_at_rest(x):
    model = TracedByPlace(6, 4.0)
    with Monitor(model) as monitor:
        output, state = model(2 * x)
        assert torch.equal(monitor[""].spikes, output)
        with pytest.raises(TypeError, match="unexpected keyword argument 'state'"):
            model(2 * x, state)


def test_traces_of_a_user_s_own_are_what_is_recorded(x):
    model = Sequential(nn.Linear(6, 5), Traced(5, 4.0))
    with Monitor(model) as monitor:
        _, state = model(x)
        model(x, state)
    assert [part.unique().item() for part in vars(monitor["1"]).values()] == [0, 1, 2]


class TracedByState(SpikingNeuron):
    def forward(self, x, hidden=None, gain=1.0):
        return super().forward(gain * x, hidden)

    def traces(self, x, state=None):
        return super().traces(x, state)


class HandingAllOn(SpikingNeuron):
    def forward(self, *arguments, **others):
        return super().forward(*arguments, **others)

    def traces(self, *arguments, **others):
        return super().traces(*arguments, **others)


@pytest.mark.parametrize("kind", [TracedByState, HandingOn, HandingAllOn, TracedByItsName])
def test_traces_are_given_the_state_by_its_name_and_what_else_they_know(x, kind):
    model = kind(6, 4.0)
    _, state = model(2 * x[:9])
    with Monitor(model) as monitor:
        output, _ = model(2 * x[9:], state)
    assert output.any()
    assert torch.equal(monitor[""].spikes, output)


def test_a_monitored_neuron_lets_other_models_compile(x):
    torch.compiler.reset()
    with Monitor(Noisy(6, 4.0)) as monitor, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is seen of it
        other = torch.compile(SpikingNeuron(6, 4.0), backend="eager", fullgraph=True)
        assert other(x).output.shape == x.shape
        monitor._model(x)


class InHalves(SpikingNeuron):
    def forward(self, x, state=None, lengths=None):
        first, state = super().forward(x[:5], state)
        rest, state = super().forward(x[5:], state)
        return Output(torch.cat([first, rest]), state)


def test_neurons_that_run_twice_in_a_forward_of_their_own_are_not_recorded(x):
    model = Sequential(nn.Linear(6, 5), InHalves(5, 4.0))
    with (
        Monitor(model),
        pytest.raises(ValueError, match=r"layer '1' \(InHalves\) .* calls Cell.forward 2 times"),
    ):
        model(x)


def neuron_by_definition(neuron, current, membrane, reset):
    """Spikes, membrane potential and reset, step by step."""
    coefficients = neuron.reset_decay, neuron.reset_strength, neuron.membrane_decay
    return traces_by_hand(current, *coefficients, membrane, reset)


def assert_record(record, expected):
    assert record.spikes.equal(expected[0])
    torch.testing.assert_close(record.membrane, expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(record.reset, expected[2], rtol=1e-5, atol=1e-5)


def test_every_synapse_and_neuron_is_recorded_with_the_traces_of_the_definition(model, x):
    with Monitor(model) as monitor:
        output, _ = model(x)
    assert list(monitor.records) == ["0", "2", "3", "5"]
    signal = x
    for index, module in enumerate(model.children()):
        if isinstance(module, SpikingNeuron):
            rest = torch.zeros(3, *module.shape)
            expected = neuron_by_definition(module, signal, rest, rest)
            assert_record(monitor[str(index)], expected)
            assert 0.05 < expected[0].mean() < 0.95
            signal = expected[0]
        elif isinstance(module, nn.Linear):
            signal = module(signal)
        else:
            signal, _ = module(signal)
            assert monitor[str(index)].psp.equal(signal)
    assert monitor["5"].spikes.equal(output)


def test_under_autocast_spikes_are_where_the_membrane_is_above_the_threshold(model, x):
    with Monitor(model) as monitor, torch.autocast("cpu", torch.bfloat16):
        model(x)
    for name in ("2", "5"):
        assert monitor[name].spikes.bool().equal(monitor[name].membrane > 1)


def test_a_neuron_without_a_memory_is_recorded():
    x, model = 2 * torch.rand(9, 2, 5), Sequential(Threshold(5))
    with Monitor(model) as monitor:
        model(x)
    record = monitor["0"]
    assert record.membrane.equal(x)
    assert record.spikes.equal((x > 1).float())
    assert not record.reset.any()


@pytest.mark.parametrize("membrane_filter", [False, True])
def test_a_neuron_that_goes_on_from_a_state_is_recorded(membrane_filter):
    neuron = SpikingNeuron((2, 2), 5.0, membrane_filter=membrane_filter)
    current = torch.rand(20, 3, 2, 2) * 2
    state = torch.rand(3, 2, 2), torch.rand(3, 2, 2)
    with Monitor(nn.Sequential(neuron)) as monitor:
        neuron(current, state=state)
    assert_record(monitor["0"], neuron_by_definition(neuron, current, *state))


def test_a_run_in_chunks_is_recorded_as_one_run_though_its_chunks_run_again(model, x):
    with Monitor(model) as whole:
        model(x)
    chunked = Chunked(model, steps=7)  # the last chunk is shorter
    with Monitor(chunked) as monitor:
        for _ in range(2):  # each run anew
            chunked(x)[0].sum().backward()
    assert list(monitor.records) == [f"module.{name}" for name in whole.records]
    for name, record in whole.records.items():
        for trace, expected in vars(record).items():
            found = getattr(monitor[f"module.{name}"], trace)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_last_call_of_a_layer_that_is_used_twice_is_recorded_in_chunks_too():
    synapse = LowPassSynapse(3, 4.0)
    model, x = Sequential(synapse, nn.Linear(3, 3), synapse), torch.rand(10, 2, 3)
    chunked = Chunked(model, 4)
    with torch.no_grad(), Monitor(model) as whole, Monitor(chunked) as monitor:
        chunked(x)
        found = monitor["module.0"].psp
        model(x)
    torch.testing.assert_close(found, whole["0"].psp)


class LeftOut(StatefulModule):
    """One of two layers runs where its input is large, the other where it is small."""

    def __init__(self):
        super().__init__()
        self.layer, self.resting = LowPassSynapse(5, 3.0), LowPassSynapse(5, 3.0)

    def forward(self, x, state=None):
        return (self.layer if x.max() > 1 else self.resting)(x, state)


def test_of_a_layer_that_a_chunk_leaves_out_the_others_are_recorded():
    x, model = torch.rand(9, 2, 5), LeftOut()
    x[3:] += 1  # the first of three chunks leaves it out
    with Monitor(model) as monitor:
        model(x)
        Chunked(model, 3)(x)
    state = model.resting(x[:3]).state
    torch.testing.assert_close(monitor["layer"].psp, model.layer(x[3:], state).output)


def test_dropout_does_not_hide_spikes(model, x):
    with Monitor(model, ["2"]) as resting:
        model(x)
    with Monitor(model, ["2"]) as training:
        model.train()(x)
    assert training["2"].spikes.equal(resting["2"].spikes)
    assert training["2"].reset.equal(resting["2"].reset)


def test_only_the_layers_that_are_named_are_recorded(model, x):
    with Monitor(model, ["3", "2"]) as monitor:
        model(x)
    assert set(monitor.records) == {"2", "3"}
    with pytest.raises(KeyError, match="nothing is recorded of 2, only of '2', '3'"):
        monitor[2]


def test_layers_may_come_and_go_before_the_context(x):
    model = Sequential(nn.Linear(6, 5), SpikingNeuron(5, 4.0))
    monitor = Monitor(model)
    model[1] = nn.ReLU()
    model.append(nn.Linear(5, 3))
    model.append(Noisy(3, 4.0))
    with monitor:
        output, _ = model(x)
    assert set(monitor.records) == {"3"}
    assert torch.equal(monitor["3"].spikes, output)


@pytest.mark.parametrize("name", ["1", "7", ""])
def test_names_of_other_layers_are_refused(model, name):
    with pytest.raises(ValueError, match=f"no synapse or neuron layer '{name}', choose from '0'"):
        Monitor(model, [name])
    with pytest.raises(KeyError, match=f"nothing is recorded of '{name}'"):
        Monitor(model)[name]


def test_a_text_is_no_list_of_names(model):
    with pytest.raises(TypeError, match=r"layers is '3', expected the names in a list: \['3'\]"):
        Monitor(model, "3")


def test_recording_changes_no_output_gradient_or_state_dict(model, x):
    before, _ = model(x)
    keys = list(model.state_dict())
    with Monitor(model) as monitor:
        inside, _ = model(x)
        inside.sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
    recorded = monitor["5"]
    model.zero_grad()
    after, _ = model(x)
    after.sum().backward()
    assert before.equal(inside)
    assert before.equal(after)
    assert monitor["5"] is recorded  # nothing is recorded outside
    assert list(model.state_dict()) == keys
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad.equal(gradient)
    assert not any(module._forward_hooks for module in model.modules())
    assert not recorded.membrane.requires_grad
    assert not monitor["0"].psp.requires_grad


@pytest.mark.parametrize("steps", [7, 30])
def test_recording_does_not_change_dropout(steps):
    layers = nn.Linear(6, 64), SpikingNeuron(64, 3.0, dropout=0.5), nn.Linear(64, 64)
    model = Sequential(*layers, SpikingNeuron(64, 3.0, dropout=0.5), nn.Linear(64, 1))
    for weights in (model[0].weight, model[2].weight):
        weights.data *= 5
    chunked, x, found = Chunked(model, steps), torch.randn(30, 4, 6), []
    for context in (nullcontext(), Monitor(model)):
        torch.manual_seed(1)
        with context:
            output, _ = chunked(x)
        found.append([output, *torch.autograd.grad(output.sum(), model.parameters())])
    assert all(map(torch.equal, *found))


def test_a_run_of_no_steps_is_recorded_as_none(model, x):
    with Monitor(model) as monitor:
        model(x[:0])
    for trace in vars(monitor["2"]).values():
        assert trace.shape == (0, x.shape[1], 5)


def test_hooks_are_gone_after_an_error(model):
    with pytest.raises(ValueError, match="shape"), Monitor(model):
        model(torch.rand(4, 2, 7))
    assert not any(module._forward_hooks for module in model.modules())


def test_each_run_replaces_the_record(model, x):
    with Monitor(model) as monitor:
        model(x)
        model(x[:7])
    assert monitor["2"].spikes.shape == (7, 3, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_neuron_of_lower_precision_is_recorded_in_float32(dtype):
    neuron = SpikingNeuron(4, 5.0, membrane_filter=True).to(dtype)
    current = (2 * torch.rand(20, 3, 4)).to(dtype)
    with Monitor(neuron) as monitor:
        neuron(current)
    record = monitor[""]
    rest = torch.zeros(3, 4)
    assert_record(record, neuron_by_definition(neuron.float(), current.float(), rest, rest))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_tensors_of_any_dtype_become_arrays_and_low_precision_float32(low):
    for dtype, expected in ((low, "float32"), (torch.float64, "float64"), (torch.bool, "bool")):
        tensor = torch.tensor([[0, 1], [1, 0]], dtype=dtype)
        array = as_numpy(tensor.requires_grad_(tensor.is_floating_point()))
        assert array.dtype == expected
        assert array.tolist() == [[0, 1], [1, 0]]

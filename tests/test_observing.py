"""What is reported of the calls of layers."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn

from snn_lib import Chunked, Sequential, SpikingNeuron, answer_from_the_start, fire_from_the_start
from snn_lib.containers import is_weighted
from snn_lib.inference.description import describe
from snn_lib.inspection.activity import count_activity
from snn_lib.inspection.monitor import Monitor
from snn_lib.observing import observe, observe_layers
from snn_lib.penalties import collect_spikes
from snn_lib.pytorch_private import forward_hooks


def test_a_call_is_reported_with_its_arguments_by_name_until_the_handle_is_removed():
    neuron, calls = SpikingNeuron(2, 4.0), []
    handle = observe(neuron, lambda given, result: calls.append((given, result)))
    current, state = torch.ones(3, 1, 2), (torch.zeros(1, 2), torch.zeros(1, 2))
    output = neuron(current, state=state)
    handle.remove()
    neuron(current)
    ((given, result),) = calls
    assert list(given) == ["x", "state"]
    assert given["x"] is current
    assert given["state"] is state
    assert result is output.output


def test_layers_are_reported_by_name_until_the_context_is_left_and_also_after_an_error():
    model = Sequential(nn.Linear(2, 2), SpikingNeuron(2, 4.0), nn.Linear(2, 2))
    calls = []
    observing = observe_layers(model, is_weighted, lambda *call: calls.append(call[:2]))
    with contextlib.suppress(RuntimeError), observing:
        model(torch.ones(3, 1, 2))
        raise RuntimeError
    model(torch.ones(3, 1, 2))
    assert calls == [("0", model[0]), ("2", model[2])]


def test_chunks_that_run_again_for_the_backward_pass_are_not_reported_again():
    model, steps = Sequential(nn.Linear(2, 2), SpikingNeuron(2, 4.0)), []
    with observe_layers(model, is_weighted, lambda *call: steps.append(len(call[2]["input"]))):
        Chunked(model, 2)(torch.ones(5, 1, 2))[0].sum().backward()
    assert steps == [2, 2, 1]


class Noisy(SpikingNeuron):
    """Neurons of a user's own, whose state has another name."""

    def forward(self, x, before=None, lengths=None):
        return super().forward(x + torch.rand_like(x), before, lengths)


@pytest.mark.parametrize("kind", [SpikingNeuron, Noisy])
def test_a_copy_is_not_reported_and_is_free_of_what_observes_the_model(kind):
    model, x = Sequential(nn.Linear(4, 3), kind(3, 4.0)), 3 * torch.rand(9, 2, 4)
    nn.init.constant_(model[0].weight, 0.3)
    watching = Monitor(model), count_activity(model), collect_spikes(model)
    with watching[0] as monitor, watching[1] as activity, watching[2] as spikes:
        output, _ = model(x)
        other = copy.deepcopy(model)
        other(0 * x)
    other(0 * x)
    assert torch.equal(monitor["1"].spikes, output)
    assert torch.equal(spikes["1"], output)
    assert activity.firing_rates()["1"] == pytest.approx(output.mean().item())
    with torch.no_grad():
        other[1].reset_strength.fill_(0.25)
    torch.manual_seed(1)
    found, _ = other(x)
    with Monitor(other) as monitor:
        torch.manual_seed(1)
        other(x)
    assert torch.equal(monitor["1"].spikes, found)
    assert torch.equal(monitor["1"].reset[1], 0.25 * found[0])
    assert not forward_hooks(other[1])
    if kind is SpikingNeuron:
        describe(other)


def test_monitors_may_end_in_any_order():
    model, x = Sequential(Noisy(3, 4.0)), torch.rand(9, 2, 3)
    first, second = Monitor(model), Monitor(model)
    first.__enter__()
    second.__enter__()
    before, _ = model(x)
    first.__exit__(None, None, None)
    output, _ = model(x + 1)
    second.__exit__(None, None, None)
    assert torch.equal(first["0"].spikes, before)
    assert torch.equal(second["0"].spikes, output)


class WithGain(SpikingNeuron):
    def forward(self, x, gain=1.0, state=None, lengths=None):
        return super().forward(gain * x, state, lengths)


class Named(SpikingNeuron):
    def forward(self, x, **named):
        named.pop("gain", None)
        return super().forward(x, **named)


class Windowed(SpikingNeuron):
    def forward(self, x, gain=(1.0, 2.0), state=None, lengths=None):
        return super().forward(x, state, lengths)


@pytest.mark.parametrize("kind", [WithGain, Named, Windowed])
def test_other_arguments_are_no_state(kind):
    model, x = kind(3, 4.0), torch.rand(9, 2, 3)
    state, lengths = model(x).state, torch.tensor([4, 9])
    gain = (2.0, 3.0) if kind is Windowed else 2.0
    for options in ({"gain": gain}, {"state": None}, {"lengths": lengths}):
        with collect_spikes(model) as spikes:
            model(x, **options)
            model(x, **options)
        assert len(spikes[""]) == 9
    with collect_spikes(model) as spikes:
        model(x)
        model(x, state=state)
    assert len(spikes[""]) == 18


def test_chunks_of_neurons_whose_state_has_another_name_are_one_sequence():
    model, x = Sequential(nn.Linear(4, 3), Noisy(3, 4.0)), torch.rand(9, 2, 4)
    with collect_spikes(model) as spikes:
        first, state = model(x[:5])
        rest, _ = model(x[5:], state)
    assert torch.equal(spikes["1"], torch.cat([first, rest]))


def in_eager_mode(module):
    module.compile(backend="eager")
    return module


COMPILED = [lambda module: torch.compile(module, backend="eager"), in_eager_mode]


@pytest.mark.parametrize("compile_it", COMPILED, ids=["torch.compile", "Module.compile"])
def test_layers_that_a_compiled_model_runs_unseen_are_refused_by_name(compile_it):
    torch.compiler.reset()
    x, layers = torch.ones(3, 1, 2), (nn.Linear(2, 2), SpikingNeuron(2, 4.0))
    model = compile_it(Sequential(*layers)).eval()
    with torch.no_grad():
        model(x)  # this program calls no hooks
        for observing in (
            observe_layers(model, is_weighted, print),
            collect_spikes(model),
            Monitor(model),
        ):
            with (
                pytest.raises(ValueError, match=r"nothing was seen of .*torch\.compile"),
                observing,
            ):
                model(x)
        before = layers[0].weight.clone()
        with pytest.raises(ValueError, match=r"nothing was seen of layer .*torch\.compile"):
            fire_from_the_start(model, x)
        assert torch.equal(layers[0].weight, before)
        with pytest.raises(ValueError, match=r"the last layer runs 0 times .* is not compiled"):
            answer_from_the_start(model, layers[0], [(x, torch.zeros(1).long(), None)])


def test_layers_beside_a_compiled_part_are_observed():
    torch.compiler.reset()
    model = Sequential(in_eager_mode(nn.Linear(2, 2)), SpikingNeuron(2, 4.0))
    for _ in range(2):
        with collect_spikes(model) as spikes:
            model(torch.ones(3, 1, 2))
        assert spikes.keys() == {"1"}


def test_a_model_of_which_a_program_ran_elsewhere_is_said_to_be_unseen():
    torch.compiler.reset()
    x, model = torch.ones(3, 1, 2), Sequential(nn.Linear(2, 2), SpikingNeuron(2, 4.0))
    program = torch.compile(model, backend="eager")
    program(x)
    for observe_it in (collect_spikes, Monitor, count_activity):
        words = r"nothing was seen of layer 1: .* torch\.compile"
        with pytest.warns(RuntimeWarning, match=words), observe_it(model):
            program(x)
        with warnings.catch_warnings(), observe_it(model):
            warnings.simplefilter("error")
            model(x)
    unused = nn.ModuleDict({"used": model, "unused": SpikingNeuron(2, 4.0)})
    with warnings.catch_warnings(), collect_spikes(unused):
        warnings.simplefilter("error")
        model(x)

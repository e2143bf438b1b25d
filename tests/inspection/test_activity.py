"""Firing rates of any network, whatever its ``forward`` does, against the spikes themselves."""

import contextlib

import pytest
import torch
from small_networks import in_parts
from torch import nn

from snn_lib import Chunked, LowPassSynapse, Sequential, SpikingNeuron, fire_from_the_start
from snn_lib.inspection.activity import count_activity
from snn_lib.inspection.monitor import Monitor
from snn_lib.penalties import collect_spikes

LENGTHS = torch.tensor([9, 2, 5])


class Loop(nn.Module):
    """Neurons that run twice at each step, and others that are called in parts of the sequence."""

    def __init__(self, part):
        super().__init__()
        torch.manual_seed(0)
        weights, synapse, neuron = nn.Linear(6, 6), LowPassSynapse(6, 4.0), SpikingNeuron(6, 4.0)
        nn.init.normal_(weights.weight, 0.2, 0.6)
        self.twice, self.parts = Sequential(*[weights, synapse, neuron] * 2), SpikingNeuron(6, 4.0)
        self.part = part

    def forward(self, x, state=None):
        x, state, outputs, potentials = *self.twice(x, state and state[0]), [], state and state[1]
        for steps in (3 * x).split(self.part):
            output, potentials = self.parts(steps, potentials)
            outputs.append(output)
        return torch.cat(outputs), (state, potentials)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("part", [9, 2, 1])
@pytest.mark.parametrize("chunk", [None, 4])
def test_firing_rates_count_the_steps_of_each_sequence_and_no_padding(part, chunk, padded):
    model, x = Loop(part), (torch.rand(9, 3, 6) < 0.5).float()
    outputs, _ = model.twice.layerwise(x)
    last = SpikingNeuron(6, 4.0)(3 * outputs[5])[0]
    own = (torch.arange(9)[:, None] < LENGTHS if padded else torch.ones(9, 3))[..., None]
    fired = {"twice.2": (outputs[2] + outputs[5]) / 2 * own, "parts": last * own}
    run = Chunked(model, chunk) if chunk else model
    with torch.no_grad(), count_activity(model) as activity:
        for _ in range(2):  # each batch is announced
            activity.begin(LENGTHS if padded else None, 9)
            run(x)
    rates = {name: (s.sum() / (6 * own.sum())).item() for name, s in fired.items()}
    assert min(rates.values()) > 0
    assert activity.firing_rates() == pytest.approx(rates)
    assert activity.elements["twice.2"] == 2 * 2 * 6 * own.sum()


class Alone(SpikingNeuron):
    """Returns its spikes without a state."""

    def forward(self, x):
        return super().forward(x)[0]


def test_neurons_that_return_spikes_alone_are_counted_penalised_recorded_and_scaled():
    model, x = nn.Sequential(nn.Linear(4, 6), Alone(6, 4.0)), 4 * torch.rand(12, 3, 4)
    expected = model(x)
    with count_activity(model) as activity, collect_spikes(model) as spikes, Monitor(model) as run:
        model(x)
    assert activity.firing_rates()["1"] == pytest.approx(expected.mean().item())
    assert torch.equal(spikes["1"], expected)
    assert torch.equal(run["1"].spikes, expected)
    found = fire_from_the_start(model, x, 0.2)
    assert found["1"] == pytest.approx(model(x).mean().item())
    assert found["1"] == pytest.approx(0.2, abs=0.05)


def test_spikes_that_dropout_takes_are_not_counted_in_training():
    model, x = Sequential(SpikingNeuron(50, 4.0, dropout=0.75)), 2 * torch.rand(12, 3, 50)
    with torch.no_grad(), count_activity(model) as activity:
        activity.begin(None, 12)
        output, _ = model(x)
    assert output.max() == 4
    assert activity.spike_counts["0"] == (output != 0).sum()


def test_lengths_of_small_numbers_do_not_overflow_in_chunks():
    model, x = Sequential(SpikingNeuron(6, 4.0)), 2 * torch.rand(12, 3, 6)
    found = []
    for lengths in (torch.tensor([12, 3, 5]), torch.tensor([12, 3, 5], dtype=torch.uint8)):
        with torch.no_grad(), count_activity(model) as activity:
            activity.begin(lengths, 12)
            Chunked(model, 4)(x)
        found.append((activity.firing_rates(), activity.elements))
    assert found[0] == found[1]


def test_a_padded_sequence_may_be_run_in_parts_with_the_state():
    model, x = Sequential(LowPassSynapse(6, 4.0), SpikingNeuron(6, 4.0)), torch.rand(9, 3, 6)
    found = []
    for run in (model, lambda x: in_parts(model, x, 3)):
        with torch.no_grad(), count_activity(model) as activity:
            activity.begin(LENGTHS, 9)
            run(x)
        found.append(activity.firing_rates())
    assert found[0] == found[1] == {"1": pytest.approx(found[0]["1"])}
    assert 0 < found[0]["1"] < 1


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_lengths_of_a_call_are_counted_as_announced_ones_are(chunk):
    model, x = Sequential(LowPassSynapse(6, 4.0), SpikingNeuron(6, 4.0)), torch.rand(9, 3, 6)
    run = Chunked(model, chunk) if chunk else model
    with count_activity(model) as announced:
        announced.begin(LENGTHS, 9)
        run(x)
    with count_activity(model) as given:
        run(x, lengths=LENGTHS)
    assert given.firing_rates() == announced.firing_rates()
    assert given.elements["1"] == 6 * LENGTHS.sum()


def test_rates_of_maps_are_means_over_all_their_positions():
    neurons, x = SpikingNeuron((2, 3, 4), 4.0), 3 * torch.rand(9, 3, 2, 3, 4)
    with torch.no_grad(), count_activity(nn.Sequential(neurons)) as activity:
        activity.begin(LENGTHS, 9)
        spikes, _ = neurons(x)
    own = torch.cat([spikes[:length, number] for number, length in enumerate(LENGTHS)])
    assert activity.firing_rates() == {"0": pytest.approx(own.mean().item())}


def test_a_silent_layer_has_rate_zero_and_a_busy_one_rate_one():
    model = Sequential(
        nn.Linear(2, 3), SpikingNeuron(3, 4.0), nn.Linear(3, 2), SpikingNeuron(2, 4.0)
    )
    nn.init.constant_(model[0].weight, 0.0)
    nn.init.constant_(model[0].bias, 0.0)
    nn.init.constant_(model[2].bias, 1000.0)
    with pytest.warns(RuntimeWarning, match="nothing was seen"), count_activity(model) as activity:
        pass
    assert activity.firing_rates() == {}
    assert activity.activity_sparsity() == 1
    with count_activity(model) as activity:
        model(torch.ones(5, 2, 2))
    assert activity.firing_rates() == {"1": 0.0, "3": 1.0}
    assert activity.activity_sparsity() == 1 - 2 / 5


def test_a_chunk_that_runs_again_for_the_backward_pass_is_counted_once():
    model, x = Loop(1), torch.rand(9, 3, 6, requires_grad=True)
    with Monitor(model) as monitor, count_activity(model) as activity:
        Chunked(model.twice[2], 4)(9 * x)[0].sum().backward()
    assert activity.spike_counts["twice.2"] == monitor["twice.2"].spikes.sum() > 0


def test_the_hooks_are_gone_afterwards_also_after_an_error():
    model = Sequential(nn.Linear(8, 6), SpikingNeuron(6, 4.0))
    with contextlib.suppress(RuntimeError), count_activity(model) as activity:
        model(torch.ones(2, 1, 8))
        with pytest.raises(ValueError, match="features"):
            model[1](torch.ones(2, 1, 5))  # an error inside, after which counting goes on
        model(torch.ones(2, 1, 8))
        raise RuntimeError("stop")
    model(torch.ones(2, 1, 8))
    assert activity.elements["1"] == 2 * 2 * 6
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_counts_of_several_processes_add_up():
    model, parts = Sequential(SpikingNeuron(8, 4.0)), [torch.rand(10, size, 8) for size in (4, 2)]
    counts = []
    for batches in ([parts[0]], [parts[1]], parts):
        with torch.no_grad(), count_activity(model) as activity:
            for x in batches:
                model(9 * x)
        counts.append(activity)
    first, second, together = counts
    sums = iter([second.spike_counts, second.elements])

    def total(own):
        return {key: float(own[key]) + float(value) for key, value in next(sums).items()}

    first.sum_by(total)
    assert first.firing_rates() == together.firing_rates()

"""Activity: firing rates and synaptic operations against a count by hand."""

import contextlib

import pytest
import torch
from torch import nn

from snn_lib import DualExponentialSynapse, LowPassSynapse, Sequential, SpikingNeuron
from snn_lib.inspection.activity import count_activity


def network():
    model = Sequential(
        DualExponentialSynapse(8, 4.0, 1.0),
        nn.Linear(8, 6),
        SpikingNeuron(6, 4.0),
        LowPassSynapse(6, 4.0),
        nn.Linear(6, 3),
        SpikingNeuron(3, 4.0),
    )
    for index in (1, 4):
        nn.init.normal_(model[index].weight, 0.2, 0.6)
    return model


def test_rates_and_operations_against_a_count_by_hand():
    model = network()
    batches = [(torch.rand(10, size, 8) < 0.4).float() for size in (4, 3)]
    with count_activity(model) as activity:
        for batch in batches:
            model(batch)

    hidden_spikes = output_spikes = operations = 0
    for batch in batches:
        hidden = model[2](model[1](model[0](batch)[0]))[0]
        output = model[5](model[4](model[3](hidden)[0]))[0]
        hidden_spikes += hidden.sum().item()
        output_spikes += output.sum().item()
        operations += 6 * batch.sum().item() + 3 * hidden.sum().item()
    assert hidden_spikes > 0
    assert output_spikes > 0
    assert activity.sequences == 7
    assert activity.firing_rates() == pytest.approx(
        {"2": hidden_spikes / (10 * 7 * 6), "5": output_spikes / (10 * 7 * 3)}
    )
    assert activity.synaptic_operations() == pytest.approx(operations / 7)
    assert activity.dense_operations == 8 * 6 + 6 * 3


def test_a_current_counts_where_it_is_not_zero():
    model = Sequential(LowPassSynapse(4, 4.0), nn.Linear(4, 5))
    x = torch.tensor([0.3, 0.0, 2.0, 0.0]).expand(6, 2, 4)
    with count_activity(model) as activity:
        model(x)
    assert activity.synaptic_operations() == 6 * 2 * 5
    assert activity.firing_rates() == {}


def test_a_silent_layer_has_rate_zero_and_a_busy_one_rate_one():
    model = Sequential(
        nn.Linear(2, 3), SpikingNeuron(3, 4.0), nn.Linear(3, 2), SpikingNeuron(2, 4.0)
    )
    nn.init.constant_(model[0].weight, 0.0)
    nn.init.constant_(model[0].bias, 0.0)
    nn.init.constant_(model[2].bias, 1000.0)
    with count_activity(model) as activity:
        model(torch.ones(5, 2, 2))
    assert activity.firing_rates() == {"1": 0.0, "3": 1.0}


def test_the_hooks_are_gone_afterwards_also_after_an_error():
    model = network()
    with contextlib.suppress(RuntimeError), count_activity(model) as activity:
        model(torch.ones(2, 1, 8))
        raise RuntimeError("stop")
    model(torch.ones(2, 1, 8))
    assert activity.sequences == 1
    assert not any(module._forward_hooks for module in model.modules())

"""Activity: firing rates and synaptic operations against a count by hand."""

import contextlib
import weakref

import pytest
import torch
from torch import nn

from snn_lib import (
    Chunked,
    DualExponentialSynapse,
    LowPassSynapse,
    PerStep,
    Sequential,
    SpikingNeuron,
)
from snn_lib.inspection.activity import (
    Operations,
    connection_sparsity,
    count_activity,
    footprint,
    operations_per_step,
)


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


class BatchFirst(nn.Module):
    """A network of a user's own: input ``(B, T, C)``, layers called by keyword, in chunks."""

    def __init__(self, chunk):
        super().__init__()
        self.synapse, self.linear, self.neuron = list(network().children())[:3]
        self.chunk = chunk

    def forward(self, x):
        outputs, past, potentials = [], None, None
        for part in x.transpose(0, 1).split(self.chunk):
            psp, past = self.synapse(state=past, x=part)
            spikes, potentials = self.neuron(current=self.linear(psp), state=potentials)
            outputs.append(spikes)
        return torch.cat(outputs).transpose(0, 1)


@pytest.mark.parametrize("chunk", [10, 4, 1])
def test_sequences_are_those_of_the_layers_whatever_the_input_of_the_model(chunk):
    model, x = BatchFirst(chunk), (torch.rand(3, 10, 8) < 0.4).float()
    with count_activity(model) as activity:
        spikes = model(x)
        model(x[:2])
    assert activity.sequences == 5
    assert activity.synaptic_operations() == 6 * (x.sum() + x[:2].sum()).item() / 5
    fired = spikes.sum() + spikes[:2].sum()
    assert activity.firing_rates() == pytest.approx({"neuron": fired.item() / (5 * 10 * 6)})


def test_a_sequence_in_chunks_counts_once():
    model, x = network(), (torch.rand(10, 4, 8) < 0.4).float()
    with count_activity(model) as whole:
        model(x)
    with count_activity(model) as in_chunks:
        state = None
        for part in x.split(3):
            _, state = model(part, state)
    assert in_chunks.sequences == whole.sequences == 4
    assert in_chunks.synaptic_operations() == whole.synaptic_operations()
    assert in_chunks.firing_rates() == whole.firing_rates()


def test_without_a_beginning_there_are_no_operations_per_sequence():
    model, x = network(), torch.ones(4, 2, 8)
    _, state = model(x)
    with count_activity(model) as activity:
        model(x, state)
    with pytest.raises(ValueError, match="no sequence has begun"):
        activity.synaptic_operations()


class Averaged(nn.Module):
    """A module of a user's own without parameters: the mean of each map."""

    def forward(self, x):
        return x.mean((3, 4))


@pytest.mark.parametrize(
    ("between", "features"),
    [
        (PerStep(nn.BatchNorm2d(2)), 32),
        (PerStep(nn.BatchNorm2d(2, affine=False)), 32),
        (PerStep(nn.AvgPool2d(2)), 8),
        (PerStep(nn.Upsample(scale_factor=2)), 128),
        (Averaged(), 2),
        (SpikingNeuron((2, 4, 4), 4.0), 32),
    ],
)
def test_only_the_weights_right_after_a_synapse_are_its_fan_out(between, features):
    model = Sequential(
        DualExponentialSynapse((2, 4, 4), 4.0, 1.0),
        between,
        nn.Flatten(2),
        nn.Linear(features, 7),
        SpikingNeuron(7, 4.0),
        LowPassSynapse(7, 4.0),
        nn.Linear(7, 3),
        SpikingNeuron(3, 4.0),
    )
    nn.init.constant_(model[3].bias, 2.0)
    with count_activity(model) as activity:
        model((torch.rand(10, 3, 2, 4, 4) < 0.4).float())
    assert {name: fan_out.tolist() for name, fan_out in activity.fan_out.items()} == {"5": [3] * 7}
    assert activity.dense_operations == 7 * 3
    fired = activity.firing_rates()["4"]
    assert fired > 0
    assert activity.synaptic_operations() == pytest.approx(fired * 10 * 7 * 3)


@pytest.mark.parametrize("flat", [True, False])
def test_operations_of_a_synapse_with_a_feature_shape(flat):
    weights = [nn.Flatten(2), nn.Linear(12, 5)] if flat else [nn.Linear(4, 5)]
    model = Sequential(LowPassSynapse((3, 4), 4.0), *weights)
    with count_activity(model) as activity:
        model(torch.ones(6, 2, 3, 4))
    assert activity.dense_operations == 12 * 5
    assert activity.synaptic_operations() == 6 * 12 * 5  # all inputs at all steps


def test_the_hooks_are_gone_afterwards_also_after_an_error():
    model = network()
    with contextlib.suppress(RuntimeError), count_activity(model) as activity:
        model(torch.ones(2, 1, 8))
        raise RuntimeError("stop")
    model(torch.ones(2, 1, 8))
    assert activity.sequences == 1
    assert not any(module._forward_hooks for module in model.modules())


def test_what_lies_behind_a_sequence_s_end_is_not_counted():
    model = Sequential(DualExponentialSynapse(3, 4.0, 1.0), nn.Linear(3, 5), SpikingNeuron(5, 4.0))
    nn.init.constant_(model[1].bias, 2.0)  # fires in silence too
    x, lengths = (torch.rand(9, 2, 3) < 0.5).float(), torch.tensor([9, 4])
    with count_activity(model) as activity:
        activity.lengths = lengths
        model(x)
    with count_activity(model) as alone:
        spikes = [model(x[:n, b : b + 1])[0] for b, n in enumerate(lengths.tolist())]
    fired = sum(part.sum().item() for part in spikes)
    assert activity.firing_rates() == pytest.approx({"2": fired / (13 * 5)})
    assert activity.firing_rates() == pytest.approx(alone.firing_rates())
    assert activity.synaptic_operations() == pytest.approx(alone.synaptic_operations())
    with count_activity(model) as stepwise:
        stepwise.lengths, state = lengths, None
        for step in x.split(1):
            _, state = model(step, state)
    assert stepwise.firing_rates() == pytest.approx(activity.firing_rates())
    assert stepwise.synaptic_operations() == pytest.approx(activity.synaptic_operations())


@pytest.mark.parametrize("membrane_filter", [False, True])
def test_operations_by_kind_against_a_count_by_hand(membrane_filter):
    model = Sequential(
        DualExponentialSynapse(4, 4.0, 1.0),
        nn.Linear(4, 6),
        SpikingNeuron(6, 4.0, membrane_filter=membrane_filter),
        LowPassSynapse(6, 4.0),
        nn.Linear(6, 3),
    )
    nn.init.normal_(model[1].weight, 0.4, 0.6)
    current, spikes = torch.rand(5, 2, 4), (torch.rand(5, 3, 4) < 0.5).float()
    current[0] = 0.0
    with count_activity(model) as activity:
        hidden = [model[2](model[1](model[0](x)[0]))[0] for x in (current, spikes)]
        for x in hidden:
            model[4](model[3](x)[0])
    sent = sum(x.sum().item() for x in hidden)
    found = activity.operations()
    assert found.additions == pytest.approx((6 * spikes.sum().item() + 3 * sent) / 5)
    assert found.multiply_accumulates == pytest.approx(6 * current.count_nonzero().item() / 5)
    assert found.additions + found.multiply_accumulates == pytest.approx(
        activity.synaptic_operations()
    )
    # per step: alpha_1, alpha_2 and the betas of four channels; alpha_1 and beta_0 of six
    dual, low = len(model[0].alpha) + len(model[0].beta), 2
    assert found.filters == 5 * (4 * dual + 6 * low)
    assert found.neurons == 5 * 6 * (3 if membrane_filter else 2)
    assert activity.spikes() == pytest.approx(sent / 5)
    assert activity.activity_sparsity() == pytest.approx(1 - sent / (5 * 5 * 6))


def test_energy_is_that_of_additions_and_products():
    assert Operations(1000, 0, 0, 0).energy() == pytest.approx(0.9e-9)
    for kind in range(1, 4):
        work = [0, 0, 0, 0]
        work[kind] = 1000
        assert Operations(*work).energy() == pytest.approx(4.6e-9)


def test_footprint_and_connection_sparsity():
    model = Sequential(nn.Linear(4, 5), SpikingNeuron(5, 4.0), nn.Linear(5, 2, bias=False))
    assert footprint(model) == 4 * (4 * 5 + 5 + 3 * 5 + 5 * 2)
    with torch.no_grad():
        model[0].weight[:2] = 0.0
        model[0].bias.zero_()
    assert connection_sparsity(model) == pytest.approx(8 / 30)


def test_operations_per_step_add_up_to_all_of_them():
    model, x = network(), (torch.rand(10, 4, 8) < 0.4).float()
    with count_activity(model) as activity, operations_per_step(model) as operations:
        model(x)
    assert torch.equal(operations["0"], 6 * x.sum(2).long())
    assert sum(operations.values()).sum() == 4 * activity.synaptic_operations()
    with operations_per_step(model) as in_chunks, torch.inference_mode():
        for _ in range(2):  # a sequence that begins anew takes the place of the one before
            Chunked(model, 4)(x)
    assert all(torch.equal(in_chunks[name], operations[name]) for name in operations)


def outputs_reached(convolution, features):
    """By brute force: how many outputs change with each input of a convolution."""
    count = torch.Size(features).numel()
    with torch.no_grad():
        one_input_each = torch.eye(count).view(count, *features)
        return convolution(one_input_each).flatten(1).ne(0).sum(1).view(features)


@pytest.mark.parametrize(
    ("convolution", "features"),
    [
        (nn.Conv2d(2, 3, 3, bias=False), (2, 5, 4)),
        (nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 5, 4)),
        (nn.Conv2d(2, 3, (3, 2), stride=2, padding=1, bias=False), (2, 6, 5)),
        (nn.Conv2d(2, 3, 2, stride=3, bias=False), (2, 6, 6)),  # some inputs are never read
        (nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False), (4, 4, 4)),
        (nn.Conv2d(2, 3, 3, dilation=2, padding=(2, 1), bias=False), (2, 6, 5)),
        (nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular", bias=False), (2, 5, 4)),
        (nn.Conv1d(2, 3, 3, stride=2, bias=False), (2, 8)),
        (nn.Conv3d(2, 3, 2, stride=2, padding=1, bias=False), (2, 3, 4, 5)),
    ],
    ids=str,
)
def test_operations_of_a_convolution_against_brute_force(convolution, features):
    model = Sequential(LowPassSynapse(features, 4.0), PerStep(convolution))
    x = (torch.rand(4, 3, *features) < 0.3).float()
    counts = count_activity(model), operations_per_step(model)
    with torch.inference_mode(), counts[0] as activity, counts[1] as per_step:
        model(x)
    reached = outputs_reached(convolution, features)
    assert torch.equal(activity.fan_out["0"], reached)
    assert activity.dense_operations == reached.sum()
    assert activity.synaptic_operations() == (x * reached).sum().item() / 3
    assert activity.operations().multiply_accumulates == 0
    assert torch.equal(per_step["0"], (x * reached).flatten(2).sum(2).long())


def test_operations_of_a_network_of_convolutions_and_pooling():
    convolutions = [nn.Conv2d(1, 2, 3, bias=False), nn.Conv2d(2, 3, 3, padding=1, bias=False)]
    model = Sequential(
        LowPassSynapse(64, 4.0),
        nn.Unflatten(2, (1, 8, 8)),
        PerStep(convolutions[0]),
        SpikingNeuron((2, 1, 1), 4.0),
        PerStep(nn.MaxPool2d(2)),
        LowPassSynapse((2, 1, 1), 4.0),
        PerStep(convolutions[1]),
        SpikingNeuron((3, 1, 1), 4.0),
        nn.Flatten(2),
        LowPassSynapse(27, 4.0),
        nn.Linear(27, 5),
    )
    for convolution in convolutions:
        nn.init.normal_(convolution.weight, 0.2)
    current = torch.rand(1, 3, 64).expand(6, 3, 64)
    with count_activity(model) as activity:
        outputs, _ = model.layerwise(current)
    _, _, _, spikes, pooled, _, _, _, flat, _, _ = outputs
    from_current = (current != 0).view(6, 3, 1, 8, 8) * outputs_reached(convolutions[0], (1, 8, 8))
    from_spikes = (pooled * outputs_reached(convolutions[1], (2, 3, 3))).sum() + 5 * flat.sum()
    found = activity.operations()
    assert found.multiply_accumulates == from_current.sum().item() / 3
    assert found.additions == pytest.approx(from_spikes.item() / 3)
    assert spikes.sum() > pooled.sum() > 0
    assert activity.firing_rates()["3"] == pytest.approx(spikes.mean().item())


def test_maps_of_another_size_have_another_fan_out():
    convolution = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    model = Sequential(LowPassSynapse((2, 1, 1), 4.0), PerStep(convolution))
    with count_activity(model) as activity:
        for size in (4, 6):
            model(torch.ones(2, 1, 2, size, size))
    expected = [outputs_reached(convolution, (2, size, size)).sum().item() for size in (4, 6)]
    assert activity.synaptic_operations() == 2 * sum(expected) / 2


def test_weights_that_are_zero_take_no_operations():
    torch.manual_seed(0)
    model = Sequential(
        LowPassSynapse((2, 5, 5), 4.0),
        PerStep(nn.Conv2d(2, 4, 3, stride=2, groups=2)),
        SpikingNeuron((4, 2, 2), 4.0),
        nn.Flatten(2),
        LowPassSynapse(16, 4.0),
        nn.Linear(16, 3),
    )
    convolution, linear = model[1].module, model[5]
    with torch.no_grad():
        for weights in (convolution.weight, linear.weight):
            weights *= torch.rand_like(weights) < 0.5
        convolution.bias.fill_(2.0)  # it fires
    x = (torch.rand(4, 3, 2, 5, 5) < 0.3).float()
    with torch.no_grad(), count_activity(model) as activity, operations_per_step(model) as steps:
        hidden = model.layerwise(x)[0][3]
    expected = (hidden.sum((0, 1)) * linear.weight.ne(0).sum(0)).sum()
    for c, i, j in x.nonzero()[:, 2:].tolist():
        for o in range(4):
            for di in range(3):
                for dj in range(3):
                    (p, left_p), (q, left_q) = divmod(i - di, 2), divmod(j - dj, 2)
                    if not (left_p or left_q) and p in (0, 1) and q in (0, 1) and o // 2 == c:
                        expected += convolution.weight[o, 0, di, dj].item() != 0
    assert activity.synaptic_operations() == pytest.approx(expected.item() / 3)
    assert sum(step.sum() for step in steps.values()).item() == pytest.approx(expected.item())
    assert activity.dense_operations == 4 * 4 * 9 + 16 * 3


def test_counts_of_a_network_that_has_not_run_or_has_nothing_to_count():
    model = Sequential(nn.Linear(3, 2), SpikingNeuron(2, 4.0))
    with count_activity(model) as activity:
        pass
    with pytest.raises(ValueError, match="no sequence has begun"):
        activity.spikes()
    assert activity.activity_sparsity() == 1.0
    assert connection_sparsity(nn.Identity()) == 0.0
    with operations_per_step(Sequential(LowPassSynapse(3, 4.0), nn.Linear(3, 2))) as steps:
        pass
    assert steps == {}


def test_a_spike_may_be_negative():
    model = Sequential(LowPassSynapse(3, 4.0), nn.Linear(3, 2))
    with count_activity(model) as activity:
        model(torch.tensor([1.0, -1.0, 0.0]).expand(4, 1, 3))
    assert activity.operations()[:2] == (16, 0)


def test_synapses_called_by_keyword_are_counted_by_step():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.synapse, self.weights = LowPassSynapse(3, 4.0), nn.Linear(3, 2)

        def forward(self, x):
            return self.weights(self.synapse(x=x)[0])

    model = ByKeyword()
    with operations_per_step(model) as steps:
        model(torch.ones(4, 5, 3))
    assert torch.equal(steps["synapse"], torch.full((4, 5), 6))


def test_a_mean_over_maps_as_wide_as_they_are_many_is_not_taken_for_their_rows():
    model = Sequential(LowPassSynapse((2, 4, 2), 4.0), Averaged(), nn.Linear(2, 5))
    with count_activity(model) as activity:
        model(torch.ones(3, 1, 2, 4, 2))
    assert activity.fan_out == {}


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Unflatten(2, (2, -1, 3)),),
        (nn.Unflatten(2, (2, 15)), nn.Unflatten(3, (5, 3))),
        (nn.Flatten(2), nn.Identity(), nn.Unflatten(-1, (2, 5, 3))),
    ],
    ids=str,
)
def test_whatever_makes_maps_of_what_a_synapse_hands_on(layers):
    convolution = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    model = Sequential(LowPassSynapse(30, 4.0), *layers, PerStep(convolution))
    x = (torch.rand(4, 3, 30) < 0.3).float()
    with torch.no_grad(), count_activity(model) as activity:
        model(x)
    reached = outputs_reached(convolution, (2, 5, 3)).flatten()
    assert torch.equal(activity.fan_out["0"], reached)
    assert activity.synaptic_operations() == (x * reached).sum().item() / 3


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_that_repeats_a_position_has_its_weights_read_it_again(mode):
    convolution = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode, bias=False)
    model = Sequential(LowPassSynapse((2, 1, 1), 4.0), PerStep(convolution))
    with torch.no_grad(), count_activity(model) as activity:
        model(torch.ones(1, 1, 2, 5, 4))
    padded = nn.functional.pad(torch.eye(40).view(40, 2, 5, 4), (1, 1, 1, 1), mode=mode)
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1)
    assert torch.equal(activity.fan_out["0"], 3 * windows.flatten(1).sum(1).long().view(2, 5, 4))


@pytest.mark.parametrize("bias", [True, False])
def test_parametrised_weights_are_weights(bias):
    convolution = nn.Conv2d(2, 3, 3, padding=1, bias=bias)
    expected = outputs_reached(nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 5, 4))
    normed = nn.utils.parametrizations.weight_norm(convolution)
    model = Sequential(LowPassSynapse((2, 5, 4), 4.0), PerStep(normed))
    with count_activity(model) as activity:
        model(torch.ones(1, 1, 2, 5, 4))
    assert torch.equal(activity.fan_out["0"], expected)


def test_synapses_may_be_called_step_by_step_before_their_weights_run_once():
    model, x = network(), (torch.rand(10, 4, 8) < 0.4).float()
    counts = count_activity(model), operations_per_step(model)
    with torch.no_grad(), counts[0] as activity, counts[1] as steps:
        activity.lengths = torch.tensor([10, 7, 3, 1])
        for _ in range(2):
            state, potentials = None, []
            for part in x.split(1):
                psp, state = model[0](part, state)
                potentials.append(psp)
            model[1](torch.cat(potentials))
    own = sum(x[:n, b].sum() for b, n in enumerate(activity.lengths.tolist()))
    assert activity.synaptic_operations() == 6 * own.item() / 4
    assert torch.equal(steps["0"], 6 * x.sum(2).long())


def test_weights_may_be_called_step_by_step():
    model = network()
    x = (torch.rand(10, 4, 8) < 0.4).float()
    with count_activity(model) as activity:
        for psp in model[0](x)[0]:
            model[1](psp)
    assert activity.synaptic_operations() == 6 * x.sum().item() / 4


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
def test_spikes_of_any_type_are_counted(dtype):
    model = Sequential(LowPassSynapse((2, 5, 4), 4.0), PerStep(nn.Conv2d(2, 3, 3, bias=False)))
    x = (torch.rand(4, 3, 2, 5, 4) < 0.3).to(dtype)
    with torch.no_grad(), count_activity(model) as activity, operations_per_step(model) as steps:
        model.to(dtype if dtype.is_floating_point else torch.float32)(x)
    expected = (x.float() * outputs_reached(nn.Conv2d(2, 3, 3, bias=False), (2, 5, 4))).sum().item()
    assert activity.operations()[:2] == pytest.approx((expected / 3, 0))
    assert steps["0"].sum() == expected


def test_counting_keeps_nothing_of_what_it_has_counted():
    model, x = network(), (torch.rand(10, 4, 8) < 0.4).float()
    with torch.no_grad(), count_activity(model), operations_per_step(model):
        received = []
        hook = model[3].register_forward_pre_hook(
            lambda module, inputs: received.append(weakref.ref(inputs[0]))
        )
        model(x)
        assert [spikes() for spikes in received] == [None]
    hook.remove()

"""Penalties on firing, against their formula, and what they do to a network that is trained."""

import pytest
import torch
from small_networks import Operators, in_parts
from torch import nn

from snn_lib import Chunked, LowPassSynapse, PerStep, Recurrent, Sequential, SpikingNeuron
from snn_lib.penalties import collect_spikes, hidden_layers, network_penalty, rate_penalty


def network():
    torch.manual_seed(0)
    return Sequential(
        nn.Linear(6, 12),
        SpikingNeuron(12, 4.0),
        LowPassSynapse(12, 4.0),
        nn.Linear(12, 3),
        SpikingNeuron(3, 4.0),
    )


@pytest.mark.parametrize(("target", "limit"), [(0.1, 0.0), (0.0, 0.3), (0.2, 0.5), (0.0, 0.0)])
def test_the_penalty_is_the_squared_relative_distance_of_rates_from_target_and_limit(target, limit):
    spikes = (torch.rand(7, 4, 2, 3) < 0.4).float()
    rates = [spikes[:, :, i, j].mean().item() for i in range(2) for j in range(3)]
    expected = 0.0
    if target:
        expected += (sum(rates) / 6 / target - 1) ** 2
    if limit:
        expected += sum(max(rate / limit - 1, 0) ** 2 for rate in rates) / 6
    assert rate_penalty(spikes, target, limit).item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [None, [400, 150]])
def test_rates_keep_their_digits_in_low_precision(dtype, lengths):
    spikes = (torch.rand(400, 2, 5) < 0.37).float()
    lengths = None if lengths is None else torch.tensor(lengths)
    found = rate_penalty(spikes.to(dtype), 0.1, 0.3, lengths)
    expected = rate_penalty(spikes, 0.1, 0.3, lengths)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_padding_does_not_count_in_rates():
    spikes = (torch.rand(7, 3, 5) < 0.4).float()
    for lengths in ([7, 2, 4], [0, 1, 0]):
        own = torch.cat([spikes[:length, b] for b, length in enumerate(lengths)])[:, None]
        found = rate_penalty(spikes, 0.1, 0.3, torch.tensor(lengths))
        torch.testing.assert_close(found, rate_penalty(own, 0.1, 0.3))


def test_lengths_beyond_the_steps_count_as_all_and_of_0_as_no_spikes():
    spikes = (torch.rand(7, 3, 5) < 0.4).float().requires_grad_()
    beyond, all_of_it = torch.tensor([9, 2, 7]), torch.tensor([7, 2, 7])
    torch.testing.assert_close(
        rate_penalty(spikes, 0.1, 0.3, beyond), rate_penalty(spikes, 0.1, 0.3, all_of_it)
    )
    nothing = rate_penalty(spikes, 0.1, 0.3, torch.zeros(3, dtype=torch.int64))
    nothing.backward()
    assert nothing.item() == pytest.approx(1.0)  # as far from the target as no spike at all
    assert not spikes.grad.any()


def test_only_neurons_above_the_limit_have_a_gradient_of_it():
    spikes = torch.zeros(10, 1, 2)
    spikes[:5, 0, 0] = 1.0
    spikes.requires_grad_()
    rate_penalty(spikes, limit=0.2).backward()
    assert (spikes.grad[:, 0, 0] > 0).all()
    assert (spikes.grad[:, 0, 1] == 0).all()


@pytest.mark.parametrize(
    ("shape", "settings", "words"),
    [
        ((0, 3, 5), {"target": 0.1}, "expected a step and a sequence"),
        ((7, 0, 5), {"target": 0.1}, "expected a step and a sequence"),
        *(
            ((2, 1, 3), {name: rate}, f"{name} is {rate}, expected a rate >= 0")
            for name in ("target", "limit")
            for rate in (-0.1, float("nan"))
        ),
    ],
)
def test_bad_rates_and_spikes_of_no_step_are_refused(shape, settings, words):
    with pytest.raises(ValueError, match=words):
        rate_penalty(torch.zeros(shape), **settings)


def test_a_network_that_ran_no_step_is_refused():
    model = network()
    with collect_spikes(model) as spikes:
        model(torch.zeros(0, 4, 6))
    with pytest.raises(ValueError, match="expected a step and a sequence"):
        network_penalty(model, spikes, 0.1)


def test_the_spikes_of_every_layer_are_collected_with_gradients_and_over_chunks():
    model, x = network(), 3 * torch.rand(10, 4, 6)
    with collect_spikes(model) as whole:
        model(x)
    assert {name: spikes.shape for name, spikes in whole.items()} == {
        "1": (10, 4, 12),
        "4": (10, 4, 3),
    }
    with collect_spikes(model) as chunks:
        _, state = in_parts(model, x[:6], 3)
        assert len(chunks["1"]) == 6  # what there is can be read at any time
        model(x[6:], state)
    assert chunks.keys() == whole.keys()
    for name, spikes in whole.items():
        assert torch.equal(spikes, chunks[name])
    rate_penalty(whole["1"], target=0.01).backward()
    assert model[0].weight.grad.any()
    model(x)
    assert len(whole["1"]) == 10  # nobody listens any more


def test_spikes_of_many_chunks_are_put_together_once():
    def elements(chunks):
        model, x = network(), torch.rand(chunks * 3, 4, 6)
        with Operators() as counted, collect_spikes(model) as spikes:
            in_parts(model, x, 3)
            rate_penalty(spikes["1"], target=0.1)
            assert spikes["1"] is spikes["1"]
        return counted.elements / chunks

    assert elements(40) < 1.2 * elements(10)


def test_a_chunked_run_is_penalised_as_the_whole_run():
    x = 3 * torch.rand(10, 4, 6)
    gradients = []
    for wrap in (lambda model: model, lambda model: Chunked(model, 3)):
        model = network()
        with collect_spikes(model) as spikes:
            wrap(model)(x)
        sum(rate_penalty(layer, target=0.01) for layer in spikes.values()).backward()
        gradients.append(model[0].weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_later_call_of_a_layer_that_runs_twice_counts_in_chunks_too():
    neuron = SpikingNeuron(4, 5.0)
    model, x = Sequential(nn.Linear(4, 4), neuron, nn.Linear(4, 4), neuron), 3 * torch.rand(7, 2, 4)
    nn.init.constant_(model[2].bias, 0.8)
    found = []
    for wrap in (lambda model: model, lambda model: Chunked(model, 2)):
        with collect_spikes(model) as spikes:
            wrap(model)(x)
        found.append(spikes["1"])
    assert 0 < found[0].sum() < found[0].numel()
    assert torch.equal(*found)


class Stepping(nn.Module):
    """A layer step by step, as a user may write it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, state=None):
        return in_parts(self.layer, x, 1, state)


def test_a_model_that_takes_its_steps_one_by_one_is_collected_whole():
    model, x = Stepping(SpikingNeuron(4, 5.0)), 3 * torch.rand(7, 2, 4)
    for runs in (model, Chunked(model, 3)):
        with collect_spikes(model) as spikes:
            output, _ = runs(x)
        assert torch.equal(spikes["layer"], output)


def test_a_chunked_run_from_a_state_continues_the_one_before():
    model, x = network(), 3 * torch.rand(7, 4, 6)
    with collect_spikes(model) as whole:
        model(x)
    with collect_spikes(model) as spikes:
        in_parts(Chunked(model, 2), x, [3, 4])
    torch.testing.assert_close(spikes["1"], whole["1"])


def test_a_second_run_without_a_state_replaces_the_first():
    model = network()
    with collect_spikes(model) as spikes:
        model(torch.rand(5, 4, 6))
        model(torch.rand(3, 2, 6))
    assert spikes["1"].shape == (3, 2, 12)


def test_chunks_that_run_again_in_the_backward_pass_are_not_collected_twice():
    model = network()
    with collect_spikes(model) as spikes:
        Chunked(model, 3)(3 * torch.rand(10, 4, 6))[0].sum().backward()
    assert spikes["1"].shape == (10, 4, 12)


def test_hidden_layers_are_those_whose_spikes_reach_weights():
    model = network()
    assert hidden_layers(model) == {"1": 3}  # each of its spikes reaches three neurons
    model.append(nn.Linear(3, 2))
    assert hidden_layers(model) == {"1": 3, "4": 2}
    assert hidden_layers(nn.Sequential(nn.Linear(3, 2), SpikingNeuron(2, 4.0))) == {}
    maps = nn.Sequential(SpikingNeuron((4, 1, 1), 4.0), nn.Conv2d(4, 6, 3, groups=2))
    assert hidden_layers(maps) == {"0": 3 * 3 * 3}


def test_spikes_that_come_back_reach_the_weights_of_their_own_layer():
    recurrent = Recurrent(nn.Linear(3, 3), SpikingNeuron(3, 4.0))
    assert hidden_layers(recurrent) == {"neuron": 3}
    model = network().append(LowPassSynapse(3, 4.0)).append(recurrent)  # the answer
    assert hidden_layers(model) == {"1": 3, "6.neuron": 3}
    model.append(nn.Linear(3, 2))
    assert hidden_layers(model) == {"1": 3, "4": 2, "6.neuron": 3 + 2}
    low_rank = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 6))
    assert hidden_layers(Recurrent(low_rank, SpikingNeuron(6, 4.0))) == {"neuron": 3}


@pytest.mark.parametrize(
    ("head", "reached"),
    [(PerStep(nn.ConvTranspose2d(6, 4, 3, groups=2)), 2 * 3 * 3), (nn.GRU(6, 5), 15)],
)
def test_weights_of_every_kind_make_a_layer_hidden(head, reached):
    shape = 6 if isinstance(head, nn.GRU) else (6, 1, 1)
    assert hidden_layers(Sequential(SpikingNeuron(shape, 4.0), head)) == {"0": reached}


def test_neurons_at_two_places_and_networks_without_hidden_ones_are_refused():
    shared = SpikingNeuron(6, 4.0)
    model = Sequential(nn.Linear(6, 6), shared, nn.Linear(6, 6), shared, nn.Linear(6, 3))
    with collect_spikes(model) as spikes:
        model(torch.rand(5, 2, 6))
    with pytest.raises(ValueError, match="layers 1 and 3 of Sequential are the same"):
        network_penalty(model, spikes, 0.1)
    within = Sequential(nn.Sequential(model[0], shared), nn.Sequential(model[2], shared), model[4])
    with pytest.raises(ValueError, match=r"layers 0.1 and 1.1 of Sequential are the same"):
        network_penalty(within, spikes, 0.1)
    coming_back = Recurrent(nn.Linear(6, 6), shared)
    with pytest.raises(ValueError, match="layers 0 and 2 of Sequential are the same"):
        network_penalty(Sequential(coming_back, model[2], coming_back, model[4]), spikes, 0.1)
    model[3] = SpikingNeuron(6, 4.0)
    model.looked_at = nn.ModuleDict({"hidden": model[1]})  # a second name is no second place
    with collect_spikes(model[:5]) as spikes:
        model[:5](torch.rand(5, 2, 6))
    assert network_penalty(model[:5], spikes, 0.1) >= 0


def test_tied_weights_count_at_each_of_their_places_and_other_names_do_not():
    tied, neurons = nn.Linear(6, 6), [SpikingNeuron(6, 4.0) for _ in range(3)]
    assert hidden_layers(Sequential(tied, neurons[0], tied, neurons[1])) == {"1": 6}
    assert hidden_layers(Sequential(tied, neurons[0], tied, neurons[1], tied)) == {"1": 6, "3": 6}
    model = nn.Module()
    model.layers = Sequential(nn.Linear(6, 6), neurons[0], tied, neurons[1])
    model.first, model.begin = model.layers[0], model.layers[:2]
    assert hidden_layers(model) == {"layers.1": 6}  # not the last, which no weights follow


class Scale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(shape))


@pytest.mark.parametrize("scale", [Scale(6, 1, 1), PerStep(nn.LayerNorm([6, 5, 5])), Scale(6)])
def test_a_scale_of_each_channel_is_no_weight(scale):
    layers = SpikingNeuron((6, 1, 1), 4.0), scale
    assert hidden_layers(Sequential(*layers)) == {}
    assert hidden_layers(Sequential(*layers, PerStep(nn.Conv2d(6, 4, 3)))) == {"0": 4 * 9}


def penalty_by_hand(spikes, lengths, share):
    """That of a layer off the target 0.1, of which a share counts, and above the limit 0.3."""
    counts = torch.zeros(spikes.shape[2])
    for number, length in enumerate(lengths):
        for step in range(length):
            counts += spikes[step, number]
    rates = counts / sum(lengths)
    above = [max(rate / 0.3 - 1, 0) ** 2 for rate in rates.tolist()]
    return share * (rates.mean().item() / 0.1 - 1) ** 2 + sum(above) / len(above)


@pytest.mark.parametrize("lengths", [None, [2, 6, 4]])
@pytest.mark.parametrize(("by_cost", "shares"), [(False, [1, 1]), (True, [1, 5 * 2 / (7 * 5)])])
def test_a_network_is_penalised_for_its_hidden_layers_own_steps(lengths, by_cost, shares):
    model = Sequential(LowPassSynapse(3, 3.0))
    for inputs, neurons in (3, 7), (7, 5), (5, 2):
        model.append(nn.Linear(inputs, neurons)).append(SpikingNeuron(neurons, 3.0))
        nn.init.normal_(model[-2].weight, 0.3, 0.5)
    x, given = 3 * torch.rand(6, 3, 3), None if lengths is None else torch.tensor(lengths)
    with collect_spikes(model) as spikes:
        model(x)
    found = network_penalty(model, spikes, 0.1, 0.3, given, by_cost)
    layers = zip((spikes["2"], spikes["4"]), shares, strict=True)
    expected = [
        penalty_by_hand(layer.detach(), lengths or [6] * 3, share) for layer, share in layers
    ]
    assert min(expected) > 0.1
    assert found.item() == pytest.approx(sum(expected), rel=1e-5)
    alone = network_penalty(model, spikes, limit=0.3, lengths=given)
    limited = sum(rate_penalty(spikes[name], 0.0, 0.3, given) for name in ("2", "4"))
    assert alone.item() == pytest.approx(limited.item(), rel=1e-5)


def test_spikes_of_maps_cost_the_weights_of_all_their_positions():
    model = Sequential(SpikingNeuron((2, 4, 5), 3.0), PerStep(nn.Conv2d(2, 3, 3)))
    model.append(SpikingNeuron((3, 2, 3), 3.0)).append(nn.Flatten(2)).append(nn.Linear(18, 5))
    shapes = {"0": (2, 4, 5), "2": (3, 2, 3)}
    spikes = {name: (torch.rand(6, 3, *s) < 0.4).float() for name, s in shapes.items()}
    first, second = (rate_penalty(layer, 0.1) for layer in spikes.values())
    share = (18 * 5) / (2 * 4 * 5 * 3 * 9)  # neurons, and what each spike reaches
    found = network_penalty(model, spikes, 0.1, by_cost=True)
    torch.testing.assert_close(found, first + share * second)


def test_an_empty_share_of_a_batch_is_not_penalised():
    """As a process may have, when the last batch does not divide."""
    model = Sequential(nn.Linear(3, 4), SpikingNeuron(4, 3.0), nn.Linear(4, 2))
    for sequences in (0, 1):
        with collect_spikes(model) as spikes:
            model(torch.rand(1, sequences, 3))
        penalty = network_penalty(model, spikes, 0.1, by_cost=True)
        assert penalty == (1.0 if sequences else 0.0)  # no spike in a single step


def test_spikes_of_other_names_are_refused():
    model = Sequential(nn.Linear(3, 4), SpikingNeuron(4, 3.0), nn.Linear(4, 2))
    with collect_spikes(wrapped := nn.ModuleDict({"net": model})) as spikes:
        model(torch.rand(5, 2, 3))
    assert network_penalty(wrapped, spikes, 0.1) > 0
    for other in (spikes, {}):
        with pytest.raises(ValueError, match="no spikes of the hidden layers 1 are given: collect"):
            network_penalty(model, other, 0.1)


def test_spikes_that_are_changed_in_place_are_refused():
    model = Sequential(SpikingNeuron(5, 4.0), nn.Dropout(0.5, inplace=True), nn.Linear(5, 2))
    with collect_spikes(model) as spikes:
        model(torch.rand(9, 2, 5))
    with pytest.raises(ValueError, match="changes the spikes of 0 in place: give it inplace=False"):
        network_penalty(model, spikes, 0.1)
    with torch.inference_mode(), collect_spikes(model.eval()) as spikes:
        model(torch.rand(9, 2, 5))
    assert spikes["0"].shape == (9, 2, 5)


def test_a_network_without_hidden_layers_is_not_penalised_in_silence():
    model = nn.Sequential(nn.Linear(3, 2), SpikingNeuron(2, 4.0))
    with pytest.raises(ValueError, match="Sequential has no hidden layer of neurons"):
        network_penalty(model, {}, 0.1)

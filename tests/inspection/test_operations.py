"""Operations against a count by hand, and against NeuroBench's."""

import weakref
from functools import partial

import pytest
import torch
from running import ROOT
from torch import nn
from torch.nn.utils import prune

import snn_lib
from snn_lib import (
    Chunked,
    DualExponentialSynapse,
    LowPassSynapse,
    PerStep,
    Recurrent,
    Sequential,
    SpikingNeuron,
    StatefulModule,
    Votes,
)
from snn_lib.inspection.operations import (
    CountedNetwork,
    Operations,
    _count_products,
    connection_sparsity,
    footprint,
)
from snn_lib.readout import Last


def loud(*layers):
    """A network whose weights make neurons fire."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.2, 0.6)
    return Sequential(*layers)


def network():
    """Filters before the weights: the first layer of weights multiplies, and so does the second."""
    torch.manual_seed(0)
    first = DualExponentialSynapse(8, 4.0, 1.0), nn.Linear(8, 6), SpikingNeuron(6, 4.0)
    return loud(*first, LowPassSynapse(6, 4.0), nn.Linear(6, 3), SpikingNeuron(3, 4.0))


def behind():
    """Filters behind the weights: nothing but spikes arrives there."""
    torch.manual_seed(0)
    first = nn.Linear(8, 6), LowPassSynapse(6, 4.0), SpikingNeuron(6, 4.0)
    return loud(*first, nn.Linear(6, 3), LowPassSynapse(3, 4.0), SpikingNeuron(3, 4.0))


def spikes(*shape, rate=0.4, seed=1):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < rate).float()


def arrivals(model, x):
    """What each ``nn.Linear`` of a ``Sequential`` is given, and the layer."""
    outputs, _ = model.layerwise(x)
    for layer, before in zip(model, [x, *outputs], strict=False):
        if isinstance(layer, nn.Linear):
            yield before, layer


@torch.no_grad()
def per_step(model, x):
    """By definition: operations of each step and sequence, ``(T, B)``."""
    counts = [
        torch.einsum("tbi,oi->tb", before.ne(0).double(), layer.weight.ne(0).double())
        for before, layer in arrivals(model, x)
    ]
    return sum(counts).long()


def count(model, *inputs, lengths=None):
    """The network with its counts of these inputs."""
    counted = CountedNetwork(model)
    for x in inputs:
        counted(x, lengths=lengths)
    return counted


def test_operations_and_spikes_are_those_counted_by_hand():
    model, batches = network(), [spikes(10, size, 8) for size in (4, 3)]
    counted = count(model, *batches)
    outputs = [model.layerwise(batch)[0] for batch in batches]
    hidden, last = (sum(output[layer].sum().item() for output in outputs) for layer in (2, 5))
    assert min(hidden, last) > 0
    assert counted.sequences == 7
    operations = sum(per_step(model, batch).sum().item() for batch in batches)
    assert counted.operations()[:2] == (0, operations / 7)
    assert counted.dense_operations() == 8 * 6 + 6 * 3
    assert counted.spikes() == (hidden + last) / 7
    assert counted.activity.firing_rates() == {"2": hidden / 420, "5": last / 210}
    assert torch.equal(counted.per_step, per_step(model, batches[1]))


def test_spikes_that_reach_weights_take_additions_alone():
    model, x = behind(), spikes(10, 4, 8)
    counted = count(model, x)
    assert counted.operations()[:2] == (per_step(model, x).sum().item() / 4, 0)
    assert counted.synaptic_operations() == sum(counted.operations()[:2])
    negative = count(model, x * torch.tensor([1.0, -1.0] * 4))
    assert negative.operations().multiply_accumulates == 0  # a spike may be negative
    found = count(model, x * 0.5).operations()
    assert found.multiply_accumulates == 6 * x.sum().item() / 4  # of the first layer alone
    assert found.additions > 0
    assert count(model, x.bool()).operations() == counted.operations()


@pytest.mark.parametrize("scales", [(1, 0.5), (0.5, 1)])
def test_a_layer_that_multiplies_in_one_call_is_counted_so_in_all_calls(scales):
    x = spikes(5, 4, 8)
    found = count(behind(), *(scale * x for scale in scales)).operations()
    assert found.multiply_accumulates == 6 * 2 * x.sum().item() / 8
    assert found.additions > 0


@pytest.mark.parametrize("padded", [False, True])
def test_an_input_that_repeats_is_weighed_and_counted_once(padded):
    model = behind()
    x, lengths = torch.rand(1, 3, 8).expand(10, 3, 8), torch.tensor([10, 4, 7])
    counted = count(model, x, lengths=lengths if padded else None)
    spikes = model.layerwise(x)[0][2]
    own = torch.arange(10)[:, None] < (lengths if padded else torch.full((3,), 10))
    assert counted.operations().multiply_accumulates == 8 * 6
    assert counted.operations().additions == (3 * spikes * own[..., None]).sum().item() / 3
    assert counted.dense_operations() == 8 * 6 + 6 * 3
    assert counted.per_step[0].sum() == 3 * 8 * 6 + 3 * spikes[0].sum()
    assert count(model, x.contiguous()).operations().multiply_accumulates == 10 * 8 * 6


def test_layers_that_are_used_twice_count_twice():
    weights, synapse, neuron = nn.Linear(6, 6), LowPassSynapse(6, 4.0), SpikingNeuron(6, 4.0)
    nn.init.normal_(weights.weight, 0.2, 0.6)
    model = Sequential(Sequential(weights, synapse, neuron), weights, synapse, neuron)
    x, lengths = spikes(9, 3, 6) * 0.7, torch.tensor([9, 2, 5])
    counted, own = count(model, x, lengths=lengths), (torch.arange(9)[:, None] < lengths)[..., None]
    first, *_, last = (output * own for output in model.layerwise(x)[0])
    found = counted.operations()
    assert found.multiply_accumulates == 6 * (x * own).count_nonzero().item() / 3
    assert found.additions == 6 * first.sum().item() / 3
    assert min(first.sum(), last.sum()) > 0
    assert counted.spikes() == (first.sum() + last.sum()).item() / 3
    assert found.filters == 2 * 6 * 2 * 16 / 3


def test_a_layer_that_weighs_a_broadcast_step_twice_counts_twice():
    layer, x = nn.Linear(8, 8), torch.ones(1, 4, 8).expand(10, 4, 8)
    counted = count(Sequential(layer, layer, SpikingNeuron(8, 4.0)), x)
    assert counted.synaptic_operations() == 2 * 64  # once for all steps
    assert counted.dense_operations() == 2 * 64


@pytest.mark.parametrize("membrane_filter", [False, True])
def test_filters_and_neurons_are_counted_at_every_step(membrane_filter):
    model = Sequential(
        DualExponentialSynapse(4, 4.0, 1.0),
        nn.Linear(4, 6),
        SpikingNeuron(6, 4.0, membrane_filter=membrane_filter),
        LowPassSynapse(6, 4.0),
        nn.Linear(6, 3),
    )
    found = count(model, torch.zeros(5, 2, 4)).operations()
    # per step: alpha_1, alpha_2 and the betas of four channels; alpha_1 and beta_0 of six
    dual, low = len(model[0].alpha) + len(model[0].beta), 2
    assert found.filters == 5 * (4 * dual + 6 * low)
    assert found.neurons == 5 * 6 * (3 if membrane_filter else 2)


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
    assert connection_sparsity(nn.Identity()) == 0.0
    convolution = nn.Conv2d(2, 3, 2)
    nn.init.zeros_(convolution.weight[0].data)
    assert connection_sparsity(model.append(PerStep(convolution))) == pytest.approx(16 / 54)


# What a sequence is, and where it ends


@pytest.mark.parametrize("build", [network, behind])
def test_steps_behind_the_end_of_a_sequence_are_not_counted(build):
    model, x, lengths = build(), spikes(9, 2, 8), torch.tensor([9, 4])
    x[4:, 1] = 0.5  # makes no multiplications
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.bias, 2.0)  # fires in silence too
    alone = count(model, *(x[:n, b : b + 1] for b, n in enumerate(lengths.tolist())))
    counted = count(model, x, x, lengths=lengths)  # two batches
    assert counted.sequences == 4
    assert counted.operations() == alone.operations()
    assert counted.spikes() == alone.spikes()
    assert counted.dense_operations() == alone.dense_operations()
    by_step = per_step(model, x) * (torch.arange(9)[:, None] < lengths)
    assert torch.equal(counted.per_step, by_step)


@pytest.mark.parametrize("build", [network, behind])
def test_a_sequence_in_chunks_counts_once_and_gives_the_network_s_output(build):
    model, x, lengths = build(), spikes(9, 2, 8), torch.tensor([9, 4])
    whole, by_hand, chunked = (CountedNetwork(model) for _ in range(3))
    output, _ = whole(x, lengths=lengths)
    assert torch.equal(output, model(x)[0])
    state = None
    for start in range(0, 9, 4):
        _, state = by_hand(x[start : start + 4], state, (lengths - start).clamp(0, 4))
    Chunked(chunked, 4)(x, lengths=lengths)
    for counted in (by_hand, chunked):
        assert counted.sequences == 2
        assert counted.operations() == whole.operations()
        assert counted.dense_operations() == whole.dense_operations()
        assert torch.equal(counted.per_step, whole.per_step)


def test_a_network_that_takes_the_batch_first_is_counted_as_it_is_run():
    model, x, lengths = network(), spikes(9, 2, 8), torch.tensor([9, 4])
    turned = Sequential(*model, batch_first=True)
    expected, found = CountedNetwork(model), CountedNetwork(turned)
    expected(x, lengths=lengths)
    output, _ = found(x.transpose(0, 1), lengths=lengths)
    assert torch.equal(output, turned(x.transpose(0, 1))[0])
    assert found.operations() == expected.operations()
    assert torch.equal(found.per_step, expected.per_step)


def test_operations_per_sequence_are_refused_where_every_run_continues_a_state():
    model, x = network(), torch.ones(4, 2, 8)
    counted = CountedNetwork(model)
    assert counted.dense_operations() == 0
    counted(x, model(x)[1])
    with pytest.raises(ValueError, match="no sequence has begun"):
        counted.synaptic_operations()


@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8)])
@pytest.mark.parametrize("wrap", [lambda layer: layer, PerStep])
def test_an_input_without_steps_or_sequences_counts_nothing(shape, wrap):
    model = Sequential(wrap(nn.Linear(8, 4)), SpikingNeuron(4, 3.0))
    counted = count(model, torch.ones(shape), torch.ones(3, 2, 8))
    assert counted.operations().additions == 3 * 8 * 4 * 2 / counted.sequences


class Delay(StatefulModule):
    """A layer of one's own, which takes no lengths."""

    def forward(self, x, state=None):
        x = torch.cat([torch.zeros_like(x[:1]) if state is None else state, x])
        return x[:-1], x[-1:]


def test_a_layer_that_takes_no_lengths_is_counted_among_padded_sequences():
    x, lengths = spikes(9, 2, 8), torch.tensor([9, 4])
    counted = count(Sequential(Delay(), nn.Linear(8, 3)), x, lengths=lengths)
    assert counted.operations().additions == 3 * (x[:8, 0].sum() + x[:3, 1].sum()).item() / 2


# What cannot be counted


class Padding(nn.Module):
    def forward(self, x):
        return nn.functional.pad(x, (0, 0, 0, 0, 0, 5))


@pytest.mark.parametrize("changing", [Padding(), Last()])
def test_layers_behind_one_that_changes_the_number_of_steps_are_refused(changing):
    with pytest.raises(ValueError, match=r"layer 1 is given the shape .*, expected \(9, 3, '\*'\)"):
        count(Sequential(changing, nn.Linear(8, 4)), spikes(9, 3, 8))


class Weighing(nn.Module):
    """A layer of one's own."""

    def __init__(self, *shape):
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.ones(shape))])

    def forward(self, x):
        return nn.functional.linear(x, self.parts[0])


class Scaling(Weighing):
    def forward(self, x):
        return x * self.parts[0]


def with_hook(module):
    module.register_forward_hook(lambda *ran: 9 * ran[2])
    return module


def with_another_forward(module):
    module.forward = lambda x: x @ torch.ones(3, 4)
    return module


class Masked(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * 0.0)


REFUSED = [  # the layer behind another one, and the words
    (Masked(3, 4), "1 is a Masked"),
    (nn.GRU(3, 4), r"1 is an nn\.GRU"),
    (PerStep(nn.ConvTranspose1d(1, 1, 2)), r"1\.module is an nn\.ConvTranspose1d"),
    (Recurrent(nn.Linear(3, 3), SpikingNeuron(3, 4.0)), "1 is a Recurrent"),
    (Weighing(4, 3), "1 is a Weighing"),
    (Weighing(1, 3), "1 is a Weighing"),
    (nn.Sequential(Weighing(4, 3)), r"1\.0 is a Weighing"),
    (Scaling(3, 5, 5), "1 is a Scaling"),  # for all one knows
    (with_another_forward(PerStep(nn.Linear(3, 4))), "1 is a PerStep"),
]


class Holding(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)[0]


@pytest.mark.parametrize("part", [SpikingNeuron(3, 4.0), snn_lib.Delay(3, 1.0, 2)])
def test_neurons_and_delays_in_a_plain_module_are_refused(part):
    words = f"layer 1 is a Holding, in which a {type(part).__name__} has no count"
    with pytest.raises(ValueError, match=words):
        CountedNetwork(Sequential(nn.Linear(3, 3), Holding(part)))


@pytest.mark.parametrize(("layer", "words"), REFUSED)
def test_weights_of_another_kind_are_refused(layer, words):
    with pytest.raises(ValueError, match=f"^layer {words}, whose weights have no count here"):
        CountedNetwork(Sequential(nn.Identity(), layer))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (with_hook(Sequential(nn.Linear(3, 4))), "the network .Sequential. has hooks"),
        (Sequential(with_hook(Sequential(nn.Linear(3, 4)))), "0 .Sequential. has hooks"),
        (Sequential(with_hook(PerStep(nn.Linear(3, 4)))), "0 .PerStep. has hooks"),
    ],
)
def test_hooks_of_containers_are_refused_and_those_of_layers_are_called(model, words):
    with pytest.raises(ValueError, match=words):
        CountedNetwork(model)
    assert CountedNetwork(Sequential(with_hook(nn.Linear(3, 4))))(torch.ones(2, 1, 3))


class OwnSynapse(DualExponentialSynapse):
    pass


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 1, 1)])
def test_subclasses_are_counted_and_a_scale_of_each_map_takes_no_operations(shape):
    scaling = Scaling(*shape)
    model = Sequential(OwnSynapse((3, 5, 5), 4.0, 1.0), scaling, PerStep(nn.Conv2d(3, 2, 3)))
    found = count(model, torch.ones(4, 2, 3, 5, 5)).operations()
    assert found.multiply_accumulates == 4 * 9 * 2 * 27


def test_weights_of_a_parametrisation_are_not_counted_beside_its_layer():
    linear = nn.Linear(3, 4)
    nn.utils.parametrizations.orthogonal(linear)
    model = Sequential(linear, nn.LayerNorm((4,)), SpikingNeuron(4, 4.0))
    assert count(model, torch.ones(5, 2, 3)).operations().additions == 5 * 3 * 4


# Maps, and weights that are zero


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
def test_operations_of_a_convolution_are_those_of_brute_force(convolution, features):
    model = Sequential(PerStep(convolution), SpikingNeuron((3, *[1] * (len(features) - 1)), 4.0))
    if convolution.out_channels != 3:
        model = Sequential(PerStep(convolution))
    x = spikes(4, 3, *features, rate=0.3)
    counted = count(model, x)
    reached = outputs_reached(convolution, features)
    assert counted.dense_operations() == reached.sum()
    assert counted.operations()[:2] == ((x * reached).sum().item() / 3, 0)
    assert torch.equal(counted.per_step, (x * reached).flatten(2).sum(2).long())


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_a_position_that_padding_repeats_is_read_once_more_for_each_repetition(mode):
    convolution = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode, bias=False)
    x = spikes(1, 1, 2, 5, 4)
    padded = nn.functional.pad(x[0], (1, 1, 1, 1), mode=mode)
    counted = count(Sequential(PerStep(convolution)), x)
    assert counted.synaptic_operations() == 3 * padded.unfold(2, 3, 1).unfold(3, 3, 1).sum()


def test_operations_of_a_network_of_convolutions_and_pooling():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 2, 3, bias=False), nn.Conv2d(2, 3, 3, padding=1, bias=False)]
    model = Sequential(
        nn.Unflatten(2, (1, 8, 8)),
        PerStep(convolutions[0]),
        LowPassSynapse((2, 1, 1), 4.0),
        SpikingNeuron((2, 1, 1), 4.0),
        PerStep(nn.MaxPool2d(2)),
        PerStep(nn.Sequential(convolutions[1], nn.Identity())),
        SpikingNeuron((3, 1, 1), 4.0),
        nn.Flatten(2),
        nn.Linear(27, 6),
        Votes(3),
    )
    for convolution in convolutions:
        nn.init.normal_(convolution.weight, 0.2)
    current = torch.rand(1, 3, 64).expand(6, 3, 64)
    counted = count(model, current)
    outputs, _ = model.layerwise(current)
    pooled, flat = outputs[4], outputs[7]
    from_current = outputs_reached(convolutions[0], (1, 8, 8)).sum()  # computed once
    from_spikes = (pooled * outputs_reached(convolutions[1], (2, 3, 3))).sum() + 6 * flat.sum()
    found = counted.operations()
    assert found.multiply_accumulates == from_current.item()
    assert found.additions == pytest.approx(from_spikes.item() / 3)
    assert outputs[3].sum() > pooled.sum() > 0
    assert [name for name, _ in counted.parts[5:7]] == ["5.module.0", "5.module.1"]


def test_a_convolution_beside_other_modules_in_a_step_weighs_every_step():
    model = Sequential(PerStep(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Identity())))
    found = count(model, torch.rand(1, 3, 1, 5, 5).expand(6, 3, 1, 5, 5)).operations()
    assert found.multiply_accumulates == 6 * 9 * 2 * 9


def test_maps_of_several_sizes_are_counted_each_by_its_own_size():
    convolution = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    model = Sequential(PerStep(convolution), SpikingNeuron((3, 1, 1), 4.0))
    counted = count(model, *(torch.ones(2, 1, 2, size, size) for size in (4, 6)))
    expected = [outputs_reached(convolution, (2, size, size)).sum().item() for size in (4, 6)]
    assert counted.synaptic_operations() == 2 * sum(expected) / 2


def test_weights_that_are_zero_take_no_operations():
    model = behind()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        model[3].weight[1] = 0
    prune.random_unstructured(model[3], "weight", 0.5)
    x = spikes(10, 4, 8)
    counted = count(model, x)
    assert counted.synaptic_operations() == per_step(model, x).sum().item() / 4
    assert counted.dense_operations() == 8 * 6 + 6 * 3


def test_weights_of_groups_that_are_zero_take_no_operations():
    convolution = prune.random_unstructured(nn.Conv2d(4, 6, 3, groups=2, bias=False), "weight", 0.6)
    x = spikes(2, 3, 4, 5, 5)
    reached = outputs_reached(convolution, (4, 5, 5))
    counted = count(Sequential(PerStep(convolution)), x)
    assert counted.synaptic_operations() == (x * reached).sum().item() / 3


@pytest.mark.parametrize("wrap", [lambda layer: layer, PerStep])
@pytest.mark.parametrize("batch", [2, 3])  # as many as there are positions, too
def test_weights_that_several_positions_share_are_counted_at_each_position(batch, wrap):
    model = Sequential(wrap(nn.Linear(4, 5)), SpikingNeuron((3, 5), 4.0))
    x, lengths = spikes(6, batch, 3, 4), torch.tensor([6, 1, 4][:batch])
    counted = count(model, x, lengths=lengths)
    expected = 5 * x.sum((2, 3)).long() * (torch.arange(6)[:, None] < lengths)
    assert torch.equal(counted.per_step, expected)
    assert counted.dense_operations() == 3 * 4 * 5


@pytest.mark.parametrize("bias", [True, False])
def test_parametrised_weights_are_counted(bias):
    convolution = nn.Conv2d(2, 3, 3, padding=1, bias=bias)
    expected = outputs_reached(nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 5, 4)).sum()
    normed = nn.utils.parametrizations.weight_norm(convolution)
    counted = count(Sequential(PerStep(normed)), torch.ones(1, 1, 2, 5, 4))
    assert counted.synaptic_operations() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_operations_are_exact_in_every_precision(dtype):
    wide = Sequential(nn.Linear(8, 5000), SpikingNeuron(5000, 4.0)).to(dtype)
    x = spikes(10, 4, 8).to(dtype)
    assert count(wide, x).operations()[:2] == (5000 * x.float().sum().item() / 4, 0)
    many = torch.ones(1, 8191), torch.ones(2049, 8191)  # 2^24 and more, an odd number
    assert _count_products(nn.Linear(1, 1), *many).item() == 8191 * 2049
    with torch.autocast("cpu", torch.bfloat16):
        rounded = count(Sequential(nn.Linear(8, 6)), x.float())
    assert rounded.synaptic_operations() == 6 * x.float().sum() / 4


def test_counting_keeps_no_tensor_that_it_has_counted():
    model, received = network(), []
    model[4].register_forward_pre_hook(
        lambda module, inputs: received.append(weakref.ref(inputs[0]))
    )
    count(model, spikes(10, 4, 8))
    assert [psp() for psp in received] == [None]


def dense():
    torch.manual_seed(0)
    return Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def maps(*, filters_behind):
    """Convolutions and a matrix, with the filters before the weights or behind them."""
    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(12, 5)
    nn.init.normal_(convolution.weight, 0.2)
    nn.init.normal_(linear.weight, 0.2)
    neurons = SpikingNeuron((3, 1, 1), 4.0), SpikingNeuron(5, 4.0)
    begin, pooling = nn.Unflatten(2, (2, 2, 2)), nn.Flatten(2)
    if filters_behind:
        filters = LowPassSynapse((3, 1, 1), 4.0), LowPassSynapse(5, 4.0)
        layers = (PerStep(convolution), filters[0], neurons[0], pooling, linear, filters[1])
    else:
        filters = LowPassSynapse((2, 1, 1), 4.0), LowPassSynapse(12, 4.0)
        layers = (filters[0], PerStep(convolution), neurons[0], pooling, filters[1], linear)
    return Sequential(begin, *layers, neurons[1])


maps_before, maps_behind = (partial(maps, filters_behind=behind) for behind in (False, True))


@pytest.mark.parametrize("build", [dense, network, behind, maps_before, maps_behind])
@pytest.mark.parametrize("current", [False, True])
def test_neurobench_counts_the_same(build, current, monkeypatch):
    pytest.importorskip("neurobench")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from neurobench_counts import ours, theirs

    x = torch.rand(1, 3, 8).expand(10, 3, 8) if current else spikes(10, 3, 8)
    found = ours(build().eval(), x)
    assert found == pytest.approx(theirs(build().eval(), x), rel=1e-12)
    assert found["Effective_ACs"] + found["Effective_MACs"] > 0


def test_delays_are_counted_as_filters():
    delay = snn_lib.Delay((2, 3, 3), 1.5, 4)
    model = Sequential(delay, nn.Flatten(2), nn.Linear(18, 3))
    assert count(model, torch.ones(5, 2, 2, 3, 3)).operations().filters == 5 * 18 * 2

"""What cannot leave PyTorch is refused in one line that names the layer."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from snn_lib import (
    ChannelsFirst,
    Chunked,
    LowPassSynapse,
    PerStep,
    Recurrent,
    Repeat,
    Sequential,
    SpikingNeuron,
    Votes,
)
from snn_lib.inference.description import describe
from snn_lib.readout import Snapshots


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Backwards(Sequential):
    def forward(self, x, state=None, lengths=None):
        return super().forward(x.flip(0), state, lengths)


def test_what_torch_compile_returned_is_refused():
    model = torch.compile(Sequential(nn.Linear(2, 3)))
    with pytest.raises(ValueError, match=r"the network is what torch\.compile returned"):
        describe(model)


def test_a_module_whose_forward_was_replaced_is_refused():
    network = Sequential(nn.Linear(4, 4), LowPassSynapse(4, 3.0))
    network[0].forward = lambda x: 2 * x
    with pytest.raises(ValueError, match=r"^0 \(Linear\) has a forward that was set on the module"):
        describe(network)


def in_maps(layer):
    return Sequential(LowPassSynapse((2, 6, 6), 3.0), PerStep(layer))


SHARED = nn.Linear(4, 4)
REFUSED = [  # the network, and the words
    (Sequential(nn.Linear(4, 4), nn.GRU(4, 4)), r"1 \(GRU\) runs only in PyTorch"),
    (Sequential(nn.Linear(4, 4), nn.ReLU()), r"1 \(ReLU\) runs only in PyTorch"),
    (Sequential(Sequential(Doubling(4, 4))), r"0.0 \(Doubling\) runs only in PyTorch"),
    (Backwards(nn.Linear(4, 4)), "^Backwards is no chain of layers"),
    (Sequential(Backwards(nn.Linear(4, 4))), r"^0 \(Backwards\) runs only in PyTorch"),
    (in_maps(nn.BatchNorm2d(2)), "^layer 1.module normalises what comes from no layer of weights"),
    (in_maps(nn.BatchNorm2d(2, track_running_stats=False)),
     r"1.module \(BatchNorm2d\).*no running averages"),
    (in_maps(nn.InstanceNorm2d(2)), r"1.module \(InstanceNorm2d\) runs only in PyTorch"),
    (in_maps(nn.Conv2d(2, 2, 3, padding_mode="circular")), r"1.module \(Conv2d\).*padding_mode"),
    (in_maps(nn.AvgPool2d(4, ceil_mode=True)), r"1.module \(AvgPool2d\).*ceil_mode"),
    (in_maps(nn.MaxPool2d(2, return_indices=True)), r"1.module \(MaxPool2d\).*return_indices"),
    (in_maps(nn.Flatten(2)), r"1.module \(Flatten\).*one row"),
    (in_maps(nn.Linear(6, 2)), r"1.module \(Linear\).*nn.Flatten\(2\) before it"),
    (in_maps(nn.Conv2d(3, 2, 3)), r"1.module \(Conv2d\) is given the shape \(2, 6, 6\)"),
    (Sequential(nn.Linear(4, 3), LowPassSynapse(5, 3.0)), r"1 \(LowPassSynapse\) is given"),
    (Sequential(nn.Linear(4, 3), SpikingNeuron(5, 3.0)), r"1 \(SpikingNeuron\) is given"),
    (Sequential(), "Sequential has no layers"),
    (Sequential(nn.Flatten(2), nn.Identity()), "Sequential has no layers"),
    (nn.Linear(4, 4), "^Linear is no chain of layers"),
    (Sequential(nn.Linear(4, 4), nn.Unflatten(2, (4, 1))), "^layer 1 rearranges features between"),
    (Sequential(nn.Unflatten(2, (2, 3)), nn.Linear(3, 4)), r"0 \(Unflatten\) is given the shape"),
    (in_maps(Votes(2)), r"1.module \(Votes\).*nn.Flatten\(2\) before it"),
    (Sequential(LowPassSynapse((6, 6), 3.0), PerStep(nn.MaxPool2d(2))), r"MaxPool2d.*maps \(C"),
    (Sequential(LowPassSynapse((6, 6), 3.0), Repeat(2)), r"1 \(Repeat\).*expected maps \(C"),
    (Sequential(nn.Linear(4, 4), Snapshots([1, 2**24])), r"1 \(Snapshots\).*than 2\^24 steps"),
    (Sequential(nn.Linear(4, 4)).bfloat16(), "0.weight is torch.bfloat16"),
    (Sequential(SpikingNeuron(4, 3.0)).half(), "0.reset_decay is torch.float16"),
    (Sequential(SHARED, Recurrent(SHARED, SpikingNeuron(4, 3.0))), "is also a part of another one"),
]  # fmt: skip


@pytest.mark.parametrize(("network", "words"), REFUSED)
def test_layers_that_only_pytorch_runs_are_refused_by_name(network, words):
    shape = (4,) if "no layers" in words or "Unflatten" in words else None
    with pytest.raises(ValueError, match=words) as caught:
        describe(network, shape)
    assert "\n" not in str(caught.value)


def test_what_is_no_module_or_only_pytorch_can_run_is_refused_before_its_shape():
    with pytest.raises(TypeError, match="the network is a str, expected a torch"):
        describe("network.onnx")
    with pytest.raises(ValueError, match=r"0 \(LSTM\) runs only in PyTorch"):
        describe(Sequential(nn.LSTM(4, 4), nn.Linear(4, 3)))


@pytest.mark.parametrize(
    ("first", "name"),
    [
        (PerStep(nn.Conv2d(2, 3, 3)), "0.module"),
        (PerStep(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))), "0.module.0"),
    ],
)
def test_a_network_that_begins_with_maps_of_any_size_is_asked_for_the_shape(first, name):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the message is checked below)
        describe(Sequential(first, nn.Flatten(2), nn.Linear(12, 3)))
    assert f"{name} (Conv2d) takes inputs of several shapes: give" in str(refused.value)


def test_weights_of_each_step_tell_the_shape_of_the_input():
    assert describe(Sequential(PerStep(nn.Sequential(nn.Linear(5, 3))))).before == (5,)


def test_the_shape_of_the_input_has_to_be_given_where_the_first_layer_takes_several():
    network = Sequential(LowPassSynapse((2, 1, 1), 3.0))
    with pytest.raises(ValueError, match=r"0 \(LowPassSynapse\) takes inputs of several shapes"):
        describe(network)
    assert describe(network, (2, 5, 5)).after == (2, 5, 5)
    assert describe(Sequential(nn.Linear(4, 3)), 4).before == (4,)  # as layers take it


def test_layers_with_hooks_are_refused():
    hooked, pruned = (Sequential(LowPassSynapse(4, 3.0), nn.Linear(4, 2)) for _ in range(2))
    handle = hooked[0].register_forward_hook(lambda module, args, result: result)
    prune.l1_unstructured(pruned[1], "weight", amount=4)
    for network, name in ((hooked, "0 (LowPassSynapse)"), (pruned, "1 (Linear)")):
        with pytest.raises(ValueError, match=re.escape(f"{name} has hooks, which only PyTorch")):
            describe(network)
    handle.remove()
    prune.remove(pruned[1], "weight")
    assert describe(hooked).after == describe(pruned).after == (2,)


@pytest.mark.parametrize("exact", [(), (2,), (0, 1), (0, 1, 2)])
def test_a_network_with_a_layer_in_float64_is_described_in_float64(exact):
    network = Sequential(LowPassSynapse(4, 3.0), nn.Linear(4, 4), SpikingNeuron(4, 3.0))
    for number in exact:
        network[number].double()
    assert describe(network).dtype == ("float64" if exact else "float32")


class Around(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.preparation, self.layers, self.classes = nn.Identity(), layers, 2

    def forward(self, x, state=None):
        x = x + torch.randn_like(x) if self.training else x
        return self.layers(self.preparation(x), state)


class OnTensors(Around):
    """A network whose forward does with tensors what it does with nothing else."""

    def forward(self, x, state=None):
        given = 2 * x if self.doubles == 1 and isinstance(x, torch.Tensor) else x
        output, state = self.layers(x=given, state=state)
        return 2 * output if self.doubles == 2 and isinstance(x, torch.Tensor) else output, state


class InHalf(Around):
    """Computes in another precision than its weights have."""

    def forward(self, x, state=None):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layers(x, state)


def test_a_forward_with_an_autocast_of_its_own_is_refused():
    with pytest.raises(ValueError, match="InHalf does more than its Sequential"):
        describe(InHalf(Sequential(nn.Linear(4, 2))))


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_forward_that_does_more_with_tensors_is_refused(batch_first):
    network = OnTensors(Sequential(nn.Linear(4, 2), batch_first=batch_first))
    for network.doubles in (1, 2):
        with pytest.raises(ValueError, match="OnTensors does more than its Sequential: make what"):
            describe(network)
    network.doubles = 0
    assert describe(network).after == (2,)


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_a_network_in_chunks_is_described_as_the_network_itself(steps):
    inner = Sequential(LowPassSynapse(4, 3.0), nn.Linear(4, 2))
    outer = Around(Chunked(inner, steps))
    for network in (Chunked(inner, steps), outer):
        assert describe(network).after == (2,)
    assert isinstance(outer.layers, Chunked)  # the network itself is not changed


def test_a_network_is_described_in_evaluation_mode_and_left_in_training_mode():
    network = Around(Sequential(nn.Linear(4, 2))).train()
    assert describe(network).before == (4,)
    assert network.training


class Remembering(Around):
    """Keeps its last output, which PyTorch does not copy."""

    def forward(self, x, state=None):
        self.output, state = super().forward(x, state)
        return self.output, state


def test_a_network_that_keeps_an_output_with_its_gradients_is_described():
    network = Remembering(Sequential(nn.Linear(4, 2)))
    network(torch.rand(3, 1, 4))
    before = network.output
    assert describe(network).before == (4,)
    assert network.output is before
    assert before.requires_grad


def test_a_network_that_nobody_can_copy_is_refused_in_a_line():
    network = Around(Sequential(nn.Linear(4, 2)))
    with open(__file__) as network.file:
        with pytest.raises(ValueError, match=r"^Around cannot be copied \(cannot pickle .*: give"):
            describe(network)
        assert describe(network.layers).before == (4,)


class Starting(Around):
    """Begins with a state of its own."""

    def forward(self, x):
        return self.layers(x, (None, (torch.full((1, 4), 0.5), torch.zeros(1, 4))))


def test_a_network_that_begins_with_a_state_of_its_own_is_refused():
    with pytest.raises(ValueError, match=r"Starting.forward does more than to hand its input"):
        describe(Starting(Sequential(nn.Linear(4, 4), SpikingNeuron(4, 3.0))))


class StartingLater(Around):
    """Begins with a state of its own wherever it is given numbers."""

    def forward(self, x):
        state = None, (torch.full((1, 4), 0.5), torch.zeros(1, 4))
        return self.layers(x, state if isinstance(x, torch.Tensor) else None)


def test_a_state_that_only_numbers_are_given_with_is_seen_as_the_network_runs():
    network = StartingLater(Sequential(nn.Linear(4, 4), SpikingNeuron(4, 3.0)))
    with pytest.raises(ValueError, match="StartingLater does more than its Sequential"):
        describe(network)


def test_the_neurons_of_a_recurrent_first_layer_say_what_the_input_is():
    assert describe(Sequential(Recurrent(nn.Linear(4, 4), SpikingNeuron(4, 3.0)))).before == (4,)


def test_only_the_layers_say_in_which_dtype_a_network_computes():
    for dtype in (torch.float64, torch.float16):
        network = Around(Sequential(nn.Linear(4, 2)))
        network.register_buffer("class_weights", torch.ones(2, dtype=dtype))
        assert describe(network).dtype == np.float32
    network.layers[0].weight.data = network.layers[0].weight.half()
    with pytest.raises(ValueError, match=r"^layers\.0\.weight is torch.float16: expected"):
        describe(network)
    network.layers[0].weight.data = network.layers[0].weight.double()
    with pytest.raises(ValueError, match=r"^Around does not run on steps of the shape \(4,\) in"):
        describe(network)


@pytest.mark.parametrize("per_step", [False, True])
def test_features_are_unflattened_in_a_sequence_and_in_a_step(per_step):
    unflatten = nn.Unflatten(1, (1, 6, 6)) if per_step else nn.Unflatten(2, (1, 6, 6))
    first = PerStep(nn.Sequential(unflatten, nn.Conv2d(1, 2, 3))) if per_step else unflatten
    found = describe(Sequential(first, nn.Flatten(2), nn.Linear(32 if per_step else 36, 3)), (36,))
    assert found.entry.tolist() == list(range(36))
    assert found.layers[0].before == (1, 6, 6)


def test_input_that_is_rearranged_before_the_first_layer_is_read_in_its_new_order():
    network = Sequential(nn.Unflatten(2, (3, 2)), ChannelsFirst(), nn.Flatten(2), nn.Linear(6, 2))
    found = describe(network, (6,))
    assert found.entry.tolist() == [0, 2, 4, 1, 3, 5]
    assert found.layers[0].before == (2, 3)

"""What cannot leave PyTorch is refused in one line that names the layer."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from snn_lib import Chunked, LowPassSynapse, PerStep, Repeat, Sequential, SpikingNeuron
from snn_lib.inference.description import describe
from snn_lib.readout import Snapshots


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Backwards(Sequential):
    def forward(self, x, state=None, lengths=None):
        return super().forward(x.flip(0), state, lengths)


class Around(nn.Module):
    """A forward of some kind around a Sequential."""

    def __init__(self, before=lambda x: x, after=lambda y: y):
        super().__init__()
        self.layers = Sequential(nn.Linear(4, 3))
        self.before, self.after = before, after

    def forward(self, x, state=None):
        y, state = self.layers(self.before(x), state)
        return self.after(y), state


class Later(nn.Module):
    """A forward that calls its Sequential in some way."""

    def __init__(self, call):
        super().__init__()
        self.layers, self.call = Sequential(nn.Linear(4, 3), LowPassSynapse(3, 2.0)), call

    def forward(self, x, state=None):
        return self.call(self.layers, x, state)


def twice(layers, x, state):
    _, state = layers(x, state)
    return layers(x, state)


def silent_at_first(layers, x, state):
    y, state = layers(x, state)
    return torch.cat([0 * y[:10], y[10:]]), state


def deaf_later(layers, x, state):
    return layers(torch.cat([x[:5], 0 * x[5:]]), state)


def clamped(layers, x, state):
    y, state = layers(x.clamp(-100, 100), state)
    return y, state


def clamped_after(layers, x, state):
    y, state = layers(x, state)
    return y.clamp(-10, 10), state


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (twice, "Later.forward runs 2 times, expected once, its Sequential"),
        (silent_at_first, "Later.forward does more than add up output after"),
        (deaf_later, "Later.forward computes with its input before"),
        (clamped, "Later.forward computes with its input before"),
        (clamped_after, "Later.forward does more than add up output after"),
    ],
)
def test_what_a_forward_does_in_a_run_is_compared(call, words):
    with pytest.raises(ValueError, match=words):
        describe(Later(call), (4,))
    assert describe(Later(lambda layers, x, state: layers(x, state)), (4,)).after == (3,)


def test_a_forward_of_a_single_module_is_refused():
    network = Sequential(nn.Linear(4, 4), LowPassSynapse(4, 3.0))
    network[0].forward = lambda x: 2 * x
    with pytest.raises(ValueError, match=r"^0 \(Linear\) has a forward that was set on the module"):
        describe(network)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Sequential(nn.Linear(4, 4)), Sequential(nn.Linear(4, 4))


def in_maps(layer):
    return Sequential(LowPassSynapse((2, 6, 6), 3.0), PerStep(layer))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Sequential(nn.Linear(4, 4), nn.GRU(4, 4)), r"1 \(GRU\) runs only in PyTorch"),
        (Sequential(nn.Linear(4, 4), nn.ReLU()), r"1 \(ReLU\) runs only in PyTorch"),
        (Sequential(Sequential(Doubling(4, 4))), r"0.0 \(Doubling\) runs only in PyTorch"),
        (Backwards(nn.Linear(4, 4)), r"^Backwards runs only in PyTorch"),
        (in_maps(nn.BatchNorm2d(2)), "^1.module normalises what comes from no layer of weights"),
        (
            in_maps(nn.BatchNorm2d(2, track_running_stats=False)),
            r"1.module \(BatchNorm2d\).*no running averages",
        ),
        (in_maps(nn.InstanceNorm2d(2)), r"1.module \(InstanceNorm2d\) runs only in PyTorch"),
        (
            in_maps(nn.Conv2d(2, 2, 3, padding_mode="circular")),
            r"1.module \(Conv2d\).*padding_mode",
        ),
        (in_maps(nn.AvgPool2d(4, ceil_mode=True)), r"1.module \(AvgPool2d\).*ceil_mode"),
        (in_maps(nn.MaxPool2d(2, return_indices=True)), r"1.module \(MaxPool2d\).*return_indices"),
        (in_maps(nn.Flatten(2)), r"1.module \(Flatten\).*one row"),
        (in_maps(nn.Linear(6, 2)), r"1.module \(Linear\).*nn.Flatten\(2\) before it"),
        (in_maps(nn.Conv2d(3, 2, 3)), r"1.module \(Conv2d\) is given the shape \(2, 6, 6\)"),
        (Sequential(nn.Linear(4, 3), LowPassSynapse(5, 3.0)), r"1 \(LowPassSynapse\) is given"),
        (Sequential(nn.Linear(4, 3), SpikingNeuron(5, 3.0)), r"1 \(SpikingNeuron\) is given"),
        (Sequential(), "Sequential has no layers"),
        (Sequential(nn.Flatten(2), nn.Identity()), "Sequential has no layers"),
        (nn.Linear(4, 4), "Linear has 0 parts"),
        (Two(), "Two has 2 parts"),
        (Around(before=lambda x: 2 * x), "Around.forward computes with its input before"),
        (Around(before=torch.relu), "Around.forward computes with its input before"),
        (Around(before=lambda x: x.cumsum(0)), "Around.forward computes with its input before"),
        (Around(before=lambda x: x @ None), "Around.forward refuses features"),
        (Around(after=lambda y: y.softmax(-1)), "Around.forward does more than add up"),
        (Around(after=lambda y: y + 1), "Around.forward does more than add up"),
        (
            Around(after=lambda y: y.mean(0)),
            "Around.forward does not return an output for each",
        ),
        (
            Around(after=lambda y: y.sum(-1)),
            "Around.forward does not return an output for each",
        ),
        (Around(after=lambda y: y[1:]), "Around.forward does not return an output for each"),
        (Sequential(LowPassSynapse((6, 6), 3.0), PerStep(nn.MaxPool2d(2))), r"MaxPool2d.*maps \(C"),
        (Sequential(LowPassSynapse((6, 6), 3.0), Repeat(2)), r"1 \(Repeat\).*expected maps \(C"),
        (Around(after=lambda y: y.sum(5)), "Around.forward returns no output and state"),
        (Sequential(nn.Linear(4, 4), Snapshots([1, 2**24])), r"1 \(Snapshots\).*than 2\^24 steps"),
        (Sequential(nn.Linear(4, 4)).bfloat16(), "0.weight is torch.bfloat16"),
        (Sequential(SpikingNeuron(4, 3.0)).half(), "0.reset_decay is torch.float16"),
    ],
)
def test_what_only_pytorch_runs_is_refused_by_name(network, words):
    shape = (4,) if isinstance(network, Around) or "no layers" in words else None
    with pytest.raises(ValueError, match=words) as caught:
        describe(network, shape)
    assert "\n" not in str(caught.value)


def test_the_shape_is_asked_for_where_the_first_layer_does_not_tell():
    network = Sequential(LowPassSynapse((2, 1, 1), 3.0))
    with pytest.raises(ValueError, match=r"0 \(LowPassSynapse\) takes inputs of several shapes"):
        describe(network)
    assert describe(network, (2, 5, 5)).after == (2, 5, 5)
    repeating = Around(before=lambda x: x.repeat(1, 1, 2))
    with pytest.raises(ValueError, match=r"Around.forward changes the features.*shape="):
        describe(repeating)
    assert describe(repeating, (2,)).before == (2,)


def test_hooks_are_refused_since_only_pytorch_calls_them():
    hooked, pruned = (Sequential(LowPassSynapse(4, 3.0), nn.Linear(4, 2)) for _ in range(2))
    handle = hooked[0].register_forward_hook(lambda module, args, result: result)
    prune.l1_unstructured(pruned[1], "weight", amount=4)
    for network, name in ((hooked, "0 (LowPassSynapse)"), (pruned, "1 (Linear)")):
        with pytest.raises(ValueError, match=re.escape(f"{name} has hooks, which only PyTorch")):
            describe(network)
    handle.remove()
    prune.remove(pruned[1], "weight")
    assert describe(hooked).after == describe(pruned).after == (2,)


def test_a_float64_network_stays_one():
    assert describe(Sequential(nn.Linear(4, 4)).double()).dtype == "float64"
    assert describe(Sequential(nn.Linear(4, 4))).dtype == "float32"


@pytest.mark.parametrize("exact", [(0, 1), (2,)])
def test_a_network_with_a_layer_in_float64_is_described_in_float64(exact):
    network = Sequential(LowPassSynapse(4, 3.0), nn.Linear(4, 4), SpikingNeuron(4, 3.0))
    for number in exact:
        network[number].double()
    assert describe(network).dtype == "float64"


class Jittering(Around):
    def forward(self, x, state=None):
        return super().forward(x + torch.randn_like(x) if self.training else x, state)


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_chunks_of_any_length_change_nothing(steps):
    inner = Sequential(LowPassSynapse(4, 3.0), nn.Linear(4, 2))
    outer = Around()
    outer.layers = Chunked(inner, steps)
    for network in (Chunked(inner, steps), outer):
        assert describe(network).after == (2,)
    assert isinstance(outer.layers, Chunked)  # the network itself is not changed


def test_a_module_that_is_called_preparation_is_none():
    class Prepared(nn.Module):
        def __init__(self):
            super().__init__()
            self.preparation, self.layers = nn.Identity(), Sequential(nn.Linear(4, 2))
            self.classes = 2

        def forward(self, x, state=None):
            return self.layers(self.preparation(x), state)

    assert describe(Prepared()).before == (4,)


def test_a_forward_is_read_as_in_evaluation():
    network = Jittering().train()
    assert describe(network, (4,)).after == (3,)
    assert network.training

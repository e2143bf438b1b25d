"""The networks that the benchmarks run: this library's and those it is compared with.

Every variant has the same layer sizes, input, loss and optimiser, and all but the dense floor have
the same dropout. What a variant computes between its matrix products, and what it leaves out, is
its ``note``.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # snn_lib, from any folder
import snn_lib
from snn_lib.data.mnist import load_mnist
from snn_lib.snn_layers import dual_exp_iir_layer, neuron_layer
from snn_lib.time_constants import decays_of

ROOT = Path(__file__).resolve().parents[1]
SIGMA = 0.4  # width of the Gaussian surrogate
GAIN = 5.0  # of the weights: every layer of every variant fires from the start


@dataclass(frozen=True)
class Network:
    """Layer sizes, time steps T, batch B and constants of one experiment.

    With ``images``, the input is one image per sample, repeated at every step, and the loss the
    cross-entropy of the output spike counts; otherwise input and target are spike trains. So many
    ``convolutions`` come first, 3 x 3 on square maps, whose sizes are their channels; what they
    give is pooled, 2 x 2, and dropout is behind the maps alone.

    With ``pretrained``, the name of a model that classifies digits, its input is that model's: test
    images as the spikes on which it was trained.
    """

    sizes: tuple[int, ...]
    steps: int
    tau_m: float
    tau_s: float
    images: bool
    batch: int = 64
    dropout: float = 0.0
    convolutions: int = 0
    side: int = 28  # of the first maps
    rate: float = 0.02  # of random spike trains
    pretrained: str = ""

    def __str__(self) -> str:
        if self.pretrained:
            return f"{self.pretrained}, T = {self.steps}"
        kinds = ("C3",) * self.convolutions + ("",) * len(self.sizes)
        names = (f"{size}{kind}" for size, kind in zip(self.sizes[1:], kinds, strict=False))
        first = f"{self.side}x{self.side}" if self.convolutions else str(self.sizes[0])
        return f"{'-'.join([first, *names])}, T = {self.steps}"

    @property
    def inputs(self) -> int:
        """Pixels or spike trains."""
        return self.sizes[0] * (self.side**2 if self.convolutions else 1)

    def small(self) -> "Network":
        """As many layers, but tiny."""
        sizes = (self.sizes[0] if self.convolutions else 8, *[8] * (len(self.sizes) - 1))
        steps = min(self.steps, 3)
        return replace(self, sizes=sizes, steps=steps, batch=2, side=8, pretrained="")

    def layers(self) -> Iterator["Layer"]:
        """What is between one layer of neurons and the next, first layer first."""
        last = len(self.sizes) - 2
        for index, (inputs, outputs) in enumerate(pairwise(self.sizes)):
            dropout = 0.0 if index == last else self.dropout
            if index < self.convolutions:
                before = nn.Identity() if index else Maps(self.side)
                yield Layer(inputs, outputs, 0.0, before, convolves=True)
            elif 0 < index == self.convolutions:
                positions = (self.side >> index) ** 2
                yield Layer(inputs * positions, outputs, dropout, nn.Flatten(-3))
            else:
                yield Layer(inputs, outputs, dropout)

    def data(self, device: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The input ``(T, B, N)``, and the loss of an output ``(T, B, M)``."""
        shape = (self.steps, self.batch, self.inputs)
        if self.pretrained:
            images, labels = (part[: self.batch] for part in load_mnist(ROOT / "dataset", False))
            x, _ = self.load().prepare(images)
            return x.to(device), lambda output: nn.functional.cross_entropy(
                output.float().sum(0), labels.to(device)
            )
        if self.images:  # a fifth of the pixels are bright, as in a handwritten digit
            image = torch.rand(shape[1:], device=device) * (
                torch.rand(shape[1:], device=device) < 0.2
            )
            labels = torch.randint(self.sizes[-1], (self.batch,), device=device)
            return image.expand(shape), lambda output: nn.functional.cross_entropy(
                output.float().sum(0), labels
            )
        spikes, target = self.trains(device)
        target = target.float()
        return spikes.float(), lambda output: nn.functional.mse_loss(output.float(), target)

    def load(self) -> nn.Module:
        """The pretrained model."""
        return snn_lib.load(ROOT / "checkpoint" / f"pretrained_{self.pretrained}")

    def trains(self, device: str) -> tuple[Tensor, Tensor]:
        """Random spike trains, the input's and the target's, a byte a step."""
        counts = self.inputs, self.sizes[-1]
        spikes, target = (
            torch.rand(self.steps, self.batch, count, device=device) < self.rate for count in counts
        )
        return spikes, target

    def trains_and_loss(self, device: str) -> tuple[tuple[Tensor, Tensor], Callable]:
        """Both trains, for a network that gives the summed squared error of each chunk."""
        trains = self.trains(device)
        return trains, lambda errors: errors.sum() / trains[1].numel()


class Maps(nn.Module):
    """Pixels as feature maps, whose channels lie last in memory: so convolutions are faster."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.side, self.side, -1)).movedim(-1, -3)


@dataclass(frozen=True)
class Layer:
    """Weights from one layer of neurons to the next.

    Attributes:
        inputs, outputs: channels of feature maps, or neurons.
        dropout: of the output.
        before: what the spikes go through before they are filtered.
        convolves: whether the weights are a convolution, pooled 2 x 2.
    """

    inputs: int
    outputs: int
    dropout: float
    before: nn.Module = field(default_factory=nn.Identity)
    convolves: bool = False

    def shape(self, channels: int) -> tuple[int, ...]:
        """Of coefficients, one for each map or neuron."""
        return (channels, 1, 1) if self.convolves else (channels,)

    def weights(self, gain: float = GAIN) -> nn.Module:
        """Random weights, of standard deviation gain / sqrt(inputs of a neuron)."""
        if self.convolves:
            layer = nn.Conv2d(self.inputs, self.outputs, 3, padding=1)
        else:
            layer = nn.Linear(self.inputs, self.outputs)
        nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
        return nn.Sequential(layer, nn.MaxPool2d(2)) if self.convolves else layer

    def weights_of_steps(self, gain: float = GAIN) -> nn.Module:
        """The same for all steps at once."""
        return snn_lib.PerStep(self.weights(gain)) if self.convolves else self.weights(gain)


DIGITS = Network((784, 500, 500, 10), steps=25, tau_m=4, tau_s=1, images=True, dropout=0.3)
MEMORY = Network((300, 500, 200, 500, 300), steps=300, tau_m=8, tau_s=2, images=False)
# Almost the widths of sequential_mnist.py (64, 240, 240), and a pixel a step as there. Here the
# pixel is filtered and the output spikes: a filter of one channel and ten neurons more.
PIXELS = Network(
    (1, 64, 256, 256, 10), steps=784, tau_m=8, tau_s=2, images=False, batch=100, dropout=0.1
)
# That of snn_conv.py, with one output neuron for each class.
MAPS = Network(
    (1, 16, 64, 128, 256, 10),
    steps=8,
    tau_m=4,
    tau_s=1,
    images=True,
    batch=32,
    dropout=0.3,
    convolutions=3,
)
# Of spikes, with filters behind the weights: their first weights receive spikes.
POISSON, LATENCY = (
    replace(DIGITS, steps=steps, images=False, pretrained=f"snn_mlp_1_{encoding}_behind")
    for encoding, steps in (("poisson", 25), ("latency", 12))
)
# The same of convolutions; the last neurons vote.
CONVOLUTIONS = replace(
    MAPS,
    sizes=(*MAPS.sizes[:-1], 100),
    steps=10,
    images=False,
    pretrained="snn_conv_poisson_behind",
)


@dataclass(frozen=True)
class Variant:
    """One row of the table: how to build the network, and how to run it.

    This library makes the allocator reuse large buffers, which makes any network quicker
    (``snn_lib/kernels/cpu/allocator.py``). A row with ``keeps_memory`` has this setting.
    """

    name: str
    build: Callable[[Network], nn.Module]
    note: str = ""
    precision: str = "float32"
    backend: str | None = None  # of this library
    rows: bool = False  # the input is T * B separate rows, even if it is constant over time
    input_gradient: bool = False
    keeps_memory: bool = True  # with the allocator's setting that this library makes, see above
    data: Callable[[Network, str], tuple] = Network.data  # the input, and the loss of the output
    package: str | None = None
    longest: int | None = None  # more time steps would take minutes


class SNN(nn.Module):
    """The network of the experiments, from this library, with its filters before the weights.

    With a ``rate``, all layers fire at about that rate.
    """

    def __init__(self, network: Network, behind: bool = False, rate: float | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for layer in network.layers():
            channels = layer.outputs if behind else layer.inputs
            synapse = snn_lib.DualExponentialSynapse(
                layer.shape(channels), network.tau_m, network.tau_s
            )
            weights = layer.weights_of_steps()
            layers += [
                *([] if isinstance(layer.before, nn.Identity) else [layer.before]),
                *([weights, synapse] if behind else [synapse, weights]),
                snn_lib.SpikingNeuron(
                    layer.shape(layer.outputs),
                    network.tau_m,
                    surrogate=snn_lib.Gaussian(SIGMA),
                    dropout=layer.dropout,
                ),
            ]
        self.layers = snn_lib.Sequential(*layers)
        if rate:
            snn_lib.fire_from_the_start(self.layers, network.data("cpu")[0], rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[0]


class Pretrained(nn.Module):
    """The pretrained model of a network, or if it is made small another with its filters behind."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.layers = network.load().model if network.pretrained else SNN(network, True).layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[0]


class TimeLast(nn.Module):
    """The same from the layers of the 2020 release, which take ``(B, N, T)``; no convolutions."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        sizes = network.steps, network.batch
        self.layers = nn.ModuleList()
        for layer in network.layers():
            constants = network.tau_m, network.tau_s, True
            synapse = dual_exp_iir_layer((layer.inputs,), *sizes, *constants)
            neurons = neuron_layer(layer.inputs, layer.outputs, *sizes, network.tau_m, True, False)
            neurons.neuron_cell.weight = layer.weights()
            self.layers.append(nn.ModuleList([synapse, neurons, nn.Dropout(layer.dropout)]))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(0, -1)
        for synapse, neurons, dropout in self.layers:
            x = dropout(neurons(synapse(x)[0])[0])
        return x.movedim(-1, 0)


CHUNK = 100  # time steps


class ChunkedSNN(SNN):
    """The same in chunks of time, whose forward pass runs twice."""

    def forward(self, x: Tensor) -> Tensor:
        return snn_lib.Chunked(self.layers, CHUNK)(x)[0]


class ChunkedLoss(SNN):
    """The same with the loss of a chunk in place of its output: nothing has the size of the whole
    sequence but the spike trains, a byte a step.
    """

    def forward(self, trains: tuple[Tensor, Tensor]) -> Tensor:
        return snn_lib.Chunked(self.error, CHUNK)(trains)[0]

    def error(self, trains: tuple[Tensor, Tensor], state: tuple | None) -> tuple[Tensor, tuple]:
        """The summed squared error of a chunk, ``(1,)``, and the state."""
        spikes, target = trains
        output, state = self.layers(spikes, state)
        return nn.functional.mse_loss(output, target.float(), reduction="sum")[None], state


class GaussianSpike(torch.autograd.Function):
    """The threshold, with the Gaussian surrogate."""

    @staticmethod
    def forward(ctx, membrane):
        ctx.save_for_backward(membrane)
        return (membrane > 1.0).float()

    @staticmethod
    def backward(ctx, grad):
        (membrane,) = ctx.saved_tensors
        bump = torch.exp((membrane - 1.0) ** 2 * (-0.5 / SIGMA**2))
        return grad * bump / (math.sqrt(2.0 * math.pi) * SIGMA)


class LoopLayer(nn.Module):
    """One time step of one layer, as one would write it from the equations."""

    def __init__(self, layer: Layer, network: Network) -> None:
        super().__init__()
        p, q = decays_of(network.tau_m, network.tau_s)
        shape = layer.shape(layer.inputs)
        self.alpha_1 = nn.Parameter(torch.full(shape, p + q))
        self.alpha_2 = nn.Parameter(torch.full(shape, -p * q))
        self.beta_0 = nn.Parameter(torch.full(shape, p - q))
        self.before, self.weights = layer.before, layer.weights()
        self.theta = p
        self.dropout = nn.Dropout(layer.dropout)

    def forward(self, x: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        f_1, f_2, reset = state  # F[t-1], F[t-2], R[t]; a number before the first step
        f = self.alpha_1 * f_1 + self.alpha_2 * f_2 + self.beta_0 * self.before(x)
        spikes = GaussianSpike.apply(self.weights(f).float() - reset)
        return self.dropout(spikes), (f, f_1, self.theta * reset + spikes)


class Loop(nn.Module):
    """The same network as :class:`SNN`, one time step after the other, under plain autograd."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LoopLayer(layer, network) for layer in network.layers())

    def forward(self, x: Tensor) -> Tensor:
        states = [(0.0, 0.0, 0.0)] * len(self.layers)
        outputs = []
        for step in x.unbind():  # x[t] would cost O(T^2) in the backward pass
            for index, layer in enumerate(self.layers):
                step, states[index] = layer(step, states[index])
            outputs.append(step)
        return torch.stack(outputs)


class Recurrent(nn.Module):
    """Gated layers of the same widths, each over all steps at once, and a linear output."""

    def __init__(self, kind: type[nn.RNNBase], network: Network) -> None:
        super().__init__()
        *layers, last = network.layers()
        self.layers = nn.ModuleList(kind(layer.inputs, layer.outputs) for layer in layers)
        self.dropout = nn.Dropout(network.dropout)
        self.output = nn.Linear(last.inputs, last.outputs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.dropout(layer(x)[0])
        return self.output(x)


def dense(network: Network) -> nn.Module:
    """The floor: the matrix products of the SNN and nothing else but ReLU."""
    layers: list[nn.Module] = []
    for layer in network.layers():
        layers += [layer.before, layer.weights_of_steps(), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


LOOP = Variant("per-step loop", Loop, "the model, an operator at a time")
FLOOR = Variant("dense floor", dense, "products and ReLU only", rows=True, input_gradient=True)

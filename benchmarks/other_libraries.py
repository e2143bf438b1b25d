"""The same networks built from other libraries, where they are installed.

Each runs as fast as its library offers on plain PyTorch: layer by layer, one matrix product over
all steps, then the neurons. Each has the neuron and the learned filter closest to the model's, one
dropout mask a step, and a surrogate of its own. None computes the model itself; the notes say what
is missing.

SpikingJelly takes each step out of a sequence by its number, ``x[t]``, whose gradient is as long as
the sequence: its multi-step mode costs T^2 in the backward pass. The row ``unbound`` runs the same
neurons a step at a time on ``x.unbind()``, which costs T.
"""

import importlib.util
from functools import partial

import torch
from networks import DIGITS, GAIN, MEMORY, Layer, Network, Variant
from torch import Tensor, nn

from snn_lib.time_constants import decays_of


class SnnTorchLayer(nn.Module):
    def __init__(self, layer: Layer, network: Network) -> None:
        super().__init__()
        import snntorch

        p, q = decays_of(network.tau_m, network.tau_s)
        shape = layer.shape(layer.outputs)
        self.before, self.weights = layer.before, layer.weights_of_steps()
        self.dropout = nn.Dropout(layer.dropout)
        self.neuron = snntorch.Synaptic(
            alpha=torch.full(shape, q),
            beta=torch.full(shape, p),
            learn_alpha=True,
            learn_beta=True,
            spike_grad=snntorch.surrogate.atan(),
        )

    def forward(self, x: Tensor) -> Tensor:
        synapse, membrane = self.neuron.reset_mem()
        outputs = []
        for current in self.weights(self.before(x)).unbind():
            spikes, synapse, membrane = self.neuron(current, synapse, membrane)
            outputs.append(spikes)
        return self.dropout(torch.stack(outputs))


class NorseLayer(nn.Module):
    def __init__(self, layer: Layer, network: Network) -> None:
        super().__init__()
        # Euler steps of 1 ms: dt / tau is 1 - decay, and scales the input current as well.
        rate_m, rate_s = (1.0 - decay for decay in decays_of(network.tau_m, network.tau_s))
        self.before, self.weights = layer.before, layer.weights_of_steps(gain=GAIN / rate_m)
        self.dropout = nn.Dropout(layer.dropout)
        shape = layer.shape(layer.outputs)
        self.tau_mem_inv = nn.Parameter(torch.full(shape, 1e3 * rate_m))
        self.tau_syn_inv = nn.Parameter(torch.full(shape, 1e3 * rate_s))

    def forward(self, x: Tensor) -> Tensor:
        from norse.torch.functional.lif import (
            LIFFeedForwardState,
            LIFParameters,
            lif_feed_forward_step,
        )
        from norse.torch.functional.lift import lift

        currents = self.weights(self.before(x))
        rest = torch.zeros_like(currents[0])
        parameters = LIFParameters(self.tau_syn_inv, self.tau_mem_inv)
        neuron = lift(lif_feed_forward_step, parameters)
        return self.dropout(neuron(currents, state=LIFFeedForwardState(v=rest, i=rest))[0])


class Unbound(nn.Module):
    """A SpikingJelly neuron of step mode "s" over all steps."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.neuron(step) for step in x.unbind()])


class SpikingJelly(nn.Module):
    def __init__(
        self, network: Network, synapse_filter: bool = False, unbound: bool = False
    ) -> None:
        super().__init__()
        from spikingjelly.activation_based import layer, neuron, surrogate

        layers: list[nn.Module] = []
        for described in network.layers():
            layers.append(described.before)
            if synapse_filter:
                layers.append(layer.SynapseFilter(network.tau_m, learnable=True, step_mode="m"))
            plif = neuron.ParametricLIFNode(
                float(network.tau_m),
                decay_input=False,
                v_reset=None,  # subtract the threshold
                surrogate_function=surrogate.ATan(),
                step_mode="s" if unbound else "m",
            )
            plif = Unbound(plif) if unbound else plif
            layers += [described.weights_of_steps(), plif, nn.Dropout(described.dropout)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        from spikingjelly.activation_based.functional import reset_net

        reset_net(self.layers)
        return self.layers(x)


def in_a_row(kind: type[nn.Module], network: Network) -> nn.Module:
    return nn.Sequential(*(kind(layer, network) for layer in network.layers()))


VARIANTS = [
    Variant(
        "snnTorch Synaptic",
        partial(in_a_row, SnnTorchLayer),
        "2 learned decays a neuron, after the weights; reset not filtered, detached",
        package="snntorch",
    ),
    Variant(
        "SpikingJelly PLIF",
        SpikingJelly,
        "1 learned decay a layer, after the weights; reset not filtered",
        package="spikingjelly",
        longest=MEMORY.steps,
    ),
    Variant(
        "SpikingJelly PLIF, unbound",
        partial(SpikingJelly, unbound=True),
        "the same, a step at a time",
        package="spikingjelly",
    ),
    Variant(
        "SpikingJelly SynapseFilter + PLIF",
        partial(SpikingJelly, synapse_filter=True),
        "1 learned first-order filter a layer before the weights, then as above",
        package="spikingjelly",
        longest=DIGITS.steps,
    ),
    Variant(
        "Norse LIF, lifted",
        partial(in_a_row, NorseLayer),
        "2 learned decays a neuron, after the weights; reset to 0, not filtered",
        package="norse",
    ),
]


def installed() -> list[Variant]:
    """Those whose package is there."""
    return [variant for variant in VARIANTS if importlib.util.find_spec(variant.package)]

"""A training step through the 2020 interface, the native API and per-step layers, interleaved.

    python benchmarks/interface_2020.py [--rounds 15] [--threads 2]

Two networks, batch 64, Adam, cross-entropy of the spike counts: 784-500-500-10 over 25 steps, with
dropout 0.3 as ``nn.Dropout`` in all three (and once more as the native neurons' own, which a script
of 2020 cannot ask for), and 300-500-200-500-300 over 300 steps. Prints the median of each and its
ratio to the native API.
"""

import argparse
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # snn_lib, from any folder

from snn_lib import DualExponentialSynapse, Sequential, SpikingNeuron
from snn_lib.snn_layers import dual_exp_iir_layer, neuron_layer, threshold

BATCH = 64
NETWORKS = {
    "784-500-500-10, T = 25": ((784, 500, 500, 10), 25, 4, 1, 0.3),
    "300-500-200-500-300, T = 300": ((300, 500, 200, 500, 300), 300, 8, 2, 0.0),
}


class PerStepSynapse(dual_exp_iir_layer):
    """The synapses as a loop over time with autograd."""

    def forward(self, x, states=None):
        cell = self.dual_exp_iir_cell
        last = before = torch.zeros_like(x[..., 0])
        psp = []
        for now in x.unbind(-1):
            now = cell.alpha_1 * last + cell.alpha_2 * before + cell.beta_1 * now
            last, before = now, last
            psp.append(now)
        return torch.stack(psp, -1), (last, before)


class PerStepNeurons(neuron_layer):
    """The neurons as a loop over time with autograd."""

    def forward(self, x, states=None):
        cell = self.neuron_cell
        reset, spikes = 0.0, []
        for psp in x.unbind(-1):
            potential = cell.weight(psp) - reset
            spike = threshold.apply(potential, 0.4)
            reset = cell.reset_decay * reset + cell.reset_v * spike
            spikes.append(spike)
        return torch.stack(spikes, -1), (potential, reset)


class TimeLast(nn.Module):
    """A network of the 2020 interface, fully connected."""

    def __init__(self, synapse, neurons, sizes, length, tau_m, tau_s, dropout):
        super().__init__()
        self.layers = nn.ModuleList()
        for inputs, outputs in pairwise(sizes):
            self.layers.append(synapse((inputs,), length, BATCH, tau_m, tau_s, True))
            self.layers.append(neurons(inputs, outputs, length, BATCH, tau_m, True, False))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        for index in range(0, len(self.layers), 2):
            x, _ = self.layers[index](self.dropout(x) if index else x)
            x, _ = self.layers[index + 1](x)
        return x


def native(sizes, tau_m, tau_s, dropout, own_dropout):
    modules = []
    for inputs, outputs in pairwise(sizes):
        modules += [
            DualExponentialSynapse(inputs, tau_m, tau_s),
            nn.Linear(inputs, outputs),
            SpikingNeuron(outputs, tau_m, dropout=dropout if own_dropout else 0.0),
            nn.Identity() if own_dropout else nn.Dropout(dropout),
        ]
    modules[-2:] = [SpikingNeuron(sizes[-1], tau_m)]  # no dropout after the last layer
    return Sequential(*modules)


def steps_to_time(sizes, length, tau_m, tau_s, dropout):
    """By name, a function that runs a training step."""
    options = (sizes, length, tau_m, tau_s, dropout)
    x = (torch.rand(length, BATCH, sizes[0]) < 0.05).float()
    target = torch.randint(sizes[-1], (BATCH,))

    def step(network, x, time_dimension):
        optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=True)

        def run():
            output = network(x)
            spikes = output[0] if isinstance(output, tuple) else output
            optimizer.zero_grad()
            F.cross_entropy(spikes.sum(time_dimension), target).backward()
            optimizer.step()

        return run

    steps = {
        "native": step(native(sizes, tau_m, tau_s, dropout, False), x, 0),
        "2020 interface": step(
            TimeLast(dual_exp_iir_layer, neuron_layer, *options), x.movedim(0, -1), -1
        ),
        "per-step layers": step(
            TimeLast(PerStepSynapse, PerStepNeurons, *options), x.movedim(0, -1).contiguous(), -1
        ),
    }
    if dropout:
        name = "native, dropout in its neurons"
        steps[name] = step(native(sizes, tau_m, tau_s, dropout, True), x, 0)
    return steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for network, settings in NETWORKS.items():
        steps = steps_to_time(*settings)
        times = {name: [] for name in steps}
        for _ in range(options.rounds + 1):  # the first warms up
            for name, run in steps.items():
                begin = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begin)
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        print(f"{network}: training step, median of {options.rounds}")
        for name, median in medians.items():
            print(f"  {name:32} {1e3 * median:8.1f} ms  {median / medians['native']:6.2f}")


if __name__ == "__main__":
    main()

"""How long a neuron of one's own takes, beside SpikingNeuron.

    python benchmarks/own_neuron.py mine.SoftResetNeuron decay=0.9

The class is in mine.py of the current folder, and decay is a coefficient. The neuron stands in the
place of SpikingNeuron in a network 784-500-500-10 of 25 steps. Both networks take turns.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles

import torch
from measuring import KINDS, Trial
from networks import DIGITS, SNN, Network, Variant
from torch import nn

from snn_lib import SpikingNeuron

ROUNDS = 20  # visits to each network


def build_with(neuron: Callable[..., nn.Module], network: Network) -> SNN:
    """The network of the experiments with other neurons."""
    model = SNN(network)
    for name, layer in model.layers.named_children():
        if isinstance(layer, SpikingNeuron):
            setattr(model.layers, name, neuron(layer.shape, dropout=layer.dropout))
    return model


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("neuron", metavar="module.Class")
    parser.add_argument("values", nargs="*", metavar="name=value")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="a tiny network, to see that it runs")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    sys.path.insert(0, "")  # the current folder
    module, _, name = chosen.neuron.rpartition(".")
    own = getattr(importlib.import_module(module), name)
    values = {key: float(value) for key, value in (one.split("=") for one in chosen.values)}
    network = DIGITS.small() if chosen.smoke else DIGITS
    builds = SNN, partial(build_with, partial(own, **values))
    seconds = 0.0 if chosen.smoke else 0.3  # that a visit lasts at least
    trials = [Trial(Variant("", build), network, "cpu") for build in builds]
    for kind in KINDS:
        times = [[median(one.visit(kind, seconds)) for one in trials] for _ in range(ROUNDS)]
        first, middle, third = quantiles((mine / ours for ours, mine in times), n=4)
        milliseconds = 1e3 * median(mine for _, mine in times)
        print(
            f"{kind}: {milliseconds:.1f} ms, {middle:.2f} ({first:.2f} to {third:.2f}) of the time "
            "with SpikingNeuron"
        )


if __name__ == "__main__":
    main()

"""Where the time of a training step goes: products, filters, neurons, and the memory they move.

    python benchmarks/step_profile.py

Prints a row for each network and precision, in shares of the time of the dense network's step: how
long the step takes in all, its filters and its neurons. Beside them stands how long a plain copy
takes that moves as many bytes as filters and neurons read and write. They can hardly be faster. The
last column is the same if each layer of neurons and the filter behind it were a single kernel: then
nothing would write the spikes between them, nor their gradient.
"""

import argparse
import time
from dataclasses import replace
from itertools import pairwise
from statistics import median

import torch
from measuring import Trial, machine, options
from networks import DIGITS, FLOOR, MEMORY, PIXELS, SNN, Network, Variant
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from snn_lib import SpikingNeuron
from snn_lib.files import write_csv
from snn_lib.cells import IIRSynapse

ROUNDS, SECONDS = 5, 0.3  # visits to each network, and how long one lasts at least
PROFILED = 5  # steps of a profile
KINDS = {"filters": "iir_filter", "neurons": "spiking_neuron"}
PRECISIONS = ("float32", "bfloat16")


class Traffic(TorchDispatchMode):
    """Adds up the bytes of all tensors that filters and neurons are given or return."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "snn":
            tensors = (one for one in (*args, *result) if isinstance(one, Tensor))
            self.bytes += sum(min(one.nbytes, one.untyped_storage().nbytes()) for one in tensors)
        return result


def between(model: SNN, network: Network) -> int:
    """The bytes that a single kernel for neurons and the filter behind them would not move.

    It is the spikes, written, read forward and read backward, and their gradient, written and read.
    """
    layers = [layer for layer in model.layers if isinstance(layer, (IIRSynapse, SpikingNeuron))]
    neurons = sum(
        first.shape[0]
        for first, second in pairwise(layers)
        if isinstance(first, SpikingNeuron) and isinstance(second, IIRSynapse)
    )
    return 5 * 4 * network.steps * network.batch * neurons


def copy_speed() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)

    def seconds() -> float:
        begin = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - begin

    return 2 * source.nbytes / median(seconds() for _ in range(10))


def seconds_by_kind(trial: Trial) -> dict[str, float]:
    """The seconds of filters and of neurons in a step, as PyTorch's profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(PROFILED):
            trial.training()
    events = profile.key_averages()
    return {
        kind: sum(e.self_cpu_time_total for e in events if name in e.key) / 1e6 / PROFILED
        for kind, name in KINDS.items()
    }


def row_of(network: Network, precision: str, chosen: argparse.Namespace) -> dict:
    """The row of a network in one precision."""
    ours = Trial(Variant("", SNN, precision=precision), network, "cpu")
    floor = Trial(replace(FLOOR, precision=precision), network, "cpu")
    with Traffic() as traffic:
        ours.training()
    moved = traffic.bytes
    joined = moved - between(ours.model, network)
    durations: dict[str, list[float]] = {"step": [], "dense": [], "filters": [], "neurons": []}
    speed = copy_speed()
    rounds, seconds = (1, 0.0) if chosen.smoke else (ROUNDS, SECONDS)
    for _ in range(rounds):
        for name, trial in (("step", ours), ("dense", floor)):
            durations[name] += trial.visit("training", seconds)
        for kind, duration in seconds_by_kind(ours).items():
            durations[kind].append(duration)
    found = {name: median(values) for name, values in durations.items()}
    return {
        "network": str(network),
        "precision": precision,
        "dense_ms": 1e3 * found["dense"],
        **{name: found[name] / found["dense"] for name in ("step", "filters", "neurons")},
        "copy": moved / speed / found["dense"],
        "copy_if_joined": joined / speed / found["dense"],
        "machine": machine(chosen),
    }


def main() -> None:
    chosen = options(__doc__, "step_profile")
    rows = []
    for network in (DIGITS, MEMORY, PIXELS):
        network = network.small() if chosen.smoke else network
        for precision in PRECISIONS:
            rows.append(row_of(network, precision, chosen))
            values = (f"{k} {v:.2f}" for k, v in rows[-1].items() if isinstance(v, float))
            print(network, precision, *values, sep=", ", flush=True)
    write_csv(chosen.output.with_suffix(".csv"), rows)


if __name__ == "__main__":
    main()

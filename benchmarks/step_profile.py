"""Where the time of a training step goes: products, filters, neurons, and the memory they move.

    python benchmarks/step_profile.py

Prints a row for each network and precision, in shares of the time of the dense network's step: how
long the step takes in all, and its filters and neurons. Beside them stands how long a plain copy
takes that moves as many bytes as filters and neurons read and write. They can hardly be faster.
"""

import argparse
import time
from dataclasses import replace
from statistics import median

import torch
from measuring import Trial, machine, options
from networks import DIGITS, FLOOR, MEMORY, PIXELS, SNN, Network, Variant
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from snn_lib.files import write_csv

ROUNDS, SECONDS = 5, 0.3  # visits to each network, and how long one lasts at least
PROFILED = 5  # steps of a profile
CELLS = "snn::run"  # filters and neurons, forward and backward
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


def copy_speed() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)

    def seconds() -> float:
        begin = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - begin

    return 2 * source.nbytes / median(seconds() for _ in range(10))


def seconds_of_cells(trial: Trial) -> float:
    """The seconds of filters and neurons in a step, as PyTorch's profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(PROFILED):
            trial.training()
    events = (event for event in profile.key_averages() if CELLS in event.key)
    return sum(event.self_cpu_time_total for event in events) / 1e6 / PROFILED


def row_of(network: Network, precision: str, chosen: argparse.Namespace) -> dict:
    """The row of a network in one precision."""
    ours = Trial(Variant("", SNN, precision=precision), network, "cpu")
    floor = Trial(replace(FLOOR, precision=precision), network, "cpu")
    with Traffic() as traffic:
        ours.training()
    durations: dict[str, list[float]] = {"step": [], "dense": [], "cells": []}
    speed = copy_speed()
    rounds, seconds = (1, 0.0) if chosen.smoke else (ROUNDS, SECONDS)
    for _ in range(rounds):
        for name, trial in (("step", ours), ("dense", floor)):
            durations[name] += trial.visit("training", seconds)
        durations["cells"].append(seconds_of_cells(ours))
    found = {name: median(values) for name, values in durations.items()}
    return {
        "network": str(network),
        "precision": precision,
        "dense_ms": 1e3 * found["dense"],
        **{name: found[name] / found["dense"] for name in ("step", "cells")},
        "copy": traffic.bytes / speed / found["dense"],
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

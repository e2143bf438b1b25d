"""Measures time and memory of a training step and of inference, fairly.

Every subject has a process of its own: its memory is its own, and no allocator or thread pool is
shared. The processes take turns: in each round, each is visited once while the others wait, so that
a drift of the machine hits all alike.
"""

import argparse
import contextlib
import csv
import importlib
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # an optimiser imports it: once here instead of in every process
from networks import Network, Variant

import snn_lib

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("training", "inference")


class Trial:
    """A network with its data and optimiser."""

    def __init__(self, variant: Variant, network: Network, device: str) -> None:
        torch.manual_seed(0)
        self.device, self.precision = device, getattr(torch, variant.precision)
        self.model = variant.build(network).to(device)
        # So small a step that the network, and with it the work, stays as it was drawn.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.x, self.loss = variant.data(network, device)
        if variant.rows:
            self.x = self.x.contiguous()
        self.leaf = self.x.requires_grad_() if variant.input_gradient else None

    def autocast(self) -> torch.autocast:
        enabled = self.precision != torch.float32
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled)

    def training(self) -> None:
        self.model.train()
        if self.leaf is not None:
            self.leaf.grad = None
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.loss(self.model(self.x))
        loss.backward()
        self.optimizer.step()

    def inference(self) -> None:
        self.model.eval()
        with torch.no_grad(), self.autocast():
            self.model(self.x)

    def visit(self, kind: str, seconds: float) -> list[float]:
        """Seconds of each run, repeated until ``seconds`` are over.

        A run before them does not count: it finds the caches cold after the others' turns.
        """
        step = getattr(self, kind)

        def duration() -> float:
            start = time.perf_counter()
            step()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        duration()
        durations = [duration()]
        while sum(durations) < seconds:
            durations.append(duration())
        return durations


def memory(device: str, peak: bool) -> int:
    """Bytes in use now, or the most that were since the last call for now."""
    if device == "cuda":
        if peak:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not peak:  # Linux: makes the high-water mark start from here
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    field = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def serve(connection, variant: Variant, network: Network, device: str, threads: int) -> None:
    """What a process does: build and warm up, answer visits, report the memory at the end."""
    torch.set_num_threads(threads)
    if variant.keeps_memory:
        importlib.import_module("snn_lib.kernels.cpu")
    backend = snn_lib.use_backend(variant.backend) if variant.backend else contextlib.nullcontext()
    with backend:
        small = Trial(variant, network.small(), device)  # loads and compiles what is needed once
        for kind in KINDS:
            small.visit(kind, 0.0)
        start_up = memory(device, peak=False)
        trial = Trial(variant, network, device)
        trial.visit("training", 0.0)
        used = memory(device, peak=True) - start_up
        trial.visit("inference", 0.0)
        connection.send(used)
        for kind, seconds in iter(connection.recv, None):
            connection.send(trial.visit(kind, seconds))


def interleave(
    subjects: Sequence[tuple[Variant, Network]],
    options: argparse.Namespace,
    rounds: int,
    seconds: float,
    kinds: Sequence[str] = KINDS,
) -> list[dict]:
    """For every subject, the seconds of all runs of each kind, and ``memory`` in bytes."""
    # Forked from a server that has only imported PyTorch: a fresh process without the wait.
    # The server finds this file through the environment, not through sys.path.
    here, *others = str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, others)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["measuring"])
    connections, results = [], []
    for variant, network in subjects:
        connection, other = context.Pipe()
        arguments = (other, variant, network, options.device, options.threads)
        context.Process(target=serve, args=arguments, daemon=True).start()
        other.close()  # if the process dies, recv says so instead of waiting
        results.append({kind: [] for kind in kinds} | {"memory": connection.recv()})
        connections.append(connection)
        print(".", end="", flush=True)
    order = list(range(len(subjects)))
    for round_number in range(rounds):
        random.Random(round_number).shuffle(order)  # no one always follows the same one
        for kind in kinds:
            for index in order:
                connections[index].send((kind, seconds))
                results[index][kind] += connections[index].recv()
        print(".", end="", flush=True)
    for connection in connections:
        connection.send(None)
    print()
    return results


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, in milliseconds."""
    return tuple(1e3 * np.quantile(seconds, (0.25, 0.5, 0.75)))


def options(description: str, name: str, **flags: str) -> argparse.Namespace:
    """The command line that the benchmarks share, with flags of one's own and what they do.

    PyTorch then has as many threads as it says.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    default = ROOT / "benchmarks" / "results" / name
    parser.add_argument("--output", type=Path, help="path without .csv and .png")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--smoke", action="store_true", help="tiny networks, to see that it runs")
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    chosen = parser.parse_args()
    if chosen.output is None:  # what is published must not be that of tiny networks
        chosen.output = Path(tempfile.mkdtemp()) / name if chosen.smoke else default
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(chosen.threads)
    return chosen


def earlier_rows(path: Path) -> list[dict[str, str]]:
    """The rows that an earlier call wrote, if there was one."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def machine(options: argparse.Namespace) -> str:
    """What the numbers were measured on."""
    if options.device == "cuda":
        return f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    cpu = torch.backends.cpu.get_cpu_capability()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
        cpu = f"{name} ({cpu})"
    return f"{cpu}, {options.threads} threads, PyTorch {torch.__version__}"

"""What a step of a live stream costs: one sample, one time step at a time, the state carried on.

    python benchmarks/streaming.py

The networks of sequential_mnist.py and snn_mlp_1.py with their first weights, beside the same
equations written out in plain PyTorch, and gated cells of the same widths; under
``torch.inference_mode``, in turns. ``whole`` is a step's share of a run over a whole sequence.
"""

import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from measuring import ROOT, machine, options, quartiles
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))
import sequential_mnist
import snn_mlp_1
from snn_lib import SpikingNeuron, use_backend
from snn_lib.files import write_csv
from snn_lib.synapses import IIRSynapse
from snn_lib.tasks.digits import DigitConfig
from snn_lib.tasks.sequential_digits import SequentialConfig

ROUNDS, STEPS = 10, 200  # visits to each subject, and steps of one

NETWORKS = {
    "sequential_mnist": (sequential_mnist.SNN, SequentialConfig, (1, 64, 256, 256, 10)),
    "snn_mlp_1": (snn_mlp_1.SNN, DigitConfig, (784, 500, 500, 10)),
}


class Written(nn.Module):
    """The network's equations for a step, as one would write them; no membrane that filters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = model.layers
        self.alphas = {
            layer: layer.effective_alpha().detach()
            for layer in self.layers
            if isinstance(layer, IIRSynapse)
        }

    def forward(self, x: Tensor, state: dict | None = None) -> tuple[Tensor, dict]:
        state, old = {}, state or {}
        for layer in self.layers:
            if isinstance(layer, IIRSynapse):
                f_1, f_2 = old.get(layer, (0.0, 0.0))
                alpha_1, alpha_2 = self.alphas[layer]
                x = layer.beta[0] * x + alpha_1 * f_1 + alpha_2 * f_2
                state[layer] = x, f_1
            elif isinstance(layer, SpikingNeuron):
                reset = old.get(layer, 0.0)
                x = (x - reset > 1.0).to(x.dtype)
                state[layer] = layer.reset_decay * reset + layer.reset_strength * x
            else:
                x = layer(x)
        return x, state


class Cells(nn.Module):
    """Gated cells of the same widths, one a layer, and a linear output."""

    def __init__(self, cell: type[nn.Module], sizes: tuple[int, ...]) -> None:
        super().__init__()
        *hidden, outputs = sizes
        self.cells = nn.ModuleList(cell(*widths) for widths in pairwise(hidden))
        self.output = nn.Linear(hidden[-1], outputs)

    def forward(self, x: Tensor, state: list | None = None) -> tuple[Tensor, list]:
        state = list(state or [None] * len(self.cells))
        x = x[0]  # (1, B, N): a cell sees one step
        for index, cell in enumerate(self.cells):
            state[index] = cell(x, state[index])
            x = state[index][0] if isinstance(state[index], tuple) else state[index]
        return self.output(x)[None], state


def each_step(model: nn.Module, x: Tensor) -> Callable[[], float]:
    """A visit: seconds a step, after a first one that finds the caches cold."""

    def visit() -> float:
        _, state = model(x[:1])
        start = time.perf_counter()
        for step in x.split(1):
            _, state = model(step, state)
        return (time.perf_counter() - start) / len(x)

    return visit


def whole_run(model: nn.Module, x: Tensor) -> Callable[[], float]:
    def visit() -> float:
        start = time.perf_counter()
        model(x)
        return (time.perf_counter() - start) / len(x)

    return visit


def on_eager(visit: Callable[[], float]) -> Callable[[], float]:
    def eager() -> float:
        with use_backend("eager"):
            return visit()

    return eager


def subjects(name: str, steps: int, device: str) -> dict[str, Callable[[], float]]:
    """What takes turns, by name."""
    build, config, sizes = NETWORKS[name]
    torch.manual_seed(0)
    model = build(config(name=name)).eval().to(device)
    x = torch.rand(steps, 1, sizes[0], device=device)
    cells = [Cells(cell, sizes).to(device) for cell in (nn.GRUCell, nn.LSTMCell)]
    return {
        "SNN-IIR": each_step(model, x),
        "SNN-IIR, a step of a whole run": whole_run(model, x),
        "SNN-IIR eager": on_eager(each_step(model, x)),
        "its equations in plain PyTorch": each_step(Written(model), x),
        "nn.GRUCell": each_step(cells[0], x),
        "nn.LSTMCell": each_step(cells[1], x),
    }


def measure(name: str, rounds: int, steps: int, device: str) -> dict[str, list[float]]:
    """Seconds a step of each visit."""
    visits = subjects(name, steps, device)
    seconds: dict[str, list[float]] = {subject: [] for subject in visits}
    with torch.inference_mode():
        for visit in visits.values():  # compiles what is needed
            visit()
        for _ in range(rounds):
            for subject, visit in visits.items():
                seconds[subject].append(visit())
    return seconds


def chart(path: Path, rows: list[dict]) -> None:
    """Draws a step's microseconds, axes for each network."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, len(NETWORKS), figsize=(13, 3.5), squeeze=False)
    for axes, name in zip(grid[0], NETWORKS, strict=True):
        line = [row for row in rows if row["network"] == name]
        axes.barh([row["variant"] for row in line], [row["step_us"] for row in line])
        axes.set(title=name, xlabel="a step, us (median)")
        axes.invert_yaxis()
    figure.suptitle(rows[0]["machine"], fontsize=9)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> None:
    chosen = options(__doc__, "streaming")
    torch.set_num_threads(chosen.threads)
    rounds, steps = (1, 3) if chosen.smoke else (ROUNDS, STEPS)
    rows = []
    for name in NETWORKS:
        measured = measure(name, rounds, steps, chosen.device)
        floor = quartiles(measured["its equations in plain PyTorch"])[1]
        print(f"\n{name}   ({machine(chosen)})")
        for subject, seconds in measured.items():
            first, median, third = (1e3 * value for value in quartiles(seconds))
            rows.append(
                {
                    "network": name,
                    "variant": subject,
                    "step_us": round(median, 1),
                    "step_q25": round(first, 1),
                    "step_q75": round(third, 1),
                    "step/plain": round(median / 1e3 / floor, 3),
                    "machine": machine(chosen),
                }
            )
            spread = f"({first:.0f} to {third:.0f})"
            print(f"{subject:33}{median:8.0f} us{spread:>18}{rows[-1]['step/plain']:8.2f}")
    write_csv(chosen.output.with_suffix(".csv"), rows)
    chart(chosen.output, rows)
    print(f"\nsaved {chosen.output}.csv and .png")


if __name__ == "__main__":
    main()

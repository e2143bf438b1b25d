"""What a step of a live stream costs: one sample, one time step at a time, the state carried on.

    python benchmarks/streaming.py --threads 1

Pretrained networks run a test sample in PyTorch, compiled, and as an ONNX graph. Beside them stand
the same equations written out in plain PyTorch, and two gated cells of the widths of the hidden
layers. All take turns; PyTorch runs under ``torch.inference_mode``. ``whole run`` is a step's share
of a run over the sequence.
"""

import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from measuring import machine, options, quartiles
from pretrained import OnnxStream, load
from torch import Tensor, nn

from snn_lib import SpikingNeuron, use_backend
from snn_lib.cells import IIRSynapse
from snn_lib.files import write_csv
from snn_lib.inference import compiled
from snn_lib.readout import Snapshots

ROUNDS, STEPS = 30, 200  # visits to each subject, and the most steps of one

# Each with the widths of input and hidden layers, if its equations are written out and cells stand
# beside it.
NETWORKS: dict[str, tuple[int, ...]] = {
    "sequential_mnist": (1, 240, 240),
    "snn_mlp_1": (784, 500, 500),
    "event_vision": (),
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
            elif isinstance(layer, Snapshots):
                parts = x.unflatten(2, (len(layer.steps), -1))
                step, x = old.get(layer, (0, torch.zeros_like(parts[:, :, 0])))
                step += 1
                if step in layer.steps:
                    x = x + parts[:, :, layer.steps.index(step)]
                state[layer] = step, x
            else:
                x = layer(x)
        return x, state


class Cells(nn.Module):
    """Gated cells one after the other."""

    def __init__(self, cell: type[nn.Module], sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cell(*widths) for widths in pairwise(sizes))

    def forward(self, x: Tensor, state: list | None = None) -> tuple[Tensor, list]:
        state = list(state or [None] * len(self.cells))
        x = x[0]  # (1, B, N): a cell sees one step
        for index, cell in enumerate(self.cells):
            state[index] = cell(x, state[index])
            x = state[index][0] if isinstance(state[index], tuple) else state[index]
        return x[None], state


def each_step(model: nn.Module, x: Tensor) -> Callable[[], float]:
    """A visit: seconds a step, after a first one that finds the caches cold."""

    def visit() -> float:
        _, state = model(x[:1])
        start = time.perf_counter()
        for step in x.split(1):
            _, state = model(step, state)
        return (time.perf_counter() - start) / len(x)

    return visit


def each_step_of(step: Callable[[Any], Any], x: Any) -> Callable[[], float]:
    """The same of what keeps its state itself."""
    steps = list(x)

    def visit() -> float:
        step(steps[0])
        start = time.perf_counter()
        for one in steps:
            step(one)
        return (time.perf_counter() - start) / len(steps)

    return visit


def whole_run(run: Callable[[Any], Any], x: Any) -> Callable[[], float]:
    def visit() -> float:
        start = time.perf_counter()
        run(x)
        return (time.perf_counter() - start) / len(x)

    return visit


def on_eager(visit: Callable[[], float]) -> Callable[[], float]:
    def eager() -> float:
        with use_backend("eager"):
            return visit()

    return eager


def subjects(name: str, chosen: Any, folder: str) -> dict[str, Callable[[], float]]:
    """What takes turns, by name."""
    sizes = NETWORKS[name]
    experiment = load(name, chosen, samples=1)
    model = experiment.model.eval()
    x = next(iter(experiment.task.batches("test"))).x[: 3 if chosen.smoke else STEPS, :1]
    x = x.float().contiguous()  # (T, 1, *features)
    sample, stream = x[:, 0].cpu().numpy(), compiled(model, x.shape[2:])
    found = {
        "SNN-IIR": each_step(model, x),
        "SNN-IIR, whole run": whole_run(model, x),
        "SNN-IIR eager": on_eager(each_step(model, x)),
        "ONNX Runtime": each_step_of(OnnxStream(model, x.shape[2:], folder).step, x.cpu().numpy()),
        "compiled": each_step_of(stream.step, sample),
        "compiled, whole run": whole_run(stream.run, sample),
    }
    if sizes:
        found["its equations in plain PyTorch"] = each_step(Written(model), x)
        for cell in (nn.GRUCell, nn.LSTMCell):
            cells = Cells(cell, sizes).to(chosen.device)
            found[f"two nn.{cell.__name__}s"] = each_step(cells, x)
    return found


def measure(name: str, chosen: Any) -> dict[str, list[float]]:
    """Seconds a step of each visit."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        visits = subjects(name, chosen, folder)
        seconds: dict[str, list[float]] = {subject: [] for subject in visits}
        for visit in visits.values():  # compiles what is needed
            visit()
        for _ in range(1 if chosen.smoke else ROUNDS):
            for subject, visit in visits.items():
                seconds[subject].append(visit())
    return seconds


def chart(path: Path, rows: list[dict]) -> None:
    """Draws a step's microseconds, axes for each network."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, len(NETWORKS), figsize=(19, 3.5), squeeze=False)
    for axes, name in zip(grid[0], NETWORKS, strict=True):
        line = [row for row in rows if row["network"] == name]
        bars = axes.barh([row["variant"] for row in line], [row["step_us"] for row in line])
        axes.bar_label(bars, fmt="{:,.1f}", padding=2)
        axes.set(title=name, xlabel="a step, us (median)", xscale="log", xlim=(1, 10_000))
        axes.invert_yaxis()
    figure.suptitle(rows[0]["machine"], fontsize=9)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> None:
    chosen = options(__doc__, "streaming")
    rows = []
    for name in NETWORKS:
        measured = measure(name, chosen)
        medians = {subject: quartiles(seconds)[1] for subject, seconds in measured.items()}
        floors = {"step/SNN-IIR": "SNN-IIR", "step/two GRU cells": "two nn.GRUCells"}
        print(f"\n{name}   ({machine(chosen)})")
        print(f"{'':33}{'a step':>11}{'quartiles':>18}   " + "   ".join(floors))
        for subject, seconds in measured.items():
            first, median, third = (1e3 * value for value in quartiles(seconds))
            ratios = {
                ratio: round(medians[subject] / medians[floor], 3) if floor in medians else ""
                for ratio, floor in floors.items()
            }
            rows.append(
                {
                    "network": name,
                    "variant": subject,
                    "step_us": round(median, 1),
                    "step_q25": round(first, 1),
                    "step_q75": round(third, 1),
                    **ratios,
                    "machine": machine(chosen),
                }
            )
            spread = f"({first:.1f} to {third:.1f})"
            line = "".join(f"{value:>{len(ratio) + 3}}" for ratio, value in ratios.items())
            print(f"{subject:33}{median:8.1f} us{spread:>18}{line}")
    write_csv(chosen.output.with_suffix(".csv"), rows)
    chart(chosen.output, rows)
    print(f"\nsaved {chosen.output}.csv and .png")


if __name__ == "__main__":
    main()

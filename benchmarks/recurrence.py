"""How long recurrent neurons take, beside nn.GRU and the recurrent cells of other libraries.

    python benchmarks/recurrence.py --threads 1

Each subject has as many units as inputs and is trained and run on the same sequences, in turns. The
other libraries' cells are run step by step, as they are meant to; those that are not installed are
left out. The times are those of the CPU in all threads, so that other programs do not count, and on
a GPU those of the clock.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of snn_lib
from snn_lib import Recurrent, Sequential, SpikingNeuron, fire_from_the_start

SIZES = [(300, 64, 128), (784, 64, 128), (300, 64, 512)]  # steps, sequences, units
ROUNDS, RATE = 3, 0.05


class RLeaky(nn.Module):
    """snnTorch's recurrent neurons, with weights before them."""

    def __init__(self, units: int) -> None:
        super().__init__()
        import snntorch

        self.weights = nn.Linear(units, units)
        self.neuron = snntorch.RLeaky(0.9, all_to_all=True, linear_features=units)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        spikes, membrane = self.neuron.init_rleaky()
        outputs = []
        for current in self.weights(x).unbind():
            spikes, membrane = self.neuron(current, spikes, membrane)
            outputs.append(spikes)
        return torch.stack(outputs), None


class NorseCell(nn.Module):
    """Norse's recurrent neurons, which have weights of their own for the input."""

    def __init__(self, units: int) -> None:
        super().__init__()
        from norse.torch import LIFRecurrentCell

        self.cell = LIFRecurrentCell(units, units)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        state, outputs = None, []
        for now in x.unbind():
            spikes, state = self.cell(now, state)
            outputs.append(spikes)
        return torch.stack(outputs), None


def recurrent(units: int) -> nn.Module:
    """Neurons of this library."""
    neurons = Recurrent(nn.Linear(units, units), SpikingNeuron(units, tau_m=10.0))
    return Sequential(nn.Linear(units, units), neurons)


def feed_forward(units: int) -> nn.Module:
    """The same without what comes back."""
    return Sequential(nn.Linear(units, units), SpikingNeuron(units, tau_m=10.0))


def train(model: nn.Module, x: Tensor) -> None:
    model(x)[0].square().mean().backward()


@torch.no_grad()
def infer(model: nn.Module, x: Tensor) -> None:
    model(x)


def seconds(run: Callable, model: nn.Module, x: Tensor) -> float:
    clock = time.process_time if x.device.type == "cpu" else time.perf_counter
    start = clock()
    run(model, x)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    subjects: dict[str, Callable[[int], nn.Module]] = {"Recurrent": recurrent}
    subjects |= {"feed-forward": feed_forward, "nn.GRU": lambda units: nn.GRU(units, units)}
    others = {"snntorch": ("snnTorch RLeaky", RLeaky), "norse": ("Norse", NorseCell)}
    for package, (name, build) in others.items():
        if importlib.util.find_spec(package):
            subjects[name] = build
    for steps, batch, units in [(5, 2, 16)] if chosen.smoke else SIZES:
        torch.manual_seed(0)
        x = torch.randn(steps, batch, units, device=chosen.device)
        models = {name: build(units).to(chosen.device) for name, build in subjects.items()}
        for name in ("Recurrent", "feed-forward"):
            fire_from_the_start(models[name], x, RATE)
        print(f"{steps} steps, {batch} sequences, {units} units")
        for run in (train, infer):
            times: dict[str, list[float]] = {name: [] for name in models}
            for round_number in range(1 + ROUNDS):  # the first does not count
                for name, model in models.items():
                    times[name] += [seconds(run, model, x)] if round_number else []
                    if not round_number:
                        run(model, x)
            for name, own in times.items():
                ratio = median(a / b for a, b in zip(own, times["Recurrent"], strict=True))
                print(f"  {run.__name__:6}{name:16}{1e3 * median(own):9.1f} ms {ratio:8.2f}")


if __name__ == "__main__":
    main()

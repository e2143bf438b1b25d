"""What the filters of sequential_mnist.py learned, and how it decides while the pixels arrive.

    python benchmarks/long_memory.py

Saves the accuracy on the test images after every pixel (CSV), and a picture: that accuracy, and of
each layer the memory and the frequency of its filters before and after training, and the kernels
that changed most.
"""

import matplotlib.pyplot as plt
import torch
from measuring import options
from pretrained import load
from torch import Tensor

from sequential_mnist import SNN
from snn_lib import ResonantSynapse
from snn_lib.files import write_csv
from snn_lib.inspection.plotting import BLUE, GREEN, GREY, VERMILION, impulse_response
from snn_lib.tasks.base import output_of
from snn_lib.tasks.sequential_digits import SequentialDigits
from snn_lib.training.experiment import Experiment

MODELS = {"sequential_mnist": "permuted", "sequential_mnist_in_order": "in order"}
KERNELS, STEPS = 3, 200


@torch.inference_mode()
def accuracy_over_time(experiment: Experiment) -> Tensor:
    """Share of the test images that the network tells right after each step, ``(T,)``."""
    model, right, images = experiment.model.eval(), 0, 0
    for batch in experiment.task.batches("test"):
        with experiment.autocast():
            answers = output_of(model, batch.x).argmax(2)
        right = right + (answers == batch.y).sum(1)
        images += len(batch.y)
    return right.cpu() / images


def memory_and_frequency(synapse: ResonantSynapse) -> Tensor:
    """Decay, in steps, and frequency, in cycles per step, of every slower pole, ``(2, N)``."""
    poles = synapse.poles()
    slower = poles.gather(-1, poles.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return torch.stack([-1 / slower.abs().log(), slower.angle().abs() / (2 * torch.pi)])


def draw_accuracy(axes: plt.Axes, curves: dict[str, Tensor]) -> None:
    """Accuracy as the pixels arrive, a line for each order."""
    for (label, accuracy), color in zip(curves.items(), (BLUE, GREEN), strict=True):
        last = f"{label}: {100 * accuracy[-1]:.2f} % after all pixels"
        axes.plot(range(1, len(accuracy) + 1), 100 * accuracy, color=color, label=last)
    axes.set(xlabel="pixels seen", ylabel="test images recognised, %", ylim=(0, 100))
    axes.legend(frameon=False)


def draw_filters(axes: plt.Axes, learned: ResonantSynapse, initial: ResonantSynapse) -> None:
    """Memory and frequency of every filter, and its way there from where it began."""
    before, after = memory_and_frequency(initial), memory_and_frequency(learned)
    axes.plot(*torch.stack([before, after], 1), color=GREY, lw=0.5)
    axes.scatter(*before, s=8, color=VERMILION, lw=0, label="before training")
    axes.scatter(*after, s=8, color=BLUE, lw=0, label="after training")
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="clip")  # a real pole does not ring
    axes.set(xlabel="decay, steps", ylabel="cycles per step", ylim=(2e-4, 0.5))


def draw_kernels(axes: plt.Axes, learned: ResonantSynapse, initial: ResonantSynapse) -> None:
    """The kernels that changed most, one above the other."""
    old, new = (torch.from_numpy(impulse_response(s, STEPS)) for s in (initial, learned))
    change = (new - old).norm(dim=0) / old.norm(dim=0)
    height = 0.0
    for channel in change.topk(KERNELS).indices:
        pair = torch.stack([old[:, channel], new[:, channel]])
        height -= pair.max()
        for kernel, color in zip(pair, (VERMILION, BLUE), strict=True):
            axes.plot(kernel + height, color=color, lw=1)
        height += pair.min()
    axes.set(xlabel="steps after a spike", yticks=[])


def main() -> None:
    chosen = options(__doc__, "long_memory")
    curves, rows = {}, []
    for name, order in MODELS.items():
        experiment = load(name, chosen)
        curves[order] = accuracy_over_time(experiment)
        print(f"{name}: {100 * curves[order][-1]:.2f} % after all pixels")
        steps = enumerate(curves[order].tolist(), 1)
        rows += [{"order": order, "pixels": step, "accuracy": round(a, 4)} for step, a in steps]
    write_csv(chosen.output.with_suffix(".csv"), rows)

    experiment = load("sequential_mnist", chosen)
    initial = Experiment(SNN, SequentialDigits(), experiment.config).model  # as training began
    pairs = zip(experiment.model.layers, initial.layers, strict=True)
    pairs = [(new, old) for new, old in pairs if isinstance(new, ResonantSynapse)]
    figure = plt.figure(figsize=(11, 9), layout="constrained")
    grid = figure.add_gridspec(3, len(pairs))
    draw_accuracy(figure.add_subplot(grid[0, :]), curves)
    for column, pair in enumerate(pairs):
        filters, shapes = (figure.add_subplot(grid[row, column]) for row in (1, 2))
        draw_filters(filters, *pair)
        draw_kernels(shapes, *pair)
        filters.set_title(f"filters {'of the pixels' if column == 0 else f'of layer {column}'}")
    figure.axes[1].legend(frameon=False, fontsize="small")
    figure.savefig(chosen.output.with_suffix(".png"), dpi=110)
    print(f"\nsaved {chosen.output}.csv and .png")


if __name__ == "__main__":
    main()

"""Does computing less take less time? Inference of snn_mlp_1_latency on a CPU.

    python benchmarks/early_inference.py --threads 1

Takes turns between the whole run, one that stops as soon as every image of the batch is clear, a
first layer that leaves out the pixels without a spike, both together, and the dense ReLU network of
the same size. Saves the processor's time an image (CSV), for single images and for batches.
"""

import time
from collections.abc import Callable

import torch
from measuring import machine, options, quartiles
from pretrained import load
from torch import Tensor, nn

from snn_lib.files import write_csv
from snn_lib.functional import iir_filter
from snn_lib.readout import until_clear
from snn_lib.tasks.digits import DigitClassification
from snn_mlp_1 import SNN

LEAD, ROUNDS = 2, 30
BATCHES = (1, 250)


class SkipsDarkPixels(nn.Module):
    """The network, whose first layer computes with the pixels alone that spike in the batch."""

    def __init__(self, model: SNN, active: Tensor) -> None:
        super().__init__()
        synapse, weights = model.layers[0], model.layers[1]
        self.alpha = synapse.effective_alpha()[:, active].contiguous()
        self.beta = synapse.beta[:, active].contiguous()
        self.active, self.others = active, model.layers[2:]
        self.weight, self.bias = weights.weight[:, active].contiguous(), weights.bias

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """Runs all time steps; state as the network's, its first filter's among it."""
        first, others = (None, None) if state is None else state
        psp, first = iir_filter(x[..., self.active], self.alpha, self.beta, first)
        output, others = self.others(nn.functional.linear(psp, self.weight, self.bias), others)
        return output, (first, others)


def subjects(model: SNN, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What takes turns, on input spikes ``(T, B, 784)``."""
    dense = nn.Sequential(
        nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 10)
    )
    image = x.sum(0)

    def skipping(run: Callable[[nn.Module], Tensor]) -> Tensor:
        return run(SkipsDarkPixels(model, x.flatten(0, 1).any(0).nonzero()[:, 0]))

    def whole(network: nn.Module) -> Tensor:
        return network(x)[0].sum(0).argmax(1)

    def early(network: nn.Module) -> Tensor:
        return until_clear(network, x, LEAD)[0]

    return {
        "whole run": lambda: whole(model),
        f"until {LEAD} spikes ahead": lambda: early(model),
        "pixels that spike": lambda: skipping(whole),
        "both": lambda: skipping(early),
        "dense network": lambda: dense(image).argmax(1),
    }


@torch.inference_mode()
def main() -> None:
    chosen = options(__doc__, "early_inference")
    torch.set_num_threads(chosen.threads)
    experiment = load("snn_mlp_1_latency", SNN, DigitClassification(), chosen)
    model = experiment.model.eval()
    images = next(iter(experiment.task.evaluation_batches("test"))).x
    rows = []
    for batch in BATCHES:
        visits = subjects(model, images[:, :batch].contiguous())
        for visit in visits.values():  # compiles what is needed
            visit()
        seconds: dict[str, list[float]] = {name: [] for name in visits}
        for _ in range(2 if chosen.smoke else ROUNDS):
            for name, visit in visits.items():
                begin = time.process_time()
                visit()
                seconds[name].append((time.process_time() - begin) / images[:, :batch].shape[1])
        whole = quartiles(seconds["whole run"])[1]
        print(f"\nbatches of {batch}   ({machine(chosen)})")
        for name, found in seconds.items():
            median = quartiles(found)[1]
            rows.append(
                {
                    "batch": batch,
                    "variant": name,
                    "image_ms": round(median, 4),
                    "image/whole run": round(median / whole, 3),
                    "machine": machine(chosen),
                }
            )
            print(f"{name:24}{median:10.3f} ms an image{median / whole:8.2f}")
    write_csv(chosen.output.with_suffix(".csv"), rows)
    print(f"\nsaved {chosen.output}.csv")


if __name__ == "__main__":
    main()

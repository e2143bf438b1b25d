"""Do the compiled network and the ONNX graph say what PyTorch says? Of every pretrained model.

    python benchmarks/inference_agreement.py

Runs the first 1,000 test samples of each. Sums of weights are added in another order than
PyTorch's, so a potential that lies within rounding of the threshold may be decided otherwise, and
from there on a sequence may go its own way. The table (CSV) tells how often that happens, how far
from the threshold such a potential was, and how far outputs differ where it does not happen.
"""

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from measuring import options
from pretrained import NAMES, OnnxStream, load
from torch import Tensor, nn

from snn_lib import Sequential, SpikingNeuron
from snn_lib.files import write_csv
from snn_lib.inference import compiled
from snn_lib.tasks.association import Association

SAMPLES, BATCH = 1000, 50


class Prefixes:
    """A network and its layers up to each layer of neurons, compiled: all spikes can be seen."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.network = model, compiled(model, x.shape[2:])
        self.layers = model if isinstance(model, Sequential) else model.layers
        self.neurons = [
            number for number, layer in enumerate(self.layers) if isinstance(layer, SpikingNeuron)
        ]
        inputs = self.outputs(x)[0].shape[2:]
        self.prefixes = [
            compiled(Sequential(*self.layers[: number + 1]), inputs) for number in self.neurons
        ]

    def outputs(self, x: Tensor) -> list[Tensor]:
        """The input of the model's layers, and the output of each."""
        seen: list[Tensor] = []
        handle = self.layers.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        self.model(x)
        handle.remove()
        return [seen[0], *self.layers.layerwise(seen[0])[0]]

    def first_differences(self, x: Tensor) -> list[float | None]:
        """For each sample, how far from the threshold was what differs first; ``None``: nothing."""
        values = self.outputs(x)
        first: list[tuple[int, float] | None] = [None] * x.shape[1]
        for number, prefix in zip(self.neurons, self.prefixes, strict=True):
            potentials = None
            for sample in range(x.shape[1]):
                spikes = runs(prefix, values[0][:, sample])
                different = spikes != values[number + 1][:, sample].numpy()
                if not different.any():
                    continue
                step = int(different.reshape(len(x), -1).any(1).argmax())
                if first[sample] is None or step < first[sample][0]:
                    if potentials is None:
                        potentials = self.layers[number].traces(values[number])[1]
                    away = potentials[step, sample].numpy()[different[step]] - 1.0
                    first[sample] = step, float(np.abs(away).max())
        return [None if found is None else found[1] for found in first]


def runs(stream: Any, x: Tensor) -> np.ndarray:
    """The compiled network's output for one sample from rest on."""
    stream.reset()
    return stream.run(x.numpy())


def runs_onnx(stream: OnnxStream, x: Tensor) -> Tensor:
    """The ONNX graph's output for a batch from rest on."""
    stream.reset(x.shape[1])
    return torch.stack([torch.from_numpy(stream.step(step)) for step in x.numpy()])


def batches(experiment: Any, count: int) -> Iterator[tuple[Any, Tensor]]:
    """Small batches of the first test samples, and their input ``(T, B, *features)``."""
    done = 0
    for batch in experiment.task.batches("test"):
        for start in range(0, min(batch.x.shape[1], count - done), BATCH):
            own = slice(start, min(start + BATCH, count - done))
            lengths = None if batch.lengths is None else batch.lengths[own]
            part = batch._replace(x=batch.x[:, own], y=batch.y[own], lengths=lengths)
            yield part, part.x.float()
        done += batch.x.shape[1]
        if done >= count:
            return


def answers_of(task: Any, batch: Any, output: Tensor) -> Tensor:
    """The class of each sample, or of a pattern the numbers of its spikes."""
    if isinstance(task, Association):
        weights = torch.arange(1, 1 + output[:, 0].numel(), dtype=torch.float64)
        return output.transpose(0, 1).flatten(1).double() @ weights
    if task.counts_spikes:
        return output.sum(0).argmax(1)
    return task.logits(output, batch).argmax(1)


@torch.inference_mode()
def measure(name: str, chosen: Any, samples: int) -> dict[str, Any]:
    """The row of one model."""
    experiment = load(name, chosen, samples)
    model = experiment.model.eval()
    count, own_way, same, same_onnx = 0, [], 0, 0
    output_error = 0.0
    streams = graph = None
    with tempfile.TemporaryDirectory() as folder:
        for batch, x in batches(experiment, samples):
            if streams is None:
                streams, graph = Prefixes(model, x), OnnxStream(model, x.shape[2:], folder)
            expected, first = model(x)[0], streams.first_differences(x)
            stack = [torch.from_numpy(runs(streams.network, one)) for one in x.unbind(1)]
            output = torch.stack(stack, 1)
            alike = torch.tensor([found is None for found in first])
            own_way += [found for found in first if found is not None]
            error = (output - expected).abs()[:, alike]
            output_error = max(output_error, error.max().item() if error.numel() else 0.0)
            count += len(first)
            series = expected, output, runs_onnx(graph, x)
            answers = [answers_of(experiment.task, batch, y) for y in series]
            same += int((answers[0] == answers[1]).sum())
            same_onnx += int((answers[0] == answers[2]).sum())
    return {
        "model": name,
        "samples": count,
        "same_answer": same,
        "same_answer_onnx": same_onnx,
        "with_a_differing_spike": len(own_way),
        "farthest_from_threshold": f"{max(own_way, default=0.0):.1e}",
        "output_error": f"{output_error:.1e}",
    }


def main() -> None:
    chosen = options(__doc__, "inference_agreement")
    rows = []
    for name in NAMES:
        rows.append(measure(name, chosen, 10 if chosen.smoke else SAMPLES))
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        write_csv(chosen.output.with_suffix(".csv"), rows)
    print(f"\nsaved {chosen.output}.csv")


if __name__ == "__main__":
    main()

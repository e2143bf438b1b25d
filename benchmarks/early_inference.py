"""Does computing less take less time? One image at a time through snn_mlp_1_latency, on a CPU.

    python benchmarks/early_inference.py --threads 1

The network runs all 12 steps, or stops as soon as one class is two spikes ahead, in PyTorch and
compiled. Beside it: the dense ReLU network of the same size in PyTorch, in ONNX Runtime, and in a
loop that skips zeros; and a network whose filters stand behind the weights, so that only spikes
reach weights, with random weights that fire as rarely. All take turns. Saves the processor's time
an image (CSV); of the networks in PyTorch also in batches.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from measuring import machine, options
from numba import njit
from onnx import TensorProto, helper, numpy_helper
from pretrained import load, onnx_session
from torch import Tensor, nn

from snn_lib import (
    DualExponentialSynapse,
    Sequential,
    SpikingNeuron,
    fire_from_the_start,
)
from snn_lib.files import write_csv
from snn_lib.inference import CompiledNetwork, compile_network
from snn_lib.readout import until_clear
from snn_lib.tasks.digits import DigitClassification
from snn_mlp_1 import SNN

LEAD, ROUNDS, IMAGES = 2, 30, 50
RATE = 0.04  # spikes per hidden neuron and step, at which the pretrained network was held
FLOOR = "dense network, ONNX Runtime"


def dense_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 10)
    )


def behind_the_weights(x: Tensor) -> CompiledNetwork:
    """A network of the same size that weighs spikes and filters behind the weights."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((784, 500), (500, 500), (500, 10)):
        layers += [
            nn.Linear(inputs, outputs),
            DualExponentialSynapse(outputs, 8.0, 2.0),
            SpikingNeuron(outputs, 8.0),
        ]
    network = Sequential(*layers)
    fire_from_the_start(network, x, RATE)
    return compile_network(network)


def in_onnx_runtime(dense: nn.Sequential, folder: str) -> Callable[[np.ndarray], np.ndarray]:
    """What runs the dense network on an image, ``(1, 784)``."""
    nodes, constants, value = [], [], "x"
    for number, layer in enumerate(dense):
        if isinstance(layer, nn.Linear):
            weights = [f"{name}_{number}" for name in ("weight", "bias")]
            tensors = layer.weight.numpy(), layer.bias.numpy()
            constants += map(numpy_helper.from_array, tensors, weights)
            nodes.append(helper.make_node("Gemm", [value, *weights], [f"y_{number}"], transB=1))
        else:
            nodes.append(helper.make_node("Relu", [value], [f"y_{number}"]))
        value = f"y_{number}"
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])]
        for name, size in (("x", 784), (value, 10))
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "dense", *ends, constants),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    path = Path(folder) / "dense.onnx"
    onnx.save(model, path)
    session = onnx_session(path)
    return lambda image: session.run(None, {"x": image})[0]


@njit(fastmath={"contract"})
def _skipping_zeros(x, weight, bias, out):
    """weight.T @ x + bias of the inputs that are not zero; the weight is ``(inputs, outputs)``."""
    out[:] = bias
    for i in range(len(x)):
        if x[i] > 0:
            for j in range(len(out)):
                out[j] += x[i] * weight[i, j]


def skipping_zeros(dense: nn.Sequential) -> Callable[[np.ndarray], np.ndarray]:
    """What runs the dense network on an image, ``(784,)``."""
    weights = [
        (np.ascontiguousarray(layer.weight.numpy().T), layer.bias.numpy())
        for layer in dense
        if isinstance(layer, nn.Linear)
    ]
    values = [np.zeros(len(bias), np.float32) for _, bias in weights]

    def run(x: np.ndarray) -> np.ndarray:
        for (weight, bias), out in zip(weights, values, strict=True):
            _skipping_zeros(x, weight, bias, out)  # takes what is below zero for zero
            x = out
        return x

    return run


def from_rest(stream: CompiledNetwork, run: Callable[[np.ndarray], Any]) -> Callable:
    def of_image(x: np.ndarray) -> Any:
        stream.reset()
        return run(x)

    return of_image


def single(model: SNN, x: Tensor, folder: str) -> dict[str, Callable[[], None]]:
    """What takes turns on images one at a time, from input spikes ``(T, B, 784)``."""
    steps = [x[:, n : n + 1].contiguous() for n in range(x.shape[1])]
    samples = [one[:, 0].numpy() for one in steps]
    images = [one.sum(0) for one in steps]  # (1, 784)
    arrays = [one.numpy() for one in images]
    dense, network, other = dense_network(), compile_network(model), behind_the_weights(x)

    def each(run: Callable[[Any], Any], inputs: list[Any]) -> Callable[[], None]:
        def visit() -> None:
            for one in inputs:
                run(one)

        return visit

    def early(stream: CompiledNetwork) -> Callable:
        return from_rest(stream, lambda sample: stream.until_clear(sample, LEAD))

    return {
        "PyTorch": each(model, steps),
        f"PyTorch, until {LEAD} ahead": each(lambda one: until_clear(model, one, LEAD), steps),
        "compiled": each(from_rest(network, network.run), samples),
        f"compiled, until {LEAD} ahead": each(early(network), samples),
        "filters behind weights, compiled": each(from_rest(other, other.run), samples),
        "filters behind weights, 3 steps": each(
            from_rest(other, other.run), [sample[:3] for sample in samples]
        ),
        "dense network, PyTorch": each(dense, images),
        FLOOR: each(in_onnx_runtime(dense, folder), arrays),
        "dense network that skips zeros": each(skipping_zeros(dense), [one[0] for one in arrays]),
    }


def in_a_batch(model: SNN, x: Tensor) -> dict[str, Callable[[], Any]]:
    """What takes turns on a batch."""
    dense, images = dense_network(), x.sum(0)
    return {
        "PyTorch": lambda: model(x),
        f"PyTorch, until {LEAD} ahead": lambda: until_clear(model, x, LEAD),
        "dense network, PyTorch": lambda: dense(images),
    }


def measure(visits: dict[str, Callable[[], Any]], images: int, rounds: int) -> dict[str, float]:
    """The median of the processor's time an image, in microseconds."""
    for visit in visits.values():  # compiles what is needed
        visit()
    seconds: dict[str, list[float]] = {name: [] for name in visits}
    for _ in range(rounds):
        for name, visit in visits.items():
            begin = time.process_time()
            visit()
            seconds[name].append((time.process_time() - begin) / images)
    return {name: 1e6 * float(np.median(found)) for name, found in seconds.items()}


@torch.no_grad()
def main() -> None:
    chosen = options(__doc__, "early_inference")
    torch.set_num_threads(chosen.threads)
    experiment = load("snn_mlp_1_latency", SNN, DigitClassification(), chosen)
    model = experiment.model.eval()
    x = next(iter(experiment.task.evaluation_batches("test"))).x
    rounds, rows = 2 if chosen.smoke else ROUNDS, []
    with tempfile.TemporaryDirectory() as folder:
        few = x[:, :IMAGES]
        measured = {
            1: measure(single(model, few, folder), few.shape[1], rounds),
            x.shape[1]: measure(in_a_batch(model, x), x.shape[1], rounds),
        }
    for batch, found in measured.items():
        floor = found.get(FLOOR, found["dense network, PyTorch"])
        print(f"\nbatches of {batch}   ({machine(chosen)})")
        for name, microseconds in found.items():
            rows.append(
                {
                    "batch": batch,
                    "variant": name,
                    "image_us": round(microseconds, 1),
                    "image/dense": round(microseconds / floor, 3),
                    "machine": machine(chosen),
                }
            )
            print(f"{name:34}{microseconds:10.1f} us an image{microseconds / floor:8.2f}")
    write_csv(chosen.output.with_suffix(".csv"), rows)
    print(f"\nsaved {chosen.output}.csv")


if __name__ == "__main__":
    main()

"""Does computing less take less time? One image at a time through the networks of snn_mlp_1.py.

    python benchmarks/early_inference.py --threads 1

Each pretrained network, with its filters before or behind the weights, runs compiled: all its
steps, or until one class is two spikes ahead. The latency network also runs in PyTorch. Beside
them: the dense ReLU network of the same size, in PyTorch, in ONNX Runtime, and in a loop that skips
zeros. Its weights are random, but as many units are active as in the trained one. All take turns.
Saves the processor's time an image (CSV); of the networks in PyTorch also in batches.
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
from operations import PRETRAINED
from pretrained import load, onnx_session
from torch import Tensor, nn

from snn_lib.files import write_csv
from snn_lib.inference import CompiledNetwork, compiled
from snn_lib.readout import until_clear
from snn_mlp_1 import SNN

LEAD, ROUNDS, IMAGES = 2, 30, 50
ACTIVE = 0.126  # of the hidden units of operations.py's trained dense network: 107,726 operations
IN_PYTORCH, WITH_PIXELS = "snn_mlp_1_latency", "snn_mlp_1"
FLOOR = "dense network, ONNX Runtime"


def dense_network(images: Tensor) -> nn.Sequential:
    """Random weights, and biases with which as many units are active as in the trained network."""
    first, second = nn.Linear(784, 500), nn.Linear(500, 500)
    first.bias -= first(images).quantile(1 - ACTIVE)
    second.bias -= second(first(images).relu()).quantile(1 - ACTIVE)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(500, 10))


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


def each(run: Callable[[Any], Any], inputs: list[Any]) -> Callable[[], None]:
    def visit() -> None:
        for one in inputs:
            run(one)

    return visit


def from_rest(stream: CompiledNetwork, run: Callable[[np.ndarray], Any]) -> Callable:
    def of_image(x: np.ndarray) -> Any:
        stream.reset()
        return run(x)

    return of_image


def compiled_visits(name: str, model: SNN, x: Tensor) -> dict[str, Callable[[], None]]:
    """What runs a network compiled on each image of ``(T, B, 784)``: all steps, or until clear."""
    network, samples = compiled(model), [x[:, n].numpy() for n in range(x.shape[1])]

    def early(sample: np.ndarray) -> tuple[int, int]:
        return network.until_clear(sample, LEAD)

    return {
        f"{name}, compiled": each(from_rest(network, network.run), samples),
        f"{name}, compiled, until {LEAD} ahead": each(from_rest(network, early), samples),
    }


def single(models: dict[str, tuple[SNN, Tensor]], folder: str) -> dict[str, Callable[[], None]]:
    """What takes turns on images one at a time, from each network and its input ``(T, B, 784)``."""
    model, x = models[IN_PYTORCH]
    steps = [x[:, n : n + 1].contiguous() for n in range(x.shape[1])]
    images = models[WITH_PIXELS][1][0]
    dense, images = dense_network(images), images.split(1)  # (1, 784) each
    arrays = [one.numpy() for one in images]
    visits = {
        f"{IN_PYTORCH}, PyTorch": each(model, steps),
        f"{IN_PYTORCH}, PyTorch, until {LEAD} ahead": each(
            lambda one: until_clear(model, one, LEAD), steps
        ),
    }
    for name, (network, of_network) in models.items():
        visits |= compiled_visits(name, network, of_network)
    return visits | {
        "dense network, PyTorch": each(dense, images),
        FLOOR: each(in_onnx_runtime(dense, folder), arrays),
        "dense network that skips zeros": each(skipping_zeros(dense), [one[0] for one in arrays]),
    }


def in_a_batch(model: SNN, x: Tensor) -> dict[str, Callable[[], Any]]:
    """What takes turns on a batch."""
    images = x.sum(0)  # any images: their values do not change the time
    dense = dense_network(images)
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
    models = {}
    for name in PRETRAINED:
        experiment = load(name, chosen)
        models[name] = (
            experiment.model.eval(),
            next(iter(experiment.task.batches("test"))).x,
        )
    rounds, rows = 2 if chosen.smoke else ROUNDS, []
    model, x = models[IN_PYTORCH]
    with tempfile.TemporaryDirectory() as folder:
        few = {name: (network, x[:, :IMAGES]) for name, (network, x) in models.items()}
        images = few[IN_PYTORCH][1].shape[1]
        measured = {
            1: measure(single(few, folder), images, rounds),
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
            print(f"{name:56}{microseconds:10.1f} us an image{microseconds / floor:8.2f}")
    write_csv(chosen.output.with_suffix(".csv"), rows)
    print(f"\nsaved {chosen.output}.csv")


if __name__ == "__main__":
    main()

"""What every pretrained network computes, so that it stays so: the spikes of all its neurons.

    python tests/golden_outputs.py    # writes tests/golden anew, after a change that is meant

Sums in another order round differently, and a neuron near its threshold then fires or does not. So
a network is run a layer at a time. Weights multiply in float64, and the product is rounded once to
the dtype under test. Everything between two layers of weights, the cells, runs in that dtype, in
plain PyTorch. The spikes are kept as a digest for each step and sample, and of filters and readouts
a few values. All other ways to run the cells are given the same inputs.
"""

import copy
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the command above
import snn_lib
from snn_lib.data.mnist import load_mnist
from snn_lib.data.preparation import RecordingPreparation, SequencePreparation, SeriesPreparation
from snn_lib.inference import compiled, to_onnx

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
NETWORKS = {path.name: path for path in ROOT.glob("*checkpoint/pretrained_*") if not path.suffix}
DTYPES = {dtype: getattr(torch, dtype) for dtype in ("float32", "float64", "bfloat16")}
SAMPLES, LONG_SAMPLES = 20, 5  # of a network, and of one that runs for hundreds of steps
VALUES = 16  # kept of a filter


@dataclass
class Part:
    """The cells between two layers of weights, what they are given, and what each returns.

    Under autocast, as in training with ``bfloat16``, cells get and give bfloat16, but keep their
    states and their coefficients in float32.
    """

    cells: dict[str, nn.Module]
    x: Tensor  # (T, B, *features)
    outputs: dict[str, Tensor]


def samples_for(network: nn.Module) -> Tensor:
    """A network's input: digits, what a camera sees of them, events, patterns, walks.

    What is random comes from NumPy, whose numbers are the same on every machine.
    """
    random, preparation = np.random.default_rng(0), network.preparation
    images = load_mnist(ROOT / "dataset", train=False)[0][:SAMPLES]
    if isinstance(preparation, RecordingPreparation):
        still = pad(images, (3, 3, 3, 3)).float()
        steps = range(preparation.length + 1)
        change = torch.stack([still.roll((t, t // 2), (1, 2)) for t in steps]).diff(dim=0)
        return torch.stack([change < -100, change > 100], -1).float()
    if preparation.features == [4]:  # of an electrocardiogram
        return torch.from_numpy(random.random((300, LONG_SAMPLES, 4)) < 0.08).float()
    if isinstance(preparation, SequencePreparation):
        patterns = np.load(ROOT / "dataset" / "associative_target.npy")[:LONG_SAMPLES]
        trains = torch.from_numpy(patterns).float()  # (B, 300, T)
        trains[1::2, ::2] = 0.0
        return trains.permute(2, 0, 1).contiguous()
    if isinstance(preparation, SeriesPreparation):
        deviation, mean = preparation.deviation.numpy(), preparation.mean.numpy()
        walks = random.random((SAMPLES, preparation.steps, len(mean))).cumsum(1)
        return network.prepare((walks - walks.mean(1, keepdims=True)) * deviation + mean).x
    if getattr(preparation, "encoding", "") == "poisson":
        probability = images.flatten(1).numpy() / 255
        spikes = random.random((preparation.length, *probability.shape)) < probability
        return torch.from_numpy(spikes).float()
    return network.prepare(images if preparation.length < 100 else images[:LONG_SAMPLES]).x


class Arrival(Exception):
    """Carries the input of a network's layers out of its forward."""


def layers_of(network: nn.Module) -> tuple[snn_lib.Sequential, Tensor]:
    """The layers of a network in evaluation mode, and the input that its forward gives them."""
    *_, layers = (part for part in network.modules() if isinstance(part, snn_lib.Sequential))

    def leave(_: nn.Module, arguments: tuple) -> None:
        raise Arrival(arguments[0])

    handle = layers.register_forward_pre_hook(leave)
    try:
        network(samples_for(network))
    except Arrival as arrival:
        (x,) = arrival.args
    handle.remove()
    return layers.requires_grad_(False), x


def parts_of(layers: snn_lib.Sequential, x: Tensor, dtype: str) -> Iterator[Part]:
    """Runs the layers in a dtype, as this file's head says, and yields the cells."""
    rounded, exact = DTYPES[dtype], copy.deepcopy(layers).double()
    layers = copy.deepcopy(layers).to(torch.promote_types(rounded, torch.float32))
    x, part = _step_by_step(lambda x: x.to(rounded), x), None
    for name, layer in layers.named_children():
        if isinstance(layer, snn_lib.StatefulModule):
            part = part or Part({}, x, {})
            part.cells[name], part.outputs[name] = layer, (x := run([layer], x, "eager", dtype))
            continue
        if part:
            yield part
        part, weights = None, exact.get_submodule(name)
        x = _step_by_step(lambda x, weights=weights: weights(x.double()).to(rounded), x)
    if part:
        yield part


def _step_by_step(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function that treats all steps alike; if they are the same, it runs once."""
    if x.stride(0):
        return function(x)
    step = function(x[:1])
    return step.expand(len(x), *step.shape[1:])


def run(cells: Iterable[nn.Module], x: Tensor, way: str, dtype: str) -> Tensor:
    """Runs cells one behind another, where nobody looks in between.

    The ``way`` is one of PyTorch's backends, ``"compiled"`` or ``"onnx"``.
    """
    network = snn_lib.Sequential(*cells)
    if way == "compiled":
        return _run_compiled(network, x.numpy())
    if way == "onnx":
        return _run_onnx(network, x.numpy())
    half = dtype == "bfloat16"
    with snn_lib.use_backend(way), torch.autocast("cpu", torch.bfloat16, enabled=half):
        return network(x)[0]


def _run_compiled(network: snn_lib.Sequential, x: np.ndarray) -> Tensor:
    stream, outputs = compiled(network, x.shape[2:]), []
    for sample in x.swapaxes(0, 1):
        stream.reset()
        outputs.append(stream.run(sample))
    return torch.from_numpy(np.stack(outputs, 1))


def _run_onnx(network: snn_lib.Sequential, x: np.ndarray) -> Tensor:
    import onnxruntime

    with TemporaryDirectory() as folder:
        to_onnx(network, f"{folder}/network.onnx", x.shape[2:])
        graph = onnxruntime.InferenceSession(f"{folder}/network.onnx")
    _, *states = graph.get_inputs()
    state = {one.name: np.zeros((x.shape[1], *one.shape[1:]), x.dtype) for one in states}
    outputs = []
    for step in x:
        output, *following = graph.run(None, {"x": step, **state})
        state = dict(zip(state, following, strict=True))
        outputs.append(output)
    return torch.from_numpy(np.stack(outputs))


def digests(spikes: Tensor) -> np.ndarray:
    """16 bits for each step and sample of spikes ``(T, B, *features)``, uint16 ``(T, B)``."""
    bits = np.packbits(spikes.flatten(2).bool().numpy(), axis=2)
    crcs = [[zlib.crc32(sample) & 0xFFFF for sample in step] for step in bits]
    return np.array(crcs, np.uint16)


def some_values(output: Tensor) -> np.ndarray:
    """A few values of a sequence, evenly spread, and the largest magnitude, float64."""
    flat = output.flatten().double()
    places = torch.linspace(0, len(flat) - 1, VALUES).long()
    return torch.cat([flat[places], flat.abs().amax()[None]]).numpy()


def kept(parts: Iterable[Part]) -> dict[str, np.ndarray]:
    """What is kept of the outputs, by the name of the layer: digests, or some values."""
    return {
        name: (digests if isinstance(part.cells[name], snn_lib.SpikingNeuron) else some_values)(
            output
        )
        for part in parts
        for name, output in part.outputs.items()
    }


def write(name: str) -> None:
    """Writes the file of a network."""
    layers, x = layers_of(snn_lib.load(NETWORKS[name]))
    found = {
        f"{dtype}/{layer}": values
        for dtype in DTYPES
        for layer, values in kept(parts_of(layers, x, dtype)).items()
    }
    np.savez_compressed(GOLDEN / f"{name}.npz", **found)


if __name__ == "__main__":
    for name in NETWORKS:
        write(name)
        print(f"{name}: {(GOLDEN / name).with_suffix('.npz').stat().st_size:,} bytes", flush=True)

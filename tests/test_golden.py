"""Every pretrained network spikes as it did when its golden outputs were written, however it runs.

What is kept in tests/golden, and how it is made, is said in golden_outputs.py.
"""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from golden_outputs import DTYPES, GOLDEN, NETWORKS, kept, layers_of, parts_of, run

import snn_lib
from snn_lib import SpikingNeuron

# The other ways to run cells: the package that each needs, its dtypes, and how many steps and
# samples it runs.
WAYS = {
    "cpu": ("numba", DTYPES, 784, 20),
    "compiled": ("numba", ("float32", "float64"), 784, 2),
    "onnx": ("onnxruntime", ("float32",), 25, 2),
}


@pytest.fixture(scope="module")
def network(request):
    """The name of a network, its layers and their input."""
    return request.param, *layers_of(snn_lib.load(NETWORKS[request.param]))


def of(*names):
    return pytest.mark.parametrize("network", names, indirect=True, scope="module")


def assert_same(found, expected, spiking, dtype, where):
    """Spikes or their digests are the same; the values of filters may round otherwise.

    Another CPU adds up products in another order, and filters sum the difference over time.
    """
    assert found.shape == expected.shape, where
    if np.array_equal(found, expected):
        return
    if spiking:
        step, sample = np.argwhere(found != expected)[0, :2]
        pytest.fail(f"{where}: other spikes, first in step {step}, sample {sample}")
    states = torch.promote_types(dtype, torch.float32)
    largest = 16 * torch.finfo(states).eps * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, torch.finfo(dtype).eps, largest, err_msg=where)


def assert_same_on(way, parts, steps, samples, dtype):
    """All cells between two layers of weights, run together, give what they gave one by one."""
    for part in parts:
        *_, (name, last) = part.cells.items()
        found = run(part.cells.values(), part.x[:steps, :samples], way, dtype)
        expected = part.outputs[name][:steps, :samples]
        both = (output.double().numpy() for output in (found, expected))
        where = f"layer {name} and the cells before it, run on {way}"
        assert_same(*both, isinstance(last, SpikingNeuron), found.dtype, where)


@pytest.mark.parametrize("dtype", DTYPES)
@of(*NETWORKS)
def test_pretrained_networks_spike_as_in_the_golden_outputs(network, dtype):
    name, layers, x = network
    parts = list(parts_of(layers, x, dtype))
    with np.load(GOLDEN / f"{name}.npz") as golden:
        expected = {key: golden[key] for key in golden if key.startswith(f"{dtype}/")}
    found = {f"{dtype}/{layer}": values for layer, values in kept(parts).items()}
    assert found.keys() == expected.keys()
    for key, values in found.items():
        assert_same(values, expected[key], values.dtype == np.uint16, DTYPES[dtype], key)
    for way, (package, dtypes, *share) in WAYS.items():
        if dtype in dtypes and find_spec(package):
            assert_same_on(way, parts, *share, dtype)


@of("pretrained_snn_mlp_2", "pretrained_snn_mlp_1_behind")
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in test_triton_s_interpreter_agrees"
)
def test_pretrained_networks_spike_as_in_the_golden_outputs_on_cuda(network):
    _, layers, x = network
    steps, samples = 3, 1  # the interpreter takes a second for each step
    parts = parts_of(layers, x[:steps, :samples], "float32")  # it rounds otherwise to bfloat16
    assert_same_on("cuda", parts, steps, samples, "float32")

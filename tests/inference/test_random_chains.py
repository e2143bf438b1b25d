"""Chains and cells drawn at random: C in floats against PyTorch, in integers against Python."""

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.host_c import CC, SANITIZED, Compiled
from snn_lib import (
    AdaptiveNeuron,
    Cell,
    Delay,
    IIRSynapse,
    LowPassSynapse,
    PerStep,
    Repeat,
    Sequential,
    SpikingNeuron,
)
from snn_lib.inference import quantise, to_c
from snn_lib.kernels import use_backend
from snn_lib.readout import Snapshots

STEPS, BATCH = 12, 4


def delay(draw, shape):
    """Whole steps or not, the same for all channels or not."""
    longest = int(draw.integers(1, 5))
    steps = torch.from_numpy(draw.uniform(0, longest, shape))
    steps = steps.round() if draw.integers(2) else steps
    return Delay(shape, steps.mean().round().item() if draw.integers(2) else steps, longest)


def iir_filter(draw, shape):
    """Past outputs in half of the cases, and up to three inputs, some of which do not count."""
    alpha = [[], [], [0.5], [0.6, -0.3]][draw.integers(4)]
    beta = draw.choice([0.0, 1.0, 0.25, draw.normal()], draw.integers(3))
    return IIRSynapse(shape, alpha, [*beta.tolist(), draw.choice([1.0, -0.7])])


def low_pass(draw, shape):
    return LowPassSynapse(shape, draw.uniform(1, 20))


def neuron(draw, shape):
    if draw.integers(3):
        return SpikingNeuron(shape, 4.0, membrane_filter=bool(draw.integers(2)))
    return AdaptiveNeuron(shape, 4.0, 30.0, 0.5)


def weights(draw, shape):
    """Often with one output, without a bias, or of numbers that are exact; windows of any size."""
    sizes = shape[0], int(draw.choice([1, 1, 3, 12]))
    bias = draw.integers(3) == 0
    flat = len(shape) == 1
    size, stride = (int(number) for number in draw.integers(1, (4, 3)))
    window = {"stride": stride, "padding": size // 2, "bias": bias}
    layer = nn.Linear(*sizes, bias) if flat else nn.Conv2d(*sizes, size, **window)
    for parameter in layer.parameters():
        values = draw.choice([0.0, 0.5, -0.5, 1.0], parameter.shape)
        if draw.integers(3):
            values = draw.normal(size=parameter.shape) * 2.0 ** draw.integers(-3, 3)
        parameter.data = torch.from_numpy(values)
    return layer if flat else PerStep(layer)


def several_or_pooled(draw, shape):
    if len(shape) == 3:
        return PerStep([nn.MaxPool2d, nn.AvgPool2d][draw.integers(2)](2, 1, 1))
    return Repeat(2 if shape[0] < 5 else 1)


def chain(draw, shape):
    kinds = [*2 * [delay, iir_filter, weights, weights], low_pass, neuron, several_or_pooled]
    layers = []
    for _ in range(draw.integers(2, 7)):
        kind = kinds[draw.integers(len(kinds) if layers else 8)]  # first a layer of float64
        layers.append(kind(draw, shape).double())
        shape = Sequential(layers[-1])(torch.zeros(1, 1, *shape).double())[0].shape[2:]
    if draw.integers(4) == 0:
        layers.append(Snapshots([1 + int(draw.integers(STEPS))]))
    return Sequential(*layers).eval()


def values(draw, shape):
    """Spikes, counts, pixels or other numbers."""
    counts = draw.integers(0, 256, shape)
    numbers = draw.normal(size=shape) * 10.0 ** draw.integers(-3, 3)
    kinds = [counts // 128, counts, counts / 255, numbers]
    return np.asarray(kinds[draw.integers(4)], float)


@pytest.mark.skipif(CC is None, reason="there is no C compiler")
@pytest.mark.parametrize("seed", range(12))
def test_c_agrees_with_python(seed, tmp_path):
    draw = np.random.default_rng(seed)
    features = [(3,), (3,), (2, 3, 4)][draw.integers(3)]
    model, x = chain(draw, features), values(draw, (STEPS, BATCH, *features))
    with torch.no_grad(), use_backend("eager"):
        target = model(torch.from_numpy(x))[0].flatten(2)
    to_c(model, tmp_path / "network.c", features)
    output = Compiled(tmp_path, options=SANITIZED).run(x)
    np.testing.assert_allclose(output, target, rtol=1e-9, atol=1e-9)

    made = quantise(model, x, int(draw.choice([8, 4, 2])), features)
    given, (low, high) = made.integers(x), made.staged.input_limits
    given[:, 1] = draw.integers(low, high + 1, given[:, 1].shape)
    given[:, 2:] = draw.choice([low, high], given[:, 2:].shape)
    expected = []
    for sample in np.split(given, BATCH, 1):  # one by one, as C counts what does not fit
        made.reset()
        expected.append(made.run(sample).reshape(STEPS, 1, -1))
    to_c(made, tmp_path / "network.c")
    kind = made.staged.input_kind.removesuffix("_t")
    program = Compiled(tmp_path, np.int32, kind, SANITIZED)
    np.testing.assert_array_equal(np.concatenate(expected, 1), program.run(given))
    assert made.saturated == program.saturated


FORMS = ["({} + {})", "({} - {})", "({} * {})", "torch.maximum({}, {})", "torch.minimum({}, {})",
         "torch.abs({})", "torch.where({} > 0.2, {}, {})"]  # fmt: skip
STEP = """
def step(x, state, coefficients, fire):
    v, w = state
    z = fire(v + 0.5 * x)
    two, third = torch.full_like(x, 2.0), torch.full_like(x, 0.3)
    second = {second}
    v = {decay} * v + torch.clamp({first}, -3.0, 3.0)
    return v + second, (v, second)
"""


def expression(draw, depth=3):
    """Python for what is computed of the input, the states, the spikes and numbers."""
    if depth == 0 or draw.integers(6) == 0:
        return str(draw.choice(["x", "v", "w", "z", "two", "third"]))
    form = FORMS[draw.integers(len(FORMS))]
    return form.format(*(expression(draw, depth - 1) for _ in range(form.count("{}"))))


def cell(draw):
    """A cell with two states, the second of which is bounded, counts or decays."""
    second = draw.choice(["torch.clamp({}, -20.0, 20.0)", "w + z + 0.0 * {}", "0.7 * w + z * {}"])
    parts = {"second": second.format(expression(draw)), "first": expression(draw)}
    made: dict = {"torch": torch}
    exec(STEP.format(decay=draw.choice([0.9, 0.5, 0.0]), **parts), made)
    return type("Drawn", (Cell,), {"states": ("v", "w"), "step": staticmethod(made["step"])})


@pytest.mark.skipif(CC is None, reason="there is no C compiler")
@pytest.mark.parametrize("seed", range(12))
def test_integers_of_random_cells_are_close_to_floats_and_the_bits_of_c(seed, tmp_path):
    draw = np.random.default_rng(seed)
    model, x = Sequential(cell(draw)(4)), draw.normal(size=(30, 10, 4)).round(seed % 3)
    x = torch.from_numpy(x).float()
    made = quantise(model, x)
    given = made.integers(x.numpy())
    with (
        torch.no_grad(),
        use_backend("eager"),
    ):  # on the integers' own input, as thresholds are near
        expected = model(made.input_scale * torch.from_numpy(given).float())[0].numpy()
    found = made.run(given)
    apart = abs(found * made.output_scale - expected).max(0)  # a spike more or less parts two runs
    assert (apart < 0.01 * expected.std() + 1e-6).mean() > 0.9
    made.reset()
    to_c(made, tmp_path / "network.c")
    kind = made.staged.input_kind.removesuffix("_t")
    program = Compiled(tmp_path, np.int32, kind, SANITIZED)
    np.testing.assert_array_equal(
        made.run(given[:, :1]).reshape(30, 1, -1), program.run(given[:, :1])
    )

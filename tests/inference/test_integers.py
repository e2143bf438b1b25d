"""The integer network: bit for bit its C source, close to the network in floats, and stable."""

import collections
import contextlib
import ctypes
import re
import subprocess
import warnings
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from leaving_pytorch import NETWORKS, network, spikes, with_readout
from prepared import PREPARED, SERIES, Prepared
from running import ROOT
from torch import nn

import snn_lib
from benchmarks.host_c import CC, SANITIZED, Compiled, Library
from snn_lib import (
    AdaptiveNeuron,
    Cell,
    Delay,
    DualExponentialSynapse,
    IIRSynapse,
    LowPassSynapse,
    PerStep,
    ResonantSynapse,
    ResonateAndFireNeuron,
    Sequential,
    SpikingNeuron,
    fire_from_the_start,
    log_spaced,
)
from snn_lib.data.preparation import SeriesPreparation
from snn_lib.inference import IntegerNetwork, compiled, lowering, quantise, to_c
from snn_lib.inference.stages import SATURATED, rounded
from snn_lib.readout import EVERY_STEP, Mean, SpikeCount
from snn_lib.rounding import rounded_weights

needs_compiler = pytest.mark.skipif(CC is None, reason="there is no C compiler")


def written(network_, folder, options=("-O2",)):
    """The C source of an integer network, as a program."""
    to_c(network_, folder / "network.c")
    kind = network_.staged.input_kind.removesuffix("_t")
    return Compiled(folder, np.int32, kind, options)


def share_lost(model, x):
    """The mean squared error of the integer network, of the variance of that in floats."""
    with torch.no_grad():
        expected = model(x)[0].numpy()
    made = quantise(model, x)
    found = made.run(made.integers(x.numpy())) * made.output_scale
    assert made.saturated == 0
    return np.square(found - expected).mean() / expected.var()


FEW_BITS = "linear", "neurons", "groups"


@needs_compiler
@pytest.mark.parametrize(
    ("name", "bits"),
    [*((name, 8) for name in NETWORKS), *((name, bits) for bits in (4, 2) for name in FEW_BITS)],
)
def test_c_computes_the_bits_of_the_integer_network(name, bits, tmp_path):
    model, features = network(name)
    x = torch.cat([spikes(30, *features) for _ in range(3)], 1)
    made = quantise(model, x[:, :1], bits, features)
    given, output = made.integers(x.numpy()), []
    for sample in range(3):  # one by one, as C counts what does not fit
        made.reset()
        output.append(made.run(given[:, sample : sample + 1]))
    program = written(made, tmp_path, SANITIZED)
    np.testing.assert_array_equal(np.concatenate(output, 1).reshape(30, 3, -1), program.run(given))
    assert made.saturated == program.saturated


SPIKING = {"neurons", "neurons with a membrane", "normalised", "rearranged and voting"}


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - SPIKING))
def test_the_integer_network_is_close_to_the_network_in_floats(name):
    model, features = network(name)
    x = spikes(30, *features)
    with torch.no_grad():
        target = model(x)[0].numpy()
    for bits, error in ((8, 0.01), (4, 0.25)):
        made = quantise(model, x, bits, features)
        output = made.run(made.integers(x.numpy())) * made.output_scale
        assert np.std(output - target) < error * np.std(target)
        assert made.saturated == 0


NEURONS = {
    "spiking": lambda n: SpikingNeuron(n, 4.0),
    "with a membrane": lambda n: SpikingNeuron(n, 4.0, membrane_filter=True, reset_strength=0.7),
    "adaptive": lambda n: AdaptiveNeuron(n, 4.0, 30.0, 0.5, membrane_filter=True),
    "resonate and fire": lambda n: ResonateAndFireNeuron(n, 20.0, 0.1, 5.0),
}


@needs_compiler
@pytest.mark.parametrize("name", NEURONS)
def test_integer_neurons_fire_when_those_in_floats_do(name, tmp_path):
    model = Sequential(LowPassSynapse(8, 3.0), NEURONS[name](8)).eval()
    x = torch.randn(200, 5, 8)
    made = quantise(model, x)
    given = made.integers(x.numpy())
    output = made.run(given)
    with torch.no_grad():
        target = model(torch.from_numpy(given * made.input_scale).float())[0].numpy()
    assert 0.01 < target.mean() < 0.5
    assert (output * made.output_scale != target).mean() < 0.002
    np.testing.assert_array_equal(output, written(made, tmp_path).run(given))


@pytest.mark.parametrize("size", [1e-6, 2e-4, 1e-3, 1.0, 1e4])
def test_an_input_of_any_size_keeps_its_digits(size):
    model = Sequential(nn.Linear(8, 40), SpikingNeuron(40, 5.0), nn.Linear(40, 3))
    x = size * torch.randn(60, 50, 8)
    fire_from_the_start(model, x, 0.1)
    made = quantise(model, x)
    values = made.integers(x.numpy())
    assert abs(values).max() > 500
    np.testing.assert_allclose(values * made.input_scale, x, atol=2e-3 * size)
    with torch.no_grad():
        target = model(x)[0].numpy()
    found = made.run(values) * made.output_scale
    assert np.corrcoef(found.ravel(), target.ravel())[0, 1] > 0.9


@needs_compiler
def test_the_lines_of_the_page_make_the_integers_that_python_makes(tmp_path):
    page = (ROOT / "docs" / "microcontroller.md").read_text()
    (lines,) = re.findall(r"```c\n(float v = .*?)```", page, re.DOTALL)
    made = quantise(Sequential(nn.Linear(1, 2)), torch.randint(-20000, 20001, (30, 9, 1)).float())
    to_c(made, tmp_path / "network.c")
    source = tmp_path / "lines.c"
    source.write_text(
        '#include "network.h"\n'
        "void convert(const float *values, network_input *x, int count)\n"
        "{ for (int n = 0; n < count; n++) { const float value = values[n];\n" + lines + "} }\n"
    )
    library = source.with_suffix(".so")
    subprocess.run([CC, "-std=c99", "-shared", "-fPIC", source, "-o", library], check=True)
    values = np.arange(-20000, 20001, dtype=np.float32) / 2
    found = np.zeros(len(values), np.int16)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (values, found))
    ctypes.CDLL(library).convert(*pointers, len(values))
    assert made.input_scale > 1
    np.testing.assert_array_equal(found, made.integers(values))


def test_pixels_are_bytes():
    made = quantise(LINEAR, torch.randint(0, 256, (5, 2, 4)) / 255)
    assert made.staged.input_kind == "uint8_t"
    assert made.input_scale == pytest.approx(1 / 255)


@pytest.mark.parametrize(("low", "high"), [(0, 3), (7, 255), (-13, 10), (0, 8000)])
def test_whole_numbers_have_the_unit_1_and_four_times_as_large_fit(low, high):
    x = torch.randint(low, high + 1, (50, 2, 4)).float()
    x[0] = high
    model = Sequential(nn.Linear(4, 2, bias=False))
    made = quantise(model, x)
    assert made.input_scale == 1.0
    with torch.no_grad():
        expected = model(4 * x)[0].numpy()
    found = made.run(made.integers(4 * x.numpy())) * made.output_scale
    assert made.saturated == 0
    np.testing.assert_allclose(found, expected, atol=0.02 * abs(expected).max())
    made.run(made.integers(-x.numpy()))


@pytest.mark.parametrize("sign", [1, -1])
def test_whole_numbers_of_which_four_times_as_large_need_more_bits_have_a_larger_unit(sign):
    x = sign * torch.arange(20001.0).view(1, -1, 1).expand(1, -1, 4)
    assert quantise(Sequential(nn.Linear(4, 2)), x).input_scale == 4.0


def test_halves_are_rounded_up_and_numbers_beyond_the_limit_are_clipped_and_counted():
    for shift in (0, 1, 4, 12):
        values = np.arange(-(2 << shift) - 40, (2 << shift) + 40) * 3
        exact = [floor(Fraction(int(v), 1 << shift) + Fraction(1, 2)) for v in values]
        states = {SATURATED: 0}
        found = rounded(values, shift, 4, states)
        np.testing.assert_array_equal(found, np.clip(exact, -8, 7))
        assert states[SATURATED] == sum(not -8 <= number < 8 for number in exact)


@needs_compiler
def test_c_rounds_clips_and_counts_in_the_same_way(tmp_path):
    made = quantise(Sequential(LowPassSynapse(1, 50.0)), torch.rand(5, 1, 1) * 0.01)
    x = np.random.default_rng(0).integers(-(2**15), 2**15, (400, 20, 1))
    x[:100, :10] = 2**15 - 1
    x[:100, 10:] = -(2**15)
    expected = np.concatenate([made.run(x[:, n : n + 1]) for n in range(20) if not made.reset()], 1)
    program = written(made, tmp_path, SANITIZED)
    np.testing.assert_array_equal(expected, program.run(x))
    assert {2**30 - 1, -(2**30)} <= set(expected.ravel())
    assert made.saturated == program.saturated > 0


@needs_compiler
def test_c_rounds_halves_as_python_does(tmp_path):
    """Halves of odd numbers, which a decay of 1/2 makes at every other step."""
    made = quantise(Sequential(IIRSynapse(1, (0.5,), (1.0,))), torch.rand(5, 1, 1))
    x = np.random.default_rng(0).integers(-500, 500, (400, 1, 1))
    np.testing.assert_array_equal(written(made, tmp_path, SANITIZED).run(x), made.run(x))


@needs_compiler
@pytest.mark.parametrize(("bits", "most", "held"), [(8, 127, 257), (4, 7, 4369), (2, 1, 21845)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("more", [0, 1])
def test_sums_of_weights_overflow_for_no_number_of_inputs(bits, most, sign, held, more, tmp_path):
    inputs = held + more  # so many may fill a half of a word
    model = Sequential(nn.Linear(inputs, 9, bias=False))
    nn.init.constant_(model[0].weight, sign * 0.5)
    model[0].weight.data[4:, 0] *= torch.tensor([0.1, 0.3, 0.7, -1.0, 0.5])  # none is exact
    x = np.ones((1, 2, inputs), int)
    made = quantise(model, torch.from_numpy(x).float(), bits)
    rows = made.staged.stages[0].weights
    assert abs(rows).max() <= most
    output = written(made, tmp_path, SANITIZED).run(x)
    np.testing.assert_array_equal(output, made.run(x))
    exact = model(torch.from_numpy(x).float())[0].detach().numpy()
    np.testing.assert_allclose(output * made.output_scale, exact, rtol=0.1)


@needs_compiler
@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize("gain", [1e-9, 1e-4, 1e4])
def test_inputs_and_coefficients_of_any_size_keep_their_precision(size, gain, tmp_path):
    model = Sequential(
        nn.Linear(4, 3).double(), IIRSynapse(3, (0.9, -0.5), (gain, 0.3 * gain)).double()
    )
    x = size * torch.randn(100, 2, 4).double()
    made = quantise(model, x)
    given = made.integers(x.numpy())
    output = made.run(given)
    np.testing.assert_array_equal(output, written(made, tmp_path, SANITIZED).run(given))
    with torch.no_grad():
        target = model(x)[0].numpy()
    if size * gain > 1e-7:  # else the units of 2^-30 are too large
        assert np.std(output * made.output_scale - target) < 0.02 * np.std(target)


@needs_compiler
def test_sums_of_products_of_potentials_overflow_for_no_number_of_inputs(tmp_path):
    model = Sequential(nn.Linear(5000, 6))
    nn.init.uniform_(model[0].weight, 0.05, 0.1)
    model[0].weight.data[3] *= -1
    made = quantise(model, torch.rand(1, 1, 5000) - 0.3)
    limit = made.staged.input_limits[0]
    x = np.full((2, 1, 5000), limit)
    x[1] = -limit - 1
    output = written(made, tmp_path, SANITIZED).run(x)
    np.testing.assert_array_equal(output, made.run(x))
    assert (output[0, 0, :3] < 0).all()
    assert (output[1, 0, :3] > 0).all()


def padded_ones():
    """Maps of ones with zeros around, under weights whose sum is zero."""
    ones, edges = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3, padding=1)
    nn.init.zeros_(ones.weight)
    nn.init.ones_(ones.bias)
    edges.weight.data = 0.7 * torch.arange(-4, 5).sign().float().view(1, 1, 3, 3)
    return Sequential(PerStep(ones), PerStep(edges), LowPassSynapse((1, 1, 1), 3.0))


class PastSum(Cell):
    """The sum of the three inputs before this one."""

    states = ("oldest", "older", "last")

    @staticmethod
    def step(x, state, coefficients, fire):
        oldest, older, last = state
        return oldest + older + last, (older, last, x)


@needs_compiler
@pytest.mark.parametrize(
    ("model", "features"),
    [
        (Sequential(PastSum(3)), (3,)),
        (Sequential(Delay(3, torch.tensor([0.5, 1.3, 2.0]), 3)), (3,)),
        (Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 12)), (3,)),
        (padded_ones(), (1, 4, 4)),
    ],
    ids=["sum of past inputs", "past inputs", "one unit", "padding"],
)
def test_no_input_overflows(model, features, tmp_path):
    made = quantise(model, 0.1 * torch.randn(20, 10, *features), shape=features)
    x = np.random.default_rng(0).choice(made.staged.input_limits, (20, 1, *features))
    output = written(made, tmp_path, SANITIZED).run(x)
    np.testing.assert_array_equal(output, made.run(x).reshape(output.shape))


def test_a_bias_behind_weights_costs_an_addition_alone():
    counts = []
    for bias in (False, True):
        model = Sequential(nn.Linear(4, 3, bias), LowPassSynapse(3, 5.0))
        _, step = quantise(model, torch.rand(50, 2, 4).round()).staged.stages
        counts.append(collections.Counter(line.operation for line in step.trace.lines))
    assert counts[1] - counts[0] == {"add": 1}
    assert not counts[0] - counts[1]


def test_a_large_bias_leaves_the_other_outputs_their_bits():
    """The weights receive potentials, and the filter behind them the bias."""
    model = Sequential(LowPassSynapse(8, 5.0), nn.Linear(8, 4), LowPassSynapse(4, 5.0)).double()
    model[1].bias.data[0] = -1e4
    x = (torch.rand(400, 4, 8) < 0.2).double()
    with torch.no_grad():
        expected = model(x)[0].numpy()
    made = quantise(model, x)
    error = np.square(made.run(made.integers(x.numpy())) * made.output_scale - expected)
    assert (error.mean((0, 1)) < 1e-3 * expected.var((0, 1)))[1:].all()


def test_weights_are_scaled_for_the_least_error_and_multiples_of_one_size_are_exact():
    model = Sequential(nn.Linear(400, 3, bias=False))
    weight = model[0].weight.data.normal_()
    multiples = torch.randint(-3, 4, (400,))
    weight[0], weight[1] = 0.7 * multiples, 0.0
    rows = quantise(model, torch.ones(1, 1, 400), 4).staged.stages[0]
    made, exact = rows.weights[0].T, weight.numpy()
    np.testing.assert_array_equal(made[0], multiples)
    np.testing.assert_array_equal(made[1], 0)
    scale = (exact[2] @ made[2]) / (made[2] @ made[2])
    largest = abs(exact[2]).max() / 7
    simple = np.rint(exact[2] / largest) * largest
    assert ((exact[2] - scale * made[2]) ** 2).sum() < 0.9 * ((exact[2] - simple) ** 2).sum()


def test_the_slowest_filters_stay_stable(monkeypatch):
    monkeypatch.setattr(lowering, "FACTOR_BITS", 16)
    monkeypatch.setattr(lowering, "LARGEST_SHIFT", 1e9)
    monkeypatch.setattr(lowering, "LARGEST_CHANGE", 1e9)
    taus = torch.tensor([10.0, 800.0, 2000.0, 30000.0])
    model = Sequential(ResonantSynapse(4, taus, torch.tensor([0.2, 1 / 800, 1 / 5000, 1 / 1e4])))
    (step,) = quantise(model, torch.randn(500, 1, 4)).staged.stages
    exact = model[0].alpha.detach().double().numpy()
    made = np.stack([step.coefficients[name][0] for name in ("alpha_0", "alpha_1")])
    assert abs(made).max() < 2**15
    unit = 2.0 ** np.rint(np.log2(abs(exact / made)).mean(1, keepdims=True))
    alpha_1, alpha_2 = made * unit
    assert (abs(alpha_2) < 1).all()
    assert (abs(alpha_1) < 1 - alpha_2).all()
    nearest = np.rint(exact / unit) * unit
    assert not (abs(nearest[0]) < 1 - nearest[1]).all()
    assert (abs(made - exact / unit) <= 2.5).all()


class Leaky(Cell):
    """A decay that is one of Python's numbers."""

    states = ("level",)

    @staticmethod
    def step(x, state, coefficients, fire):
        level = 0.99998 * state[0] + x
        return level, (level,)


class Averaging(Cell):
    """A decay that is computed from a coefficient."""

    states, coefficients = ("mean",), ("rate",)

    @staticmethod
    def step(x, state, coefficients, fire):
        mean = (1.0 - coefficients[0]) * state[0] + coefficients[0] * x
        return mean, (mean,)


class Draining(Cell):
    """A decay by a quotient."""

    states, coefficients = ("level",), ("tau",)

    @staticmethod
    def step(x, state, coefficients, fire):
        level = state[0] - state[0] / coefficients[0] + x
        return level, (level,)


class Choosing(Cell):
    """What is compared, chosen and divided is constant; a factor that is compared, too, is one."""

    states, coefficients = ("level",), ("high", "low", "decay", "tau")

    @staticmethod
    def step(x, state, coefficients, fire):
        high, low, decay, tau = coefficients
        factor = torch.where(high > low, torch.minimum(high, low), -high)
        given = torch.where(state[0] > decay, 0.5 * x, x * factor / tau)
        level = decay * state[0] + torch.where(high > 2.0, given, -given)
        return level, (level,)


@needs_compiler
@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_step_computes_of_coefficients_alone_is_right(channels, tmp_path):
    high, low = torch.tensor([9.0, 3.0, 0.4])[:channels], torch.tensor([1.0, 2.5, 0.5])[:channels]
    values = {"decay": 1 - torch.tensor([1.4e-4, 3e-5, 0.1])[:channels], "tau": 1 + low}
    model = Sequential(Choosing(channels, high=high, low=low, **values)).double()
    x = torch.randn(8000, 1, channels).double() + 0.1
    with torch.no_grad():
        expected = model(x)[0].numpy()
    made = quantise(model, x)
    given = made.integers(x.numpy())
    found = made.run(given)
    assert np.square(found * made.output_scale - expected).mean() < 1e-3 * expected.var()
    program = written(made, tmp_path, SANITIZED)
    np.testing.assert_array_equal(found.reshape(8000, 1, -1), program.run(given))


class Mirrored(Cell):
    """A current that is negated together with what is added to it."""

    states, coefficients = ("level",), ("bias",)

    @staticmethod
    def step(x, state, coefficients, fire):
        level = 0.9 * state[0] + -(x + coefficients[0])
        return level, (level,)


def test_the_negative_of_a_sum_is_that_of_both_of_its_parts():
    x, bias = torch.randn(80, 2, 3), torch.tensor([0.5, -1.0, 2.0])
    model = Sequential(nn.Linear(3, 3, bias=False), Mirrored(3, bias=bias))
    model[0].weight.data = torch.diag(torch.tensor([0.3, 0.7, -1.1]))  # no power of two
    made = quantise(model, x)
    found = made.run(made.integers(x.numpy())) * made.output_scale
    expected = model(x)[0].detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3 * abs(expected).max())


class Level(Cell):
    """A constant, whatever comes."""

    coefficients = ("level",)

    @staticmethod
    def step(x, state, coefficients, fire):
        return coefficients[0], ()


@pytest.mark.parametrize("level", [1.0, 0.9, -1.0])
def test_an_output_that_is_a_constant_is_right(level):
    x = torch.rand(5, 2, 3)
    made = quantise(Sequential(Level(3, level=level)), x)
    found = made.run(made.integers(x.numpy()))
    np.testing.assert_allclose(found * made.output_scale, np.full((5, 2, 3), level), rtol=1e-6)


def of_poles(channels, *poles):
    """A filter of an even order, with these poles and their conjugates."""
    alpha = -np.poly([*poles, *np.conj(poles)]).real[1:]
    synapse = IIRSynapse(channels, alpha.tolist(), [1e-3]).double()
    synapse.alpha.data = torch.from_numpy(alpha)[:, None].repeat(1, channels)
    return synapse


def test_slow_filters_of_many_coefficients_stay_stable(monkeypatch):
    """Of so many that not all changes of all of them can be tried."""
    monkeypatch.setattr(lowering, "FACTOR_BITS", 16)
    monkeypatch.setattr(lowering, "LARGEST_SHIFT", 1e9)
    monkeypatch.setattr(lowering, "LARGEST_CHANGE", 1e9)
    slow = (1 - 5e-6) * np.exp(1j * np.linspace(0.3, 2.8, 12))
    synapse = IIRSynapse(12, [0.1] * 6, [1e-3]).double()
    others = [of_poles(1, pole, 0.6 * np.exp(1j), 0.5 * np.exp(2j)).alpha.data for pole in slow]
    synapse.alpha.data = torch.cat(others, 1)
    (step,) = quantise(Sequential(synapse), torch.randn(300, 2, 12).double()).staged.stages
    exact = synapse.alpha.detach().numpy()
    made = np.stack([step.coefficients[f"alpha_{place}"][0] for place in range(6)])
    unit = 2.0 ** np.rint(np.log2(abs(exact / made)).mean(1, keepdims=True))
    kept, nearest = (
        np.array([abs(np.roots([1, *-alpha])).max() for alpha in (unit * integers).T])
        for integers in (made, np.rint(exact / unit))
    )
    assert (nearest >= 1).any()
    assert (kept < 1).all()


class Held(Cell):
    """A filter that moves only while input comes, and so not at all where there is none."""

    states, coefficients = ("level",), ("decay",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (level,), (decay,) = state, coefficients
        level = torch.where(x > 0, decay * level + (1 - decay) * x, level)
        return level, (level,)


class Following(Cell):
    """Rises slowly and falls fast; a small level without input only falls."""

    states, coefficients = ("level",), ("slow", "fast")

    @staticmethod
    def step(x, state, coefficients, fire):
        (level,), (slow, fast) = state, coefficients
        keeps = torch.where(x > level, slow, fast)
        level = keeps * level + (1 - keeps) * x
        return level, (level,)


class InMillivolts(Cell):
    """A leaky neuron that rests at -65: without input, its small potentials are above threshold."""

    states, coefficients = ("v",), ("decay",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (v,), (decay,) = state, coefficients
        v = decay * v + (1 - decay) * -65.0 + x
        return v, (torch.where(fire(v + 51.0) > 0, -65.0, v),)


POLES = [0.95 * np.exp(0.02j), 0.9 * np.exp(0.05j), 0.88 * np.exp(0.08j)]


SLOW = [
    lambda n: ResonantSynapse(n, 2000.0, 1 / 1000),
    lambda n: ResonantSynapse(n, 500.0, 1 / 2000),
    lambda n: ResonantSynapse(n, 800.0, 1 / 150),  # of which 16 bits would move a pole by 16 %
    lambda n: LowPassSynapse(n, 60000.0),
    lambda n: of_poles(n, *POLES[:2]),
    lambda n: of_poles(n, 0.99 * np.exp(0.01j)),  # whose gain 16 bits would change
    lambda n: DualExponentialSynapse(n, 300.0, 150.0),
    lambda n: IIRSynapse(n, [2 * np.cos(2 * np.pi / 1000), -1.0], [1.0]),  # which does not decay
    lambda n: Held(n, decay=1 - 1e-4),
    lambda n: Following(n, slow=1 - 1e-4, fast=0.9),
    lambda n: InMillivolts(n, decay=1 - 1e-4),
    lambda n: Averaging(n, rate=2e-5),
    lambda n: Draining(n, tau=5e4),
    Leaky,
]


@pytest.mark.parametrize(
    ("build", "channels"), [*((build, 3) for build in SLOW), *((build, 1) for build in SLOW[-3:])]
)
def test_filters_with_poles_near_the_unit_circle_are_the_same_in_integers(build, channels):
    model = Sequential(build(channels)).double()
    x = (torch.rand(3000, 2, channels) < 0.2).double()
    assert share_lost(model, x) < 1e-3


GAINS = torch.tensor([1.0, 1e-2, 1e-4])


@pytest.mark.parametrize("changed", [0.0, 1e-9, 10.0, 100.0])
def test_an_output_of_large_weights_or_of_none_leaves_the_others_their_bits(changed):
    """An output that is pruned, say; the weights receive potentials."""
    model = Sequential(LowPassSynapse(64, 50.0), nn.Linear(64, 40, False), SpikingNeuron(40, 5.0))
    model[1].weight.data = torch.randint(-127, 128, (40, 64)) / 2540 * torch.rand(40, 1)
    model[1].weight.data[:, 0] = model[1].weight.abs().amax(1)  # which 8 bits hold exactly
    x = (torch.rand(400, 8, 64) < 0.1).float()
    with torch.no_grad():
        model[1].weight[0] *= changed
        expected = model(x)[0][..., 1:].numpy()
    made = quantise(model, x)
    found = made.run(made.integers(x.numpy()))[..., 1:] * made.output_scale
    assert made.saturated == 0
    assert expected.mean() > 0.02
    assert abs(found - expected).mean() < 0.02 * expected.mean()


def test_gains_of_channels_that_differ_much_are_right():
    model = Sequential(LowPassSynapse(3, 5.0), IIRSynapse(3, [0.9], [GAINS])).double()
    x = (torch.rand(500, 2, 3) < 0.2).double()
    with torch.no_grad():
        expected = model(x)[0].numpy()
    made = quantise(model, x)
    error = np.square(made.run(made.integers(x.numpy())) * made.output_scale - expected)
    assert (error.mean((0, 1)) < 1e-3 * expected.var((0, 1))).all()


def test_slow_filters_behind_weights_with_a_bias_are_the_same_in_integers():
    weighed = nn.Linear(3, 3)
    weighed.weight.data, weighed.bias.data = 0.7 * torch.eye(3), torch.tensor([0.5, -0.2, 0.1])
    model = Sequential(weighed, DualExponentialSynapse(3, 300.0, 150.0)).double()
    x = (torch.rand(3000, 2, 3) < 0.2).double()
    assert share_lost(model, x) < 1e-3


class Counting(Cell):
    """A slow filter beside a sum, which does not decay."""

    states, coefficients = ("one", "two", "total"), ("a", "b")

    @staticmethod
    def step(x, state, coefficients, fire):
        (one, two, total), (a, b) = state, coefficients
        now = a * one - b * two + x
        return now + 0.01 * total, (now, one, total + x)


def beside_a_sum(a):
    """An undamped filter and a sum."""
    made = Counting(1, a=0.0, b=1.0).double()
    made.a.fill_(a)
    return made


def test_the_gain_of_a_filter_beside_a_sum_is_kept():
    radius, angle = 0.99, 0.01
    model = Sequential(Counting(2, a=2 * radius * np.cos(angle), b=radius**2)).double()
    x = (torch.rand(3000, 2, 2) < 0.2).double()
    assert share_lost(model, x) < 1e-3


class Compared(Cell):
    """A decay with which the level is compared before it is a factor."""

    states, coefficients = ("level",), ("decay",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (level,), (decay,) = state, coefficients
        output = torch.where(level > decay, level, x)
        return output, (decay * level + x,)


def test_a_factor_that_is_compared_as_well_is_kept_stable(monkeypatch):
    monkeypatch.setattr(lowering, "FACTOR_BITS", 16)
    model = Sequential(Compared(2, decay=1 - torch.tensor([1e-5, 0.1]))).double()
    with pytest.warns(UserWarning, match="16 bits make another one"):
        (step,) = quantise(model, torch.rand(500, 1, 2)).staged.stages
    factors = [row[0].tolist() for row in step.coefficients.values()]
    assert [(1 << 14) - 1, round(0.9 * (1 << 14))] in factors


@pytest.mark.parametrize("biased", [False, True])
def test_only_filters_that_would_leave_the_circle_are_moved(monkeypatch, biased):
    monkeypatch.setattr(lowering, "FACTOR_BITS", 16)
    taus, weighed = torch.tensor([1e5, 25.0]), nn.Linear(2, 2)
    weighed.weight.data, weighed.bias.data = torch.eye(2), torch.tensor([0.5, -0.2])
    model = Sequential(*[weighed] * biased, LowPassSynapse(2, taus))
    with pytest.warns(UserWarning, match="16 bits make another one"):
        made = quantise(model, torch.rand(500, 1, 2))
    *_, step = made.staged.stages
    slow, fast = step.coefficients["alpha_0"][0]
    unit = 2.0 ** -round(np.log2(slow))
    assert slow == 1 / unit - 1  # the nearest that decays
    assert fast == round(LowPassSynapse(1, 25.0).alpha.item() / unit)


@pytest.mark.parametrize(
    "filters",
    [
        of_poles(1, *POLES),
        of_poles(1, np.exp(1e-4j)),
        of_poles(1, (1 - 2e-7) * np.exp(1j)),
        beside_a_sum(2 * np.cos(1e-4)),
    ],
    ids=["close together", "undamped", "long memory", "beside a sum"],
)
def test_a_filter_that_24_bits_make_another_one_is_told(filters):
    model, x = Sequential(filters), torch.randn(600, 2, 1).double()
    with pytest.warns(UserWarning, match="layer 0 has a filter of which 24 bits make another one"):
        quantise(model, x)


@pytest.mark.parametrize(("units", "is_told"), [(13.4, True), (30.4, False)])
def test_a_change_of_two_percent_of_the_response_to_what_lasts_is_told(units, is_told):
    """0.4 of the unit of a factor: 3.0 and 1.3 % of the distance of the pole from 1."""
    model = Sequential(IIRSynapse(1, (0.5,), (1.0,))).double()
    model[0].alpha.data.fill_(1 - units * 2.0**-23)
    told = pytest.warns(UserWarning, match="24 bits make another one")
    with told if is_told else contextlib.nullcontext():
        quantise(model, torch.randn(600, 2, 1).double())


@pytest.mark.parametrize("number", [1, 9])
def test_trained_filters_that_get_no_more_input_come_to_rest(number):
    """Near zero: rounding keeps a filter with a long memory from falling to it."""
    network_ = snn_lib.load(ROOT / "checkpoint" / "pretrained_sequential_mnist")
    model = Sequential(network_.model.layers[number]).double()
    x = (torch.rand(800, 1, *model[0].shape) < 0.05).double()
    with torch.no_grad():
        expected = model(x)[0].numpy()
    made = quantise(model, x)
    start = made.run(made.integers(x.numpy())) * made.output_scale
    made.run(np.zeros((12000, *x.shape[1:]), int))
    rest = made.run(np.zeros((500, *x.shape[1:]), int)) * made.output_scale
    assert np.square(start - expected).mean() < 1e-4 * expected.var()
    assert abs(rest).max() < 3e-4 * abs(start).max()
    assert made.saturated == 0


def test_a_spike_count_stands_still_at_its_limit():
    model = Sequential(SpikingNeuron(2, 4.0, reset_strength=0.0), SpikeCount())
    made = quantise(model, torch.full((3, 1, 2), 2.0))
    assert made.output_scale == 1
    one = np.full((1, 2), round(2 / made.input_scale))
    made.step(one)
    (name,) = (name for name in made._states if name.endswith(".sum"))
    made._states[name] = made._states[name] + 2**30 - 3
    assert [int(made.step(one)[0, 0]) for _ in range(3)] == [2**30 - 1] * 3
    assert made.saturated > 0


class Clock(Cell):
    """Adds to its input how many steps have been."""

    states = ("steps",)

    @staticmethod
    def step(x, state, coefficients, fire):
        steps = state[0] + 1.0
        return x + steps, (steps,)


def test_a_whole_number_is_exact_far_beyond_what_the_samples_reach():
    made = quantise(Sequential(Clock(2)), torch.randn(20, 5, 2))
    x = torch.zeros(500, 1, 2)
    outputs = made.run(made.integers(x.numpy())[:, :1])
    np.testing.assert_array_equal(outputs[:, 0, 0] * made.output_scale, np.arange(1, 501))


class Total(Cell):
    states = ("total",)

    @staticmethod
    def step(x, state, coefficients, fire):
        total = state[0] + x
        return 0.3 * total, (total,)


@needs_compiler
def test_products_of_what_grows_for_ever_do_not_overflow(tmp_path):
    made = quantise(Sequential(Total(2)), torch.full((240, 1, 2), 255.0))
    x = np.full((800, 1, 2), 255)
    output = written(made, tmp_path, SANITIZED).run(x)
    np.testing.assert_array_equal(output, made.run(x).reshape(output.shape))
    assert output[-1, 0, 0] * made.output_scale == pytest.approx(0.3 * 800 * 255, rel=1e-4)


class MovingAverage(Cell):
    states, coefficients = ("mean",), ("rate",)

    @staticmethod
    def step(x, state, coefficients, fire):
        mean = state[0] + coefficients[0] * (x - state[0])
        return mean, (mean,)


class DecayAfter(Cell):
    states, coefficients = ("trace",), ("decay",)

    @staticmethod
    def step(x, state, coefficients, fire):
        trace = coefficients[0] * (state[0] + x)
        return trace, (trace,)


class Coupled(Cell):
    """Factors that are the same integers of other units."""

    states = ("v", "w")

    @staticmethod
    def step(x, state, coefficients, fire):
        v, w = state
        return v - w, (0.8 * v + x - w, 0.9 * w + 0.2 * v)


class Copying(Cell):
    states = ("v", "w")

    @staticmethod
    def step(x, state, coefficients, fire):
        v, w = state
        return v - w, (0.8 * x, 0.2 * x)


class Differing(Cell):
    @staticmethod
    def step(x, state, coefficients, fire):
        return (0.8 * x - 0.3 * x) - (0.1 - x), ()


class Leaking(Cell):
    @staticmethod
    def step(x, state, coefficients, fire):
        return torch.where(x > 0, 0.8 * x, 0.1 * x), ()


@pytest.mark.parametrize("cell", [Coupled, Copying, Differing, Leaking])
def test_factors_of_the_same_integers_have_units_of_their_own(cell):
    x, alone, weighed = torch.randn(60, 20, 8), Sequential(cell(8)), nn.Linear(8, 8, bias=False)
    weighed.weight.data = 0.7 * (torch.rand(8, 8) - 0.5).sign()  # exact with 8 bits
    for model in (alone, Sequential(weighed, cell(8))):
        assert share_lost(model, x) < 1e-5


def biased():
    """Weights whose size is a power of two, and biases that are fractions of it."""
    model = nn.Linear(8, 8)
    nn.init.constant_(model.weight, -1.0)
    model.weight.data.fill_diagonal_(1.0)
    model.bias.data = torch.linspace(-0.45, 1.4, 8)
    return Sequential(model, SpikingNeuron(8, 5.0))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Sequential(MovingAverage(8, rate=0.1)),
        lambda: Sequential(DecayAfter(8, decay=0.9)),
        lambda: Sequential(ResonateAndFireNeuron(8, log_spaced(5, 50), log_spaced(0.02, 0.25))),
        biased,
    ],
)
@pytest.mark.parametrize("largest", [1, 3])
def test_states_and_biases_beside_spikes_and_counts_keep_their_precision(build, largest):
    model = build()
    x = (torch.randint(0, 3 * largest, (60, 50, 8)) - 2 * largest + 1).clamp(min=0).float()
    with torch.no_grad():
        expected = model(x)[0].numpy()
    made = quantise(model, x)
    found = made.run(made.integers(x.numpy())) * made.output_scale
    assert abs(found - expected).mean() < 0.01 * abs(expected).mean()
    assert abs(expected).mean() > 0.01


@pytest.mark.parametrize(
    "layer", [Delay(8, 1.5, 4), IIRSynapse(8, [0.6, -0.3], [0.2, 1.0])], ids=["delay", "filter"]
)
def test_small_currents_keep_their_precision(layer):
    model, x = Sequential(nn.Linear(8, 8, bias=False), layer), 1e-4 * torch.randn(60, 10, 8)
    made = quantise(model, x)
    with torch.no_grad(), rounded_weights(model, 8):
        expected = model(x)[0].numpy()
    found = made.run(made.integers(x.numpy())) * made.output_scale
    assert np.square(found - expected).mean() < 1e-3 * expected.var()


def test_weights_on_the_diagonal_alone_are_weighed():
    model = Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([0.5, 2.0, 1.0])))
    x = torch.rand(9, 2, 3)
    made = quantise(model, x)
    found = made.run(made.integers(x.numpy())) * made.output_scale
    np.testing.assert_allclose(found, model(x)[0].detach().numpy(), atol=0.02)


def test_weights_that_hand_on_one_input_each_keep_their_bias():
    model, x = Sequential(nn.Linear(3, 3)), torch.rand(9, 2, 3)
    model[0].weight.data = torch.eye(3)[[2, 0, 1]]
    model[0].bias.data = torch.tensor([0.5, -0.2, 1.0])
    made = quantise(model, x)
    found = made.run(made.integers(x.numpy())) * made.output_scale
    np.testing.assert_allclose(found, model(x)[0].detach().numpy(), atol=0.02)


class LateReset(Cell):
    """A spike lowers the potential of the next step."""

    states, coefficients = ("membrane", "before"), ("decay",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (membrane, before), (decay,) = state, coefficients
        membrane = decay * membrane + x - before
        spikes = fire(membrane)
        return spikes, (membrane, spikes)


class Inhibited(Cell):
    """The last spike holds the next one back, without a memory of the current."""

    states, coefficients = ("before",), ("strength",)

    @staticmethod
    def step(x, state, coefficients, fire):
        spikes = fire(x - coefficients[0] * state[0])
        return spikes, (spikes,)


class HeldBack(Cell):
    """The last two spikes hold the next one back; the newest is kept first."""

    states, coefficients = ("membrane", "newest", "before"), ("decay",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (membrane, newest, before), (decay,) = state, coefficients
        membrane = decay * membrane + x - 0.3 * newest - 0.2 * before
        spikes = fire(membrane)
        return spikes, (membrane, spikes, newest)


class Silent(Cell):
    """Remembers whether it has been silent, as the larger of two numbers of either sign."""

    states, coefficients = ("membrane", "silent"), ("decay",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (membrane, silent), (decay,) = state, coefficients
        membrane = decay * membrane + x - 0.3 * (1 - silent)
        spikes = fire(membrane)
        return spikes, (membrane, torch.maximum(1 - spikes, -spikes))


class Tiring(Cell):
    """Each spike raises the threshold for ever."""

    states, coefficients = ("membrane", "count"), ("decay",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (membrane, count), (decay,) = state, coefficients
        membrane = decay * membrane + x
        spikes = fire(membrane - 0.1 * count)
        return spikes, (membrane - spikes, count + spikes)


class Halving(Cell):
    """A whole number and a spike, divided by 2, are no whole number."""

    states, coefficients = ("before",), ("strength",)

    @staticmethod
    def step(x, state, coefficients, fire):
        spikes = fire(x - coefficients[0] * state[0])
        return spikes, ((state[0] + spikes) / 2,)


class Resting(Cell):
    """Neurons that rest after a spike, by a counter that is compared with a fraction."""

    states, coefficients = ("rest",), ("period",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (rest,), (period,) = state, coefficients
        spikes = fire(x * (rest < 0.5).to(x) - 0.1 * torch.abs(torch.full_like(x, -0.1)))
        return spikes, (torch.where(spikes > 0.5, period, torch.clamp(rest - 1.0, min=0.0)),)


class Follower(Cell):
    """Events of either sign when the input is a whole step away from a level that follows."""

    states, coefficients = ("level",), ("size",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (level,), (size,) = state, coefficients
        up, down = (x - level > size).to(x), (level - x > size).to(x)
        return up - down, (level + size * up - size * down,)


@needs_compiler
@pytest.mark.parametrize(
    ("cell", "value"),
    [
        (LateReset, {"decay": 0.9}),
        (Inhibited, {"strength": 1.0}),
        (Inhibited, {"strength": 0.7}),
        (Inhibited, {"strength": -0.5}),
        (HeldBack, {"decay": 0.9}),
        (Silent, {"decay": 0.9}),
        (Tiring, {"decay": 0.9}),
        (Halving, {"strength": 1.0}),
        (Resting, {"period": 3.0}),
        (Follower, {"size": 1.0}),
    ],
)
def test_a_current_beside_whole_numbers_keeps_its_precision(cell, value, tmp_path):
    x = (torch.rand(40, 60, 8) < 0.3).float()
    model = Sequential(LowPassSynapse(8, 5.0), nn.Linear(8, 50), cell(50, **value))
    nn.init.normal_(model[1].weight, std=0.25)
    with torch.no_grad():
        expected = model(x)[0].numpy()
    made = quantise(model, x)
    found = made.run(made.integers(x.numpy())) * made.output_scale
    assert 0.02 < (expected != 0).mean() < 0.6
    assert (found != expected).mean() < 0.15 * (expected != 0).mean()
    made.reset()
    given = made.integers(x.numpy()[:, :1])
    program = written(made, tmp_path, SANITIZED)
    np.testing.assert_array_equal(made.run(given).reshape(40, 1, -1), program.run(given))


def test_a_count_beside_a_current_is_right_far_beyond_what_the_samples_reach():
    model = Sequential(nn.Linear(8, 20), Tiring(20, decay=0.9))
    model[0].weight.data, model[0].bias.data = 0.7 * torch.eye(20, 8), torch.linspace(1, 9, 20)
    made, x = quantise(model, torch.rand(20, 4, 8)), torch.rand(3000, 1, 8)
    found = made.run(made.integers(x.numpy()))
    with torch.no_grad():
        expected = model(x)[0].numpy()
    counts, rights = found.sum(0), expected.sum(0)
    assert rights.max() > 5 * model(x[:20])[0].sum(0).max()
    np.testing.assert_allclose(counts, rights, rtol=0.02, atol=1)
    assert made.saturated == 0


class Charge(Cell):
    """Adds up its input."""

    states = ("total",)

    @staticmethod
    def step(x, state, coefficients, fire):
        total = state[0] + x
        return total, (total,)


def test_a_total_of_currents_is_right_far_beyond_what_the_samples_reach():
    made, x = quantise(Sequential(Charge(1)), torch.rand(50, 4, 1)), torch.full((2000, 1, 1), 0.9)
    found = made.run(made.integers(x.numpy())) * made.output_scale
    np.testing.assert_allclose(found, x.cumsum(0), rtol=1e-4)
    assert made.saturated == 0


@needs_compiler
@pytest.mark.parametrize("sign", [1, -1])
def test_the_leading_class_is_known_however_long_a_stream_is(sign, tmp_path):
    model = Sequential(nn.Linear(4, 3))
    nn.init.constant_(model[0].bias, sign * 1.6)
    model.readout = "mean"
    made = quantise(model, torch.rand(30, 20, 4) - 0.5)
    x = made.integers(torch.rand(2000, 2, 4).numpy() - 0.5)  # much longer than the samples
    x[:, 1] = -x[:, 0]
    outputs, best, lead = written(made, tmp_path, SANITIZED).run(x)
    sums = outputs.cumsum(0, np.int64)
    assert abs(sums * made.output_scale).max() > 4 * 2**30 * made.lead_scale
    ordered = np.sort(sums, -1)
    exact = (ordered[..., 2] - ordered[..., 1]) * made.output_scale
    rounding = len(x) * made.lead_scale
    np.testing.assert_allclose(lead * made.lead_scale, exact, rtol=0, atol=rounding)
    np.testing.assert_array_equal(best[exact > rounding], sums.argmax(-1)[exact > rounding])
    assert best[-1, 0] != best[-1, 1]
    answers = made.answers(x)
    np.testing.assert_array_equal(best, answers.argmax(-1))
    np.testing.assert_array_equal(lead, np.diff(np.sort(answers, -1))[..., -1])
    assert made.saturated == 0


class Totals(Cell):
    """Its states have the names of states of the preparation and of the readout."""

    states = "sum", "before"

    @staticmethod
    def step(x, state, coefficients, fire):
        total, before = state
        total = 0.9 * total + x - 0.5 * before
        return total, (total, x)


@needs_compiler
@pytest.mark.parametrize("name", ["last", "answer"])
def test_a_class_that_is_far_behind_is_no_reason_to_distrust_the_others(name, tmp_path):
    layers = [("first", nn.Linear(1, 3)), (name, Totals(3))]
    model = Sequential(collections.OrderedDict(layers))
    model[0].weight.data = torch.tensor([[0.0], [0.0], [-5.0]])
    model[0].bias.data = torch.tensor([0.3, 0.2995, 0.0])
    model.readout = "mean"
    made = quantise(model, torch.linspace(-1, 1, 20).view(1, 20, 1).expand(60, 20, 1))
    x = np.full((3000, 1, 1), made.staged.input_limits[1] // 4)
    program = written(made, tmp_path, SANITIZED)
    _, best, lead = program.run(x)
    answers = made.answers(x)
    assert answers.min() <= -3 << 28
    np.testing.assert_array_equal(best, answers.argmax(-1))
    np.testing.assert_array_equal(lead, np.diff(np.sort(answers, -1))[..., -1])
    assert (best == 0).all()
    assert made.saturated == program.saturated == 0


def test_runs_of_any_length_continue_one_stream():
    model, features = network("neurons with a membrane")
    x = spikes(40, *features)
    made = quantise(model, x)
    given = made.integers(x.numpy())
    whole = made.run(given)
    made.reset()
    parts = [made.run(given[:1]), made.run(given[1:25]), made.run(given[25:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@needs_compiler
@pytest.mark.parametrize(
    ("preparation", "raw", "steps"), PREPARED, ids=lambda value: type(value).__name__
)
def test_classify_answers_as_c_does_step_by_step(preparation, raw, steps, tmp_path):
    model = Prepared(preparation).eval()
    made = quantise(model, preparation(raw).x)
    names, answers = made.classify(raw)
    given = made.integers(steps(raw).numpy())
    _, best, _ = written(made, tmp_path).run(given)
    assert names == [model.classes[number] for number in best[-1]]
    with torch.no_grad():
        target = model(preparation(raw).x.float())[0][-1].numpy()
    np.testing.assert_allclose(answers * made.output_scale, target, atol=0.02 * abs(target).max())


def test_sequences_of_several_lengths_are_answered_at_their_own_ends():
    model = Prepared(PREPARED[0][0])
    long = torch.rand(9, 5)
    made = quantise(model, long[:, None])
    _, answers = made.classify([long, long[:4]])
    _, alone = made.classify([long[:4]])
    np.testing.assert_array_equal(answers[1], alone[0])
    assert (answers[0] != answers[1]).any()


def test_after_answers_the_network_is_ready_for_other_sequences():
    model = Prepared(PREPARED[0][0])
    samples = torch.rand(3, 9, 5)
    made = quantise(model, 0.1 * samples.transpose(0, 1))
    given = made.integers(0.2 * samples.transpose(0, 1).numpy())
    expected = made.run(given)
    made.classify(0.2 * samples)
    np.testing.assert_array_equal(made.run(given), expected)
    made.classify(0.2 * samples)
    assert made.step(given[0, :1]).shape == (1, 3)
    with pytest.raises(ValueError, match="values outside"):
        made.classify(torch.cat([0.2 * samples, 9.0 + samples], 1))
    np.testing.assert_array_equal(made.run(given), expected)


def test_what_has_not_fitted_is_known_after_answers():
    model = Sequential(LowPassSynapse(2, 1e4))
    model.readout = "last"
    made = quantise(model, torch.full((3, 1, 2), 0.3))
    made.answers(made.integers(np.full((90, 1, 2), 0.3)))
    assert made.saturated > 0


class Dividing(Cell):
    states = ("level",)
    coefficients = ("decay",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (level,), (decay,) = state, coefficients
        return x / (1 + level.abs()), (decay * level + x,)


class Guarded(Cell):
    """A time constant of 0 means that there is none."""

    states, coefficients = ("v",), ("tau",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (v,), (tau,) = state, coefficients
        v = torch.where(tau > 0, 0.9 * v + x / tau, x)
        return v, (v,)


class Unguarded(Guarded):
    """The same, where nobody asks whether there is one."""

    @staticmethod
    def step(x, state, coefficients, fire):
        v = 0.9 * state[0] + x / coefficients[0]
        return v, (v,)


def after_two_sequences(run):
    """Runs an integer network whose first step has had two sequences."""
    made = quantise(LINEAR, X)
    made.step(np.zeros((2, 4), int))
    return run(made)


LINEAR, X = Sequential(nn.Linear(4, 2)), torch.ones(5, 2, 4)
REFUSED = [  # what is quantised or run, and the words
    *((lambda x=x: quantise(LINEAR, x), r"x has the shape .*, expected \(T, B, \*\(4,\)\)")
      for x in (torch.rand(5, 2, 3), torch.rand(5, 0, 4), torch.rand(4))),
    (lambda: quantise(LINEAR, X, weight_bits=3), "weight_bits is 3, expected 8, 4 or 2"),
    (lambda: quantise(Sequential(Dividing(4, decay=0.5)), X), "0 divides by what changes, which"),
    (lambda: quantise(Sequential(nn.Linear(4, 2), Mean()), X), "1 divides by what changes"),
    (lambda: quantise(LINEAR, X).step(np.full((1, 4), 2)), "values outside 0 to 1"),
    (lambda: quantise(LINEAR, X).step(np.zeros((1, 3), int)), r"shape \(3,\), expected \(4,\)"),
    (lambda: quantise(LINEAR, X).step(np.zeros((1, 4))), "float64, expected integers"),
    *((lambda call=call: call(np.ma.masked_equal(X.numpy(), 1)), "masked values: fill them first")
      for call in (lambda x: quantise(LINEAR, x), lambda x: quantise(LINEAR, X).integers(x),
                   lambda x: quantise(LINEAR, X).step(x[0].astype(int)))),
    (lambda: quantise(LINEAR, X, weight_bits=8.0), "'float' object cannot be interpreted"),
    (lambda: quantise(LINEAR, X * 1e-8), "x lies within 1e-08 of 0, which is too little: scale"),
    (lambda: quantise(LINEAR, X * torch.nan), "x has values that are not finite"),
    (lambda: quantise(LINEAR, X / 0), "x has values that are not finite"),
    (lambda: quantise(Sequential(IIRSynapse(4, [1.9], [1.0])), X.repeat(300, 1, 1)),
     "values grow without limit on x: is it stable"),
    (lambda: quantise(LINEAR, X).step(np.zeros((0, 4), int)), "a step has 0 sequences, expected"),
    *((lambda kind=kind, scale=scale:
       quantise(Sequential(kind(4, tau=torch.tensor([0.0, 2.0, 3.0, 4.0]))), scale * X), words)
      for kind, words in ((Guarded, "layer 0 computes numbers that are not finite, such as 1 / 0"),
                          (Unguarded, "values grow without limit on x"))
      for scale in (1.0, torch.tensor([0.0, 1.0, 1.0, 1.0]))),
    *((lambda n=n: after_two_sequences(lambda made: made.step(np.zeros((n, 4), int))),
       f"a step has {n} sequences after steps of 2: call reset") for n in (1, 3)),
    (lambda: quantise(LINEAR, X).classify(X), "the readout is not known"),
    (lambda: quantise(LINEAR, (X, None)), "x is a tuple, expected an array, a tensor or"),
    (lambda: quantise(quantise(LINEAR, X), X), "the network is a IntegerNetwork, expected a torch"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_networks_and_inputs_that_integers_cannot_compute_are_refused_in_one_line(call, words):
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises((ValueError, TypeError), match=words) as error,
    ):
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("offset", "size"), [(0.0, 50.0), (5000.0, 50.0), (293.0, 0.02)])
def test_inputs_that_the_unit_of_all_is_too_coarse_for_are_warned_of(offset, size):
    x = torch.randn(200, 3, 4)
    x[..., 2] = offset + size * x[..., 2]
    small = 2 if size < 1 else 0
    context = (
        pytest.warns(UserWarning, match=f"input {small} varies by")
        if offset
        else warnings.catch_warnings(action="error")
    )
    with context:
        quantise(LINEAR, x)


def test_a_channel_of_a_series_that_lies_far_from_0_is_warned_of():
    far = torch.tensor([1e9, -1.0], dtype=torch.float64)
    preparation = SeriesPreparation(block=1, encoding="current", **{**SERIES, "mean": far})
    x = preparation((far + torch.randn(40, 6, 2)).float()).x
    told = pytest.warns(UserWarning, match="input 1 varies by")
    with told, pytest.warns(UserWarning, match="have the same class"):
        quantise(Prepared(preparation), x)


ANSWERS = {
    "last": lambda y: y[-1],
    "mean": lambda y: y.mean(0),
    "maximum": lambda y: y.amax(0),
}


def classifier(readout):
    """A network of 30 classes, many of which are nearly as large."""
    torch.manual_seed(0)
    model = Sequential(nn.Linear(8, 30, bias=False), LowPassSynapse(30, tau=4.0))
    model.readout = readout
    return model


@pytest.mark.parametrize("readout", ANSWERS)
def test_integers_that_often_choose_another_class_are_warned_of(readout):
    model, x = classifier(readout), torch.randn(20, 200, 8)
    with pytest.warns(UserWarning, match="have the same class in integers as in") as told:
        coarse = quantise(model, x, weight_bits=2)
    with warnings.catch_warnings(action="error"):
        fine = quantise(model, x, weight_bits=8)
    with torch.no_grad():
        expected = ANSWERS[readout](model(x)[0]).argmax(1).numpy()
    alike = [
        (made.answers(made.integers(x.numpy()))[-1].argmax(1) == expected).sum()
        for made in (coarse, fine)
    ]
    assert alike[0] < 180 <= alike[1]
    assert f"only {alike[0]} of the 200 samples in x" in str(told[0].message)


def test_classes_of_prepared_samples_are_compared_where_each_ends():
    preparation = SeriesPreparation(block=1, encoding="current", **{**SERIES, "steps": 600})
    model = Prepared(preparation)
    model.layers[1] = nn.Linear(4, 3, bias=False)  # until the answers of short samples have decayed
    series = [2 * torch.randn(length, 2) for length in torch.randint(10, 600, (200,)).tolist()]
    given = preparation(series)
    with warnings.catch_warnings(action="error"):
        made = quantise(model, given)
    ends = given.lengths - 1, torch.arange(200)
    with torch.no_grad():
        expected = model(given.x)[0][ends].argmax(1).numpy()
    assert (made.classify(series)[1].argmax(1) == expected).mean() > 0.9
    with pytest.warns(UserWarning, match="have the same class"):
        quantise(model, given.x)  # which does not say where they end


def test_integers_that_lose_all_classes_beside_a_bias_are_warned_of():
    model, x = classifier("mean"), torch.randn(20, 200, 8)
    model[0].bias = nn.Parameter(torch.zeros(30))
    model[0].bias.data[29] = -1e9
    with pytest.warns(UserWarning, match="only [0-9] of the 200 samples"):
        quantise(model, x)


@pytest.mark.parametrize("shape", [(6, 40, 2), (40, 6, 3), (4,)])
def test_series_that_are_not_prepared_are_refused(shape):
    network_ = Prepared(SeriesPreparation(block=1, encoding="current", **SERIES))
    with pytest.raises(
        ValueError, match=rf"shape {re.escape(str(shape))}, expected \(T, B, \*\(4,"
    ):
        quantise(network_, torch.rand(shape))


def test_a_run_of_no_steps_and_a_reset_change_nothing():
    made = quantise(LINEAR, X.bfloat16().requires_grad_())
    assert made.run(np.zeros((0, 3, 4), int)).shape == (0, 3, 2)
    two, one = np.ones((5, 2, 4), int), np.ones((5, 1, 4), int)
    expected = made.run(two)
    made.reset()
    np.testing.assert_array_equal(made.run(one), expected[:, :1])


def test_the_steps_of_a_run_may_be_a_list_or_come_one_by_one():
    made, x = quantise(LINEAR, X), np.ones((5, 2, 4), np.uint8)
    expected = made.run(x)
    for steps in ([*x], iter(x)):
        np.testing.assert_array_equal(made.run(steps), expected)


def test_a_block_that_is_refused_changes_no_state():
    made = quantise(Sequential(nn.Linear(4, 2), LowPassSynapse(2, 3.0)), X)
    expected = made.run(made.integers(X.numpy()))
    made.reset()
    wrong = made.integers(X.numpy())
    wrong[3] = 7
    with pytest.raises(ValueError, match="values outside"):
        made.run(wrong)
    np.testing.assert_array_equal(made.run(made.integers(X.numpy())), expected)


def test_what_a_step_returned_may_be_changed():
    model, x = Sequential(nn.Linear(4, 2), LowPassSynapse(2, 3.0)), np.ones((5, 2, 4), int)
    made = quantise(model, X)
    expected = made.run(x)
    made.reset()
    for now, right in zip(x, expected, strict=True):
        output = made.step(now)
        np.testing.assert_array_equal(output, right)
        output -= output.max() + 1


class Bounded(Cell):
    """By a number far beyond all others."""

    states = ("level",)

    @staticmethod
    def step(x, state, coefficients, fire):
        level = torch.clamp(0.9 * state[0] + x, -1e12, 1e12)
        return torch.where(level > -1e15, level, 0.0), (level,)


class Floored(Cell):
    """By numbers above and below all that they are compared with."""

    states = ("level",)

    @staticmethod
    def step(x, state, coefficients, fire):
        level = 0.9 * state[0] + x
        high, low = torch.maximum(level, 90.0 + 0.0 * x), torch.clamp(level, max=-80.0)
        return torch.where(level > 70.0, x, high) + low * torch.clamp(x, 0.0, 0.5), (level,)


class Never(Cell):
    """Bounds and thresholds of which one channel's is never met."""

    states, coefficients = ("level",), ("most", "threshold")

    @staticmethod
    def step(x, state, coefficients, fire):
        most, threshold = coefficients
        level = torch.minimum(0.9 * state[0] + x, most)
        return torch.where(level > threshold, 1.0, level), (level,)


def follow(x, state, coefficients, fire):
    """Fires above a baseline that follows the input."""
    (membrane, baseline), (decay, divisor) = state, coefficients
    baseline = decay * baseline + 0.05 * x / divisor
    membrane = 0.8 * membrane + x - baseline
    spikes = fire(membrane)
    return spikes, (membrane - spikes, baseline)


@needs_compiler
@pytest.mark.parametrize(
    ("states", "coefficients"),
    [
        (("offset", "gain"), ("decay", "divisor")),
        (("bias", "factor"), ("decay", "divisor")),
        (("membrane", "inverse_of_divisor"), ("decay", "divisor")),
        (("membrane", "baseline"), ("inverse_of_divisor", "divisor")),
        (("x", "constant_0"), ("factor", "bias")),
    ],
)
def test_a_cell_may_have_any_names(states, coefficients, tmp_path):
    x, weights = torch.rand(100, 1, 8), nn.Linear(8, 3)
    found = []
    for names in ((("membrane", "baseline"), ("decay", "divisor")), (states, coefficients)):
        cell = {"step": staticmethod(follow), "states": names[0], "coefficients": names[1]}
        values = dict(
            zip(names[1], torch.tensor([[0.9, 0.95, 0.99], [1.0, 2.0, 3.0]]), strict=True)
        )
        made = quantise(Sequential(weights, type("Named", (Cell,), cell)(3, **values)), x)
        given = made.integers(x.numpy())
        found.append(made.run(given))
    np.testing.assert_array_equal(*found)
    program = written(made, tmp_path)
    np.testing.assert_array_equal(found[1].reshape(100, -1), program.run(given).reshape(100, -1))


class Counter(Cell):
    """Counts up to a bound and above a threshold, of which one channel's is never met."""

    states, coefficients = ("total",), ("most", "threshold")

    @staticmethod
    def step(x, state, coefficients, fire):
        most, threshold = coefficients
        total = torch.minimum(state[0] + x, most)
        return torch.where(total > threshold, total + 100.0, total), (total,)


@needs_compiler
@pytest.mark.parametrize("channels", [1, 3])
def test_whole_thresholds_of_counts_are_exact_beside_one_that_is_never_met(channels, tmp_path):
    most = torch.tensor([1e9, 25.0, 1e10])[:channels]
    threshold = torch.tensor([1e10, 5.0, 7.0])[:channels]
    model = Sequential(Counter(channels, most=most, threshold=threshold))
    x = torch.randint(0, 2, (60, 1, channels)).float()
    made = quantise(model, x)
    given = made.integers(x.numpy())
    found = made.run(given)
    np.testing.assert_array_equal(found * made.output_scale, model(x)[0].detach().numpy())
    program = written(made, tmp_path, SANITIZED)
    np.testing.assert_array_equal(found.reshape(60, 1, -1), program.run(given))


class Muted(Cell):
    """Hands on nothing where there is no input, and else a level that may be large."""

    states = ("level",)

    @staticmethod
    def step(x, state, coefficients, fire):
        level = 0.999 * state[0] + x
        return torch.where(x < 0.5, 0.0, level), (level,)


@needs_compiler
def test_the_limits_of_a_choice_are_those_of_both_numbers(tmp_path):
    model, x = Sequential(Muted(3)), torch.randint(0, 3, (200, 1, 3)).float()
    made = quantise(model, x)
    given = made.integers(x.numpy())
    found = made.run(given)
    np.testing.assert_allclose(found * made.output_scale, model(x)[0].numpy(), rtol=1e-4)
    program = written(made, tmp_path, SANITIZED)
    np.testing.assert_array_equal(found.reshape(200, 1, -1), program.run(given))


class Above(Cell):
    coefficients = ("threshold",)

    @staticmethod
    def step(x, state, coefficients, fire):
        return torch.where(x >= coefficients[0], 1.0, 0.0), ()


def test_a_threshold_that_is_never_met_does_not_fire_at_the_largest_input():
    model, x = (
        Sequential(nn.Linear(1, 1, bias=False), Above(1, threshold=1e10)),
        torch.ones(9, 2, 1),
    )
    for weight in torch.linspace(0.5, 12, 20):
        nn.init.constant_(model[0].weight, weight.item())
        made = quantise(model, x)
        assert not made.run(made.integers(x.numpy())).any()


FAR = {"most": torch.tensor([1e9, 0.5, 1e5]), "threshold": torch.tensor([0.3, 1e10, -1e8])}


@needs_compiler
@pytest.mark.parametrize(("cell", "values"), [(Bounded, {}), (Floored, {}), (Never, FAR)])
def test_numbers_far_beyond_all_others_bound_nothing(cell, values, tmp_path):
    x, model = torch.randn(60, 1, 3), Sequential(cell(3, **values))
    made = quantise(model, x)
    given = made.integers(x.numpy())
    output = made.run(given)
    expected = model(x)[0].numpy()
    assert np.square(output * made.output_scale - expected).mean() < 1e-5 * expected.var()
    program = written(made, tmp_path, SANITIZED)
    np.testing.assert_array_equal(output.reshape(60, 1, -1), program.run(given))


def test_the_last_step_of_the_samples_counts_in_the_fixed_points():
    x = torch.full((1, 3, 2), 500.0)
    made = quantise(Sequential(LowPassSynapse(2, 5.0)), x)
    made.run(made.integers(x.numpy()))
    assert made.saturated == 0


@pytest.mark.parametrize("name", ["input", "answer"])
def test_a_layer_may_have_the_name_of_a_step_that_is_no_layer(name):
    preparation = SeriesPreparation(block=1, encoding="current", **SERIES)
    samples, linear, found = torch.rand(4, 6, 2) * 4, nn.Linear(4, 3), []
    for own in (name, "totals"):
        model = Sequential(collections.OrderedDict([("linear", linear), (own, Totals(3))]))
        model.preparation, model.readout = preparation, "mean"
        made = quantise(model, preparation(samples)[0])
        given = made.integers(samples.transpose(0, 1).numpy())
        found.append((made.run(given), made.answers(given)))
    np.testing.assert_array_equal(*[np.concatenate(pair) for pair in found])


def test_the_integer_network_names_the_classes_of_the_compiled_network():
    _, model = with_readout("last")
    model.readout = "count"
    x = torch.cat([spikes(20, 4) for _ in range(50)], 1)
    made = quantise(model, x)
    assert isinstance(made, IntegerNetwork)
    stream, answers = compiled(model), []
    for sample in x.unbind(1):
        stream.reset()
        answers.append(str(stream.run(sample.numpy()).sum(0).argmax()))
    names, _ = made.classify(x)
    assert len(set(names)) > 1
    assert sum(a == b for a, b in zip(names, answers, strict=True)) >= 48


def test_the_answer_of_a_network_that_answers_at_every_step_is_its_last_one():
    _, model = with_readout("last")
    model.readout = EVERY_STEP
    x = torch.cat([spikes(20, 4) for _ in range(50)], 1)
    made = quantise(model, x)
    names, answers = made.classify(x)
    all_answers = made.answers(made.integers(x.numpy()))
    assert all_answers.shape == (20, 50, 3)
    np.testing.assert_array_equal(answers, all_answers[-1])
    made.reset()
    np.testing.assert_array_equal(all_answers, made.run(made.integers(x.numpy())))
    assert names == [str(number) for number in answers.argmax(1)]


def time_step_of(folder):
    """What the C source says that a time step is."""
    return re.search(r"time step: +(.*)", (folder / "network.c").read_text())[1]


def test_the_c_source_states_the_time_step_of_the_preparation_or_the_one_given(tmp_path):
    preparation, recordings, _ = PREPARED[-1]
    model = Prepared(preparation).eval()
    for given in (model, quantise(model, preparation(recordings).x)):
        for asked, step in ((None, "6 ms"), ("25 ms", "25 ms")):
            to_c(given, tmp_path / "network.c", step=asked)
            assert time_step_of(tmp_path) == step


@needs_compiler
@pytest.mark.parametrize(("classes", "step"), [(None, None), (["a", "b", "c"], "25 ms")])
def test_the_c_source_says_what_the_network_is(classes, step, tmp_path):
    """The units, the classes, the time step and the bytes of a stream."""
    model = Prepared(PREPARED[0][0])
    model.readout, x = "mean", 3 * torch.randn(30, 20, 5)
    made = quantise(model, x)
    to_c(made, tmp_path / "network.c", classes=classes, step=step)
    header, source = ((tmp_path / f"network.{end}").read_text() for end in "hc")
    found = dict(re.findall(r"#define NETWORK_(\w+)_SCALE (\S+)", header))
    units = {"INPUT": made.input_scale, "OUTPUT": made.output_scale, "LEAD": made.lead_scale}
    assert {name: float(unit) for name, unit in found.items()} == units
    assert len({*units.values()}) == 3
    assert time_step_of(tmp_path) == (step or "as in the training")
    kind = made.staged.input_kind.removesuffix("_t")
    assert Library(tmp_path, np.int32, kind).classes(3) == (classes or model.classes)
    program = Compiled(tmp_path, np.int32, kind)
    program.run(made.integers(x.numpy()))
    assert f"RAM:        {program.size:,} bytes for each stream" in source


@needs_compiler
@pytest.mark.parametrize("readout", ["count", "last", "maximum"])
def test_of_classes_that_are_equal_the_first_one_leads(readout, tmp_path):
    model = Sequential(nn.Linear(4, 3), SpikingNeuron(3, 4.0))
    nn.init.ones_(model[0].weight)
    model[0].bias.data = torch.tensor([-100.0, 0.5, 0.5])
    model.readout, x = readout, torch.ones(6, 2, 4)
    made = quantise(model, x)
    to_c(model, tmp_path / "network.c")
    _, best, lead = Compiled(tmp_path, np.float32).run(x.numpy())
    assert (best == 1).any()
    assert not lead.any()
    _, found, _ = written(made, tmp_path).run(made.integers(x.numpy()))
    np.testing.assert_array_equal(best, found)
    np.testing.assert_array_equal(best, made.answers(made.integers(x.numpy())).argmax(-1))

"""The C source of a network, compiled on this machine, against PyTorch."""

import math
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from leaving_pytorch import NETWORKS, coming_back, maps, network, passed_on, spikes, with_readout
from prepared import PREPARED, SERIES, Prepared
from torch import nn

from benchmarks.host_c import CC, SANITIZED, Compiled, Library
from snn_lib import Cell, IIRSynapse, LowPassSynapse, PerStep, Sequential, SpikingNeuron
from snn_lib.data.preparation import PixelPreparation, SeriesPreparation
from snn_lib.inference import quantise, to_c
from snn_lib.readout import EVERY_STEP, READOUTS, Mean, SpikeCount

pytestmark = pytest.mark.skipif(CC is None, reason="there is no C compiler")


@pytest.mark.parametrize("name", NETWORKS)
def test_c_computes_what_pytorch_computes(name, tmp_path):
    model, features = network(name)
    x = torch.cat([spikes(30, *features) for _ in range(2)], 1)
    to_c(model, tmp_path / "network.c", features)
    made = Compiled(tmp_path, options=SANITIZED)
    output = made.run(x.numpy())
    with torch.no_grad():
        target = model(x)[0].flatten(2).numpy()
    np.testing.assert_allclose(output, target, rtol=1e-12, atol=1e-12)
    said = re.search(r"RAM: +([\d,]+) bytes", (tmp_path / "network.c").read_text())
    assert made.size == int(said[1].replace(",", ""))


def head_of(model, folder, x=None, shape=None):
    """What the C source says that it takes, and the bytes of its tables."""
    to_c(model if x is None else quantise(model, x), folder / "network.c", shape)
    source = (folder / "network.c").read_text()
    sizes = {"float": 4, "int32_t": 4, "uint32_t": 4, "int16_t": 2, "uint16_t": 2}
    tables = re.findall(r"^static const (\w+) \w+\[(\d+)\]", source, re.M)
    flash = re.search(r"flash: +([\d,]+) bytes", source)[1]
    counts = re.findall(r"(\d+) (?:additions|products)", source)
    return int(flash), sum(sizes[kind] * int(n) for kind, n in tables), [*map(int, counts)]


def test_the_head_states_the_flash_and_the_operations_of_a_step(tmp_path):
    model = Sequential(nn.Linear(4, 6), SpikingNeuron(6, 4.0), nn.Linear(6, 3)).eval()
    flash, tables, counts = head_of(model, tmp_path)
    assert flash == tables == 4 * (4 * 6 + 6 + 6 * 3 + 3)
    assert counts == [0, 4 * 6 + 6 * 3, 6]  # a neuron multiplies its reset
    flash, tables, counts = head_of(model, tmp_path, torch.rand(20, 5, 4))
    assert flash == tables
    assert counts[:2] == [6 * 3, 4 * 6]  # spikes are added, not multiplied
    filters = LowPassSynapse((2, 1, 1), 4.0), PerStep(nn.Conv2d(2, 3, 3))
    maps = Sequential(*filters, SpikingNeuron((3, 1, 1), 4.0)).eval()
    flash, tables, counts = head_of(maps, tmp_path, shape=(2, 5, 5))
    assert flash == tables
    assert counts == [0, 9 * 2 * 3 * 9, 2 * 25 + 3 * 9]  # every position has its filter and neuron


@pytest.mark.parametrize("kind", READOUTS)
def test_a_readout_answers_at_every_step_from_the_steps_so_far(kind, tmp_path):
    model, layers = with_readout(kind)
    x = torch.cat([spikes(20, 4), spikes(20, 4)], 1) - 0.3
    to_c(model, tmp_path / "network.c")
    output = Compiled(tmp_path).run(x.numpy())
    with torch.no_grad():
        values = layers(x)[0]
        target = [READOUTS[kind]()(values[: t + 1]).numpy() for t in range(len(x))]
    np.testing.assert_allclose(output, target, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("readout", ["count", "mean", "last", "maximum", EVERY_STEP])
def test_the_leading_class_and_its_lead_are_known_at_every_step(readout, tmp_path):
    _, model = with_readout("last")
    model.readout = readout
    x = torch.cat([spikes(20, 4) - 0.3 for _ in range(4)], 1)
    to_c(model, tmp_path / "network.c")
    _, best, lead = Compiled(tmp_path).run(x.numpy())
    with torch.no_grad():
        values = model(x)[0]
        readout = "last" if readout == EVERY_STEP else readout  # of the steps so far
        read = [READOUTS[readout]()(values[: t + 1]) for t in range(len(x))]
    first, second = torch.stack(read).topk(2).values.unbind(2)
    ahead = (first - second).numpy()
    if readout == "mean":  # whose sum is compared
        ahead *= np.arange(1, 21)[:, None]
    assert len(np.unique(best)) > 1
    np.testing.assert_array_equal(best, torch.stack(read).argmax(2).numpy())
    np.testing.assert_allclose(lead, ahead, rtol=1e-9, atol=1e-12)


def test_a_network_without_a_known_readout_of_classes_has_no_function_for_them(tmp_path):
    model, _ = with_readout("last")
    for model.readout, model.logit_scale in (
        ("leaky", 1.0),
        (EVERY_STEP, None),
        ("mean", None),
    ):  # numbers
        to_c(model, tmp_path / "network.c")
        assert "network_class(" not in (tmp_path / "network.h").read_text()


def test_streams_do_not_see_each_other(tmp_path):
    model, features = network("order 3, 2")
    to_c(model, tmp_path / "network.c", features)
    library, x = Library(tmp_path), spikes(20, *features)[:, 0].numpy()
    first, second = library.stream(), library.stream()
    outputs = np.array([(first(now), second(other)) for now, other in zip(x, -x, strict=True)])
    np.testing.assert_array_equal(outputs[:, 0], [*map(library.stream(), x)])
    np.testing.assert_array_equal(outputs[:, 1], [*map(library.stream(), -x)])


@pytest.mark.parametrize(
    ("preparation", "raw", "steps"), PREPARED, ids=lambda value: type(value).__name__
)
def test_c_prepares_its_input_as_pytorch_does(preparation, raw, steps, tmp_path):
    model = Prepared(preparation).eval()
    to_c(model, tmp_path / "network.c")
    output, *_ = Compiled(tmp_path, np.float32).run(steps(raw).numpy())
    with torch.no_grad():
        target = model(preparation(raw).x.float())[0]
    np.testing.assert_allclose(output, target, rtol=1e-4, atol=1e-5)


def test_c_holds_the_names_of_classes_and_the_order_of_pixels(tmp_path):
    model = Prepared(PixelPreparation(28, 0.5, torch.arange(783, -1, -1)))
    names = ["no", 'he said "ja"', "Grüße??/"]
    to_c(model, tmp_path / "network.c", classes=names)
    library = Library(tmp_path)
    assert library.classes(3) == names
    assert library.order(784) == list(range(783, -1, -1))


def test_two_networks_fit_into_one_program(tmp_path):
    for name in ("first", "second"):
        to_c(Sequential(nn.Linear(2, 3)), tmp_path / f"{name}.c")
        header = (tmp_path / f"{name}.h").read_text()
        assert f"void {name}_step({name}_state *state" in header
        assert f"#define {name.upper()}_INPUTS 2" in header


def test_spikes_are_counted_beyond_the_whole_numbers_of_float32(tmp_path):
    to_c(passed_on(SpikeCount()), tmp_path / "network.c")
    x = np.ones((1001, 1, 1))
    x[0] = 2.0**24
    assert Compiled(tmp_path, np.float32).run(x)[-1] == 2.0**24 + 1000


def test_the_mean_of_a_long_constant_input_is_the_input(tmp_path):
    to_c(passed_on(Mean()), tmp_path / "network.c")
    mean = Compiled(tmp_path, np.float32).run(np.full((2**20, 1, 1), 0.1, np.float32))[-1]
    np.testing.assert_allclose(mean, np.float32(0.1), rtol=2**-22)


def test_rows_of_neurons_that_did_not_fire_are_not_read(tmp_path):
    model = Sequential(SpikingNeuron(9, 4.0), nn.Linear(9, 3))
    current = np.zeros((1, 1, 9))
    current[..., [2, 5, 6]] = 2.0
    with torch.no_grad():
        target = model(torch.from_numpy(current).float())[0].numpy()
        model[1].weight[:, [0, 1, 3, 4, 7, 8]] = 1e38  # twice as much is no number
    to_c(model, tmp_path / "network.c")
    output = Compiled(tmp_path, np.float32).run(current)
    np.testing.assert_allclose(output, target, rtol=1e-6)


class Curved(Cell):
    states = ("level",)
    coefficients = ()

    @staticmethod
    def step(x, state, coefficients, fire):
        (level,) = state
        return torch.tanh(x + level), (level + x,)


class Unbounded(Cell):
    """A limit that nothing reaches."""

    @staticmethod
    def step(x, state, coefficients, fire):
        return torch.where(x > math.inf, 0.0, x), ()


class Distant(Cell):
    """A limit that float32 does not hold."""

    @staticmethod
    def step(x, state, coefficients, fire):
        return torch.where(x > 1e300, 0.0, x), ()


MISSPELT = Sequential(nn.Linear(4, 4))
MISSPELT.readout = "Mean"


def undefined(place, model):
    """The network, whose layer has a number that is none."""
    next(model[place].parameters()).data.view(-1)[0] = torch.nan
    return model


def two_names():
    """A network of three outputs with too few names of classes."""
    model = Prepared(PREPARED[0][0])
    model.classes = model.classes[:2]
    return model


REFUSED = [  # the network, the name of the file, and the words
    (MISSPELT, "network.c", "readout is 'Mean', expected one of count, mean, last"),
    (Sequential(nn.Linear(4, 4), nn.GRU(4, 4)), "network.c", r"1 \(GRU\)"),
    (Sequential(nn.Linear(4, 4), Curved(4)), "network.c", "1 computes tanh, for which C needs"),
    (Sequential(Unbounded(4)), "network.c", "0 computes with inf, which C has no number for"),
    (Sequential(Distant(4)), "network.c", r"0 computes with 1e\+300, which C has no number for"),
    (undefined(0, Sequential(nn.Linear(4, 4))), "network.c", "0 has weights or coefficients that"),
    (undefined(1, Sequential(nn.Linear(4, 4), LowPassSynapse(4, 3.0))), "network.c",
     "1 has weights or coefficients that are not finite"),
    (undefined(1, Sequential(LowPassSynapse((1, 2, 2), 3.0), PerStep(nn.Conv2d(1, 2, 2)))),
     "network.c", "1.module has weights or coefficients that are not finite"),
    (coming_back()[0], "network.c", "1 is given its own spikes, which C and integers cannot"),
    (Sequential(nn.Linear(4, 4)), "network.h", "network.h: expected a name in C with"),
    (Sequential(nn.Linear(4, 4)), "my-net.c", "my-net.c: expected a name in C with"),
    (Prepared(SeriesPreparation(block=2, encoding="current", **SERIES)), "network.c",
     "as it is set, is written into no step"),
    (two_names(), "network.c", "2 names of classes and 3 outputs"),
    (maps(nn.MaxPool2d(1, stride=6, padding=0, dilation=1))[0], "network.c", "give the shape"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "path", "words"), REFUSED)
def test_networks_and_names_that_c_cannot_have_are_refused_and_nothing_is_written(
    model, path, words, tmp_path
):
    with pytest.raises(ValueError, match=words):
        to_c(model, tmp_path / path)
    assert not any(tmp_path.iterdir())


def test_the_classes_of_an_integer_network_have_a_name_for_each_output(tmp_path):
    made = quantise(Sequential(nn.Linear(4, 3)), torch.ones(5, 2, 4))
    with pytest.raises(ValueError, match="2 names of classes and 3 outputs"):
        to_c(made, tmp_path / "network.c", classes=["no", "yes"])
    assert not any(tmp_path.iterdir())


def test_c_has_no_names_of_classes_that_a_readout_of_one_s_own_makes(tmp_path):
    model = two_names()
    model.readout = None  # which is that of what snn_lib.load returns
    for made in (model, quantise(model, torch.rand(6, 3, 5))):
        to_c(made, tmp_path / "network.c")
        assert "classes" not in (tmp_path / "network.h").read_text()


def test_names_of_layers_and_states_are_no_variables(tmp_path):
    """A compiler that takes warnings as errors would refuse variables that nothing uses."""
    filters = IIRSynapse(3, [], [torch.tensor([0.5, 0.2, 1.0])])
    for name, layer in (("counter", LowPassSynapse(3, 5.0)), ("state_gain", filters)):
        to_c(Sequential(OrderedDict({name: layer})), tmp_path / "network.c")
        x = np.random.default_rng(0).random((5, 1, 3), np.float32)
        with torch.no_grad():
            expected = layer(torch.from_numpy(x))[0]
        output = Compiled(tmp_path, np.float32).run(x)
        np.testing.assert_allclose(output, expected, rtol=1e-5)


class Oddly(Cell):
    """Its names are none of C's."""

    states = ("my level",)
    coefficients = ("decay rate", "größe")
    decays = ("decay rate",)

    @staticmethod
    def step(x, state, coefficients, fire):
        (level,), (decay, gain) = state, coefficients
        level = decay * level + gain * x
        return level, (level,)


def test_names_of_states_and_coefficients_may_be_no_names_of_c(tmp_path):
    given = {"decay rate": torch.linspace(0.1, 0.9, 5), "größe": torch.linspace(1, 2, 5)}
    model, x = Sequential(Oddly(5, **given)), torch.randn(20, 2, 5)
    to_c(model, tmp_path / "network.c")
    assert (tmp_path / "network.c").read_text().isascii()
    with torch.no_grad():
        expected = model(x)[0].numpy()
    output = Compiled(tmp_path, np.float32).run(x.numpy())
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_a_step_of_a_user_s_own_is_written_line_by_line(tmp_path):
    class Rectified(Cell):
        states = ("level",)
        coefficients = ("decay",)
        decays = ("decay",)

        @staticmethod
        def step(x, state, coefficients, fire):
            (level,), (decay,) = state, coefficients
            level = torch.clamp(decay * level + x, min=-0.5, max=2.0)
            return torch.where(level.abs() > 0.3, level, -level), (level,)

    model = Sequential(Rectified(5, decay=torch.linspace(0.1, 0.9, 5)), LowPassSynapse(5, 3.0))
    x = torch.randn(50, 2, 5)
    to_c(model, tmp_path / "network.c")
    with torch.no_grad():
        target = model(x)[0].numpy()
    np.testing.assert_array_equal(Compiled(tmp_path, np.float32).run(x.numpy()), target)

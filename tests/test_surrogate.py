"""Surrogate gradients: their formulas, by scipy and by hand, and those of one's own in a neuron."""

import abc
import dataclasses
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from definitions import Triangle, gradients, neuron_by_hand, neuron_inputs, run_neuron
from scipy.stats import norm

from snn_lib.kernels import use_backend
from snn_lib.kernels.program import name_of
from snn_lib.surrogate import SURROGATES, FastSigmoid, Gaussian

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
MEMBRANE = torch.linspace(-4.0, 6.0, 101, dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.1, 0.4, 2.0])
def test_gaussian_is_the_normal_density_around_the_threshold(sigma):
    expected = norm.pdf(MEMBRANE.numpy(), loc=1.0, scale=sigma)
    np.testing.assert_allclose(
        Gaussian(sigma).derivative(MEMBRANE), expected, rtol=1e-12, atol=1e-300
    )


@pytest.mark.parametrize("width", [0.1, 0.5])
def test_fast_sigmoid_is_one_at_the_threshold_and_a_quarter_at_its_width(width):
    membrane = torch.tensor([1.0, 1.0 - width, 1.0 + width, 1.0 + 9 * width], dtype=torch.float64)
    derivative = FastSigmoid(width).derivative(membrane)
    np.testing.assert_allclose(derivative, [1.0, 0.25, 0.25, 0.01], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("surrogate", [Gaussian(), FastSigmoid()])
def test_a_surrogate_far_from_the_threshold_is_finite_and_of_the_membrane_s_dtype(surrogate, dtype):
    derivative = surrogate.derivative(torch.tensor([-1e4, 0.0, 1.0, 1e4], dtype=dtype))
    assert derivative.dtype == dtype
    assert torch.isfinite(derivative).all()
    assert (derivative >= 0).all()


def test_surrogates_are_found_by_name_and_cannot_be_changed():
    assert SURROGATES["gaussian"] is Gaussian
    assert SURROGATES["fast_sigmoid"] is FastSigmoid
    assert Gaussian().width == 0.4  # the paper's
    assert FastSigmoid().width == 0.1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Gaussian().width = 1.0


@pytest.mark.parametrize("surrogate", [Gaussian, FastSigmoid])
@pytest.mark.parametrize("width", [-0.4, 0.0, float("nan"), float("inf")])
def test_a_width_that_is_no_positive_number_is_refused(surrogate, width):
    with pytest.raises(ValueError, match=f"width is {width}, expected a positive number"):
        surrogate(width)


# Surrogates of one's own


class OfAClass(abc.ABC):  # noqa: B024 (as some who write protocols do)
    width = 0.8
    derivative = Triangle.derivative


@dataclasses.dataclass(slots=True)
class Slotted:
    width: float = 0.8
    derivative = Triangle.derivative


class Named(NamedTuple):
    width: float = 0.8
    derivative = Triangle.derivative


class Whole:
    def __init__(self, width=1):
        self.width = width

    derivative = Triangle.derivative


class Wider(Gaussian):
    """A subclass that keeps the name of the compiled one."""

    def derivative(self, membrane):
        return 2.0 * super().derivative(membrane)


class OfATensor:
    """What no kernel knows; and so is the next."""

    def __init__(self):
        self.width = torch.tensor(0.8, dtype=torch.float64)

    derivative = Triangle.derivative


class Held:
    """What holds its number in another object, as all layers may share one."""

    def __init__(self):
        self.schedule = OfAClass()

    @property
    def width(self):
        return self.schedule.width

    @width.setter
    def width(self, value):
        self.schedule.width = value

    derivative = Triangle.derivative


class HeldByItsClass(Held):
    def __init__(self):
        pass

    schedule = OfAClass()


class Scheduled(HeldByItsClass):
    """As a schedule, the holder may be called; and so may a class that holds settings."""

    class schedule:
        width = 0.8


class Listed:
    """What holds its number in a list of its class."""

    widths = [0.8]  # noqa: RUF012 (that is the test)

    @property
    def width(self):
        return self.widths[0]

    @width.setter
    def width(self, value):
        self.widths[0] = value

    derivative = Triangle.derivative


class Sorted:
    def derivative(self, membrane):
        order = membrane.argsort(-1)
        return torch.relu(1.0 - torch.abs(membrane.sort(-1).values - 1.0)).gather(
            -1, order.argsort(-1)
        )


class WholeOfAClass:
    width = 1
    derivative = Triangle.derivative


class OwnList:
    """What holds its numbers in a list of its own."""

    def __init__(self, width=0.8):
        self.widths = {"all": [width]}

    @property
    def width(self):
        return self.widths["all"][0]

    @width.setter
    def width(self, value):
        self.widths["all"][0] = value

    derivative = Triangle.derivative


COMPILED = [OfAClass, Slotted, Named, Whole, WholeOfAClass, Wider, Listed, OwnList]
PLAIN = [OfATensor, Held, HeldByItsClass, Scheduled, Sorted]
CHANGED = [
    Triangle,
    OfAClass,
    Slotted,
    Whole,
    WholeOfAClass,
    Held,
    HeldByItsClass,
    Scheduled,
    Listed,
    OwnList,
]


@pytest.mark.parametrize("kind", COMPILED + PLAIN)
@pytest.mark.parametrize("compiling", [False, True])
def test_a_surrogate_of_ones_own_gives_its_own_gradient(kind, compiling):
    inputs, surrogate = neuron_inputs(), kind()
    run = partial(run_neuron, surrogate=surrogate)
    if compiling:
        torch.compiler.reset()
        run = torch.compile(run, backend="aot_eager", fullgraph=kind in COMPILED)
    definition = partial(neuron_by_hand, derivative=surrogate.derivative)
    torch.testing.assert_close(run(*inputs), definition(*inputs), **CLOSE)
    torch.testing.assert_close(gradients(run, inputs), gradients(definition, inputs), **CLOSE)


@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("compiling", [False, True])
def test_an_attribute_that_changes_between_two_calls_takes_effect(kind, compiling, monkeypatch):
    inputs, surrogate = neuron_inputs(), kind()
    run = partial(run_neuron, surrogate=surrogate)
    if compiling:
        torch.compiler.reset()
        run = torch.compile(run, backend="aot_eager")
    gradients(run, inputs)
    name, _ = name_of(surrogate)
    whole = kind in (Whole, WholeOfAClass)
    holder = kind if kind in (OfAClass, WholeOfAClass) else surrogate
    monkeypatch.setattr(holder, "width", 2 if whole else 0.3)
    definition = partial(neuron_by_hand, derivative=surrogate.derivative)
    torch.testing.assert_close(gradients(run, inputs), gradients(definition, inputs), **CLOSE)
    renamed = whole or kind in (Listed, OwnList)
    assert (name_of(surrogate)[0] == name) == (not renamed)  # the same kernel


def test_a_run_that_changed_its_surrogate_s_list_leaves_those_of_later_runs_alone():
    first, inputs = OwnList(0.87), neuron_inputs()
    with use_backend("eager"):  # which asks for the derivative every time
        gradients(partial(run_neuron, surrogate=first), inputs)
        first.width = 0.3  # in place
        gradients(partial(run_neuron, surrogate=first), inputs)
        later = OwnList(0.87)
        definition = partial(neuron_by_hand, derivative=later.derivative)
        found = gradients(partial(run_neuron, surrogate=later), inputs)
    torch.testing.assert_close(found, gradients(definition, inputs), **CLOSE)


def test_a_surrogate_is_not_asked_where_no_gradient_is_needed():
    class Refusing:
        def derivative(self, membrane):
            raise AssertionError

    inputs = neuron_inputs()
    run_neuron(*inputs, surrogate=Refusing())
    with torch.no_grad():
        run_neuron(inputs[0].requires_grad_(), *inputs[1:], surrogate=Refusing())

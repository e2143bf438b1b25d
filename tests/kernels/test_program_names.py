"""Programs: the names of what a step reads."""

import importlib

import pytest
import torch

from snn_lib.kernels.program import Kind, program, register
from snn_lib.surrogate import Gaussian


def step(x, state, coefficients, fire):
    """A membrane whose decay is called as Gaussian's width is."""
    (membrane,), (width,) = state, coefficients
    membrane = width * membrane + x
    return fire(membrane), (membrane,)


def test_a_coefficient_may_be_called_as_a_number_of_the_surrogate():
    register(Kind("same name", step, ("membrane",), ("width",)))
    made = program("same name[-;-]")
    inputs = made.inputs(Gaussian.name)
    assert len(set(inputs)) == len(inputs) == 5  # x, kept, the state, the decay, the width
    assert len(made.adjoint(Gaussian.name).results) == 5


def scale(x, state, coefficients, fire):
    (gain,) = coefficients
    return gain * x, ()


def test_what_a_cell_without_a_state_hands_on_is_rounded_too():
    register(Kind("gain", scale, (), ("gain",)))
    x, one = torch.tensor([1.01]), torch.ones(1)
    output, _ = program("gain[;-]~gain[;-]").step(x, None, [], [one, one], None)
    assert output == x.bfloat16().float() != x


def double(x, state, coefficients, fire):
    (gain,) = coefficients
    return 2.0 * gain * x, ()


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_a_cell_that_is_defined_anew_computes_what_is_new(name):
    backend = importlib.import_module(f"snn_lib.kernels.{name}")
    one = torch.ones(1, 1, 1)
    for step, expected in ((scale, 1.0), (double, 2.0)):
        register(Kind("anew", step, (), ("gain",)))
        output, *_ = backend.forward(
            "anew[;-]", one, one[0], None, None, 0.0, None, one.dtype, False
        )
        assert output.item() == expected

"""Programs: the names of what a step reads."""

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

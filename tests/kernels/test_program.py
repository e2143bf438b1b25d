"""Programs: the names of what a step reads."""

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

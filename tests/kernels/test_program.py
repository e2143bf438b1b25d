"""Programs: keys, names, neighbours, and what a step must not read."""

import importlib
import re

import numpy as np
import pytest
import torch

from snn_lib import FastSigmoid, Gaussian
from snn_lib.kernels import eager
from snn_lib.kernels.inputs import Inputs
from snn_lib.kernels.program import (
    Kind,
    key_of,
    name_of,
    parameters,
    program,
    register,
    surrogate_of,
)


def decaying(x, state, coefficients, fire):
    (past, scale), (lambda_, weights) = state, coefficients
    v = lambda_ * scale + weights[0] * x + weights[1] * past[0]
    spikes = fire(v)
    return spikes, ((*past, x)[1:], v - spikes)


register(Kind("Decaying", decaying, ("x", "dropout_scale"), ("lambda", "x")))
KEY = "Decaying[2,-;-,2]"
FILTER, NEURON = "IIRSynapse[1,0;1,1]", "SpikingNeuron[-,-;-,-,-]"


def test_a_key_names_a_cell_and_its_rows():
    assert key_of("Decaying", (2, None), (None, 2)) == KEY
    made = program(KEY)
    assert made is program(KEY)
    (cell,) = made.cells
    assert (cell.states, cell.coefficients) == ((2, None), (None, 2))
    assert (made.spikes, made.fires) == ([True], [True])


def test_a_module_s_name_may_have_the_signs_of_a_key():
    """A script whose file is called so is imported where its network is loaded."""
    name = register(Kind("lif+a~b[1;2].Mine", decaying, ("v", "scale"), ("decay", "gains")))
    key = key_of(name, (2, None), (None, 2))
    both = program(f"{key}+{FILTER}")
    assert [cell.kind.name for cell in both.cells] == [name, "IIRSynapse"]
    assert both.cells[0].kind.step is decaying


def test_names_that_clash_or_are_python_s_keywords_are_changed():
    made = program(KEY)
    assert made.states == ["x_0", "x_1", "dropout_scale_"]
    assert made.coefficients == ["lambda_", "x_0_", "x_1_"]
    assert made.inputs() == ["x", "dropout_scale", *made.states, *made.coefficients]
    both = program(f"{FILTER}+{FILTER}")
    assert both.states == ["past_output_0", "past_output_0_"]
    assert both.coefficients == ["alpha_0", "beta_0", "alpha_0_", "beta_0_"]


def test_a_coefficient_may_have_the_name_of_a_surrogate_s_number():
    def step(x, state, coefficients, fire):
        (membrane,), (width,) = state, coefficients
        membrane = width * membrane + x
        return fire(membrane), (membrane,)

    register(Kind("same name", step, ("membrane",), ("width",)))
    made = program("same name[-;-]")
    inputs = made.inputs("gaussian")
    assert len(set(inputs)) == len(inputs) == 5  # x, dropout_scale, the state, the decay, the width
    assert len(made.adjoint("gaussian").results) == 5


@pytest.mark.parametrize("key", ["Nothing[-;-]", f"{FILTER}+Nothing[-;-]", "", "__import__('os')"])
def test_a_key_that_names_no_cell_is_refused(key):
    with pytest.raises(ValueError, match=r"no cell is called .*: import its module, or name it"):
        program(key)


def test_a_step_that_returns_other_states_than_it_has_is_refused():
    def step(x, state, coefficients, fire):
        return x, (x,)

    register(Kind("Forgetful", step, ("v", "w"), ()))
    words = (
        "step of Forgetful returns 1 rows of states, expected 2, in the order of its states: v, w"
    )
    with pytest.raises(ValueError, match=words):
        program("Forgetful[-,-;]")


@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_cells_of_one_name_keep_a_step_each(name):
    backend, x = importlib.import_module(f"snn_lib.kernels.{name}"), torch.ones(1, 1, 1)
    factors = {}
    for factor in (2.0, 3.0, 4.0):
        scope = {}
        exec(f"def step(x, state, coefficients, fire): return {factor} * x, ()", scope)
        factors[register(Kind(f"Anew {name}", scope["step"], (), ()))] = factor
    assert list(factors) == [f"Anew {name}", f"Anew {name}#2", f"Anew {name}#3"]
    for kind, factor in factors.items():
        assert backend.forward(Inputs(f"{kind}[;]", x, x[:0, 0]))[0].item() == factor
        assert [line.arguments for line in program(f"{kind}[;]").forward.lines] == [("x", factor)]


def test_two_neighbours_compute_what_they_compute_one_after_the_other():
    x, coefficients = 2 * torch.randn(9, 2, 3), torch.rand(5, 3)
    filtered, past = eager.run(Inputs(FILTER, x, coefficients[:2]))
    spikes, after = eager.run(Inputs(NEURON, filtered, coefficients[2:]))
    both = program(f"{FILTER}+{NEURON}")
    assert (both.spikes, both.fires) == ([False, True], [False, True])
    found = eager.run(Inputs(both.key, x, coefficients))
    torch.testing.assert_close(found, (spikes, torch.cat([past, after])), rtol=0.0, atol=0.0)
    rounded, _ = eager.run(Inputs(NEURON, filtered.bfloat16(), coefficients[2:]))
    found, _ = eager.run(Inputs(f"{FILTER}~{NEURON}", x, coefficients))
    assert torch.equal(found, rounded)


def test_the_output_of_a_cell_without_a_state_is_rounded_too():
    def scale(x, state, coefficients, fire):
        return coefficients[0] * x, ()

    register(Kind("gain", scale, (), ("gain",)))
    x, one = torch.tensor([1.01]), torch.ones(1)
    output, _ = program("gain[;-]~gain[;-]").step(x, None, [], [one, one], None)
    assert output == x.bfloat16().float() != x


def test_dropout_changes_what_the_next_cell_sees_and_not_the_neuron_itself():
    """In front of a filter, say; the neuron's own state sees them whole."""
    x, coefficients = 2 * torch.rand(9, 2, 3), torch.rand(5, 3)
    drop = {"dropout": 0.5, "seed": torch.tensor([5, 0])}
    spikes, after = eager.run(Inputs(NEURON, x, coefficients[:3], **drop))
    filtered, past = eager.run(Inputs(FILTER, spikes, coefficients[3:]))
    found = eager.run(Inputs(f"{NEURON}+{FILTER}", x, coefficients, **drop))
    torch.testing.assert_close(found, (filtered, torch.cat([after, past])), rtol=0.0, atol=0.0)


class Odd:
    def derivative(self, membrane):
        return torch.erf(membrane)


def test_a_program_says_whether_kernels_can_compute_it():
    def odd(x, state, coefficients, fire):
        return fire(torch.erf(x)), ()

    def wrong(x, state, coefficients, fire):
        return x if fire(x) > 0 else -x, ()

    unknown, refused = (register(Kind("tried", step, (), ())) for step in (odd, wrong))
    assert program(NEURON).has_kernels("gaussian")
    assert program(NEURON).has_kernels()
    assert not program(NEURON).has_kernels(name_of(Odd())[0])
    assert not program(f"{unknown}[;]").has_kernels()
    with pytest.raises(ValueError, match="course depends on values"):
        program(f"{refused}[;]").has_kernels()


@pytest.mark.parametrize("held", [0.4, np.float32(0.4), np.int64(1), [0.4, (1, "a")], None, {}])
def test_a_surrogate_that_holds_plain_values_has_kernels(held):
    class Holding(FastSigmoid):
        pass

    surrogate = Holding(0.3)
    object.__setattr__(surrogate, "held", held)
    assert program(NEURON).has_kernels(name_of(surrogate)[0])
    object.__setattr__(surrogate, "held", [object()])
    assert not program(NEURON).has_kernels(name_of(surrogate)[0])


def test_surrogates_are_known_by_name_and_numbers():
    assert name_of(Gaussian(0.3)) == ("gaussian", [0.3])
    assert name_of(FastSigmoid(0.2)) == ("fast_sigmoid", [0.2])
    assert parameters("gaussian") == ["surrogate.width"]
    assert surrogate_of("gaussian", [0.3]) == Gaussian(0.3)
    assert program(NEURON).inputs("gaussian")[-1] == "surrogate.width"
    name, numbers = name_of(Odd())
    assert re.match(r".*Odd-", name)
    assert type(surrogate_of(name, numbers)) is Odd
    for call in (lambda: surrogate_of("arctan", []), lambda: parameters("arctan")):
        with pytest.raises(ValueError, match="no surrogate is called 'arctan': expected gaussian"):
            call()
    with pytest.raises(TypeError, match="expected an object with derivative"):
        name_of("gaussian")

"""``python -m snn_lib.kernels --show CELL``."""

import runpy
import sys

import pytest

from snn_lib import DualExponentialSynapse, LowPassSynapse, ResonantSynapse
from snn_lib.kernels.listing import listing


def test_a_step_and_its_adjoint_are_written_with_the_cells_own_names():
    step, adjoint = listing("SpikingNeuron+IIRSynapse").split("Its adjoint")
    assert step.splitlines()[1:4] == [
        "    _0 = membrane_decay * membrane",
        "    _1 = _0 + x",
        "    membrane' = _1 - reset",
    ]
    assert "\n    _4 = where(_3, 1, 0)\n" in step
    assert "\n    past_output_0' = past_output_1\n    past_output_1' = output\n" in step
    assert "\n    d_membrane = d_x * membrane_decay\n" in adjoint
    assert " = exp(" in adjoint
    assert "\n    d_past_output_1 = d_past_output_0' + _" in adjoint


@pytest.mark.parametrize(
    "synapse",
    [LowPassSynapse(3, 4.0), DualExponentialSynapse(3, 4.0, 2.0), ResonantSynapse(3, 4.0, 0.1)],
)
def test_a_synapse_is_shown_with_as_many_rows_as_it_has(synapse):
    assert listing(type(synapse).__name__) == listing(synapse.key)


OWN = """
from snn_lib.kernels.program import Kind, register
def step(x, state, coefficients, fire):
    (v,), (decay,) = state, coefficients
    v = decay * v + x
    return fire(v), (v,)
register(Kind("own_cell.Own", step, ("v",), ("decay",)))
"""


def show(cell, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels", "--show", cell])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("snn_lib.kernels", run_name="__main__")
    return end.value.code, *capsys.readouterr()


def test_the_command_finds_a_cell_in_a_file_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_cell.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = show("own_cell.Own", monkeypatch, capsys)
    assert code is None
    assert "\n    v' = _0 + x\n" in out
    (tmp_path / "with_orders.py").write_text(OWN.replace("own_cell", "with_orders"))
    assert show("with_orders.Own[-;-]", monkeypatch, capsys)[0] is None


ROWS = """
from snn_lib.kernels.program import Kind, register
def step(x, state, coefficients, fire):
    (v,), (k,) = state, coefficients
    v = k[0] * v + k[1] * x
    return fire(v), (v,)
register(Kind("cell_of_rows.Two", step, ("v",), ("k",)))
"""


@pytest.mark.parametrize("brackets", ["", "[-;1]", "[2]", "[-;two]"])
def test_rows_of_another_number_are_refused_in_a_line_that_says_which_were_taken(
    brackets, tmp_path, monkeypatch, capsys
):
    (tmp_path / "cell_of_rows.py").write_text(ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    assert show("cell_of_rows.Two[-;2]", monkeypatch, capsys)[0] is None
    code, _, line = show(f"cell_of_rows.Two{brackets}", monkeypatch, capsys)
    assert (code, line.count("\n")) == (2, 1)
    rows = f"cell_of_rows.Two{brackets or '[-;-]'}"
    assert line.endswith(f" (with these rows of each state and coefficient: {rows})\n")


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("./mine.Cell", "./mine.Cell is no cell, expected its name, or module.Class"),
        ("Delay", "Delay has no step to show, expected a cell"),
        ("snn_lib.Recurrent", "snn_lib.Recurrent has no step to show, expected a cell"),
        ("Unheard", "no cell is called 'Unheard': import its module, or name it module.Class"),
        ("Unheard[-;-]", "no cell is called 'Unheard': import its module, or name it module.Class"),
        ("no_module.Cell", "No module named 'no_module'"),
    ],
)
def test_a_cell_that_does_not_exist_is_refused_in_a_line(cell, reason, monkeypatch, capsys):
    assert show(cell, monkeypatch, capsys) == (2, "", f"{reason}\n")

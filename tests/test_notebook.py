"""The notebook runs in a fresh kernel, and what is committed is what it shows.

``python tests/test_notebook.py`` runs it and writes the new outputs into it, as is needed when the
pretrained model or a figure has changed.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "associative_memory.ipynb"
PRETRAINED = ROOT / OmegaConf.load(ROOT / "associative_memory.yaml").test_checkpoint_path
LARGEST = 2 * 2**20  # bytes


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook):
    """Runs all cells in a new kernel, and replaces their outputs."""
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=300,
        record_timing=False,
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute()
    del notebook.metadata.language_info["version"]  # differs from machine to machine


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def draws(cell):
    return "plotting." in cell.source


def images(cell):
    return [output for output in cell.outputs if "image/png" in output.get("data", {})]


def printed(cell, stream="stdout"):
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == stream)


@pytest.fixture(scope="module")
def committed():
    return read()


@pytest.fixture(scope="module")
def executed():
    if not PRETRAINED.exists():
        pytest.skip(f"there is no pretrained model {PRETRAINED.relative_to(ROOT)}")
    notebook = read()
    execute(notebook)
    return notebook


@pytest.mark.parametrize("state", ["committed", "executed"])
def test_every_plotting_cell_shows_one_picture_and_nothing_went_wrong(state, request):
    notebook = request.getfixturevalue(state)
    assert sum(map(draws, code(notebook))) >= 8
    for number, cell in enumerate(code(notebook), 1):
        assert cell.execution_count == number
        assert len(images(cell)) == draws(cell), cell.source
        assert printed(cell, "stderr") == ""
        assert all(output.output_type != "error" for output in cell.outputs)


def test_committed_outputs_are_those_of_the_pretrained_model(committed, executed):
    model, fresh = code(committed)[0], code(executed)[0]
    assert re.search(r"trained for \d+ epochs to a validation loss of 0\.\d{5}", printed(model))
    assert printed(model) == printed(fresh)


def test_committed_notebook_tells_nothing_of_the_machine_that_ran_it(committed):
    assert NOTEBOOK.stat().st_size < LARGEST
    assert committed.metadata.kernelspec.name == "python3"
    assert "version" not in committed.metadata.get("language_info", {})
    for cell in committed.cells:
        assert cell.metadata == {}
        for output in cell.get("outputs", []):
            texts = [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
            assert not re.search(r"(^|[\s'\"(=])(/|~|[A-Za-z]:\\)", "\n".join(texts)), texts


def test_all_definitions_are_imported(committed):
    source = "\n".join(cell.source for cell in code(committed))
    assert not re.search(r"^\s*(def|class)\s", source, re.MULTILINE)


if __name__ == "__main__":
    notebook = read()
    execute(notebook)
    nbformat.write(notebook, NOTEBOOK)

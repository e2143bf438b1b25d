"""The notebooks run in a fresh kernel, and what is committed is what they show.

``python tests/test_notebook.py`` runs them and writes the new outputs into them, as is needed when
a pretrained model, a figure or a layer has changed.
"""

import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
MEMORY, TUTORIAL, SERIES = "associative_memory", "tutorial", "time_series"
PRETRAINED = ROOT / OmegaConf.load(ROOT / "associative_memory.yaml").test_checkpoint_path
PICTURES = {MEMORY: 8, TUTORIAL: 5, SERIES: 1}  # at least
LARGEST = {MEMORY: 2 * 2**20, TUTORIAL: 2**20, SERIES: 2**18}  # bytes

FIRST_USE = "first use: compiling for this CPU (some seconds)\n"  # in a fresh clone

every = pytest.mark.parametrize("name", [MEMORY, TUTORIAL, SERIES])


def path_of(name):
    return ROOT / f"{name}.ipynb"


def read(name):
    return nbformat.read(path_of(name), as_version=4)


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


@cache
def executed(name):
    if name == MEMORY and not PRETRAINED.exists():
        pytest.skip(f"there is no pretrained model {PRETRAINED.relative_to(ROOT)}")
    if name == SERIES:
        pytest.importorskip("aeon")
    notebook = read(name)
    for cell in code(notebook):  # the sweeps over all kinds of damage, on a sample of each pattern
        cell.source = cell.source.replace("samples=4", "samples=1")
    execute(notebook)
    return notebook


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def draws(cell):
    return re.search(r"= (plotting\.|plt\.subplots)|^plotting\.", cell.source, re.M) is not None


def images(cell):
    kinds = {"image/png", "image/gif"}
    return [output for output in cell.outputs if kinds & {*output.get("data", {})}]


def printed(cell, stream="stdout"):
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == stream)


@every
@pytest.mark.parametrize("state", [read, executed])
def test_every_plotting_cell_shows_one_picture_and_nothing_went_wrong(name, state):
    notebook = state(name)
    assert sum(map(draws, code(notebook))) >= PICTURES[name]
    for number, cell in enumerate(code(notebook), 1):
        assert cell.execution_count == number
        assert len(images(cell)) == draws(cell), cell.source
        said = printed(cell, "stderr")
        assert said == "" or (state is executed and said == FIRST_USE)
        assert all(output.output_type != "error" for output in cell.outputs)


@every
def test_committed_notebook_tells_nothing_of_the_machine_that_ran_it(name):
    committed = read(name)
    assert path_of(name).stat().st_size < LARGEST[name]
    assert committed.metadata.kernelspec.name == "python3"
    assert "version" not in committed.metadata.get("language_info", {})
    for cell in committed.cells:
        assert cell.metadata == {}
        for output in cell.get("outputs", []):
            texts = [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
            assert not re.search(r"(^|[\s'\"(=])(/|~|[A-Za-z]:\\)", "\n".join(texts)), texts


def test_committed_outputs_are_those_of_the_pretrained_model():
    model, fresh = code(read(MEMORY))[0], code(executed(MEMORY))[0]
    assert re.search(r"trained for \d+ epochs to a validation loss of 0\.\d{5}", printed(model))
    assert printed(model) == printed(fresh)


def test_the_associative_memory_imports_all_definitions():
    source = "\n".join(cell.source for cell in code(read(MEMORY)))
    assert not re.search(r"^\s*(def|class)\s", source, re.MULTILINE)


@pytest.mark.parametrize("state", [read, executed])
def test_the_tutorial_s_network_learns_what_one_without_memory_cannot(state):
    text = "\n".join(map(printed, code(state(TUTORIAL))))
    with_memory, without = map(float, re.findall(r"test accuracy ([\d.]+)%", text))
    assert with_memory > 95
    assert 35 < without < 65


@pytest.mark.parametrize("state", [read, executed])
def test_the_estimator_is_as_good_as_minirocket_and_its_stream_ends_right(state):
    text = "\n".join(map(printed, code(state(SERIES))))
    found = [
        float(re.search(rf"{name}: ([\d.]+)", text)[1]) for name in ("Classifier", "MiniRocket")
    ]
    assert found[0] > found[1] - 0.02 > 0.9
    assert re.search(r"class (\d), and it is class \1", text)


if __name__ == "__main__":
    for name in (MEMORY, TUTORIAL, SERIES):
        notebook = read(name)
        execute(notebook)
        nbformat.write(notebook, path_of(name))

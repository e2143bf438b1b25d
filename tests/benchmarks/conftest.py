"""What the tests of the benchmarks share. None of them asks how fast anything is."""

import csv

import pytest
from running import ROOT, forkserver, run_script

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    """Benchmarks import each other, as scripts of one folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def run_smoke(monkeypatch):
    """Runs a benchmark in this process; gives the rows of its CSV, and what it printed."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    forkserver()  # whose processes the benchmarks use

    def run(name, folder, *flags, chart=True):
        output = folder / "new" / name
        options = ["--smoke", "--threads", "1", "--device", "cpu", "--output", output, *flags]
        monkeypatch.chdir(folder)
        finished = run_script(BENCHMARKS / f"{name}.py", *options)
        assert finished.code == 0, finished.err
        if chart:
            assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        with output.with_suffix(".csv").open(newline="") as file:
            return list(csv.DictReader(file)), finished.out

    yield run
    plt.close("all")

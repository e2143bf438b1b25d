"""The README: its code runs as it stands there."""

import re
import runpy
import shlex
import signal
import sys

import pytest
import torch
from reading import ROOT, blocks

README = ROOT / "README.md"


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """The README's Python blocks as files in a folder of their own, which is entered."""
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / f"block_{number}.py" for number in (1, 2, 3, 4)]
    for path, block in zip(paths, blocks(README, "python"), strict=True):
        path.write_text(block)
    return paths


def test_the_first_network_learns_and_a_trained_one_classifies(scripts, monkeypatch):
    torch.manual_seed(0)
    names = runpy.run_path(str(scripts[0]))
    right = (names["output"].mean(0).argmax(1) == names["y"]).float().mean()
    assert right > 0.9
    assert names["output"].shape == (40, 64, 2)
    monkeypatch.chdir(ROOT)
    loaded = runpy.run_path(str(scripts[1]))
    assert len(loaded["names"]) == 2
    assert set(loaded["names"]) <= set("0123456789")
    assert loaded["scores"].shape == (2, 10)


def test_the_estimator_fits_and_scores_a_built_in_set(scripts, capsys):
    pytest.importorskip("aeon")
    runpy.run_path(str(scripts[2]))
    assert float(capsys.readouterr().out) > 0.8


def test_your_own_data_is_learned_by_the_command_that_follows(scripts, monkeypatch, capsys):
    (command,) = (line for line in README.read_text().splitlines() if "python rising" in line)
    scripts[3].rename("rising.py")
    monkeypatch.setattr(sys, "argv", [*shlex.split(command)[1:], "device=cpu"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path("rising.py", run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert float(re.search(r"test .*accuracy ([\d.]+) %", printed)[1]) > 90

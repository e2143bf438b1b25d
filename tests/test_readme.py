"""The README: its code runs as it stands there."""

import re
import runpy
import shlex

import pytest
import torch
from reading import ROOT, blocks
from running import run_script

README = ROOT / "README.md"


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """The README's Python blocks as files in a folder of their own, which is entered."""
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / f"block_{number}.py" for number in (1, 2, 3, 4)]
    for path, block in zip(paths, blocks(README, "python"), strict=True):
        path.write_text(block)
    return paths


def test_the_first_network_learns_and_a_trained_one_classifies(scripts, monkeypatch, capsys):
    torch.manual_seed(0)
    names = runpy.run_path(str(scripts[0]))
    right = (names["output"].mean(0).argmax(1) == names["y"]).float().mean()
    assert right > 0.9
    assert capsys.readouterr().out == f"accuracy {right:.0%}\n"
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


def test_your_own_data_is_learned_by_the_command_that_follows(scripts):
    (command,) = (line for line in README.read_text().splitlines() if "python rising" in line)
    _, name, *arguments = shlex.split(command)
    finished = run_script(scripts[3].rename(name).resolve(), *arguments, "device=cpu")
    assert finished.code == 0, finished.err
    assert float(re.search(r"test .*accuracy ([\d.]+) %", finished.out)[1]) > 90

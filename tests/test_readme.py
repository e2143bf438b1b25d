"""The README: its code runs as it stands there, and it is as short as it promises to be."""

import re
import runpy
import shlex
import signal
import sys

import pytest
from reading import ROOT, blocks

README = ROOT / "README.md"


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """The README's Python blocks as files in a folder of their own, which is entered."""
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / f"block_{number}.py" for number in (1, 2)]
    for path, block in zip(paths, blocks(README, "python"), strict=True):
        path.write_text(block)
    return paths


def test_every_layer_of_the_network_of_your_own_fires_and_learns(scripts):
    names = runpy.run_path(str(scripts[0]))
    assert names["rates"] == pytest.approx({"2": 0.05, "5": 0.05}, rel=0.2)
    assert all(parameter.grad.abs().sum() > 0 for parameter in names["model"].parameters())
    assert names["spikes"].shape == (40, 16, 10)
    assert names["spikes"].mean().item() == pytest.approx(names["rates"]["5"])


def test_your_own_data_is_learned_by_the_command_that_follows(scripts, monkeypatch, capsys):
    (command,) = (line for line in README.read_text().splitlines() if "python rising" in line)
    scripts[1].rename("rising.py")
    monkeypatch.setattr(sys, "argv", [*shlex.split(command)[1:], "device=cpu"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path("rising.py")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert float(re.search(r"test .*accuracy ([\d.]+) %", printed)[1]) > 90

"""How much is compiled for all pretrained networks, and that a second process compiles nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llvmlite")

ROOT = Path(__file__).parents[1]
RUN = """
import sys
from pathlib import Path
import torch
from numba.core import event
from snn_lib.kernels import disk
disk._folders = lambda: iter([Path(sys.argv[1])])
import snn_lib
from snn_lib.inference import compiled
from snn_lib.kernels.cpu import library

kernels, compile_source, functions = [], library._compile, event.RecordingListener()
library._compile = lambda source: kernels.append(source) or compile_source(source)
event.register("numba:compile", functions)
folders = Path("checkpoint"), Path("associative_memory_checkpoint")
paths = [p for folder in folders for p in folder.glob("pretrained*") if not p.suffix]
for path in sorted(paths):
    network = snn_lib.load(path)
    compiled(network)  # of the stream
    network.train()  # of a training step
    output, _ = network(torch.rand(1, 2, *network.preparation.features))
    output.sum().backward()
print(len(paths), len(kernels), len({*kernels}), len(functions.buffer))
"""


def test_networks_share_their_kernels_and_a_second_process_compiles_none(tmp_path):
    """Networks differ in their sizes, weights, time constants and rates of dropout."""
    counts = []
    for _ in range(2):
        command = [sys.executable, "-c", RUN, str(tmp_path)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stderr
        counts.append([int(count) for count in run.stdout.split()])
    (networks, kernels, different, _), (_, *again) = counts
    assert networks >= 17
    assert kernels == different == 26  # three of them for products of spikes, four for convolutions
    assert again == [0, 0, 0]

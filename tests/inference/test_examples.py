"""The examples run an exported network without this library and say what PyTorch says."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from running import ROOT, shell
from small_networks import spike_trains, two_layers

from snn_lib.inference import to_onnx
from snn_lib.readout import READOUTS

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
CLASSES = ["a", "b", "c", "d", "e"]
WITHOUT_SNN_LIB = "import sys; sys.modules['torch'] = sys.modules['snn_lib'] = None; "


def exported(folder, readout, dtype=torch.float32, classes=CLASSES):
    """The file of a network, a stream for it as text, and the classes that PyTorch names."""
    model, x = two_layers()[:-1].to(dtype).eval(), spike_trains(batch=1).to(dtype)
    model.readout = readout
    to_onnx(model, folder / "network.onnx", classes=classes)
    with torch.no_grad():
        output = model(x)[0]
        answers = [READOUTS[readout]()(output[:end]).argmax().item() for end in range(1, 26)]
    assert len(set(answers)) > 1
    lines = "".join(json.dumps(step.tolist()) + "\n" for step in x[:, 0])
    return folder / "network.onnx", lines, answers


def printed(command, lines, **options):
    run = subprocess.run(
        command, input=lines, capture_output=True, text=True, timeout=60, check=False, **options
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


KNOWN = ["count", "mean", "last", "maximum"]
CASES = [*((name, torch.float32) for name in KNOWN), ("mean", torch.float64)]
each = pytest.mark.parametrize(("readout", "dtype"), CASES)


@each
def test_the_python_example_names_the_classes_that_pytorch_names(tmp_path, readout, dtype):
    network, lines, answers = exported(tmp_path, readout, dtype)
    script = ROOT / "examples" / "stream_onnx.py"
    code = f"{WITHOUT_SNN_LIB} import runpy; runpy.run_path({str(script)!r})"
    found = printed([sys.executable, "-c", code, str(network)], lines, cwd=tmp_path)
    assert found == [CLASSES[answer] for answer in answers]


def test_the_python_example_counts_classes_that_have_no_names(tmp_path):
    network, lines, answers = exported(tmp_path, "mean", classes=None)
    found = printed([sys.executable, "examples/stream_onnx.py", str(network)], lines, cwd=ROOT)
    assert found == list(map(str, answers))


def test_the_python_example_asks_for_a_readout_that_it_does_not_know(tmp_path):
    network, *_ = exported(tmp_path, "leaky")
    refused = shell(sys.executable, "examples/stream_onnx.py", network, input="")
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert refused.err == (
        "the readout is 'leaky', and this script knows count, mean, last and maximum\n"
    )
    assert shell(sys.executable, "examples/stream_onnx.py", network, "last", input="").code == 0


def test_the_python_example_refuses_a_step_of_the_wrong_size_in_a_line(tmp_path):
    network, lines, _ = exported(tmp_path, "mean")
    first = lines.splitlines()[0]
    for wrong in ("[1, 2]", "[1, [2]]", '{"x": 1}', "nothing", ""):
        stream = f"{first}\n{wrong}\n"
        refused = shell(sys.executable, "examples/stream_onnx.py", network, input=stream)
        assert (refused.code, refused.err.count("\n")) == (1, 1)
        assert refused.err.startswith(f"line 2 is {wrong!r}, expected a JSON list of ")


@each
def test_the_node_example_names_the_classes_that_pytorch_names(tmp_path, readout, dtype):
    """Where Node.js finds onnxruntime-node, as in a folder that NODE_PATH names."""
    node = shutil.which("node")
    probe = [node or "node", "-e", "require('onnxruntime-node')"]
    if node is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no onnxruntime-node: npm install onnxruntime-node, and NODE_PATH")
    network, lines, answers = exported(tmp_path, readout, dtype)
    script = ROOT / "examples" / "stream_onnx.js"
    assert printed([node, str(script), str(network), readout], lines) == list(map(str, answers))


STUB = """
exports.Tensor = class {
  constructor(type, data, dims) {
    Object.assign(this, { type, data, dims });
  }
};
const of = (name) => ({ name, type: "float32", shape: ["batch", 2, 2] });
const run = async ({ x, s }) => {
  const data = x.data.map((value, n) => value - s.data[n] / 2);
  return { y: { data }, "s.next": new exports.Tensor("float32", data, s.dims) };
};
const session = { inputMetadata: [of("x"), of("s")], inputNames: ["x", "s"], run };
exports.InferenceSession = { create: async () => session };
"""


@pytest.mark.parametrize("readout", KNOWN)
def test_the_node_example_hands_on_the_state_and_reads_out(tmp_path, readout):
    """Where there is Node.js, with a network y[t] = x[t] - y[t-1] / 2 in the place of a file."""
    node = shutil.which("node") or pytest.skip("no Node.js")
    (tmp_path / "onnxruntime-node.js").write_text(STUB)
    steps, y, outputs = torch.randn(25, 2, 2), torch.zeros(2, 2), []
    for x in steps:
        outputs.append(y := x - y / 2)
    output = torch.stack(outputs)[:, None].flatten(2)
    answers = [READOUTS[readout]()(output[:end]).argmax().item() for end in range(1, 26)]
    lines = "".join(json.dumps(step.tolist()) + "\n" for step in steps)
    script = ROOT / "examples" / "stream_onnx.js"
    command = [node, str(script), "network.onnx", readout]
    found = printed(command, lines, env={**os.environ, "NODE_PATH": str(tmp_path)})
    assert found == list(map(str, answers))


HOST = r"""
#include <stdio.h>
#include "start.h"
void print(const char *text) { fputs(text, stdout); }
void print_number(uint32_t number) { printf("%u", (unsigned)number); }
uint32_t ticks(void) { return 0; }
"""


def copied_example(folder):
    """A copy of the microcontroller's program, and what it reads beside it."""
    shutil.copytree(ROOT / "examples" / "microcontroller", folder / "examples" / "microcontroller")
    for name in ("snn_lib", "checkpoint", "dataset", "snn_mlp_1.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder / "examples" / "microcontroller"


def assert_digits_are_read(printed):
    read = re.findall(r"a (\d) is read as (\d) after (\d+) steps", printed)
    assert [(a, b) for a, b, _ in read] == [(digit, digit) for digit in "72104"]
    assert all(int(steps) <= 4 for _, _, steps in read)


def test_the_program_of_the_microcontroller_reads_digits_on_this_machine_too(tmp_path):
    folder = copied_example(tmp_path)
    written = shell(sys.executable, folder / "export.py", cwd=folder)
    assert written.code == 0, written.err
    (folder / "start.c").write_text(HOST)
    sources = "main.c", "network.c", "start.c"
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    subprocess.run([compiler, "-std=c99", "-O2", *sources, "-o", "program"], cwd=folder, check=True)
    assert_digits_are_read(shell(folder / "program").out)


def test_the_microcontroller_example_reads_digits(tmp_path):
    """Where there is a compiler for one and QEMU: the example as it stands, in a copy."""
    tools = "make", "arm-none-eabi-gcc", "qemu-system-arm"
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"no {', '.join(missing)}")
    folder = copied_example(tmp_path)
    subprocess.run(["make", "clean"], cwd=folder, check=True, capture_output=True)
    command = ["make", "run", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_digits_are_read(done.stdout + done.stderr)

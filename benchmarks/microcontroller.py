"""How many instructions does a network take on a microcontroller? All pretrained ones, emulated.

    apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm
    python benchmarks/microcontroller.py

Every pretrained network is written as C in floats and in integers of 8 and 4 bits, compiled for a
Cortex-M4 and run by QEMU, which counts instructions: the count is the same in every run. It is not
a time: QEMU knows neither caches nor how long an instruction takes. Beside them is the dense ReLU
network of snn_mlp_1's size, by the same source and with the same integers, which skips zeros. It
has random weights, but as many units are active as in the trained one. Networks that count their
output spikes also run until one class is two spikes ahead. The classes are compared with those
that the network names here. Saves a row for each (CSV); what has its row is left out.
"""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from integers import calibration
from measuring import ROOT, earlier_rows, options
from pretrained import NAMES, load

import snn_lib
from snn_lib.files import write_csv
from snn_lib.inference import IntegerNetwork, quantise
from snn_lib.inference.c_source import write_c
from snn_lib.inference.integers import integer_stages
from snn_lib.inference.stages import Rows, Stage, Step, Windows
from snn_lib.inference.staging import StagedNetwork, raw_steps, read_stages
from snn_lib.kernels.trace import Line, Trace

MOST, STEPS = 50, 1500  # samples, and steps of all of them together
LEAD, INSTRUCTIONS_A_TICK = 2, 40
DENSE, BITS = "dense network", (32, 8, 4)
BOARD = ROOT / "examples" / "microcontroller"
GCC = (
    *("arm-none-eabi-gcc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-O2"),
    *("-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"),
)
QEMU = (
    *("qemu-system-arm", "-M", "mps2-an386", "-cpu", "cortex-m4", "-icount", "shift=0"),
    *("-semihosting", "-nographic", "-kernel"),
)
MAIN = """
#include "network.h"
#include "samples.h"
#include "start.h"

static network_state state;
static network_input x[NETWORK_INPUTS];
static network_output y[NETWORK_OUTPUTS];

static void classify(int32_t sample, int until_clear)
{
    uint32_t total = 0;
    int32_t steps = 0, clear = 0;
    network_reset(&state);
    while (steps < STEPS && !clear) {
        for (int32_t n = 0; n < NETWORK_INPUTS; n++)
            x[n] = (network_input)(samples[sample][steps % STORED][n] * SCALE);
        const uint32_t begin = ticks();
        network_step(&state, x, y);
        total += (ticks() - begin) & 0xFFFFFF;
        steps++;
        clear = until_clear && network_lead(&state) >= LEAD;
    }
    print("\\nsample ");
    print_number((uint32_t)network_class(&state));
    print(" ");
    print_number((uint32_t)steps);
    print(" ");
    print_number(total);
}

int main(void)
{
    print("state ");
    print_number(sizeof state);
    for (int32_t sample = 0; sample < SAMPLES; sample++)
        for (int until_clear = 0; until_clear <= (LEAD > 0); until_clear++)
            classify(sample, until_clear);
    print("\\n");
    return 0;
}
"""
WITHOUT_CLASSES = """
#define network_class(state) ((void)(state), 0)
#define network_lead(state) ((void)(state), 0)
"""


@dataclass
class Subject:
    """A network to be run.

    Attributes:
        read: as it is written.
        samples: what it is given, in integers ``(T, B, inputs)``.
        scale: what a 1 of them stands for; 1 if the network takes the integers.
        counts: whether it counts output spikes, and may stop early.
        classes: those that it is to name, ``(B,)``.
    """

    read: StagedNetwork
    samples: np.ndarray
    scale: float
    counts: bool
    classes: np.ndarray


def subjects(name: str, chosen: Any, samples: int) -> dict[int, Subject]:
    """A pretrained network in floats and in integers, by the bits of its weights."""
    network = snn_lib.load(next(ROOT.glob(f"*checkpoint/pretrained_{name}")))
    experiment = load(name, chosen, samples)
    x = calibration(experiment)
    test = next(iter(experiment.task.batches("test"))).x.float()
    raw = raw_steps(network.preparation, test[:, : max(2, min(samples, STEPS // len(test)))])
    counts, found = network.readout == "count", {}
    for bits in (8, 4):
        made = quantise(network, x, bits)
        given = made.integers(raw)
        read_out = made.staged.readout is not None
        classes = made.answers(given)[-1].argmax(1) if read_out else np.zeros(given.shape[1])
        found[bits] = Subject(made.staged, given, 1, counts, classes)
    read, scale = read_stages(network), found[8].read.input_scale
    return {32: Subject(read, found[8].samples, scale, counts, found[8].classes)} | found


@torch.no_grad()
def dense_subject(bits: int, chosen: Any, samples: int) -> Subject:
    """The dense network of early_inference.py, for the same images."""
    from early_inference import dense_network

    torch.manual_seed(0)
    network = snn_lib.load(ROOT / "checkpoint" / "pretrained_snn_mlp_1")
    experiment = load("snn_mlp_1", chosen, samples)
    x = raw_steps(network.preparation, calibration(experiment)[:1])
    test = next(iter(experiment.task.batches("test"))).x.float()[:1, :samples]
    dense = dense_network(torch.from_numpy(x[0]).float())
    stages: list[Stage] = []
    for number, layer in enumerate(dense):
        if isinstance(layer, torch.nn.Linear):
            weight, bias = layer.weight.numpy(), layer.bias.numpy()[None]
            outputs, inputs = weight.shape
            windows = Windows((1, 1, inputs), (1, 1, outputs))
            lines = [Line("_0", "add", ("x", "bias"))]
            if number + 1 < len(dense):
                lines.append(Line("_1", "maximum", ("_0", 0.0)))
            trace = Trace(tuple(lines), (lines[-1].name,))
            stages += [
                Rows(f"{number}", windows, weight.T[None]),
                Step(f"{number}", 1, outputs, trace, (), {"bias": bias}),
            ]
    readout = (Step("answer", 1, 10, Trace((), ("x",))),)
    kind, about = np.dtype(np.float32), ("", (), None)
    read = StagedNetwork(
        DENSE, (784,), (10,), tuple(stages), readout, kind, "pixels from 0 to 1", *about
    )
    staged, _ = integer_stages(read, x, 8 if bits == 32 else bits)
    made = IntegerNetwork(staged)
    given = made.integers(raw_steps(network.preparation, test))
    classes = made.answers(given)[-1].argmax(1)
    if bits == 32:
        return Subject(read, given, made.input_scale, False, classes)
    return Subject(made.staged, given, 1, False, classes)


def run(subject: Subject) -> dict[str, Any]:
    """What the network takes, per sample."""
    with tempfile.TemporaryDirectory() as folder:
        write_c(subject.read, Path(folder) / "network.c")
        steps, count = subject.samples.shape[:2]
        values = subject.samples.reshape(steps, count, -1).swapaxes(0, 1)
        if (values == values[:, :1]).all():  # every step is the same
            values = values[:, :1]
        lead = LEAD / getattr(subject.read, "output_scale", 1) if subject.counts else 0
        kind = "int16_t" if values.min() < 0 or values.max() > 255 else "uint8_t"
        shape = "".join(f"[{size}]" for size in values.shape)
        sizes = {"STEPS": steps, "STORED": values.shape[1], "SAMPLES": count, "LEAD": round(lead)}
        scale = f"{subject.scale!r}f" if subject.scale != 1 else "1"
        lines = [f"#define {key} {value}" for key, value in {**sizes, "SCALE": scale}.items()]
        text = str(values.tolist()).replace("[", "{").replace("]", "}")
        lines.append(f"static const {kind} samples{shape} = {text};")
        if subject.read.readout is None:
            lines.append(WITHOUT_CLASSES)
        (Path(folder) / "samples.h").write_text("\n".join(lines) + "\n")
        (Path(folder) / "main.c").write_text(MAIN)

        def call(*command: str | Path, timeout: int = 600) -> str:
            done = subprocess.run(
                [*map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
                check=False,
                cwd=folder,
            )
            assert done.returncode == 0, done.stdout[-2000:]
            return done.stdout

        call(*GCC, "-c", "network.c")
        link = "-nostartfiles", "--specs=nano.specs", "-T", BOARD / "board.ld", "-I", BOARD
        call(*GCC, *link, BOARD / "start.c", "main.c", "network.o", "-o", "network.elf")
        flash = int(call("arm-none-eabi-size", "network.o").splitlines()[1].split()[0])
        printed = call(*QEMU, "network.elf")
    found = [tuple(map(int, r)) for r in re.findall(r"sample (\d+) (\d+) (\d+)", printed)]
    runs = np.array(found).reshape(count, -1, 3)
    classes, done, ticks = np.moveaxis(runs, 2, 0)
    assert (classes[:, 0] == subject.classes).all() or subject.scale != 1, "another class than here"
    instructions = INSTRUCTIONS_A_TICK * ticks.mean(0)
    row = {
        "flash": flash,
        "ram": int(re.search(r"state (\d+)", printed)[1]),
        "steps": steps,
        "instructions": round(instructions[0]),
        "instructions_a_step": round(instructions[0] / steps),
    }
    if subject.counts:
        row |= {"steps_until_clear": round(done[:, 1].mean(), 2)}
        row |= {"instructions_until_clear": round(instructions[1])}
    return row


def main() -> None:
    chosen = options(__doc__, "microcontroller")
    for program in (GCC[0], QEMU[0]):
        if shutil.which(program) is None:
            raise SystemExit(f"there is no {program}: see the head of this script")
    path, samples = chosen.output.with_suffix(".csv"), 2 if chosen.smoke else MOST
    rows = earlier_rows(path)
    for name in ["snn_mlp_1_latency_behind"] if chosen.smoke else [DENSE, *NAMES]:
        if any(row["model"] == name for row in rows):
            continue
        if name == DENSE:
            ready = {bits: dense_subject(bits, chosen, samples) for bits in BITS}
        else:
            ready = subjects(name, chosen, samples)
        for bits, subject in ready.items():
            arithmetic = "float" if bits == 32 else f"{bits} bits"
            rows.append({"model": name, "arithmetic": arithmetic, **run(subject)})
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        write_csv(path, rows)
    print(f"\nsaved {path}")


if __name__ == "__main__":
    main()

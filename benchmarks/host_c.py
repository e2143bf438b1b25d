"""Compiles an exported network with the C compiler of this machine, and runs it here."""

import ctypes
import re
import shutil
import subprocess

import numpy as np

CC = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# Reads sequences of so many steps, and writes the output of each step, the class and the lead.
MAIN = """
#include <stdio.h>
#include <stdlib.h>
#include "network.h"

static network_state state;
static network_input x[NETWORK_INPUTS];
static network_output y[NETWORK_OUTPUTS];

int main(int count, char **arguments)
{
    const long steps = count > 1 ? strtol(arguments[1], NULL, 10) : 1;
    network_reset(&state);
    for (long t = 0; fread(x, sizeof x, 1, stdin) == 1; t++) {
        if (t % steps == 0)
            network_reset(&state);
        network_step(&state, x, y);
        fwrite(y, sizeof y, 1, stdout);
        ENDS
    }
    fprintf(stderr, "%lu %lu", (unsigned long)sizeof state, (unsigned long)SATURATED);
    return 0;
}
"""
READS_OUT = """{
            const int32_t best = network_class(&state);
            const network_output lead = network_lead(&state);
            fwrite(&best, sizeof best, 1, stdout);
            fwrite(&lead, sizeof lead, 1, stdout);
        }"""


class Compiled:
    """The network of ``network.c`` in a folder, as a program of this machine.

    Attributes:
        size: the bytes of a stream's state.
        saturated: how many values did not fit in the last sequence of the last run.
    """

    def __init__(self, folder, dtype=np.float64, input_dtype=None, options=("-O2",)):
        header = (folder / "network.h").read_text()
        self.dtype, self.input_dtype = np.dtype(dtype), np.dtype(input_dtype or dtype)
        self.reads_out = "network_class(" in header
        saturated = "state.saturated" if "saturated" in header else "0"
        text = MAIN.replace("ENDS", READS_OUT if self.reads_out else "")
        (folder / "main.c").write_text(text.replace("SATURATED", saturated))
        self.program = folder / "network"
        files = [folder / "main.c", folder / "network.c"]
        command = [CC, *STRICT, *options, *map(str, files), "-o", str(self.program)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr[:2000]

    def run(self, x):
        """The output at each step of ``(T, B, inputs)``: ``(T, B, outputs)``.

        If there is a readout, also the class that leads, and its lead.
        """
        steps, batch = x.shape[:2]
        given = np.ascontiguousarray(x.reshape(steps, batch, -1).swapaxes(0, 1), self.input_dtype)
        done = subprocess.run(
            [self.program, str(steps)], input=given.tobytes(), capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()[:2000]
        self.size, self.saturated = map(int, done.stderr.split())
        table = np.frombuffer(done.stdout, np.uint8).reshape(batch, steps, -1).swapaxes(0, 1)
        if not self.reads_out:
            return table.copy().view(self.dtype)
        end = table.shape[2] - 4 - self.dtype.itemsize
        parts = table[..., :end], table[..., end : end + 4], table[..., end + 4 :]
        kinds = self.dtype, np.int32, self.dtype
        y, best, lead = (p.copy().view(k) for p, k in zip(parts, kinds, strict=True))
        return y, best[..., 0], lead[..., 0]


class Library:
    """The network of ``network.c`` in a folder, as a shared library."""

    def __init__(self, folder, dtype=np.float64, input_dtype=None):
        self.dtype, self.input_dtype = np.dtype(dtype), np.dtype(input_dtype or dtype)
        size = "const unsigned long network_size = sizeof(network_state);\n"
        (folder / "library.c").write_text(f'#include "network.c"\n{size}')
        program = folder / "network.so"
        command = [CC, *STRICT, "-shared", "-fPIC", str(folder / "library.c"), "-o", str(program)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(program))
        header = (folder / "network.h").read_text()
        self.outputs = int(re.search(r"NETWORK_OUTPUTS (\d+)", header)[1])

    def stream(self):
        """A function that runs a step of a stream of its own."""
        state = ctypes.create_string_buffer(
            ctypes.c_ulong.in_dll(self.library, "network_size").value
        )
        self.library.network_reset(state)

        def step(x):
            x, y = np.ascontiguousarray(x, self.input_dtype), np.empty(self.outputs, self.dtype)
            self.library.network_step(state, x.ctypes, y.ctypes)
            return y

        return step

    def classes(self, count):
        """The names of the classes."""
        names = (ctypes.c_char_p * count).in_dll(self.library, "network_classes")
        return [name.decode() for name in names]

    def order(self, count):
        """The order of the pixels."""
        return [*(ctypes.c_uint16 * count).in_dll(self.library, "network_order")]

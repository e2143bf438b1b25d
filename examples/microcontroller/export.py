"""Writes a trained network in integers as network.c, and some digits for it as samples.h.

    PYTHONPATH=../.. python export.py

The network reads an image as spikes: the brighter a pixel, the earlier its only spike.
"""

from pathlib import Path

import numpy as np

import snn_lib
from snn_lib.data.mnist import load_mnist
from snn_lib.inference import quantise, to_c

HERE, SAMPLES = Path(__file__).resolve().parent, 5
ROOT = HERE.parents[1]

network = snn_lib.load(ROOT / "checkpoint" / "pretrained_snn_mlp_1_latency_behind")
images, _ = load_mnist(ROOT / "dataset", train=True)
integers = quantise(network, network.prepare(images[:200]), weight_bits=4)
to_c(integers, HERE / "network.c")

images, labels = load_mnist(ROOT / "dataset", train=False)
spikes = network.prepare(images[:SAMPLES]).x.numpy()  # (steps, samples, pixels)
bits = np.packbits(spikes.astype(bool).swapaxes(0, 1), axis=2, bitorder="little")
numbers = str(bits.tolist()).replace("[", "{").replace("]", "}")
answers = ", ".join(map(str, labels[:SAMPLES].tolist()))
sizes = f"[SAMPLES][STEPS][{bits.shape[2]}]"
(HERE / "samples.h").write_text(
    f"#define SAMPLES {SAMPLES}\n#define STEPS {len(spikes)}\n\n"
    "/* Eight pixels in a byte: whether each fires in a step. */\n"
    f"static const uint8_t spikes{sizes} = {numbers};\n"
    f"static const uint8_t labels[SAMPLES] = {{{answers}}};\n"
)

"""``python -m snn_lib.kernels`` says which backend serves each device of this machine, and why.

``python -m snn_lib.kernels --check`` also compares the compiled backends with plain PyTorch.
``python -m snn_lib.kernels --show CELL`` prints what a cell's step computes, and its adjoint.
"""

import argparse
import sys

import torch

from snn_lib.kernels import choose_backend
from snn_lib.kernels.check import check
from snn_lib.kernels.listing import listing

parser = argparse.ArgumentParser(
    "python -m snn_lib.kernels",
    description="Says which backend serves each device of this machine, and why.",
)
parser.add_argument(
    "--check",
    action="store_true",
    help="compare every compiled backend with plain PyTorch on every program and dtype, and time "
    "it; exit with 1 if any result differs",
)
parser.add_argument(
    "--show",
    metavar="CELL",
    help="print what a step and its adjoint compute, of a cell such as SpikingNeuron, "
    "my_module.MyNeuron or SpikingNeuron+IIRSynapse, and nothing else",
)
arguments = parser.parse_args()
if arguments.show:
    try:
        print(listing(arguments.show))
    except (ValueError, ImportError) as error:
        parser.exit(2, f"{error}\n")
    sys.exit()

devices = ["cpu"]
if accelerator := torch.accelerator.current_accelerator(check_available=True):
    devices.append(accelerator.type)
served = 0
for device in devices:
    try:
        name, reason = choose_backend(device)
        served += 1
    except (ValueError, ImportError) as error:
        name, reason = "none", error
    print(f"{device}: {name} ({reason})")
if not served or (arguments.check and not check(devices)):
    sys.exit(1)

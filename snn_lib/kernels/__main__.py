"""``python -m snn_lib.kernels`` says which backend serves each device of this machine, and why."""

import torch

from snn_lib.kernels import serving

devices = ["cpu"]
if torch.accelerator.is_available():
    devices.append(torch.accelerator.current_accelerator().type)
for device in devices:
    name, reason = serving(device)
    print(f"{device}: {name} ({reason})")

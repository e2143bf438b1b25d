"""Checks of shapes, dtypes and devices.

The functions of ``snn_lib.functional`` check what a user hands in. A registered operator checks
again, since a user may call it directly and its kernels trust the shapes.
"""

import torch
from torch import Tensor

from snn_lib.kernels import COMPUTE_DTYPES
from snn_lib.pytorch_private import carries_tangents

# Tensors that go to a matrix product or come from it; they may be in bfloat16 beside float32.
ROUNDED = ("current", "output", "grad_output")
# What to do if a layer is given what another returned.
CHAIN = (
    "chain layers with snn_lib.Sequential instead of nn.Sequential, or take the output alone, "
    "output, state = layer(x)"
)


def check_time_first(shape: tuple[int, ...], name: str) -> None:
    """Raises a ValueError unless a sequence has the dimensions (T, B, *features)."""
    if len(shape) < 3:
        raise ValueError(
            f"{name} has shape {tuple(shape)}, expected at least three dimensions (T, B, *features)"
        )


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raises a TypeError unless this is a tensor."""
    if not isinstance(tensor, Tensor):
        hint = f": {CHAIN}" if hasattr(type(tensor), "_fields") else ""  # an Output has fields
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor{hint}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises a TypeError unless this is a tensor, and a ValueError unless it has this shape."""
    check_tensor(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def check_operands(**tensors: Tensor) -> None:
    """Raises a ValueError unless all tensors have one dtype and are on one device.

    The first tensor must be a folded sequence. The second, a coefficient, sets dtype and device.
    """
    (name, sequence), (like_name, like), *_ = tensors.items()
    dtype, device = like.dtype, like.device
    _refuse_forward_mode()
    if sequence.dim() != 3:
        raise ValueError(f"{name} has shape {tuple(sequence.shape)}, expected (T, B, N)")
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"{like_name} is in {dtype}, expected float32 or float64")
    for name, tensor in tensors.items():
        if tensor.dtype != dtype and not (
            name in ROUNDED and (tensor.dtype, dtype) == (torch.bfloat16, torch.float32)
        ):
            raise ValueError(f"{name} is in {tensor.dtype}, expected {dtype} as {like_name}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device} as {like_name}")


def _refuse_forward_mode() -> None:
    """Raises a NotImplementedError in forward mode, where an operator would drop the tangents.

    The Functions around the operators switch forward mode off before they call them.
    """
    if carries_tangents():
        raise NotImplementedError(
            "forward mode through torch.ops.snn is not possible, nor under torch.compile: "
            "call the functions of snn_lib.functional, uncompiled"
        )

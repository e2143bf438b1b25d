"""What a program runs with: the operator's arguments, which every backend is given as they are."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from snn_lib.kernels import COMPUTE_DTYPES
from snn_lib.kernels.program import Adjoint, Program, adjoint_of, program
from snn_lib.pytorch_private import carries_tangents

# Steps whose states a backward pass computes again at once, so that they stay in the cache: for
# 64 x 512 lanes of a neuron and a second-order filter 16 MB, which fit into that of large GPUs.
BLOCK = 32


class Inputs(NamedTuple):
    """A program of S rows of states and C rows of coefficients, and what it runs with.

    Attributes:
        key: of the program.
        x: ``(T, B, N)``.
        coefficients: ``(C, N)``, in the dtype that computes.
        state: ``(S, B, N)`` before the first step; zeros if ``None``.
        lengths: int64 ``(B,)``, the number of steps after which each sequence's state is returned;
            T for all if ``None``.
        surrogate, numbers: of the threshold's gradient, see ``program.name_of``.
        dropout, seed: each spike is dropped with this probability when it is passed on, and the
            others are scaled by 1 / (1 - dropout), see ``eager.dropout_scale``.
        dtype: the output is rounded to it; states go on unrounded.
        keep: whether a backward pass will follow.
        needed: of each row of coefficients, whether its gradient is needed.
    """

    key: str
    x: Tensor
    coefficients: Tensor
    state: Tensor | None = None
    lengths: Tensor | None = None
    surrogate: str = ""
    numbers: Sequence[float] = ()
    dropout: float = 0.0
    seed: Tensor | None = None
    dtype: torch.dtype = torch.float32
    keep: bool = False
    needed: Sequence[bool] = ()

    @property
    def program(self) -> Program:
        """The program that the key names."""
        return program(self.key)

    def adjoint(self, need_x: bool) -> Adjoint:
        """A step of the backward pass, with the gradient of x if it is needed."""
        return adjoint_of(self.key, self.surrogate, need_x, tuple(self.needed))

    @property
    def _shape(self) -> tuple[int, ...]:
        return len(self.program.states), *self.x.shape[1:]

    @property
    def rest(self) -> Tensor:
        """A state of zeros, which takes no memory."""
        return self.coefficients.new_zeros(()).expand(self._shape)

    @property
    def first(self) -> Tensor:
        """The state before the first step."""
        return self.rest if self.state is None else self.state

    @property
    def blocks(self) -> int:
        """The number of blocks of steps whose first states are kept: of all but the first."""
        return self.x.shape[0] // BLOCK if self.keep else 0

    def new_results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Room for the output, for the last state, and for the first states of blocks."""
        output = self.x.new_empty(self.x.shape, dtype=self.dtype)
        last = self.coefficients.new_empty(self._shape)
        # two more, since PyTorch asks of a size that it does not know whether it is below 2
        return output, last, last.new_empty(self.blocks * last.numel() + 2)

    def new_gradients(self, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Room for the gradients of x, empty if not needed, of coefficients, zero, and of state."""
        own, grad_x = self.coefficients, self.x.new_empty(self.x.shape if need_x else (0,))
        return grad_x, own.new_zeros(own.shape), own.new_empty(self._shape)

    def check(self) -> None:
        """Raises a ValueError unless all tensors fit each other, since kernels trust them.

        ``snn_lib.functional`` checks what a user hands in; whoever calls the operator is checked
        here.
        """
        if carries_tangents():
            raise NotImplementedError(
                "forward mode through torch.ops.snn is not possible, nor under torch.compile: "
                "call the layers, uncompiled"
            )
        own, device, lanes = self.coefficients.dtype, self.coefficients.device, self.x.shape[1:]
        if self.x.dim() != 3:
            raise ValueError(f"x has shape {tuple(self.x.shape)}, expected (T, B, N)")
        if own not in COMPUTE_DTYPES:
            raise ValueError(f"coefficients are in {own}, expected float32 or float64")
        for name, shape, dtype in (
            ("coefficients", (len(self.program.coefficients), *lanes[1:]), own),
            ("state", self._shape, own),
            ("lengths", lanes[:1], torch.int64),
            ("seed", (2,), torch.int64),
        ):
            tensor, expected = getattr(self, name), (torch.Size(shape), dtype, device)
            if tensor is not None and (tensor.shape, tensor.dtype, tensor.device) != expected:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}, "
                    f"expected {tuple(shape)} in {dtype} on {device}"
                )
        if self.dropout and self.seed is None:
            raise ValueError("there is dropout without a seed")
        for name, dtype in (("x", self.x.dtype), ("the output", self.dtype)):
            if dtype != own and (dtype, own) != (torch.bfloat16, torch.float32):
                raise ValueError(f"{name} is in {dtype}, expected {own}")
        if self.x.device != device:
            raise ValueError(f"x is on {self.x.device}, expected {device} as the coefficients")

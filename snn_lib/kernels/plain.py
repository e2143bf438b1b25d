"""Plain PyTorch: a program's step, one time step after the other. It is the definition of correct.

It runs on any device, and PyTorch differentiates it in every way that it can: backward and forward,
twice, under ``torch.func``. Products and sums are separate calls, as the step has them, since every
backend must give the same spikes bit for bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from snn_lib.kernels.program import Program, fire_with
from snn_lib.surrogate import Gaussian, Surrogate


def run(
    program: Program,
    x: Tensor,
    coefficients: Tensor,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    surrogate: Surrogate = Gaussian(),  # noqa: B008 (immutable)
    dropout: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs a program over all steps of ``x``.

    Args:
        program: of S rows of states and C rows of coefficients.
        x: ``(T, B, N)``.
        coefficients: ``(C, N)``.
        state: ``(S, B, N)`` before the first step; zeros if ``None``.
        lengths: int64 ``(B,)``, the number of steps after which each sequence's state is returned;
            T for all if ``None``.
        surrogate: of the threshold's gradient.
        dropout, seed: each spike is dropped with this probability when it is passed on, and the
            others are scaled by 1 / (1 - dropout), see :func:`dropout_scale`.
        dtype: the output is rounded to it; states go on unrounded.

    Returns:
        The output, ``(T, B, N)``, and the state ``(S, B, N)`` after the last step.
    """
    own, fire = coefficients.dtype, fire_with(surrogate)
    if state is None:
        state = coefficients.new_zeros(len(program.states), *x.shape[1:])
    rows, given, outputs = list(state.unbind()), coefficients.unbind(), []
    ends = rows
    kept = dropout_scale(x.shape, own, dropout, seed).unbind() if dropout else [None] * len(x)
    for t, now in enumerate(x.to(own)):
        output, rows = program.step(now, kept[t], rows, given, fire)
        outputs.append(output)
        ends = rows if lengths is None else _up_to(t, lengths, rows, ends)
    lanes = x.shape[1:]  # a result that only depends on coefficients is the same in all rows
    output = torch.stack([row.expand(lanes) for row in outputs]) if outputs else x.to(own).clone()
    last = torch.stack([row.expand(lanes) for row in ends]) if ends else state.clone()
    return output.to(dtype or own), last


def _up_to(
    t: int, lengths: Tensor, rows: Sequence[Tensor], before: Sequence[Tensor]
) -> list[Tensor]:
    """The rows after step ``t`` of the sequences that reach it, and those before of the others."""
    reached = (t < lengths)[:, None]
    return [torch.where(reached, row, old) for row, old in zip(rows, before, strict=True)]


def dropout_scale(shape: Sequence[int], dtype: torch.dtype, dropout: float, seed: Tensor) -> Tensor:
    """0 where an element is dropped and 1 / (1 - dropout) elsewhere.

    The generator is counter-based. Element number i is dropped if the hash of i under a key, a
    uniform number from 0 to 2^32 - 1, is below dropout * 2^32. ``seed``, int64 ``(2,)``, holds the
    key and the number of the first element; the others are numbered row-major. No mask is stored:
    any backend draws the same one in any order, and the backward pass draws it again. The hash is
    the finaliser of MurmurHash3 (Appleby, public domain), once for each half of the key.
    """
    # int32 wraps around as the hash needs it, and is several times faster than int64.
    key, first = seed.unbind()
    count = torch.Size(shape).numel()
    h = (first + torch.arange(count, device=seed.device)).to(torch.int32)
    for half in (key, key >> 32):
        h = _mix(h ^ half.to(torch.int32))
    kept = (h ^ (-(2**31))) >= int(dropout * 2**32) - 2**31  # compares them unsigned
    return kept.view(*shape).to(dtype) * (1.0 / (1.0 - dropout))


def _mix(h: Tensor) -> Tensor:
    """32-bit finaliser of MurmurHash3; the masks make ``>>`` shift zeros in."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * (0x85EBCA6B - 2**32)
    h = (h ^ ((h >> 13) & 0x7FFFF)) * (0xC2B2AE35 - 2**32)
    return h ^ ((h >> 16) & 0xFFFF)

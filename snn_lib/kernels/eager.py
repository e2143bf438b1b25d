"""Plain PyTorch: a program's step, one time step after the other. It is the definition of correct.

PyTorch differentiates it in every way that it can: backward and forward, twice, under
``torch.func``. Products and sums are separate calls, as the step has them, since every backend must
give the same spikes bit for bit, if the step has no elementary function such as exp. As a backend
it serves any device.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from snn_lib.kernels.inputs import BLOCK, Inputs
from snn_lib.kernels.program import Fire, fire_with, surrogate_of
from snn_lib.surrogate import Surrogate


def run(
    inputs: Inputs, surrogate: Surrogate | None = None, firsts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Runs a program over all steps, with the surrogate that is named if none is given.

    Args:
        inputs: the program, and what it runs with.
        surrogate: of the threshold's gradient.
        firsts: room for the first states of all blocks but the first, ``(blocks, S, B, N)``.

    Returns:
        The output, ``(T, B, N)``, and the state ``(S, B, N)`` after the last step.
    """
    x, lengths, ends = inputs.x, inputs.lengths, inputs.first.unbind()
    outputs, lanes = [], x.shape[1:]
    if surrogate is None:
        surrogate = surrogate_of(inputs.surrogate, inputs.numbers)
    for t, (output, rows) in enumerate(steps_of(inputs, fire_with(surrogate))):
        # one that only depends on coefficients is the same in all rows
        outputs.append(output.expand(lanes))
        if firsts is not None and rows and (t + 1) % BLOCK == 0:
            firsts[(t + 1) // BLOCK - 1] = torch.stack([row.expand(lanes) for row in rows])
        if lengths is not None:
            reached = (t < lengths)[:, None]
            rows = [torch.where(reached, row, old) for row, old in zip(rows, ends, strict=True)]
        ends = rows
    output = torch.stack(outputs) if outputs else x.clone()
    last = torch.stack([row.expand(lanes) for row in ends]) if ends else inputs.first.clone()
    return output.to(inputs.dtype), last


def steps_of(inputs: Inputs, fire: Fire) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Takes one step after the other: its output, and the rows of states after it."""
    rows, coefficients = inputs.first.unbind(), inputs.coefficients.unbind()
    x, scales = inputs.x.to(inputs.coefficients.dtype), [None] * len(inputs.x)
    if inputs.dropout and inputs.seed is not None:
        scales = dropout_scale(x.shape, x.dtype, inputs.dropout, inputs.seed).unbind()
    for now, scale in zip(x.unbind(), scales, strict=True):
        output, rows = inputs.program.step(now, scale, rows, coefficients, fire)
        yield output, rows


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the last state, and the first states of blocks, for another's backward pass."""
    *_, kept = inputs.new_results()
    firsts = kept[:-2].view(inputs.blocks, *inputs.first.shape) if inputs.blocks else None
    with torch.no_grad():
        output, last = run(inputs, firsts=firsts)
    # stack returns a view, into which autograd would let no later module write
    return output.clone(), last, kept


def backward(
    inputs: Inputs, grad_output: Tensor, grad_last: Tensor, checkpoints: Tensor, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the coefficients and of the state."""
    wanted = {"state": inputs.first}
    wanted |= {"x": inputs.x} if need_x else {}
    wanted |= {"coefficients": inputs.coefficients} if any(inputs.needed) else {}
    # Other than autograd, a transform works within an operator, too.
    pull = torch.func.vjp(lambda wanted: run(inputs._replace(**wanted)), wanted)[1]
    (found,) = pull((grad_output, grad_last))
    results = inputs.new_gradients(need_x)
    for name, result in zip(("x", "coefficients", "state"), results, strict=True):
        if name in found:
            result.copy_(found[name])
    return results


def differentiate(
    function: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    arriving: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of a function in plain PyTorch, which have derivatives themselves.

    Args:
        function: of all tensors.
        tensors: the tensors. One of them may come from another, as a state from the weights of the
            steps before; its gradient is not followed so far.
        needs: which tensors' gradients are needed; the others are ``None``.
        arriving: the gradients of the function's results.
    """
    given: list[Any] = [None if one is None else one.view_as(one) for one in tensors]
    pairs = zip(function(*given), arriving, strict=True)
    pairs = [(result, gradient) for result, gradient in pairs if result.requires_grad]
    wanted = [tensor for tensor, need in zip(given, needs, strict=True) if need]
    found = torch.autograd.grad(
        [result for result, _ in pairs],
        wanted,
        [gradient for _, gradient in pairs],
        create_graph=True,
        allow_unused=True,
    )
    following = iter(found)
    return [next(following) if need else None for need in needs]


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

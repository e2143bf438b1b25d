"""The operator that runs a program over a whole sequence, as PyTorch sees it.

Autograd, ``torch.compile`` and ``torch.export`` see a single node, however many time steps there
are. It runs on the backend that serves its tensors, see ``snn_lib.kernels``. Where PyTorch has to
see the steps themselves, plain PyTorch runs them: in forward mode, under the transforms of
``torch.func``, for second derivatives, and for steps or surrogates that no kernel can compute.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snn_lib.kernels import COMPUTE_DTYPES, backend_for, plain
from snn_lib.kernels.program import name_of, program, surrogate_of
from snn_lib.pytorch_private import carries_tangents, is_transformed, is_watched
from snn_lib.surrogate import Surrogate

PLAIN = (Tensor, torch.nn.Parameter)  # other subclasses of a tensor may change what operators do
INPUTS = (
    "str key, Tensor x, Tensor coefficients, Tensor? state, Tensor? lengths, "
    "str surrogate, float[] numbers, float dropout, Tensor? seed"
)


def run(
    key: str,
    x: Tensor,
    coefficients: Tensor,
    state: Tensor | None,
    lengths: Tensor | None,
    surrogate: Surrogate,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Runs a program; see ``plain.run``, whose shapes and dtypes are checked already.

    ``needed`` says of each row of coefficients whether it may need a gradient.
    """
    tensors = x, coefficients, state
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    name, numbers = name_of(surrogate) if learns else ("", [])
    if is_transformed() or not _has_kernels(key, name):
        return _run_plain(key, x, coefficients, state, lengths, surrogate, dropout, seed, dtype)
    if not learns and _can_skip_dispatch((x, coefficients, state, lengths, seed)):
        backend, given = backend_for(x), (x, coefficients, state, lengths, dropout, seed)
        return backend.forward(key, *given, dtype, False)[:2]
    settings = lengths, name, numbers, dropout, seed, dtype, learns, list(needed)
    return torch.ops.snn.run(key, x, coefficients, state, *settings)[:2]


@torch.compiler.disable(reason="a transform, or what no kernel can compute, runs step by step")
def _run_plain(key: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    return plain.run(program(key), *arguments)


@torch.compiler.assume_constant_result
def _has_kernels(key: str, surrogate: str) -> bool:
    return program(key).has_kernels(surrogate)


def _can_skip_dispatch(inputs: Sequence[Tensor | None]) -> bool:
    """Whether a backend may be called directly, because no part of PyTorch has to see the operator.

    That is so if no gradient is needed and no compiler, mode or subclass of a tensor is at work. A
    direct call leaves out PyTorch's dispatch and the operator's checks, which take most of the time
    of a single step of a stream. Tensors on several devices are left to those checks.
    """
    if torch.compiler.is_compiling() or is_watched():
        return False
    device = inputs[0].device
    for tensor in inputs:
        if tensor is not None and (
            type(tensor) not in PLAIN
            or tensor.device != device
            or tensor.is_neg()  # its memory holds numbers of the opposite sign
        ):
            return False
    return device.type != "meta"


@torch.library.custom_op(
    "snn::run",
    mutates_args=(),
    schema=f"({INPUTS}, ScalarType dtype, bool keep, bool[] needed) -> (Tensor, Tensor, Tensor)",
)
def _run(
    key, x, coefficients, state, lengths, surrogate, numbers, dropout, seed, dtype, keep, needed
):
    _check(key, x, coefficients, state, lengths, dropout, seed, dtype)
    return backend_for(coefficients).forward(
        key, x, coefficients, state, lengths, dropout, seed, dtype, keep
    )


@_run.register_fake
def _(key, x, coefficients, state, lengths, surrogate, numbers, dropout, seed, dtype, keep, needed):
    _check(key, x, coefficients, state, lengths, dropout, seed, dtype)
    steps, *lanes = x.shape
    count = len(program(key).states)
    blocks = backend_for(coefficients).blocks_of(steps) if keep else 0
    return (
        x.new_empty(x.shape, dtype=dtype),
        coefficients.new_empty(count, *lanes),
        coefficients.new_empty(blocks * count * lanes[0] * lanes[1] + 2),
    )


@torch.library.custom_op(
    "snn::run_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor? grad_last, Tensor checkpoints, {INPUTS}, bool need_x, "
    "bool[] needed) -> (Tensor, Tensor, Tensor)",
)
def _run_backward(grad_output, grad_last, checkpoints, *inputs):
    key, x, coefficients, state, lengths, surrogate, numbers, dropout, seed, need_x, needed = inputs
    _check(key, x, coefficients, state, lengths, dropout, seed, grad_output.dtype)
    return backend_for(coefficients).backward(
        key,
        grad_output,
        grad_last,
        x,
        coefficients,
        state,
        checkpoints,
        lengths,
        surrogate,
        numbers,
        dropout,
        seed,
        need_x,
        needed,
    )


@_run_backward.register_fake
def _(grad_output, grad_last, checkpoints, *inputs):
    key, x, coefficients, *_, need_x, _ = inputs
    return (
        x.new_empty(x.shape if need_x else (0,)),
        coefficients.new_empty(coefficients.shape),
        coefficients.new_empty(len(program(key).states), *x.shape[1:]),
    )


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.key, x, coefficients, state, lengths, *settings = inputs
    ctx.surrogate, ctx.numbers, ctx.dropout, seed, ctx.dtype, _, ctx.needed = settings
    *_, checkpoints = output
    ctx.mark_non_differentiable(checkpoints)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, coefficients, state, lengths, seed, checkpoints)


def _differentiate(ctx: Any, grad_output: Tensor | None, grad_last: Tensor | None, _: Any) -> tuple:
    x, coefficients, state, lengths, seed, checkpoints = ctx.saved_tensors
    _, need_x, need_coefficients, need_state, *_ = ctx.needs_input_grad
    if torch.is_grad_enabled():  # somebody differentiates the gradient
        inputs = x, coefficients, state
        needs = need_x, need_coefficients, need_state
        found = iter(_derivatives(ctx, inputs, lengths, seed, needs, grad_output, grad_last))
        gradients = [next(found) if need else None for need in needs]
    else:
        if grad_output is None:
            grad_output = x.new_zeros(()).expand(x.shape).to(ctx.dtype)
        needed = [need and need_coefficients for need in ctx.needed]
        gradients = torch.ops.snn.run_backward(
            *(grad_output, grad_last, checkpoints),
            *(ctx.key, x, coefficients, state, lengths),
            *(ctx.surrogate, ctx.numbers, ctx.dropout, seed, need_x, needed),
        )
    grad_x, grad_coefficients, grad_state = gradients
    return (
        None,
        grad_x if need_x else None,
        grad_coefficients if need_coefficients else None,
        grad_state if need_state else None,
        *[None] * 8,
    )


def _derivatives(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    lengths: Tensor | None,
    seed: Tensor | None,
    needs: Sequence[bool],
    *gradients: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of plain PyTorch, which have derivatives themselves."""
    surrogate = surrogate_of(ctx.surrogate, ctx.numbers)
    results = plain.run(program(ctx.key), *inputs, lengths, surrogate, ctx.dropout, seed, ctx.dtype)
    pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if g is not None]
    return torch.autograd.grad(
        [result for result, _ in pairs],
        [tensor for tensor, need in zip(inputs, needs, strict=True) if need],
        [gradient for _, gradient in pairs],
        create_graph=True,
        allow_unused=True,
    )


_run.register_autograd(_differentiate, setup_context=_remember)


def _check(
    key: str,
    x: Tensor,
    coefficients: Tensor,
    state: Tensor | None,
    lengths: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Raises a ValueError unless all tensors fit each other, since kernels trust them.

    The functions above check what a user hands in; whoever calls the operator is checked here.
    """
    if carries_tangents():
        raise NotImplementedError(
            "forward mode through torch.ops.snn is not possible, nor under torch.compile: "
            "call the layers, uncompiled"
        )
    made, own, device = program(key), coefficients.dtype, coefficients.device
    lanes = x.shape[1:]
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (T, B, N)")
    if own not in COMPUTE_DTYPES:
        raise ValueError(f"coefficients are in {own}, expected float32 or float64")
    expected = {
        "coefficients": (coefficients, (len(made.coefficients), *lanes[1:]), own),
        "state": (state, (len(made.states), *lanes), own),
        "lengths": (lengths, lanes[:1], torch.int64),
        "seed": (seed, (2,), torch.int64),
    }
    for name, (tensor, shape, kind) in expected.items():
        if tensor is not None and (tensor.shape, tensor.dtype, tensor.device) != (
            *(torch.Size(shape), kind, device),
        ):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}, "
                f"expected {tuple(shape)} in {kind} on {device}"
            )
    if dropout and seed is None:
        raise ValueError("there is dropout without a seed")
    for name, kind in (("x", x.dtype), ("the output", dtype)):
        if kind != own and (kind, own) != (torch.bfloat16, torch.float32):
            raise ValueError(f"{name} is in {kind}, expected {own}")
    if x.device != device:
        raise ValueError(f"x is on {x.device}, expected {device} as the coefficients")

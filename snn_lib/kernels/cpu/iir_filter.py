"""The IIR filter's two functions on the CPU; equations and arguments are in ``eager``."""

import torch
from torch import Tensor

from snn_lib.kernels.cpu import openmp
from snn_lib.kernels.cpu.compiling import jit
from snn_lib.kernels.cpu.llvm import arrays
from snn_lib.kernels.cpu.rows import (
    TINY,
    add,
    assign,
    correlate,
    flush,
    multiply,
    multiply_add,
    prefetch,
    read,
    row,
    row_or_past,
    write,
)
from snn_lib.kernels.cpu.tiles import check_dtypes, groups, locate, share_out
from snn_lib.kernels.eager import only_needed


@jit
def second_order(f, beta_0, x, alpha_1, f_1, alpha_2, f_2):
    """F[t] of a filter of order 2 without past inputs, the usual one, in a single pass."""
    tiny, zero = f.dtype.type(TINY), f.dtype.type(0)
    for n in range(len(f)):
        value = beta_0[n] * read(x[n]) + alpha_1[n] * f_1[n] + alpha_2[n] * f_2[n]
        f[n] = zero if abs(value) < tiny else value


@jit
def _filter_forward(number, first, last, arguments):
    (rows, columns), inputs, outputs = arrays(arguments)
    x, alpha, beta, past_output, past_input = inputs
    output, rounds, last_output, recent = outputs
    steps, batch, channels = output.shape
    order_p, order_q, kept = len(alpha), len(beta) - 1, len(recent)
    for item in range(first, last):
        tile, cut = locate(item, rows, columns, batch, channels)
        for p in range(order_p):
            for b in tile:
                assign(recent[(p - order_p) % kept, b, cut], row(past_output, p, b, cut))
        for t in range(steps):
            for b in tile:
                prefetch(x, t + 1, b, cut)
                f, x_now = recent[t % kept, b, cut], row(x, t, b, cut)
                if order_p == 2 and order_q == 0:
                    f_1, f_2 = recent[(t - 1) % kept, b, cut], recent[(t - 2) % kept, b, cut]
                    second_order(f, beta[0, cut], x_now, alpha[0, cut], f_1, alpha[1, cut], f_2)
                else:
                    multiply(f, beta[0, cut], x_now)
                    for q in range(1, order_q + 1):
                        x_past = row_or_past(x, past_input, order_q, t - q, b, cut)
                        multiply_add(f, beta[q, cut], x_past)
                    for p in range(1, order_p + 1):
                        multiply_add(f, alpha[p - 1, cut], recent[(t - p) % kept, b, cut])
                    flush(f)
                if rounds:
                    write(output[t, b, cut], f)
        for p in range(order_p):
            for b in tile:
                assign(last_output[p, b, cut], recent[(steps + p - order_p) % kept, b, cut])


@jit
def _filter_forward_parallel(threads, items, arguments):
    openmp.in_parallel(_filter_forward, threads, items, arguments)


def filter_forward(
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    past_output: Tensor,
    past_input: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See ``eager.filter_forward``."""
    shape, (order_p, _) = x.shape, alpha.shape
    steps, batch, channels = shape
    output = torch.empty(steps, batch, channels, dtype=dtype)
    check_dtypes((output,), x, alpha, beta, past_output, past_input)
    last_output = torch.empty(order_p, batch, channels, dtype=x.dtype)
    # ``recent`` holds the outputs that the recurrence still needs, unrounded: F[t] at
    # t % len(recent).
    rounds = dtype != x.dtype or steps <= order_p
    recent = torch.empty(order_p + 1, batch, channels, dtype=x.dtype) if rounds else output
    share_out(
        _filter_forward,
        _filter_forward_parallel,
        shape,
        (x, alpha.contiguous(), beta.contiguous(), past_output, past_input),
        (output, rounds, last_output, recent),
    )
    return output, last_output


@jit
def _filter_backward(number, first, last, arguments):
    """A gradient that is not needed has length 0 and is not computed.

    A coefficient's gradient is summed for every group of batch rows on its own, so no two threads
    write to the same place.
    """
    (rows, columns), (steps, batch), inputs, (ones, adjoint), gradients = arrays(arguments)
    grad_output, grad_last, x, alpha, beta, output, past_output, past_input = inputs
    grad_x, grad_alpha, grad_beta, grad_past_output, grad_past_input = gradients
    order_p, order_q, channels = len(alpha), len(beta) - 1, alpha.shape[1]
    kept = len(adjoint)
    for item in range(first, last):
        tile, cut = locate(item, rows, columns, batch, channels)
        group = tile.start // rows
        for t in range(steps - 1, -1, -1):
            for b in tile:
                prefetch(grad_output, t - 1, b, cut)
                prefetch(grad_x, t - 1, b, cut)
                a, grad = adjoint[t % kept, b, cut], row(grad_output, t, b, cut)
                if order_p == 2 and t < steps - 2:
                    a_1, a_2 = adjoint[(t + 1) % kept, b, cut], adjoint[(t + 2) % kept, b, cut]
                    second_order(a, ones[cut], grad, alpha[0, cut], a_1, alpha[1, cut], a_2)
                else:
                    assign(a, grad)
                    if t >= steps - order_p:
                        add(a, row(grad_last, t - (steps - order_p), b, cut))
                    for p in range(1, min(order_p, steps - 1 - t) + 1):
                        multiply_add(a, alpha[p - 1, cut], adjoint[(t + p) % kept, b, cut])
                    flush(a)
                if len(grad_x):
                    g = grad_x[t, b, cut]
                    multiply(g, beta[0, cut], a)
                    for q in range(1, min(order_q, steps - 1 - t) + 1):
                        multiply_add(g, beta[q, cut], adjoint[(t + q) % kept, b, cut])
                if len(grad_alpha):
                    prefetch(output, t - order_p - 1, b, cut)
                    for p in range(1, order_p + 1):
                        total = grad_alpha[group, p - 1, cut]
                        if t >= p:  # two calls, since the rows may differ in dtype
                            correlate(total, a, row(output, t - p, b, cut))
                        else:
                            correlate(total, a, row(past_output, order_p + t - p, b, cut))
                if len(grad_beta):
                    prefetch(x, t - order_q - 1, b, cut)
                    for q in range(order_q + 1):
                        x_past = row_or_past(x, past_input, order_q, t - q, b, cut)
                        correlate(grad_beta[group, q, cut], a, x_past)
        # The value at time past - order goes into step t, 0 <= t <= past, through the coefficient
        # of lag t + order - past.
        for b in tile:
            for past in range(len(grad_past_output)):
                for t in range(min(past + 1, steps)):
                    a = adjoint[t % kept, b, cut]
                    weight = alpha[t + order_p - past - 1, cut]
                    multiply_add(grad_past_output[past, b, cut], weight, a)
            for past in range(len(grad_past_input)):
                for t in range(min(past + 1, steps)):
                    a = adjoint[t % kept, b, cut]
                    weight = beta[t + order_q - past, cut]
                    multiply_add(grad_past_input[past, b, cut], weight, a)


@jit
def _filter_backward_parallel(threads, items, arguments):
    openmp.in_parallel(_filter_backward, threads, items, arguments)


def filter_backward(
    grad_output: Tensor,
    grad_last: Tensor,
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    output: Tensor,
    past_output: Tensor,
    past_input: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``eager.filter_backward``."""
    check_dtypes((grad_output, output), grad_last, x, alpha, beta, past_output, past_input)
    need_x, need_alpha, need_beta, need_past_output, need_past_input = needed
    shape, dtype = grad_output.shape, alpha.dtype
    none = torch.empty(0, 0, 0, dtype=dtype)
    # ``adjoint`` holds the steps that the recurrence still needs: A[t] at t % len(adjoint).
    order_p, steps = len(alpha), len(grad_output)
    adjoint = torch.empty(max(order_p, len(beta) - 1) + 1, *shape[1:], dtype=dtype)
    grad_x = torch.empty(shape, dtype=dtype) if need_x else none
    sums = [
        torch.zeros(groups(shape) if need else 0, *coefficients.shape, dtype=torch.float64)
        for coefficients, need in ((alpha, need_alpha), (beta, need_beta))
    ]
    grad_past_output, grad_past_input = (
        torch.zeros(past.shape, dtype=dtype) if need else none
        for past, need in ((past_output, need_past_output), (past_input, need_past_input))
    )
    if need_past_output and steps < order_p:  # some of them are still among the last P outputs
        grad_past_output[steps:] = grad_last[: order_p - steps]
    inputs = (
        grad_output,
        grad_last,
        x if need_beta else none,
        alpha.contiguous(),
        beta.contiguous(),
        output if need_alpha else none,
        past_output,
        past_input,
    )
    share_out(
        _filter_backward,
        _filter_backward_parallel,
        shape,
        shape[:2],
        inputs,
        (torch.ones(shape[2], dtype=dtype), adjoint),
        (grad_x, *sums, grad_past_output, grad_past_input),
    )
    grad_alpha, grad_beta = (total.sum(0).to(dtype) for total in sums)
    gradients = grad_x, grad_alpha, grad_beta, grad_past_output, grad_past_input
    return only_needed(gradients, needed)

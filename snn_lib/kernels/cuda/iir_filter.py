"""The IIR filter's two functions on a GPU; equations and arguments are in ``eager``."""

import torch
import triton.language as tl
from torch import Tensor

from snn_lib.kernels.cuda.lanes import (
    add_products,
    add_scaled,
    address_of,
    load_each,
    locate_lanes,
    pop,
    push,
    repeat,
    store_partial_sums,
)
from snn_lib.kernels.cuda.launching import (
    STAGES,
    UNROLL,
    jit,
    launch,
    partial_sums,
    tile_shape,
    with_strides,
)


def filter_forward(
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    past_output: Tensor,
    past_input: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The filter's output and its last values; see ``eager.filter_forward``."""
    output = torch.empty(x.shape, dtype=dtype, device=x.device)
    last_output = x.new_empty(past_output.shape)
    launch(
        _filter_forward,
        tile_shape(x, output),
        x.shape,
        with_strides(x),
        alpha.contiguous(),
        beta.contiguous(),
        with_strides(past_output),
        with_strides(past_input),
        output,
        last_output,
        P=len(past_output),
        Q=len(past_input),
    )
    return output, last_output


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
    """Gradients for x, alpha, beta, past_output, past_input; see ``eager.filter_backward``."""
    need_x, need_alpha, need_beta, need_past_output, need_past_input = needed
    shape = grad_output.shape
    tile = tile_shape(grad_output, *[output] * need_alpha, *[x] * need_beta)
    grad_x = alpha.new_empty(shape if need_x else 0)
    grad_alpha = partial_sums(tile, shape, alpha, need_alpha)
    grad_beta = partial_sums(tile, shape, beta, need_beta)
    grad_past_output = alpha.new_empty(past_output.shape if need_past_output else 0)
    grad_past_input = alpha.new_empty(past_input.shape if need_past_input else 0)
    launch(
        _filter_backward,
        tile,
        shape,
        with_strides(grad_output),
        with_strides(grad_last),
        with_strides(x),
        alpha.contiguous(),
        beta.contiguous(),
        with_strides(output),
        with_strides(past_output),
        with_strides(past_input),
        grad_x,
        grad_alpha,
        grad_beta,
        grad_past_output,
        grad_past_input,
        P=len(past_output),
        Q=len(past_input),
        NEED_X=need_x,
        NEED_ALPHA=need_alpha,
        NEED_BETA=need_beta,
        NEED_PAST_OUTPUT=need_past_output,
        NEED_PAST_INPUT=need_past_input,
    )
    sums = (partial.sum(-2).to(alpha.dtype) for partial in (grad_alpha, grad_beta))
    return grad_x, *sums, grad_past_output, grad_past_input


@jit
def _filter_forward(
    x,
    alpha,
    beta,
    past_output,
    past_input,
    output,
    last_output,
    steps,
    batch,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
):
    b, n, lane, step, channels = locate_lanes(batch, channels, ROWS, COLUMNS, NEIGHBOURS)
    alphas = load_each(alpha + n, channels, n < channels, P)
    betas = load_each(beta + n, channels, n < channels, Q + 1)
    # outputs[k] is F[t-1-k] and inputs[k] is x[t-1-k]
    past_output, past_step = address_of(past_output, P - 1, b, n, 1)
    outputs = load_each(past_output, -past_step, lane, P)
    past_input, past_step = address_of(past_input, Q - 1, b, n, 1)
    inputs = load_each(past_input, -past_step, lane, Q)

    x, x_step = address_of(x, 0, b, n, NEIGHBOURS)
    output += b * channels + n
    for _ in tl.range(steps, num_stages=STAGES, loop_unroll_factor=UNROLL):
        newest = tl.load(x, lane, 0.0)
        f = add_products(betas[0] * newest, betas, 1, inputs, 0, Q)
        f = add_products(f, alphas, 0, outputs, 0, P)
        tl.store(output, f, lane)
        inputs = push(newest, inputs, Q)
        outputs = push(f, outputs, P)
        x += x_step
        output += step
    for k in tl.static_range(P):
        tl.store(last_output + (P - 1 - k) * step + b * channels + n, outputs[k], lane)


@jit
def _filter_backward(
    grad_output,
    grad_last,
    x,
    alpha,
    beta,
    output,
    past_output,
    past_input,
    grad_x,
    grad_alpha,
    grad_beta,
    grad_past_output,
    grad_past_input,
    steps,
    batch,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_ALPHA: tl.constexpr,
    NEED_BETA: tl.constexpr,
    NEED_PAST_OUTPUT: tl.constexpr,
    NEED_PAST_INPUT: tl.constexpr,
):
    ORDER: tl.constexpr = P if P > Q else Q
    b, n, lane, step, channels = locate_lanes(batch, channels, ROWS, COLUMNS, NEIGHBOURS)
    alphas = load_each(alpha + n, channels, n < channels, P)
    betas = load_each(beta + n, channels, n < channels, Q + 1)
    zero = tl.zeros((ROWS, COLUMNS), alpha.dtype.element_ty)
    no_sum = tl.zeros((ROWS, COLUMNS), tl.float64)
    alpha_sums, beta_sums = repeat(no_sum, P), repeat(no_sum, Q + 1)

    last = steps.to(tl.int64) - 1
    grad_output, grad_output_step = address_of(grad_output, last, b, n, NEIGHBOURS)
    # pending[k] is what the state after the last step adds to the k-th of the F[t] still to come
    grad_last, past_step = address_of(grad_last, P - 1, b, n, 1)
    pending = load_each(grad_last, -past_step, lane, P)
    if NEED_ALPHA:
        output, output_step = address_of(output, last, b, n, NEIGHBOURS)
    if NEED_BETA:
        x, x_step = address_of(x, last, b, n, NEIGHBOURS)
    grad_x += last * step + b * channels + n
    adjoints = repeat(zero, ORDER + 1)  # once A[t] is pushed, adjoints[k] is A[t+k]
    for _ in tl.range(steps, num_stages=STAGES, loop_unroll_factor=UNROLL):
        a = tl.load(grad_output, lane, 0.0).to(zero.dtype)
        if P > 0:
            a += pending[0]
            pending = pop(pending, zero, P)
        a = add_products(a, alphas, 0, adjoints, 0, P)
        adjoints = push(a, adjoints, ORDER + 1)
        if NEED_X:
            tl.store(grad_x, add_products(betas[0] * a, betas, 1, adjoints, 1, Q), lane)
        # F[t] went into F[t+p] through alpha_p, and x[t] into F[t+q] through beta_q
        if NEED_ALPHA:
            alpha_sums = add_scaled(alpha_sums, adjoints, 1, tl.load(output, lane, 0.0), P)
            output -= output_step
        if NEED_BETA:
            beta_sums = add_scaled(beta_sums, adjoints, 0, tl.load(x, lane, 0.0), Q + 1)
            x -= x_step
        grad_output -= grad_output_step
        grad_x -= step

    # On into the past, where A[t] is zero: past_output[P - k] and past_input[Q - k] are at t = -k.
    for k in tl.static_range(1, ORDER + 1):
        adjoints = push(zero, adjoints, ORDER + 1)
        if k <= P:
            if NEED_ALPHA:
                past, _ = address_of(past_output, P - k, b, n, 1)
                alpha_sums = add_scaled(alpha_sums, adjoints, 1, tl.load(past, lane, 0.0), P)
            if NEED_PAST_OUTPUT:
                gradient = add_products(pending[0], alphas, 0, adjoints, 1, P)
                pending = pop(pending, zero, P)
                tl.store(grad_past_output + (P - k) * step + b * channels + n, gradient, lane)
        if k <= Q:
            if NEED_BETA:
                past, _ = address_of(past_input, Q - k, b, n, 1)
                beta_sums = add_scaled(beta_sums, adjoints, 0, tl.load(past, lane, 0.0), Q + 1)
            if NEED_PAST_INPUT:
                gradient = add_products(zero, betas, 1, adjoints, 1, Q)
                tl.store(grad_past_input + (Q - k) * step + b * channels + n, gradient, lane)

    if NEED_ALPHA:
        store_partial_sums(grad_alpha, alpha_sums, batch, channels, n, P)
    if NEED_BETA:
        store_partial_sums(grad_beta, beta_sums, batch, channels, n, Q + 1)

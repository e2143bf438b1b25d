"""The GPU backend, in Triton: one kernel over the whole sequence for each of the four functions.

A program is one warp. It owns a tile of (batch, channel) lanes, one or two to a thread, and walks
through time with the recurrence's state in registers. Neighbouring lanes are neighbouring channels,
so loads and stores coalesce. Sequences come with their strides: an input that is expanded over time
or not contiguous is read in place. A coefficient's gradient is summed in each lane over time, then
in each program over its batch rows, then by PyTorch over the programs: no atomics, the same bits
every time. The sums are in double precision, where a product of two floats is exact: a fused
multiply-add serves, which makes up for the conversions. It costs up to 16 registers a thread.

A sequence in 16 bits is loaded ahead where its channels lie side by side, their number and the
strides are even, and it begins on a multiple of 16 bytes; elsewhere it is read step by step.

Spikes must be ``eager``'s, so the operations keep its order and are not fused into multiply-adds,
which round differently. Arguments and equations are in ``snn_lib.kernels.eager``.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from snn_lib import surrogate as surrogates
from snn_lib.kernels import eager

WARP = 32  # threads, a program
# Memory's latency is hidden by loading ahead of the recurrence: UNROLL steps at once, while the
# UNROLL before them are computed. No loop may therefore read what it writes itself. Filters of an
# order above UNROLL go without: Triton does not where a value is handed on over several passes.
UNROLL, STAGES = tl.constexpr(4), tl.constexpr(2)
THRESHOLD = tl.constexpr(surrogates.THRESHOLD)
SQRT_2_PI = tl.constexpr(math.sqrt(2.0 * math.pi))


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
    _launch(
        _filter_forward,
        _tile(x, output),
        x.shape,
        *_strided(x),
        alpha.contiguous(),
        beta.contiguous(),
        *_strided(past_output),
        *_strided(past_input),
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
    tile = _tile(grad_output, *[output] * need_alpha, *[x] * need_beta)
    grad_x = alpha.new_empty(shape if need_x else 0)
    grad_alpha = _partial_sums(tile, shape, alpha, need_alpha)
    grad_beta = _partial_sums(tile, shape, beta, need_beta)
    grad_past_output = alpha.new_empty(past_output.shape if need_past_output else 0)
    grad_past_input = alpha.new_empty(past_input.shape if need_past_input else 0)
    _launch(
        _filter_backward,
        tile,
        shape,
        *_strided(grad_output),
        *_strided(grad_last),
        *_strided(x),
        alpha.contiguous(),
        beta.contiguous(),
        *_strided(output),
        *_strided(past_output),
        *_strided(past_input),
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


def neuron_forward(
    current: Tensor,
    reset_decay: Tensor,
    reset_strength: Tensor,
    membrane_decay: Tensor,
    membrane: Tensor,
    reset: Tensor,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes, last membrane potential and next reset; see ``eager.neuron_forward``."""
    spikes = reset_decay.new_empty(current.shape)
    last_membrane, next_reset = (reset_decay.new_empty(current.shape[1:]) for _ in range(2))
    _launch(
        _neuron_forward,
        _tile(current),
        current.shape,
        *_strided(current),
        reset_decay.contiguous(),
        reset_strength.contiguous(),
        membrane_decay.contiguous(),
        *_strided(membrane),
        *_strided(reset),
        seed,
        spikes,
        last_membrane,
        next_reset,
        dropout,
        DROPS=dropout > 0.0,
    )
    return spikes, last_membrane, next_reset


def neuron_backward(
    grad_spikes: Tensor,
    grad_membrane: Tensor,
    grad_reset: Tensor,
    current: Tensor,
    reset_decay: Tensor,
    reset_strength: Tensor,
    membrane_decay: Tensor,
    membrane: Tensor,
    reset: Tensor,
    surrogate: str,
    width: float,
    slope: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for the six tensors of ``neuron_forward``; see ``eager.neuron_backward``."""
    if slope is not None:
        return eager.neuron_backward(
            grad_spikes,
            grad_membrane,
            grad_reset,
            current,
            reset_decay,
            reset_strength,
            membrane_decay,
            membrane,
            reset,
            surrogate,
            width,
            slope,
            dropout,
            seed,
            needed,
        )
    need_current, need_theta, need_strength, need_lambda, need_membrane, need_reset = needed
    shape = current.shape
    if slope is None:
        slope = grad_spikes  # never read
    tile = _tile(grad_spikes, current, slope)
    grad_current = current.new_empty(shape if need_current else 0)
    grad_theta = _partial_sums(tile, shape, reset_decay, need_theta)
    grad_strength = _partial_sums(tile, shape, reset_strength, need_strength)
    grad_lambda = _partial_sums(tile, shape, membrane_decay, need_lambda)
    grad_first_membrane = membrane.new_empty(membrane.shape if need_membrane else 0)
    grad_first_reset = reset.new_empty(reset.shape if need_reset else 0)
    # V[t-1] and R[t], which the neuron's second run leaves for the way back
    membranes = membrane.new_empty(shape)
    resets = reset.new_empty(shape if need_theta else 0)
    _launch(
        _neuron_backward,
        tile,
        shape,
        *_strided(grad_spikes),
        *_strided(grad_membrane),
        *_strided(grad_reset),
        *_strided(current),
        reset_decay.contiguous(),
        reset_strength.contiguous(),
        membrane_decay.contiguous(),
        *_strided(membrane),
        *_strided(reset),
        *_strided(slope),
        seed,
        membranes,
        resets,
        grad_current,
        grad_theta,
        grad_strength,
        grad_lambda,
        grad_first_membrane,
        grad_first_reset,
        width,
        dropout,
        SURROGATE=surrogate,
        DROPS=dropout > 0.0,
        NEED_CURRENT=need_current,
        NEED_THETA=need_theta,
        NEED_STRENGTH=need_strength,
        NEED_LAMBDA=need_lambda,
        NEED_MEMBRANE=need_membrane,
        NEED_RESET=need_reset,
    )
    partials = grad_theta, grad_strength, grad_lambda
    sums = (partial.sum(-2).to(reset_decay.dtype) for partial in partials)
    return grad_current, *sums, grad_first_membrane, grad_first_reset


def _tile(*sequences: Tensor) -> dict[str, int]:
    """Batch rows and channels of a program, and the neighbouring channels of each thread.

    A warp reads 32 floats of a row at once, 128 bytes: all that coalescing gives. More warps to a
    program only make it harder to share out: 64 x 300 lanes are 640 programs of one warp, at most
    5 of them on each of 132 multiprocessors (4.8 on average), but 160 of four, at most 2 (1.2).

    What loads ahead copies 4 bytes at least, which are two neighbours in 16 bits. They may be read
    as one where no stride lets a row begin between them.
    """
    _, _, channels = sequences[0].shape
    sizes = [channels, *(size for sequence in sequences for size in sequence.stride()[:2])]
    halves = any(sequence.itemsize == 2 for sequence in sequences)
    neighbours = 2 if halves and all(size % 2 == 0 for size in sizes) else 1
    columns = min(triton.next_power_of_2(max(channels, 1)), WARP * neighbours)
    return {"ROWS": WARP * neighbours // columns, "COLUMNS": columns, "NEIGHBOURS": neighbours}


def _launch(kernel, tile: dict[str, int], shape: torch.Size, *arguments, **constants) -> None:
    """Runs a kernel with enough programs to cover every lane of sequences of this shape."""
    steps, batch, channels = shape
    programs = triton.cdiv(batch, tile["ROWS"]) * triton.cdiv(channels, tile["COLUMNS"])
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](
            *arguments,
            steps,
            batch,
            channels,
            **tile,
            **constants,
            num_warps=1,
            enable_fp_fusion=False,
        )


def _strided(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    return tensor, tensor.stride()


def _partial_sums(
    tile: dict[str, int], shape: torch.Size, coefficients: Tensor, need: bool
) -> Tensor:
    """Room for a coefficient's gradient, one batch block a row, ``(..., blocks, N)``."""
    _, batch, channels = shape
    blocks = triton.cdiv(batch, tile["ROWS"])
    room = (*coefficients.shape[:-1], blocks, channels) if need else (0, 0)
    return coefficients.new_empty(room, dtype=torch.float64)


# A kernel compiled anew for sizes that happen to be 1 or divisible by 16 would gain nothing.
_jit = triton.jit(do_not_specialize=["steps", "batch", "channels"])


@_jit
def _filter_forward(
    x,
    x_stride,
    alpha,
    beta,
    past_output,
    past_output_stride,
    past_input,
    past_input_stride,
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
    b, n, lane, step, channels = _lanes(batch, channels, ROWS, COLUMNS, NEIGHBOURS)
    alphas = _load_each(alpha + n, channels, n < channels, P)
    betas = _load_each(beta + n, channels, n < channels, Q + 1)
    # outputs[k] is F[t-1-k] and inputs[k] is x[t-1-k]
    past_output, past_step = _at(past_output, past_output_stride, P - 1, b, n, 1)
    outputs = _load_each(past_output, -past_step, lane, P)
    past_input, past_step = _at(past_input, past_input_stride, Q - 1, b, n, 1)
    inputs = _load_each(past_input, -past_step, lane, Q)

    x, x_step = _at(x, x_stride, 0, b, n, NEIGHBOURS)
    output += b * channels + n
    for _ in tl.range(steps, num_stages=STAGES, loop_unroll_factor=UNROLL):
        newest = tl.load(x, lane, 0.0)
        f = _add_products(betas[0] * newest, betas, 1, inputs, 0, Q)
        f = _add_products(f, alphas, 0, outputs, 0, P)
        tl.store(output, f, lane)
        inputs = _push(newest, inputs, Q)
        outputs = _push(f, outputs, P)
        x += x_step
        output += step
    for k in tl.static_range(P):
        tl.store(last_output + (P - 1 - k) * step + b * channels + n, outputs[k], lane)


@_jit
def _filter_backward(
    grad_output,
    grad_output_stride,
    grad_last,
    grad_last_stride,
    x,
    x_stride,
    alpha,
    beta,
    output,
    output_stride,
    past_output,
    past_output_stride,
    past_input,
    past_input_stride,
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
    b, n, lane, step, channels = _lanes(batch, channels, ROWS, COLUMNS, NEIGHBOURS)
    alphas = _load_each(alpha + n, channels, n < channels, P)
    betas = _load_each(beta + n, channels, n < channels, Q + 1)
    zero = tl.zeros((ROWS, COLUMNS), alpha.dtype.element_ty)
    no_sum = tl.zeros((ROWS, COLUMNS), tl.float64)
    alpha_sums, beta_sums = _repeat(no_sum, P), _repeat(no_sum, Q + 1)

    last = steps.to(tl.int64) - 1
    grad_output, grad_output_step = _at(grad_output, grad_output_stride, last, b, n, NEIGHBOURS)
    # pending[k] is what the state after the last step adds to the k-th of the F[t] still to come
    grad_last, past_step = _at(grad_last, grad_last_stride, P - 1, b, n, 1)
    pending = _load_each(grad_last, -past_step, lane, P)
    if NEED_ALPHA:
        output, output_step = _at(output, output_stride, last, b, n, NEIGHBOURS)
    if NEED_BETA:
        x, x_step = _at(x, x_stride, last, b, n, NEIGHBOURS)
    grad_x += last * step + b * channels + n
    adjoints = _repeat(zero, ORDER + 1)  # once A[t] is pushed, adjoints[k] is A[t+k]
    for _ in tl.range(steps, num_stages=STAGES, loop_unroll_factor=UNROLL):
        a = tl.load(grad_output, lane, 0.0).to(zero.dtype)
        if P > 0:
            a += pending[0]
            pending = _pop(pending, zero, P)
        a = _add_products(a, alphas, 0, adjoints, 0, P)
        adjoints = _push(a, adjoints, ORDER + 1)
        if NEED_X:
            tl.store(grad_x, _add_products(betas[0] * a, betas, 1, adjoints, 1, Q), lane)
        # F[t] went into F[t+p] through alpha_p, and x[t] into F[t+q] through beta_q
        if NEED_ALPHA:
            alpha_sums = _add_scaled(alpha_sums, adjoints, 1, tl.load(output, lane, 0.0), P)
            output -= output_step
        if NEED_BETA:
            beta_sums = _add_scaled(beta_sums, adjoints, 0, tl.load(x, lane, 0.0), Q + 1)
            x -= x_step
        grad_output -= grad_output_step
        grad_x -= step

    # On into the past, where A[t] is zero: past_output[P - k] and past_input[Q - k] are at t = -k.
    for k in tl.static_range(1, ORDER + 1):
        adjoints = _push(zero, adjoints, ORDER + 1)
        if k <= P:
            if NEED_ALPHA:
                past, _ = _at(past_output, past_output_stride, P - k, b, n, 1)
                alpha_sums = _add_scaled(alpha_sums, adjoints, 1, tl.load(past, lane, 0.0), P)
            if NEED_PAST_OUTPUT:
                gradient = _add_products(pending[0], alphas, 0, adjoints, 1, P)
                pending = _pop(pending, zero, P)
                tl.store(grad_past_output + (P - k) * step + b * channels + n, gradient, lane)
        if k <= Q:
            if NEED_BETA:
                past, _ = _at(past_input, past_input_stride, Q - k, b, n, 1)
                beta_sums = _add_scaled(beta_sums, adjoints, 0, tl.load(past, lane, 0.0), Q + 1)
            if NEED_PAST_INPUT:
                gradient = _add_products(zero, betas, 1, adjoints, 1, Q)
                tl.store(grad_past_input + (Q - k) * step + b * channels + n, gradient, lane)

    if NEED_ALPHA:
        _store_partial_sums(grad_alpha, alpha_sums, batch, channels, n, P)
    if NEED_BETA:
        _store_partial_sums(grad_beta, beta_sums, batch, channels, n, Q + 1)


@_jit
def _neuron_forward(
    current,
    current_stride,
    reset_decay,
    reset_strength,
    membrane_decay,
    membrane,
    membrane_stride,
    reset,
    reset_stride,
    seed,
    spikes,
    last_membrane,
    next_reset,
    dropout: tl.float64,
    steps,
    batch,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    DROPS: tl.constexpr,
):
    b, n, lane, step, channels = _lanes(batch, channels, ROWS, COLUMNS, NEIGHBOURS)
    theta = tl.load(reset_decay + n, n < channels, 0.0)
    strength = tl.load(reset_strength + n, n < channels, 0.0)
    decay = tl.load(membrane_decay + n, n < channels, 0.0)
    v = tl.load(membrane + b * membrane_stride[0] + n * membrane_stride[1], lane, 0.0)
    r = tl.load(reset + b * reset_stride[0] + n * reset_stride[1], lane, 0.0)
    lane_index = b * channels + n
    key, index = _numbered(seed, lane_index, DROPS)

    current, current_step = _at(current, current_stride, 0, b, n, NEIGHBOURS)
    spikes += lane_index
    for _ in tl.range(steps, num_stages=STAGES, loop_unroll_factor=UNROLL):
        v = decay * v + tl.load(current, lane, 0.0).to(v.dtype) - r
        spike = (v > THRESHOLD).to(v.dtype)
        r = theta * r + strength * spike
        tl.store(spikes, _dropped(spike, index, key, dropout, DROPS), lane)
        current += current_step
        spikes += step
        index += step.to(tl.uint32)
    tl.store(last_membrane + lane_index, v, lane)
    tl.store(next_reset + lane_index, r, lane)


@_jit
def _neuron_backward(
    grad_spikes,
    grad_spikes_stride,
    grad_membrane,
    grad_membrane_stride,
    grad_reset,
    grad_reset_stride,
    current,
    current_stride,
    reset_decay,
    reset_strength,
    membrane_decay,
    membrane,
    membrane_stride,
    reset,
    reset_stride,
    slope,
    slope_stride,
    seed,
    membranes,
    resets,
    grad_current,
    grad_theta,
    grad_strength,
    grad_lambda,
    grad_first_membrane,
    grad_first_reset,
    width: tl.float64,
    dropout: tl.float64,
    steps,
    batch,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    SURROGATE: tl.constexpr,
    DROPS: tl.constexpr,
    NEED_CURRENT: tl.constexpr,
    NEED_THETA: tl.constexpr,
    NEED_STRENGTH: tl.constexpr,
    NEED_LAMBDA: tl.constexpr,
    NEED_MEMBRANE: tl.constexpr,
    NEED_RESET: tl.constexpr,
):
    b, n, lane, step, channels = _lanes(batch, channels, ROWS, COLUMNS, NEIGHBOURS)
    theta = tl.load(reset_decay + n, n < channels, 0.0)
    strength = tl.load(reset_strength + n, n < channels, 0.0)
    decay = tl.load(membrane_decay + n, n < channels, 0.0)
    lane_index = b * channels + n

    # The neuron once more. V[t-1] and R[t], of which step t is made, go to scratch memory.
    potential = tl.load(membrane + b * membrane_stride[0] + n * membrane_stride[1], lane, 0.0)
    trace = tl.load(reset + b * reset_stride[0] + n * reset_stride[1], lane, 0.0)
    current, current_step = _at(current, current_stride, 0, b, n, NEIGHBOURS)
    membranes += lane_index
    resets += lane_index
    for _ in tl.range(steps, num_stages=STAGES, loop_unroll_factor=UNROLL):
        tl.store(membranes, potential, lane)
        if NEED_THETA:
            tl.store(resets, trace, lane)
        potential = decay * potential + tl.load(current, lane, 0.0).to(decay.dtype) - trace
        spike = (potential > THRESHOLD).to(potential.dtype)
        trace = theta * trace + strength * spike
        current += current_step
        membranes += step
        resets += step
    tl.debug_barrier()  # makes the scratch memory visible to all threads of the program

    # Back through time: v and r are what flows into V[t] and R[t+1] from the steps after t.
    v = tl.load(
        grad_membrane + b * grad_membrane_stride[0] + n * grad_membrane_stride[1], lane, 0.0
    )
    r = tl.load(grad_reset + b * grad_reset_stride[0] + n * grad_reset_stride[1], lane, 0.0)
    theta_sum = tl.zeros((ROWS, COLUMNS), tl.float64)
    strength_sum = tl.zeros((ROWS, COLUMNS), tl.float64)
    lambda_sum = tl.zeros((ROWS, COLUMNS), tl.float64)
    last = steps.to(tl.int64) - 1
    key, index = _numbered(seed, last * step + lane_index, DROPS)
    grad_spikes, grad_spikes_step = _at(grad_spikes, grad_spikes_stride, last, b, n, NEIGHBOURS)
    slope, slope_step = _at(slope, slope_stride, last, b, n, NEIGHBOURS)
    grad_current += last * step + lane_index
    for _ in tl.range(steps, num_stages=STAGES, loop_unroll_factor=UNROLL):
        membranes -= step
        resets -= step
        spike = (potential > THRESHOLD).to(v.dtype)
        grad_spike = _dropped(tl.load(grad_spikes, lane, 0.0), index, key, dropout, DROPS)
        if SURROGATE == "given":
            derivative = tl.load(slope, lane, 0.0)
        else:
            derivative = _derivative(potential, width, SURROGATE)
        wide_r = r.to(tl.float64)
        if NEED_THETA:
            theta_sum = tl.fma(wide_r, tl.load(resets, lane, 0.0).to(tl.float64), theta_sum)
        if NEED_STRENGTH:
            strength_sum = tl.fma(wide_r, spike.to(tl.float64), strength_sum)
        v = (grad_spike + strength * r) * derivative + v
        potential = tl.load(membranes, lane, 0.0)
        if NEED_LAMBDA:
            lambda_sum = tl.fma(v.to(tl.float64), potential.to(tl.float64), lambda_sum)
        if NEED_CURRENT:
            tl.store(grad_current, v, lane)
        r = theta * r - v
        v = decay * v
        grad_spikes -= grad_spikes_step
        slope -= slope_step
        grad_current -= step
        index -= step.to(tl.uint32)

    if NEED_THETA:
        _store_partial_sums(grad_theta, (theta_sum,), batch, channels, n, 1)
    if NEED_STRENGTH:
        _store_partial_sums(grad_strength, (strength_sum,), batch, channels, n, 1)
    if NEED_LAMBDA:
        _store_partial_sums(grad_lambda, (lambda_sum,), batch, channels, n, 1)
    if NEED_MEMBRANE:
        tl.store(grad_first_membrane + lane_index, v, lane)
    if NEED_RESET:
        tl.store(grad_first_reset + lane_index, r, lane)


# Sizes become 64 bits wide, since a sequence may have more than 2^31 elements. Dividing them by
# NEIGHBOURS and multiplying again tells the compiler what they are multiples of.


@triton.jit
def _lanes(batch, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """This program's batch rows, channels and mask, then the elements of a step and of a row."""
    channels = channels.to(tl.int64) // NEIGHBOURS * NEIGHBOURS
    program, across = tl.program_id(0), tl.cdiv(channels, COLUMNS)
    b = program // across * ROWS + tl.arange(0, ROWS)[:, None]
    n = program % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return b, n, (b < batch) & (n < channels), batch * channels, channels


@triton.jit
def _at(sequence, stride, t, b, n, NEIGHBOURS: tl.constexpr):
    """Where the lanes of step ``t`` are in memory, and how far those of the next are from them."""
    step = tl.cast(stride[0], tl.int64) // NEIGHBOURS * NEIGHBOURS
    row = tl.cast(stride[1], tl.int64) // NEIGHBOURS * NEIGHBOURS
    return sequence + t * step + b * row + n * stride[2], step


@triton.jit
def _store_partial_sums(partial, sums, batch, channels, n, COUNT: tl.constexpr):
    """Sums over the program's batch rows, into its own place of ``(COUNT, blocks, N)``."""
    for k in tl.static_range(COUNT):
        block = tl.program_id(0) // tl.cdiv(channels, sums[k].shape[1])
        row = k * tl.cdiv(batch, sums[k].shape[0]) + block
        total = tl.sum(sums[k], 0, keep_dims=True)
        tl.store(partial + row.to(tl.int64) * channels + n, total, n < channels)


# Triton's tuples are indexed at compile time: what they hold lives in registers.


@triton.jit
def _load_each(pointer, stride, mask, COUNT: tl.constexpr):
    values = ()
    for k in tl.static_range(COUNT):
        values += (tl.load(pointer + k * stride, mask, 0.0),)
    return values


@triton.jit
def _repeat(value, COUNT: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values += (value,)
    return values


@triton.jit
def _push(newest, values, COUNT: tl.constexpr):
    """``newest``, then the first of ``values``: COUNT in all."""
    pushed = ()
    for k in tl.static_range(COUNT):
        pushed += (newest if k == 0 else values[k - 1],)
    return pushed


@triton.jit
def _pop(values, fill, COUNT: tl.constexpr):
    """``values`` without the first, and ``fill`` at the end: COUNT in all."""
    rest = ()
    for k in tl.static_range(1, COUNT + 1):
        rest += (values[k] if k < COUNT else fill,)
    return rest


@triton.jit
def _add_products(total, weights, i: tl.constexpr, values, j: tl.constexpr, COUNT: tl.constexpr):
    """``total`` and the products of ``weights`` from the i-th on with ``values`` from the j-th."""
    for k in tl.static_range(COUNT):
        total = total + weights[i + k] * values[j + k]
    return total


@triton.jit
def _add_scaled(sums, values, j: tl.constexpr, scale, COUNT: tl.constexpr):
    """Each of ``sums`` and ``scale`` times its one of ``values``, from the j-th on."""
    added = ()
    for k in tl.static_range(COUNT):
        added += (tl.fma(values[j + k].to(tl.float64), scale.to(tl.float64), sums[k]),)
    return added


# Numbers are computed from an argument in double precision and then rounded, as PyTorch does.


@triton.jit
def _derivative(membrane, width, SURROGATE: tl.constexpr):
    """The surrogate gradients of ``snn_lib.surrogate``."""
    distance = membrane - THRESHOLD
    if SURROGATE == "gaussian":
        height = tl.full((), 1.0 / (SQRT_2_PI * width), membrane.dtype)
        steepness = tl.full((), -0.5 / (width * width), membrane.dtype)
        return height * tl.exp(distance * distance * steepness)
    else:
        tl.static_assert(SURROGATE == "fast_sigmoid")
        reach = 1.0 + tl.abs(distance) * tl.full((), 1.0 / width, membrane.dtype)
        return 1.0 / (reach * reach)


@triton.jit
def _numbered(seed, index, DROPS: tl.constexpr):
    """The seed's key, and the number of each lane's element, row-major, modulo 2^32."""
    if DROPS:
        return tl.load(seed), (tl.load(seed + 1) + index).to(tl.uint32)
    else:
        return 0, index.to(tl.uint32)


@triton.jit
def _dropped(value, index, key, dropout, DROPS: tl.constexpr):
    """``value`` times ``eager.dropout_scale``."""
    if DROPS:
        dropped_below = tl.full((), dropout * 2.0**32, tl.uint32)
        scale = tl.full((), 1.0 / (1.0 - dropout), value.dtype)
        mixed = _mix(_mix(index ^ key.to(tl.uint32)) ^ (key >> 32).to(tl.uint32))
        return tl.where(mixed >= dropped_below, value * scale, 0.0)
    else:
        return value


@triton.jit
def _mix(h):
    """32-bit finaliser of MurmurHash3 (Appleby, public domain)."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)

"""One Numba function that runs any described network, for one sample.

A network is a program: an array with one record per layer, which says what the layer does, and
where its coefficients, its state and its output are in three flat arrays. So the function is
compiled once for all networks, is kept in Numba's cache on disk, and allocates nothing.

- Weights are added up: each input that is not zero adds its row of the weights, times its value. Of
  a spike train these are the rows of the neurons that fired, and no others.
- Filters and neurons compute what the CPU's kernels compute, bit for bit, with their functions.
- A sequence runs layer by layer, ``BLOCK`` steps at a time: a row that is read from memory serves
  all steps of the block.
"""

from functools import partial

import numpy as np

from snn_lib.kernels.cpu.compiling import jit
from snn_lib.kernels.cpu.rows import add, assign, flush, multiply, multiply_add
from snn_lib.kernels.cpu.spiking_neuron import advance, fire

BLOCK = 12  # steps
GROUP = 4  # rows of weights that are added at once
CACHED = 8192  # weights that the processor keeps near it
LINE = 16  # rows begin where a line of the cache does, every 16 numbers

# What a layer does.
WEIGHTS, POOLING, FILTER, NEURON, INTEGRATOR, SUM, MEAN, LAST, MAXIMUM = range(9)

# A layer of the program. The features of maps lie channels last, (H, W, C). An nn.Linear has maps
# of one position.
LAYER = np.dtype(
    [
        (name, np.int64)
        for name in (
            "kind",
            "source",  # where the input of the first step is among the values,
            "source_stride",  # and how far it is to the next step's
            "inputs",
            "target",  # likewise the output
            "target_stride",
            "outputs",
            "coefficients",  # where they begin, in the order that the layer's function reads
            "state",  # where it begins
            "past_outputs",  # P of a filter
            "past_inputs",  # Q of a filter
            "height",  # of the input maps
            "width",
            "channels",
            "out_height",
            "out_width",
            "out_channels",
            "stride_height",
            "stride_width",
            "taps",  # where they begin in the table, two integers each
            "tap_count",
            "tap_width",  # columns of the output that a tap of a convolution reaches
            "kernel",  # where the rows of a convolution begin among its coefficients,
            "row_stride",  # and how far it is to the next row
        )
    ]
)

# --------------------------------------------------------------------------------------------------
# Weights and pooling


@jit
def _collect(x, numbers, amounts):
    """Which inputs are not zero, and their values; returns how many, up to a multiple of ``GROUP``.

    The last group is filled up with the last of these inputs, times zero.
    """
    count = 0
    for i in range(len(x)):
        numbers[count], amounts[count] = i, x[i]
        count += x[i] != 0
    if count:
        for k in range(count, count + GROUP):
            numbers[k], amounts[k] = numbers[count - 1], 0
    return count + -count % GROUP


@partial(jit, fastmath={"contract"})  # a product and its sum are rounded once
def _add_rows(rows, stride, numbers, amounts, out):
    """out += the sum of amounts[k] times row numbers[k]."""
    for k in range(0, len(numbers), GROUP):
        a, b, c, d = amounts[k], amounts[k + 1], amounts[k + 2], amounts[k + 3]
        row_a = rows[numbers[k] * stride :][: len(out)]
        row_b = rows[numbers[k + 1] * stride :][: len(out)]
        row_c = rows[numbers[k + 2] * stride :][: len(out)]
        row_d = rows[numbers[k + 3] * stride :][: len(out)]
        for n in range(len(out)):
            out[n] += a * row_a[n] + b * row_b[n] + c * row_c[n] + d * row_d[n]


@jit
def _add_chunks(rows, stride, inputs, steps, work, out, out_stride, width):
    """The rows of all steps, so few at a time that they stay in the cache from step to step."""
    counts, begun, numbers, amounts = work
    most = 1
    for t in range(steps):
        begun[t] = 0
        most = max(most, counts[t])
    chunk = 1 + (inputs if steps == 1 else CACHED * inputs // (width * most))
    for end in range(chunk, inputs + chunk, chunk):
        for t in range(steps):
            first = last = begun[t]
            while last < counts[t] and numbers[t, last + GROUP - 1] < end:
                last += GROUP
            begun[t] = last
            mine = out[t * out_stride :][:width]
            _add_rows(rows, stride, numbers[t, first:last], amounts[t, first:last], mine)


@jit
def _weigh(layer, steps, coefficients, table, values, work):
    """Every position of the input map adds, for each tap, to a stretch of the output map.

    A tap is a row of the convolution's window, or one element of it where the convolution has a
    stride or gaps. Its output begins ``(above, left)`` of the input's position.
    """
    counts, _, numbers, amounts = work
    inputs, outputs, out = layer.channels, layer.out_channels, values[layer.target :]
    kernel = coefficients[layer.kernel :]
    for t in range(steps):
        for position in range(layer.out_height * layer.out_width):
            assign(out[t * layer.target_stride + position * outputs :][:outputs], coefficients)
    for line in range(layer.height):
        for column in range(layer.width):
            x = values[layer.source + (line * layer.width + column) * inputs :]
            some = 0
            for t in range(steps):
                own = x[t * layer.source_stride :][:inputs]
                counts[t] = _collect(own, numbers[t], amounts[t])
                some += counts[t]
            for tap in range(layer.tap_count if some else 0):
                above = line + table[layer.taps + 2 * tap]
                left = column + table[layer.taps + 2 * tap + 1]
                if above % layer.stride_height or left % layer.stride_width:
                    continue
                above, left = above // layer.stride_height, left // layer.stride_width
                first, last = max(left, 0), min(left + layer.tap_width, layer.out_width)
                if 0 <= above < layer.out_height and first < last:
                    rows = kernel[tap * inputs * layer.row_stride + (first - left) * outputs :]
                    begin = (above * layer.out_width + first) * outputs
                    _add_chunks(
                        rows,
                        layer.row_stride,
                        inputs,
                        steps,
                        work,
                        out[begin:],
                        layer.target_stride,
                        (last - first) * outputs,
                    )


@jit
def _pool(layer, table, x, out):
    """The largest value of each window; what lies outside the map is none."""
    channels = layer.channels
    for line in range(layer.out_height):
        for column in range(layer.out_width):
            at = (line * layer.out_width + column) * channels
            largest = out[at : at + channels]
            largest[:] = -np.inf
            for tap in range(layer.tap_count):
                y = line * layer.stride_height + table[layer.taps + 2 * tap]
                z = column * layer.stride_width + table[layer.taps + 2 * tap + 1]
                if 0 <= y < layer.height and 0 <= z < layer.width:
                    at = (y * layer.width + z) * channels
                    values = x[at : at + channels]
                    for n in range(channels):
                        largest[n] = max(largest[n], values[n])


# --------------------------------------------------------------------------------------------------
# What has a state


@jit
def _filter(order_p, order_q, coefficients, state, x, f):
    """F[t] = sum_q beta_q x[t-q] + sum_p alpha_p F[t-p]; the state holds F and x, newest first."""
    n = len(x)
    alpha, beta = coefficients, coefficients[order_p * n :]
    past_f, past_x = state, state[order_p * n :]
    multiply(f, beta, x)
    for q in range(order_q):
        multiply_add(f, beta[(q + 1) * n :], past_x[q * n :])
    for p in range(order_p):
        multiply_add(f, alpha[p * n :], past_f[p * n :])
    flush(f)
    _remember(order_p, past_f, f)
    _remember(order_q, past_x, x)


@jit
def _remember(order, past, now):
    """Moves the past on by one step."""
    n = len(now)
    for k in range(order - 1, 0, -1):
        assign(past[k * n :][:n], past[(k - 1) * n :])
    if order:
        assign(past[:n], now)


@jit
def _spike(coefficients, state, current, spikes):
    n = len(current)
    membrane, reset = state[:n], state[n:]
    decay, theta, strength = coefficients, coefficients[n:], coefficients[2 * n :]
    advance(membrane, reset, current, decay, theta, strength)
    fire(spikes, membrane)


@jit
def _read_out(kind, coefficients, state, x, out):
    """The readout of the steps so far; the state ends with their number."""
    n = len(x)
    so_far, steps = state[:n], state[n] + 1
    state[n] = steps
    if kind == INTEGRATOR:
        decay, share = coefficients[0], coefficients[1]
        for i in range(n):
            so_far[i] = share * x[i] + decay * so_far[i]
        flush(so_far)
    elif kind == LAST:
        assign(so_far, x)
    elif kind == MAXIMUM:
        for i in range(n):
            so_far[i] = x[i] if steps == 1 else max(so_far[i], x[i])
    else:
        add(so_far, x)
    assign(out, so_far)
    if kind == MEAN:
        for i in range(n):
            out[i] /= steps


# --------------------------------------------------------------------------------------------------
# The whole network


@jit
def _run_layer(layer, steps, coefficients, table, state, values, work):
    own, past = coefficients[layer.coefficients :], state[layer.state :]
    if layer.kind == WEIGHTS:
        _weigh(layer, steps, own, table, values, work)
        return
    for t in range(steps):
        x = values[layer.source + t * layer.source_stride :][: layer.inputs]
        out = values[layer.target + t * layer.target_stride :][: layer.outputs]
        if layer.kind == POOLING:
            _pool(layer, table, x, out)
        elif layer.kind == FILTER:
            _filter(layer.past_outputs, layer.past_inputs, own, past, x, out)
        elif layer.kind == NEURON:
            _spike(own, past, x, out)
        else:
            _read_out(layer.kind, own, past, x, out)


@jit
def _is_ahead(total, lead):
    """Whether the largest sum is ahead of every other by ``lead``."""
    first = second = total.dtype.type(-np.inf)
    for value in total:
        if value > first:
            first, second = value, first
        elif value > second:
            second = value
    return first - second >= lead


@jit
def _are_finite(x):
    wrong = 0
    for t in range(len(x)):
        for n in range(x.shape[1]):
            wrong += x[t, n] - x[t, n] != 0
    return wrong == 0


@jit
def run(program, coefficients, table, state, values, work, x, out, summing, lead):
    """Runs the steps of ``x`` and changes ``state``.

    Args:
        program: records of ``LAYER``.
        coefficients, table: of all layers, numbers, and the integers of the taps.
        state: what the layers remember.
        values, work: room for the layers' outputs, and for lists of inputs.
        x: ``(T, inputs)`` of the first layer.
        out: ``(T, outputs)`` of the last layer, to be written; if ``summing``, ``(1, outputs)``, to
            be added to.
        lead: if ``summing``, it stops when one sum is ahead of every other by so much.

    Returns:
        The number of steps that it ran: none if ``x`` is not finite everywhere.
    """
    if not _are_finite(x):
        return 0
    first, last = program[0], program[len(program) - 1]
    block = 1 if summing else BLOCK
    for start in range(0, len(x), block):
        steps = min(block, len(x) - start)
        for t in range(steps):
            assign(values[t * first.source_stride :][: first.inputs], x[start + t])
        for number in range(len(program)):
            _run_layer(program[number], steps, coefficients, table, state, values, work)
        for t in range(steps):
            output = values[last.target + t * last.target_stride :][: last.outputs]
            if summing:
                add(out[0], output)
            else:
                assign(out[start + t], output)
        if summing and _is_ahead(out[0], lead):
            return start + steps
    return len(x)

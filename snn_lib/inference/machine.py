"""One Numba function that runs any described network, for one sample.

A network is an array with a record for each layer. The record says what the layer does, and where
its coefficients, its state and its output lie in three flat arrays. So the function is compiled
once for all networks and kept in Numba's cache on disk. It allocates nothing.

- Each input that is not zero adds its row of the weights, times its value. For a spike train only
  the rows of the neurons that fired are read.
- Cells are run by the kernels that train them, and so compute the same bits.
- A sequence runs layer by layer, ``BLOCK`` steps at a time. The output of a filter lasts for many
  steps, so a layer of weights after it reads each row only once for the whole block.
"""

from functools import partial

import numpy as np

from snn_lib.inference.compiling import jit, run_step

BLOCK = 3  # steps
STEP = np.int64(1)  # not a plain 1, for which Numba would compile all once more
GROUP = 4  # rows of weights that are added at once
LINE = 16  # numbers in a line of the cache, at the beginning of which each row begins

# What a layer does.
WEIGHTS, LARGEST, AVERAGE, CELL, SNAPSHOTS, RECURRENCE = range(6)

# A record. Feature maps lie with their channels last, as (H, W, C). An nn.Linear has
# maps of one position.
LAYER = np.dtype(
    [
        (name, np.int64)
        for name in (
            "kind",
            "source",  # where the input of a block's first step begins among the values
            "source_stride",  # the distance from there to the next step's input
            "inputs",
            "target",  # the same for the output
            "target_stride",
            "outputs",
            "follows_filter",  # whether the layer before lasts for many steps
            "coefficients",  # where the layer's coefficients begin
            "state",  # where its state begins
            "function",  # the address of a cell's kernel
            "following",  # that of the cell behind it, before the weights of a recurrence
            "cells",  # where the coefficients of both begin among the layer's coefficients
            "cell_after",
            "state_after",  # where the state of the cell behind it begins in the layer's state
            "height",  # those of the input maps
            "width",
            "channels",
            "out_height",
            "out_width",
            "out_channels",
            "stride_height",
            "stride_width",
            "taps",  # where the taps begin in the table, with two integers for each
            "tap_count",
            "tap_width",  # columns of the output that a tap of a convolution reaches
            "kernel",  # where the rows of weights begin among the layer's coefficients
            "row_stride",  # the distance from one row to the next
        )
    ]
)


@jit
def assign(out, x):
    """out = x."""
    for n in range(len(out)):
        out[n] = x[n]


@jit
def add(out, x):
    """out += x."""
    for n in range(len(out)):
        out[n] += x[n]


# --------------------------------------------------------------------------------------------------
# Weights and pooling


@jit
def _collect(x, stride, inputs, steps, numbers, amounts):
    """Lists the inputs that are not zero in one of the steps, and their values in each of them.

    Returns their number, rounded up to a multiple of ``GROUP``. The last group is filled up with
    the last of these inputs, with a value of zero.
    """
    size = amounts[0, :inputs]  # of each input, summed over the steps
    size[:] = 0
    for t in range(steps):
        _add_size(size, x[t * stride :])
    count = 0
    for i in range(inputs):
        numbers[count] = i
        count += size[i] != 0  # also if it is undefined
    if count == 0:
        return 0
    numbers[count : count + GROUP] = numbers[count - 1]
    for t in range(steps):
        for k in range(count):
            amounts[t, k] = x[t * stride + numbers[k]]
        amounts[t, count : count + GROUP] = 0
    return count + -count % GROUP


@jit
def _add_size(size, x):
    for i in range(len(size)):
        size[i] += abs(x[i])


@partial(jit, fastmath={"contract"})  # so that a product and its sum are rounded only once
def _add_rows(rows, stride, numbers, amounts, out):
    """Adds ``amounts[0, k]`` times row ``numbers[k]`` to ``out``, for all k.

    The rows of a group are summed first, so that fewer sums as large as ``out`` are rounded.
    """
    for k in range(0, len(numbers), GROUP):
        row_0 = rows[numbers[k] * stride :][: len(out)]
        row_1 = rows[numbers[k + 1] * stride :][: len(out)]
        row_2 = rows[numbers[k + 2] * stride :][: len(out)]
        row_3 = rows[numbers[k + 3] * stride :][: len(out)]
        a, b, c, d = amounts[0, k], amounts[0, k + 1], amounts[0, k + 2], amounts[0, k + 3]
        for n in range(len(out)):
            out[n] += a * row_0[n] + b * row_1[n] + c * row_2[n] + d * row_3[n]


@partial(jit, fastmath={"contract"})
def _add_rows_block(rows, stride, numbers, amounts, x, y, z):
    """Does this for the outputs ``x, y, z`` of three steps, each with its row of ``amounts``."""
    for k in range(0, len(numbers), GROUP):
        row_0 = rows[numbers[k] * stride :][: len(x)]
        row_1 = rows[numbers[k + 1] * stride :][: len(x)]
        row_2 = rows[numbers[k + 2] * stride :][: len(x)]
        row_3 = rows[numbers[k + 3] * stride :][: len(x)]
        a, b, c, d = amounts[0, k], amounts[0, k + 1], amounts[0, k + 2], amounts[0, k + 3]
        e, f, g, h = amounts[1, k], amounts[1, k + 1], amounts[1, k + 2], amounts[1, k + 3]
        p, q, r, s = amounts[2, k], amounts[2, k + 1], amounts[2, k + 2], amounts[2, k + 3]
        for n in range(len(x)):
            x[n] += a * row_0[n] + b * row_1[n] + c * row_2[n] + d * row_3[n]
            y[n] += e * row_0[n] + f * row_1[n] + g * row_2[n] + h * row_3[n]
            z[n] += p * row_0[n] + q * row_1[n] + r * row_2[n] + s * row_3[n]


@jit
def _weigh(layer, steps, coefficients, table, x, out, numbers, amounts):
    """Runs a layer of weights: each position of the input map adds to the output map at each tap.

    A tap is a row of the convolution's window, or a single element of it if the convolution has a
    stride or a dilation. It reaches ``tap_width`` columns of the output, the first of which lies
    ``(above, left)`` of the input's position. There are 1 or ``BLOCK`` steps; ``x`` and ``out``
    begin with the first of them.
    """
    inputs, outputs, out_next = layer.channels, layer.out_channels, layer.target_stride
    kernel = coefficients[layer.kernel :]
    for t in range(steps):
        for position in range(layer.out_height * layer.out_width):
            assign(out[t * out_next + position * outputs :][:outputs], coefficients)
    for line in range(layer.height):
        for column in range(layer.width):
            here = x[(line * layer.width + column) * inputs :]
            count = _collect(here, layer.source_stride, inputs, steps, numbers, amounts)
            for tap in range(layer.tap_count if count else 0):
                above = line + table[layer.taps + 2 * tap]
                left = column + table[layer.taps + 2 * tap + 1]
                if above % layer.stride_height or left % layer.stride_width:
                    continue
                above, left = above // layer.stride_height, left // layer.stride_width
                first, last = max(left, 0), min(left + layer.tap_width, layer.out_width)
                if not (0 <= above < layer.out_height and first < last):
                    continue
                rows = kernel[tap * inputs * layer.row_stride + (first - left) * outputs :]
                there = out[(above * layer.out_width + first) * outputs :]
                own = there[: (last - first) * outputs]
                if steps == 1:
                    _add_rows(rows, layer.row_stride, numbers[:count], amounts, own)
                else:
                    y, z = there[out_next:], there[2 * out_next :]
                    _add_rows_block(rows, layer.row_stride, numbers[:count], amounts, own, y, z)


@jit
def _pool(layer, table, x, out):
    """Finds the largest value or the mean of each window.

    Positions outside the map have no value, and in a mean zeros.
    """
    channels, averages = layer.channels, layer.kind == AVERAGE
    for line in range(layer.out_height):
        for column in range(layer.out_width):
            at = (line * layer.out_width + column) * channels
            pooled = out[at : at + channels]
            pooled[:] = 0 if averages else -np.inf
            for tap in range(layer.tap_count):
                y = line * layer.stride_height + table[layer.taps + 2 * tap]
                z = column * layer.stride_width + table[layer.taps + 2 * tap + 1]
                if 0 <= y < layer.height and 0 <= z < layer.width:
                    at = (y * layer.width + z) * channels
                    values = x[at : at + channels]
                    for n in range(channels):
                        if averages:
                            pooled[n] += values[n]
                        else:
                            pooled[n] = max(pooled[n], values[n])
            if averages:
                for n in range(channels):
                    pooled[n] /= layer.tap_count


@jit
def _recur(layer, own, past, table, x, out, numbers, amounts):
    """Runs neurons on x and on what comes back through weights; the state begins with that."""
    count = layer.inputs
    fed = past[:count]
    _weigh(layer, STEP, own, table, fed, out, numbers, amounts)
    current = out[:count]
    add(current, x)
    run_step(layer.function, count, own[layer.cells :], past[count:], current, current)
    if layer.following:
        after, state = own[layer.cell_after :], past[layer.state_after :]
        run_step(layer.following, count, after, state, current, fed)
    else:
        assign(fed, current)


@jit
def _snapshots(layer, table, state, x, out):
    """Adds the inputs whose step has come; the state holds the sums, then the number of steps.

    A tap is the step at which an input is added to an output, and the number of this input. The
    taps go through the outputs again and again.
    """
    outputs = len(out)
    state[outputs] += 1
    for tap in range(layer.tap_count):
        if table[layer.taps + 2 * tap] == state[outputs]:
            state[tap % outputs] += x[table[layer.taps + 2 * tap + 1]]
    assign(out, state)


# --------------------------------------------------------------------------------------------------
# The whole network


@jit
def _run_layer(layer, steps, coefficients, table, state, values, numbers, amounts):
    own, past = coefficients[layer.coefficients :], state[layer.state :]
    if layer.kind == WEIGHTS and layer.follows_filter and steps == BLOCK:
        x, out = values[layer.source :], values[layer.target :]
        _weigh(layer, steps, own, table, x, out, numbers, amounts)
        return
    for t in range(steps):
        x = values[layer.source + t * layer.source_stride :][: layer.inputs]
        out = values[layer.target + t * layer.target_stride :][: layer.outputs]
        if layer.kind == WEIGHTS:
            _weigh(layer, STEP, own, table, x, out, numbers, amounts)
        elif layer.kind == LARGEST or layer.kind == AVERAGE:
            _pool(layer, table, x, out)
        elif layer.kind == CELL:
            run_step(layer.function, layer.inputs, own, past, x, out)
        elif layer.kind == RECURRENCE:
            whole = values[layer.target + t * layer.target_stride :]
            _recur(layer, own, past, table, x, whole, numbers, amounts)
        else:
            _snapshots(layer, table, past, x, out)


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


@partial(jit, no_cpython_wrapper=False)  # Python calls it
def run(layers, coefficients, table, state, values, numbers, amounts, x, total, out, summing, lead):
    """Runs ``total`` steps of ``x`` and changes ``state``.

    Args:
        layers, coefficients, table: of :class:`snn_lib.inference.arrays.Arrays`.
        state, values: what the layers remember, and room for their outputs.
        numbers, amounts: room for a list of inputs that are not zero.
        x: ``(total, inputs)`` of the first layer; ``(1, inputs)`` if every step is the same. If
            that layer has weights, it then weighs one step for all.
        out: ``(T, outputs)`` of the last layer, to be written; if ``summing``, ``(1, outputs)``, to
            be added to.
        lead: if ``summing``, it stops when one sum is ahead of every other by so much.

    Returns:
        The number of steps that it ran: none if ``x`` is not finite everywhere.
    """
    if not _are_finite(x):
        return 0
    first, last = layers[0], layers[len(layers) - 1]
    weighs_once = len(x) < total and first.kind == WEIGHTS
    if weighs_once:
        assign(values[: first.inputs], x[0])
        _run_layer(first, STEP, coefficients, table, state, values, numbers, amounts)
        once = values[first.target :][: first.outputs]
        for t in range(1, BLOCK):
            assign(values[first.target + t * first.target_stride :][: first.outputs], once)
    start = 0
    while start < total:
        steps = 1 if summing or total - start < BLOCK else BLOCK
        for t in range(steps):
            now = x[min(start + t, len(x) - 1)]
            assign(values[t * first.source_stride :][: first.inputs], now)
        for number in range(weighs_once, len(layers)):
            layer = layers[number]
            _run_layer(layer, steps, coefficients, table, state, values, numbers, amounts)
        for t in range(steps):
            output = values[last.target + t * last.target_stride :][: last.outputs]
            if summing:
                add(out[0], output)
            else:
                assign(out[start + t], output)
        start += steps
        if summing and _is_ahead(out[0], lead):
            break
    return start

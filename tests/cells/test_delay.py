"""Delays against a loop over channels and steps, and what a layer with a memory has to keep."""

import copy
import math

import numpy as np
import pytest
import torch
from definitions import gradients, with_channels_last
from hypothesis import example, given
from hypothesis import strategies as st
from small_networks import assert_chunks_and_lengths_change_nothing
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jvp, vmap
from torch.library import opcheck

from snn_lib import Chunked, Delay, Repeat, Sequential, parameter_groups, use_backend

DOUBLE = torch.float64


def delay_by_hand(x, delays, before):
    """Each channel, interpolated by NumPy between its steps; ``before`` are the inputs before x."""
    steps = np.concatenate([before, x])
    times, output = np.arange(len(steps)) - len(before), np.empty(x.shape)
    for row, channel in np.ndindex(x.shape[1:]):
        asked = np.arange(len(x)) - delays[channel]
        output[:, row, channel] = np.interp(asked, times, steps[:, row, channel])
    return output


def layer_of(delays, longest, dtype=DOUBLE, **settings):
    """A layer with exactly these delays."""
    layer = Delay(delays.shape, delays.float(), longest, **settings).to(dtype)
    layer.steps.data.copy_(delays)
    return layer


@given(
    steps=st.integers(1, 150),
    batch=st.integers(1, 3),
    channels=st.integers(1, 140),
    longest=st.integers(1, 100),
    seed=st.integers(0, 2**32 - 1),
)
@example(0, 2, 5, 3, 0)
@example(200, 2, 65, 4, 0)
def test_each_channel_is_delayed_and_interpolated_between_steps(
    steps, batch, channels, longest, seed
):
    torch.manual_seed(seed)
    x, before = (torch.randn(n, batch, channels, dtype=DOUBLE) for n in (steps, longest))
    delays = longest * torch.rand(channels, dtype=DOUBLE)
    delays[::3] = delays[::3].round()  # whole ones, and perhaps the shortest and the longest
    expected = delay_by_hand(x.numpy(), delays.numpy(), before.numpy())
    for name in ("eager", "auto"):
        with use_backend(name):
            output, (after,) = layer_of(delays, longest)(x, (before,))
        np.testing.assert_allclose(output.detach(), expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(after, torch.cat([before, x])[steps:])


@pytest.mark.usefixtures("backend")
def test_first_and_second_derivatives_are_finite_differences():
    delays = torch.tensor([0.4, 2.0, 2.7, 5.0, 4.3], dtype=DOUBLE)
    layer = layer_of(delays - torch.tensor([0, 1e-3, 0, 1e-3, 0]), 5)  # where it has a derivative

    def run(x, before, steps):
        output, (after,) = functional_call(layer, {"steps": steps}, (x, (before,)))
        return output, after

    inputs = torch.randn(7, 2, 5), torch.randn(5, 2, 5), layer.steps.detach()
    inputs = [tensor.to(DOUBLE).requires_grad_() for tensor in inputs]
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@pytest.mark.usefixtures("backend")
def test_the_gradient_of_a_delay_is_the_difference_of_the_two_steps_it_lies_between():
    layer = layer_of(torch.tensor([1.25, 3.0, 0.0], dtype=DOUBLE), 3)
    x = torch.randn(9, 1, 3, dtype=DOUBLE)
    layer(x)[0][6].sum().backward()  # at step 6
    neighbours = [x[4, 0, 0] - x[5, 0, 0], x[3, 0, 1] - x[4, 0, 1], x[5, 0, 2] - x[6, 0, 2]]
    torch.testing.assert_close(layer.steps.grad, torch.stack(neighbours))


def test_the_operators_and_their_derivatives_pass_pytorch_s_checks():
    sequence, start = torch.randn(9, 2, 3, dtype=DOUBLE), torch.tensor([-4, 0, 7])
    parts, gradient = torch.randn(2, 3, dtype=DOUBLE), torch.randn(6, 2, 3, dtype=DOUBLE)
    for tensor in (sequence, parts, gradient):
        tensor.requires_grad_()
    opcheck(torch.ops.snn.interpolate, (sequence, start, parts, 6))
    opcheck(torch.ops.snn.correlate, (gradient, sequence, start))


def test_kernels_in_float32_with_any_number_of_threads_give_the_bits_of_plain_pytorch(threads):
    pytest.importorskip("llvmlite")
    layer, x = Delay(70, lambda shape: 30 * torch.rand(shape), 30), torch.randn(300, 5, 70)
    with use_backend("eager"):
        expected = layer(x)[0]
    for count in (1, 3):
        threads(count)
        assert torch.equal(layer(x)[0], expected)


def test_chunks_and_lengths_change_nothing_and_bytes_are_taken():
    layer = layer_of(4 * torch.rand(6, dtype=DOUBLE), 4)
    x = torch.randint(0, 2, (20, 4, 6), dtype=torch.uint8)
    lengths = torch.tensor([20, 5, 0, 2])
    assert_chunks_and_lengths_change_nothing(layer, x, 3, lengths)  # shorter than the longest delay
    direct, chunks = (
        gradients(lambda x, run=run: [run(x)[0]], [x.double()])
        for run in (layer, Chunked(layer, 3))
    )
    torch.testing.assert_close(direct, chunks)


def test_an_input_that_is_the_same_at_every_step_may_be_expanded():
    layer = layer_of(torch.tensor([0.5, 2.0], dtype=DOUBLE), 2)
    x = torch.randn(1, 3, 2, dtype=DOUBLE)
    assert torch.equal(layer(x.expand(5, 3, 2))[0], layer(x.repeat(5, 1, 1))[0])


@pytest.mark.parametrize("last", [False, True])
def test_positions_of_a_map_share_the_delay_of_their_channel(last):
    delays = torch.tensor([0.5, 3.0], dtype=DOUBLE)
    maps, rows = layer_of(delays.view(2, 1, 1), 3), layer_of(delays, 3)
    x = torch.randn(6, 3, 2, 4, 5, dtype=DOUBLE)
    output, (after,) = maps(with_channels_last(x) if last else x)
    assert output.stride(2) == (1 if last else 20)  # maps stay as they lie in memory
    for y, z in np.ndindex(4, 5):
        expected, (expected_after,) = rows(x[..., y, z])
        assert torch.equal(output[..., y, z], expected)
        assert torch.equal(after[..., y, z], expected_after)
    rest = with_channels_last(x[3:]) if last else x[3:]
    assert torch.equal(maps(rest, (maps(x[:3])[1][0],))[0], maps(x)[0][3:])


def test_an_input_that_is_repeated_has_several_delays():
    several = Sequential(Repeat(2), Delay(4, torch.tensor([0.0, 1.0, 2.0, 3.0]), 3))
    x = torch.randn(8, 1, 2)
    output, _ = several(x)
    for channel, delay in enumerate([0, 1, 2, 3]):
        torch.testing.assert_close(output[delay:, 0, channel], x[: 8 - delay, 0, channel % 2])


@pytest.mark.parametrize("moved", [-7.0, 30.0])
def test_delays_that_an_optimiser_moves_out_of_range_are_pulled_back(moved):
    layer, edge = layer_of(torch.tensor([2.5, 1.0], dtype=DOUBLE), 4), min(max(moved, 0.0), 4.0)
    x = torch.randn(9, 2, 2, dtype=DOUBLE)
    layer.steps.data[0] = moved
    layer.eval()(x)
    assert layer.steps[0] == moved  # evaluation changes nothing
    torch.testing.assert_close(layer(x)[0], layer_of(torch.tensor([edge, 1.0]), 4)(x)[0])
    layer.train()(x)[0].sum().backward()
    assert layer.steps[0] == edge
    assert layer.steps.grad[0] != 0  # so that it can leave the edge
    layer.steps.data[0] = moved
    assert copy.deepcopy(layer).state_dict()["steps"][0] == edge


def test_delays_learn_at_the_rate_of_the_weights_without_weight_decay():
    model = Sequential(Delay(3, 1.0, 5), nn.Linear(3, 2))
    groups = parameter_groups(model, lr=1.0, coefficient_lr_scale=0.01)
    (own,) = [group for group in groups if group["params"][0] is model[0].steps]
    assert (len(own["params"]), own["lr"], own["weight_decay"]) == (1, 1.0, 0.0)
    assert sum(len(group["params"]) for group in groups) == 3


def test_fixed_delays_are_no_parameters():
    layer = Delay(3, 1.5, 5, train=False)
    assert not [*layer.parameters()]
    assert torch.equal(layer.state_dict()["steps"], torch.full((3,), 1.5))


def test_output_has_the_dtype_of_autocast_or_the_layer_and_the_state_stays_in_float32():
    x = torch.randn(5, 2, 3)
    layer = Delay(3, torch.tensor([0.5, 1.0, 2.0]), 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x)[0], layer.float()(x)[0].bfloat16())
    low, (state,) = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert (low.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(low, layer(x.bfloat16())[0].bfloat16())


def test_transforms_the_compiler_and_export_give_the_same():
    layer = layer_of(3 * torch.rand(4, dtype=DOUBLE), 3)
    x, tangent = torch.randn(2, 6, 2, 4, dtype=DOUBLE)

    def run(x):
        return layer(x)[0]

    torch.testing.assert_close(jvp(run, (x,), (tangent,))[1], run(tangent))  # it is linear
    many = torch.stack([x, tangent])
    torch.testing.assert_close(vmap(run)(many), torch.stack([run(x), run(tangent)]))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, expected = (gradients(lambda x, f=f: f(x)[:1], [x]) for f in (compiled, layer))
    torch.testing.assert_close(found, expected)
    exported = torch.export.export(layer.eval(), (x,)).module()
    assert torch.equal(exported(x)[0], layer(x)[0])


def test_a_delay_that_is_no_number_gives_nan_in_its_own_channel_alone():
    layer = Delay(2, 1.0, 3)
    layer.steps.data[0] = math.nan
    output, _ = layer(torch.randn(5, 2, 2))
    assert output[..., 0].isnan().all()
    assert output[..., 1].isfinite().all()


def interpolate(start):
    return torch.ops.snn.interpolate(torch.zeros(9, 2, 3), start, torch.zeros(2, 3), 9)


REFUSED = [  # what is built or run, and the words
    *((lambda steps=steps: Delay(3, steps, 5), r"steps is .*, expected a delay in \[0, 5\]")
      for steps in (-0.5, 5.5, math.nan, math.inf)),
    (lambda: Delay(3, [1.0, 2.0], 5), r"steps has the shape \(2,\), expected \(3,\) or a number"),
    (lambda: Delay(3, 0.0, 0), "longest is 0, expected a whole number of at least 1"),
    (lambda: Delay(3, 1.0, 5)(torch.zeros(4, 2, 7)),
     r"x has shape \(4, 2, 7\), expected .* features of the layer's shape \(3,\)"),
    (lambda: Delay(3, 1.0, 5)(torch.zeros(4, 3)), "x has shape"),
    (lambda: Delay(3, 1.0, 5)(torch.zeros(4, 2, 3, device="meta")), "x is on meta, expected cpu"),
    (lambda: Delay(3, 1.0, 5)(torch.zeros(4, 2, 3) * 1j), "x is in torch.complex64"),
    (lambda: Delay(3, 1.0, 5)(torch.zeros(4, 2, 3), (torch.zeros(4, 2, 3),)), "state has shape"),
    (lambda: Delay(3, 1.0, 5)(torch.zeros(4, 2, 3), ()), r"has 0 entries, expected 1: \(past"),
    (lambda: Delay(3, 1.0, 5)(torch.zeros(4, 2, 3), torch.zeros(5, 2, 3)), "state is a Tensor"),
    (lambda: interpolate(torch.zeros(2, dtype=torch.int64)), "do not fit each other"),
    (lambda: interpolate(torch.zeros(3, dtype=torch.int32)), "do not fit each other"),
]  # fmt: skip


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("wrong", [12.0, -1.0, math.nan])
def test_delays_of_a_file_that_the_layer_does_not_allow_are_refused(wrong, train):
    delay = Delay(3, 0.0, 5, train=train)
    with pytest.raises(RuntimeError, match=f"steps is {wrong:g}, expected a delay in .0, 5"):
        delay.load_state_dict({"steps": torch.tensor([1.0, wrong, 2.0])})


def test_a_delay_that_low_precision_rounds_up_is_the_longest():
    x, delay = torch.randn(400, 1, 1), Delay(1, 303.0, 303).bfloat16()
    expected = torch.cat([torch.zeros(303, 1, 1), x.bfloat16()[:97]])
    output, _ = delay(x.bfloat16())
    assert torch.equal(output.float(), expected)
    output.float().square().sum().backward()
    exact = Delay(1, 303.0, 303)
    exact(x.bfloat16().float())[0].square().sum().backward()
    torch.testing.assert_close(delay.steps.grad.float(), exact.steps.grad, rtol=0.02, atol=0)


def test_a_delay_that_is_set_beyond_the_longest_is_the_longest():
    x, delay = torch.randn(9, 2, 3), Delay(3, 0.0, 5, train=False)
    delay.steps.fill_(12.0)
    assert torch.equal(delay(x)[0], Delay(3, 5.0, 5)(x)[0])


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_bad_delays_and_inputs_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()

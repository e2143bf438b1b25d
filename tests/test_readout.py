"""Readouts against a loop over the samples, each at its own length."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from small_networks import in_parts
from torch import nn

from snn_lib import Chunked, LowPassSynapse, Output, Sequential
from snn_lib.containers import tensors_in
from snn_lib.penalties import rate_penalty
from snn_lib.readout import (
    READOUTS,
    Last,
    LeakyIntegrator,
    Mean,
    Snapshots,
    first_lead,
    until_clear,
)

T, B, N = 9, 4, 3
LENGTHS = torch.tensor([9, 1, 5, 8])


def leaky(own):
    decay, membrane = math.exp(-1 / 20.0), torch.zeros(own.shape[1:])
    for value in own:
        membrane = decay * membrane + (1 - decay) * value
    return membrane


DEFINITIONS = {
    "count": lambda own: own.sum(0),
    "mean": lambda own: own.mean(0),
    "last": lambda own: own[-1],
    "maximum": lambda own: own.max(0).values,
    "leaky": leaky,
}


@pytest.mark.parametrize("features", [(), (N,), (2, N), (2, N, 4)])
@pytest.mark.parametrize("name", READOUTS)
def test_every_readout_reads_each_sequence_over_its_own_steps(name, features):
    output = torch.randn(T, B, *features) - 1.0
    readout = READOUTS[name]()
    whole = torch.stack([DEFINITIONS[name](output[:, b]) for b in range(B)])
    torch.testing.assert_close(readout(output), whole)
    own = torch.stack([DEFINITIONS[name](output[:length, b]) for b, length in enumerate(LENGTHS)])
    torch.testing.assert_close(readout(output, LENGTHS), own)
    torch.testing.assert_close(readout(output, torch.full((B,), T)), whole)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", READOUTS)
def test_a_readout_that_ends_a_network_answers_as_behind_it(name, batch_first):
    before = Sequential(nn.Linear(2, N), LowPassSynapse(N, 3.0))
    x, readout, after = torch.rand(T, B, 2), READOUTS[name](), nn.Linear(N, 5)
    given = x.transpose(0, 1) if batch_first else x
    expected = after(readout(before(x)[0], LENGTHS))
    for layers in ((*before, readout, after), (*before, Sequential(readout, after))):
        network = Sequential(*layers, batch_first=batch_first)
        torch.testing.assert_close(network(given, lengths=LENGTHS)[0], expected)
        torch.testing.assert_close(network.layerwise(given, lengths=LENGTHS)[0][-1], expected)
        torch.testing.assert_close(network(given)[0], after(readout(before(x)[0])))


@pytest.mark.parametrize("kind", [Sequential, nn.Sequential])
def test_a_readout_in_a_network_is_refused_where_it_would_not_see_the_whole_sequence(kind):
    network, x = Sequential(nn.Linear(2, N), kind(Mean())), torch.rand(T, B, 2)
    _, state = Sequential(LowPassSynapse(2, 3.0), *network)(x)
    with pytest.raises(ValueError, match=r"Mean.* begins anew with each call: run whole seq"):
        Sequential(LowPassSynapse(2, 3.0), *network)(x, state)
    with pytest.raises(ValueError, match=r"begins anew|would answer once for each chunk"):
        Chunked(network, 3)
    within = Sequential(nn.Linear(2, N), nn.Sequential(Mean()))
    with pytest.raises(ValueError, match="layer 1: the Mean in this Sequential is handed no len"):
        within(x, lengths=LENGTHS)


def test_a_network_with_a_readout_is_compiled_and_exported_with_its_lengths():
    torch.compiler.reset()
    network, x = Sequential(nn.Linear(2, N), LowPassSynapse(N, 3.0), Mean()), torch.rand(T, B, 2)
    expected, _ = network(x, lengths=LENGTHS)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(network, (x,), {"lengths": LENGTHS}).module()
    for run in (compiled, exported):
        torch.testing.assert_close(run(x, lengths=LENGTHS)[0], expected)


def test_the_last_step_of_a_network_may_be_read_after_each_part_of_a_sequence():
    network, x = Sequential(LowPassSynapse(2, 3.0), Last()), torch.rand(T, B, 2)
    state = None
    for begin in range(0, T, 3):
        answer, state = network(x[begin : begin + 3], state)
        assert torch.equal(answer, network(x[: begin + 3])[0])
    with pytest.raises(ValueError, match="has a readout, which would answer once for each chunk"):
        Chunked(network, 3)


@pytest.mark.parametrize("name", READOUTS)
def test_a_length_beyond_the_steps_counts_as_all_of_them(name):
    output, readout = torch.randn(T, B, N), READOUTS[name]()
    beyond = torch.tensor([T + 5, 1, 5, T + 1])
    torch.testing.assert_close(readout(output, beyond), readout(output, beyond.clamp(max=T)))


def test_count_and_mean_without_steps_are_zero():
    output, lengths = torch.randn(T, 2, N), torch.tensor([0, T])
    for name in ("count", "mean"):
        assert READOUTS[name]()(output, lengths)[0].tolist() == [0.0] * N


@pytest.mark.parametrize("name", READOUTS)
def test_padding_may_be_nan(name):
    output = torch.randn(T, B, N)
    clean, readout = output.clone(), READOUTS[name]()
    for b, length in enumerate(LENGTHS):
        output[length:, b] = math.nan
    assert torch.equal(readout(output, LENGTHS), readout(clean, LENGTHS))


@pytest.mark.parametrize("kind", READOUTS.values())
def test_readouts_are_built_on_any_default_device(kind):
    with torch.device("meta"):
        layer = kind()
    torch.testing.assert_close(layer(torch.ones(T, B, N)), kind()(torch.ones(T, B, N)))


@pytest.mark.parametrize("layer", [*(make() for make in READOUTS.values()), Snapshots([2])])
def test_lengths_may_be_on_the_cpu_wherever_the_sequences_are(layer):
    layer = layer.to("meta")
    state = (None,) if isinstance(layer, Snapshots) else ()
    output = layer(torch.empty(T, B, N, device="meta"), *state, LENGTHS)
    assert all(part.is_meta for part in tensors_in(output))


@pytest.mark.parametrize("name", [*READOUTS, "snapshots"])
@pytest.mark.parametrize(
    "lengths", [[2, 3, 4, 5], torch.tensor([2]), torch.tensor(2), torch.ones(B), LENGTHS > 3]
)
def test_lengths_that_are_not_a_whole_number_for_each_sequence_are_refused(name, lengths):
    readout = READOUTS[name]() if name in READOUTS else Snapshots([2])
    with pytest.raises(ValueError, match=r"lengths (are a list|have shape)"):
        readout(torch.randn(T, B, N), lengths=lengths)


@pytest.mark.parametrize("name", READOUTS)
def test_padding_has_no_gradient(name):
    output = torch.randn(T, B, N, requires_grad=True)
    READOUTS[name]()(output, LENGTHS).square().sum().backward()
    for b, length in enumerate(LENGTHS):
        assert (output.grad[length:, b] == 0).all()
        assert (output.grad[:length, b] != 0).any()


@pytest.mark.parametrize("name", ["count", "mean", "leaky"])
def test_sums_over_time_keep_their_digits_in_bfloat16(name):
    output = torch.rand(2000, 2, 3).bfloat16()
    readout = LeakyIntegrator(600) if name == "leaky" else READOUTS[name]()
    found = readout(output)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, readout(output.double()).float(), rtol=1e-4, atol=1e-5)


def snapshots_of(own, steps):
    """The definition, step by step, for one sequence ``(T, K * C, *positions)``."""
    channels = own.shape[1] // len(steps)
    y, found = torch.zeros_like(own[0, :channels]), []
    for t, now in enumerate(own, start=1):
        for part, step in zip(now.split(channels), steps, strict=True):
            y = y + part if step == t else y
        found.append(y)
    return torch.stack(found)


@pytest.mark.parametrize("positions", [(), (2, 5)])
@pytest.mark.parametrize("steps", [[T], [2, 5, T], [T, 1, 1], [4, T + 1, 4 * T]])
def test_snapshots_add_up_their_parts_of_the_input_at_their_steps(steps, positions):
    x = torch.randn(T, B, 2 * len(steps), *positions)
    whole = torch.stack([snapshots_of(x[:, b], steps) for b in range(B)], 1)
    y, _ = Snapshots(steps)(x)
    torch.testing.assert_close(y, whole)


@pytest.mark.parametrize("cut", [0, 1, 4, 5, T])
def test_snapshots_in_chunks_are_those_of_the_whole_run(cut):
    x, snapshots = torch.randn(T, B, 6), Snapshots([2, 5, 8])
    whole, end = snapshots(x)
    parts, state = in_parts(snapshots, x, [cut, T - cut])
    assert torch.equal(parts, whole)
    assert all(map(torch.equal, state, end))
    torch.testing.assert_close(Chunked(Sequential(snapshots), 2)(x)[0], whole)


def test_snapshots_of_padded_sequences_continue_at_each_sequence_s_own_end():
    x, more, snapshots = torch.randn(T, B, 6), torch.randn(T, B, 6), Snapshots([2, 7, 12])
    y, state = snapshots(x, lengths=LENGTHS)
    again, _ = snapshots(more, state)
    for b, length in enumerate(LENGTHS):
        own = snapshots_of(torch.cat([x[:length, b], more[:, b]]), snapshots.steps)
        torch.testing.assert_close(y[:length, b], own[:length])
        torch.testing.assert_close(again[:, b], own[length:])


def test_snapshots_give_gradients_to_the_steps_they_took_alone():
    x = torch.randn(T, B, 4, dtype=torch.float64, requires_grad=True)
    taken = torch.randn(B, 2, 2, dtype=torch.float64, requires_grad=True)
    snapshots = Snapshots([3, T])
    state = taken, torch.full((B,), 1)
    assert torch.autograd.gradcheck(lambda *given: snapshots(given[0], given[1:])[0], (x, *state))
    (found,) = torch.autograd.grad(snapshots(x)[0][-1].sum(), x)
    wanted = torch.zeros_like(x)
    wanted[2, :, :2] = wanted[T - 1, :, 2:] = 1.0
    assert torch.equal(found, wanted)


def test_snapshots_do_not_see_nan_in_the_steps_they_do_not_take():
    x = torch.full((T, 1, 2), math.nan)
    x[1, :, 0] = x[3, :, 1] = 1.0
    assert Snapshots([2, 4])(x)[0].flatten().tolist() == [0, 1, 1, *[2] * (T - 3)]


def test_snapshots_keep_their_digits_in_bfloat16():
    x = torch.rand(T, B, 6).bfloat16()
    y, _ = Snapshots([1, 2, 3])(x)
    assert y.dtype == torch.float32
    assert torch.equal(y[-1], x[0, :, :2].float() + x[1, :, 2:4].float() + x[2, :, 4:].float())


def test_snapshots_compile_as_one_graph():
    torch.compiler.reset()
    x, snapshots = torch.randn(T, B, 6), Snapshots([2, 5, 8])
    _, state = snapshots(x[:3])
    wanted, end = snapshots(x, state)
    y, found = torch.compile(snapshots, backend="eager", fullgraph=True)(x, state)
    assert torch.equal(y, wanted)
    assert all(map(torch.equal, found, end))


def test_an_exported_network_with_snapshots_takes_any_number_of_steps_and_samples():
    network, dynamic = Sequential(nn.Linear(4, 6), Snapshots([2, 5, 8])), torch.export.Dim.DYNAMIC
    given = (torch.randn(T, B, 4),)
    program = torch.export.export(network, given, dynamic_shapes=({0: dynamic, 1: dynamic},))
    x = torch.randn(6, 2, 4)
    torch.testing.assert_close(program.module()(x)[0], network(x)[0])


def test_for_snapshots_a_length_beyond_the_steps_counts_as_all_of_them():
    x, snapshots = torch.randn(T, B, 6), Snapshots([2, 7, 12])
    _, (taken, elapsed) = snapshots(x, lengths=LENGTHS + T)
    assert torch.equal(taken, snapshots(x)[1][0])
    assert elapsed.tolist() == [T] * B


@pytest.mark.parametrize("steps", [range(2, 7, 2), np.arange(2, 7, 2), iter([2, 4, 6])])
def test_the_steps_of_snapshots_may_be_any_whole_numbers(steps):
    assert Snapshots(steps).steps == (2, 4, 6)


def test_a_state_in_another_dtype_does_not_change_that_of_the_output():
    x, snapshots = torch.randn(T, B, 6), Snapshots([2, 5, 12])
    _, state = snapshots(x.double())
    y, (taken, _) = snapshots(x, state)
    assert y.dtype == taken.dtype == torch.float32


@pytest.mark.parametrize("lead", [0.0, 1.0, 3.0, 100.0])
def test_first_lead_is_the_first_step_at_which_a_class_is_so_far_ahead(lead):
    output = (torch.rand(T, 20, 5) < 0.4).float()
    answers, steps = first_lead(output, lead)
    for sequence in range(20):
        counts = [0.0] * 5
        for step in range(T):  # until one class is ahead of every other
            counts = [c + o for c, o in zip(counts, output[step, sequence].tolist(), strict=True)]
            *_, second, first = sorted(counts)
            if first - second >= lead:
                break
        assert steps[sequence] == step + 1
        assert counts[answers[sequence]] == max(counts)


def replayed(output):
    """A model that answers with this output, and the steps that it has been asked for."""
    seen = []

    def model(x, state):
        start = state or 0
        seen.append(len(x))
        return output[start : start + len(x)], start + len(x)

    return model, seen


@pytest.mark.parametrize("steps", [1, 2, 50])
@pytest.mark.parametrize("lead", [1.0, 3.0, 100.0])
def test_until_clear_answers_as_the_whole_run_and_runs_no_more_steps_than_needed(lead, steps):
    output = (torch.rand(T, 3, 5) < 0.4).float()
    output[:3, :, 0] = 1.0
    output[:3, :, 1:] = 0.0  # clear after three steps
    output[3] = torch.eye(5)[1]  # and no more after four
    model, seen = replayed(output)
    found = until_clear(model, torch.zeros(T, 3, 7), lead, steps)
    for one, other in zip(found, first_lead(output, lead), strict=True):
        assert torch.equal(one, other)
    needed = {1.0: 1, 3.0: 3, 100.0: T}[lead]
    assert sum(seen) == min(T, -(-needed // steps) * steps)


def test_until_clear_runs_until_every_sequence_has_once_been_clear():
    output = torch.zeros(T, 2, 3)
    output[0, 0, 1] = 2.0  # clear at once, then caught up with
    output[1, 0, 2] = 2.0
    output[4, 1, 0] = 2.0  # clear at step 5
    model, seen = replayed(output)
    answers, steps = until_clear(model, torch.zeros(T, 2, 7), lead=2.0)
    assert (answers.tolist(), steps.tolist()) == ([1, 0], [1, 5])
    assert len(seen) == 5


@pytest.mark.parametrize("steps", [1, 7])
def test_low_precision_is_added_up_in_float32_until_it_is_clear(steps):
    output = torch.zeros(500, 2, 2, dtype=torch.bfloat16)
    output[:, 0, 0], output[:, 1, 1] = 0.5, 1.0
    model, _ = replayed(output)
    found = until_clear(model, torch.zeros(500, 2, 1), 200.0, steps), first_lead(output, 200.0)
    for answers, taken in found:
        assert (answers.tolist(), taken.tolist()) == ([0, 1], [400, 200])


def run_snapshots(x, taken=None, elapsed=None):
    return Snapshots([1, 2])(x, None if taken is None else (taken, elapsed))


WHOLE = torch.zeros(B, dtype=torch.int64)
REFUSED = [  # what is built or run, and the words
    *((lambda tau=tau: LeakyIntegrator(tau), "expected a positive number of steps")
      for tau in (0.0, -1.0, math.nan)),
    *((lambda tau=tau: LeakyIntegrator(tau), "so long that the membrane does not leak in float32")
      for tau in (1e9, math.inf)),
    *((lambda steps=steps: Snapshots(steps), r"expected (a )?whole numbers? of at least 1")
      for steps in ([], [0, 1], [1.5], [-1], ["1"])),
    (lambda: run_snapshots(torch.zeros(T, B, 7)), "7 channels, expected a multiple of the 2 steps"),
    (lambda: run_snapshots(torch.zeros(T, B)), r"x has shape \(9, 4\), expected at least three"),
    (lambda: run_snapshots(torch.zeros(T, B, 6), torch.zeros(B, 3), WHOLE),
     r"state taken has shape \(4, 3\), expected \(4, 2, 3\)"),
    (lambda: run_snapshots(torch.zeros(T, B, 6), torch.zeros(B, 2, 3), WHOLE[0]),
     r"state elapsed has shape \(\), expected \(4,\)"),
    (lambda: Snapshots([2, 4])(torch.zeros(T, B, 6), ()), r"has 0 entries, expected 2: \(taken"),
    *((lambda shape=shape: first_lead(torch.zeros(shape), 1.0), "least one step and two classes")
      for shape in ((0, 2, 3), (4, 2, 1), (4, 3))),
    *((lambda lead=lead: first_lead(torch.zeros(4, 2, 3), lead), f"lead is {lead}, expected")
      for lead in (-1.0, math.nan)),
    (lambda: until_clear(replayed(torch.zeros(4, 2, 1))[0], torch.zeros(4, 2, 1), 1.0),
     "at least one step and two classes"),
    (lambda: until_clear(replayed(torch.zeros(4, 2, 3))[0], torch.zeros(4, 2, 1), 1.0, steps=0),
     "steps is 0"),
    (lambda: until_clear(Sequential(nn.Linear(3, 2), batch_first=True), torch.zeros(2, 5, 3), 1.0),
     "the model has batch_first"),
    (lambda: until_clear(nn.Sequential(Sequential(nn.Linear(3, 2), batch_first=True)), WHOLE, 1.0),
     "the model, in its part 0, has batch_first"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_bad_settings_and_inputs_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_arrays_of_a_compiled_network_are_refused_where_tensors_are_asked_for():
    x = np.zeros((T, B, 3), np.float32)
    clear = partial(first_lead, lead=1.0), partial(until_clear, nn.Linear(3, 2), lead=1.0)
    for call in (*clear, rate_penalty):
        with pytest.raises(TypeError, match="is a ndarray, expected a tensor"):
            call(x)


@pytest.mark.parametrize("kind", READOUTS.values())
def test_what_a_layer_returns_is_no_output(kind):
    """The last of (output, state) would be the state."""
    with pytest.raises(TypeError, match=r"output is a Output, expected a tensor: .* = layer"):
        kind()(Output(torch.zeros(T, B, 3), ()))

"""The compiled network against PyTorch, as a stream, in threads, and with input that is wrong."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from leaving_pytorch import (
    COMING_BACK,
    NETWORKS,
    maps,
    network,
    passed_on,
    pooled_spikes,
    spikes,
    with_readout,
)
from torch import nn

from snn_lib import (
    DualExponentialSynapse,
    IIRSynapse,
    LowPassSynapse,
    PerStep,
    Sequential,
    SpikingNeuron,
)
from snn_lib.inference import compiled, machine, quantise, to_c, to_onnx
from snn_lib.readout import READOUTS, LeakyIntegrator, Mean, SpikeCount, first_lead


def expected(model, x):
    """PyTorch's output for one sample, ``(T, *features)``."""
    with torch.no_grad():
        return model(x)[0][:, 0].numpy()


def digits():
    """A small classifier in float32, and spike trains ``(T, B, 12)``."""
    model = Sequential(
        DualExponentialSynapse(12, 4.0, 1.0), nn.Linear(12, 9), SpikingNeuron(9, 4.0)
    )
    nn.init.normal_(model[1].weight, 0.1, 0.5)
    return model.eval(), (torch.rand(40, 5, 12) > 0.6).float()


@pytest.mark.parametrize("name", [*NETWORKS, *COMING_BACK])
def test_the_compiled_network_computes_what_pytorch_computes(name):
    model, features = network(name)
    x = spikes(50, *features)
    network_ = compiled(model, features)
    output = network_.run(x[:, 0].numpy())
    target = expected(model, x)
    assert output.dtype == np.float64
    assert output.shape == target.shape
    assert np.ptp(target) > 0
    np.testing.assert_allclose(output, target, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", READOUTS)
def test_a_readout_answers_at_every_step_from_the_steps_so_far(kind):
    model, layers = with_readout(kind)
    x = spikes(20, 4) - 0.3
    output = compiled(model).run(x[:, 0].numpy())
    with torch.no_grad():
        values = layers(x)[0]
        target = [READOUTS[kind]()(values[: t + 1])[0].numpy() for t in range(len(x))]
    assert (np.diff(values.numpy(), axis=0) < 0).any()  # the last is not the largest
    np.testing.assert_allclose(output, target, rtol=1e-12, atol=1e-12)


class Louder(nn.Conv2d):
    """A convolution whose forward is PyTorch's, and calls something else."""

    def _conv_forward(self, *arguments):
        return 1.5 * super()._conv_forward(*arguments)


def test_a_layer_that_computes_something_else_than_its_kind_is_refused(tmp_path):
    model, features = maps(Louder(2, 3, 3))
    for leave in (
        compiled,
        lambda *given: to_c(given[0], tmp_path / "network.c", given[1]),
        lambda *given: quantise(given[0], torch.rand(5, 2, *given[1]), shape=given[1]),
        lambda *given: to_onnx(given[0], tmp_path / "network.onnx", given[1]),
    ):
        with pytest.raises(ValueError, match=r"^layer 1\.module computes something else in PyTor"):
            leave(model.eval(), features)
    assert not any(tmp_path.iterdir())


def test_a_network_with_batch_first_is_compiled():
    network = Sequential(nn.Linear(4, 3), LowPassSynapse(3, 2.0), batch_first=True)
    x = torch.rand(2, 20, 4)
    output = compiled(network).run(x[1].numpy())
    np.testing.assert_allclose(output, network(x)[0][1].detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [2, 3, 5, 6, 7])
def test_average_pooling_of_spikes_has_the_bits_of_pytorch(size):
    """The mean of spikes alone is 1, which is not above the threshold."""
    model, current = pooled_spikes(size)
    for part in (model, model[:2]):
        output = compiled(part, current.shape[2:]).run(current[:, 0].numpy())
        np.testing.assert_array_equal(output, expected(part, current))
    assert not expected(model, current)[:10].any()


def test_spikes_are_counted_beyond_the_whole_numbers_of_float32():
    stream = compiled(passed_on(SpikeCount()))
    stream.step([2.0**24])
    assert stream.run(np.ones((1000, 1)))[-1] == 2.0**24 + 1000


@pytest.mark.parametrize("readout", [SpikeCount(), Mean()])
def test_a_sum_that_overflows_is_infinite_from_then_on_as_in_pytorch(readout):
    x = np.float32([[3e38], [3e38], [1], [1]])
    target = [readout(torch.from_numpy(x[:end, None]))[0].numpy() for end in range(1, 5)]
    assert np.isinf(target[1:]).all()
    np.testing.assert_array_equal(compiled(passed_on(readout)).run(x), target)


def test_the_mean_of_a_long_constant_input_is_the_input():
    stream, x = compiled(passed_on(Mean())), np.broadcast_to(np.float32(0.1), (2**20, 1))
    for _ in range(4):
        mean = stream.run(x)[-1]
    np.testing.assert_allclose(mean, np.float32(0.1), rtol=2**-22)


@pytest.mark.parametrize(
    "name",
    [
        *("order 3, 2", "neurons with a membrane", "rearranged and voting", "snapshots", "delays"),
        *COMING_BACK,
    ],
)
def test_steps_and_runs_of_any_length_continue_one_stream(name):
    model, features = network(name)
    x = spikes(40, *features)[:, 0].numpy()
    stream = compiled(model, features)
    whole = stream.run(x)
    stream.reset()
    np.testing.assert_array_equal(np.stack([stream.step(step) for step in x]), whole)
    stream.reset()
    parts = [stream.run(x[:1]), stream.run(x[1:1]), stream.run(x[1:30]), stream.run(x[30:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_filters_and_neurons_are_pytorchs_bit_for_bit():
    model = Sequential(
        DualExponentialSynapse(50, 4.0, 1.0), SpikingNeuron(50, 4.0, membrane_filter=True)
    )
    x = torch.randn(100, 1, 50)
    np.testing.assert_array_equal(compiled(model).run(x[:, 0].numpy()), expected(model, x))
    synapse = Sequential(model[0])
    np.testing.assert_array_equal(compiled(synapse).run(x[:, 0].numpy()), expected(synapse, x))


def test_peek_returns_the_output_of_a_step_without_taking_it():
    model, x = digits()
    stream, sample = compiled(model), x[:, 0].numpy()
    for now, other in zip(sample, x[:, 1].numpy(), strict=True):
        stream.peek(other)
        told = stream.peek(now)
        np.testing.assert_array_equal(stream.step(now), told)
    stream.reset()
    np.testing.assert_array_equal(stream.run(sample), expected(model, x[:, :1]))


def test_streams_share_weights_and_nothing_else():
    model, x = digits()
    first = compiled(model)
    second = first.stream()
    a, b = x[:, 0].numpy(), x[:, 1].numpy()
    outputs = np.array([(first.step(one), second.step(two)) for one, two in zip(a, b, strict=True)])
    np.testing.assert_array_equal(outputs[:, 0], expected(model, x[:, :1]))
    np.testing.assert_array_equal(outputs[:, 1], expected(model, x[:, 1:2]))
    assert first._arrays is second._arrays


def test_streams_run_in_threads():
    model, x = digits()
    network_ = compiled(model)
    samples = [x[:, n % 5].numpy() for n in range(40)]

    def answer(sample):
        return network_.stream().run(sample)

    with ThreadPoolExecutor(4) as threads:
        for sample, output in zip(samples, threads.map(answer, samples), strict=True):
            np.testing.assert_array_equal(output, answer(sample))


@pytest.mark.parametrize("lead", [1, 2, 5, 1000])
def test_until_clear_stops_where_the_lead_is_large_enough(lead):
    model, x = digits()
    with torch.no_grad():
        answers, steps = first_lead(model(x)[0], lead)
    stream = compiled(model)
    for n in range(x.shape[1]):
        stream.reset()
        sample = x[:, n].numpy()
        assert stream.until_clear(sample, lead) == (answers[n], steps[n])
        # The stream stands where it stopped: it goes on with the steps that it did not run.
        rest = stream.run(sample[steps[n] :])
        np.testing.assert_array_equal(rest, expected(model, x[:, n : n + 1])[steps[n] :])


def test_until_clear_names_a_class_of_flattened_maps_by_pytorch_s_number():
    """In memory, the channels of the maps lie last."""
    model = Sequential(PerStep(nn.Conv2d(1, 2, 1)), nn.Flatten(2)).eval()
    x = torch.rand(9, 8, 1, 1, 3)
    with torch.no_grad():
        answers, steps = first_lead(model(x)[0], 0.5)
    assert len(answers.unique()) > 1
    stream = compiled(model, (1, 1, 3))
    found = [stream.until_clear(sample.numpy(), 0.5) for sample in x.unbind(1)]
    assert found == [*zip(answers.tolist(), steps.tolist(), strict=True)]


def test_a_copy_through_a_file_finds_the_kernels_of_its_own_process():
    model, x = digits()
    stream, sample = compiled(model), x[:, 0].numpy()
    stream._arrays = copy.copy(stream._arrays)
    stream._arrays.layers = stream._arrays.layers.copy()
    addresses = stream._arrays.layers["function"].copy()
    stream._arrays.layers["function"] = 0  # as those of another process, they lead nowhere
    again = pickle.loads(pickle.dumps(stream))
    np.testing.assert_array_equal(again._arrays.layers["function"], addresses)
    np.testing.assert_array_equal(again.run(sample), expected(model, x[:, :1]))


@pytest.mark.parametrize("total", [1, 3, 7])
def test_a_step_may_be_broadcast_over_time(total):
    model = Sequential(nn.Linear(4, 40), LowPassSynapse(40, 4.0), SpikingNeuron(40, 4.0))
    model.append(nn.Linear(40, 3))
    network, image = compiled(model), np.random.default_rng(0).random((1, 4), np.float32) * 4
    copied, broadcast = image.repeat(total, 0), np.broadcast_to(image, (total, 4))
    np.testing.assert_allclose(network.run(broadcast), network.stream().run(copied), rtol=1e-6)
    network.reset()
    assert network.until_clear(broadcast, 1e6) == network.stream().until_clear(copied, 1e6)


def test_a_step_that_a_filter_takes_first_may_be_broadcast_over_time():
    network = compiled(Sequential(LowPassSynapse(4, 3.0), nn.Linear(4, 3)))
    step = np.random.default_rng(0).random((1, 4), np.float32)
    copied, broadcast = step.repeat(8, 0), np.broadcast_to(step, (8, 4))
    np.testing.assert_array_equal(network.run(broadcast), network.stream().run(copied))


def test_weights_of_a_neuron_are_read_in_the_steps_in_which_it_fires_alone():
    model = Sequential(SpikingNeuron(9, 4.0), nn.Linear(9, 3))
    current = np.zeros((3, 9))
    current[0, [2, 5]] = current[1, 7] = 2.0
    with torch.no_grad():
        model[1].weight[:, 5] = torch.inf  # in another step, zero times it would be nan
    first, *others = compiled(model).run(current)
    assert not np.isfinite(first).any()
    assert np.isfinite(others).all()


def test_values_that_cancel_each_other_over_a_few_steps_are_weighed():
    """Such as what a filter of differences makes of a spike: 1, and -1 at the next step."""
    model = Sequential(IIRSynapse(4, (), (1.0, -1.0)), nn.Linear(4, 3)).eval()
    x = torch.zeros(6, 1, 4)
    x[0, 0, :2] = x[4, 0, 2:] = 1.0
    output = compiled(model).run(x[:, 0].numpy())
    np.testing.assert_allclose(output, expected(model, x), rtol=1e-6, atol=1e-7)


def test_states_that_decay_become_zero_and_no_denormal_numbers():
    stream = compiled(Sequential(LowPassSynapse(3, 2.0), SpikingNeuron(3, 2.0, True)))
    stream.run(np.ones((1, 3)))
    output = stream.run(np.zeros((300, 3)))
    assert not output[-1].any()
    assert not stream._state.any()


def test_input_may_be_of_any_real_dtype():
    model, x = digits()
    target = expected(model, x[:, :1])
    sample = x[:, 0]
    readonly = np.asfortranarray(sample.numpy())
    readonly.flags.writeable = False
    kinds = (sample.bool().numpy(), sample.int().numpy(), sample.double().numpy(), readonly, sample)
    for values in kinds:
        np.testing.assert_array_equal(compiled(model).run(values), target)
    assert len(machine.run.signatures) <= 2  # one for each dtype


def test_compiling_leaves_the_network_as_it_was_and_later_changes_of_it_do_not_count():
    model, x = digits()
    model.train()
    before = copy.deepcopy(model.state_dict())
    stream = compiled(model)
    target = stream.run(x[:, 0].numpy())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        model[1].weight.zero_()
    stream.reset()
    np.testing.assert_array_equal(stream.run(x[:, 0].numpy()), target)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (np.zeros((4, 11)), ValueError, r"shape \(11,\), expected \(12,\)"),
        (np.zeros(12), ValueError, r"shape \(\), expected \(12,\)"),
        (1.0, ValueError, r"shape \(\), expected \(12,\)"),
        ([[0.0] * 12, [0.0] * 11], ValueError, "shape"),
        (np.full((4, 12), "a"), TypeError, "cast"),
        (np.zeros((4, 12), complex), TypeError, "cast"),
        (np.ma.masked_less(np.eye(4, 12), 1), ValueError, "masked values: fill them first"),
        ([*np.ma.masked_less(np.eye(4, 12), 1)], ValueError, "masked values: fill them first"),
    ],
)
def test_input_that_does_not_fit_is_refused(value, error, words):
    stream = compiled(digits()[0])
    with pytest.raises(error, match=words):
        stream.run(value)


def test_a_step_with_a_masked_value_is_refused():
    with pytest.raises(ValueError, match="masked values: fill them first"):
        compiled(digits()[0]).step(np.ma.masked_less(np.eye(1, 12)[0], 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_input_that_is_not_finite_is_named_and_changes_no_state(bad):
    model, x = digits()
    stream, sample = compiled(model), x[:, 0].numpy()
    stream.run(sample[:10])
    wrong = sample[10:].copy()
    wrong[3, 7] = bad
    with pytest.raises(ValueError, match=f"input is {bad} in step 3, channel 7"):
        stream.run(wrong)
    with pytest.raises(ValueError, match="channel 7"):
        stream.step(wrong[3])
    np.testing.assert_array_equal(stream.run(sample[10:]), expected(model, x[:, :1])[10:])


@pytest.mark.filterwarnings("ignore:a filter's pole")
def test_a_filter_that_overflows_is_undefined_as_in_pytorch():
    model = Sequential(IIRSynapse(1, (1.0, -2.0), (1.0,)), nn.Linear(1, 2))
    x = torch.ones(600, 1, 1)
    target = expected(model, x)
    assert np.isnan(target[-1]).all()
    np.testing.assert_array_equal(np.isnan(compiled(model).run(x[:, 0].numpy())), np.isnan(target))


@pytest.mark.parametrize("tau", [20.0, 1e5])
def test_leaky_readouts_of_any_time_constant_are_exact_in_float32(tau):
    model, x = Sequential(nn.Linear(2, 2), LeakyIntegrator(tau)), torch.rand(50, 1, 2)
    with torch.no_grad():
        values = model[0](x)
        target = torch.stack([model[1](values[: t + 1])[0] for t in range(len(x))]).numpy()
    np.testing.assert_allclose(compiled(model).run(x[:, 0].numpy()), target, rtol=1e-5, atol=1e-9)


def test_a_default_device_and_autocast_change_nothing():
    model, x = digits()
    with torch.device("meta"), torch.autocast("cpu"):
        network = compiled(model)
    np.testing.assert_array_equal(network.run(x[:, 0].numpy()), expected(model, x[:, :1]))


def test_a_lead_is_rounded_as_in_pytorch():
    model = Sequential(nn.Linear(1, 2))
    nn.init.zeros_(model[0].weight)
    model[0].bias.data[:] = torch.tensor([0.7, 0.0])
    x = torch.zeros(3, 1, 1)
    for lead, step in ((0.7, 1), (1.6, 3)):
        answers, steps = first_lead(model(x)[0], lead)
        found = compiled(model).until_clear(x[:, 0].numpy(), lead)
        assert found == (answers[0], steps[0]) == (0, step)


def test_until_clear_without_steps_or_classes_and_input_beyond_float32_are_refused():
    stream = compiled(digits()[0])
    with pytest.raises(ValueError, match="0 steps"):
        stream.until_clear(np.zeros((0, 12)), 1)
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=r"inf .* in float32"):
        stream.run(np.full((1, 12), 1e300))
    single = compiled(Sequential(nn.Linear(12, 1)))
    with pytest.raises(ValueError, match="two classes"):
        single.until_clear(np.zeros((3, 12)), 1)

"""The way from a user's values to input: that of the task's own batches, and what is refused."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from recorded import some_events
from refusing import refusal

from snn_lib.data.events import Events
from snn_lib.data.preparation import (
    DigitPreparation,
    PixelPreparation,
    RecordingPreparation,
    SequencePreparation,
    SeriesPreparation,
    preparation_from,
)
from snn_lib.errors import InputError

LATENCY = {"span": 3, "threshold": 0.2, "law": "linear", "tau": 5.0, "jitter": 0.0}
SERIES = SeriesPreparation(
    mean=torch.tensor([1e8, 2.0], dtype=torch.float64),
    deviation=torch.tensor([1.0, 4.0], dtype=torch.float64),
    change=torch.tensor([1.0, 2.0]),
    block=2,
    steps=3,
    encoding="current",
    fields=8,
    threshold=0.25,
)
DIGITS = DigitPreparation(4, "constant", 0.5, **LATENCY)
PIXELS = PixelPreparation(28, 1.0, torch.arange(784).flip(0))
RECORDINGS = RecordingPreparation(5, 30.0, sensor=34, values="clipped", order="forward")
SEQUENCES = SequencePreparation([3])
ONE = Events(x=[2], y=[3], t=[7], p=[1])


@pytest.mark.parametrize("made", [SERIES, DIGITS, PIXELS, RECORDINGS, SEQUENCES], ids=repr)
def test_a_preparation_comes_back_from_a_checkpoint(made, tmp_path):
    torch.save(made.to_dict(), tmp_path / "file")
    again = preparation_from(torch.load(tmp_path / "file", weights_only=True))
    assert type(again) is type(made)
    for name, value in vars(made).items():
        assert torch.equal(value, vars(again)[name]) if torch.is_tensor(value) else True
    assert again.to_dict().keys() == made.to_dict().keys()


NO_INPUT = "its preparation makes no input"


@pytest.mark.parametrize("values", [None, {}, {"kind": "Unknown"}, {"kind": "PixelPreparation"}, 3])
def test_what_is_no_preparation_is_refused(values):
    assert refusal(preparation_from, values) == NO_INPUT


@pytest.mark.parametrize(
    ("made", "name", "value"),
    [
        (SEQUENCES, "kind", ["SequencePreparation"]),
        (SEQUENCES, "features", 3),
        (SEQUENCES, "features", ["3"]),
        (SEQUENCES, "features", [-3]),
        (SERIES, "mean", torch.zeros(3)),
        (SERIES, "mean", torch.tensor([0.0, torch.nan])),
        (SERIES, "deviation", [1.0, 2.0]),
        (SERIES, "deviation", torch.zeros(2)),
        (SERIES, "block", 0),
        (SERIES, "encoding", "Current"),
        (SERIES, "encoding", ["current"]),
        (DIGITS, "length", 0),
        (DIGITS, "length", "4"),
        (DIGITS, "max_rate", torch.inf),
        (DIGITS, "law", None),
        (PIXELS, "length", 27),
        (PIXELS, "order", torch.arange(784.0)),
        (PIXELS, "order", torch.arange(784) + 1),
        (PIXELS, "order", None),
        (RECORDINGS, "sensor", 0),
        (RECORDINGS, "merge", 0),
        (RECORDINGS, "duration", torch.nan),
        (RECORDINGS, "order", "backward"),
    ],
)
def test_a_preparation_with_a_damaged_value_is_refused(made, name, value):
    assert refusal(preparation_from, {**made.to_dict(), name: value}) == NO_INPUT


def test_checking_a_preparation_draws_no_random_numbers():
    state = torch.get_rng_state()
    preparation_from(DigitPreparation(4, "poisson", 0.5, **LATENCY).to_dict())
    assert torch.equal(torch.get_rng_state(), state)


def test_series_are_standardised_shortened_padded_and_encoded():
    long = np.array([[1e8 + 1, 6.0], [1e8 + 3, 10.0], [1e8, 2.0], [1e8 - 1, -2.0]])
    x, lengths = SERIES([long, long[:2]])
    # Means of two standardised steps: (1, 1), (3, 2) and (0, 0), (-1, -1); then their changes.
    first = torch.tensor([[2.0, 1.5, 0.0, 0.0], [-0.5, -0.5, -2.5, -1.0]])
    torch.testing.assert_close(x[:, 0], first)
    torch.testing.assert_close(x[0, 1], first[0])
    assert lengths.tolist() == [2, 1]
    assert SERIES.inputs == x.shape[2]


def test_images_become_currents_or_one_spike_a_pixel():
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    images[1, 0, 3] = 255
    x, lengths = DIGITS(images)
    assert x.shape == (4, 2, 784)
    assert lengths is None
    assert x[:, 1, 3].tolist() == [0.5] * 4
    assert x.sum() == 2
    assert torch.equal(x, DIGITS(images.float() / 255).x)
    spikes = DigitPreparation(5, "latency", 1.0, **LATENCY)(images).x
    assert spikes[:, 1, 3].tolist() == [1, 0, 0, 0, 0]
    assert spikes.sum() == 1


@pytest.mark.parametrize("tau", [3.0, 8.0])
def test_a_latency_follows_the_law_and_the_time_constant_of_the_preparation(tau):
    options = {**LATENCY, "span": 15, "law": "logarithmic", "tau": tau}
    spikes = DigitPreparation(20, "latency", 1.0, **options)(torch.full((1, 28, 28), 0.5)).x
    expected = round(tau * math.log(0.5 / (0.5 - 0.2)))
    assert (spikes.argmax(0) == expected).all()
    assert (spikes.sum(0) == 1).all()


def test_pixels_come_in_order_around_their_mean():
    images = torch.rand(2, 28, 28)
    x, _ = PIXELS(images)
    assert x.shape == (28, 2, 28)
    expected = images.flatten(1).flip(1).view(2, 28, 28).transpose(0, 1) - 0.1307
    torch.testing.assert_close(x, expected)


def test_recordings_become_frames():
    events = some_events(3, count=500)
    x, _ = RECORDINGS([events, events])
    counts = torch.from_numpy(RECORDINGS.count_events(events, 34))
    assert torch.equal(x[:, 1], counts.clamp(max=1))
    with pytest.raises(InputError, match="list of recordings"):
        RECORDINGS([np.zeros(3)])


def test_events_may_be_lists_tensors_and_whole_numbers_of_any_type():
    x, y, t, p = [3, 4], torch.tensor([5, 6]), [7.0, 9000.0], np.array([True, False])
    arrays = Events(np.array(x), y.numpy(), np.array([7, 9000]), np.array([1, 0]))
    assert torch.equal(RECORDINGS([Events(x, y, t, p)]).x, RECORDINGS([arrays]).x)


def test_images_may_be_a_list():
    images = torch.rand(2, 28, 28)
    for given in ([*images], [image.numpy() for image in images], images.tolist()):
        assert torch.equal(DIGITS(given).x, DIGITS(images).x)


def test_samples_are_prepared_on_the_cpu_whatever_the_default_device():
    sequences = [torch.randn(steps, 3) for steps in (4, 2)]
    with torch.device("meta"):
        x, lengths = SequencePreparation([3])(sequences)
    assert (x.device.type, lengths.tolist()) == ("cpu", [4, 2])


def test_sequences_enter_as_they_are():
    x = torch.rand(2, 5, 3)
    assert torch.equal(SEQUENCES(x).x, x.transpose(0, 1))
    padded, lengths = SEQUENCES([x[0], x[1, :2]])
    assert lengths.tolist() == [5, 2]
    assert not padded[2:, 1].any()


@pytest.mark.parametrize(
    ("made", "samples", "words"),
    [
        (SEQUENCES, torch.rand(2, 5, 4), r"sample 0 has shape \(5, 4\), expected \(T, 3\)"),
        (SEQUENCES, [torch.rand(5, 3), torch.rand(0, 3)], "sample 1 has shape"),
        (SEQUENCES, [], "no samples"),
        (SEQUENCES, [torch.rand(4, 3).where(torch.arange(3) != 1, torch.nan)], "step 0, channel 1"),
        (SEQUENCES, [["a"]], "sample 0 is .*, expected numbers"),
        (SERIES, [np.ones((4, 3))], "expected .T, 2."),
        (SERIES, [np.ones((4, 2)), np.full((4, 2), 1.7e308)], "a number of the size 1.7e.308: o"),
        (
            replace(SERIES, encoding="population"),
            [np.full((1, 2), 1e39)],
            "of the size 1e.39: once",
        ),
        (
            SERIES,
            [np.repeat([[-3e38, 0], [3e38, 0]], 2, axis=0)],
            "float32 does not hold it or its ch",
        ),
        (DIGITS, torch.rand(28, 28), r"expected \(samples, 28, 28\)"),
        (
            DIGITS,
            torch.rand(6, 14, 56),
            r"have the shape \(6, 14, 56\), expected \(samples, 28, 28\)",
        ),
        (DIGITS, [torch.rand(28, 28), torch.rand(28, 27)], "the images differ in their shape"),
        (DIGITS, [["a"]], "image 0 is .*, expected numbers"),
        (SEQUENCES, None, "sample 0 is None, expected numbers"),
        (RECORDINGS, [], "there are no recordings"),
        (RECORDINGS, iter([]), "there are no recordings"),
        (RECORDINGS, 3, "expected a list of recordings"),
        (
            RECORDINGS,
            [some_events(3), ONE._replace(p=[-1])],
            "recording 1: event 0 has the pol.*-1",
        ),
        (RECORDINGS, [ONE._replace(x=[34])], r"event 0 is at \(34, 3\), outside of the 34 x 34"),
        (RECORDINGS, [ONE._replace(t=[])], r"have the shapes \[\(1,\), \(1,\), \(0,\), \(1,\)\]"),
        (RECORDINGS, [Events([], [], [], [])], "recording 0 has no events"),
        (RECORDINGS, [ONE._replace(x=["a"])], "x, y, t and p are not arrays of numbers"),
        (RECORDINGS, [ONE._replace(x=[2j])], "x, y, t and p are not arrays of numbers"),
        (RECORDINGS, [ONE._replace(t=[2**70])], "x, y, t and p are not arrays of numbers"),
        (RECORDINGS, [ONE._replace(t=[torch.nan])], "has numbers that are not whole"),
        (RECORDINGS, [ONE._replace(t=[0.5])], "has numbers that are not whole"),
        (RECORDINGS, [Events([1, 2], [3, 4], [9, 5], [0, 1])], "times run backwards, event 1"),
        (SEQUENCES, torch.rand(5, 3), r"a single sequence of shape \(5, 3\)"),
        (SEQUENCES, np.ones(5), r"a single sequence of shape \(5,\)"),
        (DIGITS, torch.full((1, 28, 28), 255.0), "from 0 to 1"),
        (PIXELS, torch.full((1, 28, 28), torch.nan), "from 0 to 1"),
    ],
)
def test_samples_that_the_network_was_not_trained_on_are_refused(made, samples, words):
    assert re.search(words, refusal(made, samples))


def test_series_of_other_lengths_do_not_add_a_change_to_the_padding():
    large, longer = np.full((2, 2), 3e38), np.zeros((8, 2))
    assert SERIES([large, longer]).lengths.tolist() == [1, 4]


def test_the_fields_of_a_population_reach_two_deviations_to_either_side():
    made = replace(SERIES, encoding="population", fields=5)
    values = torch.arange(-2.0, 3.0)[:, None, None].expand(5, 1, 2)
    fields = made.encode(values).unflatten(2, (2, 5))
    for number in range(5):  # the field around -2, -1, ...
        torch.testing.assert_close(fields[number, 0, :, number], torch.ones(2))


@pytest.mark.parametrize(("bins", "step"), [("time", "2.5 ms"), ("count", "")])
def test_a_step_of_frames_of_equal_time_lasts_a_part_of_the_duration(bins, step):
    shared = {"sensor": 34, "values": "clipped", "order": "forward"}
    assert RecordingPreparation(40, 100.0, bins, **shared).step == step


@pytest.mark.parametrize(("shift", "agrees"), [(0.0, True), (1e-9, True), (1e-4, False)])
@pytest.mark.parametrize("name", ["mean", "deviation"])
def test_series_agree_if_mean_and_deviation_do_but_for_rounding(name, shift, agrees):
    for series in (SERIES, replace(SERIES, mean=SERIES.mean + 1e6)):
        saved = series.to_dict()
        saved[name] = saved[name] + shift * series.deviation
        assert series.agrees_with(saved) == agrees

"""Files of events, written by hand, event for event; and frames against counting in a loop."""

import math
from tempfile import NamedTemporaryFile

import numpy as np
import pytest
import refusing
from hypothesis import given
from hypothesis import strategies as st

from snn_lib.data.events import Events, Frames, nmnist_bytes, read_gesture, read_nmnist
from snn_lib.errors import InputError

# x, y, then the bits of polarity and microseconds: 1, 70,000, 100,000 and 100,001.
BY_HAND = bytes(
    [
        *(0, 33, 0b1000_0000, 0b0000_0000, 0b0000_0001),
        *(10, 2, 0b0000_0001, 0b0001_0001, 0b0111_0000),
        *(33, 0, 0b1000_0001, 0b1000_0110, 0b1010_0000),
        *(5, 6, 0b0000_0001, 0b1000_0110, 0b1010_0001),
    ]
)
EVENTS = [(0, 33, 1, 1), (10, 2, 70_000, 0), (33, 0, 100_000, 1), (5, 6, 100_001, 0)]
MARK = bytes([7, 240, 0, 0, 0])


def events_of(rows):
    return Events(*(np.array(column, np.int64) for column in zip(*rows, strict=True)))


def rows_of(events):
    return list(zip(*(values.tolist() for values in events), strict=True))


def refusal(read, path):
    message = refusing.refusal(read, path)
    assert str(path) in message
    return message


def test_a_file_in_n_mnist_s_form_is_read_event_for_event(tmp_path):
    path = tmp_path / "00001.bin"
    path.write_bytes(BY_HAND)
    assert rows_of(read_nmnist(path)) == EVENTS


def test_a_mark_of_overflow_is_no_event_and_moves_all_that_follow(tmp_path):
    path = tmp_path / "00001.bin"
    first, second, third, fourth = (BY_HAND[k : k + 5] for k in range(0, 20, 5))
    path.write_bytes(first + MARK + second + MARK + MARK + third + fourth)
    later = [0, 8192, 3 * 8192, 3 * 8192]
    expected = [(x, y, t + more, p) for (x, y, t, p), more in zip(EVENTS, later, strict=True)]
    assert rows_of(read_nmnist(path)) == expected


EVENT = st.tuples(*(st.integers(0, last) for last in (33, 33, 2**23 - 1, 1)))


@given(st.lists(EVENT, min_size=1, max_size=20))
def test_events_that_are_written_are_read_as_they_were(rows):
    rows.sort(key=lambda row: row[2])
    content = nmnist_bytes(events_of(rows))
    assert len(content) == 5 * len(rows)
    with NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        assert rows_of(read_nmnist(file.name)) == rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 0, 2**23, 0)], "the events are from 8388608 to 8388608 us"),
        ([(0, 0, -5, 0), (0, 0, 1, 0)], "the events are from -5 to 1 us"),
        ([(259, 1, 5, 1)], "the recording"),
        ([(3, 1, 5, -1)], "the recording"),
        ([(3, 1, 9, 1), (3, 1, 5, 1)], "the recording"),
    ],
)
def test_events_that_the_form_cannot_hold_are_not_written(rows, message):
    with pytest.raises((InputError, ValueError), match=message):
        nmnist_bytes(events_of(rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BY_HAND[:-2], "is cut in the middle of an event: it has 18 bytes"),
        (b"", "has no events"),
        (MARK, "has no events"),
        (BY_HAND + bytes([34, 0, 0b1, 0xF0, 0]), "event 4 is at (34, 0), outside of the 34 x 34"),
        (bytes([3, 255, 0, 0, 0]) + BY_HAND, "event 0 is at (3, 255), outside of the 34 x 34"),
        (BY_HAND + BY_HAND[:5], "backwards, event 4 is of 1 us, the one before it of 100001 us"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    path = tmp_path / "00001.bin"
    path.write_bytes(content)
    assert message in refusal(read_nmnist, path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for read in (read_nmnist, read_gesture):
        assert refusal(read, tmp_path / "none") == f"there is no file {tmp_path}/none"


GESTURE = [[0, 127, 1, 5], [64, 3, 0, 5], [127, 0, 1, 6000]]


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.float64])
def test_a_gesture_is_read_event_for_event(tmp_path, dtype):
    np.save(tmp_path / "3.npy", np.array(GESTURE, dtype))
    found = rows_of(read_gesture(tmp_path / "3.npy"))
    assert found == [(0, 127, 5000, 1), (64, 3, 5000, 0), (127, 0, 6_000_000, 1)]


def test_milliseconds_are_rounded_to_whole_microseconds(tmp_path):
    t = np.arange(1000, 2000)
    np.save(tmp_path / "3.npy", np.stack([0 * t, 0 * t, 0 * t, t / 1000], 1))
    assert read_gesture(tmp_path / "3.npy").t.tolist() == t.tolist()


def test_a_polarity_of_minus_one_is_darker(tmp_path):
    np.save(tmp_path / "3.npy", np.array([[0, 0, -1, 5], [0, 0, 1, 5]]))
    assert read_gesture(tmp_path / "3.npy").p.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((0, 4)), "has no events"),
        (np.zeros((3, 5)), "has an array of shape (3, 5) in float64, expected numbers (events, 4)"),
        (np.zeros(4), "has an array of shape (4,) in float64"),
        (np.array([["a"] * 4]), "in <U1, expected numbers (events, 4)"),
        (np.array([[128, 0, 0, 0]]), "event 0 is at (128, 0), outside of the 128 x 128"),
        (np.array([[0, -1, 0, 0]]), "event 0 is at (0, -1), outside"),
        (np.array([[0, 0, 0, 2], [0, 0, 0, 1]]), "times run backwards, event 1 is of 1000 us"),
        (np.array([[0, 0, 0, object()]]), "cannot be read"),
        *(
            (np.insert(np.ones((2, 4)), 1, np.where(np.arange(4) == column, value, 0), axis=0), row)
            for column in range(4)
            for value, row in ((np.nan, "nan"), (np.inf, "inf"), (-1e300, "-1e+300"))
        ),
        (np.array([[0.5, 0, 0, 0]]), "event 0 is [0.5, 0.0, 0.0, 0.0], expected x and y in whole"),
        (np.array([[0, 0.5, 0, 0]]), "event 0 is [0.0, 0.5, 0.0, 0.0]"),
        (np.array([[0, 0, 2, 0]]), "event 0 is [0.0, 0.0, 2.0, 0.0]"),
    ],
)
def test_arrays_that_are_no_gesture_are_refused(tmp_path, rows, message):
    np.save(tmp_path / "3.npy", rows)
    assert message in refusal(read_gesture, tmp_path / "3.npy")


def random_events(count, sensor=34, last=400_000, seed=0):
    generator = np.random.default_rng(seed)
    x, y = generator.integers(0, sensor, (2, count))
    t = np.sort(generator.integers(0, last, count)) + 12_345  # of a clock that began earlier
    return Events(x, y, t, generator.integers(0, 2, count))


def counted(frames, events, sensor):
    """The same by its definition, an event at a time."""
    found = np.zeros((frames.length, frames.side, frames.side, 2), int)
    rows = [(x, y, t - events.t[0], p) for x, y, t, p in rows_of(events)]
    rows = [row for row in rows if row[2] < 1000 * frames.duration]
    corner = (frames.side - sensor // frames.merge) // 2
    for number, (x, y, t, p) in enumerate(rows):
        if frames.bins == "time":
            step = int(t / (1000 * frames.duration / frames.length))
        else:
            step = int(number / (len(rows) / frames.length))
        column, row = x // frames.merge + corner, y // frames.merge + corner
        if 0 <= column < frames.side and 0 <= row < frames.side:
            found[step, row, column, p] += 1
    return found


@pytest.mark.parametrize(
    ("frames", "sensor"),
    [
        (Frames(12, 300.0), 34),
        (Frames(8, 400.0, "count"), 34),
        (Frames(10, 1000.0), 34),  # longer than the recording
        (Frames(70, 9.0), 34),  # steps of 128 4/7 microseconds
        (Frames(5, 300.0, side=40), 34),  # padded
        (Frames(5, 300.0, "count", side=20), 34),  # cropped
        (Frames(5, 300.0, side=33), 34),  # by a pixel
        (Frames(4, 250.0, merge=4, side=32), 128),
        (Frames(4, 256.0, "count", merge=2, side=34), 128),
        (Frames(4, 300.0, merge=4, side=8), 34),  # two pixels are left over
    ],
)
def test_frames_count_every_event_where_and_when_it_was(frames, sensor):
    events = random_events(3000, sensor)
    found = frames.count_events(events, sensor)
    assert found.dtype == np.uint8
    assert (found == counted(frames, events, sensor)).all()


@pytest.mark.parametrize("kind", [list, lambda a: a.astype("u2"), lambda a: a.astype("u8")])
def test_events_in_lists_and_in_any_integers_are_counted_alike(kind):
    events = random_events(200, last=250)
    lists = Events(*(kind(values) for values in events))
    found = Frames(7, 0.3).count_events(lists, 34)
    assert (found == Frames(7, 0.3).count_events(events, 34)).all()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((0, 0, 0.004, 1), "numbers that are not whole"),
        ((0, 0, 5, -1), "event 1 has the polarity -1"),
        ((34, 0, 5, 1), r"event 1 is at \(34, 0\)"),
        ((0, 0, -1, 1), "times run backwards"),
    ],
)
def test_events_that_make_no_sense_are_not_counted(row, words):
    events = Events(*np.array([(3, 4, 0, 1), row]).T)
    with pytest.raises(InputError, match=words):
        Frames(7, 0.3).count_events(events, 34)


def test_a_sensor_has_one_size():
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        Frames(7, 0.3).count_events(random_events(70), (34, 34))


def test_bins_of_equal_count_have_as_many_events_each():
    found = Frames(7, 500.0, "count").count_events(random_events(700), 34)
    assert found.sum((1, 2, 3)).tolist() == [100] * 7


def test_events_after_the_duration_are_not_counted():
    events = events_of([(0, 0, 0, 0), (1, 1, 9_999, 1), (2, 2, 10_000, 1)])
    for bins in ("time", "count"):
        found = Frames(2, 10.0, bins).count_events(events, 34)
        assert found.sum() == 2
        assert not found[:, 2, 2].any()


def test_more_events_than_a_byte_counts_stay_at_255():
    many = events_of([(3, 4, t, 1) for t in range(300)])
    found = Frames(1, 1.0).count_events(many, 34)
    assert found[0, 4, 3].tolist() == [0, 255]
    assert found.sum() == 255


def test_a_frame_needs_no_event_that_comes_later():
    events, frames = random_events(2000), Frames(12, 300.0)
    whole = frames.count_events(events, 34)
    for step in range(12):
        seen = (events.t - events.t[0]) < (step + 1) * 25_000
        so_far = frames.count_events(Events(*(values[seen] for values in events)), 34)
        assert (so_far[step] == whole[step]).all()


@pytest.mark.parametrize(
    "wrong",
    [{"bins": "tim"}, {"length": 0}, {"merge": 0}, {"side": 1.5}, {"duration": -1.0},
     {"duration": math.nan}],
)  # fmt: skip
def test_frames_that_cannot_be_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is .*, expected"):
        Frames(**{"length": 3, "duration": 10.0, **wrong})

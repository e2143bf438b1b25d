"""The events that an event camera records: reads and checks files, and counts events in frames.

An event camera has no shutter. A pixel sends an event whenever its light has changed by a certain
share. The event says where and when that was, and whether the light has become brighter or darker.
"""

import math
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from snn_lib.containers import whole_number
from snn_lib.errors import InputError, require
from snn_lib.files import read_array, read_file

NMNIST_SIDE, GESTURE_SIDE = 34, 128  # pixels of the sensor
OVERFLOW_ROW, OVERFLOW = 240, 2**13  # an entry with this y adds so many microseconds to the clock
LATEST = 2**23 - 1  # the latest time that an event can have, in microseconds
LARGEST = 2**40  # numbers in a file must be smaller; as milliseconds this is 35 years
MOST = 255  # an element of a frame counts up to so many events


class Events(NamedTuple):
    """The events of a recording in the order of time, int64 ``(events,)`` each.

    Attributes:
        x, y: column and row of the pixel.
        t: time in microseconds.
        p: polarity, 1 for brighter and 0 for darker.
    """

    x: np.ndarray
    y: np.ndarray
    t: np.ndarray
    p: np.ndarray


def read_nmnist(path: Path | str) -> Events:
    """Reads a file in the form of N-MNIST.

    An event has five bytes: x, y, and three bytes whose highest bit is the polarity and whose other
    23 bits are the time in microseconds. An entry in row 240 is not an event: it adds 2^13
    microseconds to the times of all events after it.

    Source: Orchard, Jayawant, Cohen, Thakor, Frontiers in Neuroscience 2015, doi
    10.3389/fnins.2015.00437.

    Raises:
        InputError: the file cannot be read, ends within an event or has no events, an event lies
            outside of the 34 x 34 pixels, or times run backwards.
    """
    content = read_file(path)
    require(
        len(content) % 5 == 0,
        f"{path} is cut in the middle of an event: it has {len(content)} bytes, five an event",
    )
    raw = np.frombuffer(content, np.uint8).reshape(-1, 5).astype(np.int64)
    x, y, high, middle, low = raw.T
    marks = y == OVERFLOW_ROW
    t = ((high & 127) << 16 | middle << 8 | low) + OVERFLOW * np.cumsum(marks)
    events = Events(*(values[~marks] for values in (x, y, t, high >> 7)))
    return check_events(events, NMNIST_SIDE, path)


def nmnist_bytes(events: Events) -> bytes:
    """Writes the events as bytes that :func:`read_nmnist` reads.

    Raises:
        InputError: there are no events, they are not whole numbers, an event lies outside of the
            34 x 34 pixels, a polarity is neither 0 nor 1, or times run backwards.
        ValueError: an event is before 0 or later than 2^23 - 1 microseconds.
    """
    events = check_events(events, NMNIST_SIDE, "the recording")
    if not 0 <= events.t[0] <= events.t[-1] <= LATEST:
        raise ValueError(
            f"the events are from {events.t[0]} to {events.t[-1]} us, 23 bits hold 0 to {LATEST}"
        )
    high = events.p << 7 | events.t >> 16
    columns = events.x, events.y, high, events.t >> 8 & 255, events.t & 255
    return np.stack(columns, 1).astype(np.uint8).tobytes()


def read_gesture(path: Path | str) -> Events:
    """Reads a file of DVS128 Gesture as Tonic unpacks it.

    The file is an ``.npy`` with a row for each event: x, y, polarity (0 or -1 for darker, 1 for
    brighter) and the time in milliseconds.

    Raises:
        InputError: the file cannot be read or has no events, an event has a number that makes no
            sense or lies outside of the 128 x 128 pixels, or times run backwards.
    """
    rows = read_array(path)
    require(
        rows.ndim == 2 and rows.shape[1] == 4 and rows.dtype.kind in "iuf",
        f"{path} has an array of shape {rows.shape} in {rows.dtype}, expected numbers (events, 4): "
        "x, y, polarity and milliseconds",
    )
    rows = rows.astype(np.float64)
    sensible = (np.abs(rows) < LARGEST).all(1) & np.isin(rows[:, 2], (-1, 0, 1))
    sensible &= (rows[:, :2] == np.rint(rows[:, :2])).all(1)
    if not sensible.all():
        number = sensible.argmin()
        raise InputError(
            f"{path}: event {number} is {rows[number].tolist()}, expected x and y in whole pixels, "
            "a polarity of -1, 0 or 1 and a time in milliseconds"
        )
    rows[:, 3] *= 1000  # in microseconds
    x, y, p, t = np.rint(rows).astype(np.int64).T
    return check_events(Events(x, y, t, (p > 0).astype(np.int64)), GESTURE_SIDE, path)


def check_events(events: Events, side: int, source: Path | str) -> Events:
    """Returns the events from ``source`` as arrays of int64 if they make sense.

    Raises:
        InputError: there are no events, they are not whole numbers, or more of one kind than of
            another; times run backwards; a polarity is neither 0 nor 1; or an event lies outside of
            the sensor, which has ``side`` pixels in each direction.
    """
    no_numbers = f"{source}: x, y, t and p are not arrays of numbers"
    try:
        given = [np.asarray(values) for values in events]
        require(all(values.dtype.kind in "biufO" for values in given), no_numbers)
        with np.errstate(invalid="ignore"):  # of undefined numbers, which are refused below
            arrays = [values.astype(np.int64, copy=False) for values in given]
    except (TypeError, ValueError, OverflowError):
        raise InputError(no_numbers) from None
    shapes = [values.shape for values in arrays]
    require(
        len(shapes[0]) == 1 and len(set(shapes)) == 1,
        f"{source}: x, y, t and p have the shapes {shapes}, expected as many numbers of each",
    )
    require(len(arrays[0]) > 0, f"{source} has no events")
    require(
        all((values == whole).all() for values, whole in zip(given, arrays, strict=True)),
        f"{source} has numbers that are not whole: expected x, y, t and p as integers",
    )
    events = Events(*arrays)
    binary = np.isin(events.p, (0, 1))
    if not binary.all():
        number = binary.argmin()
        raise InputError(
            f"{source}: event {number} has the polarity {events.p[number]}, expected 0 or 1"
        )
    inside = (np.minimum(events.x, events.y) >= 0) & (np.maximum(events.x, events.y) < side)
    if not inside.all():
        number = inside.argmin()
        raise InputError(
            f"{source}: event {number} is at ({events.x[number]}, {events.y[number]}), outside of "
            f"the {side} x {side} pixels"
        )
    backwards = np.diff(events.t) < 0
    if backwards.any():
        number = backwards.argmax() + 1
        raise InputError(
            f"{source}: times run backwards, event {number} is of {events.t[number]} us, the one "
            f"before it of {events.t[number - 1]} us"
        )
    return events


@dataclass(frozen=True)
class Frames:
    """How a recording becomes frames, one for each time step.

    Time counts from a recording's first event. Events after the duration or outside of the frame
    are left out. If the sensor is smaller, or the recording shorter and ``bins`` is ``"time"``, the
    rest stays empty.

    Attributes:
        length: number of frames, T.
        duration: milliseconds of the recording that are used.
        bins: whether all frames take the same ``"time"`` or have the same ``"count"`` of events,
            those outside of the frame included.
        merge: pixels of the sensor, in each direction, that become one pixel of a frame.
        side: pixels of a frame in each direction. Its middle is the middle of the sensor.

    Raises:
        ValueError: a number is not positive or not whole, or ``bins`` is another word.
    """

    length: int
    duration: float
    bins: Literal["time", "count"] = "time"
    merge: int = 1
    side: int = NMNIST_SIDE

    def __post_init__(self) -> None:
        for name in ("length", "merge", "side"):
            whole_number(getattr(self, name), name)
        if not 0 < self.duration < math.inf:  # nan too
            raise ValueError(f"duration is {self.duration}, expected milliseconds above 0")
        if self.bins not in ("time", "count"):
            raise ValueError(f"bins is {self.bins!r}, expected 'time' or 'count'")

    def count_events(
        self, events: Events, sensor: int, source: Path | str = "the recording"
    ) -> np.ndarray:
        """Counts darker and brighter events, uint8 ``(T, side, side, 2)``, up to 255.

        Args:
            events: the events of a recording.
            sensor: pixels of the sensor in each direction.
            source: what messages call the recording.

        Raises:
            InputError: as :func:`check_events`.
            TypeError: ``sensor`` is no whole number, since only square sensors are known.
        """
        events = check_events(events, index(sensor), source)
        time = events.t - events.t[0]
        count = np.searchsorted(time, round(1000 * self.duration))
        if self.bins == "time":
            step = time[:count] * self.length // round(1000 * self.duration)
        else:
            step = np.arange(count) * self.length // max(count, 1)
        margin = (self.side - sensor // self.merge) // 2
        x, y = (values[:count] // self.merge + margin for values in (events.x, events.y))
        place = ((step * self.side + y) * self.side + x) * 2 + events.p[:count]
        outside = (np.minimum(x, y) < 0) | (np.maximum(x, y) >= self.side)
        counts = np.bincount(place[~outside], minlength=self.length * self.side**2 * 2)
        return counts.clip(max=MOST).astype(np.uint8).reshape(self.length, self.side, self.side, 2)

"""Augmentation of frames of events, against NumPy and SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from snn_lib.data.augmentation import EventAugmentationSettings, augment_events, find_origins
from snn_lib.data.batches import default_dtype

SIDE = 34
OFF = {"shift": 0.0, "rotation": 0.0, "drop": 0.0}


def changed(frames, seed=0, **options):
    config = EventAugmentationSettings(**{**OFF, **options})
    return augment_events(frames, config, torch.Generator().manual_seed(seed))


def recordings(count=3, side=SIDE):
    frames = torch.rand(count, 4, side, side, 2) * 4 * (torch.rand(count, 4, side, side, 2) < 0.2)
    return frames.to(torch.uint8)


def test_with_everything_off_recordings_stay_as_they_are():
    frames = recordings()
    assert torch.equal(changed(frames), frames)


def test_a_seed_gives_the_same_again_and_the_frames_given_stay_as_they_are():
    options, frames = {"shift": 3.0, "rotation": 15.0, "drop": 0.5}, recordings()
    before = frames.clone()
    one, again, other = (changed(frames, seed, **options) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(frames, before)
    assert (one.dtype, one.shape) == (torch.uint8, frames.shape)


def moved(frames, shift, angle=0.0):
    """The frames (T, side, side, 2) through ``find_origins``."""
    side = frames.shape[1]
    source = find_origins(side, torch.tensor([shift]).float(), torch.tensor([angle]))[0]
    padded = torch.cat([frames.flatten(1, 2), torch.zeros_like(frames[:, :1, 0])], 1)
    return padded[:, source].unflatten(1, (side, side))


def test_a_shift_of_whole_pixels_moves_to_the_right_and_down_and_cuts_off():
    frames = recordings(1)[0]
    found = moved(frames, (2.0, -3.0))
    assert torch.equal(found[:, :-3, 2:], frames[:, 3:, :-2])
    assert not found[:, -3:].any()
    assert not found[:, :, :2].any()


@pytest.mark.parametrize(("degrees", "shift"), [(90.0, (0.0, 0.0)), (7.3, (1.4, -2.2))])
def test_a_clockwise_turn_takes_the_nearest_pixel_as_scipy_does(degrees, shift):
    frames = recordings(1)[0]
    angle = math.radians(degrees)
    found = moved(frames, shift, angle).numpy()
    # In the order (row, column): clockwise, as rows count downwards.
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix = np.array([[cosine, -sine], [sine, cosine]])
    middle = np.full(2, (SIDE - 1) / 2)
    offset = middle - matrix @ (middle + np.array(shift[::-1]))
    for step in range(4):
        for polarity in range(2):
            expected = ndimage.affine_transform(
                np.pad(frames[step, ..., polarity].numpy(), SIDE),  # nothing all around
                matrix,
                offset + SIDE,
                output_shape=(SIDE, SIDE),
                order=0,
            )
            assert (found[step, ..., polarity] == expected).all()


def test_each_recording_moves_by_values_of_its_own_within_the_limits():
    frames = torch.zeros(200, 1, SIDE, SIDE, 2, dtype=torch.uint8)
    frames[:, 0, 17, 17] = 1
    found = changed(frames, shift=3.0).nonzero()
    assert len(found) == 400
    for axis in (2, 3):
        away = found[:, axis] - 17
        assert away.min() == -3
        assert away.max() == 3
    assert len({(int(r), int(c)) for r, c in found[:, 2:4]}) > 30


def test_recordings_turn_either_way_up_to_the_angle():
    """A pixel at the right edge of the frame is seen to move down and up along a circle."""
    frames = torch.zeros(400, 1, SIDE, SIDE, 2, dtype=torch.uint8)
    frames[:, 0, 14:20, 30:34] = 1
    found = changed(frames, rotation=30.0)[..., 0].float().flatten(1, 2)
    place = torch.arange(SIDE) - (SIDE - 1) / 2
    mass = found.sum((1, 2))
    down = (found.sum(2) @ place) / mass
    right = (found.sum(1) @ place) / mass
    angles = torch.atan2(down, right).rad2deg()
    assert angles.min() == pytest.approx(-30, abs=2)
    assert angles.max() == pytest.approx(30, abs=2)
    assert angles.mean() == pytest.approx(0, abs=2)


def test_events_are_dropped_one_by_one_up_to_the_share():
    frames = torch.full((300, 2, 20, 20, 2), 5, dtype=torch.uint8)
    with default_dtype(torch.float64):  # which a user may have set
        left = changed(frames, drop=0.4)
    assert set(left.unique().tolist()) == {0, 1, 2, 3, 4, 5}
    shares = left.float().mean((1, 2, 3, 4)) / 5
    assert shares.min() > 0.57
    assert shares.max() > 0.98
    assert shares.mean().item() == pytest.approx(0.8, abs=0.02)
    # Of one recording each event is kept or not by itself: a binomial count.
    kept, variance = shares, left.float().var((1, 2, 3, 4))
    torch.testing.assert_close(variance, 5 * kept * (1 - kept), atol=0.15, rtol=0.2)


def test_events_are_dropped_from_moved_recordings_too():
    frames = torch.full((200, 1, SIDE, SIDE, 2), 5, dtype=torch.uint8)
    moved_only, both = changed(frames, shift=3.0), changed(frames, shift=3.0, drop=0.4)
    assert torch.equal(moved_only > 0, moved_only == 5)
    assert not both[moved_only == 0].any()  # the places are drawn alike
    assert both[moved_only > 0].float().mean().item() == pytest.approx(5 * 0.8, rel=0.02)

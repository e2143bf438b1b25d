"""Augmentation of sequences against NumPy's interpolation, one sequence at a time."""

import numpy as np
import pytest
import torch

from snn_lib.data.augmentation import AugmentationSettings, augment_sequences, resample
from snn_lib.data.batches import Batch

LENGTHS = torch.tensor([12, 1, 7, 9])


def batch(channels=3):
    x = torch.randn(12, len(LENGTHS), channels)
    for index, length in enumerate(LENGTHS):
        x[length:, index] = 0
    return x


def changed(x, lengths=LENGTHS, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(x.shape[1], 12)  # of a sequence, as many as there are steps
    given = Batch(x, labels, lengths)
    x, same, lengths = augment_sequences(given, AugmentationSettings(**options), generator, False)
    assert torch.equal(same, labels)
    return x, lengths


def test_by_default_sequences_stay_as_they_are():
    x = batch()
    found, lengths = changed(x)
    assert torch.equal(found, x)
    assert torch.equal(lengths, LENGTHS)


def test_a_window_is_read_as_numpy_interpolates_it():
    x = batch()
    start, window = torch.tensor([1.5, 0.0, 2.0, 0.25]), torch.tensor([8.0, 1.0, 5.0, 8.5])
    new_lengths = torch.tensor([11, 2, 3, 8])
    found = resample(x, LENGTHS, start, window, new_lengths)
    assert found.shape == (11, 4, 3)
    for index, (length, new) in enumerate(zip(LENGTHS.tolist(), new_lengths.tolist(), strict=True)):
        middles = np.arange(new) + 0.5
        places = start[index].item() + middles * window[index].item() / new - 0.5
        for channel in range(3):
            expected = np.interp(places, np.arange(length), x[:length, index, channel].numpy())
            np.testing.assert_allclose(found[:new, index, channel], expected, atol=1e-5)
        assert not found[new:, index].any()


@pytest.mark.parametrize(
    "labels",
    [
        torch.randint(-1, 6, (12, 4)),
        torch.randint(2**40, (12, 4, 5)),
        torch.rand(12, 4, 3, 2, dtype=torch.float64),
        torch.rand(12, 4) < 0.5,
    ],
)
def test_each_new_step_has_the_target_of_the_nearest_one(labels):
    x = torch.arange(12.0)[:, None, None].expand(12, 4, 1)  # which tells what a step has become of
    generator = torch.Generator().manual_seed(0)
    settings = AugmentationSettings(stretch=1.9, crop=0.6)
    found = augment_sequences(Batch(x, labels, LENGTHS), settings, generator, True)
    assert found.y.dtype == labels.dtype
    assert found.y.shape[2:] == labels.shape[2:]
    assert found.lengths.tolist() != LENGTHS.tolist()
    for index, length in enumerate(found.lengths.tolist()):
        places = found.x[:length, index, 0]
        between = (places - places.floor() - 0.5).abs() < 1e-3  # where either is the nearest
        expected = labels[places.round().long(), index]
        same = (found.y[:length, index] == expected).reshape(length, -1).all(1)
        assert (same | between).all()
        assert not between.all()


def test_a_single_step_that_is_sped_up_remains_a_step():
    x, lengths = torch.rand(3, 50, 2), torch.ones(50, dtype=torch.int64)
    settings = AugmentationSettings(stretch=3.0)
    batch = Batch(x, torch.zeros(50).long(), lengths)
    found = augment_sequences(batch, settings, torch.Generator().manual_seed(0), False)
    assert found.lengths.min() == 1
    assert torch.equal(found.x[0], x[0])


def test_stretching_slows_time_as_often_as_it_speeds_it_up_by_up_to_the_factor():
    lengths = torch.full((4000,), 100)
    _, new = changed(torch.zeros(100, 4000, 1), lengths, stretch=1.5)
    assert new.min() == pytest.approx(100 / 1.5, abs=1)
    assert new.max() == pytest.approx(150, abs=1)
    assert (new / 100).log().mean() == pytest.approx(0, abs=0.02)


def test_crops_are_windows_of_every_length_and_place():
    lengths = torch.full((2000,), 100)
    ramp = torch.arange(100.0)[:, None, None].expand(100, 2000, 1)
    found, new = changed(ramp, lengths, crop=0.5)
    first, last = found[0, :, 0], found[new - 1, torch.arange(2000), 0]
    assert torch.equal(last - first + 1, new.float())  # whole steps, at the pace of before
    assert torch.equal(found, found.round())
    assert 50 <= new.min() <= 51
    assert new.max() == 100
    assert (last == 99)[new < 100].any()
    spare = 100.0 - new
    roomy = spare > 20
    assert (first / spare)[roomy].mean() == pytest.approx(0.5, abs=0.03)
    _, of_eight = changed(ramp[:8], lengths.clamp(max=8), crop=0.8)
    assert of_eight.unique().tolist() == [7, 8]  # of 8 steps, 6 would be fewer than 80 %
    found, shorter = changed(ramp, lengths // torch.tensor([1, 2]).repeat(1000), crop=0.5)
    assert 25 <= shorter[1::2].min() <= 26  # half of their own steps
    assert shorter[1::2].max() == 50
    assert shorter[1::2].float().mean() == pytest.approx(38, abs=1)
    spare = 50.0 - shorter[1::2]
    places = (found[0, 1::2, 0] / spare)[spare > 10]
    assert places.mean() == pytest.approx(0.5, abs=0.03)


def test_noise_scale_and_silence_have_the_asked_strength_and_end_with_the_sequence():
    lengths = torch.tensor([40] * 500 + [20] * 500)
    ones = torch.ones(40, 1000, 4)
    noisy, _ = changed(ones, lengths, noise=0.3)
    assert noisy[:20].mean() == pytest.approx(1.0, abs=0.01)
    alike = (noisy[:20] - 1).flatten(0, 1).T.corrcoef()
    torch.testing.assert_close(alike, torch.eye(4), atol=0.03, rtol=0)  # each channel has its own
    assert (noisy[:20] - 1).std() == pytest.approx(0.3, rel=0.02)
    assert not noisy[20:, 500:].any()
    scaled, _ = changed(ones, lengths, scale=0.2)
    assert torch.equal(scaled[0], scaled[19])  # one factor for a whole channel
    assert scaled[0].log().std() == pytest.approx(0.2, rel=0.05)
    silent, _ = changed(ones, lengths, channel_dropout=0.25)
    assert set(silent[:20].unique().tolist()) == {0.0, 1.0}
    assert silent[0].mean() == pytest.approx(0.75, abs=0.03)


def test_silenced_and_scaled_channels_have_noise_too():
    lengths = torch.tensor([400] * 50 + [100] * 50)
    tens = torch.full((400, 100, 4), 10.0)
    found, _ = changed(tens, lengths, noise=0.3, scale=0.2, channel_dropout=0.5)
    level = found[:100].mean(0)  # of each channel, (B, channels)
    silent = level.abs() < 1
    assert 0.4 < silent.float().mean() < 0.6
    for channels in (silent, ~silent):
        deviation = (found[:100] - level).std(0, correction=0)[channels]
        assert deviation.mean() == pytest.approx(0.3, rel=0.02)
    assert (level[~silent] / 10).log().std() == pytest.approx(0.2, rel=0.15)
    assert not found[100:, 50:].any()


def test_maps_change_as_their_channels_do():
    x = torch.ones(40, 300, 2, 3, 4)
    found, lengths = changed(x, None, scale=0.2, channel_dropout=0.2)
    assert lengths.tolist() == [40] * 300
    factors = found[0, :, :, 0, 0]
    assert torch.equal(found, factors[None, ..., None, None].expand_as(found))
    assert (factors == 0).float().mean() == pytest.approx(0.2, abs=0.06)
    assert factors[factors > 0].log().std() == pytest.approx(0.2, rel=0.15)
    ramp = torch.arange(40.0).view(40, 1, 1, 1, 1).expand_as(x)
    places, new = changed(ramp, None, crop=0.5, noise=0.0)
    assert torch.equal(places, places[..., :1, :1, :1].expand_as(places))
    assert new.min() < 25


def test_a_sequence_that_is_stretched_by_less_than_half_a_step_keeps_its_length():
    _, new = changed(torch.zeros(20, 1000, 1), torch.full((1000,), 20), stretch=1.02)
    assert new.eq(20).all()


def test_a_stretched_window_is_scaled_as_a_whole():
    lengths = torch.full((500,), 60)
    ramp = torch.arange(60.0)[:, None, None].expand(60, 500, 2) + 1
    found, new = changed(ramp, lengths, scale=0.2, stretch=1.5, crop=0.6)
    for index in range(500):
        own = found[: new[index], index]
        # The two channels read the same window, and differ by a factor alone.
        ratio = own[:, 0] / own[:, 1]
        torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
        assert (own.diff(dim=0) > -1e-5).all()
    assert (found[0, :, 0] / found[0, :, 1]).log().std() == pytest.approx(0.2 * 2**0.5, rel=0.15)


def test_a_seed_gives_the_same_augmentation_again_and_another_seed_another():
    x = batch()
    options = {"noise": 0.1, "scale": 0.1, "stretch": 1.2, "crop": 0.8, "channel_dropout": 0.2}
    (one, _), (same, _), (other, _) = (changed(x, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert one.shape != other.shape or not torch.equal(one, other)

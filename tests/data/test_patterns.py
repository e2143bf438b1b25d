import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from refusing import refusal
from scipy import stats

from snn_lib.data.patterns import (
    DAMAGE_KINDS,
    Damage,
    damage_patterns,
    delay_spikes,
    load_patterns,
    single_damage,
)

STEPS, TRAINS = 60, 50
NO_DAMAGE = Damage(modify_probability=0.0, noise_probability=0.0)


@pytest.fixture
def patterns():
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(STEPS, 3, TRAINS, generator=generator) < 0.1).float()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def only(**values):
    """Certain damage of the kinds given, none of the others."""
    nothing = {"jitter_probability": 0.0, "removal_probability": 0.0, "noise_probability": 0.0}
    return Damage(
        **{"modify_probability": 1.0, "block_size": 10, "rows_removed": 10} | nothing | values
    )


def cutting(**values):
    """Damage that may cut a block, or rows."""
    return only(**{"removal_probability": 0.01, "block_probability": 0.5} | values)


def damaged_by(*arguments):
    return damage_patterns(*arguments).spikes


# reading


@pytest.mark.parametrize("dtype", [np.uint8, bool, np.int64, np.float16, np.float32, np.float64])
def test_patterns_of_any_number_type_are_loaded_time_first(tmp_path, dtype):
    array = (np.random.default_rng(0).random((4, 5, 6)) < 0.3).astype(dtype)
    np.save(tmp_path / "p.npy", np.asfortranarray(array) if dtype is bool else array)
    patterns = load_patterns(tmp_path / "p.npy")
    assert patterns.dtype == torch.float32
    assert patterns.shape == (6, 4, 5)
    assert patterns.is_contiguous()
    for pattern, train, time in np.ndindex(array.shape):
        assert patterns[time, pattern, train] == array[pattern, train, time]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4)), "shape (3, 4), expected (patterns, trains, time)"),
        (np.zeros((1, 2, 3, 4)), "shape (1, 2, 3, 4)"),
        (np.zeros((0, 4, 4)), "shape (0, 4, 4)"),
        (np.full((1, 2, 2), 2), "values other than 0 and 1"),
        (np.full((1, 2, 2), 0.5, np.float32), "values other than 0 and 1"),
        (np.full((1, 2, 2), np.nan), "values other than 0 and 1"),
        (np.full((1, 2, 2), -1), "values other than 0 and 1"),
        (np.full((1, 2, 2), "1"), "values other than 0 and 1"),
        (np.full((1, 2, 2), None), "it has an array of Python objects"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    path = tmp_path / "p.npy"
    np.save(path, array, allow_pickle=True)
    said = refusal(load_patterns, path)
    assert str(path) in said
    assert message in said


# delay


@pytest.mark.parametrize("steps", [0, 1, 4, STEPS, STEPS + 1, 2 * STEPS])
def test_delay_shifts_in_time(patterns, steps):
    late = delay_spikes(patterns, steps)
    assert late.shape == patterns.shape
    for t in range(STEPS):
        expected = patterns[t - steps] if t >= steps else torch.zeros_like(patterns[0])
        assert late[t].equal(expected)


def test_a_delay_of_fewer_than_no_steps_is_refused(patterns):
    with pytest.raises(ValueError, match="steps is -3, expected at least 0"):
        delay_spikes(patterns, -3)


# damage


def test_default_damage_is_that_of_the_2020_release():
    assert Damage() == Damage(0.4, 0.7, 0.0, 1.0, 0.5, 0.5, 40, 40, 0.005, False)
    with pytest.raises(FrozenInstanceError):
        Damage().block_size = 3


def test_no_damage_gives_the_patterns_themselves(patterns):
    labels = torch.tensor([2, 0, 0, 1, 2])
    damage = replace(NO_DAMAGE, block_size=5, rows_removed=5)
    damaged = damaged_by(patterns, labels, damage, seeded())
    assert damaged.dtype == patterns.dtype
    assert damaged.equal(patterns[:, labels])


def test_an_empty_batch_and_silent_patterns_are_damaged_without_trouble(patterns):
    damage = replace(Damage(), block_size=5, rows_removed=5)
    none = torch.empty(0, dtype=torch.int64)
    assert damaged_by(patterns, none, damage, seeded()).shape == (STEPS, 0, TRAINS)
    silent = torch.zeros_like(patterns)
    damage = only(jitter_probability=1.0, removal_probability=1.0)
    assert not damaged_by(silent, torch.zeros(4, dtype=torch.int64), damage, seeded()).any()


def test_a_seed_gives_the_same_damage_again_and_every_sample_its_own(patterns):
    labels = torch.zeros(8, dtype=torch.int64)
    damage = only(jitter_probability=1.0, removal_probability=1.0, noise_probability=0.01)
    one = damaged_by(patterns, labels, damage, seeded(3))
    assert one.equal(damaged_by(patterns, labels, damage, seeded(3)))
    assert not one.equal(damaged_by(patterns, labels, damage, seeded(4)))
    for first in range(8):
        for second in range(first):
            assert not one[:, first].equal(one[:, second])


def test_damage_leaves_the_patterns_alone(patterns):
    before = patterns.clone()
    damaged_by(patterns, torch.arange(3), only(jitter_probability=1.0), seeded())
    assert patterns.equal(before)


def test_jitter_moves_every_spike_by_a_rounded_normal_deviate():
    patterns = torch.zeros(STEPS, 1, TRAINS)
    patterns[30] = 1.0  # one spike a train, far from the edges
    damage = only(jitter_probability=1.0, jitter_mean=2.0, jitter_sigma=1.5)
    damaged = damaged_by(patterns, torch.zeros(400, dtype=torch.int64), damage, seeded())
    assert damaged.sum(0).eq(1).all()
    shift = (damaged.argmax(0) - 30).flatten().numpy()
    values = np.arange(-3, 8)
    edges = np.concatenate([[-np.inf], values[:-1] + 0.5, [np.inf]])
    expected = np.diff(stats.norm(2.0, 1.5).cdf(edges)) * shift.size
    counted = np.bincount(np.clip(shift, -3, 7) + 3, minlength=len(values))
    assert stats.chisquare(counted, expected).pvalue > 1e-3


def test_jittered_spikes_stay_in_their_train_and_in_time():
    patterns = torch.zeros(STEPS, 1, TRAINS)
    patterns[[0, STEPS - 1], 0, 7] = 1.0
    damage = only(jitter_probability=1.0, jitter_sigma=1e6)
    damaged = damaged_by(patterns, torch.zeros(200, dtype=torch.int64), damage, seeded())
    assert damaged.sum(0)[:, 7].min() >= 1
    assert damaged.sum() == damaged[[0, -1], :, 7].sum()  # so far that all end at an edge


def test_spikes_that_meet_become_one():
    patterns = torch.ones(2, 1, TRAINS)
    damage = only(jitter_probability=1.0, jitter_sigma=3.0, block_size=1)
    damaged = damaged_by(patterns, torch.zeros(50, dtype=torch.int64), damage, seeded())
    assert set(damaged.unique().tolist()) == {0.0, 1.0}
    assert set(damaged.sum(0).unique().tolist()) == {1.0, 2.0}


def test_the_block_removed_is_a_square_anywhere_inside():
    patterns, size = torch.ones(STEPS, 1, TRAINS), 12
    damage = only(removal_probability=1.0, block_probability=1.0, block_size=size)
    damaged = damaged_by(patterns, torch.zeros(1500, dtype=torch.int64), damage, seeded())
    first_steps, first_trains = set(), set()
    for hole in (damaged == 0).unbind(1):
        times, trains = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole.sum() == size * size
        assert times.equal(torch.arange(times[0], times[0] + size))
        assert trains.equal(torch.arange(trains[0], trains[0] + size))
        first_steps.add(times[0].item())
        first_trains.add(trains[0].item())
    assert first_steps == set(range(STEPS - size + 1))
    assert first_trains == set(range(TRAINS - size + 1))


def test_the_rows_removed_are_whole_trains_each_as_likely_as_the_other():
    patterns = torch.ones(STEPS, 1, TRAINS)
    damage = only(removal_probability=1.0, block_probability=0.0, rows_removed=7)
    damaged = damaged_by(patterns, torch.zeros(2000, dtype=torch.int64), damage, seeded())
    removed = damaged[0] == 0
    assert (damaged == damaged[0]).all()
    assert removed.sum(1).eq(7).all()
    # without replacement, so the counts vary less than a chi-squared test expects
    assert stats.chisquare(removed.sum(0).numpy()).pvalue > 1e-3


def test_noise_is_a_bernoulli_draw_in_every_cell():
    patterns, probability, size = torch.zeros(STEPS, 1, TRAINS), 0.03, 300
    damaged = damaged_by(
        patterns,
        torch.zeros(size, dtype=torch.int64),
        only(noise_probability=probability),
        seeded(),
    )
    cells = damaged.numel()
    assert abs(damaged.sum() - cells * probability) < 4 * math.sqrt(cells * probability)
    for counts in (damaged.sum((1, 2)), damaged.sum((0, 2)), damaged.sum((0, 1))):
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    after = damaged.flatten()[1:][damaged.flatten()[:-1] == 1].mean()  # no memory
    assert abs(after - probability) < 4 * math.sqrt(probability / damaged.sum())


def test_noise_is_not_held_back_where_more_of_it_is_drawn_than_expected():
    silence, label, generator = torch.zeros(5, 1, 20), torch.zeros(1, dtype=torch.int64), seeded()
    noise = only(noise_probability=0.005)  # half a spike is expected, and often there are two
    found = [damaged_by(silence, label, noise, generator).sum().item() for _ in range(2000)]
    assert sum(found) / len(found) == pytest.approx(0.5, abs=0.06)


def test_noise_is_as_dense_in_the_last_cells_as_in_the_first():
    silence, label, generator = torch.zeros(30, 1, 300), torch.zeros(1, dtype=torch.int64), seeded()
    noise = only(noise_probability=0.04)  # 360 spikes are expected, with a deviation of 19
    found = sum(damaged_by(silence, label, noise, generator)[-1].sum().item() for _ in range(300))
    assert found / (300 * 300) == pytest.approx(0.04, abs=4 * math.sqrt(0.04 / (300 * 300)))


@pytest.mark.parametrize("probability", [1e-9, 0.5, 1.0])
def test_noise_at_extreme_probabilities(patterns, probability):
    labels = torch.zeros(20, dtype=torch.int64)
    damage = only(noise_probability=probability)
    damaged = damaged_by(patterns, labels, damage, seeded())
    expected = patterns[:, labels].mean().item() * (1 - probability) + probability
    assert damaged.mean().item() == pytest.approx(expected, abs=0.01)
    assert damaged.all() == (probability == 1.0)  # the first cell and the last, too


def test_samples_that_are_not_modified_have_noise_too():
    silence, labels = torch.zeros(STEPS, 1, TRAINS), torch.zeros(40, dtype=torch.int64)
    damage = only(modify_probability=0.0, noise_probability=0.1)
    rates = damaged_by(silence, labels, damage, seeded()).mean((0, 2))
    assert rates.min() > 0.05
    assert rates.mean().item() == pytest.approx(0.1, rel=0.05)


def test_samples_are_modified_as_often_as_the_settings_say():
    patterns, size = torch.ones(20, 1, 20), 6000
    damage = Damage(
        modify_probability=0.6,
        jitter_probability=0.0,
        removal_probability=0.7,
        block_probability=0.25,
        block_size=10,
        rows_removed=10,
        noise_probability=0.0,
    )
    damaged = damaged_by(patterns, torch.zeros(size, dtype=torch.int64), damage, seeded())
    lost = 400 - damaged.sum((0, 2))
    counted = [lost.eq(value).sum().item() for value in (0, 100, 200)]
    expected = np.array([1 - 0.42, 0.42 * 0.25, 0.42 * 0.75]) * size
    assert sum(counted) == size
    assert stats.chisquare(counted, expected).pvalue > 1e-3


def test_jitter_and_removal_are_independent():
    patterns, size = torch.zeros(41, 1, 40), 4000
    patterns[20] = 1.0
    damage = only(
        jitter_probability=0.7,
        jitter_sigma=3.0,
        removal_probability=0.5,
        block_probability=0.0,
    )
    damaged = damaged_by(patterns, torch.zeros(size, dtype=torch.int64), damage, seeded())
    rows_lost = damaged.sum((0, 2)) < 40
    moved = damaged[20].sum(1) < damaged.sum((0, 2))
    counted = [
        (rows_lost.eq(r) & moved.eq(m)).sum().item() for r in (True, False) for m in (True, False)
    ]
    expected = np.array([0.5 * 0.7, 0.5 * 0.3, 0.5 * 0.7, 0.5 * 0.3]) * size
    assert stats.chisquare(counted, expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: cutting(block_size=51), "block_size is 51, patterns have 50 trains of 60 steps"),
        (lambda: cutting(rows_removed=51), "rows_removed is 51, patterns have 50 trains"),
        (lambda: single_damage("blocks", 3), f"unknown, choose one of {', '.join(DAMAGE_KINDS)}"),
    ],
)
def test_damage_that_is_unknown_or_larger_than_a_pattern_is_refused(patterns, damage, message):
    with pytest.raises(ValueError, match=message):
        damaged_by(patterns, torch.arange(3), damage(), seeded())


@pytest.mark.parametrize(
    ("never", "kinds"),
    [
        ({"modify_probability": 0.0}, ["rows_removed", "block_size", "jitter_sigma"]),
        ({"removal_probability": 0.0}, ["rows_removed", "block_size"]),
        ({"block_probability": 0.0}, ["block_size"]),
        ({"block_probability": 1.0}, ["rows_removed"]),
        ({"jitter_probability": 0.0}, ["jitter_sigma"]),
    ],
)
def test_what_never_happens_has_no_strength_and_may_be_larger_than_a_pattern(
    patterns, never, kinds
):
    large = {"rows_removed": 51, "block_size": 51, "jitter_sigma": 61.0}
    sizes = {"rows_removed": 6, "block_size": 7, "jitter_sigma": 2.0, "noise_probability": 0.25}
    usual = Damage(**sizes, varied=True)
    assert usual.strengths() == sizes
    damage = replace(usual, **never, **{kind: large[kind] for kind in kinds})
    assert damage.strengths() == sizes | dict.fromkeys(kinds, 0)
    labels = torch.arange(100) % 3
    damaged = damage_patterns(patterns, labels, damage, seeded())
    for one, same in zip(
        damaged, damage_patterns(patterns, labels, replace(usual, **never), seeded()), strict=True
    ):
        assert one.equal(same)


@pytest.mark.parametrize("block", [0.0, 1.0])
def test_the_part_removed_is_told_and_holds_nothing(block):
    full = torch.ones(STEPS, 1, TRAINS)
    labels = torch.zeros(300, dtype=torch.int64)
    damage = only(removal_probability=0.5, block_probability=block, block_size=8, rows_removed=7)
    spikes, removed = damage_patterns(full, labels, damage, seeded())
    assert removed.equal(spikes == 0)
    assert set(removed.sum((0, 2)).tolist()) == {0, 64 if block else 7 * STEPS}


def test_varied_damage_spreads_each_strength_evenly_up_to_the_most():
    size = 3000
    labels = torch.zeros(size, dtype=torch.int64)
    full = torch.ones(STEPS, 1, TRAINS)

    def even(values, most):
        assert stats.kstest(values.double().numpy() / most, "uniform").pvalue > 1e-3

    block = only(removal_probability=1.0, block_probability=1.0, block_size=50, varied=True)
    removed = damage_patterns(full, labels, block, seeded()).removed
    sides = removed.any(2).sum(0)
    assert sides.equal(removed.any(0).sum(1))
    smear = torch.rand(size, generator=seeded(5)) - 0.5  # sizes are whole numbers
    even((sides + smear).clamp(0, 50), 50)

    rows = only(removal_probability=1.0, block_probability=0.0, rows_removed=50, varied=True)
    lost = damage_patterns(full, labels, rows, seeded()).removed[0].sum(1)
    even((lost + smear).clamp(0, 50), 50)
    few = only(removal_probability=1.0, block_probability=0.0, rows_removed=2, varied=True)
    lost = damage_patterns(full, labels, few, seeded()).removed[0].sum(1)  # none, one or both
    assert stats.chisquare(lost.bincount().numpy(), np.array([1, 2, 1]) * size / 4).pvalue > 1e-3

    noise = only(noise_probability=0.5, varied=True)
    rates = damaged_by(0 * full, labels, noise, seeded()).mean((0, 2))
    even(rates.clamp(0, 0.5), 0.5)

    middle = torch.zeros(STEPS, 1, TRAINS)
    middle[STEPS // 2] = 1.0
    jitter = only(jitter_probability=1.0, jitter_sigma=6.0, varied=True)
    shift = damaged_by(middle, labels, jitter, seeded()).argmax(0) - STEPS // 2
    variance = shift.double().var(1)  # of 50 trains, rounded: 1 / 12 more
    assert variance.mean().item() == pytest.approx(6**2 / 3 + 1 / 12, rel=0.05)
    assert (variance < 3**2).double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_varied_noise_is_as_strong_in_small_batches_as_in_large_ones():
    noise, generator = only(noise_probability=0.2, varied=True), seeded()
    silent = torch.zeros(STEPS, 1, TRAINS)
    for size in (1, 3):
        labels = torch.zeros(size, dtype=torch.int64)
        share = [damaged_by(silent, labels, noise, generator).mean() for _ in range(1500 // size)]
        assert torch.stack(share).mean().item() == pytest.approx(0.1, rel=0.1)


def test_a_removed_part_holds_no_spike_that_has_moved_into_it():
    full = torch.ones(STEPS, 1, TRAINS)
    labels = torch.zeros(50, dtype=torch.int64)
    damage = only(
        jitter_probability=1.0, jitter_sigma=4.0, removal_probability=1.0, block_probability=1.0
    )
    spikes, removed = damage_patterns(full, labels, damage, seeded())
    assert removed.sum((0, 2)).tolist() == [100] * 50
    assert not spikes[removed].any()


@pytest.mark.parametrize("kind", DAMAGE_KINDS)
def test_damage_of_a_single_kind_is_of_that_kind_alone(kind):
    strength = {"block_size": 20, "rows_removed": 20, "jitter_sigma": 2.0}.get(kind, 0.02)
    patterns = torch.zeros(100, 1, 80)
    patterns[10:90:4, :, ::2] = 1.0
    damage = single_damage(kind, strength)
    assert getattr(damage, kind) == strength
    labels = torch.zeros(50, dtype=torch.int64)
    damaged = damaged_by(patterns, labels, damage, seeded())
    before = patterns[:, labels]
    lost, new = (before > damaged).sum((0, 2)), (damaged > before).sum((0, 2))
    if kind == "block_size":
        assert not new.any()
        assert lost.min() > 0
        assert lost.le(20 * 20 / 8).all()
    elif kind == "rows_removed":
        assert not new.any()
        assert lost.min() > 0
        assert (damaged.any(0) | damaged.eq(0).all(0)).all()
    elif kind == "jitter_sigma":
        assert new.min() > 0
        assert damaged[:, :, 1::2].sum() == 0
    else:
        assert not lost.any()
        assert new.min() > 0

"""The simulated camera: its physics, its determinism, and the files that it leaves."""

import itertools
import math
import subprocess

import numpy as np
import pytest
import torch
from running import ROOT

import snn_lib.data.simulated_events as simulated
from snn_lib.data.batches import default_dtype
from snn_lib.data.events import Frames, read_nmnist
from snn_lib.data.mnist import load_mnist
from snn_lib.data.recordings import NMNIST, load_recordings
from snn_lib.data.simulated_events import (
    CameraSettings,
    draw_noise,
    draw_thresholds,
    follow,
    pan_images,
    record,
    simulated_recordings,
    watch,
)
from snn_lib.errors import InputError
from snn_lib.seeds import batch_generator

IMAGES, LABELS = load_mnist(ROOT / "dataset", train=True)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of data sets that has MNIST alone. Recordings are made in blocks of ten."""
    monkeypatch.setattr(simulated, "BLOCK", 10)
    (tmp_path / "MNIST").symlink_to(ROOT / "dataset" / "MNIST")
    return tmp_path


def recorded(count=4, seed=0, **camera):
    return record(IMAGES[:count], CameraSettings(**camera), batch_generator(seed, 0, 0))


def looks(*levels):
    """Light of a single pixel, whose logarithm is given at every look."""
    return [torch.tensor(float(level)).exp().view(1, 1, 1) for level in levels]


def events(*levels, threshold=1.0, refractory=0.0, step=1.0):
    """Microseconds and polarities of that pixel."""
    found = watch(looks(*levels), step, torch.full((2, 1, 1), threshold), refractory)
    return list(zip(found[1].tolist(), found[4].tolist(), strict=True))


def test_an_event_is_where_the_logarithm_of_the_light_crosses_the_threshold():
    assert events(0, 0.9, 1.1) == [(1500, 1)]
    assert events(0, 0.5, -0.5, -1.5, step=2.0) == [(5000, 0)]
    assert events(0, 0.9, -0.9, 0.9) == []
    twice = events(*torch.linspace(2, 7, 11), threshold=0.99)  # of a level of any height
    assert [p for _, p in twice] == [1] * 5
    assert events(*torch.linspace(7, 2, 11), threshold=0.99) == [(t, 0) for t, _ in twice]


def test_a_pixel_has_one_threshold_for_darker_and_one_for_brighter():
    both = torch.tensor([0.3, 0.6]).view(2, 1, 1)
    for level, expected in ((-0.4, [0]), (0.4, []), (0.7, [1])):
        assert watch(looks(0, level), 1.0, both, 0.0)[4].tolist() == expected


def test_a_pixel_that_has_sent_an_event_is_blind_for_a_while():
    rising = [0.0, 1.5, 3.0, 4.5, 6.0, 7.5, 9.0]
    assert [t for t, _ in events(*rising)] == [667, 1667, 2667, 3667, 4667, 5667]
    # Blind from 0.67 to 3.17 ms: it remembers the 6.0 of the look at 4 ms.
    found = events(*rising, refractory=2.5)
    assert [t for t, _ in found] == [667, 4667]


def test_what_does_not_change_is_not_recorded_but_for_noise():
    assert all(len(e.t) == 0 for e in recorded(reach=0.0, noise=0.0))
    seconds, pixels = 0.3, 34**2
    counts = [len(e.t) for e in recorded(100, reach=0.0, noise=5.0)]
    expected = 5.0 * seconds * pixels
    assert np.mean(counts) == pytest.approx(expected, rel=0.02)
    assert np.std(counts) == pytest.approx(math.sqrt(expected), rel=0.3)


def test_noise_is_everywhere_at_any_time_and_of_both_kinds():
    _, t, y, x, p = draw_noise(50, CameraSettings(noise=10.0), batch_generator(0, 0, 0)).double()
    for values, highest in ((t, 300_000), (y, 34), (x, 34), (p, 2)):
        assert values.min() >= 0
        assert values.max() < highest
        assert values.mean().item() == pytest.approx((highest - (highest <= 34)) / 2, rel=0.02)


def test_a_pixel_that_a_digit_reaches_sends_darker_events():
    bar = torch.zeros(1, 28, 28, dtype=torch.uint8)
    bar[:, :, 14:] = 255  # the right half is black
    (found,) = record(bar, CameraSettings(noise=0.0, spread=0.0), batch_generator(0, 0, 0))
    edge = (np.abs(found.x - 16.5) < 5) & (found.y > 10) & (found.y < 23)
    for begin, end, polarity in ((130, 180, 1), (230, 280, 0)):  # it moves right, and then left
        during = edge & (found.t > 1000 * begin) & (found.t < 1000 * end)
        assert during.sum() > 100
        assert (found.p[during] == polarity).all()


def test_the_thresholds_of_a_camera_are_fixed_and_spread_around_their_mean():
    camera = CameraSettings(threshold=0.4, spread=0.1)
    found = draw_thresholds(camera)
    assert torch.equal(found, draw_thresholds(camera))
    assert torch.corrcoef(found.flatten(1))[0, 1].abs() < 0.1  # darker and brighter are two draws
    assert found.mean().item() == pytest.approx(0.4, rel=0.02)
    assert found.std().item() == pytest.approx(0.04, rel=0.1)
    assert torch.equal(draw_thresholds(CameraSettings(spread=0.0)).unique(), torch.tensor([0.2]))
    assert draw_thresholds(CameraSettings(spread=10.0)).min().item() == pytest.approx(0.02)
    # A pixel that needs less change sends more.
    still = CameraSettings(spread=0.3, noise=0.0)
    ramp = [torch.full((1, 34, 34), math.exp(0.05 * k)) for k in range(100)]
    counts = torch.zeros(34, 34)
    _, _, y, x, p = watch(ramp, 1.0, draw_thresholds(still), 0.0)
    counts.index_put_((y, x), torch.ones(len(p)), accumulate=True)
    assert p.all()
    assert torch.corrcoef(torch.stack([counts.flatten(), draw_thresholds(still)[1].flatten()]))[
        0, 1
    ] < (-0.8)


def test_between_two_places_a_path_is_half_a_period_of_a_cosine():
    path = (0.0, 1.0), (10.0, 3.0), (30.0, 2.0)
    quarter = 0.5 - 0.5 * math.sqrt(0.5)  # of the way, after a quarter of the time
    expected = [1.0, 1.0 + 2.0 * quarter, 2.0, 3.0, 3.0 - quarter, 2.5, 2.0 + quarter, 2.0]
    times = np.array([0.0, 2.5, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0])
    np.testing.assert_allclose(follow(path, times), expected, rtol=1e-12)


def test_the_image_goes_down_and_right_then_up_and_right_then_left():
    dot = torch.zeros(1, 28, 28, dtype=torch.uint8)
    dot[0, 10, 12] = 255  # at row 13 and column 15 of the sensor, if the image is in the middle
    place = torch.arange(34.0)

    def look(**camera):
        light = torch.cat(list(pan_images(dot, CameraSettings(black=0.1, **camera))))
        ink = (1.0 - light) / 0.9
        assert ink.sum((1, 2)).tolist() == pytest.approx([1.0] * 301, abs=1e-3)  # none is lost
        return light, (ink.sum(1) @ place - 15).tolist(), (ink.sum(2) @ place - 13).tolist()

    _, right, below = look()
    corners = {0: (-2.4, -2.2), 100: (-0.8, None), 195: (2.4, None), 300: (-2.6, -1.8)}
    corners |= {60: (-1.9, None), 83: (None, 3.65), 128: (None, 3.2), 259: (0.15, None)}
    for time, expected in corners.items():
        for found, here in zip((right, below), expected, strict=True):
            assert here is None or found[time] == pytest.approx(here, abs=0.01)
    light, right, below = look(reach=0.0, blur=0.01)
    assert right + below == pytest.approx([0.0] * 602, abs=1e-3)
    sharp = torch.ones(34, 34)
    sharp[13, 15] = 0.1
    torch.testing.assert_close(light, sharp.expand(301, 34, 34))


def test_the_lens_blurs_by_so_many_pixels():
    dot = torch.zeros(1, 28, 28, dtype=torch.uint8)
    dot[0, 14, 14] = 255
    ink = 1.0 - next(iter(pan_images(dot, CameraSettings(reach=0.0, blur=1.5))))[0]
    share, place = ink.sum(0) / ink.sum(), torch.arange(34.0) - 17
    assert (share * place**2).sum().sqrt().item() == pytest.approx(1.5, rel=0.01)


def test_the_image_goes_as_far_as_the_reach_says():
    dot = torch.zeros(1, 28, 28, dtype=torch.uint8)
    dot[0, 10, 12] = 255
    place = torch.arange(34.0)

    def path(reach):
        ink = 1.0 - torch.cat(list(pan_images(dot, CameraSettings(reach=reach))))
        ink = ink / ink.sum((1, 2), keepdim=True)
        return torch.stack([ink.sum(1) @ place - 15, ink.sum(2) @ place - 13])

    usual = path(6.0)
    for times in (0.5, 2.0, 2.5):
        torch.testing.assert_close(path(6.0 * times), times * usual, rtol=0, atol=0.02)


def test_the_pixels_of_a_recording_rest_as_long_as_the_camera_s_do():
    for rest, once in ((0.5, False), (400.0, True)):
        (found,) = recorded(1, refractory=rest, noise=0.0)
        pixels = {*zip(found.x.tolist(), found.y.tolist(), strict=True)}
        assert len(pixels) > 100
        assert (len(pixels) == len(found.x)) is once


def test_another_seed_of_the_camera_is_another_camera_with_other_noise(root):
    thresholds = [draw_thresholds(CameraSettings(seed=seed)) for seed in (0, 1)]
    assert not torch.equal(*thresholds)
    noise = [
        simulated_recordings(CameraSettings(seed=seed, spread=0.0), root, train=True, count=1)
        for seed in (0, 1)
    ]
    times = [read_nmnist(path).t.tolist() for (path,) in noise]
    assert times[0] != times[1]


def test_a_seed_records_the_same_again_and_an_image_alone_as_among_others():
    one, again, other = (recorded(seed=seed, noise=20.0) for seed in (0, 0, 1))
    for first, second, third in zip(one, again, other, strict=True):
        assert all(map(np.array_equal, first, second))
        assert not np.array_equal(first.t, third.t)
    together, alone = recorded(3, noise=0.0), recorded(1, noise=0.0)[0]
    assert all(map(np.array_equal, together[0], alone))
    for found in one:
        assert (np.diff(found.t) >= 0).all()


def test_recordings_lie_as_those_of_n_mnist_and_grow_without_a_change(root):
    camera = CameraSettings()
    with default_dtype(torch.float64):  # which a user may have set
        assert len(simulated_recordings(camera, root, train=True, count=3)) == 3
    files = simulated_recordings(camera, root, train=True, count=10)
    folder = camera.folder(root)
    assert set(files) == set(folder.glob("Train/*/*.bin"))
    assert [path.stem for path in files] == [f"{n:05d}" for n in range(1, 11)]  # a block
    assert [int(path.parent.name) for path in files] == LABELS[:10].tolist()
    block = record(IMAGES[:10], camera, batch_generator(camera.seed, 1, 0))
    for path, events in zip(files, block, strict=True):
        assert all(map(np.array_equal, read_nmnist(path), events))
    before = {path: path.stat().st_mtime_ns for path in files}
    (test,) = simulated_recordings(camera, root, train=False, count=1)
    assert test == folder / "Test" / "7" / "00001.bin"
    assert simulated_recordings(camera, root, train=True, count=11)[:10] == files
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert len(list(folder.glob("Train/*/*.bin"))) == 20
    assert len(list(folder.glob("Test/*/*.bin"))) == 10
    lists = sorted(path.name for path in folder.glob("*.sha256"))
    assert lists == ["Test_00001.sha256", "Train_00001.sha256", "Train_00011.sha256"]
    check = ["sha256sum", "--check", "--quiet", *lists]
    assert subprocess.run(check, cwd=folder, check=False).returncode == 0


def test_every_block_of_either_part_has_noise_of_its_own(root):
    camera = CameraSettings(threshold=100.0, noise=5.0)  # which sends nothing but noise
    train, test = (simulated_recordings(camera, root, train, count=11) for train in (True, False))
    times = [read_nmnist(path).t.tolist() for path in (train[0], train[10], test[0], test[10])]
    assert all(one != other for one, other in itertools.combinations(times, 2))


def test_another_camera_has_another_folder(tmp_path):
    folders = {CameraSettings(**o).folder(tmp_path) for o in ({}, {"seed": 1}, {"noise": 2.0})}
    assert len(folders) == 3
    assert all("simulated" in folder.name for folder in folders)


def test_recordings_of_an_interrupted_run_are_made_again(root, monkeypatch):
    camera, real, left = CameraSettings(), simulated.write_atomically, [3]

    def interrupted(path, content, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(path, content, **options)

    monkeypatch.setattr(simulated, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulated_recordings(camera, root, train=True, count=10)
    folder = camera.folder(root)
    half = list(folder.glob("Train/*/*.bin"))
    assert len(half) == 3
    assert not list(folder.glob("*.sha256"))
    half[0].write_bytes(b"half of a f")  # as a failure of power may leave it
    monkeypatch.undo()
    paths = simulated_recordings(camera, root, train=True, count=10)
    x, y = load_recordings(NMNIST, paths, Frames(2, 300.0))
    assert len(x) == 10
    assert torch.equal(y, LABELS[:10])
    assert not list(folder.rglob("*.tmp"))


def test_a_damaged_recording_is_made_again_as_it_was(root):
    def contents():
        paths = simulated_recordings(CameraSettings(), root, train=False, count=10)
        return {path: path.read_bytes() for path in paths}

    whole, listed = contents(), CameraSettings().folder(root) / "Test_00001.sha256"
    lines = listed.read_text()
    path, other, *_ = whole
    path.write_bytes(whole[path][:-5])
    assert contents() == whole
    path.unlink()
    other.write_bytes(whole[other][:7] + bytes([whole[other][7] ^ 1]) + whole[other][8:])
    assert contents() == whole
    for damaged in (lines[:-70], lines[-70:], "", "\xff\n"):
        listed.write_text(damaged, "latin-1")
        assert contents() == whole
        assert listed.read_text() == lines


def test_runs_that_simulate_at_the_same_time_leave_all_recordings(root, monkeypatch):
    camera, real, waiting = CameraSettings(), simulated.record, [(True, 20), (False, 10)]

    def record_while_others_do(*arguments):
        if waiting:
            others.append(simulated_recordings(camera, root, *waiting.pop(0)))
        return real(*arguments)

    others = []
    monkeypatch.setattr(simulated, "record", record_while_others_do)
    mine = simulated_recordings(camera, root, train=True, count=30)
    monkeypatch.setattr(simulated, "record", None)  # from now on there is nothing to be recorded
    assert simulated_recordings(camera, root, train=True, count=30) == mine
    assert [len(paths) for paths in others] == [10, 20]
    assert simulated_recordings(camera, root, train=True, count=20) == others[1] == mine[:20]
    assert simulated_recordings(camera, root, train=False, count=10) == others[0]


def test_a_camera_that_sees_nothing_of_an_image_is_refused(root):
    with pytest.raises(InputError, match=r"records no event of an image .*lower camera\.threshold"):
        simulated_recordings(CameraSettings(reach=0.0, noise=0.0), root, train=True, count=1)

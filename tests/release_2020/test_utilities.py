"""The 2020 utilities and digit data sets against definitions written here."""

import math

import matplotlib
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from snn_lib import utilities
from snn_lib.data_loaders import MNISTDataset, MNISTDataset_Poisson_Spike, get_rand_transform

matplotlib.use("agg")


def test_random_patterns_have_the_asked_numbers_of_spikes_at_random_times():
    x, one_hot, labels = utilities.generate_rand_pattern(5, 40, 30, 2, 6)
    assert x.shape == (5, 40, 30)
    assert set(np.unique(x)) == {0, 1}
    assert set(np.unique(x.sum(-1))) == {2, 3, 4, 5, 6}  # both ends included
    assert (x.sum((0, 1)) > 0).all()  # any time can be drawn
    assert np.array_equal(one_hot, np.eye(5))
    assert np.array_equal(labels, np.arange(5))
    torch.manual_seed(0)
    again = utilities.generate_rand_pattern(5, 40, 30, 2, 6)[0]
    assert np.array_equal(x, again)
    full, *_ = utilities.generate_rand_pattern(1, 3, 4, 4, 4)
    assert full.all()


def test_mutation_moves_every_spike():
    template = np.zeros((400, 100))
    template[:, 50] = 1
    moved = utilities.mutate_spike_pattern(template, 3, 2)
    assert moved.shape == template.shape
    assert (moved.sum(1) == 1).all()
    shift = moved.argmax(1) - 50
    assert abs(shift.mean() - 3) < 0.4
    # a normal deviate of variance 4, and rounding's 1/12
    assert abs(shift.var() - 4 - 1 / 12) < 1.0


def test_mutation_keeps_spikes_within_the_pattern():
    template = np.zeros((2, 10), dtype=np.uint8)
    template[0, 8] = template[1, 1] = 1
    assert np.array_equal(
        np.nonzero(utilities.mutate_spike_pattern(template, 50, 0)), [[0, 1], [9, 9]]
    )
    assert np.array_equal(
        np.nonzero(utilities.mutate_spike_pattern(template, -50, 0)), [[0, 1], [0, 0]]
    )
    assert np.array_equal(utilities.mutate_spike_pattern(template, 0, 0), template)


@pytest.mark.parametrize("taus", [{}, {"tau_m": 7.2, "tau_s": 1.8}])
@pytest.mark.parametrize(
    ("filter_type", "normalize"), [("exp", True), ("dual_exp", True), ("dual_exp", False)]
)
def test_filters_are_leaky_integrators_and_their_scaled_difference(filter_type, normalize, taus):
    trains = np.random.default_rng(0).random((3, 50)) < 0.2
    expected = np.zeros((3, 50))
    m = s = np.zeros(3)
    for t in range(50):
        m = m * math.exp(-1 / taus.get("tau_m", 10)) + trains[:, t]
        s = s * math.exp(-1 / taus.get("tau_s", 2.5)) + trains[:, t]
        expected[:, t] = s if filter_type == "exp" else m - s
    if filter_type == "dual_exp" and normalize:
        expected *= 4 ** (4 / 3) / 3
    options = {"filter_type": filter_type, "normalize": normalize, **taus}
    found = utilities.filter_spike_multiple(trains, **options)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    one = utilities.filter_spike(trains[1], **options)
    assert one.shape == (1, 50)
    np.testing.assert_allclose(one[0], expected[1], atol=1e-5)


def test_the_gaussian_filter_adds_a_density_for_every_spike():
    train = np.zeros(81)
    train[[40, 45]] = 1
    time = np.arange(81)
    expected = sum(np.exp(-((time - t) ** 2) / (2 * 3**2)) for t in (40, 45))
    expected /= 3 * math.sqrt(2 * math.pi)
    smooth = utilities.gaussian_filter_spike_train(train, 3)
    np.testing.assert_allclose(smooth, expected, atol=1e-4)
    batch = np.stack([np.stack([train, np.roll(train, 7)]), np.zeros((2, 81))])
    found = utilities.gaussian_filter_spike_train_batch(batch, 3)
    np.testing.assert_allclose(found[0, 0], smooth, atol=1e-7)
    np.testing.assert_allclose(found[0, 1], np.roll(smooth, 7), atol=1e-7)
    assert not found[1].any()


@pytest.mark.parametrize(
    ("value", "times"),
    [(0, []), (0.05, []), (0.1, [0]), (0.4, [0, 2, 5, 7]), (0.5, [0, 2, 4, 6, 8]), (1, range(10))],
)
def test_a_number_becomes_regular_spikes_at_its_rate(value, times):
    assert np.array_equal(np.flatnonzero(utilities.float_to_spike_train(value, 10)), times)


def test_the_data_set_of_patterns_is_batched_and_transformed():
    x, one_hot, labels = utilities.generate_rand_pattern(6, 4, 10, 1, 3)
    batches = torch.utils.data.DataLoader(utilities.RandPatternDataset(x, one_hot), batch_size=4)
    sizes = [(pattern.shape, label.shape) for pattern, label in batches]
    assert sizes == [((4, 4, 10), (4, 6)), ((2, 4, 10), (2, 6))]
    pattern, label = utilities.RandPatternDataset(x, labels, lambda p: 2 * p)[3]
    assert np.array_equal(pattern, 2 * x[3])
    assert label == 3


def test_the_data_set_of_patterns_may_be_files(tmp_path):
    x, _, labels = utilities.generate_rand_pattern(6, 4, 10, 1, 3)
    np.save(tmp_path / "x.npy", x.astype(int))
    np.save(tmp_path / "y.npy", labels)
    files = {"dataset_path": str(tmp_path / "x.npy"), "label_path": tmp_path / "y.npy"}
    data = utilities.RandPatternDataset(**files)
    assert len(data) == 6
    pattern, label = data[3]
    assert (pattern.dtype, label) == (np.float32, 3)
    assert np.array_equal(pattern, x[3])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "compute",
    [
        utilities.filter_spike_multiple,
        lambda trains: utilities.filter_spike(trains[1]),
        lambda trains: utilities.gaussian_filter_spike_train(trains[1], 2),
    ],
)
def test_trains_may_be_reversed_and_read_only(compute):
    trains = (np.random.default_rng(0).random((3, 50)) < 0.2).astype(np.float32)
    backwards = trains[:, ::-1]
    expected = compute(backwards.copy())
    np.testing.assert_array_equal(compute(backwards), expected)
    backwards.flags.writeable = False
    np.testing.assert_array_equal(compute(backwards), expected)


def test_rasters_have_time_along_x():
    spikes = np.zeros((3, 20))
    spikes[2, 15] = 1
    figure = matplotlib.pyplot.figure()
    utilities.plot_raster(spikes, label="mine", color="red")
    utilities.plot_raster(spikes)
    lines = figure.gca().lines  # one over the other
    assert [line.get_xydata().tolist() for line in lines] == [[[15, 2]]] * 2
    assert figure.gca().get_legend().get_texts()[0].get_text() == "mine"
    utilities.plot_raster_dot(spikes)
    other = matplotlib.pyplot.gcf()
    assert other is not figure
    assert other.gca().collections[0].get_offsets().tolist() == [[15, 2]]
    matplotlib.pyplot.close("all")


REFUSED = [  # what is called, and the words
    *((lambda n=n: utilities.generate_rand_pattern(2, 3, 10, *n), "min <= max <= length")
      for n in ((-1, 2), (3, 2), (0, 11))),
    (lambda: utilities.filter_spike(np.zeros(5), "gaussian"), "expected 'exp' or 'dual_exp'"),
    (lambda: utilities.gaussian_filter_spike_train(np.zeros(5), 0), "sigma is 0, expected a numb"),
    (lambda: utilities.float_to_spike_train(1.5, 10), "rate in"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Digits


def digits(transform=lambda image: image):
    values = np.arange(2 * 28 * 28, dtype=np.int64).reshape(2, 28, 28) % 256
    images = [Image.fromarray(array.astype(np.uint8)) for array in values]
    return [(transform(image), label) for label, image in enumerate(images)], values / 255


def test_digits_are_scaled_to_the_largest_rate():
    mnist, values = digits()
    dataset = MNISTDataset(mnist, 25, max_rate=0.5)
    assert len(dataset) == 2
    image, label = dataset[1]
    assert label == 1
    np.testing.assert_allclose(image, 0.5 * values[1], atol=1e-6)
    flat, _ = MNISTDataset(mnist, 25, flatten=True)[1]
    np.testing.assert_allclose(flat, values[1].reshape(-1), atol=1e-6)


def test_digits_as_tensors_are_scaled_alike():
    mnist, values = digits(lambda image: torch.from_numpy(np.array(image)).float()[None] / 255)
    np.testing.assert_allclose(MNISTDataset(mnist, 25)[0][0], values[:1], atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64, np.float32])
def test_a_transform_may_return_pixels_up_to_255_of_any_type(dtype):
    mnist, values = digits()
    dataset = MNISTDataset(mnist, 25, transform=lambda image: np.array(image).astype(dtype))
    np.testing.assert_allclose(dataset[0][0], values[0], atol=1e-6)


def test_a_transform_may_return_true_and_false_or_normalised_images():
    mnist, values = digits()
    binary = MNISTDataset(mnist, 25, transform=lambda image: np.array(image) > 127)
    np.testing.assert_array_equal(binary[0][0], values[0] > 127 / 255)
    bright = MNISTDataset(mnist, 25, transform=lambda image: 1.2 * np.array(image) / 255)
    np.testing.assert_allclose(bright[0][0], 1.2 * values[0], atol=1e-6)
    normal = MNISTDataset(mnist, 25, transform=lambda image: (np.array(image) / 255 - 0.13) / 0.31)
    np.testing.assert_allclose(normal[0][0], (values[0] - 0.13) / 0.31, atol=1e-6)


def test_digits_as_poisson_spikes():
    mnist, values = digits()
    spikes, label = MNISTDataset_Poisson_Spike(mnist, 4000, max_rate=0.5)[1]
    assert spikes.shape == (28, 28, 4000)
    assert label == 1
    assert set(np.unique(spikes)) == {0, 1}
    assert np.abs(spikes.mean(-1).numpy() - 0.5 * values[1]).max() < 0.05
    assert not torch.equal(spikes[..., 0], spikes[..., 1])
    flat, _ = MNISTDataset_Poisson_Spike(mnist, 7, flatten=True)[1]
    assert flat.shape == (784, 7)


def test_transform_is_applied_to_the_image():
    mnist, values = digits()
    dataset = MNISTDataset(mnist, 25, transform=lambda image: image.rotate(90))
    np.testing.assert_allclose(dataset[0][0], np.rot90(values[0]), atol=1e-6)


CROP = {"scale": [0.3, 0.4], "ratio": [0.75, 1.33]}


@pytest.mark.parametrize(
    "config",
    [
        {"probability": 0.5, "RandomResizedCrop": CROP, "RandomRotation": {"degrees": 15}},
        {
            "RandomApply": {"probability": 0.5},
            "RandomResizedCrop": {"size": 28, **CROP},
            "RandomRotation": {"angle": 15},
        },
    ],
)
def test_random_transform_changes_half_of_the_images(config):
    transform = get_rand_transform(OmegaConf.create(config))
    image = digits()[0][0][0]
    images = [transform(image) for _ in range(100)]
    assert {image.size for image in images} == {(28, 28)}
    changed = [not np.array_equal(np.array(other), np.array(image)) for other in images]
    assert 30 <= sum(changed) <= 70
    crops, turns = transform.transforms[::2], transform.transforms[1::2]
    assert [(crop.scale, crop.ratio) for crop in crops] == [((0.3, 0.4), (0.75, 1.33))] * 2
    assert [list(turn.degrees) for turn in turns] == [[-15, 15]] * 2


def test_crops_have_the_size_of_the_settings():
    crop = {"size": 20, **CROP}
    options = {"probability": 1.0, "RandomResizedCrop": crop, "RandomRotation": {"degrees": 15}}
    assert get_rand_transform(options)(digits()[0][0][0]).size == (20, 20)


def test_no_image_is_changed_with_probability_0():
    options = {"probability": 0.0, "RandomResizedCrop": CROP, "RandomRotation": {"degrees": 15}}
    image = digits()[0][0][0]
    assert np.array_equal(np.array(get_rand_transform(options)(image)), np.array(image))

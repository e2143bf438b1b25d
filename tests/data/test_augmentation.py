"""Augmentation against affine maps applied by SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from snn_lib.data.augmentation import (
    ElasticSettings,
    RandomResizedCropSettings,
    RandomRotationSettings,
    TransformSettings,
    draw_elastic_shift,
    draw_grids,
    warp,
)
from snn_lib.data.batches import default_dtype

SIDE = 28


def transform(scale=(1.0, 1.0), ratio=(1.0, 1.0), degrees=0.0, **options):
    """An augmentation that does nothing unless told to."""
    options = {"probability": 1.0, "repeat": 1, **options}
    crop = RandomResizedCropSettings(list(scale), list(ratio))
    return TransformSettings(
        RandomResizedCrop=crop, RandomRotation=RandomRotationSettings(degrees), **options
    )


def grids(count, conf, seed=0):
    return draw_grids(count, conf, torch.Generator().manual_seed(seed))


def images(count):
    """Smooth blobs, of which an interpolated pixel depends on where exactly it is read."""
    noise = np.random.default_rng(3).random((count, SIDE, SIDE))
    return torch.from_numpy(ndimage.gaussian_filter(noise, (0, 2, 2))).float()


def affine_maps(sampled):
    """The maps ``(B, 2, 3)`` from (x, y, 1) to the sampled coordinates, by regression."""
    centres = (2 * np.arange(SIDE) + 1) / SIDE - 1
    y, x = np.meshgrid(centres, centres, indexing="ij")
    design = np.stack([x.ravel(), y.ravel(), np.ones(SIDE * SIDE)], 1)
    found = []
    for grid in sampled.double().numpy():
        solution, residual, *_ = np.linalg.lstsq(design, grid.reshape(-1, 2), rcond=None)
        assert residual.max() < 1e-6  # it is affine
        found.append(solution.T)
    return np.array(found)


def scipy_warp(image, map_):
    """The image resampled through the map, in pixels and (row, column) order as SciPy has them."""
    flip = np.array([[0, 1], [1, 0]])
    matrix = flip @ map_[:, :2] @ flip
    middle = np.full(2, (SIDE - 1) / 2)
    offset = middle - matrix @ middle + flip @ map_[:, 2] * SIDE / 2
    return ndimage.affine_transform(
        np.pad(image.double().numpy(), SIDE),  # bilinear with zeros all around
        matrix,
        offset + SIDE,
        output_shape=(SIDE, SIDE),
        order=1,
    )


def test_the_identity_returns_the_images():
    x = images(5)
    torch.testing.assert_close(warp(x, grids(5, transform())), x, rtol=0, atol=1e-5)
    whole = torch.randint(0, 2, (5, SIDE, SIDE)).float()  # the sharpest images there are
    assert torch.equal(warp(whole, grids(5, transform())).round(), whole)


def test_images_stay_in_float32_where_that_is_not_the_default():
    x = images(5)
    with default_dtype(torch.float64):
        assert warp(x, grids(5, transform(elastic=ElasticSettings(1.0)))).dtype == torch.float32


def test_images_are_left_alone_with_probability_zero_and_half_of_them_with_one_half():
    everything = {"scale": (0.3, 0.5), "degrees": 90.0, "elastic": ElasticSettings(3.0)}
    identity = grids(1, transform())
    assert torch.equal(
        grids(50, transform(probability=0.0, **everything)), identity.expand(50, -1, -1, -1)
    )
    changed = (grids(2000, transform(probability=0.5, **everything)) != identity).flatten(1).any(1)
    assert 900 < changed.sum() < 1100


@pytest.mark.parametrize(
    "options",
    [
        {"degrees": 15.0},
        {"scale": (0.4, 0.9)},
        {"scale": (0.5, 0.9), "ratio": (0.75, 1.33), "degrees": 180.0},
        {"scale": (0.7, 1.0), "ratio": (0.75, 1.33), "degrees": 15.0, "repeat": 2},
    ],
)
def test_images_are_resampled_as_scipy_does_through_the_same_map(options):
    x = images(6)
    sampled = grids(6, transform(**options))
    ours = warp(x, sampled)
    for image, map_, warped in zip(x, affine_maps(sampled), ours, strict=True):
        np.testing.assert_allclose(warped.numpy(), scipy_warp(image, map_), atol=1e-4)


def test_rotations_turn_about_the_centre_by_up_to_the_largest_angle():
    maps = affine_maps(grids(400, transform(degrees=15.0)))
    angles = np.degrees(np.arctan2(maps[:, 1, 0], maps[:, 0, 0]))
    turns = np.array(
        [[[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]] for a in np.radians(angles)]
    )
    np.testing.assert_allclose(maps[:, :, :2], turns, atol=1e-5)
    np.testing.assert_allclose(maps[:, :, 2], 0.0, atol=1e-5)
    assert np.abs(angles).max() <= 15.0 + 1e-3
    assert angles.min() < -14
    assert angles.max() > 14


def test_crops_have_the_asked_area_and_ratio_and_lie_inside_the_image():
    maps = affine_maps(grids(400, transform(scale=(0.3, 0.6), ratio=(0.7, 1.1))))
    np.testing.assert_allclose(maps[:, 0, 1], 0.0, atol=1e-5)
    np.testing.assert_allclose(maps[:, 1, 0], 0.0, atol=1e-5)
    width, height = maps[:, 0, 0], maps[:, 1, 1]
    for values, low, high in ((width * height, 0.3, 0.6), (width / height, 0.7, 1.1)):
        assert values.min() >= low - 1e-4
        assert values.max() <= high + 1e-4
        assert values.max() - values.min() > 0.9 * (high - low)
    shift = maps[:, :, 2]
    assert (np.abs(shift) <= 1 - np.stack([width, height], 1) + 1e-5).all()
    assert np.abs(np.corrcoef(shift.T)[0, 1]) < 0.2  # across and down are drawn apart
    share = shift / (1 - np.stack([width, height], 1))  # of the room to either side
    np.testing.assert_allclose(share.mean(0), 0, atol=0.1)
    np.testing.assert_allclose(share.std(0), 1 / math.sqrt(3), rtol=0.1)


def test_crops_are_as_often_wide_as_tall():
    maps = affine_maps(grids(1000, transform(scale=(0.1, 0.2), ratio=(0.25, 4.0))))
    ratios = np.log(maps[:, 0, 0] / maps[:, 1, 1]) / math.log(4.0)
    np.testing.assert_allclose(ratios.mean(), 0, atol=0.1)
    np.testing.assert_allclose(ratios.std(), 1 / math.sqrt(3), rtol=0.1)


def test_crops_that_are_longer_than_the_image_end_at_its_edge():
    maps = affine_maps(grids(400, transform(scale=(0.8, 1.0), ratio=(0.5, 2.0))))
    sides = np.stack([maps[:, 0, 0], maps[:, 1, 1]], 1)
    assert sides.max() == pytest.approx(1.0)
    assert (np.abs(maps[:, :, 2]) <= 1 - sides + 1e-5).all()


def test_an_image_is_cropped_before_it_is_turned():
    """So what is seen lies about the middle of a crop, whose sides are those of the image."""
    maps = affine_maps(grids(400, transform((0.1, 0.2), (0.3, 0.4), degrees=90.0)))
    linear = maps[:, :, :2]
    across_and_down = linear @ linear.swapaxes(1, 2)  # of the crop alone: a turn drops out
    np.testing.assert_allclose(across_and_down[:, 0, 1], 0, atol=1e-5)
    sides = np.sqrt(np.diagonal(across_and_down, axis1=1, axis2=2))
    assert (np.abs(maps[:, :, 2]) <= 1 - sides + 1e-5).all()
    assert np.abs(linear[:, 0, 1]).max() > 0.1


def test_two_rounds_turn_further_than_one():
    angles = [
        np.degrees(np.arctan2(maps[:, 1, 0], maps[:, 0, 0])).std()
        for maps in (affine_maps(grids(500, transform(degrees=10.0, repeat=n))) for n in (1, 2))
    ]
    assert angles[0] == pytest.approx(10 / math.sqrt(3), rel=0.1)
    assert angles[1] == pytest.approx(10 * math.sqrt(2 / 3), rel=0.1)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.5, 2.0), (1.5, 4.0)])
def test_elastic_displacements_have_the_asked_strength_and_smoothness(alpha, sigma):
    shift = draw_elastic_shift(
        4000, ElasticSettings(alpha, sigma), torch.Generator().manual_seed(1)
    )
    pixels = shift.double().numpy() * SIDE / 2
    for direction in range(2):
        squares = pixels[..., direction] ** 2
        np.testing.assert_allclose(np.sqrt(squares.mean(0)), alpha, rtol=0.08)  # at every place
        assert math.sqrt(squares.mean()) == pytest.approx(alpha, rel=0.02)
    assert abs(np.corrcoef(pixels[..., 0].ravel(), pixels[..., 1].ravel())[0, 1]) < 0.02
    # White noise blurred by a Gaussian is correlated over a distance d by exp(-d^2 / (4 sigma^2)).
    middle = pixels[:, 14, 12:16, 0]
    for distance in (1, 3):
        measured = np.corrcoef(middle[:, 0], middle[:, distance])[0, 1]
        assert measured == pytest.approx(math.exp(-(distance**2) / (4 * sigma**2)), abs=0.05)


def test_every_change_of_an_image_is_drawn_from_the_generator_alone():
    everything = {"scale": (0.3, 0.5), "degrees": 90.0, "elastic": ElasticSettings(3.0)}
    drawn = []
    for seed in range(2):
        torch.manual_seed(seed)
        drawn.append(grids(50, transform(probability=0.5, **everything), seed=7))
    assert torch.equal(*drawn)


def test_elastic_displacement_moves_what_an_image_shows():
    sampled = grids(300, transform(elastic=ElasticSettings(1.5, 4.0)))
    moved = (sampled - grids(1, transform())) * SIDE / 2
    assert moved.square().mean().sqrt().item() == pytest.approx(1.5, rel=0.05)

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATASET = Path(__file__).parent.parent / "dataset"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_patterns", DATASET / "make_patterns.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed():
    return np.load(DATASET / "associative_target.npy")


def test_committed_file_is_the_scripts_output(script, committed):
    assert committed.dtype == np.uint8
    np.testing.assert_array_equal(script.make_patterns(script.FIGURES.values()), committed)


def test_committed_contact_sheet_shows_the_committed_patterns(script, committed):
    sheet = Image.open(DATASET / "associative_target.png")
    np.testing.assert_array_equal(np.asarray(sheet), np.asarray(script.contact_sheet(committed)))


def test_patterns_are_ten_pictures_of_zeros_and_ones(committed):
    assert committed.shape == (10, 300, 300)
    assert set(np.unique(committed)) == {0, 1}


def test_one_to_two_per_cent_of_every_pattern_are_spikes(committed):
    share = committed.mean((1, 2))
    assert share.min() >= 0.010
    assert share.max() <= 0.020


def test_figures_fill_the_frame(committed):
    assert committed.any(2).mean(1).min() > 0.9  # of the trains have spikes
    assert committed.any(1).mean(1).min() > 0.9  # of the steps


def test_no_train_spikes_at_more_than_one_step_in_eight(committed):
    windows = np.lib.stride_tricks.sliding_window_view(committed, 8, axis=2)
    assert windows.sum(-1).max() == 1


def test_patterns_are_distinct(committed):
    for one, other in itertools.combinations(committed, 2):
        assert (one & other).sum() < 0.6 * min(one.sum(), other.sum())


def test_main_writes_both_files(script, committed, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "__file__", str(tmp_path / "make_patterns.py"))
    script.main()
    np.testing.assert_array_equal(np.load(tmp_path / "associative_target.npy"), committed)
    assert Image.open(tmp_path / "associative_target.png").size == (3120, 1260)

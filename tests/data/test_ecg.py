"""Electrocardiograms: read from files that are made here, and held out by whole recordings."""

import numpy as np
import pytest
import torch
from recorded import qtdb_files, some_beats
from refusing import refusal
from scipy.io import savemat

from snn_lib.data.ecg import hold_out, load_ecg, recordings


def test_events_and_labels_are_those_of_the_file(tmp_path):
    x, labels = some_beats()
    qtdb_files(tmp_path, -x, labels)
    for part in ("train", "test"):
        found_x, found = load_ecg(tmp_path, part)
        assert found_x.dtype == torch.float32
        np.testing.assert_array_equal(found_x, -x)
        np.testing.assert_array_equal(found, labels)


def sequences_of(lengths, seed=0, odd=19):
    """Labels of recordings, cut as the files are: 1,301 steps, each begins 1,000 after the last.

    The first ``odd`` steps of a sequence are of the first class, as many after them have no label.
    The end of a recording has none either.
    """
    generator = np.random.default_rng(seed)
    numbers, cut = [], []
    for number, count in enumerate(lengths):
        beats = generator.integers(3, 90, 6 * count * 20)
        labels = np.repeat(np.arange(len(beats)) % 6, beats)[: 1000 * count + 301]
        labels[-400:] = -1
        for begin in range(0, 1000 * count, 1000):
            sequence = labels[begin : begin + 1301].copy()
            sequence[:odd], sequence[odd : 2 * odd] = 0, -1
            cut.append(sequence)
            numbers.append(number)
    return torch.tensor(np.array(cut)), torch.tensor(numbers)


@pytest.mark.parametrize("odd", [19, 95])  # the latter leaves two fifths of the overlap alike
def test_sequences_that_overlap_are_found_to_be_of_one_recording(odd):
    labels, numbers = sequences_of([5, 1, 9, 2, 2, 7], odd=odd)
    assert torch.equal(recordings(labels), numbers)


def test_whole_recordings_are_held_out_and_others_by_another_seed():
    labels, numbers = sequences_of([3, 4, 2, 5, 3, 6, 2, 3, 4, 5])
    drawn = set()
    for seed in range(8):
        held_out = hold_out(labels, 0.2, seed)
        (chosen,) = {tuple(numbers[held_out].unique().tolist())}
        assert len(chosen) == 2
        assert not set(numbers[~held_out].tolist()) & set(chosen)
        assert torch.equal(hold_out(labels, 0.2, seed), held_out)
        drawn.add(chosen)
    assert len(drawn) > 3


@pytest.mark.parametrize("steps", [40, 900, 1000])
def test_short_sequences_that_do_not_overlap_are_recordings_of_their_own(steps):
    assert recordings(torch.zeros(5, steps).long()).tolist() == [0, 1, 2, 3, 4]


def test_the_share_that_is_held_out_is_rounded_to_the_nearest_number_of_recordings():
    labels, numbers = sequences_of([2] * 9)
    held_out = hold_out(labels, 0.2, 0)  # 1.8
    assert len(numbers[held_out].unique()) == 2


def test_a_single_recording_cannot_be_divided():
    labels, _ = sequences_of([3])
    assert refusal(hold_out, labels, 0.1, 2) == (
        "all sequences are of one recording, so none can be held out"
    )


@pytest.mark.parametrize("share", [-0.5, 0, 1, 2, float("nan")])
def test_a_share_that_is_no_part_is_refused(share):
    labels, _ = sequences_of([2] * 9)
    assert refusal(hold_out, labels, share, 0) == (
        f"share is {share}, expected a part of the recordings"
    )


def test_a_missing_file_is_named_with_where_it_comes_from(tmp_path):
    message = f"there is no file {tmp_path}/QTDB_train.mat: set dataset_path to its folder"
    assert refusal(load_ecg, tmp_path, "train").startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": np.zeros((3, 9, 2)), "y": np.zeros((3, 9, 6))}, "x has shape (3, 9, 2) and y (3, 9"),
        ({"x": np.zeros((3, 9, 4)), "y": np.zeros((3, 8, 6))}, "and y (3, 8, 6), expected (seq"),
        ({"x": np.zeros((0, 9, 4)), "y": np.zeros((0, 9, 6))}, "x has shape (0, 9, 4) and y (0"),
        ({"x": np.array(["ab"]), "y": np.zeros((3, 9, 6))}, "QTDB_test.mat: x is array(['ab']"),
        ({"x": np.zeros((3, 9, 4))}, "QTDB_test.mat has no arrays x and y"),
        ({"x": np.full((3, 9, 4), 7), "y": np.zeros((3, 9, 6))}, "expected events of -1, 0 and 1"),
        ({"x": np.zeros((3, 9, 4)), "y": -np.ones((3, 9, 6))}, "and a single 1 in y at each step"),
        ({"x": np.zeros((3, 9, 4)), "y": np.ones((3, 9, 6))}, "and a single 1 in y at each step"),
    ],
)
def test_a_file_of_other_arrays_or_that_is_cut_is_refused(tmp_path, content, message):
    path = tmp_path / "QTDB_test.mat"
    savemat(path, content)
    assert message in refusal(load_ecg, tmp_path, "test")
    path.write_bytes(path.read_bytes()[:-100])
    assert "QTDB_test.mat cannot be read: " in refusal(load_ecg, tmp_path, "test")

"""Sequences of one's own: what fits is padded into batches, what does not is refused in a line."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from snn_lib.data.sequences import SequenceDataset, collate, sequence_dataset
from snn_lib.errors import InputError


def ragged(*lengths, features=(2,)):
    return [torch.randn(length, *features) for length in lengths]


def test_arrays_are_taken_samples_first():
    x, y = np.random.default_rng(0).random((5, 7, 2)), [0, 1, 0, 1, 1]
    data = SequenceDataset(x, y)
    assert len(data) == 5
    sequence, label = data[3]
    np.testing.assert_array_equal(sequence, x[3])
    assert label == 1


def test_lengths_cut_the_padding_off():
    x = torch.randn(3, 6, 2)
    data = SequenceDataset(x, torch.arange(3), [6, 2, 4])
    assert [len(data[index][0]) for index in range(3)] == [6, 2, 4]
    assert torch.equal(data[1][0], x[1, :2])


def test_a_batch_is_time_first_and_padded_to_its_longest():
    sequences = ragged(3, 5, 1)
    batch = collate(list(zip(sequences, [4, 5, 6], strict=True)))
    assert batch.x.shape == (5, 3, 2)
    assert batch.y.tolist() == [4, 5, 6]
    assert batch.lengths.tolist() == [3, 5, 1]
    for index, sequence in enumerate(sequences):
        assert torch.equal(batch.x[: len(sequence), index], sequence)
        assert (batch.x[len(sequence) :, index] == 0).all()


def test_sequences_of_one_length_have_no_lengths():
    assert collate([(sequence, 0) for sequence in ragged(4, 4)]).lengths is None


def test_targets_at_every_step_are_padded_likewise():
    batch = collate([(torch.ones(3, 2), torch.ones(3)), (torch.ones(5, 2), torch.ones(5))], True)
    assert batch.y.shape == (5, 2)
    assert batch.y.sum(0).tolist() == [3, 5]
    with pytest.raises(InputError, match="a sequence of 3 steps has 2 targets"):
        collate([(torch.ones(3, 2), torch.ones(2))], True)


def test_padded_targets_at_every_step_are_cut_as_their_sequences():
    x, y = torch.randn(3, 6, 2), torch.randn(3, 6, 1)
    data = SequenceDataset(x, y, [6, 2, 4], targets_are_sequences=True)
    batch = collate([data[index] for index in range(3)], targets_are_sequences=True)
    assert torch.equal(batch.y[:2, 1], y[1, :2])
    assert (batch.y[2:, 1] == 0).all()


def test_numbers_of_numpy_become_float32():
    batch = collate([(np.ones((3, 2)), np.float64(0.5))])
    assert (batch.x.dtype, batch.y.dtype) == (torch.float32, torch.float32)
    assert collate([(np.ones((3, 2)), np.int32(1))]).y.dtype == torch.int32


def test_spikes_as_integers_become_floats():
    batch = collate([(torch.ones(3, 2, dtype=torch.uint8), 0)])
    assert batch.x.dtype == torch.float32


def test_a_data_set_is_taken_as_it_is():
    data = TensorDataset(torch.randn(4, 6, 2), torch.arange(4))
    assert sequence_dataset(data, "train") is data


X = torch.zeros(4, 7, 2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((X, torch.zeros(3)), r"train data: x has shape \(4, 7, 2\) and y 3 targets"),
        ((X, torch.zeros(7)), r"samples first: time comes second, as in x\.transpose\(0, 1\)"),
        ((X[..., 0], torch.zeros(4)), r"expected \(samples, T, \*features\).*x\[\.\.\., None\]"),
        ((X, torch.zeros(4), [7, 0, 1, 1]), "length 1 is 0, expected 1 to 7"),
        ((X, torch.zeros(4), [8, 1, 1, 1]), "length 0 is 8, expected 1 to 7"),
        ((X, torch.zeros(4), [1, 2]), "4 sequences have 2 lengths"),
        ((X, torch.zeros(4), [1.0, 2.0, 3.0, 4.0]), r"length 0 is 1\.0, expected 1 to 7"),
        ((ragged(2, 3), [0]), "2 sequences have 1 targets"),
        (([], []), "there are no sequences"),
        ((X,), r"expected \(x, y\), \(x, y, lengths\) or a torch"),
        (X, "the train data is Tensor, expected"),
        (("words", [0]), "x is no array of numbers"),
        (TensorDataset(torch.zeros(0, 3, 1)), "the train data set is empty"),
    ],
)
def test_what_does_not_fit_is_refused(source, message):
    with pytest.raises(InputError, match=message):
        sequence_dataset(source, "train")


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([torch.zeros(0, 2)], r"shape \(0, 2\), expected \(T, \*features\) with T > 0"),
        ([torch.zeros(5)], r"shape \(5,\)"),
        ([torch.zeros(5, 2), torch.zeros(5, 3)], r"features \(2,\) and \(3,\)"),
    ],
)
def test_sequences_that_fit_no_batch_are_refused(sequences, message):
    with pytest.raises(InputError, match=message):
        collate([(sequence, 0) for sequence in sequences])

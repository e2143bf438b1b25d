"""Sequences of one's own: what fits is padded into batches, what does not is refused in a line."""

import importlib
import inspect
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from claimed_device import ClaimedDevice
from refusing import refusal
from torch.utils.data import Dataset, TensorDataset

import snn_lib
from snn_lib.data.sequences import (
    SequenceDataset,
    as_numbers,
    collate,
    read_sample,
    sequence_dataset,
)
from snn_lib.errors import InputError


def ragged(*lengths, features=(2,)):
    return [torch.randn(length, *features) for length in lengths]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int16])
def test_classes_may_be_numbers_of_any_whole_type(dtype):
    data = sequence_dataset((np.ones((2, 3, 1)), np.array([0, 200], dtype)), "train")
    target = read_sample(data, 1)[1]
    assert target >= 0
    assert target.long() == 200


ARRAY = np.random.default_rng(0).random((3, 7, 2))
PACKED = np.zeros(ARRAY.shape, dtype=[("mark", "u1"), ("value", "f4")])
PACKED["value"] = ARRAY


@pytest.mark.parametrize(
    ("x", "y"),
    [(ARRAY, [0, 1, 1]), (ARRAY[:, ::-1], np.arange(3)[::-1]), (PACKED["value"], np.arange(3))],
    ids=["as usual", "reversed", "a column of packed rows"],
)
def test_arrays_of_any_layout_are_taken_samples_first(x, y):
    data = SequenceDataset(x, y)
    assert len(data) == 3
    for index in range(3):
        sequence, label = data[index]
        np.testing.assert_array_equal(sequence, x[index])
        assert label == y[index]


def test_an_array_may_have_longer_floats_than_pytorch():
    values = np.random.default_rng(0).random((3, 2))
    assert torch.equal(as_numbers(values.astype(np.longdouble), "x"), torch.from_numpy(values))


def test_sequences_of_several_lengths_may_be_an_array_of_objects():
    x, y = np.empty(2, object), np.array([1, 0])
    x[:] = [np.ones((3, 2)), np.ones((5, 2))]
    data = SequenceDataset(x, y)
    assert [len(data[index][0]) for index in range(2)] == [3, 5]


@pytest.mark.parametrize("listed", [tuple, pd.Series])
def test_sequences_may_be_a_tuple_or_a_column_of_a_table(listed):
    x = [np.ones((3, 2)), np.full((5, 2), 4.0)]
    data = SequenceDataset(listed(x), listed([1, 0]))
    for index in range(2):
        sequence, target = read_sample(data, index)
        assert (sequence.tolist(), target) == (x[index].tolist(), 1 - index)


def test_a_sequence_may_be_a_list_of_tensors():
    x = torch.rand(3, 2)
    assert torch.equal(sample_of([*x], 1)[0], x)
    assert torch.equal(sample_of([x[0], x[1].tolist(), x[2].numpy()], 1)[0], x)
    assert sample_of(x, [torch.tensor(1.0), 2.0])[1].tolist() == [1, 2]
    assert "expected numbers" in refusal(sample_of, [x[0], x[1, :1]], 1)


def test_a_target_may_be_a_number_of_numpy_s_of_any_type():
    for dtype in (np.int8, np.uint64, np.uint16, bool):
        assert sample_of(np.ones((3, 2)), np.ones(1, dtype)[0])[1] == 1


@pytest.mark.filterwarnings("error")
def test_an_array_may_be_read_only_and_is_neither_copied_nor_warned_of():
    x = np.random.default_rng(0).random((3, 7, 2))
    x.flags.writeable = False
    torch.set_warn_always(True)  # once in a process otherwise, perhaps in another test
    try:
        data = SequenceDataset(x, np.frombuffer(b"abc", np.uint8))
    finally:
        torch.set_warn_always(False)
    assert data.x.data_ptr() == x.ctypes.data  # a file that is mapped may be larger than the memory
    np.testing.assert_array_equal(data[1][0], x[1])


def test_lengths_cut_the_padding_off():
    x = torch.randn(3, 6, 2)
    data = SequenceDataset(x, torch.arange(3), [6, 1, 4])
    assert [len(data[index][0]) for index in range(3)] == [6, 1, 4]
    assert torch.equal(data[1][0], x[1, :1])


def test_a_batch_is_time_first_and_padded_to_its_longest():
    sequences = ragged(3, 5, 1)
    batch = collate(list(zip(sequences, [4, 5, 6], strict=True)))
    assert batch.x.shape == (5, 3, 2)
    assert batch.y.tolist() == [4, 5, 6]
    assert batch.lengths.tolist() == [3, 5, 1]
    for index, sequence in enumerate(sequences):
        assert torch.equal(batch.x[: len(sequence), index], sequence)
        assert (batch.x[len(sequence) :, index] == 0).all()


def test_a_batch_of_sequences_of_one_length_has_no_lengths():
    assert collate([(sequence, 0) for sequence in ragged(4, 4)]).lengths is None


def test_targets_at_every_step_are_padded_as_their_sequences():
    batch = collate([(torch.ones(3, 2), torch.ones(3)), (torch.ones(5, 2), torch.ones(5))], True)
    assert batch.y.shape == (5, 2)
    assert batch.y.sum(0).tolist() == [3, 5]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("targets", "dtype"),
    [
        ((torch.tensor([0, 1, 1]), torch.tensor([0.5, 0.25])), torch.float32),
        ((torch.tensor([True, False]), torch.tensor([300, -1])), torch.int64),
        ((torch.tensor([255, 3], dtype=torch.uint8), torch.tensor([-1, 2, 0])), torch.int64),
    ],
)
def test_targets_of_several_types_keep_their_numbers(targets, dtype, order):
    y = collate([(torch.ones(len(one), 2), one) for one in targets[::order]], True).y
    assert y.dtype == dtype
    for column, target in zip(y.T, targets[::order], strict=True):
        assert column[: len(target)].tolist() == target.tolist()


@pytest.mark.parametrize("kind", [lambda y: y, np.asarray, torch.Tensor.tolist])
@pytest.mark.parametrize("features", [(), (1,)])
def test_padded_targets_at_every_step_are_cut_as_their_sequences(features, kind):
    x, y = torch.randn(3, 6, 2), torch.randn(3, 6, *features)
    data = SequenceDataset(x, kind(y), [6, 2, 4], targets_are_sequences=True)
    batch = collate([data[index] for index in range(3)], targets_are_sequences=True)
    assert torch.equal(batch.y[:2, 1], y[1, :2])
    assert (batch.y[2:, 1] == 0).all()


def sample_of(sequence, target, targets_are_sequences=False):
    return read_sample([(sequence, target)], 0, targets_are_sequences)


def test_the_bytes_of_an_array_may_be_in_any_order():
    values = np.arange(6.0).reshape(3, 2)
    for order in "<>":
        x, y = sample_of(values.astype(f"{order}f8"), np.array(1, f"{order}i4"))
        assert torch.equal(x, torch.tensor(values, dtype=torch.float32))
        assert y == 1


def test_sequences_and_real_targets_become_float32_and_whole_targets_stay():
    x, y = sample_of(np.ones((3, 2)), np.float64(0.5))
    assert (x.dtype, y.dtype) == (torch.float32, torch.float32)
    x, y = sample_of(torch.ones(3, 2, dtype=torch.uint8), np.int32(1))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int32)


def test_samples_that_lie_on_a_device_come_to_the_cpu():
    with ClaimedDevice():
        x, y = torch.rand(4, 6, 2, device="cuda"), torch.arange(4, device="cuda")
        arrays = sequence_dataset((x, y), "train")
        for data in (arrays, TensorDataset(x, y)):
            sequence, target = read_sample(data, 3)
            assert (sequence.device.type, target.device.type) == ("cpu", "cpu")
            assert torch.equal(sequence, x.cpu()[3])
            assert target == 3


X = torch.zeros(4, 7, 2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((X, torch.zeros(3)), "train data: 4 sequences have 3 targets"),
        ((X, torch.zeros(7)), r"x has shape \(4, 7, 2\), .* first, as in x\.transpose\(0, 1\)"),
        ((X[..., 0], torch.zeros(4)), r"expected \(samples, T, \*features\).*x\[\.\.\., None\]"),
        ((X, torch.zeros(4), [7, 0, 1, 1]), "length 1 is 0, expected a whole number from"),
        ((X, torch.zeros(4), [8, 1, 1, 1]), "length 0 is 8, expected a whole number from"),
        ((X, torch.zeros(4), [1, 2]), r"lengths has shape \(2,\), expected \(4,\)"),
        ((X, 7), "train data: y is a single number"),
        (([1.0, 2.0], [0, 1], [1, 1]), "train data: sequence 0 is a single number"),
        ((7, torch.zeros(4)), "train data: x is a single number"),
        ((X, torch.zeros(4), 7), r"lengths has shape \(\), expected \(4,\)"),
        ((X, torch.zeros(4), [True] * 4), "length 0 is True, expected a whole number from"),
        (
            (X, torch.zeros(4), [1.0, 2.0, 3.0, 4.0]),
            r"length 0 is 1\.0, expected a whole number from",
        ),
        ((ragged(2, 3), [0]), "2 sequences have 1 targets"),
        (([], []), "there are no sequences"),
        ((X,), r"expected \(x, y\), \(x, y, lengths\) or a torch"),
        (X, "the train data is Tensor, expected"),
        (("words", [0]), "x is 'words', expected numbers"),
        ((X, np.array(["a", "b"] * 2)), "y is array.*'a', .* expected numbers; .* classes=names"),
        ((X + 1j, torch.zeros(4)), "x has complex numbers, expected real ones"),
        (TensorDataset(torch.zeros(0, 3, 1)), "the train data set is empty"),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(source, message):
    assert re.search(message, refusal(sequence_dataset, source, "train"))


def test_of_series_and_labels_of_steps_either_may_be_turned():
    y = torch.zeros(7, 4)
    expected = r"7 targets: x has shape \(4, 7, 2\) and y \(7, 4\), expected samples first in both"
    assert re.search(expected, refusal(sequence_dataset, (X, y), "train", True))
    # A target for each sequence is one of four numbers.
    assert "x.transpose(0, 1)" in refusal(sequence_dataset, (X, y), "train")


NAN, HUGE = torch.tensor([[1.0, math.nan]]), np.array([[1e300]])


@pytest.mark.parametrize(
    ("sequence", "target", "message"),
    [
        (torch.zeros(0, 2), 0, r"shape \(0, 2\), expected \(T, \*features\) with at least one num"),
        (torch.zeros(5), 0, r"the sequence has shape \(5,\)"),
        (NAN, 0, "infinite or undefined in torch.float32: step 0, channel 1"),
        (HUGE, 0, "the sequence has a number that is infinite or undefined in torch.float32"),
        (torch.zeros(5, 2), math.inf, "the target has numbers that are infinite or undefined"),
        (torch.zeros(5, 2), "walk", "the target is 'walk', expected numbers; .*classes=names"),
        (torch.zeros(5, 2), None, "the target is None, expected numbers"),
        (((10**30,) * 9,) * 9, 0, r"the sequence is \(\(10{30}, 10{30}, \.\.\., expected numbers$"),
        ([[1, 2], [3]], 0, r"the sequence is \[\[1, 2\], \[3\]\], expected numbers"),
    ],
)
def test_samples_that_are_none_are_refused(sequence, target, message):
    assert re.search(message, refusal(sample_of, sequence, target))


@pytest.mark.parametrize("target", [torch.zeros(2), torch.tensor(1.0)])
def test_a_target_that_has_other_steps_is_refused(target):
    said = refusal(sample_of, torch.ones(3, 2), target, targets_are_sequences=True)
    assert "the sequence has 3 steps and the target shape" in said


def test_a_sample_that_is_no_pair_is_refused():
    said = refusal(read_sample, [torch.zeros(5, 2)], 0)
    assert "it is Tensor, expected (sequence, target)" in said
    said = refusal(read_sample, [(torch.zeros(5, 2), 1, "speaker")], 0)
    assert "it has 3 parts, expected (sequence, target)" in said


class Failing(Dataset):
    """Calls a function that raises from the line that :attr:`line` has the number of."""

    line = inspect.currentframe().f_lineno + 6

    def __init__(self, read):
        self.read = read

    def __getitem__(self, index):
        return self.read(f"none_{index}.npy")


def test_an_error_of_the_user_s_code_is_told_with_its_line():
    with pytest.raises(InputError) as refused:
        read_sample(Failing(np.load), 7)
    message = str(refused.value)
    assert message.startswith("FileNotFoundError: [Errno 2] No such file")
    assert message.endswith(f"'none_7.npy' ({__file__}, line {Failing.line})")
    assert isinstance(refused.value.__cause__, FileNotFoundError)


def test_the_line_of_an_error_may_be_in_a_file_named_like_the_library():
    code = "def read(index):\n    raise OSError('no disk')\n"
    file = f"{Path(snn_lib.__file__).parent}_mine.py"
    names = {}
    exec(compile(code, file, "exec"), names)
    assert refusal(read_sample, Failing(names["read"]), 7) == f"OSError: no disk ({file}, line 2)"


def test_the_line_of_an_error_is_the_user_s_and_not_that_of_an_installed_package(
    tmp_path, monkeypatch
):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "reading_package.py").write_text("def read(index):\n    raise OSError('no disk')\n")
    monkeypatch.syspath_prepend(folder)
    data = Failing(importlib.import_module("reading_package").read)
    assert refusal(read_sample, data, 7) == f"OSError: no disk ({__file__}, line {data.line})"


def test_the_line_of_an_error_is_not_one_of_compiled_python_whose_file_has_no_folder():
    data = Failing(lambda index: np.random.default_rng(0).integers(5, 1))
    message = refusal(read_sample, data, 7)
    line = inspect.currentframe().f_lineno - 2
    assert message == f"ValueError: low >= high ({__file__}, line {line})"

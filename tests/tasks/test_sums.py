import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from claimed_device import ClaimedDevice

from snn_lib.errors import RunError
from snn_lib.tasks.base import add_sums, plain_number, read_sums


def test_sums_of_a_device_and_of_the_cpu_are_read_together():
    with ClaimedDevice():
        sums = {"a": torch.tensor(2.0), "b": torch.tensor(3, device="cuda"), "c": 4}
        assert read_sums(sums) == {"a": 2.0, "b": 3.0, "c": 4.0}


def test_counts_beyond_the_digits_of_float32_are_added_exactly():
    sums = {}
    for spikes in (2**24, *[1] * 100):
        add_sums(sums, {"spikes": torch.tensor(spikes), "loss": torch.tensor(0.5)})
    assert read_sums(sums) == {"spikes": 2**24 + 100, "loss": 50.5}


def test_adding_sums_up_leaves_a_batch_s_own_tensors_alone():
    """A task may keep them, or return the same one for every batch."""
    sums, own = {}, torch.tensor(0.5)
    for _ in range(3):
        add_sums(sums, {"loss": own})
    assert own == 0.5
    assert read_sums(sums) == {"loss": 1.5}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(0.5, dtype=torch.bfloat16), 1000.0),
        (torch.tensor(0.5, dtype=torch.float16), 1000.0),
        (torch.tensor(2, dtype=torch.uint8), 4000),
        (torch.tensor(True), 2000),
        (np.float16(0.5), 1000.0),
        (np.uint8(2), 4000),
        (torch.tensor(1 + 2**-40, dtype=torch.float64), 2000 + 2000 * 2**-40),
    ],
)
def test_sums_of_small_types_do_not_stand_still_or_overflow(value, expected):
    sums = {}
    for _ in range(2000):
        add_sums(sums, {"loss": value})
    assert read_sums(sums) == {"loss": expected}


def test_a_sum_that_is_no_number_is_refused_by_name():
    with pytest.raises(RunError, match=r"sum 'per_class' has shape \(3,\)"):
        read_sums({"per_class": torch.zeros(3)})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        (True, 1),
        (0.5, 0.5),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),  # a subclass of float that a checkpoint does not read
        (np.longdouble(0.5), 0.5),
        (np.int64(-3), -3),
        (np.uint8(3), 3),
        (np.bool_(True), 1),
        (np.array(0.5, dtype=np.float16), 0.5),
        (np.array(3), 3),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor(3), 3),
        (Fraction(1, 2), 0.5),
    ],
)
def test_plain_numbers_are_pythons_own_and_readable_from_a_checkpoint(value, expected, tmp_path):
    number = plain_number(value)
    assert number == expected
    assert type(number) is type(expected)
    torch.save(number, tmp_path / "number")
    assert torch.load(tmp_path / "number", weights_only=True) == expected


@pytest.mark.parametrize("value", [np.float32("nan"), torch.tensor(math.nan), math.nan])
def test_plain_numbers_may_be_nan(value):
    assert math.isnan(plain_number(value))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.5", "str '0.5' is no number, expected an int or a float"),
        (None, "NoneType None is no number"),
        (1 + 2j, r"complex \(1\+2j\) is no number"),
        (np.complex64(1), "complex64 .* is no number"),
        (np.str_("a"), "str_ .* is no number"),
        (np.ones((9, 9)), r"ndarray array\(\[\[1.*\.\.\. is no number"),
        (torch.ones(1), r"Tensor tensor\(\[1.\]\) is no number"),
        ([1.0], r"list \[1.0\] is no number"),
    ],
)
def test_what_is_no_number_is_named_in_one_line(value, message):
    with pytest.raises(TypeError, match=message) as refusal:
        plain_number(value)
    assert "\n" not in str(refusal.value)

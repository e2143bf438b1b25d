"""Batches prepared ahead of a device: the same ones, errors where they are used, no thread left."""

import threading
import time

import pytest
import torch
from claimed_device import ClaimedDevice

from snn_lib.data.batches import Batch, ahead

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def claimed():
    with ClaimedDevice() as device:
        yield device
        assert not preparing()


def preparing():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def numbered(count, prepared=None):
    """Batches that hold their number, which is noted in ``prepared`` when they are asked for."""
    for number in range(count):
        if prepared is not None:
            prepared.append(number)
        yield Batch(torch.full((2, 3), float(number)), torch.tensor([number, -number]))


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_cpu_gets_the_very_batches_when_it_asks_for_them():
    prepared = []
    given = list(numbered(3))
    assert all(a is b for a, b in zip(ahead(iter(given), CPU), given, strict=True))
    batches = ahead(numbered(9, prepared), CPU)
    next(batches)
    assert prepared == [0]
    assert not preparing()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_device_gets_the_same_in_the_same_order(depth):
    batches = list(ahead(numbered(7), CUDA, depth))
    assert len(batches) == 7
    for batch, expected in zip(batches, numbered(7), strict=True):
        for tensor, other in zip(batch[:2], expected[:2], strict=True):
            assert tensor.device.type == "cuda"
            assert torch.equal(tensor.cpu(), other)


def test_nothing_waits_for_the_device(claimed):
    assert len(list(ahead(numbered(5), CUDA))) == 5
    assert not claimed.waits


@pytest.mark.parametrize("depth", [1, 3])
def test_so_many_are_prepared_beyond_the_one_that_was_handed_out(depth):
    prepared = []
    batches = ahead(numbered(100, prepared), CUDA, depth)
    assert not prepared  # not before the first is wanted
    for handed_out in (1, 2):
        next(batches)
        wait_until(lambda count=handed_out + depth: len(prepared) == count)
    time.sleep(0.01)
    batches.close()
    assert len(prepared) == 2 + depth


@pytest.mark.parametrize("error", [ValueError("bad file"), KeyboardInterrupt()])
def test_an_error_of_the_preparation_comes_after_the_batches_before_it(error):
    def failing():
        yield from numbered(3)
        raise error

    batches = ahead(failing(), CUDA)
    assert [next(batches)[1][0].item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(type(error)) as raised:
        next(batches)
    assert raised.value is error
    assert list(batches) == []


def test_the_thread_ends_with_the_iterator():
    for end in (lambda batches: batches.close(), lambda batches: None):
        batches = ahead(numbered(100), CUDA)
        next(batches)
        assert len(preparing()) == 1
        end(batches)
        del batches
        assert not preparing()


def test_closing_ends_a_thread_that_is_at_work():
    at_work, prepared = threading.Event(), []

    def slow():
        for batch in numbered(100, prepared):
            if len(prepared) == 3:
                at_work.set()
                time.sleep(0.02)
            yield batch

    batches = ahead(slow(), CUDA)
    next(batches)
    assert at_work.wait(20)
    batches.close()
    assert not preparing()
    assert len(prepared) == 3


def test_an_iterator_that_is_never_used_starts_nothing():
    ahead(numbered(3), CUDA).close()
    assert not preparing()

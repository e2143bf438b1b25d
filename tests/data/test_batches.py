"""Batches: every sample once, in an order and with random numbers that resume and are shared."""

import random
import signal

import numpy as np
import pytest
import torch

from snn_lib.data.batches import Batch, Split, split_indices
from snn_lib.errors import InputError
from snn_lib.seeds import batch_generator

COUNT = 50


def batches(size=16, **options):
    """Batches of 50 samples that hold their own number and one random number each."""
    seed = options.get("seed", 0)

    def make_batch(numbers, share, epoch, number):
        noise = torch.rand(len(numbers), generator=batch_generator(seed, epoch, number + 1))
        return Batch(torch.stack([numbers.float(), noise])[:, share], numbers[share])

    return Split(COUNT, size, make_batch, **options)


def shuffled(**options):
    return batches(**{"seed": 4, "shuffle": True, **options})


def assert_same(ones, others):
    ones, others = list(ones), list(others)
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.y, other.y)


def test_an_epoch_covers_every_sample_once_and_keeps_its_target():
    seen = list(shuffled().batches(3))
    assert len(seen) == len(shuffled()) == 4
    assert [len(batch.y) for batch in seen] == [16, 16, 16, 2]
    labels = torch.cat([batch.y for batch in seen])
    assert labels.sort().values.tolist() == list(range(COUNT))
    assert labels.tolist() != list(range(COUNT))
    assert torch.equal(torch.cat([batch.x[0] for batch in seen]), labels.float())


def test_without_shuffling_the_order_is_kept():
    assert torch.cat([batch.y for batch in batches().batches()]).tolist() == list(range(COUNT))


def test_seed_epoch_and_batch_decide_order_and_random_numbers():
    assert_same(shuffled().batches(2), shuffled().batches(2))
    torch.rand(5)  # whatever else has drawn random numbers
    assert_same(shuffled().batches(2), shuffled().batches(2))
    first = next(shuffled().batches(2))
    for other in (shuffled().batches(3), shuffled(seed=5).batches(2)):
        batch = next(other)
        assert not torch.equal(batch.x[1], first.x[1])
        assert not torch.equal(batch.y, first.y)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 3])
def test_an_epoch_goes_on_from_any_batch(start, workers):
    later = shuffled(workers=workers).batches(2, start)
    assert_same(list(shuffled().batches(2))[start:], later)


def drawing(**options):
    """Batches that are drawn from the generators of PyTorch, NumPy and Python."""

    def make_batch(numbers, share, epoch, number):
        drawn = torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002
        return Batch(torch.tensor(drawn), numbers[share])

    return Split(COUNT, 16, make_batch, seed=4, **options)


def test_what_a_batch_draws_from_the_global_generators_follows_from_its_number():
    epochs = [list(drawing().batches(epoch)) for epoch in (0, 1)]
    values = torch.cat([batch.x for batches in epochs for batch in batches])
    assert len(values.unique()) == len(values)  # each batch draws for itself
    torch.rand(5)
    for workers in (0, 2):
        assert_same(drawing(workers=workers).batches(1), epochs[1])
        assert_same(drawing(workers=workers).batches(1, 2), epochs[1][2:])
    assert not torch.equal(next(drawing(rank=1, world=2).batches()).x, epochs[0][0].x)


def test_batches_leave_the_global_generators_as_they_were():
    before = torch.get_rng_state()
    list(drawing().batches())
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_share_a_batch_and_its_random_numbers():
    world = 3
    shares = [list(shuffled(rank=rank, world=world).batches(1)) for rank in range(world)]
    for number, whole in enumerate(shuffled().batches(1)):
        for rank, share in enumerate(shares):
            assert torch.equal(share[number].x, whole.x[:, rank::world])
            assert torch.equal(share[number].y, whole.y[rank::world])


def test_workers_draw_nothing_from_the_generator_of_dropout():
    state = torch.get_rng_state()
    list(shuffled(workers=1).batches(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_leave_ctrl_c_to_the_process_that_ends_them():
    def make_batch(numbers, share, epoch, number):
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        return Batch(torch.tensor([int(handler) for handler in handlers]), numbers)

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        batch = next(Split(COUNT, COUNT, make_batch, workers=1).batches())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert batch.x.tolist() == [signal.SIG_IGN, signal.SIG_DFL]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_batch_is_refused_before_it_leaves_its_process(workers):
    def make_batch(numbers, share, epoch, batch):
        yield numbers  # a generator, which no worker could send

    with pytest.raises(InputError, match=r"^make_batch returned a generator, expected a Batch$"):
        list(Split(COUNT, 16, make_batch, workers=workers).batches())


def test_a_refusal_comes_out_of_a_worker_as_it_is():
    def make_batch(numbers, share, epoch, number):
        raise InputError("sequence 3 is empty")

    for workers in (0, 1):
        with pytest.raises(InputError, match=r"^sequence 3 is empty$"):
            list(Split(COUNT, 16, make_batch, workers=workers).batches())


def test_workers_are_refused_where_processes_cannot_fork(monkeypatch):
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(InputError, match="data_workers needs processes that fork"):
        list(shuffled(workers=1).batches())


def test_training_and_validation_cover_all_samples_as_the_seed_says():
    training, validation = split_indices(100, 30, seed=1)
    assert (len(training), len(validation)) == (70, 30)
    assert sorted(torch.cat([training, validation]).tolist()) == list(range(100))
    again = split_indices(100, 30, seed=1)
    assert torch.equal(training, again[0])
    assert torch.equal(validation, again[1])
    assert not torch.equal(validation, split_indices(100, 30, seed=2)[1])


def test_samples_are_computed_alike_whatever_mode_the_network_runs_in():
    weights, raw = torch.randn(30, 30, requires_grad=True), torch.randn(50, 30)

    def make_batch(numbers, share, epoch, number):
        values = raw[numbers] @ weights
        (gradient,) = torch.autograd.grad(values.square().sum(), weights)
        return Batch(values.detach(), gradient.sum(0))

    split = Split(50, 16, make_batch)
    expected = list(split.batches())
    assert torch.equal(expected[0].x, (raw[:16] @ weights).detach())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert_same(split.batches(), expected)

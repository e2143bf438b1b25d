"""Seeds: each thing that draws has numbers of its own, and leaves those of others alone."""

import random

import numpy as np
import torch

from snn_lib import seeds
from snn_lib.seeds import EPOCHS, MOST_BATCHES, batch_generator, batch_seed


def test_seeds_epochs_and_batches_have_generators_of_their_own():
    draws = {
        torch.rand(1, generator=batch_generator(seed, epoch, batch)).item()
        for seed in range(3)
        for epoch in (-1, 0, 1)
        for batch in range(3)
    }
    assert len(draws) == 27


def draw():
    return torch.rand(1).item(), float(np.random.rand()), random.random()  # noqa: NPY002


def test_a_seeded_batch_leaves_the_generators_as_they_were():
    def around(*batch):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        inside = None
        if batch:
            with batch_seed(*batch):
                inside = draw()
        return inside, draw()

    _, untouched = around()
    first, after = around(3, 1, 2)
    again, _ = around(3, 1, 2)
    assert after == untouched
    assert first == again
    for other in ((4, 1, 2), (3, 2, 2), (3, 1, 3)):
        assert all(a != b for a, b in zip(around(*other)[0], first, strict=True))


def test_seeding_a_batch_leaves_other_devices_alone(monkeypatch):
    """They may be in use: the thread that prepares batches is not the one that trains."""
    touched = []
    for module in (torch.cuda, torch.mps):
        for name in ("manual_seed", "manual_seed_all"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, touched.append)
    with batch_seed(1, 2, 3):
        torch.rand(1)
    assert not touched


def test_no_two_rows_of_the_table_are_the_same_numbers():
    batches, fixed = range(50), [seeds.DATA, seeds.LAYERS, seeds.FIRST_WEIGHTS, seeds.EVALUATION]
    places = [(epoch, 0) for epoch in fixed]
    places += [(seeds.DATA, 1 + batch) for batch in batches]
    places += [(seeds.SPLITS, epoch) for epoch in EPOCHS.values()] + [(seeds.MADE, 0)]
    for epoch in {*EPOCHS.values(), 1, 2, 300}:
        for batch in batches:
            places += [(epoch, 1 + batch), (epoch, -1 - batch), (epoch, MOST_BATCHES + batch)]
        places.append((epoch, 0))
    of_two_processes = {seeds.mix(seed, *place) for seed in (4, 5) for place in places}
    assert len(of_two_processes) == 2 * len(places)

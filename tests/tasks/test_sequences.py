"""Tasks on one's own sequences: each at its own length, from a tensor to a tested model."""

import copy
import itertools
import math
import os
import random
import re
import signal
import threading
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from claimed_device import ClaimedDevice
from refusing import refusal
from running import Answer, run, the_run
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import Dataset, Subset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from snn_lib import DualExponentialSynapse, Sequential, SpikingNeuron, StatefulModule, Votes
from snn_lib.data.augmentation import AugmentationSettings
from snn_lib.data.batches import Batch, Split, default_dtype
from snn_lib.data.preparation import SequencePreparation
from snn_lib.errors import InputError, RunError
from snn_lib.readout import LeakyIntegrator, Mean, within
from snn_lib.seeds import batch_seed
from snn_lib.settings import ExperimentConfig, Settings, section, setting
from snn_lib.tasks import (
    ClassificationConfig,
    SequenceClassification,
    SequenceConfig,
    SequenceRegression,
)
from snn_lib.tasks.base import add_sums, output_of, read_sums
from snn_lib.tasks.sequences import labels_of
from snn_lib.tasks.time_series import TimeSeriesConfig
from snn_lib.training import Experiment
from snn_lib.training.checkpoints import load_checkpoint
from snn_lib.training.experiment import Stopped
from snn_lib.training.loading import load
from snn_lib.training.state import rng_state, split_of

CPU = torch.device("cpu")
CHANNELS, CLASSES = 4, 3


def sequences(count=40, seed=0):
    """Sequences of 5 to 12 steps, whose class is in their mean."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    lengths = torch.randint(5, 13, (count,), generator=generator).tolist()
    x = [
        torch.rand(n, CHANNELS, generator=generator) + k
        for n, k in zip(lengths, y.tolist(), strict=True)
    ]
    return x, y


def network(config=None):
    return Sequential(
        DualExponentialSynapse(CHANNELS, 4.0, 1.0, constraint="stable"),
        nn.Linear(CHANNELS, 20),
        SpikingNeuron(20, 4.0),
        DualExponentialSynapse(20, 4.0, 1.0, constraint="stable"),
        nn.Linear(20, CLASSES),
    )


def prepared(task, rank=0, world=1, **options):
    config = task.config_class()
    config.hyperparameters.batch_size = 8
    for key, value in options.items():
        setattr(config, key, value)
    task.setup(config, CPU)
    task.share(rank, world)
    return task


def settings_of(task, folder, **options):
    """Settings of a run of an epoch, with these hyperparameters."""
    config = task.config_class(device="cpu", runs_path=str(folder))
    for key, value in {"epoch": 1, "batch_size": 8, **options}.items():
        setattr(config.hyperparameters, key, value)
    return config


def trained_once(task, folder, model=network, **options):
    """An experiment after its training."""
    trial = Experiment(model, task, settings_of(task, folder, **options))
    trial.train()
    return trial


class Noisy(Dataset):
    """Draws from every global generator."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        noise = torch.rand(6, CHANNELS) + float(np.random.rand())  # noqa: NPY002
        return noise, index % CLASSES


# Classification


@pytest.mark.parametrize("readout", ["count", "mean", "last", "maximum", "leaky"])
def test_padding_changes_neither_loss_nor_metrics(readout):
    task = prepared(SequenceClassification({"train": sequences()}, readout))
    model = network()
    batch = next(task.batches("train"))
    assert batch.lengths is not None
    padded = batch._replace(x=torch.cat([batch.x, torch.randn(7, *batch.x.shape[1:])]))
    (loss, sums), (padded_loss, padded_sums) = (task.loss(model, b) for b in (batch, padded))
    torch.testing.assert_close(loss, padded_loss)
    torch.testing.assert_close(sums, padded_sums)


def test_loss_and_accuracy_are_those_of_each_sequence_by_itself():
    data = sequences()
    task, model = prepared(SequenceClassification({"train": data}, "mean")), network()
    sums = {"samples": 0, "loss": 0.0, "correct": 0}
    for batch in task.batches("validation"):
        for key, value in task.loss(model.eval(), batch)[1].items():
            sums[key] += float(value)
    losses = correct = 0.0
    samples = task.parts["validation"]
    for x, label in (samples[index] for index in range(len(samples))):
        logits = model(x[:, None])[0].mean(0)[0].detach().double()
        losses += math.log(logits.exp().sum()) - logits[label].item()
        correct += logits.argmax().item() == label
    metrics = task.metrics(sums)
    assert sums["samples"] == len(samples) == 4
    assert metrics["loss"] == pytest.approx(losses / 4, rel=1e-5)
    assert metrics["accuracy"] == correct / 4


def test_training_goes_in_a_new_order_every_epoch_and_evaluation_in_the_same():
    data = ([torch.full((3, 1), float(k)) for k in range(20)], torch.arange(20))
    task = prepared(SequenceClassification({"train": data, "validation": data, "test": data}))

    def order(batches):
        return torch.cat([batch.y for batch in batches]).tolist()

    first, second = order(task.batches("train")), order(task.batches("train", 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first == order(task.batches("train"))
    for split in ("validation", "test"):
        assert order(task.batches(split)) == list(range(20))


def test_training_goes_in_another_order_with_another_seed():
    data = {"train": (torch.ones(20, 3, 1), torch.arange(20))}
    parts = {**data, "validation": data["train"]}
    orders = [
        torch.cat(
            [
                batch.y
                for batch in prepared(SequenceClassification(parts), seed=seed).batches("train")
            ]
        )
        for seed in (1, 2)
    ]
    assert orders[0].tolist() != orders[1].tolist()


def test_without_a_validation_part_a_tenth_is_held_out_by_the_seed():
    def labels(task, split):
        data = task.parts[split]
        return [data[index][1].item() for index in range(len(data))]

    x = [torch.zeros(3, 1)] * 50
    parts = {"train": (x, torch.arange(50))}
    one, same, other = (prepared(SequenceClassification(parts), seed=seed) for seed in (1, 1, 2))
    training, validation = labels(one, "train"), labels(one, "validation")
    assert (len(training), len(validation)) == (45, 5)
    assert sorted(training + validation) == list(range(50))
    assert labels(same, "validation") == validation != labels(other, "validation")
    given = prepared(SequenceClassification({**parts, "validation": (x[:2], [0, 1])}))
    assert (len(given.parts["train"]), len(given.parts["validation"])) == (50, 2)


def test_training_sequences_are_augmented_as_the_settings_say_and_others_are_not():
    data = ([torch.ones(6 + k % 2, 2) for k in range(16)], torch.arange(16) % 2)
    task = prepared(SequenceClassification({"train": data, "validation": data}))
    plain = list(task.batches("train"))
    assert all(batch.x.unique().tolist() == [0, 1] for batch in plain)  # by default nothing is
    options = AugmentationSettings(noise=0.1, scale=0.2, stretch=1.3, crop=0.7)
    task = prepared(SequenceClassification({"train": data, "validation": data}))
    task.config.augmentation = options
    for number, (batch, before) in enumerate(zip(task.batches("train", 3), plain, strict=True)):
        assert len(batch.y) == len(before.y)
        again = next(task.batches("train", 3, number))  # as a run that is resumed there sees it
        assert torch.equal(batch.x, again.x)
        assert torch.equal(batch.lengths, again.lengths)
        assert len(batch.x[batch.x != 0].unique()) > 50
    for batch in task.batches("validation"):
        assert batch.x.unique().tolist() == [0, 1]


def test_a_sequence_is_augmented_otherwise_in_every_batch_epoch_and_seed():
    """All sequences are the same one, so that their order changes nothing."""
    data = torch.ones(16, 6, 2), torch.arange(16) % 2
    noise, shown = AugmentationSettings(noise=0.1), []
    for seed, epoch in (2, 3), (2, 4), (3, 3):
        task = SequenceClassification({"train": data, "validation": data})
        prepared(task, seed=seed, augmentation=noise)
        shown += [x for batch in task.batches("train", epoch) for x in batch.x.transpose(0, 1)]
    assert len(shown) == 48
    assert torch.pdist(torch.stack(shown).flatten(1)).min() > 0.01


def test_sequences_that_augmentation_makes_unequal_get_lengths():
    x = torch.ones(8, 20, 1)
    task = prepared(SequenceClassification({"train": (x, torch.arange(8) % 2)}, "mean"))
    task.config.augmentation.stretch = 1.5
    batch = next(task.batches("train"))
    assert len(set(batch.lengths.tolist())) > 1
    assert torch.equal((batch.x != 0).sum(0)[:, 0], batch.lengths)


def test_each_process_augments_its_share():
    samples = torch.ones(17, 5, 1), torch.arange(17) % 3
    data = {"train": samples, "validation": samples}
    shares = [prepared(SequenceClassification(data), rank, 2) for rank in range(2)]
    for share in shares:
        share.config.augmentation.scale = 0.5
    one, other = (list(share.batches("train")) for share in shares)
    assert [len(batch.y) for batch in one] == [4, 4, 1]
    assert [len(batch.y) for batch in other] == [4, 4, 0]
    assert not torch.equal(one[0].x, other[0].x)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_that_draws_at_random_repeats_and_resumes(workers):
    task = prepared(SequenceClassification({"train": Noisy()}), data_workers=workers)
    state = torch.get_rng_state()
    epoch = list(task.batches("train", 1))
    assert workers or torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(epoch[0].x, epoch[1].x)
    torch.rand(3)
    for one, other in zip(epoch[1:], task.batches("train", 1, 1), strict=True):
        assert torch.equal(one.x, other.x)
    assert not torch.equal(epoch[0].x, next(task.batches("train", 2)).x)
    other = prepared(SequenceClassification({"train": Noisy()}), seed=7)
    assert not torch.equal(epoch[0].x, next(other.batches("train", 1)).x)


def test_a_data_set_draws_other_numbers_in_every_process():
    shares = [prepared(SequenceClassification({"train": Noisy()}), rank, 2) for rank in range(2)]
    ones, others = (torch.cat([b.x for b in task.batches("train")], 1).flatten() for task in shares)
    assert not set(ones.tolist()) & set(others.tolist())


class Drawing(SequenceClassification):
    def encode(self, batch):
        return batch._replace(x=batch.x + float(np.random.rand()) + random.random())  # noqa: NPY002


def test_an_encode_of_one_s_own_draws_other_numbers_in_every_process():
    x = torch.zeros(16, 5, CHANNELS)
    tasks = [prepared(Drawing({"train": (x, torch.arange(16) % 2)}), rank, 2) for rank in (0, 1)]
    one, other, again = (next(task.batches("train")).x for task in (*tasks, tasks[0]))
    assert torch.equal(one, again)
    assert (one != other).all()


def drawn():
    """A number of every global generator, and what a checkpoint would store of them."""
    state = rng_state(CPU)["cpu"].numpy().tobytes()
    return torch.rand(1).item(), float(np.random.rand()), random.random(), state  # noqa: NPY002


@pytest.mark.parametrize(("device", "workers"), [("cpu", 0), ("cpu", 1), ("cuda", 0)])
def test_a_data_set_that_draws_at_random_leaves_the_generators_as_they_were(device, workers):
    def draw_beside(batches_of):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        seen, beside = [], []
        for batch in batches_of():
            seen.append(batch and batch.x.cpu())
            beside.append(drawn())
        return seen, beside

    here = prepared(SequenceClassification({"train": Noisy()}))
    expected = [batch.x for batch in here.batches("train", 3)]
    _, alone = draw_beside(lambda: [None] * len(expected))
    threads = threading.active_count()

    def read():
        task = SequenceClassification({"train": Noisy()})
        task.setup(replace(here.config, data_workers=workers), torch.device(device))
        return task.batches("train", 3)

    with ClaimedDevice() if device == "cuda" else nullcontext():
        found, beside = draw_beside(read)
        assert workers or threading.active_count() <= threads
    assert beside == alone
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_processes_share_a_batch_even_if_one_of_them_gets_no_sample():
    data = {"train": sequences(10), "validation": sequences(3)}  # 8 + 2, among 3 processes
    whole = prepared(SequenceClassification(data))
    shares = [prepared(SequenceClassification(data), rank, 3) for rank in range(3)]
    for batches in zip(whole.batches("train"), *(s.batches("train") for s in shares), strict=True):
        batch, *parts = batches
        assert sum(len(part.y) for part in parts) == len(batch.y)
        for rank, part in enumerate(parts):
            assert torch.equal(part.y, batch.y[rank::3])
            assert part.x.shape[1] == len(part.y)
    assert shares[2].loss(network(), parts[2])[1]["samples"] == 0


@pytest.mark.parametrize("kind", [SequenceClassification, SequenceRegression])
def test_a_process_that_gets_no_sample_has_no_target_of_a_step(kind):
    x, y = labelled(10)  # 8 + 2, among 3 processes
    if kind is SequenceRegression:
        y = [sequence[:, :CLASSES] for sequence in x]
    data = {"train": (x, y), "validation": (x, y)}
    task = prepared(kind(data, None), 2, 3)
    *_, last = task.batches("train")
    _, sums = task.loss(nn.Linear(CHANNELS, CLASSES), last)
    assert (sums["samples"], int(sums[task.mean_over])) == (0, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"test": sequences()}, "data has no part 'train'"),
        ({"train": sequences(), "tset": sequences()}, "data has a part 'tset'"),
        ({"train": sequences(1)}, "1 training sequences are too few to hold out 1"),
        ({"train": 3}, "the train data is int"),
        (sequences(), "data is tuple, expected the parts by name"),
    ],
)
def test_data_without_its_parts_is_refused(data, message):
    assert message in refusal(prepared, SequenceClassification(data))


@pytest.mark.parametrize(
    ("readout", "message"),
    [
        ("total", "'total', expected one of count, mean, last"),
        (nn.Linear(3, 3), "Linear has parameters.*put what has to learn into the"),
    ],
)
def test_a_readout_that_is_unknown_or_learns_is_refused(readout, message):
    with pytest.raises(ValueError, match=message):
        SequenceClassification({}, readout)


class Listed(Dataset):
    """Samples that are given one by one, as from a disk."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if self.y[index] == "raises":
            raise KeyError(index)
        return self.x[index], self.y[index]


NAN = torch.rand(5, CHANNELS).masked_fill(torch.eye(5, CHANNELS) > 0, math.nan)
X = torch.rand(5, CHANNELS)
WRONG = [  # of sample 7
    (NAN, 0, "the sequence has a number that is infinite or undefined"),
    (X[:, :1], 0, r"features are \(1,\) and targets \(\), expected \(4,\) and \(\), as"),
    (X, -1, r"the target is -1 \(int64\), expected the number of a class, an integer from 0 on"),
    (X, 1.0, r"the target is 1.0 \(float32\), expected the number of a class"),
    (X, torch.tensor([1]), r"targets \(1,\), expected \(4,\) and \(\)"),
    (X, "walk", "the target is 'walk', expected numbers"),
    (
        np.ma.masked_greater(X.numpy(), 0.5),
        0,
        "the sequence has a number that is infinite or undef",
    ),
    (np.ma.masked_less(np.ones((5, 4), int), 2), 0, "the sequence has masked values: fill them"),
    (X.to_sparse(), 0, "the sequence is sparse or quantised: give to_dense"),
    (
        torch.nested.nested_tensor([X]),
        0,
        r"the sequence is a nested tensor: give the list unbind()",
    ),
]


def data_with(sequence, target, part="train"):
    """Two parts of twelve samples, in which sample 7 of one is as given."""
    parts = {name: ([X] * 12, [k % CLASSES for k in range(12)]) for name in ("train", "test")}
    x, y = parts[part]
    x[7], y[7] = sequence, target
    return parts


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(("sequence", "target", "message"), WRONG)
def test_a_wrong_sample_of_arrays_is_named_before_training(sequence, target, message, part):
    said = refusal(prepared, SequenceClassification(data_with(sequence, target, part)))
    assert re.search(f"^sample 7 of the {part} data: .*{message}", said)


def test_a_mask_may_cover_the_padding():
    x = np.ma.masked_array(np.random.default_rng(0).random((12, 5, CHANNELS)))
    x[:, 3:] = np.ma.masked
    task = prepared(SequenceClassification({"train": (x, [0] * 12, [3] * 12)}))
    assert all(batch.x.isfinite().all() for batch in task.batches("train"))


@pytest.mark.parametrize("kind", ["int64", "Int64", "object"])
def test_labels_of_pandas_are_taken_by_position_and_not_by_index(kind):
    pandas = pytest.importorskip("pandas")
    labels = pandas.Series([k % CLASSES for k in range(12)], index=range(40, 52), dtype=kind)
    task = prepared(SequenceClassification({"train": (torch.stack([X] * 12), labels)}))
    assert task.fetch("train", 0)[1].item() == labels.iloc[task.parts["train"].indices[0]]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_are_taken_without_their_gradient(workers):
    encoder = nn.Linear(CHANNELS, CHANNELS)
    data = {"train": (encoder(torch.rand(20, 5, CHANNELS)), torch.arange(20) % CLASSES)}
    task = prepared(SequenceClassification(data, "mean"), data_workers=workers)
    for batch in task.batches("train"):
        assert not batch.x.requires_grad


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("sequence", "target", "message"),
    [*WRONG, (X, "raises", r"KeyError: 7 \(.*test_sequences.py, ")],
)
def test_a_wrong_sample_of_a_data_set_is_named_when_it_is_read(sequence, target, message, workers):
    parts = {name: Listed(*part) for name, part in data_with(sequence, target).items()}
    task = prepared(SequenceClassification(parts), data_workers=workers)
    both = (batch for split in ("train", "validation") for batch in task.split(split).batches())
    said = refusal(list, both)  # whichever part it was drawn to
    assert re.search(f"^sample 7 of the train data: .*{message}", said)


def test_a_sample_that_is_held_out_is_named_by_its_number_in_the_whole():
    parts = {name: Listed(*part) for name, part in data_with(NAN, 0).items()}
    for seed in range(40):  # which draw sample 7 for validation sooner or later
        task = prepared(SequenceClassification(parts), seed=seed)
        if task.parts["validation"].indices == [7]:
            break
    said = refusal(task.fetch, "validation", 0)
    assert said.startswith("sample 7 of the train data: the sequence has")
    own = prepared(SequenceClassification({**parts, "validation": Subset(parts["train"], [2, 7])}))
    said = refusal(own.fetch, "validation", 1)
    assert said.startswith("sample 1 of the validation data: the sequence has")


def test_a_worker_that_is_killed_is_told_in_a_line(monkeypatch):
    class Killed(Noisy):
        def __getitem__(self, index):
            if get_worker_info() and index == 13:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    # How often PyTorch looks whether workers live, in seconds.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    handler = signal.getsignal(signal.SIGCHLD)
    data = {"train": Killed(), "validation": Killed()}
    task = prepared(SequenceClassification(data), data_workers=2)
    with pytest.raises(RunError, match=r"prepares data was killed.*set data_workers"):
        list(task.batches("train"))
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_names_of_classes_may_be_an_array_of_numpy():
    task = SequenceClassification({}, classes=np.unique(["walk", "run"]))
    names = task.usage()["classes"]
    assert names == ["run", "walk"]
    assert {type(name) for name in names} == {str}  # which a checkpoint may hold


@pytest.mark.parametrize(
    ("first", "names", "message"),
    [
        (1, [], "a class 3, but the network has 3 outputs: classes count from 0, so it needs 4"),
        (0, ["walk", "run"], "2 names of classes, but the network has 3 outputs"),
        (0, ["walk", "run", "walk"], "classes has the same name twice"),
    ],
)
def test_classes_that_do_not_fit_the_outputs_are_refused(first, names, message):
    x, y = torch.rand(12, 5, CHANNELS), torch.arange(12) % 3 + first
    task = prepared(SequenceClassification({"train": (x, y)}, classes=names))
    assert message in refusal(task.loss, network(), Batch(x.transpose(0, 1), y))


def test_classes_are_checked_again_on_a_device_when_the_data_change():
    """There they are looked at once, as looking waits for the device."""
    x, known, unknown = torch.rand(12, 5, CHANNELS), torch.full((12,), 2), torch.full((12,), 3)
    given = iter([known, unknown])
    task = SequenceClassification(lambda config: {"train": (x, next(given))})
    with ClaimedDevice():
        model, device = network().to("cuda"), torch.device("cuda")
        prepared(task).loss(model, Batch(x.transpose(0, 1), known).to(device))
        prepared(task)
        batch = Batch(x.transpose(0, 1), unknown).to(device)
        assert "there is a class 3" in refusal(task.loss, model, batch)


LINEAR = nn.Linear(CHANNELS, 1)


OF_THREE = {"train": (torch.rand(12, 5, 3), [0] * 12)}
OF_STEPS = {"train": (torch.rand(12, 5, CHANNELS), [[0] * 5] * 12)}
OF_NUMBERS = {"train": (torch.rand(12, 5, CHANNELS), torch.zeros(12))}
SHORTER = {"train": (torch.rand(12, 5, CHANNELS), [0] * 12, [4, 5] * 6)}
NOT_TAKEN = "the model does not take batches (T, B, *features) of shape (5, 8, 3): "


class AtOnce(nn.Module):
    """A network that answers once for each sequence."""

    def forward(self, x):
        return LINEAR(x).mean(0)


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        (SequenceClassification(OF_THREE), network(), NOT_TAKEN),
        (SequenceClassification(OF_THREE), LINEAR, NOT_TAKEN),
        (
            SequenceClassification(OF_STEPS, None),
            lambda x: LINEAR(x)[::2],
            "the answers have the shape (3, 8, 1), expected (5, 8, classes), of an output (T, B, ",
        ),
        (
            SequenceClassification({"train": (OF_STEPS["train"][0], [0] * 12)}, "mean"),
            AtOnce(),
            "the answers have the shape (1,), expected (8, classes), of an output (T, B, classes)",
        ),
        (SequenceRegression(OF_NUMBERS, "mean"), LINEAR, "says (8, 1), the targets are (8,)"),
        (
            SequenceClassification(SHORTER, "mean"),
            AtOnce(),
            "the network's output has the shape (8, 1), expected (T, 8, *): a value at every step",
        ),
    ],
)
def test_shapes_that_do_not_fit_the_model_are_refused(task, model, message):
    prepared(task)
    assert message in refusal(task.loss, model, next(task.batches("train")))


@pytest.mark.parametrize("lengths", [[], [[4, 5] * 6]])
@pytest.mark.parametrize("kind", [SequenceClassification, SequenceRegression])
@pytest.mark.parametrize("y", [[0] * 12, torch.zeros(12), np.zeros(12)])
def test_a_target_for_each_sequence_is_refused_where_there_is_one_at_every_step(kind, y, lengths):
    data = {"train": (torch.rand(12, 5, CHANNELS), y, *lengths)}
    assert "target shape (), expected a target for each step" in refusal(prepared, kind(data, None))


def test_networks_of_other_steps_and_readouts_of_one_s_own_take_padded_sequences():
    output = torch.rand(5, 8, CLASSES)
    for answer, readout in (
        (output[::2], "mean"),  # it strides over time
        (output.mean(0), lambda output, lengths: output),  # it answers once
        (output.transpose(0, 1), lambda output, lengths: output[:, 0]),
    ):
        task = prepared(SequenceClassification(SHORTER, readout))
        loss, _ = task.loss(Answer(answer), next(task.batches("train")))
        assert loss.isfinite()


@pytest.mark.parametrize("names", [{"b", "a"}, {"b": 1, "a": 0}, "ab"])
def test_names_of_classes_have_an_order(names):
    with pytest.raises(ValueError, match="expected their names in a list, by number"):
        SequenceClassification({"train": sequences()}, classes=names)


@pytest.mark.parametrize("readout", [Mean, LeakyIntegrator, ("mean",), 3])
def test_a_readout_that_is_no_function_is_refused(readout):
    with pytest.raises(ValueError, match="expected a function, a module or a name"):
        SequenceClassification({"train": sequences()}, readout)


def test_a_network_is_tested_with_the_readout_that_it_was_trained_with(tmp_path):
    config = ClassificationConfig(device="cpu", runs_path=str(tmp_path))
    config.hyperparameters.epoch, config.hyperparameters.batch_size = 1, 8
    data = {"train": sequences(), "test": sequences(seed=1)}
    trial = Experiment(network, SequenceClassification(data, "mean"), config)
    trial.train()
    checkpoint = load_checkpoint(trial.run.best)
    other = Experiment(network, SequenceClassification(data, "last"), config)
    message = refusal(other.test, checkpoint)
    assert message == "the network was trained with the readout 'mean', and the task has 'last'"
    own = Experiment(network, SequenceClassification(data, lambda y, lengths: y.sum(0)), config)
    assert own.test(checkpoint)  # of a function nothing is known


def test_a_trained_model_is_handed_over_in_evaluation_mode(tmp_path):
    """Also if its average was evaluated, and there is no test."""
    config = ClassificationConfig(device="cpu", runs_path=str(tmp_path))
    settings = config.hyperparameters
    settings.epoch, settings.batch_size, settings.weight_averaging = 1, 8, 0.5
    trial = Experiment(network, SequenceClassification({"train": sequences()}, "mean"), config)
    trial.train()
    assert not any(module.training for module in trial.model.modules())


def test_layers_that_draw_are_the_same_in_every_run_and_where_they_are_loaded(tmp_path):
    def wired(config):
        drawn.append((np.random.rand(), random.random(), torch.rand(()).item()))  # noqa: NPY002
        return network()

    drawn = []
    config = ClassificationConfig(device="cpu", runs_path=str(tmp_path))
    config.hyperparameters.epoch, config.hyperparameters.batch_size = 1, 8
    for _ in range(2):
        trial = Experiment(wired, SequenceClassification({"train": sequences()}, "mean"), config)
    trial.train()
    load(trial.run.best, wired)  # with what no checkpoint holds, such as a fixed order
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_network_whose_settings_have_properties_is_loaded_with_their_class(tmp_path):
    @dataclass
    class Own(ClassificationConfig):
        @property
        def hidden(self):
            return 5 * self.hyperparameters.batch_size

    def build_model(config):
        neurons = SpikingNeuron(config.hidden, 4.0)
        return Sequential(
            nn.Linear(CHANNELS, config.hidden), neurons, nn.Linear(config.hidden, CLASSES)
        )

    config = Own(device="cpu", runs_path=str(tmp_path))
    config.hyperparameters.epoch, config.hyperparameters.batch_size = 1, 8
    trial = Experiment(build_model, SequenceClassification({"train": sequences()}, "mean"), config)
    trial.train()
    assert "has no attribute 'hidden'" in refusal(load, trial.run.best, build_model)
    network = load(trial.run.best, build_model, config_class=Own)
    precise = copy.deepcopy(network).double().answer(sequences()[0])
    assert precise.dtype == torch.float64
    torch.testing.assert_close(precise.float(), network.answer(sequences()[0]))
    x = torch.rand(5, 2, CHANNELS)
    assert torch.equal(network(x)[0], trial.model(x)[0])


def test_the_share_that_is_held_out_is_rounded():
    task = prepared(SequenceClassification({"train": sequences(15)}, "mean"))
    assert [task.split(part).count for part in ("train", "validation")] == [13, 2]


class Scaled(SequenceClassification):
    logit_scale = 3.0

    def encode(self, batch):
        return batch._replace(x=5 * batch.x - 1)


class Turned(SequenceClassification):
    def logits(self, output, batch):
        return -super().logits(output, batch)


class Answering(SequenceClassification):
    def answer(self, output, batch):
        return -super().answer(output, batch)


def test_what_a_task_does_in_its_own_way_no_checkpoint_claims_to_know(tmp_path):
    def trained(kind):
        trial = trained_once(kind({"train": sequences()}, "mean"), tmp_path)
        return trial, load(trial.run.best, network)

    x, _ = sequences()
    trial, loaded = trained(Scaled)
    assert "does not say how to prepare input" in refusal(loaded.answer, x)
    batch = next(trial.task.batches("validation"))
    output, _ = trial.model(batch.x)
    logits = 3.0 * Mean()(output, batch.lengths)
    torch.testing.assert_close(trial.task.logits(output, batch), logits)
    for kind in (Turned, Answering):
        assert "does not hold a readout" in refusal(trained(kind)[1].answer, x)


@pytest.mark.parametrize("name", ["logits", "answer", "loss"])
@pytest.mark.parametrize("way", [staticmethod, classmethod, None])
def test_what_is_set_on_a_task_or_needs_no_instance_is_its_own_as_well(name, way):
    def mine(*arguments):
        return -arguments[-2].mean(0)

    kind = type("Mine", (SequenceClassification,), {name: way(mine)} if way else {})
    task = kind({"train": sequences()}, "mean")
    if way is None:
        assert task.usage()["readout"] == "mean"
        setattr(task, name, mine)
    assert task.usage()["readout"] is None


class Unread(SequenceClassification):
    def loss(self, model, batch):
        return model(batch.x)[0].data.sum(), {}


def test_what_a_task_holds_is_no_method_that_its_loss_calls():
    def data(config):
        return data.answer

    assert Unread(data, "mean").usage()["readout"] is None


@pytest.mark.parametrize("kind", [Turned, Answering, SequenceClassification])
def test_early_answers_are_those_of_counted_spikes_alone(kind):
    task, model = prepared(kind({"train": sequences(), "test": sequences(seed=1)})), network()
    counted, accuracy, _ = task.stop_early(model)
    lines = [*task.report(model, None)]
    early = kind is SequenceClassification
    assert (len(accuracy) > 0) == early == any("so many steps" in line for line in lines)
    assert counted.sequences == 40


@pytest.mark.parametrize("scale", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5), 2])
def test_the_scale_of_the_logits_may_be_any_number(scale, tmp_path):
    task = SequenceClassification({"train": sequences()}, "mean")
    task.logit_scale = scale
    assert load(trained_once(task, tmp_path).run.best, network).logit_scale == float(scale)


@pytest.mark.parametrize("kept", [np.ones(2), np.float64(0.5), Fraction(1, 2)])
def test_what_no_checkpoint_could_be_read_with_is_refused_before_the_first_epoch(kept, tmp_path):
    class Keeping(SequenceClassification):
        def usage(self):
            return {**super().usage(), "scaler": kept}

    message = refusal(trained_once, Keeping({"train": sequences()}, "mean"), tmp_path)
    assert message.startswith("checkpoints of this run could not be read: their scaler holds")
    assert not [*tmp_path.glob("**/last")]


def by_features(config, task):
    """A network whose width is that of the data."""
    assert task.preparation.features == [CHANNELS]
    return network()


def test_an_encoding_of_a_user_s_own_leaves_the_preparation_to_build_model(tmp_path):
    trial = trained_once(Scaled({"train": sequences()}, "mean"), tmp_path, by_features)
    loaded = load(trial.run.best, by_features)
    assert loaded.preparation is None
    prepared_elsewhere = Prepared({"train": sequences()}, "mean")
    trial = trained_once(prepared_elsewhere, tmp_path, by_features)
    message = refusal(load, trial.run.best, by_features)
    assert message.endswith("the checkpoint does not hold the preparation of its task")


def test_sums_of_first_weights_are_of_all_data_in_every_process(tmp_path, monkeypatch):
    class Solved(SequenceClassification):
        config_class = TimeSeriesConfig

        def metrics(self, sums):
            return {**super().metrics(sums), "tested": sums["samples"]}

    def initialise(model, task):
        return {"samples": 72, "loss": 36.0, "correct": 60}

    task = Solved({"train": sequences()}, "mean")
    config = TimeSeriesConfig(device="cpu", runs_path=str(tmp_path))
    config.hyperparameters.epoch = 0
    trial = Experiment(network, task, config, initialise)
    monkeypatch.setattr(
        "snn_lib.training.distributed.add", lambda *values: [2 * value for value in values]
    )
    best = trial.train()["best"]
    assert (best["validation_tested"], best["validation_loss"]) == (72, 0.5)


def test_a_look_at_the_validation_part_within_an_epoch_leaves_training_as_it_was(tmp_path):
    modes = []

    class Noting(SequenceClassification):
        def loss(self, model, batch):
            modes.append(model.training)
            return super().loss(model, batch)

    def look():
        if not looked:
            looked.append(trial.evaluate("validation"))
        return False

    looked = []
    task = Noting({"train": sequences()}, "mean")
    trial = Experiment(network, task, settings_of(task, tmp_path), None, look)
    trial.train()
    assert modes == [True, False, *[True] * 4, False]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_the_average_of_weights_leaves_whole_numbers_as_they_are(dtype, tmp_path):
    class Fixed(Ordered):
        def __init__(self, config=None):
            super().__init__()
            self.layers.register_parameter(
                "fixed", nn.Parameter(torch.tensor([0, 1, 1]).to(dtype), requires_grad=False)
            )

    trial = trained_once(
        SequenceClassification({"train": sequences(80)}, "mean"),
        tmp_path,
        Fixed,
        weight_averaging=0.99,
    )
    assert trial.model.order.tolist() == [2, 0, 3, 1]
    assert trial.model.layers.fixed.tolist() == [0, 1, 1]


def test_an_average_of_weights_in_bfloat16_is_refused(tmp_path):
    task = SequenceClassification({"train": sequences()}, "mean")
    message = refusal(
        trained_once,
        task,
        tmp_path,
        lambda config: network().bfloat16(),
        weight_averaging=0.99,
    )
    assert "is torch.bfloat16, in which an average stands still" in message


def test_expanded_buffers_are_refused_by_name(tmp_path):
    def expanded(config):
        model = network()
        model.register_buffer("scale", torch.ones(1).expand(4))
        return model

    def of_numpy(config):
        model = network()
        row = torch.from_numpy(np.ones(4)[None])  # whose first stride is 0, which does no harm
        model.register_buffer("scale", row)
        model.register_buffer("mask", torch.eye(3).to_sparse())
        assert 0 in row.stride()
        return model

    task = SequenceClassification({"train": sequences()}, "mean")
    assert refusal(trained_once, task, tmp_path, expanded).startswith("scale of the model is exp")
    trial = trained_once(SequenceClassification({"train": sequences()}, "mean"), tmp_path, of_numpy)
    assert load(trial.run.best, of_numpy).model.scale.tolist() == [[1.0] * 4]


class Simulated(SequenceClassification):
    """Its samples are drawn where a split is made."""

    def __init__(self):
        super().__init__({"train": sequences(), "test": sequences()}, "mean")
        self.drawn = []

    def make_split(self, split):
        x = torch.rand(40, 6, CHANNELS) + float(np.random.rand())  # noqa: NPY002
        self.drawn.append((split, x.sum().item()))
        samples = [(one, torch.tensor(k % CLASSES)) for k, one in enumerate(x)]
        self.parts = {**self.parts, split: Subset(samples, range(40))}
        return super().make_split(split)


def test_samples_that_a_task_simulates_are_the_same_in_training_test_and_every_process(tmp_path):
    task, other = Simulated(), Simulated()
    trial = trained_once(task, tmp_path)
    task.share(1, 2)
    task.split("validation")
    Experiment(network, other, settings_of(other, tmp_path)).test(trial.run.best)
    sums = {*task.drawn, *other.drawn}
    assert len(task.drawn) > 3
    assert len({split for split, _ in sums}) == len({drawn for _, drawn in sums}) == len(sums) == 3


@pytest.mark.parametrize(
    ("method", "expected"), [("make_split", "Split"), ("make_batch", "Batch"), ("encode", "Batch")]
)
def test_what_is_not_the_data_of_a_task_is_refused_by_the_method_that_returned_it(
    method, expected, tmp_path
):
    def pair(*_):
        return torch.rand(40, 6, CHANNELS), torch.zeros(40)

    task = SequenceClassification({"train": sequences()}, "mean")
    if method == "make_batch":
        task.make_split = lambda split: Split(40, 8, pair)
    else:
        setattr(task, method, pair)
    told = f"^{method} returned a tuple, expected a {expected}$"
    with pytest.raises(InputError, match=told):
        trained_once(task, tmp_path)


def test_a_checkpoint_that_was_read_once_can_be_resumed_twice(tmp_path):
    data = {"train": sequences(80)}
    trial = trained_once(SequenceClassification(data, "mean"), tmp_path)
    checkpoint, results = load_checkpoint(trial.run.last, "last"), []
    written = trial.run.last.read_bytes()
    for _ in range(2):
        trial.run.last.write_bytes(written)
        task = SequenceClassification(data, "mean")
        config = settings_of(task, tmp_path, epoch=2)
        again = Experiment(network, task, config, None, lambda: True)  # stopped at once
        with pytest.raises(Stopped):
            again.train(checkpoint)
        results.append(load_checkpoint(again.run.last, "last")["optimizer_state_dict"]["state"])
    torch.testing.assert_close(*results, rtol=0, atol=0)


class Reading(SequenceClassification):
    """A loss that reads the output in its own way."""

    def loss(self, model, batch):
        output, _ = model(batch.x)
        loss, count = nn.functional.cross_entropy(output[-2], batch.y), len(batch.y)
        correct = (output[-2].argmax(1) == batch.y).sum()
        return loss, {"samples": count, "loss": count * loss.detach(), "correct": correct}


class Weighing(SequenceClassification):
    """Losses that read the output by the readout."""

    def loss(self, model, batch):
        loss, sums = super().loss(model, batch)
        return 2 * loss, sums


class Calling(SequenceClassification):
    """Reads the output in a method and in a function within it."""

    def loss(self, model, batch):
        return self.of_output(model(batch.x)[0], batch)

    def of_output(self, output, batch):
        def found():
            return self.readout(output, batch.lengths)

        sums = {"samples": len(batch.y), "loss": found().detach().sum(), "correct": 0}
        return found().square().mean(), sums


class Resetting(SequenceClassification):
    def __init__(self, *data):
        super().__init__(*data)
        self.readout = lambda output, lengths: output[-2]


class Renaming(SequenceClassification):
    def __init__(self, *data):
        super().__init__(*data)
        self.readout, self.readout_name, self.counts_spikes = Mean(), "mean", False


@pytest.mark.parametrize(
    ("kind", "readout"),
    [
        *((Reading, None), (Resetting, None)),
        *((Weighing, "count"), (Calling, "count"), (Renaming, "mean")),
    ],
)
def test_a_checkpoint_names_the_readout_if_nothing_else_reads_the_output(kind, readout, tmp_path):
    task = kind({"train": sequences(), "test": sequences(seed=1)})
    trial = trained_once(task, tmp_path)
    assert load(trial.run.best, network).readout == readout
    assert (task.stop_early(trial.model)[1] != []) == (readout == "count")


def test_what_initialise_returns_is_passed_over_unless_it_is_sums(tmp_path):
    for returned in (torch.rand(3), {"2": 0.1}, None):
        config = TimeSeriesConfig(device="cpu", runs_path=str(tmp_path))
        config.hyperparameters.epoch = 0
        task = SequenceClassification({"train": sequences()}, "mean", config_class=TimeSeriesConfig)
        trial = Experiment(network, task, config, lambda model, task, found=returned: found)
        best = trial.train()["best"]
        assert best["validation_loss"] == trial.evaluate("validation")[0]["loss"]


class Doubled(SequencePreparation):
    def encode(self, x):
        return 2 * super().encode(x)


class Prepared(SequenceClassification):
    def setup(self, config, device):
        super().setup(config, device)
        self.preparation = Doubled(**vars(self.preparation))


def test_a_checkpoint_does_not_hold_a_preparation_of_a_user_s_own(tmp_path):
    task = Prepared({"train": sequences()}, "mean")
    loaded = load(trained_once(task, tmp_path).run.best, network)
    assert loaded.preparation is None
    assert "does not say how to prepare input" in refusal(loaded.answer, sequences()[0])


class Moody(nn.Module):
    """A readout that notes its modes."""

    def __init__(self):
        super().__init__()
        self.modes = set()

    def forward(self, output, lengths):
        self.modes.add(self.training)
        return output.mean(0)


def test_a_readout_of_a_user_s_own_is_always_in_evaluation_mode(tmp_path):
    readout = Moody()
    trial = trained_once(SequenceClassification({"train": sequences()}, readout), tmp_path)
    loaded = load(trial.run.best, network)
    loaded.readout = other = Moody()
    loaded.answer(sequences()[0])
    assert readout.modes == other.modes == {False}


class Projected(SequenceClassification):
    """An encoding that computes products and draws at random."""

    def setup(self, config, device):
        super().setup(config, device)
        self.types, self.drawn, self.recorded = set(), [], set()
        self.filter = nn.Linear(CHANNELS, CHANNELS)

    def encode(self, batch):
        x = batch.x @ self.filter.weight.detach()
        self.types.add(x.dtype)
        self.recorded.add(self.filter(batch.x).requires_grad)
        self.drawn.append((np.random.rand(), random.random()))  # noqa: NPY002
        return batch._replace(x=x)


def test_an_encoding_is_as_exact_in_evaluation_as_in_training_and_draws_by_the_seed(tmp_path):
    data = {"train": sequences(), "test": sequences(seed=1)}
    drawn = []
    for _ in range(2):
        task = Projected(data, "mean")
        trial = trained_once(task, tmp_path, precision="bfloat16")
        drawn.append([*task.drawn])
        trial.test()
        assert task.types == {torch.float32}
        task.recorded.clear()
        trial.test()
        assert task.recorded == {False}  # no gradients of what is evaluated
    assert drawn[0] == drawn[1]
    assert len({*drawn[0]}) == len(drawn[0]) > 8  # another number in every batch of every part


def test_an_encoding_and_the_data_draw_different_numbers():
    noisy = Noisy()
    task = prepared(Projected({"train": noisy, "validation": noisy}, "mean"), seed=3)
    with batch_seed(3, 0, 0):
        of_the_data = np.random.rand()  # noqa: NPY002
    next(task.batches("train", 0))
    assert task.drawn[0][0] != of_the_data


class Weighted(SequenceClassification):
    mean_over = "weight"

    def loss(self, model, batch):
        loss, sums = super().loss(model, batch)
        return loss, {**sums, "weight": torch.tensor([8.0])}


class Twice(SequencePreparation):
    def encode(self, given):
        return 2 * super().encode(given)


def test_a_preparation_may_stand_in_the_class_of_a_task():
    class Prepared(SequenceClassification):
        preparation = Twice([CHANNELS])

    data = {"train": (torch.rand(16, 5, CHANNELS), torch.arange(16) % CLASSES)}
    plain, own = (prepared(kind(data, "mean")) for kind in (SequenceClassification, Prepared))
    first, second = (next(task.batches("train")) for task in (plain, own))
    assert torch.equal(second.x, 2 * first.x)


def test_names_of_classes_may_stand_in_the_class_of_a_task():
    class Named(SequenceClassification):
        classes = ("a", "b")

    class Unordered(SequenceClassification):
        classes = frozenset("ab")

    with pytest.raises(ValueError, match="expected their names in a list"):
        Unordered({})
    assert Unordered({}, classes=["c"]).classes == ["c"]
    assert Named({}).classes == ["a", "b"]
    assert Named({}, classes=["c"]).classes == ["c"]
    assert SequenceClassification({}).classes == []
    assert SequenceClassification({}, classes=map(str, range(2))).classes == ["0", "1"]
    assert SequenceClassification({}, None).mean_over == "labels"
    Named.mean_over = "samples"
    assert Named({}, None).mean_over == "samples"


@pytest.mark.parametrize("readout", ["mean", None])
def test_a_network_is_tested_and_resumed_with_the_classes_that_it_has_learned(tmp_path, readout):
    x, y = torch.rand(20, 5, CHANNELS), torch.arange(20) % CLASSES
    data, names = {"train": (x, y if readout else y[:, None].expand(20, 5))}, ["a", "b", "c"]
    best = trained_once(SequenceClassification(data, readout, classes=names), tmp_path).run.best
    checkpoint = load_checkpoint(best)
    task = prepared(SequenceClassification(data, readout, classes=names[::-1]))
    words = refusal(task.check_data, checkpoint)
    assert words.startswith(f"the network has learned the classes {names}, and the data has ['c'")
    prepared(SequenceClassification(data, readout)).check_data(checkpoint)  # without names


@pytest.mark.parametrize("answer", [torch.tensor(1.0), None, np.zeros((4, 3))])
def test_a_readout_of_ones_own_that_answers_for_no_sequence_is_refused(tmp_path, answer):
    task = SequenceClassification({"train": sequences()}, lambda output, lengths: answer)
    with pytest.raises(InputError, match=r"^the readout returns .*, expected a tensor \(B, \*\)"):
        trained_once(task, tmp_path)


class Forecast(SequenceClassification):
    """Its network tells the class of a step and a number."""

    def loss(self, model, batch):
        output = output_of(model, batch.x)
        loss = F.cross_entropy(output[..., :CLASSES].flatten(0, 1), batch.y.flatten())
        loss = loss + output[..., CLASSES].square().mean()
        return loss, {"samples": 1, "labels": 1, "loss": loss.detach(), "correct": 0.0}


def test_outputs_of_which_only_a_user_s_loss_knows_are_reported_without_an_accuracy_by_class():
    data = torch.rand(8, 5, CHANNELS), torch.randint(CLASSES, (8, 5))
    task = prepared(Forecast({"train": data, "test": data}, None, classes=["a", "b", "c"]))
    model = Sequential(nn.Linear(CHANNELS, CLASSES + 1)).eval()
    assert not any("by class" in line for line in task.report(model, None))


def test_what_the_mean_counts_may_be_a_tensor_with_a_dimension(tmp_path, monkeypatch):
    task = Weighted({"train": sequences()}, "mean")
    assert task.mean_over == "weight"
    trial = trained_once(task, tmp_path)
    trial.world = 2
    monkeypatch.setattr("snn_lib.training.distributed.add", lambda *values: [2 * values[0]])
    loss, _ = trial._training_loss(next(task.batches("train")))
    assert loss.shape == ()


def test_metrics_are_means_over_what_the_loss_is_a_mean_over():
    sums = {"samples": 4, "labels": 10, "steps": 50, "loss": 2.0, "correct": 2}
    counted = ("mean", "samples", 4), (None, "labels", 10), (None, "steps", 50)
    for readout, named, count in counted:
        task = SequenceClassification({}, readout)
        assert named in (task.mean_over, "steps")
        task.mean_over = named
        assert task.metrics(sums) == {"loss": 2.0 / count, "accuracy": 2 / count}


def test_a_cross_entropy_of_ones_own_that_nobody_asks_is_refused():
    class Own(SequenceClassification):
        def cross_entropy(self, model, logits, targets):
            return super().cross_entropy(model, logits, targets)

    data = {"train": labelled()}
    assert "nobody asks a cross_entropy of your own" in refusal(prepared, Own(data, None))
    prepared(Own({"train": sequences()}, "mean"))


def test_a_batch_without_a_label_in_any_process_has_no_loss(tmp_path, monkeypatch):
    data = torch.rand(16, 5, CHANNELS), torch.full((16, 5), -1)
    data[1][:, 0] = 0
    task = SequenceClassification({"train": data}, None)
    trial = trained_once(task, tmp_path)
    trial.world = 2
    monkeypatch.setattr("snn_lib.training.distributed.add", lambda *values: [2 * values[0]])
    batch = next(task.batches("train"))
    loss, _ = trial._training_loss(batch._replace(y=torch.full_like(batch.y, -1)))
    assert loss == 0


class Ordered(nn.Module):
    """A network with whole numbers before its weights."""

    def __init__(self, config=None):
        super().__init__()
        self.order = nn.Parameter(torch.tensor([2, 0, 3, 1]), requires_grad=False)
        self.layers = network()

    def forward(self, x):
        return self.layers(x[..., self.order])


def test_a_network_with_whole_numbers_among_its_parameters_answers_as_it_was_trained(tmp_path):
    x = torch.rand(20, 6, CHANNELS)
    task = SequenceClassification({"train": (x, torch.arange(20) % CLASSES)}, "mean")
    trial = trained_once(task, tmp_path, Ordered)
    answer = load(trial.run.best, Ordered).answer(x)
    expected = trial.model.eval()(x.transpose(0, 1))[0].mean(0)
    torch.testing.assert_close(answer, expected)


def test_labels_at_every_step_are_augmented_in_double_precision():
    with default_dtype(torch.float64):
        x, y = torch.rand(8, 9, CHANNELS), torch.arange(72).view(8, 9) % CLASSES
        task = prepared(SequenceClassification({"train": (x, y)}, readout=None))
        task.config.augmentation.stretch = 1.5
        batch = next(task.batches("train"))
    assert (batch.x.dtype, batch.y.dtype) == (torch.float64, torch.int64)
    assert batch.y.shape == batch.x.shape[:2]


def test_the_loss_is_as_exact_as_the_network():
    x, y = torch.rand(8, 5, CHANNELS).double(), torch.rand(8, CLASSES).double()
    task = prepared(SequenceRegression({"train": (x, y)}, "mean", config_class=SequenceConfig))
    batch, model = next(task.batches("train")), network().double()
    loss, _ = task.loss(model, batch)
    expected = (model(batch.x)[0].mean(0) - batch.y).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    task = prepared(SequenceClassification({"train": (x, torch.arange(8) % 3)}, "mean"))
    batch = next(task.batches("train"))
    output, _ = model(batch.x)
    torch.testing.assert_close(task.logits(output, batch), output.mean(0), rtol=1e-13, atol=0)


def test_data_and_layers_have_the_seed_whether_data_draws_or_not():
    """So that parts and fixed orders that are drawn are the same in all versions and runs."""
    drawn = []

    def data(config):
        drawn.append(torch.rand(3).tolist())
        return {"train": sequences()}

    def build_model(config):
        drawn.append(torch.rand(3).tolist())
        return network()

    Experiment(build_model, SequenceClassification(data), ClassificationConfig(seed=7))
    torch.manual_seed(7)
    assert drawn == [torch.rand(3).tolist()] * 2


def test_a_class_of_the_test_part_alone_is_found_before_training(tmp_path):
    x, y = sequences(8)
    for readout in ("mean", None):
        steps = [label.repeat(len(one)) for one, label in zip(x, y, strict=True)]
        labels = y if readout else steps
        data = {"train": (x, labels), "test": (x[:1], [labels[0] + CLASSES])}
        task = SequenceClassification(data, readout)
        config = ClassificationConfig(device="cpu", runs_path=str(tmp_path))
        config.hyperparameters.batch_size = 4
        trial = Experiment(network, task, config)
        assert f"there is a class {CLASSES}, but" in refusal(trial.train)
        assert not [*tmp_path.glob("*/*/last")]


@pytest.mark.parametrize("stretch", [1.0, 1.5])
def test_the_labels_of_padding_are_none(stretch):
    x, y = sequences(9)
    labels = [(label + 1).repeat(len(one)).to(torch.uint8) for one, label in zip(x, y, strict=True)]
    augmentation = AugmentationSettings(stretch=stretch)
    data = {"train": (x, labels)}
    task = SequenceClassification(data, None, config_class=SequenceConfig)
    batch = next(prepared(task, augmentation=augmentation).batches("train"))
    own = torch.arange(len(batch.x))[:, None] < batch.lengths
    assert (batch.y[own] >= 1).all()
    assert (batch.y[~own] == -1).all()
    assert not own.all()


def test_layers_and_first_weights_are_those_of_the_seed(tmp_path):
    drawn = []
    config = ClassificationConfig(device="cpu", seed=5, runs_path=str(tmp_path))
    config.hyperparameters.epoch, config.hyperparameters.batch_size = 1, 8
    task = SequenceClassification({"train": sequences(15)}, "mean")
    trial = Experiment(network, task, config, lambda model, task: drawn.append(torch.rand(3)))
    assert task.divided() == 15
    torch.manual_seed(5)
    for name, weight in network().state_dict().items():
        assert torch.equal(trial.model.state_dict()[name], weight)
    trial.train()
    torch.manual_seed(5)
    assert torch.equal(drawn[0], torch.rand(3))


def test_a_task_that_is_set_up_anew_knows_the_classes_of_its_data_alone():
    x, y = sequences(9)
    task = prepared(SequenceClassification({"train": (x, [label + 4 for label in y])}, "mean"))
    task.data = {"train": (x, y)}
    prepared(task)
    assert task.loss(network(), next(task.batches("train")))


def test_a_task_that_is_set_up_anew_has_the_shapes_and_parts_of_its_data_alone():
    x, y = torch.rand(12, 5, CHANNELS), torch.arange(12) % CLASSES
    task = prepared(SequenceClassification({"train": (x, y)}, "mean"))
    narrow = x[..., :2], y
    task.data = {"train": narrow, "validation": narrow}
    prepared(task)
    assert task.usage()["preparation"]["features"] == [2]
    assert task.divided() == 0
    assert torch.equal(next(task.batches("validation")).x, narrow[0][:8].transpose(0, 1))


def test_augmentation_of_a_regression_is_refused():
    config = SequenceConfig(augmentation=AugmentationSettings(noise=0.1))
    task = SequenceRegression({"train": sequences()}, config_class=SequenceConfig)
    assert "augmentation has no effect" in refusal(task.setup, config, CPU)


def test_label_smoothing_of_a_regression_is_refused():
    config = SequenceConfig()
    config.hyperparameters.label_smoothing = 0.1
    task = SequenceRegression({"train": sequences()}, config_class=SequenceConfig)
    assert "label_smoothing has no effect" in refusal(task.setup, config, CPU)


def test_without_epochs_the_network_of_initialise_is_validated_and_tested(tmp_path):
    def initialise(model, task):
        nn.init.normal_(model[-1].weight)

    parts = {"train": sequences(), "validation": sequences(9, 1), "test": sequences(9, 2)}
    task = SequenceClassification(parts, "mean", config_class=TimeSeriesConfig)
    config = TimeSeriesConfig(device="cpu", runs_path=str(tmp_path))  # it has no epochs
    trial = Experiment(network, task, config, initialise)
    found = trial.train()
    said = {"validation": split_of(found["best"], "validation"), "test": found["test"]}
    for split, metrics in said.items():
        sums = {}
        for batch in task.batches(split):
            add_sums(sums, task.loss(trial.model, batch)[1])
        assert metrics == pytest.approx(task.metrics(read_sums(sums)))


def test_a_regression_may_augment_in_a_way_of_its_own():
    @dataclass
    class Jitter(Settings):
        noise: float = setting(0.0, "noise", at_least=0)

    @dataclass
    class Own(ExperimentConfig):
        augmentation: Jitter = section(Jitter)

    class Jittered(SequenceRegression):
        def augment(self, batch, generator):
            noise = torch.randn(batch.x.shape, generator=generator)
            return batch._replace(x=batch.x + self.config.augmentation.noise * noise)

    configs = (
        Own(augmentation=Jitter(0.1)),
        SequenceConfig(augmentation=AugmentationSettings(noise=0.1)),
    )
    x = torch.zeros(9, 4, 2)
    for config in configs:
        config.hyperparameters.batch_size = 4
        task = Jittered({"train": (x, torch.zeros(9))}, "mean", config_class=type(config))
        task.setup(config, CPU)
        assert next(task.batches("train")).x.std().item() == pytest.approx(0.1, rel=0.3)


class Mixed(SequenceClassification):
    """A loss that draws from the generators of NumPy and Python."""

    def loss(self, model, batch):
        share = random.random() * np.random.rand()  # noqa: NPY002
        mixed = batch.x + share * batch.x.flip(1)
        self.drawn.append((model.training, self.data_drawn, share))
        return super().loss(model, batch._replace(x=mixed))

    def augment(self, batch, generator):
        self.data_drawn = random.random() * np.random.rand()  # noqa: NPY002
        return batch


def test_a_loss_that_draws_is_the_same_in_every_run_and_after_a_stop(tmp_path):
    def trial(stop_after=None, resumed=None):
        config = ClassificationConfig(device="cpu", runs_path=str(tmp_path))
        config.hyperparameters.epoch, config.hyperparameters.batch_size = 2, 8
        task = Mixed({"train": sequences()}, "mean")
        task.drawn, stops = [], itertools.count(1)
        made = Experiment(network, task, config, stop_requested=lambda: next(stops) == stop_after)
        with suppress(Stopped):
            made.train(resumed)
        return made, task.drawn

    whole, drawn = trial()
    training, evaluation = ([one for one in drawn if one[0] is way] for way in (True, False))
    assert len({share for *_, share in training}) == len(training)
    assert len({share for *_, share in evaluation}) == len(evaluation) / 2  # each epoch the same
    assert all(data_drawn != share for _, data_drawn, share in training)
    stopped, first = trial(stop_after=3)
    again, others = trial(resumed=load_checkpoint(stopped.run.last, "last"))
    assert [one[2] for one in first + others] == [one[2] for one in drawn]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight)


def test_each_of_several_processes_draws_its_own_numbers_in_a_loss(tmp_path):
    shares = []
    for rank in (0, 1):
        config = ClassificationConfig(device="cpu", runs_path=str(tmp_path))
        config.hyperparameters.epoch, config.hyperparameters.batch_size = 1, 8
        task = Mixed({"train": sequences()}, "mean")
        task.drawn = []
        trial = Experiment(network, task, config)
        trial.rank = rank
        trial.train()
        shares.append([share for training, _, share in task.drawn if training])
    assert not set(shares[0]) & set(shares[1])


def test_weight_bits_without_weights_to_round_are_refused():
    config = ClassificationConfig()
    config.hyperparameters.weight_bits = 2
    task = SequenceClassification({"train": sequences()}, "mean")
    message = refusal(Experiment, lambda config: nn.GRU(CHANNELS, CLASSES), task, config)
    assert "weight_bits is 2, but the network has no nn.Linear and no nn.Conv2d" in message


def test_weight_bits_of_a_pruned_network_are_refused():
    """Each pass computes its weights anew, from others that are not rounded."""

    def pruned(config):
        return nn.Sequential(prune.random_unstructured(nn.Linear(4, 3), "weight", 0.5))

    config = ClassificationConfig()
    task = SequenceClassification({"train": sequences()}, "mean")
    Experiment(pruned, task, config)
    config.hyperparameters.weight_bits = 2
    message = refusal(Experiment, pruned, task, config)
    assert "weight_bits is 2, but layer 0 computes its weight from other parameters" in message


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class OutputAlone(StatefulModule):
    def forward(self, x, state=None):
        return x


class Named(nn.Linear):
    def forward(self, x):
        return {"out": super().forward(x)}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Named(4, 3), "the model returns a dict, expected its output, or (output, state)"),
        (Sequential(*network(), batch_first=True), "the model has batch_first"),
        (nn.Sequential(nn.Identity(), nn.GRU(4, 3, batch_first=True)), "in its part 1, has batch"),
        (network().requires_grad_(False), "the model has no parameter that is trained"),
        (Sequential(*network(), Votes(2)), "4): layer 5: got 3 channels, expected a multiple of"),
        (
            Sequential(Pair(4, 3), nn.Identity()),
            "the model does not run: layer 1 is given a tuple, exp",
        ),
        (
            Sequential(nn.Linear(4, 3), OutputAlone()),
            "the model does not run: layer 1: OutputAlone returned a Tensor",
        ),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(tmp_path, model, message):
    task, config = SequenceClassification({"train": sequences()}), ClassificationConfig()
    config.runs_path, config.hyperparameters.batch_size = str(tmp_path), 8
    assert message in refusal(lambda: Experiment(lambda config: model, task, config).train())


class Alone(nn.Module):
    """A network of which ``returned`` takes output and state."""

    def __init__(self, returned):
        super().__init__()
        self.layers, self.returned = network(), returned

    def forward(self, x, state=None):
        return self.returned(self.layers(x, state))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda pair: pair[0], "Alone returned Tensor, expected (output, state) to go on from"),
        (lambda pair: (pair[0], None), "Alone returned no state, so that its "),
        (lambda pair: ({"out": pair[0]}, pair[1]), "the output of Alone is a dict, expected"),
    ],
)
def test_a_model_whose_output_does_not_fit_chunks_is_refused(tmp_path, returned, message):
    task, config = SequenceClassification({"train": sequences()}, "mean"), ClassificationConfig()
    config.runs_path, config.hyperparameters.batch_size = str(tmp_path), 8
    config.hyperparameters.chunk = 2
    found = refusal(lambda: Experiment(lambda config: Alone(returned), task, config).train())
    assert found.startswith(f"the model does not run in chunks: {message}")


@pytest.mark.parametrize(
    "draw", [torch.rand, np.random.rand, lambda n: [random.random() for _ in range(n)]]
)
def test_a_function_of_the_data_draws_the_same_in_every_run(draw):
    """And whatever it draws, the first weights are the same."""
    counts, drawn, models = [2, 1, 1], [], []

    def data(config):
        drawn.append([float(one) for one in draw(3 * counts.pop())])
        return {"train": sequences()}

    while counts:
        models.append(Experiment(network, SequenceClassification(data, "mean")).model)
    assert drawn[0] == drawn[1] == drawn[2][:3]
    for first, _, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, other)


@pytest.mark.parametrize("config", [None, ExperimentConfig(device="cpu")])
def test_a_configuration_may_be_left_out_or_be_of_the_base_class(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    trial = Experiment(network, SequenceClassification({"train": sequences()}, "mean"), config)
    assert trial.evaluate("validation")[0]["loss"] > 0
    assert not trial.task.has("test")


def test_labels_at_every_step_are_refused_without_listing_them():
    task = SequenceClassification({"train": (torch.rand(12, 500, 2), torch.ones(12, 500).long())})
    message = refusal(task.setup, ExperimentConfig(), torch.device("cpu"))
    assert "sample 0 of the train data: the target has shape (500,) (int64), expected" in message
    assert message.endswith("for labels at every step, set readout=None")


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, bool, np.float64])
def test_a_loss_of_one_s_own_gets_labels_as_int64_and_numbers_as_float32(kind, every_step):
    x, y = np.ones((12, 5, 2)), np.ones((12, 5) if every_step else 12, kind)
    for task, dtype in (SequenceClassification, torch.int64), (SequenceRegression, torch.float32):
        if kind is not np.float64 or task is SequenceRegression:
            made = prepared(task({"train": (x, y)}, readout=None if every_step else "count"))
            assert next(made.batches("train")).y.dtype == dtype


def test_class_labels_may_be_any_integers():
    x = np.random.default_rng(0).random((12, 5, CHANNELS))
    task = prepared(SequenceClassification({"train": (x, np.arange(12, dtype=np.int32) % 3)}))
    task.loss(network(), next(task.batches("train")))[0].backward()


@pytest.mark.parametrize("kind", ["numbers at every step", "numbers", "labels at every step"])
def test_losses_of_processes_weighed_by_their_counts_are_the_loss_of_all(kind):
    x, _ = sequences()
    model, task, readout = nn.Linear(CHANNELS, 1), SequenceRegression, None
    if kind == "numbers":
        y, readout = torch.rand(len(x), 1), "mean"
    elif kind == "numbers at every step":
        y = [s.sum(1, keepdim=True) for s in x]
    else:
        (x, y), model, task = labelled(), nn.Linear(CHANNELS, CLASSES), SequenceClassification
    data = {"train": (x, y)}
    whole = prepared(task(data, readout))
    shares = [prepared(task(data, readout), rank, 2) for rank in range(2)]
    loss, sums = whole.loss(model, next(whole.batches("train")))
    parts = [task.loss(model, next(task.batches("train"))) for task in shares]
    key = whole.mean_over
    together = sum(part * (own[key] / sums[key]) for part, own in parts)
    torch.testing.assert_close(together, loss)


def test_a_readout_may_be_a_function_or_a_module_of_one_s_own():
    class Strongest(nn.Module):
        def forward(self, output, lengths=None):
            return output[0]

    with_function = prepared(
        SequenceClassification({"train": sequences()}, lambda output, lengths: output[0])
    )
    task = prepared(SequenceClassification({"train": sequences()}, Strongest()))
    model, batch = network(), next(task.batches("train"))
    expected = nn.functional.cross_entropy(model(batch.x)[0][0], batch.y)
    torch.testing.assert_close(task.loss(model, batch)[0], expected)
    torch.testing.assert_close(with_function.loss(model, batch)[0], expected)


# Classification of every step


def labelled(count=40, seed=0):
    """Sequences of 5 to 12 steps, each of which has a class; a third of the steps has no label."""
    x, _ = sequences(count, seed)
    generator = torch.Generator().manual_seed(seed)
    y = [(sequence.sum(1) * 2).long() % CLASSES for sequence in x]
    for labels in y:
        labels[1:][torch.rand(len(labels) - 1, generator=generator) < 0.4] = -1
    return x, y


def test_loss_and_accuracy_at_every_step_are_those_of_the_labelled_steps():
    task, model = prepared(SequenceClassification({"train": labelled()}, None)), network().eval()
    sums = {}
    for batch in task.batches("validation"):
        assert batch.lengths is not None
        add_sums(sums, task.loss(model, batch)[1])
    samples, losses, right = task.parts["validation"], [], []
    for x, labels in (samples[index] for index in range(len(samples))):
        logits = model(x[:, None])[0][:, 0].detach().double()
        for step, label in enumerate(labels.tolist()):
            if label >= 0:
                losses.append((logits[step].exp().sum().log() - logits[step, label]).item())
                right.append(logits[step].argmax().item() == label)
    metrics = task.metrics(read_sums(sums))
    assert (sums["samples"], sums["labels"]) == (4, len(losses))
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["accuracy"] == np.mean(right)


def test_a_batch_without_a_label_teaches_nothing():
    """Augmentation may cut all labels away."""
    task, model = prepared(SequenceClassification({"train": labelled()}, None)), network()
    batch = next(task.batches("train"))
    loss, sums = task.loss(model, batch._replace(y=torch.full_like(batch.y, -1)))
    loss.backward()
    assert (loss, sums["labels"], sums["correct"]) == (0, 0, 0)
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_labels_are_smoothed_in_training_alone():
    task, model = prepared(SequenceClassification({"train": labelled()}, None)), network()
    task.config.hyperparameters.label_smoothing = 0.3
    batch = next(task.batches("train"))
    logits = model(batch.x)[0].log_softmax(2)
    known = labels_of(batch) >= 0
    right = logits.gather(2, batch.y.clamp(min=0)[..., None])[..., 0]
    plain, smooth = -right[known].mean(), -(0.7 * right + 0.3 * logits.mean(2))[known].mean()
    torch.testing.assert_close(task.loss(model.train(), batch)[0], smooth)
    torch.testing.assert_close(task.loss(model.eval(), batch)[0], plain)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(4).long(), "the sequence has 5 steps and the target shape (4,), expected a"),
        (torch.tensor([0, 1, -2, 0, 0]), "the target has shape (5,) (int64) and begins at -2, exp"),
        (torch.zeros(5), "shape (5,) (float32) and begins at 0.0, expected the number of a class"),
        (torch.full((5,), -1), "no step has a label: leave it out"),
        (torch.tensor(1), "the sequence has 5 steps and the target shape (), expected a target"),
    ],
)
def test_wrong_labels_of_steps_are_named_before_training(target, message):
    x, y = [X] * 12, [torch.arange(5) % CLASSES] * 12
    y[7] = target
    said = refusal(prepared, SequenceClassification({"train": (x, y)}, None))
    assert said.startswith("sample 7 of the train data: ")
    assert message in said


def test_a_script_that_labels_every_step_trains_and_says_how_well_it_knows_each_class(tmp_path):
    data = {"train": labelled(60), "test": labelled(30, seed=1)}
    for y in data["test"][1]:  # one class is not in the test part, and is left out
        y[y == 0] = 2
    task = SequenceClassification(data, readout=None, classes=["a", "b", "c"])
    config = SequenceConfig(name="steps", device="cpu", runs_path=str(tmp_path))
    config.hyperparameters.epoch, config.hyperparameters.batch_size = 2, 20
    config.augmentation.stretch = 1.2
    trial = Experiment(network, task, config)
    trial.train()
    answered = load(trial.run.best, network).classify(data["test"][0])[0]
    pairs = [
        (label, name)
        for labels, names in zip(data["test"][1], answered, strict=True)
        for label, name in zip(labels.tolist(), names, strict=True)
        if label >= 0
    ]
    assert trial.test()["accuracy"] == np.mean(["abc"[label] == name for label, name in pairs])
    *_, said = task.report(trial.model.eval(), None)
    shares = [
        np.mean([name == own for label, name in pairs if "abc"[label] == own]) for own in "bc"
    ]
    expected = ", ".join(f"{n}: {100 * share:.2f} %" for n, share in zip("bc", shares, strict=True))
    assert said == f"accuracy by class: {expected}"
    assert max(shares) > 0


def test_classes_of_steps_that_have_no_names_are_reported_by_their_numbers():
    task = prepared(SequenceClassification({"train": labelled(), "test": labelled()}, None))
    model, answers = network().eval(), []
    for x, y in zip(*labelled(), strict=True):
        answers += zip(y.tolist(), model(x[:, None])[0][:, 0].argmax(1).tolist(), strict=True)
    shares = [np.mean([own == said for own, said in answers if own == c]) for c in range(CLASSES)]
    expected = ", ".join(f"{c}: {100 * share:.2f} %" for c, share in enumerate(shares))
    assert task.split("test").batch_size < task.split("test").count
    *_, said = task.report(model, None)
    assert said == f"accuracy by class: {expected}"


class SeveralLabels(SequenceClassification):
    """Each class is right or wrong at each step."""

    def read_target(self, target):
        return target.float()

    def loss(self, model, batch):
        loss = F.binary_cross_entropy_with_logits(output_of(model, batch.x), batch.y)
        return loss, {"samples": 1, "labels": 1, "loss": loss.detach(), "correct": 0.0}


def test_steps_with_several_labels_each_are_reported_without_an_accuracy_by_class():
    x, y = labelled()
    several = [F.one_hot(labels.clamp(min=0), CLASSES) for labels in y]
    task = prepared(SeveralLabels({"train": (x, several), "test": (x, several)}, None))
    assert not any("by class" in line for line in task.report(network().eval(), None))


class Likely(SequenceClassification):
    """Its targets are what a user makes them, such as probabilities of the classes."""

    def read_target(self, target):
        return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.bool])
def test_several_labels_of_a_step_move_with_it_and_whole_numbers_are_marked_in_the_padding(dtype):
    marked = dtype in (torch.int64, torch.uint8)
    x = [torch.rand(length, CHANNELS) for length in (9, 14, 20, 17)] * 4
    y = [(one > 0.5).to(dtype) for one in x]
    task = prepared(Likely({"train": (x, y)}, None))
    task.config.augmentation.crop = 0.6
    for epoch in range(3):
        for batch in task.batches("train", epoch):
            assert batch.y.dtype == (torch.int64 if marked else dtype)
            assert len(batch.lengths.unique()) > 2
            own = within(batch.x, batch.lengths)
            expected = (batch.x > 0.5).to(batch.y.dtype)
            assert torch.equal(batch.y, expected.masked_fill(~own, -1 if marked else 0))


class Read(nn.Module):
    """A network of one's own around a readout."""

    def __init__(self, config):
        super().__init__()
        self.layers, self.mean = Sequential(nn.Linear(CHANNELS, CLASSES)), Mean()

    def forward(self, x):
        return self.mean(self.layers(x)[0])


def test_a_readout_in_the_network_is_refused_where_sequences_differ_in_length(tmp_path):
    """Alone, a sequence would have another answer than beside a longer one."""

    def build(config):
        return Sequential(nn.Linear(CHANNELS, CLASSES), Mean())

    y = torch.arange(40) % CLASSES
    for readout in (lambda output, lengths: output, "mean"):
        ragged = [torch.rand(5 + number % 3, CHANNELS) for number in range(40)]
        for model in (build, Read):
            task = SequenceClassification({"train": (ragged, y)}, readout)
            with pytest.raises(
                InputError, match="differ in length, and nobody knows whether the M"
            ):
                trained_once(task, tmp_path, model)
    task = SequenceClassification({"train": (torch.rand(40, 5, CHANNELS), y)}, lambda out, _: out)
    network = load(trained_once(task, tmp_path, build).run.best, build)
    settings = settings_of(task := SequenceClassification(task.data, task.readout), tmp_path)
    settings.augmentation.noise = 0.1  # which gives all of them lengths, of all steps
    Experiment(build, task, settings).train()
    network.readout = task.readout
    assert network.answer(ragged[:1]).shape == (1, CLASSES)
    assert "differ in length" in refusal(network.answer, ragged)


class Masking(nn.Module):
    """Reads its sequences' own steps, which its last channel tells."""

    def __init__(self, config=None):
        super().__init__()
        self.layers = network()

    def forward(self, x):
        return Mean()(self.layers(x[..., :-1])[0], x[..., -1].sum(0).long())


def test_a_readout_in_the_network_that_is_told_the_lengths_reads_out(tmp_path):
    x, y = sequences()
    x = [torch.cat([one, torch.ones(len(one), 1)], 1) for one in x]
    task = SequenceClassification({"train": (x, y)}, lambda output, lengths: output)
    model = trained_once(task, tmp_path, Masking).model.eval()
    batch = next(task.batches("validation"))
    alone = [model(batch.x[:n, [i]])[0] for i, n in enumerate(batch.lengths)]
    output = output_of(model, batch.x, batch.lengths)
    torch.testing.assert_close(task.logits(output, batch), torch.stack(alone))


class Doubly(SequenceClassification):
    """Its network takes two sequences."""

    def encode(self, batch):
        return batch._replace(x=(batch.x, 0.5 * batch.x))


class Sum(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.layers = network()

    def forward(self, x):
        return self.layers(x[0] + x[1])[0]


class Copying(SequenceRegression):
    def encode(self, batch):
        return batch._replace(y=batch.x)


def test_targets_of_another_shape_are_counted_as_the_sequences():
    data = torch.rand(12, 7, CHANNELS), torch.rand(12, 3)
    task = prepared(Copying({"train": data}, lambda output, lengths: output))
    _, sums = task.loss(nn.Linear(CHANNELS, CHANNELS), next(task.batches("train")))
    assert sums["samples"] == 8


@pytest.mark.parametrize("kind", [SequenceClassification, SequenceRegression])
def test_input_of_several_sequences_is_read_out(kind, tmp_path):
    x, y = sequences()
    y = y if kind is SequenceClassification else torch.rand(len(y), CLASSES)
    doubled = type("Twice", (kind,), {"encode": Doubly.encode})
    losses = [
        trained_once(task, tmp_path, model).evaluate("validation")[0]["loss"]
        for task, model in (
            (doubled({"train": (x, y)}, "mean"), Sum),
            (kind({"train": ([1.5 * one for one in x], y)}, "mean"), network),
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_input_of_several_sequences_that_differ_in_length_is_trained(tmp_path):
    x, y = labelled()
    doubly = trained_once(Doubly({"train": (x, y)}, None), tmp_path, Sum)
    plain = trained_once(
        SequenceClassification({"train": ([1.5 * one for one in x], y)}, None), tmp_path
    )
    losses = [trial.evaluate("validation")[0]["loss"] for trial in (doubly, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    message = refusal(output_of, doubly.model, (torch.rand(5, 2, 9), torch.rand(5, 2, 9)))
    assert "the model does not take batches (T, B, *features): " in message


class Judged(SequenceClassification):
    """Labels at every step, though it has a readout."""

    def __init__(self, data):
        super().__init__(data, "mean")
        self.targets_are_sequences = True

    def read_target(self, target):
        return target.long()


def test_labels_at_every_step_are_marked_in_the_padding_beside_a_readout():
    batch = next(prepared(Judged({"train": labelled()})).batches("train"))
    padding = ~within(batch.y, batch.lengths)
    assert padding.any()
    assert (batch.y[padding] == -1).all()


def test_chances_at_every_step_are_marked_in_the_padding():
    x = [torch.rand(length, CHANNELS) for length in (9, 14)]
    task = prepared(Likely({"train": (x * 4, [one[:, 0] for one in x] * 4)}, None))
    batch = next(task.batches("train"))
    own = within(batch.x, batch.lengths)[..., 0]
    assert torch.equal(batch.y, batch.x[..., 0].masked_fill(~own, -1.0))


def test_true_and_false_at_every_step_stay_so():
    x = [torch.rand(length, CHANNELS) for length in (9, 14)]
    task = prepared(Likely({"train": (x * 4, [one[:, 0] > 0.5 for one in x] * 4)}, None))
    batch = next(task.batches("train"))
    assert torch.equal(batch.y, batch.x[..., 0] > 0.5)


class Event(SequenceClassification):
    """Whether something happens at a step, or how likely that is."""

    def read_target(self, target):
        return target

    def loss(self, model, batch):
        chances = output_of(model, batch.x)[..., 0]
        loss = F.binary_cross_entropy_with_logits(chances, batch.y.clamp(min=0).float())
        return loss, {"samples": 1, "labels": 1, "loss": loss.detach(), "correct": 0.0}


class AnsweredEvent(Event):
    """The same, by the answer."""

    def loss(self, model, batch):
        return super().loss(lambda x: self.answer(output_of(model, x), batch), batch)


class Naming(nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}


class Telling(nn.Linear):
    def forward(self, x, lengths):
        return super().forward(x)


class Part(nn.Linear):
    def forward(self, x):
        return super().forward(x).repeat(1, 1, 2)


class Batched(nn.Linear):
    def forward(self, batch):
        return super().forward(batch.x)


class ByName(SequenceClassification):
    classes = "a", "b", "c"

    def loss(self, model, batch):
        given = {Telling: (batch.x, batch.lengths), Batched: (batch,)}.get(type(model), (batch.x,))
        output = model(*given)
        output = output["logits"] if isinstance(model, Naming) else output[..., :CLASSES]
        logits = self.logits(output, batch)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.y.flatten())
        return loss, {"samples": 1, "labels": 1, "loss": loss.detach(), "correct": 0.0}


@pytest.mark.parametrize("kind", [Naming, Telling, Part, Batched])
def test_what_only_the_user_s_loss_can_read_is_reported_without_an_accuracy_by_class(kind):
    data = torch.rand(12, 9, CHANNELS), torch.randint(2, (12, 9))
    task = prepared(ByName({"train": data, "test": data}, None))
    model = kind(CHANNELS, CLASSES).eval()
    assert task.loss(model, next(task.batches("test")))[0].isfinite()
    assert not any("by class" in line for line in task.report(model, None))


class Logit(SequenceClassification):
    """Two classes by one output, whose logits have a shape of their own."""

    shape = (9, -1)

    def logits(self, output, batch):
        return 2 * output.view(*self.shape)

    def loss(self, model, batch):
        logits = self.logits(output_of(model, batch.x), batch).view(9, -1)
        loss = F.binary_cross_entropy_with_logits(logits, batch.y.float())
        return loss, {"samples": 1, "labels": 1, "loss": loss.detach(), "correct": 0.0}


@pytest.mark.parametrize("shape", [(9, -1), (9, -1, 1), (-1, 1)])
def test_logits_of_one_s_own_shape_are_reported_without_an_accuracy_by_class(shape):
    data = torch.rand(12, 9, CHANNELS), torch.randint(2, (12, 9))
    task = prepared(Logit({"train": data, "test": data}, None))
    task.shape = shape
    model = Sequential(nn.Linear(CHANNELS, 1)).eval()
    assert not any("by class" in line for line in task.report(model, None))


@pytest.mark.parametrize("kind", [Event, AnsweredEvent])
@pytest.mark.parametrize(
    "targets", [torch.randint(2, (12, 9)), torch.zeros(12, 9).long(), torch.rand(12, 9)]
)
def test_an_event_at_a_step_is_reported_without_an_accuracy_by_class(targets, kind):
    data = torch.rand(12, 9, CHANNELS), targets
    task = prepared(kind({"train": data, "test": data}, None))
    for outputs in (1, CLASSES) if targets.is_floating_point() else (1,):
        model = Sequential(nn.Linear(CHANNELS, outputs)).eval()
        assert not any("by class" in line for line in task.report(model, None))


def test_probabilities_of_classes_stay_as_they_are_whatever_else_is_augmented():
    x, y = torch.rand(16, 9, CHANNELS), torch.rand(16, CLASSES).softmax(1)
    task = prepared(Likely({"train": (x, y)}, "mean"))
    task.config.augmentation.crop, task.config.augmentation.noise = 0.5, 0.1
    found = torch.cat([batch.y for batch in task.batches("train")])
    known = [min((one - other).abs().max().item() for other in y) for one in found]
    assert max(known) == 0


# Regression


def test_errors_at_every_step_leave_the_padding_out():
    x, _ = sequences()
    y = [sequence[:, :2] for sequence in x]
    task = prepared(SequenceRegression({"train": (x, y)}))
    model = nn.Linear(CHANNELS, 2)
    batch = next(task.batches("train"))
    loss, sums = task.loss(model, batch)
    errors = [
        (model(batch.x[:n, b]) - batch.x[:n, b, :2]).square().flatten()
        for b, n in enumerate(batch.lengths.tolist())
    ]
    torch.testing.assert_close(loss, torch.cat(errors).mean())
    values = {key: float(value) for key, value in sums.items()}
    metrics = task.metrics(values)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    power = sum(batch.x[:n, b, :2].square().sum() for b, n in enumerate(batch.lengths.tolist()))
    expected = torch.cat(errors).detach().sum() / power
    assert metrics["error"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_of_one_number_a_sequence_is_its_mean_square_error():
    x, _ = sequences()
    y = torch.stack([sequence.mean(0)[:2] for sequence in x])
    task = prepared(SequenceRegression({"train": (x, y)}, readout="mean"))
    model, batch = nn.Linear(CHANNELS, 2), next(task.batches("train"))
    means = [model(batch.x[:n, b]).mean(0) for b, n in enumerate(batch.lengths.tolist())]
    expected = (torch.stack(means) - batch.y).square().mean()
    torch.testing.assert_close(task.loss(model, batch)[0], expected)


def test_spikes_may_be_targets():
    x = torch.rand(12, 5, CHANNELS)
    losses = []
    for target in (x > 0.5, (x > 0.5).float()):
        task = prepared(SequenceRegression({"train": (x, target)}))
        losses.append(task.loss(nn.Identity(), next(task.batches("train")))[0])
    assert torch.equal(*losses)


# All of it


def test_firing_rates_of_an_evaluation_leave_the_padding_out():
    x, y = sequences()

    def model(config):
        model = network()
        nn.init.constant_(model[1].bias, 2.0)  # fires in silence too, as in padding
        return model

    task = SequenceClassification({"train": (x, y), "validation": (x, y)}, "mean")
    trial = Experiment(model, task, ClassificationConfig(device="cpu"))
    _, activity = trial.evaluate("validation")
    spikes = [trial.model[:3](sequence[:, None])[0] for sequence in x]
    fired, steps = sum(s.sum().item() for s in spikes), sum(map(len, x))
    assert activity.firing_rates() == {"2": pytest.approx(fired / (20 * steps))}


def test_an_experiment_needs_no_script_and_no_yaml_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = {"train": sequences(120), "test": sequences(30, seed=1)}
    task = SequenceClassification(data, readout="mean")
    config = ClassificationConfig(name="mine", device="cpu")
    config.hyperparameters.epoch, config.hyperparameters.batch_size = 15, 20
    config.optimizer.Adam.lr = 0.02
    result = Experiment(network, task, config).train()
    assert result["test"]["accuracy"] > 0.9
    assert "best epoch" in capsys.readouterr().out


def test_an_experiment_whose_task_another_one_has_taken_is_refused(tmp_path):
    task = SequenceClassification({"train": sequences(), "test": sequences()}, readout="mean")
    first, second = (
        Experiment(network, task, ClassificationConfig(name=name, runs_path=str(tmp_path)))
        for name in ("first", "second")
    )
    for use in (first.train, lambda: first.evaluate("test")):
        assert "give each Experiment a task of its own" in refusal(use)
    assert not any(tmp_path.iterdir())
    second.evaluate("test")
    message = refusal(second.evaluate, "tset")
    assert message == "split is 'tset', expected one of train, validation, test"


def test_a_task_without_an_experiment_says_that_it_has_no_data():
    task = SequenceClassification({"train": sequences()})
    said = "the SequenceClassification has no data yet: an Experiment sets it up"
    assert refusal(task.batches, "train") == said


def test_a_script_of_one_s_own_trains_resumes_and_tests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def script(*arguments):
        data = {"train": sequences(60), "test": sequences(30, seed=1)}
        task = SequenceClassification(data, readout="mean")
        options = "hyperparameters.batch_size=20", "device=cpu", *arguments
        return run(*options, model=network, task=task, script=tmp_path / "own.py")

    first = script("--train", "hyperparameters.epoch=2")
    assert (first.code, first.err) == (0, "")
    more = script("--train", "--resume", "hyperparameters.epoch=4")
    assert (more.code, more.err) == (0, "")
    assert f"resumed from {the_run(tmp_path).relative_to(tmp_path)}/last after 2 epochs" in more.out
    tested = script("--test")
    assert (tested.code, tested.err) == (0, "")
    best = more.out.split("; test ")[1].split("\n")[0]
    assert f"test {best}\n" in tested.out
    assert "layer 2: " in tested.out
    refused = script("--train", "hyperparameters.batch_size=55")
    assert refused.code == 2
    assert "batch_size is 55, there are 54 sequences to train on" in refused.err


class NoisyLoss(SequenceClassification):
    """A loss that draws by PyTorch, in a test too."""

    def loss(self, model, batch):
        return super().loss(model, batch._replace(x=batch.x + torch.randn_like(batch.x)))


def test_a_test_draws_the_same_each_time(tmp_path):
    config = ClassificationConfig(device="cpu", runs_path=str(tmp_path))
    config.hyperparameters.epoch, config.hyperparameters.batch_size = 1, 8
    data = {"train": sequences(), "test": sequences(seed=1)}
    trial = Experiment(network, NoisyLoss(data, "mean"), config)
    trial.train()
    assert trial.test() == trial.test()


def test_devices_are_seeded_before_data_and_layers_draw(monkeypatch):
    seeds, drawn = [], []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)

    def data(config):
        drawn.extend(seeds[-1:])
        return {"train": sequences()}

    def build_model(config):
        drawn.extend(seeds[-1:])
        return network()

    before = torch.get_rng_state()
    Experiment(build_model, SequenceClassification(data), ClassificationConfig(seed=7))
    assert drawn == [7, 7]
    assert torch.equal(torch.get_rng_state(), before)

"""A network of digits learns the mean answer of trained networks to the image that it sees."""

import copy
import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from running import ROOT, refused, tiny
from torch import nn

import snn_lib
from snn_lib import use_backend
from snn_lib.errors import InputError
from snn_lib.tasks.digits import DigitClassification, DigitConfig
from snn_lib.tasks.distillation import Teachers
from snn_lib.tasks.sequential_digits import SequentialConfig, SequentialDigits
from snn_lib.training import Experiment, loading
from snn_lib.training.checkpoints import load_checkpoint
from snn_lib.training.experiment import Stopped

PATHS = [str(ROOT / "checkpoint" / f"pretrained_snn_mlp_{number}") for number in (1, 2)]
RANDOM = str(ROOT / "checkpoint" / "pretrained_snn_mlp_1_poisson")
TEMPERATURE = 2.5
loaded = functools.cache(snn_lib.load)


def digits(config_class, **options):
    config = config_class(dataset_path=str(ROOT / "dataset"))
    config.hyperparameters.batch_size = 8
    values = {"training_size": 20, "validation_size": 10, "test_size": 10, **options}
    config.mnist_config = type(config.mnist_config)(**values)
    return config


def batches_of(task, config, split="train"):
    task.setup(config, torch.device("cpu"))
    return list(task.batches(split))


def softened(images, paths=PATHS, temperature=TEMPERATURE):
    logits = sum(loaded(path).answer(images) for path in paths) / len(paths)
    odds = (logits / temperature).exp()
    return odds / odds.sum(1, keepdim=True)


@pytest.mark.parametrize("paths", [PATHS[:1], PATHS])
def test_the_target_is_the_mean_answer_to_the_augmented_image(paths):
    teaching = {"teachers": paths, "teacher_temperature": TEMPERATURE, "max_rate": 0.5}
    config = digits(DigitConfig, **teaching)
    plain = batches_of(DigitClassification(), digits(DigitConfig, max_rate=0.5))
    for batch, labelled in zip(batches_of(DigitClassification(), config), plain, strict=True):
        assert torch.equal(batch.x, labelled.x)
        images = batch.x[0].unflatten(1, (28, 28)) / 0.5
        torch.testing.assert_close(batch.y, softened(images.clamp(0, 1), paths))


@pytest.mark.parametrize("length", [784, 28])
def test_teachers_see_the_image_that_the_network_sees_in_another_order(length):
    config = digits(SequentialConfig, teachers=PATHS, teacher_temperature=TEMPERATURE)
    config.hyperparameters.length = length
    task = SequentialDigits()
    for batch in batches_of(task, config):
        pixels = batch.x.transpose(0, 1).flatten(1) + 0.1307
        images = torch.empty_like(pixels)
        images[:, task.preparation.order] = pixels
        expected = softened(images.unflatten(1, (28, 28)).clamp(0, 1))
        torch.testing.assert_close(batch.y, expected, rtol=0, atol=2e-3)  # of rounded pixels


@pytest.mark.parametrize("split", ["validation", "test"])
def test_what_is_evaluated_are_the_labels(split):
    plain = batches_of(DigitClassification(), digits(DigitConfig), split)
    taught = batches_of(DigitClassification(), digits(DigitConfig, teachers=["missing"]), split)
    for batch, labelled in zip(taught, plain, strict=True):
        assert torch.equal(batch.y, labelled.y)


@pytest.mark.parametrize("workers", [0, 2])
def test_teachers_that_draw_spikes_say_the_same_wherever_an_epoch_begins(workers):
    config = digits(DigitConfig, teachers=[RANDOM])
    task = DigitClassification()
    (*_, expected) = batches_of(task, config)
    config = copy.deepcopy(config)
    config.data_workers = workers
    task.setup(config, torch.device("cpu"))
    state = torch.get_rng_state()
    (last,) = task.batches("train", 0, start=2)
    assert torch.equal(last.y, expected.y)
    assert torch.equal(torch.get_rng_state(), state)  # dropout draws the same, too


def test_teachers_that_draw_spikes_draw_others_in_every_epoch():
    config = digits(DigitConfig, teachers=[RANDOM], training_size=1, use_transform=False)
    task = DigitClassification()
    task.setup(config, torch.device("cpu"))
    (first,), (second,), (again,) = (list(task.batches("train", epoch)) for epoch in (0, 1, 0))
    assert torch.equal(first.x, second.x)  # of the same image
    assert torch.equal(first.y, again.y)
    assert not torch.equal(first.y, second.y)


def test_white_may_be_rounded_up():
    teachers = Teachers(PATHS[:1], TEMPERATURE)
    image = torch.ones(1, 28, 28)
    assert torch.equal(teachers(image * (1 + 1e-6)), teachers(image))


def test_a_share_without_images_needs_no_answer():
    config = digits(DigitConfig, teachers=PATHS[:1], training_size=17)
    task = DigitClassification()
    task.setup(config, torch.device("cpu"))
    task.share(1, 2)  # the last batch has one image, the other process's
    assert [len(batch.y) for batch in task.batches("train")] == [4, 4, 0]


@pytest.mark.parametrize("early", [0.0, 0.5])
def test_the_loss_is_the_cross_entropy_of_answer_and_target(early):
    config = digits(DigitConfig, teachers=PATHS[:1])
    config.hyperparameters.early_answers = early
    task = DigitClassification()
    batch, *_ = batches_of(task, config)
    spikes = torch.rand(6, len(batch.y), 10).round()

    class Answer(nn.Module):
        def forward(self, x):
            return spikes

    def loss_of(counts):
        log = counts - counts.exp().sum(1, keepdim=True).log()
        return -(batch.y * log).sum(1).mean()

    loss, sums = task.loss(Answer().train(), batch)
    steps = torch.stack([loss_of(spikes[:step].sum(0)) for step in range(1, 7)])
    torch.testing.assert_close(loss, steps[-1] + early * steps.mean())
    right = spikes.sum(0).argmax(1) == batch.y.argmax(1)
    assert sums["correct"] == right.sum()


def test_a_run_that_is_resumed_in_an_epoch_learns_the_same(tmp_path):
    def build_model(config):
        return nn.Sequential(nn.Dropout(0.3), nn.Linear(784, 10))

    def experiment(name, stop_requested=lambda: False):
        config = digits(DigitConfig, teachers=[RANDOM], training_size=40)
        config.name, config.runs_path, config.device = name, str(tmp_path), "cpu"
        options = config.hyperparameters
        options.length, options.epoch = 6, 2
        task = DigitClassification()
        return Experiment(build_model, task, config, stop_requested=stop_requested)

    whole = experiment("whole")
    whole.train()
    batches = itertools.count(1)
    parts = experiment("parts", lambda: next(batches) == 7)  # two batches into the second epoch
    with pytest.raises(Stopped):
        parts.train()
    resumed = experiment("parts")
    resumed.train(load_checkpoint(parts.run.last))
    expected, found = (load_checkpoint(one.run.last) for one in (whole, resumed))
    first, second = (row["train_loss"] for row in expected["metrics"])
    assert second < first - 0.05  # it does learn
    for name, weights in found["snn_state_dict"].items():
        assert torch.equal(weights, expected["snn_state_dict"][name]), name


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("missing", "missing"),
        ("pretrained_time_series", "sample 0 has shape (28, 28)"),
        ("pretrained_event_vision", "expected a list of recordings"),
    ],
)
def test_what_cannot_teach_is_refused(tmp_path, teacher, message):
    path = str(ROOT / "checkpoint" / teacher)
    line = refused("--train", *tiny(tmp_path, f"mnist_config.teachers=[{path}]"))
    assert line.startswith(f"teacher {path}: ")
    assert message in line


def test_a_teacher_of_other_classes_is_refused(monkeypatch):
    network = SimpleNamespace(answer=lambda images: torch.zeros(len(images), 26))
    monkeypatch.setattr(loading, "load", lambda path: network)
    with pytest.raises(InputError, match=r"an image has the shape \(1, 26\), expected \(1, 10\)"):
        Teachers(PATHS[:1], TEMPERATURE)


def test_a_teacher_that_a_forced_backend_cannot_serve_is_refused():
    pytest.importorskip("triton")
    with use_backend("cuda"), pytest.raises(InputError, match=r"teacher .*backend 'cuda'"):
        Teachers(PATHS[:1], TEMPERATURE)

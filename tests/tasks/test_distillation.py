"""A network of digits learns the mean answer of trained networks to the image that it sees."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from refusing import refusal
from running import ROOT, Answer, refused, tiny

import snn_lib
from snn_lib import use_backend
from snn_lib.errors import InputError
from snn_lib.tasks.digits import DigitClassification, DigitConfig
from snn_lib.tasks.distillation import Teachers
from snn_lib.tasks.sequential_digits import SequentialConfig, SequentialDigits
from snn_lib.training import loading

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


def test_a_task_that_is_set_up_anew_has_the_teachers_of_its_settings():
    task = DigitClassification()
    for paths, temperature in ((PATHS[:1], 1.0), (PATHS[:1], 4.0), (PATHS, 4.0)):
        teaching = {"teachers": paths, "teacher_temperature": temperature, "use_transform": False}
        batch, *_ = batches_of(task, digits(DigitConfig, **teaching))
        images = batch.x[0].unflatten(1, (28, 28))
        torch.testing.assert_close(batch.y, softened(images, paths, temperature))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_compares_with_the_labels_and_asks_no_teacher(split):
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


def test_teachers_that_draw_spikes_draw_others_in_every_batch():
    config = digits(DigitConfig, teachers=[RANDOM], training_size=2, use_transform=False)
    config.hyperparameters.batch_size = 1
    task = DigitClassification()
    task.setup(config, torch.device("cpu"))
    images, labels = task.images["train"]
    task.images["train"] = images[:1].expand(2, 28, 28), labels[:1].expand(2)
    first, second = task.batches("train", 0)
    assert not torch.equal(first.y, second.y)


def test_teachers_that_draw_spikes_draw_others_in_every_process():
    config = digits(DigitConfig, teachers=[RANDOM], training_size=2, use_transform=False)
    answers = []
    for rank in range(2):
        task = DigitClassification()
        task.setup(config, torch.device("cpu"))
        images, labels = task.images["train"]
        task.images["train"] = images[:1].expand(2, 28, 28), labels[:1].expand(2)
        task.share(rank, 2)
        (batch,) = task.batches("train", 0)
        answers.append(batch.y)
    assert not torch.equal(*answers)


def test_teachers_take_white_that_rounding_made_brighter_than_one():
    teachers = Teachers(PATHS[:1], TEMPERATURE)
    image = torch.ones(1, 28, 28)
    assert torch.equal(teachers(image * (1 + 1e-6)), teachers(image))


def test_a_process_without_images_in_a_batch_asks_no_teacher():
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

    def loss_of(counts):
        log = counts - counts.exp().sum(1, keepdim=True).log()
        return -(batch.y * log).sum(1).mean()

    loss, sums = task.loss(Answer(spikes).train(), batch)
    steps = torch.stack([loss_of(spikes[:step].sum(0)) for step in range(1, 7)])
    torch.testing.assert_close(loss, steps[-1] + early * steps.mean())
    right = spikes.sum(0).argmax(1) == batch.y.argmax(1)
    assert sums["correct"] == right.sum()


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("missing", "missing"),
        ("pretrained_time_series", "sample 0 has shape (28, 28)"),
        ("pretrained_event_vision", "expected a list of recordings"),
    ],
)
def test_a_network_that_takes_no_digits_is_refused_as_a_teacher(tmp_path, teacher, message):
    path = str(ROOT / "checkpoint" / teacher)
    line = refused("--train", *tiny(tmp_path, f"mnist_config.teachers=[{path}]"))
    assert line.startswith(f"teacher {path}: ")
    assert message in line


def test_a_teacher_of_other_classes_is_refused(monkeypatch):
    network = SimpleNamespace(answer=lambda images: torch.zeros(len(images), 26))
    monkeypatch.setattr(loading, "load", lambda path: network)
    message = refusal(Teachers, PATHS[:1], TEMPERATURE)
    assert "an image has the shape (1, 26), expected (1, 10)" in message


def test_a_teacher_that_predicts_numbers_is_refused(monkeypatch):
    network = SimpleNamespace(answer=lambda images: torch.zeros(len(images), 10), logit_scale=None)
    monkeypatch.setattr(loading, "load", lambda path: network)
    assert "it predicts numbers, expected one that" in refusal(Teachers, PATHS[:1], TEMPERATURE)


def test_a_teacher_that_a_forced_backend_cannot_serve_is_refused():
    pytest.importorskip("triton")
    with use_backend("cuda"), pytest.raises(InputError, match=r"teacher .*backend 'cuda'"):
        Teachers(PATHS[:1], TEMPERATURE)

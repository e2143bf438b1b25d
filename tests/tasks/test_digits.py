import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
from refusing import refusal
from running import ROOT, Answer, prepared
from torch import nn

from snn_lib import LowPassSynapse, Sequential, SpikingNeuron
from snn_lib.data.batches import Batch
from snn_lib.data.mnist import load_mnist
from snn_lib.encoding import poisson
from snn_lib.inspection.activity import Activity
from snn_lib.inspection.operations import CountedNetwork
from snn_lib.seeds import batch_generator
from snn_lib.tasks.classification import describe_energy
from snn_lib.tasks.digits import (
    DigitClassification,
    DigitConfig,
    DigitHyperparameters,
    MNISTSettings,
)

LENGTH, IMAGES = 6, 30
task_of = partial(prepared, DigitClassification)


@pytest.fixture
def config():
    config = DigitConfig(dataset_path=str(ROOT / "dataset"))
    config.hyperparameters.length = LENGTH
    options = config.mnist_config
    options.training_size, options.validation_size, options.test_size = 70, 40, IMAGES
    return config


def random_spikes(images, rate=0.4):
    return (torch.rand(LENGTH, images, 10) < rate).float()


@pytest.mark.parametrize("logit_per_spike", [1.0, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("training", [True, False])
def test_loss_is_the_cross_entropy_of_the_spike_counts(
    config, logit_per_spike, smoothing, training
):
    config.hyperparameters.logit_per_spike = logit_per_spike
    config.hyperparameters.label_smoothing = smoothing
    labels = torch.tensor([3, 0, 9])
    spikes = random_spikes(3)
    model = Answer(spikes).train(training)
    loss, sums = task_of(config).loss(model, Batch(None, labels))

    losses, correct = [], 0
    for image, label in enumerate(labels.tolist()):
        counts = spikes[:, image].sum(0).tolist()
        weights = [math.exp(logit_per_spike * count) for count in counts]
        surprise = [-math.log(weight / sum(weights)) for weight in weights]
        uniform = smoothing if training else 0.0  # validation is compared across recipes
        losses.append((1 - uniform) * surprise[label] + uniform * sum(surprise) / 10)
        correct += counts.index(max(counts)) == label
    assert loss.item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert float(sums["loss"]) == pytest.approx(sum(losses), rel=1e-5)
    assert (sums["samples"], int(sums["correct"])) == (3, correct)


@pytest.mark.parametrize("training", [True, False])
def test_early_answers_adds_the_mean_loss_of_the_answers_after_each_step(config, training):
    config.hyperparameters.early_answers, config.hyperparameters.logit_per_spike = 0.3, 0.5
    labels, spikes = torch.tensor([3, 0, 9]), random_spikes(3)
    loss, _ = task_of(config).loss(Answer(spikes).train(training), Batch(None, labels))
    said = [
        nn.functional.cross_entropy(0.5 * spikes[:step].sum(0), labels).item()
        for step in range(1, LENGTH + 1)
    ]
    expected = said[-1] + (0.3 * sum(said) / LENGTH if training else 0.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_early_answers_end_with_each_sequence(config, soft):
    config.hyperparameters.early_answers = 1.0
    labels, spikes, lengths = torch.tensor([3, 0]), random_spikes(2), torch.tensor([2, LENGTH])
    y = nn.functional.one_hot(labels, 10).float() if soft else labels
    task = task_of(config)
    loss, _ = task.loss(Answer(spikes).train(), Batch(spikes, y, lengths))
    counts = [spikes[: step + 1, b].sum(0) for b, end in enumerate(lengths) for step in range(end)]
    early = nn.functional.cross_entropy(
        torch.stack(counts),
        labels.repeat_interleave(lengths),
        label_smoothing=task.smoothing(Answer(0)),
    )
    at_end = torch.stack([spikes[:end, b].sum(0) for b, end in enumerate(lengths)])
    last = nn.functional.cross_entropy(at_end, labels, label_smoothing=task.smoothing(Answer(0)))
    torch.testing.assert_close(loss, last + early)


def test_early_answers_of_which_a_user_s_own_logits_know_are_refused(config):
    class Pairs(DigitClassification):
        def logits(self, output, batch):
            return super().logits(output, batch)

    config.hyperparameters.early_answers = 0.5
    words = refusal(Pairs().setup, config, torch.device("cpu"))
    assert words.startswith("hyperparameters.early_answers does not know")


def test_early_answers_add_up_low_precision_in_float32(config):
    config.hyperparameters.early_answers, config.hyperparameters.logit_per_spike = 1.0, 0.1
    batch, spikes = Batch(None, torch.tensor([3, 0])), torch.ones(600, 2, 10)
    spikes[300:, :, 3] = 0
    task, low = task_of(config), spikes.bfloat16()
    found, expected = (task.loss(Answer(one).train(), batch)[0] for one in (low, spikes))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_latency_spikes_once_a_pixel_within_the_span(config):
    config.hyperparameters.encoding, config.latency.span = "latency", 4
    config.latency.threshold = 0.5
    task = task_of(config)
    (batch,) = task.batches("test")
    images = load_mnist(ROOT / "dataset", train=False)[0][:IMAGES].flatten(1) / 255.0
    assert batch.x.shape == (LENGTH, IMAGES, 784)
    assert torch.equal(batch.x.sum(0), (images > 0.5).float())
    expected = ((1 - images) / 0.5 * 3).round()
    step = batch.x.argmax(0)
    assert torch.equal(step[images > 0.5].float(), expected[images > 0.5])


@pytest.mark.parametrize(
    ("length", "max_rate", "message"),
    [
        (6, 1.0, "latency.span is 10, expected at most hyperparameters.length, 6"),
        (25, 0.2, "expected below mnist_config.max_rate, 0.2"),
    ],
)
def test_a_latency_code_that_does_not_fit_length_or_pixels_is_refused(length, max_rate, message):
    hyperparameters = DigitHyperparameters(length=length, encoding="latency")
    pixels = MNISTSettings(max_rate=max_rate)
    said = refusal(DigitConfig, hyperparameters=hyperparameters, mnist_config=pixels)
    assert message in said


def test_the_best_epoch_is_the_most_accurate_and_of_equals_the_one_of_lower_loss(config):
    score = task_of(config).score
    rows = [{"accuracy": 0.9, "loss": 0.3}, {"accuracy": 0.9, "loss": 0.2}]
    assert max([*rows, {"accuracy": 0.8, "loss": 0.1}], key=score) == rows[1]


def test_a_constant_image_is_the_same_current_at_every_step_up_to_the_highest_rate(config):
    (x, labels, _), *_ = task_of(config).batches("test")
    assert x.shape == (LENGTH, IMAGES, 784)
    assert labels.shape == (IMAGES,)
    assert (x == x[0]).all()
    assert 0.0 < x[0].mean() < x.max() == 1.0
    config.mnist_config.max_rate = 0.4
    (dimmed, *_), *_ = task_of(config).batches("test")
    torch.testing.assert_close(dimmed, 0.4 * x)


@pytest.mark.parametrize("encoding", ["poisson", "latency"])
def test_random_spikes_are_drawn_anew_for_training_and_kept_for_evaluation(config, encoding):
    config.hyperparameters.encoding = encoding
    config.latency.span, config.latency.jitter = LENGTH, 1.0
    config.mnist_config.use_transform = False
    config.hyperparameters.batch_size = 70  # one batch, in another order each epoch
    task = task_of(config)
    for split in ("validation", "test"):
        first, second = (next(iter(task.batches(split))).x for _ in range(2))
        assert torch.equal(first, second)
    epochs = [next(task.batches("train", epoch)).x.sum((1, 2)) for epoch in (0, 1, 1)]
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[1], epochs[2])


def test_poisson_spikes_of_an_evaluation_are_those_of_the_published_figures(config):
    (image, *_), *_ = task_of(config).batches("test")
    config.hyperparameters.encoding = "poisson"
    (x, *_), *_ = task_of(config).batches("test")
    drawn = poisson(image[0], LENGTH, batch_generator(config.seed + 1, -1, 0))
    assert torch.equal(x, drawn)


def test_splits_of_the_training_images_do_not_overlap(config):
    config.mnist_config.use_transform = False
    task = task_of(config)
    training = torch.cat([x[0] for x, *_ in task.batches("train")])
    validation = torch.cat([x[0] for x, *_ in task.batches("validation")])
    assert (len(training), len(validation)) == (70, 40)
    assert torch.cdist(training, validation).min() > 0
    config.seed += 1
    others = torch.cat([x[0] for x, *_ in task_of(config).batches("validation")])
    assert not torch.equal(others, validation)


def test_an_image_is_deformed_and_drawn_otherwise_in_every_batch_epoch_and_seed(
    config, monkeypatch
):
    """All images are the same one, so that their order changes nothing."""
    images, labels = load_mnist(ROOT / "dataset", train=True)
    alike = images[:1].expand(6, 28, 28), labels[:1].expand(6)
    monkeypatch.setattr("snn_lib.tasks.digits.load_mnist", lambda root, train: alike)
    options = config.mnist_config
    options.training_size, options.validation_size, options.test_size = 4, 2, 2
    config.hyperparameters.batch_size, config.transform.probability = 2, 1.0
    task, original = task_of(config), images[0].flatten() / 255.0
    other = task_of(dataclasses.replace(config, seed=config.seed + 1))
    batches = [b for t in (task, other) for epoch in (0, 1) for b in t.batches("train", epoch)]
    shown = [x for batch in batches for x in batch.x[0]]
    assert len(shown) == 16
    assert torch.pdist(torch.stack(shown)).min() > 0.1
    for split in ("validation", "test"):
        for batch in task.batches(split):
            assert (batch.x == original).all()
    options.use_transform = False
    assert all((b.x == original).all() for b in task_of(config).batches("train"))
    config.hyperparameters.encoding = "poisson"
    task = task_of(config)
    spikes = [batch.x.flatten() for epoch in (0, 1) for batch in task.batches("train", epoch)]
    assert torch.pdist(torch.stack(spikes)).min() > 0


def test_processes_share_a_batch_and_augment_alike(config):
    world = 3
    shares = [list(task_of(config, rank, world).batches("train", 1)) for rank in range(world)]
    plain = copy.deepcopy(config)
    plain.mnist_config.use_transform = False
    for number, whole in enumerate(task_of(config).batches("train", 1)):
        for rank, share in enumerate(shares):
            assert torch.equal(share[number].x, whole.x[:, rank::world])
            assert torch.equal(share[number].y, whole.y[rank::world])
    assert not torch.equal(whole.x, list(task_of(plain).batches("train", 1))[-1].x)


def test_processes_draw_other_spikes(config, monkeypatch):
    """All images are the same one, so that the shares differ by what is drawn alone."""
    images, labels = load_mnist(ROOT / "dataset", train=True)
    alike = images[:1].expand(IMAGES, 28, 28), labels[:1].expand(IMAGES)
    monkeypatch.setattr("snn_lib.tasks.digits.load_mnist", lambda root, train: alike)
    options = config.mnist_config
    options.training_size, options.validation_size, options.use_transform = 20, 10, False
    config.hyperparameters.encoding = "poisson"
    shares = [next(task_of(config, rank, 2).batches("train", 0)).x for rank in (0, 1)]
    assert shares[0].shape == shares[1].shape
    assert not torch.equal(*shares)


def test_accuracy_over_time_counts_the_spikes_so_far(config):
    task = task_of(config)
    labels = torch.cat([labels for _, labels, _ in task.batches("test")])
    spikes = random_spikes(IMAGES)
    _, found, rows = task.stop_early(Sequential(Answer(spikes)))
    assert (len(found), rows) == (LENGTH, [])
    for step in range(LENGTH):
        counts = spikes[: step + 1].sum(0).tolist()
        decisions = [row.index(max(row)) for row in counts]
        expected = sum(d == label for d, label in zip(decisions, labels.tolist(), strict=True))
        assert found[step] == pytest.approx(expected / IMAGES)


def test_the_report_says_what_was_counted(config):
    task = task_of(config)
    torch.manual_seed(1)
    model = Sequential(LowPassSynapse(784, 4.0), nn.Linear(784, 10), SpikingNeuron(10, 4.0))
    counted = CountedNetwork(model.eval())
    for batch in task.batches("test"):
        counted(batch.x)
    first, second, *rest = task.report(model, Activity(model))
    work = counted.operations()
    assert first.startswith(
        f"{counted.spikes():,.0f} spikes and {counted.synaptic_operations():,.0f} synaptic "
        f"operations per image ({work.additions:,.0f} additions and "
    )
    assert first.endswith(" a dense network of this size takes 7,840 multiply-accumulates per step")
    assert f"{describe_energy(work)} per image" in second
    filters, neurons = f"{work.filters:,.0f}", f"{work.neurons:,.0f}"
    assert filters != neurons
    assert second.startswith(f"filters and neurons: {filters} and {neurons} multiply-accumulates ")
    _, accuracy, (row, *_) = task.stop_early(model, [1])
    assert f"5: {100 * accuracy[4]:.2f} %" in rest[0]
    assert f"1 spike ahead: {100 * row['accuracy']:.2f} % after {row['steps']:.1f} steps" in rest[1]

import copy
import math
from functools import partial

import pytest
import torch
from running import ROOT, prepared
from torch import nn

from snn_lib import Chunked, LowPassSynapse, Sequential, SpikingNeuron
from snn_lib.data.batches import Batch, batch_generator
from snn_lib.data.mnist import load_mnist
from snn_lib.encoding import poisson
from snn_lib.errors import InputError
from snn_lib.inspection.activity import Activity
from snn_lib.inspection.operations import CountedNetwork
from snn_lib.tasks.classification import describe_energy
from snn_lib.tasks.digits import (
    DigitClassification,
    DigitConfig,
    DigitHyperparameters,
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


class Answer(nn.Module):
    """Gives these output spikes, whatever its input."""

    def __init__(self, spikes):
        super().__init__()
        self.spikes = spikes

    def forward(self, x):
        return self.spikes


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
def test_early_answers_adds_the_mean_loss_of_what_is_said_after_each_step(config, training):
    config.hyperparameters.early_answers, config.hyperparameters.logit_per_spike = 0.3, 0.5
    labels, spikes = torch.tensor([3, 0, 9]), random_spikes(3)
    loss, _ = task_of(config).loss(Answer(spikes).train(training), Batch(None, labels))
    said = [
        nn.functional.cross_entropy(0.5 * spikes[:step].sum(0), labels).item()
        for step in range(1, LENGTH + 1)
    ]
    expected = said[-1] + (0.3 * sum(said) / LENGTH if training else 0.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


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


def test_jitter_is_drawn_anew_for_training_and_kept_for_evaluation(config):
    config.hyperparameters.encoding, config.latency.span = "latency", LENGTH
    config.latency.jitter = 1.0
    task = task_of(config)

    def first(batches):
        return next(iter(batches)).x

    assert torch.equal(*(first(task.batches("test")) for _ in range(2)))
    config.mnist_config.use_transform = False
    one, other = (first(task_of(config).batches("train", epoch)) for epoch in (0, 1))
    assert not torch.equal(one.sum((1, 2)), other.sum((1, 2)))


def test_a_span_longer_than_the_sequence_is_refused():
    hyperparameters = DigitHyperparameters(length=6, encoding="latency")
    with pytest.raises(InputError, match=r"latency.span is 10, expected at most .*length, 6"):
        DigitConfig(hyperparameters=hyperparameters)


def test_metrics_are_means_over_samples(config):
    metrics = task_of(config).metrics({"samples": 40, "loss": 10.0, "correct": 30})
    assert metrics == {"loss": 0.25, "accuracy": 0.75}


def test_the_best_epoch_is_the_most_accurate_and_of_equals_the_one_of_lower_loss(config):
    score = task_of(config).score
    rows = [{"accuracy": 0.9, "loss": 0.3}, {"accuracy": 0.9, "loss": 0.2}]
    assert max([*rows, {"accuracy": 0.8, "loss": 0.1}], key=score) == rows[1]


def test_a_constant_image_is_the_same_current_at_every_step(config):
    (x, labels, _), *_ = task_of(config).batches("test")
    assert x.shape == (LENGTH, IMAGES, 784)
    assert labels.shape == (IMAGES,)
    assert (x == x[0]).all()
    assert 0.0 < x[0].mean() < x.max() == 1.0


def test_poisson_spikes_follow_the_pixels(config):
    (images, *_), *_ = task_of(config).batches("test")
    config.hyperparameters.encoding = "poisson"
    config.hyperparameters.length = 400
    (x, *_), *_ = task_of(config).batches("test")
    assert set(x.unique().tolist()) == {0.0, 1.0}
    deviation = (x.mean(0) - images[0]).abs().max()
    assert deviation < 5.5 * math.sqrt(0.25 / 400)  # standard deviations, of 23,520 pixels


def test_poisson_spikes_are_drawn_anew_for_training_and_kept_for_evaluation(config):
    config.hyperparameters.encoding = "poisson"
    config.mnist_config.use_transform = False
    config.hyperparameters.batch_size = 70  # one batch, in another order each epoch
    task = task_of(config)

    def spikes(batches):
        return next(iter(batches))[0]

    for split in ("validation", "test"):
        first, second = (spikes(task.batches(split)) for _ in range(2))
        assert torch.equal(first, second)
    epochs = [spikes(task.batches("train", epoch, 0)).sum((1, 2)) for epoch in (0, 1)]
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[1], spikes(task.batches("train", 1, 0)).sum((1, 2)))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_poisson_spikes_of_an_evaluation_are_those_of_the_published_figures(config, split):
    (image, *_), *_ = task_of(config).batches(split)
    config.hyperparameters.encoding = "poisson"
    (x, *_), *_ = task_of(config).batches(split)
    drawn = poisson(image[0], LENGTH, batch_generator(config.seed + 1, -1, 0))
    assert torch.equal(x, drawn)


def test_splits_of_the_training_images_do_not_overlap(config):
    config.mnist_config.use_transform = False
    task = task_of(config)
    training = torch.cat([x[0] for x, *_ in task.batches("train")])
    validation = torch.cat([x[0] for x, *_ in task.batches("validation")])
    assert (len(training), len(validation)) == (70, 40)
    assert torch.cdist(training, validation).min() > 0


def test_pixels_reach_from_zero_to_the_highest_rate(config):
    whole = torch.cat([x[0] for x, *_ in task_of(config).batches("test")])
    config.mnist_config.max_rate = 0.4
    dimmed = torch.cat([x[0] for x, *_ in task_of(config).batches("test")])
    assert whole.max() == 1.0
    torch.testing.assert_close(dimmed, 0.4 * whole)


def test_an_image_is_deformed_otherwise_in_every_batch_and_epoch_and_never_in_evaluation(
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
    shown = [x for epoch in (0, 1) for b in task.batches("train", epoch) for x in b.x[0]]
    assert len(shown) == 8
    assert torch.pdist(torch.stack(shown)).min() > 0.1
    for split in ("validation", "test"):
        for batch in task.batches(split):
            assert (batch.x == original).all()
    options.use_transform = False
    assert all((b.x == original).all() for b in task_of(config).batches("train"))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_batch_and_augment_alike(config, world):
    shares = [list(task_of(config, rank, world).batches("train", 1)) for rank in range(world)]
    plain = copy.deepcopy(config)
    plain.mnist_config.use_transform = False
    for number, whole in enumerate(task_of(config).batches("train", 1)):
        for rank, share in enumerate(shares):
            assert torch.equal(share[number].x, whole.x[:, rank::world])
            assert torch.equal(share[number].y, whole.y[rank::world])
    assert not torch.equal(whole.x, list(task_of(plain).batches("train", 1))[-1].x)


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


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: Chunked(model, 2)])
def test_early_stopping_gives_what_each_image_says_and_costs_until_then(config, wrap):
    config.hyperparameters.encoding, config.latency.span = "latency", LENGTH
    task = task_of(config)
    torch.manual_seed(1)
    model = Sequential(LowPassSynapse(784, 4.0), nn.Linear(784, 10), SpikingNeuron(10, 4.0))
    nn.init.normal_(model[1].weight, std=0.05)
    with torch.no_grad():  # one class spikes more often
        model[1].bias[3] = 3.0
    _, _, rows = task.stop_early(wrap(model), [1, 2, 100])
    (batch,) = task.batches("test")
    with torch.no_grad():
        psp, output = model[0](batch.x)[0], model(batch.x)[0]
    for row in rows:
        right = taken = cost = 0
        for image in range(IMAGES):
            for step in range(1, LENGTH + 1):
                counts = output[:step, image].sum(0)
                second, first = counts.sort().values[-2:]
                if first - second >= row["lead"]:
                    break
            right += counts.argmax() == batch.y[image]
            taken += step
            cost += 10 * psp[:step, image].count_nonzero()
        assert row == pytest.approx(
            {
                "lead": row["lead"],
                "accuracy": float(right) / IMAGES,
                "steps": taken / IMAGES,
                "operations": float(cost) / IMAGES,
            }
        )
    assert 1 < rows[0]["steps"] < rows[1]["steps"] < rows[2]["steps"] == LENGTH


def test_a_network_without_synapses_is_counted_too(config):
    task = task_of(config)
    _, _, (row,) = task.stop_early(Sequential(nn.Linear(784, 10)), [math.inf])
    x = torch.cat([batch.x for batch in task.batches("test")], 1)
    assert row["operations"] == 10 * x[0].count_nonzero() / IMAGES  # a constant current


@pytest.mark.parametrize(("law", "differs"), [("linear", False), ("logarithmic", True)])
def test_the_law_of_the_latency_code_is_that_of_the_settings(config, law, differs):
    config.hyperparameters.encoding, config.latency.span = "latency", LENGTH
    (linear,) = task_of(config).batches("test")
    config.latency.law = law
    (batch,) = task_of(config).batches("test")
    assert torch.equal(batch.x, linear.x) != differs


def test_a_threshold_that_no_pixel_exceeds_is_refused():
    config = DigitConfig(name="dim")
    config.hyperparameters.encoding, config.mnist_config.max_rate = "latency", 0.2
    with pytest.raises(InputError, match=r"expected below mnist_config.max_rate, 0.2"):
        config.__post_init__()


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
    _, accuracy, (row, *_) = task.stop_early(model, [1])
    assert f"5: {100 * accuracy[4]:.2f} %" in rest[0]
    assert f"1 spike ahead: {100 * row['accuracy']:.2f} % after {row['steps']:.1f} steps" in rest[1]

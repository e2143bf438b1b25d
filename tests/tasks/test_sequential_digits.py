import hashlib

import pytest
import torch
from running import ROOT, accuracy, run, tiny

import sequential_mnist
from snn_lib import ResonantSynapse, SpikingNeuron
from snn_lib.data.batches import Batch
from snn_lib.data.mnist import load_mnist
from snn_lib.tasks.sequential_digits import SequentialConfig, SequentialDigits
from snn_lib.training.config import load_config

IMAGES = 20


@pytest.fixture
def config():
    config = load_config(SequentialConfig, ROOT / "sequential_mnist.yaml", [])
    config.dataset_path = str(ROOT / "dataset")
    options = config.mnist_config
    options.training_size, options.validation_size, options.test_size = 30, 10, IMAGES
    return config


def shown(config):
    task = SequentialDigits()
    task.setup(config, torch.device("cpu"))
    (batch,) = task.batches("test")
    return task, batch.x


def images():
    return load_mnist(ROOT / "dataset", train=False)[0][:IMAGES] / 255.0 - 0.1307


@pytest.mark.parametrize("length", [784, 112, 28, 1])
def test_in_order_a_digit_is_read_row_by_row(config, length):
    config.hyperparameters.length = length
    config.mnist_config.permuted = False
    _, x = shown(config)
    assert x.shape == (length, IMAGES, 784 // length)
    for image, expected in enumerate(images()):
        assert torch.equal(x[:, image].flatten(), expected.flatten())
    if length == 28:
        assert torch.equal(x[11], images()[:, 11])


@pytest.mark.parametrize("seed", [2, 3])
def test_the_permutation_is_the_same_for_everyone(config, seed):
    config.seed = seed
    task, x = shown(config)
    order = task.preparation.order.tolist()
    assert sorted(order) == list(range(784))
    assert hashlib.sha256(bytes(str(order), "ascii")).hexdigest()[:16] == "453ad6c92e265c24"
    assert torch.equal(x[:, :, 0].T, images().flatten(1)[:, order])


def test_max_rate_scales_the_pixels_around_their_mean(config):
    _, x = shown(config)
    config.mnist_config.max_rate = 0.5
    torch.testing.assert_close(shown(config)[1], 0.5 * x)


def test_the_answer_is_the_output_of_the_last_step(config):
    task, x = shown(config)
    output = torch.arange(4.0)[:, None, None].expand(4, IMAGES, 10) + torch.arange(10)
    logits = task.logits(output, Batch(x, None))
    assert torch.equal(logits, 3.0 + torch.arange(10.0).expand(IMAGES, 10))


def test_the_model_has_the_size_it_says_and_every_layer_fires(config):
    torch.manual_seed(config.seed)
    model = sequential_mnist.SNN(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 85_320
    _, x = shown(config)
    outputs, _ = model.train().layers.layerwise(x)  # eval() would use statistics of no data
    assert outputs[-1].shape == (784, IMAGES, 10)
    rates = [
        output.mean()
        for module, output in zip(model.layers, outputs, strict=True)
        if isinstance(module, SpikingNeuron)
    ]
    assert len(rates) == 2
    assert all(0.01 < rate < 0.3 for rate in rates)


def test_the_first_filters_decay_and_ring_in_the_ranges_of_the_settings(config):
    options = config.hyperparameters
    first, *others = (
        module
        for module in sequential_mnist.SNN(config).layers
        if isinstance(module, ResonantSynapse)
    )
    for synapse in (first, *others):
        assert torch.equal(synapse.effective_alpha(), synapse.alpha)  # nothing is pulled back
        tau = -1 / synapse.poles().abs().log()
        assert tau.amin() == pytest.approx(10, rel=1e-3)
        assert tau.amax() == pytest.approx(800, rel=1e-2)
    cycles = first.poles().angle().abs().amax(-1) / (2 * torch.pi)
    steps = cycles.sort().values.diff()
    assert cycles.amin() == pytest.approx(options.lowest_frequency, rel=1e-2)
    assert cycles.amax() == pytest.approx(0.5, rel=1e-3)
    torch.testing.assert_close(steps, steps.mean().expand(63), rtol=1e-2, atol=0)
    for synapse in others:
        cycles = synapse.poles().angle().abs().amax(-1) / (2 * torch.pi)
        assert cycles.amin() == pytest.approx(options.lowest_frequency, rel=1e-2)
        assert cycles.amax() == pytest.approx(options.highest_frequency, rel=1e-2)


def test_the_currents_of_hidden_neurons_are_standardised(config):
    config.hyperparameters.length = 28
    model = sequential_mnist.SNN(config).train()
    _, x = shown(config)
    outputs, _ = model.layers.layerwise(x)
    drives = [
        output
        for output, following in zip(outputs, model.layers[1:], strict=False)
        if isinstance(following, SpikingNeuron)
    ]
    assert len(drives) == 2
    for current in drives:
        torch.testing.assert_close(current.mean((0, 1)), torch.zeros(240), rtol=0, atol=1e-4)
        deviation = current.std((0, 1), correction=0)
        torch.testing.assert_close(deviation, torch.ones(240), rtol=0, atol=1e-2)


def test_first_weights_are_signs_for_the_pixels_and_scaled_for_hidden_layers(config):
    model = sequential_mnist.SNN(config)
    pixels, first, second = (model.layers[index] for index in (0, 2, 6))
    assert set(pixels.weight.flatten().tolist()) == {-1.0, 1.0}
    assert not pixels.bias.any()
    for layer in (first, second):
        assert layer.bias is None  # the normalisation has one
        scale = layer.weight.detach().std() * layer.in_features**0.5
        assert float(scale) == pytest.approx(0.4, rel=0.05)


def test_a_filter_s_first_share_of_several_pixels_is_as_large_as_of_one(config):
    for length in (784, 28):
        config.hyperparameters.length = length
        weight = sequential_mnist.SNN(config).layers[0].weight
        torch.testing.assert_close(weight.square().sum(1), torch.ones(64))


def test_without_train_bias_no_bias_is_trained(config):
    config.hyperparameters.train_bias = False
    for name, parameter in sequential_mnist.SNN(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.requires_grad
            assert not parameter.any()


def test_the_last_layer_has_its_own_weights_for_each_moment(config):
    model = sequential_mnist.SNN(config).eval()
    _, x = shown(config)
    *_, memory, _, answers = model.layers.layerwise(x)[0]
    weight, bias = model.layers[-2].weight, model.layers[-2].bias
    expected = torch.zeros(IMAGES, 10)
    for moment, step in enumerate((196, 392, 588, 784)):
        own = slice(10 * moment, 10 * (moment + 1))
        assert torch.equal(answers[step - 2], answers[step - 197] if moment else expected)
        expected = expected + memory[step - 1] @ weight[own].T + bias[own]
        torch.testing.assert_close(answers[step - 1], expected)


@pytest.mark.parametrize("permuted", [True, False])
def test_rows_are_learned_and_tested_to_the_same_accuracy(tmp_path, permuted):
    settings = tiny(
        tmp_path,
        "name=sequential",
        "hyperparameters.length=28",
        "hyperparameters.batch_size=32",
        "mnist_config.training_size=512",
        f"mnist_config.permuted={permuted}",
        "mnist_config.teachers=[]",
        "optimizer.gradient_clipping=1",
        "optimizer.coefficient_lr_scale=0.1",
    )
    options = {
        "model": sequential_mnist.SNN,
        "task": SequentialDigits(),
        "script": ROOT / "sequential_mnist.py",
    }
    trained, tested = (run(action, *settings, **options) for action in ("--train", "--test"))
    assert accuracy(trained) == accuracy(tested) > 20  # chance is 10

"""The 2020 networks, written with that release's names, beside this project's own."""

import shlex
import sys

import pytest
import torch
from omegaconf import OmegaConf
from running import YAML, run_script, shell
from torch import nn

import associative_memory
import snn_mlp_1
import snn_mlp_2
from snn_lib.errors import InputError
from snn_lib.optimizers import get_optimizer
from snn_lib.release_2020.conversion import MODELS, convert, main
from snn_lib.schedulers import get_scheduler
from snn_lib.snn_layers import *  # noqa: F403 (as the scripts of the release do)
from snn_lib.tasks.association import AssociationConfig
from snn_lib.tasks.digits import DigitConfig
from snn_lib.training.checkpoints import load_checkpoint, load_weights
from snn_lib.training.config import load_config

STEPS, BATCH = 10, 4

# As in the YAML of the release, with options that this project's schema does not list.
CONF = OmegaConf.create(
    """
    optimizer:
      optimizer_choice: Adam
      Adam: {lr: 1.0e-4, betas: [0.9, 0.99], amsgrad: true}
      AdamW: {lr: 1.0e-4, weight_decay: 0.01}
      SGD: {lr: 0.1, momentum: 0.9, dampening: 0.1}
    scheduler:
      scheduler_choice: none
      MultiStepLR: {milestones: [1, 2], gamma: 0.1}
      CosineAnnealingWarmRestarts: {T_0: 2, T_mult: 1, eta_min: 0}
      CyclicLR: {base_lr: 1.0e-5, max_lr: 1.0e-3, step_size_up: 2, mode: triangular2}
    """
)


class MLP(nn.Module):
    """784-500-500-10, as a script of the release writes it."""

    def __init__(self, low_pass, train_bias, membrane_filter):
        super().__init__()

        def axon(size):
            if low_pass:
                return first_order_low_pass_layer((size,), STEPS, BATCH, 4, True)  # noqa: F405
            return dual_exp_iir_layer((size,), STEPS, BATCH, 4, 1, True)  # noqa: F405

        def snn(inputs, outputs):
            return neuron_layer(  # noqa: F405
                inputs, outputs, STEPS, BATCH, 4, train_bias, membrane_filter
            )

        self.axon1 = axon(784)
        self.snn1 = snn(784, 500)
        self.axon2 = axon(500)
        self.snn2 = snn(500, 500)
        self.axon3 = axon(500)
        self.snn3 = snn(500, 10)
        self.dropout1 = nn.Dropout(p=0.3)
        self.dropout2 = nn.Dropout(p=0.3)

    def forward(self, inputs):
        axon1_out, _ = self.axon1(inputs, self.axon1.create_init_states())
        spike_l1, _ = self.snn1(axon1_out, self.snn1.create_init_states())
        axon2_out, _ = self.axon2(self.dropout1(spike_l1))
        spike_l2, _ = self.snn2(axon2_out)
        axon3_out, _ = self.axon3(self.dropout2(spike_l2))
        spike_l3, _ = self.snn3(axon3_out)
        return spike_l3


class Memory(nn.Module):
    """300-500-200-500-300, as a script of the release writes it."""

    def __init__(self, train_bias, membrane_filter):
        super().__init__()
        sizes = (300, 500, 200, 500, 300)
        for i in range(4):
            axon = dual_exp_iir_layer((sizes[i],), STEPS, BATCH, 8, 2, True)  # noqa: F405
            snn = neuron_layer(  # noqa: F405
                sizes[i], sizes[i + 1], STEPS, BATCH, 8, train_bias, membrane_filter
            )
            setattr(self, f"axon{i + 1}", axon)
            setattr(self, f"dense{i + 1}", snn)
        self.output_filter = filter_layer(300, STEPS, BATCH, 8, 2)  # noqa: F405

    def forward(self, inputs):
        spikes = inputs
        for i in range(1, 5):
            psp, _ = getattr(self, f"axon{i}")(spikes)
            spikes, _ = getattr(self, f"dense{i}")(psp)
        return spikes


def release_network(model, train_bias=True, membrane_filter=False):
    if model == "associative_memory":
        return Memory(train_bias, membrane_filter)
    return MLP(model == "snn_mlp_2", train_bias, membrane_filter)


def native_network(model, *overrides):
    script = {
        "snn_mlp_1": snn_mlp_1,
        "snn_mlp_2": snn_mlp_2,
        "associative_memory": associative_memory,
    }[model]
    schema = AssociationConfig if script is associative_memory else DigitConfig
    return script.SNN(load_config(schema, YAML[model], overrides))


def trained(model, conf=CONF, steps=3, **options):
    """The network after a few steps that make all layers fire, its optimiser and an input."""
    network = release_network(model, **options)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.endswith("weight.weight"):
                value.mul_(8)
    optimizer = get_optimizer(network.parameters(), conf)
    scheduler = get_scheduler(optimizer, conf)
    x = (torch.rand(BATCH, MODELS[model][1][0], STEPS) < 0.3).float()
    if model == "associative_memory":
        compare = filter_layer(300, STEPS, BATCH, 8, 2, "cpu")  # noqa: F405
        target = compare(x)

        def criterion(spikes):
            return nn.functional.mse_loss(compare(spikes), target)
    else:
        labels = torch.arange(BATCH)

        def criterion(spikes):
            return nn.functional.cross_entropy(spikes.sum(2), labels)

    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = criterion(network(x))
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return network.eval(), optimizer, x, loss.item()


def saved(path, network, optimizer, loss):
    """As the scripts of the release do it."""
    state = {
        "epoch": 7,
        "snn_state_dict": network.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "loss": loss,
    }
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [
        ("Adam", "MultiStepLR"),
        ("AdamW", "CosineAnnealingWarmRestarts"),
        ("SGD", "CyclicLR"),
        ("Adam", "none"),
    ],
)
def test_a_script_of_the_release_trains(optimizer, scheduler):
    choice = {
        "optimizer": {"optimizer_choice": optimizer},
        "scheduler": {"scheduler_choice": scheduler},
    }
    torch.manual_seed(1)
    before, *_ = trained("snn_mlp_1", OmegaConf.merge(CONF, choice), steps=1)
    torch.manual_seed(1)
    after, *_ = trained("snn_mlp_1", OmegaConf.merge(CONF, choice), steps=3)
    first, last = before.state_dict(), after.state_dict()
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    learned = ("alpha_1", "alpha_2", "beta_1", "weight.weight", "weight.bias")
    assert moved == {name for name in first if name.endswith(learned)}


@pytest.mark.parametrize("membrane_filter", [False, True])
@pytest.mark.parametrize("train_bias", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_outputs_are_the_same_after_saving_loading_and_conversion(
    model, train_bias, membrane_filter, tmp_path
):
    options = {"train_bias": train_bias, "membrane_filter": membrane_filter}
    network, optimizer, x, loss = trained(model, **options)
    with torch.no_grad():  # an unstable filter, as there were in that release
        next(value for name, value in network.named_parameters() if "alpha_1" in name)[0] = 1.5
    spikes = network(x)
    assert 0.02 < spikes.mean() < 0.9
    source = saved(tmp_path / "of_the_release", network, optimizer, loss)

    checkpoint = torch.load(source, weights_only=True)
    again = release_network(model, **options).eval()
    again.load_state_dict(checkpoint["snn_state_dict"])
    get_optimizer(again.parameters(), CONF).load_state_dict(checkpoint["optimizer_state_dict"])
    assert torch.equal(again(x), spikes)

    converted = tmp_path / "converted"
    command = convert(source, converted, model, membrane_filter)
    given = [override for override in command if override.startswith("hyperparameters.")]
    native = native_network(
        model, *given, f"hyperparameters.membrane_filter={membrane_filter}"
    ).eval()
    load_weights(native, converted)
    assert torch.equal(native(x.movedim(-1, 0))[0], spikes.movedim(-1, 0))
    assert load_checkpoint(converted)["epoch"] == 7


def test_gradients_are_those_of_the_native_network(tmp_path):
    network, optimizer, x, loss = trained("snn_mlp_1")
    converted = tmp_path / "converted"
    convert(saved(tmp_path / "of_the_release", network, optimizer, loss), converted, "snn_mlp_1")
    native = native_network("snn_mlp_1").eval()
    load_weights(native, converted)
    optimizer.zero_grad()
    for spikes, time in ((network(x), -1), (native(x.movedim(-1, 0))[0], 0)):
        nn.functional.cross_entropy(spikes.sum(time), torch.arange(BATCH)).backward()
    for index, number in ((0, 1), (3, 2), (6, 3)):
        cell = getattr(network, f"axon{number}").dual_exp_iir_cell
        alpha, beta = native.layers[index].alpha.grad, native.layers[index].beta.grad
        torch.testing.assert_close(torch.stack([cell.alpha_1.grad, cell.alpha_2.grad]), alpha)
        torch.testing.assert_close(cell.beta_1.grad, beta[0])
        weight = getattr(network, f"snn{number}").neuron_cell.weight.weight
        torch.testing.assert_close(weight.grad, native.layers[index + 1].weight.grad)
        assert weight.grad.abs().max() > 0


def test_the_command_converts_a_checkpoint_that_the_script_then_tests(tmp_path):
    network, optimizer, _, loss = trained("snn_mlp_2")
    source = saved(tmp_path / "of_the_release", network, optimizer, loss)
    target = tmp_path / "converted"
    converted = shell(
        *(sys.executable, "-m", "snn_lib.checkpoints", "convert"),
        *(source, target, "--model", "snn_mlp_2"),
    )
    assert converted.code == 0, converted.err
    shown = shlex.split(converted.out.partition("test it with: python ")[2])
    tested = run_script(*shown, "mnist_config.test_size=20", "device=cpu", "seed=5")
    assert tested.code == 0, tested.err
    assert "epoch 7: test" in tested.out
    for idle in ("hyperparameters.tau_m=9", "hyperparameters.dropout=0.5", "optimizer.AdamW.eps=1"):
        refused = run_script(*shown, idle)
        assert refused.code == 2
        assert f"{idle.partition('=')[0]} has no effect with --test" in refused.err
    place = next(word for word in shown if word.startswith("test_checkpoint_path="))
    refused = run_script(shown[0], "--export", tmp_path / "network.onnx", place, "device=cpu")
    assert refused.code == 2
    assert "does not hold the settings of its network" in refused.err


def test_the_command_for_a_memory_has_the_synapses_and_the_delay_of_2020(tmp_path):
    source, target = tmp_path / "of_the_release", tmp_path / "converted"
    torch.save({"snn_state_dict": release_network("associative_memory").state_dict()}, source)
    _, *words = convert(source, target, "associative_memory")
    said = run_script(*words, "--help").out
    assert "hyperparameters.synapse=dual_exponential " in said
    assert "hyperparameters.delay=4 " in said


def test_a_checkpoint_of_the_first_version_is_converted(tmp_path):
    network = release_network("snn_mlp_2")
    weights = {
        key.replace("first_order", "firsr_order"): value
        for key, value in network.state_dict().items()
    }
    source, target = tmp_path / "of_the_release", tmp_path / "converted"
    torch.save({"snn_state_dict": weights}, source)
    convert(source, target, "snn_mlp_2")
    found = load_checkpoint(target)["snn_state_dict"]["layers.0.alpha"]
    assert torch.equal(found[0], network.axon1.first_order_low_pass_cell.alpha_1)


def command(capsys, *arguments):
    """Exit code and what went to standard error."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code, capsys.readouterr().err


def test_the_command_keeps_the_membrane_filter_if_it_is_told_that_there_was_one(tmp_path, capsys):
    source, target = tmp_path / "of_the_release", tmp_path / "converted"
    network = release_network("snn_mlp_2", membrane_filter=True)
    torch.save({"snn_state_dict": network.state_dict()}, source)
    for given in ([], ["--membrane_filter"]):
        command(capsys, "convert", source, target, "--model", "snn_mlp_2", *given)
        decay = load_checkpoint(target)["snn_state_dict"]["layers.2.membrane_decay"]
        expected = network.snn1.neuron_cell.decay_v if given else torch.zeros(500)
        assert torch.equal(decay, expected)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    network, optimizer, _, loss = trained("snn_mlp_2", steps=1)
    source = saved(tmp_path / "of_the_release", network, optimizer, loss)
    target = tmp_path / "converted"
    broken = tmp_path / "broken"
    broken.write_bytes(source.read_bytes()[:1000])
    (tmp_path / "link").symlink_to(source)
    for arguments, message in (
        (("convert", source, target, "--model", "snn_mlp_1"), "belongs to another model"),
        (("convert", tmp_path / "none", target, "--model", "snn_mlp_2"), "no file"),
        (("convert", broken, target, "--model", "snn_mlp_2"), "is refused: it is damaged"),
        (
            ("convert", source, tmp_path / "link", "--model", "snn_mlp_2"),
            "is the checkpoint that is read",
        ),
        (("convert", source, target, "--model", "snn_mlp_3"), "invalid choice"),
        (("convert", source, target), "--model"),
        ((), "COMMAND"),
    ):
        code, error = command(capsys, *arguments)
        assert code == 2
        assert message in error
        assert len(error.splitlines()) == 1
    assert not target.exists()


def test_a_failed_write_is_exit_code_1(tmp_path, capsys):
    network, optimizer, _, loss = trained("snn_mlp_2", steps=1)
    source = saved(tmp_path / "of_the_release", network, optimizer, loss)
    arguments = ("convert", source, tmp_path / "nowhere" / "converted", "--model", "snn_mlp_2")
    code, error = command(capsys, *arguments)
    assert code == 1
    assert len(error.splitlines()) == 1


def test_unknown_keys_of_a_checkpoint_are_refused_by_name(tmp_path):
    network, optimizer, _, loss = trained("snn_mlp_1", steps=1)
    network.snn4 = nn.Linear(2, 2)
    source = saved(tmp_path / "of_the_release", network, optimizer, loss)
    with pytest.raises(InputError, match=r"Unexpected key.*snn4\.bias"):
        convert(source, tmp_path / "converted", "snn_mlp_1")

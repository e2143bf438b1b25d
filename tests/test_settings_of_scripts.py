"""Every setting of a script changes its model, its data or its loss, or is said not to."""

import contextlib
import dataclasses
import functools
import itertools
import math
import operator
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from recorded import nmnist_files, qtdb_files, some_beats
from running import ROOT, SCRIPTS, YAML

import snn_lib.data.mnist
from snn_lib import IIRSynapse, SpikingNeuron, fire_from_the_start
from snn_lib.errors import InputError
from snn_lib.penalties import hidden_layers
from snn_lib.settings import LOCAL_KEYS, NEVER, list_settings, needs_of, without_effect
from snn_lib.training.building import build
from snn_lib.training.checkpoints import load_checkpoint
from snn_lib.training.config import config_from_dict, load_config
from snn_lib.training.loading import arguments_of_main

# Read by the loop for any script, and tested there: tests/training.
OF_THE_LOOP = {
    *("name", "seed", "dataset", "dataset_path", "test_checkpoint_path", "first_weights"),
    *("hyperparameters.epoch", "hyperparameters.precision", "hyperparameters.weight_averaging"),
    "hyperparameters.weight_bits",
    *("hyperparameters.chunk", "hyperparameters.rate_penalty", "hyperparameters.target_rate"),
    *("hyperparameters.rate_limit", "hyperparameters.penalty_by_cost"),
}
SECTIONS_OF_OTHERS = ("optimizer.", "scheduler.")
# Those that are refused or do nothing with the small data here, and are tested beside their task.
WITHOUT_EFFECT = {
    "snn_mlp_1": {"mnist_config.teacher_temperature"},  # there are no teachers
    "snn_mlp_2": {"mnist_config.teacher_temperature"},
    "snn_conv": {"mnist_config.teacher_temperature"},
    "event_vision": {"events.path"},
    "associative_memory": {"hyperparameters.length"},  # is refused unless it is the patterns'
    "time_series": {"hyperparameters.train_bias", "missing"},  # has to be true; no value is missing
}
FEW_DIGITS = {
    "hyperparameters.length": 6,
    "hyperparameters.batch_size": 4,
    "mnist_config.training_size": 8,
    "mnist_config.validation_size": 3,
    "mnist_config.test_size": 3,
}
SMALL = {
    "snn_mlp_1": {**FEW_DIGITS, "latency.span": 4},
    "snn_mlp_2": {**FEW_DIGITS, "latency.span": 4},
    "snn_conv": {**FEW_DIGITS, "latency.span": 4, "hyperparameters.channels": [4, 8, 8]},
    "sequential_mnist": {**FEW_DIGITS, "hyperparameters.length": 28},
    "snn_mlp_1_latency": {"latency.span": 4, "hyperparameters.length": 8},
    "snn_mlp_1_latency_behind": {"latency.span": 4, "hyperparameters.length": 8},
    "time_series": {"hyperparameters.batch_size": 4, "hyperparameters.neurons": 32},
    "event_vision": {
        "dataset": "nmnist",
        "hyperparameters.channels": [4, 4, 8],
        "hyperparameters.batch_size": 4,
        "events.training_size": 8,
        "events.validation_size": 4,
        "events.test_size": 8,
    },
    "event_vision_gesture": {"hyperparameters.length": 8, "events.duration": 100},
    "ecg": {"hyperparameters.neurons": [6, 5], "hyperparameters.batch_size": 4},
    "associative_memory": {
        "hyperparameters.length": 32,
        "hyperparameters.batch_size": 8,
        "hyperparameters.delay": 4,
        "damage.block_size": 10,
        "damage.rows_removed": 100,
        "pattern_config.training_samples": 8,
        "pattern_config.validation_samples": 1,
        "pattern_config.test_samples": 10,
    },
}
PRETRAINED = sorted(path for path in ROOT.glob("*checkpoint/pretrained_*") if not path.suffix)
RESONANCE = ("shortest_memory", "longest_memory", "lowest_frequency", "highest_frequency")
# What differs between a recipe and its pretrained model without being a part of the recipe.
OF_NO_CONCERN = {
    # Its synapses do not resonate, and the run had the name of the script.
    "associative_memory_2020": {"name", *(f"hyperparameters.{key}" for key in RESONANCE)},
}


def base_of(name):
    """The YAML file that this one changes, if any."""
    return Path(OmegaConf.load(YAML[name]).get("base", "")).stem


def script_of(name):
    """The script of a YAML file: the first with the name of the file or of one of its bases."""
    return name if (ROOT / f"{name}.py").exists() else script_of(base_of(name))


def keys_of(name):
    """The dotted keys that a YAML file names, and for a script's own file those of its bases."""

    def leaves(content, prefix=""):
        for key, value in content.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    content = OmegaConf.to_container(OmegaConf.load(YAML[name]))
    base = content.pop("base", None)
    inherited = keys_of(base_of(name)) if base and script_of(name) == name else ()
    return {*leaves(content), *inherited}


def keys_under_test(name, config):
    """All settings of a script with its own YAML file, and those that a variant of it names."""
    script, keys = script_of(name), keys_of(name)
    if name == script:
        keys = {key for key, _ in list_settings(config)}
    values = {key: operator.attrgetter(key)(config) for key in keys}
    no_values = {k for k, v in values.items() if dataclasses.is_dataclass(v) or v == []}
    keys -= no_values | OF_THE_LOOP | WITHOUT_EFFECT.get(script, set()) | {*LOCAL_KEYS}
    return sorted(key for key in keys if not key.startswith(SECTIONS_OF_OTHERS))


def others(value, choices):
    """Values that a setting may have instead, of which some may not fit the other settings."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return [choice for choice in choices if choice != value]
    if isinstance(value, list):
        if isinstance(value[0], str):
            return [value[:-1]]
        return [[other, *value[1:]] for other in others(value[0], choices)]
    if isinstance(value, int):
        return [2 * value, value // 2, value + 1, value - 1]
    return [0.5 * value, 1.5 * value, 0.75 * value + 0.25]


def with_value(section, key, value):
    """The configuration with this value of a setting, which is checked."""
    name, _, rest = key.partition(".")
    inner = with_value(getattr(section, name), rest, value) if rest else value
    return dataclasses.replace(section, **{name: inner})


def changed(config, key):
    """The configuration with another value of a setting."""
    *sections, name = key.split(".")
    section = functools.reduce(getattr, sections, config)
    (entry,) = (entry for entry in dataclasses.fields(section) if entry.name == name)
    old = getattr(section, name)
    for other in others(old, get_args(entry.type)):
        with contextlib.suppress(InputError):
            if other != old:
                return with_value(config, key, other)
    raise AssertionError(f"there is no other value for {key}")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    ("setting", "kinds"), [("train_bias", {"bias"}), ("train_coefficients", {"alpha", "beta"})]
)
def test_what_the_settings_do_not_train_is_not_trained_in_any_layer(name, setting, kinds, data):
    if (name, setting) == ("time_series", "train_bias"):
        pytest.skip("is refused")
    build_model, task, _, config = small_experiment(name, data)
    task.setup(config, torch.device("cpu"))
    for train in (True, False):
        model = build(build_model, with_value(config, f"hyperparameters.{setting}", train), task)
        trained = {
            key.rpartition(".")[2] for key, value in model.named_parameters() if value.requires_grad
        }
        assert bool(kinds & trained) is train


@pytest.mark.parametrize("name", SCRIPTS)
def test_hidden_spikes_are_dropped_as_the_settings_say_and_those_of_the_output_never(name, data):
    build_model, task, _, config = small_experiment(name, data)
    task.setup(config, torch.device("cpu"))
    model = build(build_model, with_value(config, "hyperparameters.dropout", 0.25), task)
    neurons = {key: one.dropout for key, one in model.named_modules() if hasattr(one, "dropout")}
    hidden = hidden_layers(model)
    behind_convolutions = {"snn_conv": 3, "event_vision": 3}.get(name, 0)  # they drop none
    expected = [0] * behind_convolutions + [0.25] * (len(hidden) - behind_convolutions)
    assert expected[-1] == 0.25
    assert [neurons[key] for key in hidden] == expected
    assert not any(dropout for key, dropout in neurons.items() if key not in hidden)


def precision_of(name):
    """The precision that a file's head, or that of one of its bases, says the model has."""
    head, _, _ = YAML[name].read_text().partition("\nname:")
    found = re.findall(r"hyperparameters\.precision=(\w+)", head)
    return found[0] if found else "float32"


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.name)
def test_a_recipe_is_what_its_pretrained_model_was_trained_by(path):
    name = path.name.removeprefix("pretrained_")
    checkpoint = load_checkpoint(path)
    _, task, _ = arguments_of_main(ROOT / checkpoint["script"])
    overrides = [f"hyperparameters.precision={precision_of(name)}"]
    recipe = load_config(task.config_class, YAML[name], overrides)
    trained = config_from_dict(task.config_class, checkpoint["config"], [])

    def values(config):
        return {
            key: value
            for key, value in list_settings(config)
            if not dataclasses.is_dataclass(value) and key not in LOCAL_KEYS
        }

    differ = {key for key, value in values(recipe).items() if values(trained)[key] != value}
    assert differ <= OF_NO_CONCERN.get(name, set())


@pytest.mark.parametrize("name", YAML)
def test_a_yaml_file_tests_its_own_pretrained_network_or_else_a_run_of_its_name(name):
    _, task, _ = arguments_of_main(ROOT / f"{script_of(name)}.py")
    config = load_config(task.config_class, YAML[name], [])
    own = [str(path.relative_to(ROOT)) for path in PRETRAINED if path.name == f"pretrained_{name}"]
    assert [config.test_checkpoint_path] == (own or [""])
    assert config.name == name


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_layer_has_the_time_constant_and_the_constraint_of_the_settings(name, data):
    build_model, task, _, config = small_experiment(name, data)
    config = with_value(config, "hyperparameters.tau_m", 6.5)
    task.setup(config, torch.device("cpu"))
    for constraint in ("none", "stable"):
        other = with_value(config, "hyperparameters.constraint", constraint)
        layers = [*build(build_model, other, task).modules()]
        assert {one.constraint for one in layers if isinstance(one, IIRSynapse)} == {constraint}
        for neurons in (one for one in layers if isinstance(one, SpikingNeuron)):
            expected = torch.full(neurons.shape, math.exp(-1 / 6.5))
            torch.testing.assert_close(neurons.reset_decay, expected)


def weighted_sum(x):
    """A number that depends on every element and its place."""
    return (x.flatten().double() * torch.linspace(1, 2, x.numel(), dtype=torch.float64)).sum()


def data_of(task, config):
    """All batches of all splits, as numbers, and the first one to train on."""
    torch.manual_seed(0)
    task.setup(config, torch.device("cpu"))
    batches = [list(task.batches("train"))]
    batches += [list(task.batches(split)) for split in ("validation", "test")]
    return [
        (len(split), *((*batch.x.shape, weighted_sum(batch.x).item()) for batch in split))
        for split in batches
    ], batches[0][0]


def learning_of(build_model, initialise, task, config, batch):
    """The loss of a training batch and its gradients, as numbers, and what keeps filters stable."""
    torch.manual_seed(0)
    model = build(build_model, config, task)
    if initialise is not None:
        with torch.no_grad():
            initialise(model, task)
    torch.manual_seed(0)
    loss, _ = task.loss(model.train(), batch)
    loss.backward()
    sums = [p.grad is not None and weighted_sum(p.grad).item() for p in model.parameters()]
    constraints = [getattr(module, "constraint", None) for module in model.modules()]
    return loss.item(), sums, constraints


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small data for the scripts that need it."""
    folder = tmp_path_factory.mktemp("data")
    patterns = np.random.default_rng(0).random((2, 300, 32)) < 0.1
    np.save(folder / "patterns.npy", patterns)
    generator = np.random.default_rng(1)
    arrays = {"x": generator.normal(size=(24, 20, 3)).cumsum(1), "y": np.arange(24) % 3}
    np.savez(folder / "series.npz", **arrays, x_test=arrays["x"], y_test=arrays["y"])
    nmnist_files(folder / "events")
    (folder / "MNIST").symlink_to(ROOT / "dataset" / "MNIST")  # which the camera looks at
    return {
        "associative_memory": {"dataset_path": str(folder / "patterns.npy")},
        "time_series": {
            "dataset": str(folder / "series.npz"),
            "hyperparameters.epoch": 1,
            "hyperparameters.length": 15,
        },
        "event_vision": {"events.path": str(folder / "events"), "dataset_path": str(folder)},
        "ecg": {"dataset_path": str(qtdb_files(folder / "qtdb", *some_beats()))},
    }


@pytest.fixture(scope="module", autouse=True)
def few_digits_read_once():
    with pytest.MonkeyPatch.context() as patch:
        read = functools.lru_cache(snn_lib.data.mnist.load_mnist)
        patch.setattr("snn_lib.tasks.digits.load_mnist", read)
        patch.setattr("snn_lib.data.simulated_events.load_mnist", read)
        patch.setattr("snn_lib.data.simulated_events.BLOCK", 16)
        yield


def small_experiment(name, data):
    """What a script gives ``main``, and a configuration of a YAML file with little data."""
    script = script_of(name)
    build_model, task, initialise = arguments_of_main(ROOT / f"{script}.py")
    config = load_config(task.config_class, YAML[name], [])
    for key, value in {**SMALL[script], **data.get(script, {}), **SMALL.get(name, {})}.items():
        config = with_value(config, key, value)
    return build_model, task, initialise, config


def where_it_counts(config, key):
    """The configuration with what a setting needs to have an effect."""
    for need in dict(needs_of(config))[key]:
        if not need.met_by(config):
            one = with_value(config, need.key, need.values[0]) if need.values else None
            config = one or changed(config, need.key)
    return config


@pytest.mark.parametrize("name", YAML)
def test_every_setting_has_an_effect_or_is_said_to_have_none(name, data):
    build_model, task, initialise, config = small_experiment(name, data)

    def effects(config):
        """What it is about, the cheaper first."""
        numbers, batch = data_of(task, config)
        yield numbers
        yield learning_of(build_model, initialise, task, config, batch)

    def has_effect(config, key):
        if repr(config) not in usual:
            usual[repr(config)] = list(effects(config))
        pairs = zip(effects(changed(config, key)), usual[repr(config)], strict=True)
        return any(itertools.starmap(operator.ne, pairs))

    usual = {repr(config): list(effects(config))}
    assert list(effects(config)) == usual[repr(config)]  # nothing else differs from time to time
    idle, needs = without_effect(config), dict(needs_of(config))
    wrong = []
    for key in keys_under_test(name, config):
        if key in idle and has_effect(config, key):
            wrong.append(f"{key} {idle[key]}")
        if NEVER not in needs[key] and not has_effect(where_it_counts(config, key), key):
            wrong.append(f"{key} has none")
    assert wrong == []


@pytest.mark.parametrize("name", [name for name in YAML if name in SCRIPTS or name in SMALL])
def test_a_setting_has_an_effect_on_a_trained_network_or_is_said_to_have_none(name, data):
    """In a test, that is: the settings of the loop and of the machine are left out."""
    build_model, task, initialise, config = small_experiment(name, data)
    task.setup(config, torch.device("cpu"))
    model = build(build_model, config, task)
    if initialise is not None:
        with torch.no_grad():
            initialise(model, task)
    elif name != "sequential_mnist":  # its normalisation sees to that
        fire_from_the_start(model, next(task.batches("train")).x, rate=0.2)
    weights = model.state_dict()

    def tested(config):
        """All batches of the test with their sums, as numbers, or what the weights do not fit."""
        torch.manual_seed(0)
        task.setup(config, torch.device("cpu"))
        model = build(build_model, config, task).eval()
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            return str(error)
        batches = task.batches("test")
        with torch.no_grad():
            found = [(batch.x, task.loss(model, batch)[1]) for batch in batches]
        return [
            (x.shape, weighted_sum(x).item(), {key: float(sums[key]) for key in sums})
            for x, sums in found
        ]

    usual, left_out = tested(config), OF_THE_LOOP | WITHOUT_EFFECT.get(script_of(name), set())
    left_out |= {*LOCAL_KEYS}
    unread = {"first_weights": "is loaded", "hyperparameters.epoch": "is over"}
    idle = without_effect(config, unread=unread)
    assert idle.keys() > unread.keys()
    wrong = [
        key
        for key, value in list_settings(config)
        if not dataclasses.is_dataclass(value)
        and value != []
        and key not in left_out | unread.keys()
        and not key.startswith(SECTIONS_OF_OTHERS)
        and (tested(changed(config, key)) == usual) is not (key in idle)
    ]
    assert wrong == []

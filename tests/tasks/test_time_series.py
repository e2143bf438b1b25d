"""Time series: how they are prepared and shown, and the script on arrays of one's own."""

import math
import re
import sys
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from refusing import refusal
from running import ROOT, accuracy, load, prepared, run, run_script, shell

import snn_lib
import time_series
from snn_lib import SpikingNeuron
from snn_lib.initialisation import ridge_regression
from snn_lib.tasks.time_series import (
    TimeSeries,
    TimeSeriesConfig,
    TimeSeriesHyperparameters,
    prepare_series,
)
from snn_lib.time_series import VALUED, build_network, complete
from snn_lib.training import command_line
from snn_lib.training.config import load_config

CPU = torch.device("cpu")
SAMPLES, STEPS = 60, 20
task_of = partial(prepared, TimeSeries)
ENCODINGS = {"current": 6, "population": 15, "delta": 6}  # and the channels that the network sees


@pytest.fixture
def mine(tmp_path):
    """Sequences of three channels, whose class is the channel that rises."""
    generator = np.random.default_rng(1)
    y = np.arange(SAMPLES) % 3
    x = generator.normal(size=(SAMPLES, STEPS, 3)) + 5
    x[np.arange(SAMPLES), :, y] += np.linspace(0, 6, STEPS)
    lengths = generator.integers(12, STEPS + 1, SAMPLES)
    arrays = {"x": x[:45], "y": y[:45], "lengths": lengths[:45]}
    arrays |= {"x_test": x[45:], "y_test": y[45:], "lengths_test": lengths[45:]}
    np.savez(tmp_path / "mine.npz", **arrays)
    return arrays


def configured(folder, **options):
    config = load_config(TimeSeriesConfig, ROOT / "time_series.yaml", [])
    config.dataset, config.device = str(folder / "mine.npz"), "cpu"
    hyperparameters = config.hyperparameters
    hyperparameters.batch_size, hyperparameters.fields, hyperparameters.neurons = 15, 5, 256
    for key, value in options.items():
        setattr(hyperparameters, key, value)
    return config


def test_sequences_are_held_out_only_for_training_by_gradients(mine, tmp_path):
    for epochs, expected in ((0, (45, 45)), (1, (41, 4))):
        parts = task_of(configured(tmp_path, epoch=epochs)).parts
        assert (len(parts["train"]), len(parts["validation"])) == expected
        assert len(parts["test"]) == 15


def test_channels_are_standardised_by_the_training_sequences(mine, tmp_path):
    task = task_of(configured(tmp_path))
    own = [x[:n] for x, n in zip(mine["x"], mine["lengths"], strict=True)]
    mean, deviation = np.concatenate(own).mean(0), np.concatenate(own).std(0)
    for part, x, lengths in (("train", "x", "lengths"), ("test", "x_test", "lengths_test")):
        for index, (sequence, _) in enumerate(task.parts[part]):
            expected = (mine[x][index, : mine[lengths][index]] - mean) / deviation
            np.testing.assert_allclose(sequence.numpy(), expected, atol=1e-4)


def test_a_channel_that_never_changes_is_zero(tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 5, 2))
    x[..., 1] = 3.0
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(8) % 2)
    for sequence, _ in task_of(configured(tmp_path)).parts["train"]:
        assert not sequence[:, 1].any()


@pytest.mark.parametrize(
    ("key", "factor", "message"),
    [
        ("x", 0.0, "no training sequence ever changes"),
        ("x", 1e300, "the numbers of a channel are too large to be squared"),
        ("x_test", 1e300, "sample 0 of the test data has a number of the size "),
    ],
)
def test_numbers_that_cannot_be_standardised_are_refused(mine, tmp_path, key, factor, message):
    np.savez(tmp_path / "mine.npz", **{**mine, key: mine[key] * factor})
    assert message in refusal(task_of, configured(tmp_path))


@pytest.mark.parametrize(("offset", "factor"), [(1e8, 1.0), (0.0, 1e37), (0.0, 1e150)])
def test_large_numbers_are_standardised_alike(mine, tmp_path, offset, factor):
    expected = task_of(configured(tmp_path)).parts["test"]
    moved = {key: mine[key] * factor + offset for key in ("x", "x_test")}
    np.savez(tmp_path / "mine.npz", **{**mine, **moved})
    for (sequence, _), (other, _) in zip(
        task_of(configured(tmp_path)).parts["test"], expected, strict=True
    ):
        assert sequence.dtype == torch.float32
        torch.testing.assert_close(sequence, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("slope", "start", "steps"),
    [(1.0, 0.0, 60), (1 / 60, 0.3, 60), (-1e5, 7.0, 60), (1.0, 1.7e9, 60), (1 / 60, 0.3, 2048)],
)
def test_changes_that_differ_by_rounding_alone_become_0(slope, start, steps):
    """As of a counter of steps, or of a clock."""
    bent, half = torch.arange(steps, dtype=torch.float64)[:, None] * slope + start, steps // 2
    steady, bent[half:] = bent.clone(), bent[half:] * 1.00001  # the second has one real change
    preparation = prepare_series([steady] * 9, TimeSeriesHyperparameters())
    x, _ = preparation([steady])
    assert x[0, 0, 0] * x[-1, 0, 0] < -2
    assert not x[..., 1].any()
    found = prepare_series([bent] * 9, TimeSeriesHyperparameters()).change
    exact = np.diff(((bent - bent.mean()) / bent.std(correction=0)).numpy(), axis=0).std()
    np.testing.assert_allclose(found, [exact], rtol=0.1)


STARTS, STEP, NOISE = np.linspace(-60, 60, 40)[:, None], np.arange(50.0), np.random.default_rng(0)


@pytest.mark.parametrize(
    "values",
    [
        STARTS + 9e-6 * NOISE.normal(size=(40, 50)).cumsum(1),  # a walk on the globe, in degrees
        STARTS + 9e-6 * NOISE.normal(20, 1, (40, 50)).cumsum(1),
        1.7e9 + 86400 * STARTS + np.where(STARTS > 0, 2, 1) * STEP,
        np.where(STARTS > 0, 1.0001, 1) * STEP / 60,
        50 + 2e-3 * NOISE.normal(size=(40, 2000)).cumsum(1) + np.arange(2000),
        STARTS.repeat(50, 1),
    ],
    ids=["walks", "drifts", "Unix times", "clocks", "counters", "constants"],
)
def test_changes_are_input_however_small_they_are_beside_the_values(values):
    series = [torch.from_numpy(one)[:, None] for one in values]
    found = prepare_series(series, TimeSeriesHyperparameters()).change.item()
    exact = np.diff(values / values.std(), axis=1).std()
    assert found == pytest.approx(exact or 1, rel=0.1)


@pytest.mark.filterwarnings("error")
def test_sequences_of_a_single_step_have_no_changes(tmp_path):
    np.savez(tmp_path / "mine.npz", x=np.arange(8.0)[:, None], y=np.arange(8) % 2)
    task = task_of(configured(tmp_path))
    batch = next(task.batches("validation"))
    assert batch.x.shape == (1, 8, 2)
    assert not batch.x[..., 1].any()


def test_time_and_channels_in_the_wrong_order_are_warned_of(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(8, 2, 40)), np.arange(8) % 2
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    with pytest.warns(UserWarning, match=r"40 channels and at most 2 steps: are time and channels"):
        task_of(configured(tmp_path))


def test_long_sequences_are_averaged_over_blocks(mine, tmp_path):
    whole = task_of(configured(tmp_path))
    assert whole.preparation.steps == mine["lengths"][:45].max()
    blocks = task_of(configured(tmp_path, length=7))  # blocks of three steps
    assert blocks.preparation.steps == -(-whole.preparation.steps // 3) <= 7
    for (long, _), (short, _) in zip(whole.parts["test"], blocks.parts["test"], strict=True):
        expected = [long[begin : begin + 3].mean(0) for begin in range(0, len(long), 3)]
        torch.testing.assert_close(short, torch.stack(expected))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_network_sees_the_channels_and_steps_that_the_task_says(mine, tmp_path, encoding):
    channels = ENCODINGS[encoding]
    plain = next(task_of(configured(tmp_path)).batches("test"))
    task = task_of(configured(tmp_path, encoding=encoding))
    batch = next(task.batches("test"))
    assert batch.x.shape == (len(plain.x), len(plain.x[0]), channels)
    assert torch.equal(batch.lengths, plain.lengths)
    assert task.preparation.inputs == channels
    assert task.preparation.steps == mine["lengths"][:45].max()
    assert task.classes == ["0", "1", "2"]


def test_the_network_sees_values_beside_their_changes(mine, tmp_path):
    task = task_of(configured(tmp_path))
    x, lengths = task.preparation(
        [x[:n] for x, n in zip(mine["x_test"], mine["lengths_test"], strict=True)]
    )
    values = [sequence.numpy() for sequence, _ in task.parts["train"]]
    deviation = np.concatenate([np.diff(one, axis=0) for one in values]).std(0)
    for index, (sequence, _) in enumerate(task.parts["test"]):
        own = x[: lengths[index], index].numpy()
        np.testing.assert_array_equal(own[:, :3], sequence)
        assert not own[0, 3:].any()
        np.testing.assert_allclose(own[1:, 3:], np.diff(sequence, axis=0) / deviation, atol=1e-5)


def test_an_event_of_a_series_is_a_change_by_the_threshold_of_the_settings(mine, tmp_path):
    plain = next(task_of(configured(tmp_path)).batches("test"))
    for threshold in (0.5, 2.0):
        task = task_of(configured(tmp_path, encoding="delta", threshold=threshold))
        batch = next(task.batches("test"))
        rises, falls = batch.x.split(3, 2)
        told = threshold * (rises - falls).cumsum(0)
        for number, length in enumerate(batch.lengths):
            apart = (told - plain.x[..., :3])[:length, number].abs()
            assert threshold / 2 < apart.max() <= threshold * (1 + 1e-4)


def test_missing_values_are_filled_if_the_settings_say_so(mine, tmp_path):
    mine["x"][0, 1, 0] = np.nan
    np.savez(tmp_path / "mine.npz", **mine)
    config = configured(tmp_path)
    assert "missing=interpolate fills them" in refusal(task_of, config)
    config.missing = "interpolate"
    before, filled, after = task_of(config).parts["train"][0][0][:3, 0]
    torch.testing.assert_close(filled, (before + after) / 2)


def test_first_weights_see_every_training_sequence_as_it_is(mine, tmp_path):
    config = configured(tmp_path, epoch=1)
    config.augmentation.noise = 1.0
    task = task_of(config)
    shown = [
        (batch.x[:length, index, :3], batch.y[index])
        for batch in task.training_sequences()
        for index, length in enumerate(batch.lengths)
    ]
    assert len(shown) == 41
    for number, (own, label) in enumerate(shown):
        sequence, target = task.parts["train"][number]
        assert torch.equal(own, sequence)
        assert label == target


@pytest.mark.parametrize("most", [64, 10])
def test_the_sample_for_first_weights_is_from_all_over_the_training_sequences(
    mine, tmp_path, monkeypatch, most
):
    monkeypatch.setattr("snn_lib.tasks.time_series.SAMPLE", most)
    task = task_of(configured(tmp_path))
    sequences = [sequence for sequence, _ in task.parts["train"]]
    sample, lengths = task.sample()
    numbers = []
    for number, length in enumerate(lengths):
        own = sample[:length, number, :3]
        (found,) = [k for k, x in enumerate(sequences) if x.shape == own.shape and (x == own).all()]
        numbers.append(found)
    assert len(set(numbers)) == len(numbers)
    assert min(most, len(sequences)) / 2 < len(numbers) <= most
    for part in range(4):  # each quarter of the set has its share
        inside = sum(part * 45 <= 4 * number < (part + 1) * 45 for number in numbers)
        assert abs(inside - len(numbers) / 4) < 1.5


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_slowest_filters_of_a_long_series_are_as_drawn(epoch):
    settings = TimeSeriesHyperparameters(length=8192, epoch=epoch)
    preparation = prepare_series([torch.randn(8192, 1, dtype=torch.float64)], settings)
    torch.manual_seed(0)
    network = build_network(settings, preparation, 2)
    periods = 2 * torch.pi / network[1].poles().angle().abs()
    assert periods.max() == pytest.approx(8192, rel=0.2)  # one cycle in the series
    for filters in (network[1], network[4]):  # where they are trained, the edge is near enough
        apart = (filters.effective_alpha() - filters.alpha).abs().max()
        assert apart <= (2e-5 if epoch else 0.0)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_layer_fires_and_padding_changes_nothing(mine, tmp_path, encoding):
    config = configured(tmp_path, encoding=encoding)
    task = task_of(config)
    torch.manual_seed(0)
    model = time_series.build_model(config, task)
    with torch.no_grad():
        time_series.initialise(model, task)
    model.eval()
    batch = next(task.batches("test"))
    with torch.no_grad():
        outputs, _ = model.layerwise(batch.x)
        padding = torch.randn(5, *batch.x.shape[1:])
        longer = batch._replace(x=torch.cat([batch.x, padding]))
        logits, same = (task.logits(model(b.x)[0], b) for b in (batch, longer))
    for layer, output in zip(model, outputs, strict=True):
        if isinstance(layer, SpikingNeuron):
            assert 0.2 < output.mean() < 0.6
    assert logits.shape == (15, 3)
    torch.testing.assert_close(logits, same)
    assert (logits.argmax(1) == batch.y).float().mean() > 0.6  # chance is 0.33


def script(folder, action, *overrides):
    settings = ["name=mine", "device=cpu", f"runs_path={folder}/runs", *overrides]
    options = {"model": time_series.build_model, "initialise": time_series.initialise}
    options |= {"task": TimeSeries(), "script": ROOT / "time_series.py"}
    return run(action, *settings, **options)


def test_an_npz_of_one_s_own_is_learned_and_tested_to_the_same_accuracy(mine, tmp_path):
    data = f"dataset={tmp_path}/mine.npz"
    trained = script(tmp_path, "--train", data, "hyperparameters.epoch=3")
    steps = mine["lengths"].min(), mine["lengths"].max()
    contents = f"sequences 45 to train, 15 to test; steps {steps[0]} to {steps[1]}"
    assert f"{tmp_path}/mine.npz: {contents}; channels 3; classes 3\n" in trained.out
    tested = script(tmp_path, "--test", "test_checkpoint_path=''")
    assert accuracy(trained) == accuracy(tested) > 80  # chance is 33
    assert re.search(r"[\d,]+ spikes and [\d,]+ synaptic operations per sequence", tested.out)


OTHER_CLASSES = "learned the classes ['0', '1', '2'], and the data has ['b', 'c', 'd']: give it"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"x": lambda x: 1000 * x}, "mine.npz has another mean and deviation than the data"),
        ({"x": lambda x: x + 1}, "mine.npz has another mean and deviation than the data"),
        (dict.fromkeys(["y", "y_test"], lambda y: np.array(["d", "b", "c"])[y]), OTHER_CLASSES),
        # Another order rounds the mean otherwise, and the network is tested on whatever is there.
        ({"x": lambda x: x[::-1], "y": lambda y: y[::-1], "x_test": lambda x: x + 1}, None),
    ],
)
def test_a_network_is_tested_and_resumed_on_the_data_that_it_has_learned_from(
    mine, tmp_path, change, what
):
    mine["x"] -= mine["x"].mean((0, 1))  # so that the mean is rounding alone
    for part in ("lengths", "lengths_test"):
        mine.pop(part)
    np.savez(tmp_path / "mine.npz", **mine)
    script(tmp_path, "--train", f"dataset={tmp_path}/mine.npz", "hyperparameters.epoch=1")
    changed = {part: new(mine[part]) for part, new in change.items()}
    np.savez(tmp_path / "mine.npz", **mine | changed)
    for command in (["--test", "test_checkpoint_path=''"], ["--train", "--resume"]):
        finished = script(tmp_path, *command)
        if what:
            assert what in finished.err
        assert finished.code == (2 if what else 0)
    if what is None:
        shorter = script(tmp_path, "--test", "test_checkpoint_path=''", "hyperparameters.length=9")
        assert shorter.code == 0


def test_a_network_is_given_the_changes_of_a_channel_as_in_its_training(tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 30, 2))
    x[..., 1] = np.arange(30)
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(8) % 2)
    task = task_of(configured(tmp_path))
    saved = task.preparation.to_dict()
    for before in ([9.0, 1.0], [math.inf, math.inf], [9.0, 3e-8]):
        earlier = {"preparation": {**saved, "change": torch.tensor(before)}}
        words = refusal(task.check_data, earlier)
        assert words.startswith("a channel rises or falls evenly in")
    task.check_data({"preparation": {**saved, "change": torch.tensor([9.0, math.inf])}})
    task.check_data({"preparation": saved})
    task_of(configured(tmp_path, encoding="population")).check_data(earlier)


def test_each_training_sequence_is_validated_by_a_fit_without_it(tmp_path):
    x = np.random.default_rng(1).normal(size=(45, STEPS, 3))  # which says nothing of the classes
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(45) % 3)
    finished = script(tmp_path, "--train", f"dataset={tmp_path}/mine.npz")
    (shown,) = re.findall(
        r"trained without epochs: validation .*?accuracy ([\d.]+) %", finished.out
    )
    (best,) = tmp_path.glob("runs/mine/*/best")
    network = snn_lib.load(best)
    with torch.no_grad():
        features = network.model[:-1](network.prepare(x).x)[0].mean(0)
    y = torch.arange(45) % 3
    signs = 2.0 * torch.nn.functional.one_hot(y) - 1
    right = ridge_regression(features, signs).leave_one_out.argmax(1) == y
    assert float(shown) == pytest.approx(100 * right.double().mean().item(), abs=0.01)
    assert (network.answer(x).argmax(1) == y).sum() > right.sum() + 10  # learned by heart


def test_the_best_checkpoint_of_a_fit_holds_rounded_weights(mine, tmp_path):
    script(tmp_path, "--train", f"dataset={tmp_path}/mine.npz", "hyperparameters.weight_bits=2")
    (best,) = tmp_path.glob("runs/mine/*/best")
    weights = [w for w in load(best)["snn_state_dict"].values() if w.dim() == 2 and len(w) == 3]
    assert weights
    assert all(len(row.unique()) <= 3 for row in weights[-1])


def test_weights_that_nothing_would_train_are_refused(mine, tmp_path):
    data = f"dataset={tmp_path}/mine.npz"
    script(tmp_path, "--train", data, "hyperparameters.epoch=1")
    (folder,) = tmp_path.glob("runs/mine/*")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for given in (["--resume", "hyperparameters.epoch=0"], [data, "first_weights=best"]):
        finished = script(tmp_path, "--train", *given)
        assert finished.code == 2
        why = "hyperparameters.epoch is 0, so nothing would be trained from these weights: set"
        assert why in finished.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_installed_command_trains_tests_and_loads(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def accuracy_of(*arguments, run=run_script):
        done = run("snn_lib/time_series.py", *arguments)
        assert done.err == ""
        return accuracy(done)

    def installed(_, *arguments):
        return shell(sys.executable, "-m", "snn_lib.time_series", *arguments, cwd=tmp_path)

    Path("mine.npz").rename("0123.npz")  # which YAML would take for the number 83
    accuracy_of("--train", "0123.npz", "hyperparameters.neurons=8", "device=cpu")
    assert len([*tmp_path.glob("runs/0123/*/best")]) == 1
    Path("0123.npz").rename("my #2.npz")  # where YAML would take the end for a comment
    found = accuracy_of("my #2.npz", "hyperparameters.neurons=64", "device=cpu", run=installed)
    assert found > 60  # chance is 33
    assert accuracy_of("--test", "my #2.npz", "device=cpu") == found
    assert installed("", "my #2.npz", "--export=mine.c").code == 0
    assert Path("mine.c").exists()
    (best,) = tmp_path.glob("runs/my__2/*/best")
    names, scores = snn_lib.load(best).classify([mine["x_test"][0]])
    assert names[0] in {"0", "1", "2"}
    assert scores.shape == (1, 3)
    Path("my #2.npz").rename("other.npz")  # by whose name there is no run
    arguments = "--test", f"test_checkpoint_path={best}", "other.npz", "device=cpu"
    assert accuracy_of(*arguments) == found


DATA = "dataset=a_TRAIN.ts"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a_TRAIN.ts", f"{DATA} --train name=a"),
        ("device=cpu a_TRAIN.ts", f"{DATA} --train name=a device=cpu"),
        ("--train a_TRAIN.ts --resume", f"{DATA} --train name=a --train --resume"),
        ("a_TRAIN.ts --resume seed=2", f"{DATA} --train name=a --resume seed=2"),
        ("a_TRAIN.ts --resume best", f"{DATA} --train --resume best"),
        ("--train --resume best a_TRAIN.ts", f"{DATA} --train --train --resume best"),
        ("--resume=best a_TRAIN.ts", f"{DATA} --train --resume=best"),
        ("--config_file b.yaml a_TRAIN.ts", f"{DATA} --train name=a --config_file b.yaml"),
        ("a_TRAIN.ts --test", f"{DATA} name=a --test"),
        ("a_TRAIN.ts test_checkpoint_path=''", f"{DATA} --train name=a test_checkpoint_path=''"),
        ("--test test_checkpoint_path=best a_TRAIN.ts", f"{DATA} --test test_checkpoint_path=best"),
        ("--export a.c a_TRAIN.ts", "name=a --export a.c"),
        ("a_TRAIN.ts --export=a.c", "name=a --export=a.c"),
        ("a_TRAIN.ts a.npz", f"{DATA} --train name=a a.npz"),  # which is refused
        ("--config_file c seed=2 c", "dataset=c --train name=c --config_file c seed=2"),
        ("--help a_TRAIN.ts", f"{DATA} --train name=a --help"),
        ("--help", "--help"),
        ("seed=3", "--train dataset= seed=3"),
        ("dataset=b best", "--train dataset= dataset=b best"),  # which is refused
        ("--test dataset=b best", "--test dataset=b best"),
        (
            "a_TRAIN.ts test_checkpoint_path=best test_checkpoint_path=",
            f"{DATA} --train name=a test_checkpoint_path=best test_checkpoint_path=",
        ),
    ],
)
def test_the_data_is_found_among_the_words_and_names_a_run_that_has_no_name(words, expected):
    assert complete(words.split()) == expected.split()


def test_options_that_have_a_value_are_known():
    options = command_line._parser(Path("mine.py"))._actions
    valued = {one.option_strings[0] for one in options if one.option_strings and one.nargs != 0}
    assert valued == set(VALUED)


def test_the_installed_command_without_data_asks_for_data(tmp_path):
    command = "-m", "snn_lib.time_series", "hyperparameters.neurons=8"
    done = shell(sys.executable, *command, cwd=tmp_path)
    assert not any(tmp_path.iterdir())
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "snn_lib.time_series: no data set is named: give an .npz file, NAME_TRAIN.ts or the name "
        "of an archive set, such as mine.npz or GunPoint\n"
    )


def test_the_yaml_file_and_the_installed_command_have_one_recipe():
    given = load_config(TimeSeriesConfig, ROOT / "time_series.yaml", []).hyperparameters
    assert given == TimeSeriesHyperparameters()


def test_mean_and_deviation_keep_their_digits():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(500, 3)) * [1, 1e37, 0] + [1e8, 0, 0.1]
    sequences = [torch.from_numpy(part) for part in np.split(values, [100, 101, 400])]
    found = prepare_series(sequences, TimeSeriesHyperparameters())
    mean, deviation = found.mean, found.deviation
    exact = values.astype(object)  # Python's own integers and floats, one by one
    for channel in range(2):
        column = [Fraction(value) for value in exact[:, channel]]
        expected = sum(column) / 500
        variance = sum((value - expected) ** 2 for value in column) / 500
        assert mean[channel].item() == pytest.approx(float(expected), rel=1e-15)
        root = Decimal(variance.numerator) / Decimal(variance.denominator)
        assert deviation[channel].item() == pytest.approx(float(root.sqrt()), rel=1e-8)
    assert (mean[2], deviation[2]) == (0.1, 1)  # it never changes, so it is only centred
    assert found.change[2] == 1

import csv
import itertools
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import running
import torch
from running import ROOT, YAML, Answer, prepared, run_script
from scipy import signal
from torch import nn

from associative_memory import SNN
from snn_lib import DualExponentialSynapse, ResonantSynapse, load
from snn_lib.data.batches import Batch
from snn_lib.data.patterns import DAMAGE_KINDS, Damage, single_damage
from snn_lib.errors import SettingsError
from snn_lib.tasks.association import Association, AssociationConfig, write_sweep
from snn_lib.training.checkpoints import load_checkpoint, load_weights
from snn_lib.training.config import config_from_dict, load_config

SCRIPT = ROOT / "associative_memory.py"
STEPS, TRAINS, PATTERNS = 24, 300, 3  # the script's network has 300 inputs
task_of = partial(prepared, Association)
NO_DAMAGE = Damage(modify_probability=0.0, block_size=0, rows_removed=0, noise_probability=0.0)


@pytest.fixture(scope="module")
def pattern_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("patterns") / "patterns.npy"
    array = np.random.default_rng(0).random((PATTERNS, TRAINS, STEPS)) < 0.05
    np.save(path, array.astype(np.uint8))
    return path


@pytest.fixture
def config(pattern_file):
    config = AssociationConfig(
        name="tiny", dataset_path=str(pattern_file), test_checkpoint_path="unused"
    )
    options = config.hyperparameters
    options.length, options.batch_size, options.delay = STEPS, 8, 4
    config.pattern_config.training_samples = 7
    config.pattern_config.validation_samples = 2
    config.pattern_config.test_samples = 3
    config.damage = Damage(block_size=5, rows_removed=5)
    return config


@pytest.fixture
def task(config):
    return task_of(config)


def output_filter(x, tau_m=8.0, tau_s=2.0):
    """v0 (m[t] - s[t]) along the first axis."""
    eta = tau_m / tau_s
    v0 = eta ** (eta / (eta - 1)) / (eta - 1)
    m, s = (signal.lfilter([1.0], [1.0, -math.exp(-1 / tau)], x, axis=0) for tau in (tau_m, tau_s))
    return v0 * (m - s)


def random_output(labels, rate=0.05):
    generator = torch.Generator().manual_seed(3)
    return (torch.rand(STEPS, len(labels), TRAINS, generator=generator) < rate).float()


def assert_same_batches(batches, others):
    for (x, labels, _), (other_x, other_labels, _) in zip(batches, others, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(labels, other_labels)


def test_the_size_of_a_batch_decides_on_no_sample_of_validation_and_test(config):
    config.pattern_config.validation_samples = config.pattern_config.test_samples = 20
    found = task_of(config)
    larger = replace(config.hyperparameters, batch_size=40)
    other = task_of(replace(config, hyperparameters=larger))
    for split in ("validation", "test"):
        assert_same_batches(found.batches(split), other.batches(split))
        assert len(next(found.batches(split)).y) == 32  # as in the published figures
    cut, model = Damage(block_size=5), _repeat_late(found)
    assert found.measure(model, cut) == other.measure(model, cut)


def test_targets_are_the_patterns_after_the_delay(task, pattern_file):
    patterns = np.load(pattern_file).transpose(2, 0, 1)
    np.testing.assert_array_equal(task.patterns, patterns)
    np.testing.assert_array_equal(task.targets[4:], patterns[:-4])
    assert not task.targets[:4].any()


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_power_are_mean_squares_behind_the_output_filter(task, autocast):
    labels = torch.tensor([2, 0, 1, 2])
    output = random_output(labels).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, sums = task.loss(Answer(output), Batch(task.patterns[:, labels], labels))
    target = task.targets[:, labels].double().numpy()
    filtered, wanted = output_filter(output.detach().double().numpy()), output_filter(target)
    expected = np.square(filtered - wanted).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert float(sums["loss"]) == pytest.approx(4 * expected, rel=1e-5)
    assert float(sums["power"]) == pytest.approx(4 * np.square(wanted).mean(), rel=1e-5)
    loss.backward()
    assert output.grad.abs().sum() > 0


def test_metrics_of_the_target_itself_of_silence_and_of_wrong_patterns(task):
    labels = torch.tensor([0, 1, 2, 1])
    batch = Batch(task.patterns[:, labels], labels)

    def metrics(output):
        return task.metrics({k: float(v) for k, v in task.loss(Answer(output), batch)[1].items()})

    ideal = {"loss": 0, "error": 0, "retrieval": 1, "precision": 1, "recall": 1, "f1": 1}
    assert metrics(task.targets[:, labels]) == ideal
    silent = metrics(torch.zeros_like(batch.x))
    assert silent["error"] == pytest.approx(1.0)
    wanted = output_filter(task.targets[:, labels].double().numpy())
    assert silent["loss"] == pytest.approx(np.square(wanted).mean(), rel=1e-5)
    assert silent["f1"] == silent["precision"] == silent["recall"] == 0
    half_right = metrics(task.targets[:, torch.tensor([0, 1, 1, 2])])
    assert half_right["retrieval"] == 0.5
    half_fired = task.targets[:, labels].clone()
    half_fired[:, ::2] = 0
    half_fired = metrics(half_fired)
    assert half_fired["precision"] == 1
    share = task.targets[:, labels[1::2]].sum() / task.targets[:, labels].sum()
    assert half_fired["recall"] == pytest.approx(share.item())


def test_sums_of_several_batches_give_the_metrics_of_all_samples(task):
    labels = torch.arange(12) % PATTERNS
    output = random_output(labels)

    def sums(part):
        batch = Batch(task.patterns[:, labels[part]], labels[part])
        result = task.loss(Answer(output[:, part]), batch)[1]
        return {key: float(value) for key, value in result.items()}

    one, other = sums(slice(0, 5)), sums(slice(5, 12))
    whole = task.metrics(sums(slice(0, 12)))
    assert task.metrics({k: one[k] + other[k] for k in one}) == pytest.approx(whole, rel=1e-5)


def test_the_best_epoch_is_that_of_the_lowest_loss(task):
    assert task.score({"loss": 0.1, "retrieval": 0.5}) > task.score({"loss": 0.2, "retrieval": 1})


def test_an_epoch_shows_each_pattern_equally_often_in_new_order(task):
    epochs = [torch.cat([labels for _, labels, _ in task.batches("train", e, 0)]) for e in (0, 1)]
    for labels in epochs:
        assert labels.bincount().tolist() == [7] * PATTERNS
    assert not torch.equal(*epochs)
    sizes = [len(labels) for _, labels, _ in task.batches("train")]
    assert sizes == [8, 8, 5]
    assert len(task.split("train")) == 3


def test_batches_are_reproducible_and_continue_anywhere(config, task):
    again = task_of(config)
    batches = list(task.batches("train", 4, 0))
    assert_same_batches(batches, again.batches("train", 4, 0))
    for start in range(4):
        assert_same_batches(batches[start:], again.batches("train", 4, start))
    for other in (next(task.batches("train", 5, 0)), batches[1]):
        assert not torch.equal(batches[0][0], other[0])
    other_seed = task_of(replace(config, seed=config.seed + 1))
    assert not torch.equal(batches[0][0], next(other_seed.batches("train", 4, 0))[0])


def test_samples_are_the_patterns_where_nothing_damages_them(config):
    task = task_of(replace(config, damage=NO_DAMAGE))
    for x, labels, _ in task.batches("train"):
        assert torch.equal(x, task.patterns[:, labels])


def test_the_batches_of_all_epochs_and_seeds_are_damaged_independently(config):
    silenced = replace(
        NO_DAMAGE,
        modify_probability=0.5,
        removal_probability=1.0,
        block_probability=0.0,
        rows_removed=TRAINS,
    )
    shown = []
    for seed, epoch in (2, 0), (2, 1), (3, 0):
        task = task_of(replace(config, damage=silenced, seed=seed))
        shown += [x.any(2).any(0) for x, *_ in task.batches("train", epoch)]  # (B,) each
    for one, other in itertools.combinations(shown, 2):
        assert not torch.equal(one, other)


def test_the_damage_that_is_measured_follows_the_seed(config):
    seen, model = [], nn.Identity()
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for seed in 2, 2, 3:
        task_of(replace(config, seed=seed)).measure(model, config.damage, 2)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(("split", "samples"), [("validation", 2), ("test", 3)])
def test_evaluation_samples_are_the_same_every_time(config, task, split, samples):
    batches = list(task.batches(split))
    list(task.batches("train"))
    assert_same_batches(batches, task.batches(split))
    assert_same_batches(batches, task_of(config).batches(split))
    labels = torch.cat([labels for _, labels, _ in batches])
    assert labels.bincount().tolist() == [samples] * PATTERNS


def test_validation_test_and_training_samples_are_damaged_differently(config):
    config.pattern_config.validation_samples = config.pattern_config.test_samples
    task = task_of(config)
    validation, test = (next(task.batches(s))[0] for s in ("validation", "test"))
    assert not torch.equal(validation, test)
    assert not torch.equal(validation, next(task.batches("train"))[0])
    for split in ("train", "validation", "test"):
        assert any((x != task.patterns[:, labels]).any() for x, labels, _ in task.batches(split))


def test_processes_share_every_batch(config, task):
    world = 3
    shares = [list(task_of(config, rank, world).batches("train", 1, 0)) for rank in range(world)]
    for number, (x, labels, _) in enumerate(task.batches("train", 1, 0)):
        for rank, share in enumerate(shares):
            assert torch.equal(share[number][0], x[:, rank::world])
            assert torch.equal(share[number][1], labels[rank::world])


def test_sweep_has_a_row_for_each_kind_and_strength_that_fits(task, monkeypatch):
    fitting = {
        "rows_removed": [0, 150, TRAINS],
        "block_size": [0, STEPS],
        "jitter_sigma": [0, 1000],
        "noise_probability": [0, 1],
    }
    too_many = {"rows_removed": [TRAINS + 1], "block_size": [STEPS + 1]}
    for kind, values in DAMAGE_KINDS.items():
        strengths = (*fitting[kind], *too_many.get(kind, []))
        monkeypatch.setitem(DAMAGE_KINDS, kind, replace(values, strengths=strengths))
    rows = task.sweep(_repeat_late(task), samples=2)
    assert [(r["damage"], r["strength"]) for r in rows] == [
        (kind, strength) for kind in DAMAGE_KINDS for strength in fitting[kind]
    ]
    for row in rows:
        if row["strength"] == 0:
            assert row["error"] == 0
            assert row["f1"] == row["retrieval"] == 1


def test_a_sweep_shows_each_sample_its_own_damage_and_so_many_samples(task, monkeypatch):
    values = replace(DAMAGE_KINDS["rows_removed"], strengths=(150,))
    monkeypatch.setattr("snn_lib.tasks.association.DAMAGE_KINDS", {"rows_removed": values})
    task.patterns, shown = torch.ones_like(task.patterns), []

    def model(x):
        shown.append(x.any(0))  # which trains are left, (B, trains)
        return x

    model.eval = lambda: None
    task.sweep(model, samples=30)
    together = torch.cat(shown)
    assert len(together) == 30 * PATTERNS
    assert len(together.unique(dim=0)) == len(together)


def test_sweep_damages_in_one_way_and_as_strongly_as_it_says(task):
    rows = {(r["damage"], r["strength"]): r for r in task.sweep(_repeat_late(task), samples=10)}
    for removed in DAMAGE_KINDS["rows_removed"].strengths:
        row = rows["rows_removed", removed]
        assert row["precision"] == 1
        assert row["recall"] == pytest.approx(1 - removed / TRAINS, abs=0.03)
    # Spikes per cell: 5 % of the pattern's, and noise, of which some hits a spike's cell.
    noisy = rows["noise_probability", 0.08]
    assert noisy["recall"] == 1
    assert noisy["error"] > rows["noise_probability", 0.04]["error"] > 0
    assert rows["jitter_sigma", 8]["f1"] < rows["jitter_sigma", 2]["f1"] < 1


def test_the_part_cut_out_and_the_late_steps_are_measured_by_themselves(
    config, pattern_file, tmp_path
):
    config.hyperparameters.length = 80
    array = np.random.default_rng(1).random((PATTERNS, TRAINS, 80)) < 0.05
    config.dataset_path = str(tmp_path / "longer.npy")
    np.save(config.dataset_path, array)
    task = task_of(config)
    cut = single_damage("block_size", 30)
    alone = task.measure(_repeat_late(task), cut, samples=2)
    assert (alone["part_precision"], alone["part_recall"]) == (0, 0)
    assert alone["precision"] == 1
    late = torch.cat([torch.zeros(50, 2 * PATTERNS, TRAINS), task.targets[50:].repeat(1, 2, 1)])
    whole = task.measure(Answer(task.targets.repeat(1, 2, 1)), cut, samples=2)
    assert (whole["part_precision"], whole["part_recall"], whole["late_error"]) == (1, 1, 0)

    unhurt = task.measure(Answer(late), NO_DAMAGE, samples=2)
    assert "part_recall" not in unhurt
    # What the silent steps have missed is still in the filter for a while.
    wanted = output_filter(task.targets.double().numpy())
    missed = output_filter((task.targets - late[:, :PATTERNS]).double().numpy())
    expected = np.square(missed[50:]).sum() / np.square(wanted[50:]).sum()
    assert unhurt["late_error"] == pytest.approx(expected, rel=1e-4)
    assert unhurt["late_error"] < unhurt["error"] / 2


def _repeat_late(task):
    """A model that answers with its input four steps later."""

    class Delay(torch.nn.Module):
        def forward(self, x):
            return torch.cat([torch.zeros(4, *x.shape[1:]), x[:-4]]), ()

    return Delay()


class Doubled(Association):
    """Its input is twice the patterns, and its loss has a sum of its own."""

    def encode(self, batch):
        return batch._replace(x=2 * batch.x)

    def loss(self, model, batch):
        loss, sums = super().loss(model, batch)
        return loss, {**sums, "more": 1.0}

    def metrics(self, sums):
        return {**super().metrics(sums), "more": sums["more"]}


def test_a_sweep_gives_the_network_what_it_was_trained_on(config):
    own, plain = Doubled(), Association()
    for task in (own, plain):
        task.setup(config, torch.device("cpu"))
        task.share(0, 1)
    model = nn.Linear(plain.patterns.shape[2], plain.patterns.shape[2])
    doubled = nn.Sequential(Double(), model)
    cut = single_damage("block_size", 5)
    found, expected = own.measure(model, cut, 2), plain.measure(doubled, cut, 2)
    assert found == expected


class Counting(Doubled):
    def compare(self, output, difference, labels):
        return {**super().compare(output, difference, labels), "more": output.sum()}


def test_metrics_of_ones_own_read_the_sums_of_ones_own_comparison(config):
    task = Counting()
    task.setup(config, torch.device("cpu"))
    width = task.patterns.shape[2]
    assert "more" in task.measure(nn.Linear(width, width), single_damage("block_size", 5), 2)


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def test_sweep_is_written_as_table_and_picture(task, tmp_path):
    rows = task.sweep(_repeat_late(task), samples=1)
    write_sweep(rows, tmp_path / "new", {"rows_removed": 40})
    with open(tmp_path / "new" / "damage_sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    columns = dict.fromkeys(key for row in rows for key in row)
    assert table == [{key: str(row.get(key, "")) for key in columns} for row in rows]
    assert (tmp_path / "new" / "damage_sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_says_what_was_measured(config, tmp_path):
    config.hyperparameters.length = 80
    config.dataset_path, config.runs_path = str(tmp_path / "longer.npy"), str(tmp_path)
    np.save(config.dataset_path, np.random.default_rng(1).random((PATTERNS, TRAINS, 80)) < 0.05)
    task = task_of(config)
    lines = list(task.report(_repeat_late(task), None))
    rows = {(row["damage"], row["strength"]): row for row in task.sweep(_repeat_late(task))}
    rows["damage of the 2020 release", ""] = weak = task.measure(_repeat_late(task), Damage())
    assert weak["error"] != rows["rows_removed", 0]["error"]
    for (kind, strength), row in rows.items():
        begin = f"{kind} {strength:g}: " if strength != "" else f"{kind}: "
        (line,) = (line for line in lines if line.startswith(begin))
        assert f"error {100 * row['error']:.1f} %, " in line
        assert f"error after 50 steps {100 * row['late_error']:.1f} %, " in line
        assert f"retrieval {100 * row['retrieval']:.1f} %" in line
        assert ("removed part" in line) is ("part_recall" in row)
    row = rows["block_size", 40]
    (line,) = (line for line in lines if line.startswith("block_size 40: "))
    assert f"precision in the removed part {100 * row['part_precision']:.1f} %" in line
    assert line.endswith(f"recall in the removed part {100 * row['part_recall']:.1f} %")


def test_the_picture_of_a_report_marks_the_damage_of_the_settings(task, tmp_path, monkeypatch):
    marked = []
    monkeypatch.setattr(
        "snn_lib.tasks.association.write_sweep", lambda rows, folder, damage: marked.append(damage)
    )
    list(task.report(_repeat_late(task), None))
    assert marked == [task.config.damage.strengths()] != [Damage().strengths()]


@pytest.mark.parametrize(
    ("name", "kind", "spread"),
    [
        ("associative_memory", ResonantSynapse, True),
        ("associative_memory_2020", DualExponentialSynapse, False),
    ],
)
def test_each_configuration_has_its_filters_and_its_pretrained_model(name, kind, spread):
    config = load_config(AssociationConfig, YAML[name], [])
    model = SNN(config)
    for synapse in model.layers[::3]:
        assert type(synapse) is kind
        assert (len(synapse.alpha[0].unique()) > 100) == spread
    path = ROOT / config.test_checkpoint_path
    load_weights(model, path)
    own = config_from_dict(AssociationConfig, load_checkpoint(path)["config"], [])
    assert own.hyperparameters.synapse == config.hyperparameters.synapse
    assert own.hyperparameters.delay == config.hyperparameters.delay


def test_first_weights_have_the_gain_of_the_settings(config):
    config.hyperparameters.weight_gain = 3.0
    for layer in SNN(config).layers[1::3]:
        gain = layer.weight.std().item() * layer.in_features**0.5
        assert gain == pytest.approx(3.0, rel=0.02)


def arguments(folder, pattern_file, *overrides):
    return [
        f"dataset_path={pattern_file}",
        f"hyperparameters.length={STEPS}",
        "hyperparameters.epoch=1",
        "hyperparameters.batch_size=4",
        "hyperparameters.precision=float32",
        "pattern_config.training_samples=2",
        "pattern_config.validation_samples=1",
        "pattern_config.test_samples=1",
        "damage.block_size=5",
        "damage.rows_removed=5",
        "device=cpu",
        "test_checkpoint_path=''",
        f"runs_path={folder}/runs",
        *overrides,
    ]


PARTS = {"model": SNN, "task": Association(), "script": SCRIPT}
run, refused = (partial(function, **PARTS) for function in (running.run, running.refused))


def test_script_trains_and_tests(tmp_path, pattern_file):
    options = arguments(tmp_path, pattern_file)
    trained = run_script(SCRIPT.name, "--train", *options)
    assert (trained.code, trained.err) == (0, "")
    metrics = ["loss", "error", "retrieval", "precision", "recall", "f1"]
    line = ", ".join(rf"{name} [\d.]+( %)?" for name in metrics)
    assert re.search(rf"^epoch 1/1: train {line}; validation {line}; ", trained.out, re.MULTILINE)
    assert re.search(
        rf"^best epoch 1: validation {line}; test ({line})$", trained.out, re.MULTILINE
    )
    (table,) = (tmp_path / "runs").glob("*/*/metrics.csv")
    (row,) = csv.DictReader(table.read_text().splitlines())
    network = load(table.parent / "best")
    x = torch.from_numpy(np.load(pattern_file)).movedim(2, 1).float()  # samples first
    assert torch.equal(network.prepare(x).x, x.transpose(0, 1))
    assert {f"{split}_{name}" for split in ("train", "validation") for name in metrics} <= set(row)

    tested = run_script(SCRIPT.name, "--test", *options)
    assert (tested.code, tested.err) == (0, "")
    (of_training,) = re.findall(r"; test (loss .*)", trained.out)
    assert f"epoch 1: test {of_training}\n" in tested.out
    for kind in DAMAGE_KINDS:
        assert f"{kind} 0: error " in tested.out
    folder = tmp_path / "runs" / "associative_memory"
    sweep = list(csv.DictReader((folder / "damage_sweep.csv").read_text().splitlines()))
    assert {row["damage"] for row in sweep} == set(DAMAGE_KINDS)
    assert f"damage sweep in {folder / 'damage_sweep.csv'} and .png\n" in tested.out
    assert (folder / "damage_sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("never", ["modify", "removal", "block"])
def test_patterns_may_be_shorter_than_blocks_that_never_happen(tmp_path, never):
    """The block of the YAML file, whose size has no effect and so cannot be set."""
    np.save(tmp_path / "short.npy", np.random.default_rng(0).random((4, 300, 30)) < 0.1)
    settings = arguments(tmp_path, tmp_path / "short.npy", "hyperparameters.length=30")
    kept = [one for one in settings if not one.startswith("damage.")]
    assert "damage.block_size=5" in settings
    trained = run("--train", *kept, f"damage.{never}_probability=0")
    assert "epoch 1" in trained.out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("damage.block_size=25", "damage: block_size is 25, patterns have 300 trains of 24 steps"),
        ("damage.rows_removed=301", "damage: rows_removed is 301, patterns have 300 trains"),
        ("damage.row_removed=5", "did you mean 'damage.rows_removed'?"),
        ("damage.block_size=large", "block_size"),
        ("hyperparameters.delay=24", "hyperparameters.delay is 24"),
        ("hyperparameters.length=25", "24 time steps, hyperparameters.length is 25"),
        ("dataset_path=absent.npy", "there is no file absent.npy"),
    ],
)
def test_settings_that_do_not_fit_the_patterns_are_refused(
    override, message, tmp_path, pattern_file
):
    assert message in refused("--train", *arguments(tmp_path, pattern_file, override))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "change", [("length", 25), ("delay", 23), ("damage", Damage(block_size=25))]
)
def test_what_does_not_fit_the_patterns_ends_a_trial_and_not_the_sweep(config, change, tmp_path):
    name, value = change
    setattr(config if name == "damage" else config.hyperparameters, name, value)
    early = np.zeros((2, TRAINS, STEPS), np.uint8)
    early[:, :, 2] = 1
    np.save(tmp_path / "early.npy", early)
    config.dataset_path = str(tmp_path / "early.npy")
    with pytest.raises(SettingsError, match=name):
        task_of(config)


@pytest.mark.parametrize(("share", "setting"), [(0, "block_size"), (1, "rows_removed")])
def test_a_size_of_parts_that_are_never_removed_is_refused(share, setting, tmp_path, pattern_file):
    overrides = f"damage.block_probability={share}", f"damage.{setting}=5"
    message = refused("--train", *arguments(tmp_path, pattern_file, *overrides))
    assert message == f"damage.{setting} has no effect with damage.block_probability={share:.1f}"


def test_patterns_of_which_the_delay_leaves_nothing_are_refused(tmp_path):
    array = np.zeros((2, TRAINS, STEPS), np.uint8)
    array[0, :, 0] = array[1, :, -1] = 1  # the second one spikes too late
    np.save(tmp_path / "late.npy", array)
    message = refused("--train", *arguments(tmp_path, tmp_path / "late.npy"))
    assert "late.npy: pattern 1 has no spike that hyperparameters.delay=" in message

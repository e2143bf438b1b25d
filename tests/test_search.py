"""What a sweep searches, and a trial of it."""

import csv
import math
import shlex
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier

import pytest
import torch
import yaml
from refusing import refusal
from running import ROOT, SCRIPTS, YAML
from sweeping import SCRIPT, sweep

from snn_lib import load
from snn_lib.errors import InputError, RunError, WriteError
from snn_lib.files import lock
from snn_lib.sweep import SearchSpace, _choices, open_study, run_trial
from snn_lib.training import checkpoints
from snn_lib.training.checkpoints import load_checkpoint
from snn_lib.training.experiment import Experiment

optuna = pytest.importorskip("optuna")


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    return path


def drawn(script, *settings, trials=200):
    """What so many trials draw, as a dict each."""
    space = SearchSpace(script, None, settings)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [dict(one.split("=") for one in space.draw(study.ask())) for _ in range(trials)]


def test_ranges_are_searched_between_their_ends_and_wide_ones_on_a_logarithmic_scale(script):
    rows = drawn(script, "hyperparameters.tau_m=4..8", "optimizer.Adam.lr=1e-5..1e-1")
    taus = [float(row["hyperparameters.tau_m"]) for row in rows]
    assert 4 <= min(taus) < 4.2
    assert 7.8 < max(taus) <= 8
    assert sum(taus) / len(taus) == pytest.approx(6, abs=0.3)
    decades = [math.log10(float(row["optimizer.Adam.lr"])) for row in rows]
    assert -5 <= min(decades) < -4.8
    assert sum(decades) / len(decades) == pytest.approx(-3, abs=0.3)


@pytest.mark.parametrize(
    ("ends", "logarithmic"), [("1..9.9", False), ("1..10", True), ("3e-5..3e-4", True)]
)
def test_the_scale_of_a_range_that_is_ten_times_as_wide_is_logarithmic(script, ends, logarithmic):
    trial = optuna.create_study().ask()
    space = SearchSpace(script, None, [f"optimizer.Adam.lr={ends}"])
    space.draw(trial)
    assert trial.distributions["optimizer.Adam.lr"].log == logarithmic


def test_draws_stay_in_a_range_that_is_narrow(script):
    rows = drawn(script, "hyperparameters.tau_m=123456.1..123456.9", trials=20)
    taus = {float(row["hyperparameters.tau_m"]) for row in rows}
    assert len(taus) == 20
    assert 123456.1 <= min(taus) < max(taus) <= 123456.9


def test_a_key_may_be_written_in_brackets(script):
    (row,) = drawn(script, "hyperparameters[tau_m]=2..16", trials=1)
    assert 2 <= float(row["hyperparameters.tau_m"]) <= 16


def test_a_setting_whose_value_another_one_takes_is_searched_and_kept(script, tmp_path):
    script.with_suffix(".yaml").write_text(
        "optimizer: {Adam: {lr: '${scheduler.CyclicLR.max_lr}'}}"
    )
    settings = ["scheduler.CyclicLR.max_lr=0.1..0.5", "hyperparameters.epoch=1", "device=cpu"]
    trial = optuna.trial.FixedTrial({"scheduler.CyclicLR.max_lr": 0.25})
    run_trial(trial, SearchSpace(script, None, settings), tmp_path)
    assert "scheduler.CyclicLR.max_lr=0.25" in trial.user_attrs["settings"]


def test_a_file_may_hold_what_counts_with_one_of_the_choices(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {ROOT}/snn_mlp_1.yaml\nlatency: {{span: 3}}")
    encodings = ["hyperparameters.encoding=constant,latency"]
    SearchSpace(ROOT / "snn_mlp_1.py", mine, encodings)
    others = ["hyperparameters.encoding=constant,poisson"]
    said = refusal(SearchSpace, ROOT / "snn_mlp_1.py", mine, others)
    assert "mine.yaml: latency.span has no effect with" in said


def test_a_setting_without_effect_beside_the_others_is_not_among_those_of_a_trial(script, tmp_path):
    settings = ["optimizer.optimizer_choice=Adam,SGD", "optimizer.SGD.momentum=0.5..0.9"]
    settings += ["hyperparameters.epoch=1", "device=cpu"]
    space = SearchSpace(script, None, settings)
    for choice, searched in (("Adam", set()), ("SGD", {"optimizer.SGD.momentum=0.75"})):
        values = {"optimizer.optimizer_choice": choice, "optimizer.SGD.momentum": 0.75}
        trial = optuna.trial.FixedTrial(values)
        run_trial(trial, space, tmp_path)
        kept = {f"optimizer.optimizer_choice={choice}", "hyperparameters.epoch=1"}
        assert set(trial.user_attrs["settings"]) == kept | searched


def test_the_settings_of_the_documented_sweep_count():
    text = (ROOT / "docs" / "sweeps.md").read_text()
    words = shlex.split(text.split("```")[1].replace("\\\n", ""))
    settings = [word for word in words if "=" in word]
    assert len(settings) == 4
    SearchSpace(ROOT / words[3], None, settings)


def test_settings_that_are_whole_numbers_are_searched_as_such(script):
    rows = drawn(script, "hyperparameters.batch_size=2..5", "hyperparameters.epoch=1..64")
    assert {row["hyperparameters.batch_size"] for row in rows} == {"2", "3", "4", "5"}
    epochs = sorted(int(row["hyperparameters.epoch"]) for row in rows)
    assert epochs[0] == 1
    assert 4 < epochs[len(epochs) // 2] < 16  # on a logarithmic scale


def test_choices_are_separated_by_the_commas_outside_of_lists_and_one_alone_is_fixed(script):
    betas = "[0.9,0.99],[0.8,0.9]"
    rows = drawn(script, f"optimizer.Adam.betas={betas}", "seed=3", "runs_path=../..")
    assert {row["optimizer.Adam.betas"] for row in rows} == {"[0.9,0.99]", "[0.8,0.9]"}
    assert {(row["seed"], row["runs_path"]) for row in rows} == {("3", "../..")}


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("a,b,", ["a", "b", ""]),
        ("[[1,2],[3]],[[4]]", ["[[1,2],[3]]", "[[4]]"]),
        ("[[1,2],[3,4]]", ["[[1,2],[3,4]]"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("['a,b', \"c]\"],[d]", ["['a,b', \"c]\"]", "[d]"]),
        ("it's,that's", ["it's", "that's"]),
        ("'tis,b", ["'tis", "b"]),
        ("a],b", ["a]", "b"]),
        ("${oc.select:a,b},{a: 1, b: 2}", ["${oc.select:a,b}", "{a: 1, b: 2}"]),
    ],
)
def test_choices_may_be_lists_of_lists_and_texts_with_commas(text, choices):
    assert _choices(text) == choices


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("hyperparameters.tau=2..4", "unknown key 'hyperparameters.tau', did you mean"),
        ("hyperparameters.tau_m=9..2", "=9..2 is an empty range, expected the lower end first"),
        ("hyperparameters.tau_m=2..2", "=2..2 is an empty range"),
        ("hyperparameters.dropout=0..1", "dropout is 1.0, expected at least 0 and below 1"),
        ("hyperparameters.tau_m=-1..2", "tau_m is -1.0, expected above 0"),
        ("hyperparameters.epoch=1.5..2", "could not be converted to Integer"),
        ("hyperparameters.train_bias=0..1", "is a range, but hyperparameters.train_bias is no num"),
        ("optimizer.optimizer_choice=Adam,Adem,SGD", "Invalid value 'Adem'"),
        ("hyperparameters.tau_m=2..x", "'2..x'"),
        ("epoch", "'epoch': expected key=low..high, key=a,b,c or key=value"),
        ("name=a,b", "name is 'a,b', expected"),
        ("optimizer.SGD.lr=0.1,0.2", "optimizer.SGD.lr has no effect with optimizer.optimizer_"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_a_line(script, setting, message):
    assert message in refusal(SearchSpace, script, None, [setting])


def test_a_choice_may_fit_only_one_choice_of_another_setting(script):
    settings = ["hyperparameters.rate_penalty=0,1", "hyperparameters.target_rate=0,0.1"]
    assert SearchSpace(script, None, settings).config.hyperparameters.target_rate == 0.1


@pytest.mark.parametrize("moments", ["4,16", "16,4"])
def test_choices_may_come_in_any_order(moments):
    """28 steps are none of 16 moments, but of 4."""
    settings = ["hyperparameters.length=28,784", f"hyperparameters.moments={moments}"]
    space = SearchSpace(ROOT / "sequential_mnist.py", None, settings)
    hyper = space.config.hyperparameters
    assert hyper.length % hyper.moments == 0
    assert space.choices["hyperparameters.moments"] == moments.split(",")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["length=28,784", "moments=4,5"], "moments is 5, expected a divisor of the length, 784"),
        (["length=784,28", "moments=5,4"], "moments is 5, expected a divisor of the length, 784"),
        (["tau_m=2..16", "dropout=0,1.5"], "dropout is 1.5, expected at least 0 and below 1"),
        (["dropout=1.5", "tau_m=2..16"], "dropout is 1.5, expected at least 0 and below 1"),
    ],
)
def test_a_choice_that_no_choice_of_the_others_allows_is_refused(settings, message):
    given = [f"hyperparameters.{setting}" for setting in settings]
    assert message in refusal(SearchSpace, ROOT / "sequential_mnist.py", None, given)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_experiment_can_be_searched(name):
    settings = ["hyperparameters.tau_m=4..16", "name=mine"]
    space = SearchSpace(ROOT / f"{name}.py", None, settings)
    assert space.base == ROOT / f"{name}.yaml"
    assert (space.config.name, space.config.hyperparameters.tau_m) == ("mine", 16)


def test_a_yaml_file_of_another_name_is_the_base():
    variant = YAML["snn_mlp_1_poisson"]
    space = SearchSpace(ROOT / "snn_mlp_1.py", Path(variant.name), ["hyperparameters.tau_m=4..16"])
    assert space.base == variant
    assert space.config.hyperparameters.encoding == "poisson"


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_study_that_several_begin_at_once_is_the_same_for_all(tmp_path):
    start = Barrier(4)

    def begin(number):
        start.wait()
        return open_study(tmp_path / "sweep_mine", None, {"seed": "1..2"})._study_id

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(begin, range(4))) == {1}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used")
def test_a_study_that_cannot_be_written_is_refused_with_the_database_s_words(tmp_path, monkeypatch):
    def fail(**options):
        try:
            raise sqlite3.OperationalError("attempt to write a readonly database")
        except sqlite3.OperationalError as error:
            raise optuna.exceptions.StorageInternalError("invalid data perhaps") from error

    monkeypatch.setattr(optuna, "create_study", fail)
    monkeypatch.setattr("snn_lib.sweep.time.sleep", lambda seconds: None)
    with pytest.raises(InputError, match=r"study\.db: attempt to write a readonly database$"):
        open_study(tmp_path / "sweep_mine", None, {"seed": "1..2"})


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used")
def test_a_trial_that_is_interrupted_more_than_three_times_is_given_up(tmp_path):
    study = open_study(tmp_path, None, {"seed": "1..9"})
    seeds = [study.ask().suggest_int("seed", 1, 9)]
    for _ in range(9):
        with closing(sqlite3.connect(tmp_path / "study.db")) as database, database:
            database.execute(  # that its process has long been gone
                "INSERT INTO trial_heartbeats (trial_id, heartbeat) "
                "SELECT trial_id, '2020-01-01' FROM trials WHERE state = 'RUNNING'"
            )
        optuna.storages.fail_stale_trials(study)
        if not study.get_trials(states=[optuna.trial.TrialState.WAITING]):
            break
        seeds.append(study.ask().suggest_int("seed", 1, 9))
    assert seeds == 4 * seeds[:1]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used")
def test_a_trial_is_taken_over_after_two_minutes_without_a_sign_of_life(tmp_path):
    study = open_study(tmp_path, None, {"seed": "1..9"})
    storage, trial = study._storage, study.ask()._trial_id
    assert storage.get_heartbeat_interval() == 30  # several may be late
    storage.record_heartbeat(trial)
    for seconds, states in (110, "R"), (130, "FW"):
        with closing(sqlite3.connect(tmp_path / "study.db")) as database, database:
            database.execute(
                f"UPDATE trial_heartbeats SET heartbeat = datetime('now', '-{seconds} seconds')"
            )
        optuna.storages.fail_stale_trials(study)
        assert "".join(one.state.name[0] for one in study.get_trials()) == states


def run(script, folder, setting, **values):
    """Runs a trial with these values of what is searched."""
    space = SearchSpace(script, None, [*setting, "hyperparameters.epoch=2", "device=cpu"])
    return run_trial(optuna.trial.FixedTrial(values, number=7), space, folder)


def test_trials_share_no_container_that_a_task_fills(script, tmp_path):
    script.write_text(
        SCRIPT.replace(
            "    def score(",
            """    def __init__(self, *data):
        super().__init__(*data)
        self.seen = []

    def setup(self, config, device):
        super().setup(config, device)
        self.seen.append(config.hyperparameters.tau_m)
        assert len(self.seen) == 1

    def score(""",
        )
    )
    space = SearchSpace(script, None, ["hyperparameters.tau_m=4,8", "device=cpu"])
    for number, tau in enumerate(("4", "8")):
        trial = optuna.trial.FixedTrial({"hyperparameters.tau_m": tau}, number=number)
        run_trial(trial, space, tmp_path)


def test_a_trial_returns_the_score_and_leaves_the_test_data_alone(script, tmp_path, capsys):
    value = {"hyperparameters.tau_m": 7.5}
    assert run(script, tmp_path, ["hyperparameters.tau_m=4..16"], **value) == -2.5
    assert "test loss" not in capsys.readouterr().out
    (found,) = tmp_path.glob("trial_0007/*/config.yaml")
    assert yaml.safe_load(found.read_text())["hyperparameters"]["tau_m"] == 7.5


def test_the_network_of_a_trial_is_loaded_as_that_of_any_run(script, tmp_path):
    run(script, tmp_path, ["hyperparameters.tau_m=4..16"], **{"hyperparameters.tau_m": 7.5})
    (best,) = tmp_path.glob("trial_0007/*/best")
    assert load(best).answer(torch.rand(3, 5, 2)).shape == (3, 2)


def test_a_trial_begins_with_the_first_weights_that_the_script_finds(script, tmp_path):
    own = "def initialise(model, task):\n    nn.init.constant_(model[1].bias, 9.0)\n\n\nif __name__"
    text = SCRIPT.replace("if __name__", own).replace('"mean"))', '"mean"), initialise)')
    script.write_text(text)
    settings = ["hyperparameters.tau_m=4..16", "optimizer.Adam.lr=1e-9"]
    run(script, tmp_path, settings, **{"hyperparameters.tau_m": 5.0})
    (best,) = tmp_path.glob("trial_0007/*/best")
    bias = load_checkpoint(best)["snn_state_dict"]["1.bias"]
    assert bias.tolist() == pytest.approx([9.0, 9.0])


def test_a_trial_of_a_new_study_takes_nothing_from_one_before(script, tmp_path):
    setting, value = ["hyperparameters.tau_m=4..16"], {"hyperparameters.tau_m": 7.5}
    assert run(script, tmp_path, setting, **value) == -2.5
    script.write_text(SCRIPT.replace("tau_m - 5)", "tau_m - 6)"))
    assert run(script, tmp_path, setting, **value) == -1.5
    assert sorted(path.name for path in tmp_path.glob("trial*")) == ["trial_0007", "trial_0007_2"]


def test_a_text_of_a_script_with_annotations_as_words_is_taken_as_it_is_typed(script, tmp_path):
    own = """
import dataclasses
from snn_lib.tasks import ClassificationConfig

@dataclasses.dataclass
class Config(ClassificationConfig):
    kind: str = "one"


class Known("""
    text = "from __future__ import annotations\n" + SCRIPT.replace("\nclass Known(", own)
    script.write_text(text.replace('"mean")', '"mean", config_class=Config)'))
    space = SearchSpace(script, None, ["kind=0123", "hyperparameters.tau_m=4..16"])
    assert space.config.kind == "0123"


def test_a_trial_is_judged_by_its_best_epoch(script, tmp_path):
    contrary = SCRIPT.replace('"test": (x, y)', '"validation": (x, 1 - y), "test": (x, y)')
    contrary = contrary.replace("if __name__", "x[::2] -= 1\nif __name__")  # which is easy to learn
    own = "return -abs(self.config.hyperparameters.tau_m - 5)"
    script.write_text(contrary.replace(own, 'return -metrics["loss"]'))
    settings = ["hyperparameters.tau_m=4..16", "optimizer.Adam.lr=0.1"]
    found = run(script, tmp_path, settings, **{"hyperparameters.tau_m": 5.0})
    (path,) = tmp_path.glob("trial_0007/*/metrics.csv")
    with open(path, newline="") as file:
        first, last = (float(row["validation_loss"]) for row in csv.DictReader(file))
    assert found == pytest.approx(-first)
    assert last > 1.1 * first  # what is learned is wrong there


STATELESS = "return Sequential(", "return nn.Sequential("
LARGE = "return -abs", "raise torch.OutOfMemoryError('all of it')  # ("
UNDEFINED = "return -abs", "return float('nan')  # ("
PENALTY = "hyperparameters.rate_penalty=0,1", "hyperparameters.target_rate=0,0.1"
NESTEROV = "optimizer.optimizer_choice=SGD", "optimizer.SGD.nesterov=true"


@pytest.mark.parametrize(
    ("settings", "drawn", "change", "message"),
    [
        (PENALTY, ("1", "0"), None, "hyperparameters.rate_penalty is 1.0"),
        (("optimizer.Adam.lr=1e-3,1e38",), ("1e38",), None, "epoch 1"),
        (("hyperparameters.batch_size=1,500",), ("500",), None, "is 500, there are 90 sequences"),
        (
            ("hyperparameters.chunk=1,3",),
            ("3",),
            STATELESS,
            "chunk is 3: Sequential takes no state",
        ),
        ((*NESTEROV, "optimizer.SGD.momentum=0,1"), ("0",), None, "PyTorch refuses the options of"),
        (("seed=1,3",), ("3",), LARGE, "out of memory"),
        (("seed=1,3",), ("3",), UNDEFINED, "its score is not a number"),
    ],
)
def test_settings_with_which_nothing_can_be_trained_end_a_trial_early(
    script, tmp_path, capsys, settings, drawn, change, message
):
    if change is not None:
        script.write_text(SCRIPT.replace(*change))
    searched = [setting.partition("=")[0] for setting in settings if "," in setting]
    with pytest.raises(optuna.TrialPruned):
        run(script, tmp_path, settings, **dict(zip(searched, drawn, strict=True)))
    (line,) = [one for one in capsys.readouterr().out.splitlines() if "ends early" in one]
    assert line.startswith("trial_0007 ends early: ")
    assert message in line


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used")
def test_a_trial_that_another_process_trains_after_all_does_not_count(script, tmp_path):
    settings = "hyperparameters.tau_m=4..16", "hyperparameters.epoch=2", "device=cpu"
    settings += (f"runs_path={tmp_path / 'runs'}",)
    assert sweep(script, *settings, "--trials", 1).code == 0
    (folder,) = tmp_path.glob("runs/sweep_mine")
    study = open_study(folder, None, SearchSpace(script, None, settings).whole)
    study.enqueue_trial(study.trials[0].params, user_attrs={"run": "trial_0000"})
    (run,) = folder.glob("trial_0000/*")
    with lock(run / "lock"):
        finished = sweep(script, *settings, "--trials", 2)
    assert finished.code == 0
    assert "trial_0000 is left alone: the run " in finished.out
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]


@pytest.mark.parametrize(("epochs", "fails"), [(1, False), (2, False), (1, True)])
def test_a_process_whose_trial_was_taken_over_ends_in_a_line(
    script, tmp_path, monkeypatch, epochs, fails
):
    study, train = optuna.create_study(), Experiment.train

    def take_over(self, checkpoint):
        study.tell(0, state=optuna.trial.TrialState.FAIL)
        if fails:
            raise RunError("the loss is not finite")
        return train(self, checkpoint)

    monkeypatch.setattr(Experiment, "train", take_over)
    settings = "hyperparameters.tau_m=4..16", f"hyperparameters.epoch={epochs}", "device=cpu"
    space = SearchSpace(script, None, settings)
    with pytest.raises(SystemExit, match="another one has taken its trial over: start it again"):
        study.optimize(lambda trial: run_trial(trial, space, tmp_path), n_trials=1)


def test_a_full_disk_ends_the_sweep_and_uses_up_no_trial(script, tmp_path, monkeypatch):
    def full(path, content, **options):
        raise WriteError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    settings = "hyperparameters.tau_m=4..16", "hyperparameters.epoch=2", "device=cpu"
    space, study = SearchSpace(script, None, settings), optuna.create_study()
    with pytest.raises(SystemExit, match=r"sweep: cannot write .* No space left"):
        study.optimize(lambda trial: run_trial(trial, space, tmp_path), n_trials=1)
    assert [trial.state.name for trial in study.trials] == ["RUNNING"]


def test_wrong_data_end_the_sweep_and_not_only_a_trial(script, tmp_path):
    script.write_text(SCRIPT.replace("if __name__", "x[3] = torch.nan\nif __name__"))
    with pytest.raises(InputError, match="sample 3 of the train data"):
        run(script, tmp_path, ["hyperparameters.tau_m=4..16"], **{"hyperparameters.tau_m": 5.0})


@pytest.mark.parametrize("batch", [16, 90])  # several batches, and all sequences in one
def test_a_trial_that_is_worse_than_the_median_ends_after_its_first_epoch(
    script, tmp_path, capsys, batch
):
    fixed = "hyperparameters.epoch=3", f"hyperparameters.batch_size={batch}"
    space = SearchSpace(script, None, ["hyperparameters.tau_m=4..9", *fixed])
    study = optuna.create_study(direction="maximize")
    for score in (-1.0, -1.0, -1.5, -2.0, -2.0):
        before = dict.fromkeys(range(1, 4), score)
        study.add_trial(optuna.create_trial(value=score, intermediate_values=before))
    for tau_m, epochs in ((6.6, 1), (6.4, 3)):  # the median is that of 6.5
        study.enqueue_trial({"hyperparameters.tau_m": tau_m})
        study.optimize(lambda trial: run_trial(trial, space, tmp_path), n_trials=1)
        found = study.trials[-1]
        (metrics,) = tmp_path.glob(f"{found.user_attrs['run']}/*/metrics.csv")
        assert len(metrics.read_text().splitlines()) == 1 + epochs
        assert found.state.name == ("PRUNED" if epochs == 1 else "COMPLETE")
    assert "trial_0005 ends early: others were better after epoch 1" in capsys.readouterr().out

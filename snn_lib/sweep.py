"""Searches an experiment's settings with Optuna, in any number of processes.

    python -m snn_lib.sweep snn_mlp_1.py hyperparameters.tau_m=2..16 hyperparameters.dropout=0,0.3

docs/sweeps.md tells more.
"""

import math
import os
import random
import re
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import is_dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from snn_lib.errors import (
    BusyError,
    InputError,
    RunError,
    SettingsError,
    WriteError,
    one_line,
    out_of_memory,
    require,
)
from snn_lib.files import write_atomically
from snn_lib.settings import LOCAL_KEYS, list_settings
from snn_lib.training.checkpoints import load_checkpoint
from snn_lib.training.command_line import Parser, exit_with
from snn_lib.training.config import (
    check_config,
    chosen_file,
    idle_settings,
    keys_of,
    merge_config,
    read_override,
    refuse_file_without_effect,
    refuse_without_effect,
)
from snn_lib.training.display import say, say_from_a_handler
from snn_lib.training.experiment import Experiment
from snn_lib.training.loading import arguments_of_main
from snn_lib.training.state import score_of

NOT_SEARCHED = ("name", *LOCAL_KEYS)
NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
TRIES = 20  # draws of the other settings, before a choice is refused
STOPPED = b"""sweep: stopped; the same command continues it; two minutes from now or later it also \
takes up the trial that was running"""


def main() -> int:
    """Runs trials until the study has enough of them, and writes the best settings so far."""
    parser = Parser(prog="python -m snn_lib.sweep", description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("script", type=Path, help="a script that calls snn_lib.training.main")
    parser.add_argument("settings", nargs="*", help="key=low..high, key=a,b,c or key=value")
    parser.add_argument("--config_file", type=Path, help="a YAML file other than the script's own")
    parser.add_argument("--trials", type=int, default=50, help="of all processes (default: 50)")
    parser.add_argument("--storage", metavar="URL", help="a database (default: an SQLite file)")
    options = parser.parse_intermixed_args()
    os.environ.pop("RANK", None)  # each trial has one process, whatever started this one
    try:
        import optuna
    except ImportError:
        raise InputError("a sweep needs the package optuna: pip install optuna") from None
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    # A trial that goes on reports the epoch before it once more.
    warnings.filterwarnings("ignore", "The reported value is ignored")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, kill)
    sys.path.insert(0, str(options.script.resolve().parent))  # as if Python ran the script
    require(options.trials > 0, f"--trials is {options.trials}, expected at least 1")
    space = SearchSpace(options.script, options.config_file, options.settings)
    require(
        any(len({*choices}) > 1 for choices in space.choices.values()),
        "all trials would be the same: give a range, key=low..high, or choices, key=a,b,c",
    )
    folder = Path(space.config.runs_path) / f"sweep_{space.config.name}"
    study = open_study(folder, options.storage, space.whole)
    while True:
        if study.best_trials:
            save_best(study.best_trial, space, folder / "best.yaml")
        ended = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
        if len(ended) >= options.trials:
            if not study.best_trials:
                say(f"none of the {len(ended)} trials has a score: all ended early")
            return 0 if study.best_trials else 1
        study.optimize(
            lambda trial: run_trial(trial, space, folder),
            n_trials=1,
            catch=(BusyError,),  # such a trial does not count
            gc_after_trial=True,
        )


def kill(number: int, frame: Any) -> None:
    """Ends this process without Optuna's noticing, so that its trial is run again."""
    say_from_a_handler(STOPPED)
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def save_best(trial: Any, space: "SearchSpace", path: Path) -> None:
    """Writes the settings of a trial as a YAML file that ``--config_file`` takes."""
    above = {}
    if space.base is not None:  # which is seen from where the folder lies, not from a link to it
        base = space.base.parent.resolve() / space.base.name
        above = {"base": os.path.relpath(base, path.parent.resolve())}
    schema = type(space.config)
    settings = (read_override(schema, one) for one in trial.user_attrs["settings"])
    values = OmegaConf.merge(above, *settings)
    title = f"{trial.user_attrs['run']} of {path.parent.name}, score {trial.value:.6g}"
    write_atomically(path, f"# {title}\n{OmegaConf.to_yaml(values)}".encode())
    say(f"best so far: {title}; settings in {path}")


class SearchSpace:
    """The settings of an experiment, some of which are searched.

    Args:
        script: the experiment's script.
        config_file: the YAML file whose settings are changed; ``None`` for the script's own.
        settings: ``key=low..high``, a range of numbers; ``key=a,b,c``, choices; or ``key=value``,
            which is fixed. The commas of a list ``[1,2]`` separate no choices, nor do those of the
            name and of settings that say where and how a machine runs a trial.

    Attributes:
        base: the YAML file, or ``None`` if the script has none.
        config: a configuration that may be drawn.
        whole: all settings that do not say where and how a machine runs them, as text: the range or
            the choices of one that is searched, and the value of any other.

    Raises:
        InputError: a key is unknown, an end or a choice is allowed with none of the choices of the
            others that are tried, a range is empty or not one of numbers, or a setting has no
            effect in any trial.
    """

    def __init__(self, script: Path, config_file: Path | None, settings: Sequence[str]) -> None:
        self.build_model, self.task, self.initialise = arguments_of_main(script)
        require(len(settings) > 0, "no setting is given: expected key=low..high or key=a,b,c")
        self.script, self.base = script, chosen_file(script, config_file)
        schema = self.task.config_class
        self.merged = partial(merge_config, schema, self.base, script=script)
        self.choices: dict[str, Sequence[Any]] = {}  # of a range, a tuple of its ends
        given: dict[str, str] = {}
        for setting in settings:
            key, sign, text = setting.partition("=")
            require(sign != "", f"{setting!r}: expected key=low..high, key=a,b,c or key=value")
            (key,) = keys_of(schema, [f"{key}=0"])  # a[b] is a.b
            given[key] = text
            ends = re.fullmatch(rf"{NUMBER}\.\.{NUMBER}", text)
            if key in NOT_SEARCHED:
                self.choices[key] = [text]
            else:
                self.choices[key] = ends.groups() if ends else _choices(text)
        allowed = self._find_allowed()
        refuse_file_without_effect(self.base, script, *allowed)
        refuse_without_effect([f"{key}={own[0]}" for key, own in self.choices.items()], *allowed)
        self.config = check_config(allowed[-1])
        present = dict(list_settings(self.config))
        for key, ends in self.choices.items():
            if isinstance(ends, tuple):
                text, kind = f"{key}={ends[0]}..{ends[1]}", type(present[key])
                require(kind in (int, float), f"{text} is a range, but {key} is no number")
                low, high = self.choices[key] = tuple(kind(float(end)) for end in ends)
                require(low < high, f"{text} is an empty range, expected the lower end first")
        self.whole = {
            key: given[key] if len(self.choices.get(key, ())) > 1 else str(value)
            for key, value in _without_local(present).items()
            if not is_dataclass(value)
        }

    def _find_allowed(self) -> list[DictConfig]:
        """Configurations in which each choice and each end of a range occurs.

        Raises:
            InputError: one of them is not allowed beside what has the same place among the choices
                of the other settings, nor beside any of ``TRIES`` draws of them.
        """
        allowed: list[DictConfig] = []
        met: set[tuple[str, str]] = set()
        wrong: dict[tuple[str, str], InputError] = {}
        draws = random.Random(0)

        def check(chosen: Mapping[str, str]) -> None:
            merged = self.merged([f"{key}={value}" for key, value in chosen.items()])
            try:
                check_config(merged)
            except InputError as error:
                for one in chosen.items():
                    wrong.setdefault(one, error)
            else:
                allowed.append(merged)
                met.update(chosen.items())

        for place in range(max(map(len, self.choices.values()))):
            check({key: own[min(place, len(own) - 1)] for key, own in self.choices.items()})
        for (key, value), error in [*wrong.items()]:
            for _ in range(min(TRIES, math.prod(map(len, self.choices.values())))):
                if (key, value) not in met:
                    others = {name: draws.choice(own) for name, own in self.choices.items()}
                    check({**others, key: value})
            if (key, value) not in met:
                raise error
        return allowed

    def draw(self, trial: Any) -> list[str]:
        """Lets a trial of Optuna's choose the settings, and returns them, ``key=value`` each.

        If the lower end of a range is above 0 and the upper one at least ten times as large, its
        logarithm is searched.
        """
        return [f"{key}={self._draw(trial, key, own)}" for key, own in self.choices.items()]

    def _draw(self, trial: Any, key: str, choices: Sequence[Any]) -> Any:
        if len(choices) == 1:
            return choices[0]
        if isinstance(choices, list):
            return trial.suggest_categorical(key, choices)
        low, high = choices
        logarithmic = 0 < 10 * low <= high * (1 + 1e-9)  # 10 * 3e-5 is a little above 3e-4
        if isinstance(low, int):
            return trial.suggest_int(key, low, high, log=logarithmic)
        return trial.suggest_float(key, low, high, log=logarithmic)


def _choices(text: str) -> list[str]:
    """What stands between commas that are neither in brackets nor in quotes."""
    choices, depth, quote = [""], 0, ""
    for place, sign in enumerate(text, 1):
        before = choices[-1].rstrip()
        if sign == "," and not (depth or quote):
            choices.append("")
            continue
        choices[-1] += sign
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"" and sign in text[place:] and (not before or before[-1] in "[{,:"):
            quote = sign
        else:
            depth = max(0, depth + (sign in "[{") - (sign in "]}"))
    return choices


def open_study(folder: Path, url: str | None, settings: dict[str, str]) -> Any:
    """Opens Optuna's study that is named like a folder, or begins it.

    If a running trial gives no sign of life for two minutes, another process runs it again.

    Args:
        folder: of the files of its trials.
        url: of its database; ``None`` for a file in the folder.
        settings: the attribute ``whole`` of the :class:`SearchSpace`.

    Raises:
        InputError: the database cannot be used, or is in memory alone, or the study is there and
            has other settings.
    """
    import optuna

    url = url or f"sqlite:///{folder}/study.db"
    require(
        re.match(r"sqlite[^:]*:(///?($|\?)|.*(:memory:|mode=memory))", url) is None,
        f"{url} is a database in memory, which ends with this process: name a file, or leave out "
        "--storage",
    )
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback(3, inherit_intermediate_values=True)
    life = {"heartbeat_interval": 30, "grace_period": 120, "heartbeat_stale_trial_callback": retry}
    options = {"study_name": folder.name, "direction": "maximize", "load_if_exists": True}
    for wait in (0.5, 1, 2, 0):  # seconds, since two processes that begin it hinder each other
        try:
            folder.mkdir(parents=True, exist_ok=True)
            study = optuna.create_study(storage=optuna.storages.RDBStorage(url, **life), **options)
            break
        except Exception as error:  # every database fails in its own way
            if not wait:
                if isinstance(error, optuna.exceptions.StorageInternalError):
                    error = error.__cause__ or error  # the database's own words
                reason = one_line(error)
                raise InputError(f"the study cannot be kept in {url}: {reason}") from None
            time.sleep(wait)
    for key, earlier in study.user_attrs.get("whole", settings).items():
        value = settings.get(key, earlier)
        require(
            value == earlier,
            f"{folder.name} began with {key}={earlier}, now it is {value}: set it as before, or "
            "begin another study by name=",
        )
    study.set_user_attr("whole", settings)
    return study


def run_trial(trial: Any, space: SearchSpace, folder: Path) -> float:
    """Trains with the settings that a trial of Optuna's draws.

    A trial that was killed before goes on from its last checkpoint. The test data is left alone.

    Args:
        trial: takes note of the score of every epoch, and of the ``settings`` that count in it.
        space: what the settings are drawn from.
        folder: where the run has its folder.

    Returns:
        The best epoch's score, the first number of ``Task.score``.

    Raises:
        TrialPruned: the best score so far is below the median of other trials' after this epoch,
            the settings do not fit each other or the data, the score is not a number, or the run
            failed, for example because a loss was not finite or the memory was too small.
        BusyError: the process whose trial this was gives signs of life again.
    """
    from optuna import TrialPruned
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError

    task = copy(space.task)  # trials share nothing that one of them prepares
    for key, value in vars(task).items():
        if isinstance(value, (list, dict, set)):
            setattr(task, key, copy(value))
    has, task.has = task.has, lambda split: split != "test" and has(split)
    name = trial.user_attrs.get("run") or _new_name(trial.number, folder)  # if killed, it has one

    def hold() -> None:
        """Notes the name of the run, and ends this process if another one has the trial now."""
        try:
            trial.set_user_attr("run", name)
        except UpdateFinishedTrialError:
            sys.exit(
                "sweep: this process was held up for two minutes or longer, and another one has "
                "taken its trial over: start it again"
            )

    def end_early(why: object) -> NoReturn:
        hold()
        say(f"{name} ends early: {why}")
        raise TrialPruned

    def report() -> bool:
        progress = experiment.progress
        if progress.history and progress.batch == 1:  # the first batch after an epoch
            hold()
            trial.report(score_of(progress.history[-1], task)[0], progress.epoch)
            if trial.should_prune():
                end_early(f"others were better after epoch {progress.epoch}")
        return False

    hold()
    settings = space.draw(trial)
    try:
        merged = space.merged(settings)
        config = check_config(merged)
    except InputError as error:  # each setting is allowed, but not all together
        end_early(error)
    idle = idle_settings(merged)  # beside what was drawn for the others
    settings = [setting for setting in settings if setting.partition("=")[0] not in idle]
    kept = sorted(setting for setting in settings if setting.partition("=")[0] not in LOCAL_KEYS)
    trial.set_user_attr("settings", kept)
    say(f"{name}: {' '.join(settings)}")
    config.runs_path, config.name = str(folder), name
    last = max(folder.glob(f"{name}/*/last"), default=None)
    checkpoint = None if last is None else load_checkpoint(last)
    try:
        experiment = Experiment(space.build_model, task, config, space.initialise, report)
        experiment.script = space.script.name
        score = score_of(experiment.train(checkpoint)["best"], task)[0]
    except (WriteError, StorageInternalError) as error:
        # Optuna takes no notice of it, so that the trial is run again, from its last checkpoint.
        sys.exit(f"sweep: {one_line(error.__cause__ or error)}")
    except BusyError as error:
        say(f"{name} is left alone: {error}")
        raise
    except (RunError, SettingsError) as error:
        end_early(error)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        end_early("out of memory")
    if math.isnan(score):
        end_early("its score is not a number")
    hold()
    return score


def _new_name(number: int, folder: Path) -> str:
    """The name of a trial, which none of an earlier study in the same folder has had."""
    name = f"trial_{number:04}"
    names = chain([name], (f"{name}_{study}" for study in count(2)))
    return next(name for name in names if not (folder / name).exists())


def _without_local(config: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that say where and how a machine runs them."""
    return {key: value for key, value in config.items() if key not in LOCAL_KEYS}


if __name__ == "__main__":
    exit_with("sweep", main)

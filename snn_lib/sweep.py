"""Searches an experiment's settings with Optuna, in any number of processes.

    python -m snn_lib.sweep snn_mlp_1.py hyperparameters.tau_m=2..16 hyperparameters.dropout=0,0.3

docs/sweeps.md tells more.
"""

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from snn_lib.errors import InputError, require
from snn_lib.files import write_atomically
from snn_lib.training.command_line import Parser, exit_with
from snn_lib.training.display import say
from snn_lib.training.search import SearchSpace, open_study, run_trial

STOPPED = b"""sweep: stopped; the same command continues it; two minutes from now or later it also \
takes up the trial that was running
"""


def main() -> int:
    """Runs trials until the study has enough of them, and writes the best settings so far."""
    parser = Parser(prog="python -m snn_lib.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("script", type=Path, help="a script that calls snn_lib.training.main")
    parser.add_argument("settings", nargs="+", help="key=low..high, key=a,b,c or key=value")
    parser.add_argument("--config_file", type=Path, help="a YAML file other than the script's own")
    parser.add_argument("--trials", type=int, default=50, help="of all processes (default: 50)")
    parser.add_argument("--storage", metavar="URL", help="a database (default: an SQLite file)")
    options = parser.parse_intermixed_args()
    try:
        import optuna
    except ImportError:
        raise InputError("a sweep needs the package optuna: pip install optuna") from None
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    signal.signal(signal.SIGINT, kill)
    sys.path.insert(0, str(options.script.resolve().parent))  # as if Python ran the script
    require(options.trials > 0, f"--trials is {options.trials}, expected at least 1")
    space = SearchSpace(options.script, options.config_file, options.settings)
    require(
        any(len(choices) > 1 for choices in space.choices.values()),
        "all trials would be the same: give a range, key=low..high, or choices, key=a,b,c",
    )
    folder = Path(space.config.runs_path) / f"sweep_{space.config.name}"
    study = open_study(folder, options.storage, space.whole)
    while True:
        if study.best_trials:
            save_best(study.best_trial, space.base, folder / "best.yaml")
        ended = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
        if len(ended) >= options.trials:
            return 0 if study.best_trials else 1
        study.optimize(
            lambda trial: run_trial(trial, space, folder), n_trials=1, gc_after_trial=True
        )


def kill(number: int, frame: Any) -> None:
    """Ends this process without Optuna's noticing, so that its trial is run again."""
    os.write(2, STOPPED)  # not by print, because the signal may have interrupted a print
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def save_best(trial: Any, base: Path | None, path: Path) -> None:
    """Writes the settings of a trial as a YAML file that ``--config_file`` takes."""
    above = {} if base is None else {"base": os.path.relpath(base, path.parent)}
    values = OmegaConf.merge(above, OmegaConf.from_dotlist(trial.user_attrs["settings"]))
    title = f"{trial.user_attrs['run']} of {path.parent.name}, score {trial.value:.6g}"
    write_atomically(path, f"# {title}\n{OmegaConf.to_yaml(values)}".encode())
    say(f"best so far: {title}; settings in {path}")


if __name__ == "__main__":
    exit_with("sweep", main)

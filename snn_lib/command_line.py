"""The command line that every experiment has, and what its exit codes mean.

0: done. 1: the run failed. 2: the user's input was wrong; one line says what and how to mend it.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import omegaconf
from torch import nn

from snn_lib import distributed
from snn_lib.checkpoints import load_checkpoint
from snn_lib.config import ExperimentConfig, config_from_dict, load_config, require
from snn_lib.errors import InputError, RunError
from snn_lib.experiment import Experiment, Stopped, Task

# A checkpoint brings its own configuration along; these keys are about where it runs now.
LOCAL_KEYS = (
    "device",
    "dataset_path",
    "checkpoint_base_path",
    "test_checkpoint_path",
    "runs_path",
    "tensorboard",
)
INTERRUPTED = 130  # what a shell reports of a process that Ctrl-C ended


def main(
    script: str,
    build_model: Callable[[Any], nn.Module],
    task_class: type[Task],
    arguments: Sequence[str] | None = None,
) -> None:
    """Runs an experiment's script and exits.

    Args:
        script: the script's ``__file__``; the YAML file of the same name is its configuration.
        build_model: makes the model from the configuration.
        task_class: the task that the model learns.
        arguments: the command line, by default the process's.
    """
    try:
        code = _run(Path(script), build_model, task_class, arguments)
    except InputError as error:
        print(f"{Path(script).name}: {error}", file=sys.stderr)
        code = 2
    except (RunError, OSError) as error:
        print(f"{Path(script).name}: the run failed: {error}", file=sys.stderr)
        code = 1
    finally:
        distributed.stop()
    sys.exit(code)


def _run(
    script: Path,
    build_model: Callable[[Any], nn.Module],
    task_class: type[Task],
    arguments: Sequence[str] | None,
) -> int:
    options = _parser(script, task_class.config_class).parse_intermixed_args(arguments)
    if options.train == options.test:
        raise InputError("choose one of --train and --test")
    require(options.train or options.resume is None, "--resume goes with --train")
    yaml_file = options.config_file or script.with_suffix(".yaml")
    config = load_config(task_class.config_class, yaml_file, options.overrides)

    checkpoint = source = None
    if options.test:
        source = Path(config.test_checkpoint_path)
    elif options.resume is not None:
        source = Path(options.resume or f"{config.checkpoint_base_path}/{config.name}_last")
    if source is not None:
        checkpoint = load_checkpoint(source)
        config = _with_own_settings(config, checkpoint, options.overrides)

    stop_signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: _request_stop(number, stop_signals))
    distributed.start()
    experiment = Experiment(build_model, task_class, config, lambda: bool(stop_signals))
    if options.test:
        experiment.test(checkpoint, source)
        return 0
    try:
        experiment.train(checkpoint, source)
    except Stopped:
        last = experiment.checkpoint_path("last")
        experiment.say(f"stopped; continue with: python {script.name} --train --resume {last}")
        return 128 + stop_signals[0] if stop_signals else INTERRUPTED
    return 0


def _request_stop(number: int, stop_signals: list[int]) -> None:
    if stop_signals:  # asked twice: at once
        raise KeyboardInterrupt
    stop_signals.append(number)
    print("stopping after this batch; once more stops at once", file=sys.stderr)


def _with_own_settings(
    config: ExperimentConfig, checkpoint: dict[str, Any], overrides: Sequence[str]
) -> ExperimentConfig:
    """The checkpoint's configuration at this place, with the overrides."""
    own = checkpoint.get("config")
    if not isinstance(own, dict):
        return config
    here = {key: getattr(config, key) for key in LOCAL_KEYS}
    return config_from_dict(type(config), {**own, **here}, overrides)


def _parser(script: Path, config_class: type[ExperimentConfig]) -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:
            raise InputError(f"{message} (see --help)")

    parser = Parser(
        prog=f"python {script.name}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "Every setting can be overridden by key=value; the settings and their defaults\n"
            f"(the YAML file's values, where it has others, apply):\n\n{_defaults(config_class)}"
        ),
    )
    parser.add_argument("--train", action="store_true", help="train, then test the best epoch")
    parser.add_argument(
        "--test", action="store_true", help="evaluate test_checkpoint_path on the test data"
    )
    parser.add_argument(
        "--config_file",
        type=Path,
        metavar="FILE",
        help=f"the YAML file with the settings (default: {script.with_suffix('.yaml').name})",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="with --train: go on from this checkpoint, by default the run's last one, "
        "with the settings it was trained with",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, such as device=cpu"
    )
    return parser


def _defaults(config_class: type[ExperimentConfig]) -> str:
    return omegaconf.OmegaConf.to_yaml(omegaconf.OmegaConf.structured(config_class))

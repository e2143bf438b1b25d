"""The command line that every experiment has, and what its exit codes mean.

0: done. 1: the run failed. 2: the user's input was wrong; one line says what and how to mend it.
"""

import argparse
import dataclasses
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from snn_lib.errors import InputError, RunError, limit_length, out_of_memory, place_of, require
from snn_lib.inference import to_c, to_onnx
from snn_lib.settings import LOCAL_KEYS, ExperimentConfig, Settings, list_settings
from snn_lib.tasks.base import Task, check_task
from snn_lib.training import distributed
from snn_lib.training.building import BuildModel
from snn_lib.training.checkpoints import Checkpoint, load_checkpoint
from snn_lib.training.config import (
    check_config,
    chosen_file,
    config_from_dict,
    defaults,
    expand_home,
    idle_settings,
    keys_of,
    merge_config,
    passed_over,
    refuse_file_without_effect,
    refuse_without_effect,
)
from snn_lib.training.display import say, say_from_a_handler
from snn_lib.training.experiment import Experiment, Stopped
from snn_lib.training.loading import GIVEN, trained_network
from snn_lib.training.run_folder import newest

EXPORTS = {".onnx": to_onnx, ".c": to_c}
STOP = (signal.SIGINT, signal.SIGTERM)
STOPPING = b"stopping after this batch, or after the test if the last epoch is done"
ONCE_MORE = b"; once more stops at once"
USED = {  # beside a file of weights alone
    "hyperparameters.constraint",
    "hyperparameters.synapse",  # how its filters are kept stable
    "hyperparameters.epoch",
    "seed",  # how data are divided
    *LOCAL_KEYS,
}
PIPE_CLOSED = 141  # the exit code that a shell reports if a closed pipe ended a process


def main(
    script: str,
    build_model: BuildModel,
    task: Task,
    initialise: Callable[[Any, Any], Any] | None = None,
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Runs an experiment's script and exits.

    Args:
        script: the script's ``__file__``. The YAML file of the same name, if there is one, has its
            settings.
        build_model: makes the model from the configuration; see :class:`Experiment`.
        task: the task that the model learns.
        initialise: called as ``initialise(model, task)`` where training starts from scratch, to
            find first weights on the training data; see :class:`Experiment`.
        arguments: the command line, by default the process's.

    Raises:
        InputError: the script calls ``main`` when it is imported, or ``task`` is none.
    """
    caller = sys._getframe(1).f_globals
    require(
        caller.get("__file__") != script or caller.get("__name__") == "__main__",
        f"{script} calls main when it is imported: put the call under if __name__ == '__main__':",
    )
    require(
        isinstance(task, Task),
        f"main is given {task!r}, expected a task: main(__file__, build_model, task)",
    )
    given = GIVEN.get()
    if given is not None:  # arguments_of_main runs this script, to learn what it gives
        check_task(task)
        defaults(task.config_class)  # annotations that are text name things of this script
        given += build_model, task, initialise
        sys.exit()
    about = caller.get("__doc__")
    work = partial(_run, Path(script), about, build_model, task, initialise, arguments)
    exit_with(_module_of(script) or Path(script).name, work)


def exit_with(name: str, work: Callable[[], int]) -> NoReturn:
    """Does the work and exits with the code that it returns; if it fails, a line says why."""
    try:
        code, message = work(), None
    except InputError as error:
        code, message = 2, error
    except KeyboardInterrupt as interrupt:
        code, message = 128 + (*interrupt.args, signal.SIGINT)[0], "stopped at once"
    except BrokenPipeError:  # the program that reads our output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, message = PIPE_CLOSED, None
    except RunError as error:
        code, message = 1, f"the run failed: {error}"
    except OSError as error:  # of a file of the user's own code, perhaps
        code, message = 1, f"the run failed: {error}{place_of(error)}"
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            remedy = "set hyperparameters.chunk, or lower hyperparameters.batch_size"
            code, message = 1, f"the run failed: out of memory; {remedy}"
        elif distributed.lost_contact(error):
            code, message = 1, "the run failed: another process ended, or cannot be reached"
        else:
            raise
    finally:
        distributed.stop()
    if message is not None:
        process = f" process {os.environ['RANK']}:" if distributed.is_launched() else ""
        print(f"{name}:{process} {limit_length(str(message))}", file=sys.stderr)
    if distributed.is_launched():
        # Threads of PyTorch's process group live on. If one of them frees a tensor while Python
        # shuts down, the process aborts. So end without Python's shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are :class:`InputError`."""

    def error(self, message: str) -> NoReturn:
        """Refuses what argparse does not understand."""
        raise InputError(f"{message} (see --help)")


def _run(
    script: Path,
    about: str | None,
    build_model: BuildModel,
    task: Task,
    initialise: Callable[[Any, Any], Any] | None,
    arguments: Sequence[str] | None,
) -> int:
    check_task(task)
    parser, typed = _parser(script, about), list(sys.argv[1:] if arguments is None else arguments)
    for place, (word, after) in enumerate(pairwise(typed)):
        if word == "--resume" and "=" in after and not Path(after).exists():
            typed[place] = "--resume="  # what follows, key=value, names no checkpoint
    options = parser.parse_intermixed_args(typed)
    yaml_file = chosen_file(script, options.config_file)
    merged = merge_config(task.config_class, yaml_file, options.overrides, script)
    refuse_file_without_effect(yaml_file, script, merged)
    config = check_config(merged)
    if options.help:
        values = f"the values from {yaml_file.name} and" if yaml_file else "their"
        print(f"{parser.format_help()}\nsettings, with {values} defaults:")
        print("\n".join(_explain(config, idle_settings(merged))))
        return 0
    require(
        options.train + options.test + bool(options.export) == 1,
        "choose one of --train, --test and --export (see --help)",
    )
    require(
        options.export is None or (options.export.parent.is_dir() and not options.export.is_dir()),
        f"--export {options.export}: expected the name of a file in a folder that exists",
    )
    require(
        options.export is None or options.export.suffix in EXPORTS,
        f"--export {options.export}: expected a name with the ending {' or '.join(EXPORTS)}",
    )
    require(options.train or options.resume is None, "--resume goes with --train")
    require(
        options.train or not distributed.is_launched(),
        "--test and --export take one process: start the script with python instead of torchrun",
    )

    require(
        not options.train
        or not config.test_checkpoint_path
        or "test_checkpoint_path" not in keys_of(task.config_class, options.overrides),
        "test_checkpoint_path has no effect with --train, which tests the network that it trains",
    )

    checkpoint = None
    if options.test or options.export:
        checkpoint = load_checkpoint(config.test_checkpoint_path or newest(config, "best"))
    elif options.resume is not None:
        checkpoint = load_checkpoint(options.resume or newest(config, "last"), "last")
    if checkpoint is None:
        refuse_without_effect(options.overrides, merged)
    else:
        of_file, trained = config, settings_of(checkpoint, config, [])
        if trained is config:  # of weights alone, of which these settings say how they are used
            used = [o for o in options.overrides if USED & {*keys_of(task.config_class, [o])}]
            trained = check_config(merge_config(task.config_class, yaml_file, used, script))
        config = settings_of(checkpoint, config, options.overrides)
        unread = _unread(options, config, checkpoint)
        merged = OmegaConf.structured(config)
        refuse_without_effect(options.overrides, merged, unread=unread, trained=trained)
        chosen = yaml_file if options.config_file or options.train else None
        idle = unread if options.test else None
        is_first = os.environ.get("RANK", "0") == "0"  # the processes have no group yet
        if is_first and chosen and (instead := passed_over(chosen, of_file, config, idle)):
            say(
                f"{chosen.name} differs from {checkpoint.path}, whose settings count: "
                f"{' '.join(instead)}"
            )
    if options.export and checkpoint is not None:
        network = trained_network(checkpoint, build_model, task.config_class)
        try:
            EXPORTS[options.export.suffix](network, options.export)
        except (ImportError, ValueError) as error:
            done = f"; in Python: export snn_lib.load({str(checkpoint.path)!r})"
            raise InputError(f"{error}{done if 'shape=' in str(error) else ''}") from None
        say(f"{checkpoint.path} is exported to {options.export}: one time step, with its states")
        return 0

    with StopSignals() as stop:
        distributed.start()
        experiment = Experiment(build_model, task, config, initialise, stop.asked_after_a_batch)
        experiment.script = script.name
        if options.test:
            require(task.has("test"), "there is no test data")
            experiment.test(checkpoint)
            return 0
        try:
            experiment.train(checkpoint)
        except Stopped:
            command = _resume_command(script, options, experiment.run.last, experiment.world)
            experiment.say(f"stopped; continue with: {command}")
            return 128 + (*stop.received, signal.SIGINT)[0]  # if none, another process was asked
    return 0


class StopSignals:
    """The context in which Ctrl-C and SIGTERM stop a run.

    While the model trains, the first signal asks for a stop after the current batch, and the second
    stops at once, but for a process of torchrun. After the last batch the run ends by itself, with
    its test. Before the first batch is done there is nothing to save, so the first signal stops at
    once.

    Raises:
        InputError: this is not Python's main thread.
    """

    def __init__(self) -> None:
        require(
            threading.current_thread() is threading.main_thread(),
            "--train and --test handle Ctrl-C, as only Python's main thread can: in another one, "
            "use Experiment",
        )
        self.received: list[int] = []
        self.training = False

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._receive) for number in STOP}
        return self

    def __exit__(self, *_: object) -> None:
        if not distributed.is_launched():  # torchrun sends each signal once more, and ends anyway
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def asked_after_a_batch(self) -> bool:
        """Whether to stop."""
        self.training = True
        return bool(self.received)

    def _receive(self, number: int, frame: Any) -> None:
        # A process of torchrun gets the same signal twice: from the terminal and from torchrun.
        again = bool(self.received) and not distributed.is_launched()
        if again or not self.training:
            raise KeyboardInterrupt(number)
        if not self.received:
            say_from_a_handler(STOPPING + (b"" if distributed.is_launched() else ONCE_MORE))
        self.received.append(number)


def _resume_command(script: Path, options: argparse.Namespace, last: Path, processes: int) -> str:
    """The command that continues the run, with the same overrides."""
    launcher = ["python"] if processes == 1 else ["torchrun", f"--nproc-per-node={processes}"]
    config_file = ["--config_file", str(options.config_file)] if options.config_file else []
    flags = ["--train", "--resume", str(last), *config_file, *options.overrides]
    module = _module_of(script)
    started = ["-m", module] if module else [os.path.relpath(script)]
    return shlex.join([*launcher, *started, *flags])


def _module_of(script: Path | str) -> str | None:
    """The script's name as a module, if Python was started with it as one: ``python -m name``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # None if a script was started
    return spec.name if spec is not None and spec.origin == str(script) else None


def _unread(
    options: argparse.Namespace, config: ExperimentConfig, checkpoint: Checkpoint
) -> dict[str, str]:
    """The settings that a command with a trained network does not read, and why."""
    path, option = checkpoint.path, "--resume" if options.train else "--test"
    loaded = f"has no effect with {option}: weights and coefficients are those of {path}"
    unread = {"first_weights": loaded}
    done = checkpoint.get("epoch")
    if options.train and isinstance(done, int) and done >= config.hyperparameters.epoch > 0:
        why = f"has no effect with --resume {path}, which has been trained up to epoch {done}"
        unread = {key: why for key, _ in list_settings(config) if key not in LOCAL_KEYS}
    if options.resume:
        unread["name"] = f"has no effect with --resume {path}: the run goes on in its folder"
    if options.test:
        unread["hyperparameters.epoch"] = "has no effect with --test, which does not train"
        unread["seed"] = (
            f"has to be that of {path} with --test, since the parts of the data may follow from it"
        )
    if options.export:
        why = f"has no effect with --export, which writes the network of {path} as it was trained"
        unread = {key: why for key, _ in list_settings(config)}
    if not options.train and config.test_checkpoint_path:
        unread["name"] = (
            f"has no effect with test_checkpoint_path={config.test_checkpoint_path}: empty it, "
            "test_checkpoint_path=, to take the newest run of a name"
        )
    return unread


def settings_of(
    checkpoint: Checkpoint, config: ExperimentConfig, overrides: Sequence[str]
) -> ExperimentConfig:
    """The settings that a checkpoint was trained with, the local ones of ``config``, and overrides.

    Raises:
        InputError: the checkpoint's settings are not those of this script.
    """
    trained = checkpoint.get("config")
    if not isinstance(trained, dict):
        return config
    local = {key: getattr(config, key) for key in LOCAL_KEYS}
    source = f"the configuration of {checkpoint.origin}"
    return config_from_dict(type(config), {**trained, **local}, overrides, source)


def _parser(script: Path, about: str | None = None) -> argparse.ArgumentParser:
    module = _module_of(script)
    parser = Parser(
        prog=f"python -m {module}" if module else f"python {script.name}",
        add_help=False,  # which would end the script before the configuration is read
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=about or "Trains a network, or tests or exports a trained one.",
        epilog="exit codes: 0 done, 1 the run failed, 2 the input was wrong",
    )

    def add(name: str, description: str, **how: Any) -> None:
        parser.add_argument(name, help=description, **how)

    flag = {"action": "store_true"}
    add("--help", "show this help and all settings with their values, and exit", **flag)
    add("--train", "train, then test the best epoch", **flag)
    add(
        "--test",
        "test the network in test_checkpoint_path, or if that is empty the best of the newest run",
        **flag,
    )
    add(
        "--export",
        "write one time step of the network that --test tests to FILE, for use without PyTorch",
        type=lambda text: Path(expand_home(text)),
        metavar="FILE.onnx|FILE.c",
    )
    add(
        "--config_file",
        "read the settings from this YAML file, which may be one in configs/ "
        f"(default: {script.with_suffix('.yaml').name})",
        type=Path,
        metavar="FILE",
    )
    add(
        "--resume",
        "with --train: continue from this last checkpoint, with the settings that it was trained "
        "with (default: that of the newest run of this name)",
        type=expand_home,
        nargs="?",
        const="",
        metavar="CHECKPOINT",
    )
    add(
        "overrides",
        "settings, such as hyperparameters.epoch=10 or device=cpu",
        nargs="*",
        metavar="key=value",
    )
    return parser


def _explain(
    section: Any, idle: Mapping[str, str], prefix: str = "", above: str = ""
) -> Iterator[str]:
    """A line for each setting: its key and value, its meaning, and what it may be.

    If it has no effect, which ``idle`` says, the line says so, unless the reason is that of its
    whole section, ``above``.
    """
    nested, kinds = [], get_type_hints(type(section))
    for entry in dataclasses.fields(section):
        value, name = getattr(section, entry.name), f"{prefix}{entry.name}"
        why = idle.get(name, "")
        if dataclasses.is_dataclass(value):
            nested.append((value, name, why))
            continue
        shown = value if isinstance(value, str) else json.dumps(value)
        doc, allowed = entry.metadata.get("doc", ""), str(entry.metadata.get("range", ""))
        if get_origin(kind := kinds[entry.name]) is Literal:
            allowed = ", ".join(map(str, get_args(kind)))
        doc += f" ({allowed})" if allowed else ""
        doc += f"; {why}" if why not in ("", above) else ""
        yield f"  {f'{name}={shown}':<50} {doc}".rstrip()
    for value, name, why in nested:
        written = (  # dataclass writes one that begins with its name
            kind.__doc__
            for kind in type(value).__mro__
            if kind not in (Settings, object)
            and kind.__doc__
            and not kind.__doc__.startswith(f"{kind.__name__}(")
        )
        yield f"\n{next(written, name).splitlines()[0]}{why and f' (this {why})'}"
        yield from _explain(value, idle, f"{name}.", why)

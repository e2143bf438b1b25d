"""The folder of a run, ``runs/NAME/TIME/``, in which no other run ever writes.

It holds the settings (``config.yaml``), the versions (``environment.yaml``), a row of metrics for
every epoch (``metrics.csv``), the checkpoint from which the run can be resumed (``last``) and the
finished model of its best epoch (``best``). ``metrics.csv`` is written as a whole after every
epoch, from the history in ``last``, so it has each epoch once even if the run was killed and
resumed.
"""

import contextlib
import dataclasses
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from snn_lib.errors import BusyError, InputError, require
from snn_lib.files import lock, write_atomically, write_csv
from snn_lib.tasks.base import Task
from snn_lib.training import distributed
from snn_lib.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from snn_lib.training.state import TIMES, Row, TrainingState

NAMED_BY_TIME = r"\d{4}(-\d\d){2}_\d\d(-\d\d){2}(_\d+)?"  # see new_folder


class RunFolder:
    """The folder of one run. All processes read it, but only the one that opened it writes there.

    Args:
        path: the folder.
        config: the configuration.
        made_by: what else every checkpoint holds: its origin, and what ``Task.usage`` says.

    Attributes:
        last, best: the paths of the two checkpoints.
    """

    def __init__(self, path: Path, config: Any, made_by: Row) -> None:
        self.path, self.last, self.best = path, path / "last", path / "best"
        self.made_by = {"config": dataclasses.asdict(config), **made_by}
        self._writer = self._lock = None
        self._shown = 0  # epochs that TensorBoard's writer has

    def lock(self) -> None:
        """Locks the folder. From now on nobody else writes there.

        Raises:
            BusyError: this run is being trained already.
            InputError: the folder cannot be written.
        """
        try:
            self._lock = lock(self.path / "lock")
        except BlockingIOError:
            raise BusyError(
                f"the run {self.path} is being trained already, by another process or in this one"
            ) from None
        except OSError as error:
            raise cannot_write(error) from None

    def open(self) -> None:
        """Writes settings and versions; the folder is locked.

        Raises:
            InputError: TensorBoard is not installed.
            RunError: the disk is full or the folder cannot be written.
        """
        shown = self.made_by["config"]["tensorboard"]
        if shown:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError(
                    "tensorboard=true needs a package: pip install tensorboard"
                ) from None
        for leftover in self.path.glob("*.tmp"):  # of a process that was killed as it wrote
            leftover.unlink()
        for key in ("config", "environment"):
            content = yaml.safe_dump(self.made_by[key], sort_keys=False)
            write_atomically(self.path / f"{key}.yaml", content.encode())
        if shown:  # TensorBoard forgets what this folder has, and is given the whole history again
            self._writer = SummaryWriter(self.path, purge_step=0)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        """Closes what is open, so that another process may continue the run."""
        for opened in (self._writer, self._lock):
            if opened is not None:
                opened.close()

    def write(self, path: Path, content: Mapping[str, Any]) -> None:
        """Writes the ``last`` or the ``best`` checkpoint, with what decided its numbers."""
        if self._lock is not None:
            save_checkpoint(path, {**content, **self.made_by})

    def write_metrics(self, history: list[Row]) -> None:
        """Writes the metrics of all epochs, and those that are new to TensorBoard."""
        if self._lock is None:
            return
        write_csv(self.path / "metrics.csv", history)
        if self._writer is not None:
            for row in history[self._shown :]:
                for key, value in row.items():
                    self._writer.add_scalar(key, value, row["epoch"])
            self._writer.flush()
            self._shown = len(history)


def begin_run(config: Any, made_by: Row) -> RunFolder:
    """Opens a new folder for a run; every process has to call this.

    Raises:
        InputError, RunError: the folder cannot be written, or as :meth:`RunFolder.open`.
    """
    rank, _ = distributed.rank_and_world()
    path = new_folder(config.runs_folder) if rank == 0 else None
    run = RunFolder(distributed.gather(path)[0], config, made_by)
    if rank == 0:
        run.lock()
        run.open()
    return run


def continue_run(state: TrainingState, task: Task, resumed: Checkpoint, made_by: Row) -> RunFolder:
    """Opens the folder of a run that has been restored from its last checkpoint.

    Every process has to call this.

    Raises:
        InputError: the checkpoint is not named ``last``, or not the same for all processes; the
            best epoch's model is not beside it, the run is being trained already or was continued
            meanwhile, or the folder cannot be written.
        RunError: as :meth:`RunFolder.open`.
    """
    progress, path = state.progress, resumed.path.parent
    require(
        resumed.path.name == "last",
        f"{resumed.path} is not in the folder of its run: a run goes on from the checkpoint named "
        "last",
    )
    position = progress.epoch, progress.batch
    states = distributed.gather((*position, repr(progress.history)))
    require(
        len(set(states)) == 1,
        f"the processes find other states in {resumed.path}, of these epochs and batches: "
        f"{[state[:2] for state in states]}; give all the same file",
    )
    run = RunFolder(path, state.config, made_by)
    if distributed.rank_and_world()[0] > 0:
        return run
    with contextlib.ExitStack() as on_error:
        on_error.push(run)  # lets go of a run that is refused
        run.lock()
        found = load_checkpoint(run.last).get("progress", {})
        require(
            (found.get("epoch"), found.get("batch")) == position,
            f"the run {path} was continued meanwhile: resume it again",
        )
        at_best = progress.is_at_best_epoch(task)
        if progress.history and not at_best:
            check_best(run.best, progress.best_row(task))
        run.open()
        if at_best:  # the run may have been killed before it had written that
            run.write(run.best, state.best_checkpoint())
        if progress.history:
            run.write_metrics(progress.history)
        on_error.pop_all()
    return run


def new_folder(base: Path) -> Path:
    """Makes a new folder under ``base``, named by the time; runs of one second get one each.

    The time is UTC, in which no hour comes twice, so that the names are in the order of the runs.

    Raises:
        InputError: it cannot be made.
    """
    stamp, number = time.strftime("%Y-%m-%d_%H-%M-%S", time.gmtime()), 0
    try:
        while True:
            number += 1
            path = base / (stamp if number == 1 else f"{stamp}_{number:03d}")
            with contextlib.suppress(FileExistsError):
                path.mkdir(parents=True)
                return path
    except OSError as error:
        raise cannot_write(error) from None


def cannot_write(error: OSError) -> InputError:
    """The line about a folder of runs that cannot be written."""
    return InputError(
        f"cannot write to {error.filename}: {error.strerror}; set runs_path to a folder that can "
        "be written"
    )


def newest(config: Any, which: str) -> Path:
    """The ``last`` or ``best`` checkpoint of the newest run of the configuration's name.

    Raises:
        InputError: there is none.
    """
    # Runs name their folders by the time, and users name copies as they like.
    found = sorted(
        config.runs_folder.glob(f"*/{which}"),
        key=lambda path: (re.fullmatch(NAMED_BY_TIME, path.parent.name) is not None, path),
    )
    remedy = f"train {config.name} first, or name a checkpoint"
    if any(config.runs_folder.glob("*/best")):
        remedy = "a run of hyperparameters.epoch=0 has none, since there is nothing to resume"
    require(bool(found), f"there is no checkpoint {config.runs_folder}/*/{which}: {remedy}")
    return found[-1]


def check_best(path: Path, row: Row) -> None:
    """Raises :class:`InputError` if the best checkpoint does not have this row of metrics."""
    found = load_checkpoint(path).get("metrics", {}) if path.exists() else {}
    # Without the times, which each process measures by itself; as text, since nan differs from nan.
    row = {key: value for key, value in row.items() if key not in TIMES}
    same = repr({key: found.get(key) for key in row}) == repr(row)
    require(same, f"the best epoch so far, {row['epoch']}, is not at {path}: put it there")


def name_of(maker: Any, script: str) -> str | None:
    """``module:name``, by which a function or class can be imported beside a script.

    It is ``None`` for a lambda, or what is defined within something else.
    """
    module, name = getattr(maker, "__module__", None), getattr(maker, "__qualname__", "")
    module = Path(script).stem if module == "__main__" else module
    return f"{module}:{name}" if name.isidentifier() else None


def environment(device: torch.device, processes: int) -> Row:
    """What besides the configuration decides a run's numbers: versions, revision, threads."""
    revision = ""
    # The library may be installed within a repository of somebody's own, which lacks its files.
    if shutil.which("git") and _git("ls-files", Path(__file__).name):
        revision = _git("describe", "--always", "--dirty")
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "device": str(device),
        "cuda": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "revision": revision.strip() or None,
    }


def _git(*command: str) -> str:
    """What git prints in the folder of the library; nothing if it fails."""
    git, folder = ["git", *command], Path(__file__).parent
    return subprocess.run(git, cwd=folder, capture_output=True, text=True, check=False).stdout

"""The files of a run: its last and its best checkpoint, and the folder of its log."""

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snn_lib.errors import InputError
from snn_lib.files import remove_leftovers
from snn_lib.training.checkpoints import load_checkpoint, save_checkpoint
from snn_lib.training.run_log import Row, RunLog, new_folder
from snn_lib.training.state import TIMES, Progress

Checkpoint = dict[str, Any]


class RunFiles:
    """Where a run writes ``<name>_last``, ``<name>_best`` and its log, and what stands there.

    Only the first of several processes opens and writes them; any may read.

    Args:
        config: the configuration.
        environment: what :func:`snn_lib.training.run_log.environment` returns.
        say: tells the user a line.
    """

    def __init__(self, config: Any, environment: Row, say: Callable[[str], None]) -> None:
        self.config, self.environment, self.say = config, environment, say
        self._new = False

    def path(self, which: str) -> Path:
        """Where the ``last`` or the ``best`` checkpoint is."""
        return Path(self.config.checkpoint_base_path) / f"{self.config.name}_{which}"

    def open(self, progress: Progress, resumed: bool) -> None:
        """Makes sure that the run can write, before it computes anything.

        Raises:
            InputError: a folder cannot be made or written.
        """
        runs = Path(self.config.runs_path)
        try:
            Path(self.config.checkpoint_base_path).mkdir(parents=True, exist_ok=True)
            for which in ("last", "best"):
                _check_writable(self.path(which))
            self._new = not resumed
            folder = Path(progress.folder)
            if folder.parent != runs / self.config.name or not folder.is_dir():
                progress.folder = str(new_folder(runs / self.config.name))
            self.log = RunLog(
                Path(progress.folder),
                dataclasses.asdict(self.config),
                self.environment,
                self.config.tensorboard,
                progress.epoch,
            )
        except OSError as error:
            raise InputError(
                f"cannot write to {error.filename}: {error.strerror}; set runs_path and "
                "checkpoint_base_path to folders that can be written"
            ) from None
        if progress.history:
            self.log.write(progress.history)

    def _set_earlier_run_aside(self) -> None:
        """Renames what an earlier run of this name left, so that this one does not overwrite it."""
        paths = {which: self.path(which) for which in ("last", "best")}
        if not any(path.exists() for path in paths.values()):
            return
        name = f"{self.config.name}_previous"
        for which, path in paths.items():
            previous = path.with_name(f"{name}_{which}")
            previous.unlink(missing_ok=True)
            if path.exists():
                path.rename(previous)
        self.say(
            f"the earlier run of this name is {name} now: --train --resume name={name} goes on "
            "with it"
        )

    def write(self, which: str, content: Checkpoint) -> None:
        """Writes the ``last`` or the ``best`` checkpoint, with what decided its numbers.

        Before the first of a new run, an earlier run of its name is set aside: not sooner, since a
        run may fail before it has anything to write.
        """
        if self._new:
            self._set_earlier_run_aside()
            self._new = False
        made_by = {"config": dataclasses.asdict(self.config), "environment": self.environment}
        save_checkpoint(self.path(which), {**content, **made_by})

    def best(self, row: Row) -> Checkpoint | None:
        """The best checkpoint, if it is there and that of the epoch with this row of metrics."""
        path = self.path("best")
        if not path.exists():
            return None
        checkpoint = load_checkpoint(path)
        found = checkpoint.get("metrics")
        # Without the times, which each process measures by itself; as text, since a file may hold
        # anything and nan differs from itself.
        row = {key: value for key, value in row.items() if key not in TIMES}
        same = isinstance(found, dict) and repr({key: found.get(key) for key in row}) == repr(row)
        return checkpoint if same else None


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    remove_leftovers(path)
    probe = path.with_name(f"{path.name}.probe.tmp")
    probe.touch()
    probe.unlink()

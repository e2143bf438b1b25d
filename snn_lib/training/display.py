"""What a run shows: lines, metrics as text, and how far an epoch has come."""

import sys
from typing import Any

from tqdm import tqdm

from snn_lib.tasks.base import Task
from snn_lib.tasks.sums import read_sums
from snn_lib.training.state import Progress, Row

BATCHES_PER_DISPLAY = 25
SECONDS_PER_LINE = 60
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} batches, {remaining} left{postfix}"


def say(line: str) -> None:
    """Prints a line, above the bar if there is one."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class EpochDisplay:
    """Shows how far an epoch has come: by a bar on a terminal, elsewhere by a line every minute.

    Args:
        progress: of the run, which the training loop updates.
        task: whose metrics are shown.
        config: the configuration.
        hidden: show nothing, as all processes but the first do.
    """

    def __init__(self, progress: Progress, task: Task, config: Any, hidden: bool) -> None:
        options = config.hyperparameters
        self.progress, self.task, self.hidden = progress, task, hidden
        self.epochs, self.batch_size = options.epoch, options.batch_size
        self.told = progress.seconds
        self.title = f"epoch {progress.epoch + 1}/{options.epoch}"
        self.bar = tqdm(
            total=progress.batches,
            initial=progress.batch,
            desc=self.title,
            bar_format=BAR,
            leave=False,
            dynamic_ncols=True,
            disable=True if hidden else None,  # None: shown on a terminal only
        )

    def __enter__(self) -> "EpochDisplay":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self) -> None:
        """Shows that one more batch is done."""
        progress = self.progress
        if not self.bar.disable:
            self.bar.update()
            if progress.batch % BATCHES_PER_DISPLAY == 0:  # to read the sums waits for the device
                metrics = self.task.metrics(read_sums(progress.sums))
                self.bar.set_postfix_str(f"{describe(metrics)}, {self._rate()}")
        elif not self.hidden and progress.seconds - self.told >= SECONDS_PER_LINE:
            self.told = progress.seconds
            say(
                f"{self.title}, batch {progress.batch}/{progress.batches}: {self._rate()}, about "
                f"{duration(self._seconds_left())} left"
            )

    def _rate(self) -> str:
        samples = self.progress.batch * self.batch_size  # of all processes together
        return f"{samples / self.progress.seconds:.0f} {self.task.unit}/s"

    def _seconds_left(self) -> float:
        """Until the end of the run, at this epoch's rate and without the evaluations."""
        progress = self.progress
        left = (self.epochs - progress.epoch) * progress.batches - progress.batch
        return left * progress.seconds / progress.batch


def duration(seconds: float) -> str:
    """A time as people say it: ``2 h 05 min``, ``12 min`` or ``40 s``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def describe(metrics: Row) -> str:
    """Metrics as text: ``loss 0.0312, accuracy 99.12 %``."""
    shares = ("accuracy", "retrieval")
    return ", ".join(
        f"{key} {100 * value:.2f} %" if key in shares else f"{key} {value:.4f}"
        for key, value in metrics.items()
    )

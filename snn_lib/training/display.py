"""What a run shows: lines, metrics as text, and a bar for each epoch on a terminal."""

import sys

from tqdm import tqdm

from snn_lib.inspection.metrics import read_sums
from snn_lib.tasks.base import Task
from snn_lib.training.run_log import Row
from snn_lib.training.state import Progress

BATCHES_PER_DISPLAY = 25


def say(line: str) -> None:
    """Prints a line, above the bar if there is one."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def epoch_bar(progress: Progress, epochs: int, hidden: bool) -> tqdm:
    """A bar over the batches of the epoch under way."""
    return tqdm(
        total=progress.batches,
        initial=progress.batch,
        desc=f"epoch {progress.epoch + 1}/{epochs}",
        unit="batch",
        leave=False,
        dynamic_ncols=True,
        disable=True if hidden else None,  # None: shown on a terminal only
    )


def advance(bar: tqdm, progress: Progress, task: Task) -> None:
    """One batch more; now and then the metrics so far, for which the device is waited for."""
    bar.update()
    if progress.batch % BATCHES_PER_DISPLAY == 0 and not bar.disable:
        sums = read_sums(progress.sums)
        rate = sums["samples"] / progress.seconds
        bar.set_postfix_str(f"{described(task.metrics(sums))}, {rate:.0f} {task.unit}/s")


def described(metrics: Row) -> str:
    """Metrics as text: ``loss 0.0312, accuracy 99.12 %``."""
    shares = ("accuracy", "retrieval")
    return ", ".join(
        f"{key} {100 * value:.2f} %" if key in shares else f"{key} {value:.4f}"
        for key, value in metrics.items()
    )


def split_of(row: Row, split: str) -> dict[str, float]:
    """The metrics of one split from an epoch's row."""
    return {
        key.removeprefix(f"{split}_"): value
        for key, value in row.items()
        if key.startswith(f"{split}_")
    }

"""What a run prints: lines, metrics as text, and the progress of an epoch."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from snn_lib.kernels import choose_backend
from snn_lib.tasks.base import Task, metrics_of, read_sums
from snn_lib.training.state import Progress, Row

BATCHES_PER_DISPLAY = 25
SECONDS_PER_LINE = 60
WARM_UP = 5  # batches of an epoch that say nothing of its pace: kernels compile in the first ones
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} batches{postfix}"


def say(line: str) -> None:
    """Prints a line, above the progress bar if there is one."""
    if sys.stdout is not None:  # it may have been closed
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def say_from_a_handler(line: bytes) -> None:
    """Writes a line to standard error, unless nobody reads it any more.

    It does not print, because a signal's handler may have interrupted a print.
    """
    with suppress(OSError):  # in cmd 2>&1 | tee log, Ctrl-C ends tee as well
        os.write(2, line + b"\n")


def introduction(model: nn.Module, config: Any, device: torch.device, world: int) -> str:
    """The line that says what runs and where. Call it in the context of the backend.

    Raises:
        ValueError, ImportError: the backend cannot run on this device, or its package is missing.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    processes = f", {world} processes" if world > 1 else ""
    kernels, why = choose_backend(device)
    return (
        f"{config.name}: {parameters:,} parameters on {device}{processes}, batches of "
        f"{config.hyperparameters.batch_size}, seed {config.seed}, kernels {kernels} ({why})"
    )


@contextmanager
def show_epoch(
    progress: Progress, task: Task, config: Any, hidden: bool
) -> Iterator[Callable[[], None]]:
    """Shows the progress of an epoch: as a bar on a terminal, elsewhere as a line every minute.

    The pace, and the time that is left of the run, are told after the first few batches.

    The training loop updates ``progress`` after every batch, and then calls the function that this
    context returns. If ``hidden``, nothing is shown: that is for all processes but the first.
    """
    settings = config.hyperparameters
    title = f"epoch {progress.epoch + 1}/{settings.epoch}"
    # A resumed epoch may have begun on another machine, so the pace is that of this process alone.
    start = progress.batch + WARM_UP
    begin = told = progress.seconds
    metrics = ""
    bar = tqdm(
        total=progress.batches,
        initial=progress.batch,
        desc=title,
        bar_format=BAR,
        leave=False,
        dynamic_ncols=True,
        disable=hidden or sys.stderr is None or None,  # None: shown on a terminal only
    )

    def advance() -> None:
        nonlocal begin, told, metrics
        batch, pace = progress.batch, ""
        if batch <= start:
            begin = progress.seconds
        else:
            per_second = (batch - start) / (progress.seconds - begin)
            # The batches up to the end of the run take this long, without the evaluations.
            batches = (settings.epoch - progress.epoch) * progress.batches - batch
            # With torchrun, each batch is one of all processes together.
            pace = f"{per_second * settings.batch_size:.0f} {task.unit}/s, "
            pace += f"about {duration(batches / per_second)} left"
        if not bar.disable:
            if batch % BATCHES_PER_DISPLAY == 0:  # reading the sums waits for the device
                with suppress(ArithmeticError, ValueError):  # too few samples for a metric
                    metrics = describe(metrics_of(task, read_sums(progress.sums)))
            bar.set_postfix_str(", ".join(filter(None, (metrics, pace))), refresh=False)
            bar.update()
        elif not hidden and progress.seconds - told >= SECONDS_PER_LINE:
            told = progress.seconds
            say(f"{title}, batch {batch}/{progress.batches}{pace and f': {pace}'}")

    with bar:
        yield advance


def duration(seconds: float) -> str:
    """A time as text: ``2 h 05 min``, ``12 min`` or ``40 s``."""
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

"""What a run shows: metrics as text, and how far an epoch has come."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import pytest
import torch
from tqdm import tqdm

from snn_lib.tasks.classification import Classification, ClassificationConfig
from snn_lib.training import display
from snn_lib.training.display import describe, duration, show_epoch
from snn_lib.training.state import Progress


def test_losses_have_four_decimals_and_shares_are_per_cent():
    assert describe({"loss": 0.03124, "accuracy": 0.9912}) == "loss 0.0312, accuracy 99.12 %"


class Precision(Classification):
    """Divides by the number of alarms, of which there are none in the first 30 batches."""

    def metrics(self, sums):
        share = torch.tensor(sums["samples"]) / 240
        return {"precision": 1 / max(0, sums["correct"] - 30), "share": share}


def shown(
    monkeypatch,
    terminal,
    batches,
    hidden=False,
    resumed=(0, 0.0),
    compiling=0.0,
    task=Classification,
):
    """What is printed while an epoch's batches are trained on, two seconds each.

    ``resumed`` is how many of them were done before, and the seconds that this took. The first
    batch takes ``compiling`` seconds longer.
    """
    out, bar = io.StringIO(), io.StringIO()
    bar.isatty = lambda: terminal
    config = ClassificationConfig()
    config.hyperparameters.epoch, config.hyperparameters.batch_size = 3, 40
    done, before = resumed
    progress = Progress(batches=60, epoch=1, batch=done, seconds=before)
    with monkeypatch.context() as patch, redirect_stdout(out), redirect_stderr(bar):
        patch.setattr(display, "tqdm", partial(tqdm, file=bar, mininterval=0))
        patch.setattr(display, "say", lambda line: out.write(f"{line}\n"))
        with show_epoch(progress, task(), config, hidden) as advance:
            for batch in range(done + 1, batches + 1):
                progress.batch, progress.seconds = batch, before + compiling + 2.0 * (batch - done)
                loss = torch.tensor(2.0 * batch)
                progress.sums = {"samples": 4 * batch, "loss": loss, "correct": batch}
                advance()
    return out.getvalue(), bar.getvalue()


def test_without_standard_error_there_is_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    config = ClassificationConfig()
    with show_epoch(Progress(batches=2), Classification(), config, hidden=False) as advance:
        advance()


def test_a_terminal_shows_a_bar_with_the_metrics_so_far_and_one_rate(monkeypatch):
    for batches in (display.BATCHES_PER_DISPLAY - 1, display.BATCHES_PER_DISPLAY):
        lines, bar = shown(monkeypatch, True, batches)
        assert lines == ""
        assert ("accuracy" in bar) is (batches == display.BATCHES_PER_DISPLAY)
    assert "epoch 2/3:  42%" in bar
    assert "25/60 batches" in bar
    # An epoch and the rest of this one are left: 95 batches of two seconds.
    assert "loss 0.5000, accuracy 25.00 %, 20 sequences/s, about 3 min left" in bar
    assert "it/s" not in bar
    assert "batch/s" not in bar
    assert "s/batch" not in bar


def test_a_bar_shows_a_metric_as_soon_as_there_are_enough_samples(monkeypatch):
    for batches in (display.BATCHES_PER_DISPLAY, 2 * display.BATCHES_PER_DISPLAY):
        _, bar = shown(monkeypatch, True, batches, task=Precision)
        assert f"{batches}/60 batches" in bar
        assert ("precision" in bar) is (batches > 30)
    assert "precision 0.0500, share 0.8333" in bar


def test_without_a_terminal_a_line_a_minute_says_how_far_it_has_come(monkeypatch):
    lines, bar = shown(monkeypatch, False, 60)
    # An epoch and the rest of this one are left: 90 batches of two seconds, 60 after this minute.
    assert lines.splitlines() == [
        "epoch 2/3, batch 30/60: 20 sequences/s, about 3 min left",
        "epoch 2/3, batch 60/60: 20 sequences/s, about 2 min left",
    ]
    assert bar == ""


def test_the_time_that_kernels_take_to_compile_says_nothing_of_the_time_left(monkeypatch):
    lines, _ = shown(monkeypatch, False, 60, compiling=3600.0)
    assert lines.splitlines() == [
        "epoch 2/3, batch 1/60",
        "epoch 2/3, batch 31/60: 20 sequences/s, about 3 min left",
    ]
    for batches in range(1, 7):
        _, bar = shown(monkeypatch, True, batches, compiling=3600.0)
        assert ("left" in bar) is ("sequences/s" in bar) is (batches == 6)


def test_the_rate_of_a_resumed_epoch_is_that_of_this_process(monkeypatch):
    """Whatever the machine on which the epoch began."""
    lines, _ = shown(monkeypatch, False, 60, resumed=(25, 5000.0))
    assert lines == "epoch 2/3, batch 55/60: 20 sequences/s, about 2 min left\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_other_processes_than_the_first_show_nothing(monkeypatch, terminal):
    assert shown(monkeypatch, terminal, 60, hidden=True) == ("", "")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.4, "59 s"), (61, "1 min"), (3570, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_a_duration_is_in_seconds_minutes_or_hours(seconds, said):
    assert duration(seconds) == said

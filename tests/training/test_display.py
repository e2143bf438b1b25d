"""What a run shows: metrics as text, and a bar that tells of them."""

import io

import torch
from tqdm import tqdm

from snn_lib.tasks.classification import Classification
from snn_lib.training import display
from snn_lib.training.display import advance, described, split_of
from snn_lib.training.state import Progress


def test_metrics_read_well():
    assert described({"loss": 0.03124, "accuracy": 0.9912}) == "loss 0.0312, accuracy 99.12 %"


def test_a_split_s_metrics_lose_its_name():
    row = {"epoch": 3, "train_loss": 0.2, "validation_loss": 0.1, "validation_f1": 0.5}
    assert split_of(row, "validation") == {"loss": 0.1, "f1": 0.5}


def test_the_bar_tells_the_metrics_so_far_now_and_then():
    text = io.StringIO()
    bar = tqdm(total=60, file=text, mininterval=0)
    progress = Progress(batches=60)
    for batch in range(1, display.BATCHES_PER_DISPLAY + 1):
        progress.batch, progress.seconds = batch, batch / 10
        progress.sums = {"samples": 4 * batch, "loss": torch.tensor(2.0 * batch), "correct": batch}
        assert "accuracy" not in text.getvalue()
        advance(bar, progress, Classification())
    bar.close()
    assert "loss 0.5000, accuracy 25.00 %, 40 sequences/s" in text.getvalue()

"""The pretrained models whose data is in the clone, in PyTorch and in ONNX Runtime."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from measuring import ROOT
from torch import nn

from snn_lib.inference import to_onnx
from snn_lib.training.checkpoints import load_checkpoint, load_weights
from snn_lib.training.config import config_from_dict
from snn_lib.training.experiment import Experiment
from snn_lib.training.loading import arguments_of_main, find_script

NAMES = sorted(
    path.name.removeprefix("pretrained_")
    for path in ROOT.glob("*checkpoint/pretrained_*")
    if not path.suffix and "_ecg" not in path.name  # whose recordings are not in the clone
)


def load(name: str, chosen: argparse.Namespace, samples: int | None = None) -> Experiment:
    """A pretrained model in its experiment, with so many test images or recordings or all.

    With ``--smoke`` there are ten.
    """
    path = next(ROOT.glob(f"*checkpoint/pretrained_{name}"))
    checkpoint = load_checkpoint(path)
    build_model, task, _ = arguments_of_main(find_script(checkpoint))
    config = config_from_dict(task.config_class, checkpoint["config"], ())
    config.dataset_path, config.device = str(ROOT / config.dataset_path), chosen.device
    samples = 10 if chosen.smoke else samples
    for section in ("mnist_config", "events"):
        if samples and hasattr(config, section):
            getattr(config, section).test_size = samples
    experiment = Experiment(build_model, task, config)
    load_weights(experiment.model, checkpoint)
    return experiment


def onnx_session(path: Path) -> onnxruntime.InferenceSession:
    """A graph in ONNX Runtime on one thread."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), settings)


class OnnxStream:
    """A network as its ONNX graph, which keeps its state from one step to the next."""

    def __init__(self, model: nn.Module, shape: Sequence[int], folder: str) -> None:
        path = Path(folder) / "network.onnx"
        to_onnx(model, path, shape)
        self.session = onnx_session(path)
        self.reset(batch=1)

    def reset(self, batch: int) -> None:
        """Starts at rest, for a batch of so many samples."""
        _, *states = self.session.get_inputs()
        self.state = {s.name: np.zeros((batch, *s.shape[1:]), np.float32) for s in states}

    def step(self, x: np.ndarray) -> np.ndarray:
        """Runs one step, ``(B, *features)``."""
        output, *states = self.session.run(None, {"x": x, **self.state})
        self.state = dict(zip(self.state, states, strict=True))
        return output

"""The folder of a run, ``runs/<name>/<time>/``: metrics.csv, configuration, versions, TensorBoard.

``metrics.csv`` is written anew, as a whole, after every epoch from the history that the checkpoint
holds, so a run that is killed and resumed has each epoch in it exactly once.
"""

import os
import platform
import shutil
import subprocess
import time
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from snn_lib.files import remove_leftovers, write_atomically, write_csv

Row = dict[str, Any]


def new_folder(base: Path) -> Path:
    """A new folder under ``base``, named by the time."""
    base.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        folder = base / (stamp if attempt == 1 else f"{stamp}_{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{base} has a thousand folders of {stamp}")


class RunLog:
    """Writes the folder of a run.

    Args:
        folder: made if it does not exist.
        config: the resolved configuration, a plain dict.
        environment: what :func:`environment` returns.
        tensorboard: whether to write TensorBoard events, if the package is there.
        epochs: how many epochs the run has behind it, if it is resumed.
    """

    def __init__(
        self, folder: Path, config: Row, environment: Row, tensorboard: bool, epochs: int = 0
    ) -> None:
        self.folder, self.writer = folder, None
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.yaml", "environment.yaml", "metrics.csv"):
            remove_leftovers(folder / name)
        for name, content in (("config.yaml", config), ("environment.yaml", environment)):
            write_atomically(folder / name, yaml.safe_dump(content, sort_keys=False).encode())
        if tensorboard and find_spec("tensorboard") is None:
            warnings.warn(
                "tensorboard is true but the package is not installed: no events are written",
                RuntimeWarning,
                stacklevel=2,
            )
        elif tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder, purge_step=epochs + 1)

    def write(self, history: list[Row]) -> None:
        """Writes all epochs' metrics, and the last one's to TensorBoard."""
        write_csv(self.folder / "metrics.csv", history)
        if self.writer is not None:
            for key, value in history[-1].items():
                self.writer.add_scalar(key, value, history[-1]["epoch"])
            self.writer.flush()


def environment(device: torch.device, processes: int) -> Row:
    """What besides the configuration decides a run's numbers: versions, revision, threads."""
    revision = None
    if shutil.which("git"):
        git = ["git", "describe", "--always", "--dirty"]
        folder = Path(__file__).parent
        revision = subprocess.run(
            git, cwd=folder, capture_output=True, text=True, check=False
        ).stdout.strip()
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
        "revision": revision or None,
    }

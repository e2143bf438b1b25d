"""Utilities for spike trains, under the names of the authors' 2020 release.

Arrays are NumPy arrays with time last, ``(pattern, train, time)``. Times are in steps. Random
numbers come from PyTorch's generator, which ``torch.manual_seed`` seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch.utils.data import Dataset

from snn_lib.cells import IIRSynapse, LowPassSynapse
from snn_lib.data.patterns import damage_patterns, single_damage
from snn_lib.inspection.metrics import OutputFilter

__all__ = [
    "RandPatternDataset",
    "filter_spike",
    "filter_spike_multiple",
    "float_to_spike_train",
    "gaussian_filter_spike_train",
    "gaussian_filter_spike_train_batch",
    "generate_rand_pattern",
    "mutate_spike_pattern",
    "plot_raster",
    "plot_raster_dot",
]


def generate_rand_pattern(
    pattern_num: int, synapse_num: int, length: int, min_spike_num: int, max_spike_num: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Makes random patterns, each of which is a class of its own.

    Every train has ``min_spike_num`` to ``max_spike_num`` spikes, at times that are all different
    and equally likely.

    Returns:
        The patterns ``(pattern, synapse, time)`` and one-hot labels ``(pattern, pattern)``, both
        float32, and the class labels ``(pattern,)``, int64.

    Raises:
        ValueError: the numbers of spikes are not 0 <= min <= max <= length.
    """
    if not 0 <= min_spike_num <= max_spike_num <= length:
        raise ValueError(
            f"min_spike_num is {min_spike_num} and max_spike_num {max_spike_num}, "
            f"expected 0 <= min <= max <= length {length}"
        )
    number = torch.randint(min_spike_num, max_spike_num + 1, (pattern_num, synapse_num, 1))
    rank = torch.rand(pattern_num, synapse_num, length).argsort(-1)  # a random order of the times
    return (
        (rank < number).float().numpy(),
        np.eye(pattern_num, dtype=np.float32),
        np.arange(pattern_num),
    )


def mutate_spike_pattern(template_pattern: ArrayLike, mean: float, sigma: float) -> np.ndarray:
    """Moves every spike by round(N(mean, sigma)) steps, clipped to the time range.

    Args:
        template_pattern: 0 and 1, ``(..., time)``.

    Returns:
        float32, of the template's shape. Spikes that are moved to the same step become one.
    """
    template = np.asarray(template_pattern, dtype=np.float32)
    trains = torch.from_numpy(template.reshape(-1, template.shape[-1]).T.copy())
    jitter = replace(single_damage("jitter_sigma", sigma), jitter_mean=mean)
    one_sample = torch.zeros(1, dtype=torch.int64)
    moved = damage_patterns(trains[:, None], one_sample, jitter, torch.default_generator).spikes
    return moved[:, 0].T.reshape(template.shape).numpy()


def filter_spike(
    spike_train: ArrayLike,
    filter_type: str = "exp",
    tau_m: float = 10,
    tau_s: float = 2.5,
    normalize: bool = True,
) -> np.ndarray:
    """Filters one spike train.

    Args:
        spike_train: 0 and 1, ``(time,)``.
        filter_type: ``"exp"`` for the first-order low pass with ``tau_s``, whose answer to a spike
            has the peak 1; or ``"dual_exp"`` for the difference of two low passes.
        normalize: whether the difference is scaled to the peak 1 in continuous time.

    Returns:
        float32, ``(1, time)``.

    Raises:
        ValueError: the filter is unknown, or the time constants do not fit it.
    """
    return filter_spike_multiple(
        np.asarray(spike_train)[None], filter_type, tau_m, tau_s, normalize
    )


def filter_spike_multiple(
    spike_trains: ArrayLike,
    filter_type: str = "exp",
    tau_m: float = 10,
    tau_s: float = 2.5,
    normalize: bool = True,
) -> np.ndarray:
    """As :func:`filter_spike`, for several trains ``(train, time)``; returns the same shape."""
    trains = torch.from_numpy(np.array(spike_trains, np.float32))
    channels = len(trains)
    synapse: IIRSynapse
    if filter_type == "exp":
        synapse = LowPassSynapse(channels, tau_s)
    elif filter_type == "dual_exp":
        synapse = OutputFilter(tau_m, tau_s, channels, normalize)
    else:
        raise ValueError(f"filter_type is {filter_type!r}, expected 'exp' or 'dual_exp'")
    with torch.no_grad():
        psp, _ = synapse(trains.T[:, None])  # (T, 1, N)
    return psp[:, 0].T.numpy()


def gaussian_filter_spike_train(spike_train: ArrayLike, sigma: float) -> np.ndarray:
    """Smooths a spike train by a Gaussian of standard deviation ``sigma`` and area 1.

    Args:
        spike_train: ``(time,)``, with silence before and after it.

    Returns:
        float32, ``(time,)``.

    Raises:
        ValueError: ``sigma`` is not positive.
    """
    return gaussian_filter_spike_train_batch(np.asarray(spike_train)[None], sigma)[0]


def gaussian_filter_spike_train_batch(spike_trains: ArrayLike, sigma: float) -> np.ndarray:
    """As :func:`gaussian_filter_spike_train`, for any ``(..., time)``; returns the same shape."""
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}, expected a number above 0")
    trains = torch.from_numpy(np.array(spike_trains, np.float32))
    reach = int(4 * sigma + 0.5)  # as in SciPy
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    rows = trains.reshape(-1, 1, trains.shape[-1])
    smooth = F.conv1d(rows, (kernel / kernel.sum()).view(1, 1, -1), padding=reach)
    return smooth.view(trains.shape).numpy()


def float_to_spike_train(value: float, length: int) -> np.ndarray:
    """Makes int(value * length) evenly spaced spikes from step 0 on, float32 ``(length,)``.

    Raises:
        ValueError: ``value`` lies outside [0, 1].
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"value is {value}, expected a rate in [0, 1]")
    train = np.zeros(length, dtype=np.float32)
    number = int(value * length)
    train[(np.arange(number) * (length / max(number, 1))).astype(int)] = 1.0
    return train


class RandPatternDataset(Dataset):
    """Patterns and their labels, of ``.npy`` files, or as :func:`generate_rand_pattern` makes them.

    If there is a ``transform``, it is called with each pattern.
    """

    def __init__(
        self,
        dataset_path: str | Path | Sequence[Any],
        label_path: str | Path | Sequence[Any],
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.dataset: Any = dataset_path
        if isinstance(dataset_path, (str, Path)):
            self.dataset = np.load(dataset_path).astype(np.float32)
        self.label: Any = np.load(label_path) if isinstance(label_path, (str, Path)) else label_path
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        pattern = self.dataset[index]
        return pattern if self.transform is None else self.transform(pattern), self.label[index]


def plot_raster(spike_mat: ArrayLike, **options: Any) -> None:
    """Draws the spikes of ``(train, time)`` into pyplot's axes, with the options of its ``plot``.

    If a ``label`` is among them, there is a legend.
    """
    train, time = np.nonzero(np.asarray(spike_mat))
    plt.plot(time, train, **{"linestyle": "None", "marker": "|", **options})
    if "label" in options:
        plt.legend(loc="upper right")


def plot_raster_dot(spike_mat: ArrayLike) -> None:
    """Draws the spikes of ``(train, time)`` as dots, in a figure of its own; train 0 is below."""
    trains, steps = np.shape(spike_mat)
    train, time = np.nonzero(np.asarray(spike_mat))
    axes = plt.figure().gca()
    axes.scatter(time, train, s=1.5)
    axes.set(xlim=(0, steps), ylim=(0, trains))

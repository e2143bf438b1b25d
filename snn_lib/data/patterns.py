"""Spatio-temporal spike patterns: reads, delays and damages them.

A pattern file holds an array ``(patterns, trains, time)``. In memory, patterns are time first like
everything else: ``(T, patterns, N)`` for N spike trains. So ``patterns[:, labels]`` is a batch
``(T, B, N)``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from snn_lib.errors import require
from snn_lib.files import read_array
from snn_lib.settings import Needs, Settings, setting


def load_patterns(path: str | Path) -> Tensor:
    """Reads spike patterns from a ``.npy`` file.

    Args:
        path: an array ``(patterns, trains, time)`` of 0 and 1, of any numeric type.

    Returns:
        float32, ``(T, patterns, N)``.

    Raises:
        InputError: the file cannot be read, or holds no such array.
    """
    array = read_array(path)
    require(
        array.ndim == 3 and array.size > 0,
        f"{path} holds an array of shape {array.shape}, expected (patterns, trains, time)",
    )
    require(
        array.dtype.kind in "biuf" and bool(np.isin(array, (0, 1)).all()),
        f"{path} holds values other than 0 and 1",
    )
    return torch.from_numpy(array.transpose(2, 0, 1).astype(np.float32, order="C"))


def delay_spikes(spikes: Tensor, steps: int) -> Tensor:
    """Delays spikes ``(T, B, N)``: the first ``steps`` become silent, the last ones are lost.

    Raises:
        ValueError: ``steps`` is negative.
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}, expected at least 0")
    late = torch.zeros_like(spikes)
    late[steps:] = spikes[: max(len(spikes) - steps, 0)]
    return late


MODIFIED = Needs("damage.modify_probability")
MOVED = Needs("damage.jitter_probability")
CUT = Needs("damage.removal_probability")


@dataclass(frozen=True)
class Damage(Settings):
    """How the patterns of a batch are damaged, each sample independently of the others.

    A modified sample may have its spikes moved in time. Each spike then moves by a normal deviate,
    rounded to steps, and stays within the pattern; spikes that meet become one. A modified sample
    may also lose a part: a block at a random place, or whole rows at random. Then every sample,
    modified or not, gets noise.

    All samples have the strengths ``jitter_sigma``, ``block_size``, ``rows_removed`` and
    ``noise_probability``. If ``varied``, these are the largest strengths: each sample draws its
    own, uniformly from zero.
    """

    modify_probability: float = setting(
        0.4, "probability that a sample is modified", at_least=0, at_most=1
    )
    jitter_probability: float = setting(
        0.7, "probability that its spikes then move", MODIFIED, at_least=0, at_most=1
    )
    jitter_mean: float = setting(0.0, "mean of the spikes' shifts, in steps", MODIFIED, MOVED)
    jitter_sigma: float = setting(
        1.0, "standard deviation of the shifts, in steps", MODIFIED, MOVED, at_least=0
    )
    removal_probability: float = setting(
        0.5, "probability that it then loses a part", MODIFIED, at_least=0, at_most=1
    )
    block_probability: float = setting(
        0.5, "probability that the part is a block, not rows", MODIFIED, CUT, at_least=0, at_most=1
    )
    block_size: int = setting(
        40,
        "spike trains and steps of the block",
        MODIFIED,
        CUT,
        Needs("damage.block_probability"),
        at_least=0,
    )
    rows_removed: int = setting(
        40,
        "number of spike trains that are silenced as rows",
        MODIFIED,
        CUT,
        Needs("damage.block_probability", never=1),
        at_least=0,
    )
    noise_probability: float = setting(
        0.005, "probability of a noise spike in a cell", at_least=0, at_most=1
    )
    varied: bool = setting(False, "draw each sample's strengths from 0 to these values")

    def strengths(self) -> dict[str, float]:
        """The strength of each of ``DAMAGE_KINDS``, 0 if it has no effect."""
        config = SimpleNamespace(damage=self)
        return {
            entry.name: getattr(self, entry.name)
            * all(need.met_by(config) for need in entry.metadata["needs"])
            for entry in fields(self)
            if entry.name in DAMAGE_KINDS
        }


@dataclass(frozen=True)
class DamageKind:
    """One kind of damage, whose strength is the value of one field of :class:`Damage`.

    Attributes:
        label: the label of a plot's axis, with the unit of the strength.
        strengths: the strengths of a sweep, from none to far more than in training.
        always: the probabilities that let it happen to every sample.
    """

    label: str
    strengths: tuple[float, ...]
    always: Mapping[str, float]


# The keys are the fields of ``Damage`` that are the strengths.
DAMAGE_KINDS = {
    "rows_removed": DamageKind(
        "rows removed", (0, 40, 80, 120, 150, 180, 210), {"removal_probability": 1.0}
    ),
    "block_size": DamageKind(
        "side of the removed block",
        (0, 40, 80, 120, 160, 200, 240),
        {"removal_probability": 1.0, "block_probability": 1.0},
    ),
    "jitter_sigma": DamageKind(
        "jitter (s.d. in steps)", (0, 1, 2, 4, 8, 16), {"jitter_probability": 1.0}
    ),
    "noise_probability": DamageKind(
        "noise spikes per cell", (0, 0.005, 0.01, 0.02, 0.04, 0.08), {}
    ),
}


def single_damage(kind: str, strength: float) -> Damage:
    """Makes damage of one kind alone, which every sample gets with the same strength.

    Raises:
        ValueError: ``kind`` is none of ``DAMAGE_KINDS``.
    """
    if kind not in DAMAGE_KINDS:
        raise ValueError(f"damage {kind!r} is unknown, choose one of {', '.join(DAMAGE_KINDS)}")
    nothing = {entry.name: type(entry.default)(0) for entry in fields(Damage)}
    always = {"modify_probability": 1.0, **DAMAGE_KINDS[kind].always}
    return Damage(**{**nothing, **always, kind: strength})


class Damaged(NamedTuple):
    """A batch of damaged patterns.

    Attributes:
        spikes: the damaged patterns, ``(T, B, N)``.
        removed: whether a cell belongs to the part that was removed, bool ``(T, B, N)``.
    """

    spikes: Tensor
    removed: Tensor


def damage_patterns(
    patterns: Tensor, labels: Tensor, damage: Damage, generator: torch.Generator
) -> Damaged:
    """Takes the batch ``patterns[:, labels]`` and damages it.

    It damages a list of the spikes, which is short, and then writes the dense batch once.

    Args:
        patterns: spikes of 0 and 1, ``(T, patterns, N)``.
        labels: number of each sample's pattern, int64 ``(B,)``.
        damage: the kinds of damage, with their probabilities and strengths.
        generator: the source of randomness, on the patterns' device.

    Returns:
        Spikes in the dtype of ``patterns``, and the removed part.

    Raises:
        ValueError: a block or the rows that may be removed are larger than a pattern.
    """
    steps, _, trains = patterns.shape
    size, device = len(labels), patterns.device
    strengths = damage.strengths()
    if strengths["block_size"] > min(steps, trains):
        raise ValueError(
            f"block_size is {damage.block_size}, patterns have {trains} trains of {steps} steps"
        )
    if strengths["rows_removed"] > trains:
        raise ValueError(f"rows_removed is {damage.rows_removed}, patterns have {trains} trains")

    def happens(probability: float) -> Tensor:  # (B,)
        return torch.rand(size, device=device, generator=generator) < probability

    def strength(most: float) -> Tensor:  # (B,)
        full = torch.full((size,), float(most), device=device)
        if not damage.varied:
            return full
        return full * torch.rand(size, device=device, generator=generator)

    modified = happens(damage.modify_probability)
    jittered = modified & happens(damage.jitter_probability)
    cut = modified & happens(damage.removal_probability)
    block = happens(damage.block_probability)

    time, sample, train = _spikes(patterns, labels)
    deviate = torch.randn(len(time), device=device, generator=generator)
    shift = damage.jitter_mean + strength(damage.jitter_sigma)[sample] * deviate
    shift = shift.round().clamp(-steps, steps).long()
    time = (time + shift * jittered[sample]).clamp_(0, steps - 1)

    # A removed cell is one of these times, (B, T), and one of these trains, (B, N).
    side = strength(damage.block_size).round().long()
    times, of_trains = (_span(extent, side, generator) for extent in (steps, trains))
    rows = torch.rand(size, trains, device=device, generator=generator).argsort(1)
    lost = rows < strength(damage.rows_removed).round()[:, None]
    times = cut[:, None] & (times | ~block[:, None])
    of_trains = torch.where(block[:, None], of_trains, lost)
    removed = times.T[..., None] & of_trains  # (T, B, N)
    kept = ~removed[time, sample, train]

    spikes = patterns.new_zeros(steps, size, trains)
    spikes[time[kept], sample[kept], train[kept]] = 1.0
    noise = strength(damage.noise_probability)
    most = noise.max().item() if size else 0.0
    cells = _bernoulli(spikes.numel(), most, generator)
    if damage.varied:  # spikes are drawn as for the noisiest sample; each keeps its share
        share = torch.rand(len(cells), device=device, generator=generator) * most
        cells = cells[share < noise[cells // trains % size]]
    spikes.view(-1)[cells] = 1.0
    return Damaged(spikes, removed)


def _spikes(patterns: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lists the time, sample and train of every spike of ``patterns[:, labels]``."""
    of_pattern = [pattern.nonzero() for pattern in patterns.unbind(1)]  # time and train
    listed = [of_pattern[label] for label in labels.tolist()]
    counts = labels.new_tensor([len(spikes) for spikes in listed])
    sample = torch.arange(len(labels), device=labels.device).repeat_interleave(counts)
    time, train = torch.cat([of_pattern[0][:0], *listed]).T  # the batch may be empty
    return time, sample, train


def _span(extent: int, length: Tensor, generator: torch.Generator) -> Tensor:
    """Marks a span of each sample's ``length`` at a random place, bool ``(B, extent)``."""
    uniform = torch.rand(len(length), device=length.device, generator=generator)
    first = (uniform * (extent - length + 1)).long()
    index = torch.arange(extent, device=length.device)
    return (index >= first[:, None]) & (index < (first + length)[:, None])


def _bernoulli(cells: int, probability: float, generator: torch.Generator) -> Tensor:
    """Draws the cells in which an event of this probability happens; returns sorted indices.

    The gaps between events are geometric, 1 + floor(log U / log(1 - p)). This takes one random
    number for each event instead of one for each cell.
    """
    if probability == 0.0:
        return torch.empty(0, dtype=torch.int64, device=generator.device)
    mean = cells * probability
    # Ten standard deviations more gaps than expected are enough to reach past the last cell.
    enough = int(mean + 10 * math.sqrt(mean) + 10)
    uniform = torch.rand(enough, dtype=torch.float64, device=generator.device, generator=generator)
    log_failure = math.log1p(-probability) if probability < 1.0 else -math.inf
    index = (1 + (torch.log1p(-uniform) / log_failure).floor()).cumsum(0).long() - 1
    return index[index < cells]

"""Association: a network learns to answer damaged spike patterns with the patterns themselves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snn_lib.data.batches import Batch, Batches, batch_generator
from snn_lib.data.patterns import (
    DAMAGE_KINDS,
    Damage,
    damage_patterns,
    delay_spikes,
    load_patterns,
    single_damage,
)
from snn_lib.data.preparation import SequencePreparation
from snn_lib.errors import InputError, require
from snn_lib.files import write_csv
from snn_lib.inspection.activity import Activity
from snn_lib.inspection.metrics import OutputFilter, match_spikes, nearest_pattern, spike_scores
from snn_lib.settings import (
    LONGEST_MEMORY,
    ExperimentConfig,
    ResonantHyperparameters,
    Settings,
    setting,
)
from snn_lib.tasks.base import Task, output_of
from snn_lib.tasks.sums import add_sums, read_sums

SAMPLES_PER_PATTERN = 10  # for each kind and strength of damage in the sweep
FIRST_STEPS = 50  # in which patterns can hardly be told apart
SWEEPS = -3  # replaces the epoch in the sweep's seeds, as in ``tasks.base.EVALUATIONS``


@dataclass
class AssociationHyperparameters(ResonantHyperparameters):
    """Hyperparameters of association: the model and its training."""

    length: int = setting(300, "time steps of the patterns", at_least=1)
    synapse: Literal["dual_exponential", "resonant"] = setting(
        "dual_exponential",
        "filters that all have tau_m and tau_s, or resonant ones of many memories",
    )
    tau_m: float = setting(
        8.0,
        "slow time constant of synapse, reset and loss, in steps",
        above=0,
        at_most=LONGEST_MEMORY,
    )
    tau_s: float = setting(2.0, "fast time constant of synapse and loss, in steps", above=0)
    delay: int = setting(4, "steps by which the target is later than the input", at_least=0)
    weight_gain: float = setting(
        4.0, "standard deviation of the first weights, times sqrt(fan-in)", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.delay < self.length,
            f"delay is {self.delay}, expected less than length, {self.length}",
        )


@dataclass
class PatternOptions(Settings):
    """How many damaged samples of each pattern are drawn."""

    training_samples: int = setting(100, "samples of each pattern in an epoch", at_least=1)
    validation_samples: int = setting(20, "samples of each pattern", at_least=1)
    test_samples: int = setting(100, "samples of each pattern", at_least=1)


@dataclass
class AssociationConfig(ExperimentConfig):
    """The configuration of associative_memory."""

    dataset_path: str = setting(
        "dataset/associative_target.npy", "array [patterns, trains, time] of 0 and 1"
    )
    hyperparameters: AssociationHyperparameters = field(default_factory=AssociationHyperparameters)
    pattern_config: PatternOptions = field(default_factory=PatternOptions)
    damage: Damage = field(default_factory=Damage)


class Association(Task):
    """The task of associative_memory.

    Attributes:
        patterns: the patterns, spikes ``(T, patterns, N)``, on the CPU, where damage is drawn.
        targets: the patterns, ``delay`` steps later, on the device.
    """

    config_class = AssociationConfig
    unit = "samples"

    def prepare(self, config: AssociationConfig, device: torch.device) -> None:
        """Reads the patterns; see :class:`Task`."""
        super().prepare(config, device)
        options = config.hyperparameters
        self.patterns = load_patterns(config.dataset_path)
        require(
            len(self.patterns) == options.length,
            f"{config.dataset_path} has {len(self.patterns)} time steps, hyperparameters.length is "
            f"{options.length}",
        )
        self.targets = delay_spikes(self.patterns, options.delay).to(device)
        trains = self.patterns.shape[2]
        self.preparation = SequencePreparation([trains])
        self.filter = OutputFilter(options.tau_m, options.tau_s, trains).to(device)
        self.filtered_targets, _ = self.filter(self.targets)
        try:  # damage that does not fit the patterns is refused before training
            damage_patterns(self.patterns, torch.zeros(1).long(), config.damage, torch.Generator())
        except ValueError as error:
            raise InputError(f"damage: {error}") from None

    def make_batches(self, split: str) -> Batches:
        """Damaged patterns ``(T, B, N)`` and their numbers ``(B,)``."""
        options = self.config.pattern_config
        samples = {
            "train": options.training_samples,
            "validation": options.validation_samples,
            "test": options.test_samples,
        }
        return self.damaged_batches(samples[split], self.config.damage)

    def damaged_batches(self, samples: int, damage: Damage) -> Batches:
        """Batches with ``samples`` of every pattern, each damaged anew in every epoch."""
        seed, patterns = self.config.seed, self.patterns
        count = patterns.shape[1]

        def take(numbers: Tensor, share: slice, epoch: int, number: int) -> Batch:
            labels = numbers % count
            generator = batch_generator(seed, epoch, number + 1)
            x = damage_patterns(patterns, labels, damage, generator).spikes
            return Batch(x[:, share], labels[share])

        size = self.config.hyperparameters.batch_size
        return self.shared(samples * count, size, take, shuffle=True)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Mean squared difference of filtered output and filtered target, and sums."""
        output = output_of(model, batch.x)  # (T, B, N)
        difference = self.filter(output - self.targets[:, batch.y])[0]
        loss = difference.square().mean()
        with torch.no_grad():
            return loss, self.likeness(output, difference, batch.y)

    def likeness(self, output: Tensor, difference: Tensor, labels: Tensor) -> dict[str, Any]:
        """Sums for :meth:`metrics`.

        Args:
            output: spikes, ``(T, B, N)``.
            difference: of output and target, filtered, ``(T, B, N)``.
            labels: which pattern each sample is, ``(B,)``.
        """
        target = self.filtered_targets[:, labels]
        nearest = nearest_pattern(difference + target, self.filtered_targets)
        return {
            "samples": len(labels),
            "loss": difference.square().mean() * len(labels),
            "power": target.square().mean() * len(labels),
            "retrieved": (nearest == labels).sum(),
            **match_spikes(output, self.targets[:, labels]),
        }

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Loss, error (the loss as a share of the target's power), retrieval, and spike scores."""
        return {
            "loss": sums["loss"] / sums["samples"],
            "error": sums["loss"] / sums["power"],
            "retrieval": sums["retrieved"] / sums["samples"],
            **spike_scores(sums),
        }

    def report(self, model: nn.Module, activity: Activity) -> Iterator[str]:
        """Sweeps the damage, and writes the results as a table and as a plot."""
        folder = self.config.runs_folder
        rows = self.sweep(model)
        write_sweep(rows, folder, vars(self.config.damage))

        def listed(kind: str, key: str, said: Callable[[dict[str, Any]], str]) -> str:
            """What is said at each strength of a kind of damage, of the rows that have the key."""
            of_kind = (row for row in rows if row["damage"] == kind and key in row)
            return ", ".join(f"{row['strength']:g}: {said(row)}" for row in of_kind)

        def overall(row: dict[str, Any]) -> str:
            return f"{100 * row['error']:.1f} % / {100 * row['retrieval']:.0f} %"

        def inside(row: dict[str, Any]) -> str:
            return f"{row['part_precision']:.3f} / {row['part_recall']:.3f}"

        def late(row: dict[str, Any]) -> str:
            return f"{100 * row['late_error']:.1f} %"

        for kind in DAMAGE_KINDS:
            yield f"error / retrieval at {kind} {listed(kind, 'error', overall)}"
            if parts := listed(kind, "part_recall", inside):
                yield f"precision / recall in the part cut out by {kind} {parts}"
            if later := listed(kind, "late_error", late):
                yield f"error after the first {FIRST_STEPS} steps at {kind} {later}"
        usual = Damage()
        if min(self.patterns.shape[0], self.patterns.shape[2]) >= usual.block_size:
            row = self.measure(model, usual)
            yield f"error / retrieval at the damage of the 2020 release {overall(row)}"
        yield f"damage sweep in {folder / 'damage_sweep.csv'} and .png"

    def sweep(self, model: nn.Module, samples: int = SAMPLES_PER_PATTERN) -> list[dict[str, Any]]:
        """What :meth:`measure` says of each kind and strength of ``DAMAGE_KINDS``, one row each.

        Sizes beyond the patterns' own are left out.
        """
        steps, _, trains = self.patterns.shape
        limits = {"rows_removed": trains, "block_size": min(steps, trains)}
        return [
            {"damage": kind, "strength": strength}
            | self.measure(model, single_damage(kind, strength), samples)
            for kind, of_kind in DAMAGE_KINDS.items()
            for strength in of_kind.strengths
            if strength <= limits.get(kind, strength)
        ]

    @torch.inference_mode()
    def measure(
        self, model: nn.Module, damage: Damage, samples: int = SAMPLES_PER_PATTERN
    ) -> dict[str, float]:
        """Metrics of the model under one kind of damage, on so many samples of every pattern.

        In longer patterns ``late_error`` leaves out the first ``FIRST_STEPS``. Where the damage
        cuts out a part, ``part_precision``, ``part_recall`` and ``part_f1`` are of the spikes
        inside it alone, which the network adds by heart.
        """
        model.eval()
        sums: dict[str, Any] = {}
        count, size = self.patterns.shape[1], self.config.hyperparameters.batch_size
        for number, labels in enumerate((torch.arange(samples * count) % count).split(size)):
            generator = batch_generator(self.config.seed, SWEEPS, number + 1)
            damaged = damage_patterns(self.patterns, labels, damage, generator)
            output = output_of(model, damaged.spikes.to(self.device))
            labels = labels.to(self.device)
            difference = self.filter(output - self.targets[:, labels])[0]
            add_sums(sums, self.likeness(output, difference, labels))
            part = delay_spikes(damaged.removed, self.config.hyperparameters.delay).to(self.device)
            counts = match_spikes(output * part, self.targets[:, labels] * part)
            add_sums(sums, {f"part_{key}": value for key, value in counts.items()})
            late = self.filtered_targets[FIRST_STEPS:, labels]
            power = {"late_loss": difference[FIRST_STEPS:], "late_power": late}
            add_sums(sums, {key: values.square().sum() for key, values in power.items()})
        totals = read_sums(sums)
        metrics = self.metrics(totals)
        if totals["late_power"]:
            metrics["late_error"] = totals["late_loss"] / totals["late_power"]
        if totals["part_target_spikes"]:
            inside = {key: totals[f"part_{key}"] for key in counts}
            metrics |= {f"part_{key}": value for key, value in spike_scores(inside).items()}
        return metrics


def write_sweep(rows: Sequence[dict[str, Any]], folder: Path, trained: Mapping[str, float]) -> None:
    """Writes the rows of :meth:`Association.sweep` as damage_sweep.csv and damage_sweep.png.

    The picture marks the ``trained`` strength of each kind of damage.
    """
    import matplotlib.pyplot as plt  # only here: training does without it

    from snn_lib.inspection.plotting import damage_sweeps

    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "damage_sweep.csv", rows)
    axes = damage_sweeps(rows, trained)
    axes.flat[0].figure.savefig(folder / "damage_sweep.png", dpi=120)
    plt.close(axes.flat[0].figure)

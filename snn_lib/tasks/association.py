"""Association: a network receives damaged spike patterns and learns to output the whole ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snn_lib.data.batches import Batch, Split
from snn_lib.data.patterns import (
    DAMAGE_KINDS,
    Damage,
    damage_patterns,
    delay_spikes,
    load_patterns,
    single_damage,
)
from snn_lib.data.preparation import SequencePreparation
from snn_lib.errors import InputError, SettingsError, refusing, require
from snn_lib.files import write_csv
from snn_lib.inspection.activity import Activity
from snn_lib.inspection.metrics import OutputFilter, match_spikes, nearest_pattern, spike_scores
from snn_lib.seeds import DATA, batch_generator
from snn_lib.settings import (
    FIRST_VALUE,
    LONGEST_MEMORY,
    TRAINING,
    ExperimentConfig,
    Hyperparameters,
    ResonantFilters,
    Settings,
    section,
    setting,
)
from snn_lib.tasks.base import Task, add_sums, output_of, read_sums

EVALUATION_BATCH = 32  # not a setting, since the damage is drawn for a whole batch
SAMPLES_PER_PATTERN = 10  # for each kind and strength of damage
FIRST_STEPS = 50  # the network can hardly tell the patterns apart during these


@dataclass
class AssociationHyperparameters(ResonantFilters, Hyperparameters):
    """Hyperparameters of association: the model and its training."""

    length: int = setting(300, "time steps of the patterns", at_least=1)
    batch_size: int = setting(
        64, "samples in a training batch, over all processes", TRAINING, at_least=1
    )
    synapse: Literal["dual_exponential", "resonant"] = setting(
        "dual_exponential",
        "all filters with tau_m and tau_s, or resonant ones of many memories",
        FIRST_VALUE,
    )
    tau_m: float = setting(
        8.0,
        "slow time constant of synapse, reset and loss; of the loss alone if weights are loaded",
        above=0,
        at_most=LONGEST_MEMORY,
    )
    tau_s: float = setting(
        2.0,
        "fast time constant of synapse and loss; of the loss alone if weights are loaded",
        above=0,
    )
    delay: int = setting(4, "steps by which the target is later than the input", at_least=0)
    weight_gain: float = setting(
        4.0, "first weights' deviation times sqrt(inputs)", FIRST_VALUE, above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.tau_s < self.tau_m,
            f"tau_m is {self.tau_m} and tau_s {self.tau_s}, expected tau_s below tau_m",
        )
        require(
            self.delay < self.length,
            f"delay is {self.delay}, expected less than length, {self.length}",
        )


@dataclass
class PatternSettings(Settings):
    """How many damaged samples of each pattern are drawn."""

    training_samples: int = setting(
        100, "samples of each pattern in an epoch", TRAINING, at_least=1
    )
    validation_samples: int = setting(20, "samples of each pattern", TRAINING, at_least=1)
    test_samples: int = setting(100, "samples of each pattern", at_least=1)


@dataclass
class AssociationConfig(ExperimentConfig):
    """The configuration of associative_memory."""

    dataset_path: str = setting(
        "dataset/associative_target.npy",
        "array [patterns, trains, time] of 0 and 1; SIZES in the script says how many trains",
    )
    hyperparameters: AssociationHyperparameters = section(AssociationHyperparameters)
    pattern_config: PatternSettings = section(PatternSettings)
    damage: Damage = section(Damage)


class Association(Task):
    """The task of associative_memory.

    Attributes:
        patterns: the patterns, spikes ``(T, patterns, N)``, on the CPU, which damages them.
        targets: the patterns, ``delay`` steps later, on the device.
    """

    config_class = AssociationConfig
    unit = "samples"

    def setup(self, config: AssociationConfig, device: torch.device) -> None:
        """Reads the patterns; see :class:`Task`."""
        super().setup(config, device)
        settings = config.hyperparameters
        self.patterns = load_patterns(config.dataset_path)
        steps, _, trains = self.patterns.shape
        require(
            steps == settings.length,
            f"{config.dataset_path} has {steps} time steps, hyperparameters.length is "
            f"{settings.length}",
            SettingsError,
        )
        self.targets = delay_spikes(self.patterns, settings.delay).to(device)
        silent = (self.targets == 0).flatten(2).all(2).all(0)
        number = int(silent.int().argmax())
        require(
            not silent.any(),
            f"{config.dataset_path}: pattern {number} has no spike that "
            f"hyperparameters.delay={settings.delay} leaves within its {steps} steps",
            SettingsError if self.patterns[:, number].any() else InputError,
        )
        self.preparation = SequencePreparation([trains])
        self.filter = OutputFilter(settings.tau_m, settings.tau_s, trains).to(device)
        self.filtered_targets, _ = self.filter(self.targets)
        with refusing("damage: "):  # that does not fit the patterns, before training
            damage_patterns(self.patterns, torch.zeros(1).long(), config.damage, torch.Generator())

    def make_split(self, split: str) -> Split:
        """Patterns ``(T, B, N)``, damaged anew in every epoch, and their numbers ``(B,)``."""
        config, patterns = self.config, self.patterns
        count = patterns.shape[1]

        def make_batch(numbers: Tensor, share: slice, epoch: int, number: int) -> Batch:
            labels = numbers % count
            generator = batch_generator(config.seed, epoch, number + 1)
            x = damage_patterns(patterns, labels, config.damage, generator).spikes
            return Batch(x[:, share], labels[share])

        settings = config.pattern_config
        samples = {
            "train": settings.training_samples,
            "validation": settings.validation_samples,
            "test": settings.test_samples,
        }
        size = config.hyperparameters.batch_size if split == "train" else EVALUATION_BATCH
        return Split(samples[split] * count, size, make_batch, shuffle=True)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Mean squared difference between filtered output and filtered target, and sums."""
        output = output_of(model, batch.x)  # (T, B, N)
        difference = self.filter(output - self.targets[:, batch.y])[0]
        loss = difference.square().mean()
        with torch.no_grad():
            return loss, self.compare(output, difference, batch.y)

    def compare(self, output: Tensor, difference: Tensor, labels: Tensor) -> dict[str, Any]:
        """The sums that :meth:`metrics` needs, of output spikes ``(T, B, N)``.

        ``difference`` is the filtered difference between output and target, ``(T, B, N)``.
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
        """Measures the network at every kind and strength of damage, and writes what it found.

        A table and a plot go to the folder of all runs of this name.
        """
        swept, release = self.sweep(model), Damage()
        rows = [*swept]
        if min(self.patterns.shape[0], self.patterns.shape[2]) >= release.block_size:
            rows.append({"damage": "damage of the 2020 release", **self.measure(model, release)})
        words = {
            "error": "error",
            "late_error": f"error after {FIRST_STEPS} steps",
            "retrieval": "retrieval",
            "part_precision": "precision in the removed part",
            "part_recall": "recall in the removed part",
        }
        for row in rows:
            strength = f" {row['strength']:g}" if "strength" in row else ""
            shares = (f"{text} {100 * row[key]:.1f} %" for key, text in words.items() if key in row)
            yield f"{row['damage']}{strength}: {', '.join(shares)}"
        folder = self.config.runs_folder
        write_sweep(swept, folder, self.config.damage.strengths())
        yield f"damage sweep in {folder / 'damage_sweep.csv'} and .png"

    def sweep(self, model: nn.Module, samples: int = SAMPLES_PER_PATTERN) -> list[dict[str, Any]]:
        """Calls :meth:`measure` for each kind and strength of ``DAMAGE_KINDS``; a row for each.

        It leaves out sizes that are larger than the patterns.
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

    @torch.no_grad()
    def measure(
        self, model: nn.Module, damage: Damage, samples: int = SAMPLES_PER_PATTERN
    ) -> dict[str, float]:
        """Tests the model on damaged patterns, so many samples of each.

        Returns:
            The metrics. In patterns longer than ``FIRST_STEPS`` also ``late_error``, the error
            without the first ``FIRST_STEPS``. If the damage removes a part, also
            ``part_precision``, ``part_recall`` and ``part_f1`` of the spikes in this part, which
            the network can only know by heart.
        """
        model.eval()
        sums: dict[str, Any] = {}
        delay, count = self.config.hyperparameters.delay, self.patterns.shape[1]
        numbers = torch.arange(samples * count) % count
        for number, labels in enumerate(numbers.split(EVALUATION_BATCH)):
            generator = batch_generator(self.config.seed, DATA, number + 1)
            x, removed = damage_patterns(self.patterns, labels, damage, generator)
            batch = self._encoded(Batch(x, labels), DATA, number)
            labels, output = batch.y, output_of(model, batch.x)
            target = self.targets[:, labels]
            difference = self.filter(output - target)[0]
            part = delay_spikes(removed, delay).to(self.device)
            inside = match_spikes(output * part, target * part)
            late_target = self.filtered_targets[FIRST_STEPS:, labels]
            late = {"loss": difference[FIRST_STEPS:], "power": late_target}
            add_sums(sums, self.compare(output, difference, labels))
            add_sums(sums, {f"part_{key}": value for key, value in inside.items()})
            add_sums(sums, {f"late_{key}": value.square().sum() for key, value in late.items()})
        totals = read_sums(sums)
        # Metrics of a user's own may read sums of the user's own loss, which nobody asks here.
        own = self._is_of_the_user("loss") and not self._is_of_the_user("compare")
        metrics = Association.metrics(self, totals) if own else self.metrics(totals)
        if totals["late_power"]:
            metrics["late_error"] = totals["late_loss"] / totals["late_power"]
        if totals["part_target_spikes"]:
            scores = spike_scores({key: totals[f"part_{key}"] for key in inside})
            metrics |= {f"part_{key}": value for key, value in scores.items()}
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

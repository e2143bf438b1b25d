"""The settings: dataclasses whose fields are the keys of the YAML files.

Each field states its default, its meaning, its range and what it needs to have an effect, by
:func:`setting`. ``--help`` prints them, :class:`Settings` refuses a value outside the range, and
:func:`without_effect` finds what nothing reads. ``training.config`` fills them from YAML files and
the command line. An experiment reads, for example, ``config.hyperparameters.tau_m``.

Settings come in sections: a configuration (``...Config``) is the whole file, and each of its
sections is a dataclass of its own (``...Settings``). The section ``hyperparameters`` is composed of
:class:`Hyperparameters` and of the groups of settings that an experiment needs beside them, which
come before it in the list of bases, so that their defaults count.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

from snn_lib.errors import require
from snn_lib.rounding import WEIGHT_BITS

OptimizerChoice = Literal["Adam", "AdamW", "SGD"]
SchedulerChoice = Literal[
    "MultiStepLR", "CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR", "none"
]
LONGEST_MEMORY = 1_000_000  # steps; float32 can hardly tell slower decays from no decay
LARGEST = 2**32 - 1  # the largest whole number that a setting may have


@dataclass(frozen=True)
class Range:
    """The finite numbers that a setting may have.

    Attributes:
        at_least, above, at_most, below: the bounds of a number, or of each number in a list, and in
            the lists within it.
        length: number of elements of a list; ``None``: any.
    """

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    length: int | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises :class:`InputError` unless the setting of this name may have this value."""
        values = value if isinstance(value, (list, tuple)) else [value]
        numbers = [one for one in _elements(values) if isinstance(one, (int, float))]
        for one in numbers:
            require(
                abs(one) <= LARGEST if isinstance(one, int) else math.isfinite(one),
                f"{name} is {value}, expected finite numbers, and whole ones up to {LARGEST:,}",
            )
        within = [
            self.at_least <= n <= self.at_most and self.above < n < self.below for n in numbers
        ]
        right = all(within) and (value is None or self.length in (None, len(values)))
        require(right, f"{name} is {value}, expected {self}")

    def __str__(self) -> str:
        bounds = {name: bound for name, bound in vars(self).items() if name != "length"}
        each = " and ".join(
            f"{name.replace('_', ' ')} {bound:,}"
            for name, bound in bounds.items()
            if math.isfinite(bound)
        )
        if self.length is None:
            return each
        return f"{self.length} numbers, each {each}" if each else f"{self.length} values"


def _elements(values: Iterable[Any]) -> Iterator[Any]:
    """The elements of lists, and of those within them."""
    for one in values:
        yield from _elements(one) if isinstance(one, (list, tuple)) else [one]


@dataclass(frozen=True)
class Needs:
    """What a setting needs to have an effect: one of these values of another setting.

    Attributes:
        key: the other setting, with its section. A configuration without it has what is needed.
        values: the values; if none are named, any but 0, false and nothing.
        never: the value which it must not have, if there is one; any other one is right.
        instead: the setting that counts otherwise; ``{}`` stands for the other setting's value.
    """

    key: str
    values: tuple[Any, ...] = ()
    never: Any = None
    instead: str = ""

    def met_by(self, config: Any) -> bool:
        """Whether a configuration has what is needed."""
        try:
            value = attrgetter(self.key)(config)
        except AttributeError:
            return True
        if self.never is not None:
            return value != self.never
        return value in self.values if self.values else bool(value)


TRAINING = Needs("hyperparameters.epoch")
FIRST_VALUE = Needs("first_weights", ("",))  # weights and coefficients are loaded otherwise
NEVER = Needs("name", ("",))  # a run always has a name
# These settings are not taken from a checkpoint, because they say where and how a script runs on
# this machine.
LOCAL_KEYS = (
    "device",
    "backend",
    "data_workers",
    "dataset_path",
    "test_checkpoint_path",
    "checkpoint_minutes",
    "runs_path",
    "tensorboard",
)


def setting(default: Any, doc: str, *needs: Needs, **bounds: Any) -> Any:
    """A dataclass field with its default, its meaning, its range and what it needs.

    Args:
        default: the value if nothing else is set. A list is copied for every configuration.
        doc: the meaning, which ``--help`` prints.
        needs: without all of these it has no effect.
        bounds: the bounds of :class:`Range`.
    """
    metadata = {"doc": doc, "range": Range(**bounds), "needs": needs}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(make: Callable[[], Any], *needs: Needs) -> Any:
    """A dataclass field with a section of settings, which needs all of these to have an effect."""
    return field(default_factory=make, metadata={"needs": needs})


class Settings:
    """A section of the configuration, which refuses numbers outside their range.

    A subclass is a dataclass with fields from :func:`setting`. If fields depend on each other, its
    ``__post_init__`` calls this one and then checks them with :func:`snn_lib.errors.require`.
    Messages name a setting without its section, because ``training.config`` adds the section.

    Raises:
        InputError: a value lies outside its range, or does not fit another one, a field is
            ``init=False``, or a class with settings is no dataclass.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]

    def __post_init__(self) -> None:
        fields = dataclasses.fields(self)
        names = {entry.name for entry in fields}
        for kind in (kind for kind in type(self).__mro__ if issubclass(kind, Settings)):
            sets = any("ClassVar" not in str(one) for one in inspect.get_annotations(kind).values())
            require(
                "__dataclass_fields__" in vars(kind) or not (sets or names & vars(kind).keys()),
                f"{kind.__name__} has settings and is no dataclass, so they would have no effect: "
                "write @dataclass above it",
            )
        for entry in fields:
            require(
                entry.init,
                f"{entry.name} is a field with init=False, which no setting can be: let "
                "__post_init__ set it, without a field",
            )
            allowed = entry.metadata.get("range", Range())
            allowed.check(entry.name, getattr(self, entry.name))

    def require_order(self, first: str, last: str) -> None:
        """Refuses a first setting that is larger than the last one."""
        low, high = getattr(self, first), getattr(self, last)
        message = f"{first} is {low} and {last} {high}, expected the smaller one first"
        require(low <= high, message)


RATE_IS_KEPT = Needs(
    "scheduler.scheduler_choice",
    ("MultiStepLR", "CosineAnnealingWarmRestarts", "none"),
    instead="scheduler.{}.max_lr",
)


@dataclass
class AdamSettings(Settings):
    """Options of Adam and AdamW, as PyTorch names them."""

    lr: float = setting(
        1e-4, "learning rate; OneCycleLR and CyclicLR replace it", RATE_IS_KEPT, above=0
    )
    betas: list[float] = setting(
        [0.9, 0.999], "decay of both moments", at_least=0, below=1, length=2
    )
    eps: float = setting(1e-8, "number added to the denominator", at_least=0)
    weight_decay: float = setting(0.0, "decay of the weights, never of the filters", at_least=0)


@dataclass
class SGDSettings(Settings):
    """Options of SGD, as PyTorch names them."""

    lr: float = setting(
        0.1, "learning rate; OneCycleLR and CyclicLR replace it", RATE_IS_KEPT, above=0
    )
    momentum: float = setting(0.9, "share of the previous step that is added", at_least=0)
    weight_decay: float = setting(0.0, "decay of the weights, never of the filters", at_least=0)
    nesterov: bool = setting(False, "use Nesterov's momentum")


@dataclass
class OptimizerSettings(Settings):
    """The optimiser, and the options of each."""

    optimizer_choice: OptimizerChoice = setting("Adam", "which optimiser to use")
    Adam: AdamSettings = section(AdamSettings, Needs("optimizer.optimizer_choice", ("Adam",)))
    AdamW: AdamSettings = section(
        lambda: AdamSettings(weight_decay=0.01), Needs("optimizer.optimizer_choice", ("AdamW",))
    )
    SGD: SGDSettings = section(SGDSettings, Needs("optimizer.optimizer_choice", ("SGD",)))
    coefficient_lr_scale: float = setting(
        1.0,
        "factor on the learning rate of filters' coefficients and of trained decays",
        Needs("hyperparameters.train_coefficients"),
        at_least=0,
    )
    gradient_clipping: float = setting(0.0, "largest norm of the gradient, 0: any", at_least=0)


@dataclass
class MultiStepLRSettings(Settings):
    """MultiStepLR: the learning rate is multiplied by gamma at each milestone."""

    milestones: list[int] = setting([15, 90], "epochs after which the rate drops", at_least=0)
    gamma: float = setting(
        0.1,
        "factor that the rate is multiplied by",
        Needs("scheduler.MultiStepLR.milestones"),
        above=0,
    )


@dataclass
class WarmRestartsSettings(Settings):
    """CosineAnnealingWarmRestarts: a cosine from lr to eta_min, started again after each cycle."""

    T_0: int = setting(10, "epochs of the first cycle", at_least=1)
    T_mult: int = setting(1, "factor by which each cycle is longer than the last", at_least=1)
    eta_min: float = setting(0.0, "lowest learning rate, of weights and filters alike", at_least=0)


@dataclass
class CyclicLRSettings(Settings):
    """CyclicLR: a triangle from base_lr up to max_lr and down again."""

    base_lr: float = setting(1e-5, "lowest learning rate", at_least=0)
    max_lr: float = setting(1e-3, "highest learning rate", above=0)
    step_size_up: int = setting(2000, "batches from the lowest to the highest rate", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_order("base_lr", "max_lr")


@dataclass
class OneCycleLRSettings(Settings):
    """OneCycleLR: the rate rises to max_lr, then falls along a cosine to almost zero."""

    max_lr: float = setting(1e-3, "highest learning rate", above=0)
    pct_start: float = setting(0.3, "share of the run in which the rate rises", at_least=0, below=1)
    div_factor: float = setting(25.0, "the first rate is max_lr / this", above=0)
    final_div_factor: float = setting(1e4, "the last rate is the first / this", above=0)


@dataclass
class SchedulerSettings(Settings):
    """The learning rate scheduler, and the options of each."""

    scheduler_choice: SchedulerChoice = setting("none", "which scheduler to use")
    MultiStepLR: MultiStepLRSettings = section(
        MultiStepLRSettings, Needs("scheduler.scheduler_choice", ("MultiStepLR",))
    )
    CosineAnnealingWarmRestarts: WarmRestartsSettings = section(
        WarmRestartsSettings, Needs("scheduler.scheduler_choice", ("CosineAnnealingWarmRestarts",))
    )
    CyclicLR: CyclicLRSettings = section(
        CyclicLRSettings, Needs("scheduler.scheduler_choice", ("CyclicLR",))
    )
    OneCycleLR: OneCycleLRSettings = section(
        OneCycleLRSettings, Needs("scheduler.scheduler_choice", ("OneCycleLR",))
    )


@dataclass
class Hyperparameters(Settings):
    """The settings of model and training that all experiments share. Times are in steps."""

    length: int = setting(25, "time steps of a sequence", at_least=1)
    batch_size: int = setting(64, "sequences in a batch, over all processes", at_least=1)
    epoch: int = setting(100, "epochs to train for", at_least=1)
    dropout: float = setting(
        0.0, "share of hidden spikes dropped in training", TRAINING, at_least=0, below=1
    )
    tau_m: float = setting(
        4.0,
        "slow time constant of PSP and membrane, in steps",
        FIRST_VALUE,
        above=0,
        at_most=LONGEST_MEMORY,
    )
    tau_s: float = setting(
        1.0,
        "fast time constant of the PSP, in steps; models with both need tau_s below tau_m",
        FIRST_VALUE,
        above=0,
    )
    train_coefficients: bool = setting(
        True, "train the coefficients of the synapses' filters", TRAINING
    )
    train_bias: bool = setting(True, "give every layer a bias, and train it")
    membrane_filter: bool = setting(
        False, "let the membrane potential leak with tau_m", FIRST_VALUE
    )
    surrogate_width: float = setting(
        0.4, "sigma of the Gaussian surrogate gradient", TRAINING, above=0
    )
    constraint: Literal["none", "stable"] = setting("none", "keep trained filters stable", TRAINING)
    precision: Literal["float32", "bfloat16"] = setting("float32", "type of the matrix products")
    weight_averaging: float = setting(
        0.0, "decay of the moving average of the weights, 0: none", TRAINING, at_least=0, below=1
    )
    weight_bits: int = setting(
        0,
        "train nn.Linear and nn.Conv2d with weights of so few bits, for integer networks, which "
        "have no other weights: 8, 4 or 2, 0: floats",
    )
    chunk: int = setting(0, "time steps run at a time, to save memory, 0: all", at_least=0)
    rate_penalty: float = setting(
        0.0, "weight of the penalty on firing rates, 0: none", TRAINING, at_least=0
    )
    target_rate: float = setting(
        0.0,
        "mean spikes per step that a layer should have, 0: any",
        TRAINING,
        at_least=0,
        at_most=1,
    )
    rate_limit: float = setting(
        0.0,
        "spikes per step above which a neuron is penalised, 0: none",
        TRAINING,
        at_least=0,
        at_most=1,
    )
    penalty_by_cost: bool = setting(
        False,
        "target_rate counts less for a layer whose spikes make fewer operations at the weights",
        Needs("hyperparameters.target_rate"),
        TRAINING,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.weight_bits in (0, *WEIGHT_BITS),
            f"weight_bits is {self.weight_bits}, expected 8, 4, 2 or 0",
        )
        require(
            (self.rate_penalty > 0) == (max(self.target_rate, self.rate_limit) > 0),
            f"rate_penalty is {self.rate_penalty}, target_rate {self.target_rate}, "
            f"rate_limit {self.rate_limit}, expected a weight and a rate, or neither",
        )


@dataclass
class FilterPosition(Settings):
    """The order of weights and filters in a layer."""

    filter_position: Literal["before", "behind"] = setting(
        "before", "filter each input of the weights (the paper's order), or each of their outputs"
    )


@dataclass
class ConvolutionSizes(Settings):
    """The sizes of a network of three convolutions and a layer of neurons after them."""

    channels: list[int] = setting(
        [16, 32, 64], "feature maps of the three convolutions", at_least=1, length=3
    )
    hidden: int = setting(256, "neurons in the layer after the convolutions", at_least=1)


@dataclass
class OneTimeConstant(Settings):
    """For networks that have no PSP of two time constants: ``tau_s`` has no effect."""

    tau_s: float = setting(1.0, "fast time constant of a PSP that has two", NEVER, above=0)


RESONANT = Needs("hyperparameters.synapse", ("resonant",)), FIRST_VALUE


@dataclass
class ResonantFilters(Settings):
    """First values of resonant filters: a layer's channels are spread on logarithmic scales."""

    shortest_memory: float = setting(
        10.0, "steps in which the fastest filter decays", *RESONANT, above=0
    )
    longest_memory: float = setting(
        800.0,
        "steps in which the slowest filter decays",
        *RESONANT,
        above=0,
        at_most=LONGEST_MEMORY,
    )
    lowest_frequency: float = setting(
        1 / 800, "lowest frequency, in cycles per step", *RESONANT, above=0
    )
    highest_frequency: float = setting(
        0.25, "highest, in cycles per step", *RESONANT, above=0, at_most=0.5
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_order("shortest_memory", "longest_memory")
        self.require_order("lowest_frequency", "highest_frequency")


@dataclass
class ExperimentConfig(Settings):
    """The settings of every experiment; a task may add its own (see ``tasks.digits``)."""

    name: str = setting("experiment", "name of the run, and of the folder of all runs of this name")
    seed: int = setting(2, "seed of weights, order, augmentation, dropout and spikes", at_least=0)
    device: str = setting("auto", "cpu, cuda, ...; auto: CUDA if there is a GPU")
    backend: Literal["auto", "eager", "cpu", "cuda"] = setting("auto", "kernels; auto: the fastest")
    data_workers: int = setting(0, "processes that prepare batches", at_least=0, at_most=256)
    dataset_path: str = setting("dataset", "folder with the data")
    first_weights: str = setting("", "checkpoint whose weights training starts from; empty: none")
    test_checkpoint_path: str = setting(
        "", "checkpoint or run's folder that --test tests; empty: the newest run"
    )
    checkpoint_minutes: float = setting(10.0, "minutes between checkpoints in an epoch", above=0)
    runs_path: str = setting("runs", "folder of all runs; each has its own, NAME/TIME/")
    tensorboard: bool = setting(False, "write TensorBoard events there too")
    hyperparameters: Hyperparameters = section(Hyperparameters)
    optimizer: OptimizerSettings = section(OptimizerSettings, TRAINING)
    scheduler: SchedulerSettings = section(SchedulerSettings, TRAINING)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            re.fullmatch(r"\w[\w.+-]{,99}", self.name) is not None,
            f"name is {self.name!r}, expected at most 100 letters, digits and . _ + -, not "
            "beginning with . + or - (it names files)",
        )
        schedule, optimizer = self.scheduler, self.optimizer
        if schedule.scheduler_choice == "CosineAnnealingWarmRestarts":
            lowest = schedule.CosineAnnealingWarmRestarts.eta_min
            rate = getattr(optimizer, optimizer.optimizer_choice).lr
            learn = self.hyperparameters.train_coefficients
            scale = min(optimizer.coefficient_lr_scale, 1.0) if learn else 1.0
            require(
                lowest <= rate * scale * (1 + 1e-9),
                f"scheduler.CosineAnnealingWarmRestarts.eta_min is {lowest}, expected at most "
                f"optimizer.{optimizer.optimizer_choice}.lr, {rate}, and at most that times "
                f"optimizer.coefficient_lr_scale, {optimizer.coefficient_lr_scale}",
            )

    @property
    def runs_folder(self) -> Path:
        """The folder of all runs of this name."""
        return Path(self.runs_path) / self.name


def list_settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All dotted keys of a configuration, also those of sections, with their values."""
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        yield prefix + entry.name, value
        if dataclasses.is_dataclass(value):
            yield from list_settings(value, f"{prefix}{entry.name}.")


def without_effect(
    schema: Any, *configs: Any, unread: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The settings and sections that have an effect in none of these configurations, and why.

    Args:
        schema: a configuration of the class whose fields say what they need.
        configs: those that a run or a sweep may have, by default ``schema`` itself. They need
            only have the same attributes.
        unread: settings that are not read whatever their value is, and why. Nor is any setting read
            that needs a value of them.

    Returns:
        By dotted key, the reason in words that follow the key.
    """
    found, configs, unread = {}, configs or (schema,), unread or {}
    for key, needs in needs_of(schema):
        unmet = [need for need in needs if not any(map(need.met_by, configs))]
        why = [unread[one] for one in (key, *(need.key for need in needs)) if one in unread]
        if NEVER in unmet:
            found[key] = "has no effect in this experiment"
        elif unmet:
            values = [attrgetter(need.key)(configs[0]) for need in unmet]
            shown = (f"{need.key}={value}" for need, value in zip(unmet, values, strict=True))
            instead = unmet[-1].instead.format(values[-1])
            remedy = f": {instead} counts instead" if instead else ""
            found[key] = f"has no effect with {' and '.join(shown)}{remedy}"
        elif why:
            found[key] = why[0]
    return found


def needs_of(config: Any, prefix: str = "", above: tuple[Needs, ...] = ()) -> Iterator[Any]:
    """All dotted keys of a configuration, with what they and their sections need."""
    for entry in dataclasses.fields(config):
        needs, value = above + entry.metadata.get("needs", ()), getattr(config, entry.name)
        yield prefix + entry.name, needs
        if dataclasses.is_dataclass(value):
            yield from needs_of(value, f"{prefix}{entry.name}.", needs)

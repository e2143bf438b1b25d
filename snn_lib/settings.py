"""What can be set: typed dataclasses with the keys of the YAML, their ranges and what they mean.

What an experiment sees is a plain dataclass: ``config.hyperparameters.tau_m``. Each task extends
:class:`Hyperparameters` and :class:`ExperimentConfig` by what is particular to it.
``training.config`` fills them from YAML and the command line.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from snn_lib.errors import require

OptimizerChoice = Literal["Adam", "AdamW", "SGD"]
SchedulerChoice = Literal[
    "MultiStepLR", "CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR", "none"
]
LONGEST_MEMORY = 1_000_000  # steps; float32 does not tell much slower decays from none
LARGEST = 2**31 - 1  # of counts such as batch_size


def setting(default: Any, doc: str) -> Any:
    """A dataclass field with its default and the words that ``--help`` has for it."""
    metadata = {"doc": doc}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class AdamOptions:
    """Options of Adam and AdamW, as PyTorch names them."""

    lr: float = setting(1e-4, "learning rate; OneCycleLR and CyclicLR set their own")
    betas: list[float] = setting([0.9, 0.999], "decay of the two moments of the gradient")
    eps: float = setting(1e-8, "added to the denominator")
    weight_decay: float = setting(0.0, "of the weights; filter coefficients never decay")


@dataclass
class SGDOptions:
    """Options of SGD, as PyTorch names them."""

    lr: float = setting(0.1, "learning rate; OneCycleLR and CyclicLR set their own")
    momentum: float = setting(0.9, "share of the last step that is taken again")
    weight_decay: float = setting(0.0, "of the weights; filter coefficients never decay")
    nesterov: bool = setting(False, "look ahead by the momentum")


@dataclass
class OptimizerConfig:
    """Which optimiser, and the options of each."""

    optimizer_choice: OptimizerChoice = setting("Adam", "the optimiser")
    Adam: AdamOptions = field(default_factory=AdamOptions)
    AdamW: AdamOptions = field(default_factory=lambda: AdamOptions(weight_decay=0.01))
    SGD: SGDOptions = field(default_factory=SGDOptions)
    coefficient_lr_scale: float = setting(1.0, "learning rate of filter coefficients, relative")
    gradient_clipping: float = setting(0.0, "largest norm of the whole gradient, 0: not clipped")

    def __post_init__(self) -> None:
        for name in get_args(OptimizerChoice):
            options = getattr(self, name)
            require(options.lr > 0, f"optimizer.{name}.lr is {options.lr}, expected > 0")
            require(
                options.weight_decay >= 0,
                f"optimizer.{name}.weight_decay is {options.weight_decay}, expected >= 0",
            )
        for name in ("Adam", "AdamW"):
            betas = getattr(self, name).betas
            require(len(betas) == 2, f"optimizer.{name}.betas is {betas}, expected two numbers")
        require(
            self.coefficient_lr_scale >= 0,
            f"optimizer.coefficient_lr_scale is {self.coefficient_lr_scale}, expected >= 0",
        )
        require(
            self.gradient_clipping >= 0,
            f"optimizer.gradient_clipping is {self.gradient_clipping}, expected >= 0 (0: off)",
        )


@dataclass
class MultiStepLROptions:
    """Learning rate times gamma at each milestone (epochs)."""

    milestones: list[int] = setting([15, 90], "epochs after which the rate drops")
    gamma: float = setting(0.1, "factor by which it drops")


@dataclass
class CosineAnnealingWarmRestartsOptions:
    """Cosine from lr to eta_min over T_0 epochs, then again over T_0 T_mult, and so on."""

    T_0: int = setting(10, "epochs of the first cycle")
    T_mult: int = setting(1, "how many times longer each next cycle is")
    eta_min: float = setting(0.0, "lowest learning rate")


@dataclass
class CyclicLROptions:
    """Triangle between base_lr and max_lr, step_size_up batches up and as many down."""

    base_lr: float = setting(1e-5, "lowest learning rate")
    max_lr: float = setting(1e-3, "highest learning rate")
    step_size_up: int = setting(2000, "batches from the lowest to the highest")


@dataclass
class OneCycleLROptions:
    """One rise to max_lr over pct_start of the run, then a cosine fall to almost zero."""

    max_lr: float = setting(1e-3, "highest learning rate")
    pct_start: float = setting(0.3, "share of the run in which it rises")
    div_factor: float = setting(25.0, "the run starts at max_lr / div_factor")
    final_div_factor: float = setting(1e4, "and ends at the start / final_div_factor")


@dataclass
class SchedulerConfig:
    """Which learning rate scheduler, and the options of each."""

    scheduler_choice: SchedulerChoice = setting("none", "the scheduler")
    MultiStepLR: MultiStepLROptions = field(default_factory=MultiStepLROptions)
    CosineAnnealingWarmRestarts: CosineAnnealingWarmRestartsOptions = field(
        default_factory=CosineAnnealingWarmRestartsOptions
    )
    CyclicLR: CyclicLROptions = field(default_factory=CyclicLROptions)
    OneCycleLR: OneCycleLROptions = field(default_factory=OneCycleLROptions)

    def __post_init__(self) -> None:
        for section in ("CosineAnnealingWarmRestarts", "CyclicLR"):
            for key in ("T_0", "T_mult", "step_size_up"):
                value = getattr(getattr(self, section), key, 1)
                require(value >= 1, f"scheduler.{section}.{key} is {value}, expected >= 1")
        cycle = self.OneCycleLR
        require(
            cycle.max_lr > 0 and cycle.div_factor > 0 and cycle.final_div_factor > 0,
            "scheduler.OneCycleLR: max_lr, div_factor and final_div_factor must be positive",
        )
        require(
            0 <= cycle.pct_start < 1,
            f"scheduler.OneCycleLR.pct_start is {cycle.pct_start}, expected a share in [0, 1)",
        )


@dataclass
class Hyperparameters:
    """The model and its training, as far as all experiments share them. Times are in steps."""

    length: int = setting(25, "time steps of a sequence")
    batch_size: int = setting(64, "sequences a batch, over all processes")
    epoch: int = setting(100, "epochs of the run")
    dropout: float = setting(0.0, "probability that a hidden spike is not passed on")
    tau_m: float = setting(4.0, "slow time constant of PSP and membrane, in steps")
    tau_s: float = setting(1.0, "fast time constant of the PSP, in steps")
    train_coefficients: bool = setting(True, "train the filters of the synapses too")
    train_bias: bool = setting(True, "give the layers a trained bias")
    membrane_filter: bool = setting(False, "let the membrane potential leak with tau_m")
    surrogate_width: float = setting(0.4, "sigma of the Gaussian surrogate gradient")
    constraint: Literal["none", "stable"] = setting("none", "keep trained filters stable")
    precision: Literal["float32", "bfloat16"] = setting("float32", "of the matrix products")
    weight_averaging: float = setting(0.0, "decay of the moving average that is evaluated, 0: off")
    chunk: int = setting(0, "run so many time steps at a time, which bounds the memory, 0: all")
    rate_penalty: float = setting(0.0, "weight of the penalty on hidden layers' firing, 0: off")
    target_rate: float = setting(0.0, "spikes per neuron and step it draws a layer to, 0: none")
    rate_limit: float = setting(0.0, "above which it holds a neuron down, likewise")

    def __post_init__(self) -> None:
        for key in ("length", "batch_size", "epoch"):
            value = getattr(self, key)
            require(value >= 1, f"hyperparameters.{key} is {value}, expected at least 1")
            require(value <= LARGEST, f"hyperparameters.{key} is {value}, expected below 2^31")
        require(
            0 <= self.dropout < 1,
            f"hyperparameters.dropout is {self.dropout}, expected a probability in [0, 1)",
        )
        require(
            0 < self.tau_s < self.tau_m < math.inf,
            f"hyperparameters.tau_m is {self.tau_m} and tau_s {self.tau_s}, "
            "expected 0 < tau_s < tau_m",
        )
        require(
            self.surrogate_width > 0,
            f"hyperparameters.surrogate_width is {self.surrogate_width}, expected > 0",
        )
        require(
            0 <= self.chunk <= LARGEST,
            f"hyperparameters.chunk is {self.chunk}, expected 0 (all steps at once) or more",
        )
        require(
            0 <= self.weight_averaging < 1,
            f"hyperparameters.weight_averaging is {self.weight_averaging}, expected in [0, 1)",
        )
        require(
            self.rate_penalty >= 0,
            f"hyperparameters.rate_penalty is {self.rate_penalty}, expected >= 0",
        )
        for key in ("target_rate", "rate_limit"):
            rate = getattr(self, key)
            require(0 <= rate <= 1, f"hyperparameters.{key} is {rate}, expected a rate in [0, 1]")
        require(
            (self.rate_penalty > 0) == (max(self.target_rate, self.rate_limit) > 0),
            f"hyperparameters.rate_penalty is {self.rate_penalty}, target_rate {self.target_rate}, "
            f"rate_limit {self.rate_limit}, expected a weight and a rate, or neither",
        )


@dataclass
class ConvolutionHyperparameters(Hyperparameters):
    """The sizes of a network of three convolutions and a layer of neurons behind them."""

    channels: list[int] = setting([16, 32, 64], "feature maps of the three convolutions")
    hidden: int = setting(256, "neurons of the layer behind them")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.channels) == 3 and min(*self.channels, self.hidden) >= 1,
            f"hyperparameters.channels is {self.channels} and hidden {self.hidden}, "
            "expected three numbers and one, at least 1",
        )


@dataclass
class ResonantHyperparameters(Hyperparameters):
    """Where resonant filters start, the channels of a layer spread on logarithmic scales."""

    shortest_memory: float = setting(10.0, "decay of the first filters, from so many steps")
    longest_memory: float = setting(800.0, "to so many")
    lowest_frequency: float = setting(1 / 800, "at which they ring, from so many cycles a step")
    highest_frequency: float = setting(1 / 4, "to so many")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.shortest_memory <= self.longest_memory <= LONGEST_MEMORY,
            f"hyperparameters.shortest_memory is {self.shortest_memory} and longest_memory "
            f"{self.longest_memory}, expected 0 < shortest_memory <= longest_memory <= "
            f"{LONGEST_MEMORY:,}",
        )
        require(
            0 < self.lowest_frequency <= self.highest_frequency <= 0.5,
            f"hyperparameters.lowest_frequency is {self.lowest_frequency} and highest_frequency "
            f"{self.highest_frequency}, expected 0 < lowest_frequency <= highest_frequency <= 0.5",
        )


@dataclass
class ExperimentConfig:
    """What every experiment has; a task may add to it (see ``tasks.digits``)."""

    name: str = setting("experiment", "of the run, in its logs and checkpoints")
    seed: int = setting(2, "of first weights, order, augmentation, dropout and spikes")
    device: str = setting("auto", "cpu, cuda, ...; auto: CUDA where there is one")
    backend: Literal["auto", "eager", "cpu", "cuda"] = setting(
        "auto", "of the kernels; auto: the fastest for the device"
    )
    data_workers: int = setting(0, "processes that prepare batches ahead of time")
    dataset_path: str = setting("dataset", "where the data is")
    checkpoint_base_path: str = setting("checkpoint", "folder for NAME_last and NAME_best")
    test_checkpoint_path: str = setting("", "what --test evaluates; empty: NAME_best")
    checkpoint_minutes: float = setting(
        10.0, "of training between writings of NAME_last within an epoch"
    )
    runs_path: str = setting("runs", "folder for NAME/TIME/ with metrics.csv and settings")
    tensorboard: bool = setting(False, "write TensorBoard events there too")
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"\w[\w.+-]*", self.name) is not None,
            f"name is {self.name!r}, expected letters, digits and . _ + - (it names files)",
        )
        for key in ("dataset_path", "checkpoint_base_path", "test_checkpoint_path", "runs_path"):
            value = getattr(self, key)
            usable = value.isprintable() and (value or key == "test_checkpoint_path")
            require(bool(usable), f"{key} is {value!r}, which is no usable path")
        require(
            0 <= self.data_workers <= 256, f"data_workers is {self.data_workers}, expected 0 to 256"
        )
        require(
            self.checkpoint_minutes > 0,
            f"checkpoint_minutes is {self.checkpoint_minutes}, expected > 0",
        )
        require(0 <= self.seed < 2**32, f"seed is {self.seed}, expected 0 to 2^32 - 1")
        for key, value in flattened(self):
            for number in value if isinstance(value, list) else [value]:
                finite = not isinstance(number, float) or math.isfinite(number)
                require(finite, f"{key} is {value}, expected finite numbers")


def flattened(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All dotted keys of a configuration with their values, sections among them."""
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        yield prefix + entry.name, value
        if dataclasses.is_dataclass(value):
            yield from flattened(value, f"{prefix}{entry.name}.")

"""The settings of an experiment: typed dataclasses, filled from YAML and the command line.

OmegaConf reads and merges, these dataclasses say which keys exist, of which type and range. What
an experiment sees is a plain dataclass: ``config.hyperparameters.tau_m``.
"""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from snn_lib.errors import InputError

Config = TypeVar("Config")


def require(condition: bool, message: str) -> None:
    """Raises :class:`InputError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


@dataclass
class AdamOptions:
    """Options of Adam and AdamW, as PyTorch names them."""

    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class SGDOptions:
    """Options of SGD, as PyTorch names them."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False


@dataclass
class OptimizerConfig:
    """Which optimiser, and the options of each."""

    optimizer_choice: Literal["Adam", "AdamW", "SGD"] = "Adam"
    Adam: AdamOptions = field(default_factory=AdamOptions)
    AdamW: AdamOptions = field(default_factory=lambda: AdamOptions(weight_decay=0.01))
    SGD: SGDOptions = field(default_factory=SGDOptions)
    coefficient_lr_scale: float = 1.0  # learning rate of the filter coefficients, relative
    gradient_clipping: float = 0.0  # largest norm of the whole gradient, 0: not clipped

    def __post_init__(self) -> None:
        for name in ("Adam", "AdamW", "SGD"):
            options = getattr(self, name)
            for key in ("lr", "weight_decay"):
                value = getattr(options, key)
                require(
                    value >= 0 and math.isfinite(value),
                    f"optimizer.{name}.{key} is {value}, expected a number >= 0",
                )
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

    milestones: list[int] = field(default_factory=lambda: [15, 90])
    gamma: float = 0.1


@dataclass
class CosineAnnealingWarmRestartsOptions:
    """Cosine from lr to eta_min over T_0 epochs, then again over T_0 T_mult, ..."""

    T_0: int = 10
    T_mult: int = 1
    eta_min: float = 0.0


@dataclass
class CyclicLROptions:
    """Triangle between base_lr and max_lr, step_size_up batches up and as many down."""

    base_lr: float = 1e-5
    max_lr: float = 1e-3
    step_size_up: int = 2000


@dataclass
class OneCycleLROptions:
    """One rise to max_lr over pct_start of the run, then a cosine fall to almost zero."""

    max_lr: float = 1e-3
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4


@dataclass
class SchedulerConfig:
    """Which learning rate scheduler, and the options of each."""

    scheduler_choice: Literal[
        "MultiStepLR", "CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR", "none"
    ] = "none"
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
            0 <= cycle.pct_start <= 1,
            f"scheduler.OneCycleLR.pct_start is {cycle.pct_start}, expected a share in [0, 1]",
        )


@dataclass
class Hyperparameters:
    """The model and its training, as far as all experiments share them. Times are in steps."""

    length: int = 25  # time steps T
    batch_size: int = 64
    epoch: int = 100
    dropout: float = 0.0
    tau_m: float = 4.0
    tau_s: float = 1.0
    train_coefficients: bool = True
    train_bias: bool = True
    membrane_filter: bool = False
    surrogate_width: float = 0.4  # sigma of the Gaussian
    constraint: Literal["none", "stable"] = "none"
    precision: Literal["float32", "bfloat16"] = "float32"
    weight_averaging: float = 0.0  # decay of the evaluated moving average, 0: the weights as is

    def __post_init__(self) -> None:
        for key in ("length", "batch_size", "epoch"):
            value = getattr(self, key)
            require(value >= 1, f"hyperparameters.{key} is {value}, expected at least 1")
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
            0 <= self.weight_averaging < 1,
            f"hyperparameters.weight_averaging is {self.weight_averaging}, expected in [0, 1)",
        )


@dataclass
class ExperimentConfig:
    """What every experiment has; each adds its data (see ``classification``, ``association``)."""

    name: str = "???"  # of the run: names its folder under runs/ and its checkpoints
    seed: int = 2
    device: str = "auto"  # auto: CUDA where there is one, else CPU
    dataset_path: str = "dataset"
    checkpoint_base_path: str = "checkpoint"
    test_checkpoint_path: str = "???"
    runs_path: str = "runs"
    tensorboard: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        require(
            bool(self.name) and Path(self.name).name == self.name,
            f"name is {self.name!r}, expected a plain name for folders and files",
        )
        require(0 <= self.seed < 2**32, f"seed is {self.seed}, expected 0 to 2^32 - 1")


def load_config(schema: type[Config], yaml_path: Path, overrides: Sequence[str]) -> Config:
    """Reads a YAML file, applies ``key=value`` overrides, checks all of it against ``schema``.

    Raises:
        InputError: the file is missing or no YAML, a key is unknown (the message names the
            nearest), or a value has a wrong type or lies outside its range.
    """
    try:
        loaded = OmegaConf.load(yaml_path)
    except FileNotFoundError:
        raise InputError(f"there is no configuration file {yaml_path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{yaml_path} cannot be read as YAML: {one_line(error)}") from None
    return _typed(schema, loaded, overrides, str(yaml_path))


def config_from_dict(
    schema: type[Config], values: dict[str, Any], overrides: Sequence[str]
) -> Config:
    """The same from a plain dict, as a checkpoint holds it."""
    return _typed(schema, values, overrides, "the checkpoint's configuration")


def _typed(schema: type[Config], values: Any, overrides: Sequence[str], source: str) -> Config:
    config = OmegaConf.structured(schema)
    parts = [(source, lambda: values)]
    for override in overrides:
        require("=" in override, f"{override!r} is not an override, expected key=value")
        parts.append((f"override {override!r}", lambda text=override: parse_override(text)))
    try:
        for source, part in parts:  # noqa: B007 (named in the messages below)
            config = OmegaConf.merge(config, part())
        source = "the configuration"
        return OmegaConf.to_object(config)
    except KeyError as error:
        key = getattr(error, "full_key", None) or str(error)
        nearest = difflib.get_close_matches(key, _keys(schema), n=1, cutoff=0.0)
        raise InputError(f"{source}: unknown key {key!r}, did you mean {nearest[0]!r}?") from None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None)
        where = f" ({key})" if key else ""
        raise InputError(f"{source}{where}: {one_line(error)}") from None


def parse_override(text: str) -> Any:
    """One ``key=value`` as a nested configuration."""
    return OmegaConf.from_dotlist([text])


def _keys(schema: type, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass, sections among them."""
    keys = []
    for entry in dataclasses.fields(schema):
        keys.append(prefix + entry.name)
        if dataclasses.is_dataclass(entry.type):
            keys += _keys(entry.type, f"{prefix}{entry.name}.")
    return keys


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

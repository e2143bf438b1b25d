"""Settings: every range that a field declares is checked, shown, and holds for its default."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from refusing import refusal

from event_vision import EventConvConfig, EventConvHyperparameters
from snn_conv import ConvConfig, ConvHyperparameters
from snn_lib.data.augmentation import AugmentationSettings, EventAugmentationSettings
from snn_lib.data.patterns import Damage
from snn_lib.data.simulated_events import CameraSettings
from snn_lib.errors import require
from snn_lib.settings import LARGEST, ExperimentConfig, Range, Settings, list_settings, setting
from snn_lib.tasks.association import AssociationConfig, AssociationHyperparameters, PatternSettings
from snn_lib.tasks.digits import DigitConfig, LatencySettings, MNISTSettings
from snn_lib.tasks.event_vision import EventSettings
from snn_lib.tasks.sequential_digits import SequentialConfig, SequentialHyperparameters
from snn_lib.tasks.time_series import TimeSeriesConfig, TimeSeriesHyperparameters
from snn_lib.training.config import config_from_dict

CONFIGS = (
    DigitConfig,
    ConvConfig,
    SequentialConfig,
    TimeSeriesConfig,
    EventConvConfig,
    AssociationConfig,
)


def sections_of(config_class):
    """Every section of a configuration by its prefix, the whole among them."""
    config = config_class()
    return {"": config, **{f"{k}.": v for k, v in list_settings(config) if isinstance(v, Settings)}}


SECTIONS = {type(s): s for config in CONFIGS for s in sections_of(config).values()}


def outside(value, allowed):
    """Numbers of the value's type that its range does not have, the nearest among them."""
    number = value[0] if isinstance(value, list) else value
    whole = isinstance(number, int)
    below = {"at_least": -1, "above": 0}
    yield from (LARGEST + 1, -LARGEST - 1) if whole else (math.inf, -math.inf, math.nan)
    for name in ("at_least", "above", "at_most", "below"):
        bound = getattr(allowed, name)
        if math.isfinite(bound):
            away = -1 if name in below else 1
            if name in ("above", "below"):
                yield bound if whole else float(bound)
            yield bound + away if whole else math.nextafter(bound, away * math.inf)


@pytest.mark.parametrize("section", SECTIONS.values(), ids=[s.__name__ for s in SECTIONS])
def test_every_number_outside_its_range_is_refused_by_its_name(section):
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, (int, float)) and not isinstance(first, bool):
            for wrong in outside(value, entry.metadata["range"]):
                wrong = [wrong] * len(value) if isinstance(value, list) else wrong
                said = refusal(type(section), **{entry.name: wrong})
                assert said.startswith(f"{entry.name} is {wrong}, expected ")


# The test above takes a range from the field itself, and cannot tell that the range is right.
SENSELESS = [
    (AssociationHyperparameters, {"tau_s": 8.0}, "and tau_s 8.0, expected tau_s below"),
    (AugmentationSettings, {"noise": -1.0}, "noise is -1.0, expected at least 0"),
    (AugmentationSettings, {"scale": -1.0}, "scale is -1.0, expected at least 0"),
    (AugmentationSettings, {"stretch": 0.5}, "stretch is 0.5, expected at least 1"),
    (AugmentationSettings, {"crop": 0.0}, "crop is 0.0, expected above 0 and at most 1"),
    (AugmentationSettings, {"channel_dropout": 1.0}, "expected at least 0 and below 1"),
    (CameraSettings, {"threshold": 0.0}, "threshold is 0.0, expected at least 0.01"),
    (CameraSettings, {"black": 0.0}, "black is 0.0, expected at least 0.001"),
    (CameraSettings, {"spread": -0.1}, "spread is -0.1, expected at least 0"),
    (CameraSettings, {"reach": 40.0}, "reach is 40.0, expected at least 0 and at most 34"),
    (CameraSettings, {"noise": 1e9}, "expected at least 0 and at most 1,000"),
    (ConvHyperparameters, {"channels": [1, 1, 0]}, "expected 3 numbers, each at least 1"),
    (ConvHyperparameters, {"hidden": 0}, "hidden is 0, expected at least 1"),
    (ConvHyperparameters, {"voters": 0}, "voters is 0, expected at least 1"),
    (Damage, {"modify_probability": 1.1}, "expected at least 0 and at most 1"),
    (Damage, {"noise_probability": 1.5}, "expected at least 0 and at most 1"),
    (Damage, {"jitter_probability": 1.1}, "expected at least 0 and at most 1"),
    (Damage, {"jitter_sigma": -1.0}, "jitter_sigma is -1.0, expected at least 0"),
    (Damage, {"block_size": -1}, "block_size is -1, expected at least 0"),
    (Damage, {"rows_removed": -2}, "rows_removed is -2, expected at least 0"),
    (EventAugmentationSettings, {"shift": -1.0}, "shift is -1.0, expected at least 0"),
    (EventAugmentationSettings, {"rotation": -1.0}, "rotation is -1.0, expected at least 0"),
    (EventAugmentationSettings, {"drop": 1.0}, "drop is 1.0, expected at least 0 and below 1"),
    (EventConvHyperparameters, {"first_rate": 0.0}, "first_rate is 0.0, expected above 0"),
    (EventSettings, {"merge": 0}, "merge is 0, expected at least 1"),
    (EventSettings, {"side": 0}, "side is 0, expected at least 1"),
    (EventSettings, {"validation_size": 0}, "validation_size is 0, expected at least 1"),
    (EventSettings, {"duration": 0.0}, "duration is 0.0, expected at least 0.001"),
    (LatencySettings, {"span": 0}, "span is 0, expected at least 1"),
    (LatencySettings, {"threshold": 1.0}, "threshold is 1.0, expected above 0 and below 1"),
    (LatencySettings, {"tau": 0.0}, "tau is 0.0, expected above 0"),
    (LatencySettings, {"jitter": -1.0}, "jitter is -1.0, expected at least 0"),
    (MNISTSettings, {"teacher_temperature": 0.0}, "expected above 0"),
    (MNISTSettings, {"training_size": -5}, "training_size is -5, expected at least 1"),
    (AssociationHyperparameters, {"weight_gain": 0.0}, "weight_gain is 0.0, expected above 0"),
    (PatternSettings, {"training_samples": 0}, "training_samples is 0, expected at least 1"),
    (SequentialHyperparameters, {"length": 100}, "expected a divisor of the 784 pixels"),
    (SequentialHyperparameters, {"length": 28, "moments": 5}, "a divisor of the length, 28"),
    (SequentialHyperparameters, {"shortest_memory": 0.0}, "expected above 0"),
    (SequentialHyperparameters, {"shortest_memory": 900.0}, "900.0 and longest_memory 800.0"),
    (SequentialHyperparameters, {"highest_frequency": 0.6}, "expected above 0 and at most 0.5"),
    (SequentialHyperparameters, {"lowest_frequency": 0.3}, "0.3 and highest_frequency 0.25"),
    (TimeSeriesHyperparameters, {"fields": 1}, "fields is 1, expected at least 2"),
    (TimeSeriesHyperparameters, {"neurons": 0}, "neurons is 0, expected at least 1"),
    (TimeSeriesHyperparameters, {"filters": 0}, "filters is 0, expected at least 1"),
    (TimeSeriesHyperparameters, {"heard": 0}, "heard is 0, expected at least 1"),
    (TimeSeriesHyperparameters, {"threshold": 0.0}, "threshold is 0.0, expected above 0"),
    (TimeSeriesHyperparameters, {"lowest_rate": 0.0}, "lowest_rate is 0.0, expected above 0"),
    (TimeSeriesHyperparameters, {"train_bias": False}, "train_bias is False, but the neurons'"),
    (TimeSeriesHyperparameters, {"highest_rate": 1.0}, "expected above 0 and below 1"),
    (TimeSeriesHyperparameters, {"lowest_rate": 0.9, "highest_rate": 0.1}, "the smaller one first"),
]


@pytest.mark.parametrize(("section", "values", "message"), SENSELESS)
def test_values_outside_these_ranges_are_refused(section, values, message):
    assert message in refusal(section, **values)


def test_tau_m_may_be_below_tau_s_where_no_filter_has_both():
    assert TimeSeriesHyperparameters(tau_m=0.5, tau_s=1.0).tau_m == 0.5


@dataclass
class Inner(Settings):
    share: float = setting(0.5, "a share", above=0, at_most=1)
    pair: list[int] = setting([1, 2], "two", at_least=1, length=2)
    free: float = 3.0
    blocks: list[list[float]] = setting([[1.0, 2.0]], "lists", at_least=1)
    words: Any = setting(None, "none, or two", length=2)

    def __post_init__(self):
        super().__post_init__()
        require(self.pair[0] < self.pair[1], f"pair is {self.pair}, expected the lowest first")


@dataclass
class Outer(ExperimentConfig):
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0.0}, "share is 0.0, expected above 0 and at most 1"),
        ({"share": math.nan}, "share is nan, expected finite numbers"),
        ({"pair": [1, 2, 3]}, "pair is [1, 2, 3], expected 2 numbers, each at least 1"),
        ({"pair": [0, 1]}, "pair is [0, 1], expected 2 numbers, each at least 1"),
        ({"pair": [2, 1]}, "pair is [2, 1], expected the lowest first"),
        ({"blocks": [[2.0], [1.0, 0.5]]}, "blocks is [[2.0], [1.0, 0.5]], expected at least 1"),
        ({"blocks": [[math.nan]]}, "blocks is [[nan]], expected finite numbers"),
        ({"words": ["a"]}, "words is ['a'], expected 2 values"),
        ({"free": math.inf}, "free is inf, expected finite numbers"),
        ({"pair": [1, 10**30]}, f"and whole ones up to {LARGEST:,}"),
    ],
)
def test_a_section_of_one_s_own_is_checked_alone_and_in_a_configuration(values, message):
    alone = refusal(Inner, **values)
    assert message in alone
    assert refusal(config_from_dict, Outer, {"inner": values}, []) == f"inner.{alone}"


class NewDefault(Inner):
    share: float = 0.25


class NewSetting(Inner):
    width: int = setting(16, "a width")


class PlainSetting(Inner):
    width: int = 16


class Mixin:
    share: float = 0.3


@dataclass
class Mixed(Mixin, Inner):
    """Its own fields count, not an attribute of the mixin."""


class NoSetting(Inner):
    NAMES: ClassVar[tuple[str, ...]] = ("a", "b")

    @property
    def half(self):
        return self.share / 2


def test_settings_of_a_class_that_is_no_dataclass_are_refused():
    for kind in (NewDefault, NewSetting, PlainSetting, type("Below", (NewSetting,), {})):
        assert "has settings and is no dataclass, so they would have no effect" in refusal(kind)
    assert NoSetting(share=0.5).half == 0.25
    assert Mixed().share == 0.5


def test_a_value_on_an_included_bound_is_taken():
    assert Inner(share=1.0, pair=[1, LARGEST]).share == 1.0


def test_a_range_reads_as_words():
    assert str(Range()) == ""
    assert str(Range(at_least=0, below=1)) == "at least 0 and below 1"
    assert str(Range(above=0.5, at_most=10_000)) == "above 0.5 and at most 10,000"
    assert str(Range(above=0, length=2)) == "2 numbers, each above 0"


RESTARTS = {
    "scheduler_choice": "CosineAnnealingWarmRestarts",
    "CosineAnnealingWarmRestarts": {"eta_min": 0.001},
}


@pytest.mark.parametrize(
    ("scheduler", "optimizer", "message"),
    [
        ({"CyclicLR": {"base_lr": 0.1, "max_lr": 0.01}}, {}, "base_lr is 0.1 and max_lr 0.01, exp"),
        (RESTARTS, {}, "eta_min is 0.001, expected at most optimizer.Adam.lr, 0.0001, and at most"),
        (
            RESTARTS,
            {"Adam": {"lr": 0.01}, "coefficient_lr_scale": 0.01},
            "coefficient_lr_scale, 0.01",
        ),
    ],
)
def test_the_lowest_rate_is_not_above_the_highest(scheduler, optimizer, message):
    values = {"scheduler": scheduler, "optimizer": optimizer}
    assert message in refusal(config_from_dict, ExperimentConfig, values, [])
    right = {"Adam": {"lr": 0.1}, "coefficient_lr_scale": 0.01}  # 0.001, but for rounding
    config_from_dict(ExperimentConfig, {"scheduler": RESTARTS, "optimizer": right}, [])
    fixed = {"optimizer": {"Adam": {"lr": 0.1}, "coefficient_lr_scale": 0.0}}
    fixed["hyperparameters"] = {"train_coefficients": False}
    config_from_dict(ExperimentConfig, {"scheduler": RESTARTS, **fixed}, [])

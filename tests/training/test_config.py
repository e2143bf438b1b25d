"""Settings: read from YAML, overridden, and refused with one line where they make no sense."""

import dataclasses
import enum
import json
import shlex
from pathlib import Path
from typing import List, Literal  # noqa: UP035 (some write it so)

import pytest
import refusing
import yaml
from omegaconf import OmegaConf
from running import ROOT

from snn_lib.errors import InputError
from snn_lib.settings import Settings, section
from snn_lib.tasks.digits import DigitConfig, DigitHyperparameters
from snn_lib.training.config import (
    attributes_of,
    check_config,
    chosen_file,
    config_from_dict,
    keys_of,
    load_config,
    merge_config,
    refuse_without_effect,
)

YAML = """
name: trial
hyperparameters:
  length: 12
  tau_m: 5
optimizer:
  optimizer_choice: AdamW
  AdamW: {lr: 0.002}
"""


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text(YAML)
    return path


def refusal(path, *overrides, script=None):
    return refusing.refusal(load_config, DigitConfig, path, overrides, script)


def test_yaml_fills_the_defaults_and_overrides_win(yaml_file):
    config = load_config(DigitConfig, yaml_file, ["hyperparameters.length=7", "seed=1", "seed=9"])
    assert isinstance(config, DigitConfig)
    assert config.name == "trial"
    assert config.hyperparameters.length == 7
    assert config.hyperparameters.tau_m == 5.0
    assert isinstance(config.hyperparameters.tau_m, float)
    assert config.optimizer.AdamW.lr == 0.002
    assert config.optimizer.AdamW.weight_decay == DigitConfig().optimizer.AdamW.weight_decay
    assert config.seed == 9  # the last of the two


def test_an_override_may_be_a_list_another_setting_s_value_or_empty(yaml_file):
    overrides = ["scheduler.MultiStepLR.milestones=[3,5]", "hyperparameters.epoch=${seed}"]
    config = load_config(DigitConfig, yaml_file, [*overrides, "test_checkpoint_path="])
    assert config.test_checkpoint_path == ""
    assert config.scheduler.MultiStepLR.milestones == [3, 5]
    assert config.hyperparameters.epoch == config.seed


def test_a_configuration_comes_back_from_a_plain_dict(yaml_file):
    config = load_config(DigitConfig, yaml_file, [])
    assert config_from_dict(DigitConfig, dataclasses.asdict(config), []) == config


def test_defaults_are_not_shared_between_configurations():
    one, other = DigitConfig(), DigitConfig()
    one.optimizer.Adam.betas[0] = 0.5
    assert other.optimizer.Adam.betas[0] == 0.9


@pytest.mark.parametrize(
    "text", ["0123", "a #1", "yes", "~x", "1e-3", "2026_11", "a: b", '"', "it's", "é", "[a, b]"]
)
def test_a_text_is_taken_as_it_is_typed(yaml_file, text):
    overrides = [f"dataset_path={text}", "transform[elastic][alpha]=1e-1"]
    config = load_config(DigitConfig, yaml_file, overrides)
    assert (config.dataset_path, config.transform.elastic.alpha) == (text, 0.1)
    quoted = load_config(DigitConfig, yaml_file, [f"dataset_path={json.dumps(text)}"])
    assert quoted.dataset_path == config.dataset_path
    assert keys_of(DigitConfig, overrides) == ["dataset_path", "transform.elastic.alpha"]


@pytest.mark.parametrize("text", ["0123", "yes", "1e-3", "2026_11", "1.10", "0x1F", "on"])
def test_a_text_in_a_file_is_what_is_written(yaml_file, text):
    yaml_file.write_text(f"name: {text}")
    config = load_config(DigitConfig, yaml_file, [])
    assert config.name == text
    yaml_file.write_text(yaml.safe_dump(dataclasses.asdict(config)))  # as in a run's folder
    assert load_config(DigitConfig, yaml_file, []) == config


def test_a_path_may_begin_in_the_home_folder(yaml_file, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    yaml_file.write_text("dataset_path: ~/data\nmnist_config: {teachers: [~/best, other]}")
    config = load_config(
        DigitConfig, yaml_file, ["name=digits", "runs_path=~/r", "test_checkpoint_path=a~/b"]
    )
    assert config.dataset_path == "/somewhere/data"
    assert config.mnist_config.teachers == ["/somewhere/best", "other"]
    assert config.runs_folder == Path("/somewhere/r/digits")
    assert config.test_checkpoint_path == "a~/b"
    assert load_config(DigitConfig, None, ["name=digits", "runs_path=~"]).runs_path == "/somewhere"


def test_files_of_settings_may_lie_in_the_home_folder(yaml_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(f"base: ~/{yaml_file.name}\nseed: 5")
    config = load_config(DigitConfig, chosen_file(ROOT / "snn_mlp_1.py", Path("~/mine.yaml")), [])
    assert (config.seed, config.hyperparameters.length) == (5, 12)


@dataclasses.dataclass
class Named(DigitConfig):
    kind: Literal["on", "off", "1e3"] = "off"
    order: Literal[1, 2] = 1
    names: list[str] = dataclasses.field(default_factory=list)
    note: str | None = None
    pairs: list[list[str]] | None = None
    some: list[str | None] = dataclasses.field(default_factory=list)
    mixed: int | str = 0
    anything: List = dataclasses.field(default_factory=list)  # noqa: UP006 (some write it so)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("kind=on", "on"),
        ("kind='on'", "on"),
        ("kind=1e3", "1e3"),
        ("order=2", 2),
        ("names=[on,1e3,7.0,'a, b','${name}']", ["on", "1e3", "7.0", "a, b", "own"]),
        ("names=[]", []),
        ("note=on", "on"),
        ("note=null", None),
        ("some=[a,null]", ["a", None]),
        ("mixed=3", 3),
        ("anything=[3]", [3]),
        ("pairs=[[on],[1e3]]", [["on"], ["1e3"]]),
    ],
)
def test_text_with_choices_and_texts_in_a_list_are_taken_as_they_are_typed(
    yaml_file, override, value
):
    yaml_file.write_text(f"name: own\n{override.replace('=', ': ', 1)}")
    for given in ((None, ["name=own", override]), (yaml_file, [])):
        assert getattr(load_config(Named, *given), override.split("=")[0]) == value


def test_a_list_of_texts_that_does_not_end_is_refused():
    message = refusing.refusal(load_config, Named, None, ["name=own", "names=[a"])
    assert message.startswith("override 'names=[a': while parsing a flow sequence")


@dataclasses.dataclass
class Filling(DigitHyperparameters):
    width: int = 10
    hidden: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.hidden = self.hidden or 2 * self.width


@dataclasses.dataclass
class Inner(Settings):
    size: int = 5
    twice: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.twice = self.twice or 2 * self.size


@dataclasses.dataclass
class Around(Settings):
    inner: Inner = section(Inner)


@dataclasses.dataclass
class FillingConfig(DigitConfig):
    hyperparameters: Filling = section(Filling)
    around: Around = section(Around)


@pytest.mark.parametrize(
    ("overrides", "hidden"),
    [([], 20), (["hyperparameters.width=12"], 24), (["hyperparameters.hidden=3"], 3)],
)
def test_a_section_may_fill_in_a_setting_from_others(overrides, hidden):
    config = load_config(FillingConfig, None, ["name=own", "around.inner.size=7", *overrides])
    assert config.hyperparameters.hidden == hidden
    assert config.around.inner.twice == 14


@dataclasses.dataclass
class OptionalConfig(DigitConfig):
    inner: Inner | None = None


def test_a_section_that_may_be_absent_can_be_set():
    assert load_config(OptionalConfig, None, ["name=own"]).inner is None
    typed = load_config(OptionalConfig, None, ["name=own", "inner.size=7"])
    kept = config_from_dict(OptionalConfig, {"name": "own", "inner": {"size": 7}}, [])
    assert typed.inner.size == kept.inner.size == 7


@dataclasses.dataclass(slots=True)
class InSlots(DigitHyperparameters):
    width: int = 16


@dataclasses.dataclass(slots=True)
class SlotsConfig(DigitConfig):
    hyperparameters: InSlots = section(InSlots)


def test_what_is_set_in_python_counts_where_settings_lie_in_slots():
    config = SlotsConfig(name="own")
    config.hyperparameters.width, config.hyperparameters.epoch = 64, 1
    config.hyperparameters.half = 7
    values = attributes_of(config)
    assert (values["name"], values["hyperparameters"]["width"]) == ("own", 64)
    assert (values["hyperparameters"]["epoch"], values["hyperparameters"]["half"]) == (1, 7)


def test_a_field_that_init_does_not_take_is_refused():
    derived = dataclasses.field(init=False, default=0)
    own = dataclasses.make_dataclass("Own", [("derived", int, derived)], bases=(DigitConfig,))
    part = dataclasses.make_dataclass("Part", [("derived", int, derived)], bases=(Settings,))
    outer = dataclasses.make_dataclass(
        "Outer", [("part", part, section(part))], bases=(DigitConfig,)
    )
    for schema in (own, outer):
        message = refusing.refusal(load_config, schema, None, ["name=own"])
        assert message.startswith("derived is a field with init=False, which no setting can be")
        assert "\n" not in message


def test_a_base_without_a_name_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("base:\nseed: 3\n")
    assert "mine.yaml: base is None, expected the name of a YAML" in refusal(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("hyperparameters.lenght=3", "hyperparameters.length"),
        ("lenght=3", "hyperparameters.length"),
        ("epoch=3", "hyperparameters.epoch"),
        ("optimiser.Adam.lr=3", "optimizer"),
        ("optimizer.adam.lr=3", "optimizer.Adam"),
        ("hyperparameters.milestones=[3]", "scheduler.MultiStepLR.milestones"),
        ("sed=1", "seed"),
        ("hyperparameters.surname=1", "hyperparameters.surrogate_width"),
        ("transforms.repeat=1", "transform"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(yaml_file, override, nearest):
    message = refusal(yaml_file, override)
    assert f"override {override!r}: unknown key" in message
    assert f"did you mean {nearest!r}?" in message


@pytest.mark.parametrize("choice", ["Adam", "AdamW"])
def test_the_option_of_another_optimiser_is_not_the_nearest(yaml_file, choice):
    chosen = f"optimizer.optimizer_choice={choice}"
    constant = chosen, "scheduler.scheduler_choice=none"
    assert f"did you mean 'optimizer.{choice}.lr'?" in refusal(yaml_file, *constant, "lr=0.1")
    planned = chosen, "scheduler.scheduler_choice=OneCycleLR"
    assert "unknown key 'lr': --help lists" in refusal(yaml_file, *planned, "lr=0.1")
    meant = refusal(yaml_file, *constant, "optimizer.SGD.lrr=0.1")  # the choice may come next
    assert "did you mean 'optimizer.SGD.lr'?" in meant
    assert "unknown key 'lr'" in refusal(yaml_file, "optimizer.optimizer_choice=${name}", "lr=1")


@pytest.mark.parametrize("override", ["seed=010", "seed=008", "hyperparameters.tau_m=-012"])
def test_a_number_that_would_be_octal_is_refused(yaml_file, override):
    assert f"override {override!r}: YAML may read a number that begins" in refusal(
        yaml_file, override
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("seed: 010", "seed is 010: YAML may read a number that begins with 0 as octal"),
        ("hyperparameters: {tau_m: -012}", "hyperparameters.tau_m is -012: YAML may read a number"),
    ],
)
def test_an_octal_number_in_a_file_is_refused(yaml_file, line, said):
    yaml_file.write_text(line)
    assert refusal(yaml_file).startswith(f"{yaml_file}: {said}")


def test_a_missing_value_is_refused(yaml_file):
    said = "hyperparameters.tau_m is ???, expected a value"
    for override in ("hyperparameters.tau_m=???", "hyperparameters={tau_m: '???'}"):
        assert refusal(yaml_file, override) == f"override {override!r}: {said}"
    yaml_file.write_text("hyperparameters:\n  tau_m: ???")
    assert refusal(yaml_file, "hyperparameters.tau_m=4") == f"{yaml_file}: {said}"


def test_a_section_without_settings_or_with_a_value_is_refused_in_words(yaml_file):
    said = "expected its settings, such as"
    override = refusal(yaml_file, "optimizer=Adam")
    assert f"override 'optimizer=Adam': optimizer is 'Adam', {said} optimizer_choice, " in override
    yaml_file.write_text("seed: 3\nhyperparameters:\n  # epoch: 3\n")
    assert f"{yaml_file}: hyperparameters is None, {said} " in refusal(yaml_file)
    yaml_file.write_text("optimizer:\n  Adam: 3\n")
    assert f"{yaml_file}: Adam is 3, {said} lr, or no such line" in refusal(yaml_file)


@pytest.mark.parametrize(
    "override",
    [
        "hyperparameters.length=abc",
        "hyperparameters.length=2.5",
        "hyperparameters.length=true",
        "hyperparameters.length=null",
        "hyperparameters.tau_m=fast",
        "hyperparameters=3",
        "hyperparameters.epoch.x=3",
        "tensorboard=maybe",
        "optimizer.Adam.betas=0.9",
        "scheduler.MultiStepLR.milestones=[a]",
        "hyperparameters.encoding=rate",
        "optimizer.optimizer_choice=Adm",
        "name=[",
        "name=${nowhere}",
        "name=${name}",
    ],
)
def test_a_wrong_type_is_refused_with_its_key(yaml_file, override):
    assert override.partition("=")[0].split(".")[0] in refusal(yaml_file, override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("hyperparameters.tau_s=0", "hyperparameters.tau_s is 0.0, expected above 0"),
        ("hyperparameters.tau_m=-4", "tau_m is -4.0, expected above 0 and at most 1,000,000"),
        ("hyperparameters.tau_m=nan", "tau_m is nan, expected finite"),
        ("hyperparameters.dropout=1", "dropout is 1.0, expected at least 0 and below 1"),
        ("hyperparameters.length=0", "hyperparameters.length is 0, expected at least 1"),
        ("hyperparameters.batch_size=0", "hyperparameters.batch_size is 0"),
        ("hyperparameters.epoch=0", "hyperparameters.epoch is 0"),
        ("hyperparameters.length=10000000000000000000000", "whole ones up to 4,294,967,295"),
        ("hyperparameters.surrogate_width=0", "surrogate_width is 0.0"),
        (
            "hyperparameters.weight_averaging=1",
            "weight_averaging is 1.0, expected at least 0 and b",
        ),
        ("hyperparameters.weight_bits=3", "weight_bits is 3, expected 8, 4, 2 or 0"),
        ("hyperparameters.label_smoothing=1", "label_smoothing is 1.0"),
        ("hyperparameters.logit_per_spike=0", "logit_per_spike is 0.0, expected above 0"),
        ("mnist_config.teachers=one", "('mnist_config.teachers'): expected a list, such as [a, b]"),
        ("mnist_config.max_rate=0", "mnist_config.max_rate is 0.0"),
        ("mnist_config.test_size=10001", "is 10001, expected at least 1 and at most 10,000"),
        ("mnist_config.training_size=60000", "_size + training_size is 65000, MNIST has 60000"),
        ("optimizer.AdamW.lr=0", "optimizer.AdamW.lr is 0.0, expected above 0"),
        ("optimizer.SGD.weight_decay=-1", "optimizer.SGD.weight_decay is -1.0"),
        (
            "optimizer.Adam.betas=[0.9]",
            "optimizer.Adam.betas is [0.9], expected 2 numbers, each at",
        ),
        ("optimizer.Adam.betas=[0.9,nan]", "optimizer.Adam.betas is [0.9, nan], expected finite"),
        ("optimizer.gradient_clipping=-1", "optimizer.gradient_clipping is -1.0"),
        ("optimizer.coefficient_lr_scale=-1", "optimizer.coefficient_lr_scale is -1.0"),
        ("scheduler.OneCycleLR.pct_start=1", "pct_start is 1.0, expected at least 0 and below 1"),
        ("scheduler.OneCycleLR.max_lr=-1", "scheduler.OneCycleLR.max_lr is -1.0, expected above 0"),
        ("scheduler.CosineAnnealingWarmRestarts.T_0=0", "T_0 is 0, expected at least 1"),
        ("transform.probability=2", "transform.probability is 2.0"),
        ("transform.repeat=-1", "transform.repeat is -1, expected at least 0 and at most 100"),
        ("transform.RandomResizedCrop.scale=[0.5,2]", "expected 2 numbers, each above 0 and at mo"),
        ("transform.RandomResizedCrop.scale=[0.5]", "scale is [0.5], expected 2 numbers"),
        ("transform.RandomResizedCrop.ratio=[2,1]", "[2.0, 1.0], expected the lowest first"),
        ("transform.RandomRotation.degrees=-1", "degrees is -1.0, expected at least 0"),
        ("transform.elastic.sigma=0", "transform.elastic.sigma is 0.0, expected above 0"),
        ("hyperparameters.rate_penalty=1", "expected a weight and a rate, or neither"),
        ("hyperparameters.target_rate=0.1", "expected a weight and a rate, or neither"),
        ("hyperparameters.rate_limit=0.1", "expected a weight and a rate, or neither"),
        ("seed=-1", "seed is -1, expected at least 0"),
        ("name=a/b", "name is 'a/b', expected at most 100 letters, digits"),
        ("name=..", "name is '..', expected at most 100 letters, digits"),
        ("seed", "'seed' is not an override, expected key=value"),
        ("=3", "'=3' is not an override, expected key=value"),
    ],
)
def test_a_value_outside_its_range_is_refused(yaml_file, overrides, message):
    assert message in refusal(yaml_file, overrides)


def test_the_rate_of_poisson_spikes_is_at_most_one(yaml_file):
    bright = "mnist_config.max_rate=1.5"
    assert load_config(DigitConfig, yaml_file, [bright]).mnist_config.max_rate == 1.5
    message = refusal(yaml_file, bright, "hyperparameters.encoding=poisson")
    assert message.startswith("mnist_config.max_rate is 1.5, expected at most 1: with ")


@pytest.mark.parametrize(
    ("stem", "name"),
    [("rising (1)", "rising__1_"), ("-x", "_x"), ("a.b+c", "a.b+c"), ("n" * 120, "n" * 100)],
)
def test_a_run_is_named_after_a_script_of_any_name(stem, name):
    assert load_config(DigitConfig, None, [], Path(f"{stem}.py")).name == name
    assert load_config(DigitConfig, None, ["name=mine"], Path(f"{stem}.py")).name == "mine"


def test_what_is_no_file_is_refused(tmp_path):
    assert refusal(tmp_path / "none.yaml") == f"there is no file {tmp_path}/none.yaml"
    assert refusal(tmp_path) == f"{tmp_path} is not a file"


NESTED = "is written as one key, but keys are nested: "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "hyperparameters: {droput: 1}",
            "'hyperparameters.droput', did you mean 'hyperparameters.d",
        ),
        ("optimizer.AdamW.lr: 4", f"{NESTED}optimizer: {{AdamW: {{lr: ...}}}}"),
        ("optimizer: {AdamW.lr: 4}", f"{NESTED}optimizer: {{AdamW: {{lr: ...}}}}"),
        ("hyperparameters.tau_m: 4", f"{NESTED}hyperparameters: {{tau_m: ...}}"),
        ("seed: 3\ntransform: {repeat: 4\nname: x", "line 3: did not find expected ',' or '}'"),
        ("a: [", "cannot be read: line 2: "),
        ("just words", "unknown key 'just words'"),
        ("- a\n- list", "expected lines such as seed: 3"),
        ("mnist_config: {teachers: {a: b}}", "teachers is {'a': 'b'}, expected a list, such as [a"),
        ("optimizer: {AdamW: {betas: {a: 1}}}", "betas is {'a': 1}, expected a list, such as [a"),
        (
            "hyperparameters: {epoch: {a: 1}}",
            " ('hyperparameters.epoch'): Value '{'a': 1}' of type",
        ),
        ("a: b: c", "cannot be read: line 1: "),
        ("\0\xff", "cannot be read: "),
        ("[" * 5000, "cannot be read: "),
        ("a: !!set {b}", "cannot be read: "),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_its_name(yaml_file, content, message):
    yaml_file.write_text(content, "latin-1")
    said = refusal(yaml_file)
    assert said.startswith(str(yaml_file))
    assert message in said


def test_an_unknown_key_like_no_other_is_refused_without_a_guess(yaml_file):
    assert "unknown key 'gpu': --help lists the settings" in refusal(yaml_file, "gpu=1")


class Kind(enum.StrEnum):
    WIDE = "wide"


@pytest.mark.parametrize(
    ("kind", "value", "name"),
    [
        (Path, Path("here"), r"\w*Path"),
        (Kind, Kind.WIDE, "Kind"),
        (list[Path], [], r"\w*Path"),
        (dict[str, int], {"hidden": 3}, "dict"),
    ],
)
def test_a_setting_that_is_neither_a_value_nor_a_list_is_refused(kind, value, name):
    default = dataclasses.field(default_factory=lambda: value)
    own = dataclasses.make_dataclass("Own", [("own", kind, default)], bases=(DigitConfig,))
    with pytest.raises(InputError, match=rf"own has a {name}, expected text, a number"):
        load_config(own, None, ["own=[there]"] if value == [] else [])


def test_a_yaml_file_cannot_run_code(yaml_file, tmp_path):
    touched = tmp_path / "touched"
    yaml_file.write_text(f"name: !!python/object/apply:os.system ['touch {touched}']")
    refusal(yaml_file)
    assert not touched.exists()


def test_the_documented_command_has_the_constants_of_the_2020_release():
    """They are the defaults, so whatever our YAML file sets otherwise has to be in the command."""
    text = (ROOT / "docs" / "experiments.md").read_text()
    lines = text.replace("\\\n", "").splitlines()
    (command,) = (line for line in lines if "optimizer_choice=Adam " in line)
    script, train, *overrides = shlex.split(command)[1:]
    assert (script, train) == ("snn_mlp_1.py", "--train")
    config = load_config(DigitConfig, ROOT / "snn_mlp_1.yaml", overrides)
    for part in ("hyperparameters", "mnist_config", "transform"):
        assert getattr(config, part) == getattr(DigitConfig(), part)
    assert config.optimizer.Adam == DigitConfig().optimizer.Adam
    assert config.scheduler.MultiStepLR == DigitConfig().scheduler.MultiStepLR


# ---------------------------------------------------------------------------------------------
# A file that is a variant of another


@pytest.fixture
def variant(yaml_file):
    path = yaml_file.parent / "more" / "variant.yaml"
    path.parent.mkdir()
    path.write_text("base: ../trial.yaml\nhyperparameters: {tau_m: 6}\nseed: 3")
    return path


def test_a_variant_has_what_its_base_says_but_for_its_own_lines(variant, yaml_file):
    base, own = (load_config(DigitConfig, path, []) for path in (yaml_file, variant))
    assert (own.hyperparameters.tau_m, own.seed) == (6, 3)
    base.hyperparameters.tau_m, base.seed = 6.0, 3
    assert own == base
    assert load_config(DigitConfig, variant, ["seed=4"]).seed == 4


def test_a_base_may_have_a_base(variant, tmp_path):
    (tmp_path / "third.yaml").write_text("base: more/variant.yaml\nhyperparameters: {length: 9}")
    config = load_config(DigitConfig, tmp_path / "third.yaml", [])
    options = config.hyperparameters
    assert (config.name, options.length, options.tau_m, config.seed) == ("trial", 9, 6, 3)


def test_a_list_of_a_variant_replaces_that_of_its_base(variant, yaml_file):
    key = "scheduler: {scheduler_choice: MultiStepLR, MultiStepLR: {milestones: %s}}"
    yaml_file.write_text(key % [1, 2, 3])
    variant.write_text("base: ../trial.yaml\n" + key % [4])
    assert load_config(DigitConfig, variant, []).scheduler.MultiStepLR.milestones == [4]


def test_of_a_variant_and_its_base_the_file_with_the_unknown_key_is_named(variant, yaml_file):
    yaml_file.write_text("hyperparameters: {droput: 0.5}")
    assert refusal(variant).startswith(f"{variant.parent}/../trial.yaml: unknown key")
    yaml_file.write_text(YAML)
    variant.write_text("base: ../trial.yaml\nhyperparameters: {droput: 0.5}")
    assert refusal(variant).startswith(f"{variant}: unknown key 'hyperparameters.droput'")


@pytest.mark.parametrize("base", ["variant.yaml", "../trial.yaml", "../more/variant.yaml"])
def test_a_circle_of_bases_is_refused(variant, yaml_file, base):
    yaml_file.write_text("base: more/variant.yaml")
    variant.write_text(f"base: {base}")
    message = refusal(variant)
    assert "is a base of itself: variant.yaml -> " in message
    assert message.endswith("-> variant.yaml")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere.yaml", "there is no file {folder}/nowhere.yaml"),
        ("[a]", "{folder}/variant.yaml: base is ['a'], expected the name of a YAML file"),
        ("3", "base is 3, expected the name of a YAML file"),
        (".", "{folder} is not a file"),
    ],
)
def test_a_base_that_is_no_file_is_refused(variant, base, message):
    variant.write_text(f"base: {base}")
    assert message.format(folder=variant.parent) in refusal(variant)


# ---------------------------------------------------------------------------------------------
# Settings that nothing reads


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optimizer.AdamW.lr=0.1"],
            "optimizer.AdamW.lr has no effect with scheduler.scheduler_choice=OneCycleLR: "
            "scheduler.OneCycleLR.max_lr counts instead",
        ),
        (
            ["optimizer={SGD: {momentum: 0}}"],
            "optimizer.SGD.momentum has no effect with optimizer.optimizer_choice=AdamW",
        ),
        (
            ["latency.law=logarithmic", "latency.tau=3"],
            "latency.law has no effect with hyperparameters.encoding=constant",
        ),
        (
            ["hyperparameters.encoding=latency", "latency.tau=3"],
            "latency.tau has no effect with latency.law=linear",
        ),
        (
            ["transform.repeat=0", "transform.RandomRotation.degrees=3"],
            "transform.RandomRotation.degrees has no effect with transform.repeat=0",
        ),
    ],
)
def test_an_override_that_nothing_reads_is_refused_with_the_setting_that_decides(
    overrides, message
):
    merged = merge_config(DigitConfig, ROOT / "snn_mlp_1.yaml", overrides)
    assert refusing.refusal(refuse_without_effect, overrides, merged) == message


@pytest.mark.parametrize("plan", ["none", "MultiStepLR", "CosineAnnealingWarmRestarts"])
@pytest.mark.parametrize("choice", ["Adam", "AdamW", "SGD"])
def test_the_learning_rate_counts_where_the_schedule_has_none_of_its_own(choice, plan):
    overrides = [f"scheduler.scheduler_choice={plan}", f"optimizer.optimizer_choice={choice}"]
    overrides.append(f"optimizer.{choice}.lr=0.01")
    refuse_without_effect(overrides, merge_config(DigitConfig, ROOT / "snn_mlp_1.yaml", overrides))


@pytest.mark.parametrize(
    "reference",
    [
        "${optimizer.Adam.lr}",
        "${..Adam.lr}",
        "${optimizer[Adam].lr}",
        "${ optimizer.Adam.lr }",
        "${oc.select:optimizer.Adam.lr,1}",
        "${oc.select:'optimizer.Adam.lr',1}",
    ],
)
def test_a_setting_counts_that_another_one_refers_to(reference, yaml_file):
    overrides = [
        "name=a", "optimizer.Adam.lr=0.5", f"optimizer.AdamW.lr={reference}",
        "scheduler.scheduler_choice=none",
    ]  # fmt: skip
    merged = merge_config(DigitConfig, yaml_file, overrides)
    assert check_config(merged).optimizer.AdamW.lr == 0.5
    refuse_without_effect(overrides, merged)


def test_a_list_counts_of_which_an_element_is_referred_to(yaml_file):
    overrides = ["name=a", "scheduler.scheduler_choice=none", "optimizer.Adam.betas=[0.5,0.6]"]
    overrides.append("optimizer.AdamW.lr=${optimizer.Adam.betas[0]}")
    refuse_without_effect(overrides, merge_config(DigitConfig, yaml_file, overrides))


@pytest.mark.parametrize("order", [("Adam", "AdamW", "SGD"), ("SGD", "AdamW", "Adam")])
def test_a_setting_counts_by_way_of_another_one(order, yaml_file):
    first, second, third = (f"optimizer.{name}.lr" for name in order)
    overrides = [
        "name=a", "scheduler.scheduler_choice=none", f"optimizer.optimizer_choice={order[2]}",
        f"{first}=0.5", f"{second}=${{{first}}}", f"{third}=${{{second}}}",
    ]  # fmt: skip
    merged = merge_config(DigitConfig, yaml_file, overrides)
    assert getattr(check_config(merged).optimizer, order[2]).lr == 0.5
    refuse_without_effect(overrides, merged)


def test_a_default_of_another_type_is_refused_in_a_line():
    for value, kind in ((1e3, int), (None, float), ("c", Literal["a", "b"])):
        own = dataclasses.make_dataclass("Own", [("size", kind, value)], bases=(DigitConfig,))
        message = refusing.refusal(load_config, own, None, ["name=own"])
        assert message.startswith("the defaults of Own ('size'): ")


def test_a_base_that_refers_to_nothing_is_refused_in_a_line(variant):
    variant.write_text("base: ${nothing}/x.yaml\n")
    assert "variant.yaml" in refusal(variant)


def test_an_override_may_count_only_with_the_others():
    overrides = ["optimizer.SGD.lr=0.1", "optimizer[optimizer_choice]=SGD"]
    overrides += ["scheduler.scheduler_choice=none", "hyperparameters.encoding=latency"]
    overrides += ["latency.law=logarithmic", "latency.tau=3"]
    refuse_without_effect(overrides, merge_config(DigitConfig, ROOT / "snn_mlp_1.yaml", overrides))


@pytest.mark.parametrize(("choice", "counts"), [("AdamW", True), ("SGD", False)])
def test_a_setting_whose_value_another_one_takes_counts_as_that_one_does(choice, counts):
    """In snn_mlp_1.yaml that is AdamW's learning rate."""
    overrides = ["scheduler.scheduler_choice=none", "scheduler.OneCycleLR.max_lr=0.5"]
    overrides += [f"optimizer.optimizer_choice={choice}"]
    merged = merge_config(DigitConfig, ROOT / "snn_mlp_1.yaml", overrides)
    if counts:
        assert check_config(merged).optimizer.AdamW.lr == 0.5
        refuse_without_effect(overrides, merged)
    else:
        message = refusing.refusal(refuse_without_effect, overrides, merged)
        assert message.startswith("scheduler.OneCycleLR.max_lr has no effect with scheduler.sched")


@pytest.fixture
def script(tmp_path):
    """A script of one's own whose own file chooses AdamW and OneCycleLR."""
    (tmp_path / "own.yaml").write_text((ROOT / "snn_mlp_1.yaml").read_text())
    return tmp_path / "own.py"


def changed(script, old, new):
    text = script.with_suffix(".yaml").read_text()
    assert text.count(old) == 1
    return text.replace(old, new)


OF_THE_SCHEDULE = "lr: ${scheduler.OneCycleLR.max_lr}"


@pytest.mark.parametrize(
    ("old", "new", "setting", "override"),
    [
        (OF_THE_SCHEDULE, "lr: 0.1", "optimizer.AdamW.lr", "scheduler.scheduler_choice=none"),
        # the default, of which the script's own file says something else
        (OF_THE_SCHEDULE, "lr: 0.0001", "optimizer.AdamW.lr", "scheduler.scheduler_choice=none"),
        (
            "name: snn_mlp_1",
            "latency: {span: 3}",
            "latency.span",
            "hyperparameters.encoding=latency",
        ),
        (
            "  AdamW:",
            "  SGD: {lr: 0.3}\n  AdamW:",
            "optimizer.SGD.lr",
            "optimizer.optimizer_choice=SGD",
        ),
    ],
)
def test_a_file_may_set_what_nothing_reads_only_if_the_command_line_makes_it_count(
    script, old, new, setting, override
):
    mine = script.with_name("mine.yaml")
    mine.write_text(changed(script, old, new))
    has_no_effect = f"{mine}: {setting} has no effect with {override.partition('=')[0]}"
    assert refusal(mine, script=script).startswith(has_no_effect)
    plan = [] if "scheduler_choice" in override else ["scheduler.scheduler_choice=MultiStepLR"]
    load_config(DigitConfig, mine, [override, *plan], script)


def test_the_command_line_may_switch_off_what_a_file_has_options_for(script):
    mine = script.with_name("mine.yaml")
    mine.write_text("hyperparameters: {encoding: latency}\nlatency: {span: 3}")
    load_config(DigitConfig, mine, ["hyperparameters.encoding=poisson"], script)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (OF_THE_SCHEDULE, "lr: 0.002"),  # as copies of earlier versions say it
        ("optimizer_choice: AdamW", "optimizer_choice: SGD"),
        ("scheduler_choice: OneCycleLR", "scheduler_choice: none"),
        ("use_transform: true", "use_transform: false"),
        ("max_lr: 0.002", "max_lr: 0.01"),
        ("  AdamW:", "  Adam: {lr: 1e-4}\n  SGD: {lr: 0.1, momentum: 0.9}\n  AdamW:"),
    ],
)
def test_a_file_may_keep_the_options_of_what_it_does_not_choose(script, old, new):
    text = changed(script, old, new)
    mine = script.with_name("mine.yaml")
    mine.write_text(text)
    load_config(DigitConfig, mine, [], script)
    script.with_suffix(".yaml").write_text(text)
    load_config(DigitConfig, script.with_suffix(".yaml"), [], script)


def test_all_settings_of_a_run_may_be_a_file(script):
    """In which the idle learning rate is that of the schedule, and not that of the own file."""
    faster, own = ["scheduler.OneCycleLR.max_lr=0.01"], script.with_suffix(".yaml")
    config = load_config(DigitConfig, own, faster, script)
    OmegaConf.save(OmegaConf.structured(config), script.with_name("config.yaml"))
    assert load_config(DigitConfig, script.with_name("config.yaml"), [], script) == config


def test_a_variant_may_choose_otherwise_than_its_base(script):
    variant = script.with_name("variant.yaml")
    variant.write_text("base: own.yaml\nscheduler: {scheduler_choice: none}")
    config = load_config(DigitConfig, variant, [], script)
    assert config.optimizer.AdamW.lr == 0.002


def test_a_variant_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    script, variant = tmp_path / "own.py", tmp_path / "configs" / "variant.yaml"
    variant.parent.mkdir()
    variant.write_text("seed: 5")
    own = tmp_path / "own.yaml"
    own.write_text("seed: 4")
    monkeypatch.chdir(tmp_path / "configs")  # also where it lies, and by the path it once had
    for path in (Path("variant.yaml"), tmp_path / "variant.yaml", Path("..") / "variant.yaml"):
        found = chosen_file(script, path)
        assert (found.exists(), load_config(DigitConfig, found, []).seed) == (True, 5)
    assert chosen_file(script, None) == own
    assert chosen_file(script, own) == own
    (tmp_path / "above.yaml").write_text("base: variant.yaml")
    assert load_config(DigitConfig, tmp_path / "above.yaml", []).seed == 5
    with pytest.raises(InputError, match=r"^there is no file none\.yaml"):
        load_config(DigitConfig, chosen_file(script, Path("none.yaml")), [])

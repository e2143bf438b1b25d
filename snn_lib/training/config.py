"""Reads the settings of an experiment from YAML and the command line, and checks all of them.

OmegaConf reads and merges; ``snn_lib.settings`` says which keys exist, of which type and range. A
YAML file may name another one, ``base: other.yaml``, and then lists only what differs from it. The
variants of a script's settings lie in the folder ``configs`` beside it.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from snn_lib.errors import InputError, one_line, require
from snn_lib.files import reading
from snn_lib.settings import list_settings, without_effect

Config = TypeVar("Config")
get_type: Callable[..., Any] = OmegaConf.get_type  # a class, since every configuration has one

# Settings that checkpoints of earlier versions hold, and the settings that replaced them.
RETIRED = {"checkpoint_base_path": "runs_path"}
A_LIST = "expected a list, such as [a, b]"
ALIKE = 1.0  # the least likeness, of 2, of a key that may be meant


def own_file(script: Path) -> Path | None:
    """The YAML file that lies beside a script and has its name, if there is one."""
    path = script.with_suffix(".yaml")
    return path if path.exists() else None


def chosen_file(script: Path, path: Path | None) -> Path | None:
    """The YAML file at a path, or the script's own without one.

    If there is none at the path, the name is looked for in the folder ``configs`` beside the
    script.
    """
    return own_file(script) if path is None else _found(path, script.parent)


def _found(path: Path, folder: Path) -> Path:
    """The path, or if nothing is there, a file of this name among the folder's ``configs``."""
    path = Path(expand_home(str(path)))
    variant = folder / "configs" / path.name
    return variant if variant.exists() and not path.exists() else path


def load_config(
    schema: type[Config],
    yaml_path: Path | None,
    overrides: Sequence[str],
    script: Path | None = None,
) -> Config:
    """Reads a YAML file and its bases, applies ``key=value`` overrides, and checks all of it.

    Whether the overrides have an effect is not checked here, see :func:`refuse_without_effect`.

    Args:
        schema: the dataclass of the settings.
        yaml_path: the file; ``None`` for the defaults.
        overrides: settings of the command line; the last of several for one key counts.
        script: the experiment's script. Its name is that of the run if the file gives none; what no
            name may have becomes ``_``, and it is cut to 100 characters. A file other than the
            script's own may repeat what that one says.

    Raises:
        InputError: a file is missing or is no YAML, a key is unknown (the message names the file
            and a key that is like it), a value has a wrong type or lies outside its range, or the
            file sets what has no effect, neither with its other settings nor with all of these.
    """
    merged = merge_config(schema, yaml_path, overrides, script)
    refuse_file_without_effect(yaml_path, script, merged)
    return check_config(merged)


def merge_config(
    schema: type[Config],
    yaml_path: Path | None,
    overrides: Sequence[str],
    script: Path | None = None,
) -> DictConfig:
    """As :func:`load_config`, before the ranges are checked; ``${key}`` still refers to a key."""
    parts = [] if yaml_path is None else _files(schema, Path(yaml_path))
    if script is not None:
        allowed = re.sub(r"^\W", "_", re.sub(r"[^\w.+-]", "_", script.stem))[:100]
        parts.insert(0, ("the run's name", OmegaConf.create({"name": allowed})))
    return _merged(schema, parts, overrides)


def config_from_dict(
    schema: type[Config],
    values: dict[str, Any],
    overrides: Sequence[str],
    source: str = "the configuration",
) -> Config:
    """As :func:`load_config`, from the dict in a checkpoint; messages name it as ``source``."""
    values = {key: value for key, value in values.items() if key not in RETIRED}
    return check_config(_merged(schema, [(source, values)], overrides))


def refuse_without_effect(
    overrides: Sequence[str],
    *merged: DictConfig,
    unread: Mapping[str, str] | None = None,
    trained: Any = None,
) -> None:
    """Refuses settings of the command line that nothing reads.

    Args:
        overrides: ``key=value`` each.
        merged: the configurations with them; those of a sweep are several.
        unread: see :func:`snn_lib.settings.without_effect`.
        trained: a configuration whose values they may repeat.

    Raises:
        InputError: a setting has an effect in none of the configurations.
    """
    unmet = idle_settings(*merged, unread=unread)
    for key in keys_of(get_type(merged[0]), overrides):
        if key in unmet and (trained is None or not _same(key, merged[0], trained)):
            raise InputError(f"{key} {unmet[key]}")


def refuse_file_without_effect(
    yaml_path: Path | None, script: Path | None, *merged: DictConfig
) -> None:
    """Refuses what a YAML file of the user's own sets although nothing reads it.

    It may repeat what the script's own file says, or the default of what that does not say. That
    file itself, and the bases of a file, may hold the options of what they do not choose.

    Args:
        yaml_path: the file, if there is one.
        script: the experiment's script.
        merged: the configurations with this file and what else is set; those of a sweep are
            several. What counts in one of them, or without what else is set, is not refused.

    Raises:
        InputError: as it says.
    """
    own = script and own_file(script)
    if yaml_path is None or (own and Path(yaml_path).resolve() == own.resolve()):
        return
    schema = get_type(merged[0])
    *bases, (path, content) = files = _files(schema, Path(yaml_path))
    usual = _files(schema, own) if own else bases
    with _naming(schema, path):
        idle = idle_settings(alone := _merged(schema, files, []), *merged)
        values = {key: value for key, value in _leaves(content) if "${" not in str(value)}
        counting = OmegaConf.create()  # from which idle ones may take their values
        for key in values.keys() - idle.keys():
            OmegaConf.update(counting, key, values[key])
        expected = [_merged(schema, [*usual, *more], []) for more in ([], [(path, counting)])]
        for key in (key for key in values if key in idle):
            repeats = any(_same(key, alone, one) for one in expected)
            require(repeats, f"{path}: {key} {idle[key]}")


def passed_over(
    yaml_path: Path, config: Any, used: Any, unread: Mapping[str, str] | None = None
) -> list[str]:
    """The settings that count instead of those that a YAML file names; its bases do not count.

    Args:
        yaml_path: the file.
        config: the configuration with it.
        used: the configuration that is used, that of a trained network.
        unread: see :func:`snn_lib.settings.without_effect`.

    Returns:
        ``key=value`` of ``used``, for each that has an effect and differs.
    """
    idle = idle_settings(OmegaConf.structured(used), unread=unread)
    *_, (_, content) = _files(type(used), yaml_path)
    named = (key for key, _ in _leaves(content) if key not in idle)
    return [f"{key}={attrgetter(key)(used)}" for key in named if not _same(key, config, used)]


def idle_settings(*merged: DictConfig, unread: Mapping[str, str] | None = None) -> dict[str, str]:
    """As :func:`without_effect`, but for what a setting that counts takes its value from."""
    unmet = without_effect(get_type(merged[0])(), *merged, unread=unread)
    leaves = [*itertools.chain.from_iterable(map(_leaves, merged))]
    before = None
    while before != len(unmet):  # one may refer to another that refers to a third
        before = len(unmet)
        for key, value in leaves:
            if key not in unmet:
                for name in _referred(key, str(value)):
                    for whole in [one for one in unmet if f"{name}.".startswith(f"{one}.")]:
                        unmet.pop(whole)
    return unmet


def _referred(key: str, value: str) -> Iterator[str]:
    """The settings that a value refers to, as ``${a.b}``, or ``${..b}`` seen from its own key."""
    for written in re.findall(r"\$\{\s*(?:oc\.select:\s*)?[\"']?([\w.\[\]]+)", value):
        name = re.sub(r"\[(\w+)\]", r".\1", written)
        dots = len(name) - len(name.lstrip("."))
        above = key.split(".")[:-dots] if dots else []
        yield ".".join([*above, name.lstrip(".")])


def keys_of(schema: type, overrides: Sequence[str]) -> list[str]:
    """The dotted keys that overrides set, however they are written: ``a.b=1``, ``a[b]=1``."""
    return [key for one in overrides for key, _ in _leaves(read_override(schema, one))]


@functools.lru_cache(maxsize=64)  # as of the defaults
def read_override(schema: type, override: str) -> DictConfig:
    """What ``key=value`` sets. A text is what is typed, and any other value is YAML, as in quotes.

    It is kept: copy it before it is changed.

    Raises:
        InputError: it is none.
    """
    key, sign, value = override.partition("=")
    require(bool(key and sign), f"{override!r} is not an override, expected key=value")
    ((dotted, _),) = _leaves(OmegaConf.from_dotlist([f"{key}=0"]))
    kind, quoted = _type_of(schema, *dotted.split(".")), re.fullmatch("'.*'|\".*\"", value)
    absent = value == "null" and NoneType in get_args(kind)
    if not value or (_is_text(kind) and not (quoted or absent)):
        value = json.dumps(value, ensure_ascii=False)
    elif _holds_texts(kind) and value.startswith("["):
        with _naming(schema, f"override {override!r}"):
            texts = yaml.load(value, yaml.BaseLoader)
        value = json.dumps(texts, ensure_ascii=False)
    _refuse_octal(value, f"override {override!r}")
    return OmegaConf.from_dotlist([f"{key}={value}"])


def _refuse_octal(written: str, source: str) -> None:
    require(
        re.fullmatch(r"[-+]?0\d+", written) is None,
        f"{source}: YAML may read a number that begins with 0 as octal: leave it out",
    )


def _type_of(schema: type, *key: str) -> Any:
    """What a setting is declared as; nothing if there is none."""
    *above, last = key
    section = defaults(schema)
    for part in above:
        section = section.get(part) if isinstance(section, DictConfig) else None
    return get_type_hints(get_type(section)).get(last) if section is not None else None


def _is_text(kind: Any) -> bool:
    """Whether a setting of this type is text, one of a few texts, or one of these or nothing."""
    members = get_args(kind)
    if get_origin(kind) is Literal:
        return all(isinstance(one, str) for one in members)
    if get_origin(kind) in (Union, UnionType):
        return all(one is NoneType or _is_text(one) for one in members)
    return kind is str


def _holds_texts(kind: Any) -> bool:
    """Whether a setting of this type is a list of texts, or of such lists, or nothing."""
    members = [one for one in get_args(kind) if one is not NoneType]
    if get_origin(kind) in (Union, UnionType):
        return len(members) == 1 and _holds_texts(members[0])
    if get_origin(kind) is not list or not members:
        return False
    (one,) = members
    return (_is_text(one) and NoneType not in get_args(one)) or _holds_texts(one)


def _leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a mapping and in those within it, by their dotted keys."""
    if OmegaConf.is_config(content):
        content = OmegaConf.to_container(content)
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _same(key: str, one: Any, other: Any) -> bool:
    return attrgetter(key)(one) == attrgetter(key)(other)


def attributes_of(section: Any) -> Any:
    """All attributes of a configuration as plain values, those that are no settings among them.

    ``dataclasses.asdict`` would leave a misspelt one out, so that nobody is told. What the class
    itself derives from its settings is left out.
    """
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        fields = (entry.name for entry in dataclasses.fields(section))
        values = {name: getattr(section, name) for name in fields} | vars(section)  # or in slots
        derived = _derived(section, values.keys() - section.__dataclass_fields__.keys())
        return {name: attributes_of(one) for name, one in values.items() if name not in derived}
    return section.item() if isinstance(section, np.generic) else section


def _derived(section: Any, names: Set[str]) -> Set[str]:
    """Those of these attributes that the class of a section sets or caches by itself."""
    cached = {n for n in names if isinstance(getattr(type(section), n, None), cached_property)}
    if names != cached:
        with contextlib.suppress(InputError):  # which is told where the class is made again
            return names & (cached | vars(dataclasses.replace(section)).keys())
    return cached


def _files(
    schema: type, path: Path, variants: tuple[Path, ...] = ()
) -> list[tuple[str, DictConfig]]:
    """The paths and contents of a YAML file and of its bases, the last base first."""
    require(
        path.resolve() not in variants,
        f"{path} is a base of itself: {' -> '.join(file.name for file in variants)} -> {path.name}",
    )
    with reading(path):
        text = path.read_text("utf-8")
    base, content = _content(schema, path, text)
    if base is False:
        return [(str(path), content)]
    require(isinstance(base, str), f"{path}: base is {base!r}, expected the name of a YAML file")
    below = _found(path.parent / expand_home(base), path.parent)
    return [*_files(schema, below, (*variants, path.resolve())), (str(path), content)]


@functools.lru_cache(maxsize=16)  # a command needs its files several times
def _content(schema: type, path: Path, text: str) -> tuple[Any, DictConfig]:
    """The base that a YAML file names, or False, and what else it sets, which nobody may change."""
    with reading(path):
        content = OmegaConf.load(io.StringIO(text))
        written = yaml.load(text, yaml.BaseLoader)  # all values as texts
    if not isinstance(content, DictConfig):
        raise InputError(f"{path} is a list, expected lines such as seed: 3")
    content = OmegaConf.create(_as_written(schema, OmegaConf.to_container(content), written, path))
    with _naming(schema, str(path)):
        return content.pop("base", False), content


def _as_written(schema: type, value: Any, written: Any, path: Path, *key: str) -> Any:
    """What a YAML file sets; texts are what is written, though YAML sees a number in 1e-3."""
    if isinstance(value, dict):
        texts = written if isinstance(written, dict) else value  # a file may be empty, or a word
        return {
            name: _as_written(schema, one, texts.get(name, one), path, *key, str(name))
            for name, one in value.items()
        }
    if value is None or isinstance(value, str) or str(value) == written:
        return value
    kind = _type_of(schema, *key)
    if _is_text(kind) or _holds_texts(kind):
        return written
    if isinstance(value, int):
        _refuse_octal(str(written), f"{path}: {'.'.join(key)} is {written}")
    return value


def _merged(schema: type, parts: Sequence[tuple[str, Any]], overrides: Sequence[str]) -> Any:
    """The defaults, then parts that each name a source, then overrides."""
    config = copy.deepcopy(defaults(schema))
    for source, content in (*parts, *((f"override {one!r}", one) for one in overrides)):
        with _naming(schema, source, config if isinstance(content, str) else None):
            if isinstance(content, str):
                content = read_override(schema, content)
            _check_nesting(config, content, source)
            config.merge_with(content)
            for key, value in _leaves(content):  # OmegaConf would pass over it
                require(value != "???", f"{source}: {key} is ???, expected a value")
    return config


def _check_nesting(config: Any, content: Any, source: str) -> None:
    """Refuses a section that is given a value, or nothing, and a list that is given settings."""
    if OmegaConf.is_config(content):
        content = OmegaConf.to_container(content)
    for key, value in content.items():
        section = config.get(key) if key in config else None
        if isinstance(section, DictConfig):
            require(
                isinstance(value, dict),
                f"{source}: {key} is {value!r}, expected its settings, such as "
                f"{next(iter(section))}, or no such line",
            )
            _check_nesting(section, value, source)
        elif isinstance(section, ListConfig):  # OmegaConf's words lack the key
            require(not isinstance(value, dict), f"{source}: {key} is {value!r}, {A_LIST}")


def check_config(merged: DictConfig) -> Any:
    """Makes the dataclass, which checks the ranges, from merged settings."""
    with _naming(get_type(merged), "the configuration"):
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    return _section(merged, values)


@contextlib.contextmanager
def _naming(schema: type, source: str, config: Any = None) -> Iterator[None]:
    """Says in one line what is wrong in a source of settings, an override of ``config`` perhaps."""
    try:
        yield
    except KeyError as error:
        key = str(getattr(error, "full_key", error))
        known = [name for name, _ in list_settings(schema())]
        if key in known:
            nested = ": {".join(key.split(".")) + ": ..." + "}" * key.count(".")
            raise InputError(
                f"{source}: {key!r} is written as one key, but keys are nested: {nested}"
            ) from None
        idle: Mapping[str, str] = {}
        with contextlib.suppress(OmegaConfBaseException):  # if a value refers to what is not there
            idle = idle_settings(config) if config else {}
        others = (name for name in known if not key.startswith(f"{name}."))
        likeness, nearest = max(
            (_likeness(key, name), name) for name in others if not _is_other(name, key, known, idle)
        )
        nearest = RETIRED.get(key) or (nearest if likeness >= ALIKE else None)
        hint = f", did you mean {nearest!r}?" if nearest else ": --help lists the settings"
        raise InputError(f"{source}: unknown key {key!r}{hint}") from None
    except InputError:
        raise
    except Exception as error:  # OmegaConf and PyYAML raise many kinds
        key = getattr(error, "full_key", None)
        where, reason = f" ({key!r})" if key else "", one_line(error)
        if "is not a ListConfig" in reason:
            reason = A_LIST
        raise InputError(f"{source}{where}: {reason}") from None


@functools.lru_cache(maxsize=64)  # not all, as each keeps in memory the script that defines it
def defaults(schema: type) -> DictConfig:
    """The defaults with their types. They are kept: copy them before something is merged.

    A section that is given as its class, and fills in some of its fields from others, does so with
    the values of a run.
    """
    schema()  # if it refuses its own defaults, it says so in one line
    with _naming(schema, f"the defaults of {schema.__name__}"):
        config = OmegaConf.structured(schema)
    for entry in dataclasses.fields(schema):
        if dataclasses.is_dataclass(entry.default_factory):
            config[entry.name] = defaults(entry.default_factory)
    return config


def _section(config: DictConfig, values: Any, prefix: str = "") -> Any:
    """Makes the dataclass of a section; messages name its settings with ``prefix`` in front."""
    types = {key: get_type(config, key) for key in values}
    arguments = {
        key: _section(config[key], value, f"{prefix}{key}.")
        if dataclasses.is_dataclass(types[key])
        else _plain(value, f"{prefix}{key}")
        for key, value in values.items()
    }
    try:
        return get_type(config)(**arguments)
    except InputError as error:
        raise InputError(f"{prefix}{error}") from None


def _plain(value: Any, name: str) -> Any:
    """A value of a setting; others, such as a path, an enum or a dictionary, are refused.

    A text that begins with ``~/`` is a path in the home folder.
    """
    if isinstance(value, list):
        for part in value:
            _plain(part, name)
    else:
        require(
            type(value) in (bool, int, float, str, bytes, NoneType),
            f"{name} has a {type(value).__name__}, expected text, a number, true or false, a list, "
            "or a section of its own for several values",
        )
    return expand_home(value)


def expand_home(value: Any) -> Any:
    """A value, in which each text that begins in the home folder is the whole path."""
    if isinstance(value, list):
        return [expand_home(one) for one in value]
    if isinstance(value, dict):
        return {key: expand_home(one) for key, one in value.items()}
    in_home = isinstance(value, str) and (value == "~" or value.startswith("~/"))
    return os.path.expanduser(value) if in_home else value


def _is_other(name: str, key: str, known: Sequence[str], idle: Collection[str]) -> bool:
    """Whether a setting has no effect, and shares its name with one that may, such as lr."""
    section, _, own = name.rpartition(".")
    shared = sum(one.endswith(f".{own}") for one in known) > 1
    return shared and name in idle and section != key.rpartition(".")[0]


def _likeness(key: str, known: str) -> float:
    """How similar two dotted keys are: as a whole, and without their sections."""
    pairs = ((key, known), (key.rsplit(".")[-1], known.rsplit(".")[-1]))
    return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

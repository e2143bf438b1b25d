"""Reads the settings of an experiment from YAML and the command line, and checks all of them.

OmegaConf reads and merges; ``snn_lib.settings`` says which keys exist, of which type and range. A
YAML file may name another one, ``base: other.yaml``, and then lists only what differs from it. The
variants of a script's settings lie in the folder ``configs`` beside it.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import numpy as np
from omegaconf import DictConfig, OmegaConf

from snn_lib.data.reading import reading
from snn_lib.errors import InputError, one_line, require
from snn_lib.settings import list_settings, without_effect

Config = TypeVar("Config")

# Settings that checkpoints of earlier versions hold, and the settings that replaced them.
RETIRED = {"checkpoint_base_path": "runs_path"}


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
    variant = folder / "configs" / path.name
    return variant if variant.exists() and not path.exists() else path


def load_config(
    schema: type[Config],
    yaml_path: Path | None,
    overrides: Sequence[str],
    script: Path | None = None,
) -> Config:
    """Reads a YAML file and its bases, applies ``key=value`` overrides, and checks all of it.

    Args:
        schema: the dataclass of the settings.
        yaml_path: the file; ``None`` for the defaults.
        overrides: settings of the command line; the last of several for one key counts. Whether
            they have an effect is not checked here, see :func:`refuse_without_effect`.
        script: the experiment's script. Its name is that of the run if the file gives none; what no
            name may have becomes ``_``, and it is cut to 100 characters. A file other than the
            script's own may repeat what that one says.

    Raises:
        InputError: a file is missing or is no YAML, a key is unknown (the message names the file
            and the nearest key), a value has a wrong type or lies outside its range, or a file sets
            what has no effect with its other settings.
    """
    parts = [] if yaml_path is None else _files(Path(yaml_path))
    own, usual = script and own_file(script), None
    if own and yaml_path is not None and Path(yaml_path).resolve() != own.resolve():
        usual = _built(schema, _files(own), [])
    if script is not None:
        allowed = re.sub(r"^\W", "_", re.sub(r"[^\w.+-]", "_", script.stem))[:100]
        parts.insert(0, ("the run's name", OmegaConf.create({"name": allowed})))
    return _built(schema, parts, overrides, partial(_check_file, schema(), usual))


def config_from_dict(
    schema: type[Config],
    values: dict[str, Any],
    overrides: Sequence[str],
    source: str = "the configuration",
) -> Config:
    """As :func:`load_config`, from the dict in a checkpoint; messages name it as ``source``."""
    values = {key: value for key, value in values.items() if key not in RETIRED}
    return _built(schema, [(source, values)], overrides)


def refuse_without_effect(overrides: Sequence[str], *configs: Any) -> None:
    """Refuses settings of the command line that nothing reads.

    Args:
        overrides: ``key=value`` each.
        configs: the configurations with them; those of a sweep are several.

    Raises:
        InputError: a setting has an effect in none of the configurations.
    """
    unmet = without_effect(configs[0], *configs)
    for key in _keys_of(OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))):
        if key in unmet:
            raise InputError(f"{key} {unmet[key].why}")


def _check_file(
    schema: Any, usual: Any, path: str, content: Any, before: DictConfig, after: DictConfig
) -> None:
    """Refuses what a file sets to another value although nothing reads it.

    A file may repeat what another one, ``usual``, says. One without such a model, as the file of a
    script itself, may hold the options of what it has switched off. Both may serve several scripts,
    some of which never read a setting.
    """
    unmet, keys = without_effect(schema, after), set(_keys_of(OmegaConf.to_container(content)))
    for key in sorted(keys & unmet.keys()):
        why, decided_by, instead = unmet[key]
        value = attrgetter(key)
        if instead:
            idle = value(after) != attrgetter(instead)(after)
        elif usual is not None:
            idle = value(after) != value(usual)
        else:
            idle = keys.isdisjoint(decided_by)
        idle = idle and bool(decided_by)
        require(not idle or value(after) == value(before), f"{path}: {key} {why}")


def _keys_of(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of the values in a mapping and in those within it."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def attributes_of(section: Any) -> Any:
    """All attributes of a configuration as plain values, those that are no settings among them.

    ``dataclasses.asdict`` would leave a misspelt one out, so that nobody is told.
    """
    if dataclasses.is_dataclass(section):
        return {name: attributes_of(value) for name, value in vars(section).items()}
    return section.item() if isinstance(section, np.generic) else section


def _files(path: Path, variants: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
    """The paths and contents of a YAML file and of its bases, the last base first."""
    require(
        path.resolve() not in variants,
        f"{path} is a base of itself: {' -> '.join(file.name for file in variants)} -> {path.name}",
    )
    with reading(path):
        content = OmegaConf.load(path)
        base = content.pop("base", None) if isinstance(content, DictConfig) else None
    if base is None:
        return [(str(path), content)]
    require(isinstance(base, str), f"{path}: base is {base!r}, expected the name of a YAML file")
    below = _found(path.parent / base, path.parent)
    return [*_files(below, (*variants, path.resolve())), (str(path), content)]


def _built(
    schema: type[Config],
    parts: Sequence[tuple[str, Any]],
    overrides: Sequence[str],
    check: Callable[[str, Any, DictConfig, DictConfig], None] | None = None,
) -> Config:
    """Makes the dataclass from its defaults, then parts that each name a source, then overrides.

    ``check`` is called for every part, with the settings before and after it.
    """
    config = defaults(schema)
    try:
        for source, content in parts:
            before, config = config, OmegaConf.merge(config, content)
            if check is not None:
                check(source, content, before, config)
        for override in overrides:
            source = f"override {override!r}"
            key, sign, _ = override.partition("=")
            require(bool(key and sign), f"{override!r} is not an override, expected key=value")
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
        source = "the configuration"
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except KeyError as error:
        key = str(getattr(error, "full_key", error))
        known = [name for name, _ in list_settings(schema())]
        nearest = RETIRED.get(key) or max(known, key=lambda name: _likeness(key, name))
        raise InputError(f"{source}: unknown key {key!r}, did you mean {nearest!r}?") from None
    except InputError:
        raise
    except Exception as error:  # OmegaConf and PyYAML raise many kinds
        key = getattr(error, "full_key", None)
        where, reason = f" ({key!r})" if key else "", one_line(error)
        if "is not a ListConfig" in reason:
            reason = "expected a list, such as [a, b]"
        raise InputError(f"{source}{where}: {reason}") from None
    return _section(config, values)


@functools.lru_cache(maxsize=64)  # not all, as each keeps in memory the script that defines it
def defaults(schema: type) -> DictConfig:
    """The defaults with their types. Merging copies them, so they can be kept."""
    return OmegaConf.structured(schema)


def _section(config: DictConfig, values: dict[str, Any], prefix: str = "") -> Any:
    """Makes the dataclass of a section; messages name its settings with ``prefix`` in front."""
    types = {key: OmegaConf.get_type(config, key) for key in values}
    arguments = {
        key: _section(config[key], value, f"{prefix}{key}.")
        if dataclasses.is_dataclass(types[key])
        else _plain(value, f"{prefix}{key}")
        for key, value in values.items()
    }
    try:
        return OmegaConf.get_type(config)(**arguments)
    except InputError as error:
        raise InputError(f"{prefix}{error}") from None


def _plain(value: Any, name: str) -> Any:
    """Returns a value that a checkpoint can hold, and refuses others, such as a path or an enum."""
    if isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            _plain(part, name)
        return value
    require(
        type(value) in (bool, int, float, str, bytes, NoneType),
        f"{name} has a {type(value).__name__}, which no checkpoint can hold: expected text, a "
        "number, true or false, or a list",
    )
    return value


def _likeness(key: str, known: str) -> float:
    """How similar two dotted keys are: as a whole, and without their sections."""
    pairs = ((key, known), (key.rsplit(".")[-1], known.rsplit(".")[-1]))
    return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

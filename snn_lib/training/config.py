"""Reads the settings of an experiment from YAML and the command line, and checks all of them.

OmegaConf reads and merges; ``snn_lib.settings`` says which keys exist, of which type and range.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from snn_lib.errors import InputError, one_line, require
from snn_lib.settings import flattened

Config = TypeVar("Config")

# What OmegaConf and PyYAML raise at text and values that they cannot use.
UNREADABLE = (
    IndexError,
    OSError,
    OmegaConfBaseException,
    RecursionError,
    TypeError,
    ValueError,
    YAMLError,
)


def load_config(
    schema: type[Config], yaml_path: Path, overrides: Sequence[str], name: str | None = None
) -> Config:
    """Reads a YAML file, applies ``key=value`` overrides, checks all of it against ``schema``.

    ``name`` is the run's where the file has none.

    Raises:
        InputError: the file is missing or no YAML, a key is unknown (the message names the
            nearest), or a value has a wrong type or lies outside its range.
    """
    try:
        loaded = OmegaConf.load(yaml_path)
    except FileNotFoundError:
        raise InputError(f"there is no configuration file {yaml_path}") from None
    except UNREADABLE as error:
        raise InputError(f"{yaml_path} cannot be read as YAML: {one_line(error)}") from None
    if name is not None:
        loaded = OmegaConf.merge({"name": name}, loaded)
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
        key, sign, _ = override.partition("=")
        require(bool(key and sign), f"{override!r} is not an override, expected key=value")
        parts.append((f"override {override!r}", lambda text=override: parse_override(text)))
    try:
        for source, part in parts:  # noqa: B007 (named in the messages below)
            config = OmegaConf.merge(config, part())
        source = "the configuration"
        return OmegaConf.to_object(config)
    except KeyError as error:
        key = str(getattr(error, "full_key", error))
        known = [name for name, _ in flattened(schema())]
        nearest = max(known, key=lambda name: _likeness(key, name))
        raise InputError(f"{source}: unknown key {key!r}, did you mean {nearest!r}?") from None
    except UNREADABLE as error:
        key = getattr(error, "full_key", None)
        where = f" ({key!r})" if key else ""
        raise InputError(f"{source}{where}: {one_line(error)}") from None


def _likeness(key: str, known: str) -> float:
    """How like two dotted keys are: as wholes, and in their last parts (a section is forgotten)."""
    pairs = ((key, known), (key.rsplit(".")[-1], known.rsplit(".")[-1]))
    return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)


def parse_override(text: str) -> Any:
    """One ``key=value`` as a nested configuration."""
    return OmegaConf.from_dotlist([text])

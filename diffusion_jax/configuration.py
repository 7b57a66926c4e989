"""A config file, and what the command line changes in it."""

import ast
import importlib.util
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


def load(name: str, overrides: dict[str, str] | None = None) -> ConfigDict:
    """The locked config of a file, with some of its fields changed.

    name: "FILE.py" for its `get_config()`, or "FILE.py:PRESET" for `get_config(PRESET)`.
    overrides: path of a field -> new value as text, {"train.steps": "100"}, see `overrides_of`.

    Raises FileNotFoundError if there is no such file, ValueError for a wrong preset, field or value.
    """
    path, _, preset = name.partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None:
        raise ValueError(f"a config is a Python file with a function get_config, got {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{path} line {error.lineno}: {error.msg}") from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no function get_config")
    if preset and not inspect.signature(module.get_config).parameters:
        raise ValueError(f"{path} has no presets, got {preset!r}")
    config = module.get_config(*[preset] if preset else [])
    for field, text in (overrides or {}).items():
        _override(config, field, text)
    return config.lock()


def overrides_of(arguments: Iterable[str]) -> dict[str, str]:
    """["--config.train.steps=100", "--config.data.flip", "true"] -> {"train.steps": "100", "data.flip": "true"}.

    Raises ValueError for an argument in another form.
    """
    found = {}
    arguments = iter(arguments)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        dashes, config, field = name.partition("config.")
        if dashes not in ("-", "--") or not config:
            raise ValueError(f"unknown argument {argument!r}; --help lists those known")
        text = text if equals else next(arguments, None)
        if text is None:
            raise ValueError(f"{argument} needs a value: {argument}=VALUE")
        found[field] = text
    return found


def _override(config: ConfigDict, field: str, text: str) -> None:
    """Set config.<field> to what the text says, a value of the same type as before."""
    *sections, last = field.split(".")
    section = config
    for i, name in enumerate([*sections, last]):
        where = ".".join(["config", *sections[:i]])
        if not isinstance(section, ConfigDict):
            raise ValueError(f"--config.{field}: {where} is no section, its value is {section!r}")
        if name not in section:
            raise ValueError(f"--config.{field}: {where} has no field {name!r}; known: {', '.join(sorted(section))}")
        parent, section = section, section[name]
    if isinstance(section, ConfigDict):
        raise ValueError(f"--config.{field} is a section: set one of its fields, {', '.join(sorted(section))}")
    try:
        parent[last] = _like(section, text)
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            f"--config.{field}: expected {type(section).__name__} like {section!r}, got {text!r}"
        ) from error


def _like(old: Any, text: str) -> Any:
    """The text as a value of the type of `old`, any literal where `old` is None. Raises ValueError or SyntaxError."""
    if isinstance(old, str):
        return text
    if isinstance(old, bool) and text in ("true", "false"):
        return text == "true"
    if isinstance(old, tuple | list):
        return type(old)(_sequence_like(old, text))
    value = ast.literal_eval(text)
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if old is not None and type(value) is not type(old):
        raise ValueError
    return value


def _sequence_like(old: Sequence, text: str) -> Sequence:
    """Like `old` in the type of its elements. One element needs no brackets, one string no quotes."""
    kind = type(old[0]) if old else object
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if not isinstance(value, tuple | list):
        value = (text if kind is str else value,)
    if not all(isinstance(one, kind) for one in value):
        raise ValueError
    return value

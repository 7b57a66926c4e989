"""Parse the command line with absl and ml_collections, and report their errors in one line each."""

import itertools
import sys
import traceback
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.tuple_parser import TupleParser

from diffusion_jax import paths
from diffusion_jax.build import shipped

CONFIG = ("--config", "-config")
NO_PRESETS = "TypeError: get_config() takes 0 positional arguments but 1 was given"
TRACEBACK = "Error whilst parsing config file:"  # ml_collections prints this before a traceback
NOTHING = "None"  # the word for no value


class _Text(flags.ArgumentParser):
    """A text as it is; None is the empty one."""

    def parse(self, argument: str) -> str:
        return "" if argument == NOTHING else argument


class _Whole(flags.ArgumentParser):
    """A whole number, also as 1e3; None only passes the check of fields that may be None."""

    def parse(self, argument: int | str | None) -> int | None:
        if not isinstance(argument, str):
            return argument
        if argument == NOTHING:
            return None
        try:
            return int(argument, 0)
        except ValueError:
            number = _float(argument)
            if not number.is_integer():
                raise ValueError(f"expected a whole number, got {argument!r}") from None
            return int(number)


class _Number(flags.FloatParser):
    """A number; None as for `_Whole`."""

    def parse(self, argument: float | str | None) -> float | None:
        if argument in (None, NOTHING):
            return None
        try:
            return super().parse(argument)
        except ValueError:
            raise ValueError(f"expected a number, got {argument!r}") from None


class _Tuple(TupleParser):
    """A tuple as in Python, or its one value; None is the empty one."""

    def parse(self, argument: Any) -> tuple:
        return super().parse(() if argument in (NOTHING, [NOTHING]) else argument)


def _float(argument: str) -> float:
    """A number, nan for other text."""
    try:
        return float(argument)
    except ValueError:
        return float("nan")


for _kind, _parser in {str: _Text(), int: _Whole(), float: _Number(), tuple: _Tuple()}.items():
    config_flags.register_flag_parser_for_type(_kind, _parser)


def parse_flags(argv: list[str]) -> list[str]:
    """Parse `argv` and return only the program's name: the `flags_parser` of `absl.app.run`.

    Raises ValueError with a one-line message for a bad flag, config file or field (with the known names), and for
    arguments that are not flags.
    """
    argv = _with_found_config(argv)
    try:
        words = flags.FLAGS(argv)
        config = flags.FLAGS.config
        hasattr(config, "name")  # a missing file raises only when its config is first used
    except (flags.Error, OSError) as error:
        where, _, trace = str(error).partition(TRACEBACK)
        message = (where + _message(trace)).replace(NO_PRESETS, "this config has no presets: leave out the colon")
        raise ValueError(message) from error
    except Exception as error:
        _explain(argv)
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if words[1:]:
        raise ValueError(
            f"expected only flags, --NAME=VALUE, got also {' '.join(words[1:])!r}; quote a value that has spaces"
        )
    if flags.FLAGS["config"].present and not isinstance(config, ConfigDict):
        raise ValueError(f"get_config() of the file of --config must return a ConfigDict, got {config!r}")
    return words


def _with_found_config(argv: list[str]) -> list[str]:
    """`argv` with the file of `--config=FILE` or `--config FILE` replaced by the path that `shipped.find` finds.

    Raises ValueError for a file that cannot be opened.
    """

    def with_found_file(value: str) -> str:
        file, colon, preset = value.partition(":")
        found = shipped.find(paths.local(file, "--config"))
        try:
            found.open().close()
        except OSError as error:
            example = "name a config file, e.g. --config=configs/latent_cfg.py"
            raise ValueError(f"--config: {error.strerror}: {file!r}; {example}") from error
        return f"{found}{colon}{preset}"

    arguments = argv[:1]
    for word in argv[1:]:
        flag, _, value = word.partition("=")
        if arguments[-1] in CONFIG:
            arguments.append(with_found_file(word))
        else:
            arguments.append(f"{flag}={with_found_file(value)}" if flag in CONFIG and value else word)
    return arguments


def _message(trace: str) -> str:
    """The error at the end of a printed traceback."""
    last_frame = trace.rpartition('\n  File "')[2]
    return "\n".join(itertools.dropwhile(lambda line: line.startswith(" "), last_frame.splitlines()[1:]))


def _explain(argv: list[str]) -> None:
    """Raise ValueError for a config file that cannot be run, or for an unknown config field."""
    overrides = [argument for argument in argv if argument.startswith(("--config.", "-config."))]
    sys.argv = [argument for argument in argv if argument not in overrides]  # where config flags look for overrides
    flags.FLAGS.unparse_flags()
    try:
        flags.FLAGS(sys.argv)
    except Exception as error:
        flag = next(argument for argument in sys.argv if argument.lstrip("-").startswith("config"))
        file = flag.partition("=")[2].partition(":")[0]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f" in line {lines[-1]}" if lines else ""
        raise ValueError(f"{flag} cannot be read{where}: {type(error).__name__}: {error}") from error
    for override in overrides:
        check_field(flags.FLAGS.config, override.split("=")[0].partition(".")[2])


def check_field(config: ConfigDict, field: str) -> None:
    """Raise ValueError, with the known names, if `config` has no such field, a dotted path."""
    where = "config"
    for name in field.split("."):
        if not isinstance(config, ConfigDict):
            raise ValueError(f"--config.{field}: {where} has no fields, its value is {config!r}")
        if name not in config:
            raise ValueError(f"--config.{field}: {where} has no field {name!r}; known: {', '.join(sorted(config))}")
        config, where = config[name], f"{where}.{name}"

"""The command line, read by absl and ml_collections, with their complaints as one line each."""

import sys

from absl import flags
from ml_collections import ConfigDict


def parse_flags(argv: list[str]) -> list[str]:
    """Parse `argv` and return what is left of it: the `flags_parser` of `absl.app.run`.

    Raises ValueError with the known names for a field that the config has not, flags.Error for other mistakes.
    """
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # a field that the config has not
        overrides = [argument for argument in argv if argument.startswith(("--config.", "-config."))]
        sys.argv = [argument for argument in argv if argument not in overrides]  # where config flags look for overrides
        flags.FLAGS.unparse_flags()
        flags.FLAGS(sys.argv)
        for override in overrides:
            check_field(flags.FLAGS.config, override.split("=")[0].partition(".")[2])
        raise ValueError(str(error)) from error


def check_field(config: ConfigDict, field: str) -> None:
    """Raise ValueError, with the known names, unless `config` has the field, a dotted path."""
    where = "config"
    for name in field.split("."):
        if not isinstance(config, ConfigDict):
            raise ValueError(f"--config.{field}: {where} has no fields, its value is {config!r}")
        if name not in config:
            raise ValueError(f"--config.{field}: {where} has no field {name!r}; known: {', '.join(sorted(config))}")
        config, where = config[name], f"{where}.{name}"

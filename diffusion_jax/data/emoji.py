"""Emoji as a TFDS data set of drawings: about 1,900 concepts in up to four styles, on a transparent ground.

    outlined   OpenMoji, filled and with black outlines
    flat       OpenMoji's colour layer alone
    line       OpenMoji's line layer alone
    shaded     Noto Color Emoji, with shades and highlights

Concepts, names and OpenMoji come from `data.openmoji`, Noto Color Emoji (Google, OFL 1.1) from the PyPI package
`dynamic-font`.
"""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
import resvg_py
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from diffusion_jax.data.colours import MainHue, ink_colour, main_hue
from diffusion_jax.data.openmoji import Drawing, drawings, is_flag

PIXELS = 192  # on a side of a drawing in the data set, more than a scene shows of it
STYLES = ("outlined", "flat", "line", "shaded")
LAYERS = {"outlined": ".*", "flat": "(?!line)", "line": "line"}  # ids of OpenMoji's groups that a style keeps
FLAGLESS = ("line", "shaded")  # line drawings show only a frame, and resvg puts Noto's flags on a grey ground
VISIBLE = 0.4  # least part of the outlined drawing's area that a flat one, which shows no white parts, must cover
SVG = "http://www.w3.org/2000/svg"


def noto_font() -> Path:
    """The file of Noto Color Emoji. Raises ModuleNotFoundError if its package is missing."""
    spec = find_spec("dynamic_font")
    if spec is None:
        raise ModuleNotFoundError(
            "the style shaded needs the package dynamic-font: pip install --no-deps -r requirements-assets.txt"
        )
    return Path(spec.origin).parent / "assets" / "fonts" / "NotoColorEmoji-Regular.ttf"


def draw(concept: Drawing, style: str, size: int) -> UInt8[np.ndarray, "size size 4"] | None:
    """The drawing as sRGB and alpha, or None if the concept has none in this style.

    size: pixels a side.
    Raises ValueError for an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r} of emoji; known: {', '.join(STYLES)}")
    if is_flag(concept.symbol) and style in FLAGLESS:
        return None
    if style == "shaded":
        return _shaded(concept.symbol, size)
    image = _render(_layers(concept.svg, LAYERS[style]), size)
    visible = (image[..., 3] > 127) & (image[..., :3].min(axis=-1) < 240)
    if style == "flat":
        whole_area = _filled(_render(_layers(concept.svg, ".*"), size)[..., 3] > 127)
        return image if visible.sum() > VISIBLE * whole_area else None
    return image if visible.any() else None


def _layers(svg: Path, pattern: str) -> str:
    """The SVG with only the groups whose id starts with the pattern."""
    ET.register_namespace("", SVG)
    root = ET.fromstring(svg.read_text(encoding="utf-8"))
    for group in list(root):
        if not re.match(pattern, group.get("id", "")):
            root.remove(group)
    return ET.tostring(root, encoding="unicode")


def _shaded(symbol: str, size: int) -> UInt8[np.ndarray, "size size 4"] | None:
    text = f'<text x="64" y="100" font-size="100" text-anchor="middle" font-family="Noto Color Emoji">{symbol}</text>'
    # twice as wide as one character, to see whether the font draws the whole symbol as a single one
    wide = _render(f'<svg xmlns="{SVG}" viewBox="-64 0 256 128">{text}</svg>', size, aspect=2)
    columns = np.flatnonzero(wide[..., 3].any(axis=0))
    is_single = len(columns) and columns[0] >= size // 2 and columns[-1] < 3 * size // 2
    return wide[:, size // 2 : 3 * size // 2] if is_single else None


def _render(svg: str, size: int, aspect: int = 1) -> UInt8[np.ndarray, "size width 4"]:
    fonts = [str(noto_font())] if "<text" in svg else None
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=aspect * size, height=size, skip_system_fonts=True, font_files=fonts
    )
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def _filled(ink: np.ndarray) -> int:
    """Area of a drawing: between its first and last ink in each row and in each column."""
    rows, columns = (
        np.maximum.accumulate(ink, axis) & np.flip(np.maximum.accumulate(np.flip(ink, axis), axis), axis)
        for axis in (0, 1)
    )
    return int((rows & columns).sum())


@dataclass(kw_only=True)
class Size(tfds.core.BuilderConfig):
    """pixels: height and width of a drawing."""

    pixels: int


class Emoji(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of the drawings, all in one split; `data.scenes` says what is held out.

    "hue", "share": the `MainHue` of a drawing, share 0 for one without.
    "ink": its `ink_colour`.
    """

    name = "emoji"
    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS: ClassVar = [Size(name=f"{PIXELS}px", pixels=PIXELS)]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.pixels
        return self.dataset_info_from_configs(
            description="Named emoji in four styles: OpenMoji outlined, flat and as lines, Noto Color Emoji shaded.",
            homepage="https://openmoji.org",
            license="OpenMoji: CC BY-SA 4.0. Noto Color Emoji: OFL 1.1.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 4), encoding_format="png"),
                    "name": tfds.features.Text(),
                    "aliases": tfds.features.Sequence(tfds.features.Text()),
                    "style": tfds.features.Text(),
                    "hue": tfds.features.Tensor(shape=(3,), dtype=np.float32),
                    "share": tfds.features.Scalar(dtype=np.float32),
                    "ink": tfds.features.Tensor(shape=(3,), dtype=np.float32),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"drawings": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict]]:
        for concept in drawings():
            for style in STYLES:
                image = draw(concept, style, self.builder_config.pixels)
                if image is not None:
                    yield f"{concept.svg.stem}-{style}", _example(concept, style, image)


def _example(concept: Drawing, style: str, image: UInt8[np.ndarray, "size size 4"]) -> dict:
    hue = main_hue(image / 255) or MainHue(np.zeros(3), 0.0)
    return {
        "image": Image.fromarray(image),  # TFDS would encode an array with TensorFlow
        "name": concept.name,
        "aliases": list(concept.aliases),
        "style": style,
        "hue": hue.lab.astype(np.float32),
        "share": np.float32(hue.share),
        "ink": ink_colour(image / 255).astype(np.float32),
    }

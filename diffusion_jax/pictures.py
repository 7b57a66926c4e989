"""Picture files: PNG with their settings, and labelled grids."""

import math
import textwrap
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from diffusion_jax import paths
from diffusion_jax.paths import Path

TILE = 128  # pixels on a side; smaller images are enlarged in a grid
MILLISECONDS = 120  # that an image of an animation is shown
LABEL = 30  # pixels below a tile for its label


def save(path: str | Path | BytesIO, image: UInt8[np.ndarray, "height width 3"], texts: dict[str, str]) -> None:
    """Write a PNG with `texts` in its text chunk."""
    _save(path, Image.fromarray(image), pnginfo=_info(texts))


def save_animation(
    path: str | Path | BytesIO, images: Sequence[UInt8[np.ndarray, "height width 3"]], texts: dict[str, str]
) -> None:
    """Write an animated PNG that shows the images forwards and backwards without end."""
    first, *others = map(Image.fromarray, [*images, *images[-2:0:-1]])
    _save(path, first, pnginfo=_info(texts), save_all=True, append_images=others, duration=MILLISECONDS, loop=0)


def save_gif(file: BytesIO, images: Sequence[UInt8[np.ndarray, "height width 3"]]) -> None:
    """Write an animated GIF as `save_animation` does a PNG, in 256 colours and without texts."""
    first, *others = map(Image.fromarray, [*images, *images[-2:0:-1]])
    first.save(file, "GIF", save_all=True, append_images=others, duration=MILLISECONDS, loop=0)


def _save(path: str | Path | BytesIO, image: Image.Image, **options) -> None:
    if isinstance(path, BytesIO):
        image.save(path, "PNG", **options)
        return
    with paths.written(path) as file:
        image.save(file, "PNG", **options)


def _info(texts: dict[str, str]) -> PngInfo:
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    return info


def grid(
    images: Sequence[UInt8[np.ndarray, "height width 3"]], columns: int = 1, labels: Sequence[str] = ()
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """All images on one white sheet, small ones enlarged.

    columns: images in a row. 1 makes the sheet about square instead.
    labels: one or two lines under each image, or none.
    """
    if columns == 1:
        columns = math.ceil(math.sqrt(len(images)))
    height, width, _ = images[0].shape
    factor = max(1, round(TILE / height))
    height, width = height * factor, width * factor
    pitch = height + (LABEL if any(labels) else 0)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + 4) - 4, rows * (pitch + 4) - 4), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for i, image in enumerate(images):
        left, top = i % columns * (width + 4), i // columns * (pitch + 4)
        sheet.paste(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), (left, top))
        if any(labels):
            lines = textwrap.wrap(labels[i], max(width // 6, 1), max_lines=2, placeholder="...")
            pen.multiline_text(
                (left + width / 2, top + height + 2), "\n".join(lines), "black", font, "ma", align="center"
            )
    return np.asarray(sheet)

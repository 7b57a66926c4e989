"""Turn any picture into a square of uint8 RGB, and that into the input of a network."""

import io
import warnings
from collections.abc import Callable, Sequence
from os import PathLike

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusion_jax.messages import first_line

Record = dict
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # about 89 million, above which PIL suspects an attack on memory
MAX_RATIO = 32  # of the sides of a picture: longer ones take minutes to resize, and a crop shows almost nothing
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `decode` checks the size itself
Transform = Callable[[Record, np.random.Generator], Record]


class BadRecord(ValueError):
    """A record that cannot be used. The message says why. Readers skip the record and log it."""


def decode(image: str | PathLike | bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Read a picture from its file or its encoded bytes: upright by its EXIF tag, transparency on white, 8-bit RGB.

    Raises BadRecord if it is truncated, not a picture, too large or too elongated.
    """
    return rgb(upright(image))


def upright(
    image: str | PathLike | bytes, max_pixels: int = MAX_PIXELS, formats: Sequence[str] | None = None
) -> Image.Image:
    """Read a picture from its file or its encoded bytes, upright by its EXIF tag. Of an animation, the first frame.

    max_pixels: larger pictures are not decoded.
    formats: that PIL may try, None for all.
    Raises BadRecord if it is truncated, not a picture, too large or too elongated.
    """
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=formats) as opened:
            _check_size(*opened.size, max_pixels)
            opened.load()
            return ImageOps.exif_transpose(opened)
    except UnidentifiedImageError as error:
        raise BadRecord("not a picture of a known format") from error
    except BadRecord:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadRecord(f"not a readable picture ({first_line(error)})") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadRecord(f"{width}x{height} pixels, expected at most {max_pixels} in all")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadRecord(f"{width}x{height} pixels, expected sides of at most {MAX_RATIO} to 1")


def rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """8-bit RGB, with transparency on white."""
    return np.asarray(_rgb(image))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip to its low byte
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def crop(height: int, width: int, random_crop: bool = False, flip: bool = False, upscale: bool = False) -> Transform:
    """A transform that resizes record["image"] to cover height x width, then crops it to that size.

    height, width: in pixels.
    random_crop: crop at a random place, else at the centre.
    flip: mirror half of the images.
    upscale: enlarge smaller images, else raise BadRecord for them.
    """
    size = np.array([height, width])

    def transform(record: Record, rng: np.random.Generator) -> Record:
        image = record["image"]
        original = np.array(image.shape[:2])
        scale = np.max(size / original)
        if scale > 1 and not upscale:
            raise BadRecord(f"{original[1]}x{original[0]} pixels, smaller than the {width}x{height} crop")
        if scale != 1:
            resized = np.maximum(size, np.round(original * scale).astype(int))
            image = np.asarray(Image.fromarray(image).resize(resized[::-1].tolist(), Image.Resampling.LANCZOS))
        margin = image.shape[:2] - size
        top, left = rng.integers(0, margin + 1) if random_crop else margin // 2
        image = image[top : top + height, left : left + width]
        if flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return record | {"image": np.ascontiguousarray(image)}

    return transform


def variants(transform: Transform, crops: int, flip: bool) -> Transform:
    """A transform that replaces record["image"] by its augmented versions, (variants, H, W, 3), for a cache.

    transform: makes one crop.
    crops: number of crops.
    flip: add the mirror image of each crop.
    """

    def all_variants(record: Record, rng: np.random.Generator) -> Record:
        images = np.stack([transform(record, rng)["image"] for _ in range(crops)])
        return record | {"image": np.concatenate([images, images[:, :, ::-1]]) if flip else images}

    return all_variants


def to_float(images: UInt8[Array | np.ndarray, "*shape"]) -> Float[Array | np.ndarray, "*shape"]:
    """0..255 -> [-1, 1], float32. For numpy and JAX arrays, traced ones too."""
    return images.astype("float32") / 127.5 - 1


def to_uint8(images: Float[Array | np.ndarray, "*shape"]) -> UInt8[Array | np.ndarray, "*shape"]:
    """[-1, 1] -> 0..255, rounded and clipped. For numpy and JAX arrays, traced ones too."""
    return ((images + 1) * 127.5).round().clip(0, 255).astype("uint8")

"""Pictures that clients send: decoded within limits, from memory only."""

import base64
import binascii
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diffusion_jax.data.crops import stretched
from diffusion_jax.data.transforms import LIGHT, decode, decode_alpha, decode_mask, decode_texts

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def from_base64(text: str) -> bytes:
    """The bytes of base64 text, or of a data URL, with or without white space. Raises ValueError for other text."""
    letters = "".join(text.split())
    if letters[:5].lower() == "data:":
        letters = letters.partition(",")[2]
    try:
        return base64.b64decode(letters, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("expected a picture in base64") from error


def picture(data: bytes, max_pixels: int) -> UInt8[np.ndarray, "height width 3"]:
    """The picture, at most `max_pixels` in all. Raises ValueError for data that is not a picture that can be used."""
    return decode(data, max_pixels, FORMATS)


def mask(data: bytes, max_pixels: int) -> UInt8[np.ndarray, "height width"]:
    """The mask, see `decode_mask`. Limit and errors as in `picture`."""
    return decode_mask(data, max_pixels, FORMATS)


def mask_of_transparency(data: bytes, max_pixels: int) -> bytes | None:
    """A mask, PNG, light where the picture is transparent; None if it is light nowhere. Errors as in `picture`."""
    alpha = decode_alpha(data, max_pixels, FORMATS)
    return _png(255 - alpha) if 255 - alpha.min() > LIGHT else None


def mask_of_size(data: bytes, size: tuple[int, int], max_pixels: int, invert: bool) -> bytes:
    """The mask, PNG, stretched to `size`, height and width. Errors as in `picture`.

    invert: mark what the mask does not mark.
    """
    levels = stretched(mask(data, max_pixels), size)
    return _png(255 - levels if invert else levels)


def texts(data: bytes, max_pixels: int) -> dict[str, str]:
    """The texts in a PNG. Errors as in `picture`."""
    return decode_texts(data, max_pixels, FORMATS)


def _png(levels: UInt8[np.ndarray, "height width"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()

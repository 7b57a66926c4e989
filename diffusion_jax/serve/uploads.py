"""Pictures that clients send: decoded within limits, from memory only."""

import base64
import binascii
import io

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps

from diffusion_jax.data.transforms import crop, rgb, upright

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
LIGHT = 127  # a mask is above this where the picture is generated


def from_base64(text: str) -> bytes:
    """The bytes of base64 text, or of a data URL. Raises ValueError for other text."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("expected a picture in base64") from error


def picture(data: bytes, size: tuple[int, int], max_pixels: int) -> UInt8[np.ndarray, "height width 3"]:
    """The picture, resized to cover `size`, height and width, and cropped at its centre.

    max_pixels: larger pictures are not decoded.
    Raises ValueError for data that is not a picture, and for a picture that cannot be used.
    """
    image = rgb(upright(data, max_pixels, FORMATS))
    return crop(*size, upscale=True)({"image": image}, np.random.default_rng(0))[
        "image"
    ]  # a centre crop: rng is unused


def mask(data: bytes, size: tuple[int, int], max_pixels: int) -> Bool[np.ndarray, "height width 1"]:
    """True where the mask is light, resized and cropped as `picture` does. Errors as there."""
    return picture(data, size, max_pixels)[..., :1] > LIGHT


def mask_of_transparency(data: bytes, max_pixels: int) -> bytes:
    """A mask, PNG, that is light where the picture is transparent. Errors as in `picture`."""
    return _png(ImageOps.invert(upright(data, max_pixels, FORMATS).convert("RGBA").getchannel("A")))


def inverted(data: bytes, max_pixels: int) -> bytes:
    """A mask, PNG, that is light where this one is dark. Errors as in `picture`."""
    return _png(ImageOps.invert(upright(data, max_pixels, FORMATS).convert("L")))


def texts(data: bytes, max_pixels: int) -> dict[str, str]:
    """The texts in a PNG. Errors as in `picture`."""
    return {name: text for name, text in upright(data, max_pixels, FORMATS).info.items() if isinstance(text, str)}


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()

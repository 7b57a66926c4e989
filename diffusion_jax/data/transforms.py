"""Turn any picture into uint8 RGB, and that into the input of a network."""

import functools
import io
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TypeVar

import numpy as np
from jaxtyping import Array, Float, Integer, UInt8
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from diffusion_jax import paths
from diffusion_jax.messages import first_line

Record = dict
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # about 89 million, above which PIL suspects an attack on memory
MAX_RATIO = 32  # of the sides of a picture: longer ones take minutes to resize, and a crop shows almost nothing
DRAFT = 2  # how many times the side of the crop a JPEG keeps that is decoded at part of its size
LIGHT = 127  # a mask is above this where it marks
PNG = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"tRNS", b"iCCP", b"eXIf")  # the optional ones that decide about pixels, with texts of these names:
PNG_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
PNG_ALL_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
TURNS = {  # value of EXIF's orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = [TURNS[orientation] for orientation in (5, 6, 7, 8)]  # those that exchange height and width
SRGB = ImageCms.createProfile("sRGB")
WHITE_IS_ZERO = 0  # the value of a TIFF's PhotometricInterpretation for inverted grey
UNSIGNED = (1,)  # the value of a TIFF's SampleFormat for whole numbers from 0
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `decode` checks the size itself
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20  # bytes of a profile or a text; PIL's 1 MiB is too little for some profiles
Transform = Callable[[Record, np.random.Generator], Record]
Content = TypeVar("Content")


class BadRecord(ValueError):
    """A record that cannot be used. The message says why. Readers skip the record and log it."""


def decode(
    image: str | PathLike | bytes, max_pixels: int = MAX_PIXELS, formats: Sequence[str] | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """Read a picture from its file or its encoded bytes: 8-bit sRGB, upright by its EXIF tag, transparency on white.

    Colours are converted by the ICC profile, if there is one that fits. Grey of 12 or 16 bits keeps its highest 8. Grey
    of floats goes from 0, black, to 1, white. The transparent colour of a PNG of 16 bits a channel is found by its
    highest 8. Of an animation, the first frame is read.

    max_pixels: larger pictures are not decoded.
    formats: that PIL may try, None for all.
    Raises BadRecord if it is truncated, not a picture, too large, too elongated, or of numbers out of range.
    """
    return _read(image, functools.partial(_upright, _on_white), max_pixels, formats)


def picture(image: str | PathLike | bytes, side: int = 0) -> Record:
    """The record of a picture for training: "image", see `decode`, and "original", int32 (2,), height and width of the
    upright picture in its file.

    side: of the square that is cropped from it later, pixels. A JPEG of four times this or more is decoded at 1/2, 1/4
      or 1/8 of its size, but not below twice this: that takes less time and gives the same crop to a level or two.
      0 for the full size.
    Raises what `decode` raises.
    """

    def take(opened: Image.Image) -> Record:
        width, height = opened.size
        if side:
            opened.draft(None, (DRAFT * side, DRAFT * side))  # JPEGs alone can do this
        pixels = _upright(_on_white, opened)
        original = (width, height) if _turn(opened) in SIDEWAYS else (height, width)
        return {"image": pixels, "original": np.array(original, np.int32)}

    return _read(image, take, MAX_PIXELS, None)


def size_of(image: str | PathLike | bytes) -> Integer[np.ndarray, "2"]:
    """Height and width of a picture, upright, as `picture` says them, from its header: nothing is decoded but TIFFs.

    Raises what `decode` raises, as far as the header shows it.
    """

    def take(opened: Image.Image) -> Integer[np.ndarray, "2"]:
        if opened.format == "TIFF":  # Pillow turns them itself, some versions when they are opened
            opened.load()
        width, height = opened.size
        return np.array((width, height) if _turn(opened) in SIDEWAYS else (height, width), np.int32)

    return _read(image, take, MAX_PIXELS, None)


def decode_mask(
    image: str | PathLike | bytes, max_pixels: int = MAX_PIXELS, formats: Sequence[str] | None = None
) -> UInt8[np.ndarray, "height width"]:
    """Read a mask: its alpha, unless that is 255 everywhere, else its grey levels. Light marks, see `LIGHT`.

    If no level is light and there are two, as of labels 0 and 1, the larger marks. Arguments and errors are those
    of `decode`; more levels than two, none of them light, are an error too.
    """
    return _read(image, functools.partial(_upright, _marks), max_pixels, formats)


def decode_alpha(
    image: str | PathLike | bytes, max_pixels: int = MAX_PIXELS, formats: Sequence[str] | None = None
) -> UInt8[np.ndarray, "height width"]:
    """Read the alpha of a picture, 255 everywhere if it has none. Arguments and errors are those of `decode`."""
    return _read(image, functools.partial(_upright, _alpha), max_pixels, formats)


def decode_texts(
    image: str | PathLike | bytes, max_pixels: int = MAX_PIXELS, formats: Sequence[str] | None = None
) -> dict[str, str]:
    """Read the texts in a picture's metadata, by name. Arguments and errors are those of `decode`."""

    def texts(opened: Image.Image) -> dict[str, str]:
        opened.load()  # some stand after the pixels
        return {name: text for name, text in opened.info.items() if isinstance(text, str)}

    return _read(image, texts, max_pixels, formats, (*PNG_CHUNKS, *PNG_ALL_TEXTS))


def _read(
    image: str | PathLike | bytes,
    take: Callable[[Image.Image], Content],
    max_pixels: int,
    formats: Sequence[str] | None,
    png_chunks: tuple[bytes, ...] = PNG_CHUNKS,
) -> Content:
    """What `take` returns for the opened picture, whose pixels it loads. Whatever a decoder raises is a bad record.

    png_chunks: the optional ones to keep.
    """
    try:
        data = image if isinstance(image, bytes) else paths.at(image).read_bytes()
        with Image.open(io.BytesIO(_without_metadata(data, png_chunks)), formats=formats) as opened:
            _check_size(*opened.size, max_pixels)
            _scale_transparent_colour(opened)
            return take(opened)
    except UnidentifiedImageError as error:
        known = f", one of {', '.join(formats)}" if formats else ""
        raise BadRecord(f"not a picture of a known format{known}") from error
    except BadRecord:
        raise
    except Exception as error:  # decoders of damaged pictures raise anything
        raise BadRecord(f"not a readable picture ({first_line(error)})") from error


def _without_metadata(data: bytes, png_chunks: tuple[bytes, ...]) -> bytes:
    """A PNG without other metadata: PIL fails if that is damaged or large. Other formats unchanged."""
    if not data.startswith(PNG):
        return data
    kept, start = [PNG], len(PNG)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")  # length, name, content, checksum
        if _is_kept(data[start + 4 : end - 4], data[end - 4 : end], png_chunks):
            kept.append(data[start:end])
        start = end
    pixels = next((number for number, chunk in enumerate(kept) if chunk[4:8] == b"IDAT"), len(kept))
    # optional chunks, in lower case, before the pixels, so that the header tells all
    return b"".join(kept[:pixels] + sorted(kept[pixels:], key=lambda chunk: chunk[4:5].isupper()))


def _is_kept(chunk: bytes, checksum: bytes, optional: tuple[bytes, ...]) -> bool:
    """Whether to keep a chunk of a PNG, its name and content. Damaged optional chunks are left out."""
    if chunk[:1].isupper():
        return True
    is_known = chunk.startswith(optional) or chunk[4:].startswith(PNG_TEXTS)
    return is_known and zlib.crc32(chunk) == int.from_bytes(checksum, "big")


def _scale_transparent_colour(image: Image.Image) -> None:
    """Give the transparent colour of a PNG the 8 bits of the pixels. PIL leaves it in those of the file."""
    if image.format != "PNG" or "transparency" not in image.info:
        return
    colour, stored = image.info["transparency"], image.tile[0][-1]
    if stored in ("L;2", "L;4"):
        most = 3 if stored == "L;2" else 15
        image.info["transparency"] = (colour & most) * 255 // most
    elif stored == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadRecord(f"{width}x{height} pixels, expected at most {max_pixels} in all")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadRecord(f"{width}x{height} pixels, expected sides of at most {MAX_RATIO} to 1")


def _upright(convert: Callable[[Image.Image], Image.Image], image: Image.Image) -> np.ndarray:
    """The pixels of the converted picture, upright by its EXIF tag."""
    image.load()  # some tags stand after the pixels
    turn, converted = _turn(image), convert(image)
    return np.asarray(converted if turn is None else converted.transpose(turn))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright, or None if it is upright or its EXIF tags cannot be read."""
    try:
        tags = Image.Image.getexif(image)  # that of PNGs would load the pixels
        return TURNS.get(tags.get(ExifTags.Base.Orientation))
    except Exception:  # damaged tags, of any kind
        return None


def _on_white(image: Image.Image) -> Image.Image:
    """sRGB, with transparency on white."""
    colours = _srgb(_eight_bits(image), image.info.get("icc_profile"))
    if not image.has_transparency_data:
        return colours
    colours.putalpha(_alpha(image))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")


def _marks(image: Image.Image) -> Image.Image:
    """The mask that a picture is, mode L. Raises BadRecord if it does not say what it marks."""
    alpha = _alpha(image)
    is_opaque = alpha.getextrema() == (255, 255)
    mask = _eight_bits(image).convert("L") if is_opaque else alpha
    values = _whole_numbers(image)[0] if is_opaque and image.mode.startswith("I") else np.asarray(mask)
    levels = np.unique(values)
    if mask.getextrema()[1] > LIGHT or len(levels) == 1:
        return mask
    if len(levels) > 2:
        raise BadRecord(
            f"a mask of {len(levels)} levels from {levels[0]} to {levels[-1]}, none of them light: expected black and "
            "white, or two labels"
        )
    return Image.fromarray(np.where(values == levels[1], np.uint8(255), np.uint8(0)))


def _alpha(image: Image.Image) -> Image.Image:
    """The alpha of a picture, mode L, 255 everywhere if it has none."""
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    if image.mode.startswith("I"):
        return Image.fromarray(np.where(np.asarray(image) == image.info["transparency"], np.uint8(0), np.uint8(255)))
    return image.convert("RGBA").getchannel("A")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The picture's colours without alpha, mode L, RGB or CMYK. Raises BadRecord for grey levels out of range."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_grey_of_floats(image) if image.mode == "F" else _grey_of_many_bits(image))
    if image.mode in ("1", "L", "LA"):
        return _in_mode("L", image)
    if image.mode == "CMYK":
        return image
    return _in_mode("RGB", _in_mode("RGBA" if image.has_transparency_data else "RGB", image))


def _in_mode(mode: str, image: Image.Image) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def _grey_of_floats(image: Image.Image) -> UInt8[np.ndarray, "height width"]:
    """Levels from 0 to 1 in 8 bits, those included that are rounded to them."""
    values, rounding = np.asarray(image), 0.5 / 255
    if not (values.min() >= -rounding and values.max() <= 1 + rounding):  # not a number is out of range
        raise BadRecord(f"grey levels from {values.min():g} to {values.max():g}, expected 0 to 1")
    return np.round(255 * (1 - values if _is_inverted(image) else values)).astype(np.uint8)


def _grey_of_many_bits(image: Image.Image) -> UInt8[np.ndarray, "height width"]:
    """The highest 8 bits of levels that are whole numbers."""
    values, bits = _whole_numbers(image)
    return (values >> (bits - 8)).astype(np.uint8)


def _whole_numbers(image: Image.Image) -> tuple[Integer[np.ndarray, "height width"], int]:
    """Levels that are whole numbers, 0 for black, and their bits. PIL keeps those of 12 bits as they are."""
    values, tags = np.asarray(image), _tags(image)
    (bits,) = tags.get(ExifTags.Base.BitsPerSample, (16,))
    if bits > 16 or tags.get(ExifTags.Base.SampleFormat, UNSIGNED) != UNSIGNED:
        raise BadRecord(
            f"grey levels from {values.min()} to {values.max()}, expected 0 to 65535 in 8 to 16 bits: of signed "
            "numbers and those of 32 bits it is not known which one is white"
        )
    if values.min() < 0 or values.max() >= 2**bits:
        raise BadRecord(f"grey levels from {values.min()} to {values.max()}, expected 0 to {2**bits - 1}")
    return 2**bits - 1 - values if _is_inverted(image) else values, bits


def _is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white. PIL inverts levels of up to 8 bits itself."""
    return _tags(image).get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO


def _tags(image: Image.Image) -> Mapping:
    """The tags of a TIFF; of other formats, none."""
    return getattr(image, "tag_v2", {})


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """sRGB by an ICC profile. A profile that is damaged or of other colours says nothing, as in browsers."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, SRGB, outputMode="RGB")
        except (OSError, ImageCms.PyCMSError):
            pass
    return _in_mode("RGB", image)


def to_float(images: UInt8[Array | np.ndarray, "*shape"]) -> Float[Array | np.ndarray, "*shape"]:
    """0..255 -> [-1, 1], float32. For numpy and JAX arrays, traced ones too."""
    return images.astype("float32") / 127.5 - 1


def to_uint8(images: Float[Array | np.ndarray, "*shape"]) -> UInt8[Array | np.ndarray, "*shape"]:
    """[-1, 1] -> 0..255, rounded and clipped. For numpy and JAX arrays, traced ones too."""
    return ((images + 1) * 127.5).round().clip(0, 255).astype("uint8")

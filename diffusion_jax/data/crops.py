"""Crops of pictures, and what was done to make them."""

import numpy as np
from jaxtyping import Bool, Integer, UInt8
from PIL import Image

from diffusion_jax.data.transforms import LIGHT, BadRecord, Record, Transform


def centred(image: UInt8[np.ndarray, "..."], size: tuple[int, int]) -> UInt8[np.ndarray, "..."]:
    """A picture or a mask, resized to cover `size`, height and width, and cropped at its centre."""
    return crop(*size, upscale=True)({"image": image}, np.random.default_rng(0))["image"]  # rng is unused


def stretched(image: UInt8[np.ndarray, "..."], size: tuple[int, int]) -> UInt8[np.ndarray, "..."]:
    """A picture or a mask, resized to `size`, height and width, whatever its shape is."""
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS))


def check_one_size(
    mask: UInt8[np.ndarray, "height width"],
    image: UInt8[np.ndarray, "rows columns 3"],
    names: tuple[str, str] = ("it", "the image"),
) -> None:
    """Raise ValueError unless a mask has the size of its picture. names: of both in the error."""
    if mask.shape != image.shape[:2]:
        sizes = [f"{width}x{height}" for height, width in (mask.shape, image.shape[:2])]
        raise ValueError(f"{names[0]} is {sizes[0]} pixels and {names[1]} {sizes[1]}: they must be of one size")


def centred_mask(
    levels: UInt8[np.ndarray, "height width"], size: tuple[int, int]
) -> Bool[np.ndarray, "rows columns 1"]:
    """True where a mask marks, resized and cropped as its picture is by `centred`."""
    return centred(levels, size)[..., None] > LIGHT


def crop(height: int, width: int, random_crop: bool = False, flip: bool = False, upscale: bool = False) -> Transform:
    """A transform that resizes record["image"] to cover height x width, then crops it to that size.

    What it did is in record["sizes"], int32 (6,), in pixels: height and width of the picture in its file, top and left
    of the crop in the resized picture, which may be mirrored, height and width of the crop (as `original_size`,
    `crop_top_left` and `target_size` of SDXL in diffusers). record["resized"] is the size of the resized picture,
    int32 (2,).

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
        resized = np.maximum(size, np.round(original * scale).astype(int))
        margin = resized - size
        corner = rng.integers(0, margin + 1) if random_crop else margin // 2
        cropped = {
            "image": np.ascontiguousarray(_resized_part(image, resized, corner, size)),
            "sizes": np.concatenate([original_size(record), corner, size]).astype(np.int32),
            "resized": resized.astype(np.int32),
        }
        cropped = {name: value for name, value in record.items() if name != "original"} | cropped
        return mirrored(cropped) if flip and rng.random() < 0.5 else cropped

    return transform


def mirrored(cropped: Record) -> Record:
    """The mirror image of a crop, as if its picture had been mirrored before: see `crop`."""
    sizes = cropped["sizes"].copy()
    left, width = sizes[3], sizes[5]
    sizes[3] = cropped["resized"][1] - left - width
    return cropped | {"image": np.ascontiguousarray(cropped["image"][:, ::-1]), "sizes": sizes}


def _resized_part(
    image: UInt8[np.ndarray, "..."], resized: np.ndarray, corner: np.ndarray, size: np.ndarray
) -> UInt8[np.ndarray, "..."]:
    """The part of `size` at a corner of the picture that is resized to `resized`. Nothing else of it is computed."""
    if np.array_equal(image.shape[:2], resized):
        (top, left), (bottom, right) = corner, corner + size
        return image[top:bottom, left:right]
    per_pixel = np.array(image.shape[:2]) / resized
    (top, left), (bottom, right) = corner * per_pixel, np.minimum((corner + size) * per_pixel, image.shape[:2])
    part = Image.fromarray(image).resize(size[::-1].tolist(), Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    return np.asarray(part)


def variants(transform: Transform, crops: int, flip: bool) -> Transform:
    """A transform that replaces record["image"] by its augmented versions, (variants, H, W, 3), for a cache. "sizes"
    are those of each, (variants, 6), see `crop`.

    transform: makes one crop.
    crops: number of crops.
    flip: add the mirror image of each crop.
    """

    def all_variants(record: Record, rng: np.random.Generator) -> Record:
        versions = [transform(record, rng) for _ in range(crops)]
        versions += [mirrored(version) for version in versions] if flip else []
        return record | {name: np.stack([version[name] for version in versions]) for name in ("image", "sizes")}

    return all_variants


def original_size(record: Record) -> Integer[np.ndarray, "2"]:
    """Height and width of a record's picture in its file; if that is not known, or it has none, those of its image."""
    return record.get("original", np.array(record["image"].shape[:2], np.int32))

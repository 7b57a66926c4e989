"""Checks of a picture of a scene by a program: its ground, and the colour, place and number of its drawings.

Pictures are uint8 (H, W, 3). The answers are words of `data.scenes` and `data.colours`.
"""

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from scipy import ndimage

from diffusion_jax.data.colours import COLOURS, rgb_of, to_lab
from diffusion_jax.data.scenes import PLACES

Picture = UInt8[np.ndarray, "height width 3"]
INK = 0.1  # least distance in OKLab from the colour of the ground
HUED, ENOUGH_HUE = 0.05, 0.2  # least chroma of a pixel with a hue; part of the ink above which only those count
SPECK = 0.1  # smaller parts, relative to the largest one, are not counted
CLOSED = 0.06  # gaps inside one drawing, as a part of the picture's side
LOW, HIGH = 0.38, 0.62  # where the middle begins and ends, as a part of the picture's side
_NAMES = list(COLOURS)
_LABS = np.stack([to_lab(rgb_of(name)) for name in _NAMES])


def ground(picture: Picture) -> str:
    """The named colour nearest to that of the picture's edge, "" for white."""
    name = _NAMES[np.argmin(np.linalg.norm(_LABS - _edge(picture), axis=-1))]
    return "" if name == "white" else name


def ink(picture: Picture) -> Bool[np.ndarray, "height width"]:
    """Where the picture differs from its edge."""
    return np.linalg.norm(to_lab(picture / 255) - _edge(picture), axis=-1) > INK


def colour(picture: Picture) -> str | None:
    """The named colour that most pixels of the ink are nearest to, or None without ink. Black, white and grey, such as
    outlines, count only where less than a fifth of the ink has a hue.
    """
    lab = to_lab(picture[ink(picture)] / 255)
    if not len(lab):
        return None
    hued = np.hypot(lab[:, 1], lab[:, 2]) > HUED
    lab = lab[hued] if hued.mean() > ENOUGH_HUE else lab
    nearest = np.argmin(np.linalg.norm(lab[:, None] - _LABS, axis=-1), axis=-1)
    return _NAMES[np.bincount(nearest).argmax()]


def place(picture: Picture) -> str | None:
    """The place of the ink, one of `PLACES`, judged by its middle. None without ink."""
    ink_mask = ink(picture)
    if not ink_mask.any():
        return None
    middles = [_middle(ink_mask.any(axis=axis)) for axis in (0, 1)]
    across, down = (0.0 if middle < LOW else 1.0 if middle > HIGH else 0.5 for middle in middles)
    return next(word for word, position in PLACES.items() if position == (across, down))


def count(picture: Picture) -> int:
    """The number of separate drawings, those with small gaps counted as one."""
    return len(_parts(picture))


def largest(picture: Picture, size: int) -> UInt8[np.ndarray, "size size"]:
    """The largest of the separate drawings, in grey on white, enlarged to the whole picture. White without ink.

    size: side of the result, pixels.
    """
    parts = _parts(picture)
    if not parts:
        return np.full((size, size), 255, np.uint8)
    grey = np.where(ink(picture), to_lab(picture / 255)[..., 0], 1.0)
    rows, columns = max(parts, key=lambda part: np.prod([side.stop - side.start for side in part]))
    cropped = Image.fromarray(np.uint8(255 * np.clip(grey[rows, columns], 0, 1)))
    scale = size / max(cropped.size)
    cropped = cropped.resize([max(round(scale * side), 1) for side in cropped.size], Image.Resampling.BILINEAR)
    canvas = Image.new("L", (size, size), 255)
    canvas.paste(cropped, ((size - cropped.width) // 2, (size - cropped.height) // 2))
    return np.asarray(canvas)


def _edge(picture: Picture) -> np.ndarray:
    """The colour of the picture's edge in OKLab."""
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    return to_lab(np.median(edge, axis=0) / 255)


def _middle(line: Bool[np.ndarray, " length"]) -> float:
    """The middle between the first and the last True, in [0, 1]."""
    positions = np.flatnonzero(line)
    return (positions[0] + positions[-1] + 1) / 2 / len(line)


def _parts(picture: Picture) -> list[tuple[slice, slice]]:
    """The boxes of the separate drawings."""
    ink_mask = ink(picture)
    reach = max(int(CLOSED * len(picture) / 2), 1)
    labels, num_parts = ndimage.label(ndimage.binary_dilation(ink_mask, iterations=reach))
    sizes = np.bincount(labels[ink_mask], minlength=num_parts + 1)[1:]
    boxes = ndimage.find_objects(np.where(ink_mask, labels, 0))
    return [box for box, size in zip(boxes, sizes, strict=False) if box and size >= SPECK * sizes.max()]

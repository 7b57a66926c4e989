"""What a program can see in a picture of a scene: its ground, and the colour, place and number of what is drawn.

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
HUED, ENOUGH_HUE = 0.05, 0.2  # least chroma of a pixel with a hue, and the part of the ink above which only those count
SPECK = 0.1  # of the largest part's pixels, below which a part is not counted
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
    """One of `PLACES`, by the middle of the ink, or None without ink."""
    drawn = ink(picture)
    if not drawn.any():
        return None
    middles = [_middle(drawn.any(axis=axis)) for axis in (0, 1)]
    across, down = (0.0 if middle < LOW else 1.0 if middle > HIGH else 0.5 for middle in middles)
    return next(word for word, where in PLACES.items() if where == (across, down))


def count(picture: Picture) -> int:
    """The number of separate drawings, those with small gaps counted as one."""
    return len(_parts(picture))


def largest(picture: Picture, size: int) -> UInt8[np.ndarray, "size size"]:
    """The largest of the separate drawings in grey on white, its longer side the whole picture's. White without ink."""
    parts = _parts(picture)
    if not parts:
        return np.full((size, size), 255, np.uint8)
    grey = np.where(ink(picture), to_lab(picture / 255)[..., 0], 1.0)
    rows, columns = max(parts, key=lambda part: np.prod([side.stop - side.start for side in part]))
    cut = Image.fromarray(np.uint8(255 * np.clip(grey[rows, columns], 0, 1)))
    scale = size / max(cut.size)
    cut = cut.resize([max(round(scale * side), 1) for side in cut.size], Image.Resampling.BILINEAR)
    canvas = Image.new("L", (size, size), 255)
    canvas.paste(cut, ((size - cut.width) // 2, (size - cut.height) // 2))
    return np.asarray(canvas)


def _edge(picture: Picture) -> np.ndarray:
    """The colour of the picture's edge in OKLab."""
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    return to_lab(np.median(edge, axis=0) / 255)


def _middle(line: Bool[np.ndarray, " length"]) -> float:
    """The middle between the first and the last True, in [0, 1]."""
    where = np.flatnonzero(line)
    return (where[0] + where[-1] + 1) / 2 / len(line)


def _parts(picture: Picture) -> list[tuple[slice, slice]]:
    """The boxes of the separate drawings."""
    drawn = ink(picture)
    reach = max(int(CLOSED * len(picture) / 2), 1)
    labels, found = ndimage.label(ndimage.binary_dilation(drawn, iterations=reach))
    sizes = np.bincount(labels[drawn], minlength=found + 1)[1:]
    boxes = ndimage.find_objects(np.where(drawn, labels, 0))
    return [box for box, size in zip(boxes, sizes, strict=False) if box and size >= SPECK * sizes.max()]

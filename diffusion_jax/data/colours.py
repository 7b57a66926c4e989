"""Named colours, and recolouring of drawings in OKLab (Ottosson 2020)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

COLOURS = {  # sRGB
    "red": (217, 43, 43),
    "orange": (240, 138, 36),
    "yellow": (247, 217, 42),
    "green": (79, 174, 60),
    "blue": (63, 143, 224),
    "purple": (142, 85, 196),
    "pink": (245, 138, 181),
    "brown": (138, 90, 53),
    "black": (46, 46, 46),
    "white": (244, 244, 244),
    "grey": (154, 154, 154),
}
_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
GREY = 0.04  # chroma below which a colour has no hue
NEAR, FAR = 30.0, 45.0  # degrees from the main hue up to which a colour moves with it, and from which it stays


class MainHue(NamedTuple):
    """The hue that covers most of a drawing.

    lab: (3,) its median colour in OKLab.
    share: how much of the ink has it, in [0, 1].
    """

    lab: Float[np.ndarray, "3"]
    share: float


def to_lab(rgb: Float[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    """sRGB in [0, 1] -> OKLab."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T


def to_rgb(lab: Float[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    """OKLab -> sRGB, clipped to [0, 1]."""
    linear = np.clip((lab @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_LMS).T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def rgb_of(colour: str) -> Float[np.ndarray, "3"]:
    """A colour of COLOURS as sRGB in [0, 1]."""
    return np.array(COLOURS[colour]) / 255


def main_hue(image: Float[np.ndarray, "height width 4"]) -> MainHue | None:
    """The hue that covers most of a drawing, or None if all of it is grey. image: sRGB and alpha in [0, 1]."""
    lab = to_lab(image[image[..., 3] > 0.5][:, :3])
    hue = np.degrees(np.arctan2(lab[:, 2], lab[:, 1])) % 360
    coloured = np.hypot(lab[:, 1], lab[:, 2]) > GREY
    if not coloured.any():
        return None
    counts = np.histogram(hue[coloured], bins=72, range=(0, 360))[0]
    peak = 5 * np.argmax(sum(np.roll(counts, shift) for shift in range(-5, 6))) + 2.5
    in_main_hue = coloured & (np.abs((hue - peak + 180) % 360 - 180) < NEAR)
    return MainHue(np.median(lab[in_main_hue], axis=0), float(in_main_hue.sum() / len(lab)))


def ink_colour(image: Float[np.ndarray, "height width 4"]) -> Float[np.ndarray, "3"]:
    """The median colour of a drawing's ink in OKLab. image: sRGB and alpha in [0, 1], some of it opaque."""
    return np.median(to_lab(image[image[..., 3] > 0.5][:, :3]), axis=0)


def recoloured(
    image: Float[np.ndarray, "height width 4"], hue: MainHue, colour: str
) -> Float[np.ndarray, "height width 4"]:
    """The drawing with its main hue moved to a named colour. Shades keep their differences, other hues stay.

    A pixel moves in proportion to how much of the hue it has, so that the edges to other colours stay smooth.
    """
    lab, target = to_lab(image[..., :3]), to_lab(rgb_of(colour))
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    full_chroma = np.hypot(*hue.lab[1:])
    along_hue = lab[..., 1:] @ (hue.lab[1:] / full_chroma)
    angle = np.degrees(np.arccos(np.clip(along_hue / np.maximum(chroma, 1e-6), -1, 1)))
    membership = np.clip(along_hue / full_chroma, 0, 1) * np.clip((FAR - angle) / (FAR - NEAR), 0, 1)
    moved = lab + membership[..., None] * (target - hue.lab)
    if np.hypot(*target[1:]) < GREY:  # a grey target: remove the tint of the shades
        moved[..., 1:] *= 1 - membership[..., None] ** 0.5
    return np.concatenate([to_rgb(moved), image[..., 3:]], axis=-1)


def inked(image: Float[np.ndarray, "height width 4"], colour: str) -> Float[np.ndarray, "height width 4"]:
    """All ink in one colour, for drawings of lines."""
    return np.concatenate([np.broadcast_to(rgb_of(colour), image[..., :3].shape), image[..., 3:]], axis=-1)

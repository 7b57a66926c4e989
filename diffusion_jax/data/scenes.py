"""Scenes of emoji: one drawing in a style, a colour, a size and a place, on a ground, and what people call it.

Every part is drawn by the number of the scene, so that a scene is the same in every run. Some pairs are never drawn for
training: by the hash of their names, one in ten pairs of colour and concept, one in ten of style and concept, and one
in twenty concepts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diffusion_jax.data.colours import COLOURS, MainHue, inked, named, recoloured, to_lab
from diffusion_jax.data.openmoji import percent

ENOUGH = 0.45  # of a drawing's ink must have its main hue if it is to come in other colours
SIZES = {"": 0.8, "small": 0.4, "large": 0.95}  # longer side of the ink, as a part of the picture's
PLACES = {  # centre of the ink, as far from the picture's edge as it goes: across, down
    "": (0.5, 0.5),
    "on the left": (0.0, 0.5),
    "on the right": (1.0, 0.5),
    "at the top": (0.5, 0.0),
    "at the bottom": (0.5, 1.0),
    "in the top left corner": (0.0, 0.0),
    "in the top right corner": (1.0, 0.0),
    "in the bottom left corner": (0.0, 1.0),
    "in the bottom right corner": (1.0, 1.0),
}
MARGIN = 0.04
APART = 0.12  # least distance in OKLab between the colour of a drawing and its ground


class Drawing(NamedTuple):
    """A drawing to make scenes of.

    name: of its concept.
    words: what people call it, noun phrases without articles.
    style: one of `emoji.STYLES`.
    hue: its main hue.
    read: -> (size, size, 4) uint8.
    """

    name: str
    words: tuple[str, ...]
    style: str
    hue: MainHue | None
    read: Callable[[], UInt8[np.ndarray, "size size 4"]]

    @property
    def takes_colours(self) -> bool:
        """Whether it comes in other colours: lines, and what is mostly of one hue and not named after it."""
        if set(self.name.lower().split()) & COLOURS.keys() or self.name.startswith("flag of"):
            return False
        return self.style == "line" or (self.hue is not None and self.hue.share > ENOUGH)


class Scene(NamedTuple):
    """What is seen. colour, ground, size and place are empty for a drawing's own colour, white, and the usual ones."""

    name: str
    style: str
    colour: str = ""
    ground: str = ""
    size: str = ""
    place: str = ""


def is_held_out(*names: str) -> bool:
    """Whether a concept, or a pair of a colour or style and a concept, is never trained on."""
    return percent(" ".join(names)) < (5 if len(names) == 1 else 10)


def is_trained_on(scene: Scene) -> bool:
    """Whether no part of the scene is held out."""
    pairs = [(scene.name,), (scene.style, scene.name)] + ([(scene.colour, scene.name)] if scene.colour else [])
    return not any(is_held_out(*pair) for pair in pairs)


def scene(drawing: Drawing, rng: np.random.Generator) -> Scene:
    """A scene of the drawing."""
    colour = ground = size = place = ""
    if drawing.takes_colours and rng.random() < 0.5:
        colour = rng.choice([name for name in COLOURS if name != "white" or drawing.style != "line"])
    if rng.random() < 0.3:
        ground = rng.choice([name for name in COLOURS if _stands_out(drawing, colour, name)] or [""])
    if rng.random() < 0.3:
        size = rng.choice(["small", "large"])
    if size == "small" and rng.random() < 0.7:
        place = rng.choice([name for name in PLACES if name])
    return Scene(drawing.name, drawing.style, *map(str, (colour, ground, size, place)))


def trained_scene(drawings: Sequence[Drawing], rng: np.random.Generator) -> tuple[Scene, Drawing]:
    """A scene of one of the drawings, no part of it held out."""
    while True:
        drawing = drawings[rng.integers(len(drawings))]
        made = scene(drawing, rng)
        if is_trained_on(made):
            return made, drawing


def held_out_scene(drawings: Sequence[Drawing], rng: np.random.Generator) -> tuple[Scene, Drawing]:
    """A scene of one of the drawings whose concept is held out."""
    while True:
        drawing = drawings[rng.integers(len(drawings))]
        if is_held_out(drawing.name):
            return scene(drawing, rng), drawing


def _stands_out(drawing: Drawing, colour: str, ground: str) -> bool:
    """Whether the drawing can be seen on the ground; black outlines and lines cannot on black."""
    if ground == "white" or (ground == "black" and drawing.style in ("outlined", "line")):
        return False
    own = to_lab(named(colour)) if colour else drawing.hue and drawing.hue.lab
    return own is None or bool(np.linalg.norm(to_lab(named(ground)) - own) > APART)


def paint(scene: Scene, drawing: Drawing, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The picture of a scene, size x size pixels."""
    image = drawing.read() / 255
    if scene.colour:
        image = inked(image, scene.colour) if scene.style == "line" else recoloured(image, drawing.hue, scene.colour)
    ink = _scaled(_cropped(image), SIZES[scene.size] * size)
    canvas = np.ones((size, size, 3)) * (named(scene.ground) if scene.ground else 1.0)
    height, width = ink.shape[:2]
    margin = round(MARGIN * size)
    across, down = PLACES[scene.place]
    left, top = (round(margin + part * (size - 2 * margin - side)) for part, side in ((across, width), (down, height)))
    part = canvas[top : top + height, left : left + width]
    part[:] = np.clip(ink[..., :3] + (1 - ink[..., 3:]) * part, 0, 1)  # resizing overshoots
    return np.round(255 * canvas).astype(np.uint8)


def _cropped(image: np.ndarray) -> np.ndarray:
    """The part of an image with ink."""
    rows, columns = (np.flatnonzero(image[..., 3].any(axis=axis)) for axis in (1, 0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _scaled(image: np.ndarray, side: float) -> np.ndarray:
    """The image with its longer side of so many pixels, its colours multiplied by alpha."""
    scale = side / max(image.shape[:2])
    height, width = (max(round(scale * length), 1) for length in image.shape[:2])
    image = np.concatenate([image[..., :3] * image[..., 3:], image[..., 3:]], axis=-1).astype(np.float32)
    planes = [Image.fromarray(image[..., i]).resize((width, height), Image.Resampling.LANCZOS) for i in range(4)]
    return np.clip(np.stack([np.asarray(plane) for plane in planes], axis=-1), 0, 1)

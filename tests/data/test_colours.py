"""Colours: conversions are inverse, recolouring moves one hue and leaves the rest."""

import numpy as np
import pytest

from diffusion_jax.data.colours import COLOURS, inked, main_hue, recoloured, rgb_of, to_lab, to_rgb


def test_oklab_and_back():
    rgb = np.random.default_rng(0).random((100, 3))
    np.testing.assert_allclose(to_rgb(to_lab(rgb)), rgb, atol=1e-6)


def test_white_is_light_without_hue_and_black_dark():
    np.testing.assert_allclose(to_lab(np.array([[1.0, 1, 1], [0, 0, 0]])), [[1, 0, 0], [0, 0, 0]], atol=1e-6)


def drawing():
    """Mostly blue, a quarter red, a quarter black lines, on a transparent ground."""
    image = np.zeros((8, 8, 4))
    image[:4] = [0.2, 0.5, 0.9, 1]
    image[4:6] = [0.9, 0.1, 0.1, 1]
    image[6:] = [0, 0, 0, 1]
    return image


def test_the_main_hue_is_that_of_most_ink():
    hue = main_hue(drawing())
    assert hue.share == 0.5
    np.testing.assert_allclose(to_rgb(hue.lab), [0.2, 0.5, 0.9], atol=1e-6)
    assert main_hue(np.ones((4, 4, 4))) is None


@pytest.mark.parametrize("colour", COLOURS)
def test_only_the_main_hue_moves(colour):
    image = drawing()
    moved = recoloured(image, main_hue(image), colour)
    np.testing.assert_allclose(moved[:4, ..., :3], np.broadcast_to(rgb_of(colour), (4, 8, 3)), atol=0.02)
    np.testing.assert_allclose(moved[4:], image[4:], atol=1e-6)
    np.testing.assert_array_equal(moved[..., 3], image[..., 3])


def test_shades_keep_their_order():
    image = np.ones((1, 3, 4))
    image[0, :, :3] = [[0.1, 0.3, 0.6], [0.2, 0.5, 0.9], [0.5, 0.7, 1.0]]
    for colour in COLOURS:
        lightness = to_lab(recoloured(image, main_hue(image), colour)[..., :3])[0, :, 0]
        assert np.all(np.diff(lightness) >= 0), colour


def test_lines_are_all_of_one_colour():
    image = inked(drawing(), "green")
    np.testing.assert_allclose(image[..., :3], np.broadcast_to(rgb_of("green"), (8, 8, 3)))
    np.testing.assert_array_equal(image[..., 3], drawing()[..., 3])

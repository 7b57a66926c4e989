"""Requests of any size, drawn at the sizes of a model."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.serve.sizes import Frame, nearest, parsed, written

SEEN = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def test_the_nearest_shape_is_drawn_and_of_equal_shapes_the_nearest_area():
    sizes = [(512, 512), (768, 512), (512, 768), (1024, 1024)]
    for size in sizes:
        assert nearest(size, sizes) == size
    expected = {(100, 100): (512, 512), (900, 900): (1024, 1024), (1536, 1024): (768, 512), (1024, 1792): (512, 768)}
    for size, drawn in expected.items():
        assert nearest(size, sizes) == drawn
    assert nearest((3, 2000), [(8, 8)]) == (8, 8)


def test_the_own_size_is_left_as_it_is():
    mask = SEEN[..., :1] > 127
    frame = Frame((24, 40), (24, 40), SEEN, mask)
    assert frame.entered() == (frame.image, frame.mask) and frame.left(SEEN) is SEEN and not frame.is_resized


@pytest.mark.parametrize("size", [(24, 24), (24, 40), (40, 24), (8, 3), (1, 1), (200, 7)])
def test_a_picture_comes_back_where_it_was(size):
    """A gradient is drawn as it is given: after two resizings it is still that gradient."""
    height, width = size
    ramp = np.linspace(40, 200, height)[:, None] + np.linspace(0, 40, width)[None]
    image = np.repeat(ramp[..., None], 3, axis=-1).astype(np.uint8)
    frame = Frame(size, (64, 64), image)
    entered, mask = frame.entered()
    assert entered.shape == (64, 64, 3) and mask is None and frame.left(entered).shape == (*size, 3)
    np.testing.assert_allclose(frame.left(entered).astype(int), image, atol=8)


def test_shapes_are_not_distorted_and_the_middle_is_used():
    disc = np.zeros((64, 64, 3), np.uint8)
    rows, columns = np.mgrid[:64, :64] - 31.5
    disc[rows**2 + columns**2 < 100] = 255
    wide = Frame((64, 128), (64, 64)).left(disc)[..., 0] > 127
    height, width = (np.ptp(np.flatnonzero(wide.any(axis=axis))) for axis in (1, 0))
    assert abs(height - width) <= 2 and abs(height - 40) <= 2, "twice as large, still round"
    # the part is 32 of 64 rows: exactly Pillow's resize of these
    expected = np.asarray(Image.fromarray(disc[16:48]).resize((128, 64), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(Frame((64, 128), (64, 64)).left(disc), expected)


def test_a_single_marked_pixel_of_a_large_image_is_generated():
    mask = np.zeros((2000, 2000, 1), bool)
    mask[1000, 500] = True
    _, small = Frame((2000, 2000), (64, 64), np.zeros((2000, 2000, 3), np.uint8), mask).entered()
    assert small.sum() == 1 and small[32, 16]


def test_outside_a_mask_the_image_stays_exactly():
    mask = np.zeros((24, 40, 1), bool)
    mask[5:7, 20:] = True
    frame = Frame((24, 40), (16, 16), SEEN, mask)
    image, small = frame.entered()
    assert image.shape == (16, 16, 3) and small.shape == (16, 16, 1)
    assert small.any() and not small.all() and small[:, 10:].any() and not small[:, :7].any()
    result = frame.left(np.zeros((16, 16, 3), np.uint8))
    np.testing.assert_array_equal(result[~mask[..., 0]], SEEN[~mask[..., 0]])
    assert not result[mask[..., 0]].any()


def test_a_thin_mask_does_not_vanish():
    mask = np.zeros((400, 400, 1), bool)
    mask[:, 200] = True
    _, small = Frame((400, 400), (8, 8), np.zeros((400, 400, 3), np.uint8), mask).entered()
    assert small.any()


def test_sizes_are_written_as_width_and_height():
    assert parsed("512x768") == (768, 512) and written((768, 512)) == "512x768"
    for wrong in ("512", "x", "512x", "axb", "512X512", "1" * 9 + "x1", "-1x5"):
        with pytest.raises(ValueError, match="expected WIDTHxHEIGHT"):
            parsed(wrong)

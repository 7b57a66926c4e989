"""Inpainting generates where the mask is 1 and keeps the given image elsewhere."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import solvers
from diffusion_jax.data.transforms import to_float, to_uint8
from diffusion_jax.pipelines import inpaint, text_to_image
from tests.pipelines.painter import LATENTS, PIXELS, SCHEDULE, SIZE, keys, photographs, told

IMAGES = photographs(2)
HALF = np.zeros((1, SIZE, SIZE, 1), np.float32)
HALF[:, :3] = 1
PLAN = solvers.ddim(SCHEDULE, 8)


def paint(mask, pipeline=PIXELS, image=IMAGES, plan=PLAN, grey=0.5):
    return inpaint(pipeline, image, mask, told(grey, grey), keys(2), plan)


@pytest.mark.parametrize("pipeline", [PIXELS, LATENTS])
@pytest.mark.parametrize("plan", [PLAN, solvers.with_resampling(PLAN, 3), solvers.dpmpp_2m(SCHEDULE, 8)])
def test_the_known_pixels_are_those_of_the_image(pipeline, plan):
    result = paint(HALF, pipeline, plan=plan)
    np.testing.assert_array_equal(result[:, 3:], to_float(IMAGES)[:, 3:])
    np.testing.assert_array_equal(to_uint8(result)[:, 3:], IMAGES[:, 3:])
    assert jnp.all(jnp.any(result[:, :3] != to_float(IMAGES)[:, :3], axis=-1))


def test_the_new_part_follows_its_condition_and_not_what_was_there():
    result = paint(HALF)
    np.testing.assert_allclose(result[:, :3].mean((1, 2, 3)), 0.5, atol=0.1)
    other = np.where(HALF > 0, photographs(2, seed=1), IMAGES).astype(np.uint8)
    np.testing.assert_allclose(paint(HALF, image=other)[:, :3], result[:, :3], atol=1e-5)


@pytest.mark.parametrize("pipeline", [PIXELS, LATENTS])
def test_a_mask_of_ones_is_text_to_image_and_of_zeros_the_image(pipeline):
    alone = text_to_image(pipeline, told(0.5, 0.5), keys(2), PLAN)
    np.testing.assert_allclose(paint(np.ones_like(HALF), pipeline), alone, atol=1e-5)
    np.testing.assert_array_equal(paint(np.zeros_like(HALF), pipeline), to_float(IMAGES))


def test_a_latent_cell_that_the_mask_touches_is_new():
    """Only row 2 is masked: the cell of rows 2 and 3 is generated, and row 3 is restored from the image."""
    mask = np.zeros_like(HALF)
    mask[:, 2] = 1
    result = paint(mask, LATENTS)
    alone = text_to_image(LATENTS, told(0.5, 0.5), keys(2), PLAN)
    np.testing.assert_allclose(result[:, 2], alone[:, 2], atol=1e-5)
    np.testing.assert_array_equal(np.delete(result, 2, axis=1), np.delete(to_float(IMAGES), 2, axis=1))


def test_masks_may_differ_by_image_and_blend():
    masks = np.concatenate([HALF, 0.5 * HALF])
    result, whole = paint(masks), paint(HALF)
    np.testing.assert_allclose(result[0], whole[0], atol=1e-6)
    np.testing.assert_allclose(
        result[1], (whole[1] + jnp.where(HALF[0] > 0, to_float(IMAGES[1]), whole[1])) / 2, atol=1e-5
    )


def test_bytes_and_booleans_are_masks_too():
    np.testing.assert_array_equal(paint(HALF > 0), paint(HALF))
    np.testing.assert_array_equal(paint(HALF.astype(np.uint8)), paint(HALF))


def test_without_steps_the_image_stays():
    nothing = solvers.with_resampling(solvers.ddim(SCHEDULE, 0, spacing=[]), 2)
    np.testing.assert_array_equal(paint(HALF, plan=nothing), to_float(IMAGES))


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (3, SIZE, SIZE, 1), (1, 4, 4, 1), (1, SIZE, SIZE, 3)])
def test_a_mask_of_another_shape_is_one_clear_line(shape):
    with pytest.raises(ValueError, match=r"a mask must be of shape \(B or 1, H, W, 1\)") as error:
        paint(np.ones(shape, np.float32))
    assert "\n" not in str(error.value)

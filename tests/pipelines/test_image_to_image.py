"""An image partly noised and generated again, with a network that knows the answer."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import sampling, schedules, solvers
from diffusion_jax.data.transforms import to_float
from diffusion_jax.pipelines import Guidance, image_to_image, text_to_image
from tests.pipelines.painter import LATENTS, PIXELS, SCHEDULE, keys, photographs, told

IMAGES = photographs(3)


def plan(strength, steps=10, solver=solvers.ddim, **options):
    left = solvers.strength_times(SCHEDULE, steps, strength)
    return solver(SCHEDULE, len(left), spacing=left, **options)


def change(strength, image=IMAGES, pipeline=PIXELS, greys=(-0.5, 0.0, 0.5), seed=0, guidance=1.0, **options):
    cond, key = told(*greys), keys(len(greys), seed)
    return image_to_image(pipeline, image, cond, key, plan(strength, **options), guidance)


@pytest.mark.parametrize("pipeline", [PIXELS, LATENTS])
def test_strength_0_gives_the_image_back(pipeline):
    np.testing.assert_array_equal(change(0.0, pipeline=pipeline), to_float(IMAGES))
    np.testing.assert_array_equal(change(0.0, to_float(IMAGES), pipeline), to_float(IMAGES))


@pytest.mark.parametrize("pipeline", [PIXELS, LATENTS])
def test_strength_1_draws_what_the_prompt_alone_does(pipeline):
    alone = text_to_image(pipeline, told(-0.5, 0.0, 0.5), keys(3), plan(1.0))
    np.testing.assert_allclose(change(1.0, pipeline=pipeline), alone, atol=1e-5)


def test_on_a_schedule_that_ends_near_noise_strength_1_is_near():
    steps = solvers.ddim(schedules.cosine(), 10)
    alone = text_to_image(PIXELS, told(0.2), keys(1), steps)
    np.testing.assert_allclose(image_to_image(PIXELS, IMAGES[:1], told(0.2), keys(1), steps), alone, atol=1e-3)


def test_the_stronger_the_further_from_the_image():
    image = to_float(IMAGES)
    distances = [float(jnp.mean(jnp.square(change(strength) - image))) for strength in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert distances == sorted(distances) and distances[1] > 0


def test_numbers_and_bytes_are_the_same_image():
    np.testing.assert_array_equal(change(0.5), change(0.5, to_float(IMAGES)))


def test_an_image_does_not_depend_on_its_batch():
    together = change(0.5)
    alone = image_to_image(PIXELS, IMAGES[1:2], told(0.0), keys(3)[1:2], plan(0.5))
    np.testing.assert_allclose(alone[0], together[1], atol=1e-5)


def test_nothing_recompiles():
    def draw(count, strength, solver):
        guidance = Guidance(1.5 + count, negative={"grey": told(0.1 * count)["grey"][0]}, interval=(0.1 * count, 5.0))
        return change(
            strength, steps=24 - 7 * count, solver=solver, seed=count, guidance=guidance, greys=(0.1, 0.2, 0.3)
        )

    draw(0, 1.0, solvers.ddim)
    before = sampling.advance._cache_size()
    draw(1, 0.3, solvers.dpmpp_2m)
    draw(2, 0.6, solvers.ddpm)
    assert sampling.advance._cache_size() == before


def test_an_image_of_another_size_is_one_clear_line():
    with pytest.raises(ValueError, match="this model's images are 8x8 pixels, got 6x4") as error:
        change(0.5, np.zeros((3, 4, 6, 3), np.uint8))
    assert "\n" not in str(error.value)

"""From a condition to pixels, with a network that knows the answer: a picture in the grey that its label names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import codec as codecs
from diffusion_jax.core import schedules, solvers
from diffusion_jax.pipelines import text_to_image
from tests.pipelines.painter import painted

PLAN = solvers.ddim(schedules.cosine(), 7)


def grey(params, x, t, cond):
    return jnp.broadcast_to(params * cond["label"][:, None, None, None].astype(jnp.float32), x.shape)


PIPELINE = painted(grey, jnp.float32(0.1), {"label": np.int32(0)}, 4, schedules.cosine())


def draw(labels, seed=0, pipeline=PIPELINE, **options):
    keys = jax.random.split(jax.random.key(seed), len(labels))
    return text_to_image(pipeline, {"label": np.array(labels, np.int32)}, keys, PLAN, **options)


def test_a_picture_follows_its_condition():
    images = draw([-3, 0, 7])
    assert images.shape == (3, 4, 4, 3)
    np.testing.assert_allclose(images, np.array([-0.3, 0, 0.7])[:, None, None, None] * np.ones((1, 4, 4, 3)), atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_leads_away_from_no_condition(scale):
    np.testing.assert_allclose(draw([2], guidance=scale), 0.2 * scale, atol=1e-5)


def test_pictures_may_differ_in_guidance():
    images = draw([2, 2], guidance=jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(images[:, 0, 0, 0], [0.2, 0.4], atol=1e-5)


def test_pixels_stay_in_their_range():
    np.testing.assert_allclose(draw([9], guidance=5.0), 1.0, atol=1e-5)


def test_a_latent_is_decoded():
    codec = codecs.identity()._replace(
        decode=lambda params, x0: jnp.repeat(jnp.repeat(x0 / params, 2, axis=1), 2, axis=2),
        params=jnp.float32(0.5), factor=2, limit=None,
    )  # fmt: skip
    images = draw([3], pipeline=PIPELINE._replace(codec=codec))
    assert images.shape == (1, 4, 4, 3)
    np.testing.assert_allclose(images, 0.6, atol=1e-5)


def test_a_callback_can_stop_between_chunks():
    calls, plan = [], solvers.ddim(schedules.cosine(), 45)
    keys = jax.random.split(jax.random.key(0), 1)
    cond, stop = {"label": np.array([1], np.int32)}, lambda done, x0: calls.append(done) or done >= 20
    text_to_image(PIPELINE, cond, keys, plan, callback=stop)
    assert calls == [10, 20]

"""Between two noises, two prompts, two seeds; and from an image back to its noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_jax.core import solvers
from diffusion_jax.data.transforms import to_float
from diffusion_jax.pipelines import from_noise, invert, mix, slerp, text_to_image, variations
from tests.pipelines.painter import PIXELS, SCHEDULE, keys, told

A, B = (jax.random.normal(key, (5, 4, 4, 3)) for key in keys(2))
PLAN = solvers.ddim(SCHEDULE, 8)


def norms(x):
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2, 3)))


def test_slerp_ends_where_it_should():
    np.testing.assert_allclose(slerp(A, B, 0.0), A, atol=1e-6)
    np.testing.assert_allclose(slerp(A, B, 1.0), B, atol=1e-6)
    np.testing.assert_allclose(slerp(A, B, 0.3), slerp(B, A, 0.7), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(weight=st.floats(0, 1), angle=st.floats(-4, 0).map(lambda power: np.pi * 0.99 * 10.0**power))
def test_slerp_walks_the_circle_at_an_even_pace(weight, angle):
    a, b = jnp.array([[2.0, 0.0]]), 2 * jnp.array([[np.cos(angle), np.sin(angle)]], jnp.float32)
    expected = [[2 * np.cos(weight * angle), 2 * np.sin(weight * angle)]]
    np.testing.assert_allclose(slerp(a, b, weight), expected, atol=2e-5)


def test_slerp_is_linear_between_parallels_and_finite_from_nothing():
    np.testing.assert_allclose(slerp(A, 3 * A, 0.5), 2 * A, rtol=1e-5)
    np.testing.assert_allclose(slerp(A, -A, 0.25), 0.5 * A, atol=1e-4)
    assert jnp.all(jnp.isfinite(slerp(0 * A, B, 0.5)))


def test_each_image_has_its_own_weight():
    weights = np.linspace(0, 1, 5, dtype=np.float32)
    each = jnp.stack([slerp(A[i : i + 1], B[i : i + 1], float(w))[0] for i, w in enumerate(weights)])
    np.testing.assert_allclose(slerp(A, B, weights), each, atol=1e-6)


def test_prompts_mix_in_their_embeddings_and_join_their_tokens():
    a = {"text": np.ones((3, 3, 4), np.float32), "mask": np.array([[1, 1, 0]] * 3, bool)}
    b = {"text": 3 * a["text"], "mask": np.array([[1, 0, 1]] * 3, bool)}
    mixed = mix(a, b, np.array([0.0, 0.5, 1.0], np.float32))
    np.testing.assert_allclose(mixed["text"][:, 0, 0], [1.0, 2.0, 3.0])
    assert mixed["mask"].tolist() == [[True, True, False], [True, True, True], [True, False, True]]


def test_there_is_nothing_between_two_classes():
    with pytest.raises(ValueError, match="only embeddings can be mixed"):
        mix({"label": np.array([1])}, {"label": np.array([2])}, 0.5)


def test_variations_lead_from_one_seed_to_another():
    cond, ours, others = told(0.0, 0.0), keys(2), keys(2, seed=1)

    def drawn(strength):
        return from_noise(PIXELS, variations(PIXELS, ours, others, PLAN, strength), cond, ours, PLAN)

    image = text_to_image(PIXELS, cond, ours, PLAN)
    np.testing.assert_allclose(drawn(0.0), image, atol=1e-5)
    np.testing.assert_allclose(drawn(1.0), text_to_image(PIXELS, cond, others, PLAN), atol=1e-5)
    distances = [float(jnp.mean(jnp.square(drawn(strength) - image))) for strength in (0.0, 0.1, 0.3, 1.0)]
    assert distances == sorted(distances)


def test_the_noise_of_an_image_draws_it_and_the_better_the_more_steps():
    image = 0.2 * jax.random.normal(jax.random.key(7), (2, 8, 8, 3))
    cond, errors = told(0.0, 0.0), []
    for steps in (5, 10, 20, 40):
        noise = invert(PIXELS, image, cond, solvers.ddim_inversion(SCHEDULE, steps))
        back = from_noise(PIXELS, noise, cond, keys(2), solvers.ddim(SCHEDULE, steps))
        errors.append(float(jnp.max(jnp.abs(back - image))))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 4, errors
    assert abs(float(jnp.std(noise)) - 1) < 0.2, "what comes out is noise"


def test_images_are_inverted_from_bytes_too():
    image = np.full((1, 8, 8, 3), 100, np.uint8)
    plan = solvers.ddim_inversion(SCHEDULE, 5)
    np.testing.assert_array_equal(
        invert(PIXELS, image, told(0.0), plan), invert(PIXELS, to_float(image), told(0.0), plan)
    )

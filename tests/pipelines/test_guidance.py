"""The options of `Guidance`, through a pipeline."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import parameterization, process, schedules, solvers
from diffusion_jax.core.guidance import Guidance, guided
from diffusion_jax.pipelines import text_to_image
from tests.pipelines.painter import LATENTS, PIXELS, SCHEDULE, keys, painted, told

LEVEL = schedules.cosine()(jnp.float32(500))
X = jnp.linspace(-1, 1, 2 * 4 * 4 * 3).reshape(2, 4, 4, 3)


def shifted(x, level, cond):
    x0 = x + cond["grey"]
    return process.Prediction(x0, (x - level.alpha * x0) / level.sigma)


def x0_of(guidance, limit=None):
    return guided(shifted, guidance if isinstance(guidance, Guidance) else Guidance(guidance), told(0.0), limit)(
        X, LEVEL, told(0.1, 0.2)
    ).x0


def test_a_negative_prompt_takes_the_place_of_no_condition():
    negative = x0_of(Guidance(3.0, negative=told(-0.1)))
    np.testing.assert_allclose(negative, X - 0.1 + 3 * (told(0.1, 0.2)["grey"] + 0.1), atol=1e-6)
    np.testing.assert_allclose(x0_of(Guidance(3.0, negative=told(0.0))), x0_of(3.0))
    each = x0_of(Guidance(3.0, negative=told(-0.1, 0.0)))
    np.testing.assert_allclose(each[0], negative[0], atol=1e-6)
    np.testing.assert_allclose(each[1], x0_of(3.0)[1], atol=1e-6)


def test_phi_of_0_and_an_interval_of_everything_change_nothing():
    plain = x0_of(3.0)
    np.testing.assert_allclose(x0_of(Guidance(3.0)), plain, atol=1e-6)
    np.testing.assert_allclose(x0_of(Guidance(3.0, interval=(0.0, np.inf))), plain, atol=1e-6)
    np.testing.assert_allclose(x0_of(Guidance(3.0, interval=(1e3, np.inf))), x0_of(1.0), atol=1e-6)


def test_phi_of_1_keeps_the_contrast_of_the_condition_alone():
    def scaled(x, level, cond):
        return parameterization.x0.predict(x, x * cond["grey"], level)

    for phi, contrast in [(0.0, 1.5), (1.0, 0.5)]:
        prediction = guided(scaled, Guidance(3.0, rescale=phi), told(0.0))(X, LEVEL, told(0.5, 0.5))
        np.testing.assert_allclose(jnp.std(prediction.x0) / jnp.std(X), contrast, rtol=1e-5)


def test_pixels_are_clipped_or_thresholded_and_latents_left_alone():
    assert jnp.max(jnp.abs(x0_of(9.0))) > 2
    assert jnp.max(jnp.abs(x0_of(9.0, limit=1.0))) == 1
    soft = x0_of(Guidance(9.0, dynamic_threshold=1.0), limit=1.0)
    np.testing.assert_allclose(jnp.max(jnp.abs(soft)), 1, rtol=1e-6)
    assert jnp.mean(jnp.abs(soft) == 1) < jnp.mean(jnp.abs(x0_of(9.0, limit=1.0)) == 1)


def test_cfg_plus_plus_of_scale_0_is_unconditional_and_grows_from_there():
    plan = solvers.ddim(SCHEDULE, 6)
    zero, half, one = (
        text_to_image(PIXELS, told(0.3), keys(1), plan, Guidance(scale, cfg_pp=True)) for scale in (0.0, 0.5, 1.0)
    )
    np.testing.assert_allclose(zero, text_to_image(PIXELS, told(0.3), keys(1), plan, 0.0), atol=1e-5)
    assert zero.mean() < half.mean() < one.mean()


def test_a_model_without_conditions_runs_once_a_step():
    batches = []

    def apply(params, x, t, cond):
        batches.append(len(x))
        return 0 * x

    text_to_image(painted(apply, {}, {}, size=4), {}, keys(3), solvers.ddim(SCHEDULE, 2), 5.0)
    assert set(batches) == {3}


@pytest.mark.parametrize(
    "guidance, message",
    [
        (Guidance(-1.0), "guidance must be at least 0"),
        (Guidance(2.0, rescale=1.5), r"rescale's phi must be in \[0, 1\]"),
        (Guidance(2.0, interval=(2.0, 1.0)), "must have 0 <= low < high"),
        (Guidance(2.0, cfg_pp=True), r"the scale of CFG\+\+ must be in \[0, 1\]"),
        (Guidance(0.5, cfg_pp=True, rescale=0.5), "exclude each other"),
        (Guidance(0.5, cfg_pp=True), "needs a solver of one row a step"),
        (Guidance(2.0, dynamic_threshold=0.99), "is for models of pixels"),
    ],
)
def test_what_cannot_be_is_one_clear_line(guidance, message):
    with pytest.raises(ValueError, match=message) as error:
        text_to_image(LATENTS, told(0.3), keys(1), solvers.dpmpp_2m(SCHEDULE, 4), guidance)
    assert "\n" not in str(error.value)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import guidance, parameterization, schedules
from diffusion_jax.core.process import Prediction

LEVEL = schedules.linear()(jnp.float32(300))
X = 3 * jax.random.normal(jax.random.key(0), (3, 8))
COND = jnp.array([[1.0], [2.0], [3.0]])
NULL = jnp.zeros(1)


def denoise(x, level, cond):
    """A prediction that is tied to x and depends on the condition."""
    return parameterization.eps.predict(x, jnp.sin(x) + cond, level)


def assert_equal(a, b, rtol=1e-5):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-5), a, b)


def assert_tied(prediction):
    np.testing.assert_allclose(LEVEL.alpha * prediction.x0 + LEVEL.sigma * prediction.eps, X, rtol=1e-4, atol=1e-4)


CONDITIONAL, UNCONDITIONAL = denoise(X, LEVEL, COND), denoise(X, LEVEL, 0 * COND)


def test_scale_1_is_no_guidance_and_0_is_unconditional():
    for scale, expected in [(1.0, CONDITIONAL), (0.0, UNCONDITIONAL)]:
        assert_equal(guidance.classifier_free(denoise, scale, NULL)(X, LEVEL, COND), expected)


def test_a_negative_prompt_takes_the_place_of_the_null_condition():
    negative = jnp.array([[5.0], [6.0], [7.0]])  # one for each image
    out = guidance.classifier_free(denoise, 3.0, negative)(X, LEVEL, COND)
    away = denoise(X, LEVEL, negative)
    assert_equal(out, jax.tree.map(lambda a, b: a + 3 * (b - a), away, CONDITIONAL))


def test_scale_may_differ_by_image_and_calls_the_network_once():
    calls = []

    def counted(x, level, cond):
        calls.append(x.shape)
        return denoise(x, level, cond)

    scale = jnp.array([1.0, 2.0, 3.0])
    out = guidance.classifier_free(counted, scale, NULL)(X, LEVEL, COND)
    for i in range(3):
        alone = guidance.classifier_free(denoise, scale[i], NULL)(X, LEVEL, COND)
        assert_equal(jax.tree.map(lambda leaf, i=i: leaf[i], out), jax.tree.map(lambda leaf, i=i: leaf[i], alone))
    assert calls == [(6, 8)]


def test_rescaling_fully_gives_the_contrast_of_the_conditional_prediction():
    plain = guidance.classifier_free(denoise, 7.5, NULL)(X, LEVEL, COND)
    assert_equal(guidance.rescale(denoise, 7.5, NULL, phi=0.0)(X, LEVEL, COND), plain)
    full = guidance.rescale(denoise, 7.5, NULL, phi=1.0)(X, LEVEL, COND)
    np.testing.assert_allclose(jnp.std(full.x0, 1), jnp.std(CONDITIONAL.x0, 1), rtol=1e-4)
    half = guidance.rescale(denoise, 7.5, NULL, phi=0.5)(X, LEVEL, COND)
    np.testing.assert_allclose(half.x0, (plain.x0 + full.x0) / 2, rtol=1e-4, atol=1e-5)
    assert_tied(full)


def test_guidance_holds_in_its_interval_only():
    guided = guidance.classifier_free(denoise, 4.0, NULL)
    s = float(LEVEL.sigma / LEVEL.alpha)
    inside = guidance.interval(guided, denoise, s / 2, 2 * s)(X, LEVEL, COND)
    assert_equal(inside, guided(X, LEVEL, COND))
    for low, high in [(2 * s, 3 * s), (0.0, s / 2)]:
        assert_equal(guidance.interval(guided, denoise, low, high)(X, LEVEL, COND), CONDITIONAL)


def test_an_interval_up_to_infinity_guides_pure_noise():
    """Of one image and of a batch; a finite end leaves it out."""
    noise = schedules.zero_terminal_snr(schedules.linear())(jnp.float32(999))
    assert noise.alpha == 0

    def spoken(x, level, cond):  # eps does not determine x0 there
        return parameterization.v.predict(x, jnp.sin(x) + cond, level)

    guided = guidance.classifier_free(spoken, 4.0, NULL)
    for level in (noise, jax.tree.map(lambda value: jnp.full(3, value), noise)):
        for high, expected in [(np.inf, guided), (1e6, spoken)]:
            assert_equal(guidance.interval(guided, spoken, 0.5, high)(X, level, COND), expected(X, level, COND))


def test_cfg_pp_puts_back_the_unconditional_noise():
    out = guidance.cfg_pp(denoise, 0.6, NULL)(X, LEVEL, COND)
    np.testing.assert_allclose(out.eps, UNCONDITIONAL.eps, rtol=1e-5)
    np.testing.assert_allclose(out.x0, 0.4 * UNCONDITIONAL.x0 + 0.6 * CONDITIONAL.x0, rtol=1e-4, atol=1e-4)


def test_autoguidance_leads_away_from_the_weaker_model():
    def weaker(x, level, cond):
        return parameterization.eps.predict(x, jnp.sin(x) + 0.5 * cond, level)

    assert_equal(guidance.autoguidance(denoise, weaker, 1.0)(X, LEVEL, COND), CONDITIONAL)
    out = guidance.autoguidance(denoise, weaker, 2.0)(X, LEVEL, COND)
    np.testing.assert_allclose(out.eps, jnp.sin(X) + 1.5 * COND, rtol=1e-4, atol=1e-5)


def test_clipping_keeps_the_pair_tied():
    out = guidance.clip_x0(denoise, 1.0)(X, LEVEL, COND)
    assert jnp.max(jnp.abs(out.x0)) <= 1 < jnp.max(jnp.abs(CONDITIONAL.x0))
    assert_tied(out)


def test_dynamic_thresholding_scales_bright_images_and_leaves_dim_ones():
    out = guidance.dynamic_threshold(denoise, percentile=0.75, limit=1.0)(X, LEVEL, COND)
    size = jnp.maximum(jnp.quantile(jnp.abs(CONDITIONAL.x0), 0.75, axis=1, keepdims=True), 1)
    np.testing.assert_allclose(out.x0, jnp.clip(CONDITIONAL.x0, -size, size) / size, rtol=1e-4, atol=1e-5)
    assert_tied(out)
    dim = guidance.dynamic_threshold(lambda x, level, cond: Prediction(0.1 * jnp.tanh(x), x))(X, LEVEL, COND)
    np.testing.assert_allclose(dim.x0, 0.1 * jnp.tanh(X), rtol=1e-6)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: guidance.classifier_free(denoise, -1.0, NULL), "guidance must be at least 0, got -1.0"),
        (lambda: guidance.classifier_free(denoise, np.array([1.0, -2.0]), NULL), "guidance must be at least 0"),
        (lambda: guidance.rescale(denoise, 2.0, NULL, phi=1.5), r"phi must be in \[0, 1\]"),
        (lambda: guidance.cfg_pp(denoise, 7.5, NULL), r"scale of CFG\+\+ must be in \[0, 1\]"),
        (lambda: guidance.interval(denoise, denoise, 2.0, 1.0), "0 <= low < high"),
        (lambda: guidance.dynamic_threshold(denoise, 99.5), r"percentile of dynamic thresholding must be in \[0, 1\]"),
        (lambda: guidance.clip_x0(denoise, -1.0), "the limit of x0 must be at least 0"),
    ],
)
def test_bad_values_are_one_clear_line(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def batches_of(wrap):
    """The batches that the network sees under a guidance."""
    batches = []

    def counted(x, level, cond):
        batches.append(len(x))
        return denoise(x, level, cond)

    wrap(counted)(X, LEVEL, COND)
    return batches


@pytest.mark.parametrize("scale", [1.0, np.ones(3), jnp.ones(3), 1])
def test_what_is_not_guided_runs_the_network_on_one_branch(scale):
    zero = 0 * scale
    assert batches_of(lambda d: guidance.classifier_free(d, scale, NULL)) == [3]
    assert batches_of(lambda d: guidance.classifier_free(d, zero, NULL)) == [3]
    assert batches_of(lambda d: guidance.rescale(d, scale, NULL, 0.7)) == [3]
    assert batches_of(lambda d: guidance.cfg_pp(d, zero, NULL)) == [3]
    assert batches_of(lambda d: guidance.classifier_free(d, scale + 1, NULL)) == [6]
    for options in (guidance.Guidance(scale), guidance.Guidance(scale, rescale=0.5), guidance.Guidance(zero)):
        assert batches_of(lambda d: guidance.guided(d, options, NULL)) == [3]  # noqa: B023


GUIDANCES = {
    "classifier_free": lambda d: guidance.classifier_free(d, 3.0, NULL),
    "unconditional": lambda d: guidance.classifier_free(d, 0.0, NULL),
    "scale of each image": lambda d: guidance.classifier_free(d, jnp.array([0.0, 1.0, 4.0]), NULL),
    "rescale": lambda d: guidance.rescale(d, 3.0, NULL),
    "interval": lambda d: guidance.interval(guidance.classifier_free(d, 3.0, NULL), d, 0.5, 2.0),
    "cfg_pp": lambda d: guidance.cfg_pp(d, 0.6, NULL),
    "autoguidance": lambda d: guidance.autoguidance(d, lambda x, level, cond: d(0.9 * x, level, cond), 2.0),
    "clip_x0": lambda d: guidance.clip_x0(d, 1.0),
    "dynamic_threshold": lambda d: guidance.dynamic_threshold(d, 0.75),
    "all at once": lambda d: guidance.guided(d, guidance.Guidance(3.0, rescale=0.5, interval=(0.5, 2.0)), NULL, 1.0),
}


@pytest.mark.parametrize("name", GUIDANCES)
def test_each_image_may_have_its_own_noise_level(name):
    """What comes of it is what each image has alone; the interval, of sigma / alpha 0.2, 1.3 and 5.6, holds one."""
    levels = schedules.linear()(jnp.float32([100, 500, 800]))
    scale = {"scale of each image": lambda i: jnp.array([0.0, 1.0, 4.0])[i : i + 1]}.get(name)
    together = GUIDANCES[name](denoise)(X, levels, COND)
    for i in range(3):
        level = jax.tree.map(lambda leaf: leaf[i], levels)  # noqa: B023
        one = guidance.classifier_free(denoise, scale(i), NULL) if scale else GUIDANCES[name](denoise)
        alone = one(X[i : i + 1], level, COND[i : i + 1])
        assert_equal(jax.tree.map(lambda leaf: leaf[i : i + 1], together), alone)  # noqa: B023


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_a_leaf_that_the_null_condition_lacks_is_seen_by_both_branches(scale):
    def denoise_with_condition(x, level, cond):
        return parameterization.eps.predict(x, jnp.sin(x) + cond["text"] + cond["known"], level)

    known = jnp.array([[0.1], [0.2], [0.3]])
    guided = guidance.classifier_free(denoise_with_condition, scale, {"text": NULL})(
        X, LEVEL, {"text": COND, "known": known}
    )
    null, conditional = (denoise_with_condition(X, LEVEL, {"text": text, "known": known}) for text in (0 * COND, COND))
    assert_equal(guided, jax.tree.map(lambda a, b: a + scale * (b - a), null, conditional), rtol=1e-4)

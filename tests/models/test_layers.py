"""Layers against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.layers import Downsample2D, GroupNorm, PointwiseConv, Upsample2D, sinusoidal_embedding

image = jax.random.normal(jax.random.key(0), (2, 6, 5, 8))


def convolve(x, variables, stride=1, padding=((1, 1), (1, 1))):
    kernel, bias = variables["params"]["conv"]["kernel"], variables["params"]["conv"]["bias"]
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=dimensions) + bias


def test_sinusoidal_embedding_is_its_formula():
    t, half = jnp.array([0.0, 3.5, 999.0]), 4
    angles = np.outer(t, 10000.0 ** (-np.arange(half) / (half - 1)))
    expected = np.concatenate([np.sin(angles), np.cos(angles), np.zeros((3, 1))], axis=1)
    np.testing.assert_allclose(sinusoidal_embedding(t, 9, flip_sin_to_cos=False, freq_shift=1), expected, atol=1e-4)
    flipped = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((3, 1))], axis=1)
    np.testing.assert_allclose(sinusoidal_embedding(t, 9, flip_sin_to_cos=True, freq_shift=1), flipped, atol=1e-4)


@pytest.mark.parametrize("smoothing", [0.5, 50.0])
def test_a_smoothed_derivative_of_the_waves_is_their_difference_quotient(smoothing):
    t = jnp.array([100.0, 611.5])
    value, slope = jax.jvp(lambda t: sinusoidal_embedding(t, 16, smoothing=smoothing), (t,), (jnp.ones(2),))
    np.testing.assert_array_equal(value, sinusoidal_embedding(t, 16))
    before, after = (np.float64(sinusoidal_embedding(t + step, 16)) for step in (-smoothing, smoothing))
    np.testing.assert_allclose(slope, (after - before) / (2 * smoothing), atol=1e-3 * min(1, 1 / smoothing))


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_group_norm_has_mean_0_and_variance_1_in_each_group(mean):
    out, _ = GroupNorm(groups=4, eps=0.0).init_with_output(jax.random.key(0), image + mean)
    groups = out.reshape(2, 30, 4, 2)
    np.testing.assert_allclose(groups.mean(axis=(1, 3)), 0.0, atol=1e-6 + 1e-6 * mean)
    np.testing.assert_allclose(groups.std(axis=(1, 3)), 1.0, rtol=1e-4)


def test_group_norm_is_float32_and_names_a_bad_split():
    out, _ = GroupNorm(groups=4, eps=1e-5).init_with_output(jax.random.key(0), image.astype(jnp.bfloat16))
    assert out.dtype == jnp.float32
    with pytest.raises(ValueError, match="8 channels cannot be split into 3 groups"):
        GroupNorm(groups=3, eps=1e-5).init(jax.random.key(0), image)


@pytest.mark.parametrize("size", [None, (12, 10), (11, 10), (11, 9)])
def test_upsampling_equals_repeating_pixels_and_convolving(size):
    up = Upsample2D(16)
    variables = jax.tree.map(lambda p: p + 0.1, up.init(jax.random.key(1), image))
    height, width = size or (12, 10)

    def definition(x, variables):
        return convolve(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, :height, :width], variables)

    def ours(x, variables):
        return up.apply(variables, x, size)

    np.testing.assert_allclose(ours(image, variables), definition(image, variables), atol=1e-5)
    gradients = [
        jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1))(image, variables) for f in (ours, definition)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *gradients)


@pytest.mark.parametrize("padding", [0, 1])
def test_downsampling_halves(padding):
    down = Downsample2D(16, padding)
    out, variables = down.init_with_output(jax.random.key(1), image)
    assert out.shape == (2, 3, 2 + padding, 16)
    np.testing.assert_allclose(out, convolve(image, variables, 2, [(padding, 1)] * 2), atol=1e-6)


def test_pointwise_is_a_1x1_convolution():
    out, variables = PointwiseConv(4).init_with_output(jax.random.key(1), image)
    kernel = variables["params"]["kernel"]
    dimensions = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(image, kernel, (1, 1), "VALID", dimension_numbers=dimensions)
    np.testing.assert_allclose(out, expected, atol=1e-5)

"""Laws of patches, positions and rotation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.attention import attention
from diffusion_jax.models.token_layers import (
    grid_positions,
    image_of,
    patches,
    rotate,
    rotation,
    sincos_positions,
)

AXES = (4, 2, 6)


def tokens():
    return jax.random.normal(jax.random.key(0), (1, 5, 2, sum(AXES)))


def test_patches_are_pixels_row_by_row_with_channels_together():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    cut = patches(jnp.asarray(x), 2)
    assert cut.shape == (2, 6, 12)
    np.testing.assert_array_equal(cut[1, 4], x[1, 2:4, 2:4].ravel())
    np.testing.assert_array_equal(image_of(cut, (2, 3), 2), x)


@pytest.mark.parametrize("pairs", ["adjacent", "half"])
def test_rotation_of_scores_depends_on_the_difference_of_positions_alone(pairs):
    q, k = tokens(), jax.random.normal(jax.random.key(1), tokens().shape)
    positions = np.random.default_rng(0).integers(0, 50, (5, 3)).astype(float)

    def scores(positions):
        by = rotation(positions, AXES, 100.0)
        return jnp.einsum("bqhd,bkhd->bhqk", rotate(q, by, pairs), rotate(k, by, pairs))

    near, far = scores(positions), scores(positions + np.array([7.0, 0.0, 30.0]))
    np.testing.assert_allclose(near, far, atol=2e-5)
    assert jnp.abs(near - scores(2 * positions)).max() > 0.1


@pytest.mark.parametrize("pairs", ["adjacent", "half"])
def test_rotation_keeps_lengths_and_turns_each_pair_by_its_angle(pairs):
    x, positions = tokens(), np.arange(15.0).reshape(5, 3)
    turned = rotate(x, rotation(positions, AXES, 100.0), pairs)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    angles = [(0, 1.0), (0, 100**-0.5), (1, 1.0), (2, 1.0), (2, 100 ** (-1 / 3)), (2, 100 ** (-2 / 3))]
    for i, (axis, rate) in enumerate(angles):
        a, b = (2 * i, 2 * i + 1) if pairs == "adjacent" else (i, i + 6)
        before, after = (np.asarray(y[..., a] + 1j * y[..., b]) for y in (x, turned))
        np.testing.assert_allclose(after, before * np.exp(1j * rate * positions[:, axis])[:, None], atol=1e-5)


def test_traced_positions_of_each_image_rotate_as_known_ones():
    positions = np.random.default_rng(0).integers(0, 500, (1, 5, 3)).astype(float)
    known = rotate(tokens(), rotation(positions, AXES, 256.0))
    traced = jax.jit(lambda p: rotate(tokens(), rotation(p, AXES, 256.0)))(jnp.asarray(positions))
    np.testing.assert_allclose(known, traced, atol=2e-4)  # the angles of 500 in float32


def test_rotation_in_bfloat16_is_computed_in_float32():
    x = tokens().astype(jnp.bfloat16)
    by = rotation(np.full((5, 3), 300.0), AXES, 100.0)
    assert rotate(x, by).dtype == jnp.bfloat16
    np.testing.assert_array_equal(rotate(x, by), rotate(x.astype(jnp.float32), by).astype(jnp.bfloat16))


@pytest.mark.parametrize("widths", [(4, 8), (3, 2, 7), (0, 6, 6)])
def test_widths_that_do_not_fit_are_refused(widths):
    with pytest.raises(ValueError, match="expected 3 even widths"):
        rotation(np.zeros((5, 3)), widths, 100.0)


def test_sincos_positions_tell_column_before_row():
    table = sincos_positions((3, 5), 8).reshape(3, 5, 2, 4)
    np.testing.assert_array_equal(table[0, :, 0], table[2, :, 0])  # the first half is that of the column
    np.testing.assert_array_equal(table[:, 0, 1], table[:, 4, 1])
    np.testing.assert_allclose(table[2, 3, :, 0], np.sin([3, 2]), rtol=1e-6)
    np.testing.assert_allclose(table[2, 3, :, 3], np.cos([0.03, 0.02]), rtol=1e-6)


def test_another_grid_is_stretched_over_that_of_training():
    trained, finer = sincos_positions((4, 4), 16, (4, 4)), sincos_positions((8, 8), 16, (4, 4))
    np.testing.assert_array_equal(trained.reshape(4, 4, 16), finer.reshape(8, 8, 16)[::2, ::2])
    np.testing.assert_array_equal(grid_positions((2, 3))[[1, 3]], [[0, 1], [1, 0]])


def test_heads_of_128_are_neither_padded_nor_split():
    """The fused kernels of TPU and GPU take heads of 128 as they are."""
    q = jnp.zeros((1, 16, 2, 128), jnp.bfloat16)
    shapes = {
        variable.aval.shape[-1]
        for equation in jax.make_jaxpr(lambda q: attention(q, q, q, implementation="xla"))(q).eqns
        if equation.primitive.name == "dot_general"
        for variable in equation.invars
    }
    assert shapes == {128, 16}

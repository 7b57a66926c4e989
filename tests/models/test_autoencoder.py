"""Laws of the autoencoder and the discriminator; equality with diffusers is in tests/interop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.autoencoder import AutoencoderKL, mode, sample_moments
from diffusion_jax.models.discriminator import PatchDiscriminator

SMALL = AutoencoderKL(block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=2, norm_num_groups=4)
image = jax.random.uniform(jax.random.key(1), (2, 16, 12, 3), minval=-1)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(SMALL.init)(jax.random.key(0), SMALL.example_image())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_types(variables, dtype):
    autoencoder = SMALL.clone(dtype=dtype)
    moments = jax.eval_shape(lambda v: autoencoder.apply(v, image, method="encode"), variables)
    assert (moments.shape, moments.dtype) == ((2, 4, 3, 4), jnp.float32)
    decoded = jax.eval_shape(lambda v: autoencoder.apply(v, jnp.zeros((2, 4, 3, 2)), method="decode"), variables)
    assert (decoded.shape, decoded.dtype) == (image.shape, jnp.float32)


def test_log_variance_is_bounded(variables):
    params = variables["params"] | {"quant_conv": jax.tree.map(lambda p: p + 1e3, variables["params"]["quant_conv"])}
    encode = jax.jit(functools.partial(SMALL.apply, method="encode"))
    logvar = jnp.split(encode({"params": params}, image), 2, axis=-1)[1]
    assert -30 <= logvar.min() <= logvar.max() == 20


def test_moments_describe_the_samples():
    moments = jnp.broadcast_to(jnp.array([1.0, -2.0, 0.0, 2.0]), (1, 64, 64, 4))
    z = sample_moments(moments, jax.random.split(jax.random.key(0), 1))[0].reshape(-1, 2)
    np.testing.assert_allclose(z.mean(axis=0), [1, -2], atol=0.1)
    np.testing.assert_allclose(z.var(axis=0), [1, np.exp(2)], rtol=0.1)
    np.testing.assert_array_equal(mode(moments)[0, 0, 0], [1, -2])


def test_a_sample_depends_on_its_key_alone():
    moments, keys = jnp.zeros((2, 3, 3, 4)), jax.random.split(jax.random.key(0), 2)
    both = sample_moments(moments, keys)
    np.testing.assert_array_equal(both[1:], sample_moments(moments[1:], keys[1:]))
    assert jnp.any(both[0] != both[1])


def test_wrong_sizes_are_one_line(variables):
    with pytest.raises(ValueError, match=r"multiples of 4, got \(1, 10, 12, 3\)"):
        SMALL.apply(variables, jnp.zeros((1, 10, 12, 3)), method="encode")
    with pytest.raises(ValueError, match=r"expected 2 latent channels \(last axis\), got shape \(1, 4, 4, 4\)"):
        SMALL.apply(variables, jnp.zeros((1, 4, 4, 4)), method="decode")


def test_discriminator_judges_patches_of_each_image_by_itself():
    discriminator = PatchDiscriminator(channels=16)
    logits, variables = jax.jit(discriminator.init_with_output)(jax.random.key(0), jnp.tile(image, (1, 2, 3, 1)))
    assert logits.shape == (2, 2, 2)
    alone = jax.jit(discriminator.apply)(variables, jnp.tile(image[:1], (1, 2, 3, 1)))
    np.testing.assert_allclose(logits[:1], alone, atol=1e-5)
    with pytest.raises(ValueError, match="at least 24x24 pixels"):
        discriminator.init(jax.random.key(0), image)

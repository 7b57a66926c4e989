"""Images to x0 and back: the same pixels for the identity, the autoencoder's output for latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import codec as codecs
from diffusion_jax.data.transforms import to_float
from diffusion_jax.models.autoencoder import AutoencoderKL, mean_and_std, sample_gaussian, sample_moments

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
KEYS = jax.random.split(jax.random.key(0), 2)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(autoencoder().init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def autoencoder(**fields):
    return AutoencoderKL(block_out_channels=(4, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2, **fields)


def test_pixels_come_back_as_they_were():
    codec = codecs.identity()
    x0 = codec.sample(codec.stats, codec.encode(codec.params, IMAGES), KEYS)
    assert jnp.max(jnp.abs(x0)) <= codec.limit
    np.testing.assert_array_equal(codec.decode(codec.params, x0), to_float(IMAGES))


def test_the_scale_and_shift_of_latents_are_undone(variables):
    for fields in ({"scaling_factor": 0.3, "shift_factor": 0.1}, {"scaling_factor": 5.0}):
        model = autoencoder(**fields)
        codec = codecs.autoencoder_kl(model, variables)
        record = codec.encode(codec.params, IMAGES)
        z = sample_gaussian(*jnp.split(record, 2, axis=-1), KEYS)
        x0 = codec.sample(codec.stats, record, KEYS)
        assert x0.shape == (2, 8 // codec.factor, 8 // codec.factor, codec.channels)
        scaled = (z - fields.get("shift_factor", 0)) * fields["scaling_factor"]
        np.testing.assert_allclose(x0, scaled, rtol=1e-5, atol=1e-6)
        expected = model.apply(variables, z, method="decode")
        np.testing.assert_allclose(codec.decode(codec.params, x0), expected, rtol=1e-4, atol=1e-5)


def test_records_are_mean_and_standard_deviation_of_the_latent(variables):
    model = autoencoder()
    codec = codecs.autoencoder_kl(model, variables)
    record = codec.encode(codec.params, IMAGES)
    moments = model.apply(variables, jnp.asarray(to_float(IMAGES)), method="encode")
    for part, expected in zip(jnp.split(record, 2, axis=-1), mean_and_std(moments), strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-5)
    z = codec.sample(codec.stats, record, KEYS) / codec.stats["scale"]
    np.testing.assert_allclose(z, sample_moments(moments, KEYS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("log_variance", [-30.0, -13.0, 0.0])
def test_a_stored_record_gives_the_same_latents_up_to_rounding(log_variance):
    """Each of mean and standard deviation has an error of 2^-8 of itself, however small the variance is."""
    mean = jax.random.normal(KEYS[0], (2, 4, 4, 2))
    std = jnp.exp(0.5 * log_variance + 0.1 * jax.random.normal(KEYS[1], mean.shape))
    codec = codecs.autoencoder_kl(autoencoder(scaling_factor=2.0), {})
    record = jnp.concatenate([mean, std], axis=-1)
    stored = codecs.stored(record)
    assert stored.dtype == jnp.bfloat16 and codecs.stored(IMAGES) is IMAGES
    exact, rounded = (codec.sample(codec.stats, r, KEYS) for r in (record, stored))
    assert rounded.dtype == jnp.float32
    noise = jnp.abs(sample_gaussian(jnp.zeros_like(mean), std, KEYS))
    assert jnp.all(jnp.abs(exact - rounded) <= 2.0 * (jnp.abs(mean) + noise) * 2.0**-8 + 1e-6)
    np.testing.assert_array_equal(
        codec.sample(codec.stats, stored, None), 2.0 * mean.astype(jnp.bfloat16).astype(jnp.float32)
    )


def test_the_name_changes_with_the_weights_alone(variables):
    name = codecs.autoencoder_kl(autoencoder(), variables).cache_key()
    assert name == codecs.autoencoder_kl(autoencoder(scaling_factor=2.0), jax.tree.map(jnp.copy, variables)).cache_key()
    assert name != codecs.autoencoder_kl(autoencoder(), jax.tree.map(lambda a: a + 1e-6, variables)).cache_key()
    renamed = {"params": {"other": variables["params"]}}
    assert codecs.fingerprint(renamed) != codecs.fingerprint(variables)


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (2, 9, 20, 3), (1, 3, 31, 3)])
def test_tiles_fade_into_each_other(shape):
    """Tiles of a decoder that looks at single cells add up to the whole; each pixel is a mean of the tiles over it."""
    z = jax.random.normal(jax.random.key(0), shape)

    def decode(z):
        return jnp.repeat(jnp.repeat(2 * z, 2, axis=1), 2, axis=2)

    np.testing.assert_allclose(codecs.in_tiles(decode, z, 8), decode(z), rtol=1e-5)

    image = codecs.in_tiles(lambda z: decode(z) + jnp.arange(16.0)[:, None, None][: 2 * z.shape[1]], 0 * z, 8)
    assert image.min() >= 0 and image.max() <= 15


def test_an_autoencoder_decodes_large_images_in_tiles(variables):
    x0 = jax.random.normal(jax.random.key(0), (1, 20, 12, 2))
    whole, tiled = (codecs.autoencoder_kl(autoencoder(), variables, tile) for tile in (0, 16))
    images = [jax.jit(codec.decode)(codec.params, x0) for codec in (whole, tiled)]
    assert images[0].shape == images[1].shape == (1, 40, 24, 3)
    assert np.corrcoef(np.ravel(images[0]), np.ravel(images[1]))[0, 1] > 0.95
    small = x0[:, :8, :8]
    np.testing.assert_array_equal(*(jax.jit(codec.decode)(codec.params, small) for codec in (whole, tiled)))
    with pytest.raises(ValueError, match="tile must be a multiple of 8 pixels, or 0 for none, got 12"):
        codecs.autoencoder_kl(autoencoder(), variables, 12)

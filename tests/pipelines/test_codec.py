"""Images to what the denoiser sees and back: the same pixels for the identity, the autoencoder's own for latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.data.transforms import to_float
from diffusion_jax.models.autoencoder import AutoencoderKL, mode, sample_moments
from diffusion_jax.pipelines import codec as codecs

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
KEYS = jax.random.split(jax.random.key(0), 2)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(autoencoder().init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def autoencoder(**fields):
    return AutoencoderKL(block_out_channels=(4, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2, **fields)


def test_pixels_come_back_as_they_were():
    codec = codecs.identity()
    x0 = codec.draw(codec.stats, codec.encode(IMAGES), KEYS)
    assert jnp.max(jnp.abs(x0)) <= codec.limit
    np.testing.assert_array_equal(codec.decode(codec.params, x0), to_float(IMAGES))


def test_the_scale_and_shift_of_latents_are_undone(variables):
    for fields in ({"scaling_factor": 0.3, "shift_factor": 0.1}, {"scaling_factor": 5.0}):
        model = autoencoder(**fields)
        codec = codecs.autoencoder_kl(model, variables)
        moments = codec.encode(IMAGES)
        z = sample_moments(moments, KEYS)
        x0 = codec.draw(codec.stats, moments, KEYS)
        assert x0.shape == (2, 8 // codec.factor, 8 // codec.factor, codec.channels)
        scaled = (z - fields.get("shift_factor", 0)) * fields["scaling_factor"]
        np.testing.assert_allclose(x0, scaled, rtol=1e-5, atol=1e-6)
        expected = model.apply(variables, z, method="decode")
        np.testing.assert_allclose(codec.decode(codec.params, x0), expected, rtol=1e-4, atol=1e-5)


def test_records_are_the_moments_of_the_pixels(variables):
    model = autoencoder()
    moments = codecs.autoencoder_kl(model, variables).encode(IMAGES)
    expected = model.apply(variables, jnp.asarray(to_float(IMAGES)), method="encode")
    np.testing.assert_allclose(mode(moments), mode(expected), rtol=1e-4, atol=1e-5)


def test_the_name_changes_with_the_weights_alone(variables):
    name = codecs.autoencoder_kl(autoencoder(), variables).name
    assert name == codecs.autoencoder_kl(autoencoder(scaling_factor=2.0), jax.tree.map(jnp.copy, variables)).name
    assert name != codecs.autoencoder_kl(autoencoder(), jax.tree.map(lambda a: a + 1e-6, variables)).name
    renamed = {"params": {"other": variables["params"]}}
    assert codecs.fingerprint(renamed) != codecs.fingerprint(variables)

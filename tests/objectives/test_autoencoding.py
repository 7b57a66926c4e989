"""Each term of the first stage's loss has the right value, and its gradient reaches only its own network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.objectives.autoencoding import autoencoding, edge_error, hinge, kl_to_standard_normal

WEIGHTS = {"l1": 1.0, "l2": 2.0, "edges": 0.4, "perceptual": 0.5, "kl": 0.01, "adversarial": 0.3}
PARAMS = {"autoencoder": {"in": jnp.float32(0.8), "out": jnp.float32(0.7)}, "discriminator": jnp.float32(0.4)}
IMAGE = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3), minval=-1, maxval=1)


def encode(params, image):
    mean = params["in"] * image
    return jnp.concatenate([mean, jnp.full_like(mean, -2.0)], axis=-1)


def draw(moments, keys):
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(0.5 * logvar) * jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)


def decode(params, z):
    return params["out"] * z


def discriminate(params, image):
    return jnp.sin(params * image.mean(axis=-1))


def perceptual(params, x, y):
    return params * jnp.mean(jnp.square(x - y), axis=(1, 2, 3))


def gradient(with_discriminator=True, with_perceptual=True, params=PARAMS, **weights):
    """(loss, metrics), gradient of the loss with some weights changed."""
    loss = autoencoding(
        encode, draw, decode, perceptual if with_perceptual else None,
        discriminate if with_discriminator else None, WEIGHTS | weights,
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(1), len(IMAGE))
    return jax.value_and_grad(loss, has_aux=True)(params, {"perceptual": jnp.float32(2.0)}, {"image": IMAGE}, keys)


@pytest.mark.parametrize("mean, scale", [(0.0, 1.0), (1.5, 1.0), (-0.5, 0.3), (0.2, 2.0)])
def test_kl_is_the_mean_log_ratio_of_the_densities(mean, scale):
    def log_density(x, mean, scale):
        return -0.5 * ((x - mean) / scale) ** 2 - np.log(scale)

    x = mean + scale * np.random.default_rng(0).normal(size=400_000)
    expected = np.mean(log_density(x, mean, scale) - log_density(x, 0.0, 1.0))
    value = kl_to_standard_normal(jnp.full((3, 2), mean), jnp.full((3, 2), 2 * np.log(scale)))
    assert value.shape == (3,)  # summed over the two latents of an example
    np.testing.assert_allclose(value, 2 * expected, atol=0.03)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    (value, metrics), _ = gradient()
    mse = 4 / 10 ** (metrics["psnr"] / 10)  # pixels span [-1, 1]: the peak squared is 4
    terms = {"l1": metrics["l1"], "l2": mse, "kl": metrics["kl"], "perceptual": metrics["lpips"]}
    terms |= {"adversarial": metrics["generator"], "edges": metrics["edges"]}
    expected = sum(WEIGHTS[name] * term for name, term in terms.items()) + metrics["discriminator"]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_error_of_edges_is_that_of_neighbours_differences():
    flat, step = jnp.full((1, 4, 4, 1), 0.3), jnp.zeros((1, 4, 4, 1)).at[:, 2:].set(0.6)
    assert edge_error(flat) == 0
    np.testing.assert_allclose(edge_error(step), 0.6 / 3)  # one of three differences down, none across


def test_terms_that_are_off_are_not_computed():
    (_, metrics), _ = gradient(with_discriminator=False, with_perceptual=False)
    assert sorted(metrics) == ["edges", "kl", "l1", "psnr"]


def test_the_discriminator_learns_from_its_own_term_alone():
    _, grads = gradient()
    for change in ({"adversarial": 9.0}, {"l1": 5.0, "kl": 1.0}):
        assert gradient(**change)[1]["discriminator"] == grads["discriminator"] != 0


def test_the_autoencoder_does_not_learn_from_the_discriminators_term():
    _, without = gradient(with_discriminator=False)
    _, grads = gradient(adversarial=0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), grads["autoencoder"], without["autoencoder"])
    _, adversarial = gradient()
    for name, value in without["autoencoder"].items():
        assert adversarial["autoencoder"][name] != value


def test_hinge_losses_reach_one_network_each():
    real, fake = IMAGE, IMAGE[::-1] * 0.5

    def of(which):
        loss = lambda params, fake: hinge(discriminate, params, real, fake)[which]  # noqa: E731
        return jax.grad(loss, (0, 1))(jnp.float32(0.4), fake)

    generator_on_params, generator_on_fake = of(0)
    discriminator_on_params, discriminator_on_fake = of(1)
    assert generator_on_params == 0 and jnp.any(generator_on_fake != 0)
    assert discriminator_on_params != 0 and jnp.all(discriminator_on_fake == 0)


def test_a_discriminator_that_is_sure_has_no_loss_and_one_that_is_wrong_has():
    def says(params, image):
        return params * image[..., 0]

    real, fake = jnp.ones((2, 3, 3, 1)), -jnp.ones((2, 3, 3, 1))
    assert hinge(says, jnp.float32(1.0), real, fake) == (1.0, 0.0)
    assert hinge(says, jnp.float32(0.0), real, fake) == (0.0, 1.0)
    assert hinge(says, jnp.float32(-1.0), real, fake) == (-1.0, 2.0)

"""First stage: reconstruct the image through a small Gaussian latent (Rombach et al. 2022, appendix G)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.codec import pixels


def kl_to_standard_normal(
    mean: Float[Array, "batch *shape"], logvar: Float[Array, "batch *shape"]
) -> Float[Array, "batch"]:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over each latent (Kingma & Welling 2014, appendix B)."""
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar, axis=range(1, mean.ndim))


def autoencoding(
    encode: Callable[[PyTree, Array], Array],
    sample: Callable[[Array, Array], Array],
    decode: Callable[[PyTree, Array], Array],
    perceptual: Callable[[PyTree, Array, Array], Array] | None,
    discriminate: Callable[[PyTree, Array], Array] | None,
    weights: dict,
) -> Callable:
    """The loss of a first stage, each term a mean over pixels:

        l1 |x - x'| + l2 |x - x'|^2 + edges |d(x - x')| + perceptual LPIPS(x, x') + kl KL + adversarial hinge

    encode: (params, image (B, H, W, 3)) -> moments (B, h, w, 2C).
    sample: (moments, keys (B,)) -> z.
    decode: (params, z) -> image.
    perceptual: (frozen params, x, x') -> distance (B,), or None.
    discriminate: (params, image) -> logits, or None.
    weights: of the terms, {"l1", "l2", "edges", "perceptual", "kl", "adversarial"}. "edges" weighs the error of the
      differences between neighbours, which are large at outlines.

    Params are {"autoencoder": ...}, and {"discriminator": ...} if there is one. One optimizer step updates both,
    because the gradient of each term reaches only its own network. batch = {"image": (B, H, W, 3), uint8 or in [-1,
    1]}.
    """

    def loss(params: PyTree, frozen: PyTree, batch: PyTree, keys: Key[Array, "batch"]) -> tuple[Float[Array, ""], dict]:
        image = pixels(batch["image"])
        moments = encode(params["autoencoder"], image)
        output = decode(params["autoencoder"], sample(moments, keys))
        mse = jnp.mean(jnp.square(image - output))
        l1 = jnp.mean(jnp.abs(image - output))
        kl = jnp.mean(kl_to_standard_normal(*jnp.split(moments, 2, axis=-1)))
        # pixels span [-1, 1], so the peak is 2
        metrics = {"l1": l1, "edges": edge_error(image - output), "kl": kl, "psnr": 10 * jnp.log10(4 / mse)}
        total = weights["l1"] * l1 + weights["l2"] * mse + weights["kl"] * kl
        total += weights["edges"] * metrics["edges"]
        if perceptual is not None:
            metrics["lpips"] = jnp.mean(perceptual(frozen["perceptual"], image, output))
            total += weights["perceptual"] * metrics["lpips"]
        if discriminate is not None:
            generator, discriminator = hinge(discriminate, params["discriminator"], image, output)
            metrics |= {"generator": generator, "discriminator": discriminator}
            total += weights["adversarial"] * generator + discriminator
        return total, metrics

    return loss


def edge_error(error: Float[Array, "batch height width channels"]) -> Float[Array, ""]:
    """Mean absolute difference between neighbours, down and across."""
    return sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2))


def hinge(
    discriminate: Callable[[PyTree, Array], Array], params: PyTree, real: Array, fake: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Hinge losses of generator and discriminator (Lim & Ye 2017). Each treats the other network as constant."""
    stop = jax.lax.stop_gradient
    generator = -jnp.mean(discriminate(stop(params), fake))
    on_real, on_fake = discriminate(params, real), discriminate(params, stop(fake))
    return generator, jnp.mean(jax.nn.relu(1 - on_real) + jax.nn.relu(1 + on_fake)) / 2

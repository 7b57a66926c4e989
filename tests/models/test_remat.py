"""Networks that compute activations again in the backward pass are the same functions, with the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.flops import flops
from tests.models import test_autoencoder, test_transformer, test_unet

NETWORKS = {  # -> network, its inputs
    "U-Net with text": (test_unet.TEXT_1, test_unet.inputs(test_unet.TEXT_1)),
    "U-Net": (test_unet.PIXELS_1, test_unet.inputs(test_unet.PIXELS_1)),
    "transformer": (test_transformer.CROSS, test_transformer.inputs(test_transformer.CROSS)),
    "autoencoder": (test_autoencoder.SMALL.clone(block_out_channels=(8, 16)), (test_autoencoder.image,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_remat_changes_neither_value_nor_gradient(name):
    network, inputs = NETWORKS[name]
    shapes, rng = jax.eval_shape(network.init, jax.random.key(0), *inputs), np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: jnp.float32(0.1 * rng.normal(size=leaf.shape)), shapes)

    def value_and_gradient(network):
        return jax.value_and_grad(lambda variables: jnp.sum(jnp.sin(network.apply(variables, *inputs))))

    plain, again = value_and_gradient(network), value_and_gradient(network.clone(remat=True))
    assert flops(again, variables) > 1.1 * flops(plain, variables)
    expected, found = jax.jit(plain)(variables), jax.jit(again)(variables)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), expected, found)

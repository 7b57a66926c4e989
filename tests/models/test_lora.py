"""A LoRA in the network is a LoRA merged into its weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models import lora
from diffusion_jax.models.layers import Conv, Dense, PointwiseConv, UpsampledConv


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Dense(5, name="to_out_0")(jnp.sin(Dense(6, use_bias=False, name="to_q")(x)))


class Network(nn.Module):
    """A network with the names of a U-Net's attention."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        attention = nn.remat(Attention) if self.remat else Attention
        x = attention(name="attn1")(PointwiseConv(4, name="proj_in")(x))
        return UpsampledConv(3, name="conv")(Conv(5, stride=2, name="conv1")(x))


NETWORK = Network()
X = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
VARIABLES = jax.tree.map(lambda leaf: leaf + 0.1, NETWORK.init(jax.random.key(1), X))
apply = jax.jit(NETWORK.apply)


def updates(targets=lora.ATTENTION):
    """Updates that do change something."""
    result = lora.init(VARIABLES, 2, jax.random.key(0), targets)
    return jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(2), leaf.shape), result)


def merged(params, update, scale):
    """down up added to the kernels by hand."""
    if "down" in update:
        product = (update["down"] @ update["up"]).reshape(params["kernel"].shape)
        return params | {"kernel": params["kernel"] + scale * product}
    return {name: merged(part, update[name], scale) if name in update else part for name, part in params.items()}


def test_a_fresh_one_changes_nothing_and_has_a_gradient():
    fresh = lora.init(VARIABLES, 4, jax.random.key(0))
    value, pull = jax.vjp(lambda update: apply(lora.with_updates(VARIABLES, update, 2.0), X), fresh)
    np.testing.assert_array_equal(value, apply(VARIABLES, X))
    (gradient,) = pull(jnp.ones_like(value))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        moves = jnp.abs(leaf).max() > 0
        assert moves == (path[-1].key == "up"), path  # down has a gradient once up is not zero


@pytest.mark.parametrize("targets", [lora.ATTENTION, "proj_in", "to_q|proj_in", "conv1", "conv1?|to_out_0"])
def test_it_is_the_product_added_to_the_kernel(targets):
    update = updates(targets)
    ours = apply(lora.with_updates(VARIABLES, update, 0.3), X)
    expected = apply({"params": merged(VARIABLES["params"], update, 0.3)}, X)
    np.testing.assert_allclose(ours, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    assert jnp.abs(ours - apply(VARIABLES, X)).max() > 0.01 * jnp.abs(expected).max()


def test_rematerialised_networks_have_it_too():
    variables = lora.with_updates(VARIABLES, updates(), 0.3)
    np.testing.assert_allclose(jax.jit(Network(remat=True).apply)(variables, X), apply(variables, X), atol=1e-6)


def test_targets_are_found_by_the_end_of_their_path():
    update = lora.init(VARIABLES, 2, jax.random.key(0), "attn1/to_q|proj_in")
    shapes = {"attn1": {"to_q": {"down": (4, 2), "up": (2, 6)}}, "proj_in": {"down": (1, 1, 3, 2), "up": (2, 4)}}
    assert jax.tree.map(jnp.shape, update) == shapes


def test_what_cannot_be_updated_is_one_line():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        lora.init(VARIABLES, 0, jax.random.key(0))
    with pytest.raises(ValueError, match="no map of the network matches 'nowhere'"):
        lora.init(VARIABLES, 1, jax.random.key(0), "nowhere")

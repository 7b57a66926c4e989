"""A U-Net with outer levels around a trained one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.model import network_of
from diffusion_jax.models.growing import grown
from diffusion_jax.models.unet import UNet


def unet(levels, layers=1, attends=False):
    cross = "CrossAttn" if attends else ""
    return UNet(
        in_channels=3,
        out_channels=3,
        down_block_types=(f"{cross}DownBlock2D",) * levels,
        up_block_types=(f"{cross}UpBlock2D",) * levels,
        cross_attention_dim=8,
        attention_head_dim=4,
        block_out_channels=(*(8,) * (levels - 1), 16),
        layers_per_block=layers,
        norm_num_groups=4,
        mid_block_type=None,
    )


def shaken(tree):
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), tree)


@functools.cache
def networks(added):
    """(network, params) of a network and of the one with levels added around it."""
    inner, outer = network_of(unet(2)), network_of(unet(2 + added))
    trained = shaken(inner.init(jax.random.key(0)))
    fresh = outer.init(jax.random.key(1))
    made = grown(*(jax.tree.map(np.array, tree) for tree in (trained, fresh)))
    return (jax.jit(inner.apply), trained), (jax.jit(outer.apply), made)


def difference(added, side):
    """Of what both networks say of the middle of one colour."""
    inner, outer = networks(added)
    said, t = [], jnp.array([300.0])
    for (apply, params), size in ((inner, side), (outer, side * 2**added)):
        colours = jnp.broadcast_to(jnp.array([0.3, -0.7, 0.1]), (1, size, size, 3))
        said.append(apply(params, colours, t, {})[0, size // 2, size // 2])
    return float(jnp.abs(said[1] - said[0]).max())


@pytest.mark.slow
@pytest.mark.parametrize("added", [1, 2])
def test_one_colour_is_seen_as_by_the_inner_network(added):
    """But for edges: padding shows there, and in the norms of all pixels, the less the larger the picture is."""
    small, large = difference(added, 8), difference(added, 48)
    assert large < 0.08 and large < 0.35 * small


def test_the_inner_network_sees_a_clean_picture_at_half_the_size_and_half_of_the_noise():
    """The promise of `grown` is about what the inner network is given: the mean of four pixels."""
    _, (_, made) = networks(1)
    kernel = made["params"]["down_blocks_0"]["downsamplers_0"]["conv"]["kernel"]
    x = np.random.default_rng(0).normal(size=(1, 64, 64, kernel.shape[2])).astype(np.float32)
    halved = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(halved, x.reshape(1, 32, 2, 32, 2, -1).mean((2, 4)), atol=1e-5)
    assert abs(halved.std() / x.std() - 0.5) < 0.02


def test_a_network_of_as_many_levels_is_itself():
    params = network_of(unet(2)).init(jax.random.key(0))
    assert grown(params, params) is params
    assert grown({"params": {"encoder": 1}}, params) == {"params": {"encoder": 1}}


@pytest.mark.slow
def test_new_attention_changes_nothing_until_it_is_trained():
    plain, attentive = network_of(unet(2)), network_of(unet(2, attends=True))
    trained, fresh = shaken(plain.init(jax.random.key(0))), attentive.init(jax.random.key(1))
    made = grown(*(jax.tree.map(np.array, tree) for tree in (trained, fresh)))
    assert jax.tree.structure(made) == jax.tree.structure(fresh)
    x, t = jax.random.normal(jax.random.key(2), (2, 16, 16, 3)), jnp.array([300.0, 700.0])
    cond = {"text": jax.random.normal(jax.random.key(3), (2, 5, 8))}
    said = jax.jit(attentive.apply)(made, x, t, cond)
    np.testing.assert_allclose(said, jax.jit(plain.apply)(trained, x, t, {}), atol=1e-5)
    moved = (
        jax.jit(attentive.apply)(shaken(made), x, t, cond),
        jax.jit(attentive.apply)(shaken(made), x, t, {"text": 0 * cond["text"]}),
    )
    assert jnp.abs(moved[0] - moved[1]).max() > 1e-3

"""FLOPs counted from a jaxpr are those of the program that XLA compiles."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from diffusion_jax import chips
from diffusion_jax.flops import flops
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.unet import UNet

UNET = UNet(
    block_out_channels=(128,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    attention_head_dim=8,
    cross_attention_dim=32,
)
AUTOENCODER = AutoencoderKL(block_out_channels=(64, 128), layers_per_block=1)


def shape(*size):
    return jax.ShapeDtypeStruct(size, jnp.float32)


def by_xla(function, *args):
    """FLOPs that XLA counts in the compiled program. The body of a loop counts once."""
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def of_unet(unet, derivative):
    params = jax.eval_shape(unet.init, jax.random.key(0), *unet.example_inputs())

    def output(params, *inputs):
        return unet.apply(params, *inputs).sum()

    inputs = shape(2, 16, 16, 4), shape(2), {"text": shape(2, 5, 32)}
    return derivative(output), params, *inputs


def of_autoencoder(method, *size):
    params = jax.eval_shape(AUTOENCODER.init, jax.random.key(0), AUTOENCODER.example_image())
    return lambda params, x: AUTOENCODER.apply(params, x, method=method), params, shape(*size)


NETWORKS = {
    "unet": lambda: of_unet(UNET, lambda f: f),
    "gradient": lambda: of_unet(UNET, jax.grad),
    "gradient with remat": lambda: of_unet(UNET.clone(remat=True), jax.grad),
    "encoder": lambda: of_autoencoder("encode", 1, 32, 32, 3),
    "decoder": lambda: of_autoencoder("decode", 1, 16, 16, 4),
}


@functools.cache
def of_network(name):
    return flops(*NETWORKS[name]())


@pytest.mark.parametrize("name", NETWORKS)
def test_of_networks(name):
    assert 0.94 < of_network(name) / by_xla(*NETWORKS[name]()) < 1, "XLA also counts what is no product"


def test_remat_costs_more():
    assert 1.1 < of_network("gradient with remat") / of_network("gradient") < 1.4


def scan(unroll):
    return lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=7, unroll=unroll)[0]


def test_a_scan_counts_as_often_as_it_runs():
    args = shape(32, 32), shape(32, 32)
    assert flops(scan(1), *args) == 7 * 2 * 32**3 == by_xla(scan(7), *args)


CONVOLUTIONS = {  # strides, padding, dilation of the input and of the kernel, groups of features and of images
    "same": ((1, 1), "SAME", None, None, 1, 1),
    "stride": ((2, 2), [(0, 1), (1, 1)], None, None, 1, 1),
    "dilated": ((1, 2), [(2, 2), (1, 3)], (2, 3), (1, 2), 1, 1),
    "groups": ((1, 1), "VALID", None, None, 2, 1),
    "groups of images": ((1, 1), "VALID", None, None, 1, 2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_of_a_convolution(name):
    *window, feature_groups, image_groups = CONVOLUTIONS[name]

    def convolve(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, *window, numbers, feature_groups, image_groups)

    args = shape(2, 9, 7, 8), shape(3, 3, 8 // feature_groups, 6)
    assert flops(convolve, *args) == jax.jit(convolve).lower(*args).cost_analysis()["flops"]


def test_a_condition_counts_its_most_expensive_branch():
    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x[:, :1] * (x[:1] @ x), x)

    assert flops(either, shape(8, 8)) == 2 * 8**3


def test_a_loop_of_unknown_length_counts_once():
    def loop(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x)

    assert flops(loop, shape(8, 8)) == 2 * 8**3


def test_devices_count_each():
    rows = PartitionSpec("all")
    mesh = AbstractMesh((3,), ("all",), axis_types=(AxisType.Auto,))
    product = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=rows, out_specs=rows)
    assert flops(jax.jit(product), shape(3 * 4, 8)) == 3 * 2 * 4 * 4 * 8


def test_what_is_not_needed_does_not_count():
    assert flops(lambda x: (x @ x, x)[1], shape(8, 8)) == 0


def test_chips_by_the_names_of_jax():
    assert chips.of_kind("TPU v5 lite") == chips.Chip(memory=16e9, flops=197e12)
    assert chips.of_kind("cpu") is None
    assert set(chips.KINDS.values()) == chips.CHIPS.keys()

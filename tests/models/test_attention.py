"""Every implementation is the same function, with the same gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from diffusion_jax import compilation
from diffusion_jax.flops import flops
from diffusion_jax.models.attention import BLOCK, attention


def inputs(queries, keys=40, dtype=jnp.float32):
    q, k, v = (
        jax.random.normal(key, (2, length, 3, 8), dtype)
        for key, length in zip(jax.random.split(jax.random.key(0), 3), (queries, keys, keys), strict=True)
    )
    return q, k, v, jnp.arange(keys) < jnp.array([[keys], [keys // 2]])


def check_same(implementation, q, k, v, mask):
    """Assert that an implementation has the value and the gradient of "xla"."""

    def value_and_gradients(implementation):
        return jax.jit(
            jax.value_and_grad(lambda *heads: jnp.sum(jnp.sin(attention(*heads, mask, implementation))), (0, 1, 2))
        )(q, k, v)

    for ours, theirs in zip(
        *(jax.tree.leaves(value_and_gradients(name)) for name in (implementation, "xla")), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [BLOCK - 1, BLOCK + 1, 2 * BLOCK])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_equal_one_softmax(queries, masked):
    q, k, v, mask = inputs(queries)
    check_same("blocks", q, k, v, mask if masked else None)


@pytest.mark.parametrize("queries, keys, masked", [(256, 128, False), (100, 40, True), (130, 40, False)])
def test_the_kernel_of_tpus_equals_one_softmax(queries, keys, masked, monkeypatch):
    """Also where sequences are padded."""
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))
    q, k, v, mask = inputs(queries, keys)
    check_same("flash", q, k, v, mask if masked else None)


@pytest.mark.parametrize("queries, keys, masked", [(64, 64, False), (63, 77, True)])
def test_the_kernel_of_gpus_has_a_gradient(queries, keys, masked, monkeypatch):
    """Lowered for a GPU, without one."""
    kernels = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{kernels}.check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(f"{kernels}.check_compute_capability", lambda capability: True)
    *heads, mask = inputs(queries, keys, jnp.bfloat16)

    def attend(*heads):
        return attention(*heads, mask if masked else None, "cudnn")

    def program(function):
        return jax.jit(function).trace(*heads).lower(lowering_platforms=("cuda",)).as_text()

    assert jax.eval_shape(attend, *heads).shape == heads[0].shape
    forward = program(attend)
    gradient = program(jax.grad(lambda *heads: attend(*heads).astype(jnp.float32).sum(), (0, 1, 2)))
    name = "__cudnn$fmhaScaleBiasSoftmax" if masked else "__cudnn$fmhaSoftmax"
    assert name in forward and f"{name}Backward" not in forward
    assert name in gradient and f"{name}Backward" in gradient
    assert "dot_general" not in gradient, "all products are in the kernel"


def test_a_gpu_that_is_not_here_can_be_counted():
    q = jax.ShapeDtypeStruct((2, 64, 4, 8), jnp.bfloat16)
    with compilation.planned_for("gpu", devices=8):
        assert flops(attention, q, q, q) == 2 * 2 * 2 * 4 * 64 * 64 * 8


def test_the_kernel_of_tpus_counts_its_products():
    q = jax.ShapeDtypeStruct((2, 1024, 4, 64), jnp.bfloat16)
    product = 2.0 * 2 * 4 * 1024 * 1024 * 64

    def loss(*heads):
        return attention(*heads, implementation="flash").astype(jnp.float32).sum()

    assert flops(loss, q, q, q) == 2 * product
    assert flops(jax.grad(loss, (0, 1, 2)), q, q, q) == 9 * product, "both gradients compute the scores again"


def test_the_kernel_of_tpus_takes_wide_heads(monkeypatch):
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))
    q, k, v = (jax.random.normal(key, (1, 128, 1, 130)) for key in jax.random.split(jax.random.key(0), 3))
    np.testing.assert_allclose(
        attention(q, k, v, implementation="flash"), attention(q, k, v, implementation="xla"), rtol=1e-4, atol=1e-5
    )


def test_masked_keys_are_not_seen():
    q, k, v, mask = inputs(7)
    masked = attention(q, k, v, mask)
    np.testing.assert_array_equal(masked, attention(q, k, jnp.where(mask[..., None, None], v, 1e6), mask))
    np.testing.assert_allclose(masked[1], attention(q[1:], k[1:, :20], v[1:, :20])[0], rtol=1e-5, atol=1e-6)


def test_softmax_is_float32_in_bfloat16():
    q, k, v, _ = inputs(9, dtype=jnp.bfloat16)
    out = attention(q, k, jnp.ones_like(v))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), 1.0)


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="expected one of auto, blocks, xla, cudnn, flash, got 'quick'"):
        attention(*inputs(3)[:3], implementation="quick")


@pytest.mark.parametrize(
    "images, queries, keys, heads, width, expected",
    [
        (2, 1024, 1024, 8, 80, "xla"),  # Stable Diffusion 1.5, one guided image
        (2, 4096, 4096, 8, 40, "flash"),
        (2, 4096, 77, 8, 40, "xla"),
        (4, 1024, 1024, 8, 80, "flash"),
        (64, 256, 256, 8, 160, "xla"),
        (256, 4096, 77, 8, 40, "blocks"),
        (1, 4096, 4096, 1, 512, "xla"),  # its decoder
        (1, 9216, 9216, 1, 512, "flash"),
    ],
)
def test_auto_on_tpu_keeps_scores_on_the_chip(images, queries, keys, heads, width, expected, monkeypatch):
    """docs/tpu.md has the memory and the time of each as the compiler estimates them."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    q = jax.ShapeDtypeStruct((images, queries, heads, width), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((images, keys, heads, width), jnp.bfloat16)

    def program(implementation):
        return str(jax.make_jaxpr(lambda q, k, v: attention(q, k, v, implementation=implementation))(q, k, k))

    assert program("auto") == program(expected)
    with compilation.planned_for("tpu", devices=4):  # which share the images, as in sampling
        divided = program("auto")
    with compilation.without_kernels():
        differentiable = program("auto")
    assert divided == differentiable == program("xla" if expected == "flash" else expected)

"""Every implementation is the same function, with the same gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.attention import BLOCK, attention


def inputs(queries, keys=40, dtype=jnp.float32):
    q, k, v = (
        jax.random.normal(key, (2, length, 3, 8), dtype)
        for key, length in zip(jax.random.split(jax.random.key(0), 3), (queries, keys, keys), strict=True)
    )
    return q, k, v, jnp.arange(keys) < jnp.array([[keys], [keys // 2]])


@pytest.mark.parametrize("queries", [BLOCK - 1, BLOCK + 1, 2 * BLOCK])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_equal_one_softmax(queries, masked):
    q, k, v, mask = inputs(queries)
    mask = mask if masked else None

    def value_and_gradients(implementation):
        return jax.value_and_grad(
            lambda q, k, v: jnp.sum(jnp.sin(attention(q, k, v, mask, implementation))), (0, 1, 2)
        )(q, k, v)

    for ours, theirs in zip(
        jax.tree.leaves(value_and_gradients("blocks")), jax.tree.leaves(value_and_gradients("xla")), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


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
    with pytest.raises(ValueError, match="expected one of auto, blocks, xla, cudnn, got 'flash'"):
        attention(*inputs(3)[:3], implementation="flash")


@pytest.mark.parametrize(
    ("pixels", "width", "expected"), [(1024, 160, "xla"), (4096, 64, "xla"), (4096, 80, "blocks"), (9216, 40, "blocks")]
)
def test_auto_on_tpu_takes_what_the_compiler_expects_to_be_fastest(pixels, width, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    q = jax.ShapeDtypeStruct((2, pixels, 8, width), jnp.bfloat16)

    def program(implementation):
        return str(jax.make_jaxpr(lambda q, k, v: attention(q, k, v, implementation=implementation))(q, q, q))

    assert program("auto") == program(expected)

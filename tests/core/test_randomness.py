"""Numbers of keys in one pass are those of JAX, bit for bit."""

import jax
import numpy as np
import pytest

from diffusion_jax.core.randomness import in_one_pass

DRAWS = {
    "normal": jax.random.normal,
    "uniform": jax.random.uniform,
    "half": lambda key, shape: jax.random.normal(key, shape, "bfloat16"),
}


@pytest.mark.parametrize("shape", [(), (7,), (8, 8, 4)])
@pytest.mark.parametrize("draw", DRAWS)
def test_the_numbers_are_those_of_jax(draw, shape):
    keys = jax.random.split(jax.random.key(2**31 + 5), 3)

    def drawn(keys):
        return jax.vmap(lambda key: DRAWS[draw](jax.random.fold_in(key, 7), shape))(keys)

    one_pass = jax.jit(lambda keys: drawn(in_one_pass(keys)))
    np.testing.assert_array_equal(one_pass(keys), jax.jit(drawn)(keys))


def test_keys_of_the_usual_kind_change_their_generator():
    keys = jax.random.key(0)
    assert jax.random.key_impl(in_one_pass(keys)) != jax.random.key_impl(keys)


def test_other_keys_stay_as_they_are():
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 2)
    assert in_one_pass(keys) is keys

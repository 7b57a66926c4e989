"""Wrong types and shapes are errors while the tests run."""

import jax.numpy as jnp
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from diffusion_jax.core import process, schedules, solvers
from diffusion_jax.core.process import CLEAN


def test_a_wrong_type_is_an_error():
    with pytest.raises(BeartypeCallHintViolation):
        solvers.times(schedules.linear(), "3", "trailing")


def test_shapes_that_differ_where_they_must_not_are_an_error():
    x = jnp.zeros((2, 3))
    process.add_noise(x, x, CLEAN)
    with pytest.raises(TypeCheckError):
        process.add_noise(x, x[:1], CLEAN)

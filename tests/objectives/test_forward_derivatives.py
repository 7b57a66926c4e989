"""Methods with a derivative along the way use no kernel, which has a gradient alone."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax import compilation
from diffusion_jax.objectives import flow_map
from tests.objectives.test_flow_map import METHODS, SHAPE, made_model, waves


@jax.custom_vjp
def kernel(x):
    return x


kernel.defvjp(lambda x: (x, None), lambda _, change: (change,))


def chosen(params, x, level, to):
    """As networks choose their operations."""
    error = waves(params, x, level, to)
    return kernel(error) if compilation.has_kernels() else error


@pytest.mark.parametrize("method", ["mean_flow", "improved_mean_flow", "continuous_consistency", "lagrangian"])
def test_a_derivative_along_the_way_uses_no_kernel(method):
    student, teacher = made_model("linear, v", of_steps=method == "lagrangian", bump=chosen)
    function, options = METHODS[method]
    guide = flow_map.Teacher(teacher, defines_path=False)
    loss = flow_map.flow_map(student, function, 100, teacher=guide, **options)
    frozen = {"codec": {}, "conditioning": None, "null_cond": {}, "rest": {}, "teacher": teacher.params}
    frozen |= {"step": jnp.int32(99)}
    batch = {"latent": jnp.zeros((2, *SHAPE)), "cond": {}}
    keys = jax.random.split(jax.random.key(0), 2)
    gradient = jax.grad(lambda params: loss(params, frozen, batch, keys)[0])
    jax.jit(gradient).lower(student.params)  # raises if a kernel has to have a forward derivative
    assert compilation.has_kernels()

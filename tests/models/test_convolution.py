"""Every form of a convolution against XLA's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models import convolution
from diffusion_jax.models.convolution import SAME, convolve, convolve_repeated


def definition(x, kernel, padding=SAME, stride=1):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=dimensions)


def definition_repeated(x, kernel):
    return definition(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), kernel)


def arrays(shape, features):
    keys = jax.random.split(jax.random.key(0), 4)
    x, dx = (jax.random.normal(key, shape) for key in keys[:2])
    kernel, dkernel = (jax.random.normal(key, (3, 3, shape[-1], features)) for key in keys[2:])
    return (x, kernel), (dx, dkernel)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("features", [4, 256])  # fewer and more than there are pixels
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forms_of_a_convolution_are_equal(dtype, features, stride):
    (x, kernel), _ = jax.tree.map(lambda a: a.astype(dtype), arrays((2, 6, 5, 320), features))
    padding = [(0, 1), (1, 2)]
    out = convolve(x, kernel, padding, stride)
    assert out.dtype == dtype
    expected = definition(x.astype(jnp.float32), kernel.astype(jnp.float32), padding, stride)
    tolerance = 2**-8 if dtype == jnp.bfloat16 else 1e-5  # float32 sums, rounded once
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=tolerance, atol=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
def test_images_smaller_than_the_kernel(stride):
    (x, kernel), _ = arrays((64, 2, 2, 16), 8)
    result, wanted = (jax.vjp(lambda x, k, f=f: f(x, k, SAME, stride), x, kernel) for f in (convolve, definition))
    np.testing.assert_allclose(result[0], wanted[0], atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), result[1](wanted[0]), wanted[1](wanted[0]))


@pytest.mark.parametrize(
    ("ours", "expected", "shape", "name"),
    [
        (functools.partial(convolve, padding=SAME), definition, (2, 16, 16, 256), "_minimal"),
        (functools.partial(convolve, padding=SAME), definition, (2, 17, 16, 260), "_minimal"),
        (functools.partial(convolve, padding=SAME), definition, (1, 23, 25, 256), "_minimal"),
        (functools.partial(convolve, padding=SAME), definition, (2, 64, 64, 32), "_by_columns"),
        (convolve_repeated, definition_repeated, (2, 8, 9, 256), "_minimal_repeated"),
    ],
)
def test_large_convolutions_on_cpu_take_another_form(ours, expected, shape, name, monkeypatch):
    primals, tangents = arrays(shape, 258)
    calls = []
    form = getattr(convolution, name)
    monkeypatch.setattr(convolution, name, lambda *operands: calls.append(1) or form(*operands))
    result, wanted = (jax.jvp(f, primals, tangents) for f in (ours, expected))
    assert calls
    for a, b in zip(result, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * jnp.abs(b).max())
    pulled = (jax.vjp(f, *primals)[1](wanted[0]) for f in (ours, expected))
    # sums over all pixels, which XLA may add up one after another
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * jnp.abs(b).max()), *pulled)
    np.testing.assert_array_equal(jax.vmap(ours, (0, None))(primals[0][None], primals[1])[0], result[0])

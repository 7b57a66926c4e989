"""The recipe of `latent_cfg.py:imagenet256` against a few lines written from the paper, on data of a known denoiser.

JLT (arXiv 2605.27102) in its own terms: z = t x + (1 - t) e, t = 1 is clean, and the network gives x.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import latent_cfg
from diffusion_jax import build
from diffusion_jax import codec as codecs
from diffusion_jax.conditioning import class_labels
from diffusion_jax.core import sampling
from diffusion_jax.core.guidance import guided
from diffusion_jax.core.parameterization import NAMED
from diffusion_jax.core.process import NoiseLevel, Prediction
from diffusion_jax.model import DiffusionModel, Network
from diffusion_jax.objectives import levels
from tests.core import mixture
from tests.core.mixture import PLANE, Mixture

CONFIG = latent_cfg.get_config("imagenet256")
OTHER = PLANE._replace(means=PLANE.means[::-1] + 1.0, stds=PLANE.stds / 2)
BOTH = Mixture(*(np.concatenate(pair) for pair in zip(PLANE, OTHER, strict=True)))._replace(
    weights=np.concatenate([PLANE.weights, OTHER.weights]) / 2
)
OF_CLASS = {0: PLANE, 1: OTHER, 1000: BOTH}


def exact(z, t, label):
    """E[x | z, class], for z (B, 2), t (B,) and label (B,)."""

    def of_one(z, t):
        return [known.denoise(z[None], NoiseLevel(0.0, t, 1 - t)).x0[0] for known in OF_CLASS.values()]

    return jnp.select([label[:, None] == name for name in OF_CLASS], jax.vmap(of_one)(z, t))


def model(network=exact):
    """network: of the paper, (z, t, label) -> x."""

    def apply(params, x, t, cond, keys=None):
        return network(x, 1 - t / 1000, cond["label"])

    codec = codecs.identity()._replace(sample=lambda stats, record, keys: record, limit=None)
    schedule, prediction = build.model.schedule(CONFIG), NAMED[CONFIG.objective.prediction]
    return DiffusionModel(
        Network(apply, lambda key: {}), {}, schedule, prediction, codec, class_labels(1000), size=(1, 2)
    )


def data(size):
    """x (size, 2) of the mixture of each class, and the classes."""
    rng = np.random.default_rng(0)
    label, parts = rng.integers(2, size=size), rng.choice(3, size=size, p=PLANE.weights)
    means, stds = (np.stack([PLANE[i], OTHER[i]])[label, parts] for i in range(2))
    x = means + stds[:, None] * rng.normal(size=means.shape)
    return jnp.asarray(x, jnp.float32), jnp.asarray(label, jnp.int32)


def loss_of(network, size):
    loss, params, frozen = build.objective.objective(CONFIG.objective, model(network), jax.random.key(0))
    x, label = data(size)
    batch = {"latent": x, "cond": {"label": label}}
    return loss(params, frozen, batch, jax.random.split(jax.random.key(1), size))[0]


def test_the_loss_is_the_papers():
    seen = []

    def network(z, t, label):
        seen.append((z, t, label))
        return jnp.sin(z) + t[:, None]

    value, (x, _) = loss_of(network, 4096), data(4096)
    z, t, label = map(np.asarray, seen[0])
    v, v_net = ((target - z) / np.maximum(1 - t, 0.05)[:, None] for target in (x, np.sin(z) + t[:, None]))
    np.testing.assert_allclose(value, np.mean((v - v_net) ** 2), rtol=1e-4)
    noise = (z - t[:, None] * x) / (1 - t[:, None])
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.05)
    logit = np.log(t / (1 - t))
    np.testing.assert_allclose([logit.mean(), logit.std()], [-0.8, 0.8], atol=0.05)
    assert abs(np.mean(label == 1000) - 0.1) < 0.02


@pytest.mark.parametrize("prediction", ["x0", "flow"])
def test_the_weight_of_a_velocity_has_a_floor(prediction):
    """The error of the flow's output, eps - x0, has the weight 1 above it."""
    u = np.array([0.01, 0.04, 0.05, 0.3, 0.99])
    weight = levels.velocity_weight(NoiseLevel(1000 * u, 1 - u, u), NAMED[prediction])
    of_x0 = 1 / np.maximum(u, 0.05) ** 2
    np.testing.assert_allclose(weight, of_x0 if prediction == "x0" else u**2 * of_x0, rtol=1e-6)


def test_the_loss_is_least_at_the_exact_denoiser():
    def shifted(shift):
        return loss_of(lambda z, t, label: exact(z, t, label) + shift, 8192)

    slopes = [jax.grad(shifted)(shift) for shift in (-0.1, 0.0, 0.1)]
    assert abs(slopes[1]) < 0.05 * slopes[2] and abs(slopes[1]) < -0.05 * slopes[0]


def papers_sample(z, label, steps=50, scale=2.9):
    """Heun on a uniform grid in t, the last step Euler, guidance where 0.1 < t < 1."""
    null, network = np.full_like(label, 1000), jax.jit(exact)

    def velocity(z, t):
        times = jnp.full(len(z), t, jnp.float32)
        v, v_null = ((network(z, times, c) - z) / max(1 - t, 0.05) for c in (label, null))
        return v_null + (scale if 0.1 < t < 1 else 1.0) * (v - v_null)

    grid = np.linspace(0, 1, steps + 1)
    for t, t_next in itertools.pairwise(grid):
        v = velocity(z, t)
        trial = z + (t_next - t) * v
        z = z + (t_next - t) * (v + velocity(trial, t_next)) / 2 if t_next < 1 else trial
    return z


def our_sample(z, label, **changes):
    config = CONFIG.copy_and_resolve_references()
    config.sample.update(changes)
    ours = model()
    plan, rule = build.sampling.plan_and_guidance(config, ours)
    denoise = guided(ours.denoiser({}), rule, ours.conditioning.null, None)
    keys = jax.random.split(jax.random.key(0), len(z))
    return sampling.sample(denoise, plan, jnp.asarray(z), keys, {"label": jnp.asarray(label)}), plan


def test_a_sample_is_the_papers():
    rng = np.random.default_rng(0)
    z, label = jnp.asarray(rng.normal(size=(64, 2)), jnp.float32), rng.integers(2, size=64).astype(np.int32)
    expected = papers_sample(z, label)
    drawn, plan = our_sample(z, label)
    assert plan.num_rows == 99
    np.testing.assert_allclose(drawn, expected, atol=2e-3)
    for changes in ({"floor": 0.0}, {"guidance_interval": (0.0, 9.1)}, {"solver": "heun", "floor": None}):
        assert np.abs(our_sample(z, label, **changes)[0] - expected).max() > 5e-3, changes


def test_the_last_step_goes_two_fifths_of_the_way():
    z = np.zeros((1, 2), np.float32)
    (_, whole), (_, part) = (our_sample(z, np.zeros(1, np.int32), floor=floor) for floor in (None, 0.05))
    np.testing.assert_allclose([whole.x0[-1], whole.eps[-1]], [1, 0], atol=1e-12)
    np.testing.assert_allclose([part.x0[-1], part.eps[-1]], [1 - 0.6 * 0.02, 0.6 * 0.02], rtol=1e-9)
    np.testing.assert_array_equal(part.x0[:-5], whole.x0[:-5])


@pytest.mark.parametrize("floor", [None, 0.05])
def test_samples_have_the_moments_of_the_data(floor):
    """With a floor, those of the data and a little noise."""
    z, label = np.random.default_rng(0).normal(size=(20_000, 2)).astype(np.float32), np.zeros(20_000, np.int32)
    drawn, plan = our_sample(z, label, guidance=1.0, guidance_interval=(0.0, 0.0), floor=floor)
    u = mixture.run(plan, np.ones(1), lambda x, level: Prediction(np.zeros(1), x / level.sigma))[0]
    assert u == pytest.approx(0 if floor is None else 0.017136, abs=1e-6)
    mean, covariance = PLANE.moments()
    np.testing.assert_allclose(np.mean(drawn, axis=0), (1 - u) * mean, atol=0.03)
    np.testing.assert_allclose(np.cov(np.transpose(drawn)), (1 - u) ** 2 * covariance + u**2 * np.eye(2), atol=0.04)

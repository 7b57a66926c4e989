"""Guidance that a student learns from itself, on a mixture of two classes whose velocities are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from diffusion_jax import build
from diffusion_jax import codec as codecs
from diffusion_jax.conditioning import class_labels
from diffusion_jax.core import parameterization, schedules, solvers
from diffusion_jax.core.denoiser import target_time
from diffusion_jax.core.guidance import Guidance
from diffusion_jax.core.process import NoiseLevel
from diffusion_jax.model import DiffusionModel, Network
from diffusion_jax.objectives import few_step_methods, flow_map
from diffusion_jax.pipelines.generate import solve
from tests.core.mixture import PLANE, Mixture

OTHER = PLANE._replace(means=PLANE.means[::-1] + 1.0, stds=PLANE.stds / 2)
BOTH = Mixture(*(np.concatenate(pair) for pair in zip(PLANE, OTHER, strict=True)))._replace(
    weights=np.concatenate([PLANE.weights, OTHER.weights]) / 2
)
NULL, SCALE = 2, 6.0


def velocity(z, t, label):
    """E[eps - x0 | z, class] for z (B, 2), t (B,) and label (B,)."""

    def of_one(z, t):
        pairs = [known.denoise(z[None], NoiseLevel(0.0, 1 - t, t)) for known in (PLANE, OTHER, BOTH)]
        return [(pair.eps - pair.x0)[0] for pair in pairs]

    return jnp.select([label[:, None] == name for name in range(3)], jax.vmap(of_one)(z, t))


def made_model(function, takes_scale=True, takes_interval=True):
    """function: (params, z, t, cond) -> the network's output, times in [0, 1]."""

    def apply(params, x, t, cond, keys=None):
        return function(params, x, t / 1000, cond)

    codec = codecs.identity()._replace(sample=lambda stats, record, keys: record, limit=None)
    network = Network(apply, flow_map=True, takes_scale=takes_scale, takes_interval=takes_interval)
    conditioning = class_labels(NULL)
    return DiffusionModel(network, {}, schedules.flow(), parameterization.flow, codec, conditioning, size=(1, 2))


def loss_of(model, method, params, size=64, **options):
    """The loss for `size` examples of both classes."""
    rng = np.random.default_rng(0)
    label, parts = rng.integers(2, size=size), rng.choice(3, size=size, p=PLANE.weights)
    means, stds = (np.stack([PLANE[i], OTHER[i]])[label, parts] for i in range(2))
    x0 = jnp.asarray(means + stds[:, None] * rng.normal(size=means.shape), jnp.float32)
    batch = {"latent": x0, "cond": {"label": jnp.asarray(label, jnp.int32)}}
    frozen = {"codec": {}, "conditioning": {}, "rest": {}, "null_cond": {"label": NULL}, "step": jnp.int32(50)}
    loss = flow_map.flow_map(model, method, 100, teacher=flow_map.OwnGuidance(SCALE), **options)
    return loss(params, frozen, batch, jax.random.split(jax.random.key(1), size))[0]


def fraction(time):
    """The sigma of a time in the unit of cond["to"], on flow."""
    tangent = jnp.tan(time * jnp.pi / 2000)
    return jnp.where(time >= 1000, 1.0, tangent / (1 + tangent))


def test_the_target_is_that_of_improved_mean_flow():
    """As in the code of its authors, of any student: guidance at t inside the interval, and none without condition."""
    seen = []

    def paper(z, t, r, w, low, high, label):
        wave = jnp.sin(2 * z[:, ::-1] + label[:, None]) * jnp.cos(3 * t + w)[:, None]
        return wave + (r**2 + high - low)[:, None] * z

    def network(params, z, t, cond):
        seen.append({"z": z, "t": t, **cond})
        low, high = fraction(cond["interval"]).T
        return paper(z, t, fraction(cond["to"]), cond["guidance"], low, high, cond["label"])

    def method(path, maps):
        seen.append((path, few_step_methods.improved_mean_flow()(path, maps)))
        return seen[-1][1]

    loss_of(made_model(network), method, {}, plain=0.3, drop=0.3)
    path, target = next(entry for entry in seen if isinstance(entry, tuple))
    label, w, interval = (seen[-1][name] for name in ("label", "guidance", "interval"))
    low, high = fraction(interval).T
    t, r, is_plain = target.u, target.to, np.asarray(low == 0)
    z, none, one = path.at(t), jnp.full_like(label, NULL), jnp.ones_like(t)
    w_at = jnp.where((low <= t) & (t <= high) & (label != NULL), w, 1.0)
    v_c, v_u = paper(z, t, t, w_at, 0 * t, one, label), paper(z, t, t, one, 0 * t, one, none)
    v_g = path.eps - path.x0 + (1 - 1 / w_at)[:, None] * (v_c - v_u)
    out, change = jax.jvp(lambda z, t, r: paper(z, t, r, w, low, high, label), (z, t, r), (v_c, one, 0 * t))
    V = out + (t - r)[:, None] * change
    np.testing.assert_allclose(out - target.out, V - v_g, atol=2e-3)
    # all cases are there
    inside = np.asarray((low <= t) & (t <= high))
    assert all(0.1 < np.mean(case) < 0.9 for case in (inside, is_plain, label == NULL))
    assert 0.3 < np.mean(w < SCALE**0.5) < 0.7 and 1 <= w.min() < 1.2 and 0.9 * SCALE < w.max() <= SCALE
    assert 0.4 < low[~is_plain].max() < 0.5 < high[~is_plain].min() < 0.6
    np.testing.assert_allclose(high[is_plain], 1)


@pytest.mark.parametrize("takes_scale", [True, False])
def test_training_ends_at_the_guided_velocity(takes_scale):
    """Plain regression, where what the student says of guidance comes from: the slope is zero there, and leads back."""

    def network(wrong, z, t, cond):
        w = cond["guidance"] if takes_scale else jnp.full_like(t, SCALE)
        null = velocity(z, t, jnp.full_like(cond["label"], NULL))
        return null + (w * (1 + wrong))[:, None] * (velocity(z, t, cond["label"]) - null)

    model = made_model(network, takes_scale, takes_scale)
    slope = jax.jit(jax.grad(lambda wrong: loss_of(model, few_step_methods.shortcut(), wrong, size=2048, plain=1.0)))
    low, exact, high = (float(slope(wrong)) for wrong in (-0.3, 0.0, 0.3))
    assert abs(exact) < 0.2 * min(-low, high), (low, exact, high)


@pytest.mark.parametrize(
    ("interval", "times"), [(None, (0, 1000)), ((0.5, 2.0), target_time(NoiseLevel(0, 1, jnp.array([0.5, 2.0]))))]
)
def test_sampling_gives_scale_and_interval_to_the_network(interval, times):
    """The network's output is such that x0 is what it was told."""

    def network(params, z, t, cond):
        seen = jnp.stack([cond["guidance"], *cond["interval"].T], axis=-1)
        return z - seen[:, None, None]  # on flow, x0 = z - output

    model = made_model(network)
    model = model._replace(codec=model.codec._replace(channels=3), size=(1, 1))
    keys, scale = jax.random.split(jax.random.key(0), 3), jnp.array([1.0, 3.0, 5.0])
    plan, x = solvers.ddim(model.schedule, 1), jnp.ones((3, 1, 1, 3))
    seen = solve(model, x, {"label": jnp.arange(3)}, keys, plan, Guidance(scale, interval=interval))[:, 0, 0]
    np.testing.assert_allclose(seen, np.stack([scale, *np.outer(times, np.ones(3))], axis=-1), rtol=1e-4)


@pytest.mark.parametrize(
    "name, value", [("negative_prompt", "3"), ("rescale", 0.5), ("guidance_interval", (0.1, 2.0)), ("cfg_pp", True)]
)
def test_what_only_guidance_has_is_refused(name, value):
    config = digits.get_config()
    model = build.model.diffusion_model(config)
    takes_scale = model._replace(network=model.network._replace(takes_scale=True))
    build.sampling.plan_and_guidance(config, takes_scale)
    config.sample.update({name: value, "guidance": 1.0 if name == "cfg_pp" else 2.0, "solver": "ddim"})
    build.sampling.plan_and_guidance(config, model)
    with pytest.raises(ValueError, match=f"sample.{name}: this model takes the guidance scale as an input"):
        build.sampling.plan_and_guidance(config, takes_scale)
    if name == "guidance_interval":
        takes_both = takes_scale._replace(network=takes_scale.network._replace(takes_interval=True))
        build.sampling.plan_and_guidance(config, takes_both)

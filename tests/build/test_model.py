"""Every combination of prediction, schedule, spacing and space that a config accepts samples and trains correctly."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, digits
from diffusion_jax import build
from diffusion_jax.core.process import expand
from diffusion_jax.core.solvers.plan import SPACINGS
from diffusion_jax.model import Network
from diffusion_jax.models.layers import sinusoidal_embedding
from diffusion_jax.pipelines import generate

STD = 0.4  # of the data, independent normal numbers
ZERO = "zero terminal SNR"
SPACES = [
    *((prediction, "latents") for prediction in build.model.PARAMETERIZATIONS),
    ("eps", "pixels"),
    ("v", "pixels"),
]
COMBINATIONS = [
    (prediction, schedule, space)
    for (prediction, space), schedule in itertools.product(SPACES, [*build.model.SCHEDULES, ZERO])
    if (prediction, schedule) != ("eps", ZERO)  # which is refused
]
FEW, MOST = 20, 1280  # steps
ROUGH, CLOSE = 0.2, 0.05  # errors of a standard deviation, relative; the network's own are 0.025


def config_of(prediction, schedule, space="pixels"):
    config = digits.get_config()
    config.model.update(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    config.model.update(norm_num_groups=4, attention_head_dim=8, layers_per_block=1)
    config.schedule.update(name=schedule, sigma_max=8.0)  # the end of edm, 20 times the data
    if schedule == ZERO:
        config.schedule.update(name="scaled_linear", zero_terminal_snr=True)
    config.objective.update(prediction=prediction, sigma_data=STD)
    config.sample.steps = FEW
    if space == "latents":
        small = {"block_out_channels": (4, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 1}
        config.autoencoder.update(kind="kl", checkpoint="", model=small)
        config.model.update(in_channels=4, out_channels=4)
    return config


@functools.cache
def model_of(prediction, schedule, space):
    return build.model.diffusion_model(config_of(prediction, schedule, space), (16, 16))


def ideal(params, x, t, cond, keys=None):
    """The best answer for the data, and the error of 0.01 that every network makes.

    params: at the times of a plan what the network knows: the factor of its input, its level and what it says.
    """
    at = jnp.argmin(jnp.abs(params["t"] - t[:, None]), axis=1)
    alpha, sigma, p, q, factor = (expand(params[name][at], x) for name in ("alpha", "sigma", "p", "q", "factor"))
    x_t = x / factor
    mean = x_t / (alpha**2 * STD**2 + sigma**2)
    return p * alpha * STD**2 * mean + q * sigma * mean + 0.01 * jnp.cos(100 * x_t)


def knowledge(parameterization, level):
    """Of MOST levels, the last one repeated, so that plans of any length are sampled by one program."""
    level = jax.tree.map(lambda value: jnp.float32(np.pad(value, (0, MOST - len(value)), mode="edge")), level)
    factor, t = parameterization.inputs(jnp.ones(MOST), level)
    p, q = (jnp.broadcast_to(part, t.shape) for part in parameterization.coefficients(level))
    return {"t": t, "alpha": level.alpha, "sigma": level.sigma, "p": p, "q": q, "factor": factor}


def deviation(model, config) -> float:
    """How far the standard deviation of what is sampled is from the data's, relative."""
    plan, count = build.sampling.plan(config, model), 4096 // np.prod(model.shape)
    exact = model._replace(network=Network(ideal), params=knowledge(model.parameterization, plan.level))
    keys = jax.random.split(jax.random.key(0), count)
    cond = model.conditioning.of_prompts(["3"] * count)
    x0 = generate.solve(exact, generate.noise(exact, keys, plan.initial), cond, keys, plan)
    return abs(float(jnp.std(x0)) / STD - 1)


@pytest.mark.parametrize("prediction, schedule, space", COMBINATIONS)
def test_a_network_that_errs_a_little_samples_the_data(prediction, schedule, space):
    """Roughly in few steps as they are spaced by default; the better the more they are, however they are spaced."""
    model, config = model_of(prediction, schedule, space), config_of(prediction, schedule)
    assert deviation(model, config) < ROUGH
    for spacing in SPACINGS:
        config.sample.update(spacing=spacing, steps=FEW)
        most = model.useful_schedule.num_steps or MOST
        while (distance := deviation(model, config)) > CLOSE:
            assert config.sample.steps < most, (spacing, distance)
            config.sample.steps = min(8 * config.sample.steps, most)


def linear(params, x, t, cond, keys=None):
    return params * x


@pytest.mark.parametrize("prediction, schedule, space", COMBINATIONS)
def test_every_objective_has_a_loss_and_a_gradient(prediction, schedule, space):
    model = model_of(prediction, schedule, space)._replace(network=Network(linear, lambda key: jnp.float32(0.1)))
    record = jax.eval_shape(model.codec.encode, model.codec.params, jax.ShapeDtypeStruct((32, 16, 16, 3), jnp.uint8))
    images = jax.random.randint(jax.random.key(1), (32, 16, 16, 3), 0, 256).astype(jnp.uint8)
    latent = images if space == "pixels" else 0.1 * jax.random.normal(jax.random.key(1), record.shape)
    batch = {"latent": latent, "cond": model.conditioning.of_prompts(["3"] * 32)}
    keys = jax.random.split(jax.random.key(2), 32)
    section = config_of(prediction, schedule).objective
    for levels, weight in itertools.product(["", *build.objective.LEVELS], build.objective.WEIGHTS):
        section.update(levels=levels, weight=weight)
        loss, params, frozen = build.objective.objective(section, model, jax.random.key(0))
        value, slope = jax.value_and_grad(lambda p: loss(p, frozen, batch, keys)[0])(params)  # noqa: B023
        assert value > 0 and jnp.isfinite(value) and jnp.isfinite(slope) and slope != 0, (levels, weight)


def levels_of(section, model, size=4000):
    """(log(sigma / alpha), loss) of the levels that training with config.objective draws."""
    times = []

    def apply(params, x, t, cond, keys=None):
        times.append(t)
        return params * jnp.ones_like(x)

    model = model._replace(network=Network(apply, lambda key: jnp.float32(0.0)))
    loss, params, frozen = build.objective.objective(section, model, jax.random.key(0))
    images = jax.random.randint(jax.random.key(1), (size, 16, 16, 3), 0, 256).astype(jnp.uint8)
    batch = {"latent": images, "cond": model.conditioning.of_prompts(["3"] * size)}
    value, _ = loss(params, frozen | {"step": 0}, batch, jax.random.split(jax.random.key(2), size))
    level = model.schedule(times[-1])  # the last call is the student's, the ones before are the target's
    return np.log(level.sigma / level.alpha), float(value)


@pytest.mark.parametrize(
    ("name", "levels", "mean", "std"),
    [
        ("continuous_consistency", "", -1.0, 1.4),  # Lu & Song 2024
        ("consistency_training", "", -1.1, 2.0),  # Geng et al. 2024
        ("consistency_training", "lognormal_scm", -1.0, 1.4),
        ("continuous_consistency", "lognormal", -1.2, 1.2),  # Karras et al. 2022
    ],
)
def test_few_step_training_draws_the_levels_of_its_paper_or_those_that_are_set(name, levels, mean, std):
    model, section = model_of("v", "cosine", "pixels"), config_of("v", "cosine").objective
    section.update(name=name, levels=levels, weight="")
    ratio, _ = levels_of(section, model)
    quarters = mean + std * np.array([-0.6745, 0, 0.6745])
    np.testing.assert_allclose(np.quantile(ratio, [0.25, 0.5, 0.75]), quarters, atol=0.12)


def test_few_step_training_weighs_errors_as_it_is_told():
    """v's error at a level counts alpha sigma times as much when that of x0 counts alpha / sigma times."""
    model, section = model_of("v", "cosine", "pixels"), config_of("v", "cosine").objective
    section.update(name="continuous_consistency", warm_up=1.0, levels="laplace", drop=0.0)  # at first plain regression
    values = {}
    for weight in ("relative", "uniform", "inverse_noise"):
        section.weight = weight
        _, values[weight] = levels_of(section, model, size=1000)
    assert values["relative"] == pytest.approx(values["uniform"], rel=1e-4)
    assert 0.4 * values["uniform"] < values["inverse_noise"] < 0.5 * values["uniform"]  # alpha sigma is 1/2 at most


@pytest.mark.parametrize("is_map", [False, True])
def test_a_consistency_model_of_edm_spends_no_call_on_clean_data(is_map):
    """Whether the network is an ordinary one or a map: the solver says how long its last step is."""
    model, config = model_of("edm", "edm", "pixels"), config_of("edm", "edm")
    model = model._replace(network=model.network._replace(flow_map=is_map))
    config.sample.update(solver="consistency", steps=4)
    sigma = build.sampling.plan(config, model).level.sigma
    np.testing.assert_allclose(sigma, model.schedule.at(np.array([1, 0.75, 0.5, 0.25])))
    assert sigma[-1] > 10 * model.schedule.t_min
    config.sample.solver = "ddim"
    assert (build.sampling.plan(config, model).level.sigma[-1] > 10 * model.schedule.t_min) == is_map


@pytest.mark.parametrize(
    ("schedule", "prediction", "T", "expected"),
    [
        ("cosine", "v", 1000, 50),
        ("flow", "flow", 1000, 50),
        ("linear", "eps", 100, 5),
        ("edm", "v", 1000, 0),
        ("edm", "edm", 1000, 0),
        ("cosine", "edm", 1000, 0),
    ],
)
def test_the_derivative_in_time_is_smoothed_in_the_network_s_unit_of_time(schedule, prediction, T, expected):
    """Over a tenth of its steps; not at all where the time is sigma or its logarithm."""
    config = config_of(prediction, schedule)
    config.schedule.T = T
    smoothing = build.model.network(config).time_smoothing
    np.testing.assert_allclose(smoothing, expected, rtol=0.02, atol=0.1)
    if not expected:
        slopes = [
            jax.jvp(lambda t, s=s: sinusoidal_embedding(t, 32, smoothing=s), (jnp.ones(1),), (jnp.ones(1),))[1]
            for s in (smoothing, 0.0)
        ]
        np.testing.assert_allclose(*slopes, atol=0.01)
    config.model.time_smoothing = 7.0
    assert build.model.network(config).time_smoothing == 7


def first_update(kind, leaves, scale=1.0):
    section = common.optimizer(1e-2, warmup=0)
    section.kind = kind
    optimizer, gradients = build.objective.optimizer(section, 10), jax.tree.map(lambda leaf: scale * leaf, leaves)
    return optimizer.update(gradients, optimizer.init(leaves), leaves)[0]["layer"]


@pytest.mark.parametrize("shape", [(3, 3, 8, 16), (1, 1, 32, 8), (24, 40)])
def test_muon_turns_every_direction_of_a_kernel_by_the_same_angle(shape):
    kernel = jax.random.normal(jax.random.key(0), shape)
    leaves = {"layer": {"kernel": kernel, "bias": jnp.arange(1.0, 9.0), "embedding": kernel.reshape(-1, shape[-1])}}
    muon, adamw = (first_update(kind, leaves) for kind in ("muon", "adamw"))
    values = np.linalg.svd(np.reshape(muon["kernel"], (-1, shape[-1])), compute_uv=False)
    assert values.max() < 1.8 * values.min()
    assert np.sqrt(np.mean(np.square(muon["kernel"]))) == pytest.approx(0.2e-2, rel=0.35)  # 0.2 of the rate, as AdamW's
    for name in ("bias", "embedding"):  # no kernels: the first step of Adam with Nesterov's momentum
        np.testing.assert_allclose(muon[name] / adamw[name], 0.9 * 0.1 / (1 - 0.9**2) + 1, rtol=1e-3)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_an_update_does_not_depend_on_the_scale_of_the_loss(kind):
    leaves = {"layer": {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 8, 16)), "bias": jnp.ones(8)}}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6),
        first_update(kind, leaves),
        first_update(kind, leaves, scale=100.0),
    )


def test_an_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'; known: adamw, muon"):
        first_update("sgd", {"layer": {"kernel": jnp.ones((2, 2))}})

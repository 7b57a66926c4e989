"""Flow maps, on data whose maps are known: a Gaussian, for any schedule and prediction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import codec
from diffusion_jax.conditioning import unconditional
from diffusion_jax.core import parameterization, schedules, solvers
from diffusion_jax.core.denoiser import denoiser, target_time
from diffusion_jax.core.process import CLEAN, NoiseLevel, expand
from diffusion_jax.core.sampling import initial_noise, sample
from diffusion_jax.model import DiffusionModel, Network, network_of
from diffusion_jax.models.unet import UNet
from diffusion_jax.objectives import few_step_methods, flow_map, levels
from diffusion_jax.objectives.flow_map import level_function

MEAN, STD = jnp.array([1.0, -0.5, 0.2]), jnp.array([0.5, 0.3, 0.8])
SHAPE = (1, 1, 3)
METHODS = {
    "distillation": (few_step_methods.distillation(16), {}),
    "consistency_distillation": (few_step_methods.consistency_distillation(256), {}),
    "consistency_training": (few_step_methods.consistency_training(), {}),
    "soflow": (few_step_methods.soflow(), {}),
    "shortcut": (few_step_methods.shortcut(), {"plain": 0.25}),
    "mean_flow": (few_step_methods.mean_flow(), {}),
    "improved_mean_flow": (few_step_methods.improved_mean_flow(), {"plain": 0.25}),
    "continuous_consistency": (few_step_methods.continuous_consistency(), {}),
    "lagrangian": (few_step_methods.lagrangian(), {"plain": 0.5}),
    "consistency_training, taught": (few_step_methods.consistency_training(), {}),
    "soflow, taught": (few_step_methods.soflow(), {}),
    "mean_flow, taught": (few_step_methods.mean_flow(), {}),
    "improved_mean_flow, taught": (few_step_methods.improved_mean_flow(), {"plain": 0.25}),
    "continuous_consistency, taught": (few_step_methods.continuous_consistency(), {}),
    "guidance_distillation": (few_step_methods.guidance_distillation(), {}),
}
SCHEDULES = {
    "cosine": (schedules.cosine(), parameterization.v),
    "flow": (schedules.flow(), parameterization.flow),
    "linear": (schedules.linear(), parameterization.x0),
    "scaled_linear": (schedules.scaled_linear(), parameterization.eps),
    "zero_terminal_snr": (schedules.zero_terminal_snr(schedules.linear()), parameterization.v),
    "edm": (schedules.edm(0.01, 20.0), parameterization.edm(0.6)),
}
OTHERS = {  # tried where a method may diverge
    "linear, v": (schedules.linear(), parameterization.v),
    "edm, v": (schedules.edm(), parameterization.v),
    "cosine, edm": (schedules.cosine(), parameterization.edm(0.6)),
    "sigmoid, flow": (schedules.sigmoid(), parameterization.flow),
}
TOTALS = {"flow": lambda to: to.alpha + to.sigma, "edm": lambda to: to.alpha}  # 1 on the schedule


def spread(level):
    return jnp.sqrt(expand(level.alpha, MEAN[None]) ** 2 * STD**2 + expand(level.sigma, MEAN[None]) ** 2)


def reached(x, level, to):
    """The exact state at `to` of x (B, 3): the probability flow of a Gaussian."""
    ratio = spread(to) / spread(level)
    return expand(to.alpha, x) * MEAN + ratio * (x - expand(level.alpha, x) * MEAN)


def exact_x0(x, level):
    alpha = expand(level.alpha, x)
    return MEAN + alpha * STD**2 / spread(level) ** 2 * (x - alpha * MEAN)


def level_of_target_time(time):
    angle = time * jnp.pi / 2000
    return NoiseLevel(0.0 * time, jnp.cos(angle), jnp.sin(angle))


def waves(params, x, level, to):
    """params times a bump; `to` is a time of a target."""
    return params * (jnp.sin(3 * x[:, ::-1]) + jnp.cos(to / 300)[:, None])


def made_model(name, wrong=0.0, of_steps=False, bump=waves):
    """Two models: one says the exact map plus a bump, the other, a teacher, is the exact denoiser.

    wrong: params of the bump.
    of_steps: the bump vanishes where a step has no length.
    """
    schedule, says = (SCHEDULES | OTHERS)[name]

    def out_of(x, level, to):
        """The output of the exact map. The target comes by its angle, so its scale is restored."""
        if name in TOTALS:
            total = TOTALS[name](to)
            to = NoiseLevel(to.t, to.alpha / total, to.sigma / total)
        a, b = (expand(value, x) for value in says.step(level, to))
        near = jnp.abs(b) < 1e-4
        x0 = exact_x0(x, level)
        eps = (x - expand(level.alpha, x) * x0) / jnp.maximum(expand(level.sigma, x), 1e-6)
        return jnp.where(near, says.target(x0, eps, level), (reached(x, level, to) - a * x) / jnp.where(near, 1.0, b))

    def flat(function, params, x, t, cond, keys=None):
        level = schedule({"flow": lambda: t / 1000, "edm": lambda: jnp.exp(4 * t)}.get(name, lambda: t)())
        scale = (level.sigma**2 + 0.36) ** 0.5 if name == "edm" else 1.0  # as edm scales its input
        seen = x.reshape(len(x), 3)
        return function(params, seen, seen * expand(scale, seen), level, cond).reshape(x.shape)

    def student(params, seen, x, level, cond):
        error = bump(params, seen, level, cond["to"])
        if of_steps:
            error *= expand(1 - cond["to"] / target_time(level), error)
        return out_of(x, level, level_of_target_time(cond["to"])) + error

    def teacher(params, seen, x, level, cond):
        x0 = exact_x0(x, level)
        eps = (x - expand(level.alpha, x) * x0) / jnp.maximum(expand(level.sigma, x), 1e-6)
        return says.target(x0, eps, level)

    def model(function, is_map):
        network = Network(functools.partial(flat, function), flow_map=is_map)
        params = jax.tree.map(jnp.float32, wrong)
        return DiffusionModel(network, params, schedule, says, codec.identity(), unconditional(), (1, 1))

    return model(student, True), model(teacher, False)


def made_maps(output, says, level):
    """Of a student with this output."""

    def own(x, u):
        return says.predict(x, output(x, u, u), level(u))

    return flow_map.Maps(output, own, says, lambda u, to: says.step(level(u), level(to)))


def gradients(name, method, batch=32768, step=99):
    """d loss / d params, and its standard error: at the exact map, and where params is 1."""
    # what the Lagrangian method learns at the end of a step is what the student says there
    student, teacher = made_model(name, of_steps=method == "lagrangian")
    function, options = METHODS[method]
    guide = flow_map.Teacher(teacher, defines_path=method.endswith("taught"))
    loss = flow_map.flow_map(student, function, 100, teacher=guide, **options)
    keys = jax.random.split(jax.random.key(1), batch)
    x0 = MEAN + STD * jax.random.normal(jax.random.key(2), (batch, *SHAPE))
    frozen = {"codec": {}, "conditioning": None, "null_cond": {}, "rest": {}, "teacher": teacher.params}
    frozen |= {"step": jnp.int32(step)}

    def one(params, x0, key):
        return loss(params, frozen, {"latent": x0[None], "cond": {}}, key[None])[0]

    # not compiled as one program, whose parts all cases share
    of_each = jax.vmap(jax.vmap(jax.grad(one), (None, 0, 0)), (0, None, None))(jnp.array([0.0, 1.0]), x0, keys)
    assert np.isfinite(of_each).all()
    return [(float(values.mean()), float(values.std() / batch**0.5)) for values in of_each]


def is_tied(name, method):
    """Whether the method has a say in every part of the output."""
    along = method.split(",")[0] in ("mean_flow", "improved_mean_flow", "continuous_consistency")
    return not (along and SCHEDULES[name][1] is parameterization.x0)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if name in ("cosine", "flow") else pytest.mark.slow)
        for name in SCHEDULES
        for method in METHODS
        if is_tied(name, method)
    ],
)
def test_the_exact_map_is_where_training_ends(name, method):
    """No gradient at the exact map, to within sampling error and the method's own bias; a clear one beside it."""
    (mean, error), (beside, its_error) = gradients(name, method)
    assert abs(mean) < 4 * error + 0.05 * abs(beside), (mean, error, beside)
    assert beside > 4 * its_error


@pytest.mark.parametrize("method", [method for method in METHODS if not is_tied("linear", method)])
def test_the_derivative_along_the_way_does_not_determine_x0(method):
    with pytest.raises(ValueError, match="need a network that predicts eps, v, flow or edm, got x0"):
        gradients("linear", method, batch=2)


def linear_effect(name, method, other_end, by_end=False, size=400):
    """(angle, c1, c2, weight), each (size,): what a method makes of an error e of the output, -(c1 e + c2 de/dangle).

    The data are zero, where the exact output is zero, so a target of any output e shows the change of e. The times of a
    step's start run over the whole schedule, or those of its end if `by_end`; the other end is at `other_end`.
    """
    schedule, says = (SCHEDULES | OTHERS)[name]
    if says is parameterization.eps:
        schedule = schedules.below(schedule)
    moving = jnp.linspace(0.004 if by_end else max(other_end, 0.004), other_end if by_end else 1.0, size + 4)[2:-2]
    level = level_function(schedule)
    key = next(k for k in jax.random.split(jax.random.key(0), 9) if jax.random.uniform(jax.random.fold_in(k, 2)) > 0.5)
    first = jax.random.key_data(jax.random.fold_in(key, 0))
    zero = jnp.zeros((size, 1))

    def drawn(keys):
        return jnp.where((jax.random.key_data(keys) == first).all(-1), moving, other_end)

    path = flow_map.Path(
        zero,
        zero,
        lambda u: (zero, zero),
        level,
        lambda ratio: schedule.fraction_of(schedule.t_of_logsnr(-2 * jnp.log(ratio))),
        drawn,
        jnp.repeat(key[None], size, axis=0),
        jnp.float32(0.9999),
    )

    def target_of(error):
        def output(x, u, to):  # no error of the velocity itself, which plain regression teaches
            return jnp.where(u == to, 0.0, error(to if by_end else u))[:, None] + 0 * x

        maps = made_maps(output, says, level)
        return METHODS[method][0](path, maps)

    one, ramp = target_of(jnp.ones_like), target_of(lambda u: u)
    at = moving if by_end else one.u
    scale = one.weight * (2.0**8 if method == "soflow" else 1.0)  # of its last gap
    c1 = scale * (1 - one.out[:, 0])
    c2 = scale * (at - ramp.out[:, 0]) - c1 * at
    speed = jax.jvp(lambda u: jnp.arctan2(level(u).sigma, level(u).alpha), (at,), (jnp.ones_like(at),))[1]
    angle = jnp.arctan2(level(at).sigma, level(at).alpha)
    weight = levels.relative_weight(level(one.u), says)
    return tuple(np.asarray(value, np.float64) for value in (angle, c1, c2 * speed, weight))


def contraction(angle, c1, c2, weight):
    """The symmetric part of the operator c1 + c2 d/dangle, of errors that count with `weight`; c1 - c2' / 2 for 1."""
    return c1 - np.gradient(weight * c2, angle) / (2 * weight)


@pytest.mark.parametrize(
    ("method", "other_end"),
    [
        ("mean_flow", 0.0),
        ("mean_flow", 0.3),
        ("improved_mean_flow", 0.3),
        ("continuous_consistency", 0.0),
        ("consistency_training", 0.0),
        ("soflow", 0.0),
        ("soflow", 0.3),
    ],
)
@pytest.mark.parametrize(
    "name", [name for name, (_, says) in (SCHEDULES | OTHERS).items() if says is not parameterization.x0]
)
def test_errors_shrink_along_the_path_on_every_schedule(name, method, other_end):
    """p(x | angle) is conserved along the path, so an error shrinks where the symmetric part is positive. For v on a
    schedule that preserves the variance, with sCM's gain, it is 1/2 everywhere.
    """
    angle, c1, c2, weight = linear_effect(name, method, other_end)
    number = contraction(angle, c1, c2, weight)[2:-2]
    assert number.min() > 0.1, number.min()
    if (SCHEDULES | OTHERS)[name][1] is parameterization.v and method != "soflow":
        np.testing.assert_allclose(number, 0.5, atol=0.1)


@pytest.mark.parametrize("start", [1.0, 0.6, 0.2])
@pytest.mark.parametrize(
    "name", [name for name, (_, says) in (SCHEDULES | OTHERS).items() if says is not parameterization.eps]
)
def test_errors_shrink_along_the_end_of_a_step(name, start):
    """The Lagrangian method. An eps of zero is that of no data, so this prediction is left out."""
    assert contraction(*linear_effect(name, "lagrangian", start, by_end=True))[2:-2].min() > 0.1


@pytest.mark.parametrize("name", ["edm, v", "cosine", "flow"])
def test_consistency_training_has_the_gap_and_the_weight_of_its_paper(name):
    """ECT (Geng et al. 2024): r = t (1 - n(t) / 2^a), n(t) = 1 + 8 sigmoid(-t), and 1 / (t - r) on the error of x0."""
    schedule, says = (SCHEDULES | OTHERS)[name]
    level, asked = level_function(schedule), []
    u = jnp.linspace(0.05, 0.99, 40)
    zero = jnp.zeros((40, 1))

    def output(x, u, to):
        asked.append(u)
        return zero

    maps = made_maps(output, says, level)
    time_of = lambda ratio: schedule.fraction_of(schedule.t_of_logsnr(-2 * jnp.log(ratio)))  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 40)
    for halvings in (0, 1, 4, 8):
        progress = jnp.float32((halvings + 0.5) / 9)
        path = flow_map.Path(zero, zero, lambda u: (zero, zero), level, time_of, lambda keys: u, keys, progress)
        target = few_step_methods.consistency_training(8.0)(path, maps)
        start, nearer = (NoiseLevel(*(np.float64(v) for v in level(times))) for times in (u, asked[-1]))
        t = start.sigma / start.alpha
        r = np.maximum(t * (1 - (1 + 8 / (1 + np.exp(t))) / 2**halvings), 0)
        seen = r > 1.1 * float(level(jnp.array([2e-3])).sigma[0])  # less noise than this is taken for none
        np.testing.assert_allclose((nearer.sigma / nearer.alpha)[seen], r[seen], rtol=0.01)
        weight = np.asarray(target.weight * levels.inverse_noise_weight(level(u), says))
        _, b = says.step(level(u), level(0 * u))
        np.testing.assert_allclose(weight, np.asarray(b) ** 2 / (t - r), rtol=1e-3)


def small_network(params, x, level, to):
    """A bump with many parameters: a network of one layer."""
    angles = jnp.stack([target_time(level), to], axis=-1) * jnp.pi / 2000
    h = jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.tanh(h @ params["in"] + params["bias"]) @ params["out"]


DIVERGED = [  # what the length of the chord, as the reach of a step, kept away from the exact map, and relatives
    *(("linear, v", method) for method in ("continuous_consistency", "mean_flow", "lagrangian", "soflow")),
    *((name, "continuous_consistency") for name in ("cosine", "edm, v")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), DIVERGED)
def test_a_short_training_leads_back_to_the_exact_map(name, method, steps=400, batch=512):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"in": 1.5 * jax.random.normal(keys[0], (7, 32)), "bias": jax.random.normal(keys[1], 32)}
    params["out"] = 0.2 * jax.random.normal(keys[2], (32, 3))
    student, teacher = made_model(name, params, of_steps=method == "lagrangian", bump=small_network)
    function, options = METHODS[method]
    # the teacher's path, which is exact, so that the error alone is seen, not the noise of its estimate
    guide = None if method == "lagrangian" else flow_map.Teacher(teacher, defines_path=True)
    loss = flow_map.flow_map(student, function, steps, teacher=guide, **options)
    optimizer = optax.adam(2e-3)
    frozen = {"codec": {}, "conditioning": None, "null_cond": {}, "rest": {}, "teacher": teacher.params}

    def step(carry, number):
        params, state = carry
        drawn = jax.random.split(jax.random.fold_in(keys[3], number), batch + 1)
        x0 = MEAN + STD * jax.random.normal(drawn[0], (batch, *SHAPE))
        gone_by = frozen | {"step": jnp.maximum(number, 3 * steps // 4)}  # as late in a training
        gradient = jax.grad(lambda p: loss(p, gone_by, {"latent": x0, "cond": {}}, drawn[1:])[0])(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    after = jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[0][0])()
    plan, noise = solvers.consistency(student.useful_schedule, 16), jax.random.split(jax.random.key(1), 1000)
    x = initial_noise(noise, SHAPE, plan.start)

    def distance(params):
        samples = sample(student.denoiser(params), plan, x, noise, {}).reshape(-1, 3)
        moments = np.abs(samples.mean(0) - MEAN), np.abs(samples.std(0) - STD)
        return float(np.max(moments))

    assert distance(after) < 0.25 * distance(params), (distance(params), distance(after))


def test_the_target_of_improved_mean_flow_is_that_of_its_paper():
    """On flow, of any student, for data of a mixture: V = u + (t - r) du/dt along (v, 1, 0), v = u(z, t, t), should be
    eps - x0 (Geng et al. 2025b, eq. 12).
    """
    size, keys = 64, jax.random.split(jax.random.key(0), 3)
    means = jnp.array([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]])
    x0 = means[jax.random.randint(keys[0], (size,), 0, 3)] + 0.3 * jax.random.normal(keys[1], (size, 2))
    eps = jax.random.normal(keys[2], (size, 2))
    level, says = level_function(schedules.flow()), parameterization.flow

    def student(z, t, r):
        return jnp.sin(2 * z[:, ::-1]) * jnp.cos(3 * t)[:, None] + (r**2)[:, None] * z

    maps = made_maps(student, says, level)
    path = flow_map.Path(
        x0,
        eps,
        lambda u: (x0, eps),
        level,
        lambda ratio: ratio / (1 + ratio),
        lambda keys: jax.vmap(jax.random.uniform)(keys),
        jax.random.split(jax.random.key(1), size),
        jnp.float32(0.5),
    )
    target = few_step_methods.improved_mean_flow()(path, maps)
    t, r = target.u, target.to
    z = (1 - t)[:, None] * x0 + t[:, None] * eps
    out, change = jax.jvp(student, (z, t, r), (student(z, t, t), jnp.ones_like(t), jnp.zeros_like(t)))
    V = out + (t - r)[:, None] * change
    np.testing.assert_allclose(out - target.out, V - (eps - x0), atol=5e-4)
    assert np.abs(few_step_methods.mean_flow()(path, maps).out - target.out).max() > 0.1


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_map_samples_in_any_number_of_steps(name):
    student, _ = made_model(name)
    denoise = student.denoiser(student.params)
    keys = jax.random.split(jax.random.key(0), 64)
    first = solvers.ddim(student.useful_schedule, 1)
    x = initial_noise(keys, SHAPE, first.start)
    start = NoiseLevel(*(jnp.float32(value) for value in first.start))
    exact = reached(x.reshape(-1, 3), start, jax.tree.map(jnp.float32, CLEAN)).reshape(x.shape)
    for steps in (1, 2, 5):
        samples = sample(denoise, solvers.ddim(student.useful_schedule, steps), x, keys, {})
        np.testing.assert_allclose(samples, exact, atol=2e-3)
    in_one_step = sample(denoise, solvers.consistency(student.useful_schedule, 1), x, keys, {})
    np.testing.assert_allclose(in_one_step, exact, atol=2e-3)
    four = sample(denoise, solvers.consistency(student.useful_schedule, 4), x, keys, {})
    assert np.abs(np.std(four, axis=0) - STD).max() < 0.3


def test_other_solvers_are_refused():
    student, _ = made_model("cosine")
    denoise, keys = student.denoiser(student.params), jax.random.split(jax.random.key(0), 2)
    for plan in (
        solvers.dpmpp_2m(student.schedule, 4),
        solvers.heun(student.schedule, 4),
        solvers.ddpm(student.schedule, 4),
    ):
        with pytest.raises(ValueError, match="its solver must be ddim with eta=0, or consistency"):
            sample(denoise, plan, initial_noise(keys, SHAPE, plan.start), keys, {})


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_to_its_own_level_changes_nothing(name):
    schedule, says = SCHEDULES[name]
    level = level_function(schedule)(jnp.array([0.1, 0.5, 0.9]))
    a, b = says.step(level, level)
    np.testing.assert_allclose(a, 1, rtol=1e-5)
    np.testing.assert_allclose(b, 0, atol=1e-6)


def test_target_times():
    levels = NoiseLevel(np.zeros(3), np.array([1.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0]))
    np.testing.assert_allclose(target_time(levels), [0, 500, 1000])


def test_a_new_student_says_what_its_teacher_says():
    fields = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",),
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    teacher, student = (network_of(UNet(**fields, target_embedding=told)) for told in (False, True))
    assert student.flow_map and not teacher.flow_map
    params = student.init(jax.random.key(0))
    shaken = jax.tree.map(lambda leaf: leaf + 0.1, params)
    shaken["params"]["to_embedding"] = params["params"]["to_embedding"]
    without = {"params": {name: part for name, part in shaken["params"].items() if name != "to_embedding"}}
    x, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([3.0, 400.0])
    expected = teacher.apply(without, x, t, {})
    for to in (0.0, 700.0):
        np.testing.assert_array_equal(student.apply(shaken, x, t, {"to": jnp.full(2, to)}), expected)
    level = schedules.cosine()(jnp.float32(400.0))
    at_own = denoiser(student.apply, shaken, parameterization.v, flow_map=True)(x, level, {})
    np.testing.assert_array_equal(at_own.x0, denoiser(teacher.apply, without, parameterization.v)(x, level, {}).x0)

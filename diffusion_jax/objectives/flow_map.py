"""Train a flow map: a network that takes the end of a step as input (`core.denoiser`), and samples in a few steps.

All methods (`few_step_methods`) share one loss. It draws a level s, a target level `to`, and x_s on the path from data
to noise. It compares the state that the network predicts at `to` with the method's target, which needs no gradient.

Errors are those of the network's output, as in plain regression. `Emphasis` says which levels are drawn and how much
their errors count. If errors were weighted as those of the state, low noise would count too little. But what is learned
there is the target everywhere else.

Times u run from 0, clean data, to 1, the schedule's noisiest level, as in `Schedule.at`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.core.denoiser import target_time
from diffusion_jax.core.guidance import Guidance, guided
from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.process import NoiseLevel, Prediction, add_noise, expand
from diffusion_jax.core.schedules import Schedule
from diffusion_jax.model import DiffusionModel
from diffusion_jax.objectives.denoising import data_and_noise, drop_condition
from diffusion_jax.objectives.levels import Levels, Weight, even, relative_weight

Times = Float[Array, "batch"]
State = Float[Array, "batch *shape"]
Step = Callable[[State, Times, Times], State]  # (x, u, u of the target) -> the state there
MIN_STEP = 1e-3  # in u; targets never divide by a shorter step


class Path(NamedTuple):
    """The paths of a batch from data to noise.

    x0, eps: data and noise.
    ends: u -> (x0, eps), the ends of the straight line through the state at u: data and noise, or the teacher's
      prediction.
    level: u -> NoiseLevel.
    time_of: sigma / alpha -> the u of this level; the schedule's least noisy time for all ratios below it.
    levels_at: keys (B,) -> u of levels drawn for training.
    keys: (B,), for what a method draws.
    progress: fraction of the training that is done, in [0, 1].
    """

    x0: State
    eps: State
    ends: Callable[[Times], tuple[State, State]]
    level: Callable[[Times], NoiseLevel]
    time_of: Callable[[Times], Times]
    levels_at: Callable[[Key[Array, "batch"]], Times]
    keys: Key[Array, "batch"]
    progress: Float[Array, ""]

    def at(self, u: Times) -> State:
        """The state at u, between x0 and eps."""
        return add_noise(self.x0, self.eps, self.level(u))

    def state_on_line(self, u: Times, to: Times) -> State:
        """The state at `to` on the straight line through the state at u (see `ends`)."""
        return add_noise(*self.ends(u), self.level(to))

    def slope(self, u: Times) -> NoiseLevel:
        """d level / du. At clean data, the slope next to it is used."""
        u = jnp.maximum(u, MIN_STEP)
        return jax.jvp(self.level, (u,), (jnp.ones_like(u),))[1]

    def draw(self, number: int) -> Times:
        """The time of a random level for each example, in [0, 1): a schedule has no slope at its very end. Each number
        gives independent ones.
        """
        return jnp.clip(self.levels_at(self._keys(number)), 0.0, 1 - 1e-5)

    def uniform(self, number: int) -> Times:
        """A random number in [0, 1) for each example. Each `number` gives independent ones."""
        return jax.vmap(jax.random.uniform)(self._keys(number))

    def _keys(self, number: int) -> Key[Array, "batch"]:
        return jax.vmap(lambda key: jax.random.fold_in(key, number))(self.keys)


class Maps(NamedTuple):
    """The student and the teacher, as maps from the state x at u to the state at `to`.

    output: (x, u, to) -> the student's output. Its weights have no gradient.
    own: (x, u) -> the student's (x0, eps) where a step has no length.
    parameterization: the meaning of the output.
    coefficients: (u, to) -> (a, b) of the state that the student predicts, a x + b output.
    teacher: (x, u, to) -> the state that the teacher predicts.
    """

    output: Step
    own: Callable[[State, Times], Prediction]
    parameterization: Parameterization
    coefficients: Callable[[Times, Times], tuple[Times, Times]]
    teacher: Step | None = None

    def student_and_output(self, x: State, u: Times, to: Times) -> tuple[State, State]:
        """The state that the student predicts, and the output that leads there."""
        a, b = (expand(scalar, x) for scalar in self.coefficients(u, to))
        out = self.output(x, u, to)
        return a * x + b * out, out

    def student(self, x: State, u: Times, to: Times) -> State:
        """The state that the student predicts."""
        return self.student_and_output(x, u, to)[0]


class Target(NamedTuple):
    """What the student should predict.

    u, to: of the step.
    out: the output that the network should have.
    weight: of the squared error of the output.
    """

    u: Times
    to: Times
    out: State
    weight: Times


class Teacher(NamedTuple):
    """A trained model that the student learns from.

    model: its variables are frozen["teacher"].
    scale: of its guidance. A network that takes the scale as input is trained with scales from 1 to this.
    defines_path: methods that follow a path follow the teacher's instead of the straight one.
    """

    model: DiffusionModel
    scale: float = 1.0
    defines_path: bool = False


class OwnGuidance(NamedTuple):
    """Guidance that the student learns from itself: the path is guided by the student's own predictions where a step
    has no length.

        (x0, eps) + (1 - 1 / w) (student(x | c, w) - student(x | no condition, 1))

    Where training ends, the student follows w times the conditional velocity and 1 - w times the other one (MeanFlow,
    Geng et al. 2025, eq. 19; with w and the interval as inputs of the network, iMF, Geng et al. 2025b).

    scale: w. A network that takes it as input is trained with scales from 1 to this, log-uniform, and one that takes an
      interval with all intervals of sigma / (alpha + sigma) that begin below 1/2 and end above.
    """

    scale: float


class Emphasis(NamedTuple):
    """Which levels training draws, and how much the errors at each of them count.

    levels: (schedule, keys (B,)) -> NoiseLevel of (B,), from `objectives.levels`. Methods with a grid take the grid's
      interval that contains the level, the others the level itself.
    weight: (level, parameterization) -> (B,), from `objectives.levels`, of the squared error of the output. It
      multiplies the weight of the method's target.
    """

    levels: Levels = even
    weight: Weight = relative_weight


EVEN = Emphasis()
Method = Callable[[Path, Maps], Target]


def level_function(schedule: Schedule) -> Callable[[Times], NoiseLevel]:
    """u in [0, 1] -> NoiseLevel; u = 0 is clean data."""

    def level(u: Times) -> NoiseLevel:
        noisy = schedule(schedule.at(u))
        return noisy._replace(alpha=jnp.where(u > 0, noisy.alpha, 1.0), sigma=jnp.where(u > 0, noisy.sigma, 0.0))

    return level


def flow_map(
    model: DiffusionModel,
    method: Method,
    total: int,
    drop: float = 0.1,
    plain: float = 0.0,
    robust: float = 0.0,
    teacher: Teacher | OwnGuidance | None = None,
    emphasis: Emphasis = EVEN,
) -> Callable:
    """The loss of a method, E weight |target - output|^2 / (|target - output|^2 + c)^robust.

    model: its network is a flow map, or any network for methods whose target is clean data or s itself.
    method: from `few_step_methods`.
    total: steps of training.
    drop: probability of training without the condition. 0 for distillation with guidance.
    plain: part of the examples with plain regression, where the target level is the level itself.
    robust: in [0, 1]. How much less large errors count: 0.5 for continuous_consistency, and also for mean_flow, whose
      eq. 22 has 1.
    teacher: for the methods of distillation and those that follow its path. OwnGuidance is for mean_flow and
      improved_mean_flow, with examples of `plain`.
    emphasis: the levels that are drawn, and the weight of each, a factor of the loss's weight.

    The loss takes params, frozen, batch and keys as that of `denoising.denoising`.
    """
    level = level_function(model.useful_schedule)

    def loss(params: PyTree, frozen: PyTree, batch: PyTree, keys: Key[Array, "batch"]) -> tuple[Float[Array, ""], dict]:
        split = jax.vmap(lambda key: jax.random.split(key, 6))(keys).T
        x0_keys, eps_keys, drop_keys, path_keys, plain_keys, scale_keys = split
        x0, eps = data_and_noise(model, frozen, batch, x0_keys, eps_keys)
        cond = model.conditioning.embed(frozen["conditioning"], batch["cond"])
        student_cond = drop_condition(cond, frozen["null_cond"], drop, drop_keys)
        is_plain = jax.vmap(lambda key: jax.random.bernoulli(key, plain))(plain_keys)
        inputs = _guidance_inputs(model, teacher, is_plain, scale_keys)
        output, fixed = _student(model, level, frozen["rest"]), jax.lax.stop_gradient(params)
        path = _straight(x0, eps, model.useful_schedule, emphasis.levels, path_keys, frozen["step"] / total)

        def predict(x: State, u: Times, cond: PyTree) -> Prediction:
            return model.parameterization.predict(x, output(fixed, cond, x, u, u), level(u))

        maps = Maps(
            output=functools.partial(output, fixed, student_cond | inputs),
            own=functools.partial(predict, cond=student_cond | inputs),
            parameterization=model.parameterization,
            coefficients=lambda u, to: model.parameterization.step(level(u), level(to)),
        )
        if isinstance(teacher, Teacher):
            path, maps = _taught(path, maps, teacher, frozen, cond, inputs.get("guidance", teacher.scale))
        if isinstance(teacher, OwnGuidance):
            null = drop_condition(cond, frozen["null_cond"], 1.0, drop_keys)
            scale = inputs.get("guidance", jnp.full(len(keys), teacher.scale))
            followed = drop_condition({"scale": scale}, {"scale": 1.0}, drop, drop_keys)["scale"]
            path, maps = _guided_by_itself(path, maps, predict, (student_cond, null), inputs, followed)
        target = method(path, maps)
        if plain:
            target = _with_regression(target, path, maps, is_plain)
        target = jax.lax.stop_gradient(target)
        out = output(params, student_cond | inputs, path.at(target.u), target.u, target.to)
        return _weighted_error(target, out, emphasis.weight(level(target.u), model.parameterization), robust)

    return loss


def _straight(
    x0: State, eps: State, schedule: Schedule, levels: Levels, keys: Key[Array, "batch"], progress: Float[Array, ""]
) -> Path:
    """The path along straight lines from data to noise."""

    def time_of(ratio: Times) -> Times:
        return schedule.fraction_of(schedule.t_of_logsnr(-2 * jnp.log(ratio)))

    def levels_at(keys: Key[Array, "batch"]) -> Times:
        return schedule.fraction_of(schedule.t_of_logsnr(levels(schedule, keys).logsnr))

    return Path(x0, eps, lambda u: (x0, eps), level_function(schedule), time_of, levels_at, keys, progress)


def _weighted_error(target: Target, out: State, weight: Times, robust: float) -> tuple[Float[Array, ""], dict]:
    """(loss, metrics) of the student's output: see `flow_map`."""
    error = jnp.mean(jnp.square(target.out - out), axis=range(1, out.ndim))
    weight = target.weight * weight * jax.lax.stop_gradient(error + 1e-3) ** -robust
    return jnp.mean(weight * error), {"mse": jnp.mean(error)}


def _student(model: DiffusionModel, level: Callable[[Times], NoiseLevel], frozen_params: PyTree) -> Callable:
    """(params, cond, x, u, to) -> the output of the network."""

    def output(params: PyTree, cond: PyTree, x: State, u: Times, to: Times) -> State:
        inputs, t = model.parameterization.inputs(x, level(u))
        target = {"to": target_time(level(to))} if model.network.flow_map else {}
        return model.network.apply(model.adapter.join(params, frozen_params), inputs, t, cond | target)

    return output


def _guidance_inputs(
    model: DiffusionModel, teacher: Teacher | OwnGuidance | None, is_plain: Array, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """The random scale and interval of guidance that the network takes as input. Plain regression has no interval."""
    if not model.network.takes_scale:
        return {}
    part = jax.vmap(jax.random.uniform)(keys)
    if isinstance(teacher, Teacher):
        return {"guidance": 1 + part * (teacher.scale - 1)}
    inputs = {"guidance": teacher.scale**part}
    if model.network.takes_interval:
        fold = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (2,), maxval=0.5))
        sigma = jnp.where(is_plain[:, None], jnp.array([0.0, 1.0]), fold(keys) + jnp.array([0.0, 0.5]))
        inputs["interval"] = target_time(NoiseLevel(0.0, 1 - sigma, sigma))
    return inputs


def _taught(
    path: Path, maps: Maps, teacher: Teacher, frozen: PyTree, cond: PyTree, scale: ArrayLike
) -> tuple[Path, Maps]:
    """The path and the maps with a teacher's predictions."""
    denoise = guided(teacher.model.denoiser(frozen["teacher"]), Guidance(scale), frozen["null_cond"])

    def predict(x: State, u: Times, to: Times) -> Prediction:
        return denoise(x, path.level(u), cond, to=path.level(to))

    if teacher.defines_path:
        state = path.at
        path = path._replace(ends=lambda u: predict(state(u), u, u))
    return path, maps._replace(teacher=lambda x, u, to: add_noise(*predict(x, u, to), path.level(to)))


def _guided_by_itself(
    path: Path,
    maps: Maps,
    predict: Callable[[State, Times, PyTree], Prediction],
    conds: tuple[PyTree, PyTree],
    inputs: dict[str, Array],
    scale: Times,
) -> tuple[Path, Maps]:
    """The path of `OwnGuidance`, and the maps whose `own` predicts its guided ends.

    predict: (x, u, cond) -> the student's (x0, eps) where a step has no length.
    conds: the condition, and no condition.
    inputs: of `_guidance_inputs`.
    scale: of each example, 1 without condition.
    """
    cond, null = conds

    def scale_at(u: Times) -> Times:
        if "interval" not in inputs:
            return scale
        time, (low, high) = target_time(path.level(u)), inputs["interval"].T
        return jnp.where((low <= time) & (time <= high), scale, 1.0)

    def own(x: State, u: Times, cond: PyTree, scale: Times) -> Prediction:
        everywhere = jnp.tile(jnp.array([0.0, 1000.0]), (len(x), 1))
        given = {"guidance": scale, "interval": everywhere}
        return predict(x, u, cond | {name: given[name] for name in inputs})

    def ends(u: Times) -> Prediction:
        x, w = path.at(u), scale_at(u)
        pairs = Prediction(*path.ends(u)), own(x, u, cond, w), own(x, u, null, jnp.ones_like(w))
        return jax.tree.map(lambda plain, c, none: plain + expand(1 - 1 / w, x) * (c - none), *pairs)

    return path._replace(ends=ends), maps._replace(own=lambda x, u: own(x, u, cond, scale_at(u)))


def _with_regression(target: Target, path: Path, maps: Maps, is_plain: Array) -> Target:
    """The target, with plain regression for some of the examples."""
    u = jnp.maximum(path.draw(3), MIN_STEP)
    regression = Target(u, u, maps.parameterization.target(*path.ends(u), path.level(u)), jnp.ones_like(u))
    return jax.tree.map(lambda a, b: jnp.where(is_plain.reshape(-1, *[1] * (a.ndim - 1)), b, a), target, regression)

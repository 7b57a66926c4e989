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
    parameterization: the meaning of the output.
    coefficients: (u, to) -> (a, b) of the state that the student predicts, a x + b output.
    teacher: (x, u, to) -> the state that the teacher predicts.
    """

    output: Step
    parameterization: Parameterization
    coefficients: Callable[[Times, Times], tuple[Times, Times]]
    teacher: Step

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
    teacher: Teacher | None = None,
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
    teacher: for the methods of distillation and those that follow its path.
    emphasis: the levels that are drawn, and the weight of each, a factor of the loss's weight.

    The loss takes params, frozen, batch and keys as that of `denoising.denoising`.
    """
    schedule = model.useful_schedule
    level = level_function(schedule)

    def time_of(ratio: Times) -> Times:
        return schedule.fraction_of(schedule.t_of_logsnr(-2 * jnp.log(ratio)))

    def levels_at(keys: Key[Array, "batch"]) -> Times:
        return schedule.fraction_of(schedule.t_of_logsnr(emphasis.levels(schedule, keys).logsnr))

    def loss(params: PyTree, frozen: PyTree, batch: PyTree, keys: Key[Array, "batch"]) -> tuple[Float[Array, ""], dict]:
        split = jax.vmap(lambda key: jax.random.split(key, 6))(keys).T
        x0_keys, eps_keys, drop_keys, path_keys, plain_keys, scale_keys = split
        x0, eps = data_and_noise(model, frozen, batch, x0_keys, eps_keys)
        cond = model.conditioning.embed(frozen["conditioning"], batch["cond"])
        student_cond = drop_condition(cond, frozen["null_cond"], drop, drop_keys)
        scale = teacher.scale if teacher else 1.0
        if model.network.takes_scale:
            scale = jax.vmap(lambda key: jax.random.uniform(key, minval=1.0, maxval=scale))(scale_keys)
            student_cond = student_cond | {"guidance": scale}
        output = _student(model, level, frozen["rest"], student_cond)
        predict = _predictions(teacher.model, level, frozen, cond, scale) if teacher else None
        path = Path(x0, eps, lambda u: (x0, eps), level, time_of, levels_at, path_keys, progress=frozen["step"] / total)
        if teacher and teacher.defines_path:
            path = path._replace(ends=lambda u: predict(add_noise(x0, eps, level(u)), u, u))
        maps = Maps(
            output=functools.partial(output, jax.lax.stop_gradient(params)),
            parameterization=model.parameterization,
            coefficients=lambda u, to: model.parameterization.step(level(u), level(to)),
            teacher=lambda x, u, to: add_noise(*predict(x, u, to), level(to)),
        )
        target = method(path, maps)
        if plain:
            target = _with_regression(target, path, maps, plain, plain_keys)
        target = jax.lax.stop_gradient(target)
        out = output(params, path.at(target.u), target.u, target.to)
        return _weighted_error(target, out, emphasis.weight(level(target.u), model.parameterization), robust)

    return loss


def _weighted_error(target: Target, out: State, weight: Times, robust: float) -> tuple[Float[Array, ""], dict]:
    """(loss, metrics) of the student's output: see `flow_map`."""
    error = jnp.mean(jnp.square(target.out - out), axis=range(1, out.ndim))
    weight = target.weight * weight * jax.lax.stop_gradient(error + 1e-3) ** -robust
    return jnp.mean(weight * error), {"mse": jnp.mean(error)}


def _student(
    model: DiffusionModel, level: Callable[[Times], NoiseLevel], frozen_params: PyTree, cond: PyTree
) -> Callable:
    """(params, x, u, to) -> the output of the network."""

    def output(params: PyTree, x: State, u: Times, to: Times) -> State:
        inputs, t = model.parameterization.inputs(x, level(u))
        target = {"to": target_time(level(to))} if model.network.flow_map else {}
        return model.network.apply(model.adapter.join(params, frozen_params), inputs, t, cond | target)

    return output


def _predictions(
    teacher: DiffusionModel, level: Callable[[Times], NoiseLevel], frozen: PyTree, cond: PyTree, scale: ArrayLike
) -> Callable[[State, Times, Times], Prediction]:
    """(x, u, to) -> the prediction of the guided teacher."""
    denoise = guided(teacher.denoiser(frozen["teacher"]), Guidance(scale), frozen["null_cond"])
    return lambda x, u, to: denoise(x, level(u), cond, to=level(to))


def _with_regression(target: Target, path: Path, maps: Maps, plain: float, keys: Key[Array, "batch"]) -> Target:
    """The target, with plain regression for each example with the probability `plain`."""
    mask = jax.vmap(lambda key: jax.random.bernoulli(key, plain))(keys)
    u = jnp.maximum(path.draw(3), MIN_STEP)
    regression = Target(u, u, maps.parameterization.target(*path.ends(u), path.level(u)), jnp.ones_like(u))
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), b, a), target, regression)

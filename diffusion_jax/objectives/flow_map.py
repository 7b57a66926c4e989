"""Train a flow map: a network that is told where a step ends (`core.denoiser`), and so samples in one to a few steps.

All methods share one loss. It draws a level s, a target level `to` and x_s on the way from data to noise, and compares
the state that the network predicts at `to` with a target that needs no gradient:

method                    target
distillation              two steps of the teacher (Salimans & Ho 2022; the student is the next teacher)
consistency_distillation  the student, after one step of the teacher; to = clean data (Song et al. 2023; with guidance
                          in the teacher, Luo et al. 2023)
consistency_training      the student, a little further on the way; to = clean data (Geng et al. 2024)
soflow                    the same for any `to` (Luo et al. 2025)
shortcut                  two half steps of the student (Frans et al. 2024; Boffi et al. 2025)
mean_flow                 the student, corrected by its derivative along the way (Geng et al. 2025)
continuous_consistency    the same; to = clean data (sCM, Lu & Song 2024)
lagrangian                the student, corrected by its derivative in `to` (Boffi et al. 2025)
guidance_distillation     the guided teacher, at s itself (Meng et al. 2023)

Errors are those of the network's output, as in plain regression, and count the same at every level. Weighted as errors
of the state, those at low noise would count too little, and what is learned there is the target everywhere else.

The way of consistency_training, soflow, mean_flow and continuous_consistency is the straight one from data to noise, or
the teacher's, guided. Times u run from 0, clean data, to 1, the schedule's noisiest level, as `Schedule.at`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.core.denoiser import target_time
from diffusion_jax.core.guidance import Guidance, guided
from diffusion_jax.core.parameterization import NAMED, Parameterization
from diffusion_jax.core.process import NoiseLevel, Prediction, add_noise, expand
from diffusion_jax.core.schedules import Schedule
from diffusion_jax.model import DiffusionModel
from diffusion_jax.objectives.denoising import data_and_noise, drop_condition

Times = Float[Array, "batch"]
State = Float[Array, "batch *shape"]
Step = Callable[[State, Times, Times], State]  # (x, u, u of the target) -> the state there
LEAST = 1e-3  # of a step in u, below which it is not divided by


class Pass(NamedTuple):
    """What a method makes its target of, for one batch.

    x0, eps: data and noise.
    ends: u -> (x0, eps) of the way through the state at u: data and noise, or what the teacher says.
    keys: (B,), for the method's own draws.
    progress: part of the training that is done, in [0, 1].
    level: u -> NoiseLevel.
    student: a step of the student, without gradient.
    teacher: a step of the teacher.
    output: (x, u, u of the target) -> the student's output, with derivatives.
    """

    x0: State
    eps: State
    ends: Callable[[Times], tuple[State, State]]
    keys: Key[Array, "batch"]
    progress: Float[Array, ""]
    level: Callable[[Times], NoiseLevel]
    student: Step
    teacher: Step
    output: Step

    def at(self, u: Times) -> State:
        """The state at u on the straight way from x0 to eps."""
        return add_noise(self.x0, self.eps, self.level(u))

    def way(self, u: Times, to: Times) -> State:
        """The state at `to` on the way through the state at u."""
        return add_noise(*self.ends(u), self.level(to))

    def uniform(self, number: int) -> Times:
        """One number in [0, 1) for each example; another `number` gives another one."""
        return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, number)))(self.keys)


class Target(NamedTuple):
    """What the student should say.

    u, to: of the step.
    out: the output that the network should have.
    weight: of the squared error of the output.
    """

    u: Times
    to: Times
    out: State
    weight: Times


Method = Callable[[Pass, Parameterization], Target]


def levels_of(schedule: Schedule) -> Callable[[Times], NoiseLevel]:
    """u in [0, 1] -> NoiseLevel; u = 0 is clean data."""

    def level(u: Times) -> NoiseLevel:
        made = schedule(schedule.at(u))
        return made._replace(alpha=jnp.where(u > 0, made.alpha, 1.0), sigma=jnp.where(u > 0, made.sigma, 0.0))

    return level


def _towards(made: Pass, parameterization: Parameterization, u: Times, to: Times, state: State) -> Target:
    """The output that leads from u to the state at `to`."""
    x = made.at(u)
    a, b = (expand(scalar, x) for scalar in parameterization.step(made.level(u), made.level(to)))
    far = jnp.abs(u - to) >= LEAST
    out = (state - a * x) / jnp.where(expand(far, x) > 0, b, 1.0)
    return Target(u, to, out, far.astype(jnp.float32))


def distillation(segments: int) -> Method:
    """Steps of 1 / segments of the way, each as two of the teacher (Salimans & Ho 2022, algorithm 2)."""

    def target(made: Pass, parameterization: Parameterization) -> Target:
        u = (jnp.floor(made.uniform(0) * segments) + 1) / segments
        to, middle = jnp.maximum(u - 1 / segments, 0.0), u - 0.5 / segments
        to = jnp.where(to < LEAST, 0.0, to)
        return _towards(made, parameterization, u, to, made.teacher(made.teacher(made.at(u), u, middle), middle, to))

    return target


def consistency_distillation(segments: int) -> Method:
    """To clean data, from neighbours on a grid of `segments` steps (Song et al. 2023, algorithm 2; Luo et al. 2023)."""

    def target(made: Pass, parameterization: Parameterization) -> Target:
        number = jnp.floor(made.uniform(0) * segments)
        u, nearer = (number + 1) / segments, number / segments
        state = made.teacher(made.at(u), u, nearer)
        clean = jnp.zeros_like(u)
        reached = made.student(state, nearer, clean)
        state = jnp.where(expand(nearer > 0, state) > 0, reached, state)
        return _towards(made, parameterization, u, clean, state)

    return target


def consistency_training(shrinks: float = 8.0) -> Method:
    """To clean data, along the way, with a gap that shrinks during training (Geng et al. 2024, ECT).

    shrinks: how often the gap is halved. It begins as the whole step, which is plain regression of x0.
    """

    def target(made: Pass, parameterization: Parameterization) -> Target:
        u = jnp.maximum(made.uniform(0), LEAST)
        nearer = u * (1 - 0.5 ** jnp.floor(made.progress * (shrinks + 1)))
        clean = jnp.zeros_like(u)
        state = made.way(u, nearer)
        reached = made.student(state, nearer, clean)
        state = jnp.where(expand(nearer > 0, state) > 0, reached, state)
        found = _towards(made, parameterization, u, clean, state)
        return found._replace(weight=found.weight * u / (u - nearer))

    return target


def soflow(shrinks: float = 8.0) -> Method:
    """To any level, along the way, with a gap that shrinks during training (Luo et al. 2025)."""

    def target(made: Pass, parameterization: Parameterization) -> Target:
        u, to = _span(made)
        nearer = u + (to - u) * jnp.maximum(0.5 ** (made.progress * shrinks), 2.0**-shrinks)
        # what the student says of the rest, joined to the straight piece before it
        state = made.student(made.way(u, nearer), nearer, to)
        return _towards(made, parameterization, u, to, state)

    return target


def shortcut() -> Method:
    """Any step as two of half its length (Frans et al. 2024, eq. 4)."""

    def target(made: Pass, parameterization: Parameterization) -> Target:
        u, to = _span(made)
        middle = (u + to) / 2
        state = made.student(made.student(made.at(u), u, middle), middle, to)
        return _towards(made, parameterization, u, to, state)

    return target


def mean_flow() -> Method:
    """The state at `to` does not change as its start moves along the way (Geng et al. 2025, of any alpha and sigma).

    The method raises ValueError for predictions of x0; so does `continuous_consistency`.
    """
    return lambda made, parameterization: _along(made, parameterization, *_span(made))


def continuous_consistency(warm_up: float = 0.5) -> Method:
    """The same to clean data, a consistency model in continuous time (sCM, Lu & Song 2024). With a robust loss of 0.5
    its tangents are normalized as in their section 4.1.

    warm_up: part of the training during which the derivative takes over from plain regression.
    """

    def target(made: Pass, parameterization: Parameterization) -> Target:
        u = jnp.maximum(made.uniform(0), LEAST)
        found = _along(made, parameterization, u, jnp.zeros_like(u))
        part = jnp.minimum(made.progress / warm_up, 1.0) if warm_up else 1.0
        plain = parameterization.target(*made.ends(u), made.level(u))
        return found._replace(out=part * found.out + (1 - part) * plain)

    return target


def _along(made: Pass, parameterization: Parameterization, u: Times, to: Times) -> Target:
    if parameterization == NAMED["x0"]:  # any constant x0 satisfies the derivative
        raise ValueError(
            "mean_flow and continuous_consistency need a network that predicts eps, v, flow or edm, got x0: set "
            "objective.prediction"
        )
    _, change, out = jax.jvp(
        lambda start: _reached(made, parameterization, made.way(u, start), start, to),
        (u,),
        (jnp.ones_like(u),),
        has_aux=True,
    )
    return _corrected(made, parameterization, u, to, out, change, moved=u)


def lagrangian() -> Method:
    """As `to` moves, the state there moves as the student's own flow says (Lagrangian self-distillation, Boffi et al.
    2025).
    """

    def target(made: Pass, parameterization: Parameterization) -> Target:
        u, to = _span(made)
        to, x = jnp.maximum(to, LEAST), made.at(u)
        state, change, out = jax.jvp(
            lambda end: _reached(made, parameterization, x, u, end), (to,), (jnp.ones_like(to),), has_aux=True
        )
        ends = parameterization.predict(state, made.output(state, to, to), made.level(to))
        _, flow = jax.jvp(lambda end: add_noise(*ends, made.level(end)), (to,), (jnp.ones_like(to),))
        return _corrected(made, parameterization, u, to, out, flow - change, moved=to)

    return target


def _reached(made: Pass, parameterization: Parameterization, x: State, u: Times, to: Times) -> tuple[State, State]:
    """The state at `to` and the output that leads there, with derivatives."""
    out = made.output(x, u, to)
    a, b = (expand(scalar, x) for scalar in parameterization.step(made.level(u), made.level(to)))
    return a * x + b * out, out


def _corrected(
    made: Pass, parameterization: Parameterization, u: Times, to: Times, out: State, excess: State, moved: Times
) -> Target:
    """The output that takes from the state at `to` what is too much, if it is as much everywhere on the step.

    excess: in the state, as the time `moved` grows by 1.
    On a schedule of straight lines, such as flow, it is the output for which the derivative is right (Geng et al. 2025,
    eq. 6). On others the latter has a pole: cosine's whole step.
    """
    start, end = made.level(u), made.level(to)
    length = jnp.hypot(start.alpha - end.alpha, start.sigma - end.sigma)
    _, slope = jax.jvp(made.level, (moved,), (jnp.ones_like(moved),))
    _, b = parameterization.step(start, end)
    gain = length / jnp.hypot(slope.alpha, slope.sigma) / b
    return Target(u, to, out - expand(gain, out) * excess, jnp.ones_like(u))


def guidance_distillation() -> Method:
    """At every level the output of the guided teacher (Meng et al. 2023, section 3.1)."""

    def target(made: Pass, parameterization: Parameterization) -> Target:
        u = jnp.maximum(made.uniform(0), LEAST)
        # the tangent of the teacher's path, as the step to a level near by
        to = jnp.maximum(u - 10 * LEAST, 0.0)
        found = _towards(made, parameterization, u, to, made.teacher(made.at(u), u, to))
        return found._replace(to=u)

    return target


def _span(made: Pass) -> tuple[Times, Times]:
    """u and a target nearer to clean data, uniform on the triangle; one target in four is clean data itself."""
    first, second = made.uniform(0), made.uniform(1)
    u, to = jnp.maximum(first, second), jnp.minimum(first, second)
    u = jnp.maximum(u, 2 * LEAST)
    to = jnp.where((made.uniform(2) < 0.25) | (u - to < LEAST), 0.0, to)
    return u, to


def flow_map(
    model: DiffusionModel,
    method: Method,
    total: int,
    drop: float = 0.1,
    plain: float = 0.0,
    robust: float = 0.0,
    teacher: DiffusionModel | None = None,
    scale: float = 1.0,
    taught: bool = False,
) -> Callable:
    """The loss of a method, E weight |target - output|^2 / (|target - output|^2 + c)^robust.

    model: whose network is a flow map. Any network can learn methods whose target is clean data, or s itself.
    total: steps of training.
    drop: probability of training without the condition. 0 for distillation with guidance.
    plain: part of the examples with plain regression, where the target level is the level itself.
    robust: in [0, 1], how much large errors count less; 0.5 for continuous_consistency and, instead of the 1 of its eq.
      22, for mean_flow.
    teacher: for the methods of distillation; its variables are frozen["teacher"].
    scale: of the teacher's guidance. A network that takes the scale as input is trained with scales from 1 to this.
    taught: whether the way of the methods that follow one is the teacher's.
    The loss takes params, frozen, batch and keys as that of `denoising.denoising`.
    """
    parameterization, level = model.parameterization, levels_of(model.useful_schedule)

    def loss(params: PyTree, frozen: PyTree, batch: PyTree, keys: Key[Array, "batch"]) -> tuple[Float[Array, ""], dict]:
        split = jax.vmap(lambda key: jax.random.split(key, 6))(keys).T
        x0_keys, eps_keys, drop_keys, own_keys, plain_keys, scale_keys = split
        x0, eps = data_and_noise(model, frozen, batch, x0_keys, eps_keys)
        told = model.conditioning.embed(frozen["conditioning"], batch["cond"])
        cond, guidance = drop_condition(told, frozen["null_cond"], drop, drop_keys), scale
        if model.network.takes_scale:
            guidance = jax.vmap(lambda key: jax.random.uniform(key, minval=1.0, maxval=scale))(scale_keys)
            cond = cond | {"guidance": guidance}

        def output(params: PyTree, x: State, u: Times, to: Times) -> State:
            seen, t = parameterization.inputs(x, level(u))
            variables = model.adapter.join(params, frozen["rest"])
            told_where = {"to": target_time(level(to))} if model.network.flow_map else {}
            return model.network.apply(variables, seen, t, cond | told_where)

        def student(x: State, u: Times, to: Times) -> State:
            a, b = parameterization.step(level(u), level(to))
            return jax.lax.stop_gradient(expand(a, x) * x + expand(b, x) * output(params, x, u, to))

        def pair_of_teacher(x: State, u: Times, to: Times) -> Prediction:
            denoise = guided(teacher.denoiser(frozen["teacher"]), Guidance(guidance), frozen["null_cond"])
            return denoise(x, level(u), told, level(to))

        still = jax.lax.stop_gradient(params)
        made = Pass(
            x0=x0,
            eps=eps,
            ends=lambda u: pair_of_teacher(add_noise(x0, eps, level(u)), u, u) if taught else (x0, eps),
            keys=own_keys,
            progress=frozen["step"] / total,
            level=level,
            student=student,
            teacher=lambda x, u, to: add_noise(*pair_of_teacher(x, u, to), level(to)),
            output=lambda *step: output(still, *step),
        )
        target = method(made, parameterization)
        if plain:
            regressed = jax.vmap(lambda key: jax.random.bernoulli(key, plain))(plain_keys)
            target = _mixed(regressed, target, _regression(made, parameterization))
        target = jax.lax.stop_gradient(target)
        error = jnp.square(target.out - output(params, made.at(target.u), target.u, target.to))
        error = jnp.mean(error, axis=range(1, x0.ndim))
        weight = target.weight * jax.lax.stop_gradient(error + 1e-3) ** -robust
        return jnp.mean(weight * error), {"mse": jnp.mean(error)}

    return loss


def _regression(made: Pass, parameterization: Parameterization) -> Target:
    u = jnp.maximum(made.uniform(3), LEAST)
    return Target(u, u, parameterization.target(*made.ends(u), made.level(u)), jnp.ones_like(u))


def _mixed(chosen: ArrayLike, target: Target, other: Target) -> Target:
    return jax.tree.map(lambda a, b: jnp.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), b, a), target, other)

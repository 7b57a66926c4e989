"""The methods that train a flow map (`flow_map`). Each says what the network should predict:

    method                    target
    distillation              two steps of the teacher (Salimans & Ho 2022; the student is the next teacher)
    consistency_distillation  the student, after one step of the teacher; to = clean data (Song et al. 2023; with
                              guidance in the teacher, Luo et al. 2023)
    consistency_training      the student, a little further on the path; to = clean data (ECT, Geng et al. 2024)
    soflow                    the same for any `to` (Luo et al. 2025)
    shortcut                  two half steps of the student (Frans et al. 2024; Boffi et al. 2025)
    mean_flow                 the student, corrected by its derivative along the path (Geng et al. 2025)
    improved_mean_flow        the same, with the student's own velocity in the network's derivative (Geng et al. 2025b)
    continuous_consistency    mean_flow; to = clean data (sCM, Lu & Song 2024)
    lagrangian                the student, corrected by its derivative in `to` (Boffi et al. 2025)
    guidance_distillation     the guided teacher, at s itself (Meng et al. 2023)

consistency_training, soflow, mean_flow, improved_mean_flow and continuous_consistency follow a path: the straight one
from data to noise, or the guided teacher's.

Training must also lead back to the exact map from maps near it. Take a method that moves the start u of a step. An
error e of the output is an error b e of the state (see `Maps.coefficients`). Training changes it by

    -(c b' / b + c d/du) e,    c the reach of the step,

with d/du along the path. There the density p(x | u) is conserved, so the symmetric part of the operator is
c b' / b - c' / 2 = -b^2 (c / b^2)' / 2: errors shrink where c / b^2 falls with u. See `_reach`.
"""

import jax
import jax.numpy as jnp

from diffusion_jax.compilation import without_kernels
from diffusion_jax.core.parameterization import NAMED
from diffusion_jax.core.process import add_noise, expand
from diffusion_jax.objectives.flow_map import MIN_STEP, Maps, Method, Path, State, Target, Times


def _target_towards(path: Path, maps: Maps, u: Times, to: Times, state: State) -> Target:
    """The target whose output leads from the state at u to `state` at `to`."""
    x = path.at(u)
    a, b = (expand(scalar, x) for scalar in maps.coefficients(u, to))
    far = jnp.abs(u - to) >= MIN_STEP
    out = (state - a * x) / jnp.where(expand(far, x) > 0, b, 1.0)
    return Target(u, to, out, far.astype(jnp.float32))


def distillation(segments: int) -> Method:
    """One step of the student for two of the teacher (Salimans & Ho 2022, algorithm 2).

    segments: number of steps that the student learns to take from noise to data.
    """

    def method(path: Path, maps: Maps) -> Target:
        u = (_interval(path, segments) + 1) / segments
        to, middle = jnp.maximum(u - 1 / segments, 0.0), u - 0.5 / segments
        to = jnp.where(to < MIN_STEP, 0.0, to)
        return _target_towards(path, maps, u, to, maps.teacher(maps.teacher(path.at(u), u, middle), middle, to))

    return method


def consistency_distillation(segments: int) -> Method:
    """To clean data, from neighbours on a grid (Song et al. 2023, algorithm 2; Luo et al. 2023).

    segments: number of steps of the grid.
    """

    def method(path: Path, maps: Maps) -> Target:
        number = _interval(path, segments)
        u, nearer = (number + 1) / segments, number / segments
        return _clean_target(path, maps, u, nearer, maps.teacher(path.at(u), u, nearer))

    return method


def _interval(path: Path, segments: int) -> Times:
    """The number, from 0, of the interval of a grid of `segments` that contains a random level."""
    return jnp.floor(path.draw(0) * segments)


def _clean_target(path: Path, maps: Maps, u: Times, nearer: Times, state: State) -> Target:
    """The target that leads from u to clean data: the student's prediction from `state`, the state at `nearer`."""
    clean = jnp.zeros_like(u)
    student_state = maps.student(state, nearer, clean)
    return _target_towards(path, maps, u, clean, jnp.where(expand(nearer > 0, state) > 0, student_state, state))


def consistency_training(shrinks: float = 8.0) -> Method:
    """To clean data, along the path, with a gap that shrinks during training (Geng et al. 2024, ECT).

    In t = sigma / alpha the student's target is its prediction from r = t (1 - n(t) / 2^a), at least 0, n(t) = 1 + 8
    sigmoid(-t), after a halvings (their section 3.2). The target's weight is t / (t - r), so that steps of all gaps
    count alike; their 1 / (t - r) on the state is this with `levels.inverse_noise_weight`.

    shrinks: number of times that the gap is halved. The first gap is the whole step: plain regression of x0.
    """

    def method(path: Path, maps: Maps) -> Target:
        u = jnp.maximum(path.draw(0), MIN_STEP)
        level = path.level(u)
        t = level.sigma / jnp.maximum(level.alpha, 1e-4)  # pure noise has a t, too
        halvings = jnp.floor(path.progress * (shrinks + 1))
        gap = jnp.minimum((1 + 8 * jax.nn.sigmoid(-t)) * 0.5**halvings, 1.0)
        nearer = path.time_of(t * (1 - gap))
        nearer = jnp.where(nearer > MIN_STEP, jnp.minimum(nearer, u), 0.0)
        target = _clean_target(path, maps, u, nearer, path.state_on_line(u, nearer))
        return target._replace(weight=target.weight / gap)

    return method


def soflow(shrinks: float = 8.0) -> Method:
    """To any level, along the path, with a gap that shrinks during training (Luo et al. 2025).

    On curved schedules the end of a step is not as far away as its time. The weight corrects this (see `_reach`).

    shrinks: as in `consistency_training`.
    """

    def method(path: Path, maps: Maps) -> Target:
        u, to = _random_step(path)
        nearer = u + (to - u) * jnp.maximum(0.5 ** (path.progress * shrinks), 2.0**-shrinks)
        # the student's prediction for the rest, joined to the straight piece before it
        state = maps.student(path.state_on_line(u, nearer), nearer, to)
        target = _target_towards(path, maps, u, to, state)
        return target._replace(weight=target.weight * _reach(path, u, to, moving=u) / (u - to))

    return method


def shortcut() -> Method:
    """Any step as two of half its length (Frans et al. 2024, eq. 4)."""

    def method(path: Path, maps: Maps) -> Target:
        u, to = _random_step(path)
        middle = (u + to) / 2
        state = maps.student(maps.student(path.at(u), u, middle), middle, to)
        return _target_towards(path, maps, u, to, state)

    return method


def mean_flow() -> Method:
    """The state at `to` stays the same as its start moves along the path (MeanFlow, Geng et al. 2025; any schedule).

    The method raises ValueError for predictions of x0. So do `improved_mean_flow` and `continuous_consistency`.
    """
    return lambda path, maps: _derivative_target(path, maps, *_random_step(path))


def improved_mean_flow() -> Method:
    """`mean_flow` whose derivative of the network follows the student's own velocity, its output where a step has no
    length (iMF, Geng et al. 2025b, arXiv 2512.02012, eq. 12 and algorithm 1; any schedule).

    The velocity of the path is that of one pair of data and noise, so it varies much. Here it is only the target of a
    plain regression. On flow, with V = u + (t - r) sg(du/dt), the loss is |V - (eps - x0)|^2. The student learns its
    own velocity from the examples of `plain`.
    """

    def method(path: Path, maps: Maps) -> Target:
        u, to = _random_step(path)
        slope = path.slope(u)
        own = maps.own(path.at(u), u)
        target = _derivative_target(path._replace(ends=lambda u: own), maps, u, to)
        a, b = maps.coefficients(u, to)
        gain = a * _reach(path, u, to, moving=u) / b
        error = add_noise(*path.ends(u), slope) - add_noise(*own, slope)
        return target._replace(out=target.out - expand(gain, error) * error)

    return method


def continuous_consistency(warm_up: float = 0.5) -> Method:
    """`mean_flow` to clean data, a consistency model in continuous time (sCM, Lu & Song 2024). With a robust loss of
    0.5 its tangents are normalized as in their section 4.1.

    warm_up: part of the training during which the derivative takes over from plain regression.
    """

    def method(path: Path, maps: Maps) -> Target:
        u = jnp.maximum(path.draw(0), MIN_STEP)
        target = _derivative_target(path, maps, u, jnp.zeros_like(u))
        part = jnp.minimum(path.progress / warm_up, 1.0) if warm_up else 1.0
        regression = maps.parameterization.target(*path.ends(u), path.level(u))
        return target._replace(out=part * target.out + (1 - part) * regression)

    return method


def _derivative_target(path: Path, maps: Maps, u: Times, to: Times) -> Target:
    if maps.parameterization == NAMED["x0"]:  # any constant x0 satisfies the derivative
        raise ValueError(
            "mean_flow, improved_mean_flow and continuous_consistency need a network that predicts eps, v, flow or "
            "edm, got x0: set objective.prediction"
        )

    def student_from(start: Times) -> tuple[State, State]:
        return maps.student_and_output(path.state_on_line(u, start), start, to)

    with without_kernels():
        _, change, out = jax.jvp(student_from, (u,), (jnp.ones_like(u),), has_aux=True)
    return _corrected_target(path, maps, u, to, out, change, moving=u)


def lagrangian() -> Method:
    """Lagrangian self-distillation (Boffi et al. 2025): as `to` moves, the predicted state follows its flow."""

    def method(path: Path, maps: Maps) -> Target:
        u, to = _random_step(path)
        to, x = jnp.maximum(to, MIN_STEP), path.at(u)
        with without_kernels():
            state, change, out = jax.jvp(
                lambda end: maps.student_and_output(x, u, end), (to,), (jnp.ones_like(to),), has_aux=True
            )
        ends = maps.parameterization.predict(state, maps.output(state, to, to), path.level(to))
        _, flow = jax.jvp(lambda end: add_noise(*ends, path.level(end)), (to,), (jnp.ones_like(to),))
        return _corrected_target(path, maps, u, to, out, flow - change, moving=to)

    return method


def _corrected_target(path: Path, maps: Maps, u: Times, to: Times, out: State, excess: State, moving: Times) -> Target:
    """The target that removes an excess from the state at `to`: out - (reach / b) excess.

    excess: change of the state that should not be there, as the time `moving` grows by 1.
    On flow this is the output for which the derivative is right (MeanFlow, Geng et al. 2025, eq. 6), and on a schedule
    that preserves the variance, for v, that of sCM, where the whole step's gain is -cos(phi) (Lu & Song 2024, eq. 8).
    """
    _, b = maps.coefficients(u, to)
    gain = _reach(path, u, to, moving) / b
    return Target(u, to, out - expand(gain, out) * excess, jnp.ones_like(u))


def _reach(path: Path, u: Times, to: Times, moving: Times) -> Times:
    """How far a step goes, in the time `moving`, its start u or its end `to`.

    In the plane of (alpha, sigma), with the chord C of the step and the tangents T and T' at the moving and the other
    end, it is C.T / |T|^2 cos(T, T'): u - to on a straight line at constant speed, such as flow, and sin(d) cos(d) of
    the angle d of the step on a circle, in the time of the angle. So reach / b^2 falls, and errors shrink. With the
    length of the chord instead they grow on steps of more than 70 degrees of the circle.
    """
    start, end = path.level(u), path.level(to)
    tangent, first, last = path.slope(moving), path.slope(u), path.slope(to)
    along = (start.alpha - end.alpha) * tangent.alpha + (start.sigma - end.sigma) * tangent.sigma
    turned = first.alpha * last.alpha + first.sigma * last.sigma
    speeds = jnp.hypot(first.alpha, first.sigma) * jnp.hypot(last.alpha, last.sigma)
    return along / (tangent.alpha**2 + tangent.sigma**2) * turned / speeds


def guidance_distillation() -> Method:
    """The output of the guided teacher at every level (Meng et al. 2023, section 3.1)."""

    def method(path: Path, maps: Maps) -> Target:
        u = jnp.maximum(path.draw(0), MIN_STEP)
        # the tangent of the teacher's path, as the step to a level near by
        to = jnp.maximum(u - 10 * MIN_STEP, 0.0)
        target = _target_towards(path, maps, u, to, maps.teacher(path.at(u), u, to))
        return target._replace(to=u)

    return method


def _random_step(path: Path) -> tuple[Times, Times]:
    """u and a target nearer to clean data, two random levels in order; one target in four is clean data itself."""
    first, second = path.draw(0), path.draw(1)
    u, to = jnp.maximum(first, second), jnp.minimum(first, second)
    u = jnp.maximum(u, 2 * MIN_STEP)
    to = jnp.where((path.uniform(2) < 0.25) | (u - to < MIN_STEP), 0.0, to)
    return u, to

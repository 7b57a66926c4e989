"""Solvers of several stages a step. A trial state is a row like any other.

A prime marks the level after a step: alpha', sigma'. lambda = log(alpha / sigma), h = lambda' - lambda. The state at
the start of a step is not stored. It is linear in the trial state and the prediction there, so it is written in them.

Where h is infinite (to sigma' = 0, or from alpha = 0) a step has one stage and is of first order. Solvers that use the
noise prediction also do so from a level that is pure noise in practice: its sigma / alpha is at least `noise_alone`.
Two predictions there hardly differ, and h multiplies their difference, by thousands on the cosine schedule, whose last
sigma / alpha is 20,000.
"""

import functools
from collections.abc import Callable

import numpy as np

from diffusion_jax.core.process import NoiseLevel
from diffusion_jax.core.schedules import NOISE_ALONE, Schedule
from diffusion_jax.core.solvers.plan import EPS, PAST, X0, Plan, Row, Spacing, Step, Z, path, renoised, stack, state

Solver = Callable[..., Plan]


def finite(level: NoiseLevel, next: NoiseLevel) -> bool:
    """Whether the step's h is finite."""
    return bool(level.alpha > 0 and next.sigma > 0)


def differs(level: NoiseLevel, next: NoiseLevel, noise_alone: float = NOISE_ALONE) -> bool:
    """Whether a noise prediction at `level` depends enough on the image to be compared with the next one."""
    return finite(level, next) and bool(level.sigma < noise_alone * level.alpha)


def first_order(level: NoiseLevel, next: NoiseLevel, memory: np.ndarray = X0) -> Row:
    """x' = alpha' x0 + sigma' eps."""
    return Row(level, next, state(next), memory)


def heun(schedule: Schedule, steps: int, spacing: Spacing = "trailing", noise_alone: float = NOISE_ALONE) -> Plan:
    """Heun's method on d(x / alpha) / ds = eps, s = sigma / alpha (Karras et al. 2022, algorithm 1).

        x_1 / alpha' = x / alpha + (s' - s) eps
        x' / alpha'  = x / alpha + (s' - s) (eps + eps_1) / 2

    2 steps - 1 network calls.

    noise_alone: sigma / alpha from which steps are of first order.
    """
    rows = []
    for level, next in path(schedule, steps, spacing):
        rows.append(first_order(level, next, EPS))
        if differs(level, next, noise_alone):
            ds = next.sigma / next.alpha - level.sigma / level.alpha
            rows.append(Row(next, next, state(next) + next.alpha * ds * (EPS - PAST[0]) / 2, EPS))
    return stack(rows)


def flow_heun(schedule: Schedule, steps: int, spacing: Spacing = "trailing", floor: float = 0.0) -> Plan:
    """Heun's method on the velocity of the straight path from data to noise (Li & He 2025, JiT; JLT, arXiv 2605.27102).

    With z = x / (alpha + sigma) and u = sigma / (alpha + sigma), z = (1 - u) x0 + u eps on any schedule, and
      v = dz / du = (z - x0) / u
      z_1 = z + (u' - u) v;   z' = z + (u' - u) (v + v_1) / 2;   the last step, to u' = 0, is z_1
    u ends at 1 where sigma / alpha is infinite, so the first step, too, is of second order. 2 steps - 1 network calls.
    floor: of the u that v is divided by, in [0, 1]. Above the last u, it makes the last step a part of the way to x0
      and leaves the rest of the noise, (1 - u / floor) u. See docs/samplers.md.
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be in [0, 1], got {floor}")

    def scale(level: NoiseLevel) -> float:
        return level.alpha + level.sigma

    def velocity(level: NoiseLevel) -> np.ndarray:
        """(z - x0) / max(u, floor)."""
        u = level.sigma / scale(level)
        return (state(level) / scale(level) - X0) / max(u, floor)

    rows = []
    for level, next in path(schedule, steps, spacing):
        du, v = next.sigma / scale(next) - level.sigma / scale(level), velocity(level)
        rows.append(Row(level, next, scale(next) * (state(level) / scale(level) + du * v), v))
        if next.sigma > 0:
            v1 = velocity(next)
            rows.append(Row(next, next, state(next) + scale(next) * du * (v1 - PAST[0]) / 2, v1))
    return stack(rows)


def dpm_solver(
    schedule: Schedule,
    steps: int,
    spacing: Spacing = "trailing",
    order: int = 2,
    noise_alone: float = NOISE_ALONE,
) -> Plan:
    """DPM-Solver of order 1, 2 or 3, singlestep (Lu et al. 2022, algorithms 1, 2 and 4). `steps` network calls.

    Stages are at levels of the grid: `steps` levels are grouped into steps of `order` stages, fewer at the end. With
    r_i = (lambda_i - lambda) / h, e, e_1, e_2 the noise predictions of the stages, and phi(h) = exp(h) - 1:

        u_1 = alpha_1 / alpha x - sigma_1 phi(r_1 h) e
        u_2 = alpha_2 / alpha x - sigma_2 phi(r_2 h) e - sigma_2 r_2 / r_1 (phi(r_2 h) / (r_2 h) - 1) (e_1 - e)
        2nd order: x' = alpha' / alpha x - sigma' phi(h) e - sigma' / (2 r_1) phi(h) (e_1 - e)
        3rd order: x' = alpha' / alpha x - sigma' phi(h) e - sigma' / r_2 (phi(h) / h - 1) (e_2 - e)

    order: 1, 2 or 3.
    noise_alone: sigma / alpha from which steps are of first order.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"dpm_solver has orders 1, 2 and 3, got {order}")
    rows = []
    can_join = functools.partial(differs, noise_alone=noise_alone)
    for levels in _groups(path(schedule, steps, spacing), order, can_join):
        (s, *stages, t), lam = levels, [level.logsnr / 2 for level in levels]
        h = lam[-1] - lam[0]
        r = [(stage - lam[0]) / h for stage in lam[1:-1]]
        rows.append(first_order(s, levels[1], EPS))
        if len(stages) == 1:
            (s1,), (r1,), e = stages, r, PAST[0]
            x = s.alpha / s1.alpha * (state(s1) + s1.sigma * np.expm1(r1 * h) * e)
            second = t.sigma / (2 * r1) * np.expm1(h) * (EPS - e)
            rows.append(Row(s1, t, t.alpha / s.alpha * x - t.sigma * np.expm1(h) * e - second, EPS))
        elif len(stages) == 2:
            (s1, s2), (r1, r2) = stages, r

            def to_s2(e: np.ndarray, e1: np.ndarray, s2=s2, r1=r1, r2=r2, h=h) -> np.ndarray:
                """u_2 without its term in x."""
                slope = r2 / r1 * (np.expm1(r2 * h) / (r2 * h) - 1)
                return -s2.sigma * (np.expm1(r2 * h) * e + slope * (e1 - e))

            e = PAST[0]
            x = s.alpha / s1.alpha * (state(s1) + s1.sigma * np.expm1(r1 * h) * e)
            rows.append(Row(s1, s2, s2.alpha / s.alpha * x + to_s2(e, EPS), EPS))
            e, e1 = PAST[1], PAST[0]
            x = s.alpha / s2.alpha * (state(s2) - to_s2(e, e1))
            third = t.sigma / r2 * (np.expm1(h) / h - 1) * (EPS - e)
            rows.append(Row(s2, t, t.alpha / s.alpha * x - t.sigma * np.expm1(h) * e - third, EPS))
    return stack(rows)


def _groups(steps: list[Step], order: int, can_join: Callable) -> list[list[NoiseLevel]]:
    """The levels of each solver step: its start, the grid levels of its other stages, and its end.

    can_join: (level, next) -> whether that step of the grid can be part of a longer one.
    """
    groups, stages = [], []
    for i, (level, next) in enumerate(steps):
        stages.append(level)
        last = i + 1 == len(steps) or not can_join(*steps[i + 1])
        if len(stages) == order or last or not can_join(level, next):
            groups.append([*stages, next])
            stages = []
    return groups


def dpmpp_2s(schedule: Schedule, steps: int, spacing: Spacing = "trailing") -> Plan:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1). `steps` network calls.

    Stages are at levels of the grid. With r = (lambda_1 - lambda) / h, and m, m_1 the data predictions of the stages:

        u  = sigma_1 / sigma x - alpha_1 (exp(-r h) - 1) m
        x' = sigma' / sigma x - alpha' (exp(-h) - 1) ((1 - 1 / (2 r)) m + 1 / (2 r) m_1)
    """
    rows = []
    for s, *stages, t in _groups(path(schedule, steps, spacing), 2, finite):
        rows.append(first_order(s, (*stages, t)[0]))
        if stages:
            (s1,), m = stages, PAST[0]
            h, rh = (t.logsnr - s.logsnr) / 2, (s1.logsnr - s.logsnr) / 2
            x = s.sigma / s1.sigma * (state(s1) + s1.alpha * np.expm1(-rh) * m)
            D = (1 - h / (2 * rh)) * m + h / (2 * rh) * X0
            rows.append(Row(s1, t, t.sigma / s.sigma * x - t.alpha * np.expm1(-h) * D))
    return stack(rows)


def dpmpp_sde(schedule: Schedule, steps: int, spacing: Spacing = "trailing") -> Plan:
    """DPM-Solver++(SDE), two stages a step, the first halfway in lambda (Lu et al. 2022b, section 5, stages as in 2S).

        u  = sigma_1 / sigma exp(-h / 2) x + alpha_1 (1 - exp(-h)) m + n_1
        x' = sigma' / sigma exp(-h) x + alpha' (1 - exp(-2 h)) m_1 + n'

    with n_1 of variance sigma_1^2 (1 - exp(-h)) and n' = sigma' / sigma_1 exp(-h / 2) n_1 + sigma' sqrt(1 - exp(-h)) z.
    Both come from the same Brownian motion. 2 steps - 1 network calls.
    """
    rows = []
    for s, t in path(schedule, steps, spacing):
        if not finite(s, t):
            rows.append(Row(s, t, t.alpha * X0 + t.sigma * Z))
            continue
        lam, h = s.logsnr / 2, (t.logsnr - s.logsnr) / 2
        s1 = schedule(schedule.t_of_logsnr(2 * lam + h))
        decay, fresh = np.exp(-h / 2), -np.expm1(-h)  # fresh: part of the variance of u that is new noise

        x, m = state(s), X0
        trial = s1.sigma / s.sigma * decay * x + s1.alpha * fresh * m
        # n' contains ratio n_1, and n_1 = u - trial: remember the part of x' that has neither m_1 nor ratio u
        ratio = t.sigma / s1.sigma * decay
        rows.append(
            Row(s, s1, trial + s1.sigma * fresh**0.5 * Z, memory=t.sigma / s.sigma * decay**2 * x - ratio * trial)
        )
        final = PAST[0] + ratio * state(s1) - t.alpha * np.expm1(-2 * h) * X0
        rows.append(Row(s1, t, final + t.sigma * fresh**0.5 * Z))
    return stack(rows)


def with_churn(solver: Solver, churn: float, s_min: float = 0.0, s_max: float = np.inf, s_noise: float = 1.0) -> Solver:
    """The solver with noise added before each step (Karras et al. 2022, algorithm 2).

    Before each step, noise raises the level from s = sigma / alpha to

        s (1 + gamma),   gamma = min(churn / steps, sqrt(2) - 1),   but not above the schedule's t_max

    solver: a one-step solver of this package, such as heun or euler.
    churn: S_churn, how much noise all steps add together.
    s_min, s_max: add noise only where s is in [s_min, s_max].
    s_noise: factor on the standard deviation of the noise.
    """
    if churn < 0 or s_noise < 0:
        raise ValueError(f"churn and s_noise must be at least 0, got {churn} and {s_noise}")

    def churned(schedule: Schedule, steps: int, spacing: Spacing = "trailing", **options) -> Plan:
        gamma = min(churn / steps, 2**0.5 - 1)

        def raised(level: NoiseLevel) -> NoiseLevel:
            if level.alpha == 0 or not s_min <= level.sigma / level.alpha <= s_max:
                return level
            return schedule(schedule.t_of_logsnr(level.logsnr - 2 * np.log1p(gamma)))

        grid = [(raised(level), next) for level, next in path(schedule, steps, spacing)]
        return renoised(solver(schedule, steps, spacing=grid, **options), s_noise)

    return churned

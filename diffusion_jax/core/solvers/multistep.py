"""Solvers that use the predictions of earlier steps.

A prime marks the level after a step: alpha', sigma'. lambda = log(alpha / sigma), h = lambda' - lambda. m_0, m_1, ...
are data predictions, e_0, e_1, ... noise predictions, the newest first. The order grows as predictions come in. It
falls to 1 on the last step, where sigma' = 0 and h is infinite. Predictions made at alpha = 0 are not used again.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from diffusion_jax.core.process import NoiseLevel
from diffusion_jax.core.schedules import NOISE_ALONE, Schedule
from diffusion_jax.core.solvers.plan import EPS, PAST, X0, Plan, Row, Spacing, Step, Z, path, stack, state
from diffusion_jax.core.solvers.singlestep import differs, finite

Levels = list[NoiseLevel]


def _multistep(steps: list[Step], orders: Sequence[int], update: Callable, memory: np.ndarray) -> Plan:
    """Build each step by update(levels, next, predictions).

    orders: highest order of each step. A step uses at most as many predictions as were made.
    levels, predictions: as many as the step's order, the newest first.
    memory: kind of prediction to keep, X0 or EPS.
    """
    rows = []
    for i, ((level, next), order) in enumerate(zip(steps, orders, strict=True)):
        levels = [start for start, _ in reversed(steps[max(i + 1 - order, 0) : i + 1]) if start.alpha > 0]
        rows.append(Row(level, next, update(levels or [level], next, [memory, *PAST]), memory))
    return stack(rows)


def _orders(steps: list[Step], order: int, lower_order_final: bool = True) -> list[int]:
    """The order of each step: 1 where h is infinite or 0. lower_order_final: lower the order towards the end."""
    limits = [min(order, len(steps) - i) if lower_order_final else order for i in range(len(steps))]
    moves = [finite(level, next) and level.sigma != next.sigma for level, next in steps]
    return [limit if moved else 1 for moved, limit in zip(moves, limits, strict=True)]


def _order(order: int, supported: tuple[int, ...], solver: str) -> int:
    if order not in supported:
        raise ValueError(f"{solver} has orders {', '.join(map(str, supported))}, got {order}")
    return order


def _lambda(level: NoiseLevel) -> float:
    return level.logsnr / 2


def _second_difference(levels: Levels, next: NoiseLevel, m: list[np.ndarray]) -> tuple[float, np.ndarray]:
    """h and D_1 = (m_0 - m_1) / r, r = (lambda_0 - lambda_1) / h (Lu et al. 2022b, section 4.2)."""
    h = _lambda(next) - _lambda(levels[0])
    return h, (m[0] - m[1]) * h / (_lambda(levels[0]) - _lambda(levels[1]))


def _dpmpp_2m(levels: Levels, next: NoiseLevel, m: list[np.ndarray]) -> np.ndarray:
    if len(levels) == 1:
        return state(next)
    h, D1 = _second_difference(levels, next, m)
    return next.sigma / levels[0].sigma * state(levels[0]) - next.alpha * np.expm1(-h) * (m[0] + D1 / 2)


def dpmpp_2m(schedule: Schedule, steps: int, spacing: Spacing = "trailing", lower_order_final: bool = True) -> Plan:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2). `steps` network calls.

        x' = sigma' / sigma x - alpha' (exp(-h) - 1) (m_0 + (m_0 - m_1) / (2 r)),   r = (lambda_0 - lambda_1) / h

    lower_order_final: use order 1 for the last step even if it does not end on clean data.
    """
    grid = path(schedule, steps, spacing)
    return _multistep(grid, _orders(grid, 2, lower_order_final), _dpmpp_2m, X0)


def dpmpp_3m(
    schedule: Schedule,
    steps: int,
    spacing: Spacing = "trailing",
    lower_order_final: bool = True,
    curvature: float = 2.0,
) -> Plan:
    """DPM-Solver++(3M), the multistep solver of third order (Lu et al. 2022b, section 4). `steps` network calls.

        r_i = (lambda_i - lambda_{i+1}) / h,  D_10 = (m_0 - m_1) / r_0,  D_11 = (m_1 - m_2) / r_1
        D_1 = D_10 + r_0 / (r_0 + r_1) (D_10 - D_11),  D_2 = curvature (D_10 - D_11) / (r_0 + r_1)
        x' = sigma' / sigma x - alpha' (exp(-h) - 1) m_0 + alpha' ((exp(-h) - 1) / h + 1) D_1
             - alpha' ((exp(-h) - 1 + h) / h^2 - 1 / 2) D_2

    lower_order_final: use orders 2 and 1 for the last two steps.
    curvature: 2 makes D_2 equal h^2 times the second derivative of m in lambda. Published code has 1, which gives only
      second order.
    """

    def update(levels: Levels, next: NoiseLevel, m: list[np.ndarray]) -> np.ndarray:
        if len(levels) < 3:
            return _dpmpp_2m(levels, next, m)
        h, D10 = _second_difference(levels, next, m)
        lam = [_lambda(level) for level in levels]
        r0, r1 = (lam[0] - lam[1]) / h, (lam[1] - lam[2]) / h
        D11 = (m[1] - m[2]) / r1
        D1 = D10 + r0 / (r0 + r1) * (D10 - D11)
        D2 = curvature * (D10 - D11) / (r0 + r1)
        return (
            next.sigma / levels[0].sigma * state(levels[0])
            - next.alpha * np.expm1(-h) * m[0]
            + next.alpha * (np.expm1(-h) / h + 1) * D1
            - next.alpha * ((np.expm1(-h) + h) / h**2 - 0.5) * D2
        )

    grid = path(schedule, steps, spacing)
    return _multistep(grid, _orders(grid, 3, lower_order_final), update, X0)


def dpmpp_2m_sde(schedule: Schedule, steps: int, spacing: Spacing = "trailing", lower_order_final: bool = True) -> Plan:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, section 5). `steps` network calls.

        x' = sigma' / sigma exp(-h) x + alpha' (1 - exp(-2 h)) (m_0 + (m_0 - m_1) / (2 r))
             + sigma' sqrt(1 - exp(-2 h)) z

    lower_order_final: as in `dpmpp_2m`.
    """

    def update(levels: Levels, next: NoiseLevel, m: list[np.ndarray]) -> np.ndarray:
        level = levels[0]
        if not finite(level, next):
            return next.alpha * X0 + next.sigma * Z
        h, D1 = _second_difference(levels, next, m) if len(levels) > 1 else (_lambda(next) - _lambda(level), 0.0)
        fresh = -np.expm1(-2 * h)  # part of the variance of x' that is new noise
        drift = next.sigma / level.sigma * np.exp(-h) * state(level) + next.alpha * fresh * (m[0] + D1 / 2)
        return drift + next.sigma * fresh**0.5 * Z

    grid = path(schedule, steps, spacing)
    return _multistep(grid, _orders(grid, 2, lower_order_final), update, X0)


def _adams_weights(nodes: Sequence[float] | np.ndarray, moments: Sequence[float] | np.ndarray) -> np.ndarray:
    """w with sum_j w_j u_j^k = moments_k: the rule that is exact for polynomials through the nodes u."""
    return np.linalg.solve(np.vander(nodes, increasing=True).T, moments)


def deis(
    schedule: Schedule, steps: int, spacing: Spacing = "trailing", order: int = 3, lower_order_final: bool = True
) -> Plan:
    """Diffusion exponential integrator, tAB-DEIS in log(sigma / alpha) (Zhang & Chen 2022, eq. 14).

    It makes `steps` network calls.

        x' = alpha' / alpha x - sigma' sum_j w_j e_j

    This is exact where e is a polynomial in lambda. With u = (lambda - lambda_0) / h the weights are those with

        sum_j w_j u_j^k = c_k = h int_0^1 u^k exp((1 - u) h) du,   c_0 = exp(h) - 1,   c_k = k / h c_{k-1} - 1

    order: 1, 2 or 3. Number of predictions used.
    lower_order_final: lower the order of the last steps, down to 1, even if they do not end on clean data.
    """

    def update(levels: Levels, next: NoiseLevel, e: list[np.ndarray]) -> np.ndarray:
        if len(levels) == 1:
            return state(next)
        h = _lambda(next) - _lambda(levels[0])
        nodes = [(_lambda(level) - _lambda(levels[0])) / h for level in levels]
        moments = [np.expm1(h)]
        for k in range(1, len(levels)):
            moments.append(k / h * moments[-1] - 1)
        slope = _adams_weights(nodes, moments) @ e[: len(levels)]
        return next.alpha / levels[0].alpha * state(levels[0]) - next.sigma * slope

    grid = path(schedule, steps, spacing)
    return _multistep(grid, _orders(grid, _order(order, (1, 2, 3), "deis"), lower_order_final), update, EPS)


def lms(schedule: Schedule, steps: int, spacing: Spacing = "trailing", order: int = 4) -> Plan:
    """Linear multistep of Adams and Bashforth on d(x / alpha) / ds = e, s = sigma / alpha. `steps` network calls.

        x' / alpha' = x / alpha + (s' - s) sum_j w_j e_j

    This is exact where e is a polynomial in s. With u = (s - s_0) / (s' - s_0) the weights are those with

        sum_j w_j u_j^k = int_0^1 u^k du = 1 / (k + 1)

    order: 1 to 4. Number of predictions used.
    """

    def update(levels: Levels, next: NoiseLevel, e: list[np.ndarray]) -> np.ndarray:
        level, count = levels[0], len(levels)
        if count == 1:
            return state(next)
        s = np.array([past_level.sigma / past_level.alpha for past_level in levels])
        ds = next.sigma / next.alpha - s[0]
        slope = _adams_weights((s - s[0]) / ds, 1 / np.arange(1, count + 1)) @ e[:count]
        return next.alpha * (state(level) / level.alpha + ds * slope)

    orders = tuple(range(1, len(PAST) + 1))
    grid = path(schedule, steps, spacing)
    return _multistep(grid, [_order(order, orders, "lms")] * len(grid), update, EPS)


def plms(schedule: Schedule, steps: int, spacing: Spacing = "trailing", noise_alone: float = NOISE_ALONE) -> Plan:
    """Pseudo linear multistep (Liu et al. 2022, eq. 12): DDIM along the Adams-Bashforth mean of up to 4 predictions.

    The first step is taken twice, the second time along (e + e_1) / 2 as in Heun's method. It makes steps + 1 network
    calls, or `steps` if there is only one step or the first starts from pure noise.

    noise_alone: sigma / alpha from which a level counts as pure noise.
    """
    adams = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    rows, main_rows = [], []  # main_rows: the rows whose predictions later rows use
    for i, (level, next) in enumerate(path(schedule, steps, spacing)):
        main_rows.append(len(rows))
        weights = adams[min(len(main_rows), 4)]
        e = sum(w * [EPS, *PAST][len(rows) - row] for w, row in zip(weights, reversed(main_rows), strict=False))
        # alpha' / alpha (x - sigma e) + sigma' e with x = alpha X0 + sigma EPS
        change = next.sigma * e
        if level.alpha > 0:
            change = change + next.alpha * level.sigma / level.alpha * (EPS - e)
        rows.append(Row(level, next, next.alpha * X0 + change, EPS))
        if i == 0 and differs(level, next, noise_alone):
            slope = next.sigma - next.alpha * level.sigma / level.alpha
            rows.append(Row(next, next, state(next) + slope * (EPS - PAST[0]) / 2, EPS))
    return stack(rows)


def unipc(schedule: Schedule, steps: int, spacing: Spacing = "trailing", order: int = 2, variant: str = "bh2") -> Plan:
    """UniPC with data prediction (Zhao et al. 2023, algorithms 5 to 8). `steps` network calls.

    With r_j = (lambda_j - lambda_0) / h and D_j = (m_j - m_0) / r_j the predictor is

        x' = sigma' / sigma x - alpha' (exp(-h) - 1) m_0 - alpha' B(h) sum_j a_j D_j

    The corrector is the same with one more D_j: that of m', the new prediction at x', whose r is 1. The next step
    starts from the same prediction at x'.

    order: 1, 2 or 3. That of the predictor; the corrector adds one.
    variant: "bh1" for B(h) = -h, "bh2" for B(h) = exp(-h) - 1.
    """
    _order(order, (1, 2, 3), "unipc")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"unknown variant {variant!r} of unipc: one of 'bh1', 'bh2'")
    rows, earlier, grid = [], [], path(schedule, steps, spacing)
    for i, (level, next) in enumerate(grid):
        x = state(level)
        if earlier:  # corrector and predictor start from the same x: only the terms that they add differ
            x = x + _unipc_terms(earlier, level, PAST, variant, X0) - _unipc_terms(earlier, level, PAST, variant)
        earlier = []
        update = state(next)
        if finite(level, next):
            levels = [start for start, _ in reversed(grid[: i + 1]) if start.alpha > 0]
            earlier = levels[: min(order, len(grid) - i)]
            update = next.sigma / level.sigma * x + _unipc_terms(earlier, next, [X0, *PAST], variant)
        rows.append(Row(level, next, update))
    return stack(rows)


def _unipc_terms(
    levels: Levels, next: NoiseLevel, m: list[np.ndarray], variant: str, m_next: np.ndarray | None = None
) -> np.ndarray:
    """The term that UniPC's predictor adds to sigma' / sigma x; the corrector's term if m_next is given."""
    lam = [_lambda(level) for level in levels]
    h = _lambda(next) - lam[0]
    nodes = [(lam_i - lam[0]) / h for lam_i in lam[1:]]
    differences = [(m_j - m[0]) / r for m_j, r in zip(m[1:], nodes, strict=False)]
    if m_next is not None:
        nodes, differences = [*nodes, 1.0], [*differences, m_next - m[0]]
    B = -h if variant == "bh1" else np.expm1(-h)
    if len(nodes) < 2:
        weights = [0.5] * len(nodes)  # of second order for any B (section 3.4)
    else:
        phi, moments = np.expm1(-h), []
        for k in range(1, len(nodes) + 1):  # phi_k+1 = (phi_k - 1 / k!) / -h, each times -h
            phi = phi / -h - 1 / math.factorial(k)
            moments.append(phi * math.factorial(k) / B)
        weights = _adams_weights(nodes, moments)
    correction = sum((a * D for a, D in zip(weights, differences, strict=True)), np.zeros_like(X0))
    return -next.alpha * (np.expm1(-h) * m[0] + B * correction)

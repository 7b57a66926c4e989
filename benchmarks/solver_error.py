"""Error against network calls for every solver, on a problem whose solution is known: plots docs/solver_error.png.

    pip install -r requirements-dev.txt matplotlib
    python -m benchmarks.solver_error

The target is the mixture of three Gaussians in the plane of tests/core/mixture.py, whose denoiser is known in closed
form, on the linear schedule of 1,000 steps with times even in log-SNR; all in float64. Left, deterministic solvers:
median distance to where the probability flow, solved by an adaptive method of order 8, carries the same noise. Right,
stochastic ones: sliced Wasserstein distance of 20,000 samples to as many of the mixture, with its value for two exact
sets of samples as the floor.
"""

from collections.abc import Callable
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
from scipy.integrate import solve_ivp

from benchmarks import quick
from diffusion_jax.core import schedules, solvers
from diffusion_jax.core.process import NoiseLevel
from diffusion_jax.core.solvers import Plan
from tests.core.mixture import PLANE, run

DETERMINISTIC = {
    "ddim, euler, dpmpp_1": solvers.ddim,
    "heun": solvers.heun,
    "dpm_solver, order 2": solvers.dpm_solver,
    "dpm_solver, order 3": partial(solvers.dpm_solver, order=3),
    "dpmpp_2s": solvers.dpmpp_2s,
    "dpmpp_2m": solvers.dpmpp_2m,
    "dpmpp_3m": solvers.dpmpp_3m,
    "unipc, order 2": solvers.unipc,
    "unipc, order 3": partial(solvers.unipc, order=3),
    "deis, order 3": solvers.deis,
    "plms": solvers.plms,
    "lms, order 4": solvers.lms,
}
STOCHASTIC = {
    "ddpm, euler_ancestral": solvers.ddpm,
    "ddim, eta 0.5": partial(solvers.ddim, eta=0.5),
    "dpmpp_sde": solvers.dpmpp_sde,
    "dpmpp_2m_sde": solvers.dpmpp_2m_sde,
    "heun with churn": solvers.with_churn(solvers.heun, churn=20.0, s_min=0.05, s_max=50.0),
}
STEPS = (4, 6, 9, 13, 19, 28, 42, 64, 96, 144, 216)
SCHEDULE = schedules.linear()
STYLES = [(color, marker) for marker in "os^" for color in ("tab:blue", "tab:orange", "tab:green", "tab:red")]


def exact_flow(noise: np.ndarray) -> np.ndarray:
    """The data prediction at t_min after the probability flow from noise (B, 2) at t_max."""
    start, end = SCHEDULE(SCHEDULE.t_max), SCHEDULE(SCHEDULE.t_min)

    def flow(lam: float, y: np.ndarray) -> np.ndarray:  # y = x / alpha, dy / dlambda = -sigma / alpha eps
        level = NoiseLevel(0.0, 1.0, np.exp(-lam))
        return -level.sigma * PLANE.denoise(y.reshape(noise.shape), level).eps.ravel()

    span = start.logsnr / 2, end.logsnr / 2
    solution = solve_ivp(flow, span, (noise / start.alpha).ravel(), method="DOP853", rtol=1e-10, atol=1e-12)
    return PLANE.denoise(end.alpha * solution.y[:, -1].reshape(noise.shape), end).x0


def sliced_wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over 64 directions of the Wasserstein-1 distance between the projections of two sets of samples (N, 2)."""
    angles = np.pi * np.arange(64) / 64
    directions = np.stack([np.cos(angles), np.sin(angles)])
    return float(np.mean(np.abs(np.sort(a @ directions, axis=0) - np.sort(b @ directions, axis=0))))


def mixture_samples(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 2) samples of the mixture itself."""
    component = rng.choice(len(PLANE.weights), count, p=PLANE.weights)
    return PLANE.means[component] + PLANE.stds[component, None] * rng.normal(size=(count, 2))


def plot(axes: plt.Axes, solvers_by_name: dict[str, Callable], steps: tuple[int, ...], error: Callable) -> None:
    """Plot and print the error of each solver against its network calls. error: Plan -> float."""
    for (name, solver), (color, marker) in zip(solvers_by_name.items(), STYLES, strict=False):
        plans = [solver(SCHEDULE, n, spacing="logsnr") for n in steps]
        calls, errors = [plan.num_rows for plan in plans], [error(plan) for plan in plans]
        axes.loglog(calls, errors, color=color, marker=marker, markersize=4, label=name)
        print(f"{name}: " + ", ".join(f"{n} {e:.1e}" for n, e in zip(calls, errors, strict=True)))


def main() -> None:
    tiny = quick.parser(__doc__).parse_args().quick
    quick.note(tiny)
    steps, count = (STEPS[:2], 200) if tiny else (STEPS, 20_000)
    rng = np.random.default_rng(0)
    left_noise, right_noise = rng.normal(size=(256, 2)), rng.normal(size=(count, 2))
    exact, reference = exact_flow(left_noise), mixture_samples(rng, count)
    floor = sliced_wasserstein(mixture_samples(rng, count), reference)

    def distance(plan: Plan) -> float:
        return np.median(np.linalg.norm(run(plan, left_noise, PLANE.denoise) - exact, axis=1))

    def distance_of_samples(plan: Plan) -> float:
        noise = rng.normal(size=(plan.num_rows, *right_noise.shape))
        return sliced_wasserstein(run(plan, right_noise, PLANE.denoise, noise=noise), reference)

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), constrained_layout=True)
    plot(left, DETERMINISTIC, steps, distance)
    plot(right, STOCHASTIC, steps, distance_of_samples)
    right.axhline(floor, color="gray", linestyle=":", label="two exact sets of samples")
    left.set(title="deterministic", ylabel="median distance to the exact probability flow")
    right.set(title="stochastic", ylabel="sliced Wasserstein distance to the mixture")
    for axes in (left, right):
        axes.set_xlabel("network calls")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(quick.picture("solver_error.png", tiny), dpi=110)


if __name__ == "__main__":
    main()

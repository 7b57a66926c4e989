"""diffusers' schedulers beside our plans: one network, one list of time steps, both in float64.

`PEERS` has the scheduler, called the peer, of each solver. A peer's tables are float32; here it gets ours in float64
(that they are the same numbers is tested on its own), so that what is left to differ is the solver.
"""

import functools
import importlib
import itertools
import logging
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from diffusion_jax.core import schedules, solvers
from diffusion_jax.core.process import NoiseLevel
from diffusion_jax.core.solvers import HISTORY, Plan

logging.getLogger("diffusers").setLevel(logging.ERROR)

STEPS = (1, 2, 3, 5, 7, 10, 20, 50)
SCHEDULES = {  # ours, and what the peer calls it
    "linear": (schedules.linear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (
        schedules.scaled_linear(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (schedules.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
}
KINDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}

SEED, BATCH, DIM = 7, 3, 5
_rng = np.random.default_rng(0)
MEANS, STDS, WEIGHTS = _rng.normal(size=(3, DIM)), np.array([0.3, 0.5, 0.2]), np.array([0.5, 0.3, 0.2])
START = _rng.normal(size=(BATCH, DIM))


def network(x, level: NoiseLevel, kind: str):
    """The output of a perfect network for a Gaussian mixture, for x (B, D) at `level`: eps, v or x0."""
    xp = jnp if isinstance(x, jax.Array) else np
    alpha, sigma = level.alpha, level.sigma
    variance = alpha**2 * STDS**2 + sigma**2
    residual = x[:, None] - alpha * MEANS
    log = xp.log(WEIGHTS) - DIM / 2 * xp.log(variance) - xp.sum(residual**2, -1) / (2 * variance)
    weight = xp.exp(log - xp.max(log, 1, keepdims=True))
    weight = weight / xp.sum(weight, 1, keepdims=True)
    x0 = xp.einsum("bk,bkd->bd", weight, MEANS + (alpha * STDS**2 / variance)[:, None] * residual)
    eps = (x - alpha * x0) / sigma
    return {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0}[kind]


def predict(x: np.ndarray, level: NoiseLevel, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(x0, eps) from the network's output."""
    out, alpha, sigma = network(x, level, kind), level.alpha, level.sigma
    match kind:
        case "eps":
            return (x - sigma * out) / alpha, out
        case "x0":
            return out, (x - alpha * out) / sigma
    return alpha * x - sigma * out, sigma * x + alpha * out


def row_level(plan: Plan, i: int) -> NoiseLevel:
    return NoiseLevel(*(v[i] for v in plan.level))


def our_states(plan: Plan, x: np.ndarray, denoise: Callable, noise: np.ndarray) -> np.ndarray:
    """The state after each row, (R, B, D), by the rule that `plan` documents. noise: (R, B, D)."""
    states, past = [], np.zeros((HISTORY, *x.shape))
    for i in range(plan.num_rows):
        x0, eps = denoise(x, row_level(plan, i))
        x = plan.x0[i] * x0 + plan.eps[i] * eps + np.tensordot(plan.past[i], past, 1) + plan.noise[i] * noise[i]
        past = np.concatenate([(plan.memory[i, 0] * x0 + plan.memory[i, 1] * eps)[None], past[:-1]])
        states.append(x)
    return np.array(states)


class Exact(torch.Tensor):
    """float64 that stays so: some peers round their state to float32 in every step."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def to(self, *args, **kwargs):
        return self


@dataclass(frozen=True, eq=False)
class Peer:
    """A solver of ours and the scheduler that should be the same.

    ours: (schedule, steps, spacing) -> Plan. scheduler, config: the peer's class and its arguments.
    exploding: its state is x / alpha. ends_clean: its last level is clean data, else the least noisy of the schedule.
    spacings: those of the peer, or ours where it takes a list of times (takes_times).
    kinds: the predictions that it can use. noise: how it is given noise, "generator", "variance_noise" or "sampler".
    options: further arguments of its `step`. comparable: (steps, spacing) -> whether it can be the same there.
    left_out: (steps, spacing) -> how many rows at the end are known to differ.
    before_step: called with (scheduler, row) before each step. change: (x0, x, level) -> x0, what the peer does to the
    prediction and we leave to the denoiser. rounding: the difference that its arithmetic explains.
    """

    ours: Callable[..., Plan]
    scheduler: type
    config: dict = field(default_factory=dict)
    exploding: bool = False
    ends_clean: bool = True
    spacings: tuple[str, ...] = ("leading", "linspace", "trailing")
    takes_times: bool = False
    kinds: tuple[str, ...] = ("eps", "v", "x0")
    noise: str | None = None
    options: dict = field(default_factory=dict)
    comparable: Callable[[int, str], bool] = lambda steps, spacing: True
    left_out: Callable[[int, str], int] = lambda steps, spacing: 0
    before_step: Callable | None = None
    change: Callable | None = None
    rounding: float = 1e-9

    def build(self, schedule_name: str, kind: str, steps: int, spacing: str, exact: bool = True):
        """The scheduler, ready to step. exact: with our tables in float64, else with its own."""
        schedule, betas = SCHEDULES[schedule_name]
        config = {"prediction_type": KINDS[kind], **betas, **self.config}
        if not self.takes_times and spacing != "own":
            config["timestep_spacing"] = spacing
        scheduler = self.scheduler(**config)
        if exact:
            scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_bar)
        if self.takes_times and spacing != "linspace":
            scheduler.set_timesteps(timesteps=solvers.times(schedule, steps, spacing).astype(int).tolist())
        else:
            scheduler.set_timesteps(steps)
        if exact and hasattr(scheduler, "sigmas"):
            sigmas = _exact_sigmas(schedule, scheduler.sigmas.numpy(), self.times(scheduler))
            scheduler.sigmas = torch.from_numpy(sigmas)
        return scheduler

    def times(self, scheduler) -> tuple[float, ...]:
        """The time steps of a scheduler without the repetitions and trial times of solvers of two stages."""
        times = scheduler.timesteps.tolist()
        return tuple(times[::2]) if self.noise == "sampler" else tuple(dict.fromkeys(times))

    def plan(self, schedule_name: str, scheduler) -> Plan:
        """Our plan at the time steps of a scheduler."""
        times = self.times(scheduler)
        sigmas = () if _whole(times) else tuple(dict.fromkeys(scheduler.sigmas.tolist()))
        return _plan(self, schedule_name, times, sigmas)


def _whole(times: tuple[float, ...]) -> bool:
    return all(t == int(t) for t in times)


def _exact_sigmas(schedule, sigmas: np.ndarray, times: tuple[float, ...]) -> np.ndarray:
    """In float64: those of the schedule where the times are steps of it, from which the peer's are rounded."""
    if not _whole(times):
        return sigmas.astype(np.float64)
    level = schedule(np.arange(schedule.num_steps))
    table = level.sigma / level.alpha
    exact = np.where(sigmas > 0, table[np.argmin(np.abs(table / np.maximum(sigmas, 1e-9)[:, None] - 1), axis=1)], 0.0)
    np.testing.assert_allclose(sigmas, exact, rtol=1e-6)
    return exact


@functools.cache
def _plan(peer: Peer, schedule_name: str, times: tuple[float, ...], sigmas: tuple[float, ...]) -> Plan:
    """At whole times from the times alone; between them from the peer's levels, as it interpolates in sigma and not in
    log-SNR. A last step that does not end on clean data ends on the least noisy level.
    """
    schedule, spacing = SCHEDULES[schedule_name][0], list(times)
    if sigmas:
        s, t = np.array(sigmas), np.array([*times, 0.0])
        levels = [NoiseLevel(*level) for level in zip(t, (1 + s**2) ** -0.5, s * (1 + s**2) ** -0.5, strict=True)]
        spacing = list(itertools.pairwise(levels))
    elif not peer.ends_clean:
        spacing = list(itertools.pairwise([*map(schedule, times), schedule(0.0)]))
    return peer.ours(schedule, len(times), spacing=spacing)


def peer_states(
    scheduler,
    plan: Plan,
    x: np.ndarray,
    kind: str,
    noise: np.ndarray,
    *,
    exploding: bool = False,
    how: str | None = None,
    options: dict | None = None,
    before_step: Callable | None = None,
    exact: bool = True,
) -> np.ndarray:
    """The peer's state after each of its steps, (R, B, D), as x and not x / alpha. exact: kept in x's float64."""
    options, states = dict(options or {}), []
    if how == "generator":
        options["generator"] = torch.Generator().manual_seed(SEED)
    if how == "sampler":
        noises = iter(_brownian(plan, noise))
        scheduler.noise_sampler = lambda sigma, sigma_next: torch.from_numpy(next(noises))
    sample = torch.from_numpy(x / plan.level.alpha[0] if exploding else x)
    for i, t in enumerate(scheduler.timesteps):
        level = row_level(plan, i)
        assert abs(float(t) - level.t) < 1e-2, f"the peer is at time {float(t)} in row {i}, we are at {level.t}"
        out = torch.from_numpy(network(scheduler.scale_model_input(sample, t).numpy(), level, kind))
        if how == "variance_noise":
            options["variance_noise"] = torch.from_numpy(noise[i]).as_subclass(Exact)
        if before_step is not None:
            before_step(scheduler, i)
        typed_sample = sample.as_subclass(Exact) if exact else sample
        sample = scheduler.step(out, t, typed_sample, **options).prev_sample.as_subclass(torch.Tensor)
        states.append(sample.numpy() * (plan.next.alpha[i] if exploding else 1))
    return np.array(states)


def draw_noise(rows: int) -> np.ndarray:
    """(R, B, D), what a peer draws step by step from a generator with the same seed."""
    generator = torch.Generator().manual_seed(SEED)
    draws = [torch.randn((BATCH, DIM), generator=generator, dtype=torch.float64) for _ in range(rows)]
    return torch.stack(draws).numpy()


def _brownian(plan: Plan, noise: np.ndarray) -> Iterator[np.ndarray]:
    """Of DPM-Solver++(SDE): our noise of a step's first stage and of the whole step, each of variance 1.

    The whole step's is (exp(-h / 2) z_1 + z_2) / sqrt(1 + exp(-h)).
    """
    for i in range(0, plan.num_rows - 1, 2):
        decay = np.exp((plan.level.logsnr[i] - plan.next.logsnr[i + 1]) / 4)
        yield noise[i]
        yield (decay * noise[i] + noise[i + 1]) / np.sqrt(1 + decay**2)


def compare(
    peer: Peer, schedule_name: str, kind: str, steps: int, spacing: str, exact: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Our states and the peer's after each row, (R, B, D). exact: the peer with our tables and in float64."""
    scheduler = peer.build(schedule_name, kind, steps, spacing, exact)
    plan = peer.plan(schedule_name, scheduler)
    noise = draw_noise(plan.num_rows)

    def denoise(x, level):
        x0, eps = predict(x, level, kind)
        if peer.change is not None:
            x0 = peer.change(x0, x, level)
            eps = (x - level.alpha * x0) / level.sigma
        return x0, eps

    ours = our_states(plan, START, denoise, noise)
    theirs = peer_states(
        scheduler, plan, START, kind, noise,
        exploding=peer.exploding, how=peer.noise, options=peer.options, before_step=peer.before_step, exact=exact,
    )  # fmt: skip
    return ours, theirs


def difference(name: str, schedule_name: str, kind: str, steps: int, spacing: str) -> float:
    """The largest difference in a state, on the scale of the states, over the rows that are not left out."""
    peer = PEERS[name]
    ours, theirs = compare(peer, schedule_name, kind, steps, spacing)
    count = len(ours) - peer.left_out(steps, spacing)
    return relative(ours[:count], theirs[:count])


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |ours - theirs| / max(1, max |ours|); infinite where one is not finite."""
    if not (np.all(np.isfinite(ours)) and np.all(np.isfinite(theirs))):
        return np.inf
    return float(np.max(np.abs(ours - theirs), initial=0) / np.max(np.abs(ours), initial=1))


def cases(name: str) -> list[tuple[str, str, int, str]]:
    """The (schedule, kind, steps, spacing) at which a solver and its peer are compared."""
    peer = PEERS[name]
    return [
        (schedule, kind, steps, spacing)
        for schedule, kind, steps, spacing in itertools.product(SCHEDULES, peer.kinds, STEPS, peer.spacings)
        if peer.comparable(steps, spacing)
    ]


def few_cases(name: str) -> list[tuple[str, str, int, str]]:
    """Of `cases`, one spacing for each number of steps, a Latin square; more than 10 steps in one of three."""
    peer, case_list = PEERS[name], []
    for (i, schedule), (j, kind), (k, steps) in itertools.product(
        enumerate(SCHEDULES), enumerate(peer.kinds), enumerate(STEPS)
    ):
        if steps > 10 and (i + j + k) % 3:
            continue
        comparable = [spacing for spacing in peer.spacings if peer.comparable(steps, spacing)]
        case_list.append((schedule, kind, steps, comparable[(i + 2 * j + k) % len(comparable)]))
    return case_list


def _on_grid(steps: int, spacing: str) -> bool:
    """Whether the peer's next level, t - T // steps, is the next time step."""
    return spacing == "leading" or (spacing == "trailing" and 1000 % steps == 0)


published_3m = functools.partial(solvers.dpmpp_3m, curvature=1.0)


def unlimited(solver: Callable[..., Plan], **options) -> Callable[..., Plan]:
    """The solver without our limit on steps from pure noise, which applies on cosine."""
    return functools.partial(solver, noise_alone=np.inf, **options)


def heun_in_the_middle(scheduler, row: int) -> None:
    """The second stage of three is the paper's u_2, which the peer calls heun; the third is its midpoint."""
    orders = scheduler.order_list
    middle = orders[row] == 2 and row + 1 < len(orders) and orders[row + 1] == 3
    scheduler.register_to_config(solver_type="heun" if middle else "midpoint")


def lcm_boundary(x0: np.ndarray, x: np.ndarray, level: NoiseLevel) -> np.ndarray:
    """c_skip x + c_out x0 of latent consistency models (Luo et al. 2023), part of the network and not of the solver."""
    t, sigma_data = 10 * level.t, 0.5
    return sigma_data**2 / (t**2 + sigma_data**2) * x + t / np.sqrt(t**2 + sigma_data**2) * x0


def _sde_scheduler() -> type:
    """The peer's class imports torchsde for its Brownian motion; it is given other noise here, so a stub will do."""
    stub = "torchsde" not in sys.modules and importlib.util.find_spec("torchsde") is None
    if stub:
        sys.modules["torchsde"] = types.ModuleType("torchsde")
    try:
        return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    finally:
        if stub:
            del sys.modules["torchsde"]


def _ddpm(variance: str, **options) -> Peer:
    return Peer(
        functools.partial(solvers.ddpm, variance=variance),
        diffusers.DDPMScheduler,
        {"variance_type": f"fixed_{variance}", "clip_sample": False},
        noise="generator",
        **options,
    )


def _ddim(eta: float) -> Peer:
    return Peer(
        functools.partial(solvers.ddim, eta=eta),
        diffusers.DDIMScheduler,
        {"clip_sample": False, "set_alpha_to_one": True},
        spacings=("leading", "trailing"),
        noise="variance_noise" if eta else None,
        options={"eta": eta},
        comparable=_on_grid,
    )


def _singlestep(ours: Callable[..., Plan], order: int, algorithm: str, **options) -> Peer:
    clean = algorithm == "dpmsolver++"  # the peer's dpmsolver cannot end on clean data
    return Peer(
        ours,
        diffusers.DPMSolverSinglestepScheduler,
        {
            "solver_order": order,
            "algorithm_type": algorithm,
            "final_sigmas_type": "zero" if clean else "sigma_min",
            "lower_order_final": clean,
        },
        ends_clean=clean,
        spacings=("linspace", "trailing"),
        takes_times=True,
        **options,
    )


def _multistep(ours: Callable[..., Plan], order: int, algorithm: str = "dpmsolver++", **options) -> Peer:
    config = {"solver_order": order, "algorithm_type": algorithm, "final_sigmas_type": "zero"}
    return Peer(ours, diffusers.DPMSolverMultistepScheduler, config, **options)


def _unipc(order: int, variant: str, **options) -> Peer:
    ours = functools.partial(solvers.unipc, order=order, variant=variant)
    config = {"solver_order": order, "solver_type": variant, "final_sigmas_type": "zero"}
    return Peer(ours, diffusers.UniPCMultistepScheduler, config, **options)


def _deis(order: int) -> Peer:
    return Peer(
        functools.partial(solvers.deis, order=order),
        diffusers.DEISMultistepScheduler,
        {"solver_order": order},
        ends_clean=False,
        left_out=lambda steps, spacing: order - 1 if steps >= 15 else 0,
    )


PEERS = {
    "ddpm small": _ddpm("small"),
    "ddpm large": _ddpm("large", left_out=lambda steps, spacing: int(spacing == "trailing")),
    "ddim": _ddim(0.0),
    "ddim eta 0.5": _ddim(0.5),
    "ddim eta 1": _ddim(1.0),
    "euler": Peer(solvers.euler, diffusers.EulerDiscreteScheduler, exploding=True),
    "euler_ancestral": Peer(
        solvers.euler_ancestral,
        diffusers.EulerAncestralDiscreteScheduler,
        exploding=True,
        noise="generator",
        kinds=("eps", "v"),
    ),
    "heun": Peer(unlimited(solvers.heun), diffusers.HeunDiscreteScheduler, exploding=True),
    "dpm_solver 1": _singlestep(functools.partial(solvers.dpm_solver, order=1), 1, "dpmsolver"),
    "dpm_solver 2": _singlestep(unlimited(solvers.dpm_solver, order=2), 2, "dpmsolver"),
    "dpm_solver 3": _singlestep(unlimited(solvers.dpm_solver, order=3), 3, "dpmsolver", before_step=heun_in_the_middle),
    "dpmpp_1": _multistep(solvers.dpmpp_1, 1),
    "dpmpp_2s": _singlestep(solvers.dpmpp_2s, 2, "dpmsolver++"),
    "dpmpp_2m": _multistep(solvers.dpmpp_2m, 2),
    "dpmpp_3m, half of D_2": _multistep(published_3m, 3, left_out=lambda steps, spacing: 2 if steps >= 15 else 0),
    "dpmpp_2m_sde": _multistep(solvers.dpmpp_2m_sde, 2, "sde-dpmsolver++", noise="variance_noise"),
    "dpmpp_sde": Peer(solvers.dpmpp_sde, _sde_scheduler(), exploding=True, noise="sampler", kinds=("eps", "v")),
    "unipc 2 bh1": _unipc(2, "bh1", left_out=lambda steps, spacing: 1),
    "unipc 2 bh2": _unipc(2, "bh2"),
    "unipc 3 bh1": _unipc(3, "bh1", left_out=lambda steps, spacing: 1),
    "unipc 3 bh2": _unipc(3, "bh2"),
    "deis 1": _deis(1),
    "deis 2": _deis(2),
    "deis 3": _deis(3),
    "plms": Peer(
        unlimited(solvers.plms),
        diffusers.PNDMScheduler,
        {"skip_prk_steps": True, "set_alpha_to_one": True},
        spacings=("leading", "trailing"),
        kinds=("eps",),
        comparable=_on_grid,
    ),
    "lms": Peer(solvers.lms, diffusers.LMSDiscreteScheduler, exploding=True),
    "consistency": Peer(
        solvers.consistency,
        diffusers.LCMScheduler,
        spacings=("own",),
        noise="generator",
        change=lcm_boundary,
        rounding=1e-6,  # c_skip and c_out are float32
    ),
}


@dataclass(frozen=True)
class Deviation:
    """Where a peer differs, why ours is kept, and a number that is 0 where it does not: `measure`, above `least`."""

    peer: str
    what: str
    measure: Callable[[], float]
    least: float = 1e-3


def _states(peer: Peer, *case, rows: slice = slice(None), **changes) -> float:
    ours, theirs = compare(replace(peer, **changes), *case)
    return relative(ours[rows], theirs[rows])


def _times(scheduler: type, steps: int, spacing: str) -> np.ndarray:
    """Those of a peer, next to which stand ours of the same name."""
    peer = scheduler(timestep_spacing=spacing)
    peer.set_timesteps(steps)
    return peer.timesteps.numpy().astype(np.float64)


def _off_spacing(scheduler: type, steps: int, spacing: str) -> float:
    return float(np.max(np.abs(_times(scheduler, steps, spacing) - solvers.times(schedules.linear(), steps, spacing))))


def karras(scheduler: type, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(times, sigmas) of a peer with Karras' noise levels on the linear schedule."""
    peer = scheduler(**SCHEDULES["linear"][1], use_karras_sigmas=True)
    peer.set_timesteps(steps)
    return peer.timesteps.numpy().astype(np.float64), peer.sigmas.numpy().astype(np.float64)[:-1]


def _rounded_karras_times() -> float:
    times, sigmas = karras(diffusers.DPMSolverMultistepScheduler, 10)
    return float(np.max(np.abs(times - schedules.linear().t_of_logsnr(-2 * np.log(sigmas)))))


def inversion(labels: str) -> tuple[np.ndarray, np.ndarray]:
    """Our states and the peer's in DDIM inversion with 10 steps. labels: the level that the network is told, "from"
    which a step goes or "to" which; the peer's pipelines do the second.
    """
    schedule, betas = SCHEDULES["linear"]
    scheduler = diffusers.DDIMInverseScheduler(**betas, clip_sample=False, timestep_spacing="leading")
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_bar)
    scheduler.set_timesteps(10)
    plan = solvers.ddim_inversion(schedule, 10, spacing=scheduler.timesteps.tolist()[::-1])
    ours = our_states(plan, START, lambda x, level: predict(x, level, "eps"), draw_noise(10))
    x, theirs = torch.from_numpy(START), []
    for i, t in enumerate(scheduler.timesteps):
        level = row_level(plan, i) if labels == "from" else schedule(float(t))
        x = scheduler.step(torch.from_numpy(network(x.numpy(), level, "eps")), t, x).prev_sample
        theirs.append(x.numpy())
    return ours, np.array(theirs)


def edm_consistency(sigma_min: float) -> tuple[np.ndarray, np.ndarray]:
    """Our states and the peer's in multistep consistency sampling on the variance exploding schedule, 4 steps."""
    scheduler = diffusers.CMStochasticIterativeScheduler(sigma_min=sigma_min, clip_denoised=False)
    scheduler.set_timesteps(4)
    sigmas = scheduler.sigmas.numpy().astype(np.float64)
    scheduler.sigmas = torch.from_numpy(sigmas)
    levels = [NoiseLevel(s, 1.0, s) for s in sigmas[:-1]] + [NoiseLevel(0.0, 1.0, 0.0)]
    plan = solvers.consistency(schedules.edm(), 4, spacing=list(itertools.pairwise(levels)))
    noise, x, theirs = draw_noise(4), torch.from_numpy(START * sigmas[0]), []
    ours = our_states(plan, x.numpy(), lambda x, level: predict(x, level, "x0"), noise)
    generator = torch.Generator().manual_seed(SEED)
    for i, t in enumerate(scheduler.timesteps):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(scheduler.sigmas[i])
        x0 = torch.from_numpy(network(x.numpy(), row_level(plan, i), "x0"))
        scheduler.scale_model_input(x, t)
        x = scheduler.step((x0 - c_skip * x) / c_out, t, x, generator=generator).prev_sample
        theirs.append(x.numpy())
    return ours, np.array(theirs)


def zero_snr(scheduler: type, ours: Callable[..., Plan]) -> tuple[np.ndarray, np.ndarray]:
    """Our states and the peer's from v on scaled_linear rescaled to zero terminal SNR, 10 trailing steps. A peer whose
    table ends in 0 is given ours in float64.
    """
    schedule = schedules.zero_terminal_snr(SCHEDULES["scaled_linear"][0])
    betas = SCHEDULES["scaled_linear"][1] | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    clip = {"clip_sample": False} if scheduler is diffusers.DDIMScheduler else {}
    peer = scheduler(**betas, **clip, rescale_betas_zero_snr=True)
    if peer.alphas_cumprod[-1] == 0:
        peer.alphas_cumprod = torch.from_numpy(schedule.alphas_bar)
    peer.set_timesteps(10)
    plan = ours(schedule, 10, spacing=peer.timesteps.tolist())
    denoise = functools.partial(predict, kind="v")
    return our_states(plan, START, denoise, draw_noise(10)), peer_states(peer, plan, START, "v", draw_noise(10))


def _brownian_in_sigma() -> float:
    """Correlation of the two noises of a step of `dpmpp_sde`: a Brownian motion in s = sigma / alpha has sqrt((s - s_1)
    / (s - s')), the equation itself exp(-h / 2) / sqrt(1 + exp(-h)).
    """
    plan = solvers.dpmpp_sde(schedules.linear(), 10)
    s, s1 = (np.exp(-level.logsnr[:-1:2] / 2) for level in (plan.level, plan.next))
    s2 = np.exp(-plan.next.logsnr[1::2] / 2)
    return float(np.max(np.abs(((s - s1) / (s - s2)) ** 0.5 - (s1 / s) / (1 + (s1 / s) ** 2) ** 0.5)))


def _refuses_clean_end() -> float:
    try:
        diffusers.DPMSolverSinglestepScheduler(algorithm_type="dpmsolver", final_sigmas_type="zero")
    except ValueError:
        return np.inf
    return 0.0


def _magnified() -> float:
    """How far Heun's method ends from ours on cosine; the peer's is ours without the limit (see `PEERS`)."""
    schedule = SCHEDULES["cosine"][0]
    ends = [
        our_states(plan, START, lambda x, level: predict(x, level, "v"), draw_noise(plan.num_rows))[-1]
        for plan in (solvers.heun(schedule, 10), unlimited(solvers.heun)(schedule, 10))
    ]
    return relative(*ends)


def _between_steps() -> float:
    """The largest relative difference of sigma / alpha at the fractional times of the peer's linspace."""
    scheduler = diffusers.EulerDiscreteScheduler(**SCHEDULES["cosine"][1])
    scheduler.alphas_cumprod = torch.from_numpy(SCHEDULES["cosine"][0].alphas_bar)
    scheduler.set_timesteps(50)
    level = SCHEDULES["cosine"][0](scheduler.timesteps.numpy())
    return float(np.max(np.abs(scheduler.sigmas.numpy()[:-1] / (level.sigma / level.alpha) - 1)))


def rescale(guided: np.ndarray, conditional: np.ndarray, phi: float) -> np.ndarray:
    """The peer's formula of Lin et al. 2023, eq. 15 and 16."""
    pipelines = importlib.import_module("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    return pipelines.rescale_noise_cfg(torch.from_numpy(guided), torch.from_numpy(conditional), phi).numpy()


def _rescaled_output() -> float:
    """The x0 that comes of rescaling eps, as the peer's pipelines do, and of rescaling x0."""
    level = SCHEDULES["linear"][0](500.0)
    null, conditional = network(START, level, "eps"), network(START + 0.3, level, "eps")
    guided = null + 3 * (conditional - null)

    def x0(eps: np.ndarray) -> np.ndarray:
        return (START - level.sigma * eps) / level.alpha

    return relative(rescale(x0(guided), x0(conditional), 0.7), x0(rescale(guided, conditional, 0.7)))


def alphas_bar(scheduler: type = diffusers.DDPMScheduler, **config) -> np.ndarray:
    """(T,) of a peer, float64."""
    return scheduler(**config).alphas_cumprod.numpy().astype(np.float64)


def clip(x0: np.ndarray, x: np.ndarray, level: NoiseLevel) -> np.ndarray:
    return np.clip(x0, -0.5, 0.5)


CLIPPED = replace(
    PEERS["ddim"], config={"clip_sample": True, "clip_sample_range": 0.5, "set_alpha_to_one": True}, change=clip
)
_case = ("linear", "eps")
DEVIATIONS = {
    "D_2": Deviation(
        "DPMSolverMultistep, order 3",
        "D_2 lacks its factor of 2, so the order is 2; ours has it and is of order 3",
        lambda: _states(PEERS["dpmpp_3m, half of D_2"], *_case, 10, "trailing", ours=solvers.dpmpp_3m),
    ),
    "15 steps": Deviation(
        "DPMSolverMultistep, order 3",
        "from 15 steps on the next to last step is of order 3; ours falls to 2 whatever the number of steps",
        lambda: _states(PEERS["dpmpp_3m, half of D_2"], *_case, 20, "trailing", rows=slice(-2, None)),
    ),
    "deis 15 steps": Deviation(
        "DEISMultistep, order 3",
        "from 15 steps on the last two steps are of order 3; ours fall to 2 and 1 whatever the number of steps",
        lambda: _states(PEERS["deis 3"], *_case, 20, "trailing", rows=slice(-2, None)),
    ),
    "deis end": Deviation(
        "DEISMultistep",
        "ends on the least noisy level with its noise left in; ours ends on clean data",
        lambda: _states(PEERS["deis 2"], *_case, 10, "trailing", ends_clean=True),
    ),
    "noise alone": Deviation(
        "HeunDiscrete, DPMSolverSinglestep dpmsolver, PNDM on cosine",
        "steps from t = 999, sigma / alpha 20,000, magnify the difference of two noise predictions; ours makes steps "
        "from pure noise of order 1 (the image of Heun's method with 10 steps, against ours)",
        _magnified,
    ),
    "dpm_solver end": Deviation(
        "DPMSolverSinglestep, dpmsolver",
        "refuses to end on clean data; ours makes the last step of order 1",
        _refuses_clean_end,
    ),
    "dpm_solver middle": Deviation(
        "DPMSolverSinglestep, dpmsolver, order 3",
        "the second of three stages weights e_1 - e by (exp(r_2 h) - 1) / 2; ours as the paper's u_2, and as diffusers "
        "with solver_type heun in that stage",
        lambda: _states(PEERS["dpm_solver 3"], *_case, 10, "trailing", before_step=None),
    ),
    "bh1 end": Deviation(
        "UniPCMultistep, bh1",
        "the last step is NaN (an infinite B(h) times 0); ours ends on the data prediction",
        lambda: _states(PEERS["unipc 2 bh1"], *_case, 10, "trailing", rows=slice(-1, None)),
    ),
    "ddim next": Deviation(
        "DDIM, PNDM",
        "a step ends on t - T // steps, which is not the next time step with linspace, nor with trailing unless steps "
        "divide T; ours ends on the next time step",
        lambda: _states(PEERS["ddim"], *_case, 7, "trailing"),
    ),
    "plms v": Deviation(
        "PNDM, v",
        "averages v of different levels before it turns them into eps; ours averages eps",
        lambda: _states(PEERS["plms"], "linear", "v", 10, "leading"),
    ),
    "clip": Deviation(
        "DDIM, clip_sample",
        "eps stays what it was before x0 was clipped; ours stays tied to x0, diffusers' use_clipped_model_output",
        lambda: _states(CLIPPED, *_case, 10, "leading"),
    ),
    "ddpm end": Deviation(
        "DDPM, fixed_large",
        "adds noise in the last step if it starts above t = 0; ours never (Ho et al. 2020, algorithm 2)",
        lambda: _states(PEERS["ddpm large"], *_case, 10, "trailing", rows=slice(-1, None)),
    ),
    "sde noise": Deviation(
        "DPMSolverSDE",
        "the noises of a step's stages are those of a Brownian motion in sigma; ours have the correlation of the "
        "equation that is solved (from diffusers' source: its noise needs torchsde, and is replaced here)",
        _brownian_in_sigma,
    ),
    "inversion": Deviation(
        "DDIMInverse",
        "the network gets the level at the end of a step; ours gets the level of x",
        lambda: relative(*inversion("to")),
    ),
    "consistency noise": Deviation(
        "CMStochasticIterative",
        "noises the prediction by sqrt(sigma'^2 - sigma_min^2), as if it held noise of sigma_min; ours by sigma'",
        lambda: relative(*edm_consistency(0.002)),
        1e-8,
    ),
    "linspace 1": Deviation(
        "all, linspace",
        "a single step starts from the cleanest time, 0 (difference in time steps); ours from the noisiest",
        lambda: _off_spacing(diffusers.DDIMScheduler, 1, "linspace"),
    ),
    "linspace n + 1": Deviation(
        "DPMSolver, UniPC, DEIS, linspace",
        "takes n of n + 1 times and leaves out 0, unlike diffusers' DDIM and Euler (difference in time steps)",
        lambda: _off_spacing(diffusers.DPMSolverMultistepScheduler, 10, "linspace"),
    ),
    "leading n + 1": Deviation(
        "DPMSolver, UniPC, DEIS, leading",
        "takes n of n + 1 times and leaves out 0, unlike diffusers' DDIM and Euler (difference in time steps)",
        lambda: _off_spacing(diffusers.DPMSolverMultistepScheduler, 10, "leading"),
    ),
    "trailing 61": Deviation(
        "all, trailing",
        "61 steps are 62, the last at time -1, from rounding in arange (difference in the number of steps)",
        lambda: float(len(_times(diffusers.DDIMScheduler, 61, "trailing")) - 61),
    ),
    "karras times": Deviation(
        "DPMSolverMultistep, UniPC, DEIS, karras",
        "the network gets whole time steps, not those of its noise levels (difference in time steps)",
        _rounded_karras_times,
    ),
    "between steps": Deviation(
        "Euler, Heun, LMS, linspace",
        "between time steps sigma is interpolated; ours interpolates log-SNR (relative difference of sigma)",
        _between_steps,
        1e-5,
    ),
    "sigmoid": Deviation(
        "DDPM, sigmoid",
        "the betas follow a sigmoid; in ours alpha_bar does (Jabri et al. 2022)",
        lambda: float(np.max(np.abs(alphas_bar(beta_schedule="sigmoid") - schedules.sigmoid().alphas_bar))),
    ),
    "zero SNR": Deviation(
        "DPMSolverMultistep, rescale_betas_zero_snr",
        "sets the last alpha_bar to 2^-24 and uses the prediction made there again; ours keeps 0 and does not",
        lambda: relative(*zero_snr(diffusers.DPMSolverMultistepScheduler, solvers.dpmpp_2m)),
        5e-4,
    ),
    "rescale": Deviation(
        "pipelines, guidance_rescale",
        "rescales the network's output; ours rescales x0, whose contrast it is",
        _rescaled_output,
    ),
}

"""The likelihood of data under a model: exact along the probability flow, or the variational bound of the chain.

Both are in nats for each image, for any schedule and any denoiser. `bits_per_dim` converts them to bits per dimension.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.core.denoiser import Denoise, as_pytree
from diffusion_jax.core.process import NoiseLevel, add_noise, expand, snr, velocity
from diffusion_jax.core.schedules import Schedule
from diffusion_jax.core.solvers.plan import times

PIXEL = 2 / 255  # spacing of the values of an 8-bit image in [-1, 1]
RK4 = np.array([[0, 1 / 2, 1 / 2, 1], [1 / 6, 1 / 3, 1 / 3, 1 / 6]])  # node and weight of each Runge-Kutta stage
STEPS = 1000  # default length of the chain in continuous time


class Flow(NamedTuple):
    """The probability flow as a table of R = 4 x steps rows. Each row evaluates the denoiser once.

    level: NoiseLevel of (R,).
    reach: (R,). The row evaluates at the start of the step plus `reach` times the previous velocity.
    weight: (R,). The row adds `weight` times its velocity to the step.
    last: (R,). Whether the row ends its step.
    """

    level: NoiseLevel
    reach: np.ndarray
    weight: np.ndarray
    last: np.ndarray


class Chain(NamedTuple):
    """The chain of the variational bound.

    level: NoiseLevel of (T,), the least noisy first.
    weight: (T-1,) of the x0 error at t = 1..T-1.
    share: (T-1,) probability of drawing each of these t.
    """

    level: NoiseLevel
    weight: np.ndarray
    share: np.ndarray


class Bound(NamedTuple):
    """The terms of the variational bound in nats, (B,) each: L_T, the sum of L_1..L_{T-1}, and L_0."""

    prior: Float[Array, "batch"]
    diffusion: Float[Array, "batch"]
    decoder: Float[Array, "batch"]

    @property
    def total(self) -> Float[Array, "batch"]:
        """The whole bound. Its expectation over the drawn noise is at least -log p(x0)."""
        return self.prior + self.diffusion + self.decoder


def log_likelihood(
    denoise: Denoise,
    schedule: Schedule,
    x: Float[Array, "batch *shape"],
    keys: Key[Array, "batch"],
    cond: PyTree = None,
    *,
    steps: int = 25,
    probes: int | None = 1,
) -> Float[Array, "batch"]:
    """Log density of x in nats under the model at the level of t_min (Song et al. 2021, "Score-based generative
    modeling", section 4.3 and appendix D.2).

    The flow is dx/dt = alpha' x0(x, t) + sigma' eps(x, t). In y = x / r with r^2 = alpha^2 + sigma^2 and the angle
    phi = arctan(sigma / alpha) it is the same for every schedule (Salimans & Ho 2022, appendix D). D is the size of x:

        dy/dphi = v(y, phi) = cos(phi) eps - sin(phi) x0
        log p(x) = log N(y(t_max); 0, I) + integral of div v dphi from t_min to t_max - D log r(t_min)

    So the prior is N(0, (alpha^2 + sigma^2) I) at t_max, the same as `sampling.initial_noise`. The integral uses the
    fourth-order Runge-Kutta method with steps even in log-SNR. The divergence is the mean of z^T (dv/dy) z over
    probes z of random signs (Hutchinson). The probes stay fixed along the flow, so the mean over keys is exact.

    denoise: (x (B, ...), level of scalars, cond) -> Prediction.
    x: (B, ...).
    keys: (B,), one for each image. The result of an image does not depend on its batch.
    cond: leaves (B, ...).
    steps: integration steps. Each costs four evaluations of the denoiser and of its gradient.
    probes: number for each image. None computes the divergence exactly, at the cost of D probes.
    Raises ValueError for steps or probes below 1, and for steps not below T on a schedule of T steps.
    """
    T = schedule.num_steps
    if steps < 1 or (T and steps >= T):
        raise ValueError(f"steps of the flow must be {f'in 1..{T - 1}' if T else 'at least 1'}, got {steps}")
    if probes is not None and probes < 1:
        raise ValueError(f"the divergence needs at least 1 probe, got {probes}")
    return _integrate(as_pytree(denoise), _flow(schedule, steps), x, _probes(keys, x.shape[1:], probes), cond)


def _flow(schedule: Schedule, steps: int) -> Flow:
    """The rows of the flow from t_min to t_max."""
    t = times(schedule, steps + 1, "logsnr")[::-1]
    level = schedule(t)
    angle = np.arctan2(level.sigma, level.alpha)
    width = np.diff(angle)
    middle = schedule.t_of_logsnr(-2 * np.log(np.tan(angle[:-1] + width / 2)))
    reach, weight = (np.outer(width, column).ravel() for column in RK4)
    rows = schedule(np.stack([t[:-1], middle, middle, t[1:]], axis=1).ravel())
    return jax.tree.map(np.float32, Flow(rows, reach, weight, np.tile([0, 0, 0, 1], steps)))


def _probes(keys: Array, shape: tuple[int, ...], count: int | None) -> Array:
    """Probes z (P, B, ...) with mean z z^T = I. For count None, the D scaled unit vectors, whose mean is exact."""
    if count is None:
        size = int(np.prod(shape))
        return jnp.broadcast_to(size**0.5 * jnp.eye(size).reshape(size, 1, *shape), (size, len(keys), *shape))
    return jax.vmap(lambda key: jax.random.rademacher(key, (count, *shape), jnp.float32), out_axes=1)(keys)


@jax.jit
def _integrate(denoise: Denoise, flow: Flow, x: Array, probes: Array, cond: PyTree) -> Array:
    """The log density of x. The program evaluates the denoiser in one place, whatever the number of steps."""
    axes = tuple(range(1, x.ndim))

    def v(level: NoiseLevel, y: Array) -> Array:
        r = jnp.hypot(level.alpha, level.sigma)
        return velocity(*denoise(r * y, level, cond), level) / r

    def stage(state, row: Flow):
        y, end, slope, integral = state  # start of the step, its end so far, the previous velocity
        slope, vjp = jax.vjp(functools.partial(v, row.level), y + row.reach * slope)
        divergence = jnp.mean(jax.vmap(lambda z: jnp.sum(z * vjp(z)[0], axes))(probes), axis=0)
        end = end + row.weight * slope
        return (jnp.where(row.last, end, y), end, slope, integral + row.weight * divergence), None

    start = jax.tree.map(lambda c: c[0], flow.level)
    r = jnp.hypot(start.alpha, start.sigma)
    state = (x / r, x / r, jnp.zeros_like(x), jnp.zeros(len(x)))
    (y, _, _, integral), _ = jax.lax.scan(stage, state, flow)
    return jnp.sum(jax.scipy.stats.norm.logpdf(y) - jnp.log(r), axes) + integral


def pixel_decoder(x0: Array, mean: Array, std: Array) -> Array:
    """log P(x0) for each value of an 8-bit image in [-1, 1]: the mass of N(mean, std^2) in x0 -+ 1/255. The bins of the
    darkest and brightest values extend to infinity (Ho et al. 2020, eq. 13).
    """
    below = jnp.where(x0 < -1 + PIXEL / 2, -jnp.inf, (x0 - PIXEL / 2 - mean) / std)
    above = jnp.where(x0 > 1 - PIXEL / 2, jnp.inf, (x0 + PIXEL / 2 - mean) / std)
    mirrored = below + above > 0  # mirror to the left tail, where the difference of logarithms keeps its digits
    low, high = log_ndtr(jnp.where(mirrored, -above, below)), log_ndtr(jnp.where(mirrored, -below, above))
    return high + jnp.log1p(-jnp.exp(low - high))


def gaussian_decoder(x0: Array, mean: Array, std: Array) -> Array:
    """log N(x0; mean, std^2) of each value, for data that is not quantized, such as latents."""
    return jax.scipy.stats.norm.logpdf(x0, mean, std)


def variational_bound(
    denoise: Denoise,
    schedule: Schedule,
    x0: Float[Array, "batch *shape"],
    keys: Key[Array, "batch"],
    cond: PyTree = None,
    *,
    steps: int | None = None,
    terms: int | None = None,
    decoder: Callable[[Array, Array, Array], Array] = pixel_decoder,
) -> Bound:
    """Bound on -log p(x0) in nats for the chain that samples x_{t-1} from q(x_{t-1} | x_t, x0(x_t)) (Ho et al. 2020,
    eq. 5; Kingma et al. 2021, eq. 13), with t = 0..T-1 from the least noisy level to the noisiest:

        L_T     = KL(q(x_{T-1} | x0) || N(0, (alpha^2 + sigma^2) I))
        L_t     = (SNR_{t-1} - SNR_t) / 2 |x0 - x0(x_t)|^2,    t = 1..T-1
        L_0     = -log p(x0 | x_{t=0}), around x0(x_{t=0}) with the standard deviation sigma_0

    denoise: (x (B, ...), level of (B,), cond) -> Prediction.
    x0, keys, cond: as in `log_likelihood`.
    steps: T. None takes every step of a schedule of steps, or 1000 steps even in log-SNR in continuous time.
    terms: how many L_t to evaluate for each image, without bias. None evaluates all. Each t is drawn from one of as
      many equal strata of log(1 + SNR). For unit normal data every stratum has the same share of the bound.
    decoder: (x0, mean, std) -> log probability or density of each value; `pixel_decoder` or `gaussian_decoder`.
    Raises ValueError for terms below 1, and for the same steps as `solvers.times`.
    """
    if terms is not None and terms < 1:
        raise ValueError(f"the bound needs at least 1 term, got {terms}")
    T = schedule.num_steps
    level = schedule(times(schedule, steps or T or STEPS, "linspace" if T else "logsnr")[::-1])
    ratio = snr(level)
    signal = ratio[-1] / (1 + ratio[-1])
    prior = jnp.sum((signal * (x0**2 - 1) - np.log1p(-signal)) / 2, axis=tuple(range(1, x0.ndim)))
    evidence = np.log1p(ratio)
    share = -np.diff(evidence) / (evidence[0] - evidence[-1])
    chain = jax.tree.map(np.float32, Chain(level, -np.diff(ratio) / 2, share))
    if terms is not None and terms >= len(share):
        terms = None
    return Bound(prior, *_chain_terms(as_pytree(denoise), chain, x0, keys, cond, terms, decoder))


@functools.partial(jax.jit, static_argnames=("terms", "decoder"))
def _chain_terms(
    denoise: Denoise, chain: Chain, x0: Array, keys: Array, cond: PyTree, terms: int | None, decoder: Callable
) -> tuple[Array, Array]:
    """The sum of L_1..L_{T-1}, and L_0, (B,) each."""
    count, batch, axes = len(chain.weight), len(x0), tuple(range(1, x0.ndim))

    def predict_x0(level: NoiseLevel, keys: Array) -> Array:
        eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(keys)
        return denoise(add_noise(x0, eps, level), level, cond).x0

    def level_at(index: Array) -> NoiseLevel:
        return jax.tree.map(lambda c: c[index], chain.level)

    def term(total: Array, i: Array) -> tuple[Array, None]:
        t_keys, eps_keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 1 + i)))(keys).T
        index, expected_draws = jnp.full(batch, i), 1.0  # expected number of draws of this t
        if terms is not None:
            u = (i + jax.vmap(jax.random.uniform)(t_keys)) / terms
            index = jnp.searchsorted(jnp.cumsum(chain.share), u).clip(0, count - 1)
            expected_draws = terms * chain.share[index]
        error = jnp.sum((predict_x0(level_at(1 + index), eps_keys) - x0) ** 2, axes)
        return total + chain.weight[index] / expected_draws * error, None

    total, _ = jax.lax.scan(term, jnp.zeros(batch), jnp.arange(terms or count))
    first = level_at(jnp.zeros(batch, int))
    mean = predict_x0(first, jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys))
    return total, -jnp.sum(decoder(x0, mean, expand(first.sigma, x0)), axes)


def dequantize(x0: Float[Array, "batch *shape"], keys: Key[Array, "batch"]) -> Float[Array, "batch *shape"]:
    """Spread each value of 8-bit images in [-1, 1] evenly over its bin of width 2/255 (Theis et al. 2016, section 3.1).

    keys: (B,), one for each image.
    """
    return x0 + PIXEL * (jax.vmap(lambda key: jax.random.uniform(key, x0.shape[1:]))(keys) - 0.5)


def bits_per_dim(nats: Float[Array, "batch"], dimensions: int, bin: float = PIXEL) -> Float[Array, "batch"]:
    """Bits per dimension, (nats / D - log(bin)) / log(2). Lower is better.

    nats: negative log density of values that `dequantize` spread over bins of width `bin`. This bounds the negative log
      probability of the image (Theis et al. 2016, eq. 6).
    dimensions: D, height x width x 3.
    bin: width of a bin. 1 if nats is a negative log probability, as the bound with `pixel_decoder`.
    """
    return (nats / dimensions - np.log(bin)) / np.log(2)

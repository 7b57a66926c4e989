"""The sampling loop: a scan over the rows of a plan, the same for every solver."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.core.denoiser import Denoise, as_pytree, check_levels, check_rows
from diffusion_jax.core.process import NoiseLevel, Prediction, add_noise
from diffusion_jax.core.randomness import in_one_pass
from diffusion_jax.core.solvers import HISTORY, Plan

CHUNK = 10  # rows of a plan in one call of the compiled program
KNOWN = 2**31 - 1  # folded into an image's key for the noise on its known part; larger than any row index


class State(NamedTuple):
    """The state between rows.

    x: (B, ...).
    past: (1 + HISTORY, B, ...). The last d, that of row i in slot i mod (1 + HISTORY).
    """

    x: Array
    past: Array


class Known(NamedTuple):
    """What inpainting keeps.

    x0: (B, ...) the known image.
    mask: broadcasts to x0. 1 where the image is generated, 0 where the known image is kept.
    """

    x0: Array
    mask: Array


class Rows(NamedTuple):
    """A chunk of a plan on the device, padded to a fixed number of rows.

    Padding skips the network and leaves x and x0 unchanged. Its rule is x <- eps (`from_plan`), and its eps is x
    (`predict`).
    plan: the rows, `plan.past` in the slots of `State.past`.
    index: (R,) position of each row in the whole plan.
    active: (R,) False for padding.
    is_used: (R,) whether a later row uses the d of this one.
    """

    plan: Plan
    index: Array
    active: Array
    is_used: Array

    @classmethod
    def from_plan(cls, plan: Plan, size: int) -> "Rows":
        """All rows of the plan, in float32, and padding up to `size` rows."""
        index, count = np.arange(size), plan.num_rows
        active = index < count
        clipped = np.minimum(index, count - 1)
        rows = jax.tree.map(lambda c: np.asarray(c[clipped], np.float32), plan._replace(initial=None))
        past, is_used = np.zeros((size, 1 + HISTORY), np.float32), np.zeros(size, bool)
        np.put_along_axis(past, (index[:, None] - np.arange(1, 1 + HISTORY)) % (1 + HISTORY), rows.past, axis=1)
        for back in range(1, 1 + HISTORY):
            is_used[: max(count - back, 0)] |= plan.past[back:, back - 1] != 0
        rows = rows._replace(
            x0=np.where(active, rows.x0, 0),
            eps=np.where(active, rows.eps, 1),
            noise=np.where(active, rows.noise, 0),
            past=np.where(active[:, None], past, 0),
            initial=np.float32(plan.initial),
        )
        return cls(rows, index, active, is_used)

    def part(self, start: int, size: int) -> "Rows":
        """Rows start..start+size of these."""
        columns = self._replace(plan=self.plan._replace(initial=None))
        part = jax.tree.map(lambda column: column[start : start + size], columns)
        return part._replace(plan=part.plan._replace(initial=self.plan.initial))

    def predict(self, denoise: Denoise, x: Array, x0: Array, cond: PyTree) -> Prediction:
        """The prediction of one row, in the dtype of x. x0: the last one."""

        def active() -> Prediction:
            x0, eps = denoise(x, self.plan.level, cond, to=self.plan.to)
            return Prediction(x0.astype(x.dtype), eps.astype(x.dtype))

        return jax.lax.cond(self.active, active, lambda: Prediction(x0, x))


@functools.partial(jax.jit, static_argnames="shape")
def initial_noise(keys: Key[Array, "batch"], shape: tuple[int, ...], level: NoiseLevel) -> Float[Array, "batch *shape"]:
    """Noise to start a plan from: (B, *shape), with the standard deviation of x_t for data of unit variance.

    keys: (B,), one for each image.
    level: the plan's first level, `plan.start`.
    """
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(in_one_pass(keys))
    return noise * jnp.sqrt(jnp.square(level.alpha) + jnp.square(level.sigma))


@functools.partial(jax.jit, donate_argnames="state")
def advance(
    denoise: Denoise,
    rows: Rows,
    state: State,
    x0: Array,
    keys: Key[Array, "batch"],
    cond: PyTree,
    known: Known | None = None,
) -> tuple[State, Array]:
    """Run a chunk of rows. Returns the new state and the last prediction of x0, or `x0` if no row was active.

    denoise: a pytree (see `denoiser.as_pytree`), so that new values in it do not recompile.
    state: its memory is donated to the new state.
    """

    def fresh_noise(index: Array) -> Array:
        # index 0 is the initial noise
        draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1 + index), state.x.shape[1:]))
        return draw(in_one_pass(keys)).astype(state.x.dtype)

    def body(carry: tuple[State, Array], row: Rows) -> tuple[tuple[State, Array], None]:
        (state, x0), plan = carry, row.plan
        x0, eps = row.predict(denoise, state.x, x0, cond)

        def remember() -> Array:
            remembered = plan.memory[0] * x0 + plan.memory[1] * eps
            return jax.lax.dynamic_update_index_in_dim(state.past, remembered, row.index % len(state.past), 0)

        # written before it is read, so that XLA updates it in place
        past = jax.lax.cond(row.is_used, remember, lambda: state.past)

        x = plan.x0 * x0 + plan.eps * eps + sum(plan.past[slot] * past[slot] for slot in range(len(past)))
        x = jax.lax.cond(plan.noise != 0, lambda: x + plan.noise * fresh_noise(row.index), lambda: x)
        if known is not None:
            x = jax.lax.cond(row.active, lambda: _blend(x, known, plan.next, keys, 1 + row.index), lambda: x)
        return (State(x, past), x0), None

    scanned_rows = rows._replace(plan=rows.plan._replace(initial=None))
    return jax.lax.scan(body, (state, x0), scanned_rows)[0]


def sample(
    denoise: Denoise,
    plan: Plan,
    x: Float[Array, "batch *shape"],
    keys: Key[Array, "batch"],
    cond: PyTree = None,
    *,
    chunk: int | None = CHUNK,
    known: Known | None = None,
    callback: Callable[[int, Array], bool | None] | None = None,
) -> Float[Array, "batch *shape"]:
    """Sample: carry x from the plan's first level to its last.

    denoise: (x (B, ...), level of scalars, cond) -> Prediction. If it has a parameter named `to`, it also gets the
      level to go to. Wrap parameters with `jax.tree_util.Partial`, as `denoiser.denoiser` and the functions of
      `guidance` do, so that new values do not recompile.
    plan: from `solvers`.
    x: (B, ...) at the plan's first level, see `initial_noise`.
    keys: (B,), one for each image. An image does not depend on the batch in which it is generated.
    cond: pytree passed to `denoise`, leaves (B, ...).
    chunk: rows for each call of the compiled program. The last chunk is padded with rows that skip the network, so any
      number of steps reuses the program. None runs all rows in one call; use it inside your own `jax.jit`.
    known: for inpainting, the part of x to keep (see `keep`). It gets fresh noise at every level.
    callback: called after each chunk with (rows done, prediction of x0). Sampling stops if it returns True.
    Returns x (B, ...) at the plan's last level, float32 like x.
    Raises ValueError for a plan that evaluates a network where its errors become useless, such as eps on pure noise.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 row or None for all rows, got {chunk}")
    check_levels(denoise, plan.level)
    check_rows(denoise, plan.to, plan.x0, plan.eps, plan.past)
    if known is not None:
        x = _blend(x, known, plan.start, keys, 0)
    total = plan.num_rows
    size = chunk or max(total, 1)
    table, denoise = Rows.from_plan(plan, -(-total // size) * size), as_pytree(denoise)
    state, x0 = _start(x), x
    for start in range(0, total, size):
        state, x0 = advance(denoise, table.part(start, size), state, x0, keys, cond, known)
        done = min(start + size, total)
        if callback is not None and callback(done, x0):
            break
    return state.x


def run_rows(
    denoise: Denoise, rows: Rows, x: Float[Array, "batch *shape"], keys: Key[Array, "batch"], cond: PyTree = None
) -> Float[Array, "batch *shape"]:
    """Sample inside your own `jax.jit`, with the plan as an input.

    rows: from `rows(plan, at_least)`, which you call outside of the compiled function.
    x, keys, cond: as in `sample`.
    """
    return advance(as_pytree(denoise), rows, _start(x), x, keys, cond)[0].x


def rows(plan: Plan, at_least: int = 0) -> Rows:
    """The whole plan for `run_rows`.

    at_least: number of rows to pad to, so that all plans of up to so many rows use the same program.
    """
    return Rows.from_plan(plan, max(plan.num_rows, at_least))


def keep(x0: Float[Array, "batch *shape"], mask: Float[Array, "..."]) -> Known:
    """Tell `sample` to generate where mask is 1 and to keep x0 where it is 0 (Lugmayr et al. 2022, eq. 8).

    x0: (B, ...) the known image.
    mask: values in [0, 1], in a shape that broadcasts to x0's.
    Raises ValueError for a mask of another shape.
    """
    if not _broadcasts(jnp.shape(mask), x0.shape):
        raise ValueError(f"a mask must have a shape that broadcasts to the image's {x0.shape}, got {jnp.shape(mask)}")
    return Known(x0, jnp.asarray(mask, x0.dtype))


@jax.jit
def _start(x: Array) -> State:
    # computed from x, so that it is on x's device like every later state: one program serves all chunks
    return State(jnp.copy(x), jnp.broadcast_to(jnp.zeros_like(x), (1 + HISTORY, *x.shape)))


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def _blend(x: Array, known: Known, level: NoiseLevel, keys: Array, rows: ArrayLike) -> Array:
    """Blend the generated part of x, after `rows` rows, with the known image at the level of x, under fresh noise."""

    def draw(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, KNOWN), rows), x.shape[1:])

    noise = jax.vmap(draw)(in_one_pass(keys)).astype(x.dtype)
    return known.mask * x + (1 - known.mask) * add_noise(known.x0, noise, level)

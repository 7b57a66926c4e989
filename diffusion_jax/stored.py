"""Weights that stay in their files until a device needs them.

A pytree of variables may have a `Stored` in place of an array. `parallel.whole` and `parallel.local` read it onto
devices.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, PyTree

LOADERS = 8  # arrays read at the same time, at most


@dataclass(frozen=True, eq=False)
class Stored:
    """An array that is not in memory. `numpy.asarray` reads it.

    shape, dtype: of the array.
    read: () -> the array, in the host's memory; it may be a view of a mapped file.
    release: () -> None. Frees the memory that reading took.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    release: Callable[[], None] = lambda: None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        array = np.array(self.read(), dtype)
        self.release()
        return array


def on_host(array: np.ndarray) -> Stored:
    """An array that stays in the host's memory until a device needs it."""
    return Stored(array.shape, array.dtype, lambda: array)


def give_back() -> None:
    """Give the memory of arrays that are no longer used back to the system, where the allocator keeps it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


def loaded(tree: PyTree, copy: Callable[[np.ndarray], Array]) -> PyTree:
    """The pytree with copy(array) for every stored array. Arrays are left as they are.

    copy: returns when the array is copied, because its memory is then released. Several threads call it.
    """

    def load(stored: Stored) -> Array:
        array = copy(stored.read())
        stored.release()
        return array

    leaves, structure = jax.tree.flatten(tree)
    if not any(isinstance(leaf, Stored) for leaf in leaves):
        return tree
    with ThreadPoolExecutor(min(LOADERS, os.cpu_count() or 1)) as pool:
        arrays = pool.map(load, [leaf for leaf in leaves if isinstance(leaf, Stored)])
        return structure.unflatten([next(arrays) if isinstance(leaf, Stored) else leaf for leaf in leaves])

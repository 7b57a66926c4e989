"""Placement of arrays on devices, and compilation of a training step for many devices.

Training: every device of all hosts holds the whole state and processes its share of the global batch (`pmap`).
Sampling and evaluation: this host's devices share a batch, and each holds all weights.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Int, PyTree

AXIS = "data"


def is_main() -> bool:
    """Whether this process writes what all hosts share: logs, pictures, exported weights."""
    return jax.process_index() == 0


def num_devices() -> int:
    """The number of devices of all hosts, that a global batch is divided over."""
    return jax.device_count()


def to_host(tree: PyTree) -> PyTree:
    """The pytree as numpy arrays."""
    return jax.device_get(tree)


def from_all_hosts(array: np.ndarray) -> np.ndarray:
    """The arrays of all hosts, (hosts, ...), in the order of their numbers.

    array: of the same shape on every host.
    """
    return np.asarray(multihost_utils.process_allgather(array)).reshape(-1, *array.shape)


def compile_step(step: Callable, devices: list | None = None) -> Callable:
    """The step (state, frozen, batch) -> (state, metrics), run on every device at once. The old state is donated.

    step: gets its device's share of the batch. Its results must be the same on every device; use `mean`.
    devices: all of the slice by default.
    Place state and frozen by `replicate`, and the batch by `split`.
    """
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0), out_axes=None, donate_argnums=0, devices=devices)


def mean(tree: PyTree) -> PyTree:
    """The mean over devices, inside a step."""
    return jax.lax.pmean(tree, AXIS)


def example_numbers(count: int) -> Int[Array, "count"]:
    """The numbers in the global batch of this device's `count` examples, inside a step."""
    return jax.lax.axis_index(AXIS) * count + jnp.arange(count)


def replicate(tree: PyTree, devices: list | None = None) -> PyTree:
    """Copy a pytree to every device (all of the slice by default). It must be the same on all hosts."""
    mesh = Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))
    return jax.device_put(jax.device_get(tree), NamedSharding(mesh, PartitionSpec()))


def split(batch: PyTree, num_devices: int | None = None) -> PyTree:
    """Leaves (B, ...) of this host -> (num_devices, B / num_devices, ...), by default over all of its devices."""
    num_devices = num_devices or jax.local_device_count()
    return jax.tree.map(lambda a: a.reshape(num_devices, -1, *a.shape[1:]), batch)


def copier() -> Callable[[np.ndarray], Array]:
    """A function that copies an array to the default device of the thread that calls this, from any thread."""
    device = jax.config.jax_default_device

    def copy(array: np.ndarray) -> Array:
        with jax.default_device(device):
            return jax.device_put(array, may_alias=False).block_until_ready()

    return copy


def divisible(batch: int) -> int:
    """The smallest batch size of at least `batch` that this host's devices can share."""
    return batch + -batch % jax.local_device_count()


def spread(tree: PyTree, batch: int) -> PyTree:
    """Split leaves (B, ...) over this host's devices. If B is not divisible by their number, use one device."""
    return jax.device_put(tree, _placements(batch)[0])


def whole(tree: PyTree, batch: int = 0) -> PyTree:
    """Copy a pytree to every device that `spread` uses for such a batch. Data already there is not moved.

    batch: 0 for any batch that the devices can share.
    """
    return jax.device_put(tree, _placements(batch)[1])


def _placements(batch: int) -> tuple[Sharding, Sharding]:
    """The placement of arrays with a batch axis, and of arrays that every device needs whole."""
    devices = jax.local_devices()
    if len(devices) == 1 or batch % len(devices):
        single_device = SingleDeviceSharding(devices[0])
        return single_device, single_device
    mesh = Mesh(np.array(devices), (AXIS,))
    return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())

"""Where arrays live, and how a training step is compiled for many devices.

Training: every device of all hosts holds the whole state and works through its share of the global batch (`pmap`).
Sampling and evaluation: this host's devices share a batch, and the weights lie whole on each of them.
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
    """Whether this process is the one that writes what all hosts share: logs, pictures, exported weights."""
    return jax.process_index() == 0


def num_devices() -> int:
    """The number of devices of all hosts, that a global batch is divided over."""
    return jax.device_count()


def to_host(tree: PyTree) -> PyTree:
    """The pytree as numpy arrays."""
    return jax.device_get(tree)


def from_all_hosts(array: np.ndarray) -> np.ndarray:
    """The arrays of all hosts, (hosts, ...), in the order of their numbers. array: of one shape on every host."""
    return np.asarray(multihost_utils.process_allgather(array)).reshape(-1, *array.shape)


def compile_step(step: Callable, devices: list | None = None) -> Callable:
    """The step (state, frozen, batch) -> (state, metrics), run on every device at once; the old state is donated.

    step: sees its device's share of the batch. What it returns must be the same on every device, by `mean`.
    devices: all of the slice by default.
    The compiled step takes state and frozen as `replicate` places them, and the batch as `split` does.
    """
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0), out_axes=None, donate_argnums=0, devices=devices)


def mean(tree: PyTree) -> PyTree:
    """Inside a step: the mean over devices."""
    return jax.lax.pmean(tree, AXIS)


def example_numbers(count: int) -> Int[Array, "count"]:
    """Inside a step: the numbers in the global batch of this device's `count` examples."""
    return jax.lax.axis_index(AXIS) * count + jnp.arange(count)


def replicate(tree: PyTree, devices: list | None = None) -> PyTree:
    """Place a pytree whole on every device (all of the slice by default); all hosts must hold the same."""
    mesh = Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))
    return jax.device_put(jax.device_get(tree), NamedSharding(mesh, PartitionSpec()))


def split(batch: PyTree, num_devices: int | None = None) -> PyTree:
    """Leaves (B, ...) of this host -> (num_devices, B / num_devices, ...), by default over all of its devices."""
    num_devices = num_devices or jax.local_device_count()
    return jax.tree.map(lambda a: a.reshape(num_devices, -1, *a.shape[1:]), batch)


def copier() -> Callable[[np.ndarray], Array]:
    """A function that copies an array to the default device of the thread that calls this, from any thread."""
    device = jax.config.jax_default_device

    def copied(array: np.ndarray) -> Array:
        with jax.default_device(device):
            return jax.device_put(array, may_alias=False).block_until_ready()

    return copied


def divisible(batch: int) -> int:
    """The least batch of at least so many images that this host's devices can share."""
    return batch + -batch % jax.local_device_count()


def spread(tree: PyTree, batch: int) -> PyTree:
    """Place leaves (B, ...) over this host's devices, on one of them where B does not divide by their number."""
    return jax.device_put(tree, _placements(batch)[0])


def whole(tree: PyTree, batch: int = 0) -> PyTree:
    """Place a pytree whole on the devices that `spread` uses for such a batch. What lies there already is not moved.

    batch: 0 for any batch that divides by the number of devices.
    """
    return jax.device_put(tree, _placements(batch)[1])


def _placements(batch: int) -> tuple[Sharding, Sharding]:
    """Where arrays with a batch axis go, and arrays that every device needs whole."""
    devices = jax.local_devices()
    if len(devices) == 1 or batch % len(devices):
        alone = SingleDeviceSharding(devices[0])
        return alone, alone
    mesh = Mesh(np.array(devices), (AXIS,))
    return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())

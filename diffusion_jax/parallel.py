"""Placement of arrays on devices, and compilation of a training step for many devices.

Training: every device of all hosts processes its share of the global batch, and holds the whole state (`pmap`) or a
part of it (`fsdp`): see `strategy`.
Sampling and evaluation: this host's devices share a batch, and each holds all weights, unless they come divided.
"""

import contextlib
import functools
import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Int, PyTree

from diffusion_jax import chips
from diffusion_jax.compilation import DATA
from diffusion_jax.gathering import SHARDS, WHOLE, gathering
from diffusion_jax.stored import Stored, loaded

SMALL = 1 << 14  # elements; to gather a smaller array costs more than to hold it
GROUPS = (32, 16, 8)  # devices that divide one copy, if nothing else is said: few axes are divisible by more


def is_main() -> bool:
    """Whether this process writes what all hosts share: logs, pictures, exported weights."""
    return jax.process_index() == 0


def num_devices() -> int:
    """The number of devices of all hosts. A global batch is divided over them."""
    return jax.device_count()


def peak_flops() -> float | None:
    """The bfloat16 FLOP/s of all devices at peak. None for devices whose peak is not known, such as CPUs."""
    chip = chips.of_kind(jax.devices()[0].device_kind)
    return chip and num_devices() * chip.flops


def memory() -> dict[str, int]:
    """Bytes on the fullest of this host's devices: "used" now, "peak" so far. Empty where unknown, as on CPUs."""
    told = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"used": "bytes_in_use", "peak": "peak_bytes_in_use"}
    return {name: max(stats.get(key, 0) for stats in told) for name, key in names.items()} if told else {}


@contextlib.contextmanager
def on_host():
    """In this context new arrays are made in the host's memory, if JAX has a CPU backend."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names other platforms alone
        host = jax.local_devices()[0]
    with jax.default_device(host):
        yield


def to_host(tree: PyTree) -> PyTree:
    """The pytree as numpy arrays. All hosts must call this together if its arrays are divided over hosts."""

    def whole(leaf: Any) -> Any:
        if is_divided(leaf) and not leaf.is_fully_addressable:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(whole, tree)


def from_all_hosts(array: np.ndarray) -> np.ndarray:
    """The arrays of all hosts, (hosts, ...), in the order of their numbers.

    array: of the same shape on every host.
    """
    return np.asarray(multihost_utils.process_allgather(array)).reshape(-1, *array.shape)


def is_divided(array: Any) -> bool:
    """Whether several devices hold an array, each a part of it."""
    return isinstance(array, jax.Array) and not array.is_fully_replicated


def own_parts(array: Any) -> list[np.ndarray]:
    """The parts of an array that this host counts. Every number is in one part of one host."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return [np.asarray(part.data) for part in array.addressable_shards if part.replica_id == 0]
    return [np.asarray(array)] if is_main() else []


class Strategy(NamedTuple):
    """How a training step is divided over devices.

    compile: step (state, frozen, batch) -> (state, metrics) -> the same for arrays on many devices. The old state is
      donated.
    gradient: in a step, of_device -> (params, inputs, batch) -> the means over devices of what `of_device` computes:
      (params, inputs, batch, numbers, whole) -> (gradient of params, metrics). There the batch is a device's share,
      numbers (B,) are those of its examples in the global batch, and `whole` makes of a loss (params, inputs, ...) the
      loss of the parts that the device holds.
    sharding: an array of the state or of the frozen inputs, or its shape -> where its parts are.
    split: leaves (B, ...) of this host's share of the batch -> the batch on its devices.
    batch_shapes: shapes (B, ...) of the whole batch -> those that the step takes, for compiling ahead.
    """

    compile: Callable[[Callable], Callable]
    gradient: Callable[[Callable], Callable]
    sharding: Callable[[Any], NamedSharding]
    split: Callable[[PyTree], PyTree]
    batch_shapes: Callable[[PyTree], PyTree]

    def shapes(self, tree: PyTree) -> PyTree:
        """The shapes and places of arrays or shapes, for restoring them and for compiling ahead."""
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self.sharding(a)), tree)

    def place(self, tree: PyTree) -> PyTree:
        """Copy to each device its part of every array. Nothing is sent between hosts: all must have the same pytree."""

        def placed(leaf: Any) -> Array:
            whole = np.asarray(leaf)
            return jax.make_array_from_callback(whole.shape, self.sharding(whole), lambda part: whole[part])

        return jax.tree.map(placed, tree)

    def create(self, make: Callable[[PyTree], PyTree], tree: PyTree) -> PyTree:
        """make(tree), computed where its parts belong, so that no device ever holds more than its parts."""
        shardings = jax.tree.map(self.sharding, jax.eval_shape(make, tree))
        return jax.jit(make, out_shardings=shardings)(self.place(tree))


def strategy(name: str = "pmap", devices: list | None = None) -> Strategy:
    """The strategy called `name`.

    pmap: every device holds the whole state. Gradients are averaged over all devices.
    fsdp=N: groups of N devices divide one copy of the state: each array along its largest divisible axis, arrays below
      2^14 elements not at all. A weight is gathered where it is used.
    fsdp: the same, N being the largest of 32, 16 and 8 that divides the number of devices, else all devices.
    devices: all of the slice by default.

    Raises ValueError for another name, and for an N that does not divide the number of devices.
    """
    devices = _by_host(jax.devices() if devices is None else devices)
    return _replicated(devices) if name == "pmap" else _divided(devices, group(name, len(devices)))


def alone() -> Strategy:
    """The strategy of one device, to count what each of many computes."""
    return strategy("pmap", jax.local_devices()[:1])


def _by_host(devices: list) -> list:
    """The devices of each host one after the other, so that a host's share of the batch is one piece of it."""
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def group(name: str, count: int) -> int:
    """How many of `count` devices divide one copy of the state. Raises what `strategy` raises."""
    if name == "pmap":
        return 1
    match = re.fullmatch(r"fsdp(?:=([1-9]\d*))?", name)
    if match is None:
        raise ValueError(f"train.parallel must be pmap, fsdp or fsdp=N; got {name!r}")
    size = int(match[1] or next((size for size in GROUPS if count % size == 0), count))
    if count % size:
        raise ValueError(f"train.parallel={name}: {size} does not divide {count} devices")
    return size


def _replicated(devices: list) -> Strategy:
    everywhere = NamedSharding(Mesh(np.array(devices), (DATA,)), PartitionSpec())
    local = sum(device.process_index == jax.process_index() for device in devices)
    options = {"axis_name": DATA, "in_axes": (None, None, 0), "out_axes": None, "donate_argnums": 0}

    def gradient(of_device: Callable) -> Callable:
        def mean(params: PyTree, inputs: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
            numbers = _numbers(batch, jax.lax.axis_index(DATA))
            return jax.lax.pmean(of_device(params, inputs, batch, numbers, lambda loss: loss), DATA)

        return mean

    def by_device(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(devices), a.shape[0] // len(devices), *a.shape[1:]), a.dtype)

    return Strategy(
        compile=lambda step: jax.pmap(step, devices=devices, **options),
        gradient=gradient,
        sharding=lambda leaf: everywhere,
        split=lambda batch: jax.tree.map(lambda a: a.reshape(local, -1, *a.shape[1:]), batch),
        batch_shapes=lambda batch: jax.tree.map(by_device, batch),
    )


def _divided(devices: list, group: int) -> Strategy:
    mesh = Mesh(np.array(devices).reshape(-1, group), (DATA, SHARDS))
    everyone = (DATA, SHARDS)
    examples = NamedSharding(mesh, PartitionSpec(everyone))
    sharding = functools.partial(_division, mesh)

    def compiled(step: Callable) -> Callable:
        def divided_step(state: PyTree, frozen: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
            state, metrics = step(state, frozen, batch)
            return jax.lax.with_sharding_constraint(state, jax.tree.map(sharding, state)), metrics

        return jax.jit(divided_step, donate_argnums=0)

    def gradient(of_device: Callable) -> Callable:
        def mean(params: PyTree, inputs: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
            specs = jax.tree.map(lambda leaf: sharding(leaf).spec, (params, inputs))
            axes = jax.tree.map(lambda spec: spec.index(SHARDS) if SHARDS in spec else WHOLE, specs)
            whole = functools.partial(gathering, axes, (params, inputs))

            def of_parts(params: PyTree, inputs: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
                numbers = _numbers(batch, jax.lax.axis_index(everyone))
                grads, metrics = of_device(params, inputs, batch, numbers, whole)
                return jax.tree.map(group_mean, grads, specs[0]), jax.lax.pmean(metrics, everyone)

            in_specs, out_specs = (*specs, PartitionSpec(everyone)), (specs[0], PartitionSpec())
            mapped = jax.shard_map(of_parts, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
            return mapped(params, inputs, batch)

        return mean

    def group_mean(grad: Array, spec: PartitionSpec) -> Array:
        # to differentiate a gathered weight is to add up over its group what each device found for this part
        return jax.lax.pmean(grad / group, DATA) if SHARDS in spec else jax.lax.pmean(grad, everyone)

    return Strategy(
        compile=compiled,
        gradient=gradient,
        sharding=sharding,
        split=lambda batch: jax.tree.map(lambda a: jax.make_array_from_process_local_data(examples, a), batch),
        batch_shapes=lambda batch: jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=examples), batch
        ),
    )


def _numbers(batch: PyTree, device: Int[Array, ""]) -> Int[Array, "count"]:
    """The numbers in the global batch of a device's examples."""
    count = len(jax.tree.leaves(batch)[0])
    return device * count + jnp.arange(count)


def _division(mesh: Mesh | AbstractMesh, leaf: Any) -> NamedSharding:
    """An array's largest axis that the devices along SHARDS can divide is divided over them."""
    group = mesh.shape[SHARDS]
    divisible = [axis for axis, size in enumerate(leaf.shape) if size % group == 0]
    if np.prod(leaf.shape) < SMALL or not divisible:
        return NamedSharding(mesh, PartitionSpec())
    largest = max(divisible, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, SHARDS))


def bytes_held(tree: PyTree, name: str, count: int, padded: bool = False) -> int:
    """Bytes of a state or of frozen inputs that each device holds.

    tree: the arrays or their shapes.
    name: of the strategy.
    count: number of all devices.
    padded: count the padding of TPUs.
    """
    mesh = AbstractMesh((count // group(name, count), group(name, count)), (DATA, SHARDS))
    parts = [(_division(mesh, leaf).shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree)]
    return sum(chips.tpu_bytes(*part) if padded else math.prod(part[0]) * part[1] for part in parts)


class Machine(NamedTuple):
    """The devices of this machine, or of all hosts together.

    kind: JAX's name for a device.
    count: number of devices.
    memory: bytes of a device; for CPUs, of the host.
    """

    kind: str
    count: int
    memory: float


def machine() -> Machine:
    """The devices of all hosts."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    return Machine(device.device_kind, num_devices(), stats.get("bytes_limit", host_memory()))


def host_memory() -> float:
    """Bytes of this host's memory."""
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def slice_devices(topology: str) -> list:
    """The chips of a TPU slice such as "v5e:2x4". Arguments and errors as of `chips.tpu_slice`."""
    return chips.tpu_slice(topology).devices


def compiler(devices: list | None = None) -> str:
    """Everything besides the program that the result of compiling for these devices, by default all, depends on."""
    devices = jax.devices() if devices is None else devices
    return f"{devices[0].device_kind} {devices[0].client.platform_version} {len(devices)}"


def of_one_host(devices: list | None = None) -> list:
    """The devices that one host samples with, by default all of this host."""
    if devices is None:
        return jax.local_devices()
    return [device for device in devices if device.process_index == devices[0].process_index]


def sampling_shapes(weights: PyTree, batch: PyTree, name: str, devices: list) -> tuple[PyTree, PyTree]:
    """Shapes and places of weights and of a batch, leaves (B, ...), as a host with these devices samples with them."""
    divided = Mesh(np.array(devices), (SHARDS,))
    everywhere = NamedSharding(Mesh(np.array(devices), (DATA,)), PartitionSpec())
    split = NamedSharding(Mesh(np.array(devices), (DATA,)), PartitionSpec(DATA))

    def placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shardings = [everywhere if name == "pmap" else _division(divided, leaf) for leaf in jax.tree.leaves(weights)]
    leaves = map(placed, jax.tree.leaves(weights), shardings)
    return jax.tree.unflatten(jax.tree.structure(weights), leaves), jax.tree.map(lambda a: placed(a, split), batch)


def local(tree: PyTree, name: str) -> PyTree:
    """Weights as this host alone samples with them: divided over its devices if the strategy `name` divides them.

    Stored weights that are not divided stay stored.
    """
    if name == "pmap" or jax.local_device_count() == 1:
        return jax.tree.map(lambda leaf: leaf if isinstance(leaf, Stored) else jnp.asarray(leaf), tree)
    sharding = functools.partial(_division, Mesh(np.array(jax.local_devices()), (SHARDS,)))
    tree = loaded(tree, lambda array: _copied(array, sharding(array)))
    return jax.device_put(tree, jax.tree.map(sharding, tree))


def _copied(array: np.ndarray, place: Any) -> Array:
    return jax.device_put(array, place, may_alias=False).block_until_ready()


def copier() -> Callable[[np.ndarray], Array]:
    """A function that copies an array to the default device of the thread that calls this, from any thread."""
    device = jax.config.jax_default_device

    def copy(array: np.ndarray) -> Array:
        with jax.default_device(device):
            return _copied(array, None)

    return copy


def divisible(batch: int) -> int:
    """The smallest batch size of at least `batch` that this host's devices can share."""
    return batch + -batch % jax.local_device_count()


def spread(tree: PyTree, batch: int) -> PyTree:
    """Split leaves (B, ...) over this host's devices. If B is not divisible by their number, use one device."""
    return jax.device_put(tree, _placements(batch)[0])


def whole(tree: PyTree, batch: int = 0) -> PyTree:
    """Copy a pytree to every device that `spread` uses for such a batch.

    Data that is already there is not moved, and neither is what `local` divided. Stored weights are read.
    batch: 0 for any batch that the devices can share.
    """
    placement = _placements(batch)[1]

    def placed(leaf: Any) -> Array:
        sharding = getattr(leaf, "sharding", None)
        is_divided = isinstance(sharding, NamedSharding) and SHARDS in sharding.mesh.axis_names
        # device_put finds this out too, in 30 us
        is_there = sharding == placement and getattr(leaf, "committed", False)
        return leaf if is_divided or is_there else jax.device_put(leaf, placement)

    return jax.tree.map(placed, loaded(tree, lambda array: _copied(array, placement)))


def _placements(batch: int) -> tuple[Sharding, Sharding]:
    """The placement of arrays with a batch axis, and of arrays that every device needs whole."""
    devices = jax.local_devices()
    if len(devices) == 1 or batch % len(devices):
        single_device = SingleDeviceSharding(devices[0])
        return single_device, single_device
    mesh = Mesh(np.array(devices), (DATA,))
    return NamedSharding(mesh, PartitionSpec(DATA)), NamedSharding(mesh, PartitionSpec())

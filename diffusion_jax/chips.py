"""Memory and peak speed of accelerators, as their makers state them, to plan training and sampling for them.

TPU: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, "Key chip specifications": peak compute per chip (bf16) and HBM
capacity. GPU: GPU memory and BFLOAT16 Tensor Core of NVIDIA's data sheets of the A100 (number 1758950), H100 and H200
Tensor Core GPU. The last two state 1,979 TFLOPS with sparsity (H100 PCIe: 1,513), twice the rate without. A GB of
memory is 10^9 bytes there.
"""

import importlib.util
import itertools
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from diffusion_jax.messages import first_line

WITHOUT_TPU = {  # the environment in which the TPU compiler starts on any machine
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run, so several processes do no harm
}


class Chip(NamedTuple):
    """An accelerator.

    memory: bytes.
    flops: bfloat16 FLOP/s at peak.
    """

    memory: float
    flops: float


CHIPS = {
    "v4": Chip(32e9, 275e12),
    "v5e": Chip(16e9, 197e12),
    "v5p": Chip(95e9, 459e12),
    "v6e": Chip(32e9, 918e12),
    "a100": Chip(40e9, 312e12),
    "a100-80": Chip(80e9, 312e12),
    "h100": Chip(80e9, 989e12),
    "h100-pcie": Chip(80e9, 756e12),
    "h200": Chip(141e9, 989e12),
}
KINDS = {  # as JAX names them in `Device.device_kind`
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100 80GB PCIe": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H200": "h200",
}


def tpu_slice(topology: str) -> topologies.TopologyDescription:
    """A TPU slice such as "v5e:2x4", to compile for its chips; no TPU is needed.

    Raises ModuleNotFoundError without the TPU compiler, and ValueError for a slice that does not exist.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError('to compile for a TPU takes its compiler: pip install "jax[tpu]"')
    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}  # hosts have four by default
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ValueError(f"there is no slice {topology}: {first_line(error)}") from error


def of_host(kind: str, count: int) -> int:
    """How many of `count` chips one host has: eight GPUs, and of TPUs four, or eight v5e or v6e that are all.

    kind: a name in `CHIPS`.
    """
    eight = not kind.startswith("v") or (kind in ("v5e", "v6e") and count <= 8)
    return min(count, 8 if eight else 4)


def of_kind(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`. None if it is not in the table, such as a CPU."""
    return CHIPS[KINDS[device_kind]] if device_kind in KINDS else None


def tpu_bytes(shape: Sequence[int], itemsize: int) -> int:
    """Bytes of an array in a TPU's memory, where it is padded to whole tiles.

    An array of one axis is padded to a power of two from 512 bytes on, or to multiples of 1024 elements. Otherwise the
    last two axes in memory are padded: one to 128, the other to 2, 4 or a multiple of 8. The TPU compiler (libtpu
    0.0.42) chooses these two so that the padding is least.
    """
    if len(shape) < 2:
        count = max(math.prod(shape), 512 // itemsize)
        return itemsize * (-(-count // 1024) * 1024 if count > 512 else 2 ** math.ceil(math.log2(count)))
    least = max(2, 4 // itemsize)  # rows of a tile

    def rows(size: int) -> int:
        return next((few for few in (2, 4) if size <= few and few >= least), -(-size // 8) * 8)

    return itemsize * min(
        math.prod(shape) // (shape[i] * shape[j]) * (-(-shape[i] // 128) * 128) * rows(shape[j])
        for i, j in itertools.permutations(range(len(shape)), 2)
    )

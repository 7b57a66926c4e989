"""One host of several on the loopback: python -m tests.training.hosts RANK HOSTS PORT WORKDIR STEPS; prints the final
weights.
"""

import os
import sys

from tests import device_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = device_flags(2)

import optax

from diffusion_jax import hosts
from diffusion_jax.training import loop
from tests.training import linear


def main(rank: int, count: int, port: int, workdir: str, steps: int) -> None:
    hosts.connect(None, f"127.0.0.1:{port}", count, rank)
    batches = linear.batches(8 // count, process_index=rank, process_count=count)
    task = loop.Task("linear", linear.loss, linear.initial(), linear.FROZEN, batches, optax.adam(0.05))
    ema = loop.fit(task, workdir, linear.section(steps=steps), seed=0)
    print({name: value.tolist() for name, value in ema.items()})
    hosts.finish(status=0)


if __name__ == "__main__":
    rank, count, port, workdir, steps = sys.argv[1:]
    main(int(rank), int(count), int(port), workdir, int(steps))

"""One host of a run whose devices and strategy may change: python -m tests.training.resharded RANK COUNT PORT STRATEGY
WORKDIR STEPS; writes the records of its batches and the final weights to WORKDIR.RANK.json.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax

from diffusion_jax import hosts
from diffusion_jax.data.loader import loader
from diffusion_jax.data.sources import Source
from diffusion_jax.training import loop
from tests.training import linear, test_parallel

BATCH, RECORDS = 16, 40  # a batch may cross from one epoch into the next


def read(index: int) -> dict:
    return {"x": np.random.default_rng(index).normal(size=test_parallel.WIDTH).astype(np.float32), "index": index}


def main(rank: int, count: int, port: int, strategy: str, workdir: str, steps: int) -> None:
    if count > 1:
        hosts.connect(None, f"127.0.0.1:{port}", count, rank)
    seen = []

    def batches(start):
        share = {"process_index": rank, "process_count": count}
        for batch in loader(Source("records", RECORDS, read), BATCH // count, seed=0, start=start, **share):
            seen.append(batch.pop("index").tolist())
            yield batch

    task = loop.Task(
        "resharded",
        test_parallel.loss,
        jax.device_get(test_parallel.initial()),
        test_parallel.FROZEN,
        batches,
        optax.adam(1e-3),
    )
    section = linear.section(steps=steps, batch_size=BATCH, parallel=strategy, accumulate=1, post_hoc=True)
    ema = loop.fit(task, workdir, section, seed=0)
    result = {"seen": seen, "ema": {name: value.tolist() for name, value in ema.items()}}
    Path(f"{workdir}.{rank}.json").write_text(json.dumps(result))
    hosts.finish(0)


if __name__ == "__main__":
    rank, count, port, strategy, workdir, steps = sys.argv[1:]
    main(int(rank), int(count), int(port), strategy, workdir, int(steps))

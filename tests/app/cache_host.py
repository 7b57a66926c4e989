"""One process that builds a cache of numbers, alone or with others on the loopback.

python -m tests.app.cache_host FOLDER SECONDS_A_BATCH [RANK HOSTS PORT]; prints the records that it computed.
"""

import json
import sys
import time

import numpy as np

from diffusion_jax import hosts
from diffusion_jax.app.caching import built
from diffusion_jax.data import cache_files
from diffusion_jax.data.cache import Cache
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import BadRecord

RECORDS, BATCH = 50, 3


def cache(folder: str, seconds: float = 0, computed: list | None = None) -> Cache:
    """Of records each seventh is bad, and a shard has four."""

    def read(index):
        if index % 7 == 0:
            raise BadRecord("broken")
        return {"label": index}

    def label(batch):
        time.sleep(seconds)
        if computed is not None:
            computed.extend(batch["label"].tolist())
        return batch["label"][:, None]

    return Cache(Source("numbers", RECORDS, read), folder, {}, {"label": label}, BATCH)


def main(folder: str, seconds: str, *place: str) -> None:
    cache_files.UNIT = 4
    if place:
        rank, count, port = place
        hosts.connect(None, f"127.0.0.1:{port}", int(count), int(rank))
    computed = []
    source = built(cache(folder, float(seconds), computed))
    labels = source.read_batch(np.arange(len(source)), np.zeros(len(source)))["label"]
    print(json.dumps({"computed": sorted(set(computed)), "labels": labels.tolist()}))
    hosts.finish(status=0)


if __name__ == "__main__":
    main(*sys.argv[1:])

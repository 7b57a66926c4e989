"""Read a million records of Parquet, and print by how many MB the memory of this process grew, and that of its index.

A process of its own, because the tests check the types of every call. Mapped files are not counted.
"""

import itertools
import resource
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_jax.data.loader import loader
from diffusion_jax.data.shards import shards
from tests.data import odd

SHARDS, EACH = 10, 100_000


def anonymous() -> float:
    """MB of memory that is no file."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1e3


def main(folder: Path) -> None:
    picture = odd.solid(7)
    for shard in range(SHARDS):
        captions = [f"picture {number} of a million, " + "with many words " * 4 for number in range(EACH)]
        table = pa.table({"jpg": [picture] * EACH, "caption": captions, "label": ["a", "b"] * (EACH // 2)})
        pq.write_table(table, folder / f"{shard}.parquet", row_group_size=1000)
        del table, captions
    pa.default_memory_pool().release_unused()
    start = anonymous()
    source = shards("parquet", f"{folder}/*.parquet", folder, 10e9)
    assert len(source) == SHARDS * EACH
    made = anonymous()
    batches = loader(source, 50, seed=0)
    for _ in itertools.islice(batches, 400):
        pass
    read = anonymous()
    index = sum(file.stat().st_size for file in (folder / "index").iterdir()) / 1e6
    print(made - start, read - made, index, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

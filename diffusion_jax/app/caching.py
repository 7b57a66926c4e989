"""A cache that all hosts of a run build together."""

from pathlib import Path

import jax
import numpy as np

from diffusion_jax import hosts, parallel
from diffusion_jax.app.workdir import in_time
from diffusion_jax.data.cache import Cache
from diffusion_jax.data.sources import Source


def built(cache: Cache) -> Source:
    """The records of a cache, after what is missing in it was computed. All hosts call this together.

    Hosts that see the same folder share out the missing shards. Otherwise each computes all that it has not.
    Raises what `Cache.build` raises, and OSError if a shard of another host does not appear.
    """
    cache.build(_share(cache))
    hosts.meet("cache")
    if not in_time(lambda: not cache.missing()):
        numbers = ", ".join(map(str, cache.missing()))
        raise OSError(f"the cache {cache.folder} lacks shards ({numbers}): look at its disk, then run again")
    return cache.source()


def _share(cache: Cache) -> list[int]:
    """The shards that this host computes."""
    missing = cache.missing()
    if not hosts.several():
        return missing
    lacks = np.isin(np.arange(cache.num_shards), missing)
    of_hosts = parallel.from_all_hosts(lacks)
    if not of_hosts.any() or not _is_shared(cache.folder):
        return missing
    # what one host sees is there: a shared disk may show it to another one late
    return np.flatnonzero(of_hosts.all(axis=0)).tolist()[jax.process_index() :: jax.process_count()]


def _is_shared(folder: Path) -> bool:
    """Whether every host sees what every other one writes to a folder."""
    name = hosts.token()
    files = [folder / f"{name}-{host}.partial" for host in range(jax.process_count())]
    own = files[jax.process_index()]
    own.touch()
    hosts.meet("files in the cache")
    sees_all = in_time(lambda: {file.name for file in files} <= {file.name for file in folder.iterdir()})
    is_shared = bool(parallel.from_all_hosts(np.array(sees_all)).all())
    own.unlink()
    return is_shared

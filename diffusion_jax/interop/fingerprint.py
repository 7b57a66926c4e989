"""A hash of files, computed once for each version of them."""

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from diffusion_jax import paths

KNOWN = re.compile("[0-9a-f]{64}")


def fingerprint(files: Sequence[Path]) -> str:
    """SHA-256 of the names and the contents of local files, whatever folders they are in.

    It is kept under ~/.cache/diffusion_jax/fingerprints by the sizes and times of the files, so that gigabytes of
    weights are not read again at every start. Time of change is one of them, which no program can set back.
    """
    stats = [(file.absolute(), file.stat()) for file in files]  # before reading: a change meanwhile is another version
    version = [[str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for file, stat in stats]
    kept = paths.CACHE / "fingerprints" / hashlib.sha256(json.dumps(version).encode()).hexdigest()
    with contextlib.suppress(OSError):
        if KNOWN.fullmatch(text := kept.read_text()):
            return text
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    with contextlib.suppress(OSError):  # without a place to keep it, the next start reads the files again
        kept.parent.mkdir(parents=True, exist_ok=True)
        paths.write(kept, digest.hexdigest())
    return digest.hexdigest()

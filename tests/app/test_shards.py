"""A run on shards, by the command line."""

import io

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion_jax.data.sources import digits
from tests.data import odd
from tests.test_main import TINY, arrays, finish, start


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_a_run_on_a_mixture_of_shards_resumes_bit_for_bit(tmp_path):
    source = digits()
    records = [(png(source[i]["image"]), source[i]["label"]) for i in range(300)]
    for shard in range(3):
        numbered = enumerate(records[50 * shard : 50 * shard + 50])
        members = [(f"{i}.{end}", c) for i, (p, n) in numbered for end, c in (("png", p), ("cls", b"%d" % n))]
        odd.write_tar(tmp_path / f"train-{shard}.tar", members)
    columns = {"image": [{"bytes": picture, "path": None} for picture, _ in records[150:]]}
    for shard in range(6):
        rows = slice(25 * shard, 25 * shard + 25)
        labels = [label for _, label in records[150:]][rows]
        pq.write_table(
            pa.table({"image": columns["image"][rows], "label": labels}), tmp_path / f"train-{shard}.parquet"
        )
    mixture = f"mix:0.7*tar:{tmp_path}/{{split}}-*.tar + 0.3*parquet:{tmp_path}/{{split}}-*.parquet"
    flags = ["--mode=train", f"--config.data.source={mixture}", f"--config.data.cache={tmp_path}/cache"]

    def train(workdir, steps) -> None:
        status, stderr = finish(
            start(*flags, f"--workdir={tmp_path / workdir}", f"--config.train.steps={steps}", base=TINY)
        )
        assert status == 0, stderr

    train("whole", 24)
    train("stopped", 12)
    train("stopped", 24)
    whole, resumed = arrays(tmp_path / "whole"), arrays(tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)

"""A cache is the same whether one process builds it, a killed one and its successor, or several hosts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.app.caching import built
from diffusion_jax.data import cache_files
from tests import device_flags
from tests.app.cache_host import RECORDS, cache
from tests.ports import free_port

GOOD = [record for record in range(RECORDS) if record % 7]
COMMAND = [sys.executable, "-m", "tests.app.cache_host"]


def files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_files, "UNIT", 4)


@pytest.fixture
def whole(tmp_path):
    """The files of a cache that one process has built undisturbed."""
    built(cache(tmp_path / "whole"))
    return files(tmp_path / "whole")


def test_a_killed_build_goes_on_and_repeats_no_finished_shard(tmp_path, whole):
    process = subprocess.Popen([*COMMAND, str(tmp_path / "killed"), "0.1"])
    end = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("*/index/*.json"))) < 4 and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = [json.loads(file.read_text()) for file in (tmp_path / "killed").glob("*/index/*.json")]
    assert 4 <= len(finished) < 13

    computed = []
    again = cache(tmp_path / "killed", 0, computed)
    missing = again.missing()
    source = built(again)
    assert sorted(set(computed)) == [record for record in GOOD if record // 4 in missing]
    assert len(missing) == 13 - len(finished) and len(source) == len(GOOD)
    partial = {name for name in files(tmp_path / "killed") if name.endswith(".partial")}
    assert {name: data for name, data in files(tmp_path / "killed").items() if name not in partial} == whole


def run_two(*folders):
    """What two hosts print that build a cache, each in its folder or both in the only one."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [*COMMAND, str(folders[rank % len(folders)]), "0", str(rank), "2", str(port)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


@pytest.mark.slow
def test_hosts_share_out_what_a_shared_folder_lacks(tmp_path, whole):
    folder = tmp_path / "shared"
    for lacking in (range(13), (1, 3, 5)):  # all shards, and then some of which one host would have had all
        for file in folder.rglob("*-of-00013.json"):
            if int(file.name[:5]) in lacking:
                file.unlink()
        first, second = run_two(folder)
        assert first["labels"] == second["labels"] == GOOD
        assert first["computed"] and second["computed"] and not set(first["computed"]) & set(second["computed"])
        assert sorted(first["computed"] + second["computed"]) == [i for i in GOOD if i // 4 in lacking]
        assert files(folder) == whole


@pytest.mark.slow
def test_hosts_with_disks_of_their_own_compute_all(tmp_path, whole):
    shutil.copytree(tmp_path / "whole", tmp_path / "second")
    for file in [*(tmp_path / "second").rglob("*-of-00013.json")][:5]:
        file.unlink()
    first, second = run_two(tmp_path / "first", tmp_path / "second")
    assert first["labels"] == second["labels"] == first["computed"] == GOOD and len(second["computed"]) < len(GOOD) / 2
    assert files(tmp_path / "first") == files(tmp_path / "second") == whole


@pytest.mark.slow
def test_eight_devices_encode_what_one_does(tmp_path):
    latents = []
    for count in (1, 8):
        command = [sys.executable, "-m", "tests.app.encoding", str(tmp_path / str(count))]
        run = subprocess.run(command, env=os.environ | {"XLA_FLAGS": device_flags(count)}, stdout=subprocess.PIPE)
        assert run.returncode == 0 and int(run.stdout) == count
        (file,) = (tmp_path / str(count)).rglob("latent/*.npy")
        latents.append(np.load(file).view(jnp.bfloat16).astype(np.float32))
    assert latents[0].shape == (70, 2, 4, 4, 4)  # mirrored too, mean and standard deviation of two channels
    # convolutions of other batches may add up in another order, which may round to the next bfloat16
    np.testing.assert_allclose(*latents, rtol=2**-7, atol=1e-4)

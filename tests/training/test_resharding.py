"""A run may go on with another strategy, another number of devices and another number of hosts."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import device_flags
from tests.ports import free_port

# hosts, devices of each, strategy, steps until it stops
LIVES = [(2, 2, "fsdp", 3), (1, 8, "fsdp=4", 6), (1, 1, "pmap", 9), (4, 2, "fsdp", 12)]


def train(workdir, hosts, devices, strategy, steps):
    """(the records of each step in their order, the final weights), the same on every host."""
    port = free_port()
    command = [sys.executable, "-m", "tests.training.resharded"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": device_flags(devices)}
    processes = [
        subprocess.Popen([*command, *map(str, (rank, hosts, port, strategy, workdir, steps))], env=environment)
        for rank in range(hosts)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0] * hosts
    outputs = [json.loads(Path(f"{workdir}.{rank}.json").read_text()) for rank in range(hosts)]
    assert all(output["ema"] == outputs[0]["ema"] for output in outputs)
    records = [list(itertools.chain(*shares)) for shares in zip(*(output["seen"] for output in outputs), strict=True)]
    return records, outputs[0]["ema"]


@pytest.mark.slow
def test_a_run_goes_on_under_any_strategy(tmp_path):
    expected_records, expected = train(tmp_path / "whole", 1, 1, "pmap", LIVES[-1][-1])
    records = []
    for hosts, devices, strategy, steps in LIVES:
        of_life, ema = train(tmp_path / "lives", hosts, devices, strategy, steps)
        records += of_life
    assert records == expected_records
    for name, values in expected.items():
        np.testing.assert_allclose(ema[name], values, atol=1e-6)
    assert {int(file.stem) for file in (tmp_path / "lives" / "averages").iterdir()} == {3, 4, 6, 8, 9, 12}

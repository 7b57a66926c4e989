"""Several hosts: processes that find one another on the loopback, with two devices each."""

import subprocess
import sys

import pytest

from tests.ports import free_port


def train(workdir, steps, hosts=2):
    """The last line that each host prints, its final weights."""
    port = free_port()
    command = [sys.executable, "-m", "tests.training.hosts"]
    processes = [
        subprocess.Popen([*command, *map(str, (rank, hosts, port, workdir, steps))], stdout=subprocess.PIPE, text=True)
        for rank in range(hosts)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * hosts
    return [output.strip().splitlines()[-1] for output in outputs]


@pytest.mark.slow
def test_hosts_agree_and_go_on_where_they_were(tmp_path):
    whole = train(tmp_path / "whole", 8)
    assert whole[0] == whole[1]
    half = train(tmp_path / "parts", 4)
    assert half[0] == half[1] != whole[0]
    assert train(tmp_path / "parts", 8) == whole

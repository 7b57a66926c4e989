"""--mode=serve from the command line: one clear line for what cannot be served, and a picture from what can."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests import command_line
from tests.command_line import ROOT
from tests.test_main import TINY

DEMO = ["--config=configs/latent_cfg.py", "--mode=serve"]


@pytest.fixture
def paths(tmp_path):
    """What stands for a word in a flag."""
    (tmp_path / "empty.txt").write_text(" \n")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield {
            "EMPTY": str(tmp_path / "empty.txt"),
            "FILE": str(tmp_path / "empty.txt"),
            "NONE": str(tmp_path / "none.txt"),
            "TAKEN": listening.getsockname()[1],
        }


BAD = {
    "set config.serve.token_file to a file with a token": [*DEMO, "--config.serve.host=0.0.0.0"],
    "expected one line of ASCII": [*DEMO, "--config.serve.token_file=EMPTY"],
    "No such file or directory": [*DEMO, "--config.serve.token_file=NONE"],
    "Address already in use": [*DEMO, "--config.serve.port=TAKEN"],
    "config.serve.hosts: expected names such as host.docker.internal, without a port, got 'a:80'": [
        *DEMO,
        "--config.serve.hosts=('b.example', 'a:80')",
    ],
    "config.serve.port must be in [0, 65535], got 70000": [*DEMO, "--config.serve.port=70000"],
    "config.serve has no field 'prot'; known: batch_size, ": [*DEMO, "--config.serve.prot=1"],
    "config.serve.save: cannot write to ": [*DEMO, "--config.serve.save=FILE"],
    "no checkpoint in ": [*TINY, "--mode=serve", "--config.serve.port=0"],
    "has no denoiser": ["--config=configs/autoencoder.py", "--mode=serve", "--config.serve.port=0"],
}


@pytest.mark.parametrize("expected", BAD)
def test_what_cannot_be_served_is_one_clear_line(expected, paths, tmp_path, capfd, monkeypatch):
    flags = []
    for flag in BAD[expected]:
        for word, path in paths.items():
            flag = re.sub(f"={word}$", f"={path}", flag)
        flags.append(flag)
    status = command_line.run(monkeypatch, *flags, f"--workdir={tmp_path}/run")
    stderr = capfd.readouterr().err
    assert status == 2 and expected in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_demo_is_served_until_it_is_interrupted(tmp_path):
    (tmp_path / "token.txt").write_text("secret\n")
    flags = ["--config.serve.port=0", f"--config.serve.token_file={tmp_path}/token.txt", f"--workdir={tmp_path}/run"]
    command = [sys.executable, str(ROOT / "main.py"), *DEMO, *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ)
    address = next(match[0] for line in process.stderr if (match := re.search(r"http://\S+", line)))
    assert address.endswith("/?token=secret")
    with httpx.Client(base_url=address.partition("/?")[0], timeout=300, follow_redirects=True) as client:
        assert "diffusion_jax" in client.get(address).text
        response = client.post("/v1/images/generations", json={"prompt": "a red apple", "steps": 2, "seed": 1})
        assert response.status_code == 200 and len(response.json()["data"]) == 1
        worker = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1])
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and "Traceback" not in stderr, stderr
    assert not os.path.exists(f"/proc/{worker}"), "the worker ends with the server"

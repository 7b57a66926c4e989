"""The quick form of every command that the documents print, or the reason why it is not run.

The shell of tests/test_docs.py calls `python tests/quick_forms.py COMMAND WORD...` in place of each command, and then
`python tests/quick_forms.py --run-all FILE` once for all of a block.
"""

import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

SKIPPED = {
    r"python -m venv|pip install": "the environment of the tests replaces it",
    r"git clone": "the clone in which the commands run replaces it",
    r"python -m pytest|ruff": "CI runs it by itself",
    r"gcloud": "needs an account at Google Cloud",
    r"sudo|journalctl": "changes the machine",
    r"cat|sbatch": "needs Slurm",
    r"python main\.py .*--coordinator": "needs the other hosts; tests/app/test_hosts.py has them",
    r"python main\.py .*:(coco256|imagenet256)": "needs the data set",
    r"python main\.py .*data\.source=\S?(tar|parquet|array_record|mix):": "needs the shards; tests/data has some",
    r"python main\.py .*--mode=check .*--compile": "compiles for minutes; tests/app/test_check.py compiles a small one",
    r"python main\.py .*--mode=serve": "serves until it is stopped; tests/serve does so",
    r"python main\.py .*checkpoint=(DiT|SiT)-XL": "needs the file; tests/interop/test_original_dit.py has a small one",
    r"curl": "needs the server",
    r"xprof|python -m mkdocs serve": "serves until it is stopped",
    r"python -m mkdocs build": "tests/test_site.py builds the site",
    r"python main\.py --config=configs/latent_cfg\.py --mode=sample --prompt .* --config\.sample\.": (
        "tests/test_command_lines.py draws its picture"
    ),
}
NEEDED = {
    r"benchmarks\.(parity|solver_overhead|solvers_vs_peer|stable_diffusion|train_step)": "diffusers",
    r"benchmarks\.(klein|latency|transformer)": "diffusers",
    r"benchmarks\.(solver_error|guidance|story)": "matplotlib",
    r"benchmarks\.tpu": "libtpu",
    r"benchmarks\.input": "torch",
    r"benchmarks\.serve": "httpx",
}
TWO_STEPS = "--config.train.steps=2 --config.train.batch_size=2 --config.sample.steps=2"
TWO_LEVELS = (
    "--config.model.block_out_channels=8,16 --config.model.norm_num_groups=4 --config.model.attention_head_dim=4"
)
THREE_LEVELS, FOUR_LEVELS = (TWO_LEVELS.replace("8,16", more) for more in ("8,8,16", "8,8,8,16"))
EVAL = (
    "--config.eval.images=20 --config.eval.reference=20 --config.eval.networks=('pixels',)"
    " --config.eval.batch_size=20 --config.eval.steps=1 --config.eval.terms=2"
)
SCENES = (
    "--config.data.splits.train=train[:40] --config.data.splits.first_stage=mixed[:8]"
    " --config.data.splits.validation=validation[:8] --config.data.styles=('outlined',)"
    " --config.autoencoder.model.block_out_channels=4,4,4,8 --config.autoencoder.train.steps=2"
    " --config.autoencoder.train.batch_size=2"
)
QUICK = {  # what is added to a command
    r"python -m benchmarks\.": "--quick",
    r"python -m diffusion_jax\.interop\.verify": "",
    r"python main\.py .*--mode=check": "--nohours",
    r"python main\.py .*configs/(digits\.py|few_step\.py:digits)": (
        f"{TWO_STEPS} {TWO_LEVELS} {EVAL} --config.sample.num_images=1"
    ),
    r"python main\.py .*configs/autoencoder\.py": SCENES,
    r"python main\.py .*configs/latent_cfg\.py:full .*down_block_types": (
        f"{TWO_STEPS} {SCENES} --config.eval.concepts=2 --config.eval.cases=2"  # a tuple given twice would be appended
    ),
    r"python main\.py .*configs/latent_cfg\.py:full": (
        f"{TWO_STEPS} {FOUR_LEVELS} {SCENES} {EVAL} --config.eval.concepts=2 --config.eval.cases=2"
    ),
    r"python main\.py .*configs/latent_cfg\.py": (
        f"{TWO_STEPS} {THREE_LEVELS} {SCENES} {EVAL} --config.eval.concepts=2 --config.eval.cases=2"
    ),
    r"python main\.py .*configs/(published|lora)\.py": (
        f"{TWO_STEPS} --config.sample.height=64 --config.sample.width=64"
    ),
}


def reason_to_skip(command: str) -> str | None:
    """Why a command is not run, None if it is."""
    for pattern, reason in SKIPPED.items():
        if re.match(pattern, command):
            return reason
    for pattern, module in NEEDED.items():
        if re.search(pattern, command) and not importlib.util.find_spec(module):
            return f"needs {module}"
    return None


def quick_form(command: str) -> list[str] | None:
    """The words to run in place of a command, None if it has no quick form."""
    for pattern, added in QUICK.items():
        if re.match(pattern, command):
            return [*shlex.split(command), *added.split()]
    return None


def note(words: list[str]) -> None:
    """Add the quick form of a command to the file of commands, or to that of skipped commands why it is not run.

    The environment has QUICK_FORMS: the file of commands, a line of JSON each. QUICK_FORMS_SKIPPED: the other file.
    """
    command = shlex.join(words).replace("python3 ", "python ", 1)
    command = re.sub("^diffusion_jax ", "python main.py ", command)  # what is installed under this name
    if reason := reason_to_skip(command):
        with open(os.environ["QUICK_FORMS_SKIPPED"], "a") as log:
            print(f"{reason}\t{command}", file=log)
        return
    quick = quick_form(command)
    if quick is None:
        sys.exit(
            f"no quick form for: {command}\nAdd what makes it end in seconds to QUICK in tests/quick_forms.py, or, if "
            "it cannot run in the tests, the reason to SKIPPED."
        )
    with open(os.environ["QUICK_FORMS"], "a") as commands:
        print(json.dumps(quick), file=commands)


def run_all(file: str) -> None:
    """Run the commands of a file in the current folder, each in a process of its own, until one fails.

    Those of main.py are forked from this process, which has imported the program and done nothing else: imports take
    half of the time of a quick form.
    """
    sys.path.insert(0, os.getcwd())
    for line in Path(file).read_text().splitlines():
        words = json.loads(line)
        print("$", shlex.join(words), flush=True)
        if words[1] != "main.py":
            if status := subprocess.run([sys.executable, *words[1:]]).returncode:
                sys.exit(status)
            continue
        command = importlib.import_module("diffusion_jax.app.command")
        for module in command.MODES.values():
            importlib.import_module(module)
        child = os.fork()
        if not child:
            sys.argv = words[1:]
            runpy.run_path("main.py", run_name="__main__")
            sys.exit()
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(status)


if __name__ == "__main__":
    run_all(sys.argv[2]) if sys.argv[1] == "--run-all" else note(sys.argv[1:])

"""Every solver beside diffusers' scheduler of the same name, and where the two differ, as markdown.

    pip install -r requirements-peer.txt
    python benchmarks/solvers_vs_peer.py --all

Without --all each number of steps is tried with one spacing, as in tests/core/test_peer.py, which checks both tables.
"""

import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from tests.core import peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every schedule, prediction, spacing and number of steps")
    cases = peer.cases if parser.parse_args().all else peer.few_cases
    torch.set_num_threads(1)
    names = ("diffusers", "torch", "jax", "numpy")
    print(f"Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in names)}.\n")
    print("| solver | scheduler | predictions | cases | largest difference |\n|---|---|---|---|---|")
    for name, each in peer.PEERS.items():
        tried = cases(name)
        worst = max(peer.difference(name, *case) for case in tried)
        peer_name = each.scheduler.__name__.removesuffix("Scheduler")
        print(f"| {name} | {peer_name} | {', '.join(each.kinds)} | {len(tried)} | {worst:.0e} |", flush=True)
    print("\n| scheduler | where it differs, and what ours does | by |\n|---|---|---|")
    for deviation in peer.DEVIATIONS.values():
        print(f"| {deviation.peer} | {deviation.what} | {deviation.measure():.2g} |", flush=True)


if __name__ == "__main__":
    main()

"""Every solver beside diffusers' scheduler of the same name, and where the two differ, as markdown.

    pip install -r requirements-peer.txt
    python -m benchmarks.solvers_vs_peer --all

Without --all each number of steps is tried with one spacing, as in tests/core/test_peer.py, which checks both tables.
"""

import platform
from importlib.metadata import version

import torch

from benchmarks import quick
from tests.core import peer


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("--all", action="store_true", help="every schedule, prediction, spacing and number of steps")
    flags = parser.parse_args()
    quick.note(flags.quick)
    cases = peer.cases if flags.all else peer.few_cases
    torch.set_num_threads(1)
    names = ("diffusers", "torch", "jax", "numpy")
    print(f"Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in names)}.\n")
    print("| solver | scheduler | predictions | cases | largest difference |\n|---|---|---|---|---|")
    for name, each in peer.PEERS.items():
        tried = cases(name)[: 3 if flags.quick else None]
        worst = max(peer.difference(name, *case) for case in tried)
        peer_name = each.scheduler.__name__.removesuffix("Scheduler")
        print(f"| {name} | {peer_name} | {', '.join(each.kinds)} | {len(tried)} | {worst:.0e} |", flush=True)
    print("\n| scheduler | where it differs, and what ours does | by |\n|---|---|---|")
    for deviation in peer.DEVIATIONS.values():
        print(f"| {deviation.peer} | {deviation.what} | {deviation.measure():.2g} |", flush=True)


if __name__ == "__main__":
    main()

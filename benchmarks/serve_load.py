"""Many clients of one server: pictures a second with batching and without, and whether each gets its own picture.

    python -m benchmarks.serve_load --clients 64 --seconds 120

Each client asks for one picture after another, with its own prompt and one of a few seeds. A picture says in its text
which prompt and seed it is of, and the same prompt and seed must give the same bytes each time, in whatever batch. A
client that is refused comes back after the time that it is told. Prints a line for each batch size: pictures a second,
the time of a request, the fewest and the most pictures of a client, refusals, errors, and the memory of the server
after a quarter of the time and at its end.
"""

import asyncio
import base64
import collections
import hashlib
import io
import time

import httpx
import numpy as np
from PIL import Image

from benchmarks import quick
from benchmarks.served import Served, served

THINGS = ("apple", "cat", "house", "boat", "fish", "rocket", "heart", "pizza")
SEEDS = 3
MIB = 2**20


async def client(number: int, session: httpx.AsyncClient, end: float, steps: int, digests: dict, counts: dict) -> None:
    """One client, until the end. digests: of (prompt, seed), to compare with. counts: of events, to add to."""
    prompt = f"a {THINGS[number % len(THINGS)]} {number}"
    while time.monotonic() < end:
        seed, start = counts["pictures"][number] % SEEDS, time.monotonic()
        ask = {"prompt": prompt, "seed": seed, "steps": steps}
        address = {"x-forwarded-for": f"10.0.{number // 256}.{number % 256}"}  # one may fill half of the queue
        answer = await session.post("/v1/images/generations", json=ask, headers=address)
        if answer.status_code == 429:
            counts["refused"][number] += 1
            await asyncio.sleep(int(answer.headers["retry-after"]))
            continue
        if answer.status_code != 200:
            counts["errors"][number] += 1
            continue
        picture = base64.b64decode(answer.json()["data"][0]["b64_json"])
        text = Image.open(io.BytesIO(picture)).text
        digest = hashlib.sha256(picture).hexdigest()
        if (text["prompt"], text["seed"]) != (prompt, str(seed)) or digests.setdefault(
            (prompt, seed), digest
        ) != digest:
            counts["wrong"][number] += 1
        counts["pictures"][number] += 1
        counts["seconds"].append(time.monotonic() - start)


async def load(server: Served, clients: int, seconds: float, steps: int) -> str:
    """Run the clients -> a line of the table."""
    records = {name: collections.Counter() for name in ("pictures", "refused", "errors", "wrong")} | {"seconds": []}
    end, digests, limits = time.monotonic() + seconds, {}, httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.address, timeout=600, limits=limits) as session:
        running = [asyncio.create_task(client(i, session, end, steps, digests, records)) for i in range(clients)]
        await asyncio.sleep(seconds / 4)
        early = server.memory
        await asyncio.gather(*running)
    per_client = [records["pictures"][i] for i in range(clients)]
    times = [f"{value:.2f}" for value in np.percentile(records["seconds"], (50, 95))]
    totals = [str(records[name].total()) for name in ("refused", "errors", "wrong")]
    memory = [f"{size / MIB:.0f}" for size in (early, server.memory)]
    return " | ".join(
        [
            f"{sum(per_client) / seconds:.1f}",
            *times,
            f"{min(per_client)}-{max(per_client)}",
            *totals,
            " -> ".join(memory),
        ]
    )


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    options = parser.parse_args()
    quick.note(options.quick)
    if options.quick:
        options.clients, options.seconds, options.steps, options.batch_sizes = 8, 3, 2, [4]
    print("| batch | pictures / s | p50 s | p95 s | a client | refused | errors | wrong | memory MiB |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for size in options.batch_sizes:
        with served(f"--config.serve.batch_size={size}", warm=not options.quick) as server:
            line = asyncio.run(load(server, options.clients, options.seconds, options.steps))
        print(f"| {size} | {line} |", flush=True)


if __name__ == "__main__":
    main()

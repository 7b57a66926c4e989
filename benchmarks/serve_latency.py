"""How long one person waits: the first picture after the start, pictures of few and many steps, and live frames.

    python -m benchmarks.serve_latency
    python -m benchmarks.serve_latency --preset fast

The server is that of the demo, or of its student of few calls, otherwise idle. Times are those of the client, from its
request to the whole answer.
Live frames are image to image with one network call each (two steps, strength 0.5), without guidance, and where the
canvas is not drawn by a student, with it, which is one call on two images. A first start compiles; with the cache of an
earlier one it does not.
"""

import base64
import io
import json
import time

import httpx
import numpy as np
from PIL import Image
from websockets.sync.client import connect

from benchmarks import quick
from benchmarks.served import served

STEPS = (1, 2, 4, 20)
SIDES = (64, 128)


def seconds(session: httpx.Client, **ask) -> float:
    """The time of one request."""
    start = time.monotonic()
    session.post("/v1/images/generations", json={"prompt": "a red apple"} | ask).raise_for_status()
    return time.monotonic() - start


def frames_a_second(address: str, side: int, guidance: float, count: int) -> float:
    """Live frames a second of `count`, each of a canvas that has changed."""
    ask = {"prompt": "a red apple", "steps": 2, "strength": 0.5, "guidance": guidance, "width": side, "height": side}
    start = time.monotonic()
    with connect(address.replace("http", "ws") + "/api/live", max_size=None) as socket:
        for i in range(-2, count):  # the first two compile
            if i == 0:
                start = time.monotonic()
            assert json.loads(socket.recv())["type"] == "next"
            file = io.BytesIO()
            Image.new("RGB", (side, side), (255, i % 256, 0)).save(file, "PNG")
            socket.send(json.dumps(ask | {"image": base64.b64encode(file.getvalue()).decode()}))
            answer = json.loads(socket.recv(600))
            assert answer["type"] == "frame", answer
            socket.recv()
    return count / (time.monotonic() - start)


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--preset", default="", help="of configs/latent_cfg.py")
    options = parser.parse_args()
    quick.note(options.quick)
    repeats, sides = (2, SIDES[:1]) if options.quick else (options.repeats, SIDES)
    with (
        served(preset=options.preset, warm=False) as server,
        httpx.Client(base_url=server.address, timeout=600) as session,
    ):
        listening = time.monotonic() - server.begun
        seconds(session)
        print(f"the page after {listening:.1f} s, the first picture after {time.monotonic() - server.begun:.1f} s\n")
        while not options.quick and session.get("/health").json()["status"] != "ready":
            time.sleep(0.2)
        print("| steps | p50 ms | p95 ms |\n|---|---|---|", flush=True)
        for steps in STEPS:
            times = [1000 * seconds(session, steps=steps, seed=i) for i in range(repeats)]
            print("| {} | {:.0f} | {:.0f} |".format(steps, *np.percentile(times, (50, 95))), flush=True)
        schemas = session.get("/openapi.json").json()["components"]["schemas"]
        scales = (1.0, 3.0) if schemas["LiveRequest"]["properties"]["guidance"]["maximum"] > 1 else (1.0,)
        print(f"\n| live | {' | '.join(f'guidance {scale:g}' for scale in scales)} |\n|{'---|' * (len(scales) + 1)}")
        for side in sides:
            rates = [frames_a_second(server.address, side, scale, repeats) for scale in scales]
            print(f"| {side} x {side} | {' | '.join(f'{rate:.1f} / s' for rate in rates)} |", flush=True)


if __name__ == "__main__":
    main()

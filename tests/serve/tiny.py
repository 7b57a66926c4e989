"""A model of a few thousand random weights for the worker of a server, whose prompts are the digits.

Each step of a picture of the prompt SLOW waits, so that there is time to stop it.
"""

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import uvicorn

from configs import digits
from diffusion_jax import build
from diffusion_jax.data.references import References
from diffusion_jax.serve import connections
from diffusion_jax.serve.drawing import Picture, Shared
from diffusion_jax.serve.engine import Ended, Engine, PictureDone
from diffusion_jax.serve.loading import Loaded
from diffusion_jax.serve.saving import Album
from diffusion_jax.serve.server import application
from diffusion_jax.serve.service import Service

BRIGHT = 135  # mean grey level of about half of the pictures
SLOW, WAIT = "9", 0.01  # a prompt, and seconds that each of its steps takes
SHARED = Shared("generate", (8, 8), "dpmpp_2m", "", steps=4)


def config(**serve):
    result = digits.get_config()
    result.model.update(block_out_channels=(8,), norm_num_groups=4, attention_head_dim=8, mid_block_type=None)
    result.model.update(down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",))
    result.sample.update(prompts=("3", "7"), steps=4)
    result.serve.update(batch_size=3, queue=6, max_side=16, max_images=8, max_steps=1000, max_upload=500_000)
    result.serve.update(serve)
    return result


def _wait(label, x):
    """0, for every x; later if there is a picture of the slow prompt."""
    time.sleep(WAIT * bool((np.asarray(label) == int(SLOW)).any()))
    return np.zeros_like(x)


def load(origin="random", **serve) -> Loaded:
    model = build.model.diffusion_model(config())
    network_apply = model.network.apply

    def apply(params, x, t, cond, keys=None):
        corner = x[0, 0, 0, 0]  # as the wait depends on x, each step has its own
        return network_apply(params, x + jax.pure_callback(_wait, corner, cond["label"], corner), t, cond, keys)

    leaves, tree = jax.tree.flatten(model.network.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    model = model._replace(params=jax.tree.unflatten(tree, noise), network=model.network._replace(apply=apply))
    return Loaded(config(**serve), model, origin)


def load_not_finite() -> Loaded:
    loaded = load()
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), loaded.model.params)
    return loaded._replace(model=loaded.model._replace(params=broken))


def load_with_student() -> Loaded:
    """The model with a student for the live canvas, which has guidance built in and other weights."""
    loaded, student = load(), config()
    student.sample.update(solver="consistency", steps=2, guidance=1.0)
    student.objective.scale = 2.0
    params = jax.tree.map(lambda leaf: 0.5 * leaf, loaded.model.params)
    return loaded._replace(live=Loaded(student, loaded.model._replace(params=params), "the/student"))


def load_student() -> Loaded:
    """The student by itself."""
    return load_with_student().live


def load_inpainting() -> Loaded:
    """The model as one that only inpaints, and pays no attention to the known part."""
    loaded = load()
    network = loaded.model.network

    def apply(params, x, t, cond, keys=None):
        return network.apply(params, x, t, {name: leaf for name, leaf in cond.items() if name != "known"}, keys)

    return loaded._replace(model=loaded.model._replace(network=network._replace(apply=apply, known_channels=4)))


def load_reading() -> Loaded:
    """The model as one that reads two reference pictures: it adds the colour of the first, and takes off the other."""
    loaded = load()
    without = loaded.model.network.apply

    def apply(params, x, t, cond, keys=None):
        first, *second = cond.get("references", (jnp.zeros_like(x),))
        out = without(params, x, t, {"label": cond["label"]}, keys)
        return out - 0.5 * first.mean((1, 2), keepdims=True) + sum(each.mean((1, 2), keepdims=True) for each in second)

    network, reads = loaded.model.network._replace(apply=apply), References(most=2, area=64, side=4, ratio=8)
    return loaded._replace(model=loaded.model._replace(network=network, references=reads))


def load_checked() -> Loaded:
    """The model with a safety checker that flags bright images."""
    loaded = load()
    return loaded._replace(model=loaded.model._replace(held_back=lambda images: images.mean(axis=(1, 2, 3)) > BRIGHT))


def load_once(file: Path) -> Loaded:
    """The model, if the file is not there yet; it is made."""
    if file.exists():
        raise OSError("the weights are gone")
    file.touch()
    return load()


def picture(prompt="3", seed=0, guidance=2.0, **shared) -> Picture:
    return Picture(SHARED._replace(**shared), prompt, "", guidance, seed)


@contextlib.contextmanager
def running(load, size=6):
    """(engine, run): an engine that answers, and what runs a coroutine in its event loop."""
    engine = Engine(load, size)
    engine.start()
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        runner.run(stack.enter_async_context(engine.serving()))
        yield engine, runner.run
        runner.run(stack.aclose())


async def ended(job):
    """(images by number, error) of a job, once it has ended."""
    images = {}
    while True:
        event = await asyncio.wait_for(job.events.get(), 120)
        if isinstance(event, PictureDone):
            images[event.number] = event.image
        if isinstance(event, Ended):
            return images, event.error


@contextlib.contextmanager
def served(load=load, token="", hosts=(), port=0, **serve):
    """(address, service): an HTTP server of its own thread on a port of the loopback, by default a free one."""
    settings = config(**serve)
    engine = Engine(load, settings.serve.queue)
    service = Service(engine, engine.start(), settings, Album(settings.serve.save) if settings.serve.save else None)
    with socket.create_server(("127.0.0.1", port)) as listening:
        app = application(service, token, hosts)
        options = connections.settings(app, service.facts.size, settings.serve.max_upload, log_level="error")
        server = uvicorn.Server(options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://localhost:{listening.getsockname()[1]}", service
        server.should_exit = True
        thread.join()

"""The order of the queue, without a worker: its messages are recorded, and its answers made up."""

import collections
import multiprocessing
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from diffusion_jax.serve import worker as workers
from diffusion_jax.serve.drawing import Artist
from diffusion_jax.serve.engine import CANCELLED, Ended, Engine, Full, PictureDone, Preparing, Queued
from diffusion_jax.serve.loading import Facts
from diffusion_jax.serve.worker import Batch, Cancel, Compiled, Drawn
from tests.serve.tiny import picture

IMAGE = np.zeros((8, 8, 3), np.uint8)


class Worker:
    """A worker that says it has drawn a batch when it is told to."""

    def __init__(self, engine):
        self.engine, self.sent = engine, []
        engine.connection, engine.facts = self, SimpleNamespace(size=(8, 8), batch_size=1)

    def send(self, message):
        self.sent.append(message)

    def batches(self):
        """(steps, width) of the pictures sent, in their order."""
        sent = [message.pictures[0].shared for message in self.sent if isinstance(message, Batch)]
        return [(shared.steps, shared.size[1]) for shared in sent]

    def finish(self, place=-1):
        """The batch that was sent at this place is done."""
        batch = [message for message in self.sent if isinstance(message, Batch)][place]
        self.engine._take(Drawn(batch.number, [IMAGE] * len(batch.pictures)))


@pytest.fixture
def engine():
    return Engine(lambda: None, 8)


@pytest.fixture
def worker(engine):
    return Worker(engine)


def test_clients_take_turns(engine, worker):
    for steps in (1, 2, 3, 4):
        engine.submit([picture(steps=steps)], client="greedy")
    engine.submit([picture(steps=10)], client="late")
    engine.submit([picture(steps=20)], client="later")
    for _ in range(4):
        worker.finish()
    engine.submit([picture(steps=11)], client="late")
    worker.finish()
    worker.finish()
    assert [steps for steps, _ in worker.batches()] == [1, 2, 10, 20, 3, 11, 4]


def test_one_client_leaves_half_of_the_queue_to_others(engine, worker):
    jobs = [engine.submit([picture(steps=1 + i)], client="greedy") for i in range(5)]  # the first is being drawn
    with pytest.raises(Full):
        engine.submit([picture()], client="greedy")
    for i in range(4):
        engine.submit([picture(steps=10 + i)], client=f"other {i}")
    with pytest.raises(Full):
        engine.submit([picture()], client="one more")
    engine.cancel(jobs[-1])
    engine.submit([picture()], client="one more")


def test_other_sizes_are_drawn_beside_the_own_size_and_wait_for_nothing_of_it(engine, worker):
    large = engine.submit([picture(steps=1, size=(16, 16))])
    small = engine.submit([picture(steps=2)])
    more = engine.submit([picture(steps=3, size=(16, 16))])
    last = engine.submit([picture(steps=4)])
    assert worker.batches() == [(1, 16), (2, 8)], "the small one does not wait for the large one"
    assert more.events.get_nowait() == Queued(0) == last.events.get_nowait() and more.events.get_nowait() == Queued(
        1
    ), "the own size comes first"
    worker.finish(1)
    assert small.ended and not large.ended and worker.batches()[2:] == [(4, 8)]
    worker.finish(0)
    assert large.ended and worker.batches()[3:] == [(3, 16)]


def test_a_client_that_leaves_while_its_size_compiles_stops_nobody(engine, worker):
    large = engine.submit([picture(steps=1, size=(16, 16))])
    engine.cancel(large)
    assert [large.events.get_nowait() for _ in range(2)] == [Preparing((16, 16), 0), Ended(CANCELLED)]
    assert worker.sent[-1] == Cancel(1)
    waiting, small = engine.submit([picture(steps=2, size=(16, 16))]), engine.submit([picture(steps=3)])
    assert worker.batches()[1:] == [(3, 8)]
    worker.finish()
    assert small.ended
    engine.cancel(waiting)
    worker.finish(0)
    assert engine.pictures_waiting == 0 and len(worker.batches()) == 2


def test_a_size_is_prepared_once_for_each_kind_of_picture(engine, worker):
    engine._take(Compiled(9, 0, 30.0))

    def first_event(**shared):
        job = engine.submit([picture(size=(16, 16), **shared)])
        worker.finish()
        return job.events.get_nowait()

    assert first_event() == Preparing((16, 16), 30.0)
    assert first_event() == first_event(steps=9, solver="ddim", strength=0.3) == PictureDone(0, IMAGE)
    assert first_event(image=True) == Preparing((16, 16), 30.0)
    own = engine.submit([picture()])
    worker.finish()
    assert own.events.get_nowait() == PictureDone(0, IMAGE)


def test_a_request_knows_how_long_those_before_it_take(engine, worker):
    engine.seconds = 2.0
    jobs = [engine.submit([picture(steps=steps)] * 3) for steps in (1, 2, 3)]
    assert [engine.seconds_before(job) for job in jobs[1:]] == [6.0, 12.0]
    worker.finish()
    assert [engine.seconds_before(job) for job in jobs[1:]] == pytest.approx([2 * engine.seconds, 5 * engine.seconds])


@pytest.mark.parametrize("in_turns", [True, False])
def test_in_turns_one_batch_is_drawn_after_the_other(in_turns, monkeypatch):
    threads = []
    monkeypatch.setattr(workers, "_draw", lambda *inputs: threads.append(threading.get_ident()) or [])
    server, end = multiprocessing.Pipe()
    for number, size in enumerate([(8, 8), (16, 16)]):
        server.send(Batch(number, [picture(size=size)], "none"))
    artist, facts = object.__new__(Artist), Facts._make([None] * len(Facts._fields))._replace(size=(8, 8))
    artist.in_turns = in_turns
    inputs = end, {False: artist}, facts, [], collections.defaultdict(list)
    drawing = threading.Thread(target=workers._answer, args=inputs, daemon=True)
    drawing.start()
    for _ in range(4 if in_turns else 3):  # the thread of other sizes does not say how many programs there are
        assert server.poll(30)
        server.recv()
    server.close()
    drawing.join(10)
    assert len(set(threads)) == (1 if in_turns else 2)

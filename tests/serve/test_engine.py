"""The queue and its worker: a picture never depends on its batch, the order is that of arrival, and nothing is lost."""

import asyncio
import functools
import os
import re
import signal

import numpy as np
import pytest

from diffusion_jax.serve import loading
from diffusion_jax.serve.engine import CANCELLED, Engine, Full, Progress, Queued
from diffusion_jax.serve.worker import HELD_BACK, NOT_FINITE, Failed, Refused
from tests.serve import tiny
from tests.serve.tiny import ended, picture

LONG = 1000  # steps, ten seconds of the slow prompt


@pytest.fixture(scope="module")
def engine():
    with tiny.running(tiny.load) as pair:
        yield pair


def drawn(engine, *pictures):
    """The images of pictures that are asked for at once, each by itself."""
    queue, run = engine

    async def all_of_them():
        jobs = [queue.submit([one]) for one in pictures]
        return [await ended(job) for job in jobs]

    return [next(iter(images.values()), error) for images, error in run(all_of_them())]


def image_and_mask():
    rng = np.random.default_rng(0)
    mask = np.zeros((8, 8, 1), bool)
    mask[:, :3] = True
    return rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), mask


def test_a_picture_is_the_same_alone_and_in_any_batch(engine):
    mine = picture("5", seed=7, guidance=3.0)
    (alone,) = drawn(engine, mine)
    assert alone.std() > 0
    others = [picture(str(i), seed=i, guidance=1.5 + i) for i in range(4)]
    for place in range(len(others)):
        together = drawn(engine, *others[:place], mine, *others[place:])
        np.testing.assert_array_equal(together[place], alone)
        assert not np.array_equal(together[place - 1], alone)


def test_negative_prompts_and_images_do_not_mix_either(engine):
    image, mask = image_and_mask()
    mine = picture("5", image=True, mask=True)._replace(negative_prompt="2", image=image, mask=mask)
    other = mine._replace(negative_prompt="", image=255 - image, mask=~mask, seed=9)
    (alone,), together = drawn(engine, mine), drawn(engine, other, mine, other)
    np.testing.assert_array_equal(together[1], alone)
    np.testing.assert_array_equal(alone[:, 3:], image[:, 3:])
    np.testing.assert_array_equal(together[0][:, :3], 255 - image[:, :3])


def test_the_first_to_come_is_the_first_to_be_drawn(engine):
    queue, run = engine

    async def places():
        jobs = [queue.submit([picture(steps=4 + i)]) for i in range(4)]  # no two of them fit one batch
        order = []

        async def follow(i):
            await ended(jobs[i])
            order.append(i)

        positions = [[event for event in list(job.events._queue) if isinstance(event, Queued)] for job in jobs]
        await asyncio.gather(*map(follow, range(4)))
        return order, positions

    order, positions = run(places())
    assert order == [0, 1, 2, 3]
    assert positions == [[], [Queued(0)], [Queued(1)], [Queued(2)]]


def test_a_request_of_many_pictures_takes_several_batches(engine):
    queue, run = engine
    pictures = [picture(seed=seed) for seed in range(7)]
    images, error = run(as_coroutine(lambda: queue.submit(pictures)))
    assert error is None and sorted(images) == list(range(7))
    np.testing.assert_array_equal(images[5], drawn(engine, pictures[5])[0])


async def as_coroutine(submit):
    return await ended(submit())


async def begun(job):
    """Wait for a step of a job."""
    while not isinstance(await asyncio.wait_for(job.events.get(), 60), Progress):
        assert not job.ended


async def first_after_steps(job):
    """The next event of a job that is not a step."""
    while isinstance(event := await asyncio.wait_for(job.events.get(), 60), Progress):
        pass
    return event


def test_progress_is_told_with_previews_for_those_who_want_them(engine):
    queue, run = engine

    async def events():
        job, plain = queue.submit([picture()], "all"), queue.submit([picture(seed=1)])
        await asyncio.gather(done := asyncio.create_task(ended(plain)))
        progress = []
        while not job.ended or not job.events.empty():
            progress.append(await job.events.get())
        return progress, done.result()

    progress, _ = run(events())
    steps = [event for event in progress if isinstance(event, Progress)]
    assert [(step.done, step.total) for step in steps] == [(i, 4) for i in range(1, 5)]
    assert all(step.previews[0].shape == (8, 8, 3) for step in steps)


def test_a_step_is_told_once_to_a_request_of_several_pictures(engine):
    queue, run = engine

    async def steps():
        job = queue.submit([picture(), picture(seed=1)], "all")
        while not job.ended:
            await asyncio.sleep(0.01)
        return [event for event in list(job.events._queue) if isinstance(event, Progress)]

    received = run(steps())
    assert [step.done for step in received] == [1, 2, 3, 4] and all(
        sorted(step.previews) == [0, 1] for step in received
    )


def test_a_cancelled_request_stops_after_its_step_and_the_next_one_is_drawn(engine):
    queue, run = engine

    async def cancel():
        job, after = queue.submit([picture(tiny.SLOW, steps=LONG)]), queue.submit([picture()])
        await begun(job)
        queue.cancel(job)
        images, error = await ended(after)
        rest = [event for event in list(job.events._queue) if isinstance(event, Progress)]
        return rest, images, error

    rest, images, error = run(cancel())
    assert len(rest) < LONG / 2 and error is None and len(images) == 1


def test_a_request_that_waits_can_be_cancelled(engine):
    queue, run = engine

    async def cancel():
        first, second = queue.submit([picture(tiny.SLOW, steps=50)]), queue.submit([picture(steps=51)])
        queue.cancel(second)
        return await ended(first), await ended(second)

    (images, error), (none, why) = run(cancel())
    assert len(images) == 1 and error is None
    assert none == {} and why == CANCELLED


def test_a_full_queue_says_when_to_come_back(engine):
    queue, run = engine

    async def fill():
        jobs = [queue.submit([picture(steps=LONG - i)]) for i in range(queue.size + 1)]  # one of them is being drawn
        with pytest.raises(Full) as full:
            queue.submit([picture()])
        for job in jobs:
            queue.cancel(job)
        return full.value.seconds

    assert run(fill()) >= 1
    assert isinstance(drawn(engine, picture())[0], np.ndarray)


def test_a_wrong_prompt_harms_no_other_picture_of_its_batch(engine):
    good, bad, _ = drawn(engine, picture(), picture("cat"), picture("5"))
    np.testing.assert_array_equal(good, drawn(engine, picture())[0])
    assert bad == Refused("this model knows classes: expected a number in 0..9, got 'cat'", "prompt")


def test_what_cannot_be_drawn_is_refused(engine):
    (wrong,) = drawn(engine, picture(steps=LONG + 1))
    assert isinstance(wrong, Refused) and "steps must be in 1..1000" in wrong.message


def test_nothing_is_compiled_for_any_control(engine):
    queue, run = engine

    async def warmed():
        while queue.compiled.left:
            await asyncio.sleep(0.1)

    run(warmed())
    drawn(engine, picture())
    image, mask = image_and_mask()
    before = queue.compiled.programs
    for shared in ({"steps": 7}, {"solver": "ddpm"}, {"solver": "unipc", "spacing": "karras"}, {"guided": False}):
        plain = picture("8", seed=5, guidance=1.0 if shared.get("guided") is False else 4.5, **shared)
        drawn(engine, plain, plain._replace(negative_prompt="1"))
        with_image = plain._replace(shared=plain.shared._replace(image=True, strength=0.8), image=image)
        drawn(engine, with_image, with_image._replace(shared=with_image.shared._replace(live=True)))
        drawn(engine, with_image._replace(shared=with_image.shared._replace(mask=True), mask=mask))
    style = picture(solver="ddim", task="style", image=True)._replace(image=image, other_prompt="4")
    noise = picture(task="noise", image=True)._replace(image=image, weight=0.5)
    drawn(engine, style, noise)
    assert queue.compiled.programs == before


def test_a_size_that_compiles_stops_nobody(engine):
    queue, run = engine

    async def both():
        while queue.compiled.left:
            await asyncio.sleep(0.1)
        left, large, small = (queue.submit([picture(size=size)]) for size in ((8, 24), (16, 16), (8, 8)))
        queue.cancel(left)
        assert left.ended and queue.pictures_waiting == 2
        images = await ended(small)
        return images, large.ended, await ended(large)

    (small, error), was_ended, (large, no_error) = run(both())
    assert not was_ended, "the small one did not wait"
    assert error is None and no_error is None and large[0].shape == (16, 16, 3)
    np.testing.assert_array_equal(small[0], drawn(engine, picture())[0])
    np.testing.assert_array_equal(large[0], drawn(engine, picture(size=(16, 16)))[0])


def test_a_style_of_strength_0_and_noise_of_weight_0_keep_the_picture(engine):
    image, _ = image_and_mask()
    style = picture(solver="ddim", task="style", image=True, strength=0.0)._replace(image=image)
    noise = picture("", task="noise", image=True)._replace(image=image)
    restyled, clean = drawn(engine, style, noise)
    np.testing.assert_array_equal(restyled, image)
    assert np.abs(clean.astype(int) - image).mean() < 10


def test_a_picture_that_is_inverted_and_sampled_with_its_own_prompt_comes_back(engine):
    image, _ = image_and_mask()
    own = picture("5", guidance=1.0, guided=False, solver="ddim", task="style", image=True, steps=200)
    (back,) = drawn(engine, own._replace(image=image, other_prompt="5"))
    assert np.abs(back.astype(int) - image).mean() < 10


def test_a_worker_that_is_killed_is_started_again_and_its_work_is_done_again(engine):
    queue, run = engine
    slow = picture(tiny.SLOW, steps=200)
    (before,) = drawn(engine, slow)
    restarts = queue.restarts

    async def kill():
        job, waiting = queue.submit([slow]), queue.submit([picture(steps=5)])
        await begun(job)
        os.kill(queue.process.pid, signal.SIGKILL)
        return await first_after_steps(job), await ended(job), await ended(waiting)

    positions, (images, error), (others, no_error) = run(kill())
    assert positions == Queued(0), "the queue is told"
    assert error is None and no_error is None and len(others) == 1
    np.testing.assert_array_equal(images[0], before)
    assert queue.restarts == restarts + 1


def test_work_that_kills_the_worker_twice_is_given_up(engine):
    queue, run = engine

    async def kill():
        job = queue.submit([picture(tiny.SLOW, steps=LONG)])
        for _ in range(2):
            await begun(job)
            os.kill(queue.process.pid, signal.SIGKILL)
            while queue.facts:
                await asyncio.sleep(0.01)
        return await ended(job)

    images, error = run(kill())
    assert images == {} and error == Failed("the process that draws ended twice while it drew this")
    assert isinstance(drawn(engine, picture())[0], np.ndarray)


def test_a_model_that_is_not_finite_gives_an_error_and_no_picture():
    with tiny.running(tiny.load_not_finite) as engine:
        assert drawn(engine, picture(), picture(seed=1)) == [NOT_FINITE] * 2


def test_pictures_that_a_safety_checker_flags_are_held_back_and_so_are_their_previews(engine):
    pictures = [picture(seed=seed) for seed in range(6)]
    free = drawn(engine, *pictures)
    with tiny.running(tiny.load_checked) as (queue, run):
        checked = drawn((queue, run), *pictures)

        async def previews():
            job = queue.submit(pictures, "all")
            while not job.ended:
                await asyncio.sleep(0.01)
            steps = [event for event in list(job.events._queue) if isinstance(event, Progress)]
            return [image for step in steps for image in step.previews.values()]

        previews_shown = run(previews())
    bright = [image.mean() > tiny.BRIGHT for image in free]
    assert any(bright) and not all(bright)
    for image, outcome, is_bright in zip(free, checked, bright, strict=True):
        assert outcome == HELD_BACK if is_bright else np.array_equal(outcome, image)
    assert any((image == 0).all() for image in previews_shown) and all(
        image.mean() <= tiny.BRIGHT for image in previews_shown
    )


def test_a_worker_that_cannot_start_again_fails_what_waits(tmp_path):
    with tiny.running(functools.partial(tiny.load_once, tmp_path / "loaded")) as engine:
        queue, run = engine

        async def kill():
            job = queue.submit([picture(tiny.SLOW, steps=LONG)])
            os.kill(queue.process.pid, signal.SIGKILL)
            return await ended(job), await ended(queue.submit([picture()]))

        for images, error in run(kill()):
            assert images == {} and "cannot be started" in error.message
        assert queue.state == "failed"


def test_sizes_that_the_model_cannot_draw_are_one_clear_error():
    loaded = tiny.load()
    wrong = {
        "expected WIDTHxHEIGHT, got '8by8'": ["8by8"],
        r"height and width must be in \[8, 8192\], got 0x8": ["0x8"],
        r"height and width must be in \[8, 8192\], got 99999x8": ["16x8", "99999x8"],
        "expected at most 16: each has its own programs; got 17": ["16x8"] * 17,
    }
    for expected, sizes in wrong.items():
        loaded.config.serve.sizes = tuple(sizes)
        with pytest.raises(ValueError, match=rf"^config\.serve\.sizes: {expected}"):
            loading.facts(loaded)


@pytest.mark.parametrize(
    ("load", "changes", "message"),
    [
        (tiny.load, {"cfg_pp": True, "guidance": 2.0}, "the scale of CFG++ must be in [0, 1], got 2.0"),
        (tiny.load_student, {"guidance": 3.0}, "guidance 2 built in: set sample.guidance to 1, got 3"),
    ],
)
def test_settings_that_no_picture_can_be_drawn_with_are_one_clear_error(load, changes, message):
    loaded = load()
    loaded.config.sample.update(changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        loading.facts(loaded)


def test_a_model_that_cannot_be_loaded_is_one_clear_error(tmp_path):
    (tmp_path / "loaded").touch()
    with pytest.raises(ValueError, match=r"^the weights are gone$"):
        Engine(functools.partial(tiny.load_once, tmp_path / "loaded"), 1).start()

"""The samplers of published flow models do, state by state, what diffusers' schedulers of the same config do."""

import inspect
import itertools
from unittest import mock

import numpy as np
import pytest

from diffusion_jax.interop.noise_schedules import schedule_of, scheduler_config
from diffusion_jax.interop.schedulers import FLOWS, published_plan

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
peer = pytest.importorskip("tests.core.peer")

EULER, HEUN = FLOWS
RAMPS = [{}, *({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta"))]
SHIFTS = [
    {},
    {"shift": 3.0},
    {"shift": 0.5, "shift_terminal": 0.1},
    {"use_dynamic_shifting": True, "shift": 3.0, "mu": 1.7},
    {"use_dynamic_shifting": True, "time_shift_type": "linear", "mu": 2.5, "shift_terminal": 0.02},
]
CONFIGS = [
    *({**shift, **ramp, "_class_name": EULER} for shift, ramp in itertools.product(SHIFTS, RAMPS)),
    *({**shift, "stochastic_sampling": True, "_class_name": EULER} for shift in SHIFTS),
    {"num_train_timesteps": 500, "shift": 2.0, "_class_name": EULER},
    *({**shift, "_class_name": HEUN} for shift in ({}, {"shift": 3.0}, {"shift": 3.0, "num_train_timesteps": 500})),
]


def scheduler_of(config, steps, sigmas=None):
    """diffusers' scheduler, ready to step, as a pipeline prepares it."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    given = {"mu": config.get("mu"), "sigmas": sigmas}
    scheduler.set_timesteps(steps, **{name: value for name, value in given.items() if value is not None})
    scheduler.set_begin_index(0)
    return scheduler


CASES = [
    (number, (2, 4, 9, 28)[(number + given) % 4], given)
    for number, config in enumerate(CONFIGS)
    for given in (False, True)[: 1 + (config["_class_name"] == EULER)]  # Heun's takes no levels
]


@pytest.mark.parametrize(("number", "steps", "given"), CASES)
def test_every_state_is_that_of_the_scheduler(number, steps, given):
    """given: whether the pipeline gives the scheduler the levels that are shifted."""
    config = CONFIGS[number]
    sigmas = np.linspace(1.0, 1 / steps, steps) if given else None
    scheduler, (schedule, prediction) = scheduler_of(config, steps, sigmas), schedule_of(config, "test")
    assert prediction == "flow"
    plan = published_plan({**config, "sigmas": sigmas}, schedule, steps)
    assert plan.initial == pytest.approx(1.0)
    theirs = np.unique(scheduler.sigmas.numpy())[::-1]
    np.testing.assert_allclose(theirs, np.unique([*plan.level.sigma, 0.0])[::-1], atol=2e-6)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), plan.level.t, rtol=2e-6, atol=1e-3)
    np.testing.assert_allclose(schedule(plan.level.t / schedule.unit), plan.level, atol=1e-6)

    scheduler.sigmas = torch.from_numpy(np.array([*plan.level.sigma, 0.0]))  # in float64
    noise = peer.draw_noise(plan.num_rows)

    def velocity(x, level):
        return peer.network(x, level, "eps") - peer.network(x, level, "x0")

    def predict(x, level):
        v = velocity(x, level)
        return x - level.sigma * v, x + level.alpha * v

    ours = peer.our_states(plan, peer.START, predict, noise)
    sample, rows, states = torch.from_numpy(peer.START), iter(noise), []
    with mock.patch(f"{scheduler.__module__}.randn_tensor", lambda *_, **__: torch.from_numpy(next(rows))):
        for i, t in enumerate(scheduler.timesteps):
            out = torch.from_numpy(velocity(sample.numpy(), peer.row_level(plan, i))).as_subclass(peer.Exact)
            sample = scheduler.step(out, t, sample.as_subclass(peer.Exact)).prev_sample.as_subclass(torch.Tensor)
            states.append(sample.numpy())
    assert peer.relative(ours, np.array(states)) < 1e-12


def test_every_field_is_known():
    """Those that only tell a pipeline how to compute mu are no business of the scheduler."""
    of_pipelines = {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}
    for name, scheduler in FLOWS.items():
        theirs = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"} - of_pipelines
        assert theirs == scheduler.reads - {"_class_name", "prediction_type", "beta_schedule", "mu", "sigmas"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"invert_sigmas": True}, "invert_sigmas=True, and only False is supported"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting: the shift depends on the size of the image, set mu"),
        ({"time_shift_type": "even"}, "time_shift_type='even', and only 'exponential' or 'linear' is supported"),
        ({"shift_terminal": 3.0}, "shift_terminal: expected a level between 0 and 1, .*, got 3.0 and 10"),
        ({"sigmas": [1.0, 0.5]}, "sigmas: expected 10 of them, one for each step, got 2"),
    ],
)
def test_what_is_not_supported_is_refused(changes, message):
    config = {"_class_name": EULER, **changes}
    with pytest.raises(ValueError, match=message):
        published_plan(config, schedule_of(config, "test")[0], 10)


def test_one_step_cannot_be_stretched():
    config = {"_class_name": EULER, "shift_terminal": 0.1}
    with pytest.raises(ValueError, match=r"at least 2 steps, got 0\.1 and 1"):
        published_plan(config, schedule_of(config, "test")[0], 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift": "large"}, "shift: expected a number, got 'large'"),
        ({"shift": 0}, "shift: expected a number above 0, got 0"),
        ({"num_train_timesteps": -1000}, "num_train_timesteps: expected a number above 0, got -1000"),
    ],
)
def test_a_field_of_another_type_or_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        schedule_of({"_class_name": EULER, **changes}, "test")


def test_a_config_is_saved_as_it_is():
    config = {"_class_name": EULER, "shift": 3.0, "base_shift": 0.5}
    assert scheduler_config(config, *schedule_of(config, "test")) == config

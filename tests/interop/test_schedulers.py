"""The samplers that published models come with do, state by state, what diffusers' schedulers of the same config do."""

import itertools
from unittest import mock

import numpy as np
import pytest

from diffusion_jax.interop.families.latent_diffusion import SCHEDULER
from diffusion_jax.interop.pipeline import schedule_of
from diffusion_jax.interop.schedulers import SCHEDULERS, published_plan

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
peer = pytest.importorskip("tests.core.peer")

SD = {name: SCHEDULER[name] for name in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")}
V = {"prediction_type": "v_prediction"}
LAST = {"final_sigmas_type": "sigma_min"}
SPACINGS = ({"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}, {})
RAMPS = ({"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
ENDS = ({"set_alpha_to_one": False}, {})
OTHER = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 500}


def combined(*choices):
    return [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*choices)]


CONFIGS = {
    "DDIMScheduler": [*combined([{"clip_sample": False}], SPACINGS, ENDS), V | {"clip_sample": False}],
    "PNDMScheduler": combined([{"skip_prk_steps": True}], SPACINGS[:1], ENDS),
    "DDPMScheduler": combined([{"clip_sample": False}], SPACINGS, [{}, V, {"variance_type": "fixed_small_log"}]),
    "LCMScheduler": [{}, {"original_inference_steps": 100, "timestep_scaling": 5.0}, V],
    "EulerDiscreteScheduler": [*combined(SPACINGS, [{}, LAST, V]), *RAMPS, RAMPS[0] | {"sigma_max": 9.0}],
    "EulerAncestralDiscreteScheduler": combined(SPACINGS, [{}, V]),
    "HeunDiscreteScheduler": [*combined(SPACINGS, [{}, V]), *RAMPS],
    "LMSDiscreteScheduler": [*combined(SPACINGS, [{}, V]), *RAMPS],
    "DPMSolverMultistepScheduler": [
        *combined(SPACINGS, [{}, {"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"}], [{}, LAST]),
        *combined([*RAMPS, {"use_lu_lambdas": True}], [{}, LAST]),
        V | {"lambda_min_clipped": -1.5},
        {"lower_order_final": False},
        {"lower_order_final": False, **LAST},
        {"solver_order": 1},
        {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"},
    ],
    "DPMSolverSinglestepScheduler": combined(
        [{}, LAST, {"lower_order_final": True, **LAST}, {"algorithm_type": "dpmsolver", **LAST}],
        [{}, V, RAMPS[0], {"solver_order": 1}],
    ),
    "UniPCMultistepScheduler": [
        *combined(SPACINGS, [{}, LAST], [{}, {"solver_order": 3}]),
        *combined(RAMPS, [{}, LAST]),
        V,
        {"solver_type": "bh1", **LAST},
    ],
    "DEISMultistepScheduler": [*combined(SPACINGS, [{"solver_order": order} for order in (1, 2, 3)]), V, *RAMPS],
}
STEPS = (1, 2, 3, 4, 7, 14, 15, 20, 50)
CASES = [
    (name, i, STEPS[(i + shift) % len(STEPS)])
    for name, configs in CONFIGS.items()
    for i, shift in itertools.product(range(len(configs)), (0, 3, 5))
    if not (configs[i].get("use_beta_sigmas") and STEPS[(i + shift) % len(STEPS)] == 50)  # diffusers finds no 50 times
]


def test_every_scheduler_is_compared():
    assert CONFIGS.keys() == SCHEDULERS.keys()


@pytest.mark.parametrize(("name", "number", "steps"), CASES)
def test_every_state_is_that_of_the_scheduler(name, number, steps):
    # the third order of DEIS is a small difference of large numbers, in float32
    assert_same({**SD, **CONFIGS[name][number], "_class_name": name}, steps, 2e-3 if "DEIS" in name else 2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_another_schedule(name):
    assert_same({**CONFIGS[name][0], **OTHER, "_class_name": name}, 10)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_noise_alone(name):
    """Zero terminal SNR: the first level holds nothing of the image."""
    assert_same({**SD, **V, "clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
                 "_class_name": name}, 10, tolerance=2e-3)  # fmt: skip


def assert_same(config, steps, tolerance=2e-4):
    """The state after each step. Those of diffusers are float32, and so are its tables."""
    schedule, kind = schedule_of(config, "test")
    plan = published_plan(config, schedule, steps)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    noise = peer.draw_noise(plan.num_rows)
    x = peer.START * plan.initial
    ours = peer.our_states(plan, x, lambda x, level: peer.predict(x, level, kind), noise)

    # float32 logarithms, rounded down to whole times
    rounded_down = hasattr(scheduler, "lambda_t") and config.keys() & {"use_exponential_sigmas", "use_beta_sigmas"}
    exploding = hasattr(scheduler, "is_scale_input_called") or config["_class_name"] == "HeunDiscreteScheduler"
    sample, rows, states = torch.from_numpy(peer.START * float(scheduler.init_noise_sigma)), iter(noise), []
    with mock.patch(f"{scheduler.__module__}.randn_tensor", lambda *_, **__: torch.from_numpy(next(rows)), create=True):
        for i, t in enumerate(scheduler.timesteps):
            level = peer.row_level(plan, i)
            assert float(t) == pytest.approx(level.t, abs=1.01 if rounded_down else 0.01)
            seen = scheduler.scale_model_input(sample, t).numpy().astype(np.float64)
            sample = scheduler.step(torch.from_numpy(peer.network(seen, level, kind)), t, sample).prev_sample
            states.append(sample.numpy() * (plan.next.alpha[i] if exploding else 1))
    assert len(scheduler.timesteps) == plan.num_rows
    assert peer.relative(ours, np.array(states)) < tolerance


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler, which is not supported: choose a solver"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, "skip_prk_steps=False"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps=False"),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample=True"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding=True"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "variance_type='learned_range'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type='dpmsolver'"),
        ({"_class_name": "UniPCMultistepScheduler", "lower_order_final": False}, "lower_order_final=False"),
        ({"timestep_spacing": "even"}, "must be linspace, leading or trailing, got 'even'"),
    ],
)
def test_what_is_not_supported_is_refused(changes, message):
    config = {"clip_sample": False, **SD, "_class_name": "DDIMScheduler", **changes}
    with pytest.raises(ValueError, match=message):
        published_plan(config, schedule_of(config, "test")[0], 10)


def test_steps_and_strength_in_range():
    schedule, _ = schedule_of(SCHEDULER, "test")
    for steps, strength, message in [(0, 1.0, "steps must be in 1..1000"), (1001, 1.0, "steps must"), (5, 1.5, "stre")]:
        with pytest.raises(ValueError, match=message):
            published_plan(SCHEDULER, schedule, steps, strength)
    with pytest.raises(ValueError, match="at most 50"):
        published_plan(SCHEDULER | {"_class_name": "LCMScheduler"}, schedule, 51)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("strength", [0.0, 0.3, 0.75, 1.0])
def test_an_image_starts_at_a_later_step(name, strength):
    config = {**SD, **CONFIGS[name][0], "_class_name": name}
    schedule, _ = schedule_of(config, "test")
    whole, left = (published_plan(config, schedule, 20, part) for part in (1.0, strength))
    count = int(20 * strength)
    assert (left.num_rows == 0) == (count == 0)
    if count:
        times = np.unique(whole.level.t)[::-1]
        assert left.level.t[0] == times[len(times) - count]
        assert left.next.sigma[-1] == whole.next.sigma[-1]

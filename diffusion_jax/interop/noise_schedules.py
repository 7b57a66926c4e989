"""The noise schedule and the prediction that a scheduler_config.json of diffusers states, both ways."""

from collections.abc import Mapping

import numpy as np

from diffusion_jax.core import schedules
from diffusion_jax.core.schedules import Schedule
from diffusion_jax.interop.schedulers import is_flow, with_defaults
from diffusion_jax.messages import first_line
from diffusion_jax.paths import Path

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # names in diffusers and here


def schedule_of(config: Mapping, source: str | Path) -> tuple[Schedule, str]:
    """The noise schedule and the prediction ("eps", "v", "x0" or "flow") of the content of a scheduler_config.json.

    source: the file, for the messages. Raises ValueError for a schedule without betas or of an unknown kind, and for a
      network whose time is not the step of the schedule.
    """
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"{source}: timestep_type={config['timestep_type']!r}: the network reads a time that is not the step of a "
            "schedule, and only 'discrete' is supported"
        )
    try:
        config = with_defaults(config)
        if is_flow(config):
            for field in ("num_train_timesteps", "shift"):
                if not config[field] > 0:
                    raise ValueError(f"{field}: expected a number above 0, got {config[field]!r}")
            return schedules.flow(unit=config["num_train_timesteps"]), "flow"
        kind, steps = config.get("beta_schedule"), config.get("num_train_timesteps", 1000)
        start, end = config.get("beta_start"), config.get("beta_end")
        if config.get("trained_betas") is not None:
            schedule = schedules.from_betas(config["trained_betas"])
        else:
            schedule = {
                "linear": lambda: schedules.from_betas(np.linspace(start, end, steps)),
                "scaled_linear": lambda: schedules.from_betas(np.linspace(start**0.5, end**0.5, steps) ** 2),
                "squaredcos_cap_v2": lambda: schedules.cosine(steps),
            }[kind]()
        if config.get("rescale_betas_zero_snr"):
            schedule = schedules.zero_terminal_snr(schedule)
        return schedule, PREDICTIONS[config.get("prediction_type", "epsilon")]
    except KeyError as error:
        raise ValueError(f"{source}: no noise schedule with betas and a known prediction: {error} is unknown") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: no noise schedule can be made from it: {first_line(error)}") from None


def scheduler_config(config: Mapping, schedule: Schedule, prediction: str) -> dict:
    """The content of a scheduler_config.json: `config`, with a table of betas if its schedule is another one."""
    if is_flow(config):
        return dict(config)
    config = dict(config or {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False})
    config["prediction_type"] = {name: diffusers_name for diffusers_name, name in PREDICTIONS.items()}[prediction]
    schedule_fields = {"beta_schedule", "trained_betas"} & config.keys()
    if schedule_fields and np.array_equal(schedule_of(config, "scheduler")[0].logsnr_table, schedule.logsnr_table):
        return config
    alphas_bar = schedule.alphas_bar
    betas = 1 - alphas_bar / np.concatenate([[1.0], alphas_bar[:-1]])
    return config | {
        "num_train_timesteps": schedule.num_steps,
        "trained_betas": np.minimum(betas, 1 - 1e-12).tolist(),
        "rescale_betas_zero_snr": bool(np.isneginf(schedule.logsnr_table[-1])),
    }

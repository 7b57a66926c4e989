"""What a checkpoint in one file states about its denoiser, beside the weights of its networks.

v_pred, ztsnr                       empty tensors: v prediction, zero terminal SNR
alphas_cumprod, denoiser.sigmas     tables of the noise levels
modelspec.prediction_type           header (Stability AI's model specification): epsilon or v
modelspec.predict_key               header of ComfyUI, the same
modelspec.architecture              header: the 768 version of Stable Diffusion 2 predicts v
modelspec.timestep_range            header: the time steps that it was trained on
modelspec.encoder_layer             header: layer of the text encoder that it was trained on, counted from the end
ss_v_parameterization, ss_zero_terminal_snr, ss_clip_skip      header of kohya's trainer, the same
"""

import re
from collections.abc import Mapping

import numpy as np
from absl import logging

from diffusion_jax.core.schedules import scaled_linear, zero_terminal_snr
from diffusion_jax.interop.family import Config, Tensors

PREDICTIONS = {
    "epsilon": "epsilon", "eps": "epsilon",
    "v": "v_prediction", "v_prediction": "v_prediction", "v_pred": "v_prediction", "vpred": "v_prediction",
    "sample": "sample", "x0": "sample",
}  # fmt: skip
ARCHITECTURES = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
PREDICTION_FIELDS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
BOOLEANS = {"true": True, "1": True, "false": False, "0": False, "none": False, "": False}
UNSTATED = ("", "None", "none", "null")  # values of fields that a trainer left empty
PRECISION = 5e-3  # of alphas_cumprod in half precision
ZERO_TERMINAL_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}  # begins at noise alone


def stated(tensors: Tensors, header: Mapping[str, str], scheduler: Config, layer: int) -> Config:
    """Fields of scheduler_config.json that a file states. Marker tensors count more than the header, where trainers
    write defaults.

    scheduler: of the family.
    layer: the layer of the text encoder that the family uses, counted from the end.
    Raises ValueError naming a field or tensor whose value is not supported.
    """
    header = {field: str(value).strip() for field, value in header.items()}
    _check_range(header, scheduler["num_train_timesteps"])
    _check_layer(header, layer)
    architecture = header.get("modelspec.architecture", "").lower()
    if "edm" in architecture or _flag(header, "ss_flow_model"):
        raise ValueError("its header says that it is an EDM or a flow model, which is not supported in one file")
    predictions = [
        "v_prediction" if "v_pred" in tensors else None,
        "v_prediction" if _flag(header, "ss_v_parameterization") else None,
        *(_prediction(header, field) for field in PREDICTION_FIELDS),
        ARCHITECTURES.get(architecture),
    ]
    prediction = next(({"prediction_type": name} for name in predictions if name), {})
    ends_in_noise = _table_ends_in_noise(tensors) or "ztsnr" in tensors or _flag(header, "ss_zero_terminal_snr")
    return prediction | (ZERO_TERMINAL_SNR if ends_in_noise else {})


def _prediction(header, field):
    value = header.get(field, "")
    if value in UNSTATED:
        return None
    name = value.lower().replace("-", "_")
    if name not in PREDICTIONS:
        raise ValueError(f"{field}={value!r} in its header is not supported: expected epsilon, v or sample")
    return PREDICTIONS[name]


def _flag(header, field):
    value = header.get(field, "")
    if value.lower() not in BOOLEANS:
        raise ValueError(f"{field}={value!r} in its header is not supported: expected True or False")
    return BOOLEANS[value.lower()]


def _check_layer(header, layer):
    """Warn of a text encoder that was used up to another layer. Where the family never uses the last one, trainers
    write a 1 that has no effect."""
    for field in ("modelspec.encoder_layer", "ss_clip_skip"):
        value = header.get(field, "")
        if value not in (*UNSTATED, "1", str(layer)):
            earlier = int(value) - layer if value.isdecimal() else 0
            logging.warning(
                "%s=%s in the header: the model was trained on another layer of its text encoder, counted from the "
                "end, than the %d that is used here, so prompts may be followed less well%s",
                *(field, value, layer, f"; set clip_skip to {earlier} for that layer" if earlier > 0 else ""),
            )


def _check_range(header, steps):
    value = header.get("modelspec.timestep_range", "")
    is_whole = re.fullmatch(rf"[(\[]?[01][,-]({steps - 1}|{steps})[)\]]?", value.replace(" ", ""))
    if value not in UNSTATED and not is_whole:
        raise ValueError(
            f"modelspec.timestep_range={value!r} in its header is not supported: expected 0,{steps}, all time steps"
        )


def _table_ends_in_noise(tensors):
    """Whether the file's table of noise levels has zero terminal SNR. Raises ValueError for another schedule."""
    name = next((name for name in ("alphas_cumprod", "denoiser.sigmas") if name in tensors), None)
    table = np.asarray(tensors.get(name, 0), np.float64)
    if np.ptp(table) == 0:  # none, or a buffer that was never filled
        return False
    table = table if name == "alphas_cumprod" else np.sort(1 / (1 + table**2))[::-1]
    trained = scaled_linear()
    for schedule in (trained, zero_terminal_snr(trained)):
        if table.shape == schedule.alphas_bar.shape and np.abs(table - schedule.alphas_bar).max() < PRECISION:
            return bool(np.isneginf(schedule.logsnr_table[-1]))
    raise ValueError(f"{name} is the table of another noise schedule, which is not supported")

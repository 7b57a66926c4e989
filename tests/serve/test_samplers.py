"""The names that clients of AUTOMATIC1111's web UI send."""

import re

import pytest

from diffusion_jax.build.sampling import SOLVERS
from diffusion_jax.core.solvers import SPACINGS
from diffusion_jax.serve.samplers import sampler, scheduler
from diffusion_jax.serve.webui_bodies import ImageToImage, TextToImage, ignored

SOLVER_NAMES, SPACING_NAMES = tuple(SOLVERS), ("", *SPACINGS)
EXACT = {
    "Euler a": ("euler_ancestral", ""),
    "k_euler_a": ("euler_ancestral", ""),
    "euler_ancestral": ("euler_ancestral", ""),
    "k_euler": ("euler", ""),
    "Euler": ("euler", ""),
    "LMS": ("lms", ""),
    "LMS Karras": ("lms", "karras"),
    "k_lms_ka": ("lms", "karras"),
    "Heun": ("heun", ""),
    "k_heun": ("heun", ""),
    "DPM++ 2M": ("dpmpp_2m", ""),
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "k_dpmpp_2m_ka": ("dpmpp_2m", "karras"),
    "dpm++ 2m karras": ("dpmpp_2m", "karras"),
    "DPM++ SDE": ("dpmpp_sde", ""),
    "DPM++ SDE Karras": ("dpmpp_sde", "karras"),
    "DPM++ 2M SDE": ("dpmpp_2m_sde", ""),
    "DPM++ 2M SDE Karras": ("dpmpp_2m_sde", "karras"),
    "DPM++ 2M SDE Exponential": ("dpmpp_2m_sde", "logsnr"),
    "k_dpmpp_2m_sde_exp": ("dpmpp_2m_sde", "logsnr"),
    "DDIM": ("ddim", ""),
    "PLMS": ("plms", ""),
    "UniPC": ("unipc", ""),
    "uni_pc": ("unipc", ""),
    "LCM": ("consistency", ""),
    "dpmpp_sde_gpu": ("dpmpp_sde", ""),
    "dpmpp_2m_sde_gpu": ("dpmpp_2m_sde", ""),
    "Euler SGMUniform": ("euler", "trailing"),
    "Euler A SGMUniform": ("euler_ancestral", "trailing"),
    "DPM++ 2M SGM Uniform": ("dpmpp_2m", "trailing"),
    "DPM++ 2M Simple": ("dpmpp_2m", "trailing"),
    "DPM++ 2M DDIM": ("dpmpp_2m", "leading"),
    "ddim ddim_uniform": ("ddim", "leading"),
    "Euler Normal": ("euler", "linspace"),
    "Euler a Uniform": ("euler_ancestral", "linspace"),
    "DPM++ 2M SDE Polyexponential": ("dpmpp_2m_sde", "logsnr"),
    "Euler Automatic": ("euler", ""),
}
NEAREST = [
    "DPM2", "DPM2 a", "DPM2 Karras", "DPM2 a Karras", "k_dpm_2", "k_dpm_2_a", "k_dpm_2_ka", "DPM fast", "DPM adaptive",
    "k_dpm_ad", "DPM++ 2S a", "DPM++ 2S a Karras", "k_dpmpp_2s_a_ka", "DPM++ 3M SDE", "DPM++ 3M SDE Karras",
    "DPM++ 3M SDE Exponential", "DPM++ 2M SDE Heun", "DPM++ 2M SDE Heun Karras", "Restart", "DDIM CFG++", "HeunPP2",
    "Euler CFG++", "Euler a CFG++", "euler_cfg_pp", "euler_ancestral_cfg_pp", "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_2m_cfg_pp", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde_gpu", "res_multistep", "res_multistep_ancestral_cfg_pp",
    "gradient_estimation", "er_sde", "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece", "exp_heun_2_x0", "ipndm_v",
    "uni_pc_bh2", "Euler CFG++ Karras", "[Forge] Flux Realistic", "[Forge] Flux Realistic (Slow)",
]  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_a_sampler_has_many_spellings(name):
    assert sampler(name, SOLVER_NAMES, "ddim") == (*EXACT[name], [])


@pytest.mark.parametrize("name", NEAREST)
def test_the_nearest_stands_for_a_sampler_that_is_not_here_and_is_named(name):
    solver, spacing, (note,) = sampler(name, SOLVER_NAMES, "ddim")
    assert solver in SOLVERS and name in note and "nearest" in note
    assert spacing == ("karras" if name.endswith(("Karras", "_ka")) else "logsnr" if "Exp" in name else "")


def test_every_scheduler_may_end_a_sampler_s_name():
    nearest = {"Turbo": "trailing", "Beta": "trailing", "KL Optimal": "logsnr", "Align Your Steps": "karras"}
    nearest |= {"AYS": "karras", "Align Your Steps 32": "karras", "Linear Quadratic": "quadratic"}
    for method, solver in {"DPM++ 2M SDE": "dpmpp_2m_sde", "Euler": "euler", "Euler A": "euler_ancestral"}.items():
        for suffix, spacing in nearest.items():
            name = f"{method} {suffix}"
            ours, steps, (note,) = sampler(name, SOLVER_NAMES, "ddim")
            assert (ours, steps) == (solver, spacing) and note.startswith(f"sampler {name}: drawn with the nearest, ")
    note = "sampler Euler AYS: drawn with the nearest, Euler Karras"
    assert sampler("Euler AYS", SOLVER_NAMES, "ddim") == ("euler", "karras", [note])


def test_a_model_that_lacks_a_sampler_uses_its_own():
    assert sampler("Euler a", ("consistency",), "consistency")[0] == "consistency"
    assert "LCM" in sampler("Euler a", ("consistency",), "consistency")[2][0]
    assert sampler("published", ("published", "ddim"), "published") == ("published", "", [])


@pytest.mark.parametrize(
    "name", ["magic", "", "karras", "Euler b", "x" * 1000, "Euler magic", "DPM++ 2M SDE Karras Karras", "gpu"]
)
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match="unknown sampler"):
        sampler(name, SOLVER_NAMES, "ddim")
    with pytest.raises(ValueError, match="unknown scheduler"):
        scheduler(name + "!a", SPACING_NAMES)


def test_the_error_for_an_unknown_name_has_close_ones():
    for name, close in {"DPM++ 2N": "DPM++ 2M", "Eular a": "Euler a", "[Forge] Flux Realist": "Flux Realistic"}.items():
        with pytest.raises(
            ValueError, match=rf"unknown sampler .* .close: .*{re.escape(close)}.*.; /sdapi/v1/samplers"
        ):
            sampler(name, SOLVER_NAMES, "ddim")
    with pytest.raises(ValueError, match=r"unknown scheduler 'Karas' .close: Karras.*.; /sdapi/v1/schedulers has"):
        scheduler("Karas", SPACING_NAMES)
    with pytest.raises(ValueError, match="unknown sampler 'magic'; /sdapi/v1/samplers has the known ones"):
        sampler("magic", SOLVER_NAMES, "ddim")


def test_every_scheduler_of_the_web_ui_is_known():
    exact = {
        "Automatic": "", "automatic": "", "Uniform": "linspace", "uniform": "linspace", "Karras": "karras",
        "karras": "karras", "Exponential": "logsnr", "Polyexponential": "logsnr", "SGM Uniform": "trailing",
        "sgm_uniform": "trailing", "Simple": "trailing", "Normal": "linspace", "DDIM": "leading", "ddim": "leading",
    }  # fmt: skip
    for name, spacing in exact.items():
        assert scheduler(name, SPACING_NAMES) == (spacing, []), name
    for name in "KL Optimal", "kl_optimal", "Align Your Steps", "align_your_steps", "Beta", "beta", "Turbo", "turbo":
        spacing, (note,) = scheduler(name, SPACING_NAMES)
        assert spacing in SPACINGS and "nearest" in note and name in note


def warned(kind=TextToImage, **values):
    """The fields that a request is warned of."""
    return [warning.partition(" has no effect")[0] for warning in ignored(kind.model_validate(values), "mine")]


def test_what_is_ignored_is_warned_of_and_what_changes_no_picture_is_not():
    defaults = {  # as a common client sends them
        "enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 0, "hr_resize_x": 0,
        "firstphase_width": 0, "styles": [], "subseed": -1, "subseed_strength": 0.0, "seed_resize_from_h": 0,
        "restore_faces": False, "tiling": False, "do_not_save_samples": False, "eta": 1.0, "s_churn": 0, "s_tmax": 0,
        "s_noise": 1, "override_settings": {}, "override_settings_restore_afterwards": True, "script_args": None,
        "script_name": None, "save_images": False, "alwayson_scripts": {}, "denoising_strength": 0.7,
    }  # fmt: skip
    assert warned(**defaults) == []
    of_image = {
        "resize_mode": 0,
        "image_cfg_scale": 1.5,
        "mask_blur": 4,
        "inpaint_full_res": True,
        "inpainting_fill": 0,
    }
    assert warned(ImageToImage, init_images=["x"], **of_image) == []
    scripts = {"controlnet": {"args": [{"module": "canny"}]}}
    assert warned(alwayson_scripts=scripts, enable_hr=True, script_name="X/Y/Z plot") == [
        "enable_hr",
        "script_name",
        "alwayson_scripts.controlnet",
    ]
    assert warned(eta=0, s_noise=0, s_churn=0) == ["eta", "s_noise"]  # 0 is a value, and not no value
    assert warned(override_settings={"eta_ancestral": 0}) == ["override_settings.eta_ancestral"]
    (note,) = ignored(TextToImage(seed=2**32 + 7), "mine")
    assert note == f"seed={2**32 + 7} became 7"
    settings = {"sd_model_checkpoint": "other", "CLIP_stop_at_last_layers": 2}
    assert warned(override_settings=settings) == [
        "override_settings.CLIP_stop_at_last_layers",
        "override_settings.sd_model_checkpoint",
    ]
    assert warned(override_settings={"sd_model_checkpoint": "mine"}) == []
    neutral = {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic", "samples_format": "png"}
    assert warned(override_settings=neutral) == warned(override_settings={"sd_vae": "None"}) == []
    assert warned(override_settings={"sd_vae": "a.safetensors"}) == ["override_settings.sd_vae"]


def test_scripts_that_are_off_are_not_warned_of():
    unit = {"module": "canny", "weight": 1.0}
    off = [[], {}, [None], [{**unit, "enabled": False}], [{"enabled": False}, None], [False, {"x": 1}], [False]]
    for arguments in off:
        assert warned(alwayson_scripts={"ControlNet": {"args": arguments}}) == [], arguments
    assert warned(alwayson_scripts={"a": {}, "b": None}) == []
    for arguments in [unit], [{**unit, "enabled": True}], [{"enabled": False}, unit], [True, {"x": 1}], {"0": unit}:
        assert warned(alwayson_scripts={"a": {"args": arguments}}) == ["alwayson_scripts.a"], arguments


def test_images_and_ways_to_resize_that_are_not_used_are_warned_of():
    def of_image(**values):
        return warned(ImageToImage, **{"init_images": ["x"]} | values)

    assert of_image(init_images=["x", "y", "z"]) == ["init_images.1", "init_images.2"]
    assert of_image(resize_mode=1) == [] and of_image(resize_mode=2) == ["resize_mode=2"]


def test_null_is_as_good_as_no_value():
    nothing = TextToImage.model_validate(dict.fromkeys(TextToImage.model_fields))
    assert nothing == TextToImage()

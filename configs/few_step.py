"""Pictures in one to four network calls: one preset for each method, docs/few_steps.md compares them.

    python main.py --config=configs/few_step.py:shortcut --mode=train
    python main.py --config=configs/few_step.py:shortcut --mode=sample

After the colon is one of these methods, for the emoji of configs/latent_cfg.py:full, from the demo weights; or
digits/METHOD for the digits of configs/digits.py, from a run of that config (--config.teacher=runs/digits).
lora/METHOD and digits/lora/METHOD train low-rank updates of the teacher alone, a small file, by the methods marked *:
  guidance *   one call for each step instead of two; samples with any solver
  scale        the same, and sample.guidance stays free: the scale is an input of the network
  imf_scale    imf likewise, without a teacher: the student learns guidance from itself
  distillation two steps of the teacher become one; repeat with half of --config.objective.segments and the student as
               --config.teacher
  lcm *        consistency distillation with guidance in the teacher
  ect *        easy consistency tuning: from the teacher's weights, on data
  soflow       any step, from data, without derivatives
  shortcut     any step, as two of its halves
  mean_flow    any step, from data, by the derivative along the way
  imf          the same, by the derivative along the student's own way
  scm *        consistency training in continuous time
  lsd          any step, by the derivative in its end
  taught_ect *, taught_scm *, taught_soflow, taught_mean_flow, taught_imf
               the same, and instead of data they follow the teacher's guided path
Those from ect on are for two and more calls; for one, add --config.objective.levels=even to the training.

What a run costs, by --mode=check: what a chip holds without activations, and the training at 40 % of its peak.

    few_step.py:shortcut  v5e:1x1  0.2 GB  under a minute
    few_step.py:lora/lcm  v5e:1x1  0.2 GB  under a minute
"""

from ml_collections import ConfigDict

from configs import common, digits, emoji
from diffusion_jax import build

METHODS = {  # -> objective, solver
    "guidance": ({"name": "guidance_distillation"}, ""),
    "scale": ({"name": "guidance_distillation"}, ""),
    "distillation": ({"name": "distillation", "segments": 16}, "ddim"),
    "lcm": ({"name": "consistency_distillation", "segments": 25}, "consistency"),
    "ect": ({"name": "consistency_training"}, "consistency"),
    "soflow": ({"name": "soflow", "plain": 0.5}, "ddim"),
    "shortcut": ({"name": "shortcut", "plain": 0.5}, "ddim"),
    "mean_flow": ({"name": "mean_flow", "plain": 0.5, "robust": 0.5}, "ddim"),
    "imf": ({"name": "improved_mean_flow", "plain": 0.5, "robust": 0.5}, "ddim"),
    "imf_scale": ({"name": "improved_mean_flow", "plain": 0.5, "robust": 0.5}, "ddim"),
    "scm": ({"name": "continuous_consistency", "robust": 0.5}, "consistency"),
    "lsd": ({"name": "lagrangian", "plain": 0.5}, "ddim"),
}
METHODS |= {
    f"taught_{name}": (objective | {"taught": True}, solver)
    for name, (objective, solver) in METHODS.items()
    if objective["name"] in build.objective.PATH_METHODS and name != "imf_scale"
}
ALL_MAPS = r"to_(q|k|v|out_0)|proj_(in|out)|net_(0/proj|2)|conv[12]|conv_shortcut|time_emb_proj"
FREE_SCALES, MOST = ("scale", "imf_scale"), 8.0  # of guidance in their training
OF_ORDINARY = [
    name
    for name in METHODS
    if METHODS[name][0]["name"] in build.objective.CLEAN_TARGET_METHODS and name not in FREE_SCALES
]
STEPS = 4  # of sampling


def get_config(preset: str = "shortcut") -> ConfigDict:
    """preset: METHOD, lora/METHOD, digits/METHOD or digits/lora/METHOD."""
    *words, method = preset.split("/")
    if words not in ([], ["lora"], ["digits"], ["digits", "lora"]) or method not in METHODS:
        raise ValueError(
            f"unknown preset {preset!r} of few_step; known: {', '.join(METHODS)}, and with digits/, lora/ or "
            "digits/lora/ before them"
        )
    of_digits, of_lora = "digits" in words, "lora" in words
    if of_lora and method not in OF_ORDINARY:
        raise ValueError(f"few_step has low-rank updates for {', '.join(OF_ORDINARY)}; got {method!r}")
    objective, solver = METHODS[method]
    config = digits.get_config() if of_digits else emoji.full()
    scale = config.sample.guidance
    config.name = preset.replace("/", "_")
    config.teacher = "runs/digits" if of_digits else config.weights
    config.weights = ""
    config.model.target_embedding = bool(solver) and not of_lora
    if of_lora:
        config.lora = common.lora()
        config.lora.update(rank=32, alpha=32.0, targets=ALL_MAPS)
    config.objective.update(objective | {"levels": "", "weight": ""})  # those of the method
    if of_digits and method in ("ect", "taught_ect"):
        config.objective.shrinks = 4.0  # so that each gap has a hundred steps
    if method in FREE_SCALES:
        config.model.time_cond_proj_dim = 64
        config.objective.scale = MOST
    elif build.objective.learns_from_teacher(config.objective):
        config.objective.scale = scale
        config.sample.guidance = 1.0
    if build.objective.learns_from_teacher(config.objective):
        config.objective.drop = 0.0
    if solver:
        config.sample.update(solver=solver, steps=STEPS)
    if of_lora:
        config.optimizer = common.optimizer(1e-3, warmup=30, decay="cosine")
    else:
        config.optimizer.learning_rate /= 4  # training goes on from a trained model
    return config

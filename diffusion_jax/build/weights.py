"""The weights of a model: those of a run, or those that come with its config."""

import json

import jax
from absl import logging
from jaxtyping import PyTree
from ml_collections import ConfigDict, FrozenConfigDict

from diffusion_jax import build, parallel, paths
from diffusion_jax import codec as codecs
from diffusion_jax.build import encoders, fields, shipped
from diffusion_jax.build.agreement import has_text_encoders
from diffusion_jax.build.model import conditioning, diffusion_model, has_denoiser
from diffusion_jax.codec import Codec
from diffusion_jax.conditioning import Conditioning
from diffusion_jax.interop import load_autoencoder
from diffusion_jax.interop.denoisers import find_denoiser, load_denoiser, name_of
from diffusion_jax.interop.lora import load_lora, merge
from diffusion_jax.interop.tensors import read_json
from diffusion_jax.model import DiffusionModel, network_of
from diffusion_jax.paths import Path
from diffusion_jax.training import averages

LORA = "lora.safetensors"
SHARED = ("length", "pooled", "join", "null", "dtype")  # fields of a condition beside its encoders
MODEL = ("model", "autoencoder", "condition", "schedule", "objective")  # the sections that weights depend on


def first_stage_folder(workdir: Path) -> Path:
    """The folder of a run's first stage."""
    return workdir / "autoencoder"


def _checkpoints(workdir: Path):
    """The `Checkpoints` of a run, to read."""
    from diffusion_jax.training.checkpoints import Checkpoints  # imported late: Orbax takes half a second

    return Checkpoints(workdir / "checkpoints")


def _latest_step(workdir: Path) -> int | None:
    """The step of a run's newest checkpoint, or None."""
    local = not paths.in_bucket(workdir)
    return None if local and not (workdir / "checkpoints").exists() else _checkpoints(workdir).latest_step()


def trained_codec(config: ConfigDict, workdir: Path, untrained: Codec) -> Codec:
    """The codec of a model.

    If the config has its own autoencoder, the weights are those of config.autoencoder.checkpoint or of the work
    directory.
    """
    if "checkpoint" in config or config.autoencoder.kind != "kl":
        return untrained
    stage = shipped.find(config.autoencoder.checkpoint or first_stage_folder(workdir))
    return codecs.autoencoder_kl(*load_autoencoder(stage), config.sample.tile)


def resolved(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The config of the model that `load` finds. Without a checkpoint it is that of the folder config.weights."""
    if not config.get("weights") or _latest_step(workdir) is not None:
        return config
    file = shipped.find(config.weights) / "config.json"
    if not file.exists():
        return config
    logging.info("no checkpoint in %s: using the model of %s", workdir, config.weights)
    saved_config, new_config = load_config(config.weights), ConfigDict(config)
    for section in MODEL:
        new_config[section] = saved_config[section]
    new_config.data.size = saved_config.data.size
    with new_config.unlocked():
        if "lora" in saved_config:
            new_config.lora, new_config.teacher = saved_config.lora, saved_config.teacher
        elif "lora" in new_config:
            del new_config["lora"]
    return FrozenConfigDict(new_config)


def load_config(folder: str | Path) -> ConfigDict:
    """The config of a folder as `load_model` takes it. Raises FileNotFoundError without config.json."""
    folder = shipped.find(folder)
    config = fields.completed(ConfigDict(read_json(folder / "config.json")))
    if has_text_encoders(config):
        config.condition.encoders = encoders.found_in(config.condition, folder)
    if "checkpoint" not in config:
        config.weights = str(folder) if find_denoiser(folder) or (folder / LORA).exists() else ""
    return config


def load_model(
    folder: str | Path,
    size: tuple[int, int] = (0, 0),
    teacher: DiffusionModel | None = None,
    condition: Conditioning | None = None,
) -> DiffusionModel:
    """The model in a folder, with its weights.

    folder: the work directory of a training, the export that --mode=export wrote, or "weights/emoji", the demo,
      which is found from any current folder.
    size: height and width of the images, pixels. 0 for the size in training.
    teacher: the model of its config.teacher, if that is loaded already.
    condition: of a model with the same text encoders, so that they are not loaded twice: see `shared_condition`.
    Raises FileNotFoundError for a folder without config.json or weights, and ValueError for a config without a denoiser
    and for a size that the model cannot make.
    """
    folder, config = shipped.find(folder), load_config(folder)
    if not has_denoiser(config):
        raise ValueError(f"{folder / 'config.json'} describes no denoiser; load an autoencoder by load_autoencoder")
    return load(config, folder, diffusion_model(config, size, condition=condition), teacher)[0]


def teacher_of(config: ConfigDict, model: DiffusionModel) -> DiffusionModel:
    """The trained model config.teacher, with the condition of the model if both have the same.

    Raises ValueError for one with other text encoders.
    """
    theirs = load_config(config.teacher)
    return load_model(config.teacher, model.size, condition=shared_condition(config, theirs, model))


def shared_condition(config: ConfigDict, teacher: ConfigDict, model: DiffusionModel) -> Conditioning | None:
    """The condition of one of two models, if a student and its teacher have the same.

    Raises ValueError if they have different text encoders.
    """
    if not has_text_encoders(config) or not has_text_encoders(teacher):
        return None
    encoders.check_same(config.condition, teacher.condition, config.teacher)
    is_same = all(config.condition.get(name) == teacher.condition.get(name) for name in SHARED)
    return model.conditioning if is_same else None


def model_of_run(config: ConfigDict, workdir: Path, training: bool = False) -> tuple[ConfigDict, DiffusionModel]:
    """The config of a run with its text encoders `pinned`, and its model as `diffusion_model` makes it.

    Text encoders are loaded only for prompts that the run's cache lacks. If the folder of one does not exist, its hash
    is that in the run's config.json.

    Raises what `diffusion_model` raises, and ValueError if the run has a checkpoint and other encoders.
    """
    if not has_text_encoders(config):
        return config, diffusion_model(config, training=training)
    config = _with_pinned_encoders(config, workdir)
    texts = build.data.cache_folder(config.data, workdir) / "texts"
    return config, diffusion_model(config, training=training, condition=conditioning(config, texts))


def _with_pinned_encoders(config: ConfigDict, workdir: Path) -> ConfigDict:
    of_run = None
    if (workdir / "config.json").exists():
        saved = load_config(workdir)
        of_run = saved.condition if has_text_encoders(saved) else None
    if of_run is not None and _latest_step(workdir) is not None:
        encoders.check_same(config.condition, of_run, str(workdir))
    config = ConfigDict(config)
    config.condition.encoders = encoders.pinned(config.condition, of_run)
    return FrozenConfigDict(config)


def load(
    config: ConfigDict, workdir: Path, model: DiffusionModel, teacher: DiffusionModel | None = None
) -> tuple[DiffusionModel, str]:
    """The model with weights, and where they come from: the newest checkpoint of the work directory, else the weights
    that come with the config.

    teacher: as in `load_model`.
    Raises FileNotFoundError without weights, and ValueError for a checkpoint of another config.
    """
    step = _latest_step(workdir)
    if step is not None:
        params = model.adapter.join(trained(config, workdir, model), updated(config, model, teacher).params)
        params = parallel.local(params, config.train.parallel)
        codec = trained_codec(config, workdir, model.codec)
        return model._replace(params=params, codec=codec), f"{_checkpoints(workdir).folder}, step {step}, averaged"
    if "checkpoint" in config:
        return model._replace(params=parallel.local(model.params, config.train.parallel)), config.checkpoint
    folder = shipped.find(config.weights)
    if config.weights and (folder / LORA).exists():
        base, file = updated(config, model, teacher), folder / LORA
        part = name_of(model.network.apply.module)
        params = merge(base.params, load_lora(file, denoiser=part)[part], 1.0, str(file))
        return model._replace(params=params, codec=base.codec), config.weights
    if config.weights and folder.exists():
        denoiser = find_denoiser(folder) or folder / name_of(model.network.apply.module)
        module, params = load_denoiser(denoiser, config.model.get("scan", False))
        codec = model.codec
        if (folder / "vae").exists():
            codec = codecs.autoencoder_kl(*load_autoencoder(folder / "vae"), config.sample.tile)
        return model._replace(network=network_of(module), params=params, codec=codec), config.weights
    raise FileNotFoundError(
        f"no checkpoint in {paths.absolute(workdir / 'checkpoints')}: run --mode=train first, or give its --workdir"
    )


def updated(config: ConfigDict, model: DiffusionModel, teacher: DiffusionModel | None = None) -> DiffusionModel:
    """The model whose weights config.lora updates."""
    if "lora" not in config or "checkpoint" in config:
        return model
    return teacher or teacher_of(config, model)


def trained(config: ConfigDict, workdir: Path, model: DiffusionModel) -> PyTree:
    """The averaged weights of the newest checkpoint.

    Raises ValueError for LoRAs that it was not trained with.
    """
    if "loras" in config and "lora" not in config:
        trained_loras = json.loads((workdir / "config.json").read_text())["loras"]
        if list(config.loras) != trained_loras:
            raise ValueError(
                f"config.loras: the weights in {workdir} were trained with {', '.join(trained_loras) or 'none'}; "
                "for others run --mode=export and name its folder as --config.checkpoint, with another --workdir"
            )
    if has_text_encoders(config):
        encoders.check_same(config.condition, load_config(workdir).condition, str(workdir))
    like, _ = jax.eval_shape(model.adapter.split, model.params, jax.random.key(0))
    return _checkpoints(workdir).restore_ema(like)


def averaged(
    config: ConfigDict, workdir: Path, model: DiffusionModel, base_params: PyTree, step: int, length: float
) -> PyTree:
    """The weights of a model, averaged over a part of the run before a step: see `training.averages`.

    model: as `build.model.diffusion_model` makes it.
    base_params: the weights that the run updates, of `updated`.
    """
    like, _ = jax.eval_shape(model.adapter.split, model.params, jax.random.key(0))
    average = averages.load(workdir / "averages", step, length, like)
    return parallel.local(model.adapter.join(average, base_params), config.train.parallel)

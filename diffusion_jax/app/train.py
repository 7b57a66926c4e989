"""--mode=train: train the first stage if the work directory has none, then the denoiser."""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Key, PyTree
from ml_collections import ConfigDict

from diffusion_jax import build, hosts, parallel, paths
from diffusion_jax import codec as codecs
from diffusion_jax import conditioning as conditionings
from diffusion_jax.app import first_stage, sample
from diffusion_jax.app.caching import built
from diffusion_jax.app.workdir import locked
from diffusion_jax.build import agreement, encoders, records, weights
from diffusion_jax.build.initial import from_teacher, initial
from diffusion_jax.data.buckets import in_turn, shares
from diffusion_jax.data.cache import Cache, first_version
from diffusion_jax.data.folders import DECODER
from diffusion_jax.data.loader import Tally, stack
from diffusion_jax.data.sources import Source, choose_caption, with_captions
from diffusion_jax.data.transforms import Transform
from diffusion_jax.interop.denoisers import load_denoiser
from diffusion_jax.model import DiffusionModel
from diffusion_jax.paths import Path
from diffusion_jax.training.loop import Task, check_division, check_resumed, fit, sigterm_raises_stopped
from diffusion_jax.training.tracing import Wanted

ENCODE_BATCH = 64  # records in one call of the encoder


def run(config: ConfigDict, workdir: Path, traces: Wanted | None = None) -> None:
    """Train what the config describes. Resumes a stopped run. Raises Stopped after SIGTERM, see `loop.fit`.

    traces: the steps to trace, of each stage.
    """
    with sigterm_raises_stopped(), traces or Wanted() as traces:
        if build.model.has_denoiser(config):
            _train_denoiser(config, workdir, traces)
        else:
            _train_first_stage(config, workdir, traces)


def _train_first_stage(config: ConfigDict, workdir: Path, traces: Wanted) -> None:
    task = first_stage.task(config, workdir)
    with locked(workdir):
        _save_config(config, workdir)
        first_stage.train(task, config, workdir, traces)


def _train_denoiser(config: ConfigDict, workdir: Path, traces: Wanted) -> None:
    # build everything in the config now, so that errors come before hours of training
    check_division(config.train)
    with parallel.on_host():  # no device holds weights before the strategy divides them
        config, model = weights.model_of_run(config, workdir, training=True)
        snapshot_request = sample.request(config, model, config.sample.prompts)
        optimizer = build.objective.optimizer(config.optimizer, config.train.steps)
        source = build.data.source(config, "train", max(model.size))
        records.check_condition(model.conditioning.null, source)
        records.check_records(config.train, source)
        records.tell_cut_captions(model.conditioning, source)
        by_size = build.data.by_size(config, source, model)
        loss, params, frozen = objective(config, as_in_step(model, has_several_captions(source)))
    check_resumed(workdir, params)
    first_stage_folder = weights.first_stage_folder(workdir)
    first_stage_task = first_stage.task(config, first_stage_folder) if first_stage.is_missing(config, workdir) else None
    if first_stage_task is not None and agreement.has_text_encoders(config):
        encoders.check_present(config.condition)  # its latents are not in the cache, so the texts are not either
    with locked(workdir):
        _save_config(config, workdir)
        hosts.check_same(str([(size, len(of_size)) for size, of_size in by_size]), "numbers of records")
        hosts.check_same(str(first_stage_task is None), "a first stage")
        if first_stage_task is not None:
            first_stage.train(first_stage_task, config, first_stage_folder, traces)
        model = model._replace(codec=weights.trained_codec(config, workdir, model.codec))

        def snapshot(trained: PyTree) -> np.ndarray:
            params = parallel.local(model.adapter.join(trained, frozen["rest"]), config.train.parallel)
            current = model._replace(params=params)
            return sample.sheet(config, list(sample.generate(snapshot_request, current, config.sample.batch_size)))

        parts = [_training_records(config, workdir, of_size, model._replace(size=size)) for size, of_size in by_size]
        counts, tally = [len(records) for records, _ in parts], Tally()
        weights_of_sizes = shares([of_size for _, of_size in by_size], counts)
        hosts.check_same(str(counts), "numbers of readable records")
        logging.info("denoiser: %.2fM parameters, %d training records", first_stage.millions(params), sum(counts))
        task = Task(
            name="denoiser",
            loss=loss,
            params=params,
            frozen=frozen | {"codec": model.codec.stats},
            batches=in_turn(
                [build.data.batches(of, config.train, config.seed, to, tally) for of, to in parts], weights_of_sizes
            ),
            optimizer=optimizer,
            snapshot=snapshot,
            learning_rate=build.objective.learning_rate(config.optimizer, config.train.steps),
            records=tally,
        )
        fit(task, workdir, config.train, config.seed, traces)


def objective(config: ConfigDict, model: DiffusionModel) -> tuple[Callable, PyTree, dict]:
    """(loss, initial weights, frozen inputs of the loss)."""
    teacher = _teacher(config, model)
    load = functools.partial(load_denoiser, scan=config.get("model", {}).get("scan", False))

    def start(key: Key[Array, ""]) -> PyTree:
        random_params = model.network.init(key)
        return (
            from_teacher(teacher, random_params)
            if config.get("teacher")
            else initial(config.get("init", ""), load, random_params)
        )

    key = jax.random.key(config.seed)
    return build.objective.objective(config.objective, model, key, config.train.steps, teacher, start)


def _teacher(config: ConfigDict, model: DiffusionModel) -> DiffusionModel | None:
    """The model in config.teacher. A published checkpoint is its own teacher."""
    if "checkpoint" in config:
        return model if build.objective.learns_from_teacher(config.objective) else None
    return weights.teacher_of(config, model) if config.teacher else None


def has_several_captions(source: Source) -> bool:
    """Whether a record has a choice of captions."""
    return bool(source.captions) and isinstance(source.captions[0], tuple)


def as_in_step(model: DiffusionModel, several_captions: bool) -> DiffusionModel:
    """The model in the training step, which needs no weights of text encoders for captions from the cache.

    several_captions: whether a record has several, which are not in the cache.
    """
    if several_captions:
        return model
    return model._replace(conditioning=model.conditioning._replace(params=lambda: None))


def _save_config(config: ConfigDict, workdir: Path) -> None:
    text = config.to_json_best_effort(indent=2) + "\n"
    hosts.check_same(text, "a config")
    if parallel.is_main():
        paths.write(workdir / "config.json", text)


def _training_records(
    config: ConfigDict, workdir: Path, source: Source, model: DiffusionModel
) -> tuple[Source, Transform | None]:
    """The records to train on, and the transform from each of them to {"latent", "cond"}, None if they have this form.

    The outputs of frozen networks are computed once for each augmented version of a record, if that pays. For a record
    with several captions, one of them is drawn each time.
    """
    if model.is_cached:
        return _cached_records(config, workdir, source, model), None
    conditioning, crop = model.conditioning, build.data.transform(config, model.size)

    def to_training(record: dict, rng: np.random.Generator) -> dict:
        cropped = crop(record, rng)
        records_of_one = stack([record | {"caption": choose_caption(record.get("caption"), rng)}])
        cond = jax.tree.map(lambda leaf: leaf[0], conditioning.of_records(records_of_one))
        return {"latent": cropped["image"], "cond": conditioning.with_sizes(cond, cropped)}

    return with_captions(source) if has_several_captions(source) else source, to_training


def _cached_records(config: ConfigDict, workdir: Path, source: Source, model: DiffusionModel) -> Source:
    """Records {"latent", "cond"} from the cache, which is built first."""
    codec, conditioning = model.codec, model.conditioning
    batch_size = parallel.divisible(ENCODE_BATCH)
    encode = jax.jit(lambda params, images: codecs.stored(codec.encode(params, images)))

    @functools.cache  # on the devices only if something is missing in the cache
    def encoder() -> PyTree:
        return parallel.whole(codec.params, batch_size)

    def of_variants(batch: dict) -> np.ndarray:
        images = batch["image"]
        encoded = encode(encoder(), parallel.spread(images.reshape(-1, *images.shape[2:]), len(images)))
        return np.asarray(encoded).reshape(*images.shape[:2], *encoded.shape[1:])

    @functools.cache
    def embedder() -> PyTree:
        return parallel.whole(conditioning.params(), batch_size)

    def of_captions(batch: dict) -> PyTree:
        inputs = parallel.spread(conditioning.of_records(batch), batch_size)
        cond = conditionings.stored(conditioning.embed(embedder(), inputs))
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:, None], cond)  # one version of each

    def of_drawn_captions(indices: np.ndarray, draws: np.ndarray) -> PyTree:
        rngs = map(np.random.default_rng, (draws * 2**53).astype(np.uint64))  # all bits of a draw
        captions = [records.captions[index] for index in indices.tolist()]
        return conditioning.of_records({"caption": [*map(choose_caption, captions, rngs)]})

    def read_batch(indices: np.ndarray, draws: np.ndarray) -> dict:
        rows = records.read_batch(indices, draws)
        cond = of_drawn_captions(indices, draws) if several else rows.get("cond", {})
        return {"latent": rows["latent"], "cond": conditioning.with_sizes(cond, rows)}

    several = has_several_captions(source)
    fields = {"latent": of_variants} | ({} if several else {"cond": of_captions})
    fields |= {"sizes": lambda batch: batch["sizes"]} if conditioning.sizes else {}
    told = ("buckets", "cache", "cache_gb")  # by the records and their size, or nothing
    data = {name: value for name, value in config.data.to_dict().items() if name not in told}
    frozen = {"codec": codec.cache_key, "conditioning": conditioning.cache_key}
    keys = {name: identify() if identify else "" for name, identify in frozen.items()}
    key = {"data": data, "size": model.size, "decoder": DECODER, **keys}
    folder = build.data.cache_folder(config.data, workdir)
    records = built(Cache(source, folder, key, fields, batch_size, build.data.variants(config, model.size)))
    return replace(records, read=first_version(read_batch), read_batch=read_batch)

"""Convert published pipelines to models of this library, by the cards of their families."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree
from tokenizers import Tokenizer

from diffusion_jax import parallel
from diffusion_jax.codec import autoencoder_kl, check_size, fingerprint
from diffusion_jax.conditioning import Conditioning, class_labels, unconditional
from diffusion_jax.core import sampling, solvers
from diffusion_jax.core.guidance import Guidance, guided
from diffusion_jax.core.parameterization import NAMED
from diffusion_jax.core.solvers import Plan
from diffusion_jax.interop.pipeline import PublishedPipeline
from diffusion_jax.interop.prompts import learned_words
from diffusion_jax.interop.schedulers import is_flow, published_plan
from diffusion_jax.model import DiffusionModel, network_of, none_held_back
from diffusion_jax.pipelines.generate import noise, with_guidance_scale
from diffusion_jax.stored import give_back, loaded

PROMPT_BATCH = 16  # prompts that the text encoders read at once


def from_published(
    published: PublishedPipeline,
    size: tuple[int, int] = (0, 0),
    dtype: DTypeLike = jnp.float32,
    tile: int = 0,
    strategy: str = "pmap",
) -> DiffusionModel:
    """Make a model of a published pipeline.

    published: from `interop.load_pipeline`.
    size: height and width of the images in pixels, the model's own by default. 0 means the model's own side.
    dtype: compute type of the networks.
    tile: see `codec.autoencoder_kl`.
    strategy: whether this host's devices divide the text encoders, see `parallel.local`.
    Raises ValueError for a size that the autoencoder cannot generate, for a model without tokenizers, and for one that
    needs more than a prompt.

    Conditions are {"text": (B, L, D)} and the leaves that `family.prompt` adds. Prompts may have weights and
    several chunks (`interop.prompts`). Captions of records are cut to one chunk. "No condition" is the empty prompt, or
    zeros in families that use zeros. In families of classes, conditions are {"label": (B,)}, and prompts are their
    numbers or names.
    """
    _check(published)
    model = _without_condition(published, size, dtype, tile)
    texts = [part.params for part in published.text_encoders]
    on_device = functools.cache(lambda: loaded(parallel.local(texts, strategy), parallel.copier()))
    return model._replace(conditioning=_conditioning(published, on_device, model.size, dtype))


def from_shapes(
    published: PublishedPipeline, size: tuple[int, int] = (0, 0), dtype: DTypeLike = jnp.float32, tile: int = 0
) -> DiffusionModel:
    """The model of a pipeline with shapes instead of weights. It can be counted and compiled, but not run.

    Arguments as in `from_published`.
    """
    parts = {name: part._replace(params=_as_shapes(part.params)) for name, part in published.parts.items()}
    published = published._replace(parts=parts)
    model = _without_condition(published, size, dtype, tile)
    if _classes(published):
        return model._replace(conditioning=_conditioning(published, tuple, model.size, dtype))
    prompt, encoders = published.family.prompt, published.text_encoders
    lengths = [prompt.length or part.module.max_position_embeddings for part in encoders]
    ids = [jax.ShapeDtypeStruct((1, 1, length), np.int32) for length in lengths]
    weights = [jax.ShapeDtypeStruct(leaf.shape, np.float32) for leaf in ids]
    texts = [part.params for part in encoders]
    shapes = jax.eval_shape(_embedder(published, model.size, dtype), texts, ids, weights)
    null = jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), shapes)
    condition = Conditioning(lambda: "", lambda records: {}, lambda prompts: {}, null, weights=texts)
    return model._replace(conditioning=condition._replace(sizes=prompt.sizes))


def _as_shapes(variables: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)


def _without_condition(
    published: PublishedPipeline, size: tuple[int, int], dtype: DTypeLike, tile: int
) -> DiffusionModel:
    denoiser, params = published.denoiser.module.clone(dtype=dtype), published.denoiser.params
    autoencoder = published.autoencoder
    codec = autoencoder_kl(autoencoder.module.clone(dtype=dtype), autoencoder.params, tile)
    if not all(size):
        size = tuple(side or own for side, own in zip(size, _own_size(denoiser.sample_size, codec.factor), strict=True))
    network = network_of(denoiser, lambda key: params)
    check_size(size, codec.factor * network.cell)
    return DiffusionModel(
        network=network,
        params=params,
        schedule=published.schedule,
        parameterization=NAMED[published.prediction],
        codec=codec,
        conditioning=unconditional(),
        size=size,
        published_solvers={"published": sampler(published)},
        published_times={"published": functools.partial(published_times, published)},
        has_guidance=published.family.has_guidance(published.index, published.scheduler),
        references=published.family.references,
        held_back=published.safety_checker.flagged if published.safety_checker else none_held_back,
    )


def _own_size(sample_size: Any, factor: int) -> list[int]:
    """Height and width of a model's own images, pixels.

    sample_size: those of its latents, or one number for both.
    Raises ValueError if the model does not say it.
    """
    sides = np.asarray(sample_size)
    if sides.dtype.kind != "i" or sides.size not in (1, 2) or np.any(sides < 1):
        raise ValueError(
            f"the denoiser has sample_size={sample_size!r}, not the size of its images: set height and width"
        )
    return np.broadcast_to(factor * sides, 2).tolist()


def sampler(published: PublishedPipeline) -> Callable[..., Plan]:
    """(steps, strength=1, size=(0, 0)) -> the plan of the model's own scheduler for images of a size, with the
    corrections that diffusers makes to the scheduler of such a pipeline when it loads one.
    """

    def plan(steps: int, strength: float = 1.0, size: tuple[int, int] = (0, 0)) -> Plan:
        levels = published.family.levels(_cells(published, size), steps) if is_flow(published.scheduler) else {}
        config = {**published.scheduler, **published.family.scheduler_changes, **levels}
        return published_plan(config, published.schedule, steps, strength)

    return plan


def _cells(published: PublishedPipeline, size: tuple[int, int]) -> int:
    """Cells of an image that the denoiser sees. size: as in `from_published`."""
    denoiser, factor = published.denoiser.module, published.autoencoder.module.factor
    sides = size if all(size) else _own_size(denoiser.sample_size, factor)
    return math.prod(side // (factor * denoiser.cell) for side in sides)


def published_times(published: PublishedPipeline, steps: int, size: tuple[int, int] = (0, 0)) -> np.ndarray:
    """The times that the model's scheduler_config.json sets for a solver of `steps` steps: (steps,), falling.

    size: of the images, as in `from_published`; flow models may be shifted by it.
    Raises ValueError for steps outside 1..T, and for steps at which steps_offset leaves the schedule.
    """
    if is_flow(published.scheduler):
        return np.unique(sampler(published)(steps, size=size).level.sigma)[::-1]
    spacing = published.scheduler.get("timestep_spacing", "leading")
    times = solvers.times(published.schedule, steps, spacing)
    offset = published.scheduler.get("steps_offset", 0) if spacing == "leading" else 0
    return np.minimum(times + offset, published.schedule.t_max)


def _check(published: PublishedPipeline) -> None:
    family, classes = published.family, _classes(published)
    if family.prompt is None and not classes:
        raise ValueError(f"{family.name} needs more than a prompt: it can be loaded and saved, not sampled from")
    if missing := [name for name in family.tokenizers if name not in published.parts]:
        raise ValueError(f"{family.name} reads prompts by its {', '.join(missing)}, and it was loaded without")
    if len(published.tokenizers) != len(published.text_encoders):
        raise ValueError(
            f"expected a tokenizer for each of {len(published.text_encoders)} text encoders, got "
            f"{len(published.tokenizers)}; name a folder that has them as `tokenizers`"
        )
    mismatch = family.fits(published.denoiser.module, published.autoencoder.module)
    if mismatch:
        raise ValueError(mismatch)


def _classes(published: PublishedPipeline) -> int:
    """The number of classes that prompts name; 0 for a model of texts."""
    return published.family.classes(published.denoiser.module)


def generator(
    published: PublishedPipeline, size: tuple[int, int] = (0, 0), dtype: DTypeLike = jnp.float32
) -> tuple[Callable[..., Array], PyTree]:
    """Token ids to pixels as one compiled function: (run, weights), for compiling ahead and for throughput.

    run(weights, ids, token_weights, keys, rows, scale) -> images (B, height, width, 3) in about [-1, 1].
    ids: for each text encoder (2B, chunks, L), the prompts, then as many negative prompts, from `family.prompt.tokens`.
    token_weights: for each text encoder (2B, chunks, L), likewise.
    keys: (B,).
    rows: `sampling.rows(plan, at_least)`. Plans of up to at_least rows, other scales and prompts use the same program.
    scale: of guidance, () or (B,).
    size, dtype, errors: as in `from_published`. Raises ValueError also for a model of classes, which has no tokens.
    """
    if _classes(published):
        raise ValueError(f"{published.family.name} has classes and no tokens: call text_to_image on from_published")
    model = from_published(published, size, dtype)
    embed = _embedder(published, model.size, dtype)
    weights = {
        "texts": [part.params for part in published.text_encoders],
        "denoiser": model.params,
        "codec": model.codec.params,
    }

    def run(weights: PyTree, ids: list, token_weights: list, keys: Array, rows: sampling.Rows, scale: Array) -> Array:
        all_conds = embed(weights["texts"], ids, token_weights)
        cond, negative = (
            {name: leaf[half] for name, leaf in all_conds.items()} for half in (np.s_[: len(keys)], np.s_[len(keys) :])
        )
        cond, guidance = with_guidance_scale(model, cond, Guidance(scale, negative))
        denoise = guided(model.denoiser(weights["denoiser"]), guidance, model.conditioning.null)
        x = noise(model, keys, rows.plan.initial)
        return model.codec.decode(weights["codec"], sampling.run_rows(denoise, rows, x, keys, cond))

    return jax.jit(run), weights


def _embedder(published: PublishedPipeline, size: tuple[int, int], dtype: DTypeLike) -> Callable[..., PyTree]:
    """A pure function (variables, ids, weights) -> cond. Arguments are lists with an entry for each text encoder.

    ids, weights: (B, chunks, L).
    """
    prompt = published.family.prompt
    encoders = [part.module.clone(dtype=dtype) for part in published.text_encoders]

    def embed(params: Sequence[PyTree], ids: Sequence, weights: Sequence) -> PyTree:
        embedded = [
            prompt.embed(encoder, variables, jnp.reshape(rows, (-1, rows.shape[-1])), of_tokens)
            for encoder, variables, rows, of_tokens in zip(encoders, params, ids, weights, strict=True)
        ]
        (outputs, texts), chunks = zip(*embedded, strict=True), ids[0].shape[1]
        first = jax.tree.map(lambda leaf: leaf[::chunks], outputs)
        return {"text": jnp.concatenate(texts, axis=-1), **prompt.added(first, size)}

    return embed


def _conditioning(
    published: PublishedPipeline, on_device: Callable[[], PyTree], size: tuple[int, int], dtype: DTypeLike
) -> Conditioning:
    """on_device: () -> the variables of the text encoders where they are used, kept by `functools.cache`."""
    if classes := _classes(published):
        return class_labels(classes, _names(published.index.get("id2label") or {}))
    prompt, embed = published.family.prompt, jax.jit(_embedder(published, size, dtype))
    params = [part.params for part in published.text_encoders]

    def embed_in_batches(tokens: Sequence[tuple[np.ndarray, np.ndarray]]) -> PyTree:
        count = len(tokens[0][0])
        batches = [np.s_[start : start + PROMPT_BATCH] for start in range(0, count, PROMPT_BATCH)]
        conds = [
            embed(on_device(), *zip(*((ids[i], weights[i]) for ids, weights in tokens), strict=True)) for i in batches
        ]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *conds)

    def of_prompts(prompts: Sequence[str]) -> PyTree:
        return embed_in_batches(prompt.tokens(prompts, published.tokenizers))

    def of_captions(captions: Sequence[str]) -> PyTree:
        return embed_in_batches(prompt.captions(captions, published.tokenizers))

    def release() -> None:
        on_device.cache_clear()
        give_back()

    null = jax.tree.map(lambda leaf: leaf[0], of_captions([""]))
    if prompt.null_is_zeros(published.index):
        null |= {name: np.zeros_like(null[name]) for name in ("text", "text_embeds") if name in null}
    return Conditioning(
        cache_key=lambda: fingerprint({"params": params, "tokenizers": [*map(_as_bytes, published.tokenizers)]}),
        of_records=lambda records: of_captions(list(records["caption"])),
        of_prompts=of_prompts,
        null=null,
        words=_words(published),
        for_size=lambda current, size: _conditioning(published, on_device, size, dtype) if prompt.sizes else current,
        tokenizers=lambda: dict(zip(published.family.tokenizers, published.tokenizers, strict=False)),
        weights=params,
        release=release,
        sizes=prompt.sizes,
    )


def _words(published: PublishedPipeline) -> dict[str, int]:
    """Learned words, and how many tokens each has. Other families have added tokens, such as <think>, without any."""
    tokenizers = published.tokenizers if published.family.embeddings else ()
    return {word: count for tokenizer in tokenizers for word, count in learned_words(tokenizer).items()}


def _names(id2label: Mapping[str, str]) -> dict[str, int]:
    """Name -> class. id2label: number of each class -> its names, separated by commas."""
    return {name.strip(): int(number) for number, names in id2label.items() for name in names.split(",")}


def _as_bytes(tokenizer: Tokenizer) -> np.ndarray:
    return np.frombuffer(tokenizer.to_str().encode(), np.uint8)

"""The kinds of networks in published pipelines: U-Net, transformer, KL autoencoder and text encoder."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.interop import encoders, folders
from diffusion_jax.interop.family import Component
from diffusion_jax.interop.names import modern
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.text.clip import ClipTextEncoder
from diffusion_jax.models.transformer import Transformer
from diffusion_jax.models.unet import UNet

TOKENS = 16  # of a text in the random inputs


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _side(module: UNet) -> int:
    return 4 * 2 ** (len(module.block_out_channels) - 1)


def _unet_inputs(unet: UNet) -> dict[str, Array]:
    rng, side = np.random.default_rng(0), _side(unet)
    inputs = {"x": _normal(rng, 1, side, side, unet.in_channels - unet.known_channels), "t": jnp.array([500.0])}
    inputs["text"] = _normal(rng, 1, TOKENS, unet.cross_attention_dim)
    if unet.known_channels:
        inputs["known"] = _normal(rng, 1, side, side, unet.known_channels)
    if unet.class_embed_type:
        inputs["text_embeds"] = _normal(rng, 1, unet.projection_class_embeddings_input_dim)
    if unet.addition_embed_type:
        numbers = min(6, unet.projection_class_embeddings_input_dim // unet.addition_time_embed_dim)
        width = unet.projection_class_embeddings_input_dim - numbers * unet.addition_time_embed_dim
        inputs |= {"text_embeds": _normal(rng, 1, width), "time_ids": 100 * jnp.arange(1.0, numbers + 1)[None]}
    if unet.num_class_embeds:
        inputs["label"] = jnp.array([0])
    return inputs


def _run_unet(model, inputs) -> None:
    import torch

    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    x = torch.cat([inputs[name] for name in ("x", "known") if name in inputs], dim=1)
    model(x, inputs["t"], inputs["text"], class_labels=inputs.get("label"), added_cond_kwargs=added or None)


def _transformer_inputs(transformer: Transformer) -> dict[str, Array]:
    sides = np.broadcast_to(transformer.sample_size, 2).tolist()
    x = _normal(np.random.default_rng(0), 1, *sides, transformer.in_channels)
    return {"x": x, "t": jnp.array([500.0]), "label": jnp.array([0])}


def _text_inputs(encoder: ClipTextEncoder) -> dict[str, Array]:
    end, length = encoder.vocab_size - 1, min(encoder.max_position_embeddings, TOKENS)
    ids = np.random.default_rng(0).integers(end, size=(1, length))
    return {"ids": jnp.asarray(ids).at[0, -1].set(end)}


def _autoencoder_inputs(autoencoder: AutoencoderKL) -> dict[str, Array]:
    side = 4 * autoencoder.factor
    return {"x": _normal(np.random.default_rng(0), 1, side, side, autoencoder.in_channels)}


UNET = Component(
    library="diffusers",
    class_name=lambda module: folders.unet_class(module),
    weights=folders.WEIGHTS,
    build=folders.unet_of,
    tensors=lambda tensors, module: modern(tensors),
    save=folders.save_unet,
    depth=1,
    inputs=_unet_inputs,
    run=_run_unet,
)
TRANSFORMER = Component(
    library="diffusers",
    class_name=folders.transformer_class,
    weights=folders.WEIGHTS,
    build=folders.transformer_of,
    tensors=lambda tensors, module: folders.transformer_tensors(tensors),
    save=folders.save_transformer,
    depth=1,
    inputs=_transformer_inputs,
    run=lambda model, inputs: model(inputs["x"], timestep=inputs["t"], class_labels=inputs["label"]),
)
AUTOENCODER = Component(
    library="diffusers",
    class_name=folders.autoencoder_class,
    weights=folders.WEIGHTS,
    build=folders.autoencoder_of,
    tensors=lambda tensors, module: folders.autoencoder_tensors(tensors),
    save=folders.save_autoencoder,
    depth=2,
    inputs=_autoencoder_inputs,
    run=lambda model, inputs: model(inputs["x"]),
)
TEXT_ENCODER = Component(
    library="transformers",
    class_name=encoders.class_name,
    weights=encoders.WEIGHTS,
    build=encoders.text_encoder_of,
    tensors=encoders.canonical,
    save=encoders.save_text_encoder,
    depth=3,
    inputs=_text_inputs,
    run=lambda model, inputs: model(inputs["ids"].long()),
    qualified=encoders.qualified,
)

"""How well a first stage reconstructs held-out images."""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from diffusion_jax import parallel
from diffusion_jax.data.transforms import Record, to_float, to_uint8
from diffusion_jax.evaluation.batches import mapped
from diffusion_jax.evaluation.summary import summary
from diffusion_jax.model import DiffusionModel
from diffusion_jax.models.vision.lpips import lpips

Images = Float[Array, "batch height width 3"]
Picture = UInt8[np.ndarray, "height width 3"]


def evaluate_reconstruction(
    reconstruct: Callable[[Images], Images], batches: Iterable[Record], distances: dict | None = None
) -> dict:
    """Report how near reconstructions, clipped to pixel range, are to their images.

    "psnr" is in dB, averaged over images. "lpips" is the LPIPS distance. "styles" has both for each style, if the
    records name theirs.

    reconstruct: images in [-1, 1] -> the same through the first stage.
    batches: records with "image" (B, H, W, 3) uint8, perhaps with "style" (B,).
    distances: weights of LPIPS, see `models.vision.lpips.lpips`. None leaves it out.
    """

    @jax.jit
    def measure(images: UInt8[Array, "batch height width 3"]) -> dict[str, Float[Array, "batch"]]:
        images = to_float(images)
        reconstructed = jnp.clip(reconstruct(images), -1, 1)
        psnr = 10 * jnp.log10(4 / jnp.mean(jnp.square(reconstructed - images), axis=(1, 2, 3)))
        return {"psnr": psnr} | ({"lpips": lpips(distances, images, reconstructed)} if distances else {})

    results, styles = [], []
    for batch in batches:
        results.append(jax.device_get(measure(batch["image"])))
        styles += [*batch.get("style", [])]
    figures = jax.tree.map(lambda *values: np.concatenate(values), *results)
    style_names = np.array(styles)
    by_style = {str(style): _summaries(figures, style_names == style) for style in np.unique(style_names)}
    return _summaries(figures, np.s_[:]) | ({"styles": by_style} if styles else {})


def _summaries(figures: dict[str, np.ndarray], selection: slice | np.ndarray) -> dict:
    values = {name: values[selection] for name, values in figures.items()}
    return {"images": len(values["psnr"])} | {name: summary(measured) for name, measured in values.items()}


def first_stage(model: DiffusionModel) -> Callable[[Sequence[Picture]], list[Picture]]:
    """A function that encodes and decodes pictures by the first stage of a model."""
    codec, weights = model.codec, parallel.whole(model.codec.params, batch=1)

    @jax.jit
    def decode_records(params: PyTree, stats: PyTree, records: PyTree) -> UInt8[Array, "batch height width 3"]:
        return to_uint8(codec.decode(params, codec.sample(stats, records, None)))

    def reconstruct(images: UInt8[Array, "batch height width 3"]) -> UInt8[Array, "batch height width 3"]:
        return decode_records(weights, codec.stats, codec.encode(weights, images))

    return lambda pictures: list(mapped(reconstruct, pictures))

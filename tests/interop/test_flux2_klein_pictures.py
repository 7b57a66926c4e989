"""FLUX.2 klein with references, whose results equal those of diffusers' pipeline, and with images to start from."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import digits, published
from diffusion_jax import build
from diffusion_jax.app import sample
from diffusion_jax.core.sampling import KNOWN
from diffusion_jax.data.transforms import to_uint8
from diffusion_jax.interop import load_pipeline
from diffusion_jax.interop.families import flux2_klein
from diffusion_jax.pipelines import from_noise, image_to_image, inpaint, text_to_image, with_references
from diffusion_jax.pipelines.generate import noise as noise_of
from diffusion_jax.pipelines.published import from_published
from tests.interop.flow_pipelines import SIZE, theirs_drawn
from tests.interop.test_flux2_autoencoder import cells_of, image_of, theirs  # noqa: F401  (a fixture)
from tests.interop.test_flux2_klein import PROMPTS, klein  # noqa: F401  (a fixture)
from tests.interop.test_folders import peer  # noqa: F401  (a fixture)
from tests.interop.test_tokenizers import byte_pairs  # noqa: F401  (a fixture)

REFERENCES = [(66, 91), (130, 64)]  # sides of pictures that are cropped to multiples of 4, the second much taller


def pictures_of(sizes):
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.fixture(scope="module")
def model(klein):  # noqa: F811
    return from_published(load_pipeline(klein[1]), SIZE)


# -- reference pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_distilled", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_pictures_from_references_equal_those_of_diffusers(count, is_distilled, klein, model, peer):  # noqa: F811
    pictures, noise = pictures_of(REFERENCES[:count]), np.random.default_rng(0).normal(size=(2, *model.shape))
    noise = noise.astype(np.float32)
    klein[0].register_to_config(is_distilled=is_distilled)
    expected = theirs_drawn(klein[0], PROMPTS, peer.tensor(noise), 3, image=[*map(Image.fromarray, pictures)])
    prompts, keys = model.conditioning.of_prompts(PROMPTS), jax.random.split(jax.random.key(0), 2)
    plan = model.published_solvers["published"](3, size=model.size)

    def drawn(cond):
        made = from_noise(model, jnp.asarray(noise), cond, keys, plan, 1.0 if is_distilled else 4.0)
        return np.clip(made / 2 + 0.5, 0, 1)

    differences = np.abs(drawn(with_references(model, prompts, [each[None] for each in pictures])) - expected)
    assert np.quantile(differences, 0.999) < 1 / 255 and differences.max() < 1e-3
    assert np.abs(drawn(prompts) - expected).mean() > 0.01, "the references change the pictures"


@pytest.mark.slow
def test_an_edit_has_the_size_of_its_first_picture(klein, tmp_path):  # noqa: F811
    files = []
    for i, picture in enumerate(pictures_of(REFERENCES)):
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(picture).save(files[-1])
    config = published.get_config()
    config.checkpoint = str(klein[1])
    config.sample.update(prompts=PROMPTS[:1], references=tuple(files), num_images=2, batch_size=2, steps=2)
    config.sample.update(solver="published", guidance=1.0, seed=4)
    sample.run(config, tmp_path)
    model = from_published(load_pipeline(klein[1]), (64, 88))
    pictures = [each[None] for each in pictures_of(REFERENCES)]
    cond = with_references(model, model.conditioning.of_prompts(PROMPTS[:1] * 2), pictures)
    plan, keys = model.published_solvers["published"](2, size=model.size), jax.vmap(jax.random.key)(np.arange(4, 6))
    expected = to_uint8(np.asarray(text_to_image(model, cond, keys, plan)))
    for i in range(2):
        drawn = np.asarray(Image.open(tmp_path / "samples" / f"000{i}.png")).astype(int)
        assert drawn.shape == (64, 88, 3) and np.abs(drawn - expected[i]).max() <= 1


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ([(64, 64)] * 5, "reads at most 4 reference pictures, got 5: leave out those that it cannot read"),
        ([(63, 80)], "at least 64x64 pixels, with sides of at most 8 to 1, got 80x63"),
        ([(64, 520)], "at least 64x64 pixels, with sides of at most 8 to 1, got 520x64"),
        (["missing.png"], r"sample.references .*missing.png: .*No such file"),
        (["damaged.png"], r"sample.references .*damaged.png: not a "),
    ],
)
def test_references_that_cannot_be_read_are_one_line(sizes, reason, model, tmp_path):
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    files = [tmp_path / (size if isinstance(size, str) else f"{i}.png") for i, size in enumerate(sizes)]
    for file, size in zip(files, sizes, strict=True):
        if not isinstance(size, str):
            Image.new("RGB", size[::-1]).save(file)
    config = published.get_config()
    config.sample.references = tuple(map(str, files))
    with pytest.raises(ValueError, match=reason) as error:
        sample.request(config, model, PROMPTS)
    assert "\n" not in str(error.value)


def test_other_models_refuse_references(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    config = digits.get_config()
    config.sample.references = (str(tmp_path / "picture.png"),)
    model = build.model.diffusion_model(config)
    for refuse in (lambda: sample.request(config, model, ("3",)), lambda: sample.run(config, tmp_path)):
        with pytest.raises(ValueError, match="this model reads no reference pictures, got 1: leave") as error:
            refuse()
        assert "\n" not in str(error.value)


def test_large_references_are_resized_and_cropped_as_diffusers_does():
    """Each is at most about a million pixels, of sides that are multiples of 16."""
    processors = pytest.importorskip("diffusers.pipelines.flux2.image_processor")
    processor = processors.Flux2ImageProcessor(vae_scale_factor=16)
    for size in ((1500, 1201), (480, 3000), (1024, 1024), (79, 111)):
        (picture,) = pictures_of([size])
        fitted = flux2_klein.FAMILY.references.fitted(picture, 16)
        resized = processor._resize_if_exceeds_area(Image.fromarray(picture))
        width, height = (side // 16 * 16 for side in resized.size)
        expected = processor.preprocess(resized, height=height, width=width, resize_mode="crop")[0].permute(1, 2, 0)
        np.testing.assert_allclose(fitted / 127.5 - 1, expected, atol=1e-6)


# -- from an image -----------------------------------------------------------------------------------------------------


def by_hand(klein, model, images, cells, keys, levels, peer):  # noqa: F811
    """Images of the first prompt by diffusers' networks and the equations of a rectified flow.

    cells: (1, h, w), True where the image is generated.
    """
    import torch

    pipeline, noise = klein[0], peer.tensor(np.array(noise_of(model, keys)))
    text = pipeline.encode_prompt([PROMPTS[0]] * len(images))[0]
    with torch.no_grad():
        pixels = torch.tensor(images.transpose(0, 3, 1, 2) / 127.5 - 1, dtype=torch.float32)
        x0 = cells_of(pipeline.vae, pipeline.vae.encode(pixels).latent_dist.mode())

        def kept(x, level, step):
            """x where it is generated, elsewhere the image under fresh noise."""
            fresh = [jax.random.fold_in(jax.random.fold_in(key, KNOWN), step) for key in keys]
            again = peer.tensor(np.stack([jax.random.normal(key, model.shape) for key in fresh]))
            return torch.where(torch.tensor(cells)[:, None], x, (1 - level) * x0 + level * again)

        x = kept((1 - levels[0]) * x0 + levels[0] * noise, levels[0], 0)
        for i, (s, to) in enumerate(itertools.pairwise(levels)):
            ids, words = pipeline._prepare_latent_ids(x), pipeline._prepare_text_ids(text)
            velocity = pipeline.transformer(
                hidden_states=pipeline._pack_latents(x),
                timestep=torch.full((len(x),), s),
                encoder_hidden_states=text,
                txt_ids=words,
                img_ids=ids,
            ).sample
            x = kept(x + (to - s) * pipeline._unpack_latents_with_ids(velocity, ids), to, i + 1)
        return image_of(pipeline.vae, x).sample.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("is_masked", [False, True])
def test_an_image_is_changed_as_a_flow_changes_it(is_masked, klein, model, peer):  # noqa: F811
    """From the level that the strength sets, and in the cells that the mask touches."""
    keys, images = jax.random.split(jax.random.key(2), 2), np.stack(pictures_of([SIZE] * 2))
    plan = model.published_solvers["published"](4, 0.75, model.size)
    levels = [*map(float, plan.level.sigma), 0.0]
    assert len(levels) == 4 and levels[0] < 1
    mask = np.ones((1, *SIZE, 1), bool)
    mask[:, :, :9] = not is_masked
    cells = mask[..., 0].reshape(1, 4, 4, 6, 4).any(axis=(2, 4))
    cond = model.conditioning.of_prompts(PROMPTS[:1] * 2)
    expected = by_hand(klein, model, images, cells, keys, levels, peer)
    if is_masked:
        expected = np.where(mask, expected, images / 127.5 - 1)
        drawn = inpaint(model, images, mask, cond, keys, plan)
    else:
        drawn = image_to_image(model, images, cond, keys, plan)
    assert np.abs(np.asarray(drawn) - expected).max() < 1e-4 < 0.1 < np.abs(drawn - images / 127.5 + 1).mean()

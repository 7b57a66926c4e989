"""What the denoiser is trained on: every variant of an image, cached or not, and another one in another epoch."""

import itertools
import json
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import digits
from diffusion_jax import build, conditioning
from diffusion_jax import codec as codecs
from diffusion_jax.app import train
from diffusion_jax.build.initial import initial
from diffusion_jax.data.sources import Source
from diffusion_jax.interop import load_unet, save_unet
from diffusion_jax.model import network_of
from diffusion_jax.models.text.encoder import TextEmbedding, TextEncoder

SIZE = 8


@pytest.fixture
def config():
    config = digits.get_config()
    config.train.batch_size, config.train.accumulate = 6, 1
    return config


def pictures(width=SIZE) -> Source:
    """Six pictures of their own number, brighter to the right."""
    image = np.tile(np.arange(width, dtype=np.uint8)[:, None], (SIZE, 1, 3))
    return Source("pictures", 6, lambda i: {"image": image + np.uint8(20 * i), "label": i}, num_classes=6)


def of_latents(model):
    """The model with pixels for latents: what is cached are the images themselves."""
    return model._replace(codec=codecs.identity()._replace(cache_key=lambda: "weights"))


def drawn(config, source, model, folder, epochs=40) -> dict[int, list[np.ndarray]]:
    """By label what the network is given of each picture, epoch by epoch."""
    records, transform = train._training_records(config, folder, source, model)
    batches = build.data.batches(records, config.train, config.seed, transform)(0)
    latents_of = {}
    for batch in itertools.islice(batches, epochs):
        for latent, label in zip(batch["latent"], batch["cond"]["label"], strict=True):
            latents_of.setdefault(int(label), []).append(latent)
    return latents_of


@pytest.mark.parametrize("in_cache", [False, True])
def test_a_picture_is_mirrored_in_some_epochs_and_not_in_others(in_cache, config, tmp_path):
    config.data.flip = True
    model, source = build.model.diffusion_model(config), pictures()
    for label, latents in drawn(config, source, of_latents(model) if in_cache else model, tmp_path).items():
        image = source[label]["image"]
        as_it_is = [np.array_equal(latent, image) for latent in latents]
        mirrored = [np.array_equal(latent, image[:, ::-1]) for latent in latents]
        assert np.all(np.logical_xor(as_it_is, mirrored)) and 7 < sum(mirrored) < 33


@pytest.mark.parametrize("in_cache, crops", [(False, 17), (True, 4)])
def test_a_picture_is_cropped_elsewhere_in_other_epochs(in_cache, crops, config, tmp_path):
    """As many crops as are cached, or as there are places."""
    config.data.random_crop = True
    model, source = build.model.diffusion_model(config), pictures(SIZE + 16)
    for latents in drawn(config, source, of_latents(model) if in_cache else model, tmp_path).values():
        assert 1 < len({latent[0, 0, 0] for latent in latents}) <= crops


def test_what_is_cached_grows_with_crops_and_flip_alone(config, tmp_path):
    for random_crop, flip, count in [(False, False, 1), (False, True, 2), (True, False, 3), (True, True, 6)]:
        config.data.update(random_crop=random_crop, flip=flip, crops=3)
        model = of_latents(build.model.diffusion_model(config))
        train._training_records(config, tmp_path, pictures(SIZE + 2), model)
        newest = max(tmp_path.rglob("latent/*.npy"), key=lambda file: file.stat().st_mtime_ns)
        assert np.load(newest).shape == (6, count, SIZE, SIZE, 3)


def test_the_seed_of_an_example_changes_what_the_network_forgets():
    """The loss hands the network a key for each example, as dropout needs it."""
    config = digits.get_config()
    seen = []
    model = build.model.diffusion_model(config)

    def apply(params, x, t, cond, keys):
        seen.append(keys)
        return params * x

    model = model._replace(network=model.network._replace(apply=apply, init=lambda key: np.float32(1)))
    loss, params, frozen = build.objective.objective(config.objective, model, jax.random.key(0))
    batch = {"latent": jnp.zeros((4, SIZE, SIZE, 3), jnp.uint8), "cond": {"label": jnp.arange(4)}}
    loss(params, frozen, batch, jax.random.split(jax.random.key(0), 4))
    assert len(np.unique(jax.random.key_data(seen[0]), axis=0)) == 4


def letters() -> conditioning.Conditioning:
    """Told by the first letter of a caption."""

    def tokenize(prompts, warn):
        return np.array([[ord(prompt[:1] or " ")] for prompt in prompts], np.int32), np.ones((len(prompts), 1), bool)

    def embed(params, ids, mask):
        tokens = params * ids[..., None].astype(np.float32)
        return TextEmbedding(tokens, tokens[:, 0])

    return conditioning.text(lambda: [TextEncoder(tokenize, embed, np.float32(1), 1, 1)], lambda: "letters")


@pytest.mark.parametrize("in_cache", [False, True])
def test_a_picture_of_several_captions_is_told_by_another_one_each_time(in_cache, config, tmp_path):
    source = replace(pictures(), captions=[("a", "b", "c")] * 5 + [("d",)])
    model = build.model.diffusion_model(config)
    model = (of_latents(model) if in_cache else model)._replace(conditioning=letters())
    records, transform = train._training_records(config, tmp_path, source, model)
    captions_of = {}
    for batch in itertools.islice(build.data.batches(records, config.train, config.seed, transform)(0), 40):
        for latent, ids in zip(batch["latent"], batch["cond"]["0"]["ids"][:, 0], strict=True):
            captions_of.setdefault(int(latent[0, 0, 0]) // 20, set()).add(chr(ids))
    assert captions_of == {i: set("abc") for i in range(5)} | {5: {"d"}}


def test_a_caption_alone_is_embedded_once(config, tmp_path):
    """In the cache; the training step leaves it as it is."""
    source = pictures()
    source = replace(source, captions=list("abcdef"), read=lambda i: pictures().read(i) | {"caption": "abcdef"[i]})
    model = of_latents(build.model.diffusion_model(config))._replace(conditioning=letters())
    records, _ = train._training_records(config, tmp_path, source, model)
    cond = records[2]["cond"]
    assert cond["text"].tolist() == [[ord("c")]] and cond["mask"].tolist() == [True]
    assert cond["text"].dtype == jnp.bfloat16
    again = model.conditioning.embed(model.conditioning.params(), jax.tree.map(lambda leaf: leaf[None], cond))
    assert again["text"].dtype == jnp.float32
    np.testing.assert_array_equal(again["text"][0], cond["text"])


@pytest.mark.parametrize("captions", [list("abcdef"), [("a", "b")] * 6])
@pytest.mark.parametrize("in_cache", [False, True])
def test_a_network_is_told_the_true_sizes_of_each_version(in_cache, captions, config, tmp_path):
    """Where in the picture a crop is, is seen in its pixels; a mirrored one is a part of the mirrored picture."""
    config.data.update(random_crop=True, flip=True)
    width, image = SIZE + 16, pictures(SIZE + 16)[0]["image"]

    def read(index):
        told = {} if isinstance(captions[0], tuple) else {"caption": captions[index]}
        return {"image": image, "original": np.array([100 + index, 300], np.int32)} | told

    source, model = Source("pictures", 6, read, captions=captions), build.model.diffusion_model(config)
    model = (of_latents(model) if in_cache else model)._replace(conditioning=letters()._replace(sizes="time_ids"))
    records, transform = train._training_records(config, tmp_path, source, model)
    seen = set()
    for batch in itertools.islice(build.data.batches(records, config.train, config.seed, transform)(0), 20):
        time_ids = batch["cond"]["time_ids"]
        assert time_ids.dtype == np.float32 and time_ids[:, 0].min() >= 100
        for latent, (height, *others) in zip(batch["latent"], time_ids, strict=True):
            first, second = latent[0, :2, 0].astype(int)
            left = first if second > first else width - 1 - first
            assert others == [300, 0, left, SIZE, SIZE]
            seen.add((int(height), bool(second > first)))
    assert len(seen) == 12
    if in_cache:
        assert records[2]["cond"]["time_ids"].shape == (6,) and records[2].keys() == {"latent", "cond"}


def test_latents_without_a_condition_have_an_empty_one(config, tmp_path):
    model = of_latents(build.model.diffusion_model(config))._replace(conditioning=conditioning.unconditional())
    records, transform = train._training_records(config, tmp_path, pictures(), model)
    batch = next(build.data.batches(records, config.train, config.seed, transform)(0))
    assert batch["cond"] == {} and batch["latent"].shape == (6, SIZE, SIZE, 3)


def test_training_starts_from_named_weights_that_fit(config, tmp_path):
    unet = build.model.network(config)
    here, there = (network_of(unet).init(jax.random.key(seed)) for seed in (0, 1))
    save_unet(unet, there, tmp_path / "unet")
    assert initial("", load_unet, here) is here
    jax.tree.map(np.testing.assert_array_equal, initial(str(tmp_path / "unet"), load_unet, here), there)
    config.model.block_out_channels = (16, 64)
    other = network_of(build.model.network(config)).init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"unet has the weights of another network: .* is \(.*\), expected \(.*\)"):
        initial(str(tmp_path / "unet"), load_unet, other)


@pytest.mark.slow
def test_a_small_model_is_trained_in_three_sizes(config, tmp_path, monkeypatch):
    """Of pixels, without a cache. The loss of every step is finite; a step is compiled for each size."""
    for number in range(24):
        height, width = [(8, 8), (9, 24), (8, 9), (21, 8)][number % 4]
        folder = tmp_path / "photos" / str(number // 4)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((height, width, 3), 10 * number, np.uint8)).save(folder / f"{number}.png")
    config.data.update(source=f"folder:{tmp_path}/photos", buckets=1, upscale=True, cache=str(tmp_path / "cache"))
    config.condition.num_classes, config.model.num_class_embeds = 6, 7
    config.model.update(block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4)
    config.train.update(steps=4, batch_size=6, log_every=1, snapshot_every=4, checkpoint_every=4)
    config.sample.update(steps=1, prompts=("1", "2"), num_images=2)
    in_turn = mock.Mock(wraps=train.in_turn)
    monkeypatch.setattr(train, "in_turn", in_turn)
    train.run(config, tmp_path / "run")
    assert in_turn.call_args.args[1] == [2, 1, 1], "as the numbers of their pictures, 12, 6 and 6"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and np.isfinite(losses).all()

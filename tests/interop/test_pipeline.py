"""Whole pipelines: diffusers' load here and agree, ours load in diffusers, and every tensor survives a round trip."""

import functools
import itertools
import json
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import sampling, schedules, solvers
from diffusion_jax.interop import load_pipeline, load_tokenizer, save_pipeline
from diffusion_jax.interop import prompts as weighted
from diffusion_jax.interop.families import stable_diffusion_1, stable_diffusion_xl
from diffusion_jax.interop.lora import save_lora
from diffusion_jax.interop.noise_schedules import schedule_of, scheduler_config
from diffusion_jax.interop.pipeline import Part, PublishedPipeline
from diffusion_jax.interop.tensors import read_file, write_file, write_json
from diffusion_jax.models import lora
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.text.clip import ClipTextEncoder
from diffusion_jax.models.unet import UNet
from diffusion_jax.pipelines import from_noise, text_to_image
from diffusion_jax.pipelines.inpaint import inpainting_condition
from diffusion_jax.pipelines.published import _own_size, from_published, generator, published_times, sampler
from tests.interop import test_single_file

UNET = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": (2, 4),
    "sample_size": 4,
}
ADDED = {
    "cross_attention_dim": 8 + 12,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
AUTOENCODER = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
TEXT = {
    "vocab_size": 60,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
}
TEXT_2 = TEXT | {"hidden_size": 12, "projection_dim": 10, "hidden_act": "gelu"}
PROMPTS = ["a cat", "the dog and a much longer text than there is room for", ""]


def filled(module, *inputs, dtype=np.float16):
    """The module with variables that a half-precision file holds exactly."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(0)
    return Part(module, jax.tree.map(lambda s: jnp.float32(0.1 * rng.normal(size=s.shape).astype(dtype)), shapes))


def our_pipeline(parts=(), family=stable_diffusion_1.FAMILY, **changes):
    """A tiny pipeline. parts: those that differ."""
    unet, autoencoder, text = UNet(**UNET), AutoencoderKL(**AUTOENCODER), ClipTextEncoder(**TEXT)
    networks = {
        "unet": filled(unet, *unet.example_inputs()),
        "vae": filled(autoencoder, autoencoder.example_image()),
        "text_encoder": filled(text, *text.example_inputs()),
    }
    fields = {"tokenizers": (), "schedule": schedules.scaled_linear(), "prediction": "eps"}
    return PublishedPipeline(family, networks | dict(parts), **fields | changes)


def tensors_of(folder):
    return {
        (str(path.relative_to(folder)), name): tensor.tobytes()
        for path in folder.rglob("*.safetensors")
        for name, tensor in read_file(path).items()
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_load_save_load_keeps_every_byte(dtype, tmp_path):
    save_pipeline(our_pipeline(), tmp_path / "a", dtype)
    first = load_pipeline(tmp_path / "a")
    save_pipeline(first, tmp_path / "b", dtype)
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "b")
    second = load_pipeline(tmp_path / "b")
    assert (first.denoiser.module, first.scheduler, first.index) == (
        second.denoiser.module,
        second.scheduler,
        second.index,
    )
    jax.tree.map(np.testing.assert_array_equal, first.denoiser.params, second.denoiser.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(load_pipeline(tmp_path / "a", jnp.bfloat16).denoiser.params)} == {
        jnp.dtype(jnp.bfloat16)
    }


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.cosine(50),
        schedules.sigmoid(20),
        schedules.linear(1000),
        schedules.zero_terminal_snr(schedules.scaled_linear(100)),
    ],
)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_every_discrete_schedule_survives(schedule, prediction):
    config = scheduler_config({}, schedule, prediction)
    back, predicted = schedule_of(json.loads(json.dumps(config)), "test")
    assert predicted == prediction
    np.testing.assert_allclose(back.alphas_bar, schedule.alphas_bar, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "num_train_timesteps": 100},
        {"beta_schedule": "linear", "num_train_timesteps": 50, "beta_end": 0.2},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
    ],
)
def test_schedules_are_those_of_the_peer(config):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    np.testing.assert_allclose(schedule_of(config, "test")[0].alphas_bar, theirs, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FlowMatchLCMScheduler", "shift": 3.0}, "FlowMatchLCMScheduler is unknown"),
        ({"beta_schedule": "sigmoid"}, "'sigmoid' is unknown"),
        ({"beta_schedule": "linear", "prediction_type": "flow"}, "'flow' is unknown"),
        ({"beta_schedule": "linear", "beta_end": 2.0}, "betas must be one row of values inside"),
        (
            {"beta_schedule": "linear", "num_train_timesteps": "many"},
            "no noise schedule can be made from it: num_train_timesteps: expected a number, got 'many'",
        ),
        ({"steps_offset": None}, "steps_offset: expected a number, got None"),
        ({"beta_start": float("nan")}, "beta_start: expected a number, got nan"),
        ({"_class_name": ["DDIMScheduler"]}, r"_class_name: expected a name, got \['DDIMScheduler'\]"),
        ({"set_alpha_to_one": "false"}, "set_alpha_to_one: expected true or false, got 'false'"),
        ({"use_karras_sigmas": "no"}, "use_karras_sigmas: expected true or false, got 'no'"),
        ({"sigma_max": "high"}, "sigma_max: expected a number, got 'high'"),
        ({"timestep_type": "continuous"}, "timestep_type='continuous': the network reads a time that is not the step"),
    ],
)
def test_a_wrong_scheduler_is_one_line(config, message):
    with pytest.raises(ValueError, match=message) as raised:
        schedule_of(config, "scheduler_config.json")
    assert str(raised.value).startswith("scheduler_config.json: ")
    assert "\n" not in str(raised.value)


def test_eps_that_begins_at_pure_noise_is_one_line(tmp_path):
    """Of a folder, and of a file with the marker of zero terminal SNR alone. It may predict v."""
    save_pipeline(our_pipeline(schedule=schedules.zero_terminal_snr(schedules.scaled_linear())), tmp_path / "folder")
    held = test_single_file.checkpoint("sd1")[0] | {"ztsnr": test_single_file.EMPTY}
    write_file(tmp_path / "file.safetensors", held)
    for name in ("folder", "file.safetensors"):
        with pytest.raises(ValueError, match=r"pure noise \(zero terminal SNR\), where eps .* set prediction to that"):
            load_pipeline(tmp_path / name)
    assert load_pipeline(tmp_path / "folder", prediction="v").prediction == "v"


def test_parts_of_a_folder_that_are_not_used_are_named(tmp_path, caplog):
    save_pipeline(our_pipeline(), tmp_path)
    file, config = tmp_path / "model_index.json", tmp_path / "text_encoder" / "config.json"
    others = {
        "controlnet": ["diffusers", "ControlNetModel"],
        "image_encoder": [None, None],
        "feature_extractor": ["x", "y"],
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | others))
    with caplog.at_level("WARNING"):
        load_pipeline(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}: controlnet, which is not supported and not used"
    ]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_attention_mask": True}))
    with pytest.raises(ValueError, match=r"text_encoder/config\.json: use_attention_mask=true, .* is not supported"):
        load_pipeline(tmp_path)


def test_a_name_on_a_hub_is_one_line():
    with pytest.raises(FileNotFoundError, match=r"^someone/model: no such file or folder: .* a hub is not looked up$"):
        load_pipeline("someone/model")


@pytest.mark.parametrize("missing", ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"])
def test_a_missing_file_is_named(missing, tmp_path):
    save_pipeline(our_pipeline(), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing}: no such file"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("family", test_single_file.UNETS)
def test_one_file_becomes_a_folder(family, tmp_path):
    path = tmp_path / "model.safetensors"
    write_file(path, test_single_file.checkpoint(family)[0])
    if family == "sd2":
        with pytest.raises(ValueError, match="does not say what it predicts"):
            load_pipeline(path)
    pipeline = load_pipeline(path, prediction="v" if family == "sd2" else None)
    save_pipeline(pipeline, tmp_path / "folder", np.float16)
    back = load_pipeline(tmp_path / "folder")
    assert pipeline.prediction == back.prediction == ("v" if family == "sd2" else "eps")
    assert pipeline.denoiser.module == back.denoiser.module
    assert len(back.text_encoders) == (2 if family == "sdxl" else 1)
    for part in ("denoiser", "autoencoder", "text_encoders"):
        jax.tree.map(np.testing.assert_array_equal, *(_params(getattr(p, part)) for p in (pipeline, back)))


def _params(part):
    return part.params if isinstance(part, Part) else [each.params for each in part]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A folder with the smallest vocabulary of CLIP's kind: letters, and one pair."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), "th", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 9, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def published(kind, vocabulary, folder):
    """A tiny pipeline of diffusers, saved in the published format."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    tokenizer = transformers.CLIPTokenizer.from_pretrained(vocabulary)
    ends = {"bos_token_id": 53, "eos_token_id": 54}
    parts = {
        "vae": diffusers.AutoencoderKL(**AUTOENCODER, **blocks),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, **ends)),
        "tokenizer": tokenizer,
    }
    if kind == "sdxl":
        second = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**TEXT_2, **ends))
        whole = diffusers.StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=second,
            tokenizer_2=tokenizer,
            unet=diffusers.UNet2DConditionModel(**UNET | ADDED),
            scheduler=diffusers.EulerDiscreteScheduler(
                beta_schedule="scaled_linear", beta_end=0.012, timestep_spacing="leading", steps_offset=1
            ),
        )
    else:
        whole = diffusers.StableDiffusionPipeline(
            **parts,
            unet=diffusers.UNet2DConditionModel(**UNET),
            scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
            safety_checker=None,
            feature_extractor=None,
        )
    whole.save_pretrained(folder)
    return whole


def embeddings(whole, kind):
    """The condition of diffusers' U-Net for PROMPTS."""
    out = whole.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return out[0], out[2] if kind == "sdxl" else None


def peer_outputs(whole, kind):
    """(text, prediction of the U-Net, image) of diffusers as numpy arrays, with channels last."""
    import torch

    with torch.no_grad():
        text, pooled = embeddings(whole, kind)
        x = torch.linspace(-1, 1, 3 * 4 * 4 * 4).reshape(3, 4, 4, 4)
        added = {"text_embeds": pooled, "time_ids": torch.arange(18.0).reshape(3, 6)} if kind == "sdxl" else None
        out = whole.unet(x, torch.tensor([1, 500, 999]), text, added_cond_kwargs=added).sample
        image = whole.vae.decode(x).sample
    return text.numpy(), out.numpy().transpose(0, 2, 3, 1), image.numpy().transpose(0, 2, 3, 1)


def our_outputs(pipeline, kind):
    """The same from our implementation."""
    features = []
    for (module, params), tokenizer in zip(pipeline.text_encoders, pipeline.tokenizers, strict=True):
        ids = jnp.array([encoding.ids for encoding in tokenizer.encode_batch(PROMPTS)])
        features.append(jax.jit(module.apply)(params, ids))
    if kind == "sdxl":
        text = jnp.concatenate([feature.penultimate for feature in features], axis=-1)
        added = {"text_embeds": features[1].pooled, "time_ids": jnp.arange(18.0).reshape(3, 6)}
    else:
        text, added = features[0].last_hidden_state, {}
    x = jnp.linspace(-1, 1, 3 * 4 * 4 * 4).reshape(3, 4, 4, 4).transpose(0, 2, 3, 1)
    t = jnp.array([1, 500, 999])
    out = jax.jit(pipeline.denoiser.module.apply)(pipeline.denoiser.params, x, t, {"text": text, **added})
    decode = jax.jit(functools.partial(pipeline.autoencoder.module.apply, method="decode"))
    return text, out, decode(pipeline.autoencoder.params, x)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_agrees_with_the_peer_both_ways(kind, vocabulary, tmp_path):
    whole = published(kind, vocabulary, tmp_path / "theirs")
    expected = peer_outputs(whole, kind)
    pipeline = load_pipeline(tmp_path / "theirs")
    for name, ours, theirs in zip(("text", "unet", "image"), our_outputs(pipeline, kind), expected, strict=True):
        assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max(), name
    assert pipeline.prediction == ("v" if kind == "sd" else "eps")

    import diffusers

    save_pipeline(pipeline, tmp_path / "ours")
    back = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(back) is type(whole)
    assert type(back.scheduler) is type(whole.scheduler)
    configs = ({k: v for k, v in p.scheduler.config.items() if not k.startswith("_")} for p in (back, whole))
    assert next(configs) == next(configs)
    for again, theirs in zip(peer_outputs(back, kind), expected, strict=True):
        assert np.abs(again - theirs).max() <= 2e-6 * np.abs(theirs).max()


SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
AS_PUBLISHED = [  # the family and its scheduler; None is the one that `published` saves
    ("sd", None, {}),
    ("sdxl", None, {}),
    ("sd", "DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}),
    ("sd", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 0}),
    ("sd", "DDPMScheduler", {}),
    ("sdxl", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("sd", "EulerDiscreteScheduler", {}),
    ("sd", "EulerAncestralDiscreteScheduler", {}),
    ("sd", "HeunDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("sd", "LMSDiscreteScheduler", {}),
    ("sd", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("sdxl", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("sd", "DPMSolverSinglestepScheduler", {}),
    ("sd", "UniPCMultistepScheduler", {"timestep_spacing": "leading"}),
    ("sd", "DEISMultistepScheduler", {}),
    ("sd", "LCMScheduler", {}),
]


@pytest.fixture(scope="module")
def saved(vocabulary, tmp_path_factory):
    """A function of a family and of a prediction other than its own: (folder, published pipeline, model)."""

    @functools.cache
    def loaded(kind, prediction=None):
        path = tmp_path_factory.mktemp(kind)
        published(kind, vocabulary, path)
        pipeline = load_pipeline(path)
        pipeline = pipeline._replace(prediction=prediction or pipeline.prediction)
        return path, pipeline, from_published(pipeline, size=(8, 8))

    return loaded


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_model_of_another_size_is_that_loaded_for_it(kind, saved):
    _, pipeline, model = saved(kind)
    ours, theirs = model.resized((16, 8)), from_published(pipeline, size=(16, 8))
    assert ours.size == theirs.size == (16, 8) and ours.params is model.params
    conditions = [each.conditioning.of_prompts(["a cat"]) for each in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *conditions)
    with pytest.raises(ValueError, match="must be multiples of"):
        model.resized((9, 8))


def test_clip_skip_is_that_of_the_peer(saved, tmp_path):
    """The final norm after an earlier layer; a saved pipeline has the layers that are left."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path, pipeline, _ = saved("sd")
    encoder = transformers.CLIPTextModel.from_pretrained(path / "text_encoder")
    ids = np.array([encoding.ids for encoding in pipeline.tokenizers[0].encode_batch(PROMPTS)])
    with torch.no_grad():
        states = encoder(torch.tensor(ids), output_hidden_states=True).hidden_states
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        expected = norm(states[-2]).numpy()
    save_pipeline(pipeline.with_clip_skip(1), tmp_path)
    for cut in (pipeline.with_clip_skip(1), load_pipeline(tmp_path)):
        module, params = cut.text_encoders[0]
        assert module.num_hidden_layers == 1
        np.testing.assert_allclose(module.apply(params, jnp.asarray(ids)).last_hidden_state, expected, atol=2e-5)
    assert pipeline.with_clip_skip(0) is pipeline
    for layers in (-1, 2):
        with pytest.raises(ValueError, match=f"clip_skip: expected 0 to 1, got {layers}"):
            pipeline.with_clip_skip(layers)
    with pytest.raises(ValueError, match="clip_skip: Stable Diffusion XL has no choice of the text encoders' layer"):
        pipeline._replace(family=stable_diffusion_xl.FAMILY).with_clip_skip(1)


def drawn_by(model, keys, numbers):
    """A function that draws our noise, for diffusers: that of the images, 0, or of row i of the plan, 1 + i."""
    torch = pytest.importorskip("torch")

    def draw(*_, **__):
        number = next(numbers)
        drawn = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), model.shape))(keys)
        return torch.from_numpy(np.array(drawn).transpose(0, 3, 1, 2))

    return draw


@pytest.mark.parametrize(("kind", "scheduler", "config"), AS_PUBLISHED)
def test_images_are_those_of_the_peer(kind, scheduler, config, saved, tmp_path):
    """From prompt to pixels, with guidance, by the scheduler of the folder: the same noise becomes the same image."""
    diffusers = pytest.importorskip("diffusers")
    path, pipeline, model = saved(kind, scheduler and "eps")
    folder = shutil.copytree(path, tmp_path / "folder")
    plan = model.published_solvers["published"](8)
    if scheduler is not None:
        made = getattr(diffusers, scheduler)(**SCALED | config)
        made.save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", scheduler]}))
        settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        schedule, _ = schedule_of(settings, "test")
        plan = sampler(pipeline._replace(scheduler=settings, schedule=schedule))(8)
    keys = jax.random.split(jax.random.key(0), 2)
    cond = model.conditioning.of_records({"caption": PROMPTS[:2]})
    ours = text_to_image(model, cond, keys, plan, 4.0)

    whole = diffusers.DiffusionPipeline.from_pretrained(folder)
    options = dict(num_inference_steps=8, guidance_scale=4.0, output_type="np", height=8, width=8)
    steps = f"{type(whole.scheduler).__module__}.randn_tensor"
    with mock.patch(steps, drawn_by(model, keys, itertools.count(1)), create=True):
        theirs = whole(PROMPTS[:2], **options, latents=drawn_by(model, keys, iter([0]))()).images
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), theirs, atol=1e-3)
    assert np.std(theirs) > 0.1


def test_a_latent_consistency_model_is_that_of_the_peer(vocabulary, tmp_path):
    """Its guidance scale is an input of the U-Net, in one call a step."""
    diffusers = pytest.importorskip("diffusers")
    parts = published("sd", vocabulary, tmp_path / "sd").components
    parts["unet"] = diffusers.UNet2DConditionModel(**UNET, time_cond_proj_dim=6)
    parts["scheduler"] = diffusers.LCMScheduler(**SCALED)
    whole = diffusers.LatentConsistencyModelPipeline(**{name: parts[name] for name in parts if name != "image_encoder"})
    whole.save_pretrained(tmp_path / "lcm")
    model = from_published(load_pipeline(tmp_path / "lcm"), size=(8, 8))
    assert model.network.takes_scale

    keys, plan = jax.random.split(jax.random.key(0), 2), model.published_solvers["published"](3)
    cond = model.conditioning.of_records({"caption": PROMPTS[:2]})
    ours, other = (text_to_image(model, cond, keys, plan, scale) for scale in (4.5, 9.0))

    options = dict(num_inference_steps=3, guidance_scale=4.5, output_type="np", height=8, width=8)
    with mock.patch("diffusers.schedulers.scheduling_lcm.randn_tensor", drawn_by(model, keys, itertools.count(1))):
        theirs = whole(PROMPTS[:2], **options, latents=drawn_by(model, keys, iter([0]))()).images
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), theirs, atol=1e-3)
    assert np.std(theirs) > 0.1 and not np.allclose(ours, other, atol=1e-2)


@pytest.mark.parametrize(("sample_size", "size"), [(4, [32, 32]), ((4, 6), [32, 48]), ([2, 3], [16, 24])])
def test_the_own_size_of_a_model(sample_size, size):
    assert _own_size(sample_size, 8) == size


@pytest.mark.parametrize("sample_size", [None, "big", 0, -1, 2.5, (1, 2, 3)])
def test_a_model_without_a_size_needs_one(sample_size):
    with pytest.raises(ValueError, match=r"sample_size=.*, not the size of its images: set height and width"):
        _own_size(sample_size, 8)


def test_a_model_without_tokenizers_is_refused():
    with pytest.raises(ValueError, match="expected a tokenizer for each of 1 text encoders, got 0"):
        from_published(our_pipeline())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"in_channels": 5}, "a U-Net whose input is the noisy latents"),
        ({"out_channels": 8}, "a U-Net of 4 output channels, those of the latents, got 8"),
    ],
)
def test_a_network_of_other_channels_than_the_latents_is_refused(changes, message, vocabulary):
    pipeline = our_pipeline(tokenizers=(load_tokenizer(vocabulary),))
    other = pipeline.denoiser._replace(module=pipeline.denoiser.module.clone(**changes))
    with pytest.raises(ValueError, match=message):
        from_published(pipeline.with_denoiser(other))


@pytest.mark.slow
def test_filled_in_images_are_those_of_the_peer(vocabulary, tmp_path):
    """A U-Net that sees the mask: the same noise becomes the same image."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    parts = published("sd", vocabulary, tmp_path / "parts").components
    torch.manual_seed(1)
    parts["unet"] = diffusers.UNet2DConditionModel(**UNET | {"in_channels": 9})
    parts["scheduler"] = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_end=0.012, clip_sample=False)
    whole = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    whole.save_pretrained(tmp_path / "theirs")
    whole.vae.encode = _without_noise(whole.vae.encode)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 4, 4, 4)).astype(np.float32)
    image = rng.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    mask = np.zeros((1, 8, 8, 1), np.float32)
    mask[:, :5, 2:] = 1
    first = [torch.tensor(array.transpose(0, 3, 1, 2)) for array in (image, np.repeat(mask, 2, axis=0))]
    options = dict(num_inference_steps=3, guidance_scale=4.0, output_type="np", strength=1.0)
    theirs = whole(PROMPTS[:2], *first, latents=torch.tensor(noise), height=8, width=8, **options).images

    pipeline = from_published(load_pipeline(tmp_path / "theirs"))
    plan = solvers.ddim(load_pipeline(tmp_path / "theirs").schedule, 3, whole.scheduler.timesteps.double().numpy())
    cond = pipeline.conditioning.of_records({"caption": PROMPTS[:2]}) | {
        "known": inpainting_condition(pipeline, image, jnp.asarray(mask))
    }
    keys = jax.random.split(jax.random.key(0), 2)
    ours = from_noise(pipeline, jnp.asarray(noise.transpose(0, 2, 3, 1)), cond, keys, plan, 4.0)
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), theirs, atol=1e-4)
    assert np.std(theirs) > 0.05


def _without_noise(encode):
    """The encoder with the posterior mean instead of a sample."""

    def wrapped(x):
        out = encode(x)
        out.latent_dist.sample = lambda generator=None: out.latent_dist.mode()
        return out

    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets", [lora.ATTENTION, rf"{lora.ATTENTION}|conv[12]|conv|conv_shortcut|proj_in|time_emb_proj"]
)
def test_a_trained_lora_is_what_the_peer_loads(targets, vocabulary, tmp_path):
    """Of attention alone, and of all that a LoRA of latent consistency trains."""
    pytest.importorskip("peft")
    import torch

    whole = published("sd", vocabulary, tmp_path / "theirs")
    pipeline = load_pipeline(tmp_path / "theirs")
    made = lora.init(pipeline.denoiser.params, 3, jax.random.key(0), targets)
    made = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), made)
    save_lora(tmp_path / "lora.safetensors", made, 0.2)
    whole.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    with torch.no_grad():
        theirs = whole.unet(torch.ones(1, 4, 4, 4), torch.tensor([500]), torch.ones(1, 9, 8)).sample
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    x, t, text = jnp.ones((1, 4, 4, 4)), jnp.array([500]), jnp.ones((1, 9, 8))
    ours = pipeline.denoiser.module.apply(lora.with_updates(pipeline.denoiser.params, made, 0.2), x, t, {"text": text})
    plain = pipeline.denoiser.module.apply(pipeline.denoiser.params, x, t, {"text": text})
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
    assert np.abs(ours - plain).max() > 0.01 * np.abs(theirs).max()


def test_weighted_and_long_prompts_of_both_encoders(vocabulary, tmp_path):
    """All prompts are padded to the longest; the result of a prompt does not depend on the others."""
    published("sdxl", vocabulary, tmp_path)
    model = load_pipeline(tmp_path)
    pipeline = from_published(model, size=(12, 8))
    together = pipeline.conditioning.of_prompts(["(cat:1.5) dog", "a b c d e f g h i j", ""])
    assert together["text"].shape == (3, 18, 20) and together["text_embeds"].shape == (3, 10)
    np.testing.assert_array_equal(together["time_ids"], np.tile([12, 8, 0, 0, 12, 8], (3, 1)))
    alone = pipeline.conditioning.of_prompts(["(cat:1.5) dog"])
    np.testing.assert_allclose(together["text"][0, :9], alone["text"][0], atol=1e-6)
    plain = pipeline.conditioning.of_prompts(["cat dog"])
    assert np.abs(alone["text"] - plain["text"]).max() > 1e-3
    np.testing.assert_allclose(alone["text_embeds"], plain["text_embeds"], atol=1e-6)  # weights move tokens alone
    assert pipeline.shape == (6, 4, 4)


def our_wide_pipeline(tokenizers):
    """A tiny pipeline of two text encoders."""
    unet, second = UNet(**UNET | ADDED), ClipTextEncoder(**TEXT_2)
    parts = {"unet": filled(unet, *unet.example_inputs()), "text_encoder_2": filled(second, *second.example_inputs())}
    index = {"force_zeros_for_empty_prompt": False}
    return our_pipeline(parts, stable_diffusion_xl.FAMILY, tokenizers=tokenizers, index=index)


@pytest.mark.slow
def test_each_encoder_reads_its_own_tokens_and_weights(vocabulary, tmp_path):
    """As in SDXL, where "!" pads the second encoder: the first reads "!!" as one token, the second as two."""
    shutil.copytree(vocabulary, tmp_path / "other")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 9, "pad_token": "t"}
    write_json(tmp_path / "other" / "tokenizer_config.json", settings)
    one, other = load_tokenizer(vocabulary), load_tokenizer(tmp_path / "other")
    model = our_wide_pipeline((one, other))
    text = from_published(model).conditioning.of_prompts(["(tha:1.5) tha tha"])["text"]
    assert text.shape == (1, 18, 20)
    for part, tokenizer, at_least, columns in zip(
        model.text_encoders, (one, other), (2, 1), (np.s_[..., :8], np.s_[..., 8:]), strict=True
    ):  # th a th a th a, which would fit into one chunk, and t h a t h a t h a
        ids, weights = weighted.chunked(["(tha:1.5) tha tha"], tokenizer, at_least)
        expected = weighted.emphasise(part.module.apply(part.params, jnp.asarray(ids[0])).penultimate, weights)
        np.testing.assert_allclose(text[columns], expected, atol=1e-6)


def test_the_times_are_those_of_the_peer(vocabulary, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = our_pipeline()
    for spacing, offset in (("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)):
        config = {"timestep_spacing": spacing, "steps_offset": offset, "beta_schedule": "scaled_linear"}
        scheduler = diffusers.DDIMScheduler(**config)
        for steps in (2, 7, 20, 50):
            scheduler.set_timesteps(steps)
            ours = published_times(model._replace(scheduler=config), steps)
            np.testing.assert_array_equal(ours, scheduler.timesteps.numpy(), err_msg=f"{config} {steps}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_one_program_makes_the_images_of_the_parts(kind, vocabulary, tmp_path):
    """Token ids to pixels in one call; other steps, solvers, seeds, prompts and scales compile nothing."""
    tokenizer = load_tokenizer(vocabulary)
    model = our_pipeline(tokenizers=(tokenizer,))
    if kind == "sdxl":
        model = our_wide_pipeline((tokenizer, tokenizer))
    pipeline = from_published(model)
    run, weights = generator(model)
    for i, plan in enumerate([solvers.dpmpp_2m(model.schedule, 5), solvers.ddpm(model.schedule, 3)]):
        prompts, scale, keys = [f"a (cat{'s' * i}:1.2)", "dogs"], 3.0 + i, jax.random.split(jax.random.key(i), 2)
        chunks = weighted.chunked_for_each([*prompts, "", ""], model.tokenizers)
        made = run(weights, *map(list, zip(*chunks, strict=True)), keys, sampling.rows(plan, 6), scale)
        expected = text_to_image(pipeline, pipeline.conditioning.of_prompts(prompts), keys, plan, scale)
        np.testing.assert_allclose(made, expected, atol=1e-4)
    assert run._cache_size() == 1

"""DiT: diffusers' network and pipeline load here and agree, and ours load in diffusers."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import schedules
from diffusion_jax.interop import load_pipeline, load_transformer, save_pipeline, save_transformer, verify
from diffusion_jax.interop.families import dit
from diffusion_jax.interop.folders import transformer_of
from diffusion_jax.interop.lora import merge_lora, save_lora
from diffusion_jax.interop.pipeline import PublishedPipeline
from diffusion_jax.interop.tensors import read_file, read_json, write_file, write_json
from diffusion_jax.models import lora
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.transformer import Transformer
from diffusion_jax.pipelines import from_noise
from diffusion_jax.pipelines.published import from_published, generator, sampler
from tests.interop.test_folders import AUTOENCODER, peer  # noqa: F401  (a fixture)
from tests.interop.test_pipeline import filled, tensors_of

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "in_channels": 2,
    "out_channels": 4,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 5,
}
NETWORKS = {
    "depth 3, patches of 2": SMALL,
    "depth 1, patches of 4": SMALL | {"num_layers": 1, "patch_size": 4, "out_channels": None},
    "depth 5, patches of 8": SMALL | {"num_layers": 5, "patch_size": 8, "sample_size": 16, "norm_eps": 1e-2},
    "swiglu, no biases": SMALL | {"num_layers": 1, "activation_fn": "swiglu", "attention_bias": False},
    "heads of 128": SMALL | {"num_layers": 1, "attention_head_dim": 128, "num_attention_heads": 1},
}
INDEX = {"id2label": {"0": "tench, Tinca tinca", "1": "goldfish", "2": "shark", "3": "ray", "4": "cock"}}
AS_PUBLISHED = {"modulation": "own", "freq_shift": 1, "norm_eps": 1e-5}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "clip_sample": False}


def difference(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def assert_equal(ours, theirs):
    """Outputs for `inputs_of`. At t = 999 the last digit of one float32 frequency turns a wave by 6e-5 radians, in both
    programs.
    """
    assert ours.shape == theirs.shape
    assert difference(ours[:2], theirs[:2]) < 2e-6 and difference(ours[2], theirs[2]) < 2e-5


def our_pipeline(**changes):
    transformer = Transformer(**SMALL, **AS_PUBLISHED)
    autoencoder = AutoencoderKL(**AUTOENCODER)
    parts = {
        "transformer": filled(transformer, *transformer.example_inputs()),
        "vae": filled(autoencoder, autoencoder.example_image()),
    }
    return PublishedPipeline(dit.FAMILY, parts, (), schedules.linear(), "eps", SCHEDULER, INDEX)._replace(**changes)


def outputs(ours, variables, inputs):
    x, t, label = inputs
    return jax.jit(ours.apply)(variables, x, jnp.asarray(t), {"label": jnp.asarray(label)})


def their_outputs(peer, theirs, inputs):  # noqa: F811
    x, t, label = inputs
    return peer.run(lambda x: theirs(x, timestep=peer.tensor(t), class_labels=peer.tensor(label)), x)


def inputs_of(side):
    x = np.random.default_rng(0).normal(size=(3, side, side, 2)).astype(np.float32)
    return x, np.array([0, 37, 999]), np.array([0, 3, 5])


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_outputs_equal_those_of_diffusers(config, peer, tmp_path):  # noqa: F811
    theirs = peer.make("DiTTransformer2DModel", config)
    theirs.save_pretrained(tmp_path)
    ours, variables = load_transformer(tmp_path)
    for side in (config["sample_size"], 2 * config["sample_size"]):  # another size stretches the positions
        assert_equal(outputs(ours, variables, inputs_of(side)), their_outputs(peer, theirs, inputs_of(side)))
    stacked, like = transformer_of(read_json(tmp_path / "config.json"), "a config")
    assert (stacked, jax.tree.map(jnp.shape, like)) == (ours, jax.tree.map(jnp.shape, variables))


@pytest.mark.parametrize("scan", [False, True])
def test_ours_load_in_diffusers(scan, peer, tmp_path):  # noqa: F811
    """Also those of stacked blocks."""
    ours = Transformer(**SMALL, **AS_PUBLISHED, scan=scan)
    variables = filled(ours, *ours.example_inputs(), dtype=np.float32).params
    save_transformer(ours, variables, tmp_path)
    theirs = peer.load("DiTTransformer2DModel", tmp_path)
    assert_equal(outputs(ours, variables, inputs_of(8)), their_outputs(peer, theirs, inputs_of(8)))
    back = load_transformer(tmp_path, scan=scan)
    assert back[0] == ours
    jax.tree.map(np.testing.assert_array_equal, back[1], variables)


def test_a_whole_guided_picture_equals_that_of_diffusers(peer, tmp_path):  # noqa: F811
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiTPipeline(
        peer.make("DiTTransformer2DModel", SMALL | {"num_embeds_ada_norm": 1000}),  # diffusers' no class is 1000
        peer.make(
            "AutoencoderKL",
            AUTOENCODER
            | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        ),
        diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
        id2label=INDEX["id2label"],
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path)
    as_published = {"model_index.json": INDEX, "transformer/config.json": {"_class_name": "Transformer2DModel"}}
    for file, changes in as_published.items():
        write_json(tmp_path / file, read_json(tmp_path / file) | changes)
    published = load_pipeline(tmp_path)
    model = from_published(published)
    assert model.size == (16, 16) and model.shape == (8, 8, 2)
    cond = model.conditioning.of_prompts(["goldfish", " 4 "])
    np.testing.assert_array_equal(cond["label"], [1, 4])
    noise = np.random.default_rng(0).normal(size=(2, 8, 8, 2)).astype(np.float32)
    with mock.patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: peer.tensor(noise)):
        for guidance in (4.0, 1.0):
            options = {"guidance_scale": guidance, "num_inference_steps": 6, "output_type": "np"}
            expected = theirs([1, 4], **options).images
            keys = jax.random.split(jax.random.key(0), 2)
            images = from_noise(model, jnp.asarray(noise), cond, keys, sampler(published)(6, 1.0), guidance)
            pictures = np.clip(images / 2 + 0.5, 0, 1)
            assert expected.std() > 0.05 and np.abs(pictures - expected).max() < 1e-5


def test_a_pipeline_is_saved_and_loaded_as_it_is(tmp_path):
    save_pipeline(our_pipeline(), tmp_path / "a", np.float16)
    index = read_json(tmp_path / "a" / "model_index.json")
    assert index["_class_name"] == "DiTPipeline" and index["id2label"] == INDEX["id2label"]
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    back = load_pipeline(tmp_path / "a")
    scanned = load_pipeline(tmp_path / "a", scan=True)
    assert "transformer_blocks_each" in scanned.denoiser.params["params"] and scanned.denoiser.module.scan
    save_pipeline(scanned, tmp_path / "c", np.float16)
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "c")
    assert back.family == dit.FAMILY and back.denoiser.module == our_pipeline().denoiser.module
    save_pipeline(back, tmp_path / "b", np.float16)
    assert tensors_of(tmp_path / "a") == tensors_of(tmp_path / "b")


def test_diffusers_loads_what_is_saved(peer, tmp_path):  # noqa: F811
    diffusers = pytest.importorskip("diffusers")
    save_pipeline(our_pipeline(), tmp_path)
    theirs = diffusers.DiTPipeline.from_pretrained(tmp_path)
    assert theirs.labels["Tinca tinca"] == 0 and type(theirs.scheduler).__name__ == "DDIMScheduler"
    part = our_pipeline().denoiser
    assert_equal(outputs(*part, inputs_of(8)), their_outputs(peer, theirs.transformer, inputs_of(8)))


def test_verify_compares_every_block(peer, tmp_path, capsys):  # noqa: F811
    save_pipeline(our_pipeline(), tmp_path)
    assert verify.main([str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("transformer: ")]
    compared = {line[1]: float(line[2]) for line in lines if len(line) == 3}
    assert {"pos_embed", "transformer_blocks.0", "transformer_blocks.2", "proj_out_1", "proj_out_2"} <= compared.keys()
    assert max(compared.values()) < 2e-5


def test_a_table_of_positions_in_the_file_is_left_out(tmp_path):
    save_pipeline(our_pipeline(), tmp_path)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in read_file(file).items()}
    write_file(file, tensors | {"pos_embed.pos_embed": np.zeros((1, 16, 20), np.float32)})
    assert load_pipeline(tmp_path).denoiser.module == our_pipeline().denoiser.module


def test_a_lora_of_its_attention_is_merged(tmp_path):
    pipeline = our_pipeline()
    variables = pipeline.denoiser.params
    updates = jax.tree.map(lambda leaf: leaf + 0.1, lora.init(variables, 2, jax.random.key(0)))
    save_lora(tmp_path / "a.safetensors", updates, 0.5, part="transformer")
    merged = merge_lora(pipeline, tmp_path / "a.safetensors").denoiser
    expected = outputs(pipeline.denoiser.module, lora.with_updates(variables, updates, 0.5), inputs_of(8))
    assert difference(outputs(*merged, inputs_of(8)), expected) < 1e-5
    assert difference(outputs(*pipeline.denoiser, inputs_of(8)), expected) > 1e-3


def test_a_model_of_classes_says_what_it_knows():
    model = from_published(our_pipeline())
    assert model.conditioning.null == {"label": 5}
    with pytest.raises(ValueError, match=r"a number in 0\.\.4, or a name such as 'tench', got 'dog'"):
        model.conditioning.of_prompts(["dog"])
    with pytest.raises(ValueError, match="DiT has classes and no tokens"):
        generator(our_pipeline())
    with pytest.raises(ValueError, match="multiples of 4 pixels, got 18 and 16"):
        model.resized((18, 16))


def test_parts_that_do_not_fit_are_refused():
    pipeline = our_pipeline()
    wider = pipeline.denoiser._replace(module=pipeline.denoiser.module.clone(in_channels=4))
    with pytest.raises(ValueError, match="a transformer of 2 input channels"):
        from_published(pipeline.with_denoiser(wider))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm_type": "ada_norm_single"}, "norm_type='ada_norm_single' is not supported"),
        ({"_class_name": "Transformer2DModel", "cross_attention_dim": 8}, "cross_attention_dim=8 is not supported"),
        ({"norm_elementwise_affine": True}, "has classes, and norms without learned scales"),
        ({"num_embeds_ada_norm": None}, "has classes, and norms without learned scales"),
        ({"activation_fn": "mish"}, "activation_fn must be one of"),
        (
            {"_class_name": "FluxTransformer2DModel"},
            "expected one of DiTTransformer2DModel, .*, got FluxTransformer2DModel",
        ),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        transformer_of({"_class_name": "DiTTransformer2DModel"} | SMALL | changes, "config.json")


def test_our_own_kinds_survive_a_round_trip(tmp_path):
    ours = Transformer(
        **{"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": (8, 4)},
        **{"text": "joint", "cross_attention_dim": 6, "modulation": "shared", "norm": "rms_norm"},
        **{"norm_elementwise_affine": True, "qk_norm": "rms_norm", "positions": None, "axes_dims_rope": (2, 4, 2)},
        **{"target_embedding": True, "time_cond_proj_dim": 4, "interval_embedding": True, "scan": True},
    )
    part = filled(ours, *ours.example_inputs(), dtype=np.float32)
    save_transformer(*part, tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config["_class_name"] == "Transformer" and "scan" not in config
    assert "transformer_blocks.1.attn1.norm_q.weight" in read_file(tmp_path / "diffusion_pytorch_model.safetensors")
    back = load_transformer(tmp_path, scan=True)
    assert back[0] == ours
    jax.tree.map(np.testing.assert_array_equal, back[1], part.params)
    assert load_transformer(tmp_path)[0] == ours.clone(scan=False)

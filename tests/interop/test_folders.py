"""Model folders: ours survive a round trip, those of diffusers load here and agree, and ours load in diffusers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop import load_autoencoder, load_unet, save_autoencoder, save_unet
from diffusion_jax.interop.folders import autoencoder_of
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.unet import UNet

LEVELS = {"block_out_channels": (16, 32), "norm_num_groups": 4}
TEXT = {  # as Stable Diffusion 1
    **LEVELS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
TUPLES = {  # as Stable Diffusion 2 and its successors
    **TEXT,
    "layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (2, 1),
    "only_cross_attention": (True, False),
    "use_linear_projection": True,
}
SDXL = {
    **TEXT,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4, 8),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 7 + 6 * 8,
}
SSD = {  # as the distilled SSD-1B: each attention has its own depth, up and down differ, the middle is one block
    **SDXL,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 1], [1, 1]],
    "reverse_transformer_layers_per_block": [[1, 1, 3], [2, 1, 1], 1],
}
POOLED = {**TEXT, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 7}
CLASSES = {  # as ADM
    **LEVELS,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "num_class_embeds": 11,
    "resnet_time_scale_shift": "scale_shift",
}
CIFAR = {  # as DDPM
    **CLASSES,
    "attention_head_dim": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
UNETS = {
    "text": ("UNet2DConditionModel", TEXT, (8, 8)),
    "text, odd size": ("UNet2DConditionModel", TEXT, (9, 7)),
    "tuples": ("UNet2DConditionModel", TUPLES, (8, 8)),
    "text and classes": ("UNet2DConditionModel", TEXT | {"num_class_embeds": 11}, (8, 8)),
    "inpainting": ("UNet2DConditionModel", TEXT | {"in_channels": 9}, (8, 8)),
    "upcast": ("UNet2DConditionModel", TEXT | {"upcast_attention": True}, (8, 8)),
    "only cross-attention": ("UNet2DConditionModel", TEXT | {"only_cross_attention": True}, (8, 8)),
    "sdxl": ("UNet2DConditionModel", SDXL, (8, 8)),
    "ssd": ("UNet2DConditionModel", SSD, (8, 8)),
    "pooled": ("UNet2DConditionModel", POOLED, (8, 8)),
    "no middle": ("UNet2DConditionModel", TEXT | {"mid_block_type": None}, (8, 8)),
    "classes": ("UNet2DModel", CLASSES, (8, 8)),
    "cifar": ("UNet2DModel", CIFAR, (8, 8)),
    "no attention in the middle": ("UNet2DModel", CIFAR | {"add_attention": False}, (8, 8)),
}
AUTOENCODER = {**LEVELS, "layers_per_block": 1, "latent_channels": 2}


def unet_inputs(config, size):
    rng = np.random.default_rng(0)
    out = config.get("out_channels", 4)
    x, inputs = rng.normal(size=(2, *size, config.get("in_channels", 4))), {}
    if x.shape[-1] > out:
        x, inputs["known"] = np.split(x, [out], axis=-1)
    if "cross_attention_dim" in config:
        inputs["text"] = rng.normal(size=(2, 5, config["cross_attention_dim"]))
        if not np.any(config.get("only_cross_attention")):  # whose first attention forgets the mask in diffusers
            inputs["mask"] = np.arange(5) < np.array([[3], [5]])
    if config.get("num_class_embeds"):
        inputs["label"] = np.array([1, 10])
    if config.get("projection_class_embeddings_input_dim"):
        inputs["text_embeds"] = rng.normal(size=(2, 7))
    if config.get("addition_embed_type"):
        inputs["time_ids"] = np.array([[64.0, 48, 0, 0, 64, 48], [32.0, 32, 8, 4, 64, 64]])
    inputs = x, np.array([3, 700]), inputs
    return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32 if value.dtype == float else None), inputs)


def assert_near(ours, theirs):
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()


@pytest.fixture(scope="module")
def peer():
    """diffusers on one thread of torch, and what this file asks of it."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.set_num_threads(1)

    class Peer:
        def make(self, name, config):
            torch.manual_seed(0)
            model = getattr(diffusers, name)(**config).eval()
            for parameter in model.parameters():  # biases and scales start as 0 and 1, which would hide a mistake
                parameter.data += 0.1 * torch.randn_like(parameter)
            return model

        def load(self, name, folder):
            model, report = getattr(diffusers, name).from_pretrained(folder, output_loading_info=True)
            assert not any(report.values()), report
            return model.eval()

        def run(self, function, *images):
            with torch.no_grad():
                out = function(*map(self.tensor, images))
            out = getattr(out, "sample", out)
            return out.numpy().transpose(0, 2, 3, 1)

        def denoise(self, unet, inputs):
            """The U-Net of diffusers on the arguments of ours."""
            names = {"text": "encoder_hidden_states", "mask": "encoder_attention_mask", "label": "class_labels"}
            x, t, cond = inputs[0], inputs[1], dict(inputs[2])
            x = np.concatenate([x, cond.pop("known", x[..., :0])], axis=-1)
            others = {names.get(name, name): self.tensor(value) for name, value in cond.items()}
            added = {name: others.pop(name) for name in ("text_embeds", "time_ids") if name in others}
            if added:
                others |= (
                    {"added_cond_kwargs": added} if "time_ids" in added else {"class_labels": added["text_embeds"]}
                )
            others |= {"timestep": self.tensor(t)}
            return self.run(lambda x: unet(x, **others), x)

        def tensor(self, array):
            array = np.asarray(array)
            return torch.tensor(array.transpose(0, 3, 1, 2).copy() if array.ndim == 4 else array)

    return Peer()


@pytest.mark.parametrize("case", UNETS)
def test_unet_agrees_with_the_peer_both_ways(case, peer, tmp_path):
    name, config, size = UNETS[case]
    theirs = peer.make(name, config)
    theirs.save_pretrained(tmp_path / "theirs")
    inputs = unet_inputs(config, size)
    expected = peer.denoise(theirs, inputs)

    unet, variables = load_unet(tmp_path / "theirs")
    assert_near(jax.jit(unet.apply)(variables, *inputs), expected)

    save_unet(unet, variables, tmp_path / "ours")
    back = peer.load(name, tmp_path / "ours")
    np.testing.assert_array_equal(peer.denoise(back, inputs), expected)


@pytest.mark.parametrize("extra", [{}, {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1}])
def test_autoencoder_agrees_with_the_peer_both_ways(extra, peer, tmp_path):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    theirs = peer.make("AutoencoderKL", AUTOENCODER | blocks | extra)
    theirs.save_pretrained(tmp_path / "theirs")
    rng = np.random.default_rng(0)
    image, z = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 8, 6, 3), (2, 4, 3, 2)))
    moments = peer.run(lambda x: theirs.encode(x).latent_dist.parameters, image)
    decoded = peer.run(theirs.decode, z)

    autoencoder, variables = load_autoencoder(tmp_path / "theirs")
    assert_near(autoencoder.apply(variables, image, method="encode"), moments)
    assert_near(autoencoder.apply(variables, z, method="decode"), decoded)

    save_autoencoder(autoencoder, variables, tmp_path / "ours")
    back = peer.load("AutoencoderKL", tmp_path / "ours")
    np.testing.assert_array_equal(peer.run(back.decode, z), decoded)
    assert back.config.scaling_factor == theirs.config.scaling_factor
    assert back.config.shift_factor == theirs.config.shift_factor


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip(tmp_path, dtype):
    made = [
        (UNet(**TUPLES), load_unet, save_unet),
        (UNet(**CLASSES, mid_block_type="UNetMidBlock2D"), load_unet, save_unet),
        (AutoencoderKL(**AUTOENCODER), load_autoencoder, save_autoencoder),
    ]
    for i, (module, load, save) in enumerate(made):
        inputs = module.example_inputs() if isinstance(module, UNet) else (module.example_image(),)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        variables = jax.tree.map(lambda s: jnp.arange(s.size, dtype=jnp.float32).reshape(s.shape), shapes)
        save(module, variables, tmp_path / str(i), dtype)
        loaded, back = load(tmp_path / str(i))
        assert loaded == module
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(dtype)), back, variables)


def edited(folder, **changes):
    """A saved U-Net with a changed config.json."""
    unet = UNet(**TEXT)
    variables = jax.tree.map(
        lambda s: jnp.zeros(s.shape), jax.eval_shape(unet.init, jax.random.key(0), *unet.example_inputs())
    )
    save_unet(unet, variables, folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "expected a UNet2DConditionModel or UNet2DModel, got SD3"),
        ({"addition_embed_type": "text_time"}, "no network can be built from it"),
        ({"addition_embed_type": "image"}, r"addition_embed_type must be one of \(None, 'text_time'\), got 'image'"),
        ({"class_embed_type": "timestep"}, r"class_embed_type must be one of \(None, 'projection'\), got 'timestep'"),
        ({"num_attention_heads": 8}, "num_attention_heads=8 is not supported"),
        ({"block_out_channels": "wide"}, "no network can be built from it"),
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported"),
        ({"mid_block_type": "UNetMidBlock2D"}, "unknown [0-9]+ tensors: mid_block.attentions.0"),
        (
            {
                "mid_block_type": "UNetMidBlock2D",
                "down_block_types": ["DownBlock2D"] * 2,
                "up_block_types": ["UpBlock2D"] * 2,
            },
            "supported only in UNet2DModel",
        ),
        ({"transformer_layers_per_block": [[1, 2], 1]}, "expected 1 numbers of transformer blocks, one for each"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "unknown [0-9]+ tensors: down_blocks.0.attentions.0"),
        ({"block_out_channels": [16, 64]}, "misshapen"),
        ({"layers_per_block": 2}, "lacks [0-9]+ tensors: "),
    ],
)
def test_what_cannot_be_honoured_is_one_line(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        load_unet(edited(tmp_path, **changes))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_fields_that_change_nothing_are_taken(tmp_path):
    unet, _ = load_unet(edited(tmp_path, act_fn="silu", num_attention_heads=None, dual_cross_attention=False, _new=1))
    assert unet == UNet(**TEXT)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file; expected the folder of one model"):
        load_unet(tmp_path)
    edited(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"\.bin is a pickle, which may contain code"):
        load_unet(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected the weights of one model there"):
        load_unet(tmp_path)


def test_shards_and_the_half_precision_variant(tmp_path):
    from safetensors.numpy import load_file, save_file

    whole = edited(tmp_path) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    half = whole.rename(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    load_unet(tmp_path)
    half.unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    load_unet(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scaling_factor", None, "scaling_factor: expected a finite number, got None"),
        ("scaling_factor", "0.18", "scaling_factor: expected a finite number, got '0.18'"),
        ("scaling_factor", float("nan"), "scaling_factor: expected a finite number, got nan"),
        ("shift_factor", "none", "shift_factor: expected a finite number, got 'none'"),
        ("down_block_types", None, "down_block_types must be 2 times 'DownEncoderBlock2D'"),
        ("block_out_channels", None, "up_block_types must be 1 times|down_block_types must be 1 times"),
    ],
)
def test_fields_of_an_autoencoder_of_another_type_are_one_line(field, value, message):
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    config = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 16], **blocks, field: value}
    with pytest.raises(ValueError, match=f"vae/config.json: ({message})"):
        autoencoder_of(config, "vae/config.json")

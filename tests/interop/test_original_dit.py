"""DiT and SiT in the files of their authors, against their network written down in a few lines of torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop import load_pipeline, save_pipeline
from diffusion_jax.interop.families import dit
from diffusion_jax.interop.folders import save_autoencoder
from diffusion_jax.interop.tensors import write_file
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.token_layers import sincos_positions
from diffusion_jax.pipelines import text_to_image
from diffusion_jax.pipelines.published import from_published
from tests.interop.test_dit import filled

torch = pytest.importorskip("torch")
WIDTH, HEADS, CLASSES, CHANNELS, SIZE = 384, 6, 3, 4, 8
SHAPES = {
    "x_embedder.proj": (WIDTH, CHANNELS, 2, 2),
    "t_embedder.mlp.0": (WIDTH, 256),
    "t_embedder.mlp.2": (WIDTH, WIDTH),
    "blocks.0.attn.qkv": (3 * WIDTH, WIDTH),
    "blocks.0.attn.proj": (WIDTH, WIDTH),
    "blocks.0.mlp.fc1": (4 * WIDTH, WIDTH),
    "blocks.0.mlp.fc2": (WIDTH, 4 * WIDTH),
    "blocks.0.adaLN_modulation.1": (6 * WIDTH, WIDTH),
    "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    "final_layer.linear": (8 * CHANNELS, WIDTH),
}
SHAPES |= {name.replace("blocks.0", "blocks.1"): shape for name, shape in SHAPES.items() if "blocks.0" in name}


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.normal(size=s, scale=np.prod(s[1:]) ** -0.5) for name, s in SHAPES.items()}
    tensors |= {f"{name}.bias": rng.normal(size=s[0], scale=0.1) for name, s in SHAPES.items()}
    tensors["y_embedder.embedding_table.weight"] = rng.normal(size=(CLASSES + 1, WIDTH))
    tensors["pos_embed"] = sincos_positions((SIZE // 2, SIZE // 2), WIDTH)[None]
    return {name: torch.tensor(tensor, dtype=torch.float32) for name, tensor in tensors.items()}


def original(w, x, t, y):
    """Output of DiT for x (B, C, H, W), t (B,) and y (B,): the mean."""
    f = torch.nn.functional

    def linear(name, x):
        return f.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def modulated(x, shift, scale):
        return f.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def attention(name, x):
        q, k, v = linear(f"{name}.qkv", x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return linear(f"{name}.proj", f.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    tokens = f.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2).flatten(2).transpose(1, 2)
    tokens = tokens + w["pos_embed"]
    angles = t[:, None].float() * 10000 ** (-torch.arange(128) / 128)
    waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    c = linear("t_embedder.mlp.2", f.silu(linear("t_embedder.mlp.0", waves)))
    c = f.silu(c + w["y_embedder.embedding_table.weight"][y])
    for block in ("blocks.0", "blocks.1"):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{block}.adaLN_modulation.1", c).chunk(6, dim=1)
        tokens = tokens + gate1[:, None] * attention(f"{block}.attn", modulated(tokens, shift1, scale1))
        h = f.gelu(linear(f"{block}.mlp.fc1", modulated(tokens, shift2, scale2)), approximate="tanh")
        tokens = tokens + gate2[:, None] * linear(f"{block}.mlp.fc2", h)
    tokens = linear(
        "final_layer.linear", modulated(tokens, *linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1))
    )
    side = SIZE // 2
    image = tokens.reshape(len(x), side, side, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, SIZE, SIZE)
    return image[:, :CHANNELS]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    module = AutoencoderKL(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=CHANNELS)
    save_autoencoder(*filled(module, module.example_image()), folder)
    return folder


def saved(weights, folder, kind):
    path = folder / f"model.{kind}"
    if kind == "pt":
        torch.save(weights, path)
    else:
        write_file(path, {name: tensor.numpy() for name, tensor in weights.items()})
    return path


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_the_denoiser_is_the_original(weights, vae, tmp_path, prediction, kind):
    path = saved(weights, tmp_path, kind)
    published = load_pipeline(path, prediction=prediction, allow_pickle=kind == "pt", parts={"vae": vae})
    assert published.family.name == {"eps": "DiT", "flow": "SiT"}[prediction]
    model = from_published(published)
    rng = np.random.default_rng(1)
    x, label, part = rng.normal(size=(2, SIZE, SIZE, CHANNELS)), np.array([1, CLASSES]), np.array([0.3, 0.8])
    level = model.schedule(jnp.asarray(part * model.schedule.t_max))
    ours = model.denoiser(model.params)(jnp.asarray(x, jnp.float32), level, {"label": jnp.asarray(label)})
    time = 1 - part if prediction == "flow" else part * 999  # of SiT, 0 is noise
    theirs = original(weights, torch.tensor(x).float().permute(0, 3, 1, 2), torch.tensor(time), torch.tensor(label))
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    said = ours.x0 - ours.eps if prediction == "flow" else ours.eps
    np.testing.assert_allclose(said, theirs, atol=2e-4)


def test_sit_samples_by_even_steps_and_survives_an_export(weights, vae, tmp_path):
    published = load_pipeline(saved(weights, tmp_path, "safetensors"), prediction="flow", parts={"vae": vae}, scan=True)
    model = from_published(published)
    plan = model.published_solvers["published"](4)
    np.testing.assert_allclose(plan.level.sigma, [1, 0.75, 0.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose(plan.level.t, plan.level.sigma, rtol=1e-6)
    save_pipeline(published, tmp_path / "saved")
    back = load_pipeline(tmp_path / "saved")
    assert back.family == dit.SIT and back.prediction == "flow"
    cond, keys = model.conditioning.of_prompts(["1"]), jax.random.split(jax.random.key(0), 1)
    first, second = (
        text_to_image(each, cond, keys, each.published_solvers["published"](4))
        for each in (model, from_published(back))
    )
    np.testing.assert_allclose(first, second, atol=1e-4)


def test_what_a_file_does_not_say_is_asked_for(weights, vae, tmp_path):
    path = saved(weights, tmp_path, "safetensors")
    with pytest.raises(ValueError, match="set prediction to eps for DiT, and to flow for SiT"):
        load_pipeline(path, parts={"vae": vae})
    with pytest.raises(ValueError, match="has no autoencoder: name the folder of one as `vae`"):
        load_pipeline(path, prediction="eps")
    with pytest.raises(ValueError, match=r"vae='.*' is for a file without an autoencoder, and .* is a folder"):
        load_pipeline(tmp_path, parts={"vae": vae})
    with pytest.raises(ValueError, match="is a pickle"):
        load_pipeline(saved(weights, tmp_path, "pt"), prediction="eps", parts={"vae": vae})
    moved = weights | {"pos_embed": weights["pos_embed"].roll(1, dims=1)}
    with pytest.raises(ValueError, match="pos_embed has other positions"):
        load_pipeline(saved(moved, tmp_path, "safetensors"), prediction="eps", parts={"vae": vae})

"""What all families of flow do alike: verified, saved, trained, drawn, served, and refused by one clear line."""

import functools
import shutil

import jax
import numpy as np
import pytest

from configs import published
from diffusion_jax.interop import load_pipeline, save_pipeline, verify
from diffusion_jax.interop.lora import merge_lora
from diffusion_jax.interop.names import to_torch
from diffusion_jax.interop.tensors import read_json, write_json
from diffusion_jax.pipelines.published import from_published
from diffusion_jax.serve import loading
from diffusion_jax.serve.drawing import Artist, Picture, Shared
from tests.interop.flow_pipelines import CHAT, SIZE, klein_pipeline, z_image_pipeline
from tests.interop.test_flux2_autoencoder import theirs  # noqa: F401  (a fixture)
from tests.interop.test_folders import peer  # noqa: F401  (a fixture)
from tests.interop.test_tokenizers import byte_pairs  # noqa: F401  (a fixture)
from tests.test_published import TRAIN, photographs, pictures, run  # noqa: F401  (fixtures)

BLOCKS = {
    "klein": {"single_transformer_blocks.1", "proj_out", "layers.26"},
    "z_image": {"noise_refiner.0", "context_refiner.0", "layers.1", "layers.1.feed_forward", "all_final_layer.2-1"},
}
SMALL = ["--config.data.size=16", "--config.sample.steps=2"]


@pytest.fixture(scope="module", params=BLOCKS)
def flow(request, peer, theirs, byte_pairs, tmp_path_factory):  # noqa: F811
    """Name of the family, diffusers' pipeline, its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    make = {
        "klein": functools.partial(klein_pipeline, peer, theirs),
        "z_image": functools.partial(z_image_pipeline, peer),
    }
    return request.param, make[request.param](byte_pairs, folder), folder / "pipeline"


@pytest.fixture(scope="module")
def checkpoint(flow):
    return flow[2]


@pytest.fixture
def copy(flow, tmp_path):
    return shutil.copytree(flow[2], tmp_path / "copy")


def test_verify_compares_every_block(flow, capsys):
    """Or says that it does not: the vectors of a modulation are arranged otherwise."""
    name, _, folder = flow
    assert verify.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    others = {line.split()[1] for line in printed.splitlines() if "not compared: the shape is (" in line}
    assert name != "klein" or {"double_stream_modulation_img", "norm_out"} <= others, printed
    lines = [line.split() for line in printed.splitlines()]
    compared = {block: float(number) for _, block, number in (line for line in lines if len(line) == 3)}
    assert BLOCKS[name] <= compared.keys()
    assert max(compared.values()) < 2e-5


def test_a_saved_pipeline_has_the_whole_text_encoder(flow, tmp_path):
    """As after fine-tuning: what was changed is written, the text encoder and the tokenizer are those it came with."""
    _, theirs, folder = flow  # noqa: F811
    first = load_pipeline(folder)
    changed = jax.tree.map(lambda leaf: leaf + 0.5, first.denoiser.params)
    save_pipeline(first.with_denoiser(first.denoiser._replace(params=changed)), tmp_path / "saved", source=folder)
    back = load_pipeline(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, back.denoiser.params, changed)
    assert back.index == first.index and back.scheduler == first.scheduler
    read = type(theirs).from_pretrained(tmp_path / "saved")
    for ours, whole in zip(read.text_encoder.parameters(), theirs.text_encoder.parameters(), strict=True):
        np.testing.assert_array_equal(ours.detach(), whole.detach())
    assert read.tokenizer.chat_template == CHAT


def test_a_changed_text_encoder_is_saved(flow, tmp_path):
    """As by a LoRA of it: what is changed is written in the type of the file, and nothing else is."""
    _, theirs, folder = flow  # noqa: F811
    first = load_pipeline(folder)
    part = first.parts["text_encoder"]
    params = jax.tree.map(np.array, part.params)
    params["params"]["layers_1"]["mlp"]["up_proj"]["kernel"] += 0.25
    changed = first._replace(parts={**first.parts, "text_encoder": part._replace(params=params)})
    save_pipeline(changed, tmp_path / "saved", source=folder)
    read = type(theirs).from_pretrained(tmp_path / "saved").text_encoder
    pairs = zip(theirs.text_encoder.named_parameters(), read.parameters(), strict=True)
    differences = {name: (ours - whole).detach().numpy() for (name, whole), ours in pairs if not (ours == whole).all()}
    assert [name.removeprefix("model.") for name in differences] == ["layers.1.mlp.up_proj.weight"]
    np.testing.assert_allclose(next(iter(differences.values())), 0.25, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, load_pipeline(tmp_path / "saved").text_encoders[0].params, params)


def test_another_prediction_or_scheduler_is_refused(copy):
    for prediction in ("eps", "v"):
        with pytest.raises(ValueError, match=f"its network predicts flow, .*: leave out prediction='{prediction}'"):
            load_pipeline(copy, prediction=prediction)
    write_json(copy / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler"})
    with pytest.raises(ValueError, match=r"(FLUX\.2 klein|Z-Image) needs FlowMatchEuler.* or .*, got DDIMScheduler"):
        load_pipeline(copy)


def test_prompts_with_weights_are_refused(flow):
    """Captions are text as they are, and so is what only looks similar."""
    conditioning = from_published(load_pipeline(flow[2]), SIZE).conditioning
    for prompt in ("a (red:1.3) fox", "a (red fox: .5 )", "(a:2)"):
        with pytest.raises(ValueError, match=r"prompt: \(.* is a weight, and this model reads plain text") as error:
            conditioning.of_prompts(["the fox", prompt])
        assert "\n" not in str(error.value)
    conditioning.of_records({"caption": ["a (red:1.3) fox"]})
    conditioning.of_prompts(["a (red) [fox] (at 16:30), 4:3"])


def test_a_folder_without_its_text_encoder_is_one_line(copy):
    index = read_json(copy / "model_index.json")
    write_json(copy / "model_index.json", index | {"text_encoder": [None, None]})
    with pytest.raises(ValueError, match="reads prompts by its text_encoder, and it was loaded without"):
        from_published(load_pipeline(copy))
    write_json(copy / "model_index.json", index)
    (copy / "text_encoder" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"text_encoder/config.json: no such file"):
        load_pipeline(copy)


@pytest.mark.slow
def test_it_is_drawn_and_served_alike(run, checkpoint, tmp_path):  # noqa: F811
    run("published", "--mode=sample", *SMALL, "--prompt=the quick fox", "--config.sample.guidance=3")
    (drawn,) = pictures(tmp_path / "published")
    assert drawn.shape == (16, 16, 3) and drawn.std() > 10
    config = published.get_config()
    config.checkpoint, config.data.size, config.sample.guidance = str(checkpoint), 16, 3.0
    loaded = loading.load(config, tmp_path / "served")
    facts = loading.facts(loaded)
    assert facts.guided and "published" in facts.solvers and "generate" in facts.tasks
    picture = Picture(Shared("generate", (16, 16), "published", "", steps=2), "the quick fox", "", 3.0, seed=0)
    (served,) = Artist(loaded.config, loaded.model).draw([picture])
    np.testing.assert_allclose(127.5 * (np.clip(served, -1, 1) + 1), drawn, atol=1.01)


@pytest.mark.slow
def test_fine_tuning_changes_what_is_drawn_and_exports_a_pipeline(run, flow, photographs, tmp_path):  # noqa: F811
    draw = ["--mode=sample", *SMALL, "--prompt=the quick fox"]
    run("published", *draw)
    before = pictures(tmp_path / "published")
    run("published", *TRAIN, *SMALL, f"--config.data.path={photographs}")
    run("published", *draw)
    tuned = pictures(tmp_path / "published")
    assert np.any(tuned[0] != before[0])
    run("published", "--mode=export", *SMALL)
    exported = tmp_path / "published" / "export"
    run("published", *draw, f"--config.checkpoint={exported}", f"--workdir={tmp_path}/again")
    np.testing.assert_array_equal(pictures(tmp_path / "again"), tuned)  # stored as they are
    type(flow[1]).from_pretrained(exported)
    assert verify.main([str(exported)]) == 0


@pytest.mark.slow
def test_a_lora_is_trained_drawn_with_and_read_by_diffusers(run, flow, photographs, tmp_path):  # noqa: F811
    draw = ["--mode=sample", *SMALL, "--prompt=the quick fox"]
    run("lora", *TRAIN, *SMALL, f"--config.data.path={photographs}")
    run("lora", *draw)
    run("lora", "--mode=export", *SMALL)
    file = tmp_path / "lora" / "export" / "lora.safetensors"
    run("published", *draw, f"--config.loras=('{file}',)")
    ours, merged = pictures(tmp_path / "lora"), pictures(tmp_path / "published")
    np.testing.assert_allclose(np.int32(ours), np.int32(merged), atol=1)
    _, theirs, folder = flow  # noqa: F811
    read = type(theirs).from_pretrained(folder)
    read.load_lora_weights(file)
    read.fuse_lora()
    read.unload_lora_weights()
    plain, updated = (
        to_torch(p.denoiser.params) for p in (load_pipeline(folder), merge_lora(load_pipeline(folder), file))
    )
    fused = {name: tensor.numpy() for name, tensor in read.transformer.state_dict().items()}
    changed = {name for name, tensor in plain.items() if np.abs(updated[name] - tensor).max() > 1e-5}
    assert len(changed) >= 8
    for name in changed:
        np.testing.assert_allclose(fused[name], updated[name], atol=1e-5)

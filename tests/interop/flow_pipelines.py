"""Small pipelines of flow with random weights, made and saved by diffusers."""

import pytest

from tests.interop.test_flux2 import SMALL as KLEIN_FIELDS
from tests.interop.test_flux2_autoencoder import SMALL as FLUX2
from tests.interop.test_folders import AUTOENCODER
from tests.interop.test_tokenizers import qwen_folder
from tests.interop.test_z_image import NAME as Z_IMAGE
from tests.interop.test_z_image import SMALL as Z_IMAGE_FIELDS

CHAT = (  # what Qwen3's own template makes of one message
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
SIZE = (16, 24)
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}
FLUX1 = AUTOENCODER | {  # but for the widths as published
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 3,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def qwen3(layers, byte_pairs, folder):
    """A language model of transformers, and its tokenizer."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=len(byte_pairs[0]) + 8,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    encoder = transformers.Qwen3ForCausalLM(config).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tokens = qwen_folder(folder / "words", byte_pairs, chat_template=CHAT)
    return encoder, transformers.Qwen2TokenizerFast.from_pretrained(tokens)


def klein_pipeline(peer, autoencoder, byte_pairs, folder):
    """diffusers' pipeline of FLUX.2 klein, saved in folder / "pipeline". autoencoder: config -> the network."""
    diffusers = pytest.importorskip("diffusers")
    encoder, tokenizer = qwen3(28, byte_pairs, folder)
    transformer = peer.make("Flux2Transformer2DModel", KLEIN_FIELDS | {"in_channels": 12, "joint_attention_dim": 24})
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    return saved(diffusers.Flux2KleinPipeline(scheduler, autoencoder(FLUX2), encoder, tokenizer, transformer), folder)


def z_image_pipeline(peer, byte_pairs, folder):
    """diffusers' pipeline of Z-Image, saved in folder / "pipeline"."""
    diffusers = pytest.importorskip("diffusers")
    encoder, tokenizer = qwen3(3, byte_pairs, folder)
    transformer, autoencoder = (
        peer.make(Z_IMAGE, Z_IMAGE_FIELDS | {"cap_feat_dim": 8}),
        peer.make("AutoencoderKL", FLUX1),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    return saved(diffusers.ZImagePipeline(scheduler, autoencoder, encoder.model, tokenizer, transformer), folder)


def saved(pipeline, folder):
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "pipeline")
    return pipeline


def theirs_drawn(pipeline, prompts, latents, steps, **inputs):
    """The pictures of a pipeline of diffusers with guidance 4, from the noise `latents`."""
    height, width = SIZE
    inputs |= {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": 4.0}
    return pipeline(prompt=prompts, latents=latents, output_type="np", **inputs).images

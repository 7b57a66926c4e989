"""Small pipelines of flow with random weights, made and saved by diffusers."""

import pytest

from tests.interop.test_folders import AUTOENCODER
from tests.interop.test_tokenizers import qwen_folder
from tests.interop.test_z_image import NAME as Z_IMAGE
from tests.interop.test_z_image import SMALL as Z_IMAGE_FIELDS

CHAT = (  # what Qwen3's own template makes of one message
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
SIZE = (16, 24)
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


def z_image_pipeline(peer, byte_pairs, folder):
    """diffusers' pipeline, saved in folder / "pipeline"."""
    diffusers = pytest.importorskip("diffusers")
    encoder, tokenizer = qwen3(3, byte_pairs, folder)
    pipeline = diffusers.ZImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        peer.make("AutoencoderKL", FLUX1),
        encoder.model,
        tokenizer,
        peer.make(Z_IMAGE, Z_IMAGE_FIELDS | {"cap_feat_dim": 8}),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "pipeline")
    return pipeline

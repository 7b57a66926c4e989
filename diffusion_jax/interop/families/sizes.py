"""Sizes of published checkpoints: the config.json of each network, so that what they need is known without weights."""

from diffusion_jax.interop.families.latent_diffusion import SCHEDULER

UNET_1 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
UNET_2 = UNET_1 | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
UNET_XL = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
AUTOENCODER = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
CLIP_H = CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
CLIP_BIG_G = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
FLUX2_AUTOENCODER = AUTOENCODER | {
    "_class_name": "AutoencoderKLFlux2",
    "latent_channels": 32,
    "patch_size": (2, 2),
    "batch_norm_eps": 1e-4,
}
FLUX2_KLEIN_4B = {
    "_class_name": "Flux2Transformer2DModel",
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
FLUX1_AUTOENCODER = AUTOENCODER | {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
EPS, V = ({"prediction_type": name} for name in ("epsilon", "v_prediction"))
SD15 = {"unet": UNET_1, "vae": AUTOENCODER, "text_encoder": CLIP_L, "scheduler": SCHEDULER | EPS}
SD21 = {"unet": UNET_2, "vae": AUTOENCODER, "text_encoder": CLIP_H, "scheduler": SCHEDULER | V}
SDXL = {
    "unet": UNET_XL,
    "vae": AUTOENCODER,
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_BIG_G,
    "scheduler": SCHEDULER | EPS,
}
KLEIN_4B = {
    "transformer": FLUX2_KLEIN_4B,
    "vae": FLUX2_AUTOENCODER,
    "text_encoder": QWEN3_4B,
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "shift": 3.0},
}
Z_IMAGE, Z_IMAGE_TURBO = (
    {
        "transformer": {"_class_name": "ZImageTransformer2DModel", "axes_lens": (1536, 512, 512)},
        "vae": FLUX1_AUTOENCODER,
        "text_encoder": QWEN3_4B,
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift},
    }
    for shift in (6.0, 3.0)
)

"""Vision transformers (Dosovitskiy et al. 2020) whose features metrics compare: CLIP's image encoder (Radford et al.
2021) and DINOv2 (Oquab et al. 2023), which are one network with other options.

Layer names are those of transformers' `CLIPVisionModelWithProjection`.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.models.layers import Dense
from diffusion_jax.models.text.clip import stack


class Patches(nn.Module):
    """A linear map of each patch x patch pixels."""

    features: int
    patch: int
    use_bias: bool

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch patches features"]:
        b, height, width, channels = images.shape
        rows, columns, patch = height // self.patch, width // self.patch, self.patch
        x = images.reshape(b, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (patch, patch, channels, self.features))
        y = x.reshape(b, rows * columns, -1) @ kernel.reshape(-1, self.features)
        return y + self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else y


class Embeddings(nn.Module):
    """A class token and the patches, with positions."""

    features: int
    patch: int
    use_bias: bool

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch tokens features"]:
        patches = Patches(self.features, self.patch, self.use_bias, name="patch_embedding")(images)
        class_token = self.param("class_embedding", nn.initializers.normal(0.02), (self.features,))
        tokens = jnp.concatenate([jnp.broadcast_to(class_token, (len(images), 1, self.features)), patches], axis=1)
        return tokens + nn.Embed(tokens.shape[1], self.features, name="position_embedding")(jnp.arange(tokens.shape[1]))


class VisionTransformer(nn.Module):
    """The normalized class token after all layers."""

    embeddings: Callable[..., nn.Module]
    encoder: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    pre_norm: bool

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch features"]:
        x = self.embeddings(name="embeddings")(images)
        x = self.norm(name="pre_layrnorm")(x) if self.pre_norm else x
        tokens, _ = self.encoder(name="encoder")(x)
        return self.norm(name="post_layernorm")(tokens[:, 0])


class ImageEncoder(nn.Module):
    """Images of image_size pixels on a side, normalized for the encoder -> one feature vector each.

    Field names follow transformers' `CLIPVisionConfig`, and so do the defaults.

    projection_dim: of the space that CLIP shares with texts. None for no projection, as in DINOv2.
    pre_norm: normalize before the layers, as in CLIP.
    patch_bias: in the map of the patches, as in DINOv2.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int | None = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pre_norm: bool = True
    patch_bias: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch features"]:
        """Raises ValueError for images of another size."""
        if images.shape[1:3] != (self.image_size, self.image_size) or self.image_size % self.patch_size:
            raise ValueError(
                f"this encoder reads images of {self.image_size}x{self.image_size} in patches of {self.patch_size}, "
                f"got {images.shape[1]}x{images.shape[2]}"
            )
        x = VisionTransformer(
            functools.partial(Embeddings, self.hidden_size, self.patch_size, self.patch_bias),
            stack(self, jnp.float32, causal=False),
            functools.partial(nn.LayerNorm, self.layer_norm_eps),
            self.pre_norm,
            name="vision_model",
        )(images)
        if self.projection_dim is None:
            return x
        return Dense(self.projection_dim, use_bias=False, name="visual_projection")(x)

    def example_inputs(self) -> tuple[Float[Array, "1 height width 3"]]:
        """The smallest valid arguments of `init`."""
        return (jnp.zeros((1, self.image_size, self.image_size, 3)),)

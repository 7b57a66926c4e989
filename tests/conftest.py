"""Every public signature's shapes and types are checked while the tests run."""

from jaxtyping import install_import_hook

install_import_hook("diffusion_jax", "beartype.beartype")

"""Every public signature's shapes and types are checked while the tests run.

Hypothesis draws the same examples on every run; `pytest --hypothesis-profile=default` draws new ones.
"""

import hypothesis
from jaxtyping import install_import_hook

install_import_hook("diffusion_jax", "beartype.beartype")
hypothesis.settings.register_profile("repeatable", derandomize=True, print_blob=True)
hypothesis.settings.load_profile("repeatable")

"""Config -> values. The only place where strings become functions.

A wrong value is found by building what it describes, before the work starts.

fields, ranges: what a config may contain. flags: the command line. agreement: whether the parts fit together.
model, encoders, data, objective, sampling: what a config describes. initial, weights: what training starts from, and
trained weights. shipped: the files that come with the program.
"""

from diffusion_jax.build import agreement, data, fields, model, objective, sampling, shipped, weights

__all__ = ["agreement", "data", "fields", "model", "objective", "sampling", "shipped", "weights"]

"""Diffusion models on JAX: a schedule, a denoiser and a solver, and the system around them."""

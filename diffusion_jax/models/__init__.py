"""Networks in Flax Linen. Submodules have the names of published checkpoints."""

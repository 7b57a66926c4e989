"""Training: state, one step in parallel over devices, the loop, checkpoints and logging."""

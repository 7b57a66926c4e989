"""The mathematics of diffusion: schedules, forward process, solvers as tables, guidance and the one sampling loop."""

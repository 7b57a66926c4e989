"""The mathematics of diffusion: schedules, parameterizations, guidance, solvers as tables and one sampling loop."""

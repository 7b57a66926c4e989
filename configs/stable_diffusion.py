from configs.published import get_config  # noqa: F401  (the config's earlier name)

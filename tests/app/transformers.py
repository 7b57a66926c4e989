"""Configs of a tiny transformer of digits: `plain`, `single` (blocks compiled one by one), `flow_map` and `lora`."""

from configs import common, transformer


def get_config(preset="plain"):
    config = transformer.get_config()
    config.model.update(num_layers=2, num_attention_heads=2, attention_head_dim=8, axes_dims_rope=(4, 4))
    config.train.update(steps=6, batch_size=8, log_every=3, checkpoint_every=3)
    config.optimizer.update(warmup=0, learning_rate=1e-2, decay="constant")
    config.sample.update(prompts=("3", "7"), num_images=2, steps=3)
    config.model.scan = preset != "single"
    if preset == "flow_map":
        config.model.target_embedding = True
        config.objective.update(name="mean_flow", weight="", levels="")
        config.sample.update(solver="ddim", steps=2, guidance=1.0)
    if preset == "lora":
        config.lora = common.lora()
    return config

"""Train the diffusion model that a config describes, and sample from it.

python main.py --config=configs/latent_cfg.py --mode=train
python main.py --config=configs/latent_cfg.py --mode=sample --prompt "a red apple; a kitty"
"""

from diffusion_jax.app.command import run

if __name__ == "__main__":
    run()

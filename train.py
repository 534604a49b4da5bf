"""Train a few-step student of a pre-trained diffusion model: see ``python train.py --help``."""

from commands.train import main
from runtime import cli

if __name__ == "__main__":
    cli.run(main)

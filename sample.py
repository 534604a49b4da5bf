"""Sample images with a trained predictor, or with a classic or stochastic sampler."""

from commands.sample import main
from runtime import cli

if __name__ == "__main__":
    cli.run(main)

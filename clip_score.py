"""CLIP score and aesthetic score of images: see ``python clip_score.py --help``."""

from commands.clip_score import main
from runtime import cli

if __name__ == "__main__":
    cli.run(main)

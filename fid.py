"""FID and other metrics of images or of a model's samples: see ``python fid.py --help``."""

from commands.fid import main
from runtime import cli

if __name__ == "__main__":
    cli.run(main)

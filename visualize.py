"""Show the same seeds through several samplers, side by side."""

from commands.visualize import main
from runtime import cli

if __name__ == "__main__":
    cli.run(main)

"""Compare samplers at matched budgets, on the same seeds: see ``python compare.py --help``."""

from commands.compare import main
from runtime import cli

if __name__ == "__main__":
    cli.run(main)

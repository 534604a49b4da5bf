"""Measure how far samplers are from the exact solution of the ODE."""

from commands.solver_error import main
from runtime import cli

if __name__ == "__main__":
    cli.run(main)

"""How far a teacher's states at a student's times are from the exact solution of the ODE.

Trajectories on disk are known at the nodes of their own grid; a student reads them between the
nodes.  The table compares those states with the ones of a Heun teacher that walks along on the
student's refined grid, and with a walk of the student's own solver.
"""

from __future__ import annotations

import click
import torch
from torch import Tensor

from commands.help import SETTINGS
from commands.options import device_option
from denoisers.registry import ModelSource
from runtime import cli
from runtime.dist import world
from solvers.driver import integrate
from solvers.grids import Grid
from solvers.oracle import dopri5
from solvers.registry import make_solver
from teachers.build import build_teacher
from teachers.curves import Curves
from teachers.trajectories import TrajectoryOptions, prepare

NODES, INSERTED, TOL = 4, 3, 1e-5
EXAMPLES = "Example:  python -m benchmarks.curves    (two minutes on one core)"


def distances(states: Tensor, exact: Tensor) -> list[float]:
    """Root mean square over pixels, for each of (T, B, C, H, W)."""
    return (states - exact).square().flatten(1).mean(1).sqrt().tolist()


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--number", type=click.IntRange(1), default=8, help="latents")
@device_option
def main(number: int, device: str | None) -> None:
    """Print the distance from the exact solution at each of a student's times."""
    source = ModelSource("cifar10-small")
    card = source.card()
    job = prepare(TrajectoryOptions(source, number=number, keep="all"))
    click.echo("| grid | noise level | on disk | Heun, M = 3 | DPM-Solver-2 + AFS, 5 NFE |")
    click.echo("|---|---:|---:|---:|---:|")
    with world(device) as here, torch.no_grad():
        model = source.load(here)
        stored = job.run(here, model)
        batch = stored.read(range(number))
        drawn = job.draw(model, range(number), here)
        curves = Curves(stored.times, batch.x, batch.x0, here.device)
        for schedule in ("logsnr", "polynomial"):
            grid = Grid(schedule, NODES).resolve(card)
            ts, x = grid.nodes(), curves.begin
            exact = dopri5(drawn.meter, x, ts, rtol=TOL, atol=TOL).x
            teacher = build_teacher("heun", *grid.refined(INSERTED))
            found = [
                distances(torch.stack([curves.at(t) for t in ts.tolist()]), exact),
                distances(teacher.visit(drawn.meter, x, drawn.process), exact),
                distances(
                    integrate(make_solver("dpm"), drawn.meter, x, ts, afs=True).x, exact
                ),
            ]  # fmt: skip
            for level, *errors in list(zip(ts.tolist(), *found, strict=True))[1:]:
                cells = " | ".join(f"{error:.4f}" for error in errors)
                click.echo(f"| {schedule} | {level:.4g} | {cells} |")


if __name__ == "__main__":
    cli.run(main)

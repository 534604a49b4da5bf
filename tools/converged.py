"""Sample a model without a solver's error: dopri5 on the probability-flow ODE, one PNG per seed.

What a perfect deterministic solver would make of the same seeds, and so the floor that a model
sets to all of them. The step size is controlled for a batch as a whole, so an image depends on
its neighbours within the tolerance. A killed run goes on where it stopped.

Examples:

    python tools/converged.py --seeds 0-9999 --outdir samples/converged
    python fid.py calc --images samples/converged
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from denoisers.conditions import Conditions  # noqa: E402
from denoisers.prior import start  # noqa: E402
from denoisers.registry import DTYPES, Model, ModelSource  # noqa: E402
from runtime import cli  # noqa: E402
from runtime.dist import World, world  # noqa: E402
from runtime.log import progress  # noqa: E402
from runtime.noise import SeedNoise  # noqa: E402
from runtime.record import RunRecord  # noqa: E402
from runtime.seeds import parse_seeds  # noqa: E402
from samplers.folder import Folder  # noqa: E402
from samplers.generate import Batch  # noqa: E402
from solvers.driver import Meter  # noqa: E402
from solvers.oracle import dopri5  # noqa: E402


@torch.inference_mode()
def converged(
    model: Model, seeds: tuple[int, ...], tol: float, dtype: torch.dtype, device: torch.device
) -> Batch:
    """The ODE's images of ``seeds``, from sigma_max to sigma_min, and one Euler step to 0."""
    card, noise = model.card, SeedNoise(seeds)
    meter = Meter(Conditions().bind(model, noise, device))
    ts = torch.tensor([card.sigma_max, card.sigma_min], dtype=torch.float64)
    x = start(card, noise, card.sigma_max, dtype, device)
    x = dopri5(meter, x, ts, rtol=tol, atol=tol).x[-1]
    x = meter(x, ts[-1]).x0
    return Batch(seeds, x, meter.nfe, model.decode(x), None)


def fill(
    folder: Folder, missing: list[int], model: Model, tol: float, dtype: torch.dtype, batch: int,
    here: World,
) -> float:  # fmt: skip
    """Make the images that the folder lacks; returns the mean number of evaluations."""
    spent = torch.zeros(2, dtype=torch.float64)
    mine, share = here.shard(missing), -(-batch // here.size)
    with progress(len(missing), "dopri5", "img", enabled=here.is_main) as bar:
        for i in range(0, len(mine), share):
            made = converged(model, tuple(mine[i : i + share]), tol, dtype, here.device)
            folder.save(made)
            count = len(made.seeds)
            spent += torch.tensor([made.nfe * count, count])
            bar.update(min(count * here.size, len(missing) - bar.n))
    nfe, count = here.sum_(spent).tolist()
    return nfe / max(count, 1)


@click.command(context_settings={"show_default": True})
@click.option("--dataset_name", default="cifar10-small", help="model")
@cli.model_options
@cli.seeds_option("0-9999")
@cli.batch_option(128)
@click.option("--tol", type=click.FloatRange(0, min_open=True), default=1e-3, help="rtol = atol")
@click.option("--outdir", required=True, help="folder of the images")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", help="of the network")
@cli.device_option
def main(
    dataset_name: str, seeds: str, batch: int, tol: float, outdir: str, dtype: str,
    device: str | None, **paths: Any,
) -> None:  # fmt: skip
    """Sample a model to convergence."""
    numbers = parse_seeds(seeds)
    with world(device) as here:
        source = ModelSource(dataset_name, **paths)
        Conditions().check(source.card(), numbers)
        model = source.load(dtype, here)
        options = {**paths, "seeds": seeds, "batch": batch, "dtype": dtype, "outdir": outdir}
        identity = {"name": model.card.name, "sha256": model.sha256}
        plan = {"solver": "dopri5", "tol": tol, "nfe_metered": None}
        record = RunRecord.make("converged", options, identity, plan)
        folder = Folder(Path(outdir))
        opened = folder.open(record, numbers) if here.is_main else None
        opened_record, missing = here.broadcast_object(opened) or (record, [])
        state = torch.promote_types(DTYPES[dtype], torch.float32)
        nfe = fill(folder, missing, model, tol, state, batch, here)
        if here.is_main:
            if missing:
                folder.close(opened_record, round(nfe))
            click.echo(f"{outdir}: {len(missing)} images made, {nfe:.1f} NFE each on average")


if __name__ == "__main__":
    cli.run(main)

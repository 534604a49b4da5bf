"""An image in about five network calls, inside ``diffusers``: a trained predictor as scheduler.

python examples/stable_diffusion.py my-pipeline --predictor 1 --prompt "a red apple" --seed 3
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder

from runtime import cli  # noqa: E402
from samplers.in_diffusers import use_predictor  # noqa: E402


@click.command(context_settings={"show_default": True})
@click.argument("pipeline")  # a folder, or the id of one on the hub
@click.option("--predictor", required=True, help="run number in exps/, its folder, or a file")
@click.option("--prompt", required=True)
@click.option("--guidance_rate", default=7.5, help="that of the predictor's training")
@click.option("--seed", default=0)
@click.option("--device", default="cpu")
@click.option("--out", default="image.png")
def main(
    pipeline: str,
    predictor: str,
    prompt: str,
    guidance_rate: float,
    seed: int,
    device: str,
    out: str,
) -> None:
    """Draw PROMPT with a pipeline of diffusers and one of our predictors."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(pipeline).to(device)
    scheduler = use_predictor(pipe, predictor)  # also makes it pipe.scheduler
    image = pipe(
        prompt,
        num_inference_steps=scheduler.num_inference_steps,
        guidance_scale=guidance_rate,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    image.save(out)
    click.echo(f"{out}: {scheduler.num_inference_steps} calls of the network")


if __name__ == "__main__":
    cli.run(main)

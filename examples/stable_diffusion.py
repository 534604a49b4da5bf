"""An image in about five network calls, inside ``diffusers``: a trained predictor as scheduler.

python -m examples.stable_diffusion my-pipeline --predictor 1 --prompt "a red apple" --seed 3
"""

from __future__ import annotations

import click
import torch

import amed
from commands.help import SETTINGS
from runtime import cli


@click.command(context_settings=SETTINGS)
@click.argument("pipeline")
@click.option("--predictor", required=True, help="number of a run in exps/, its folder, or a file")
@click.option("--prompt", required=True, help="text of the image")
@click.option("--guidance_rate", default=7.5, help="guidance, as in the predictor's training")
@click.option("--seed", default=0, help="seed of the initial noise")
@click.option("--device", default="cpu", help="cuda, mps or cpu")
@click.option("--out", default="image.png", help="file to write")
def main(
    pipeline: str,
    predictor: str,
    prompt: str,
    guidance_rate: float,
    seed: int,
    device: str,
    out: str,
) -> None:
    """Draw an image with a diffusers pipeline and a trained predictor.

    PIPELINE is a folder, or the id of a pipeline on the Hugging Face hub.
    """
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(pipeline).to(device)
    scheduler = amed.use_predictor(pipe, predictor)  # also becomes pipe.scheduler
    image = pipe(
        prompt,
        num_inference_steps=scheduler.num_inference_steps,
        guidance_scale=guidance_rate,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    image.save(out)
    click.echo(f"{out}: {scheduler.num_inference_steps} network calls")


if __name__ == "__main__":
    cli.run(main)

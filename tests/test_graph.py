"""Walks by graph: what is recorded, what is replayed, and that nobody can tell.

A fake stands in for CUDA's graphs: like them it computes nothing while it records, works on the
tensors that were there then, and writes its result in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from denoisers import registry
from denoisers.batch import SeededBatch
from denoisers.cards import Card
from denoisers.conditions import Conditions
from denoisers.families.edm import EDMDenoiser
from denoisers.families.precond import PRECONDITIONINGS, build
from plans.plan import Solve, run_plan
from plans.table import TableWalk, tabulate
from runtime.dist import World
from runtime.errors import UserError
from samplers import job
from samplers.generate import SampleBatch, generate
from samplers.graph import GraphedWalk, Recording, has_graph
from samplers.options import SamplerOptions
from samplers.sampler import Sampler
from solvers.registry import CLASSIC
from solvers.types import Denoised
from tests.sampler_models import GaussianModel, MixtureModel, make_card
from tests.test_samplers_generate import learned, sampler

CARD = replace(make_card(), family="edm")


@dataclass(eq=False)
class FakeGraphs:
    """Records like CUDA: the work's Python runs now and its kernels at every replay."""

    recorded: int = 0
    replayed: int = 0
    results: list[Tensor] = field(default_factory=list)

    def __call__(self, work: Callable[[], Tensor], device: torch.device) -> Recording:
        self.recorded += 1
        result = torch.full_like(work(), torch.nan)
        self.results.append(result)

        def replay() -> None:
            self.replayed += 1
            result.copy_(work())

        return Recording(result, replay)


def made(chosen: Sampler, batch: int, count: int = 7, card: Card = CARD, **more: object):
    model = MixtureModel(card)
    settings: dict = {"dtype": torch.float64, "device": "cpu", **more}
    batches: list[SampleBatch] = list(
        generate(chosen, model, range(3, 3 + count), batch=batch, **settings)
    )
    return torch.cat([part.images for part in batches]), batches


def table() -> Sampler:
    solved = sampler("ipndm", num_steps=5)
    return Sampler("table", (TableWalk(tabulate(solved.plan)),))


CHOSEN = {
    "heun": lambda: sampler("heun", num_steps=4),
    "unipc with afs": lambda: sampler("unipc", afs=True),
    "thresholding": lambda: sampler("dpmpp", thresholding=True),
    "table": table,
}


@pytest.mark.parametrize("name", CHOSEN)
def test_replayed_images_are_those_of_walks(name: str) -> None:
    """With a last batch that is filled up; NFE are those of one walk."""
    chosen, graphs = CHOSEN[name](), FakeGraphs()
    walked, plain = made(chosen, 3)
    replayed, batches = made(chosen, 3, record=graphs)
    assert torch.equal(replayed, walked)
    assert [part.seeds for part in batches] == [part.seeds for part in plain]
    assert [len(part.x) for part in batches] == [3, 3, 1]
    assert {part.nfe for part in batches} == {chosen.nfe}
    assert (graphs.recorded, graphs.replayed) == (1, 3)


def test_a_replay_does_not_change_images_that_were_handed_out() -> None:
    graphs = FakeGraphs()
    _, batches = made(sampler("euler"), 2, record=graphs)
    (result,) = graphs.results
    assert all(part.x.data_ptr() != result.data_ptr() for part in batches)
    assert not torch.equal(batches[0].x, batches[1].x)


@pytest.mark.parametrize(
    ("chosen", "card"),
    [
        (sampler("restart", num_steps=6), CARD),
        (sampler("edm", num_steps=5, S_churn=3.0), CARD),
        (sampler("ddpm", num_steps=5), CARD),
        (sampler("pds", num_steps=8, freq_mask_path="none"), CARD),
        (learned(), CARD),
        (sampler("euler"), make_card()),  # of another family
    ],
)
def test_what_has_no_graph_is_walked(chosen: Sampler, card: Card) -> None:
    graphs = FakeGraphs()
    assert not has_graph(chosen, card)
    plain, _ = made(chosen, 3, card=card)
    walked, _ = made(chosen, 3, card=card, record=graphs)
    assert torch.equal(walked, plain) and graphs.recorded == 0


def test_models_with_conditions_have_no_graph() -> None:
    euler = sampler("euler")
    assert has_graph(euler, CARD)
    assert not has_graph(euler, replace(CARD, label_dim=4))


def test_a_single_batch_is_walked_and_every_batch_has_one_shape() -> None:
    graphs, sizes = FakeGraphs(), []

    class Sized(GaussianModel):
        def bind(self, *given: object, **more: object):
            inner = super().bind()

            class Noted:
                cost = 1

                def __call__(self, x: Tensor, sigma: Tensor):
                    sizes.append(len(x))
                    return inner(x, sigma)

            return Noted()

    def run(count: int, batch: int, **more: object) -> set[int]:
        sizes.clear()
        list(generate(sampler("euler"), Sized(CARD), range(count), batch=batch, device="cpu",
                      **more))  # fmt: skip
        return set(sizes)

    assert run(5, 8, record=graphs) == {5} and graphs.recorded == 0
    assert run(5, 3) == {3, 2}
    assert run(5, 3, record=graphs) == {3} and graphs.recorded == 1
    assert run(5, 3, record=graphs, keep_trajectory=True) == {3} and graphs.recorded == 1


def test_another_shape_is_refused() -> None:
    plan = sampler("euler").plan
    assert isinstance(plan[0], Solve)
    batch = SeededBatch.open(
        MixtureModel(CARD), Conditions(), range(3), torch.float64, torch.device("cpu")
    )
    x = batch.start(80.0)
    walk = GraphedWalk(plan, batch, x, FakeGraphs())
    (final,) = walk(batch.meter, x)
    assert final.shape == x.shape and batch.meter.nfe == 5
    with pytest.raises(ValueError, match=r"graph of batches \(3, .* given one of \(2, "):
        next(walk(batch.meter, x[:2]))


def test_samplers_are_recorded_where_the_network_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the flag to `generate`, on a model of the family; nothing is compiled here."""
    graphs = FakeGraphs()
    compiled: list[object] = []
    monkeypatch.setattr(registry, "check_compiler", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compiled.append(type(net).__name__))
    monkeypatch.setattr(job, "cuda_graph", graphs)
    options = job.SampleOptions(
        sampler=SamplerOptions(sampler="euler", num_steps=3), seeds="0-4", batch=2,
        outdir=str(tmp_path / "a"), compile=True,
    )  # fmt: skip
    here = World(0, 1, torch.device("cpu"))
    job.prepare(options).run(here)
    assert compiled == ["SongUNet"] and (graphs.recorded, graphs.replayed) == (1, 3)
    plain = replace(options, compile=False, outdir=str(tmp_path / "b"))
    job.prepare(plain).run(here)
    for file in sorted((tmp_path / "b").glob("*.png")):
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()
    again = replace(plain, outdir=str(tmp_path / "a"), seeds="0-5")
    assert job.prepare(again).run(here).made == 1  # the folder goes on without it


def test_the_compiler_is_refused_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--compile does not pay on device 'cpu'.* 0\.93 to 1\.00"):
        registry.check_compiler(torch.device("cpu"))
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--compile needs triton"):
        registry.check_compiler(cuda)
    monkeypatch.setattr(registry, "find_spec", lambda name: object())
    registry.check_compiler(cuda)


class NoCopies(TorchDispatchMode):
    """Refuses what no graph can record: copies to the device; reading from "meta" fails anyway."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("to", "_to_copy", "copy_"):
            source = args[1] if func.overloadpacket.__name__ == "copy_" else args[0]
            assert source.device == made.device, f"{func} from {source.device} to {made.device}"
        return made


SETTINGS = {"img_resolution": 8, "img_channels": 3, "model_channels": 8, "channel_mult": [1, 1],
            "num_blocks": 1, "attn_resolutions": [4]}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PRECONDITIONINGS)
@torch.inference_mode()
def test_nothing_is_copied_between_devices_in_a_network(kind: str, dtype: torch.dtype) -> None:
    """On the device "meta", which has no values: a call that needs one of them fails there."""
    settings = {**SETTINGS, "M": 10} if kind == "iDDPMPrecond" else SETTINGS
    net = build({"class_name": kind, **settings}).eval().cast(dtype).to("meta")
    x, sigma = torch.empty(2, 3, 8, 8, device="meta"), torch.tensor(2.0, dtype=torch.float64)
    with NoCopies():
        EDMDenoiser(net, None)(x, sigma)


@torch.inference_mode()
def test_nothing_is_copied_between_devices_in_a_walk() -> None:
    class Blank:
        cost = 1

        def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
            assert sigma.device.type == "cpu"
            return Denoised(torch.zeros_like(x), None)

    x = torch.empty(2, 3, 8, 8, device="meta")
    thresholded = sampler("dpmpp", thresholding=True)
    for walk in [table(), thresholded, *(sampler(name, num_steps=5) for name in CLASSIC)]:
        assert has_graph(walk, CARD)
        with NoCopies():
            run_plan(walk.plan, Blank(), x, lambda name: x)


@torch.inference_mode()
def test_a_copy_would_be_seen() -> None:
    with pytest.raises(AssertionError, match="from cpu to meta"), NoCopies():
        torch.ones(()).to("meta")

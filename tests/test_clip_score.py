"""CLIP score and aesthetic score on tiny models: figures against the library, and the command."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from commands import clip_score
from denoisers.conditions import Conditions
from evaluation import passes
from evaluation.image_prompts import PromptSource, pair_images
from evaluation.images import ImagePassOptions
from evaluation.scores import ScoreOptions, ScorerOptions, prepare
from metrics.clip import ScoreCollector, Scorer, load_aesthetic, load_clip_score, load_head
from metrics.vision import centre
from runtime.errors import UserError
from runtime.images import save_png
from runtime.record import RunRecord
from tests.tiny_pipeline import randomise, tokenizer

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
SIDE, DIM = 30, 12
PROMPTS = ("a cat", "two dogs, running", "", "a very long caption that the context cuts", "a cat")


def images(count: int, height: int = SIDE, width: int = SIDE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP of a few thousand weights, as the library saves it."""
    folder = tmp_path_factory.mktemp("clip")
    words = tokenizer(folder)
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32}  # fmt: skip
    config = transformers.CLIPConfig(
        vision_config={**tower, "image_size": SIDE, "patch_size": 15, "projection_dim": DIM},
        text_config={
            **tower, "vocab_size": len(words), "max_position_embeddings": 12,
            "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
        },
        projection_dim=DIM,
    )  # fmt: skip
    model = transformers.CLIPModel(config)
    randomise(model, 5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Scorer:
    return load_clip_score(clip_folder, CPU, "tiny")


@pytest.fixture(scope="module")
def library(clip_folder: Path) -> Any:
    return transformers.CLIPModel.from_pretrained(clip_folder).eval()


@torch.no_grad()
def by_the_library(library: Any, folder: Path, x: Tensor, prompts: tuple[str, ...]) -> Tensor:
    """Cosines of images of the model's own size, by `CLIPModel.forward`."""
    words = transformers.CLIPTokenizer.from_pretrained(folder)
    tokens = words(list(prompts), padding=True, truncation=True, max_length=12, return_tensors="pt")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    made = library(pixel_values=(x / 255 - mean) / std, **tokens)
    return made.logits_per_image.diagonal() / library.logit_scale.exp()


def test_cosines_are_those_of_the_library(clip: Scorer, clip_folder: Path, library: Any) -> None:
    x = images(len(PROMPTS))
    found = clip.score(x, PROMPTS)
    truth = by_the_library(library, clip_folder, x, PROMPTS)
    assert float(truth.std()) > 1e-2 and found.dtype == torch.float64
    torch.testing.assert_close(found.float(), truth, atol=1e-5, rtol=0)


def test_no_figure_sees_the_batch(clip: Scorer, clip_folder: Path, tmp_path: Path) -> None:
    x, prompts = images(5, 40, 33), PROMPTS
    torch.manual_seed(0)  # a head whose last bit differs between 1 and 5 rows
    torch.save(nn.Linear(DIM, 1).state_dict(), tmp_path / "head.pth")
    looks = load_aesthetic(clip_folder, tmp_path / "head.pth", CPU, "tiny")
    for scorer in (clip, looks):
        whole = scorer.score(x, prompts)
        parts = [scorer.score(x[i : i + 1], prompts[i : i + 1]) for i in range(5)]
        assert torch.equal(torch.cat(parts), whole) and float(whole.std()) > 1e-3


@pytest.mark.parametrize(("height", "width"), [(64, 48), (20, 31), (45, 45), (31, 30)])
def test_the_middle_square_is_that_of_the_published_rule(height: int, width: int) -> None:
    """Resizing and cropping by PIL, to one grey level: its fixed point."""
    x = images(1, height, width)
    short = min(height, width)
    sides = int(SIDE * width / short), int(SIDE * height / short)
    left, top = (round((side - SIDE) / 2.0) for side in sides)
    picture = Image.fromarray(x[0].permute(1, 2, 0).numpy())
    truth = picture.resize(sides, Image.Resampling.BICUBIC)
    truth = truth.crop((left, top, left + SIDE, top + SIDE))
    found = centre(x, SIDE)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - np.asarray(truth, np.float32)).max() <= 1


# --- the aesthetic predictors


def published(width: int) -> OrderedDict[str, Tensor]:
    """A state dict with the names and shapes of sac+logos+ava1-l14-linearMSE.pth."""
    generator, made, before = torch.Generator().manual_seed(0), OrderedDict(), width
    for place, out in {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}.items():
        made[f"layers.{place}.weight"] = torch.randn(out, before, generator=generator) / before**0.5
        made[f"layers.{place}.bias"] = torch.randn(out, generator=generator)
        before = out
    return made


def test_the_improved_predictor_is_five_linear_maps(tmp_path: Path) -> None:
    state = published(768)
    torch.save(state, tmp_path / "sac.pth")
    x = torch.randn(3, 768, generator=torch.Generator().manual_seed(1))
    truth = x
    for place in (0, 2, 4, 6, 7):
        truth = truth @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
    torch.testing.assert_close(load_head(tmp_path / "sac.pth")(x), truth, atol=1e-5, rtol=1e-5)


def test_ratings_are_of_embeddings_of_length_one(
    clip_folder: Path, library: Any, tmp_path: Path
) -> None:
    torch.save(published(DIM), tmp_path / "head.pth")
    linear = nn.Linear(DIM, 1)
    torch.save(linear.state_dict(), tmp_path / "linear.pth")
    x = images(4)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        tower = library.vision_model(pixel_values=(x / 255 - mean) / std).pooler_output
        embedding = F.normalize(library.visual_projection(tower))
        for name, head in (("head", load_head(tmp_path / "head.pth")), ("linear", linear)):
            scorer = load_aesthetic(clip_folder, tmp_path / f"{name}.pth", CPU, "tiny")
            truth = head(embedding)[:, 0].double()
            torch.testing.assert_close(scorer.score(x, ()), truth, atol=1e-5, rtol=0)


def test_other_predictors_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "head.pth"
    wider = {**published(8), "layers.2.bias": torch.zeros(5)}
    for content, sentence in (
        (wider, "another network"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, "another network"),
        (nn.Linear(2, 2), "another network"),  # a pickled class is not run
        ([1], "holds no weights by name"),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match=sentence):
            load_head(file)
    torch.save(published(8), file)
    with pytest.raises(ValueError, match="dimension 8, but .* has 12"):
        load_aesthetic(clip_folder, file, CPU, "tiny")


# --- files


def test_older_weights_are_read_as_data(
    clip_folder: Path, clip: Scorer, library: Any, tmp_path: Path
) -> None:
    for name in ("config.json", "vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    torch.save(library.state_dict(), tmp_path / "pytorch_model.bin")
    older = load_clip_score(tmp_path, CPU, "tiny")
    x = images(2)
    assert torch.equal(older.score(x, PROMPTS[:2]), clip.score(x, PROMPTS[:2]))
    assert older.sha256 != clip.sha256
    torch.save(library, tmp_path / "pytorch_model.bin")  # classes, which would have to be run
    with pytest.raises(ValueError, match="cannot be read as a CLIPModel of .*asks for"):
        load_clip_score(tmp_path, CPU, "tiny")


def test_what_is_missing_is_said(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give one with config"):
        load_clip_score(tmp_path / "nowhere", CPU, "tiny")
    with pytest.raises(ValueError, match="cannot be read as a CLIPModel of"):
        load_clip_score(tmp_path, CPU, "tiny")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(ValueError, match="has no tokenizer: add its vocab.json and"):
        load_clip_score(tmp_path, CPU, "tiny")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'amed-toolkit\[diffusion\]'"):
        load_clip_score(clip_folder, CPU, "tiny")


# --- prompts and images


def folder_of(path: Path, names: list[str], **options: Any) -> Path:
    """Random images; with ``options``, beside the record of a run of sample.py."""
    for i, name in enumerate(names):
        save_png(path / name, images(1, seed=i)[0].permute(1, 2, 0).numpy())
    if options:
        RunRecord.make("sample", options, {}, {}).write(path / "run.json")
    return path


def captions(path: Path, prompts: tuple[str, ...]) -> Path:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return path


def paired(path: Path, prompt: str | None = None, prompt_path: Path | None = None, **more: Any):
    source = PromptSource(prompt, None if prompt_path is None else str(prompt_path))
    images = pair_images(path, ImagePassOptions(**more), source)
    return dict(zip(images.names, images.prompts, strict=True))


MANY = tuple(f"prompt {i}" for i in range(9))


def test_images_of_sample_have_the_prompts_of_their_seeds(tmp_path: Path) -> None:
    file = captions(tmp_path / "all.txt", MANY)
    known = Conditions(prompts=MANY).describe()
    names = ["000000/000007.png", "000000/000002.png", "000000/000005.png"]
    path = folder_of(tmp_path / "a", names, prompt_path=str(file), prompts=known)
    expected = {f"000000/00000{i}.png": f"prompt {i}" for i in (2, 5, 7)}
    assert paired(path) == expected == paired(path, prompt_path=file)
    assert paired(path, num=2, seed=3).items() < expected.items()
    led = Conditions(prompts=MANY, negative="a dog").describe()  # which no image shows
    assert paired(folder_of(tmp_path / "n", names, prompt_path=str(file), prompts=led)) == expected
    file.rename(tmp_path / "moved.txt")
    with pytest.raises(UserError, match="all.txt, which the prompts of .* does not"):
        paired(path)
    assert paired(path, prompt_path=tmp_path / "moved.txt") == expected
    for others in (MANY[:8], (*MANY[:8], "another")):
        with pytest.raises(UserError, match="made from other prompts than .*others.txt"):
            paired(path, prompt_path=captions(tmp_path / "others.txt", others))
    one = Conditions(prompts=("a cat",)).describe()
    single = folder_of(tmp_path / "b", ["000003.png"] * 2, prompt="a cat", prompts=one)
    assert paired(single) == {"000003.png": "a cat"}
    plain = folder_of(tmp_path / "c", ["000001.png", "000009.png"], prompts=None)
    with pytest.raises(UserError, match="seed 9 in .* has no prompt: there are 9, and"):
        paired(plain, prompt_path=tmp_path / "moved.txt")
    with pytest.raises(UserError, match="nothing says what the images in .* show"):
        paired(plain)
    folder_of(tmp_path / "c", ["grid.png"])
    with pytest.raises(UserError, match="grid.png in .* is not an image of sample.py"):
        paired(plain, prompt_path=tmp_path / "moved.txt")


def test_other_images_have_prompts_in_their_order(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "a", ["b.png", "a.png", "c/0.png"])
    file = captions(tmp_path / "p.csv.txt", MANY[:3])
    expected = {"a.png": "prompt 0", "b.png": "prompt 1", "c/0.png": "prompt 2"}
    assert paired(path, prompt_path=file) == expected
    assert set(paired(path, prompt="all the same").values()) == {"all the same"}
    for count in (2, 4):
        with pytest.raises(UserError, match=f"holds 3 images, but there are {count}"):
            paired(path, prompt_path=captions(file, MANY[:count]))
    twice = PromptSource("a", str(file))
    with pytest.raises(UserError, match="both say what the images show: give one"):
        prepare(ScoreOptions(path, twice))
    for text in ("", "clip,fid"):
        with pytest.raises(UserError, match="is not a list of clip and aesthetic: give"):
            prepare(ScoreOptions(path, scorers=ScorerOptions(text)))
    prepare(ScoreOptions(path, twice, ScorerOptions("aesthetic")))  # which needs no prompts


# --- the command


def run(*flags: str) -> Any:
    return CliRunner().invoke(clip_score.main, ["calc", *flags, "--device=cpu"])


@pytest.fixture
def ready(clip_folder: Path, tmp_path: Path) -> list[str]:
    """Flags of a run on seven images with recorded prompts, for both scores."""
    file = captions(tmp_path / "all.txt", MANY)
    names = [f"{i:06d}.png" for i in range(2, 9)]
    known = Conditions(prompts=MANY).describe()
    path = folder_of(tmp_path / "images", names, prompt_path=str(file), prompts=known)
    torch.save(published(DIM), tmp_path / "head.pth")
    return [
        f"--images={path}", f"--clip-path={clip_folder}", f"--aesthetic-clip-path={clip_folder}",
        f"--aesthetic-path={tmp_path / 'head.pth'}", f"--cache-dir={tmp_path / 'cache'}",
    ]  # fmt: skip


def test_the_command_gives_the_means_of_the_figures(
    ready: list[str], clip: Scorer, tmp_path: Path
) -> None:
    file = tmp_path / "scores.json"
    done = run(*ready, "--metrics=clip,aesthetic", f"--json={file}", "--batch=3")
    assert done.exit_code == 0, done.output
    x = torch.cat([images(1, seed=i) for i in range(7)])
    truth = clip.score(x, MANY[2:])
    content = json.loads(file.read_text())
    shown, looks = content["results"]
    assert content["images"]["clip"] == truth.tolist()
    assert content["images"]["prompt"] == list(MANY[2:]) and shown["n"] == looks["n"] == 7
    assert shown["cosine"] == pytest.approx(float(truth.mean()), abs=1e-12)
    assert shown["clip_score"] == pytest.approx(100 * float(truth.clamp(min=0).mean()), abs=1e-10)
    assert shown["cosine_error"] == pytest.approx(float(truth.std()) / 7**0.5, abs=1e-12)
    assert looks["aesthetic"] == pytest.approx(float(np.mean(content["images"]["aesthetic"])))
    assert content["record"]["command"] == "clip_score calc"
    assert f"mean cosine {shown['cosine']:.5f}" in done.output and "N = 7)" in done.output
    assert f"CLIP score {shown['clip_score']:.3f}" in done.output
    assert not list((tmp_path / "cache").rglob("*.npz"))


def test_a_killed_command_goes_on(
    ready: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*ready, "--batch=2", f"--json={tmp_path / 'whole.json'}")
    monkeypatch.setattr(passes, "SAVE_EVERY", -1.0)
    seen: list[int] = []
    most, original = 4, ScoreCollector.update

    def update(self: ScoreCollector, x: Tensor, positions: range) -> None:
        if len(seen) >= most:
            raise KeyboardInterrupt
        seen.extend(positions)
        original(self, x, positions)

    monkeypatch.setattr(ScoreCollector, "update", update)
    flags = [*ready, f"--json={tmp_path / 'resumed.json'}"]
    assert run(*flags, "--batch=2").exit_code != 0 and not (tmp_path / "resumed.json").exists()
    most = 99
    done = run(*flags, "--batch=3")
    assert done.exit_code == 0 and seen == list(range(7)), done.output
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "resumed"))
    assert (one["results"], one["images"]) == (two["results"], two["images"])


def test_ranks_share_the_images(clip: Scorer) -> None:
    """Each rank's figures stand where the images' numbers say, and zeros elsewhere."""
    x, halves = images(5), [ScoreCollector([clip], PROMPTS) for _ in range(2)]
    for rank, half in enumerate(halves):
        half.update(x[rank::2], range(rank, 5, 2))
    whole = halves[0].finish() + halves[1].finish()
    assert torch.equal(whole[0], clip.score(x, PROMPTS))


def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    done = run("-n", "--images=nowhere", f"--cache-dir={tmp_path / 'cache'}")
    assert done.exit_code == 0 and json.loads(done.output)["options"]["metrics"] == "clip"
    assert not list(tmp_path.iterdir())

"""The wheel: what is in it, and that it works where the repository is not."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from runtime import __version__
from tests.test_architecture import FREE, MAY_IMPORT, SCRIPTS

pytestmark = pytest.mark.skipif(
    not {"pip", "setuptools"} <= {d.name for d in distributions()},
    reason="a wheel is built by pip and setuptools",
)

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {*MAY_IMPORT, "commands", "tools"} - {*SCRIPTS}
#: Writes the documentation of a clone.
LEFT_OUT = ("tools/docs_tables",)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)


def wheel(folder: Path) -> Path:
    """Built in a copy, since setuptools leaves files behind that a later build would pick up."""
    clone, out = folder / "clone", folder / "wheel"
    clone.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in {".py", ".toml", ".md"} or path.name == "LICENSE":
            shutil.copy(path, clone)
    for room in {*PACKAGES, *FREE}:
        ignored = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(ROOT / room, clone / room, ignore=ignored)
    done = run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", out, ".", cwd=clone)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


def holds_the_packages_with_their_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if not n.split("/")[0].endswith(".dist-info")}
    files = [path for room in PACKAGES for path in (ROOT / room).rglob("*") if path.is_file()]
    expected = {
        name
        for name in (path.relative_to(ROOT).as_posix() for path in files)
        if "__pycache__" not in name and not name.startswith(LEFT_OUT)
    }
    assert names == expected
    data = {"denoisers/cards.json", "restart/tables.json", "pds/bundled/cifar10-freq.npy"}
    assert data | {"denoisers/bundled/cifar10-small.safetensors", "commands/app.py"} <= names
    assert not [name for name in names if "/" not in name]  # no module called train or sample


def its_only_console_script_is_amed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (text,) = (archive.read(n) for n in archive.namelist() if n.endswith("entry_points.txt"))
    found = configparser.ConfigParser()
    found.read_string(text.decode())
    assert {name: dict(found[name]) for name in found.sections()} == {
        "console_scripts": {"amed": "commands.app:main"}
    }


PROGRAM = """
import amed
model = amed.load_model("cifar10-small", device="cpu")
print(model.card.shape, amed.load_model.__module__, amed.__file__)
"""


def works_installed_in_any_folder(wheel: Path, tmp_path: Path) -> None:
    """The dependencies are those of this environment; our packages are those of the wheel."""
    home, work = tmp_path / "venv", tmp_path / "elsewhere"
    work.mkdir()
    venv.create(home)
    python, amed = home / "bin/python", home / "bin/amed"
    (site,) = home.glob("lib/python*/site-packages")
    install = ["install", "--no-deps", "--no-index", "--no-compile", wheel]
    done = run(*PIP[:3], "--python", python, *PIP[3:], *install, cwd=work)
    assert done.returncode == 0, done.stderr
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert run(amed, "--version", cwd=work).stdout == f"amed, version {__version__}\n"
    done = run(amed, "sample", "--sampler=ipndm", "--nfe=5", "--device=cpu", "-n", cwd=work)
    assert done.returncode == 0 and json.loads(done.stdout)["plan"]["nfe_planned"] == 5, done.stderr
    done = run(python, "-c", PROGRAM, cwd=work)
    said = f"(3, 32, 32) denoisers.registry {site / 'amed/__init__.py'}\n"
    assert (done.stdout, list(work.iterdir())) == (said, []), done.stderr


def test_a_wheel(tmp_path: Path) -> None:
    """One test, so that one process builds it."""
    made = wheel(tmp_path)
    holds_the_packages_with_their_data_and_nothing_else(made)
    its_only_console_script_is_amed(made)
    works_installed_in_any_folder(made, tmp_path)

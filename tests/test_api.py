"""The one import: names that are found when they are used, and the page that lists them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import amed
from tests.processes import python
from tools.docs_tables import api, pages

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/api.md"
LEAST = {
    *("load_model", "make_solver", "get_grid", "integrate", "restart_plan", "run_plan"),
    *("load_predictor", "Denoised", "Conditions", "SamplerOptions", "build_sampler", "generate"),
}


@pytest.mark.parametrize("name", amed.NAMES)
def test_a_name_is_what_its_module_defines(name: str) -> None:
    module, _, attribute = amed.NAMES[name].partition(":")
    found = getattr(amed, name)
    assert found is getattr(sys.modules[module], attribute)
    assert (found.__module__, found.__qualname__) == (module, attribute)  # no other name for it
    assert (found.__doc__ or "").strip() and api.summary(name)


def test_names_are_listed_in_alphabetical_order() -> None:
    assert list(amed.NAMES) == sorted(amed.NAMES, key=str.lower) and {*amed.NAMES} >= LEAST
    assert {*amed.NAMES, "NAMES"} <= {*dir(amed)}


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'amed' has no attribute 'nonsense'"):
        amed.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        from amed import nonsense  # noqa: F401


def test_names_leave_the_submodules_alone() -> None:
    submodules = {path.stem for path in (ROOT / "amed").glob("*.py")}
    assert not submodules & {*amed.NAMES}


def test_the_import_loads_no_torch() -> None:
    code = "import sys, amed; dir(amed); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert python("-c", code).code == 0


def test_the_page_lists_the_names_of_the_code() -> None:
    text = pages.current(PAGE, "api")
    assert re.findall(r"^\| `amed\.(\w+)`", text, re.M) == list(amed.NAMES)
    assert text == api.table(), "run python -m tools.docs_tables api"


def test_the_pages_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict = {}
    exec(program, names)
    assert names["images"].shape == (4, 3, 32, 32) and float(names["images"].std()) > 0.1
    assert capsys.readouterr().out.splitlines()[0] == "5"

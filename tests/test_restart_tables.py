"""Published configurations: every NFE is recomputed from its plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from denoisers.cards import cards
from plans.plan import Jump, plan_nfe
from restart.intervals import resolve_intervals
from restart.tables import configuration, configurations
from runtime.errors import UserError

#: NFE -> FID as published (arXiv:2306.14878, tables 3 and 5), written down a second time here.
PUBLISHED: dict[str, dict[int, float | None]] = {
    "cifar10-vp": {43: 2.70, 55: 2.45, 75: 2.27, 115: 2.21, 519: 2.11},
    "cifar10": {43: 1.90},
    "cifar10-pfgmpp": {43: 1.88},
    "imagenet64": {
        39: 2.38,
        67: 1.95,
        99: 1.71,
        165: 1.51,
        203: 1.46,
        385: 1.41,
        535: 1.39,
        623: 1.36,
    },
}
#: Guidance rate -> FID of the rows of Stable Diffusion, table 10.
GUIDED = {3: 14.48, 5: 16.21, 8: 18.40}


def test_all_published_rows_are_there():
    rows: dict[str, dict[int, float | None]] = {}
    for name, row in configurations().items():
        guided = [f"{row.model}-w{rate}-{row.nfe}" for rate in GUIDED]
        assert row.name == name and name in [f"{row.model}-{row.nfe}", *guided]
        rows.setdefault(row.model, {})[row.nfe] = row.fid
    assert rows.pop("ms_coco") == {66: GUIDED[8]}
    assert rows == PUBLISHED
    assert {w: configuration(f"ms_coco-w{w}-66").fid for w in GUIDED} == GUIDED


@pytest.mark.parametrize("name", list(configurations()))
def test_nfe_of_the_plan_is_the_published_one(name):
    row = configuration(name)
    plan = row.plan()
    assert plan_nfe(plan) == row.nfe
    restarts = {p.name[1] for p in plan if isinstance(p, Jump) and p.name[0] == "restart"}
    assert restarts == set(range(len(row.intervals)))  # every interval has a restart node


@pytest.mark.parametrize("name", list(configurations()))
def test_every_row_says_what_was_checked(name):
    row = configuration(name)
    assert "arXiv:2306.14878" in row.source
    checked = name in ("cifar10-vp-43", "imagenet64-39")  # those with recorded runs
    assert row.note.startswith("Checked: " if checked else "Read in the paper: ")


@pytest.mark.parametrize("name", ["cifar10-43", "cifar10-pfgmpp-43"])
def test_the_edm_rows_restart_in_a_narrower_interval(name):
    """[0.14, 0.3] spends what [0.06, 0.3] does, so the NFE cannot tell them apart."""
    (interval,) = configuration(name).intervals
    assert (interval.t_min, interval.t_max) == (0.14, 0.3)
    (also,) = resolve_intervals(None, cards()[configuration(name).model])[1]
    assert also == interval


def test_an_unknown_name_lists_the_known_ones():
    known = ", ".join(configurations())
    with pytest.raises(UserError, match=f"'cifar10-44'; choose one of {known}"):
        configuration("cifar10-44")


def test_the_documented_table_is_the_data():
    text = (Path(__file__).parent.parent / "docs" / "restart.md").read_text(encoding="utf-8")
    for row in configurations().values():
        fid = "" if row.fid is None else f"{row.fid:.2f}"
        levels = " ".join(str(interval) for interval in row.intervals)
        assert f"| {row.name} | {row.n_main} | {levels} | {fid} |" in text

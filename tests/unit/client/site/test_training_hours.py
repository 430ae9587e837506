"""When a site trains: spans of the local day, and a round that costs nothing outside them."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister_fl.client.admission import gate
from cloister_fl.client.site.folder import init_site, open_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.site.training_hours import within
from cloister_fl.errors import OutsideHours, SiteFileInvalid

MINUTES = st.integers(0, 24 * 60 - 1)


def _at(minute: int) -> datetime.time:
    return datetime.time(minute // 60, minute % 60, 59)


@pytest.mark.parametrize(
    ("spans", "inside", "outside"),
    [
        ([], ["00:00", "12:00", "23:59"], []),
        (["08:00-17:30"], ["08:00", "12:00", "17:29"], ["07:59", "17:30", "00:00", "23:59"]),
        (["20:00-06:00"], ["20:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "19:59"]),
        (["20:00-00:00"], ["20:00", "23:59"], ["00:00", "19:59"]),
        (["00:00-06:00"], ["00:00", "05:59"], ["06:00", "23:59"]),
        (["12:00-13:00", "22:00-01:00"], ["12:30", "00:59"], ["11:59", "13:00", "01:00", "21:59"]),
        (["00:01-00:00"], ["00:01", "12:00", "23:59"], ["00:00"]),
    ],
)
def test_spans(spans: list[str], inside: list[str], outside: list[str]) -> None:
    for text in inside:
        assert within(spans, datetime.time.fromisoformat(text))
    for text in outside:
        assert not within(spans, datetime.time.fromisoformat(text))


@given(begin=MINUTES, end=MINUTES, now=MINUTES)
def test_a_span_is_what_a_walk_round_the_clock_meets(begin: int, end: int, now: int) -> None:
    """From the beginning, minute by minute and over midnight, until the end."""
    if begin == end:
        return
    span = f"{_at(begin):%H:%M}-{_at(end):%H:%M}"
    walk = set()
    minute = begin
    while minute != end:
        walk.add(minute)
        minute = (minute + 1) % (24 * 60)
    assert within([span], _at(now)) == (now in walk)


@pytest.mark.parametrize(
    "value",
    ['"20-06"', '"8:00-17:00"', '"20:00-24:00"', '"08:00-08:00"', '"٠٨:00-09:00"', "8", '""'],
)
def test_a_fault_is_told_with_its_line(tmp_path: Path, value: str) -> None:
    init_site(tmp_path)
    (tmp_path / "site.toml").write_text(
        f'[site]\nname = "a"\n[policy]\n# at night\nhours = ["20:00-06:00", {value}]\n'
    )
    with pytest.raises(SiteFileInvalid) as caught:
        open_site(tmp_path)
    (fault,) = caught.value.faults
    assert (fault.line, fault.key) == (5, "policy.hours.1")


def test_the_gate_says_what_the_hours_are(tmp_path: Path) -> None:
    site = init_site(
        tmp_path, policy=Policy(patients_at_most=1_000, hours=("20:00-06:00", "12:00-13:00"))
    )
    assert open_site(tmp_path).policy.hours == ("20:00-06:00", "12:00-13:00")
    gate.require_hours(site, datetime.time(3))
    with pytest.raises(OutsideHours, match=r"20:00-06:00, 12:00-13:00; now 14:12"):
        gate.require_hours(site, datetime.time(14, 12))

"""The preflight's findings, one by one, at their thresholds."""

from __future__ import annotations

import datetime
import itertools
import json
import time
import tomllib
from email.utils import formatdate
from pathlib import Path

import pytest

from cloister_fl.client.cli import client_group
from cloister_fl.client.network.http import Answer, Cause, Failure, Step
from cloister_fl.client.network.http_errors import error_of
from cloister_fl.client.network.join import MEMBERSHIP, Membership
from cloister_fl.client.network.proxy import FILE
from cloister_fl.client.preflight import findings as preflight
from cloister_fl.client.preflight.findings import (
    GIB,
    Check,
    Finding,
    State,
    available_memory,
    disk,
    exit_status,
    folder,
    gpu,
    memory,
    render,
)
from cloister_fl.client.preflight.network_check import clock, dates, judge, network, version
from cloister_fl.client.site.folder import init_site
from cloister_fl.membership.enrolment import HEADER_PROTOCOL, HEADER_VERSION
from cloister_fl.membership.validity import Validity
from cloister_fl.protocol.app_bundle import bundle
from cloister_fl.version import PROTOCOL, __version__
from support import commands
from support.dicom import write_site
from support.studies import study_text

pytestmark = pytest.mark.process


MEMBER = Membership(
    fleet="fl.example.org:9443",
    enrolment="fl.example.org:9444",
    authority="a" * 64,
    root="b" * 64,
    invite="c" * 16,
    site="north",
)
OK, WARN, FAIL, SKIP = State.OK, State.WARN, State.FAIL, State.SKIP


def _states(findings: list[Finding]) -> dict[int, State]:
    return {finding.number: finding.state for finding in findings}


# The machine


@pytest.mark.parametrize(
    ("free", "state", "code"),
    [(GIB - 1, FAIL, "CLO-104"), (GIB, WARN, ""), (5 * GIB - 1, WARN, ""), (5 * GIB, OK, "")],
)
def test_disk(free: int, state: State, code: str) -> None:
    found = disk(free)
    assert (found.state, found.code, bool(found.remedy)) == (state, code, state is not OK)


@pytest.mark.parametrize(
    ("available", "state"), [(None, WARN), (0, WARN), (4 * GIB - 1, WARN), (4 * GIB, OK)]
)
def test_memory(available: int | None, state: State) -> None:
    assert memory(available).state is state


def test_available_memory_is_the_least_of_machine_and_control_group(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:  8000 kB\n")
    assert available_memory(tmp_path) == 8000 * 1024
    group = tmp_path / "sys/fs/cgroup/a.slice/b"
    group.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a.slice/b\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("4000000\n")
    assert available_memory(tmp_path) == 8000 * 1024
    (group / "memory.max").write_text("5000000\n")
    assert available_memory(tmp_path) == 1_000_000
    (group / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    assert available_memory(tmp_path) == 1_500_000
    assert (available_memory() or 0) > 0


def test_gpu_asks_torch_only_where_a_gpu_is() -> None:
    def never() -> str:
        raise AssertionError

    assert gpu(False, never).what == "None; the CPU is used."
    assert gpu(True, lambda: None).state is WARN
    assert gpu(True, lambda: "H100").state is OK


def test_folder(tmp_path: Path) -> None:
    site = init_site(tmp_path / "site")
    assert folder(site).state is OK
    for path in (site.root, site.cache, site.root / "site.toml"):
        mode = path.stat().st_mode
        path.chmod(mode | 0o040)
        assert folder(site).state is WARN
        path.chmod(mode)
    for name in ("", "identity.pem", FILE):
        if name == FILE:
            (site.keys / name).write_text("x")
        path = site.keys / name
        mode = path.stat().st_mode & 0o700
        path.chmod(mode | 0o004)
        found = folder(site)
        assert (found.state, found.code) == (FAIL, "CLO-103")
        assert f"keys/{name}".rstrip("/") in found.what
        path.chmod(mode)
    assert folder(site).state is OK


# The coordinator


NOW = 1_800_000_000.0


def _clock(skew: float, travel: float = 0.0) -> Finding:
    """A request that takes ``travel`` to the coordinator, by a clock that is ahead by ``skew``."""
    date = formatdate(NOW + travel, usegmt=True)
    return clock("fl:9443", date, NOW + skew, NOW + skew + 2 * travel)


@pytest.mark.parametrize(
    ("skew", "state"),
    [
        (-100_000, FAIL),
        (-301, FAIL),
        (-299, WARN),
        (-61, WARN),
        (-59, OK),
        (0, OK),
        (3.9, OK),
        (4.1, WARN),
        (6.9, WARN),
        (7.1, FAIL),
        (100_000, FAIL),
    ],
)
def test_clock(skew: float, state: State) -> None:
    found = _clock(skew)
    assert found.state is state
    assert found.code == ("CLO-814" if state is FAIL else "")
    # A slow way blurs the measure and blames nobody.
    assert _clock(0, travel=400).state is OK


def test_a_clock_says_by_how_much() -> None:
    assert "ahead of fl:9443 by 598 to 600 s" in _clock(600).what
    assert "behind fl:9443 by 600 to 602 s" in _clock(-600).what


@pytest.mark.parametrize("date", ["", "yesterday", "Mon, 99 Jan 2027 99:00:00 GMT"])
def test_no_date_is_a_warning(date: str) -> None:
    assert clock("fl:9443", date, NOW, NOW).state is WARN


def test_flower_refuses_clocks_where_the_preflight_does() -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    from cloister_fl.client.preflight import network_check

    assert network_check.AHEAD_FAIL_S == SYSTEM_TIME_TOLERANCE
    assert network_check.BEHIND_FAIL_S == TIMESTAMP_TOLERANCE


@pytest.mark.parametrize(
    ("days", "state", "code"),
    [
        ((-9, -0.01), FAIL, "CLO-814"),
        ((-9, 0.01), WARN, ""),
        ((-9, 59.9), WARN, ""),
        ((-9, 60.1), OK, ""),
        ((0.01, 700), FAIL, "CLO-814"),
    ],
)
def test_dates(days: tuple[float, float], state: State, code: str) -> None:
    begins, ends = (
        datetime.datetime.fromtimestamp(NOW + 86400 * day, datetime.UTC) for day in days
    )
    found = dates(Validity(begins, ends), NOW)
    assert (found.state, found.code) == (state, code)


@pytest.mark.parametrize(
    ("protocol", "wheel", "state", "words"),
    [
        (str(PROTOCOL), __version__, OK, __version__),
        (str(PROTOCOL), "9.9.9", FAIL, "9.9.9"),
        (str(PROTOCOL), "\x1b[31m", FAIL, "(unknown version)"),
        (str(PROTOCOL + 1), __version__, FAIL, f"protocol version {PROTOCOL + 1}"),
        ("", "", WARN, "does not report its version"),
        ("two", __version__, WARN, "does not report its version"),
    ],
)
def test_version(protocol: str, wheel: str, state: State, words: str) -> None:
    found = version(protocol, wheel)
    assert found.state is state
    assert words in found.what
    assert "\x1b" not in found.what
    assert found.code == ("CLO-815" if state is FAIL else "")


def _answer(status: int = 200, body: bytes = b"", **headers: str) -> Answer:
    now = time.time()
    told = {"date": formatdate(now, usegmt=True), **headers}
    return Answer(status, body, told, "", now, now)


def test_an_answer_is_judged() -> None:
    good = _answer(**{HEADER_PROTOCOL: str(PROTOCOL), HEADER_VERSION: __version__})
    assert _states(judge(MEMBER, good)) == dict.fromkeys((2, 3, 4, 5, 7, 8, 9), OK)
    revoked = judge(MEMBER, _answer(403, b"certificate-revoked"))
    assert _states(revoked)[Check.ADMISSION] is FAIL
    assert exit_status(revoked) == 9
    other = judge(MEMBER, _answer(**{HEADER_PROTOCOL: "9", HEADER_VERSION: __version__}))
    assert [one.code for one in other if one.state is FAIL] == ["CLO-815"]


def test_what_the_preflight_calls_the_same_version_is_what_an_executor_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["project"]
    assert version(str(PROTOCOL), project["version"]).state is OK
    own = bundle()
    monkeypatch.setattr("cloister_fl.protocol.app_bundle.__version__", "9.9.9")
    assert bundle.__wrapped__() != own  # refused by its hash: CLO-505
    assert version(str(PROTOCOL), "9.9.9").state is FAIL


@pytest.mark.parametrize("via", ["", "proxy.hospital.example:3128"])
@pytest.mark.parametrize(("step", "cause"), list(itertools.product(Step, Cause)))
def test_every_failure_has_one_finding_and_words(step: Step, cause: Cause, via: str) -> None:
    failure = Failure(MEMBER.fleet, step, cause, via=via, status=502, user="u")
    error = error_of(failure)
    assert error.exit_status == 9
    assert error.what
    assert error.remedy
    findings = judge(MEMBER, failure)
    bad = [finding for finding in findings if finding.state is FAIL]
    assert [finding.code for finding in bad] == [error.code]
    assert sorted(_states(findings)) == [2, 3, 4, 5, 7, 8, 9]
    assert {one.state for one in findings if one.number > bad[0].number} <= {SKIP}
    assert {one.state for one in findings if one.number < bad[0].number} <= {OK}


# A site without a federation, and damage


def test_not_joined_and_offline(tmp_path: Path) -> None:
    site = init_site(tmp_path / "site")
    for offline in (False, True):
        findings = network(site, offline=offline)
        assert _states(findings) == {1: WARN, **dict.fromkeys(range(2, 11), SKIP)}
        assert "cloister client join" in findings[0].remedy
        assert exit_status(findings) == 0
    (site.root / MEMBERSHIP).write_text("{")
    (site.root / MEMBERSHIP).chmod(0o600)
    assert [one.code for one in network(site)][:2] == ["CLO-103", ""]


def test_offline_dials_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = init_site(tmp_path / "site", name="north")
    (site.root / MEMBERSHIP).write_text(MEMBER.model_dump_json())
    (site.root / MEMBERSHIP).chmod(0o600)

    def dialled(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("cloister_fl.client.preflight.network_check.dial", dialled)
    states = _states(network(site, offline=True))
    assert states == {
        **dict.fromkeys((2, 3, 4, 5, 7, 8, 9), SKIP),
        1: OK,
        Check.CERTIFICATE: WARN,
        Check.ROSTER: WARN,
    }


def _run(*arguments: object) -> tuple[int, str]:
    result = commands.invoke(client_group.app, *arguments)
    return result.exit_code, result.stdout


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_site(tmp_path / "site", 6)
    root.chmod(0o700)
    init_site(root, name="north")
    monkeypatch.setattr(preflight, "available_memory", lambda: 8 * GIB)
    status, text = _run("check", "--dir", root)
    assert status == 0
    assert "    1  warn  federation: This site has not joined a federation.\n" in text
    assert " 2-10  skip  name to roster: Not joined.\n" in text
    assert "\n   15  ok    data: 6 images of 6 patients can be used.\n" in text
    # And the report as it was before there was a preflight.
    assert "\n\nSite north\n  files       6\n" in text
    assert text.endswith("The data can be used.\n")
    status, text = _run("check", "--dir", root, "--json", "--offline")
    told = json.loads(text)
    assert told["usable"] is True
    assert [one["number"] for one in told["findings"]] == list(range(1, 17))
    assert set(told["findings"][0]) == {"number", "name", "state", "what", "remedy", "code"}
    # The first failure's status, before that of the data.
    monkeypatch.setattr(preflight, "DISK_FAIL", 1 << 60)
    assert _run("check", "--dir", root)[0] == 2
    monkeypatch.undo()
    (root / "labels.csv").unlink()
    (root / "dicom").rename(root / "elsewhere")
    status, text = _run("check", "--dir", root)
    assert status == 3
    assert "[CLO-205]" in text


def test_a_policy_that_refuses_is_a_failure(tmp_path: Path) -> None:
    root = write_site(tmp_path / "site", 20)
    init_site(root, name="north")
    study = tmp_path / "study.toml"
    study.write_text(study_text(privacy={"epsilon": 99.0}))
    status, text = _run("check", "--dir", root, "--study", study)
    assert status == 4
    assert "   16  fail  policy: " in text


def test_a_row_of_skips_is_one_line_and_no_other_row_is() -> None:
    rows = [Finding(n, f"n{n}", SKIP, "because") for n in (1, 2, 3, 5)]
    rows.insert(1, Finding(9, "nine", OK, "because"))
    assert render(rows).splitlines() == [
        "    1  skip  n1: because",
        "    9  ok    nine: because",
        "  2-3  skip  n2 to n3: because",
        "    5  skip  n5: because",
    ]

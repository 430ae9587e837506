"""A site that answers message after message from what it verified once.

Between two messages another process does something to its files, and sets the time of modification
back. Whatever was tampered with is refused before the next charge; what a steward's command did
lawfully is read whole, and the round goes on.
"""

from __future__ import annotations

import runpy
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from cloister_fl.audit_log import AuditLog, name_of, told_heads
from cloister_fl.audit_log import log as audit_module
from cloister_fl.audit_log.segments import sealed
from cloister_fl.client import app as client
from cloister_fl.client.admission.approvals import Decision, judge
from cloister_fl.client.app_state import Kept
from cloister_fl.client.ledger import chain, ledger_file, site_session
from cloister_fl.client.ledger.ledger_file import LedgerFile
from cloister_fl.client.ledger.rollback import FILE
from cloister_fl.client.ledger.site_session import SiteSession
from cloister_fl.client.site.audit_log import entries_of, log_of, path_of
from cloister_fl.client.site.folder import Site, open_site
from cloister_fl.client.site.last_refusal import read_last_refusal
from cloister_fl.networks import registry
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.protocol.round_messages import (
    Exchange,
    Prepare,
    Prepared,
    Refusal,
    RoundMessage,
    TrainTask,
    Update,
    octets,
)
from support.federations import study
from support.hand_asked_site import ask, fits, rounds_charged, write_hospital
from support.spending import disagreements
from support.tampering import cut, leave_in_wal, overwrite, put_in_place, rewrite_rows

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "messages.py"
STUDY = study(aggregation="secure = false", training="rounds = 9")
OTHER = study(study='name = "other"', aggregation="secure = false")


def train(number: int) -> TrainTask:
    module = registry.build(STUDY.network, 2, 1, size=STUDY.input.size, seed=STUDY.training.seed)
    return TrainTask(STUDY.canonical(), "run", number, 5, octets(), flatten(module))


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site that let the study in and trained two rounds."""
    policy = {**fits(STUDY), "approved_hashes": (STUDY.digest,)}
    site = write_hospital(tmp_path_factory.mktemp("warm") / "origin", policy)
    assert isinstance(ask(site, prepare()), Prepared)
    for number in (1, 2):
        assert isinstance(ask(site, train(number)), Update)
    return site


def prepare(heads: str = "") -> Prepare:
    return Prepare(STUDY.canonical(), "run", 5, "", b"", heads)


class Count:
    """Whole readings of ledger and log, and connections, in this process."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ledger = self.log = self.connects = self.compared = 0

        def counted(where: Any, name: str, what: str) -> None:
            honest = getattr(where, name)

            def counting(*given: Any, **named: Any) -> Any:
                setattr(self, what, getattr(self, what) + 1)
                return honest(*given, **named)

            patch.setattr(where, name, counting)

        counted(sqlite3, "connect", "connects")
        counted(chain, "read", "ledger")
        counted(audit_module, "chained", "log")
        counted(site_session, "differences", "compared")


@pytest.fixture
def site(hospital: Site, tmp_path: Path) -> Iterator[Site]:
    """A copy of the hospital, which has answered a message of this process."""
    shutil.copytree(hospital.root.parent, tmp_path / "copy")
    made = open_site(tmp_path / "copy" / "anker")
    assert isinstance(ask(made, train(3)), Update)
    yield made
    client.app.kept.forget(made.root)


def reason(reply: RoundMessage) -> str:
    assert isinstance(reply, Refusal), reply
    return reply.reason


def code(site: Site) -> str:
    """The code of the last refusal, which the coordinator is not told."""
    told = read_last_refusal(site.root)
    assert told is not None
    return told.code


def elsewhere(site: Site, *words: str) -> None:
    """A steward's command, in a process of its own."""
    command = [sys.executable, "-P", "-c", "from cloister_fl.cli.main import main; main()"]
    done = subprocess.run(
        [*command, "client", *words, "--dir", str(site.root)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_warm_site_reads_nothing_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    count = Count(monkeypatch)
    for number in range(4, 9):
        assert isinstance(ask(site, train(number)), Update)
    assert (count.connects, count.ledger, count.log, count.compared) == (0, 0, 0, 0)
    assert rounds_charged(site) == list(range(1, 9))
    assert disagreements(site) == ()
    kinds = [entry.kind for entry in entries_of(site) if entry.kind != "signed"]
    assert kinds[-6:] == ["asked", "ledger", "sent"] * 2


def test_a_message_is_the_same_work_whatever_was_charged_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls are counted, of Python's and of C's functions; seconds would depend on the machine."""
    benchmark = runpy.run_path(str(BENCHMARK))
    module = flatten(
        registry.build(STUDY.network, 2, 1, size=STUDY.input.size, seed=STUDY.training.seed)
    )
    monkeypatch.setattr(client, "train_round", lambda *_, **__: module)
    calls = {}
    for rounds in (1, 40, 800):
        site = write_hospital(tmp_path / str(rounds), fits(STUDY))
        benchmark["write_history"](site, rounds)
        assert isinstance(ask(site, prepare()), Prepared)
        counted = Calls()
        for number in (1, 2):
            assert isinstance(ask(site, train(number)), Update)
        assert isinstance(ask(site, train(3), counted), Update)
        calls[rounds] = counted.calls
        client.app.kept.forget(site.root)
    assert 1000 < calls[1] == calls[40]
    # Beside that, each file of the log that is full is looked at.
    assert 0 < calls[800] - calls[1] <= 30 * len(sealed(path_of(site)))


class Calls:
    """The product's ClientApp, and how many functions a message calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, message: Message, context: Context) -> Message:
        sys.setprofile(self._profile)
        try:
            return client.app(message, context)
        finally:
            sys.setprofile(None)

    def _profile(self, _: object, event: str, __: object) -> None:
        self.calls += event in {"call", "c_call"}


def test_a_process_that_starts_reads_everything(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.app.kept.forget(site.root)
    count = Count(monkeypatch)
    assert isinstance(ask(site, train(4)), Update)
    assert (count.connects, count.ledger, count.log) == (1, 1, 1)
    assert isinstance(ask(site, train(5)), Update)
    assert (count.connects, count.ledger, count.log) == (1, 1, 1)


def test_a_site_is_verified_before_its_first_message(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.app.kept.forget(site.root)
    client.app.verify(site.root)
    count = Count(monkeypatch)
    assert isinstance(ask(site, train(4)), Update)
    assert (count.connects, count.ledger, count.log) == (0, 0, 0)
    overwrite(site.ledger, b'"round":2', b'"round":8')
    client.app.kept.forget(site.root)
    client.app.verify(site.root)
    assert code(site) == "CLO-302"


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (AuditLog, "verify"),
        (site_session, "differences"),
        (SiteSession, "note"),
        (site_session, "write_atomic"),
        (audit_module, "mark_of"),
        (LedgerFile, "_marks"),
        (ledger_file, "append"),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_what_was_half_done_is_done_anew(
    site: Site, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, after: bool
) -> None:
    """A message that ends anywhere, in a process that goes on, leaves nothing half verified."""
    honest = getattr(where, name)
    ended: list[str] = []

    def ends(*given: Any, **named: Any) -> Any:
        if ended:
            return honest(*given, **named)
        if after:
            honest(*given, **named)
        ended.append(name)
        raise KeyboardInterrupt

    # A lawful change of each, so that all is read.
    log_of(site).append("audited")
    put_in_place(site.ledger, site.ledger)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, ends)
        with pytest.raises(KeyboardInterrupt):
            ask(site, train(4))
    charged = 4 in rounds_charged(site)
    reply = ask(site, train(4))
    assert isinstance(reply, Refusal) == charged
    assert isinstance(ask(site, train(5)), Update)
    assert disagreements(site) == ()


# Tampering.


def _without_line(path: Path, number: int) -> None:
    other = path.with_name("other")
    rows = path.read_bytes().splitlines(keepends=True)
    del rows[number]
    other.write_bytes(b"".join(rows))
    put_in_place(path, other)


def _replaced_line(path: Path) -> None:
    rows = path.read_bytes().splitlines(keepends=True)
    path.with_name("other").write_bytes(b"".join([*rows[:4], rows[2], *rows[5:]]))
    put_in_place(path, path.with_name("other"))


def _older_ledger(site: Site, *more: str) -> None:
    """All that the ledger is compared with is older, too, where ``more`` says so."""
    old = site.root.parent / "old"
    for name in ("ledger.sqlite", *more):
        put_in_place(site.root / name, old / name)


LEDGER: dict[str, Callable[[Site], object]] = {
    "byte": lambda site: overwrite(site.ledger, b'"round":2', b'"round":8'),
    "byte of the last row": lambda site: overwrite(site.ledger, b'"round":3', b'"round":8'),
    "row edited": lambda site: rewrite_rows(
        site.ledger, "UPDATE entries SET body = replace(body, ':2', ':1') WHERE seq = 3"
    ),
    "row deleted": lambda site: rewrite_rows(site.ledger, "DELETE FROM entries WHERE seq = 3"),
    "last row deleted": lambda site: rewrite_rows(site.ledger, "DELETE FROM entries WHERE seq = 5"),
    "row replaced": lambda site: rewrite_rows(
        site.ledger,
        "UPDATE entries SET body = (SELECT e.body FROM entries e WHERE e.seq = 3) WHERE seq = 4",
    ),
    "cut": lambda site: cut(site.ledger, 4096),
    "row deleted in the WAL": lambda site: leave_in_wal(
        site.ledger, "DROP TRIGGER no_delete", "DELETE FROM entries WHERE seq = 5"
    ),
    "older": _older_ledger,
    "older, and its note": lambda site: _older_ledger(site, FILE),
    "gone": lambda site: site.ledger.unlink(),
}
LOG: dict[str, Callable[[Path], object]] = {
    "byte": lambda path: overwrite(path, b'"run":"run"', b'"run":"ruN"'),
    "line deleted": lambda path: _without_line(path, 3),
    "last line deleted": lambda path: _without_line(path, -1),
    "line replaced": _replaced_line,
    "cut": lambda path: cut(path, 700),
    "gone": lambda path: path.unlink(),
}


@pytest.fixture
def old(site: Site) -> Site:
    """The site, with a copy of its folder from before its last round."""
    shutil.copytree(site.root, site.root.parent / "old")
    assert isinstance(ask(site, train(4)), Update)
    return site


def require_refused(site: Site, codes: set[str]) -> None:
    """Twice: it stays refused, and nothing is charged."""
    session = client.app.kept.session(site.root)
    head = session._ledger.file._pin if session._ledger else None
    for _ in range(2):
        assert reason(ask(site, train(5))) == "declined"
        assert code(site) in codes
    assert session._ledger is not None
    assert session._ledger.file._pin == head


@pytest.mark.parametrize("what", LEDGER)
def test_a_ledger_that_was_tampered_with_is_refused_before_the_next_charge(
    old: Site, what: str
) -> None:
    LEDGER[what](old)
    content = old.ledger.read_bytes() if old.ledger.exists() else b""
    require_refused(old, {"CLO-302", "CLO-309"})
    if "WAL" not in what:  # Its last reader moves it into the file.
        assert (old.ledger.read_bytes() if old.ledger.exists() else b"") == content


def test_a_write_ahead_log_that_was_tampered_with_is_refused(site: Site) -> None:
    # A program has put the ledger into this mode; its newest entries then stand in the log alone.
    wal = leave_in_wal(site.ledger, "CREATE TABLE passing (x)", "DROP TABLE passing")
    assert isinstance(ask(site, train(4)), Update)
    assert wal.stat().st_size > 0
    overwrite(wal, b'"round":4', b'"round":8')
    require_refused(site, {"CLO-302"})


@pytest.mark.parametrize("what", LOG)
def test_a_log_that_was_tampered_with_is_refused_before_the_next_charge(
    site: Site, what: str
) -> None:
    before = site.ledger.read_bytes()
    LOG[what](path_of(site))
    after = path_of(site).read_bytes() if path_of(site).exists() else b""
    require_refused(site, {"CLO-306"})
    assert site.ledger.read_bytes() == before
    # Nothing is written behind what nobody explains, and the answer is not in it.
    assert (path_of(site).read_bytes() if path_of(site).exists() else b"") == after


def test_tampering_during_a_message_is_found_before_its_charge(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Kept.network

    def tampering(*given: Any) -> Any:
        overwrite(site.ledger, b'"round":2', b'"round":8')
        return honest(*given)

    monkeypatch.setattr(Kept, "network", tampering)
    assert reason(ask(site, train(4))) == "declined"
    assert code(site) == "CLO-302"
    assert b'"round":4' not in site.ledger.read_bytes()


def test_a_folder_that_is_rolled_back_as_a_whole_is_refused_while_the_process_lives(
    old: Site,
) -> None:
    for name in ("ledger.sqlite", FILE, "audit/audit.jsonl"):
        put_in_place(old.root / name, old.root.parent / "old" / name)
    require_refused(old, {"CLO-306"})
    # A new process finds a folder that agrees with itself, as the page on sharp edges says; the
    # coordinator, who noted the newer log, tells it at the start of the next run.
    client.app.kept.forget(old.root)
    newest = "7" * 64
    heads = told_heads([(name_of(old.identity().public), newest)])
    assert reason(ask(old, prepare(heads))) == "declined"
    assert code(old) == "CLO-309"


# What a steward does meanwhile.


@pytest.mark.slow
def test_a_decision_on_another_study_costs_a_reading_and_no_refusal(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert reason(ask(site, Prepare(OTHER.canonical(), "other", 5, "", b"", ""))) == "approval"
    elsewhere(site, "approve", OTHER.digest[:16])
    count = Count(monkeypatch)
    assert isinstance(ask(site, train(4)), Update)
    assert (count.connects, count.ledger, count.log) == (0, 0, 1)
    elsewhere(site, "budget")
    elsewhere(site, "audit")
    elsewhere(site, "budget", "export", "--out", str(tmp_path / "export"))
    assert isinstance(ask(site, train(5)), Update)
    assert (count.connects, count.ledger, count.log) == (0, 0, 1)
    assert disagreements(site) == ()


def test_a_study_that_the_steward_denies_trains_no_further_round(site: Site) -> None:
    elsewhere(site, "deny", STUDY.digest[:16], "--why", "no more")
    assert reason(ask(site, train(4))) == "approval"
    elsewhere(site, "approve", STUDY.digest[:16])
    assert isinstance(ask(site, train(4)), Update)


def test_a_denial_counts_before_it_is_logged(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A steward's command that was killed between the decision and its entry."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            judge(site, STUDY, Decision.DENIED)
    assert reason(ask(site, train(4))) == "approval"


def test_a_study_that_the_steward_closes_trains_no_further_round(site: Site) -> None:
    elsewhere(site, "budget", "close", STUDY.digest[:16], "--yes")
    for task in (train(4), Exchange(STUDY.canonical(), "run", 4, 5, octets())):
        assert reason(ask(site, task)) == "budget"
    assert rounds_charged(site) == [1, 2, 3]
    assert disagreements(site) == ()


def test_a_ledger_that_the_steward_accepts_is_used_again(old: Site) -> None:
    _older_ledger(old)
    require_refused(old, {"CLO-309"})
    elsewhere(old, "budget", "accept-ledger", "--yes")
    assert isinstance(ask(old, train(5)), Update)
    assert rounds_charged(old) == [1, 2, 3, 5]
    assert disagreements(old) == ()


def test_a_policy_counts_from_the_next_message_on(site: Site) -> None:
    path = site.root / "site.toml"
    text = path.read_text()
    # As long as before, and its time set back.
    overwrite(path, b"max_epsilon_study = 6", b"max_epsilon_study = 2")
    assert reason(ask(site, train(4))) == "policy"
    path.write_text(text)
    assert isinstance(ask(site, train(4)), Update)
    path.write_text(text.replace("[policy]", "[policy]\nno_such_key = 1"))
    assert reason(ask(site, train(5))) == "declined"
    path.write_text(text)
    assert isinstance(ask(site, train(5)), Update)


def test_a_key_that_was_put_in_place_of_another_counts_at_once(site: Site, tmp_path: Path) -> None:
    key = site.keys / "cache.key"
    key.chmod(0o644)
    assert reason(ask(site, train(4))) == "declined"
    key.chmod(0o600)
    assert isinstance(ask(site, train(4)), Update)


def test_the_models_of_two_rounds_do_not_mix(hospital: Site, tmp_path: Path) -> None:
    """The network is built once and loaded for each round."""
    answers = {}
    for name, rounds in (("alone", (2,)), ("after", (1, 2))):
        shutil.copytree(hospital.root.parent, tmp_path / name)
        site = open_site(tmp_path / name / "anker")
        asked = study(privacy="enabled = false", aggregation="secure = false")
        text = (site.root / "site.toml").read_text().replace(STUDY.digest, asked.digest)
        (site.root / "site.toml").write_text(text)
        module = registry.build(
            asked.network, 2, 1, size=asked.input.size, seed=asked.training.seed
        )
        first = flatten(module)
        for number in rounds:
            # Round 1 begins with the study's own model, or is refused.
            model = first + np.float32(0.5 * (number - 1))
            task = TrainTask(asked.canonical(), "open", number, 5, octets(), model)
            reply = ask(site, task)
            assert isinstance(reply, Update), reply
            answers[name] = reply.vector
        client.app.kept.forget(site.root)
    assert np.abs(answers["alone"]).max() > 0
    np.testing.assert_array_equal(answers["alone"], answers["after"])


def test_a_session_is_of_one_process(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    session = client.app.kept.session(site.root)
    assert client.app.kept.session(site.root) is session
    monkeypatch.setattr(session, "owner", session.owner + 1)  # As a child of a fork finds it.
    other = client.app.kept.session(site.root)
    assert other is not session
    assert isinstance(ask(site, train(4)), Update)
    assert session.log is not other.log


def test_the_log_is_signed_in_time(site: Site) -> None:
    session = SiteSession(site)
    head = log_of(site).head()
    signed = session.sign_log(head)
    assert signed.seq == head.seq + 1
    for step in range(1, 10):
        later = audit_module.Head(signed.seq + step, "0" * 64)
        assert session.sign_log(later) == later
    assert session.sign_log(signed, now=True).seq == signed.seq + 1

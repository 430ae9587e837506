"""The coordinator guesses what a site wrote into its log and its ledger, and tries the guesses.

It knows hashes: the heads of the audit log come with every message, and a certificate shows an
entry of each. Most of what an entry says is no secret in itself, such as its kind, the second, and
the hash of what the coordinator sent; what is left to guess are numbers, and a machine tries
millions a second. Here the attacker is given even more than a coordinator has: every other entry,
with its salt, and all of the guessed entry but one number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from cloister_fl.audit_log import AuditLog, Head, Value, examine, heads_told, name_of, read
from cloister_fl.audit_log import entries as audit_module
from cloister_fl.client import app as client
from cloister_fl.client.admission.approvals import Decision, judge
from cloister_fl.client.ledger import chain
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.audit_log import entries_of, log_of, path_of
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.last_refusal import read_last_refusal
from cloister_fl.client.site.policy import Policy
from cloister_fl.encoding.canonical_json import canonical_json, entry_hash
from cloister_fl.membership.identity import Identity
from cloister_fl.membership.roster import Roster, RosterEntry
from cloister_fl.privacy.dp_events import Mechanism
from cloister_fl.protocol.round_messages import (
    SITE_KEY,
    Prepare,
    Refusal,
    head_of,
    kind_of,
    pack,
    unpack,
)
from cloister_fl.server.flower.engines import InProcessGrid
from cloister_fl.server.rounds.messenger import TYPES
from cloister_fl.server.rounds.site_log_heads import heads_of_sites
from support.federations import study
from support.hand_asked_site import fits
from support.tampering import put_in_place

STUDY = study(aggregation="secure = false")
OTHERS = [study(study=f'name = "other-{number}"') for number in range(3)]
FETCHED = 17_816
HEAD = re.compile(r"([0-9a-f]{16}):([0-9a-f]{64})(:[0-9a-f]{64})?")


def with_salts(known: Mapping[str, object], salts: Iterable[str]) -> Iterator[dict[str, object]]:
    """An entry without a salt, and with each of those that are known from elsewhere."""
    yield dict(known)
    for salt in salts:
        yield {**known, "salt": salt}


# A number that was written between two heads.


def test_the_count_of_fetched_files_is_recovered_from_the_head(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", Identity.generate())
    log.append("sent", message="prepared")
    rest: dict[str, Value] = {
        "source": "dicomweb",
        "end": "ok",
        "there": 0,
        "too_large": 0,
        "not_sent": 0,
    }
    head = log.append("fetched", found=FETCHED, new=FETCHED, **rest)
    log.append("asked", message="train")
    log.append("sent", message="update")
    before, fetched, *later = read(tmp_path / "log")
    assert fetched.hash == head.hash

    def recovered(salts: Iterable[str]) -> list[int]:
        return [
            count
            for count in range(FETCHED - 300, FETCHED + 300)
            for guess in with_salts(
                {
                    **rest,
                    "found": count,
                    "new": count,
                    "kind": "fetched",
                    "previous": before.hash,
                    "seq": fetched.seq,
                    "time": fetched.time,
                },
                salts,
            )
            if audit_module.hash_of(guess) == fetched.hash  # type: ignore[arg-type]
        ]

    assert recovered([before.salt, *(one.salt for one in later), "0" * 64]) == []
    # The entry itself, which an auditor has, holds what is hashed.
    assert recovered([fetched.salt]) == [FETCHED]


def test_what_was_charged_between_two_certificates_is_recovered_from_their_hashes(
    tmp_path: Path,
) -> None:
    ledger = Ledger.open(tmp_path / "ledger.sqlite", delta=1e-6)
    ledger.link("1" * 64, {"2" * 64: ((Mechanism(9.0, 1.0), 3),)})
    ledger.link("3" * 64, {"2" * 64: ((Mechanism(9.0, 1.0), 41),)})
    *before, charged = ledger.entries()
    steps = charged.body["steps"][0]

    def recovered(salts: Iterable[str]) -> list[int]:
        plain = {key: value for key, value in charged.body.items() if key != "salt"}
        return [
            count
            for count in range(100)
            for guess in with_salts({**plain, "steps": [{**steps, "steps": count}]}, salts)
            if entry_hash(chain.LABEL, canonical_json(guess), beside=charged.previous)
            == charged.hash
        ]

    assert recovered([*(one.body.get("salt", "") for one in before), "0" * 64]) == []
    assert recovered([charged.body["salt"]]) == [41]


# How much was written between two heads.


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    policy = {**fits(STUDY), "approve": "none", "approved_hashes": ()}
    made = init_site(tmp_path / "anker", name="anker", policy=Policy(**policy))
    yield made
    client.app.kept.forget(made.root)


def answer(site: Site, heads: str = "") -> RecordDict:
    """What the site says to the question whether it takes part, as it is on the wire."""
    task = Prepare(STUDY.canonical(), "run", 5, "", b"", heads)
    grid = InProcessGrid(client.app, [{SITE_KEY: str(site.root)}])
    message = Message(content=pack(task), dst_node_id=2, message_type=TYPES[task.kind])
    (reply,) = grid.send_and_receive([message])
    return reply.content


def said(records: RecordDict) -> tuple[str, str]:
    """Hash of the head that a message names, and of the one that it says is before it."""
    found = HEAD.fullmatch(head_of(records))
    assert found is not None, head_of(records)
    return found[2], (found[3] or "").removeprefix(":")


def test_the_number_of_local_decisions_is_read_off_the_heads(site: Site) -> None:
    first, base = said(answer(site))
    assert base == ""
    quiet = answer(site)
    assert said(quiet)[1] == first
    for other in OTHERS:
        judge(site, other, Decision.DENIED)
    log_of(site).append("fetched", source="dicomweb", end="ok", found=7)
    busy = answer(site)
    assert len(entries_of(site)) > 10
    # The entry that was told last, and not the last before this one.
    assert said(busy)[1] == said(quiet)[0]
    assert len(head_of(busy)) == len(head_of(quiet))
    # Neither does the length of anything else tell.
    assert [len(str(value)) for value in busy["cloister"].values()] == [
        len(str(value)) for value in quiet["cloister"].values()
    ]


def test_the_coordinator_s_head_tells_a_site_no_number_either(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", Identity.generate())
    for number in range(123):
        log.append("received", node=number)
    assert HEAD.fullmatch(log.note(log.head()))
    assert log.note(Head(123, "a" * 64)) == log.note(Head(124, "a" * 64))


# What the numbers were good for.


class Coordinator:
    """The coordinator's log of what a site said."""

    def __init__(self, folder: Path, site: Site) -> None:
        self.path = folder / "coordinator.jsonl"
        self.log = AuditLog(self.path, Identity.generate())
        self.log.append("began", run="r", sites="2=anker")
        self.site = site
        self.roster = Roster.of("r", 1, [RosterEntry("anker", site.identity().public)])

    def ask(self, heads: str = "") -> RecordDict:
        records = answer(self.site, heads)
        self.log.append("received", node=2, message=kind_of(records), peer_head=head_of(records))
        return records

    def heads(self) -> str:
        return heads_of_sites(self.log.entries(), self.roster, {})


def copied(site: Site, folder: Path) -> Path:
    folder.mkdir()
    (folder / "log").write_bytes(path_of(site).read_bytes())
    return folder / "log"


@pytest.mark.parametrize("answers", [1, 7], ids=["shorter", "longer"])
def test_a_log_that_is_rolled_back_grows_until_it_is_longer_than_it_was(
    site: Site, tmp_path: Path, answers: int
) -> None:
    coordinator = Coordinator(tmp_path, site)
    coordinator.ask()
    older = copied(site, tmp_path / "older")
    for _ in range(3):
        coordinator.ask()
    lost = entries_of(site)[-1].hash
    put_in_place(path_of(site), older)
    client.app.kept.forget(site.root)  # The service is started again, and knows nothing.
    for _ in range(answers):
        coordinator.ask()
    told = heads_told(coordinator.heads(), name_of(site.identity().public))
    assert lost in told
    assert len(told) == 2
    reply = unpack(coordinator.ask(coordinator.heads()), Refusal)
    assert reply.reason == "declined"
    refusal = read_last_refusal(site.root)
    assert refusal is not None
    assert refusal.code == "CLO-309"
    # So does an auditor, who has both logs.
    log_of(site).sign()
    found = examine(path_of(site), key=site.identity().public, peer=coordinator.path).findings
    assert len(found) == 3
    assert all("it is missing" in one.what for one in found)


def test_a_site_that_starts_again_goes_on_from_what_it_told(site: Site, tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path, site)
    for _ in range(4):
        coordinator.ask()
        client.app.kept.forget(site.root)
        judge(site, OTHERS[0], Decision.DENIED)
        log_of(site).sign()
    told = heads_told(coordinator.heads(), name_of(site.identity().public))
    assert len(told) == 1
    assert unpack(coordinator.ask(coordinator.heads()), Refusal).reason == "approval"

"""A policy that is tighter than the study refuses before one file of the data is touched."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from cloister_client import app as client
from cloister_client import gate
from cloister_client.approvals import Decision, judge
from cloister_client.audit import entries_of
from cloister_client.ledger import Ledger
from cloister_client.notices import read_notice
from cloister_client.pinned import accept
from cloister_client.policy import Policy
from cloister_client.site import Site, init_site
from cloister_common import signing
from cloister_common.identity import Identity
from cloister_common.records import (
    SITE_KEY,
    EvaluateTask,
    Exchange,
    Prepare,
    Prepared,
    Refusal,
    RoundMessage,
    TrainTask,
    Vector,
    octets,
    pack,
    unpack,
)
from cloister_common.roster import Roster, RosterEntry, sign_roster
from cloister_common.study import Study
from cloister_server.mailbox import TYPES
from cloister_server.superlink import InProcessGrid
from federations import NAMES, study, write_cohort

SPONSOR, STRANGER = Identity.generate(), Identity.generate()
ALL = ("prepare", "exchange", "train", "evaluate")
MODEL: Vector = np.zeros(3, np.float32)


@dataclass
class _Watch:
    """What this process did to the folders under watch, or began in another process."""

    folders: tuple[str, ...] = ()
    seen: list[str] = field(default_factory=list)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folders:
            return
        if event in {"open", "os.listdir", "os.scandir"}:
            path = arguments[0]
            if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(
                self.folders
            ):
                self.seen.append(f"{event} {os.fsdecode(path)}")
        elif event in {"subprocess.Popen", "os.fork", "os.posix_spawn"}:
            self.seen.append(event)


WATCH = _Watch()
sys.addaudithook(WATCH.hook)  # It cannot be taken away again, so there is one.


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[_Watch]:
    site = tmp_path / "anker"
    WATCH.seen.clear()
    WATCH.folders = (str(site / "dicom"), str(site / "labels.csv"))
    yield WATCH
    WATCH.folders = ()


def _fits(asked: Study) -> dict[str, Any]:
    """A policy that allows all that these tests ask for."""
    return {
        "max_epsilon_study": 6.0,
        "max_epsilon_lifetime": 100.0,
        "require_secure_aggregation": False,
        "allow_without_privacy": True,
        "networks": ("small-cnn",),
        "modalities": ("DX",),
        "metrics": ("score-histograms",),
        "approve": "listed",
        "approved_hashes": (asked.digest,),
        "trusted_signers": (SPONSOR.public.hex(),),
    }


def _elsewhere() -> str:
    """An hour of the day that is neither now nor soon."""
    hour = (datetime.datetime.now().hour + 6) % 24
    return f"{hour:02d}:00-{(hour + 1) % 24:02d}:00"


OPEN = {"privacy": "enabled = false"}
UNMASKED = {"aggregation": "secure = false"}

CASES: dict[str, tuple[Any, dict[str, str], str, tuple[str, ...]]] = {
    # key: what the policy says instead, what the study says instead, the reason, messages
    "max_epsilon_study": (5.9, {}, "policy", ALL),
    "max_epsilon_lifetime": (0.5, {}, "budget", ALL),
    "ledger_delta": (1e-6, {}, "policy", ALL),
    "patients_at_most": (20_000, {}, "policy", ALL),
    "require_secure_aggregation": (True, UNMASKED, "policy", ALL),
    "colluders": (2, {}, "policy", ALL),
    "min_sites": (6, {}, "policy", ALL),
    "max_rounds": (2, {}, "policy", ALL),
    "allow_without_privacy": (False, OPEN, "policy", ALL),
    "networks": (("resnet18",), {}, "policy", ALL),
    "modalities": (("CT",), {}, "policy", ALL),
    "metrics": ((), OPEN, "policy", ALL),
    # Only the round waits for its hour; the study is let in, and the data are looked at, before.
    "hours": ((_elsewhere(),), {}, "hours", ("train",)),
    "approve": ("none", {}, "approval", ALL),
    "approved_hashes": (("0" * 64,), {}, "approval", ALL),
    "trusted_signers": ((STRANGER.public.hex(),), {}, "approval", ALL),
}


def test_every_key_of_the_policy_is_tried() -> None:
    # How many patients there are can only be known once they are read.
    assert set(CASES) | {"min_patients_per_class"} == set(Policy.model_fields)


def _site(root: Path, policy: dict[str, Any]) -> Site:
    write_cohort(root / "anker", np.random.default_rng(0), "MRN", patients=24, images=1)
    site = init_site(root / "anker", name="anker", policy=Policy(**policy))
    keys = {name: Identity.generate().public for name in NAMES} | {"anker": site.identity().public}
    roster = Roster.of("north", 1, [RosterEntry(name, key) for name, key in keys.items()])
    accept(site.roster, sign_roster(roster, SPONSOR), SPONSOR.public, confirmed=roster.digest)
    return site


def _task(kind: str, asked: Study, roster: str) -> RoundMessage:
    text, nothing = asked.canonical(), octets()
    if kind == "prepare":
        return Prepare(text, "run", 5, roster, signing.sign(asked, SPONSOR))
    if kind == "exchange":
        return Exchange(text, "run", 1, 5, nothing)
    task = TrainTask if kind == "train" else EvaluateTask
    return task(text, "run", 1, 5, nothing, MODEL)


def _ask(site: Site, kind: str, asked: Study) -> RoundMessage:
    from cloister_client.pinned import read_pin

    grid = InProcessGrid(client.app, [{SITE_KEY: str(site.root)}])
    task = _task(kind, asked, read_pin(site.roster).digest.hex())
    message = Message(content=pack(task), dst_node_id=2, message_type=TYPES[kind])
    (reply,) = grid.send_and_receive([message])
    assert not reply.has_error()
    return unpack(reply.content, Refusal, Prepared)


def _charged(site: Site) -> list[str]:
    if not site.ledger.exists():
        return []
    ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
    return [entry.kind for entry in ledger.entries() if entry.kind == "started"]


@pytest.mark.parametrize("key", CASES)
def test_a_tighter_policy_refuses_before_a_file_is_touched(
    key: str, tmp_path: Path, watched: _Watch
) -> None:
    value, tables, reason, kinds = CASES[key]
    asked = study(**tables)
    policy = {**_fits(asked), key: value}
    if key == "trusted_signers":
        policy["approve"] = "signed"
    WATCH.folders, folders = (), WATCH.folders
    site = _site(tmp_path, policy)
    WATCH.folders = folders
    for kind in kinds:
        reply = _ask(site, kind, asked)
        assert isinstance(reply, Refusal)
        assert (reply.site, reply.reason) == ("anker", reason), kind
    assert watched.seen == []
    assert _charged(site) == []
    sent = [entry.body for entry in entries_of(site) if entry.kind == "sent"]
    assert len(sent) == len(kinds)
    assert {str(body["why"]) for body in sent} == {f"a reason of the closed list: {reason}"}
    assert read_notice(site.root) is not None


def test_what_fits_the_policy_is_read(tmp_path: Path, watched: _Watch) -> None:
    """Or the test above could not fail."""
    WATCH.folders, folders = (), WATCH.folders
    site = _site(tmp_path, _fits(study()))
    WATCH.folders = folders
    assert isinstance(_ask(site, "prepare", study()), Prepared)
    assert watched.seen


def test_a_signature_is_enough_where_its_key_is_trusted(tmp_path: Path) -> None:
    asked = study()
    site = _site(tmp_path, {**_fits(asked), "approve": "signed", "approved_hashes": ()})
    assert isinstance(_ask(site, "prepare", asked), Prepared)
    # Without it, the study is not new any more, and the message is judged further.
    reply = _ask(site, "train", asked)
    assert isinstance(reply, Refusal)
    assert reply.reason == "message"


def test_hours_let_a_study_in_and_no_round(tmp_path: Path) -> None:
    asked = study()
    site = _site(tmp_path, {**_fits(asked), "hours": (_elsewhere(),)})
    for kind in ("prepare", "train"):
        reply = _ask(site, kind, asked)
        assert isinstance(reply, Refusal)
        assert reply.reason == "hours"
    # The study is in: approved, and its cost set aside. No round is charged.
    assert gate.promised(site) > 0
    assert _charged(site) == []
    assert isinstance(_ask(site, "exchange", asked), Refusal)
    assert [e.body["why"] for e in entries_of(site) if e.kind == "sent"][-1].endswith("message")
    now = datetime.datetime.now()
    span = f"{now - datetime.timedelta(hours=1):%H:%M}-{now + datetime.timedelta(hours=1):%H:%M}"
    other = tmp_path / "other"
    site = _site(other, {**_fits(asked), "hours": (_elsewhere(), span)})
    reply = _ask(site, "train", asked)
    assert isinstance(reply, Refusal)
    assert reply.reason == "message"


@pytest.mark.parametrize("least", [12, 13])
def test_too_few_patients_is_declined_and_no_more_is_said(tmp_path: Path, least: int) -> None:
    """The site has 12 of each class. A reason of its own would tell the coordinator that."""
    asked = study()
    site = _site(tmp_path, {**_fits(asked), "min_patients_per_class": least})
    reply = _ask(site, "prepare", asked)
    if least == 12:
        assert isinstance(reply, Prepared)
        return
    assert isinstance(reply, Refusal)
    assert reply.reason == "declined"
    notice = read_notice(site.root)
    assert notice is not None
    assert "CLO-207" in notice.message
    assert "patients" not in "".join(str(e.body) for e in entries_of(site) if e.kind == "sent")


def test_a_server_that_asks_for_a_metric_nobody_approved_gets_none(tmp_path: Path) -> None:
    """The study measures nothing, so the policy lets it in; the server asks for scores anyhow."""
    asked = study(privacy="enabled = false", evaluation="site_fraction = 0.0")
    for number, (metrics, reason) in enumerate(
        [((), "policy"), (("score-histograms",), "message")]
    ):
        site = _site(tmp_path / str(number), {**_fits(asked), "metrics": metrics})
        judge(site, asked, Decision.APPROVED)
        assert isinstance(_ask(site, "prepare", asked), Prepared)
        reply = _ask(site, "evaluate", asked)
        assert isinstance(reply, Refusal)
        assert reply.reason == reason

"""A policy that is tighter than the study refuses before one file of the data is touched."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloister_fl.client.admission import gate
from cloister_fl.client.admission.approvals import Decision, judge
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.data_notice import data_notices
from cloister_fl.client.site.folder import Site
from cloister_fl.client.site.last_refusal import read_last_refusal
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.site.trusted_roster import read_pin
from cloister_fl.membership.identity import Identity
from cloister_fl.protocol.round_messages import (
    EvaluateTask,
    Exchange,
    Prepare,
    Prepared,
    Refusal,
    RoundMessage,
    TrainTask,
    Vector,
    octets,
)
from cloister_fl.study import signatures
from cloister_fl.study.schema import Study
from support.federations import study, with_engine
from support.hand_asked_site import SPONSOR, WATCH, Watch, ask, fits, rounds_charged, write_hospital

pytestmark = pytest.mark.process


STRANGER = Identity.generate()
ALL = ("prepare", "exchange", "train", "evaluate")
MODEL: Vector = np.zeros(3, np.float32)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watch]:
    site = tmp_path / "anker"
    WATCH.seen.clear()
    WATCH.folders = (str(site / "dicom"), str(site / "labels.csv"))
    yield WATCH
    WATCH.folders = ()


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
    "patients_at_most, not declared": (0, {}, "policy", ALL),
    "min_noise_multiplier": (50.0, {}, "policy", ALL),
    "require_secure_aggregation": (True, UNMASKED, "policy", ALL),
    "colluders": (2, {}, "policy", ALL),
    "min_sites": (6, {}, "policy", ALL),
    "max_weight_ratio": (1.5, {"aggregation": "weights = { north = 2.0 }"}, "policy", ALL),
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
    # How many patients there are is known once they are read alone; the last refuses nothing.
    counted = {key for key in Policy.model_fields if key.startswith("min_patients")}
    counted |= {"release_unstarted"}
    assert {case.partition(",")[0] for case in CASES} | counted == set(Policy.model_fields)


@pytest.mark.parametrize(
    ("policy", "enough"),
    [
        ({"min_patients": 24}, True),
        ({"min_patients": 25}, False),
        ({"min_patients_per_class_without_privacy": 1_000}, True),
    ],
)
def test_patients_in_all_are_counted(tmp_path: Path, policy: dict[str, int], enough: bool) -> None:
    """The site has 12 of each of two classes, and the study has privacy."""
    asked = study()
    site = write_hospital(tmp_path, {**fits(asked), **policy})
    assert isinstance(_ask(site, "prepare", asked), Prepared)
    assert (asked.digest in data_notices(site.root)) is not enough


def _task(kind: str, asked: Study, roster: str) -> RoundMessage:
    text, nothing = asked.canonical(), octets()
    if kind == "prepare":
        return Prepare(text, "run", 5, roster, signatures.sign(asked, SPONSOR), "")
    if kind == "exchange":
        return Exchange(text, "run", 1, 5, nothing)
    task = TrainTask if kind == "train" else EvaluateTask
    return task(text, "run", 1, 5, nothing, MODEL)


def test_book_keeping_with_privacy_is_refused_under_any_policy_before_a_file_is_touched(
    tmp_path: Path, watched: Watch
) -> None:
    asked = with_engine(study(), "book-keeping")
    WATCH.folders, folders = (), WATCH.folders
    site = write_hospital(tmp_path, fits(asked))
    WATCH.folders = folders
    for kind in ALL:
        reply = _ask(site, kind, asked)
        assert isinstance(reply, Refusal)
        assert (reply.site, reply.reason) == ("anker", "policy"), kind
    assert watched.seen == []
    assert not site.ledger.exists()
    notice = read_last_refusal(site.root)
    assert notice is not None
    assert "training.engine is 'book-keeping'" in notice.message
    assert 'engine = "patients"' in notice.message


def _ask(site: Site, kind: str, asked: Study) -> RoundMessage:
    return ask(site, _task(kind, asked, read_pin(site.roster).digest.hex()))


@pytest.mark.parametrize("case", CASES)
def test_a_tighter_policy_refuses_before_a_file_is_touched(
    case: str, tmp_path: Path, watched: Watch
) -> None:
    key, (value, tables, reason, kinds) = case.partition(",")[0], CASES[case]
    asked = study(**tables)
    policy = {**fits(asked), key: value}
    if key == "trusted_signers":
        policy["approve"] = "signed"
    WATCH.folders, folders = (), WATCH.folders
    site = write_hospital(tmp_path, policy)
    WATCH.folders = folders
    for kind in kinds:
        reply = _ask(site, kind, asked)
        assert isinstance(reply, Refusal)
        assert (reply.site, reply.reason) == ("anker", reason), kind
    assert watched.seen == []
    assert rounds_charged(site) == []
    sent = [entry.body for entry in entries_of(site) if entry.kind == "sent"]
    assert len(sent) == len(kinds)
    assert {str(body["why"]) for body in sent} == {f"a reason of the closed list: {reason}"}
    assert read_last_refusal(site.root) is not None


def test_what_fits_the_policy_is_read(tmp_path: Path, watched: Watch) -> None:
    """Or the test above could not fail."""
    WATCH.folders, folders = (), WATCH.folders
    site = write_hospital(tmp_path, fits(study()))
    WATCH.folders = folders
    assert isinstance(_ask(site, "prepare", study()), Prepared)
    assert watched.seen


def test_a_signature_is_enough_where_its_key_is_trusted(tmp_path: Path) -> None:
    asked = study()
    site = write_hospital(tmp_path, {**fits(asked), "approve": "signed", "approved_hashes": ()})
    assert isinstance(_ask(site, "prepare", asked), Prepared)
    # Without it, the study is not new any more, and the message is judged further.
    reply = _ask(site, "train", asked)
    assert isinstance(reply, Refusal)
    assert reply.reason == "message"


def test_hours_let_a_study_in_and_no_round(tmp_path: Path) -> None:
    asked = study()
    site = write_hospital(tmp_path, {**fits(asked), "hours": (_elsewhere(),)})
    for kind in ("prepare", "train"):
        reply = _ask(site, kind, asked)
        assert isinstance(reply, Refusal)
        assert reply.reason == "hours"
    # The study is in: approved, and its cost set aside. No round is charged.
    assert gate.promised(site) > 0
    assert rounds_charged(site) == []
    assert isinstance(_ask(site, "exchange", asked), Refusal)
    assert [e.body["why"] for e in entries_of(site) if e.kind == "sent"][-1].endswith("message")
    now = datetime.datetime.now()
    span = f"{now - datetime.timedelta(hours=1):%H:%M}-{now + datetime.timedelta(hours=1):%H:%M}"
    other = tmp_path / "other"
    site = write_hospital(other, {**fits(asked), "hours": (_elsewhere(), span)})
    reply = _ask(site, "train", asked)
    assert isinstance(reply, Refusal)
    assert reply.reason == "message"


@pytest.mark.parametrize("least", [12, 13])
def test_a_rule_that_approves_does_not_answer_by_the_number_of_patients(
    tmp_path: Path, least: int
) -> None:
    """The site has 12 of each class: whoever asks one study after another would count them."""
    site = write_hospital(tmp_path, {**fits(study()), "min_patients_per_class": least})
    assert isinstance(_ask(site, "prepare", study()), Prepared)
    # The site's own people learn it.
    assert (study().digest in data_notices(site.root)) is (least == 13)


@pytest.mark.parametrize("least", [12, 13])
def test_too_few_patients_is_declined_without_privacy_and_no_more_is_said(
    tmp_path: Path, least: int
) -> None:
    """The site has 12 of each class. A reason of its own would tell the coordinator that."""
    asked = study(**OPEN)
    site = write_hospital(tmp_path, {**fits(asked), "min_patients_per_class": least})
    reply = _ask(site, "prepare", asked)
    if least == 12:
        assert isinstance(reply, Prepared)
        return
    assert isinstance(reply, Refusal)
    assert reply.reason == "declined"
    notice = read_last_refusal(site.root)
    assert notice is not None
    assert "CLO-207" in notice.message
    assert "patients" not in "".join(str(e.body) for e in entries_of(site) if e.kind == "sent")


def test_a_server_that_asks_for_a_metric_nobody_approved_gets_none(tmp_path: Path) -> None:
    """The study measures nothing, so the policy lets it in; the server asks for scores anyhow."""
    asked = study(privacy="enabled = false", evaluation="site_fraction = 0.0")
    for number, (metrics, reason) in enumerate(
        [((), "policy"), (("score-histograms",), "message")]
    ):
        site = write_hospital(tmp_path / str(number), {**fits(asked), "metrics": metrics})
        judge(site, asked, Decision.APPROVED)
        assert isinstance(_ask(site, "prepare", asked), Prepared)
        reply = _ask(site, "evaluate", asked)
        assert isinstance(reply, Refusal)
        assert reply.reason == reason

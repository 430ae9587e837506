"""A steward lets a study in together with the list of sites that it is trained with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from flwr.app import Message

from cloister_fl.client.admission.approvals import Decision, judge, judgements, require_approved
from cloister_fl.client.app import app
from cloister_fl.client.cli import client_group as client
from cloister_fl.client.data import frozen_dataset as manifests
from cloister_fl.client.network import join
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.data_notice import data_notices
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.site.trusted_roster import accept, read_pin
from cloister_fl.errors import (
    CoordinatorUnreachable,
    DataChanged,
    EnrolmentRefused,
    OneClassOnly,
    OptionInvalid,
    RosterMismatch,
    StudyInvalid,
    StudyNotApproved,
)
from cloister_fl.membership.identity import Identity
from cloister_fl.membership.roster import Roster, RosterEntry, sign_roster
from cloister_fl.protocol.round_messages import (
    SITE_KEY,
    Prepare,
    Prepared,
    Refusal,
    Refused,
    RoundMessage,
    pack,
    unpack,
)
from cloister_fl.server.flower.engines import InProcessGrid
from support import commands
from support.errors import raises
from support.federations import SEEN, study, study_text, with_engine, write_cohort

pytestmark = pytest.mark.process

ROOT = Identity.generate()
OTHERS = {name: Identity.generate().public for name in ("birke", "clara", "dorn", "esche")}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site that has joined, and to which a study was proposed that its data can serve."""
    write_cohort(tmp_path / "anker", np.random.default_rng(0), "MRN", patients=4, images=1)
    policy = Policy(
        patients_at_most=1_000, max_epsilon_study=6, min_patients=1, min_patients_per_class=2
    )
    made = init_site(tmp_path / "anker", policy=policy)
    member = join.Membership(
        fleet="127.0.0.1:1", enrolment="127.0.0.1:2", authority="00" * 32,
        root=ROOT.public.hex(), invite="00" * 8, site="anker",
    )  # fmt: skip
    (made.root / join.MEMBERSHIP).write_text(member.model_dump_json())
    (made.root / join.MEMBERSHIP).chmod(0o600)
    with pytest.raises(StudyNotApproved):
        require_approved(made, study())
    return made


def roster(site: Site, serial: int, *others: str) -> Roster:
    entries = [RosterEntry(name, OTHERS[name]) for name in others]
    return Roster.of("fed", serial, [RosterEntry(site.name, site.identity().public), *entries])


def pin(site: Site, held: Roster) -> None:
    accept(site.roster, sign_roster(held, ROOT), ROOT.public, confirmed=held.digest)


@pytest.fixture
def offered(site: Site, monkeypatch: pytest.MonkeyPatch) -> Roster:
    """What the coordinator offers."""
    made = roster(site, 3, *OTHERS)
    answer = join.Joined("approved", sign_roster(made, ROOT))
    monkeypatch.setattr(join, "look", lambda _: answer)
    return made


def approve(site: Site, *arguments: str, said: str = "") -> Result:
    words = ["approve", *arguments, "--dir", str(site.root)]
    return commands.invoke(client.app, *words, said=said)


def decision(site: Site) -> Decision:
    return judgements(site)[study().digest].decision


@pytest.mark.usefixtures("at_a_terminal")
def test_one_command_shows_the_study_and_the_sites_and_asks_for_both(
    site: Site, offered: Roster
) -> None:
    result = approve(site, said="y\ny\n")
    assert result.exit_code == 0
    for words in (study().digest, "at most epsilon 6", "policy       allows it", *OTHERS):
        assert words in result.output
    assert decision(site) is Decision.APPROVED
    assert read_pin(site.roster) == offered


@pytest.mark.usefixtures("at_a_terminal", "offered")
@pytest.mark.parametrize(
    ("said", "status"),
    [("n\n", StudyNotApproved.exit_status), ("y\nn\n", RosterMismatch.exit_status)],
)
def test_no_to_either_is_no_to_both(site: Site, said: str, status: int) -> None:
    pin(site, roster(site, 1, "birke"))
    before = site.roster.read_bytes()
    assert approve(site, said=said).exit_code == status
    assert decision(site) is Decision.PENDING
    assert site.roster.read_bytes() == before


@pytest.mark.usefixtures("at_a_terminal")
def test_what_changed_in_the_list_is_shown(site: Site, offered: Roster) -> None:
    pin(site, roster(site, 1, "birke"))
    output = approve(site, study().digest[:16], said="y\n").output
    assert "new: clara, dorn, esche" in output
    assert read_pin(site.roster) == offered


@pytest.mark.usefixtures("at_a_terminal")
def test_an_accepted_list_is_not_asked_about_again(site: Site, offered: Roster) -> None:
    pin(site, offered)
    assert approve(site, study().digest[:16]).exit_code == 0
    assert decision(site) is Decision.APPROVED


def test_a_script_gives_the_digest(site: Site, offered: Roster) -> None:
    with pytest.raises(RosterMismatch, match="confirmed digest"):
        approve(site, study().digest[:16], "--accept-roster", "00" * 32)
    assert decision(site) is Decision.PENDING
    approve(site, study().digest[:16], "--accept-roster", offered.digest.hex())
    assert decision(site) is Decision.APPROVED
    assert read_pin(site.roster) == offered


@pytest.mark.usefixtures("offered")
def test_a_script_that_gives_none_accepts_none(site: Site) -> None:
    output = approve(site, study().digest[:16]).output
    assert "cloister client roster --accept-roster" in output
    assert decision(site) is Decision.APPROVED
    assert not site.roster.exists()


@pytest.mark.usefixtures("at_a_terminal")
def test_an_older_list_stops_the_approval(site: Site, offered: Roster) -> None:
    pin(site, roster(site, offered.serial + 1, "birke"))
    with pytest.raises(RosterMismatch, match="not newer"):
        approve(site, study().digest[:16], said="y\n")
    assert decision(site) is Decision.PENDING


@pytest.mark.parametrize(
    ("error", "goes_on"), [(CoordinatorUnreachable, True), (EnrolmentRefused, False)]
)
def test_a_coordinator_that_is_away_does_not_hinder_and_one_that_refuses_does(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    error: type[CoordinatorUnreachable | EnrolmentRefused],
    goes_on: bool,
) -> None:
    def look(_: Site) -> join.Joined:
        raise error("It is so.")

    monkeypatch.setattr(join, "look", look)
    with pytest.raises(error):
        approve(site, study().digest[:16], "--accept-roster", "00" * 32)
    assert decision(site) is Decision.PENDING
    if goes_on:
        assert "was not checked: It is so." in approve(site, study().digest[:16]).output
    else:
        with pytest.raises(error):
            approve(site, study().digest[:16])
    assert (decision(site) is Decision.APPROVED) is goes_on


def test_nobody_is_asked_where_nobody_sits(site: Site) -> None:
    with raises(OptionInvalid, match="Not a terminal: "):
        approve(site, said="y\ny\n")
    judge(site, study(), Decision.DENIED, why="no")
    with raises(OptionInvalid, match="No study is waiting for a decision"):
        approve(site)
    for number in (1, 2):
        with pytest.raises(StudyNotApproved):
            require_approved(site, study(study=f'name = "study-{number}"'))
    with raises(OptionInvalid, match="2 studies are waiting for a decision"):
        approve(site)
    assert decision(site) is Decision.DENIED


def test_a_study_is_proposed_before_a_list_of_sites_is_accepted_and_reserves_nothing(
    site: Site, offered: Roster
) -> None:
    """Else a steward could not be asked for both at once."""
    asked = study(study='name = "new"')
    task = Prepare(asked.canonical(), "run", 5, offered.digest.hex(), b"", "")

    def prepare() -> RoundMessage:
        grid = InProcessGrid(app, [{SITE_KEY: str(site.root)}])
        (node,) = grid.get_node_ids()
        asked = Message(content=pack(task), dst_node_id=node, message_type="query.prepare")
        (reply,) = grid.send_and_receive([asked])
        return unpack(reply.content, Refusal, Prepared)

    def reason() -> str:
        reply = prepare()
        assert isinstance(reply, Refusal)
        return reply.reason

    assert reason() == Refused.APPROVAL
    assert judgements(site)[asked.digest].decision is Decision.PENDING
    judge(site, asked, Decision.APPROVED, data=SEEN)
    assert reason() == Refused.ROSTER
    assert not site.ledger.exists()
    pin(site, offered)
    assert isinstance(prepare(), Prepared)
    assert site.ledger.exists()


# The data are part of the approval


def no_finding(site: Site) -> None:
    """Every patient has the class 'no'."""
    site.labels.write_text(site.labels.read_text().replace(",yes", ",no"))


def test_an_approval_shows_the_data_and_freezes_them(site: Site, offered: Roster) -> None:
    pin(site, offered)
    output = approve(site, study().digest[:16]).output
    assert "labels      no 2, yes 2 (patients)" in output
    assert "with 4 images of 4 patients." in output
    frozen = manifests.load(site, study())
    assert frozen is not None
    assert judgements(site)[study().digest].data == frozen.digest_at(site.name)
    (entry,) = [one for one in entries_of(site) if one.kind == "judged"]
    assert entry.body["data"] == frozen.digest_at(site.name)
    shown = commands.invoke(client.app, "review", study().digest[:16], "--dir", str(site.root))
    assert "data         checked when it was approved, and frozen" in shown.output


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.usefixtures("at_a_terminal", "offered")
def test_a_study_that_the_data_cannot_serve_is_not_approved(site: Site, asks: bool) -> None:
    no_finding(site)
    arguments = () if asks else (study().digest[:16],)
    with raises(OneClassOnly, match=f"Then approve it: .*approve {study().digest[:16]} --dir"):
        approve(site, *arguments, said="y\ny\n")
    assert decision(site) is Decision.PENDING
    assert not manifests.is_frozen(site, study())
    with pytest.raises(StudyNotApproved, match="CLO-204"):
        require_approved(site, study())
    shown = commands.invoke(client.app, "review", study().digest[:16], "--dir", str(site.root))
    assert "data         not as they must be" in shown.output


def test_data_that_changed_leave_an_approval_to_the_steward(site: Site, offered: Roster) -> None:
    """It is the steward's word: nothing that is found of the data takes it back."""
    pin(site, offered)
    approve(site, study().digest[:16])
    next(site.dicom.rglob("*.dcm")).unlink()
    with raises(DataChanged, match="The earlier approval stays in force.* client deny "):
        approve(site, study().digest[:16])
    require_approved(site, study())
    assert data_notices(site.root)[study().digest].code == "CLO-209"
    status = commands.invoke(client.app, "status", "--dir", str(site.root))
    assert f"data of the study {study().digest[:16]}" in status.output
    commands.invoke(
        client.app, "deny", study().digest[:16], "--why", "gone", "--dir", str(site.root)
    )
    assert data_notices(site.root) == {}
    with pytest.raises(StudyNotApproved, match="denied"):
        require_approved(site, study())


def test_an_approval_is_for_the_data_that_are_frozen_anew(
    site: Site, offered: Roster, tmp_path: Path
) -> None:
    pin(site, offered)
    approve(site, study().digest[:16])
    before = judgements(site)[study().digest]
    write_cohort(site.root, np.random.default_rng(1), "MORE", patients=6, images=1)
    (tmp_path / "study.toml").write_text(study_text())
    words = ["freeze", str(tmp_path / "study.toml"), "--again", "--yes", "--dir", str(site.root)]
    commands.invoke(client.app, *words, "--why", "other patients")
    after = judgements(site)[study().digest]
    frozen = manifests.load(site, study())
    assert frozen is not None
    assert len(frozen.items) > 4
    assert after.data == frozen.digest_at(site.name) != before.data
    require_approved(site, study())


def test_an_approval_without_a_look_at_the_data_does_not_count(site: Site) -> None:
    judge(site, study(), Decision.APPROVED)
    with pytest.raises(StudyNotApproved, match="without a look at the data"):
        require_approved(site, study())
    open_study = study(privacy="enabled = false")
    judge(site, open_study, Decision.APPROVED)
    require_approved(site, open_study)


def test_a_study_of_an_engine_that_does_not_keep_the_claim_is_not_approved(site: Site) -> None:
    """It could never be trained, and its epsilon would stand in the log as accepted."""
    asked = with_engine(study(), "book-keeping")
    judge(site, asked, Decision.PENDING)
    with pytest.raises(StudyInvalid, match="one patient can move"):
        approve(site, asked.digest[:16])
    assert judgements(site)[asked.digest].decision is Decision.PENDING

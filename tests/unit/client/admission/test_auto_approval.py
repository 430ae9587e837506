"""What the policy approves without a person: what it says, for as long as it says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloister_fl.cli import main
from cloister_fl.client.admission.approvals import Decision, judge, judgements, require_approved
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import Site, init_site, open_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward.review import review
from cloister_fl.errors import MessageInvalid, SiteFileInvalid, StudyNotApproved, TooFewSites
from cloister_fl.membership.identity import Identity
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.study import signatures as signing
from support.federations import SEEN, study, study_text, write_federation

pytestmark = pytest.mark.process


SPONSOR, STRANGER = Identity.generate(), Identity.generate()
SIGNED = signing.sign(study(), SPONSOR)
LISTS = {"approve": "listed", "approved_hashes": (study().digest,)}
TRUSTS = {"approve": "signed", "trusted_signers": (SPONSOR.public.hex(),)}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return init_site(tmp_path / "north")


def _with(site: Site, **policy: Any) -> Site:
    return replace(site, policy=Policy(**policy))


@pytest.mark.parametrize(
    ("policy", "signatures"),
    [
        ({}, SIGNED),
        ({"approved_hashes": (study().digest,)}, b""),
        ({"trusted_signers": (SPONSOR.public.hex(),)}, SIGNED),
        ({**LISTS, "approved_hashes": ("0" * 64,)}, SIGNED),
        ({**LISTS, "approve": "signed", "trusted_signers": (STRANGER.public.hex(),)}, SIGNED),
        (TRUSTS, b""),
        (TRUSTS, signing.sign(study(), STRANGER)),
        (TRUSTS, signing.sign(study(study='name = "other"'), SPONSOR)),
        (TRUSTS, SPONSOR.public + signing.sign(study(), STRANGER)[32:]),
    ],
    ids=["nobody", "list", "key", "others", "mixed", "unsigned", "stranger", "other", "forged"],
)
def test_nothing_else_is_approved(site: Site, policy: dict[str, Any], signatures: bytes) -> None:
    with pytest.raises(StudyNotApproved):
        require_approved(_with(site, **policy), study(), signatures)
    (held,) = judgements(site).values()
    assert held.decision is Decision.PENDING
    assert entries_of(site) == ()


@pytest.mark.parametrize(
    ("policy", "signatures", "why"),
    [
        (LISTS, b"", "approved_hashes lists it"),
        (TRUSTS, SIGNED, SPONSOR.public.hex()),
        (TRUSTS, signing.sign(study(), STRANGER) + SIGNED, SPONSOR.public.hex()),
    ],
    ids=["listed", "signed", "signed-twice"],
)
def test_an_approval_by_the_policy_is_logged_once_with_its_ground(
    site: Site, policy: dict[str, Any], signatures: bytes, why: str
) -> None:
    asked = _with(site, **policy)
    require_approved(asked, study(), signatures)
    require_approved(asked, study())  # later messages carry no signature
    (entry,) = entries_of(site)
    assert entry.kind == "judged"
    assert entry.body["by"] == "policy"
    assert (entry.body["study"], entry.body["decision"]) == (study().digest, "approved")
    assert why in str(entry.body["why"])
    (held,) = judgements(site).values()
    assert "approved by the policy" in review(asked, held)
    with pytest.raises(StudyNotApproved):
        require_approved(asked, study(study='name = "other"'))


@pytest.mark.parametrize(
    ("policy", "signatures"), [(LISTS, b""), (TRUSTS, SIGNED)], ids=["listed", "signed"]
)
@pytest.mark.parametrize(
    "later",
    [
        {},
        {"approved_hashes": LISTS["approved_hashes"], "trusted_signers": TRUSTS["trusted_signers"]},
        {"approve": "listed", "approved_hashes": ("0" * 64,)},
        {"approve": "signed", "trusted_signers": (STRANGER.public.hex(),)},
    ],
    ids=["gone", "off", "others", "strangers"],
)
def test_a_rule_that_is_taken_back_ends_what_it_approved(
    site: Site, policy: dict[str, Any], signatures: bytes, later: dict[str, Any]
) -> None:
    require_approved(_with(site, **policy), study(), signatures)
    for _ in range(2):
        with pytest.raises(StudyNotApproved, match="steward has not approved"):
            require_approved(_with(site, **later), study())
    assert [entry.body["decision"] for entry in entries_of(site)] == ["approved", "pending"]
    require_approved(_with(site, **policy), study(), signatures)


def test_a_person_overrules_the_rule_and_the_rule_no_person(site: Site) -> None:
    judge(site, study(), Decision.DENIED)
    with pytest.raises(StudyNotApproved, match="denied"):
        require_approved(_with(site, **LISTS), study())
    judge(site, study(), Decision.APPROVED, data=SEEN)
    require_approved(site, study())  # without any rule
    judge(site, study(), Decision.DENIED)
    with pytest.raises(StudyNotApproved, match="denied"):
        require_approved(_with(site, **TRUSTS), study(), SIGNED)
    assert {entry.body["by"] for entry in entries_of(site)} == {"steward"}


def test_what_waits_is_approved_once_the_policy_says_so(site: Site) -> None:
    with pytest.raises(StudyNotApproved):
        require_approved(site, study())
    require_approved(_with(site, **LISTS), study())


def test_signatures_are_looked_at_only_where_the_policy_asks(site: Site) -> None:
    with pytest.raises(MessageInvalid):
        require_approved(_with(site, **TRUSTS), study(), b"junk")
    with pytest.raises(StudyNotApproved):
        require_approved(site, study(), b"junk")


@pytest.mark.parametrize(
    ("lines", "line", "key"),
    [
        ('approve = "listed"', 4, "policy.approve"),
        ('approve = "signed"', 4, "policy.approve"),
        ('approve = "all"', 4, "policy.approve"),
        ('aprove = "none"', 4, "policy.aprove"),
        (f'\napproved_hashes = ["{"a" * 63}"]', 5, "policy.approved_hashes.0"),
        (f'\napproved_hashes = ["{"A" * 64}"]', 5, "policy.approved_hashes.0"),
        (f'trusted_signers = ["{"0" * 64}"]', 4, "policy.trusted_signers.0"),
    ],
)
def test_a_fault_is_told_with_its_line(site: Site, lines: str, line: int, key: str) -> None:
    (site.root / "site.toml").write_text(f'[site]\nname = "a"\n[policy]\n{lines}\n')
    with pytest.raises(SiteFileInvalid) as caught:
        open_site(site.root)
    (fault,) = caught.value.faults
    assert (fault.line, fault.key) == (line, key)
    if key == "policy.aprove":
        assert "'approve'" in fault.hint


def test_a_signed_study_runs_where_its_signer_is_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = write_federation(tmp_path / "sites", patients=24, images=1)
    (sites / "birke" / "site.toml").write_text(
        '[site]\nname = "birke"\n[policy]\npatients_at_most = 1000\n'
        'max_epsilon_study = 6\napprove = "signed"\n'
        f'trusted_signers = ["{SPONSOR.public.hex()}"]\n'
    )
    asked = study(training="rounds = 1")
    file = tmp_path / "study.toml"
    file.write_text(study_text(training="rounds = 1"))
    with pytest.raises(TooFewSites, match="birke: CLO-307"):
        run_simulation(Simulation(asked, sites, tmp_path / "unsigned"))
    signing.add(file, asked, SPONSOR)
    where = ["--sites", str(sites), "--out", str(tmp_path / "signed")]
    with pytest.raises(SystemExit) as ended:
        main.main(["simulate", str(file), *where, "--json"])
    assert ended.value.code == 0
    assert '"rounds": 1' in capsys.readouterr().out
    kinds = [entry.kind for entry in entries_of(open_site(sites / "birke"))]
    assert kinds.count("judged") == 1

"""A site trains what a person there approved, by hash, and nothing else."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len

from cloister_fl.audit_log import AuditLog
from cloister_fl.cli import main
from cloister_fl.client.admission import approvals, gate
from cloister_fl.client.admission.approvals import (
    FILE,
    Decision,
    find,
    judge,
    judgements,
    require_approved,
)
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward.review import review
from cloister_fl.errors import (
    AuditLogDamaged,
    FileUnreadable,
    OptionInvalid,
    StudyNotApproved,
    TooFewSites,
)
from cloister_fl.networks.pretrained import PINNED
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.study.schema import Study
from support import spending
from support.errors import raises
from support.federations import SEEN, study, study_text, write_cohort, write_federation

pytestmark = pytest.mark.process


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return init_site(tmp_path / "north", policy=Policy(patients_at_most=1_000, max_epsilon_study=6))


def _named(number: int) -> Study:
    return study(study=f'name = "study-{number}"')


def test_a_new_study_is_refused_and_kept_for_review(site: Site) -> None:
    with pytest.raises(StudyNotApproved, match="steward has not approved"):
        require_approved(site, study())
    (held,) = judgements(site).values()
    assert (held.study, held.decision) == (study(), Decision.PENDING)
    judge(site, held.study, Decision.APPROVED, data=SEEN)
    require_approved(site, study())
    with pytest.raises(StudyNotApproved):
        require_approved(site, _named(2))


def test_a_denied_study_stays_denied_until_it_is_judged_again(site: Site) -> None:
    judge(site, study(), Decision.DENIED, why="not on our patients")
    with pytest.raises(StudyNotApproved, match="denied") as caught:
        require_approved(site, study())
    assert "not on our patients" not in str(caught.value)
    judge(site, study(), Decision.APPROVED, data=SEEN)
    require_approved(site, study())


def test_the_gate_reserves_nothing_before_approval(site: Site) -> None:
    with pytest.raises(StudyNotApproved):
        spending.admit(site, study(), run="run", invited=5)
    assert not site.ledger.exists()
    judge(site, study(), Decision.APPROVED, data=SEEN)
    spending.admit(site, study(), run="run", invited=5)
    assert gate.promised(site) > 0


def test_a_server_cannot_fill_the_disk_with_proposals(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 6
    monkeypatch.setattr(approvals, "MAX_PENDING", most)
    judge(site, study(), Decision.APPROVED, data=SEEN)
    for number in range(most + 5):
        with pytest.raises(StudyNotApproved):
            require_approved(site, _named(number))
    known = judgements(site)
    assert sum(one.decision is Decision.PENDING for one in known.values()) == most
    assert known[study().digest].decision is Decision.APPROVED
    assert _named(0).digest not in known
    assert _named(most + 4).digest in known


def test_every_decision_is_in_the_audit_log(site: Site) -> None:
    judge(site, study(), Decision.DENIED, why="CANARY")
    judge(site, study(), Decision.APPROVED, data=SEEN)
    entries = entries_of(site)
    assert [entry.body["decision"] for entry in entries] == ["denied", "approved"]
    assert {entry.body["study"] for entry in entries} == {study().digest}
    assert "CANARY" not in (site.audit / "audit.jsonl").read_text()


def _propose_many(root: str, first: int) -> None:
    from cloister_fl.client.site.folder import open_site

    for number in range(first, first + 15):
        with contextlib.suppress(StudyNotApproved):
            require_approved(open_site(Path(root)), _named(number))


@pytest.mark.slow
def test_proposals_from_other_processes_undo_no_decision(site: Site) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_propose_many, args=(str(site.root), first)) for first in (0, 100)
    ]
    for worker in workers:
        worker.start()
    decided = []
    while any(worker.is_alive() for worker in workers):
        decision = _named(10_000 + len(decided))
        judge(site, decision, Decision.DENIED)
        decided.append(decision.digest)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    known = judgements(site)
    assert all(known[digest].decision is Decision.DENIED for digest in decided)
    assert len(known) == len(decided) + 30


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"format": 2, "studies": {}}', "other"])
def test_a_damaged_file_approves_nothing(site: Site, damage: str) -> None:
    judge(site, study(), Decision.APPROVED, data=SEEN)
    path = site.root / FILE
    if damage == "other":
        held = json.loads(path.read_text())
        held["studies"] = {_named(1).digest: next(iter(held["studies"].values()))}
        damage = json.dumps(held)
    path.write_text(damage)
    with pytest.raises(FileUnreadable):
        require_approved(site, study())


def test_a_study_is_found_by_the_first_digits_of_its_hash(site: Site) -> None:
    judge(site, study(), Decision.APPROVED, data=SEEN)
    assert find(site, study().digest[:8].upper()).study == study()
    for wrong in (study().digest[:7], "ffffffff", "*", ""):
        with raises(OptionInvalid):
            find(site, wrong)


def _unbroken(told: str) -> str:
    """A review without the breaks of its lines."""
    return " ".join(told.replace("|", " ").split())


def test_review_says_what_matters(site: Site, tmp_path: Path) -> None:
    write_cohort(site.root, np.random.default_rng(1), "N")
    with pytest.raises(StudyNotApproved):
        require_approved(site, study())
    (held,) = judgements(site).values()
    told = _unbroken(review(site, held))
    for words in (
        "bright-half: Is the upper half brighter",
        study().digest,
        "small-cnn, 3 rounds of 2 steps",
        "their label 'finding' (no, yes)",
        "at most epsilon 6 at delta 1e-05",
        "patient-level, this study: 0.00; lifetime on this data: 0.00 of 8",
        "noised model updates, by secure aggregation",
        "policy allows it",
        f"cloister client approve {study().digest[:16]}",
    ):
        assert words in told
    strict = init_site(tmp_path / "strict")
    assert "refuses: policy.max_epsilon_study is 3" in review(strict, held)


def test_review_says_how_classes_weigh(site: Site) -> None:
    asked = study(training="class_weights = { no = 1.0, yes = 12.0 }")
    with pytest.raises(StudyNotApproved):
        require_approved(site, asked)
    told = _unbroken(review(site, judgements(site)[asked.digest]))
    assert "weighs no 1, yes 12; none lets a patient count more" in told


@pytest.mark.parametrize("padding", [" ", "\uff0e", "\u4e00"])
def test_a_study_s_own_words_begin_no_line_of_the_review(site: Site, padding: str) -> None:
    """Nor do characters of two columns, which a terminal would break where nobody counted."""
    forged = f"x{padding * 500} costs        at most epsilon 0.1{' ' * 200}policy       allows it "
    asked = study(study=f'name = "forged"\nquestion = "{forged * 2}"')
    with pytest.raises(StudyNotApproved):
        require_approved(site, asked)
    lines = review(site, judgements(site)[asked.digest]).splitlines()
    own = [line.startswith("  hash") for line in lines].index(True)
    assert own > 1
    assert max(map(cell_len, lines[:own])) <= 79
    assert not any("\0" in line for line in lines)
    first = [line.split()[0] for line in lines]
    assert first.count("costs") == first.count("policy") == 1
    assert first[1] == "|"
    assert sum(line.startswith("  costs        at most epsilon 6") for line in lines) == 1


def test_review_names_the_weights_that_a_study_stands_on(site: Site) -> None:
    for name, arguments in (
        ("efficientnet-lite0", ""),
        ("frozen-backbone", f'architecture = "resnet18", sha256 = "{"5" * 64}"'),
    ):
        asked = study(network=f'name = "{name}"\narguments = {{ {arguments} }}')
        with pytest.raises(StudyNotApproved):
            require_approved(site, asked)
        expected = PINNED.get(name, "5" * 64)
        told = _unbroken(review(site, judgements(site)[asked.digest]))
        assert f"starts from pretrained weights with the SHA-256 {expected}" in told
    with pytest.raises(StudyNotApproved):
        require_approved(site, study())
    assert "starts from" not in review(site, judgements(site)[study().digest])


@pytest.mark.slow
def test_the_commands_judge_and_a_run_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = write_federation(tmp_path / "sites", patients=24, images=1)
    folder = sites / "birke"
    (folder / "site.toml").write_text(
        '[site]\nname = "birke"\n[policy]\npatients_at_most = 1000\nmax_epsilon_study = 6\n'
    )
    asked = study(training="rounds = 1")
    with pytest.raises(TooFewSites, match="the study is not approved there yet") as caught:
        run_simulation(Simulation(asked, sites, tmp_path / "one"))
    assert "birke: CLO-307" in str(caught.value)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main.main(["client", *arguments, "--dir", str(folder)])
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert f"{asked.digest[:16]}  pending   bright-half" in run("review")
    assert "policy       allows it" in run("review", asked.digest[:12])
    file = tmp_path / "study.toml"
    file.write_text(study_text(training="rounds = 1"))
    assert "Denied" in run("deny", asked.digest[:16], "--why", "not yet")
    with pytest.raises(TooFewSites):
        run_simulation(Simulation(asked, sites, tmp_path / "two"))
    assert "Approved" in run("approve", str(file))
    assert run_simulation(Simulation(asked, sites, tmp_path / "three"))["rounds"] == 1


@pytest.mark.parametrize(("decision", "in_force"), [("approved", False), ("denied", True)])
def test_a_decision_whose_log_entry_fails_never_opens_what_was_closed(
    site: Site, monkeypatch: pytest.MonkeyPatch, decision: str, in_force: bool
) -> None:
    before = Decision.DENIED if decision == "approved" else Decision.APPROVED
    judge(site, study(), before)

    def full(*_: object, **__: object) -> None:
        raise AuditLogDamaged("The disk is full.")

    monkeypatch.setattr(AuditLog, "append", full)
    with pytest.raises(AuditLogDamaged):
        judge(site, study(), Decision(decision))
    assert (judgements(site)[study().digest].decision is Decision(decision)) is in_force
    assert judgements(site)[study().digest].decision is Decision.DENIED

"""A certificate with a release: the whole in it, recomputed by others, and no part left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from cloister_fl.cli.verify_commands import verify as verify_command
from cloister_fl.client.admission.approvals import Decision, judge
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward import budget
from cloister_fl.client.steward.issue_certificate import certify
from cloister_fl.errors import CertificateInvalid
from cloister_fl.membership.identity import Identity
from cloister_fl.privacy import certificate
from cloister_fl.privacy.accounting import epsilon_prv_of
from cloister_fl.study.cost import charges
from cloister_fl.verify import ledger_export
from cloister_fl.verify.certificate_check import check
from support import spending
from support.errors import raises
from support.federations import SEEN, study

ASKED = study(evaluation="release_epsilon = 2.0")
WHOLE = charges(ASKED)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site") / "anker"
    policy = Policy(
        patients_at_most=1_000,
        max_epsilon_study=12,
        max_epsilon_lifetime=40,
        metrics=("score-histograms",),
    )
    made = init_site(folder, policy=policy)
    judge(made, ASKED, Decision.APPROVED, data=SEEN)
    spending.admit(made, ASKED, run="run", invited=5)
    for number in range(1, ASKED.training.rounds + 1):
        spending.charge(made, ASKED, run="run", round_number=number)
    spending.charge_release(made, ASKED, run="run")
    return made


@pytest.fixture(scope="module")
def data(site: Site) -> bytes:
    return certificate.sign(certify(site, ASKED.digest), site.identity())


@pytest.fixture(scope="module")
def ledger(site: Site, tmp_path_factory: pytest.TempPathFactory) -> ledger_export.LedgerExport:
    path = tmp_path_factory.mktemp("export") / "ledger.jsonl"
    budget.export(site, path)
    return ledger_export.read(path.read_bytes())


def changed(data: bytes, **values: Any) -> certificate.Certificate:
    """The certificate with other values, and a release with other values."""
    found = certificate.read(data)
    release = values.pop("release", {})
    if release is not None:
        assert found.release is not None
        release = found.release.model_copy(update=release)
    return found.model_copy(update={**values, "release": release})


def test_it_holds_the_whole(site: Site, data: bytes, ledger: ledger_export.LedgerExport) -> None:
    found = certificate.read(data, key=site.identity().public)
    assert found.release is not None
    assert WHOLE.release is not None
    assert found.release.noise_multiplier == WHOLE.release.noise_multiplier
    assert found.release.charged
    assert found.epsilon_run == found.epsilon_study == WHOLE.epsilon()
    assert 5.95 < found.epsilon_run <= 6.0
    told = check(found, ledger=ledger, log=entries_of(site))
    assert told.faults == ()
    assert told.accountant == "PRV (Opacus)"
    assert told.epsilon_run == epsilon_prv_of(WHOLE.composition(), 1e-5)
    assert told.epsilon_run == pytest.approx(found.epsilon_run, abs=0.02)
    own = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
    assert told.lifetime == pytest.approx(own.epsilon_lifetime(), abs=1e-6)
    assert ledger.composition() == own.spent() == WHOLE.composition()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"release": {"charged": False}}, "Epsilon of this run is"),
        ({"release": {"charged_of_study": False}}, "Epsilon of the study is"),
        ({"release": {"noise_multiplier": 5.0}}, "Epsilon of this run is"),
        ({"release": {"noise_multiplier": 1.0}}, "The noised evaluation costs epsilon"),
        ({"release": {"noise_multiplier": 1e5}}, "The noised evaluation costs epsilon 0.0"),
        ({"release": {"noise_multiplier": 0.0}}, "Epsilon of this run is"),
        ({"release": {"sensitivity": 1}}, "sensitivity is 1 in the certificate and 16"),
        ({"release": None}, "The noised evaluation is in only one of certificate and study"),
        ({"epsilon_run": WHOLE.epsilon(released=False)}, "Epsilon of this run is"),
    ],
)
def test_a_whole_that_was_made_smaller_is_found(
    data: bytes, values: dict[str, Any], words: str
) -> None:
    told = check(changed(data, **values))
    assert any(words in fault for fault in told.faults), told.faults


def test_the_ledger_says_whether_it_was_charged(
    data: bytes, ledger: ledger_export.LedgerExport
) -> None:
    free = WHOLE.epsilon(released=False)
    release = {"charged": False, "charged_of_study": False}
    told = check(
        changed(data, release=release, epsilon_run=free, epsilon_study=free), ledger=ledger
    )
    assert told.faults == (
        "The ledger charged a noised evaluation of this run; the certificate says none.",
        "The ledger charged a noised evaluation of the study; the certificate says none.",
    )
    bodies = tuple(body for body in ledger.bodies if body["kind"] != "evaluated")
    less = replace(ledger, bodies=bodies)
    told = check(certificate.read(data), ledger=less)
    missing = "The ledger charged no noised evaluation of the study; the certificate says one."
    assert missing in told.faults


def test_the_file_holds_no_form_but_its_own(data: bytes) -> None:
    held = json.loads(data)
    assert held["release"]["charged"] is True
    for release in (None, {**held["release"], "charged": False}):
        text = json.dumps({**held, "release": release}, sort_keys=True, indent=2) + "\n"
        with raises(CertificateInvalid):
            certificate.read(text.encode())
    # Signed anew without it, the file has the form of before; a null in it is another form.
    identity = Identity.generate()
    plain = changed(data, release=None, key=identity.public.hex())
    signed = certificate.sign(plain, identity)
    assert b'"release"' not in signed
    assert certificate.read(signed) == plain
    null = {**json.loads(signed), "release": None}
    with raises(CertificateInvalid, match="canonical form"):
        certificate.read((json.dumps(null, sort_keys=True, indent=2) + "\n").encode())


def test_verify_says_it_in_words(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    path.write_bytes(data)
    app = Typer()
    app.command()(verify_command)
    result = CliRunner().invoke(app, [str(path)])
    assert result.exit_code == 0, result.output
    assert "evaluation   noised, of score histograms, charged: noise" in result.output
    assert "epsilon      " in result.output


def test_a_study_that_was_closed_before_its_release_has_a_valid_certificate(
    tmp_path: Path,
) -> None:
    policy = Policy(patients_at_most=1_000, max_epsilon_study=12, metrics=("score-histograms",))
    site = init_site(tmp_path / "anker", policy=policy)
    judge(site, ASKED, Decision.APPROVED, data=SEEN)
    spending.admit(site, ASKED, run="run", invited=5)
    spending.charge(site, ASKED, run="run", round_number=1)
    own = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
    assert own.close(ASKED.digest, site.identity()) > 0
    found = certify(site, ASKED.digest)
    assert found.release is not None
    assert not found.release.charged
    app = Typer()
    app.command()(verify_command)
    path = tmp_path / "certificate.json"
    path.write_bytes(certificate.sign(found, site.identity()))
    words = " ".join(CliRunner().invoke(app, [str(path)]).output.split())
    # What it cost was not fixed beforehand, if it ended for what it had given.
    assert f"epsilon to quote is that of the whole study, {ASKED.privacy.epsilon:g}" in words
    assert check(found, log=entries_of(site)).faults == ()


def test_the_budget_names_the_release(site: Site) -> None:
    told = budget.statement(site)
    (one,) = told.studies
    assert (one.releases, one.released) == (True, True)
    assert one.epsilon_spent == WHOLE.epsilon()
    assert "noised evaluation: done" in budget.render(told)
    asked = budget.proposal(site, study(evaluation="release_epsilon = 1.0"))
    assert 5.95 < asked.study_epsilon <= 6.0

"""The certificate: it says what the ledger says, others recompute it, and no change survives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_fl.cli.main import main
from cloister_fl.cli.verify_commands import verify as verify_command
from cloister_fl.client.admission import gate
from cloister_fl.client.admission.approvals import Decision, judge
from cloister_fl.client.cli import client_group
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.audit_log import entries_of, log_of, path_of
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward import budget
from cloister_fl.client.steward.issue_certificate import certify
from cloister_fl.encoding.canonical_json import GENESIS
from cloister_fl.errors import CertificateInvalid, OptionInvalid, OutputInTheWay, StudyInvalid
from cloister_fl.membership.identity import Identity
from cloister_fl.privacy import certificate
from cloister_fl.privacy.accounting import epsilon_pld
from cloister_fl.study.schema import Study
from cloister_fl.verify import certificate_check, ledger_export
from cloister_fl.verify.certificate_check import ASK_AGAIN, NO_CLAIM, check
from support import commands, spending
from support.accountants import epsilon_prv, epsilon_rdp
from support.errors import raises
from support.federations import SEEN, study, with_engine

STUDY = study()
SITES = max(5, STUDY.aggregation.min_sites)


@pytest.fixture(scope="module")
def charged(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """All rounds of a run charged, two of a second run, and three messages sent in the first."""
    folder = tmp_path_factory.mktemp("site") / "anker"
    site = init_site(
        folder, policy=Policy(patients_at_most=1_000, max_epsilon_study=20, max_epsilon_lifetime=40)
    )
    judge(site, STUDY, Decision.APPROVED, data=SEEN)
    for run, rounds in (("run-1", STUDY.training.rounds), ("run-2", 2)):
        spending.admit(site, STUDY, run=run, invited=SITES)
        for number in range(1, rounds + 1):
            spending.charge(site, STUDY, run=run, round_number=number)
    for run, size in (("run-1", 10), ("run-2", 500), ("run-1", 7)):
        log_of(site).append(
            "sent",
            message="exchanged",
            bytes=size,
            sha256="0" * 64,
            to="coordinator",
            why="w",
            run=run,
        )
    return site


@pytest.fixture(scope="module")
def data(charged: Site) -> bytes:
    return certificate.sign(certify(charged, STUDY.digest, run="run-1"), charged.identity())


@pytest.fixture(scope="module")
def exported(charged: Site, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("export") / "ledger.jsonl"
    budget.export(charged, path)
    return path.read_bytes()


def changed(data: bytes, identity: Identity, **values: object) -> certificate.Certificate:
    """A certificate that the site itself signed with other values."""
    held = json.loads(data)
    del held["signature"]
    made = certificate.Certificate.model_validate({**held, **values, "key": identity.public.hex()})
    return certificate.read(certificate.sign(made, identity))


def test_it_says_what_the_ledger_says(charged: Site, data: bytes) -> None:
    found = certificate.read(data, key=charged.identity().public)
    ledger = Ledger.open(charged.ledger, delta=charged.policy.ledger_delta)
    used = gate.mechanism(STUDY)
    steps, two = STUDY.training.total_steps, 2 * STUDY.training.steps_per_round
    assert (found.steps_started, found.steps_reserved) == (steps, steps)
    assert found.steps_of_study == steps + two
    assert (found.noise_multiplier, found.sampling_rate) == (
        used.noise_multiplier,
        used.sampling_rate,
    )
    assert found.ledger == ledger.head().hash
    assert found.log == entries_of(charged)[-1].hash
    assert [(one.message, one.count, one.bytes) for one in found.left] == [("exchanged", 2, 17)]
    assert found.epsilon_study == ledger.epsilon_study(STUDY.digest, STUDY.privacy.delta)
    assert found.epsilon_run == epsilon_pld(
        used.noise_multiplier, used.sampling_rate, steps, STUDY.privacy.delta
    )
    assert found.epsilon_run <= STUDY.privacy.epsilon < found.epsilon_study
    assert "lifetime" not in data.decode()


@pytest.mark.slow
def test_two_other_accountants_agree(charged: Site, data: bytes, exported: bytes) -> None:
    found = certificate.read(data)
    told = check(found, ledger=ledger_export.read(exported), log=entries_of(charged))
    assert told.faults == ()
    assert told.accountant == "PRV (Opacus)"
    assert abs(told.epsilon_run - found.epsilon_run) <= 0.02
    assert abs(told.epsilon_study - found.epsilon_study) <= 0.02
    ledger = Ledger.open(charged.ledger, delta=charged.policy.ledger_delta)
    assert told.lifetime is not None
    assert abs(told.lifetime - ledger.epsilon_lifetime()) <= 1e-6


def test_a_study_whose_engine_does_not_keep_the_claim_is_a_fault(data: bytes) -> None:
    asked = with_engine(STUDY, "book-keeping")
    made = changed(data, Identity.generate(), study=asked.canonical(), study_hash=asked.digest)
    told = check(made)
    (fault,) = told.faults
    assert "training.engine is 'book-keeping'" in fault
    # Asking for the file again would be of no use to anybody.
    assert "A new copy of the file would say the same." in told.remedy
    assert 'engine = "patients"' in told.remedy
    assert "Ask the site" not in told.remedy


@pytest.mark.slow
def test_the_command_says_what_to_do_about_such_a_study(
    data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, identity = with_engine(STUDY, "book-keeping"), Identity.generate()
    path = tmp_path / "certificate.json"
    for made, told in ((asked, NO_CLAIM), (STUDY, ASK_AGAIN)):
        values = {"study": made.canonical(), "study_hash": made.digest, "clipping_norm": 9.0}
        path.write_bytes(certificate.sign(changed(data, identity, **values), identity))
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(path)])
        assert ended.value.code == CertificateInvalid.exit_status
        assert capsys.readouterr().err.endswith(f" {told}\nMore: cloister explain CLO-310\n")


def test_no_certificate_is_signed_for_an_engine_that_does_not_keep_the_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of an earlier version: its ledger is there, and its epsilon never held."""
    asked = with_engine(STUDY, "book-keeping")
    site = init_site(
        tmp_path / "anker", policy=Policy(patients_at_most=1_000, max_epsilon_study=20)
    )
    judge(site, asked, Decision.APPROVED, data=SEEN)
    with monkeypatch.context() as earlier:
        earlier.setattr(Study, "unsound_engine", property(lambda study: ""))
        spending.admit(site, asked, run="run-1", invited=SITES)
        spending.charge(site, asked, run="run-1", round_number=1)
    with pytest.raises(StudyInvalid, match="one patient can move"):
        certify(site, asked.digest)


@settings(deadline=None, max_examples=400)
@given(place=st.integers(0, 10**6), to=st.integers(0, 255))
def test_a_certificate_with_one_character_changed(data: bytes, place: int, to: int) -> None:
    place %= len(data)
    if data[place] == to:
        return
    with raises(CertificateInvalid, match="CLO-310"):
        certificate.read(data[:place] + bytes([to]) + data[place + 1 :])


def test_every_digit_matters(data: bytes) -> None:
    for place, byte in enumerate(data):
        if chr(byte).isdigit():
            other = b"1" if byte != ord("1") else b"2"
            with raises(CertificateInvalid):
                certificate.read(data[:place] + other + data[place + 1 :])


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_certificate_that_was_cut(data: bytes, cut: int) -> None:
    with raises(CertificateInvalid):
        certificate.read(data[:cut])


def test_another_key_than_asked_for(data: bytes) -> None:
    with raises(CertificateInvalid, match="another key"):
        certificate.read(data, key=Identity.generate().public)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epsilon_run": 0.1}, "Epsilon of this run"),
        ({"epsilon_study": 0.1}, "Epsilon of the study"),
        ({"noise_multiplier": 1e-3}, "Epsilon of this run"),
        ({"noise_multiplier": 1e-3}, "all steps of the study cost epsilon inf"),
        ({"sampling_rate": 1e-3}, "sampling rate"),
        ({"clipping_norm": 9.0}, "clipping norm"),
        ({"delta": 1e-3}, "delta"),
        ({"steps_reserved": 1}, "steps reserved"),
        ({"steps_of_study": 1}, "fewer steps"),
        ({"study_hash": "0" * 64}, "The study does not match its hash."),
        ({"study": "{}"}, "The study in it is not valid."),
    ],
)
def test_a_site_that_signs_what_does_not_hold(
    data: bytes, values: dict[str, object], said: str
) -> None:
    told = check(changed(data, Identity.generate(), **values))
    assert any(said in fault for fault in told.faults), told.faults


def test_a_claim_that_is_low_because_of_noise_that_the_study_does_not_add(data: bytes) -> None:
    """Noise of 10^5, and epsilon as it follows from that, was a valid certificate."""
    found = certificate.read(data)
    none = [
        epsilon_pld(1e5, found.sampling_rate, steps, found.delta)
        for steps in (found.steps_started, found.steps_of_study)
    ]
    values = {"noise_multiplier": 1e5, "epsilon_run": none[0], "epsilon_study": none[1]}
    told = check(changed(data, Identity.generate(), **values))
    assert max(none) < 0.02
    assert len(told.faults) == 1
    assert f"the study asks for {STUDY.privacy.epsilon:g}" in told.faults[0]


def test_a_low_claim_is_refused_where_opacus_is_not_installed(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was held against a Renyi bound alone, which no low claim exceeds."""

    def missing(*given: object) -> float:
        raise ImportError

    monkeypatch.setattr(certificate_check, "epsilon_prv_of", missing)
    assert check(certificate.read(data)).faults == ()
    assert check(certificate.read(data)).accountant == "PLD"
    (fault,) = check(changed(data, Identity.generate(), epsilon_run=0.1)).faults
    assert "Epsilon of this run is 0.1000" in fault


def test_an_end_of_the_log_from_before_the_messages_is_no_end_of_the_run(
    charged: Site, data: bytes, exported: bytes
) -> None:
    """A certificate could name no entry of the log, or an early one, and say that nothing left."""
    ledger, entries = ledger_export.read(exported), tuple(entries_of(charged))
    first = next(entry for entry in entries if entry.kind == "ledger").hash
    for end, said in ((GENESIS, "has no entry with the hash"), (first, "is older than")):
        lying = changed(data, charged.identity(), log=end, left=[])
        told = check(lying, ledger=ledger, log=entries)
        assert any(said in fault for fault in told.faults), told.faults
    assert check(certificate.read(data), ledger=ledger, log=entries).faults == ()


def test_fewer_steps_than_the_ledger_counts(charged: Site, data: bytes, exported: bytes) -> None:
    found = certificate.read(data)
    used = gate.mechanism(STUDY)
    steps = found.steps_started - 1
    values = {
        "steps_started": steps,
        "epsilon_run": epsilon_pld(
            used.noise_multiplier, used.sampling_rate, steps, STUDY.privacy.delta
        ),
    }
    lying = changed(data, charged.identity(), **values)
    assert check(lying).faults == ()
    told = check(lying, ledger=ledger_export.read(exported))
    assert f"counts {found.steps_started} steps of this run" in " ".join(told.faults)


@pytest.mark.slow
def test_the_ledger_of_another_site_or_time(charged: Site, data: bytes, exported: bytes) -> None:
    ledger = ledger_export.read(exported)
    stranger = changed(data, Identity.generate())
    assert check(stranger, ledger=ledger).faults == ("The ledger belongs to another site.",)
    moved = changed(data, charged.identity(), ledger="0" * 64)
    assert check(moved, ledger=ledger).faults == (
        "The ledger has no entry with the hash in the certificate.",
    )


def test_what_left_is_held_against_the_log(charged: Site, data: bytes) -> None:
    left = [{"message": "exchanged", "count": 1, "bytes": 10}]
    told = check(changed(data, charged.identity(), left=left), log=entries_of(charged))
    assert told.faults == (
        "The messages of this run in the audit log differ from those in the certificate.",
    )


@pytest.mark.parametrize("line", [0, 3, -2, -1])
def test_an_export_with_one_digit_changed(exported: bytes, line: int) -> None:
    lines = exported.splitlines(keepends=True)
    for place, byte in enumerate(lines[line]):
        if chr(byte).isdigit():
            other = b"1" if byte != ord("1") else b"2"
            new = lines[line][:place] + other + lines[line][place + 1 :]
            broken = [*lines]
            broken[line] = new
            with raises(CertificateInvalid):
                ledger_export.read(b"".join(broken))


@pytest.mark.parametrize("field", ["site", "format"])
def test_an_export_whose_last_line_says_what_nobody_signed(exported: bytes, field: str) -> None:
    *lines, last = exported.splitlines(keepends=True)
    said = json.loads(last)
    assert ledger_export.read(exported).site == said["site"] == "anker"
    said[field] = "birke" if field == "site" else said["format"] + 1
    with raises(CertificateInvalid, match="signature in its last line does not match"):
        ledger_export.read(b"".join(lines) + json.dumps(said).encode() + b"\n")


def test_an_export_with_a_number_that_is_not_finite(exported: bytes) -> None:
    first, *rest = exported.splitlines(keepends=True)
    said = json.loads(first)
    said["body"]["delta"] = float("nan")
    with raises(CertificateInvalid, match="Line 1 has a number that is not finite"):
        ledger_export.read(json.dumps(said).encode() + b"\n" + b"".join(rest))


def test_an_export_that_lacks_a_line(exported: bytes) -> None:
    lines = exported.splitlines(keepends=True)
    for gone in (0, 2, len(lines) - 2, len(lines) - 1):
        with raises(CertificateInvalid):
            ledger_export.read(b"".join(lines[:gone] + lines[gone + 1 :]))


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    sigma=st.floats(0.6, 20),
    q=st.one_of(st.just(1.0), st.floats(0.001, 0.5)),
    steps=st.integers(1, 1000),
)
def test_renyi_is_never_below_the_privacy_loss(sigma: float, q: float, steps: int) -> None:
    tight = epsilon_pld(sigma, q, steps, 1e-5)
    loose = epsilon_rdp(sigma, q, steps, 1e-5)
    assert loose >= tight - 1e-6
    if tight < 10:
        assert abs(epsilon_prv(sigma, q, steps, 1e-5) - tight) <= 0.02


# The commands.


def invoke(site: Site, *words: str) -> Result:
    return commands.invoke(client_group.app, "certificate", *words, "--dir", site.root)


def test_the_commands_write_and_check(
    charged: Site, exported: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, ledger = tmp_path / "anker.json", tmp_path / "ledger.jsonl"
    ledger.write_bytes(exported)
    told = invoke(charged, STUDY.digest[:16], "--run", "run-1", "--out", str(out)).output
    assert f"{STUDY.training.total_steps} of {STUDY.training.total_steps} steps" in told
    verify_command(out, against=path_of(charged), ledger=ledger, key=None, as_json=False)
    said = capsys.readouterr().out
    assert "The certificate of anker is valid" in said
    assert "by PRV (Opacus)" in said
    assert "the same as installed here" in said
    assert "lifetime     epsilon" in said
    verify_command(out, against=None, ledger=None, key=None, as_json=True)
    assert json.loads(capsys.readouterr().out)["holds"] is True
    with pytest.raises(OutputInTheWay):
        invoke(charged, STUDY.digest[:16], "--out", str(out))
    assert invoke(charged, STUDY.digest[:16]).output.startswith('{\n  "clipping_norm"')
    with raises(OptionInvalid, match="no such run"):
        invoke(charged, STUDY.digest[:16], "--run", "another")
    out.write_bytes(out.read_bytes().replace(b'"steps_started": ', b'"steps_started": 1'))
    with raises(CertificateInvalid, match="CLO-310"):
        verify_command(out, against=None, ledger=None, key=None, as_json=False)

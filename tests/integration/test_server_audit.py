"""The coordinator's log: every decision, run and refusal, and the command that tells them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from flwr.app import Context, Message

from cloister_fl.audit_log import examine, read
from cloister_fl.cli import main
from cloister_fl.client.app import app
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.folder import open_site
from cloister_fl.errors import AuditLogDamaged, SiteStateInvalid, TooFewSites
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.enrolment import Invite, Request
from cloister_fl.membership.identity import Identity, fingerprint
from cloister_fl.protocol.round_messages import SITE_KEY, Prepared, RoundMessage, pack
from cloister_fl.server.coordinator.federation import AUDIT
from cloister_fl.server.coordinator.folder import Coordinator
from cloister_fl.server.coordinator.rejection_log import Refusals, Refused
from cloister_fl.server.coordinator.site_approval import approve_site, invite_sites, revoke_site
from cloister_fl.server.results.audit_report import account, render
from cloister_fl.server.rounds.events import Event, Measured
from cloister_fl.simulation.run_folder import FEDERATION
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from support.coordinator_process import new_coordinator
from support.errors import raises
from support.federations import NAMES, study, write_federation
from support.message_tap import Between
from support.spending import disagreements


def _asked(place: Coordinator, name: str) -> bytes:
    """Invite a site and let it ask to join; its identity's public key."""
    (made,) = invite_sites(place, [name], 600, to_file=False)
    identity = Identity.generate()
    keys = (ec_keys.generate_pem(purpose) for purpose in (Purpose.NODE, Purpose.TLS))
    with place.registry() as registry:
        registry.use(Request.make(Invite.decode(made.line), identity, *keys))
    return identity.public


def _kinds(place: Coordinator) -> list[str]:
    return [entry.kind for entry in read(place.keys / AUDIT) if entry.kind != "signed"]


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main.main(["server", "audit", *arguments])
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_every_decision_is_logged_and_signed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = new_coordinator(tmp_path / "fed")
    assert _kinds(place) == ["roster"]
    public = _asked(place, "north")
    assert approve_site(place, "north")
    assert not approve_site(place, "north")
    invite_sites(place, ["south"], 600, to_file=True)
    revoke_site(place, "north")
    assert _kinds(place) == [
        *("roster", "invited", "approved", "roster", "invited", "revoked", "roster")
    ]
    root = place.federation_root()
    verdict = examine(place.keys / AUDIT, key=root)
    assert (verdict.findings, verdict.signed) == ((), verdict.entries - 1)
    told = {entry.kind: entry.body for entry in read(place.keys / AUDIT)}
    assert told["approved"]["key_fingerprint"] == fingerprint(public)
    assert told["roster"]["digest"] == place.federation().roster().digest.hex()
    status, out, _ = _run(capsys, "--dir", str(place.root))
    assert status == 0
    assert f"approved  north, key {fingerprint(public)}" in out
    assert "revoked   north" in out
    assert place.federation().roster().digest.hex() in out
    # An invite's secret lets whoever reads it in.
    log = (place.keys / AUDIT).read_text()
    line = (place.root / "invites" / "south.invite").read_text().strip()
    assert Invite.decode(line).secret.hex() not in log


def test_what_cannot_be_logged_is_not_approved_and_a_revoked_site_is_out_all_the_same(
    tmp_path: Path,
) -> None:
    place = new_coordinator(tmp_path / "fed")
    for name in ("north", "south"):
        _asked(place, name)
    assert approve_site(place, "north")
    log = place.keys / AUDIT
    log.write_bytes(log.read_bytes() + b"damage\n")

    def state(name: str) -> str:
        with place.registry() as registry:
            row = registry.site(name)
        assert row is not None
        return row.state

    with pytest.raises(AuditLogDamaged):
        invite_sites(place, ["west"], 600, to_file=True)
    assert not (place.root / "invites" / "west.invite").exists()
    with pytest.raises(AuditLogDamaged):
        approve_site(place, "south")
    assert state("south") == "pending"
    with pytest.raises(AuditLogDamaged):
        revoke_site(place, "north")
    assert state("north") == "revoked"


def test_a_decision_that_was_refused_is_not_logged(tmp_path: Path) -> None:
    place = new_coordinator(tmp_path / "fed")
    for act in (approve_site, revoke_site):
        with raises(SiteStateInvalid):
            act(place, "nobody")
    _asked(place, "north")
    with raises(SiteStateInvalid):
        invite_sites(place, ["north"], 600, to_file=False)
    assert _kinds(place) == ["roster", "invited"]


def test_who_was_turned_away_is_summed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = new_coordinator(tmp_path / "fed")
    older = Refusals(place.refusals)
    older.tell(Refused.NOT_TLS, "fleet", "192.0.2.1")
    older.close()
    place.refusals.rename(place.refusals.with_name("refused.jsonl.1"))
    refusals = Refusals(place.refusals)
    refusals.tell(Refused.NOT_TLS, "fleet", "192.0.2.2")
    refusals.tell(Refused.NOT_TLS, "enrolment", "192.0.2.2")
    refusals.tell(Refused.CERTIFICATE_REVOKED, "fleet", "192.0.2.3", site="north", status=403)
    for _ in range(40):
        refusals.tell(Refused.BUSY, "fleet", "192.0.2.4")
    refusals._buckets[Refused.BUSY].level = 1
    refusals.tell(Refused.BUSY, "fleet", "192.0.2.4")
    refusals.close()
    with place.refusals.open("a") as file:
        file.write('{"time": "2026-01-01", "event": "refu')
    status, out, _ = _run(capsys, "--dir", str(place.root), "--json")
    assert status == 0
    told = {(one["listener"], one["code"]): one for one in json.loads(out)["turned_away"]}
    assert {key: (one["count"], one["peers"]) for key, one in told.items()} == {
        ("fleet", "not-tls-1.3"): (2, 2),
        ("enrolment", "not-tls-1.3"): (1, 1),
        ("fleet", "certificate-revoked"): (1, 1),
        ("fleet", "busy"): (41, 1),
    }
    assert told["fleet", "certificate-revoked"]["sites"] == ["north"]
    words = render(account(place.keys / AUDIT, refused=place.refusals))
    assert "certificate-revoked" in words
    assert "with the certificate of north" in words


def test_a_run_is_told_with_its_bytes_and_its_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = write_federation(tmp_path / "sites", images=1)
    out = tmp_path / "run"

    asked: list[tuple[str, str]] = []

    def spoil(name: str, task: RoundMessage) -> RoundMessage | None:
        asked.append((name, task.kind))
        if task.kind == "train" and name == "anker" and getattr(task, "round", 0) == 2:
            asked.append((name, "failed"))
            return None
        if task.kind == "train" and name == "birke" and getattr(task, "round", 0) == 3:
            site = out / "sites" / "birke" / "site.toml"
            site.write_text(site.read_text().replace('approve = "none"', 'aprove = "none"'))
        return task

    summary = run_simulation(Simulation(study(), sites, out), client_app=Between(spoil))
    status, text, _ = _run(capsys, "--dir", str(out), "--json")
    assert status == 0
    told = json.loads(text)
    (run,) = told["runs"]
    assert (run["run"], run["study"], run["ended"]) == (summary["run"], study().digest, "done")
    assert (run["sites"], run["summed"], run["lost"]) == (list(NAMES), [1, 2, 3], [])
    assert run["refused"] == {"birke": "declined"}
    came = {one["site"]: one for one in told["sites"]}
    assert set(came) == set(NAMES)
    assert {name: one["bytes"] for name, one in came.items()} == summary["bytes_sent_per_site"]
    for name, one in came.items():
        seen = Counter(kind for who, kind in asked if who == name)
        assert one["unanswered"] == seen.pop("failed", 0)
        assert one["asked"] == seen
        assert sum(one["came"].values()) == sum(seen.values()) - one["unanswered"]
    assert came["anker"]["unanswered"] >= 1
    assert came["birke"]["refused"]["declined"] >= 1
    assert came["clara"]["refused"] == {}
    status, text, _ = _run(capsys, "--log", str(out / FEDERATION / AUDIT))
    assert status == 0
    assert "3 aggregated" in text
    assert "birke: it declined; the reason is shown at the site" in text
    assert "its node failed: " in text


def test_a_run_that_ended_early_says_so_and_by_what(tmp_path: Path) -> None:
    sites = write_federation(tmp_path / "sites", patients=24, images=1)
    (sites / "anker" / "site.toml").write_text('[site]\nname = "anker"\n')
    with pytest.raises(TooFewSites):
        run_simulation(Simulation(study(), sites, tmp_path / "run"))
    log = tmp_path / "run" / FEDERATION / AUDIT
    (run,) = account(log).runs
    assert (run.ended, run.refused, run.began) == ("CLO-501", {"anker": "policy"}, [])
    assert examine(log).findings == ()
    assert "anker: its policy does not allow the study" in render(account(log))


@pytest.mark.slow
def test_a_resumed_run_is_one_run(tmp_path: Path) -> None:
    sites = write_federation(tmp_path / "sites", images=1)
    out = tmp_path / "run"

    def stop(event: Event) -> None:
        if isinstance(event, Measured) and event.figures.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_simulation(Simulation(study(), sites, out), notify=stop)
    (run,) = account(out / FEDERATION / AUDIT).runs
    assert run.ended == ""
    assert "running or interrupted" in render(account(out / FEDERATION / AUDIT))
    run_simulation(Simulation(study(), sites, out, resume=True))
    (run,) = account(out / FEDERATION / AUDIT).runs
    assert (len(run.began), run.ended) == (2, "done")


@pytest.mark.slow
def test_a_site_folder_that_was_rolled_back_as_a_whole_is_found_by_what_the_coordinator_noted(
    tmp_path: Path,
) -> None:
    """Ledger, high-water file and audit log fit each other; only the coordinator's log tells."""
    sites = write_federation(tmp_path / "sites", images=1)
    out, old = tmp_path / "run", tmp_path / "old"
    anker = out / "sites" / "anker"

    def stop(event: Event) -> None:
        if isinstance(event, Measured) and event.figures.round == 1:
            shutil.copytree(anker, old)
        if isinstance(event, Measured) and event.figures.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_simulation(Simulation(study(), sites, out), notify=stop)
    shutil.rmtree(anker)
    shutil.copytree(old, anker)
    assert disagreements(open_site(anker)) == ()
    summary = run_simulation(Simulation(study(), sites, out, resume=True))
    assert summary["refused"] == {"anker": "declined"}
    assert summary["rounds"] == 3
    site = open_site(anker)
    wrong = ("The coordinator has an entry of the audit log that the log itself lacks.",)
    assert disagreements(site) == wrong
    spent = Ledger.open(site.ledger, delta=site.policy.ledger_delta).spent(study().digest)
    assert sum(steps for _, steps in spent) == 2
    assert disagreements(open_site(out / "sites" / "birke")) == ()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 300_000, "unreadable"),  # More than any answer to the study has.
        ("x" * 3_000, "message"),
        ("a b=c; d", "message"),
        *(pytest.param(name, "message", marks=pytest.mark.slow) for name in ("Ä", "")),
    ],
    ids=["larger than an answer", "long", "spaces", "umlaut", "empty"],
)
def test_what_a_site_calls_itself_does_not_spoil_the_log(
    tmp_path: Path, name: str, reason: str
) -> None:
    """Without masks there is no roster, and nobody checks who a site is."""
    sites = write_federation(tmp_path / "sites", images=1)
    out = tmp_path / "run"

    def liar(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if Path(str(context.node_config[SITE_KEY])).name == "anker":
            reply.content = pack(Prepared(name, b"", ""))
        return reply

    asked = study(aggregation="secure = false\nmin_sites = 4", training="rounds = 1")
    run_simulation(Simulation(asked, sites, out), client_app=liar)
    (run,) = account(out / FEDERATION / AUDIT).runs
    assert run.ended == "done"
    assert run.sites == list(NAMES[1:])
    assert list(run.refused.values()) == [reason]
    assert examine(out / FEDERATION / AUDIT).findings == ()


def test_a_damaged_log_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = new_coordinator(tmp_path / "fed")
    invite_sites(place, ["north"], 600, to_file=False)
    log = place.keys / AUDIT
    rows = log.read_text().splitlines(keepends=True)
    log.write_text("".join(rows[:1] + rows[2:]))
    status, _, err = _run(capsys, "--dir", str(place.root))
    assert (status, err[:8]) == (4, "CLO-306:")
    assert "line 2" in err.lower()
    # A whole new log, soundly signed by somebody else.
    other = new_coordinator(tmp_path / "other")
    log.write_bytes((other.keys / AUDIT).read_bytes())
    status, _, err = _run(capsys, "--dir", str(place.root))
    assert (status, err[:8]) == (4, "CLO-306:")
    assert "not validly signed" in err


@pytest.mark.parametrize("arguments", [("--dir", "."), ("--log", "nowhere")])
def test_a_place_without_a_log_is_a_named_error(
    tmp_path: Path,
    arguments: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = _run(capsys, *arguments)
    assert (status, err[:8]) == (2, "CLO-106:")

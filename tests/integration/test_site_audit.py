"""What a site's log says after a run: every message, and why it might leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloister_fl.audit_log import examine
from cloister_fl.cli import main
from cloister_fl.client.site.audit_log import entries_of, path_of, what_left
from cloister_fl.client.site.folder import Site, open_site
from cloister_fl.errors import TooFewSites
from cloister_fl.server.coordinator.federation import AUDIT
from cloister_fl.simulation.run_folder import FEDERATION
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from support.federations import NAMES, study, write_federation
from support.message_tap import Between


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Between]:
    root = tmp_path_factory.mktemp("audited")
    sites = write_federation(root / "sites")
    wire = Between()
    run_simulation(Simulation(study(), sites, root / "run"), client_app=wire)
    return root / "run", wire


def _site(out: Path, name: str) -> Site:
    return open_site(out / "sites" / name)


def test_every_message_is_in_the_log_with_its_bytes(run: tuple[Path, Between]) -> None:
    out, wire = run
    summary = json.loads((out / "summary.json").read_text())
    for name in NAMES:
        entries = entries_of(_site(out, name))
        sent = [entry for entry in entries if entry.kind == "sent"]
        assert len(sent) == sum(who == name for who, _, _ in wire.replies)
        left = sum(int(entry.body["bytes"] or 0) for entry in sent)
        assert left == summary["bytes_sent_per_site"][name]
        assert {one.message for one in what_left(entries)} == {"prepared", "exchanged"}
        asked = [entry.body["message"] for entry in entries if entry.kind == "asked"]
        assert asked == ["prepare", "exchange", "exchange", *["train", "exchange"] * 3]


def test_both_sides_fit_together(run: tuple[Path, Between]) -> None:
    out, _ = run
    coordinator = out / FEDERATION / AUDIT
    for name in NAMES:
        site = _site(out, name)
        verdict = examine(path_of(site), key=site.identity().public, peer=coordinator)
        assert verdict.findings == ()
        assert verdict.signed > 0
        assert examine(coordinator, peer=path_of(site)).findings == ()


def test_what_one_side_sent_the_other_received_to_the_hash(run: tuple[Path, Between]) -> None:
    from cloister_fl.audit_log import read

    out, _ = run
    received = {
        entry.body["sha256"] for entry in read(out / FEDERATION / AUDIT) if entry.kind == "received"
    }
    for name in NAMES:
        entries = entries_of(_site(out, name))
        sent = {entry.body["sha256"] for entry in entries if entry.kind == "sent"}
        assert sent <= received


def test_an_end_that_was_cut_off_is_found_by_the_coordinator_s_log(
    run: tuple[Path, Between], tmp_path: Path
) -> None:
    out, _ = run
    site = _site(out, "anker")
    rows = path_of(site).read_text().splitlines(keepends=True)
    (tmp_path / "cut").write_text("".join(rows[:-6]))
    coordinator = out / FEDERATION / AUDIT
    assert examine(tmp_path / "cut").findings == ()
    assert any(
        "it is missing" in found.what
        for found in examine(tmp_path / "cut", peer=coordinator).findings
    )


def test_a_site_whose_log_is_damaged_answers_nothing(tmp_path: Path) -> None:
    sites = write_federation(tmp_path / "sites")
    out = tmp_path / "run"
    hit: list[str] = []

    def damage(name: str, task: object) -> object:
        if getattr(task, "kind", "") == "train" and name == "anker" and not hit:
            hit.append(name)
            path = path_of(_site(out, name))
            path.write_text(path.read_text() + "nonsense\n")
        return task

    wire = Between(damage)  # type: ignore[arg-type]
    summary = run_simulation(Simulation(study(), sites, out), client_app=wire)
    assert summary["refused"] == {"anker": "declined"}
    kinds = [getattr(reply, "kind", "") for name, _, reply in wire.replies if name == "anker"]
    assert kinds[3:] == ["refusal"] * len(kinds[3:])
    assert len(kinds) > 3


def test_a_refusal_is_in_the_log_with_its_reason(tmp_path: Path) -> None:
    sites = write_federation(tmp_path / "sites")
    (sites / "anker" / "site.toml").write_text('[site]\nname = "anker"\n')
    with pytest.raises(TooFewSites):
        run_simulation(Simulation(study(), sites, tmp_path / "run"))
    (left,) = what_left(entries_of(open_site(sites / "anker")))
    assert (left.message, left.why) == ("refusal", "a reason of the closed list: policy")


def test_the_command_says_what_left(
    run: tuple[Path, Between], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run
    folder = str(out / "sites" / "anker")
    with pytest.raises(SystemExit) as caught:
        main.main(["client", "audit", "--dir", folder])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert "8 x exchanged" in told
    assert "masked vectors" in told
    with pytest.raises(SystemExit):
        main.main(["client", "audit", "--dir", folder, "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["site"] == "anker"
    assert answer["asked"] == 9
    assert {one["message"]: one["count"] for one in answer["left"]} == {
        "prepared": 1,
        "exchanged": 8,
    }
    (decision,) = answer["judged"]
    assert (decision["study"], decision["decision"]) == (study().digest, "approved")
    (frozen,) = answer["frozen"]
    assert (frozen["study"], frozen["images"], frozen["why"]) == (study().digest, 20, "")
    assert decision["data"] == frozen["sha256"]
    data = frozen["sha256"][:16]
    assert f"{study().digest[:16]} approved by the steward, with the data {data}" in told
    assert f"{study().digest[:16]} 20 images, data {data}" in told

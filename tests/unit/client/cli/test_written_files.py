"""Files that a command writes where a person says: never where git would offer them."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from cloister_fl.cli import study_commands
from cloister_fl.client.admission.approvals import Decision, judge
from cloister_fl.client.cli import client_group
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import OutputInTheWay
from cloister_fl.membership.identity import Identity
from cloister_fl.system.files import GIT_IGNORE, read_secret
from support import commands, spending, studies
from support.errors import raises
from support.federations import SEEN, study

WROTE = ("# Written by Cloister: what lies here is secret, or of patients, and is no source.",)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder is a clone; the site's folder is not in it."""
    folder = tmp_path / "clone"
    (folder / ".git").mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Site:
    policy = Policy(patients_at_most=1_000, max_epsilon_study=6, max_epsilon_lifetime=9)
    site, asked = init_site(tmp_path / "site", name="north", policy=policy), study()
    judge(site, asked, Decision.APPROVED, data=SEEN)
    spending.admit(site, asked, run="run-1", invited=max(5, asked.aggregation.min_sites))
    return site


ROOT = typer.Typer()
ROOT.add_typer(client_group.app, name="client")
ROOT.add_typer(study_commands.app, name="study")
COMMANDS = {
    "sheet.png": ("client", "check", "--offline", "--contact-sheet", "sheet.png"),
    "look.png": ("client", "quarantine", "show", "0" * 12, "--png", "look.png"),
    "audit.svg": ("client", "privacy-audit", "--study", "s.toml", "--plot", "audit.svg"),
    "ledger.jsonl": ("client", "budget", "export", "--out", "ledger.jsonl"),
    "signer.pem": ("study", "key", "signer.pem"),
    "data-report.html": ("client", "data-report", "--out", "."),
}


def run(site: Site, name: str) -> int:
    words = COMMANDS[name]
    where = ("--dir", site.root) if words[0] == "client" else ()
    return commands.invoke(ROOT, *words, *where).exit_code


@pytest.mark.parametrize("name", COMMANDS)
def test_beside_a_persons_own_gitignore_it_is_refused_before_the_work(
    clone: Path, site: Site, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in (
        "cloister_fl.client.preflight.findings.machine",
        "cloister_fl.client.data.quarantine.quarantined_files",
        "cloister_fl.client.privacy_audit.own_data.check",
        "cloister_fl.client.steward.data_report.survey",
    ):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("it went to work"))
    (clone / "s.toml").write_text(studies.study_text())
    (clone / GIT_IGNORE).write_text("*.pyc\n")
    with raises(OutputInTheWay, match=f"^CLO-104: {name} would lie in a git repository"):
        run(site, name)
    assert sorted(path.name for path in clone.iterdir()) == [".git", GIT_IGNORE, "s.toml"]
    assert (clone / GIT_IGNORE).read_text() == "*.pyc\n"


@pytest.mark.parametrize("name", ["ledger.jsonl", "signer.pem"])
def test_where_there_is_none_it_is_covered_by_name(clone: Path, site: Site, name: str) -> None:
    assert run(site, name) == 0
    lines = (clone / GIT_IGNORE).read_text().splitlines()
    assert lines == [*WROTE, "/.gitignore", f"/{name}"]
    assert (clone / name).is_file()


def test_the_key_that_is_covered_is_the_signers(clone: Path, site: Site) -> None:
    run(site, "signer.pem")
    key = Identity.from_pem(read_secret(clone / "signer.pem")).public.hex()
    assert len(key) == 64
    with raises(OutputInTheWay, match="exists already"):
        run(site, "signer.pem")

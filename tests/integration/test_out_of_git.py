"""What a command makes of keys, ledgers and patients' data is never offered to a commit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cloister_fl.cli.study_commands import app as study_cli
from cloister_fl.client.cli import client_group as client_cli
from cloister_fl.client.network.join import prepare
from cloister_fl.client.predictions.output import write_masks
from cloister_fl.client.site.folder import init_site
from cloister_fl.client.steward.data_report import HTML, JSON, Report, write
from cloister_fl.errors import OptionInvalid, OutputInTheWay
from cloister_fl.membership.enrolment import Invite
from cloister_fl.server.cli.server_group import app as server_cli
from cloister_fl.server.coordinator.folder import Layout, init_coordinator
from cloister_fl.simulation import demo
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.system.files import GIT_IGNORE, is_unused, read_secret
from cloister_fl.system.git_ignore import _is_covered, keep_out_of_git
from support.errors import raises
from support.federations import study, write_federation

ROOT = Path(__file__).parents[2]
GIT = shutil.which("git")
COVERS_ALL = b"*"

pytestmark = pytest.mark.skipif(GIT is None, reason="git is not installed")


def git(folder: Path, *arguments: str) -> str:
    environment = {
        **os.environ,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
    }
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        environment.pop(name, None)
    return subprocess.run(
        ["git", "-C", folder, *arguments],
        capture_output=True, text=True, check=True, env=environment,
    ).stdout  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    folder.mkdir()
    git(folder, "init", "--quiet")
    return folder


def offered(repository: Path) -> list[str]:
    """What `git add --all` would take, file by file."""
    return git(repository, "status", "--porcelain", "--untracked-files=all").splitlines()


def files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def test_both_sides_folders(repository: Path) -> None:
    run = CliRunner().invoke
    made = run(client_cli.app, ["init", str(repository / "north")])
    assert made.exit_code == 0, made.output
    asked = ["init", str(repository / "fed"), "--address", "127.0.0.1:9443", "--invite", "north"]
    made = run(server_cli, asked)
    assert made.exit_code == 0, made.output
    (invite,) = (repository / "fed" / "invites").glob("*.invite")
    prepare(repository / "joined", Invite.decode(invite.read_text().strip()))
    for name, least in (("north", 5), ("fed", 10), ("joined", 5)):
        assert files(repository / name) >= least
        assert COVERS_ALL in (repository / name / GIT_IGNORE).read_bytes().splitlines()
    assert offered(repository) == []


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(init_site, id="client init"),
        pytest.param(lambda folder: init_coordinator(folder, None), id="server init"),
    ],
)
def test_a_folder_of_an_earlier_version_gets_one_and_a_persons_own_stays(
    repository: Path, again: Callable[[Path], object], request: pytest.FixtureRequest
) -> None:
    folder = repository / "place"
    if "server" in request.node.callspec.id:
        init_coordinator(folder, Layout(("127.0.0.1:9443",)))
    else:
        init_site(folder)
    for each in folder.rglob(GIT_IGNORE):
        each.unlink()
    assert len(offered(repository)) >= 4
    again(folder)
    assert offered(repository) == []
    (folder / GIT_IGNORE).write_text("keys/\n")
    again(folder)
    assert (folder / GIT_IGNORE).read_text() == "keys/\n"


def test_joining_with_an_older_folder(repository: Path) -> None:
    init_site(repository / "north")
    (repository / "north" / GIT_IGNORE).unlink()
    place = init_coordinator(repository / "fed", Layout(("127.0.0.1:9443",)))
    assert (
        CliRunner().invoke(server_cli, ["invite", "north", "--dir", str(place.root)]).exit_code == 0
    )
    (invite,) = (repository / "fed" / "invites").glob("*.invite")
    prepare(repository / "north", Invite.decode(invite.read_text().strip()))
    assert offered(repository) == []


def test_a_simulation(repository: Path, tmp_path: Path) -> None:
    sites = write_federation(tmp_path / "sites", images=1)
    run_simulation(Simulation(study(training="rounds = 1"), sites, repository / "run"))
    assert (repository / "run" / "model.safetensors").is_file()
    assert files(repository / "run") > 30
    assert offered(repository) == []


@pytest.mark.slow
def test_a_folder_with_a_gitignore_alone_is_an_empty_one(repository: Path, tmp_path: Path) -> None:
    """So what a start leaves that was killed at once does not stand in the way of the next."""
    sites = write_federation(tmp_path / "sites", images=1)
    out = repository / "run"
    out.mkdir()
    (out / GIT_IGNORE).write_text("# mine\n*\n")
    run_simulation(Simulation(study(training="rounds = 1"), sites, out))
    assert (out / GIT_IGNORE).read_text() == "# mine\n*\n"
    with pytest.raises(OutputInTheWay):
        run_simulation(Simulation(study(training="rounds = 1"), sites, out))


def test_a_demo(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(folder: Path, **_: object) -> None:
        folder.mkdir()
        (folder / "1.dcm").touch()

    monkeypatch.setattr("cloister_fl.simulation.synthetic_sites.draw_federation", draw)
    monkeypatch.setattr(demo, "simulate", lambda *_, **__: None)
    out = repository / "out"
    demo.run_demo(out, seed=0, engine="in-process", progress=False)
    assert files(out) == 4
    assert offered(repository) == []
    with pytest.raises(OutputInTheWay):
        demo.run_demo(out, seed=0, engine="in-process", progress=False)
    shutil.rmtree(out / "data")
    (out / "study.toml").unlink()
    demo.run_demo(out, seed=0, engine="in-process", progress=False)
    assert files(out) == 4


def test_a_data_report_in_a_folder_of_its_own(repository: Path) -> None:
    report = Report("north", None, 0, 0, 0, {}, {}, 0, (), (), (), None)
    write(report, repository / "made")
    (repository / "empty").mkdir()
    write(report, repository / "empty")
    write(report, repository / "older")
    (repository / "older" / GIT_IGNORE).unlink()
    write(report, repository / "older")
    assert offered(repository) == []
    # A folder with other files is a person's: its own files are offered, the report is not.
    (repository / "mine").mkdir()
    (repository / "mine" / "notes.txt").touch()
    write(report, repository / "mine")
    write(report, repository / "mine")
    assert {path.name for path in (repository / "mine").iterdir()} == {
        HTML, JSON, "notes.txt", GIT_IGNORE,
    }  # fmt: skip
    assert offered(repository) == ["?? mine/notes.txt"]
    # Beside a .gitignore that a person wrote, nothing is written that git would offer.
    (repository / GIT_IGNORE).write_text("*.pyc\n")
    with raises(OutputInTheWay, match="does not cover it"):
        write(report, repository)
    assert (repository / GIT_IGNORE).read_text() == "*.pyc\n"
    assert offered(repository) == [f"?? {GIT_IGNORE}", "?? mine/notes.txt"]


def test_no_image_is_read_for_a_report_that_cannot_be_written(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister_fl.client.steward.data_report.survey", pytest.fail)
    (repository / GIT_IGNORE).write_text("/site/\n")
    init_site(repository / "site")
    words = ["data-report", "--dir", str(repository / "site"), "--out", str(repository)]
    assert isinstance(CliRunner().invoke(client_cli.app, words).exception, OutputInTheWay)


PATTERNS = (
    *("*.csv", "scores.csv", "/scores.csv", "scores.*", "scores.cs?", "scores.csv  ", "*"),
    *("out", "out/", "/out/", "out/*", "out/scores.csv", "/out/scores.csv", "ou*/sc*"),
    *("scores.csv/", "/scores.cs", "*.csv\n!scores.csv", "*.csv\n!*.csv\nscores.csv"),
    *("out/\n!out/scores.csv", "# scores.csv", "", "!scores.csv", "SCORES.csv", "scores.csv\r"),
    *("*.txt\r\n*.csv\r", "a/scores.csv", "/*/scores.csv", "*/scores.csv", "out/out/scores.csv"),
    *(
        "**",
        "**/scores.csv",
        "[s]cores.csv",
        "\\scores.csv",
        "*\n!**/scores.csv",
        "*\n![s]cores.csv",
    ),
)


@pytest.mark.parametrize("patterns", PATTERNS, ids=repr)
@pytest.mark.parametrize("where", ["", "out"], ids=["above", "beside"])
def test_what_a_gitignore_covers_is_what_git_says(
    repository: Path, patterns: str, where: str
) -> None:
    """Nothing is taken for covered that git would offer; what is not understood is refused."""
    (repository / "out").mkdir()
    path = repository / "out" / "scores.csv"
    path.touch()
    (repository / where / GIT_IGNORE).write_text(patterns + "\n", newline="")
    covered = "?? out/scores.csv" not in offered(repository)
    understood = not any(sign in patterns for sign in ("**", "[", "\\"))
    assert _is_covered(path, repository) is (covered and understood)


def test_a_signers_key(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    made = CliRunner().invoke(study_cli, ["key", "signer.pem"])
    assert made.exit_code == 0, made.output
    assert read_secret(Path("signer.pem"))
    assert offered(repository) == []


def test_segmentation_masks(repository: Path) -> None:
    write_masks(repository / "found", [], np.zeros((0, 8, 8), bool))
    assert files(repository / "found") == 1
    (repository / "found" / "2.25.1.png").touch()
    assert offered(repository) == []


def test_what_the_readme_writes_into_the_clone(repository: Path) -> None:
    shutil.copy(ROOT / GIT_IGNORE, repository)
    git(repository, "add", GIT_IGNORE)
    for name in ("sites/north/labels.csv", "holdout/labels.csv", "new-images/1.dcm"):
        (repository / name).parent.mkdir(parents=True)
        (repository / name).touch()
    for name in ("scores.csv", "sheet.png"):
        (repository / name).touch()
    assert offered(repository) == [f"A  {GIT_IGNORE}"]


def test_a_gitignore_is_written_whole_and_once(tmp_path: Path) -> None:
    assert is_unused(tmp_path)
    keep_out_of_git(tmp_path)
    assert is_unused(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [GIT_IGNORE]
    assert (tmp_path / GIT_IGNORE).stat().st_mode & 0o777 == 0o600
    (tmp_path / GIT_IGNORE).write_bytes(b"")
    keep_out_of_git(tmp_path)
    assert (tmp_path / GIT_IGNORE).read_bytes() == b""
    (tmp_path / "file").touch()
    assert not is_unused(tmp_path)
    with pytest.raises(OutputInTheWay):
        keep_out_of_git(tmp_path / "nowhere")


def test_keys_and_invites_stay_out_under_a_persons_own_gitignore(repository: Path) -> None:
    """``init .`` in a clone: what is there covers something else, so the commands say so."""
    for words in (
        ["client", "init", "site"],
        ["server", "init", "fed", "--address", "127.0.0.1:9443", "--invite", "a"],
    ):
        folder = repository / words[2]
        folder.mkdir()
        (folder / ".gitignore").write_text("*.pyc\n")
        words[2] = str(folder)
        side = client_cli.app if words[0] == "client" else server_cli
        result = CliRunner().invoke(side, words[1:])
        assert result.exit_code == 0, result.output
        assert "add a line with * to it" in result.stderr
    assert [name for name in offered(repository) if "/keys/" in name or "/invites/" in name] == []


def test_a_folder_is_one_sides_alone(tmp_path: Path) -> None:
    """Both sides keep keys under the same names; the second would have added its own to them."""
    site = init_site(tmp_path / "site").root
    fed = init_coordinator(tmp_path / "fed", Layout(("127.0.0.1:9443",))).root
    before = files(site), files(fed)
    with raises(OptionInvalid, match="is a coordinator's folder"):
        init_site(fed)
    with raises(OptionInvalid, match="is a site folder"):
        init_coordinator(site, Layout(("127.0.0.1:9443",)))
    assert (files(site), files(fed)) == before


def test_joining_says_what_a_persons_own_gitignore_leaves_out(repository: Path) -> None:
    place = init_coordinator(repository / "fed", Layout(("127.0.0.1:1",)))
    run = CliRunner().invoke
    assert run(server_cli, ["invite", "north", "--dir", str(place.root)]).exit_code == 0
    (repository / "north").mkdir()
    (repository / "north" / ".gitignore").write_text("*.pyc\n")
    invite = place.root / "invites" / "north.invite"
    # Nobody answers: it is said before the coordinator is asked.
    result = run(client_cli.app, ["join", str(invite), "--dir", str(repository / "north")])
    assert "add a line with * to it" in result.stderr
    assert [name for name in offered(repository) if "/keys/" in name] == []

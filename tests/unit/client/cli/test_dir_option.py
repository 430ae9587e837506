"""`--dir` names one folder for `client` and `server`, wherever it stands on the line.

A ``--dir`` given to a command group was dropped: ``client budget --dir ../seafield close ID``,
typed in ``northgate/``, closed northgate's study.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cloister_fl.cli import main
from cloister_fl.cli.folder_option import dir_option, one_folder
from cloister_fl.client.admission.approvals import Decision, judge, require_approved
from cloister_fl.client.site.folder import SITE_FILE, Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward import budget
from cloister_fl.errors import OptionInvalid, StudyNotApproved
from support import spending
from support.errors import is_of, raises
from support.federations import SEEN, study

STUDY = study()
SIDES = ("client", "server")
ROOT = main.build()


def commands() -> Iterator[tuple[str, ...]]:
    """Each command of both sides, and each group that is a command itself."""

    def walk(at: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if not isinstance(at, click.Group) or at.invoke_without_command:
            yield path
        if isinstance(at, click.Group):
            for name, command in at.commands.items():
                yield from walk(command, (*path, name))

    assert isinstance(ROOT, click.Group)
    for side in SIDES:
        yield from walk(ROOT.commands[side], (side,))


COMMANDS = list(commands())
Run = Callable[[tuple[str, ...], Mapping[int, list[str]]], Path]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command that does nothing, with words behind given levels; the folder it would use."""

    def call(path: tuple[str, ...], words: Mapping[int, list[str]]) -> Path:
        at = ROOT
        for name in path:
            assert isinstance(at, click.Group)
            at = at.commands[name]
        seen: list[Mapping[str, object]] = []
        monkeypatch.setattr(at, "callback", lambda **given: seen.append(given))
        needed = []
        for param in at.params:
            if param.required:
                needed += [param.opts[0], "x"] if isinstance(param, click.Option) else ["x"]
        line = [word for level, name in enumerate(path) for word in (name, *words.get(level, ()))]
        ROOT.main([*line, *needed], standalone_mode=False)
        (dest,) = [param.name for param in at.params if "--dir" in param.opts]
        (given,) = seen
        assert dest is not None
        return Path(str(given[dest]))

    return call


def test_the_tree_holds_the_commands_that_it_should() -> None:
    assert ("client", "budget") in COMMANDS
    assert ("client", "quarantine", "release") in COMMANDS
    assert ("server", "revoke") in COMMANDS
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_takes_dir_at_every_level(path: tuple[str, ...], run: Run) -> None:
    for level in range(len(path)):
        assert run(path, {level: ["--dir", "../seafield"]}) == Path("../seafield")
    everywhere = {level: ["--dir=../seafield"] for level in range(len(path))}
    assert run(path, everywhere) == Path("../seafield")


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_two_folders_on_a_line_are_refused(path: tuple[str, ...], run: Run) -> None:
    lines = [
        {above: ["--dir", "../seafield"], below: ["--dir", "here"]}
        for below in range(len(path))
        for above in range(below)
    ]
    lines += [{level: ["--dir", "../seafield", "--dir", "here"]} for level in range(len(path))]
    for words in lines:
        with raises(OptionInvalid, match=r"\.\./seafield and here"):
            run(path, words)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_an_empty_dir_does_not_mean_here(path: tuple[str, ...], run: Run) -> None:
    for level in range(len(path)):
        with raises(OptionInvalid, match="--dir is empty"):
            run(path, {level: ["--dir", ""]})


def test_two_ways_to_write_one_folder_are_one(run: Run, tmp_path: Path) -> None:
    words = {0: ["--dir", str(tmp_path)], 1: ["--dir", f"{tmp_path}/sub/.."]}
    assert run(("client", "check"), words).resolve() == tmp_path.resolve()


def test_a_value_of_another_option_is_no_folder(run: Run) -> None:
    words = {0: ["--dir", "a"], 2: ["--why", "--dir"]}
    with pytest.raises(click.UsageError):  # the ID is missing, and not the folder
        run(("client", "quarantine"), {0: ["--dir", "a"], 1: ["--dir"]})
    assert run(("client", "quarantine", "keep"), words) == Path("a")


@pytest.mark.parametrize("path", [*COMMANDS, *((side,) for side in SIDES)], ids=" ".join)
def test_help_shows_dir(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main([*path, "--help"])
    assert "--dir PATH" in capsys.readouterr().out


# The folder of init


@pytest.mark.parametrize(
    "words",
    [
        ("--dir", "new", "init"),
        ("init", "--dir", "new"),
        ("init", "new"),
        ("--dir", "new", "init", "./new"),
    ],
)
def test_init_makes_the_folder_that_is_named(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main.main(["client", *words])
    assert end.value.code == 0
    assert (tmp_path / "new" / SITE_FILE).exists()
    assert not (tmp_path / SITE_FILE).exists()


@pytest.mark.parametrize("side", SIDES)
def test_init_refuses_two_folders(
    side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["--dir", "one", "init", "two"], ["init", "two", "--dir", "one"]):
        with pytest.raises(SystemExit) as end:
            main.main([side, *words])
        assert end.value.code == OptionInvalid.exit_status
        assert "Two folders are named: one and two." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_coordinator_is_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main.main(["server", "init", "--address", "127.0.0.1:9443"])
    assert end.value.code == OptionInvalid.exit_status
    assert list(tmp_path.iterdir()) == []


def test_one_folder() -> None:
    assert one_folder(None, None) is None
    assert one_folder(Path("a"), None) == one_folder(None, Path("a")) == Path("a")
    with raises(OptionInvalid):
        one_folder(Path("a"), Path("b"))


def test_dir_option_is_quoted_and_left_out_for_here() -> None:
    assert dir_option(Path("../sea field")) == " --dir '../sea field'"
    assert dir_option(Path()) == ""


# What was lost by it


def charged(root: Path) -> Site:
    """A site that has approved a study, reserved its cost, and trained one round."""
    site = init_site(
        root, policy=Policy(patients_at_most=1_000, max_epsilon_study=6, max_epsilon_lifetime=9)
    )
    judge(site, STUDY, Decision.APPROVED, data=SEEN)
    invited = max(5, STUDY.aggregation.min_sites)
    spending.admit(site, STUDY, run="run-1", invited=invited)
    spending.charge(site, STUDY, run="run-1", round_number=1)
    return site


@pytest.mark.parametrize(
    "line",
    [
        "client budget --dir ../seafield close {} --yes",
        "client --dir ../seafield budget close {} --yes",
        "client budget close {} --dir ../seafield --yes",
    ],
)
def test_closing_seafields_study_from_northgates_folder(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    northgate, seafield = charged(tmp_path / "northgate"), charged(tmp_path / "seafield")
    ledger = northgate.ledger.read_bytes()
    monkeypatch.chdir(northgate.root)
    with pytest.raises(SystemExit) as end:
        main.main(line.format(STUDY.digest[:16]).split())
    assert end.value.code == 0
    assert budget.statement(seafield).studies[0].closed
    assert not budget.statement(northgate).studies[0].closed
    assert northgate.ledger.read_bytes() == ledger


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("status", "Start it: cloister client start --dir ../seafield\n"),
        ("status", f"cloister client review {STUDY.digest[:16]} --dir ../seafield\n"),
        ("approve", f"run: cloister client approve {STUDY.digest[:16]} --dir ../seafield\n"),
        ("quarantine show 0", "List them: cloister client quarantine --dir ../seafield\n"),
    ],
)
def test_the_next_command_is_for_the_same_site(
    words: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site = init_site(
        tmp_path / "seafield", policy=Policy(patients_at_most=1_000, max_epsilon_study=6)
    )
    with pytest.raises(StudyNotApproved):
        require_approved(site, STUDY)
    site.dicom.mkdir(exist_ok=True)
    (tmp_path / "northgate").mkdir()
    monkeypatch.chdir(tmp_path / "northgate")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(SystemExit):
        main.main(["client", "--dir", "../seafield", *words.split()])
    printed = capsys.readouterr()
    assert told in printed.out + printed.err


HOME_WORDS = [
    ("client --dir=~/site budget --dir={home}/site", "Site site: "),
    ("client budget --dir=~/site --json", '"site": "site"'),
    ("client status --dir ~/no-site", "{home}/no-site"),
    ("server sites --dir=~/fed", "{home}/fed"),
    ("server --dir=~/fed init {home}/fed --address=a:1", "{home}/fed"),
    ("study new ~/study.toml", "{home}/study.toml"),
    ("client init --dir=~/new --dicom=~/images --labels=~/l.csv", 'dicom = "{home}/images"'),
]


@pytest.mark.parametrize(("words", "told"), HOME_WORDS, ids=[words for words, _ in HOME_WORDS])
def test_a_tilde_that_the_shell_left_is_the_home_folder(
    words: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    init_site(home / "site")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(SystemExit):
        main.main(words.format(home=home).split())
    printed = capsys.readouterr()
    said = printed.out + printed.err
    if (home / "new").exists():
        said += (home / "new" / "site.toml").read_text()
    assert told.format(home=home) in said
    assert "Two folders" not in said
    assert list(elsewhere.iterdir()) == []
    assert not (home / "~").exists()


def test_every_path_of_every_command_knows_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/clara")
    found = 0

    def walk(at: click.Command) -> None:
        nonlocal found
        for parameter in at.params:
            if isinstance(parameter.type, click.Path):
                found += 1
                assert parameter.type.convert("~/x", parameter, None) == "/home/clara/x"
                assert parameter.type.convert("x~/~", parameter, None) == "x~/~"
            # A text is no path, whatever it begins with.
            elif parameter.type.name == "text":
                assert parameter.type.convert("~/x", parameter, None) == "~/x"
        for each in at.commands.values() if isinstance(at, click.Group) else ():
            walk(each)

    walk(ROOT)
    assert found > 60


@pytest.mark.parametrize(
    "words", [("client", "init", ""), ("server", "init", "", "--address", "a:1")]
)
def test_an_empty_positional_folder_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """An unset variable in ``init "$SITE"`` made a site, or a federation, where one stood."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main.build(), list(words))
    assert is_of(result.exception, OptionInvalid)
    assert "DIR is empty" in str(result.exception)
    assert list(tmp_path.iterdir()) == []

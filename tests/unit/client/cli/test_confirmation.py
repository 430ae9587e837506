"""Commands that cannot be undone name what they act on, and ask; `--yes` is for scripts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import Result

from cloister_fl.cli.confirm import DECLINED, ask
from cloister_fl.client.admission.approvals import Decision, judge
from cloister_fl.client.cli import client_group
from cloister_fl.client.data.frozen_dataset import path_of as manifest_of
from cloister_fl.client.site.audit_log import entries_of, path_of
from cloister_fl.client.site.folder import init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.site.settings import Network
from cloister_fl.client.steward import budget
from cloister_fl.errors import OptionInvalid, StudyNotApproved
from support import commands, spending
from support.dicom import make_dicom, radiograph, write_dicom
from support.errors import raises
from support.federations import SEEN, study, study_text
from support.spending import disagreements

pytestmark = pytest.mark.process


STUDY = study()


def invoke(words: list[str], said: str = "") -> Result:
    return commands.invoke(client_group.app, *words, said=said)


class Act:
    """A command that is final, on a site where it has something to do.

    Attributes:
        site: the site.
        words: the command, without ``--dir`` and ``--yes``.
    """

    def __init__(self, kind: str, root: Path) -> None:
        policy = Policy(
            patients_at_most=1_000,
            max_epsilon_study=6,
            max_epsilon_lifetime=9,
            min_patients=1,
        )
        self.site = init_site(root / "sea field", name="seafield", policy=policy)
        match kind:
            case "close":
                self._charge()
                self.words = ["budget", "close", STUDY.digest[:16]]
            case "accept-ledger":
                self._charge()
                self.site.ledger.unlink()
                self.words = ["budget", "accept-ledger"]
            case "freeze":
                self._data()
                path = root / "study.toml"
                path.write_text(study_text())
                invoke(["freeze", str(path), "--dir", str(self.site.root)])
                self.words = ["freeze", str(path), "--again", "--why", "sent again"]
            case _:
                self._data()
                listed = invoke(["quarantine", "--json", "--dir", str(self.site.root)]).stdout
                (held,) = json.loads(listed)["held"]
                self.words = ["quarantine", kind, held["id"], "--why", "no name"]

    def _charge(self) -> None:
        judge(self.site, STUDY, Decision.APPROVED, data=SEEN)
        invited = max(5, STUDY.aggregation.min_sites)
        spending.admit(self.site, STUDY, run="run-1", invited=invited)
        spending.charge(self.site, STUDY, run="run-1", round_number=1)

    def _data(self) -> None:
        lines = [f"PatientID,{STUDY.target.column}"]
        for number in range(4):
            name = STUDY.target.classes[number % 2]
            write_dicom(
                self.site.dicom / f"{number}.dcm", radiograph(number), patient_id=f"P{number}"
            )
            lines.append(f"P{number},{name}")
        held = make_dicom(radiograph(9), patient_id="P1", elements={"BurnedInAnnotation": "YES"})
        (self.site.dicom / "held.dcm").write_bytes(held)
        self.site.labels.write_text("\n".join(lines))

    def run(self, *more: str, said: str = "") -> Result:
        return invoke([*self.words, "--dir", str(self.site.root), *more], said)

    def left(self) -> dict[str, bytes]:
        """Every file that the command could change."""
        names = (self.site.ledger, path_of(self.site), self.site.root / "quarantine.json")
        found = {one.name: one.read_bytes() for one in names if one.exists()}
        frozen = manifest_of(self.site, STUDY)
        return found | ({"frozen": frozen.read_bytes()} if frozen.exists() else {})


@pytest.fixture(params=["close", "accept-ledger", "freeze", "release", "keep"])
def act(request: pytest.FixtureRequest, tmp_path: Path) -> Act:
    return Act(request.param, tmp_path)


@pytest.mark.usefixtures("at_a_terminal")
@pytest.mark.parametrize("said", ["n\n", "\n", ""], ids=["no", "enter", "ctrl-d"])
def test_no_changes_nothing(act: Act, said: str) -> None:
    before = act.left()
    result = act.run(said=said)
    assert f"Site seafield, in {act.site.root.resolve()}\n" in result.output
    assert "[y/N]" in result.output
    assert result.output.endswith("Nothing was changed.\n")
    assert result.exit_code == DECLINED != 0
    assert act.left() == before


@pytest.mark.usefixtures("at_a_terminal")
def test_yes_at_the_terminal_acts(act: Act) -> None:
    before = act.left()
    assert act.run(said="y\n").exit_code == 0
    assert act.left() != before


def test_the_option_acts_without_a_question(act: Act) -> None:
    before = act.left()
    result = act.run("--yes")
    assert result.exit_code == 0
    assert f"Site seafield, in {act.site.root.resolve()}\n" in result.output
    assert "[y/N]" not in result.output
    assert act.left() != before


def test_without_a_terminal_the_command_to_paste_is_told(act: Act) -> None:
    before = act.left()
    with raises(OptionInvalid, match="Not a terminal: ") as error:
        act.run(said="y\n")
    assert act.left() == before
    assert f"site seafield in {act.site.root.resolve()}" in error.value.what
    told = error.value.remedy.partition("run: ")[2]
    words = shlex.split(told)
    where = ["--dir", str(act.site.root.resolve()), "--yes"]
    assert words == ["cloister", "client", *act.words, *where]
    assert invoke(words[2:]).exit_code == 0
    assert act.left() != before


def test_what_is_closed_is_told_before(tmp_path: Path) -> None:
    act = Act("close", tmp_path)
    rest = STUDY.training.total_steps - STUDY.training.steps_per_round
    output = act.run("--yes").output
    assert f"The study {STUDY.study.name}, {STUDY.digest[:16]}, is closed for good" in output
    assert f"{rest} steps reserved" in output
    assert budget.statement(act.site).studies[0].closed


def test_a_study_that_was_closed_is_not_closed_again(tmp_path: Path) -> None:
    act = Act("close", tmp_path)
    act.run("--yes")
    before = act.left()
    again = act.run()
    assert again.exit_code == 0
    assert again.output == f"The study {STUDY.digest[:16]} was closed at seafield already.\n"
    assert act.left() == before


@pytest.mark.usefixtures("at_a_terminal")
@pytest.mark.parametrize("name", ["approve", "proxy", "fetch", "join"])
def test_the_end_of_the_input_is_no_answer(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-D where something is asked for: nothing is done, and that is said."""
    proxy = Network(proxy="http://p:1", proxy_user="u")
    site = init_site(tmp_path / "site", name="seafield", network=proxy)
    judge(site, STUDY, Decision.PENDING)
    monkeypatch.setattr("cloister_fl.client.pacs.fetch.set_secret", pytest.fail)
    # The look at the data, which comes before the question, found nothing wrong.
    looked = SimpleNamespace(faults=(), reading=object())
    check = "cloister_fl.client.preflight.data_check"
    monkeypatch.setattr(f"{check}.inspect", lambda *_, **__: looked)
    monkeypatch.setattr(f"{check}.render", lambda *_: "The data can be used.")
    more = ["--ask-secret"] if name == "fetch" else []
    before = {path: path.read_bytes() for path in site.root.rglob("*") if path.is_file()}
    result = invoke([name, *more, "--dir", str(site.root)])
    assert result.exit_code == (StudyNotApproved.exit_status if name == "approve" else DECLINED)
    assert ("stays pending" if name == "approve" else "Nothing was changed.\n") in result.output
    assert "resume" not in result.output
    assert {p: p.read_bytes() for p in site.root.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_an_interrupt_at_a_question_is_no_answer_either(
    end: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the command, whatever was still to be asked; Ctrl-D answers one question."""

    def ended(_: str) -> str:
        raise end

    monkeypatch.setattr("click.termui.visible_prompt_func", ended)
    if end is EOFError:
        assert ask("Continue?") is False
    else:
        with pytest.raises(click.Abort):
            ask("Continue?")


@pytest.mark.usefixtures("at_a_terminal")
def test_a_ledger_that_fits_is_not_asked_about(tmp_path: Path) -> None:
    act = Act("accept-ledger", tmp_path)
    assert "the ledger ends at entry 0." in act.run("--yes").output
    assert disagreements(act.site) == ()
    again = act.run()
    assert again.exit_code == 0
    assert again.output == "The ledger of seafield matches ledger.high and the audit log.\n"


def test_a_reason_that_is_none_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    act = Act("release", tmp_path)
    act.words[-1] = "two\nlines"
    with raises(OptionInvalid, match="needs a reason: one line"):
        act.run()
    assert not any(entry.kind == "quarantine" for entry in entries_of(act.site))

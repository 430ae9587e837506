"""The tree of errors: numbered once, drawn truly, and explained on a page each."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister_fl import errors
from cloister_fl.errors import (
    CloisterError,
    ErrorKind,
    Fault,
    Reject,
    StudyInvalid,
    all_errors,
    reject_codes,
)
from support.errors import raises

PAGES = Path(__file__).parents[2] / "docs" / "errors"
KINDS = list(all_errors())
NAMED: dict[str, type[CloisterError] | ErrorKind[CloisterError]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, ErrorKind)
    or (isinstance(value, type) and issubclass(value, CloisterError) and not name.startswith("_"))
}
"""Families, leaf classes and kinds by their names."""
CODES = [kind.code for kind in KINDS] + [reason.value for reason in Reject]
FAMILIES = {
    "InputError": ("1", 2),
    "DataError": ("2", 3),
    "PrivacyError": ("3", 4),
    "ModelError": ("4", 5),
    "RunError": ("5", 6),
    "InstallError": ("6", 7),
    "SecureAggregationError": ("7", 8),
    "DeploymentError": ("8", 9),
    "InternalError": ("9", 70),
}


def title_of(code: str) -> str:
    for kind in KINDS:
        if kind.code == code:
            return kind.title
    title = Reject(code).title
    return title[0].upper() + title[1:]


# Numbers


def test_codes_are_unique_and_well_formed() -> None:
    assert len(set(CODES)) == len(CODES)
    assert all(re.fullmatch(r"CLO-\d{3}", code) for code in CODES)
    titles = [title_of(code) for code in CODES]
    assert len(set(titles)) == len(titles)


def test_all_errors_yields_the_errors_in_the_order_of_their_codes() -> None:
    assert [kind.code for kind in KINDS] == sorted(kind.code for kind in KINDS)
    assert {kind.code for kind in KINDS} == {error.code for error in NAMED.values()} - {"CLO-900"}
    assert errors.SiteEmpty in KINDS
    assert ErrorKind(StudyInvalid, "CLO-101", "The study file is not valid") in KINDS


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.code)
def test_each_family_has_its_digit_and_its_exit_status(kind: ErrorKind[CloisterError]) -> None:
    (family,) = [name for name in FAMILIES if issubclass(kind.family, getattr(errors, name))]
    digit, status = FAMILIES[family]
    assert kind.code[4] == digit
    assert kind.exit_status == status


def test_exit_statuses_tell_families_apart_and_leave_those_of_the_shell_alone() -> None:
    statuses = [status for _, status in FAMILIES.values()]
    assert len(set(statuses)) == len(statuses)
    assert all(1 < status < 126 for status in statuses)


def test_every_reject_has_a_title() -> None:
    assert all(reason.title for reason in Reject)
    assert set(reject_codes._REJECT_TITLES) == set(Reject)


# The tree in the docstring


def test_the_tree_that_is_drawn_is_the_tree_that_is() -> None:
    drawn: dict[str, str] = {}
    notes: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([ │├└─]*?)([A-Z]\w+)(?:\s{2,}(\S.*)|\s+(\d.*|CLO.*))?$", line[4:])
        if not line.startswith("    ") or not match:
            continue
        depth, name = len(match.group(1)), match.group(2)
        while stack and stack[-1][0] >= depth:
            stack.pop()
        drawn[name] = stack[-1][1] if stack else ""
        notes[name] = match.group(3) or match.group(4) or ""
        stack.append((depth, name))
    assert drawn == {name: _public_parent(error) for name, error in NAMED.items()}
    for name, note in notes.items():
        error = NAMED[name]
        if error.code != CloisterError.code:
            assert note.startswith(error.code)
        status = re.search(r"exit (\d+)", note)
        if status:
            assert int(status.group(1)) == error.exit_status


def _public_parent(error: type[CloisterError] | ErrorKind[CloisterError]) -> str:
    if isinstance(error, ErrorKind):
        return error.family.__name__
    if error is CloisterError:
        return ""
    return next(base.__name__ for base in error.__mro__[1:] if not base.__name__.startswith("_"))


# Messages


def test_a_message_is_what_why_and_remedy() -> None:
    error = errors.SiteEmpty("What.", why="Why.", remedy="Remedy.")
    assert str(error) == "CLO-203: What. Why. Remedy."
    assert str(errors.SiteEmpty("What.", remedy="Remedy.")) == "CLO-203: What. Remedy."
    assert (error.what, error.why, error.remedy) == ("What.", "Why.", "Remedy.")


def test_faults_are_told_in_the_order_of_the_file() -> None:
    faults = [
        Fault(9, "b.c", "is missing."),
        Fault(2, "a", "is wrong.", "Write 3."),
        Fault(0, "d", "x."),
    ]
    error = StudyInvalid.of("s.toml", faults)
    assert isinstance(error, StudyInvalid)
    assert str(error) == (
        "CLO-101: s.toml has 3 faults:\n  d: x.\n  line 2: a: is wrong. Write 3.\n"
        "  line 9: b.c: is missing."
    )
    assert "has 1 fault:" in str(StudyInvalid.of("s.toml", faults[:1]))


BASE = ErrorKind(CloisterError, CloisterError.code, CloisterError.title)


def ways(error: CloisterError) -> Iterator[Any]:
    """Yield the error as it arrives by each way in which something carries it."""
    rebuild, arguments, _ = error.__reduce__()
    assert callable(rebuild)
    assert isinstance(arguments, tuple)
    yield rebuild(*arguments)
    yield copy.copy(error)
    yield copy.deepcopy(error)
    yield pickle.loads(pickle.dumps(error))


@pytest.mark.parametrize("kind", [BASE, *KINDS], ids=lambda kind: kind.code)
def test_errors_survive_the_way_between_processes(kind: ErrorKind[CloisterError]) -> None:
    error = kind("What.", why="Why.", remedy="Remedy.")
    assert str(error) == f"{kind.code}: What. Why. Remedy."
    for again in ways(error):
        assert type(again) is kind.family
        assert again.kind == kind
        assert str(again) == str(error)
        assert (again.what, again.why, again.remedy) == ("What.", "Why.", "Remedy.")
    assert error.__reduce__()[-1] == vars(error)


def test_a_kind_gives_an_error_of_its_family_under_its_own_code_and_title() -> None:
    error = errors.SiteEmpty("What.")
    assert type(error) is errors.DataError
    assert (error.code, error.title) == ("CLO-203", "The site has no usable image")
    assert (error.exit_status, errors.SiteEmpty.exit_status) == (3, 3)
    assert repr(error) == "DataError('CLO-203: What.')"
    # The family itself is as it was.
    assert errors.DataError("What.").code == "CLO-900"
    assert error.kind == errors.SiteEmpty


@pytest.mark.parametrize("kind", [errors.BoxTampered, errors.WireInvalid], ids=["kind", "class"])
def test_whom_an_error_blames_survives_copying_and_pickling(kind: Any) -> None:
    error = kind("What.", blamed="birke")
    _, *copies = ways(error)
    assert [one.blamed for one in (error, *copies)] == ["birke"] * 4
    assert kind("What.").blamed == ""


@pytest.mark.parametrize(
    ("expected", "raised", "met"),
    [
        (errors.SiteEmpty, errors.SiteEmpty, True),
        (errors.SiteEmpty, errors.LabelMissing, False),
        (errors.SiteEmpty, errors.DataError, False),
        (errors.DataError, errors.SiteEmpty, True),
        (errors.DecoderUnfit, errors.DecoderUnfit, True),
        ((errors.LabelMissing, errors.SiteEmpty), errors.SiteEmpty, True),
        ((errors.LabelMissing, errors.DecoderUnfit), errors.SiteEmpty, False),
    ],
)
def test_tests_tell_kinds_of_one_family_apart(expected: Any, raised: Any, met: bool) -> None:
    try:
        with raises(expected, match="What"):
            raise raised("What.")
    except (AssertionError, pytest.fail.Exception):
        told = False
    else:
        told = True
    assert told is met


def test_the_faults_of_a_file_survive_it_too() -> None:
    error = StudyInvalid.of("s.toml", [Fault(1, "a", "is wrong.")])
    assert copy.copy(error).faults == error.faults
    assert copy.deepcopy(error).faults == error.faults


# Pages


@pytest.mark.parametrize("code", CODES)
def test_each_code_has_a_page_with_its_title_and_advice(code: str) -> None:
    text = (PAGES / f"{code}.md").read_text("utf-8")
    assert text.startswith(f"# {code}: {title_of(code)}\n\n")
    assert "\n## Why it happens\n\n" in text
    assert "\n## What to do\n\n" in text
    example = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert example is None or example.group(1).startswith(f"{code}: ")
    if code.startswith("CLO") and code in {reason.value for reason in Reject}:
        assert f"`Reject.{Reject(code).name}`" in text
    else:
        kind = next(kind for kind in KINDS if kind.code == code)
        assert f"\n\nExit status: {kind.exit_status}.\n\n" in text
        (name,) = [name for name, error in NAMED.items() if error.code == code]
        assert f"`{name}`" not in text, "names of classes are of no use to a reader"


COMMAND = re.compile(
    r"`(?:\w+=\S+ )?(?:cloister|scripts/install|sudo|systemctl|chmod|sha256sum|mv|rm|cp|ls|df|date"
    r"|openssl|curl|nc|pip|python3?) [^`]+`"
)
IMPERATIVE = re.compile(
    r"(?:^|[,;:] (?:and |or )?(?:then )?)"
    r"(?:Add|Agree|Approve|Ask|Change|Check|Choose|Compare|Contact|Continue|Copy|Correct|Create|"
    r"Decode|Deny|Enter|Export|Fetch|Find|Free|Get|Give|Install|Invite|Keep|Leave|List|Look|Lower|Make|"
    r"Move|Name|Open|Raise|Read|Reduce|Reformat|Remove|Rename|Repeat|Replace|Report|Request|Restart|"
    r"Restore|Resume|Retry|Review|Run|Save|See|Send|Set|Start|Stop|Store|Tell|Treat|Try|Update|"
    r"Upgrade|Use|Verify|Wait|Write) ",
    re.IGNORECASE,
)
"""An imperative at the start of a sentence or of a clause."""


@pytest.mark.parametrize("code", CODES)
def test_the_first_paragraph_says_what_happened_why_and_what_to_do(code: str) -> None:
    """It is all that many readers read, so it must do without the rest of the page."""
    first = (PAGES / f"{code}.md").read_text("utf-8").split("\n\n")[1]
    assert 2 <= len(sentences(first)) <= 4
    assert has_remedy(first)


def sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?]) +(?=[A-Z`])", paragraph)


NOTHING_TO_DO = re.compile(r"no action is needed|nothing needs to be done", re.IGNORECASE)


def has_remedy(paragraph: str) -> bool:
    """Whether a sentence has a command to paste, or says what to do or that nothing is to do."""
    return any(
        COMMAND.search(one) or IMPERATIVE.search(one) or NOTHING_TO_DO.search(one)
        for one in sentences(paragraph)
    )


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("It failed. Run the command again.", True),
        ("It failed. If the disk is full, remove old files.", True),
        ("It failed. The way out is `cloister client check --dir FOLDER`.", True),
        ("It was left out. No action is needed.", True),
        ("It was left out. Nothing needs to be done.", True),
        ("The archive, which `site.toml` names, does not answer. It is not in time.", False),
        ("The `cloister` command failed. The use of it is unclear.", False),
        ("The disk is full. Programs that open and read files may fail.", False),
    ],
)
def test_a_remedy_is_told_from_a_statement(paragraph: str, expected: bool) -> None:
    assert has_remedy(paragraph) is expected


@pytest.mark.parametrize("code", CODES)
def test_a_page_for_both_sides_says_whose_folder_it_means(code: str) -> None:
    """A reader at a hospital must not take the coordinator's folder for the site's."""
    text = (PAGES / f"{code}.md").read_text("utf-8")
    commands = re.findall(r"`cloister (client|server) ([^`]*)`", text)
    own = {"client": "SITE-FOLDER", "server": "COORDINATOR-FOLDER"}
    sides = {side for side, words in commands if "FOLDER" in words}
    others = [
        words
        for side, words in commands
        if not set(re.findall(r"[A-Z-]*FOLDER", words)) <= {own[side]}
    ]
    assert sides != set(own) or others == []


def test_each_page_has_a_code() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == {*CODES, "README"}


def test_pages_mention_no_code_that_does_not_exist() -> None:
    for path in PAGES.glob("*.md"):
        assert set(re.findall(r"CLO-\d{3}", path.read_text("utf-8"))) <= set(CODES), path.name


def test_the_index_has_a_row_for_each_code_under_its_family() -> None:
    index = (PAGES / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| \[(CLO-\d{3})\]\((CLO-\d{3})\.md\) \| (.+) \|$", index, re.MULTILINE)
    assert sorted(rows) == sorted((code, code, title_of(code)) for code in CODES)
    sections = re.split(r"^## ", index, flags=re.MULTILINE)[1:]
    assert len(sections) == len(FAMILIES)
    for section, (digit, status) in zip(sections, FAMILIES.values(), strict=True):
        assert section.startswith(f"{digit}xx: ")
        assert f"\nExit status {status}.\n" in section
        assert {code[4] for code in re.findall(r"\[(CLO-\d{3})\]", section)} == {digit}

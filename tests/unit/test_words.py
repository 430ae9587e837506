"""Sentences that readers did not understand, and that no shipped text may hold again."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SENTENCES = (
    "met a fault of its own",
    "already holds something",
    "its sum cannot be read; what it cost is charged",
    "Nobody can be asked whether the study is approved",
    "Files that wait for a person",
    "What is summed in secret",
    "What training makes small",
    "lacks a column that it needs, or has it twice",
    "does not train at this hour",
    "Nobody is kept apart to be measured on",
    "No name server here knows its name",
    "This machine has no way to it",
    "It gave an answer that is none",
    "waits in vain for",
    "somebody who shows no name",
    "of no known version",
    "Nothing here is meant by",
    "is no name of a file or a patient",
    "a foreign bundle",
    "has begun and not ended",
    "asks for other terms than it reserved",
    "not the one that this site noted last",
    "Updates leave only masked",
    "No roster is pinned",
    "will not be listened on without TLS",
    "its own operator sees why",
    "network's people",
    "or for the proxy's address",
    "a page that blocks",
    "try on a copy",
    "use a copy of the site folder",
)


def words_of(path: Path) -> str:
    """The text of a file in one line, as a message broken over several strings is read."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        lines = (line.strip().removeprefix('f"').strip('"') for line in text.splitlines())
        text = " ".join(lines)
    return " ".join(text.split()).casefold()


def shipped() -> list[Path]:
    """Sources, templates and documentation that a user reads or installs."""
    sources = [path for side in ("client", "common", "server") for path in (ROOT / side).rglob("*")]
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*")]
    kinds = {".py", ".md", ".toml", ".sh", ".yaml", ".yml"}
    return sorted(path for path in (*sources, *documents) if path.suffix in kinds)


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """What each file says, by its path from the root; the change log quotes what was."""
    return {
        path.relative_to(ROOT).as_posix(): words_of(path)
        for path in shipped()
        if path.name != "CHANGELOG.md"
    }


def test_the_shipped_texts_are_all_there(texts: dict[str, str]) -> None:
    assert len(texts) > 200
    assert {"README.md", "docs/glossary.md", "client/cloister_fl/client/app.py"} <= set(texts)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_no_text_holds_a_sentence_that_was_mended(texts: dict[str, str], sentence: str) -> None:
    assert [name for name, text in texts.items() if sentence.casefold() in text] == []


def test_a_sentence_is_found_across_the_strings_of_a_source(tmp_path: Path) -> None:
    source = tmp_path / "one.py"
    source.write_text('raise Error(\n    "Cloister met a fault "\n    f"of its own ({kind})."\n)\n')
    assert "met a fault of its own" in words_of(source)

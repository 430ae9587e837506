"""What the guides show is what the toys run, and what they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
TOYS = Path(__file__).parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)(#[^)\s]+)?\)")
NAMED = re.compile(r"`([\w./-]+)`")
IN_A_COMMAND = re.compile(r"(?<![\w./])((?:tests|scripts|docs)/[\w./-]+)")
TEST = re.compile(r"`(test_\w+)`")


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of one kind."""
    return [text for found, text in BLOCK.findall(page.read_text("utf-8")) if found == kind]


def _slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.fixture(scope="module")
def toys() -> str:
    return "\n".join(path.read_text("utf-8") for path in sorted(TOYS.glob("*.py")))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_code_is_that_of_a_toy(guide: Path, toys: str) -> None:
    shown = blocks(guide, "python") + blocks(guide, "toml")
    assert len(shown) >= 2
    assert [text for text in shown if text not in toys] == []


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_files_that_are_named_exist(guide: Path) -> None:
    text = guide.read_text("utf-8")
    plain = BLOCK.sub("", text)
    paths = {name for name in NAMED.findall(plain) if "/" in name}
    paths |= {name for block in blocks(guide, "sh") for name in IN_A_COMMAND.findall(block)}
    assert len(paths) > 4
    assert sorted(name for name in paths if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_links_lead_somewhere(guide: Path) -> None:
    wrong = []
    for target, anchor in LINK.findall(guide.read_text("utf-8")):
        page = (guide.parent / target).resolve()
        if not page.exists():
            wrong.append(target)
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
            if anchor[1:] not in map(_slug, headings):
                wrong.append(target + anchor)
    assert wrong == []


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_tests_that_are_named_exist(guide: Path) -> None:
    names = set(TEST.findall(guide.read_text("utf-8")))
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert sorted(name for name in names if f"def {name}(" not in tests) == []


def test_every_guide_is_on_the_index_and_has_a_toy() -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    assert len(GUIDES) >= 1
    for guide in GUIDES:
        assert f"(guides/{guide.name})" in index, guide.name
        assert "tests/toys/" in guide.read_text("utf-8"), guide.name

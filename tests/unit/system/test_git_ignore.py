"""What keeps secrets and patients' data out of git; see also integration/test_out_of_git.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cloister_fl.errors import OutputInTheWay
from cloister_fl.system.files import GIT_IGNORE
from cloister_fl.system.git_ignore import keep_file_out_of_git
from support.errors import raises


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / ".git").mkdir()
    return tmp_path


def written(folder: Path) -> list[str]:
    return (folder / GIT_IGNORE).read_text().splitlines()[1:]


def test_a_file_is_covered_by_name_once_and_others_are_added(clone: Path) -> None:
    for name in ("key.pem", "scores.csv", "key.pem"):
        keep_file_out_of_git(clone / name)
    assert written(clone) == ["/.gitignore", "/key.pem", "/scores.csv"]
    assert (clone / GIT_IGNORE).read_text().startswith("# Written by Cloister: ")


def test_a_folder_deep_in_a_clone_gets_one_of_its_own(clone: Path) -> None:
    (clone / "a" / "b").mkdir(parents=True)
    keep_file_out_of_git(clone / "a" / "b" / "key.pem")
    assert written(clone / "a" / "b") == ["/.gitignore", "/key.pem"]
    assert not (clone / GIT_IGNORE).exists()


def test_a_name_is_no_pattern(clone: Path) -> None:
    for name in ("a*[1]?.png", "a*[1]?.png"):
        keep_file_out_of_git(clone / name)
    assert written(clone) == ["/.gitignore", r"/a\*\[1]\?.png"]


def test_nothing_is_written_outside_a_repository(tmp_path: Path) -> None:
    keep_file_out_of_git(tmp_path / "key.pem")
    assert list(tmp_path.iterdir()) == []


def test_the_repository_is_that_of_the_folder_itself(clone: Path) -> None:
    """Reached by a symbolic link, the file still lies in the clone."""
    (clone / "reports").mkdir()
    link = clone.with_name("link-to-reports")
    link.symlink_to(clone / "reports")
    keep_file_out_of_git(link / "key.pem")
    assert written(clone / "reports") == ["/.gitignore", "/key.pem"]


def test_a_persons_own_is_left_alone_and_the_file_refused(clone: Path) -> None:
    ignore = clone / GIT_IGNORE
    ignore.write_text("*.pyc")
    with raises(OutputInTheWay, match="does not cover it") as caught:
        keep_file_out_of_git(clone / "key.pem")
    assert ignore.read_text() == "*.pyc"
    # The remedy, as a shell does it, to a file without a last line feed.
    paste = re.search(r"printf '(.*)' (\S+) >> (\S+)", caught.value.remedy)
    assert paste is not None
    assert Path(paste.group(3)) == ignore
    with ignore.open("a") as file:
        file.write(paste.group(1).replace("\\n", "\n") % paste.group(2))
    keep_file_out_of_git(clone / "key.pem")
    assert ignore.read_text() == "*.pyc\n/key.pem\n"


def test_an_empty_one_is_a_persons(clone: Path) -> None:
    (clone / GIT_IGNORE).touch()
    with raises(OutputInTheWay, match="does not cover it"):
        keep_file_out_of_git(clone / "key.pem")
    assert (clone / GIT_IGNORE).read_text() == ""


def test_one_that_cannot_be_read_is_said(clone: Path) -> None:
    (clone / GIT_IGNORE).mkdir()
    with raises(OutputInTheWay, match="cannot be read"):
        keep_file_out_of_git(clone / "key.pem")

"""What a program outside the checkout writes against the installed wheel; mypy strict must pass."""

from __future__ import annotations

from pathlib import Path

from cloister_fl.errors import CloisterError, StudyInvalid
from cloister_fl.study.file import load_study, parse_study
from cloister_fl.study.schema import Study
from cloister_fl.version import __version__


def epsilon_of(path: Path) -> float:
    """Epsilon that a study asks for."""
    study: Study = load_study(path)
    return study.privacy.epsilon


def is_sound(text: str) -> bool:
    """Whether a study's text has no fault."""
    try:
        parse_study(text)
    except StudyInvalid:
        return False
    return True


assert issubclass(StudyInvalid, CloisterError)
assert not is_sound("")
assert epsilon_of(Path("study.toml")) > 0
print(f"Cloister {__version__}")

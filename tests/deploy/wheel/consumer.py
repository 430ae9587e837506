"""What a program outside the checkout writes against the installed wheel; mypy strict must pass.

It runs where no extra is installed: what needs one says so, with the command that installs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cloister_fl.errors import CloisterError, InstallError, StudyInvalid
from cloister_fl.study import Study, load, parse, replace
from cloister_fl.version import __version__

if TYPE_CHECKING:
    from cloister_fl.client.predict import Prediction
    from cloister_fl.simulation import Progress, Result


def epsilon_of(path: str) -> float:
    """Epsilon that a study asks for."""
    study: Study = load(path)
    return study.privacy.epsilon


def is_sound(text: str) -> bool:
    """Whether a study's text has no fault."""
    try:
        parse(text)
    except StudyInvalid:
        return False
    return True


def train(study: Study, sites: Path) -> Result:
    """Simulate a study, with progress."""
    from cloister_fl.simulation import simulate

    def told(progress: Progress) -> None:
        print(f"{progress.step}: {progress.done / progress.total:.0%}")

    return simulate(study, sites, "run", progress=told, threads=1)


def headline_of(result: Result) -> float | None:
    """The figure that counts."""
    return None if result.headline is None else result.headline.value


def score(result: Result, images: Path) -> Prediction:
    """Scores of new images."""
    from cloister_fl.client.predict import predict

    return predict(result.model, images)


def needs_an_extra(study: Study) -> str:
    """What Cloister says where the part that simulates is not installed."""
    try:
        train(study, Path())
    except InstallError as error:
        return f"{error.code}: {error.remedy}"
    raise AssertionError


assert issubclass(StudyInvalid, CloisterError)
assert not is_sound("")
assert epsilon_of("study.toml") > 0
assert replace(load("study.toml"), privacy={"epsilon": 1.0}).privacy.epsilon == 1.0
assert needs_an_extra(load("study.toml")).startswith("CLO-601: Run: ")
print(f"Cloister {__version__}")

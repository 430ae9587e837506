"""Gradient engines that do not support a privacy claim; studies that ask for one are refused.

Without privacy nothing is clipped and a study's engine has no effect, so any may be named there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cloister_fl.errors import Fault, StudyInvalid

if TYPE_CHECKING:
    from cloister_fl.study.schema import Study

ENGINE_KEY: Final = "training.engine"

REMEDY: Final = 'Write engine = "patients" in [training].'

_UNSOUND: Final = {
    "book-keeping": "one patient can move its sum of clipped gradients by many times "
    "privacy.clipping_norm, so the study's epsilon does not hold",
}


def unsound_engine(study: Study) -> str:
    """Say why the engine of a study does not support its privacy claim.

    Returns:
        One sentence; empty where the engine supports the claim, or the study makes none.
    """
    engine = study.training.engine
    if not study.privacy.enabled or engine not in _UNSOUND:
        return ""
    return f"{ENGINE_KEY} is {engine!r} and privacy is on: {_UNSOUND[engine]}."


def engine_fault(study: Study) -> tuple[str, str] | None:
    """The same as the message and the hint of a fault at ``training.engine``, or None."""
    engine = study.training.engine
    if not unsound_engine(study):
        return None
    return f"cannot be {engine!r} while privacy is on: {_UNSOUND[engine]}.", REMEDY


def require_sound_engine(study: Study) -> None:
    """Refuse a study whose engine does not support its privacy claim.

    For studies that come from no file; one from a file is refused with its line.

    Raises:
        StudyInvalid: the engine does not support the claim.
    """
    fault = engine_fault(study)
    if fault is not None:
        raise StudyInvalid.of(study.study.name, (Fault(0, ENGINE_KEY, *fault),))

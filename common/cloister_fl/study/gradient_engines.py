"""Gradient engines that do not support a privacy claim; studies that ask for one are refused.

Without privacy nothing is clipped and a study's engine has no effect, so any may be named there.
"""

from __future__ import annotations

from typing import Final

from cloister_fl.errors import Fault, StudyInvalid
from cloister_fl.study.schema import UNSOUND_ENGINES, Study

ENGINE_KEY: Final = "training.engine"

REMEDY: Final = 'Write engine = "patients" in [training].'


def engine_fault(study: Study) -> tuple[str, str] | None:
    """``Study.unsound_engine`` as message and hint of a fault at ``training.engine``, or None."""
    engine = study.training.engine
    if not study.unsound_engine:
        return None
    return f"cannot be {engine!r} while privacy is on: {UNSOUND_ENGINES[engine]}.", REMEDY


def require_sound_engine(study: Study) -> None:
    """Refuse a study whose engine does not support its privacy claim.

    For studies that come from no file; one from a file is refused with its line.

    Raises:
        StudyInvalid: the engine does not support the claim.
    """
    fault = engine_fault(study)
    if fault is not None:
        raise StudyInvalid.of(study.study.name, (Fault(0, ENGINE_KEY, *fault),))

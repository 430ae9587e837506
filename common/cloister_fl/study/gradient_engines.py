"""Gradient engines that were taken out because they support no privacy claim.

Their names stay readable, so that ledgers, models and certificates of runs that were trained with
them can be told from others; no new study may name one.
"""

from __future__ import annotations

from typing import Final

from cloister_fl.errors import Fault, StudyInvalid
from cloister_fl.study.schema import UNSOUND_ENGINES, Study

ENGINE_KEY: Final = "training.engine"

REMEDY: Final = 'Write engine = "patients" in [training].'


def engine_fault(study: Study) -> tuple[str, str] | None:
    """Message and hint of a fault at ``training.engine`` where it is one of these, or None."""
    engine = study.training.engine
    if engine not in UNSOUND_ENGINES:
        return None
    return f"{engine!r} was taken out: {UNSOUND_ENGINES[engine]}.", REMEDY


def require_sound_engine(study: Study) -> None:
    """Refuse a study whose engine was taken out.

    For studies that come from no file; one from a file is refused with its line.

    Raises:
        StudyInvalid: naming the key.
    """
    fault = engine_fault(study)
    if fault is not None:
        raise StudyInvalid.of(study.study.name, (Fault(0, ENGINE_KEY, *fault),))

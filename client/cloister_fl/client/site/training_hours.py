"""Training window of a site: spans of the local day, which may cross midnight.

Only the clock on the wall counts: a span says "from eight in the evening", and on the two nights
of a year on which clocks are set it is an hour shorter or longer, as a night is.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence

_SPAN = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])", re.ASCII)


def is_span(value: str) -> str:
    """Return a span as it was given, for pydantic.

    Raises:
        ValueError: it is not "HH:MM-HH:MM" with two different times from 00:00 to 23:59.
    """
    found = _SPAN.fullmatch(value)
    if found is None:
        raise ValueError(
            f"{value[:20]!r} is not a training window such as '20:00-06:00', from 00:00 to 23:59."
        )
    if found.group(1, 2) == found.group(3, 4):
        raise ValueError(f"{value!r} ends when it begins; for any time, leave the list empty.")
    return value


def within(spans: Sequence[str], now: datetime.time) -> bool:
    """Say whether a time of day lies in one of the spans.

    Args:
        spans: each "HH:MM-HH:MM"; its first minute is in it, its last is not. None at all
            allows any time.
        now: the local time of day.
    """
    if not spans:
        return True
    minute = now.hour * 60 + now.minute
    for span in spans:
        begin, end = _minutes(span)
        inside = begin <= minute < end if begin < end else minute >= begin or minute < end
        if inside:
            return True
    return False


def _minutes(span: str) -> tuple[int, int]:
    begin, end = (int(part[:2]) * 60 + int(part[3:]) for part in span.split("-"))
    return begin, end

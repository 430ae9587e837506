"""Times in UTC: the present, and formats for files and people."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal


def now() -> datetime:
    """The time, in UTC, with its time zone."""
    return datetime.now(UTC)


def timestamp(timespec: Literal["seconds", "milliseconds", "microseconds"] = "seconds") -> str:
    """The time in ISO 8601, such as ``2026-03-01T12:00:00+00:00``, for files and logs."""
    return now().isoformat(timespec=timespec)


def from_unix(seconds: float) -> datetime:
    """Seconds since 1970 as a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def to_minute(moment: datetime) -> str:
    """A time for a person to read, such as ``2026-03-01 12:00``; of UTC, say so beside it."""
    return moment.strftime("%Y-%m-%d %H:%M")


def to_second(moment: datetime) -> str:
    """A time for a person to read, such as ``2026-03-01 12:00:00``."""
    return moment.strftime("%Y-%m-%d %H:%M:%S")

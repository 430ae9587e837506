"""Times in UTC, whatever the machine's time zone."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from cloister_fl.system import utc

MOMENT = datetime(2026, 3, 1, 23, 5, 7, 123456, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _far_east(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    monkeypatch.setattr(utc, "now", lambda: MOMENT)


@pytest.fixture(autouse=True, scope="module")
def _back() -> object:
    yield
    time.tzset()


def test_files_get_iso_8601() -> None:
    assert utc.timestamp() == "2026-03-01T23:05:07+00:00"
    assert utc.timestamp("milliseconds") == "2026-03-01T23:05:07.123+00:00"
    assert utc.timestamp("microseconds") == "2026-03-01T23:05:07.123456+00:00"


def test_people_get_minutes_or_seconds() -> None:
    assert utc.to_minute(MOMENT) == "2026-03-01 23:05"
    assert utc.to_second(MOMENT) == "2026-03-01 23:05:07"


def test_unix_time_is_in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    moment = utc.from_unix(1772406307)
    assert moment.isoformat() == "2026-03-01T23:05:07+00:00"
    assert utc.now().utcoffset() == timedelta(0)
    assert abs(utc.now().timestamp() - time.time()) < 60

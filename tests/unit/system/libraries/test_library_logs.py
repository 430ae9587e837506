"""Silence of libraries that would log patients' data, for as long as it is needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from cloister_fl.system.libraries.logs import LIBRARIES, libraries_silenced


@pytest.fixture
def host() -> Iterator[dict[str, tuple[int, bool, list[logging.Handler]]]]:
    """A program with a set-up of its own for each library's log."""
    logs = [logging.getLogger(name) for name in LIBRARIES]
    before = [(log.level, log.propagate, log.handlers) for log in logs]
    for log in logs:
        log.setLevel(logging.INFO)
        log.propagate, log.handlers = True, [logging.NullHandler()]
    yield set_up()
    for log, (level, propagate, handlers) in zip(logs, before, strict=True):
        log.setLevel(level)
        log.propagate, log.handlers = propagate, handlers


def set_up() -> dict[str, tuple[int, bool, list[logging.Handler]]]:
    logs = [logging.getLogger(name) for name in LIBRARIES]
    return {log.name: (log.level, log.propagate, list(log.handlers)) for log in logs}


def silent() -> bool:
    return not any(
        logging.getLogger(name).isEnabledFor(logging.CRITICAL) or logging.getLogger(name).propagate
        for name in LIBRARIES
    )


def test_nothing_is_logged_inside_and_all_is_as_before_after(host: object) -> None:
    with libraries_silenced():
        assert silent()
    assert set_up() == host


def test_an_error_ends_the_silence_too(host: object) -> None:
    with pytest.raises(ValueError, match="x"), libraries_silenced():
        raise ValueError("x")
    assert set_up() == host


def test_the_last_of_two_that_overlap_puts_the_set_up_back(host: object) -> None:
    first, second = libraries_silenced(), libraries_silenced()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert silent()
    second.__exit__(None, None, None)
    assert set_up() == host


def test_a_function_may_bear_it(host: object) -> None:
    @libraries_silenced()
    def act(number: int) -> tuple[int, bool]:
        return number, silent()

    assert act(3) == (3, True)
    assert act(4) == (4, True)
    assert set_up() == host

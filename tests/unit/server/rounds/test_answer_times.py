"""How long a site's answer is waited for: by what the sites took before, and by no site's lie."""

from __future__ import annotations

import math

from cloister_fl.server.rounds.answer_times import AGAIN_S, LEAST_S, AnswerTimes

HOUR = 3600.0
SITES = (1, 2, 3, 4, 5)


class Hand:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def stage(times: AnswerTimes, clock: Hand, took: dict[int, float], kind: str = "train") -> float:
    """Let sites answer after their times: the seconds after which nobody is waited for."""
    began, waiting = clock.now, set(SITES)
    wait = times.stage(dict.fromkeys(SITES, kind))
    for node, seconds in sorted(took.items(), key=lambda pair: pair[1]):
        clock.now = began + seconds
        waiting -= set(wait.overdue(waiting))
        if node in waiting:
            waiting.discard(node)
            wait.answered(node, counts=True)
    while waiting:
        clock.now += 1.0
        waiting -= set(wait.overdue(waiting))
    return clock.now - began


def test_the_first_answer_of_a_kind_has_the_whole_timeout() -> None:
    clock = Hand()
    assert stage(AnswerTimes(HOUR, clock), clock, dict.fromkeys(SITES[:4], 20.0)) == HOUR


def test_a_silent_site_costs_minutes_once_a_round_was_measured() -> None:
    clock = Hand()
    times = AnswerTimes(HOUR, clock)
    assert stage(times, clock, dict.fromkeys(SITES, 20.0)) == 20.0
    assert stage(times, clock, dict.fromkeys(SITES[:4], 20.0)) == LEAST_S
    # The second time in a row it has a minute after the others.
    assert stage(times, clock, dict.fromkeys(SITES[:4], 20.0)) == AGAIN_S
    # Slow rounds: ten times the middle one, and then twice the others' last.
    times = AnswerTimes(HOUR, clock)
    assert stage(times, clock, dict.fromkeys(SITES, 100.0)) == 100.0
    assert stage(times, clock, dict.fromkeys(SITES[:4], 100.0)) == 1000.0
    assert stage(times, clock, dict.fromkeys(SITES[:4], 100.0)) == 300.0


def test_one_that_was_silent_is_waited_for_again_once_it_has_answered() -> None:
    clock = Hand()
    times = AnswerTimes(HOUR, clock)
    stage(times, clock, dict.fromkeys(SITES, 20.0))
    stage(times, clock, dict.fromkeys(SITES[:4], 20.0))
    stage(times, clock, dict.fromkeys(SITES, 30.0))
    assert stage(times, clock, dict.fromkeys(SITES[:4], 20.0)) == LEAST_S


def test_a_slow_site_keeps_its_time() -> None:
    """Forty times as slow as the others: three times its own."""
    clock = Hand()
    times = AnswerTimes(HOUR, clock)
    slow = {**dict.fromkeys(SITES[:4], 20.0), 5: 800.0}
    assert stage(times, clock, slow) == 800.0
    assert stage(times, clock, {**slow, 5: 2300.0}) == 2300.0


def test_a_minority_that_answers_late_does_not_move_what_a_silent_site_costs() -> None:
    clock = Hand()
    times = AnswerTimes(HOUR, clock)
    stage(times, clock, {1: 20.0, 2: 20.0, 3: 20.0, 4: 3500.0, 5: 20.0})
    waited = times.stage({1: "train", 2: "train", 3: "train", 4: "train", 5: "train"})
    clock.now += LEAST_S
    assert waited.overdue([5]) == [5]


def test_kinds_are_measured_apart() -> None:
    clock = Hand()
    times = AnswerTimes(HOUR, clock)
    stage(times, clock, dict.fromkeys(SITES, 1.0), "exchange")
    assert stage(times, clock, dict.fromkeys(SITES[:4], 20.0)) == HOUR


def test_without_a_timeout_all_are_waited_for() -> None:
    clock = Hand()
    times = AnswerTimes(None, clock)
    stage(times, clock, dict.fromkeys(SITES, 1.0))
    wait = times.stage(dict.fromkeys(SITES, "train"))
    clock.now += 1e9
    assert wait.overdue(list(SITES)) == []
    assert wait._limits[1] == math.inf

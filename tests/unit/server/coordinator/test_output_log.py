"""The server's output: codes and sites, and nothing that a peer wrote."""

from __future__ import annotations

import asyncio
import io
import logging
import re
from collections.abc import Iterator

import pytest

from cloister_fl.server.coordinator.output_log import LINES, OWN, SITE, OutputLog, plain

HOSTILE = "CANARY\n2026-01-01T00:00:00+00:00 WARNING forged\x1b[2J\x9b31m\u202e" + "x" * (1 << 20)
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 [A-Z]+ [ -~]{1,520}\n")


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = OutputLog(stream)
    loggers = [logging.getLogger(name) for name in ("flwr", "uvicorn.error", OWN)]
    before = [(one.handlers[:], one.propagate, one.level) for one in loggers]
    for logger in loggers:
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.WARNING)
    yield stream
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.setLevel(level)


def test_what_a_library_quotes_of_a_peer_is_not_written(output: io.StringIO) -> None:
    flower = logging.getLogger("flwr")
    flower.error(f"[/v1/fleet/get-fab][ApiError:1203] fab_hash={HOSTILE}")
    flower.error("Failed to store %s", HOSTILE)
    flower.error([HOSTILE])
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("uvicorn.error").exception("Exception in %s", HOSTILE)
    text = output.getvalue()
    lines = text.splitlines(keepends=True)
    assert len(lines) == 4
    assert all(LINE.fullmatch(line) for line in lines)
    for part in ("CANARY", "forged", "\x1b", "xxxx"):
        assert part not in text
    assert "error=1203" in lines[0]
    assert "error=ValueError" in lines[3]


def test_own_messages_are_one_plain_line(output: io.StringIO) -> None:
    logging.getLogger(OWN).warning("The run executor failed: %s", HOSTILE)
    assert LINE.fullmatch(output.getvalue())
    assert "The run executor failed: CANARY?2026" in output.getvalue()


def test_a_flood_is_counted_and_leaves_others_their_lines(output: io.StringIO) -> None:
    def flood(site: str, times: int) -> None:
        SITE.set(site)
        for _ in range(times):
            logging.getLogger("flwr").error("one place")

    async def run() -> None:
        await asyncio.to_thread(flood, "greedy", 10_000)
        await asyncio.to_thread(flood, "honest", 1)

    asyncio.run(run())
    lines = output.getvalue().splitlines()
    assert len([line for line in lines if line.endswith("site=greedy")]) == LINES
    assert lines[-1].endswith("site=honest")
    assert len(lines) == LINES + 1


def test_what_was_not_shown_is_counted_in_the_next_line(output: io.StringIO) -> None:
    logger = logging.getLogger("flwr")
    for _ in range(LINES + 7):
        logger.error("one place")
        (allowance,) = logger.handlers[0]._allowances.values()  # type: ignore[attr-defined]
        if allowance.dropped == 6:
            allowance.level = 1.0
    assert output.getvalue().splitlines()[-1].endswith("not_shown=6")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\nb", "a?b"), ("\x1b[2J", "?[2J"), ("Köln", "Köln"), ("\u202eabc", "?abc"), ("\x9b", "?")],
)
def test_plain(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_a_plain_text_has_an_end() -> None:
    assert len(plain("x" * 10_000)) == 500

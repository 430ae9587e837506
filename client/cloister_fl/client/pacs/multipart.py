"""Multipart parser of WADO-RS answers (PS3.18 section 8.6.1.2, RFC 2046 section 5.1.1).

The answer is read whole before, within a bound. Everything in it is checked: an answer that was
cut short has no closing delimiter, and is no file.
"""

from __future__ import annotations

import re

MAX_HEADER_BYTES = 8192
"""Most bytes of a part's header, and of what stands before the first part."""

_BOUNDARY = re.compile(
    r"""multipart/related\s*;.*?\bboundary\s*=\s*("([^"]{1,70})"|([^\s;"]{1,70}))""",
    re.IGNORECASE | re.DOTALL,
)
_LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,12})[ \t]*$", re.IGNORECASE | re.MULTILINE)


class InvalidAnswer(Exception):
    """It is no such answer, or was cut short; says nothing of it."""


def single_part(content_type: str, body: bytes) -> bytes:
    """Return the only part.

    Args:
        content_type: the answer's Content-Type; names the boundary.
        body: the answer's body.

    Raises:
        InvalidAnswer: it has another form, more or fewer parts than one, or no end.
    """
    found = _BOUNDARY.match(content_type)
    if found is None:
        raise InvalidAnswer
    delimiter = b"--" + (found.group(2) or found.group(3)).encode("latin-1", "replace")
    start = _after_delimiter(body, delimiter)
    gap = body.find(b"\r\n\r\n", start, start + MAX_HEADER_BYTES)
    # A part without a header begins with the empty line at once.
    begin = start + 2 if body[start : start + 2] == b"\r\n" else gap + 4
    if gap < 0 and begin != start + 2:
        raise InvalidAnswer
    told = _LENGTH.search(body[start:begin].replace(b"\r\n", b"\n"))
    end = begin + int(told.group(1)) if told else body.find(b"\r\n" + delimiter, begin)
    if end < begin or not body.startswith(b"\r\n" + delimiter + b"--", end):
        raise InvalidAnswer
    return body[begin:end]


def _after_delimiter(body: bytes, delimiter: bytes) -> int:
    """Where the first part's header begins."""
    at = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter, 0, MAX_HEADER_BYTES)
    if at < 0:
        raise InvalidAnswer
    at += len(delimiter) + (0 if at == 0 and body.startswith(delimiter) else 2)
    line = body.find(b"\r\n", at, at + 256)
    if line < 0 or body[at:line].strip(b" \t"):
        raise InvalidAnswer
    return line + 2

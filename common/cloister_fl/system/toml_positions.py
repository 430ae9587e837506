"""Where each key stands in a TOML file, for errors that name the line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator

_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""


_DOTTED = re.compile(rf"\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*=")


_TABLE = re.compile(rf"\s*\[(\[?)\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*\]")


_PART = re.compile(_KEY)


_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|\'[^\']*\'')


_CLOSING = {
    # A string may end in up to two quotes of its own, right before the three that close it.
    '"""': re.compile(r'(?:[^"\\]|\\.|"{1,2}(?!"))*?"{3,5}'),
    "'''": re.compile(r"(?:[^']|'{1,2}(?!'))*?'{3,5}"),
}


KeyPath = tuple[str, ...]


def key_lines(text: str) -> dict[KeyPath, int]:
    """Map the path of each key and table in TOML text to its 1-based line (first mention)."""
    found: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for number, line in _statements(text):
        header = _TABLE.match(line)
        if header:
            table = _split(header.group(2))
            _note(found, table, number)
            continue
        pair = _DOTTED.match(line)
        if pair:
            _note(found, table + _split(pair.group(1)), number)
    return found


def _note(found: dict[KeyPath, int], path: KeyPath, number: int) -> None:
    for end in range(1, len(path) + 1):
        found.setdefault(path[:end], number)


def _split(dotted: str) -> KeyPath:
    return tuple(_bare(part) for part in _PART.findall(dotted))


def _bare(part: str) -> str:
    if part[0] == '"' and "\\" in part:
        try:
            return str(tomllib.loads(f"key = {part}")["key"])
        except tomllib.TOMLDecodeError:
            return part
    return part[1:-1] if part[0] in "\"'" else part


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines on which a statement starts: not inside a string or an array."""
    closing = ""
    depth = 0
    for number, line in enumerate(_lines(text), start=1):
        if not closing and depth == 0:
            yield number, line
        # A table header's brackets close on their own line, so they need no special case.
        position = 0
        while position < len(line):
            rest = line[position:]
            if closing:
                match = _CLOSING[closing].match(rest)
                if not match:
                    break
                position += match.end()
                closing = ""
            elif rest.startswith(('"""', "'''")):
                closing = rest[:3]
                position += 3
            elif rest[0] == "#":
                break
            elif rest[0] in "\"'":
                match = _STRING.match(rest)
                position += match.end() if match else len(rest)
            else:
                depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(rest[0], 0)
                position += 1
        depth = max(depth, 0)


def _lines(text: str) -> list[str]:
    """Split as TOML does; ``str.splitlines`` would also split at U+2028 and its like."""
    return text.replace("\r\n", "\n").split("\n")

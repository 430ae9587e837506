"""The errors that a test expects, by their codes where many share a class."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest

from cloister_fl.errors import ErrorKind

E = TypeVar("E", bound=BaseException)
Expected = ErrorKind[Any] | type[BaseException]


def raises(
    expected: Expected | tuple[Expected, ...], match: str | None = None
) -> pytest.RaisesExc[Any]:
    """Expect an error of a kind or class, or of one of several, as ``pytest.raises`` does.

    Args:
        expected: what may be raised; of a kind the code must be the same, too.
        match: regular expression that the message must contain.
    """
    kinds = expected if isinstance(expected, tuple) else (expected,)
    classes = tuple(kind.family if isinstance(kind, ErrorKind) else kind for kind in kinds)

    def check(error: BaseException) -> bool:
        assert any(is_of(error, kind) for kind in kinds), f"{error!r} is of another kind"
        return True

    return pytest.raises(classes, match=match, check=check)


def is_of(error: BaseException | None, expected: Expected) -> bool:
    """Whether an error is of a kind or of a class."""
    if isinstance(expected, ErrorKind):
        return isinstance(error, expected.family) and error.code == expected.code
    return isinstance(error, expected)

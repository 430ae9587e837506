"""The base of all intended errors, their families, and the kind of an error without a class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Generic, Self, TypeVar, overload


class CloisterError(Exception):
    """Base of all intended errors; ``str`` gives code, what, why and remedy in one text.

    Args:
        what: what happened, one sentence.
        why: the cause, as far as it is known.
        remedy: what the reader can do about it.

    Attributes:
        what: as given, as are ``why`` and ``remedy``; text for a person.
        code: ``CLO-nnn``, which stays the same over versions; ``cloister explain`` has its page.
        title: title of the page.
        exit_status: status with which the commands exit on it.
    """

    code: str = "CLO-900"
    title: str = "Cloister error"
    exit_status: ClassVar[int] = 1

    def __init__(self, what: str, *, why: str = "", remedy: str = "") -> None:
        self.what = what
        self.why = why
        self.remedy = remedy
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what, self.why, self.remedy]
        return f"{self.code}: " + " ".join(part for part in parts if part)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    @property
    def kind(self) -> ErrorKind[Self]:
        """What makes another error of this code."""
        return ErrorKind(type(self), self.code, self.title)

    def __reduce__(self) -> tuple[object, ...]:
        # Ray carries errors between processes; the default would drop the keyword arguments.
        return (_rebuild, (self.kind, self.what, self.why, self.remedy), dict(self.__dict__))


_ErrorT_co = TypeVar("_ErrorT_co", bound=CloisterError, covariant=True)


@dataclass(frozen=True)
class ErrorKind(Generic[_ErrorT_co]):
    """An error with a code of its own and no class; a call returns an exception of its family.

    Attributes:
        family: class of the exceptions.
        code: their code, ``CLO-nnn``.
        title: title of the code's page.
    """

    family: type[_ErrorT_co]
    code: str
    title: str

    @property
    def exit_status(self) -> int:
        """Status with which the commands exit on it."""
        return self.family.exit_status

    @overload
    def __call__(
        self: ErrorKind[SecureAggregationError],
        what: str,
        *,
        why: str = "",
        remedy: str = "",
        blamed: str = "",
    ) -> SecureAggregationError: ...

    @overload
    def __call__(self, what: str, *, why: str = "", remedy: str = "") -> _ErrorT_co: ...

    def __call__(self, what: str, *, why: str = "", remedy: str = "", **more: str) -> CloisterError:
        error = self.family(what, why=why, remedy=remedy, **more)
        error.code, error.title = self.code, self.title
        return error


def _rebuild(kind: ErrorKind[CloisterError], what: str, why: str, remedy: str) -> CloisterError:
    return kind(what, why=why, remedy=remedy)


class InputError(CloisterError):
    """A file or an option that a person wrote is not as it must be."""

    title = "Bad input"
    exit_status = 2


class DataError(CloisterError):
    """The images or labels of a site cannot be used.

    Attributes:
        images: all that it is about, as the ids of an image and of its patient, 12 hexadecimal
            digits each; of a segmentation, the id of its file, and nothing. Only the site can
            resolve them.
        rows: all rows of the labels file that it is about: line, 1-based, and the name of the
            column that the row is keyed by, empty where it has no key.
    """

    title = "The site's data cannot be used"
    exit_status = 3
    images: tuple[tuple[str, str], ...] = ()
    rows: tuple[tuple[int, str], ...] = ()

    def about(
        self,
        images: Iterable[tuple[str, str]] = (),
        rows: Iterable[tuple[int, str]] = (),
    ) -> Self:
        """Say what it is about, all of it; the message lists the first few."""
        self.images, self.rows = tuple(images), tuple(sorted(set(rows)))
        return self


class PrivacyError(CloisterError):
    """The privacy ledger, the budget or the policy of a site says no."""

    title = "Refused to protect privacy"
    exit_status = 4


class ModelError(CloisterError):
    """A network, a vector of weights or a model file cannot be used."""

    title = "The model cannot be used"
    exit_status = 5


class RunError(CloisterError):
    """A run cannot begin or go on."""

    title = "The run cannot go on"
    exit_status = 6


class InstallError(CloisterError):
    """Something is not installed."""

    title = "Something is not installed"
    exit_status = 7


class SecureAggregationError(CloisterError):
    """A check of the protocol failed; no secret was sent.

    Args:
        blamed: id of the site that the evidence speaks against; empty where it is the server
            or nobody. Two ids are joined by a comma and a space.
    """

    title = "Secure aggregation was refused"
    exit_status = 8

    def __init__(self, what: str, *, why: str = "", remedy: str = "", blamed: str = "") -> None:
        super().__init__(what, why=why, remedy=remedy)
        self.blamed = blamed

    @property
    def blamed_sites(self) -> tuple[str, ...]:
        """The ids of ``blamed``."""
        return tuple(self.blamed.split(", ")) if self.blamed else ()


class DeploymentError(CloisterError):
    """A coordinator's server, or joining it, fails."""

    title = "The deployment is not as it must be"
    exit_status = 9

"""PACS client for DICOMweb: QIDO-RS and WADO-RS (PS3.18 sections 10.6 and 10.4).

The archive is believed as little as any other: answers are bounded, checked, and never followed to
another address. URLs hold identifiers, so httpx' own log is off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.size_limits import MAX_FILE_BYTES
from cloister_fl.client.pacs.multipart import InvalidAnswer, single_part
from cloister_fl.client.site.archive_settings import UID, DicomWeb, NotSent, Query
from cloister_fl.client.site.folder import command_at
from cloister_fl.errors import (
    ArchiveAnswerInvalid,
    ArchiveRefused,
    ArchiveUnreachable,
    DataError,
    FileUnreadable,
    Reject,
)

if TYPE_CHECKING:
    import httpx

_PAGE = 500
"""Most results that are asked for at a time."""
_MAX_RESULTS_BYTES = 16 << 20
"""Most bytes of a page of results; Python's objects take thirty times as much."""
_MAX_PAGES = 10_000
MAX_RESULTS = 4_000_000
"""Most results of one fetch: studies, series and instances."""
_TIMEOUT_SECONDS = 60.0
ANSWER_SECONDS = 600.0
"""How long one answer may take in all, however steadily it drips."""

_STUDY, _SERIES, _INSTANCE, _MODALITY = "0020000D", "0020000E", "00080018", "00080060"


class _Status(Exception):
    """An HTTP status other than 200."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _TooMuch(Exception):
    """An answer is longer than it may be."""


class WebArchive:
    """A connection to a DICOMweb archive; use it as a context.

    Args:
        settings: where it is.
        secret: the password or token; None where it asks for none.
        root: the folder that relative paths in ``settings`` are taken from.

    Raises:
        FileUnreadable: the authority's file cannot be used.
    """

    def __init__(self, settings: DicomWeb, secret: str | None, root: Path) -> None:
        import httpx

        self._root = root
        self._url = settings.url
        self._overdue = False
        self._told = 0
        # A coded answer could grow a thousandfold before anybody could count it.
        headers = {"Accept-Encoding": "identity"}
        auth: httpx.BasicAuth | None = None
        if settings.auth == "token":
            headers["Authorization"] = f"Bearer {secret or ''}"
        elif settings.auth == "basic":
            auth = httpx.BasicAuth(settings.user, secret or "")
        self._client = httpx.Client(
            verify=tls_context(settings.ca, root),
            auth=auth,
            headers=headers,
            timeout=_TIMEOUT_SECONDS,
            # Another address would be given the password.
            follow_redirects=False,
            # The archive is in the house: no proxy, and nothing from the environment.
            trust_env=False,
        )
        # Nobody asked for them, and there is no end to them.
        self._client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def find(self, query: Query) -> Iterator[tuple[str, str, str]]:
        """Yield the UIDs of the study, the series and the instance of each image that fits.

        Raises:
            ArchiveUnreachable, ArchiveRefused, ArchiveAnswerInvalid: see ``fetch.fetch``.
        """
        asked = {}
        if query.study_date:
            asked["StudyDate"] = query.study_date
        if query.study_description:
            asked["StudyDescription"] = query.study_description
        # One by one: archives differ in what they make of a list of modalities.
        studies = dict.fromkeys(
            _uid(study, _STUDY)
            for modality in query.modality
            for study in self._results("studies", {**asked, "ModalitiesInStudy": modality})
        )
        for study in studies:
            below = f"studies/{study}/series"
            for series in self._results(below, {}):
                if _text(series, _MODALITY) not in query.modality:
                    continue
                path = f"{below}/{_uid(series, _SERIES)}/instances"
                for instance in self._results(path, {}):
                    yield study, _uid(series, _SERIES), _uid(instance, _INSTANCE)

    def get(self, study: str, series: str, instance: str) -> bytes:
        """Fetch one instance as it is stored, a DICOM file.

        Raises:
            ArchiveUnreachable, ArchiveRefused, ArchiveAnswerInvalid: see ``fetch.fetch``.
            NotSent: the archive cannot send it.
            RejectedFile: ``TOO_LARGE``.
        """
        path = f"studies/{study}/series/{series}/instances/{instance}"
        accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
        try:
            kind, body = self._ask(path, {}, accept, MAX_FILE_BYTES + (64 << 10))
        except _Status as status:
            if status.code in {401, 403} or status.code < 400:
                raise _refusal(status.code, self._root) from None
            # Of this instance alone, such as a coding that it neither sends nor converts.
            raise NotSent from None
        except _TooMuch:
            raise RejectedFile(Reject.TOO_LARGE) from None
        try:
            return single_part(kind, body)
        except InvalidAnswer:
            raise invalid() from None

    def _results(self, path: str, asked: dict[str, str]) -> Iterator[dict[str, object]]:
        seen: set[bytes] = set()
        for page in range(_MAX_PAGES):
            paging = {"limit": str(_PAGE), "offset": str(page * _PAGE)}
            try:
                _, body = self._ask(
                    path, {**asked, **paging}, "application/dicom+json", _MAX_RESULTS_BYTES
                )
            except _Status as status:
                raise _refusal(status.code, self._root) from None
            except _TooMuch:
                raise invalid() from None
            results = _json(body)
            self._told += len(results)
            if self._told > MAX_RESULTS:
                raise invalid()
            # An archive without paging gives everything each time.
            before = len(seen)
            for one in results:
                mark = hashlib.sha256(json.dumps(one).encode()).digest()
                if mark not in seen:
                    seen.add(mark)
                    yield one
            if len(results) < _PAGE or len(seen) == before:
                return
        raise invalid()

    def _ask(self, path: str, asked: dict[str, str], accept: str, most: int) -> tuple[str, bytes]:
        """Content-Type and body of an answer of at most ``most`` bytes."""
        import httpx

        try:
            with (
                self._limited(),
                self._client.stream(
                    "GET", f"{self._url}/{path}", params=asked, headers={"Accept": accept}
                ) as response,
            ):
                if response.status_code == 204:
                    return "", b""
                if response.status_code != 200:
                    raise _Status(response.status_code)
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise invalid()
                body = bytearray()
                end = time.monotonic() + ANSWER_SECONDS
                for piece in response.iter_raw():
                    body += piece
                    if time.monotonic() > end:
                        raise _slow()
                    if len(body) > most:
                        raise _TooMuch
                return response.headers.get("Content-Type", ""), bytes(body)
        except httpx.RemoteProtocolError:
            # It ended in the middle of an answer.
            raise (_slow() if self._overdue else invalid()) from None
        except (httpx.InvalidURL, UnicodeError):
            raise unreachable("Its address is invalid.") from None
        except (httpx.HTTPError, RuntimeError) as error:
            # RuntimeError: closed for it.
            raise (_slow() if self._overdue else _unreachable(error)) from None

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        """Close the connection where an answer does not end: headers that drip have no other end.

        httpx limits the time between two bytes, and no more.
        """

        def close() -> None:
            self._overdue = True
            self._client.close()

        timer = threading.Timer(ANSWER_SECONDS, close)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def tls_context(ca: str, root: Path) -> ssl.SSLContext:
    """What certificates are checked by.

    Args:
        ca: PEM file, relative to ``root`` or absolute; empty: the system's authorities.
        root: the site folder.

    Raises:
        FileUnreadable: it holds no certificate.
    """
    try:
        context = ssl.create_default_context(cafile=str(root / ca) if ca else None)
        # Not even where the environment asks for the keys of the connection.
        context.keylog_filename = None  # type: ignore[assignment]
        return context
    except (OSError, ssl.SSLError):
        raise FileUnreadable(
            "The file of the archive's certificate authority cannot be used.",
            remedy="Name a PEM file as 'ca' in site.toml, relative to it or absolute.",
        ) from None


def _json(body: bytes) -> list[dict[str, object]]:
    if not body:
        return []
    results = None
    with contextlib.suppress(ValueError, RecursionError):
        results = json.loads(body)
    if not isinstance(results, list) or not all(isinstance(one, dict) for one in results):
        raise invalid()
    return results


def _text(result: dict[str, object], tag: str) -> str:
    element = result.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    value = values[0] if isinstance(values, list) and values else ""
    return value if isinstance(value, str) else ""


def _uid(result: dict[str, object], tag: str) -> str:
    uid = _text(result, tag)
    # It becomes a part of a path.
    if not UID.fullmatch(uid):
        raise invalid()
    return uid


def _refusal(status: int, root: Path) -> DataError:
    if status in {401, 403}:
        return ArchiveRefused(
            "The archive refused this site's password or token.",
            why=f"It answered {status}.",
            remedy="Check 'auth' and 'user' in site.toml, and set the secret anew: "
            + command_at(root, "fetch --ask-secret"),
        )
    return ArchiveAnswerInvalid(
        "The archive refused a request.",
        why=f"It answered with the HTTP status {status}.",
        remedy="Check 'url' in site.toml; then ask the archive's administrator. What was fetched "
        "is kept.",
    )


def invalid() -> DataError:
    """The error of an answer that cannot be used."""
    return ArchiveAnswerInvalid(
        "The archive's answer was cut short, too large, or not what was asked for.",
        remedy="Fetch again: what was fetched is kept. If it happens again, ask the archive's "
        "administrator.",
    )


def _unreachable(error: Exception) -> ArchiveUnreachable:
    told = str(error.__cause__ or error).lower()
    if "timed out" in told or "timeout" in type(error).__name__.lower():
        return _slow()
    why = "It does not answer."
    if "certificate" in told:
        why = "This site does not trust its certificate."
    return unreachable(why)


def _slow() -> ArchiveUnreachable:
    return unreachable("It took too long to answer.")


def unreachable(why: str) -> ArchiveUnreachable:
    """The error of an archive that does not answer."""
    return ArchiveUnreachable(
        "The archive cannot be reached.",
        why=why,
        remedy="Check its address and 'ca' in site.toml, and that it runs. What was fetched is "
        "kept: fetch again.",
    )

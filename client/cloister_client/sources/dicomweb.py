"""Find and fetch instances by QIDO-RS and WADO-RS (PS3.18 sections 10.6 and 10.4).

The archive is believed as little as any other: answers are bounded, checked, and never followed to
another address. URLs hold identifiers, so httpx' own log is off.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cloister_client.dicom.bounds import MAX_FILE_BYTES
from cloister_client.sources.multipart import InvalidAnswer, single_part
from cloister_client.sources.settings import DicomWeb, NotSent, Query
from cloister_common.errors import (
    ArchiveAnswerInvalid,
    ArchiveRefused,
    ArchiveUnreachable,
    FileUnreadable,
)

if TYPE_CHECKING:
    import httpx

_PAGE = 500
"""Most results that are asked for at a time."""
_MAX_RESULTS_BYTES = 64 << 20
_MAX_PAGES = 10_000
_TIMEOUT_SECONDS = 60.0
ANSWER_SECONDS = 600.0
"""How long one answer may take in all, however steadily it drips."""
_UID = re.compile(r"[0-9.]{1,64}")

_STUDY, _SERIES, _INSTANCE, _MODALITY = "0020000D", "0020000E", "00080018", "00080060"

for _name in ("httpx", "httpcore"):
    _log = logging.getLogger(_name)
    _log.addHandler(logging.NullHandler())
    _log.propagate = False
    _log.setLevel(logging.CRITICAL + 1)


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

        self._url = settings.url
        headers = {}
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
            ArchiveUnreachable, ArchiveRefused, ArchiveAnswerInvalid: see ``sources.fetch``.
        """
        asked = {"ModalitiesInStudy": "\\".join(query.modality)}
        if len(query.modality) > 1:
            # Archives differ in what they make of a list; the series are looked at anyway.
            asked = {}
        if query.study_date:
            asked["StudyDate"] = query.study_date
        if query.study_description:
            asked["StudyDescription"] = query.study_description
        for study in self._results("studies", asked):
            below = f"studies/{_uid(study, _STUDY)}/series"
            for series in self._results(below, {}):
                if _text(series, _MODALITY) not in query.modality:
                    continue
                path = f"{below}/{_uid(series, _SERIES)}/instances"
                for instance in self._results(path, {}):
                    yield _uid(study, _STUDY), _uid(series, _SERIES), _uid(instance, _INSTANCE)

    def get(self, study: str, series: str, instance: str) -> bytes:
        """Fetch one instance as it is stored, a DICOM file.

        Raises:
            ArchiveUnreachable, ArchiveRefused, ArchiveAnswerInvalid: see ``sources.fetch``.
            NotSent: the archive cannot send it.
        """
        path = f"studies/{study}/series/{series}/instances/{instance}"
        # Such as a coding that it neither sends nor converts.
        may_fail = frozenset((404, 406, 410, 415))
        accept = 'multipart/related; type="application/dicom"; transfer-syntax=*'
        kind, body = self._ask(path, {}, accept, MAX_FILE_BYTES + (64 << 10), may_fail)
        try:
            return single_part(kind, body)
        except InvalidAnswer:
            raise invalid() from None

    def _results(self, path: str, asked: dict[str, str]) -> Iterator[dict[str, object]]:
        seen: set[str] = set()
        for page in range(_MAX_PAGES):
            paging = {"limit": str(_PAGE), "offset": str(page * _PAGE)}
            _, body = self._ask(
                path, {**asked, **paging}, "application/dicom+json", _MAX_RESULTS_BYTES
            )
            results = _json(body)
            # An archive without paging gives everything each time.
            fresh = [one for one in results if json.dumps(one) not in seen]
            seen.update(json.dumps(one) for one in results)
            yield from fresh
            if len(results) < _PAGE or not fresh:
                return
        raise invalid()

    def _ask(
        self,
        path: str,
        asked: dict[str, str],
        accept: str,
        most: int,
        may_fail: frozenset[int] = frozenset(),
    ) -> tuple[str, bytes]:
        """Content-Type and body of an answer of at most ``most`` bytes."""
        import httpx

        try:
            with self._client.stream(
                "GET", f"{self._url}/{path}", params=asked, headers={"Accept": accept}
            ) as response:
                if response.status_code == 204:
                    return "", b""
                if response.status_code in may_fail:
                    raise NotSent
                if response.status_code != 200:
                    raise _refusal(response.status_code)
                body = bytearray()
                end = time.monotonic() + ANSWER_SECONDS
                for piece in response.iter_bytes():
                    body += piece
                    if time.monotonic() > end:
                        raise _slow()
                    if len(body) > most:
                        raise invalid()
                return response.headers.get("Content-Type", ""), bytes(body)
        except httpx.RemoteProtocolError:
            # It ended in the middle of an answer.
            raise invalid() from None
        except httpx.DecodingError:
            raise invalid() from None
        except httpx.HTTPError as error:
            raise _unreachable(error) from None


def tls_context(ca: str, root: Path) -> ssl.SSLContext:
    """What certificates are checked by.

    Args:
        ca: PEM file, relative to ``root`` or absolute; empty: the system's authorities.
        root: the site folder.

    Raises:
        FileUnreadable: it holds no certificate.
    """
    try:
        return ssl.create_default_context(cafile=str(root / ca) if ca else None)
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
    if not _UID.fullmatch(uid) or ".." in uid:
        raise invalid()
    return uid


def _refusal(status: int) -> ArchiveRefused | ArchiveAnswerInvalid:
    if status in {401, 403}:
        return ArchiveRefused(
            "The archive does not accept this site's password or token.",
            why=f"It answered {status}.",
            remedy="Check 'auth' and 'user' in site.toml, and set the secret anew: "
            "cloister client fetch --ask-secret",
        )
    return ArchiveAnswerInvalid(
        "The archive did not answer a request.",
        why=f"It answered with the HTTP status {status}.",
        remedy="Check 'url' in site.toml; then ask who runs the archive. What was fetched is kept.",
    )


def invalid() -> ArchiveAnswerInvalid:
    """The error of an answer that cannot be used."""
    return ArchiveAnswerInvalid(
        "The archive's answer was cut short, too large, or not what was asked for.",
        remedy="Fetch again: what was fetched is kept. If it happens again, ask who runs the "
        "archive.",
    )


def _unreachable(error: Exception) -> ArchiveUnreachable:
    told = str(error.__cause__ or error).lower()
    if "timed out" in told or "timeout" in type(error).__name__.lower():
        return _slow()
    why = "It does not answer."
    if "certificate" in told:
        why = "Its certificate is not one that this site trusts."
    return unreachable(why)


def _slow() -> ArchiveUnreachable:
    return unreachable("It took too long.")


def unreachable(why: str) -> ArchiveUnreachable:
    """The error of an archive that does not answer."""
    return ArchiveUnreachable(
        "The archive cannot be reached.",
        why=why,
        remedy="Check its address and 'ca' in site.toml, and that it runs. What was fetched is "
        "kept: fetch again.",
    )

"""Find and fetch instances by C-FIND and C-GET (PS3.4 annex C), over TLS.

C-GET brings the images over the connection that this site opened; C-MOVE would need a port that
the archive can reach, and is not used. What arrives is kept as it came; it is decoded nowhere but
in the confined workers. The answers to C-FIND, a few UIDs each, are read by pydicom here.
"""

from __future__ import annotations

import logging
import re
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pydicom.dataset import Dataset

from cloister_client.dicom.bounds import MAX_FILE_BYTES
from cloister_client.dicom.outlines import MODALITY
from cloister_client.dicom.precheck import SOP_CLASSES, TRANSFER_SYNTAXES
from cloister_client.dicom.reject import SEGMENTATION
from cloister_client.dicom.tags import silence
from cloister_client.sources.dicomweb import (
    ANSWER_SECONDS,
    MAX_RESULTS,
    invalid,
    tls_context,
    unreachable,
)
from cloister_client.sources.settings import CGet, NotSent, Query
from cloister_common.errors import ArchiveRefused, FileUnreadable
from cloister_common.files import read_secret

if TYPE_CHECKING:
    from pynetdicom.association import Association
    from pynetdicom.events import Event

_FIND = "1.2.840.10008.5.1.4.1.2.2.1"  # Study Root Query/Retrieve Information Model - FIND
_GET = "1.2.840.10008.5.1.4.1.2.2.3"
_TIMEOUT_SECONDS = 60
_PENDING = frozenset((0xFF00, 0xFF01))
MAX_PDU_BYTES = 1 << 20
"""Longest message unit that is taken; this site asks for 16 KB (PS3.8 section D.1)."""
_UID = re.compile(r"[0-9.]{1,64}")

_log = logging.getLogger("pynetdicom")
_log.addHandler(logging.NullHandler())
_log.propagate = False
_log.setLevel(logging.CRITICAL + 1)


class GetArchive:
    """A connection to an archive that speaks C-GET; use it as a context.

    Args:
        settings: where it is, and who this site is.
        root: the folder that relative paths in ``settings`` are taken from.

    Raises:
        FileUnreadable: a file of ``settings`` cannot be used.
    """

    def __init__(self, settings: CGet, root: Path) -> None:
        self._settings = settings
        self._tls = _tls(settings, root)
        self._association: Association | None = None
        self._arrived: list[bytes] = []
        self._received = 0
        self._modalities: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._association is not None and self._association.is_established:
            self._association.release()

    def find(self, query: Query) -> Iterator[tuple[str, str, str]]:
        """Yield the UIDs of the study, the series and the instance of each image that fits.

        Raises:
            ArchiveUnreachable, ArchiveRefused, ArchiveAnswerInvalid: see ``sources.fetch``.
        """
        self._modalities = query.modality
        asked = {"StudyDate": query.study_date, "StudyDescription": query.study_description}
        for study in self._found("STUDY", StudyInstanceUID="", **asked):
            one = _uid(study, "StudyInstanceUID")
            for series in self._found(
                "SERIES", StudyInstanceUID=one, SeriesInstanceUID="", Modality=""
            ):
                if str(series.get("Modality", "")) not in query.modality:
                    continue
                other = _uid(series, "SeriesInstanceUID")
                for image in self._found(
                    "IMAGE", StudyInstanceUID=one, SeriesInstanceUID=other, SOPInstanceUID=""
                ):
                    yield one, other, _uid(image, "SOPInstanceUID")

    def get(self, study: str, series: str, instance: str) -> bytes:
        """Fetch one instance, as a DICOM file.

        Raises:
            ArchiveUnreachable, ArchiveRefused, ArchiveAnswerInvalid: see ``sources.fetch``.
            NotSent: the archive cannot send it.
        """
        asked = _identifier(
            "IMAGE", StudyInstanceUID=study, SeriesInstanceUID=series, SOPInstanceUID=instance
        )
        self._arrived.clear()
        self._received = 0
        end = time.monotonic() + ANSWER_SECONDS
        with silence():
            for status, _ in self._connected().send_c_get(asked, _GET):
                code = status.get("Status")
                if code is None:
                    raise self._ended()
                if code not in _PENDING and code != 0:
                    # The association stands, so it is this instance that cannot be sent.
                    raise NotSent
                if time.monotonic() > end:
                    raise unreachable("It took too long.")
        if not self._arrived:
            raise NotSent
        if len(self._arrived) != 1:
            raise invalid()
        return self._arrived.pop()

    def _found(self, level: str, **keys: str) -> Iterator[Dataset]:
        results = []
        self._received = 0
        end = time.monotonic() + ANSWER_SECONDS
        with silence():
            for status, result in self._connected().send_c_find(_identifier(level, **keys), _FIND):
                code = status.get("Status")
                if code is None:
                    raise self._ended()
                if code in _PENDING:
                    if result is None:
                        raise invalid()
                    results.append(result)
                    if len(results) > MAX_RESULTS or time.monotonic() > end:
                        raise invalid()
                elif code != 0:
                    raise invalid()
        # All at once: what is asked next must not come between the answers.
        yield from results

    def _connected(self) -> Association:
        if self._association is not None and self._association.is_established:
            return self._association
        from pynetdicom import AE, build_role, evt

        entity = AE(ae_title=self._settings.calling)
        for name in ("acse_timeout", "dimse_timeout", "network_timeout", "connection_timeout"):
            setattr(entity, name, _TIMEOUT_SECONDS)
        entity.add_requested_context(_FIND)
        entity.add_requested_context(_GET)
        wanted = [uid for uid, kinds in SOP_CLASSES.items() if kinds & set(self._modalities)]
        wanted += [SEGMENTATION] if MODALITY in self._modalities else []
        for uid in wanted:
            # A context for each syntax, so that every image comes as it is stored.
            for transfer_syntax in sorted(TRANSFER_SYNTAXES):
                entity.add_requested_context(uid, transfer_syntax)
        association = entity.associate(
            self._settings.host,
            self._settings.port,
            ae_title=self._settings.called,
            ext_neg=[build_role(uid, scp_role=True) for uid in wanted],
            tls_args=None if self._tls is None else (self._tls, self._settings.host),
            evt_handlers=[
                (evt.EVT_CONN_OPEN, self._bound),
                (evt.EVT_C_STORE, self._store),
                (evt.EVT_DATA_RECV, self._count),
            ],
        )
        if association.is_rejected:
            raise ArchiveRefused(
                "The archive does not accept this site.",
                why="It rejected the association.",
                remedy="Have this site's AE title ('calling') entered at the archive, and check "
                "'called' in site.toml.",
            )
        if not association.is_established:
            raise unreachable(self._why_not())
        self._association = association
        return association

    def _why_not(self) -> str:
        """Tell a certificate that is not trusted from silence: pynetdicom says the same of both."""
        if self._tls is not None:
            address = (self._settings.host, self._settings.port)
            try:
                with (
                    socket.create_connection(address, _TIMEOUT_SECONDS) as channel,
                    self._tls.wrap_socket(channel, server_hostname=address[0]),
                ):
                    pass
            except ssl.SSLCertVerificationError:
                return "Its certificate is not one that this site trusts."
            except OSError:
                pass
        return "It does not answer, or not as this site asks."

    def _store(self, event: Event) -> int:
        self._arrived.append(event.encoded_dataset())
        return 0x0000

    def _bound(self, event: Event) -> None:
        """Take no unit as long as the archive says that it is: up to 4 GB, before it is counted."""
        channel = event.assoc.dul.socket
        if channel is None:
            return
        take = channel.recv

        def recv(count: int) -> bytearray:
            if count > MAX_PDU_BYTES:
                channel.close()
                raise OSError("a unit longer than was agreed")
            return take(count)

        channel.recv = recv  # type: ignore[method-assign, assignment]

    def _count(self, event: Event) -> None:
        self._received += len(event.data)
        if self._received > MAX_FILE_BYTES + (64 << 10):
            # Nothing else would keep a server from filling the memory.
            channel = event.assoc.dul.socket
            if channel is not None:
                channel.close()

    def _ended(self) -> Exception:
        if self._received > MAX_FILE_BYTES:
            return invalid()
        return unreachable("It ended the connection in the middle of an answer.")


def _identifier(level: str, **keys: str) -> Dataset:
    asked = Dataset()
    asked.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(asked, keyword, value)
    return asked


def _uid(result: Dataset, keyword: str) -> str:
    value: Any = result.get(keyword, "")
    if not _UID.fullmatch(str(value)):
        raise invalid()
    return str(value)


def _tls(settings: CGet, root: Path) -> Any:
    if not settings.tls:
        return None
    context = tls_context(settings.ca, root)
    if settings.certificate:
        key = root / settings.key
        # Refused where others could have read it.
        read_secret(key)
        try:
            context.load_cert_chain(root / settings.certificate, key)
        except OSError:
            raise FileUnreadable(
                "This site's certificate for the archive cannot be used.",
                remedy="Name PEM files as 'certificate' and 'key' in site.toml.",
            ) from None
    return context

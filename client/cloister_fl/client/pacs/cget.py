"""PACS client for DICOM C-FIND and C-GET over TLS (PS3.4 annex C).

C-GET brings the images over the connection that this site opened; C-MOVE would need a port that
the archive can reach, and is not used. What arrives is kept as it came; it is decoded nowhere but
in the confined workers. The answers to C-FIND, a few UIDs each, are read by pydicom here.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pydicom.dataset import Dataset

from cloister_fl.client.dicom.acceptance import SOP_CLASSES
from cloister_fl.client.dicom.header import silence
from cloister_fl.client.dicom.mask_table import MODALITY
from cloister_fl.client.dicom.rejection import SEGMENTATION
from cloister_fl.client.dicom.size_limits import MAX_FILE_BYTES
from cloister_fl.client.dicom.transfer_syntaxes import NATIVE, TRANSFER_SYNTAXES
from cloister_fl.client.pacs.dicomweb import (
    ANSWER_SECONDS,
    MAX_RESULTS,
    invalid,
    tls_context,
    unreachable,
)
from cloister_fl.client.site.archive_settings import UID, CGet, NotSent, Query
from cloister_fl.errors import ArchiveRefused, ArchiveUnreachable, CloisterError, FileUnreadable
from cloister_fl.system.files import read_secret

if TYPE_CHECKING:
    from pynetdicom.association import Association
    from pynetdicom.events import Event

_FIND = "1.2.840.10008.5.1.4.1.2.2.1"  # Study Root Query/Retrieve Information Model - FIND
_GET = "1.2.840.10008.5.1.4.1.2.2.3"
_TIMEOUT_SECONDS = 60
"""How long the archive may say nothing."""
_GLANCE_SECONDS = 1.0
_MOST_AHEAD = 64
"""Most answers to C-FIND that wait to be read; the archive waits with the next."""
_MOST_ANSWERS = 1_000_000
"""Most answers to one question."""
_MOST_WORD = 64
"""Longest value that is kept of an answer: a UID (PS3.5 section 9.1)."""
_MOST_FOUND_BYTES = 64 << 10
"""Longest answer to C-FIND; a few UIDs are asked for. pydicom makes forty times as much of it."""
_MOST_UNASKED_BYTES = 4 << 10
"""Most that an archive may say while it is asked nothing, such as that it releases this site."""
_PENDING = frozenset((0xFF00, 0xFF01))
MAX_CONTEXTS = 128
"""Most presentation contexts of an association: their numbers are odd, and one byte (PS3.8 section
9.3.2.2)."""
MAX_PDU_BYTES = 1 << 20
"""Longest message unit that is taken; this site asks for 16 KB (PS3.8 section D.1)."""

_KEPT = frozenset(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "Modality"))


def associations(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Split modalities so that all that their images are asked for in fits in an association.

    Each SOP class is asked for in each transfer syntax, in a context of its own, so that every
    image comes as it is stored.

    Returns:
        Groups of modalities, in the order given; a single one where all fit.
    """
    groups: list[tuple[str, ...]] = []
    for modality in modalities:
        wider = (*groups[-1], modality) if groups else (modality,)
        # Two more, to find and to get.
        if groups and len(_classes(wider)) * len(TRANSFER_SYNTAXES) + 2 <= MAX_CONTEXTS:
            groups[-1] = wider
        else:
            groups.append((modality,))
    return groups


def _classes(modalities: Collection[str]) -> list[str]:
    """The SOP classes in which images of these modalities come."""
    wanted = [uid for uid, kinds in SOP_CLASSES.items() if not kinds.isdisjoint(modalities)]
    return [*wanted, SEGMENTATION] if MODALITY in modalities else wanted


class _Held:
    """A TLS context that shows each connection before its handshake, which may be endless, too."""

    def __init__(self, context: ssl.SSLContext, show: Callable[[socket.socket], None]) -> None:
        self._context = context
        self._show = show

    def wrap_socket(self, channel: socket.socket, **given: Any) -> ssl.SSLSocket:
        wrapped = self._context.wrap_socket(channel, **given)
        self._show(wrapped)
        return wrapped


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
        self._told = 0
        self._received = 0
        self._most = 0
        self._each = False
        self._heard = 0.0
        # Answers to a question, each counted by one thread alone.
        self._came = 0
        self._taken = 0
        self._over = threading.Event()
        self._raw: socket.socket | None = None
        self._groups: list[tuple[str, ...]] = [()]
        self._group_of: dict[str, int] = {}
        # The group that is asked for next, and that of the association.
        self._group = self._joined = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._association is None or not self._association.is_established:
            return
        if _error is None:
            self._association.release()
        else:
            # Not asked for its leave, which might come behind answers without end.
            self._hang_up()
            self._association.abort()

    def find(self, query: Query) -> Iterator[tuple[str, str, str]]:
        """Yield the UIDs of the study, the series and the instance of each image that fits.

        Raises:
            ArchiveUnreachable, ArchiveRefused, ArchiveAnswerInvalid: see ``fetch.fetch``.
        """
        self._groups = associations(query.modality)
        group_of = {one: place for place, group in enumerate(self._groups) for one in group}
        asked = {"StudyDate": query.study_date, "StudyDescription": query.study_description}
        for study in self._found("STUDY", StudyInstanceUID="", **asked):
            one = _uid(study, "StudyInstanceUID")
            for series in self._found(
                "SERIES", StudyInstanceUID=one, SeriesInstanceUID="", Modality=""
            ):
                if series["Modality"] not in query.modality:
                    continue
                other = _uid(series, "SeriesInstanceUID")
                self._group_of[other] = group_of[series["Modality"]]
                for image in self._found(
                    "IMAGE", StudyInstanceUID=one, SeriesInstanceUID=other, SOPInstanceUID=""
                ):
                    yield one, other, _uid(image, "SOPInstanceUID")

    def get(self, study: str, series: str, instance: str) -> bytes:
        """Fetch one instance, as a DICOM file.

        Raises:
            ArchiveUnreachable, ArchiveRefused, ArchiveAnswerInvalid: see ``fetch.fetch``.
            NotSent: the archive cannot send it.
        """
        asked = _identifier(
            "IMAGE", StudyInstanceUID=study, SeriesInstanceUID=series, SOPInstanceUID=instance
        )
        self._arrived.clear()
        self._group = self._group_of.get(series, 0)
        with silence(), self._watched(MAX_FILE_BYTES + (64 << 10), each=False):
            for status, _ in self._connected().send_c_get(asked, _GET):
                code = status.get("Status")
                if code is None:
                    raise self._ended()
                if code not in _PENDING and code != 0:
                    # The association stands, so it is this instance that cannot be sent.
                    raise NotSent
        if not self._arrived:
            raise NotSent
        if len(self._arrived) != 1:
            raise invalid()
        return self._arrived.pop()

    def _found(self, level: str, **keys: str) -> Iterator[dict[str, str]]:
        results: list[dict[str, str]] = []
        try:
            self._ask_found(results, level, keys)
        except (CloisterError, NotSent):
            raise
        except Exception:
            # pydicom raises what Python has where a value is not of its representation.
            raise invalid() from None
        # All at once: what is asked next must not come between the answers.
        yield from results

    def _ask_found(self, results: list[dict[str, str]], level: str, keys: dict[str, str]) -> None:
        asked = _identifier(level, **keys)
        wanted = [key for key, value in keys.items() if not value and key in _KEPT]
        with silence(), self._watched(_MOST_FOUND_BYTES, each=True):
            for status, result in self._connected().send_c_find(asked, _FIND):
                code = status.get("Status")
                if code is None:
                    raise self._ended()
                self._taken += 1
                if code in _PENDING:
                    if result is None:
                        raise invalid()
                    # At once: what is no UID must not be kept until there are millions of them.
                    found = {key: str(result.get(key, "")) for key in wanted}
                    if any(len(value) > _MOST_WORD for value in found.values()):
                        raise invalid()
                    results.append(found)
                    self._told += 1
                    if self._told > MAX_RESULTS or len(results) > _MOST_ANSWERS:
                        raise invalid()
                elif code != 0:
                    raise invalid()

    @contextlib.contextmanager
    def _watched(self, most: int, *, each: bool) -> Iterator[None]:
        """Hang up on an archive that is silent for a minute, never ends, or says too much at once.

        Afterwards, until it is asked again, it may say next to nothing. pynetdicom waits for whole
        messages, and without any limit for the rest of a unit.

        Args:
            most: bytes that the archive may say.
            each: whether in each message, or in all.
        """
        self._received, self._most, self._each = 0, most, each
        self._heard = time.monotonic()
        end = time.monotonic() + ANSWER_SECONDS
        over = self._over = threading.Event()
        late = False

        def watch() -> None:
            nonlocal late
            while not over.wait(_GLANCE_SECONDS):
                now = time.monotonic()
                if now > end or now - self._heard > _TIMEOUT_SECONDS:
                    late = True
                    self._hang_up()
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            # Under watch, too: an archive may take its time with each byte of its answer.
            self._connected()
            self._received, self._came, self._taken = 0, 0, 0
            self._heard = time.monotonic()
            yield
        except (ArchiveUnreachable, NotSent):
            if late:
                raise unreachable("It took too long to answer.") from None
            raise
        finally:
            # What comes now is read all the same, by pynetdicom's own thread, and kept.
            self._received, self._most, self._each = 0, _MOST_UNASKED_BYTES, False
            over.set()
            watcher.join()
            if late and self._association is not None:
                self._association.abort()

    def _hang_up(self) -> None:
        if self._raw is not None:
            with contextlib.suppress(OSError):
                # Not the method of a TLS socket, which would take the keys from under a reader.
                socket.socket.shutdown(self._raw, socket.SHUT_RDWR)

    def _connected(self) -> Association:
        if self._association is not None and self._association.is_established:
            if self._group == self._joined:
                return self._association
            self._association.release()
        from pynetdicom import AE, _config, build_role, evt

        # It would write every answer out for a log that nobody keeps.
        _config.LOG_RESPONSE_IDENTIFIERS = False
        entity = AE(ae_title=self._settings.calling)
        for name in ("acse_timeout", "network_timeout", "connection_timeout"):
            setattr(entity, name, _TIMEOUT_SECONDS)
        # A large image takes its time; silence is watched for.
        entity.dimse_timeout = ANSWER_SECONDS
        for uid in (_FIND, _GET):
            # pynetdicom would offer the deflated syntax, too: 9 KB of it are 600 MB of values.
            entity.add_requested_context(uid, sorted(NATIVE))
        wanted = _classes(self._groups[self._group])
        for uid in wanted:
            for transfer_syntax in sorted(TRANSFER_SYNTAXES):
                entity.add_requested_context(uid, transfer_syntax)
        tls: Any = None if self._tls is None else _Held(self._tls, self._hold)
        association = entity.associate(
            self._settings.host,
            self._settings.port,
            ae_title=self._settings.called,
            ext_neg=[build_role(uid, scp_role=True) for uid in wanted],
            tls_args=None if self._tls is None else (tls, self._settings.host),
            evt_handlers=[
                (evt.EVT_CONN_OPEN, self._bound),
                (evt.EVT_C_STORE, self._store),
                (evt.EVT_DATA_RECV, self._count),
                (evt.EVT_DIMSE_RECV, self._whole),
            ],
        )
        if association.is_rejected:
            raise ArchiveRefused(
                "The archive refused this site.",
                why="It rejected the association.",
                remedy="Ask the archive's administrator to enter this site's AE title ('calling'), "
                "and check 'called' in site.toml.",
            )
        if not association.is_established:
            raise unreachable(self._why_not())
        self._association, self._joined = association, self._group
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
                return "This site does not trust its certificate."
            except OSError:
                pass
        return "It does not answer, or not as this site asks."

    def _store(self, event: Event) -> int:
        self._arrived.append(event.encoded_dataset())
        return 0x0000

    def _bound(self, event: Event) -> None:
        """Take no unit as long as the archive says that it is: up to 4 GB, before it is counted."""
        channel = event.assoc.dul.socket
        if channel is None or channel.socket is None:
            return
        self._raw = channel.socket
        # Also before there is an association to be watched.
        self._raw.settimeout(_TIMEOUT_SECONDS)
        take = channel.recv

        def recv(count: int) -> bytearray:
            if count > MAX_PDU_BYTES:
                channel.close()
                raise OSError("a unit longer than was agreed")
            return take(count)

        channel.recv = recv  # type: ignore[method-assign, assignment]

    def _count(self, event: Event) -> None:
        self._heard = time.monotonic()
        self._received += len(event.data)
        if self._most and self._received > self._most:
            # Nothing else would keep a server from filling the memory.
            self._hang_up()

    def _whole(self, _: Event) -> None:
        """A message has arrived whole; what comes now is of the next one."""
        if self._each and self._received <= self._most:
            self._received = 0
            self._came += 1
            # In the thread that reads: an archive that is faster than this site has to wait.
            while self._came - self._taken > _MOST_AHEAD and not self._over.wait(0.01):
                self._heard = time.monotonic()

    def _hold(self, channel: socket.socket) -> None:
        self._raw = channel

    def _ended(self) -> Exception:
        if self._received > self._most:
            return invalid()
        return unreachable("It ended the connection in the middle of an answer.")


def _identifier(level: str, **keys: str) -> Dataset:
    asked = Dataset()
    asked.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(asked, keyword, value)
    return asked


def _uid(result: dict[str, str], keyword: str) -> str:
    if not UID.fullmatch(result[keyword]):
        raise invalid()
    return result[keyword]


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

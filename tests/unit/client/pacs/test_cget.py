"""C-GET from an archive of the tests: images as they are stored, and a clear error for the rest."""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from pynetdicom import AE, evt

from cloister_fl.client.data.loading import read_cohort
from cloister_fl.client.dicom import acceptance
from cloister_fl.client.dicom.mask_table import MODALITY
from cloister_fl.client.dicom.rejection import SEGMENTATION
from cloister_fl.client.dicom.transfer_syntaxes import NATIVE, TRANSFER_SYNTAXES
from cloister_fl.client.pacs import cget
from cloister_fl.client.pacs.fetch import Fetched, fetch
from cloister_fl.client.site.folder import Site, init_site, open_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import (
    ArchiveAnswerInvalid,
    ArchiveRefused,
    ArchiveUnreachable,
    FileUnreadable,
)
from cloister_fl.study.schema import Study
from support import studies
from support.certificates import self_signed
from support.dicom import make_dicom, radiograph, uid
from support.errors import Expected, raises
from support.segmentations import segment

CANARY = "CANARYNAME"
EVERY = ("CR", "DX", "MG", "CT", "MR", "US")
STUDY = studies.study()
SYNTAXES = (ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless)


ODD = {
    "odd bytes": ("OB", b"1.2"),
    "odd length": ("FD", [1.5, 2.5]),
    "dot": ("UI", "."),
    "no UID": ("UI", "1..2"),
    "long word": ("LO", "9" * 65),
}
"""What an archive may say in the place of a UID."""


class Archive:
    """A C-FIND and C-GET provider on loopback."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.files: dict[tuple[str, str, str], bytes] = {}
        for number in range(3):
            for image in range(2):
                instance = uid("cget", number, image)
                self.files[uid("study", number), uid("series", number), instance] = make_dicom(
                    radiograph(10 * number + image),
                    bits_stored=12,
                    patient_id=f"MRN{number}",
                    transfer_syntax=SYNTAXES[number],
                    elements={"SOPInstanceUID": instance, "PatientName": CANARY},
                )
        self.deed = ""
        self.over = threading.Event()
        self.got = 0
        self.accepted = 0
        self.entity = AE("ARCHIVE")
        self.entity.require_called_aet = True
        for model in (cget._FIND, cget._GET):
            # Explicit: what a value is, the archive says.
            self.entity.add_supported_context(model, ExplicitVRLittleEndian)
        for name in (*acceptance.SOP_CLASSES, SEGMENTATION):
            self.entity.add_supported_context(
                name, sorted(TRANSFER_SYNTAXES), scu_role=True, scp_role=True
            )
        self.server = self.entity.start_server(
            ("127.0.0.1", 0),
            block=False,
            ssl_context=context,
            evt_handlers=[
                (evt.EVT_C_FIND, self._find),
                (evt.EVT_C_GET, self._get),
                (evt.EVT_ACCEPTED, self._accept),
            ],
        )
        self.port = self.server.server_address[1]

    def _accept(self, _event: Any) -> None:
        self.accepted += 1

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        asked = event.identifier
        level = {"STUDY": 1, "SERIES": 2, "IMAGE": 3}[asked.QueryRetrieveLevel]
        names = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
        given = [str(asked.get(name, "")) for name in names[: level - 1]]
        for key in sorted({key[:level] for key in self.files}):
            if list(key[:-1]) != given:
                continue
            result = Dataset()
            result.QueryRetrieveLevel = asked.QueryRetrieveLevel
            for name, value in zip(names, key, strict=False):
                setattr(result, name, value if self.deed != "nonsense" else "x/y")
            if self.deed in ODD:
                del result.StudyInstanceUID
                result.add_new("StudyInstanceUID", *ODD[self.deed])
            while self.deed == "endless" and not self.over.wait(0):
                result.StudyID = "x" * 60
                setattr(result, names[level - 1], "9" * 1000)
                yield 0xFF00, result
            if self.deed == "long":
                result.PatientComments = "x" * (1 << 20)
            if level == 2:
                _, file = next(one for one in self.files.items() if one[0][:2] == key)
                result.Modality = pydicom.dcmread(BytesIO(file), stop_before_pixels=True).Modality
            yield 0xFF00, result

    def _slow_down(self, channel: Any) -> None:
        """Rest before each unit, too shortly to be silent."""
        send, rests = channel.send, [0.5] * 6

        def slowly(data: bytes) -> None:
            if rests:
                time.sleep(rests.pop())
            send(data)

        channel.send = slowly

    def _get(self, event: Any) -> Iterator[Any]:
        self.got += 1
        if self.deed in {"silent", "cut in a unit"}:
            if self.deed != "silent":
                event.assoc.dul.socket.socket.sendall(b"\x04\x00\x00\x00\x10\x00\x00")
            self.over.wait(30)
            yield 0
            return
        if self.deed == "slow" and self.got == 2:
            self._slow_down(event.assoc.dul.socket)
        if self.deed == "die" and self.got > 2:
            event.assoc.dul.socket.close()
            yield 0
            return
        if self.deed == "cannot" and self.got == 2:
            yield 1
            yield 0xA702, None
            return
        if self.deed == "fail" and self.got > 2:
            yield 1
            yield 0xA701, None
            return
        asked = event.identifier
        if self.deed == "same":
            asked.StudyInstanceUID, asked.SeriesInstanceUID, asked.SOPInstanceUID = min(self.files)
        key = (asked.StudyInstanceUID, asked.SeriesInstanceUID, asked.SOPInstanceUID)
        count = 0 if self.deed == "none" else 2 if self.deed == "twice" else 1
        yield count
        for _ in range(count):
            yield 0xFF00, pydicom.dcmread(BytesIO(self.files[key]), force=True)


# pynetdicom leaves the socket of a handshake that failed to the garbage collector.
pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def archive() -> Iterator[Archive]:
    kept = Archive()
    yield kept
    kept.over.set()
    kept.server.shutdown()


def _site(root: Path, port: int, more: str = "tls = false", called: str = "ARCHIVE") -> Site:
    site = init_site(
        root / "site", name="north", policy=Policy(patients_at_most=1_000, min_patients=1)
    )
    site.dicom.mkdir()
    table = f'[data.cget]\nhost = "127.0.0.1"\nport = {port}\ncalled = "{called}"\n{more}\n'
    text = (site.root / "site.toml").read_text()
    (site.root / "site.toml").write_text(text.replace("[network]", f"{table}\n[network]"))
    return open_site(site.root)


def _kept(site: Site) -> int:
    return len(list(site.store.iterdir())) if site.store.exists() else 0


@pytest.mark.usefixtures("silenced")
def test_every_image_comes_as_it_is_stored(
    tmp_path: Path, archive: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    site = _site(tmp_path, archive.port)
    with caplog.at_level(logging.DEBUG):
        assert fetch(site) == Fetched(6, 6, 0, 0)
        assert fetch(site) == Fetched(6, 0, 6, 0)
    assert "MRN" not in caplog.text
    assert CANARY not in caplog.text
    assert "2.25." not in caplog.text
    reading = read_cohort(site, STUDY, require_labels=False)
    assert reading.rejects == {}
    assert reading.cohort is not None
    assert len(reading.cohort.images) == 6
    folder = tmp_path / "plain"
    folder.mkdir()
    for number, data in enumerate(archive.files.values()):
        (folder / str(number)).write_bytes(data)
    other = init_site(tmp_path / "other", name="other", dicom=folder)
    plain = read_cohort(other, STUDY, require_labels=False).cohort
    assert plain is not None
    assert sorted(one.mark for one in plain.patients) == sorted(
        one.mark for one in reading.cohort.patients
    )


@pytest.mark.slow
def test_segmentations_come_with_their_images_where_they_are_asked_for(
    tmp_path: Path, archive: Archive
) -> None:
    (key, source) = next(iter(archive.files.items()))
    file = segment([source], np.ones((1, 48, 40), bool))
    named = pydicom.dcmread(BytesIO(file), stop_before_pixels=True)
    archive.files[key[0], named.SeriesInstanceUID, named.SOPInstanceUID] = file
    site = _site(tmp_path, archive.port)
    assert fetch(site) == Fetched(6, 6, 0, 0)
    text = (site.root / "site.toml").read_text()
    more = '[data.query]\nmodality = ["DX", "SEG"]\n\n[network]'
    (site.root / "site.toml").write_text(text.replace("[network]", more))
    site = open_site(site.root)
    assert fetch(site) == Fetched(7, 1, 6, 0)
    outlined = STUDY.model_dump() | {"target": {"kind": "segmentation", "segment": "lungs"}}
    reading = read_cohort(site, Study.model_validate(outlined))
    assert reading.rejects == {}
    assert reading.cohort is not None
    assert reading.cohort.targets is not None
    assert reading.cohort.targets.any(axis=(1, 2)).sum() == 1


@pytest.mark.parametrize("modality", [*EVERY, MODALITY])
def test_every_modality_fits_in_an_association(modality: str) -> None:
    contexts = len(cget._classes([modality])) * len(TRANSFER_SYNTAXES) + 2
    assert 2 < contexts <= cget.MAX_CONTEXTS


def test_modalities_are_split_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cget.associations(("DX", "CR")) == [("DX", "CR")]
    # So many as the table of transfer syntaxes asks for, whatever stands in it.
    whole = len(cget._classes(EVERY)) * len(TRANSFER_SYNTAXES) + 2
    monkeypatch.setattr(cget, "MAX_CONTEXTS", whole)
    assert cget.associations(EVERY) == [EVERY]
    assert cget.associations((*EVERY, MODALITY)) == [EVERY, (MODALITY,)]
    monkeypatch.setattr(cget, "MAX_CONTEXTS", whole - 1)
    assert cget.associations(EVERY) == [EVERY[:-1], EVERY[-1:]]
    half = len(cget._classes(EVERY[:3])) * len(TRANSFER_SYNTAXES) + 2
    monkeypatch.setattr(cget, "MAX_CONTEXTS", half)
    assert cget.associations(EVERY) == [("CR", "DX", "MG"), ("CT", "MR", "US")]


@pytest.mark.slow
def test_all_modalities_at_once_are_fetched(tmp_path: Path, archive: Archive) -> None:
    (key, source) = next(iter(archive.files.items()))
    file = segment([source], np.ones((1, 48, 40), bool))
    named = pydicom.dcmread(BytesIO(file), stop_before_pixels=True)
    archive.files[key[0], named.SeriesInstanceUID, named.SOPInstanceUID] = file
    other = uid("cget", "ct")
    archive.files[uid("study", "ct"), uid("series", "ct"), other] = make_dicom(
        modality="CT", elements={"SOPInstanceUID": other}
    )
    modalities = ", ".join(f'"{one}"' for one in (*EVERY, MODALITY))
    more = f"tls = false\n\n[data.query]\nmodality = [{modalities}]\n"
    assert fetch(_site(tmp_path, archive.port, more)) == Fetched(8, 8, 0, 0)
    assert archive.accepted > 1


@pytest.mark.parametrize(
    ("deed", "error"),
    [
        ("die", ArchiveUnreachable),
        ("twice", ArchiveAnswerInvalid),
        ("nonsense", ArchiveAnswerInvalid),
        *((odd, ArchiveAnswerInvalid) for odd in ODD),
    ],
)
def test_what_goes_wrong_is_told_and_the_next_fetch_goes_on(
    tmp_path: Path, archive: Archive, deed: str, error: Expected
) -> None:
    archive.deed = deed
    site = _site(tmp_path, archive.port)
    with raises(error) as caught:
        fetch(site)
    assert "2.25." not in str(caught.value)
    kept = _kept(site)
    assert kept == (2 if deed == "die" else 0)
    archive.deed = ""
    assert fetch(site) == Fetched(6, 6 - kept, kept, 0)


def test_an_answer_that_pydicom_cannot_read_is_invalid(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quoting(*_: object, **__: object) -> None:
        raise RecursionError(CANARY)

    site = _site(tmp_path, archive.port)
    with cget.GetArchive(site.archive, site.root) as asking, monkeypatch.context() as odd:
        odd.setattr(Dataset, "get", quoting)
        with raises(ArchiveAnswerInvalid) as caught:
            list(asking.find(site.query))
    assert CANARY not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_no_answer_is_taken_deflated(tmp_path: Path, archive: Archive) -> None:
    """A small one may hold any number of values, and is parsed in this process."""
    with cget.GetArchive(_site(tmp_path, archive.port).archive, tmp_path) as asking:
        contexts = asking._connected().accepted_contexts
    asked = {str(one.abstract_syntax): set(one.transfer_syntax) for one in contexts}
    assert asked[cget._FIND] <= NATIVE
    assert asked[cget._GET] <= NATIVE


def test_what_the_archive_cannot_send_is_counted_and_the_rest_is_fetched(
    tmp_path: Path, archive: Archive
) -> None:
    site = _site(tmp_path, archive.port)
    for deed, told in (("cannot", (6, 5, 0, 0, 1)), ("fail", (6, 0, 5, 0, 1)), ("", (6, 1, 5, 0))):
        archive.deed = deed
        assert fetch(site) == Fetched(*told), deed


@pytest.mark.parametrize("deed", ["none", "same"])
def test_another_image_than_was_asked_for_is_not_kept(
    tmp_path: Path, archive: Archive, deed: str
) -> None:
    archive.deed = deed
    site = _site(tmp_path, archive.port)
    kept = 1 if deed == "same" else 0
    assert fetch(site) == Fetched(6, kept, 0, 0, 6 - kept)
    archive.deed = ""
    assert fetch(site) == Fetched(6, 6 - kept, kept, 0, 0)


def test_a_unit_that_says_it_is_endless_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive that answers the request for an association with a unit of 4 GB."""
    sent = []

    def serve(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(1 << 16)
            with contextlib.suppress(OSError):
                peer.sendall(b"\x02\x00\xff\xff\xff\xff")
                for _ in range(512):
                    peer.sendall(bytes(1 << 20))
                    sent.append(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        with pytest.raises(ArchiveUnreachable):
            fetch(_site(tmp_path, listener.getsockname()[1]))
        thread.join()
    # What the system's own buffers hold.
    assert len(sent) < 32


def test_an_archive_that_sends_without_end_is_cut_off(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cget, "MAX_FILE_BYTES", -(60 << 10))
    site = _site(tmp_path, archive.port)
    with raises(ArchiveAnswerInvalid):
        fetch(site)
    assert _kept(site) == 0


def test_what_is_no_uid_is_not_kept_until_all_answers_are_in(
    tmp_path: Path, archive: Archive
) -> None:
    archive.deed = "endless"
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, in the archive's own thread
        with raises(ArchiveAnswerInvalid):
            fetch(_site(tmp_path, archive.port))
    # Nor is it asked for its leave, which would come behind all that it still says.
    assert time.monotonic() - began < 20


def test_an_archive_that_is_faster_than_this_site_waits(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        archive.files[uid("study", number), uid("series", 0), uid("more", number)] = b""
    ahead, reads = [], Dataset.get

    class Slow(cget.GetArchive):
        def _whole(self, event: Any) -> None:
            super()._whole(event)
            ahead.append(self._came - self._taken)

    def slowly(self: Dataset, *given: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.01)
        return reads(self, *given)

    site = _site(tmp_path, archive.port)
    monkeypatch.setattr(cget, "_MOST_AHEAD", 4)
    monkeypatch.setattr(Dataset, "get", slowly)
    with Slow(site.archive, site.root) as asking:
        asking._groups = [("DX",)]
        found = list(asking._found("STUDY", StudyInstanceUID=""))
    assert len(found) == 60
    assert 0 < max(ahead) <= 4


def test_an_archive_that_talks_on_when_it_is_asked_nothing_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to release this site it went on, and its messages were kept for a minute, unread."""
    site, cut = _site(tmp_path, 104), []
    asking = cget.GetArchive(site.archive, site.root)
    asking._association = SimpleNamespace(is_established=True)
    monkeypatch.setattr(asking, "_hang_up", lambda: cut.append(True))
    message = SimpleNamespace(data=bytes(1000))
    with asking._watched(cget._MOST_FOUND_BYTES, each=True):
        for _ in range(50):
            asking._count(message)
    assert not cut
    for _ in range(10):
        asking._count(message)
        asking._whole(message)
    assert cut


@pytest.mark.parametrize("tls", [False, True])
def test_an_archive_that_drips_its_greeting_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    """A byte now and then is no silence, in a handshake of TLS as in an association's."""
    monkeypatch.setattr(cget, "_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(cget, "_GLANCE_SECONDS", 0.1)
    _, trusted = self_signed(tmp_path)
    over = threading.Event()

    def drip(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer, contextlib.suppress(OSError):
            peer.recv(1 << 16)
            peer.sendall(b"\x16\x03\x03\x40\x00\x02" if tls else b"\x02\x00\x00\x00\x10\x00")
            while not over.wait(0.2):
                peer.sendall(b"\0")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        began = time.monotonic()
        more = f'ca = "{trusted}"' if tls else "tls = false"
        with pytest.raises(ArchiveUnreachable, match="took too long"):
            fetch(_site(tmp_path, listener.getsockname()[1], more))
        assert time.monotonic() - began < 20
        over.set()
        thread.join()


@pytest.mark.parametrize("deed", ["cut in a unit", "silent"])
def test_an_archive_that_stops_in_the_middle_is_left(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch, deed: str
) -> None:
    monkeypatch.setattr(cget, "_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(cget, "_GLANCE_SECONDS", 0.1)
    archive.deed = deed
    began = time.monotonic()
    with pytest.raises(ArchiveUnreachable, match=r"took too long|ended the connection"):
        fetch(_site(tmp_path, archive.port))
    assert time.monotonic() - began < 20
    assert threading.active_count() < 10


def test_an_answer_to_a_question_has_a_length(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.deed = "long"
    with raises(ArchiveAnswerInvalid):
        fetch(_site(tmp_path, archive.port))
    monkeypatch.setattr(cget, "_MOST_FOUND_BYTES", 8 << 20)
    # Many of a sound length are no long one.
    assert fetch(_site(tmp_path / "b", archive.port)).found == 6


@pytest.mark.slow
def test_a_slow_image_is_waited_for_as_long_as_it_comes(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cget, "_TIMEOUT_SECONDS", 1.5)
    monkeypatch.setattr(cget, "_GLANCE_SECONDS", 0.1)
    archive.deed = "slow"
    for number, key in enumerate(archive.files):
        archive.files[key] = make_dicom(
            radiograph(number, 200, 200), bits_stored=12, patient_id="MRN1",
            elements={"SOPInstanceUID": key[2]},
        )  # fmt: skip
    began = time.monotonic()
    assert fetch(_site(tmp_path, archive.port)).new == 6
    assert time.monotonic() - began > 2.5


def test_an_unknown_title_is_refused(tmp_path: Path, archive: Archive) -> None:
    with raises(ArchiveRefused, match="AE title"):
        fetch(_site(tmp_path, archive.port, called="ANOTHER"))


def test_nobody_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ArchiveUnreachable):
        fetch(_site(tmp_path, port))


def test_over_tls_a_certificate_must_be_one_that_is_trusted(tmp_path: Path) -> None:
    context, trusted = self_signed(tmp_path)
    _, other = self_signed(tmp_path, "other")
    archive = Archive(context)
    try:
        site = _site(tmp_path, archive.port, f'ca = "{trusted}"')
        assert fetch(site).new == 6
        stranger = _site(tmp_path / "b", archive.port, f'ca = "{other}"')
        with pytest.raises(ArchiveUnreachable, match="This site does not trust its certificate"):
            fetch(stranger)
        assert _kept(stranger) == 0
        plain = _site(tmp_path / "c", archive.port, "tls = false")
        with pytest.raises(ArchiveUnreachable, match="It does not answer"):
            fetch(plain)
        nothing = _site(tmp_path / "d", archive.port, 'ca = "missing.pem"')
        with pytest.raises(FileUnreadable, match="authority"):
            fetch(nothing)
    finally:
        archive.server.shutdown()


def test_an_archive_may_ask_who_comes(tmp_path: Path) -> None:
    context, trusted = self_signed(tmp_path)
    _, ours = self_signed(tmp_path, "ours")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ours)
    archive = Archive(context)
    try:
        with pytest.raises(ArchiveUnreachable):
            fetch(_site(tmp_path, archive.port, f'ca = "{trusted}"'))
        known = f'ca = "{trusted}"\ncertificate = "{ours}"\nkey = "{tmp_path}/ours.key"'
        site = _site(tmp_path / "b", archive.port, known)
        assert fetch(site).new == 6
        (tmp_path / "ours.key").chmod(0o644)
        with pytest.raises(FileUnreadable, match="by others"):
            fetch(site)
    finally:
        archive.server.shutdown()

"""Archives that lie, stumble or keep their door shut: a clear error, and what came stays."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.server
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cloister_fl.client.cli import client_group
from cloister_fl.client.data.loading import freeze, load_frozen, read_cohort
from cloister_fl.client.pacs import dicomweb
from cloister_fl.client.pacs import fetch as fetching
from cloister_fl.client.pacs.fetch import Fetched, fetch, set_secret
from cloister_fl.client.pacs.multipart import MAX_HEADER_BYTES, InvalidAnswer, single_part
from cloister_fl.client.pacs.sealed_store import Store
from cloister_fl.client.preflight.data_check import inspect, render
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import Site, init_site, open_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import (
    ArchiveAnswerInvalid,
    ArchiveRefused,
    ArchiveUnreachable,
    FetchUnfinished,
    FileUnreadable,
    OptionInvalid,
    OutputInTheWay,
    Reject,
    SiteFileInvalid,
)
from support import studies
from support.certificates import self_signed
from support.dicom import make_dicom, radiograph, uid
from support.errors import Expected, is_of, raises

pytestmark = pytest.mark.process


CANARY, SECRET = "CANARYNAME", "s3cret-token"
STUDY = studies.study()


# One file out of an answer

KIND = 'multipart/related; type="application/dicom"; boundary="b0"'


@pytest.mark.parametrize(
    "body",
    [
        b"--b0\r\nContent-Type: application/dicom\r\n\r\nDATA\r\n--b0--\r\n",
        b"--b0\r\nContent-Length: 4\r\n\r\nDATA\r\n--b0--",
        b"\r\n--b0\r\n\r\nDATA\r\n--b0--\r\n",
        b"preamble\r\n--b0 \r\nA: b\r\nC: d\r\n\r\nDATA\r\n--b0--\r\nepilogue",
    ],
)
def test_a_sound_answer(body: bytes) -> None:
    assert single_part(KIND, body) == b"DATA"


def test_data_may_hold_what_looks_like_a_delimiter() -> None:
    data = b"--b0--\r\n\r\n--b0x\r\n"
    body = b"--b0\r\nContent-Length: %d\r\n\r\n" % len(data) + data + b"\r\n--b0--\r\n"
    assert single_part(KIND, body) == data


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/dicom", b"--b0\r\n\r\nDATA\r\n--b0--"),
        ("multipart/related", b"--b0\r\n\r\nDATA\r\n--b0--"),
        (KIND, b""),
        (KIND, b"DATA"),
        (KIND, b"--b0--"),
        (KIND, b"--b0\r\n\r\nDATA"),
        (KIND, b"--b0\r\n\r\nDATA\r\n--b0"),
        (KIND, b"--b0\r\n\r\nDATA\r\n--b0\r\n\r\nMORE\r\n--b0--"),
        (KIND, b"--b0\r\nContent-Length: 999999999999\r\n\r\nDATA\r\n--b0--"),
        (KIND, b"--b0\r\nContent-Length: 3\r\n\r\nDATA\r\n--b0--"),
        (KIND, b"--b0\r\n" + b"a" * 2 * MAX_HEADER_BYTES + b"\r\n\r\nDATA\r\n--b0--"),
        (KIND, b"a" * 2 * MAX_HEADER_BYTES + b"\r\n--b0\r\n\r\nDATA\r\n--b0--"),
        (KIND, b"--b0 sneaky\r\n\r\nDATA\r\n--b0--"),
    ],
)
def test_an_unsound_answer(kind: str, body: bytes) -> None:
    with pytest.raises(InvalidAnswer):
        single_part(kind, body)


@given(st.binary(max_size=300), st.booleans())
@example(b"--b0\r\n\r\n", True)
def test_whatever_is_sent_comes_out(data: bytes, told: bool) -> None:
    length = b"Content-Length: %d\r\n" % len(data) if told else b""
    body = b"--b0\r\n" + length + b"X: y\r\n\r\n" + data + b"\r\n--b0--\r\n"
    if told or b"\r\n--b0" not in b"\r\n" + data:
        assert single_part(KIND, body) == data
        for end in range(len(body) - 4):
            with pytest.raises(InvalidAnswer):
                single_part(KIND, body[:end])


@given(st.lists(st.sampled_from((b"--b0", b"\r\n", b"--", b"Content-Length: 1", b"x", b"\0"))))
def test_any_pieces_are_judged(pieces: list[bytes]) -> None:
    body = b"".join(pieces)
    with contextlib.suppress(InvalidAnswer):
        assert single_part(KIND, body) in body


# An archive that can be told to misbehave


@dataclass
class Archive:
    """A small DICOMweb archive on loopback."""

    instances: dict[tuple[str, str, str], bytes]
    password: str = ""
    token: str = ""
    misbehave: dict[str, Callable[[Handler], None]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    url: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    archive: Archive

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        archive, parts = self.archive, urlsplit(self.path)
        archive.asked.append(parts.path)
        said = self.headers.get("Authorization", "")
        archive.heard.append(said)
        wanted = ""
        if archive.password:
            wanted = "Basic " + base64.b64encode(f"research:{archive.password}".encode()).decode()
        if archive.token:
            wanted = f"Bearer {archive.token}"
        if said != wanted:
            self.send_error(401)
            return
        words = parts.path.removeprefix("/dicom-web/").split("/")
        for name, deed in archive.misbehave.items():
            if parts.path.endswith(name):
                deed(self)
                return
        if len(words) == 6:
            data = archive.instances[words[1], words[3], words[5]]
            self.answer(KIND, b"--b0\r\nX: y\r\n\r\n" + data + b"\r\n--b0--\r\n")
            return
        asked = parse_qs(parts.query)
        start, most = int(asked["offset"][0]), int(asked["limit"][0])
        known = sorted({key[: (len(words) + 1) // 2] for key in archive.instances})
        known = [key for key in known if [*key[:-1]] == words[1::2]]
        tags = ("0020000D", "0020000E", "00080018")
        results: list[dict[str, Any]] = [
            {tags[len(key) - 1]: {"Value": [key[-1]]}} for key in known[start : start + most]
        ]
        for result in results:
            if len(words) == 3:
                result["00080060"] = {"Value": ["DX"]}
        self.answer("application/dicom+json", json.dumps(results).encode())

    def answer(self, kind: str, body: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


def _instances(patients: int) -> dict[tuple[str, str, str], bytes]:
    found = {}
    for number in range(patients):
        for image in range(2):
            instance = uid("instance", number, image)
            found[uid("study", number), uid("series", number), instance] = make_dicom(
                radiograph(10 * number + image),
                bits_stored=12,
                patient_id=f"MRN{number}",
                elements={"SOPInstanceUID": instance, "PatientName": CANARY},
            )
    return found


@pytest.fixture
def archive() -> Iterator[Archive]:
    kept = Archive(_instances(4))
    handler = type("Bound", (Handler,), {"archive": kept})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    kept.url = f"http://127.0.0.1:{server.server_port}/dicom-web"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield kept
    server.shutdown()
    thread.join()
    server.server_close()


def _site(root: Path, url: str, auth: str = "none") -> Site:
    site = init_site(root / "site", name="north", policy=Policy(min_patients_per_class=1))
    site.dicom.mkdir()
    text = (site.root / "site.toml").read_text()
    user = 'user = "research"\n' if auth == "basic" else ""
    table = f'[data.dicomweb]\nurl = "{url}"\nauth = "{auth}"\n{user}\n[network]'
    (site.root / "site.toml").write_text(text.replace("[network]", table))
    site.labels.write_text(
        "PatientID,finding\n"
        + "".join(f"MRN{n},{'nodule' if n % 2 else 'normal'}\n" for n in range(4))
    )
    return open_site(site.root)


def test_what_fits_is_fetched_once_and_read(tmp_path: Path, archive: Archive) -> None:
    site = _site(tmp_path, archive.url)
    steps: list[tuple[int, int]] = []
    assert fetch(site, progress=lambda *step: steps.append(step)) == Fetched(8, 8, 0, 0)
    assert steps == [(n, 8) for n in range(1, 9)]
    reading = read_cohort(site, STUDY)
    assert not reading.faults
    assert reading.cohort is not None
    assert len(reading.cohort.images) == 8
    assert len(reading.cohort.patients) == 4
    del archive.asked[:]
    assert fetch(site) == Fetched(8, 0, 8, 0)
    assert not [path for path in archive.asked if "/instances/" in path]
    noted = [one.body for one in entries_of(site) if one.kind == "fetched"]
    assert [(one["source"], one["new"], one["there"]) for one in noted] == [
        ("dicomweb", 8, 0), ("dicomweb", 0, 8),
    ]  # fmt: skip


KILLED = """
import os, signal, sys
from pathlib import Path
from cloister_fl.client.site.folder import open_site
from cloister_fl.client.pacs.fetch import fetch

def die(done, _):
    if done == 6:
        os.kill(os.getpid(), signal.SIGKILL)

fetch(open_site(Path(sys.argv[1])), progress=die)
"""


def test_a_part_of_what_fits_is_not_frozen(tmp_path: Path, archive: Archive) -> None:
    """Killed in the middle: what is there is no data set, and a study would be held to it."""
    site = _site(tmp_path, archive.url)
    command = [sys.executable, "-c", KILLED, str(site.root)]
    ended = subprocess.run(command, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(site.store.iterdir())) == 6
    with raises(FetchUnfinished, match="from the archive is incomplete"):
        load_frozen(site, STUDY)
    with raises(FetchUnfinished):
        freeze(site, STUDY)
    assert "CLO-253" in render(inspect(site, STUDY))
    assert not list(site.root.glob("manifests/*"))
    assert fetch(site) == Fetched(8, 2, 6, 0)
    assert len(load_frozen(site, STUDY).images) == 8
    # What is frozen is not concerned by a later fetch that is cut off.
    new = _instances(5)
    archive.misbehave = {key[2]: _shut for key in new.keys() - archive.instances.keys()}
    archive.instances.update(new)
    with raises(ArchiveRefused):
        fetch(site)
    assert len(load_frozen(site, STUDY).images) == 8


def test_the_end_of_another_query_makes_no_data_whole(tmp_path: Path, archive: Archive) -> None:
    site = _site(tmp_path, archive.url)
    command = [sys.executable, "-c", KILLED, str(site.root)]
    assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
    text = (site.root / "site.toml").read_text()
    query = '[data.query]\nmodality = ["CT"]\n\n[network]'
    (site.root / "site.toml").write_text(text.replace("[network]", query))
    assert fetch(open_site(site.root)).found == 0
    with raises(FetchUnfinished, match="from the archive is incomplete"):
        freeze(open_site(site.root), STUDY)
    (site.root / "site.toml").write_text(text)
    assert fetch(open_site(site.root)) == Fetched(8, 2, 6, 0)
    assert len(freeze(open_site(site.root), STUDY).items) == 8


def test_what_a_fetch_brings_while_files_are_read_is_not_left_out(
    tmp_path: Path, archive: Archive
) -> None:
    site = _site(tmp_path, archive.url)
    whole, archive.instances = archive.instances, dict(list(archive.instances.items())[:6])
    fetch(site)
    archive.instances = whole
    site.labels.write_text("".join(site.labels.read_text().splitlines(keepends=True)[:4]))

    def meanwhile(done: int, _: int) -> None:
        if done == 6:
            assert fetch(site).new == 2

    with raises(FetchUnfinished):
        freeze(site, STUDY, progress=meanwhile)
    assert not list(site.root.glob("manifests/*"))


def test_one_fetch_at_a_time(tmp_path: Path, archive: Archive) -> None:
    site = _site(tmp_path, archive.url)
    second: list[str] = []

    def meanwhile(*_: int) -> None:
        with raises(FetchUnfinished, match="Another fetch") as caught:
            fetch(site)
        second.append(caught.value.code)

    assert fetch(site, progress=meanwhile).new == 8
    assert second == ["CLO-253"] * 8


def test_what_a_kill_left_in_the_store_is_removed(tmp_path: Path, archive: Archive) -> None:
    site = _site(tmp_path, archive.url)
    fetch(site)
    torn = site.store / ".0123456789abcdef.tmp"
    torn.write_bytes(bytes(1000))
    assert fetch(site) == Fetched(8, 0, 8, 0)
    assert not torn.exists()


def test_a_fetch_leaves_room_for_the_ledger(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = _site(tmp_path, archive.url)
    with monkeypatch.context() as small:
        small.setattr(fetching, "FREE_BYTES", 1 << 60)
        with pytest.raises(OutputInTheWay, match="nearly full"):
            fetch(site)
    assert fetch(site) == Fetched(8, 8, 0, 0)


@pytest.mark.usefixtures("silenced")
def test_nothing_plain_lies_on_the_disk(
    tmp_path: Path, archive: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    site = _site(tmp_path, archive.url, "token")
    archive.token = SECRET
    with caplog.at_level(logging.DEBUG):
        set_secret(site, SECRET + "\n")
        fetch(site)
        read_cohort(site, STUDY)
    files = [path for path in site.root.rglob("*") if path.is_file() and path != site.labels]
    held = b"".join(
        path.read_bytes() + os.fsencode(path.name)
        for path in files
        if path.name != "archive.secret"
    )
    held += caplog.text.encode()
    assert len(list(site.store.iterdir())) == 8
    for needle in (CANARY, "MRN", SECRET, "2.25.", "MONOCHROME"):
        assert needle.encode() not in held
    assert radiograph(0)[20].tobytes() not in held
    for path in site.store.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    assert site.store.stat().st_mode & 0o777 == 0o700
    assert (site.keys / "archive.secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("auth", ["basic", "token"])
def test_a_wrong_password_is_told_and_a_right_one_goes_on(
    tmp_path: Path, archive: Archive, auth: str
) -> None:
    site = _site(tmp_path, archive.url, auth)
    if auth == "basic":
        archive.password = SECRET
    else:
        archive.token = SECRET
    with pytest.raises(FileUnreadable, match="is not set"):
        fetch(site)
    set_secret(site, "wrong")
    with raises(ArchiveRefused, match="401"):
        fetch(site)
    set_secret(site, SECRET)
    assert fetch(site).new == 8


@pytest.mark.parametrize("secret", ["", "\n", "two\nlines", "x" * 5000, "schlüssel"])
def test_what_cannot_be_a_secret(tmp_path: Path, archive: Archive, secret: str) -> None:
    site = _site(tmp_path, archive.url, "token")
    with raises(OptionInvalid):
        set_secret(site, secret)
    assert not (site.keys / "archive.secret").exists()


def _cut(handler: Handler) -> None:
    """Say that more comes, and end."""
    handler.answer(KIND, b"--b0\r\nX: y\r\n\r\nDICM", length=1000)


def _cut_quietly(handler: Handler) -> None:
    """The length fits, the closing delimiter is missing."""
    handler.answer(KIND, b"--b0\r\nX: y\r\n\r\nDICM")


def _die(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def _endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", KIND)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(bytes(1 << 20))
    except OSError:
        return


def _broken(handler: Handler) -> None:
    handler.send_error(500)


def _coded(handler: Handler) -> None:
    """Small on the wire, a thousand times as large when it is unpacked."""
    body = gzip.compress(gzip.compress(bytes(64 << 20)))
    assert len(body) < 1000
    handler.send_response(200)
    handler.send_header("Content-Type", KIND)
    handler.send_header("Content-Encoding", "gzip, gzip")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def _elsewhere(handler: Handler) -> None:
    handler.send_response(307)
    handler.send_header("Location", "http://127.0.0.1:1/")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def _shut(handler: Handler) -> None:
    handler.send_error(403)


def _page(handler: Handler) -> None:
    """A login page with the status of success."""
    handler.answer(KIND, b"--b0\r\nX: y\r\n\r\n<html>\r\n--b0--\r\n")


def _another(handler: Handler) -> None:
    data = handler.archive.instances[min(handler.archive.instances)]
    handler.answer(KIND, b"--b0\r\nX: y\r\n\r\n" + data + b"\r\n--b0--\r\n")


def _last(archive: Archive) -> str:
    """The instance that is asked for last but two."""
    return sorted(archive.instances)[-3][2]


@pytest.mark.parametrize(
    ("deed", "error"),
    [
        (_cut, ArchiveAnswerInvalid),
        (_cut_quietly, ArchiveAnswerInvalid),
        (_die, ArchiveAnswerInvalid),
        (_coded, ArchiveAnswerInvalid),
        (_elsewhere, ArchiveAnswerInvalid),
        (_shut, ArchiveRefused),
    ],
)
def test_an_archive_that_stumbles_is_told_and_the_next_fetch_goes_on(
    tmp_path: Path,
    archive: Archive,
    deed: Callable[[Handler], None],
    error: Expected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dicomweb, "MAX_FILE_BYTES", 8 << 20)
    site = _site(tmp_path, archive.url)
    archive.misbehave[_last(archive)] = deed
    with raises(error) as caught:
        fetch(site)
    assert "2.25." not in str(caught.value)
    kept = len(list(site.store.iterdir()))
    assert 0 < kept < 8
    assert [one.body["new"] for one in entries_of(site) if one.kind == "fetched"] == [kept]
    archive.misbehave.clear()
    assert fetch(site) == Fetched(8, 8 - kept, kept, 0)


@pytest.mark.parametrize(
    ("deed", "told"),
    [
        (_broken, Fetched(8, 7, 0, 0, 1)),
        (_page, Fetched(8, 7, 0, 0, 1)),
        (_another, Fetched(8, 7, 0, 0, 1)),
        (_endless, Fetched(8, 7, 0, 1, 0)),
    ],
)
def test_what_ails_one_instance_is_counted_and_the_rest_is_fetched(
    tmp_path: Path,
    archive: Archive,
    deed: Callable[[Handler], None],
    told: Fetched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dicomweb, "MAX_FILE_BYTES", 8 << 20)
    archive.misbehave[_last(archive)] = deed
    site = _site(tmp_path, archive.url)
    assert fetch(site) == told
    done = CliRunner().invoke(client_group.app, ["fetch", "--json", "--dir", str(site.root)])
    assert done.exit_code == 3
    archive.misbehave.clear()
    assert fetch(site) == Fetched(8, 1, 7, 0, 0)


@pytest.mark.parametrize("host", ["xn--", "a" * 64 + ".example", "\u2024"])
def test_an_address_that_is_none(tmp_path: Path, host: str) -> None:
    with pytest.raises(ArchiveUnreachable):
        fetch(_site(tmp_path, f"https://{host}/x"))


def test_what_the_archive_cannot_send_is_counted_and_the_rest_is_fetched(
    tmp_path: Path, archive: Archive
) -> None:
    archive.misbehave[_last(archive)] = lambda handler: handler.send_error(406)
    site = _site(tmp_path, archive.url)
    assert fetch(site) == Fetched(8, 7, 0, 0, 1)
    done = CliRunner().invoke(client_group.app, ["fetch", "--dir", str(site.root)])
    assert done.exit_code == 3
    assert "could not send: 1" in done.stderr


def test_an_answer_that_drips_has_an_end(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicomweb, "ANSWER_SECONDS", -1.0)
    with pytest.raises(ArchiveUnreachable, match="too long"):
        fetch(_site(tmp_path, archive.url))


def test_headers_that_drip_have_an_end(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicomweb, "ANSWER_SECONDS", 0.3)
    sent: list[int] = []

    def drip(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        with contextlib.suppress(OSError):
            for number in range(400):
                handler.wfile.write(b"X-%d: y\r\n" % number)
                sent.append(number)
                time.sleep(0.05)

    archive.misbehave["studies"] = drip
    with pytest.raises(ArchiveUnreachable, match="too long"):
        fetch(_site(tmp_path, archive.url))
    assert len(sent) < 200


def test_a_redirect_is_not_followed(tmp_path: Path, archive: Archive) -> None:
    """Wherever it leads, the token would go there, too."""
    elsewhere: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.5)
    port = listener.getsockname()[1]

    def redirect(handler: Handler) -> None:
        handler.send_response(302)
        handler.send_header("Location", f"http://127.0.0.1:{port}/dicom-web/studies")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    archive.token = SECRET
    archive.misbehave["studies"] = redirect
    site = _site(tmp_path, archive.url, "token")
    set_secret(site, SECRET)
    with raises(ArchiveAnswerInvalid, match="302"):
        fetch(site)
    with listener, pytest.raises(TimeoutError):
        elsewhere.append(listener.accept()[0].recv(100))
    assert elsewhere == []


@pytest.mark.parametrize(
    "results",
    [
        b"{}", b"[1]", b"nonsense", b"[" * 100_000, b'[{"0020000D": {"Value": ["../../x"]}}]',
        b'[{"0020000D": {"Value": ["1..2"]}}]', b'[{"0020000D": {}}]', b'[{"0020000D": 7}]',
        b'[{"0020000D": {"Value": [7]}}]',
    ],
)  # fmt: skip
def test_results_that_are_none(tmp_path: Path, archive: Archive, results: bytes) -> None:
    archive.misbehave["studies"] = lambda handler: handler.answer("application/json", results)
    with raises(ArchiveAnswerInvalid):
        fetch(_site(tmp_path, archive.url))


def test_an_archive_without_paging_is_asked_no_more_than_twice(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicomweb, "_PAGE", 2)
    studies = sorted({key[0] for key in archive.instances})
    whole = json.dumps([{"0020000D": {"Value": [one]}} for one in studies]).encode()
    archive.misbehave["studies"] = lambda handler: handler.answer("application/json", whole)
    site = _site(tmp_path, archive.url)
    assert fetch(site).new == 8
    # For each of two modalities.
    assert sum(path.endswith("/studies") for path in archive.asked) == 2 * 2


def test_pages_are_put_together(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicomweb, "_PAGE", 1)
    assert fetch(_site(tmp_path, archive.url)) == Fetched(8, 8, 0, 0)


def test_over_tls_a_certificate_must_be_one_that_is_trusted(
    tmp_path: Path, archive: Archive
) -> None:
    context, trusted = self_signed(tmp_path)
    handler = type("Bound", (Handler,), {"archive": archive})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"https://127.0.0.1:{server.server_port}/dicom-web"
        site = _site(tmp_path, url)
        with pytest.raises(ArchiveUnreachable, match="This site does not trust its certificate"):
            fetch(site)
        text = (site.root / "site.toml").read_text()
        (site.root / "site.toml").write_text(
            text.replace("[data.dicomweb]\n", f'[data.dicomweb]\nca = "{trusted}"\n')
        )
        assert fetch(open_site(site.root)).new == 8
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_list_without_end_has_one(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "MAX_INSTANCES", 7)
    with raises(OptionInvalid, match="Narrow"):
        fetch(_site(tmp_path, archive.url))
    assert not [path for path in archive.asked if path.count("/") > 8]


def test_nobody_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    site = _site(tmp_path, f"http://127.0.0.1:{port}/dicom-web")
    with pytest.raises(ArchiveUnreachable, match="does not answer"):
        fetch(site)
    (noted,) = [one.body for one in entries_of(site) if one.kind == "fetched"]
    assert (noted["end"], noted["found"]) == ("CLO-250", 0)


def test_a_stored_file_that_was_altered_is_turned_away(tmp_path: Path, archive: Archive) -> None:
    site = _site(tmp_path, archive.url)
    fetch(site)
    paths = sorted(site.store.iterdir())
    data = bytearray(paths[0].read_bytes())
    data[40] ^= 1
    paths[0].write_bytes(data)
    # Another file's content under its name is no better.
    paths[1].write_bytes(paths[2].read_bytes())
    reading = read_cohort(site, STUDY, require_labels=False)
    assert reading.rejects == {Reject.UNREADABLE: 2}
    assert reading.cohort is not None
    assert len(reading.cohort.images) == 6
    # Named for the instance, it is fetched anew once it is gone.
    paths[0].unlink()
    assert fetch(site).new == 1


def test_stores_of_two_sites_share_no_name(tmp_path: Path) -> None:
    for number in range(2):
        store = Store(tmp_path / str(number), bytes([number]) * 32)
        store.put("1.2.3", b"data")
        assert "1.2.3" in store
        assert "1.2.4" not in store
        assert [one.read() for one in store.items()] == [b"data"]
    names = [next((tmp_path / str(number)).iterdir()).name for number in range(2)]
    assert names[0] != names[1]


# What a person writes


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ('[data.dicomweb]\nurl = "http://pacs.example/dicom-web"', "http on this machine alone"),
        ('[data.dicomweb]\nurl = "https://u:p@pacs.example/"', "no place for a query"),
        ('[data.dicomweb]\nurl = "https://"', "must be https"),
        ('[data.dicomweb]\nurl = "https://a/"\nauth = "basic"', "is needed for auth = 'basic'"),
        ('[data.dicomweb]\nurl = "https://a/"\nurll = "x"', "url"),
        ('[data.cget]\nhost = "pacs"\ncalled = "PACS"\ntls = false', "on this machine alone"),
        ('[data.cget]\nhost = "pacs"\ncalled = "A TITLE THAT IS TOO LONG"', "called"),
        ('[data.cget]\nhost = "pacs"\ncalled = "P"\ncertificate = "c.pem"', "is needed with"),
        ('[data.query]\nstudy_date = "yesterday"', "must be a day"),
        (
            '[data.dicomweb]\nurl = "https://a/"\n[data.cget]\nhost = "b"\ncalled = "P"',
            "name one archive",
        ),
    ],
)
def test_faults_of_the_site_file_are_named(tmp_path: Path, table: str, told: str) -> None:
    site = init_site(tmp_path / "site", name="north")
    text = (site.root / "site.toml").read_text()
    (site.root / "site.toml").write_text(text.replace("[network]", f"{table}\n\n[network]"))
    with pytest.raises(SiteFileInvalid, match="line") as caught:
        open_site(site.root)
    assert told in str(caught.value)


def test_the_command(tmp_path: Path, archive: Archive) -> None:
    site = _site(tmp_path, archive.url, "basic")
    archive.password = SECRET
    words = ["fetch", "--dir", str(site.root)]
    first = CliRunner().invoke(client_group.app, [*words, "--ask-secret"], input=SECRET + "\n")
    assert first.exit_code == 0
    assert first.stdout == "8 images match: 8 fetched, 0 already stored.\n"
    again = CliRunner().invoke(client_group.app, [*words, "--json"])
    assert json.loads(again.stdout) == {
        "found": 8,
        "new": 0,
        "there": 8,
        "too_large": 0,
        "not_sent": 0,
    }
    bare = init_site(tmp_path / "bare", name="bare")
    refused = CliRunner().invoke(client_group.app, ["fetch", "--dir", str(bare.root)])
    assert is_of(refused.exception, OptionInvalid)

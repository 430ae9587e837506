"""Archives that lie, stumble or keep their door shut: a clear error, and what came stays."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cloister_fl.client.cli import client_group
from cloister_fl.client.pacs import dicomweb
from cloister_fl.client.pacs import fetch as fetching
from cloister_fl.client.pacs.fetch import Fetched, fetch, set_secret
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import open_site
from cloister_fl.errors import (
    ArchiveAnswerInvalid,
    ArchiveRefused,
    ArchiveUnreachable,
    OptionInvalid,
)
from support.certificates import self_signed
from support.dicomweb_archive import KIND, SECRET, Archive, Handler, asking_site, serving, shut
from support.errors import Expected, raises

pytestmark = pytest.mark.process


@pytest.fixture
def archive() -> Iterator[Archive]:
    with serving() as kept:
        yield kept


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
        (shut, ArchiveRefused),
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
    site = asking_site(tmp_path, archive.url)
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
    site = asking_site(tmp_path, archive.url)
    assert fetch(site) == told
    done = CliRunner().invoke(client_group.app, ["fetch", "--json", "--dir", str(site.root)])
    assert done.exit_code == 3
    archive.misbehave.clear()
    assert fetch(site) == Fetched(8, 1, 7, 0, 0)


@pytest.mark.parametrize("host", ["xn--", "a" * 64 + ".example", "\u2024"])
def test_an_address_that_is_none(tmp_path: Path, host: str) -> None:
    with pytest.raises(ArchiveUnreachable):
        fetch(asking_site(tmp_path, f"https://{host}/x"))


def test_what_the_archive_cannot_send_is_counted_and_the_rest_is_fetched(
    tmp_path: Path, archive: Archive
) -> None:
    archive.misbehave[_last(archive)] = lambda handler: handler.send_error(406)
    site = asking_site(tmp_path, archive.url)
    assert fetch(site) == Fetched(8, 7, 0, 0, 1)
    done = CliRunner().invoke(client_group.app, ["fetch", "--dir", str(site.root)])
    assert done.exit_code == 3
    assert "could not send: 1" in done.stderr


def test_an_answer_that_drips_has_an_end(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicomweb, "ANSWER_SECONDS", -1.0)
    with pytest.raises(ArchiveUnreachable, match="too long"):
        fetch(asking_site(tmp_path, archive.url))


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
        fetch(asking_site(tmp_path, archive.url))
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
    site = asking_site(tmp_path, archive.url, "token")
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
        fetch(asking_site(tmp_path, archive.url))


def test_an_archive_without_paging_is_asked_no_more_than_twice(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicomweb, "_PAGE", 2)
    studies = sorted({key[0] for key in archive.instances})
    whole = json.dumps([{"0020000D": {"Value": [one]}} for one in studies]).encode()
    archive.misbehave["studies"] = lambda handler: handler.answer("application/json", whole)
    site = asking_site(tmp_path, archive.url)
    assert fetch(site).new == 8
    # For each of two modalities.
    assert sum(path.endswith("/studies") for path in archive.asked) == 2 * 2


def test_pages_are_put_together(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicomweb, "_PAGE", 1)
    assert fetch(asking_site(tmp_path, archive.url)) == Fetched(8, 8, 0, 0)


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
        site = asking_site(tmp_path, url)
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
        fetch(asking_site(tmp_path, archive.url))
    assert not [path for path in archive.asked if path.count("/") > 8]


def test_nobody_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    site = asking_site(tmp_path, f"http://127.0.0.1:{port}/dicom-web")
    with pytest.raises(ArchiveUnreachable, match="does not answer"):
        fetch(site)
    (noted,) = [one.body for one in entries_of(site) if one.kind == "fetched"]
    assert (noted["end"], noted["found"]) == ("CLO-250", 0)

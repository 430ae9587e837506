"""What is fetched from an archive, when it is whole, and how it lies on the disk."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cloister_fl.client.cli import client_group
from cloister_fl.client.data.loading import freeze, load_frozen, read_cohort
from cloister_fl.client.pacs import fetch as fetching
from cloister_fl.client.pacs.fetch import Fetched, fetch, set_secret
from cloister_fl.client.pacs.sealed_store import Store
from cloister_fl.client.preflight.data_check import inspect, render
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import init_site, open_site
from cloister_fl.errors import (
    ArchiveRefused,
    FetchUnfinished,
    FileUnreadable,
    OptionInvalid,
    OutputInTheWay,
    Reject,
)
from support import studies
from support.dicom import radiograph
from support.dicomweb_archive import CANARY, SECRET, Archive, asking_site, instances, serving, shut
from support.errors import is_of, raises

pytestmark = pytest.mark.process

STUDY = studies.study()


@pytest.fixture
def archive() -> Iterator[Archive]:
    with serving() as kept:
        yield kept


def test_what_fits_is_fetched_once_and_read(tmp_path: Path, archive: Archive) -> None:
    site = asking_site(tmp_path, archive.url)
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
from cloister_fl.client.site.folder import init_site, open_site
from cloister_fl.client.pacs.fetch import fetch

def die(done, _):
    if done == 6:
        os.kill(os.getpid(), signal.SIGKILL)

fetch(open_site(Path(sys.argv[1])), progress=die)
"""


def test_a_part_of_what_fits_is_not_frozen(tmp_path: Path, archive: Archive) -> None:
    """Killed in the middle: what is there is no data set, and a study would be held to it."""
    site = asking_site(tmp_path, archive.url)
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
    new = instances(5)
    archive.misbehave = {key[2]: shut for key in new.keys() - archive.instances.keys()}
    archive.instances.update(new)
    with raises(ArchiveRefused):
        fetch(site)
    assert len(load_frozen(site, STUDY).images) == 8


def test_the_end_of_another_query_makes_no_data_whole(tmp_path: Path, archive: Archive) -> None:
    site = asking_site(tmp_path, archive.url)
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
    site = asking_site(tmp_path, archive.url)
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
    site = asking_site(tmp_path, archive.url)
    second: list[str] = []

    def meanwhile(*_: int) -> None:
        with raises(FetchUnfinished, match="Another fetch") as caught:
            fetch(site)
        second.append(caught.value.code)

    assert fetch(site, progress=meanwhile).new == 8
    assert second == ["CLO-253"] * 8


def test_what_a_kill_left_in_the_store_is_removed(tmp_path: Path, archive: Archive) -> None:
    site = asking_site(tmp_path, archive.url)
    fetch(site)
    torn = site.store / ".0123456789abcdef.tmp"
    torn.write_bytes(bytes(1000))
    assert fetch(site) == Fetched(8, 0, 8, 0)
    assert not torn.exists()


def test_a_fetch_leaves_room_for_the_ledger(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = asking_site(tmp_path, archive.url)
    with monkeypatch.context() as small:
        small.setattr(fetching, "FREE_BYTES", 1 << 60)
        with pytest.raises(OutputInTheWay, match="nearly full"):
            fetch(site)
    assert fetch(site) == Fetched(8, 8, 0, 0)


@pytest.mark.usefixtures("silenced")
def test_nothing_plain_lies_on_the_disk(
    tmp_path: Path, archive: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    site = asking_site(tmp_path, archive.url, "token")
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
    site = asking_site(tmp_path, archive.url, auth)
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
    site = asking_site(tmp_path, archive.url, "token")
    with raises(OptionInvalid):
        set_secret(site, secret)
    assert not (site.keys / "archive.secret").exists()


def test_a_stored_file_that_was_altered_is_turned_away(tmp_path: Path, archive: Archive) -> None:
    site = asking_site(tmp_path, archive.url)
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
        store.put(("1", "1.2", "1.2.3"), b"data")
        assert ("1", "1.2", "1.2.3") in store
        assert ("1", "1.2", "1.2.4") not in store
        assert [one.read() for one in store.items()] == [b"data"]
    names = [next((tmp_path / str(number)).iterdir()).name for number in range(2)]
    assert names[0] != names[1]


def test_one_instance_listed_under_two_patients_is_kept_of_both(tmp_path: Path) -> None:
    """Whoever was listed first kept the other's image out of the store."""
    store = Store(tmp_path, bytes(32))
    store.put(("1", "1.2", "1.2.3"), b"of one")
    assert ("2", "2.2", "1.2.3") not in store
    store.put(("2", "2.2", "1.2.3"), b"of another")
    assert sorted(one.read() for one in store.items()) == [b"of another", b"of one"]


def test_the_command(tmp_path: Path, archive: Archive) -> None:
    site = asking_site(tmp_path, archive.url, "basic")
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
